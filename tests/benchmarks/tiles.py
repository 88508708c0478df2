"""Part ``tiles``: nothing is forwarded twice, what small batches cost, and which tile to choose."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from xchmv2.inference import tiles_forwarded
from xchmv2.raster import BLOCK, TileAxis, tile_runs

from .imagery import ORIGIN, as_cube, noise
from .model import ours_forward, tiles
from .networks import write_checkpoint
from .published import Forward
from .report import Table
from .scene import predicted, scene_axes
from .settings import Settings
from .timing import Action, interleave

# Blocks along each axis of the scene whose batches are counted.
_BLOCKS = 8
_LARGEST = 64


def measure_tiles(settings: Settings) -> list[Table]:
    """Count tiles, and time the small batches of groups at borders and corners of blocks.

    Parameters
    ----------
    settings : Settings
        Which network, tile and device.

    Returns
    -------
    list of Table
        Tiles by chunking; batches by size.
    """
    return [count_tiles(), time_batches(settings), time_blocks(settings)]


def count_tiles() -> Table:
    """Forward one scene under several chunkings and count, with a network that costs nothing.

    Returns
    -------
    Table
        One row per chunking.
    """
    side = 640
    image = noise(side)
    image[:, :, side // 3 :] = 0  # nodata: two thirds of the scene
    with TemporaryDirectory() as folder:
        checkpoint = str(write_checkpoint("tiny", Path(folder)))
        settings = Settings(checkpoint, "tiny", tile=64, overlap=9, side=side, batch=8)
        needed, whole = needed_tiles(settings, (image != 0).any(axis=0))
        rows = [
            _counted(settings, as_cube(image), chunk, block, needed, whole)
            for chunk, block in ((640, 640), (128, 128), (100, 200), (37, 64), (640, 91))
        ]
    title = f"Tiles forwarded: {side} x {side} px, two thirds nodata, tile 64, overlap 9"
    return Table("tiles", title, rows, "Needed: tiles of the grid that hold a valid pixel.")


def needed_tiles(settings: Settings, valid: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Count the tiles that hold a valid pixel, by a plain loop, and all tiles."""
    spans = [list(zip(axis.starts, axis.stops, strict=True)) for axis in scene_axes(settings)]
    held = [bool(valid[slice(*y), slice(*x)].any()) for y, x in product(*spans)]
    return sum(held), len(held)


def time_batches(settings: Settings) -> Table:
    """Time batches of every size up to the device's own, and add up those of a large scene.

    Parameters
    ----------
    settings : Settings
        Which network, tile and device.

    Returns
    -------
    Table
        One row per largest batch: time per tile if all batches were full, and what groups add.
    """
    forward = ours_forward(settings, settings.dtype)
    largest = max(settings.batch, 4)
    sizes = [2**power for power in range(_LARGEST.bit_length()) if 2**power <= largest]
    pixels = tiles(settings, largest)
    actions = {str(size): _forward(forward, pixels[:size]) for size in sizes}
    with torch.inference_mode():
        times = interleave(actions, settings.runs, device=settings.device, clock=settings.timer)
    seconds = {size: times.median(str(size)) for size in sizes if str(size) in times.seconds}
    groups = group_sizes(settings.tile, settings.overlap, BLOCK, _BLOCKS)
    rows = [
        {
            "batch": size,
            "ms/tile, full batches": 1e3 * seconds[size] / size,
            "forwards": sum(-(-held // size) * count for held, count in groups.items()),
            "forwards, full batches": -(-_members(groups) // size),
            "time added": cost_of_groups(groups, size, seconds) - 1,
        }
        for size in seconds
    ]
    title = (
        f"Small batches: {settings.config}, tile {settings.tile}, overlap {settings.overlap}, "
        f"{_BLOCKS} x {_BLOCKS} blocks of {BLOCK} px"
    )
    return Table("tiles", title, rows, _BATCH_NOTES)


def time_blocks(settings: Settings) -> Table:
    """Time a scene in four blocks, with groups at their borders, against the same in one block.

    Parameters
    ----------
    settings : Settings
        Which network, scene, tile, batch and device.

    Returns
    -------
    Table
        One row each.
    """
    cube = as_cube(noise(settings.side)).chunk()
    actions = {
        name: _compute(settings, cube, block)
        for name, block in (("one", max(settings.side, settings.tile)), ("four", settings.block))
    }
    times = interleave(actions, settings.runs, device=settings.device, clock=settings.timer)
    rows = [
        {
            "blocks": name,
            "s/Mpx": times.median(name) / (settings.side**2 / 1e6),
            "time added": 1 / times.ratio(name, "one") - 1,
        }
        for name in actions
    ]
    title = (
        f"Blocks measured: {settings.config}, {settings.side} x {settings.side} px, tile "
        f"{settings.tile}, overlap {settings.overlap}, batch {settings.batch}"
    )
    return Table("tiles", title, rows, "predict().compute() of the whole scene.")


def group_sizes(tile: int, overlap: int, block: int, blocks: int) -> Counter[int]:
    """Count the groups of a square scene by how many tiles they hold.

    Parameters
    ----------
    tile, overlap, block : int
        The grid [px].
    blocks : int
        Blocks along each axis.

    Returns
    -------
    Counter
        Number of groups by number of tiles.
    """
    axes = [TileAxis(blocks * block, tile, overlap, origin) for origin in ORIGIN]
    runs = [[run.last - run.first + 1 for run in tile_runs(axis, block)] for axis in axes]
    return Counter(y * x for y, x in product(*runs))


def cost_of_groups(groups: Counter[int], batch: int, seconds: dict[int, float]) -> float:
    """Time of a scene's batches, in units of the same tiles in full batches.

    Parameters
    ----------
    groups : Counter
        Number of groups by number of tiles.
    batch : int
        Most tiles per forward.
    seconds : dict
        Measured time by batch size [s]; sizes in between are interpolated.
    """
    known = sorted(seconds)
    spent = 0.0
    for size, count in groups.items():
        full, rest = divmod(size, batch)
        tail = float(np.interp(rest, known, [seconds[k] for k in known])) if rest else 0.0
        spent += count * (full * seconds[batch] + tail)
    return spent / (_members(groups) * seconds[batch] / batch)


def _counted(
    settings: Settings, cube: xr.DataArray, chunk: int, block: int, needed: int, whole: int
) -> dict[str, Any]:
    lazy = cube.chunk(y=chunk, x=chunk).assign_attrs(nodata=0)
    before = tiles_forwarded()
    predicted(replace(settings, device="cpu"), lazy, block=block).compute(scheduler="sync")
    forwarded = tiles_forwarded() - before
    return {
        "chunk": chunk,
        "block": block,
        "tiles of the grid": whole,
        "needed": needed,
        "forwarded": forwarded,
        "forwarded / needed": forwarded / needed,
    }


def _forward(forward: Forward, pixels: torch.Tensor) -> Action:
    return lambda: forward(pixels)


def _compute(settings: Settings, cube: xr.DataArray, block: int) -> Action:
    return lambda: predicted(settings, cube, block=block).compute()


def _members(groups: Counter[int]) -> int:
    """Tiles in all groups."""
    return sum(size * count for size, count in groups.items())


_BATCH_NOTES = (
    "A group of tiles is forwarded by itself, so its last batch may be small. Time added: beyond "
    "that of the same tiles in full batches across groups, from the measured time of each batch "
    "size (sizes in between interpolated)."
)
