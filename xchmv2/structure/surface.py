"""The canopy's surface: how much larger it is than the ground below it."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.areas import cell_sides
from xchmv2.imagery import find_grid

Array = npt.NDArray[Any]

#: The neighbours that share a side with a pixel, as steps in rows and columns.
_SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))


def surface_ratio(height: xr.DataArray) -> xr.DataArray:
    """Divide the area of the canopy's surface over each pixel by that of the pixel.

    Parameters
    ----------
    height : DataArray
        Heights [m] of two spatial dims and any others, as floats.

    Returns
    -------
    DataArray
        At least 1; NaN where the pixel or one of its eight neighbours is missing. Lazy
        if the heights are.

    References
    ----------
    Jenness (2004), Wildlife Society Bulletin 32(3), 829-839: eight triangles to the neighbours.
    """
    grid = find_grid(height).dims
    ordered = height.transpose(..., *grid)
    tall, wide = cell_sides(ordered)
    if height.chunks is None:
        margin = [(0, 0)] * (height.ndim - 2) + [(1, 1), (1, 1)]
        padded = np.pad(ordered.values, margin, constant_values=np.nan)
        data: Any = _ratio(padded, tall.values, wide.values)
    else:
        data = _lazy(ordered.data, tall.data, wide.data)
    return ordered.copy(data=data).transpose(*height.dims)


def _lazy(height: da.Array, tall: da.Array, wide: da.Array) -> da.Array:
    index = tuple(range(height.ndim))
    depth = {axis: int(axis >= height.ndim - 2) for axis in index}
    boundary = {axis: np.nan if reach else "none" for axis, reach in depth.items()}
    padded = da.overlap.overlap(height, depth, boundary)
    return da.blockwise(
        _ratio,
        index,
        padded,
        index,
        tall,
        index[-2:],
        wide,
        index[-2:],
        adjust_chunks=dict(enumerate(height.chunks)),
        align_arrays=False,
        dtype=height.dtype,
        meta=np.empty((0,) * height.ndim, height.dtype),
    )


def _ratio(padded: Array, tall: Array, wide: Array) -> Array:
    """Task: the ratio of one block, whose heights have a margin of one pixel.

    Each triangle has its corners at the centres of the pixel, of a neighbour that shares a side
    with it, and of one beside that which shares a corner: it rises along one axis by the first
    step and along the other by the second. The part that lies on the pixel is as steep.
    """
    rows, cols = padded.shape[-2] - 2, padded.shape[-1] - 2

    def moved(down: int, right: int) -> Array:
        return padded[..., 1 + down : 1 + down + rows, 1 + right : 1 + right + cols]

    tall, wide = tall.astype(padded.dtype), wide.astype(padded.dtype)
    total = np.zeros((*padded.shape[:-2], rows, cols), padded.dtype)
    for down, right in _SIDES:
        first, second = (tall, wide) if down else (wide, tall)
        flat = 1 + ((moved(down, right) - moved(0, 0)) / first) ** 2
        for turn in (-1, 1):
            corner = moved(down or turn, right or turn)
            total += np.sqrt(flat + ((corner - moved(down, right)) / second) ** 2)
    return total / 8
