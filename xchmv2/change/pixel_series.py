"""The heights of single pixels over time, as columns of dates: what events and trends share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.raster import spatial_dims

# Numbers in one temporary array; a task holds about twenty of them.
_SLAB = 500_000


def map_series(
    function: Callable[..., Iterable[npt.NDArray[Any]]],
    array: xr.DataArray,
    dim: str,
    dtypes: Sequence[Any],
    *others: xr.DataArray,
    per_pixel: int,
) -> Sequence[xr.DataArray]:
    """Reduce the heights of each pixel to several numbers (y, x), of some data types.

    The function takes columns of dates: of the heights, and of the `others`, which have the dims
    of the heights or none. Lazy if the heights are, with all dates in one chunk. `per_pixel`, the
    size of the largest temporary array for one pixel, bounds what a task holds.
    """
    dims = (dim, *spatial_dims(array))
    arrays = [a.transpose(*dims) if a.ndim else a for a in (array, *others)]
    if array.chunks is not None:
        arrays = [a.chunk({dim: -1}) if a.ndim else a for a in arrays]
    found: Sequence[xr.DataArray] = xr.apply_ufunc(
        _by_slabs,
        *arrays,
        kwargs={"function": function, "dtypes": dtypes, "slab": max(1, _SLAB // per_pixel)},
        input_core_dims=[[dim] if a.ndim else [] for a in arrays],
        output_core_dims=[[]] * len(dtypes),
        dask="parallelized",
        keep_attrs=True,  # also those of coordinates, which hold the CRS
        output_dtypes=dtypes,
    )
    return found


def _by_slabs(
    *arrays: npt.NDArray[Any], function: Any, dtypes: Sequence[Any], slab: int
) -> tuple[npt.NDArray[Any], ...]:
    """Reduce a block of arrays (y, x, time) or (), some pixels at a time."""
    columns = [np.moveaxis(a, -1, 0).reshape(a.shape[-1], -1) if a.ndim else a for a in arrays]
    out = [np.empty(columns[0].shape[1], dtype) for dtype in dtypes]
    for start in range(0, columns[0].shape[1], slab):
        chosen = slice(start, start + slab)
        parts = [(c[:, chosen] if c.ndim else c).astype(np.float64) for c in columns]
        for layer, found in zip(out, function(*parts), strict=True):
            layer[chosen] = found
    return tuple(layer.reshape(arrays[0].shape[:-1]) for layer in out)


def pick(rows: npt.NDArray[Any], index: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return one number of each column, the nearest one for an index outside."""
    inside = np.clip(index, 0, len(rows) - 1).astype(np.intp)
    return np.asarray(np.take_along_axis(rows, inside[None], axis=0)[0])
