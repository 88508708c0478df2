"""Which tiles will be skipped, as far as that is known without reading or computing anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2._dask import Job
from xchmv2.imagery import Scene, WindowReader
from xchmv2.tiling import TileRun


@dataclass(frozen=True)
class Skipped:
    """Tiles that hold no valid pixel, and so never reach the network.

    Parameters
    ----------
    tiles : int
        How many, over all dates.
    exact : bool
        False where only a mask is known, so that there may be more.
    """

    tiles: int
    exact: bool


def count_skipped(scene: Scene, job: Job, reader: WindowReader) -> Skipped | None:
    """Count the tiles without a valid pixel.

    Parameters
    ----------
    scene : Scene
        Imagery and mask; only what is in memory is looked at.
    job : Job
        The tile grid.
    reader : WindowReader
        The rule for validity.

    Returns
    -------
    Skipped or None
        None where it takes reading the imagery to know.
    """
    never = reader.valid_pixels.never_invalid([band.array.dtype for band in scene.bands])
    if never and scene.mask is None:
        return Skipped(0, exact=True)
    mask_known = scene.mask is None or _in_memory(scene.mask)
    known = not never and mask_known and all(_in_memory(band.array) for band in scene.bands)
    if not known and (scene.mask is None or not mask_known):
        return None
    if not known:  # the mask alone: as if all bands were valid everywhere
        rule = replace(reader.valid_pixels, nodata=(None, None, None))
        reader = replace(reader, valid_pixels=rule)
    tiles = sum(
        _count_in_date(_Plane(scene, date, known), job, reader)
        for date in np.ndindex(scene.template.shape[:-2])
    )
    return Skipped(tiles, exact=known or never)


@dataclass(frozen=True, eq=False)
class _Plane:
    """One date of what is in memory."""

    scene: Scene
    date: tuple[int, ...]
    with_bands: bool

    def bands(self, where: tuple[slice, slice]) -> list[npt.NDArray[Any]]:
        """Red, green and blue (H, W), or zeros in their place."""
        if not self.with_bands:
            shape = [cut.stop - cut.start for cut in where]
            return [np.broadcast_to(np.uint8(0), shape)] * 3
        found = []
        for band in self.scene.bands:
            index = () if band.index is None else (band.index,)
            key: Any = (*self.date, *index, *where)
            found.append(band.array.values[key])
        return found

    def mask(self, where: tuple[slice, slice]) -> npt.NDArray[np.bool_] | None:
        """Pixels declared valid (H, W)."""
        if self.scene.mask is None:
            return None
        key: Any = (*self.date, *where)
        mask: npt.NDArray[np.bool_] = self.scene.mask.values[key]
        return mask


def _count_in_date(plane: _Plane, job: Job, reader: WindowReader) -> int:
    """Go through the groups as the tasks will, so that no more is held than they hold."""
    return sum(_count_in_group(plane, rows, cols, reader) for rows, cols in product(*job.runs))


def _count_in_group(plane: _Plane, rows: TileRun, cols: TileRun, reader: WindowReader) -> int:
    target = ((rows.start, rows.stop), (cols.start, cols.stop))
    y, x = (slice(*reader.source_span(axis, *span)) for axis, span in enumerate(target))
    valid = reader.valid(plane.bands((y, x)), plane.mask((y, x)), target)
    return sum(not valid[ys, xs].any() for (ys, _), (xs, _) in product(rows.tiles, cols.tiles))


def _in_memory(array: xr.DataArray) -> bool:
    """Whether an array's values are there; of a file opened without dask they may not be."""
    return bool(getattr(array.variable, "_in_memory", False))
