"""Moving a raster by a fraction of a pixel, with missing data that stays where it belongs."""

from __future__ import annotations

import math
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

# Shifts are rounded to this before they are applied: more says nothing, and 0 stays 0 [px].
_STEP = 1e-3
# An interpolated pixel is valid if at least this share of what it is made of is.
_LEAST_VALID = 0.5


def shift_plane(plane: Any, dy: float, dx: float) -> Any:
    """Take the value of each pixel from (row + dy, column + dx), interpolated bilinearly.

    Parameters
    ----------
    plane : ndarray or dask array of float, shape (H, W)
        NaN is missing.
    dy, dx : float
        Where to take values from [px].

    Returns
    -------
    ndarray or dask array
        Of the same shape, dtype and chunks. Missing pixels take no part in their neighbours: a
        pixel is the weighted mean of the valid ones among the four it lies between, and missing
        if these weigh less than half. So is what comes from beyond the edge.
    """
    rows, cols = (round(v / _STEP) * _STEP for v in (dy, dx))
    if rows == 0 and cols == 0:
        return plane
    if not isinstance(plane, da.Array):
        return _shift(plane, rows, cols)
    return _shift_lazily(plane, rows, cols)


def _shift_lazily(plane: da.Array, dy: float, dx: float) -> da.Array:
    """Shift chunk by chunk, each with as much around it as it needs."""
    depth = {axis: math.ceil(abs(v)) + 1 for axis, v in enumerate((dy, dx))}
    roomy = plane.rechunk(
        {axis: _at_least(plane.chunks[axis], margin) for axis, margin in depth.items()}
    )
    # An axis of one chunk needs no neighbours, and may be narrower than the shift.
    depth = {axis: m if roomy.numblocks[axis] > 1 else 0 for axis, m in depth.items()}
    moved = roomy.map_overlap(
        _shift,
        dy=dy,
        dx=dx,
        depth=depth,
        boundary=np.nan,
        allow_rechunk=False,
        dtype=plane.dtype,
        meta=np.empty((0, 0), plane.dtype),
    )
    return moved.rechunk(plane.chunks)


def _at_least(chunks: tuple[int, ...], margin: int) -> tuple[int, ...]:
    """Join chunks that are narrower than a margin with their neighbours."""
    joined: list[int] = []
    for size in chunks:
        if joined and (joined[-1] < margin or size < margin):
            joined[-1] += size
        else:
            joined.append(size)
    return tuple(joined)


def _shift(plane: npt.NDArray[Any], dy: float, dx: float) -> npt.NDArray[Any]:
    total = np.zeros(plane.shape, np.float64)
    weight = np.zeros(plane.shape, np.float64)
    valid = ~np.isnan(plane)
    filled = np.where(valid, plane, 0)
    row, col = math.floor(dy), math.floor(dx)
    for step_y, share_y in ((0, 1 - (dy - row)), (1, dy - row)):
        for step_x, share_x in ((0, 1 - (dx - col)), (1, dx - col)):
            share = round(share_y, 6) * round(share_x, 6)
            if share > 0:
                to, start = _slices(plane.shape, row + step_y, col + step_x)
                total[to] += share * filled[start]
                weight[to] += share * valid[start]
    enough = weight > _LEAST_VALID - 1e-9
    moved = np.full(plane.shape, np.nan, plane.dtype)
    np.divide(total, weight, out=moved, where=enough, casting="same_kind")
    return moved


def _slices(
    shape: tuple[int, ...], dy: int, dx: int
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where pixels go, and where from, for a step of whole pixels."""
    to, start = [], []
    for size, step in zip(shape, (dy, dx), strict=True):
        low, high = max(0, -step), min(size, size - step)
        high = max(low, high)
        to.append(slice(low, high))
        start.append(slice(low + step, max(low, high) + step))
    return tuple(to), tuple(start)
