"""Count how often stated intervals hold the truth: ``python -m tests.evaluation.intervals``.

Heights are simulated with errors of known distribution and correlation, and each interval that the
package prints is compared with what it is about.
"""

from __future__ import annotations

import argparse
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import geopandas
import numpy as np
import numpy.typing as npt
import pandas as pd
import rioxarray  # noqa: F401
import shapely
import xarray as xr
from scipy import fft

from xchmv2.change import (
    ComparisonWarning,
    ErrorModel,
    difference,
    events,
    loss_area,
    stable_bias,
    trend,
)
from xchmv2.raster import cell_areas
from xchmv2.zonal import zonal

Floats = npt.NDArray[np.float64]
#: Shares of the variance, and ranges [px]: 0 for errors of single pixels.
Parts = Sequence[tuple[float, float]]
Row = dict[str, Any]

#: Errors of several ranges: correlation function, and its parts.
CORRELATED: dict[str, tuple[str, Parts]] = {
    "white": ("sph", [(1, 0)]),
    "sph 20": ("sph", [(1, 20)]),
    "exp 60": ("exp", [(1, 60)]),
    "exp 200": ("exp", [(1, 200)]),
    "exp 600": ("exp", [(1, 600)]),
    "80 % sph 10, 20 % sph 300": ("sph", [(0.8, 10), (0.2, 300)]),
    "96 % sph 6, 4 % sph 400": ("sph", [(0.96, 6), (0.04, 400)]),
    "95 % white, 5 % sph 300": ("sph", [(0.95, 0), (0.05, 300)]),
}


def correlation(model: str, distance: Floats, reach: float) -> Floats:
    """Return the correlation of errors at distances; an exponential one is 0.05 at its range."""
    if not reach:
        return (distance == 0).astype(np.float64)
    if model == "exp":
        return np.exp(-3 * distance / reach)
    part = np.minimum(distance / reach, 1)
    return 1 - 1.5 * part + 0.5 * part**3


@cache
def _amplitudes(model: str, side: int, reach: float) -> npt.NDArray[np.float32]:
    away = np.minimum(np.arange(2 * side), 2 * side - np.arange(2 * side))
    known = correlation(model, np.hypot(away[:, None], away), reach)
    return np.sqrt(np.maximum(fft.fft2(known).real, 0)).astype(np.float32)


def two_fields(rng: np.random.Generator, side: int, noise: str) -> Floats:
    """Return two independent normal fields of variance 1, (2, side, side)."""
    model, parts = CORRELATED[noise]
    total = np.zeros((2, side, side))
    for share, reach in parts:
        if reach:
            each = rng.standard_normal((2, 2 * side, 2 * side), np.float32)
            waves = (each[0] + 1j * each[1]) * _amplitudes(model, side, reach)
            field = fft.fft2(waves, norm="ortho")[:side, :side]
            total += np.sqrt(share) * np.stack([field.real, field.imag])
        else:
            total += np.sqrt(share) * rng.standard_normal(total.shape)
    return total


def on_grid(values: Floats) -> xr.DataArray:
    """Return heights (..., y, x) on pixels of 1 m, the first axis as years from 2010 on."""
    height, width = values.shape[-2:]
    coords = {"y": 5e6 - 0.5 - np.arange(height), "x": 5e5 + 0.5 + np.arange(width)}
    dims = ("time", "y", "x")[3 - values.ndim :]
    if values.ndim == 3:
        coords["time"] = pd.date_range("2010-07-01", periods=len(values), freq="YS-JUL")
    array = xr.DataArray(values.astype("f4"), coords, dims, "canopy_height", {"units": "m"})
    return array.rio.write_crs(32633)


def forest(rng: np.random.Generator, side: int) -> Floats:
    """Return heights of a mixed forest, 20 m on average."""
    return np.clip(rng.gamma(4, 5, (side, side)), 3, 60)


def _rng(*names: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(names).encode()))


def _summary(held: Any, **told: Any) -> Row:
    held = np.asarray(held, np.float64)
    return {"runs": len(held), "coverage": float(held.mean()), **told}


# Errors by height, and of any distribution: standard deviation, and draws of variance 1.
PIXELS: dict[str, tuple[Callable[[Floats], Floats], Callable[..., Floats]]] = {
    "3 m": (lambda h: 3 + 0 * h, lambda rng, n: rng.standard_normal(n)),
    "0.15 h": (lambda h: 0.15 * h, lambda rng, n: rng.standard_normal(n)),
    "1 m + 0.1 h": (lambda h: 1 + 0.1 * h, lambda rng, n: rng.standard_normal(n)),
    "0.15 h, Laplace": (lambda h: 0.15 * h, lambda rng, n: rng.laplace(0, np.sqrt(0.5), n)),
    "1 m + 0.1 h, t3": (
        lambda h: 1 + 0.1 * h,
        lambda rng, n: rng.standard_t(3, n) / np.sqrt(3),
    ),
}
CLASSES = (3.0, 10.0, 15.0, 22.0, 30.0, 61.0)


def changed_patches(rng: np.random.Generator, side: int, share: float, width: int = 20) -> Any:
    """Return a mask of square patches that cover a share of a scene."""
    cells = rng.random((-(-side // width),) * 2)
    chosen = cells < np.quantile(cells, share) if share else cells < 0
    return np.kron(chosen, np.ones((width, width), bool))[:side, :side]


#: What happens to the heights of changed pixels.
CHANGES: dict[str, Callable[[Floats], Floats]] = {
    "thinned 6 m": lambda h: h - 6,
    "thinned 12 m": lambda h: h - 12,
    "halved": lambda h: h / 2,
    "cleared": lambda h: 0 * h,
    "grown 6 m": lambda h: h + 6,
}


def significance(runs: int, side: int = 400, kinds: Iterable[str] = PIXELS) -> Iterator[Row]:
    """Share of unchanged pixels that `difference` without sigma leaves insignificant, by height."""
    for noise in kinds:
        spread, draw = PIXELS[noise]
        for change, share in ((None, 0.0), ("cleared", 0.2), ("thinned 6 m", 0.2)):
            found: dict[tuple[float, float], list[float]] = {}
            for run in range(runs):
                rng = _rng("significance", noise, change, run)
                height = forest(rng, side)
                lost = changed_patches(rng, side, share)
                second = np.where(lost, CHANGES[change](height), height) if change else height
                before, after = (
                    np.clip(each + spread(each) * draw(rng, each.shape), 0, 140)
                    for each in (height, second)
                )
                seen = difference(on_grid(before), on_grid(after))["significant"].values
                for low, high in pairwise(CLASSES):
                    kept = (height >= low) & (height < high) & ~lost
                    found.setdefault((low, high), []).append(1 - seen[kept].mean())
            for (low, high), held in found.items():
                label = f"{share:.0%} {change}" if change else "unchanged"
                yield {
                    "interval": "difference",
                    "noise": noise,
                    "truth": f"{label}, {low:g} to {high:g} m",
                    **_summary(held),
                }


def offsets(
    runs: int,
    side: int = 400,
    kinds: Iterable[str] = ("3 m", "1 m + 0.1 h", "0.15 h, Laplace", "80 % sph 10, 20 % sph 300"),
    shares: Iterable[float] = (0.1, 0.2, 0.35),
) -> Iterator[Row]:
    """Share of offsets of `stable_bias` that are right to 0.25 m or said to be doubtful."""
    cases = [("unchanged", 0.0), *((change, share) for change in CHANGES for share in shares)]
    for noise in kinds:
        for change, share in cases:
            held, doubted = [], []
            for run in range(runs):
                rng = _rng("offset", noise, change, share, run)
                height = np.clip(rng.gamma(25, 1, (side, side)), 8, 60)
                lost = changed_patches(rng, side, share)
                second = CHANGES[change](height) if share else height
                second = 1.0 + np.where(lost, second, height)
                if noise in PIXELS:
                    spread, draw = PIXELS[noise]
                    errors = [spread(height) * draw(rng, height.shape) for _ in range(2)]
                else:
                    errors = list(2.0 * two_fields(rng, side, noise))
                pair = np.stack([height + errors[0], second + errors[1]])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ComparisonWarning)
                    found = stable_bias(on_grid(np.clip(pair, 0, 140)), apply=False).isel(time=1)
                doubted.append(bool(found["offset_doubt"] > 0.25))
                held.append(abs(float(found["offset"]) - 1.0) <= 0.25 or doubted[-1])
            label = f"{share:.0%} {change}" if share else change
            yield {
                "interval": "stable_bias",
                "noise": noise,
                "truth": label,
                **_summary(held, doubted=float(np.mean(doubted))),
            }


RADII = (10, 40, 120)


def true_error(noise: str, radius: float) -> float:
    """Return the standard deviation of the mean error over a disc, for variance 1 of a pixel."""
    model, parts = CORRELATED[noise]
    near = np.arange(-radius, radius) + 0.5
    disc = (np.hypot(near[:, None], near) <= radius).astype(np.float64)
    size = 2 * len(near)
    pairs = fft.irfft2(np.abs(fft.rfft2(disc, (size, size))) ** 2, (size, size))
    away = np.minimum(np.arange(size), size - np.arange(size)).astype(np.float64)
    distance = np.hypot(away[:, None], away)
    known = sum(share * correlation(model, distance, reach) for share, reach in parts)
    return float(np.sqrt((pairs * known).sum()) / disc.sum())


def means(
    runs: int, side: int = 512, kinds: Iterable[str] = CORRELATED, radii: Sequence[int] = RADII
) -> Iterator[Row]:
    """Intervals of the mean and net volume of discs, with sigma given, measured, and by model.

    Four discs of each radius lie in a scene. Of the errors, each date has 3 / sqrt(2) m.
    """
    centres = [(side * y, side * x) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    places = [(radius, y, x) for radius in radii for y, x in centres]
    shapes = [shapely.Point(5e5 + x, 5e6 - y).buffer(radius, 64) for radius, y, x in places]
    polygons = geopandas.GeoDataFrame(geometry=shapes, crs=32633)
    for noise in kinds:
        found: dict[str, list[Floats]] = {"given": [], "measured": []}
        alone: list[Floats] = []
        for run in range(runs):
            rng = _rng("mean", noise, run)
            height = 30 + forest(rng, side) / 2
            pair = [on_grid(height + 3 / np.sqrt(2) * e) for e in two_fields(rng, side, noise)]
            for sigma, rows in zip((3 / np.sqrt(2), None), found.values(), strict=True):
                change = difference(*pair, sigma=sigma)
                table = zonal(change, polygons, stats=("mean", "net_volume"))
                # The volume is the mean by the area, and so is its error.
                discs = np.pi * np.repeat(radii, len(centres)) ** 2
                error, volume = (table[f"{name}_se"].values for name in ("mean", "net_volume"))
                np.testing.assert_allclose(volume / discs, error, rtol=2e-3)
                rows.append(np.stack([table["mean"].values, error]))
            model = ErrorModel.read(change)
            assert model is not None
            stated = []
            for radius in radii:
                near = np.arange(-radius, radius) + 0.5
                disc = (np.hypot(near[:, None], near) <= radius).astype(np.float64)
                stated.append(model.standard_error(disc, (1.0, 1.0)))
            alone.append(np.stack([table["mean"].values, np.repeat(stated, len(centres))]))
        labelled = {f"zonal, sigma {name}": rows for name, rows in found.items()}
        for interval, rows in {**labelled, "ErrorModel.standard_error": alone}.items():
            mean, error = np.array(rows).transpose(1, 0, 2)
            for k, radius in enumerate(radii):
                own = np.s_[:, k * len(centres) : (k + 1) * len(centres)]
                held = np.abs(mean[own]) <= 1.96 * error[own]
                ratio = float(np.median(error[own])) / (3 * true_error(noise, radius))
                row = _summary(held.mean(axis=1), width=ratio)
                yield {"interval": interval, "noise": noise, "truth": f"disc of {radius} m", **row}


#: Loss [m] and sides of the square patches [px] on which it happens; of growth in the same way.
LOSSES: dict[str, tuple[tuple[float, int], ...]] = {
    "unchanged": (),
    "0.05 ha cleared": ((-23, 22),),
    "0.5 ha cleared": ((-23, 71),),
    "4 ha cleared": ((-23, 200),),
    "1 ha thinned 7 m": ((-7, 100),),
    "1 ha cleared, 1 ha grown": ((-23, 100), (8, 100)),
}
ERRORS: dict[str, tuple[float, str]] = {
    "1 m white": (1.0, "white"),
    "2.5 m white": (2.5, "white"),
    "2.5 m sph 20": (2.5, "sph 20"),
    "4 m sph 20": (4.0, "sph 20"),
    "4 m, 80 % sph 10, 20 % sph 300": (4.0, "80 % sph 10, 20 % sph 300"),
}


def losses(
    runs: int, side: int = 300, kinds: Iterable[str] = ERRORS, truths: Iterable[str] = LOSSES
) -> Iterator[Row]:
    """Intervals of the area and volume of loss of 5 m and more, with sigma given and measured."""
    for noise in kinds:
        sd, field = ERRORS[noise]
        for truth in truths:
            found: dict[str, list[tuple[float, ...]]] = {}
            for run in range(runs):
                rng = _rng("loss", noise, truth, run)
                height = np.clip(rng.normal(45, 4, (side, side)), 30, 60)
                after = height.copy()
                for k, (change, width) in enumerate(LOSSES[truth]):
                    place = np.s_[20 : 20 + width, 20 + 130 * k : 20 + 130 * k + width]
                    after[place] += change
                drop = height - after
                lost = np.where(drop >= 5, cell_areas(on_grid(height)).values, 0)  # UTM: not 1 m2
                true = {"area": lost.sum(), "volume": (lost * drop).sum()}
                errors = sd * two_fields(rng, side, field)
                pair = [on_grid(each) for each in (height + errors[0], after + errors[1])]
                for name, sigma in (("given", sd), ("measured", None)):
                    stated = loss_area(difference(*pair, sigma=sigma))
                    for kind, ends in (("area", ""), ("volume", "volume_")):
                        row = [float(stated[n]) for n in (kind, f"{ends}lower", f"{ends}upper")]
                        label = f"loss_area, {kind}, sigma {name}"
                        found.setdefault(label, []).append((float(true[kind]), *row))
            for interval, rows in found.items():
                given, middle, low, high = np.array(rows).T
                scatter = float(np.sqrt(np.mean((middle - given) ** 2)))
                ratio = float(np.median(high - low)) / 3.92 / (scatter if scatter > 1 else np.nan)
                row = _summary((low <= given) & (given <= high), width=ratio)
                yield {"interval": interval, "noise": noise, "truth": truth, **row}


def trends(runs: int, side: int = 40, dates: Iterable[int] = (3, 4, 5, 6, 8, 10, 15)) -> Any:
    """Intervals of the slope of `trend`: those of all pixels of a run."""
    draws = {"2.5 m": PIXELS["3 m"][1], "2.5 m, Laplace": PIXELS["0.15 h, Laplace"][1]}
    for noise, draw in draws.items():
        for number in dates:
            held, widths, scatter = [], [], []
            for run in range(runs):
                rng = _rng("trend", noise, number, run)
                height = on_grid(20 + 2.5 * draw(rng, (number, side, side)))
                years = (height["time"] - height["time"][0]) / np.timedelta64(31_557_600, "s")
                found = trend(height + 0.3 * years.astype("f4"))
                low, high, slope = (found[n].values for n in ("slope_low", "slope_high", "slope"))
                held.append(float(((low <= 0.3) & (high >= 0.3)).mean()))
                widths.append(float(np.median(high - low)) / 3.92)
                scatter.append(float(slope.std()))
            row = _summary(held, width=float(np.mean(widths) / np.mean(scatter)))
            yield {"interval": "trend", "noise": noise, "truth": f"{number} dates", **row}


def confirmed_losses(
    runs: int, side: int = 60, dates: Iterable[int] = (6, 8, 10, 15)
) -> Iterator[Row]:
    """Share of unchanged pixels of which `events` with sigma given confirms no loss."""
    for sd in (2.5, 4.0):
        for trouble in ("none", "10 % bad readings", "two bad dates"):
            for number in dates:
                held = []
                for run in range(runs):
                    rng = _rng("events", sd, trouble, number, run)
                    height = 20 + sd * rng.standard_normal((number, side, side))
                    if trouble == "10 % bad readings":
                        height[rng.random(height.shape) < 0.1] = 3
                    elif trouble == "two bad dates":
                        first = rng.integers(number - 1)
                        height[first : first + 2] = 3 + rng.standard_normal((2, side, side))
                    found = events(on_grid(np.maximum(height, 0)), sigma=sd)
                    held.append(float(1 - found["confirmed"].mean()))
                truth = f"unchanged, {trouble}, {number} dates".replace(", none", "")
                yield {"interval": "events", "noise": f"{sd} m", "truth": truth, **_summary(held)}


#: What is measured, by the name that ``--only`` takes.
TABLES: dict[str, Callable[[int], Iterable[Row]]] = {
    "significance": significance,
    "offsets": offsets,
    "means": means,
    "losses": losses,
    "trends": trends,
    "events": confirmed_losses,
}


def write_table(rows: Iterable[Row]) -> str:
    """Return rows as text: coverage is a share of 1, width the stated error over the true one."""
    return pd.DataFrame(list(rows)).round(3).to_string(index=False, na_rep="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each kind of interval."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.intervals")
    parser.add_argument("--runs", type=int, default=200, help="scenes of each row")
    parser.add_argument("--only", choices=list(TABLES), help="one of the tables")
    options = parser.parse_args(arguments)
    for name, measure in TABLES.items():
        if options.only in (None, name):
            print(f"\n{name}\n{write_table(measure(options.runs))}", flush=True)


if __name__ == "__main__":
    main()
