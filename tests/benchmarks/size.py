"""Part ``size``: cost per pixel and memory do not grow with the scene."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask

from xchmv2.inference import tiles_forwarded

from .imagery import generated
from .memory import in_child
from .report import Table
from .scene import predicted
from .settings import Settings
from .timing import synchronise

#: Factors of the scene's area.
AREAS = (1, 4, 16)


def measure_size(settings: Settings) -> list[Table]:
    """Write scenes of 1, 4 and 16 times the area to Zarr, each in a process of its own.

    Parameters
    ----------
    settings : Settings
        Which network, scene, tile and device.

    Returns
    -------
    list of Table
        One row per area.
    """
    rows: list[dict[str, Any]] = []
    for area in AREAS:
        side = settings.side * round(area**0.5)
        (seconds, forwarded), peak = in_child(
            write_scene, settings, side, device=settings.device, threads=settings.threads
        )
        per_pixel = seconds / (side**2 / 1e6)
        rows.append(
            {
                "area": f"{area} x",
                "side [px]": side,
                "tiles": forwarded,
                "s/Mpx": per_pixel,
                "ms/tile": 1e3 * seconds / forwarded,
                "per pixel, against 1 x": per_pixel / rows[0]["s/Mpx"] if rows else 1.0,
                "peak [MiB]": peak,
                "memory, against 1 x": peak / rows[0]["peak [MiB]"] if rows else 1.0,
            }
        )
    title = (
        f"Cost against size: {settings.config}, tile {settings.tile}, overlap "
        f"{settings.overlap}, block {settings.block}, imagery made as it is read, heights to Zarr"
    )
    return [Table("size", title, rows, _NOTES)]


def write_scene(settings: Settings, side: int) -> tuple[float, int]:
    """Predict a generated scene into a store; returns seconds and tiles forwarded.

    The model is loaded before the clock starts.
    """
    with TemporaryDirectory() as folder, dask.config.set(scheduler="threads"):
        small = predicted(settings, generated(settings.tile, settings.tile))
        small.compute()
        before = tiles_forwarded()
        synchronise(settings.device)
        begun = settings.timer()
        heights = predicted(settings, generated(side, settings.block))
        heights.chmv2.to_zarr(Path(folder) / "heights.zarr", progress=False)
        seconds = settings.timer() - begun
    return seconds, tiles_forwarded() - before


_NOTES = (
    "A small scene has relatively more tiles, because those at its edges move inward: time per "
    "tile is what should stay the same. Memory on the CPU is that of the whole process, "
    "Python, torch and the network included."
)
