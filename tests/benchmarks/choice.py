"""Part ``choice``: cost and seams against tile size and overlap, with the demonstration model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from xchmv2.datasets import synthetic_forest
from xchmv2.model.files import DEMO, DEMO_FOLDER, OVERLAP, TILE

from .model import ours_forward, tiles
from .published import Forward
from .report import Table
from .scene import predicted
from .settings import Settings
from .timing import Action, interleave

# Private imports: defaults of the published checkpoint, and the demonstration's folder.

#: Sides of the tiles, and shares of a tile that neighbours have in common.
TILES = (128, 224, 320, 448)
SHARES = (0.0, 1 / 14, 1 / 7, 1 / 4, 1 / 2)


def measure_choice(settings: Settings) -> list[Table]:
    """Predict a synthetic forest with several tiles and overlaps, by the demonstration model.

    Parameters
    ----------
    settings : Settings
        Side of the scene and device.

    Returns
    -------
    list of Table
        One row per tile and overlap.
    """
    settings = replace(settings, checkpoint=str(DEMO_FOLDER), config=DEMO, batch=1)
    sides = [tile for tile in TILES if tile <= settings.side]
    forward = ours_forward(settings, settings.dtype)
    inputs = {tile: tiles(replace(settings, tile=tile)) for tile in sides}
    with torch.inference_mode():
        times = interleave(
            {str(tile): _forward(forward, pixels) for tile, pixels in inputs.items()},
            settings.runs,
            device=settings.device,
            clock=settings.timer,
        )
    seconds = {tile: times.median(str(tile)) for tile in sides}
    shape = (settings.side, settings.side)
    forest = synthetic_forest(shape, times=["2020-07-01"], seed=10).isel(time=0)
    rows = [row for tile in sides for row in _tile_rows(settings, forest, tile, seconds[tile])]
    base = _base_cost(settings, seconds)
    for row in rows:
        row["cost"] = row["s/Mpx"] / base
    title = f"Tile and overlap: demo on a synthetic forest of {settings.side} x {settings.side} px"
    return [Table("choice", title, rows, _NOTES)]


def _tile_rows(
    settings: Settings, forest: xr.Dataset, tile: int, seconds: float
) -> list[dict[str, Any]]:
    """Heights of one tile size with each overlap, against those with half a tile of it."""
    truth = forest["canopy_height"].values
    cube = forest[["red", "green", "blue"]].to_dataarray("band")
    cube = cube.assign_attrs(grid_mapping="spatial_ref")
    overlaps = [round(share * tile) for share in SHARES]
    found = {
        overlap: predicted(
            settings, cube, tile=tile, overlap=overlap, block=max(settings.side, tile)
        ).values
        for overlap in overlaps
    }
    best = found[overlaps[-1]]
    rows = []
    for overlap in overlaps:
        change = np.abs(found[overlap] - best)
        rows.append(
            {
                "tile [px]": tile,
                "overlap [px]": overlap,
                "tiles/Mpx": 1e6 / (tile - overlap) ** 2,
                "s/Mpx": seconds * 1e6 / (tile - overlap) ** 2,
                "cost": 0.0,
                "RMS change [m]": float(np.sqrt(np.mean(change**2))),
                "99.9 % below [m]": float(np.quantile(change, 0.999)),
                "MAE to truth [m]": float(np.abs(found[overlap] - truth).mean()),
            }
        )
    return rows


def _base_cost(settings: Settings, seconds: dict[int, float]) -> float:
    """Seconds per megapixel of the settings' tile, or of the largest that was measured."""
    tile = settings.tile if settings.tile in seconds else max(seconds)
    overlap = round(tile * OVERLAP / TILE)
    return seconds[tile] * 1e6 / (tile - overlap) ** 2


def _forward(forward: Forward, pixels: torch.Tensor) -> Action:
    return lambda: forward(pixels)


_NOTES = (
    "Cost: time per pixel of the forwards in a large scene, in units of the default tile and "
    "overlap. Change: heights against those of the same tile with half a tile of overlap. The "
    "demonstration model was trained on crops of 128 px and sees less far than the published one."
)
