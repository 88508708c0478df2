"""The forest of the demonstration: three dates, with clear-cuts and windthrow between them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from xchmv2.datasets import Disturbance, synthetic_forest
from xchmv2.datasets.events import Kind

TIMES = ("2019-07-01", "2021-08-25", "2024-07-10")
RESOLUTION = 0.6  # [m]
_CLOUDS = (0.0, 0.04, 0.0)
_LEFT, _TOP = 500_000.0, 5_300_000.0


def make_forest(seed: int, size: int) -> xr.Dataset:
    """Describe the imagery and its truth; nothing is made until it is computed.

    Parameters
    ----------
    seed : int
        Seed of the world.
    size : int
        Side of the scene [px].

    Returns
    -------
    Dataset
        As :func:`xchmv2.datasets.synthetic_forest` makes it, dask-backed, with the truth under
        the name `true_height` and `event_kind` as CF flags, which any Zarr reader understands.
    """
    forest = synthetic_forest(
        (size, size),
        resolution=RESOLUTION,
        times=TIMES,
        seed=seed,
        origin=(_LEFT, _TOP),
        disturbances=("clear_cut", "thinning", "windthrow", *_events(size * RESOLUTION)),
        clouds=_CLOUDS,
        chunks=size,
    )
    kinds, codes = np.unique(forest["event_kind"].values.astype(str), return_inverse=True)
    flags = {"flag_values": np.arange(kinds.size, dtype=np.int8), "flag_meanings": " ".join(kinds)}
    coded = ("event", codes.astype(np.int8), flags)
    return forest.rename(canopy_height="true_height").assign_coords(event_kind=coded)


def _events(side: float) -> list[Disturbance]:
    """Return events at set places of a square scene of some side [m], whatever its seed."""
    plan: list[tuple[Kind, str, float, float, float, float]] = [
        # kind, date, share of the side from the left and the top, share of the area, angle
        ("clear_cut", "2020-02-10", 0.33, 0.36, 0.075, 20.0),
        ("clear_cut", "2022-11-20", 0.66, 0.62, 0.095, -35.0),
        ("windthrow", "2023-02-20", 0.30, 0.74, 0.040, 60.0),
    ]
    return [
        Disturbance(
            kind,
            date,
            x=_LEFT + x * side,
            y=_TOP - y * side,
            area=share * side**2,
            angle=angle,
        )
        for kind, date, x, y, share, angle in plan
    ]
