"""The heights of single pixels over time, as columns of dates: what events and trends share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.raster import spatial_dims

_Function = Callable[[npt.NDArray[np.float64]], Iterable[npt.NDArray[Any]]]
# Numbers in one temporary array; a task holds about twenty of them.
_SLAB = 500_000


def map_series(
    function: _Function,
    array: xr.DataArray,
    dim: str,
    dtypes: Sequence[Any],
    *,
    per_pixel: int,
) -> Sequence[xr.DataArray]:
    """Reduce the heights of each pixel to several numbers (y, x), of some data types.

    Lazy if the heights are, with all dates in one chunk. Beside the heights a task holds its
    results and a bounded number of temporary values; `per_pixel` is the size of the largest array
    of these.
    """
    array = array.transpose(dim, *spatial_dims(array))
    if array.chunks is not None:
        array = array.chunk({dim: -1})
    found: Sequence[xr.DataArray] = xr.apply_ufunc(
        _by_slabs,
        array,
        kwargs={"function": function, "dtypes": dtypes, "slab": max(1, _SLAB // per_pixel)},
        input_core_dims=[[dim]],
        output_core_dims=[[]] * len(dtypes),
        dask="parallelized",
        keep_attrs=True,  # also those of coordinates, which hold the CRS
        output_dtypes=dtypes,
    )
    return found


def _by_slabs(
    heights: npt.NDArray[Any],
    function: _Function,
    dtypes: Sequence[Any],
    slab: int,
) -> tuple[npt.NDArray[Any], ...]:
    """Reduce a block (y, x, time), some pixels at a time."""
    columns = np.moveaxis(heights, -1, 0).reshape(heights.shape[-1], -1)
    out = [np.empty(columns.shape[1], dtype) for dtype in dtypes]
    for start in range(0, columns.shape[1], slab):
        chosen = slice(start, start + slab)
        part = columns[:, chosen].astype(np.float64)
        for layer, found in zip(out, function(part), strict=True):
            layer[chosen] = found
    return tuple(layer.reshape(heights.shape[:-1]) for layer in out)


def pick(rows: npt.NDArray[Any], index: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return one number of each column, the nearest one for an index outside."""
    inside = np.clip(index, 0, len(rows) - 1).astype(np.intp)
    picked: npt.NDArray[Any] = np.take_along_axis(rows, inside[None], axis=0)[0]
    return picked
