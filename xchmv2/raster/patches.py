"""Connected components of a mask for any chunking: labels, a table, and a sieve by area."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.array.overlap import ensure_minimum_chunksize
from dask.base import tokenize
from dask.graph_manipulation import checkpoint
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from xchmv2.errors import CHMv2Error
from xchmv2.raster.arguments import is_whole, show, validate_number
from xchmv2.raster.components import (
    KIND,
    SURE,
    Connectivity,
    Integers,
    Moments,
    PatchNumbers,
    Rule,
    Summary,
    add_up,
    summarise,
)
from xchmv2.raster.grid import find_grid, on_same_coordinates
from xchmv2.raster.ground import cell_areas
from xchmv2.raster.labels import label_quantity

if TYPE_CHECKING:
    import pandas as pd

_Array = npt.NDArray[Any]
_Objects = npt.NDArray[np.object_]
_Chunks = tuple[tuple[int, ...], tuple[int, ...]]
_Packed = tuple[tuple[int, ...], Any, list[_Array]]

#: Side of the blocks that masks in memory are divided into [px].
_SIDE = 2048


def label_patches(
    mask: xr.DataArray,
    values: Mapping[str, xr.DataArray] | None = None,
    *,
    connectivity: Connectivity = 8,
    min_area: float | None = None,
    max_area: float | None = None,
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Label the connected patches of a mask, and summarise the values in each.

    Parameters
    ----------
    mask : DataArray
        Boolean, of two spatial dims and any others, such as time; each plane is labelled
        separately.
    values : mapping of str to DataArray, optional
        Quantities on the same grid to summarise per patch; NaN is left out.
    connectivity : {8, 4}
        Whether pixels that touch only at corners are connected (8) or not (4).
    min_area, max_area : float, optional
        Smallest and largest area of a patch, both inclusive [m2 on the ground; without a CRS in
        the coordinates' own units]. Other patches are left out.

    Returns
    -------
    labels : DataArray
        int32, 0 outside patches; numbered from 1 in each plane, in the order of their first
        pixels row by row, for any chunks. Lazy if the mask is.
    table : DataFrame
        One row per patch: the coordinates of further dims, ``patch``, ``pixels``, ``area``, and
        for each value ``<name>_count``, ``_mean``, ``_min``, ``_max``, ``_sd`` (ddof=1), ``_sum``
        and ``_volume`` (sum of value times area of the cell).

    Raises
    ------
    CHMv2Error
        If the mask is not boolean, values lie on another grid, or the bounds are invalid.

    Notes
    -----
    The number of patches depends on the data, so the table is computed at once, in one pass that
    holds few blocks at a time. Lazy labels hold the mask at one bit per pixel, on a cluster in the
    memory of the workers, and do not compute it again.
    """
    import pandas as pd

    rule = _resolve_rule(connectivity, min_area, max_area)
    planes = _read_planes(mask, values or {})
    summaries, packed = _parts(planes.summaries(rule).persist(**planes.scheduler))
    blocks = summaries.compute(**planes.scheduler)
    numbers, parts = np.empty(blocks.shape, object), []
    for index in np.ndindex(blocks.shape[:-2]):
        numbers[index], columns = _join_blocks(blocks[index], planes.chunks, rule)
        n = len(columns["patch"])
        places = zip(planes.leading, index, strict=True)
        along = {name: np.repeat(values[k : k + 1], n) for (name, values), k in places}
        parts.append(pd.DataFrame(along | columns))
    known = da.from_array(numbers, chunks=1, name=f"patch-numbers-{tokenize(summaries.name)}")
    labels = planes.number(packed, known, rule, np.dtype("int32"))
    attrs = {"long_name": "number of the patch, 0 outside patches", "units": "1"}
    labelled = label_quantity(planes.wrap(labels, mask), "patch", attrs)
    return labelled, pd.concat(parts, ignore_index=True)


def sieve(
    mask: xr.DataArray,
    *,
    connectivity: Connectivity = 8,
    min_area: float | None = None,
    max_area: float | None = None,
) -> xr.DataArray:
    """Remove the patches of a mask that are too small or too large.

    Parameters
    ----------
    mask, connectivity, min_area, max_area
        As in :func:`label_patches`.

    Returns
    -------
    DataArray
        Like the mask; lazy if it is. The result does not depend on the chunks.

    Raises
    ------
    CHMv2Error
        If the mask is not boolean, or the bounds are invalid.

    Notes
    -----
    A patch may extend over any number of chunks, so the first chunk of the result needs all
    chunks of the mask. They are computed once, and held in memory at one bit per pixel.
    """
    rule = _resolve_rule(connectivity, min_area, max_area)
    planes = _read_planes(mask, {})
    if rule.low <= 0 and math.isinf(rule.high):
        return mask.copy(deep=False)
    return _keep(planes, mask, rule)


def keep_sure_patches(
    mask: xr.DataArray,
    kind: xr.DataArray,
    sure: xr.DataArray,
    *,
    connectivity: Connectivity = 8,
) -> xr.DataArray:
    """Keep the patches of a boolean mask of which at least half of the pixels are `sure`.

    Only neighbours of equal `kind`, integers or dates, belong to one patch. As in :func:`sieve`,
    but a pixel is held at as many bits as the number of kinds in its chunk has.
    """
    rule = _resolve_rule(connectivity, None, None)
    planes = _read_planes(mask, {KIND: kind, SURE: sure})
    # Not the true areas, which a sieve of the result would share: they would be held until then.
    area = da.ones(planes.area.shape, chunks=planes.area.chunks)
    return _keep(replace(planes, area=area), mask, rule)


def _keep(planes: _Planes, mask: xr.DataArray, rule: Rule) -> xr.DataArray:
    """Keep the patches of a mask that a rule keeps."""
    summaries, packed = _parts(planes.summaries(rule))
    whole = summaries.rechunk({planes.mask.ndim - 2: -1, planes.mask.ndim - 1: -1})
    numbers = _map(_join, whole, planes.chunks, rule, chunks=whole.chunks).rechunk(1)
    kept = planes.number(packed, numbers, rule, np.dtype("bool"))
    return planes.wrap(kept, mask)


def map_neighbourhoods(operation: Any, mask: da.Array, reach: int) -> da.Array:
    """Apply an operation to each plane of a mask (..., y, x), across the borders of chunks.

    Pixels beyond the raster's edge are False. `reach` is the distance over which pixels matter to
    each other [px]. Unlike in ``dask.array.map_overlap``, a chunk that waits for its neighbours is
    held in memory at one bit per pixel.
    """
    sizes = {axis: mask.chunks[axis] for axis in (mask.ndim - 2, mask.ndim - 1)}
    roomy = mask.rechunk(
        {axis: ensure_minimum_chunksize(min(reach, sum(n)), n) for axis, n in sizes.items()}
    )
    packed = _map(_pack_block, roomy)
    near = da.overlap.overlap(packed, dict.fromkeys(sizes, 1), dict.fromkeys(sizes, 0))
    found = _map(_operate, near, operation, reach, dtype=bool, chunks=roomy.chunks)
    return found.rechunk(mask.chunks)


def _operate(near: _Objects, operation: Any, reach: int) -> _Array:
    """Task: apply an operation to one block with margins from its neighbours."""
    blocks: Any = near.reshape(3, 3)
    middle = _unpack(blocks[1, 1])
    window = np.zeros((*middle.shape[:-2], *(n + 2 * reach for n in middle.shape[-2:])), bool)
    to = (slice(reach), slice(reach, -reach), slice(-reach, None))
    start = (slice(-reach, None), slice(None), slice(reach))
    for i, j in np.ndindex(3, 3):
        if blocks[i, j]:  # not beyond the raster's edge
            window[..., to[i], to[j]] = _unpack(blocks[i, j])[..., start[i], start[j]]
    found: _Array = operation(window)[..., to[1], to[1]]
    return found


def hold_packed(mask: xr.DataArray) -> xr.DataArray:
    """Compute a lazy mask now, and hold it in memory at one bit per pixel, unpacked lazily.

    On a cluster its bits are in the memory of the workers. A graph of a mask and of the values that
    it was made from would hold these until the mask is known; now they are read again, by blocks.
    """
    if mask.chunks is None:
        return mask
    packed = _map(_pack_block, mask.data).persist()
    checkpoint(packed).compute()  # on a cluster persist() does not wait
    return mask.copy(data=_map(_unpack_block, packed, dtype=bool, chunks=mask.chunks))


def _resolve_rule(
    connectivity: Connectivity, min_area: float | None, max_area: float | None
) -> Rule:
    """Validate the connectivity and the area bounds of patches, from 0 to inf by default."""
    if not (is_whole(connectivity) and connectivity in (4, 8)):
        raise CHMv2Error(
            "connectivity 4 (sides) or 8 (sides and corners)",
            f"connectivity={show(connectivity)}",
            "pass connectivity=8",
        )
    for name, area in (("min_area", min_area), ("max_area", max_area)):
        if not (isinstance(area, float) and math.isinf(area)):
            validate_number(name, area, 200, optional=True)
    low = 0.0 if min_area is None else float(min_area)
    high = math.inf if max_area is None else float(max_area)
    if not 0 <= low <= high:
        raise CHMv2Error(
            "0 <= min_area <= max_area [m2]",
            f"min_area={min_area} and max_area={max_area}",
            "pass areas such as min_area=200",
        )
    return Rule(connectivity, low, high)


def _join(blocks: _Objects, chunks: _Chunks, rule: Rule) -> _Objects:
    """Task: join the patches of one plane."""
    numbers, _ = _join_blocks(blocks.reshape(blocks.shape[-2:]), chunks, rule)
    return numbers.reshape(blocks.shape)


def _number(packed: _Objects, numbers: _Objects, rule: Rule, kind: Any) -> _Array:
    """Task: number the patches of one block, or keep those that have a number."""
    mask = _unpack(packed.item())
    found = numbers.item().apply(mask.reshape(mask.shape[-2:]), rule, kind)
    return np.reshape(found, mask.shape)


def _pack(mask: _Array) -> _Packed:
    """Pack a mask into one bit per pixel, or numbers into as many as the largest one needs."""
    planes = [mask]
    if mask.dtype != bool:
        planes = [mask >> k & 1 > 0 for k in range(int(mask.max(initial=0)).bit_length())]
    return mask.shape, mask.dtype, [np.packbits(plane) for plane in planes]


def _unpack(packed: _Packed) -> _Array:
    shape, dtype, planes = packed
    found: _Array = np.zeros(shape, dtype)
    for k, bits in enumerate(planes):
        plane = np.unpackbits(bits, count=math.prod(shape)).reshape(shape)
        found |= plane.view(bool) if found.dtype == bool else plane.astype(dtype) << k
    return found


def _pack_block(mask: _Array) -> _Objects:
    return _boxed(_pack(mask), mask.ndim)


def _unpack_block(packed: _Objects) -> _Array:
    return _unpack(packed.item())


def _parts(both: da.Array) -> list[da.Array]:
    """Divide summaries from packed masks."""
    return [_map(_part, both, part) for part in range(2)]


def _part(both: _Objects, part: int) -> _Objects:
    return _boxed(both.item()[part], both.ndim)


def _statistics(moments: Moments) -> dict[str, _Array]:
    """Compute statistics from moments; NaN without values, and for the sd of a single value."""
    count = moments.count
    with np.errstate(invalid="ignore"):  # 0 / 0 is the variance of a single value
        found = {
            "mean": moments.mean,
            "min": moments.low,
            "max": moments.high,
            "sd": np.sqrt(moments.squares / (count - 1)),
            "sum": moments.mean * count,
            "volume": moments.volume,
        }
    return {"count": count} | {k: np.where(count > 0, v, np.nan) for k, v in found.items()}


@dataclass(frozen=True, eq=False)
class _Planes:
    """A mask in blocks of one plane each, with cell areas and quantities on its grid and chunks.

    `mask`: (..., y, x) bool, chunks of 1 along all dims before y and x; `area`: (y, x); `leading`:
    coordinates of the dims before y and x; `scheduler`: arguments of ``compute``, the synchronous
    scheduler if the mask was not lazy.
    """

    mask: da.Array
    area: da.Array
    values: dict[str, da.Array]
    dims: tuple[Hashable, ...]
    leading: list[tuple[str, _Array]]
    scheduler: dict[str, str]

    @property
    def chunks(self) -> _Chunks:
        """Numbers of rows and of columns of the blocks."""
        return self.mask.chunks[-2], self.mask.chunks[-1]

    def summaries(self, rule: Rule) -> da.Array:
        """Summarise the patches of each block and pack its mask: one object per block.

        One task does both, so that no block waits for the other at a byte per pixel.
        """
        names, values = tuple(self.values), self.values.values()
        return _map(_summarise, self.mask, self.area, *values, names=names, rule=rule)

    def number(self, packed: da.Array, numbers: da.Array, rule: Rule, kind: Any) -> da.Array:
        """Build the numbers of patches, or a mask of those that have one, in the mask's chunks."""
        chunks = self.mask.chunks
        return _map(_number, packed, numbers, rule=rule, kind=kind, dtype=kind, chunks=chunks)

    def wrap(self, data: da.Array, like: xr.DataArray) -> xr.DataArray:
        """Add the coordinates of the mask to an array, and compute it if the mask was not lazy."""
        data = data.compute(**self.scheduler) if self.scheduler else data
        return like.transpose(*self.dims).copy(data=data).transpose(*like.dims)


def _read_planes(mask: xr.DataArray, values: Mapping[str, xr.DataArray]) -> _Planes:
    """Divide a mask and the quantities on its grid into blocks of one plane each."""
    if not isinstance(mask, xr.DataArray) or mask.dtype != bool:
        raise CHMv2Error(
            "a boolean mask",
            f"{mask.dtype} values" if isinstance(mask, xr.DataArray) else show(mask),
            "compare first: label_patches(height <= 10), or mask.astype(bool)",
        )
    grid = find_grid(mask).dims
    dims = (*(dim for dim in mask.dims if dim not in grid), *grid)
    turned = mask.transpose(*dims)
    data = _blocks(turned).rechunk(dict.fromkeys(range(mask.ndim - 2), 1))
    on_grid = {}
    for name, value in values.items():
        found = on_same_coordinates(
            value,
            turned,
            expected=f"{name} on the grid and dates of the mask",
            fix=f"bring it there: {name}.interp_like(mask)",
        ).broadcast_like(turned)
        on_grid[name] = _blocks(found.transpose(*dims)).rechunk(data.chunks)
    return _Planes(
        mask=data,
        area=cell_areas(turned.copy(data=data)).data,
        values=on_grid,
        dims=dims,
        leading=[(str(dim), turned[dim].values) for dim in dims[:-2]],
        scheduler={} if mask.chunks else {"scheduler": "synchronous"},
    )


def _blocks(array: xr.DataArray) -> da.Array:
    if array.chunks:
        return array.data
    sizes = [min(size, _SIDE) for size in array.shape]
    return da.from_array(array.values, chunks=sizes, name=False)


def _map(task: Any, array: da.Array, *others: Any, dtype: Any = object, **options: Any) -> da.Array:
    """Map the blocks of arrays, by default to one object each."""
    options = {"chunks": (1,) * array.ndim, "meta": np.empty((0,) * array.ndim, dtype)} | options
    return da.map_blocks(task, array, *others, dtype=dtype, **options)


def _boxed(value: Any, ndim: int) -> _Objects:
    """Wrap one object in an array of one element."""
    flat = np.empty(1, object)
    flat[0] = value
    return flat.reshape((1,) * ndim)


def _summarise(
    mask: _Array,
    area: _Array,
    *values: _Array,
    names: tuple[str, ...],
    rule: Rule,
) -> _Objects:
    """Task: summarise the patches of one block, and pack its mask."""
    planes = {n: v.reshape(area.shape) for n, v in zip(names, values, strict=True)}
    plane, ndim = mask.reshape(area.shape), mask.ndim
    if KIND not in planes:
        return _boxed((summarise(plane, area, planes, rule), _pack(mask)), ndim)
    kinds, number = np.unique(planes.pop(KIND)[plane], return_inverse=True)
    numbers = np.zeros(plane.shape, np.uint32)
    numbers[plane] = number + 1
    found = summarise(numbers, area, planes, rule)
    found = replace(found, kinds=kinds.astype(np.int64)[found.kinds - 1])
    return _boxed((found, _pack(numbers.reshape(mask.shape))), ndim)


def _join_blocks(
    blocks: _Objects, chunks: _Chunks, rule: Rule
) -> tuple[_Objects, dict[str, _Array]]:
    """Join the patches of all blocks (rows, cols): the numbers in each, and columns of a table.

    Those that are kept are numbered from 1 in the order of their first pixels, row by row: the
    numbers do not depend on the blocks.
    """
    summaries: list[Summary] = list(blocks.ravel())
    offsets = np.cumsum([0, *(len(s.ids) for s in summaries)])
    kinds = _all(summaries, "kinds", np.int64)
    part_of, count = _components(blocks, offsets, kinds, rule)
    area = add_up(part_of, _all(summaries, "area", float), count)
    values = {
        name: _combine([s.values[name] for s in summaries], part_of, count)
        for name in summaries[0].values
    }
    first = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first, part_of, _first_pixels(blocks, chunks))
    order = np.argsort(first)
    order = order[rule.keeps(area, values)[order]]
    number = np.zeros(count, np.int64)
    number[order] = np.arange(1, len(order) + 1)
    pixels = add_up(part_of, _all(summaries, "pixels", float), count).astype(np.int64)
    columns = {"patch": number[order], "pixels": pixels[order], "area": area[order]}
    for name, moments in values.items():
        columns |= {f"{name}_{what}": v[order] for what, v in _statistics(moments).items()}
    return _numbers(blocks, offsets, number[part_of]), columns


def _all(summaries: Sequence[Summary], field: str, dtype: Any) -> _Array:
    return np.concatenate([getattr(s, field) for s in summaries]).astype(dtype)


def _first_pixels(blocks: _Objects, chunks: _Chunks) -> Integers:
    """Return the raster index of the first pixel of each block's patches, row by row."""
    tops, lefts = (np.cumsum([0, *sizes]) for sizes in chunks)
    places = [b.first + np.array([tops[i], lefts[j]]) for (i, j), b in np.ndenumerate(blocks)]
    rows, cols = np.concatenate(places).T
    return np.asarray(rows * lefts[-1] + cols, np.int64)


def _components(
    blocks: _Objects, offsets: Integers, kinds: Integers, rule: Rule
) -> tuple[_Array, int]:
    """Find the connected components of equal kind among the patches of all blocks."""
    start = offsets[:-1].reshape(blocks.shape)
    pairs = [np.empty((2, 0), np.int64)]
    for lines, starts, last, first in ((blocks, start, 1, 0), (blocks.T, start.T, 3, 2)):
        for upper, lower in pairwise(zip(lines, starts, strict=True)):
            pairs += _touching(_side(*upper, last), _side(*lower, first), rule)
    one, other = np.concatenate(pairs, axis=1)
    alike = kinds[one] == kinds[other]
    one, other = one[alike], other[alike]
    size = int(offsets[-1])
    links = coo_array((np.ones(len(one), bool), (one, other)), shape=(size, size))
    count, part_of = connected_components(links, directed=False)
    return part_of, int(count)


def _side(blocks: _Objects, starts: Integers, edge: int) -> Integers:
    """Return the patches along one side of a line of blocks, which spans the raster; -1 for none.

    So corners of blocks, at which patches may touch, lie inside.
    """
    edges = zip((block.edges[edge] for block in blocks), starts, strict=True)
    return np.concatenate([np.where(ids > 0, ids + start - 1, -1) for ids, start in edges])


def _touching(upper: Integers, lower: Integers, rule: Rule) -> list[Integers]:
    sides = [(upper, lower)]
    if rule.connectivity == 8:
        sides += [(upper[1:], lower[:-1]), (upper[:-1], lower[1:])]
    return [np.unique(np.stack(s)[:, (s[0] >= 0) & (s[1] >= 0)], axis=1) for s in sides]


def _numbers(blocks: _Objects, offsets: Integers, number: Integers) -> _Objects:
    found = np.empty_like(blocks)
    own_numbers = np.split(number, offsets[1:-1])
    for (index, block), own in zip(np.ndenumerate(blocks), own_numbers, strict=True):
        found[index] = PatchNumbers(block.ids[own > 0], own[own > 0])
    return found


def _combine(parts: Sequence[Moments], part_of: _Array, n: int) -> Moments:
    """Combine the moments of the parts of each patch."""
    count, mean, squares, low, high, volume = (
        np.concatenate(fields) for fields in zip(*(part.fields for part in parts), strict=True)
    )
    total = add_up(part_of, count, n).astype(np.int64)
    mean_all = add_up(part_of, count * mean, n) / np.maximum(total, 1)
    # Squared deviations from the mean of the whole: within the parts, plus between the parts.
    squares = squares + count * (mean - mean_all[part_of]) ** 2
    low_all, high_all = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low_all, part_of, low)
    np.maximum.at(high_all, part_of, high)
    return Moments(
        count=total,
        mean=mean_all,
        squares=add_up(part_of, squares, n),
        low=low_all,
        high=high_all,
        volume=add_up(part_of, volume, n),
    )
