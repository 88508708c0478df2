"""A mask in blocks of one plane each, and what lies on the same grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.areas import cell_areas
from xchmv2.errors import CHMv2Error
from xchmv2.imagery import find_grid
from xchmv2.patches.local import Rule, summarise


@dataclass(frozen=True, eq=False)
class Planes:
    """A mask in blocks of one plane each, and what lies on the same grid.

    Parameters
    ----------
    mask : dask.array.Array
        (..., y, x) bool; chunks of 1 along all dims before y and x.
    area : dask.array.Array
        (y, x) areas of cells in the mask's chunks.
    values : dict of dask.array.Array
        Quantities in the mask's chunks.
    dims : tuple
        Names of the mask's dims.
    leading : list of (name, ndarray)
        Coordinates of the dims before y and x.
    scheduler : dict
        How to compute: here and now if the mask was no dask array.
    """

    mask: da.Array
    area: da.Array
    values: dict[str, da.Array]
    dims: tuple[Hashable, ...]
    leading: list[tuple[str, npt.NDArray[Any]]]
    scheduler: dict[str, str]

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and columns of the blocks."""
        return self.mask.chunks[-2], self.mask.chunks[-1]

    def summaries(self, rule: Rule) -> da.Array:
        """Sum up the patches of each block: an array with one object per block."""
        index = tuple(range(self.mask.ndim))
        arrays = [array for value in self.values.values() for array in (value, index)]
        return da.blockwise(
            _summarise,
            index,
            self.mask,
            index,
            self.area,
            index[-2:],
            *arrays,
            names=tuple(self.values),
            rule=rule,
            adjust_chunks=dict.fromkeys(index, 1),
            align_arrays=False,
            dtype=object,
            meta=no_objects(self.mask.ndim),
        )

    def blockwise(self, task: Any, *sources: da.Array, rule: Rule, dtype: Any) -> da.Array:
        """Make an array in the mask's chunks from arrays with one block for each of them."""
        index = tuple(range(self.mask.ndim))
        arrays = [array for one in sources for array in (one, index)]
        return da.blockwise(
            task,
            index,
            *arrays,
            rule=rule,
            dtype=dtype,
            align_arrays=False,
            adjust_chunks=dict(enumerate(self.mask.chunks)),
            meta=np.empty((0,) * self.mask.ndim, dtype),
        )

    def wrap(self, data: da.Array, like: xr.DataArray) -> xr.DataArray:
        """Give an array the coordinates of the mask, and compute it if that was no dask array."""
        found = like.transpose(*self.dims).copy(
            data=data.compute(**self.scheduler) if self.scheduler else data
        )
        return found.transpose(*like.dims)


def read_planes(mask: xr.DataArray, values: Mapping[str, xr.DataArray]) -> Planes:
    """Cut a mask, and what lies on its grid, into blocks of one plane each.

    Parameters
    ----------
    mask : DataArray
        Boolean, of two spatial dims and any others.
    values : mapping of str to DataArray
        Quantities on the same grid.

    Returns
    -------
    Planes
        Lazy where they are.

    Raises
    ------
    CHMv2Error
        If the mask is not boolean, or values lie on another grid.
    """
    if mask.dtype != bool:
        raise CHMv2Error(
            "a boolean mask",
            f"{mask.dtype} values",
            "compare first: label_patches(height <= 10), or mask.astype(bool)",
        )
    grid = find_grid(mask).dims
    dims = (*(dim for dim in mask.dims if dim not in grid), *grid)
    turned = mask.transpose(*dims)
    data = _blocks(turned).rechunk(dict.fromkeys(range(mask.ndim - 2), 1))
    on_grid = {name: _blocks(_like(name, value, turned)) for name, value in values.items()}
    return Planes(
        mask=data,
        area=_blocks(cell_areas(mask)).rechunk(data.chunks[-2:]),
        values={name: value.rechunk(data.chunks) for name, value in on_grid.items()},
        dims=dims,
        leading=[(str(dim), turned[dim].values) for dim in dims[:-2]],
        scheduler={} if mask.chunks else {"scheduler": "synchronous"},
    )


def _blocks(array: xr.DataArray) -> da.Array:
    if array.chunks:
        return array.data
    return da.from_array(array.values, chunks=array.shape, name=False)


def _like(name: str, value: xr.DataArray, mask: xr.DataArray) -> xr.DataArray:
    """Bring a quantity to the mask's dims; both must lie on one grid."""
    try:
        value, _ = xr.align(value, mask, join="exact", copy=False)
        return value.broadcast_like(mask).transpose(*mask.dims)
    except ValueError as error:
        raise CHMv2Error(
            f"{name} on the mask's grid",
            f"sizes {dict(value.sizes)} against {dict(mask.sizes)}, or other coordinates",
            f"bring them together: {name}.odc.reproject(mask.odc.geobox)",
        ) from error


def no_objects(ndim: int) -> npt.NDArray[np.object_]:
    """Return what dask takes for an example of an array of objects."""
    return np.empty((0,) * ndim, object)


def boxed(value: Any, ndim: int) -> npt.NDArray[np.object_]:
    """Put one object into an array of one element."""
    flat = np.empty(1, object)
    flat[0] = value
    return flat.reshape((1,) * ndim)


def _summarise(
    mask: npt.NDArray[Any],
    area: npt.NDArray[Any],
    *values: npt.NDArray[Any],
    names: tuple[str, ...],
    rule: Rule,
) -> npt.NDArray[np.object_]:
    """Task: sum up the patches of one block."""
    planes = {n: v.reshape(area.shape) for n, v in zip(names, values, strict=True)}
    return boxed(summarise(mask.reshape(area.shape), area, planes, rule), mask.ndim)
