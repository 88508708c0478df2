"""Pairs of dates whose truth is known, and heights as a model would find them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import ndimage

from xchmv2.datasets import synthetic_forest

Floats = npt.NDArray[np.float64]

#: Forests of each scenario.
SEEDS = tuple(range(211, 221))

_SUMMER = ("2019-07-01", "2024-07-10")
_TURNING = ("2019-07-01", "2024-09-27")  # a third of the way from summer to autumn colours
_AUTUMN = ("2019-07-01", "2024-10-05")
_SHIFT = ((0.0, 0.0), (1.5, -2.2))


@dataclass(frozen=True)
class Scenario:
    """Two dates of a forest, and how their heights come about.

    Parameters
    ----------
    name : str
        What the table calls it.
    model : str, optional
        Model that predicts the heights from imagery; None for true heights with errors.
    times : tuple of str
        The two dates.
    shift : tuple of (dy, dx)
        Misregistration of each date [px].
    bias : float
        What the second date reads too high, where there are trees [m].
    noise : float
        Standard deviation of the errors of a date [m].
    disturbed : bool
        Whether anything happens between the dates, and trees grow.
    """

    name: str
    model: str | None = None
    times: tuple[str, str] = _SUMMER
    shift: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.0, 0.0))
    bias: float = 0.0
    noise: float = 2.5
    disturbed: bool = True


SCENARIOS = (
    Scenario("true + noise"),
    Scenario("true + noise, bias +1.5", bias=1.5),
    Scenario("true + noise, bias -1.5", bias=-1.5),
    Scenario("true + noise, shift", shift=_SHIFT),
    Scenario("true + noise, bias, shift", bias=1.5, shift=_SHIFT),
    Scenario("demo model", model="demo"),
    Scenario("demo model, shift", model="demo", shift=_SHIFT),
    Scenario("demo model, leaves turning, shift", model="demo", times=_TURNING, shift=_SHIFT),
)
#: Nothing happens and nothing grows; light, season and register differ.
UNDISTURBED = (
    Scenario("true + noise, bias, shift", bias=1.5, shift=_SHIFT, disturbed=False),
    Scenario("demo model, sun, shift", "demo", ("2019-07-01", "2024-07-10T15:30"), _SHIFT,
             disturbed=False),
    Scenario("demo model, leaves turning, shift", "demo", _TURNING, _SHIFT, disturbed=False),
)  # fmt: skip
#: Leaves have turned: the model itself fails, and no comparison of its heights mends that.
BEYOND = (Scenario("demo model, October, shift", "demo", _AUTUMN, _SHIFT, disturbed=False),)


def make_scene(scenario: Scenario, seed: int, side: int) -> tuple[xr.Dataset, xr.DataArray]:
    """Make the heights that a scenario gives, and the true ones.

    Parameters
    ----------
    scenario : Scenario
        How.
    seed : int
        Of forest and errors.
    side : int
        Side of the scene [px of 0.6 m].

    Returns
    -------
    found : Dataset
        ``canopy_height`` (time, y, x) [m]; of a model ``bin_spread`` too.
    truth : DataArray
        (time, y, x) heights [m].
    """
    if scenario.model is None:
        truth = _true_heights(scenario.times, scenario.disturbed, seed, side)
        return _disturb(truth, scenario, seed).to_dataset(name="canopy_height"), truth
    from xchmv2.predict import predict

    forest = _forest(scenario.times, scenario.disturbed, seed, side, shift_px=scenario.shift)
    imagery = forest[["red", "green", "blue"]]
    found = predict(imagery, scenario.model, layers=("height", "bin_spread"))
    assert isinstance(found, xr.Dataset)
    return found, forest["canopy_height"]


def _forest(
    times: tuple[str, str], disturbed: bool, seed: int, side: int, **options: Any
) -> xr.Dataset:
    forest = synthetic_forest(
        (side, side),
        times=times,
        seed=seed,
        disturbances="random" if disturbed else None,
        growth=disturbed,
        **options,
    )
    return forest.drop_vars(("shift_y", "shift_x"))


@functools.lru_cache(maxsize=len(SEEDS))
def _true_heights(times: tuple[str, str], disturbed: bool, seed: int, side: int) -> xr.DataArray:
    """Make true heights alone, without painting the imagery."""
    lazy = _forest(times, disturbed, seed, side, chunks=side)
    return lazy["canopy_height"].compute()


def _disturb(truth: xr.DataArray, scenario: Scenario, seed: int) -> xr.DataArray:
    """Add the errors of an imagined model: alike among neighbours, and none on open ground."""
    rng = np.random.default_rng([seed, 7])
    dates = []
    for k, (plane, shift) in enumerate(zip(truth.values, scenario.shift, strict=True)):
        moved = ndimage.shift(plane.astype(float), shift, order=1, mode="nearest")
        error = scenario.noise * _noise(plane.shape, rng) + k * scenario.bias
        ground = np.abs(rng.normal(0.0, 0.3, plane.shape))
        dates.append(np.where(moved > 0, np.clip(moved + error, 0.0, None), ground))
    return truth.copy(data=np.stack(dates).astype(np.float32))


def _noise(shape: Sequence[int], rng: np.random.Generator) -> Floats:
    """Return noise of unit variance: crowns (2.4 m) and stands (24 m) that are off together."""
    parts = [ndimage.gaussian_filter(rng.normal(size=shape), s, mode="wrap") for s in (4.0, 40.0)]
    crowns, stands = (part / part.std() for part in parts)
    mixed: Floats = 0.9 * crowns + np.sqrt(1 - 0.9**2) * stands
    return mixed
