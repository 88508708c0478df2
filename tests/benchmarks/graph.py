"""Part ``graph``: what it costs to plan a large cube."""

from __future__ import annotations

import math
import pickle
import time
from typing import Any

import dask.array as da

from .imagery import as_cube
from .memory import in_child, peak_memory
from .report import Table
from .scene import predicted
from .settings import Settings

#: Sides of the blocks [px].
BLOCKS = (4096, 2048)


def measure_graph(settings: Settings) -> list[Table]:
    """Plan a large cube; nothing is computed and no model is loaded.

    Parameters
    ----------
    settings : Settings
        Sides, dates and tiles.

    Returns
    -------
    list of Table
        One row per block size.
    """
    rows: list[dict[str, Any]] = []
    for block in BLOCKS:
        found, _ = in_child(plan_cube, settings, block, device="cpu", threads=settings.threads)
        rows.append({"block": block, **found})
    title = (
        f"Graph of {settings.graph_side} x {settings.graph_side} px x {settings.graph_dates} "
        f"dates: tile {settings.tile}, overlap {settings.overlap}"
    )
    return [Table("graph", title, rows, _NOTES)]


def plan_cube(settings: Settings, block: int) -> dict[str, Any]:
    """Plan, and measure the plan."""
    side, dates = settings.graph_side, settings.graph_dates
    bands = da.zeros((dates, 3, side, side), chunks=(1, 3, block, block), dtype="uint8")
    cube = as_cube(bands)
    before = peak_memory("cpu")
    begun = time.perf_counter()
    heights = predicted(settings, cube, block=block, device="cpu")
    seconds = time.perf_counter() - begun
    memory = peak_memory("cpu") - before
    own = {k: v for k, v in dict(heights.data.dask).items() if "chmv2" in str(k)}
    blocks = dates * math.ceil(side / block) ** 2
    return {
        "blocks": blocks,
        "tasks": len(own),
        "tasks/block": len(own) / blocks,
        "build [s]": seconds,
        "memory [MiB]": memory,
        "pickled [MiB]": len(pickle.dumps(own, protocol=5)) / 2**20,
    }


_NOTES = (
    "Tasks without those that read the imagery. Memory: what the process grew by while planning; "
    "pickled: what goes to a scheduler."
)
