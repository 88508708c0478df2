"""Patches of masks in xarray: labels, table, and masks without what is too small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.base import tokenize

from xchmv2.errors import CHMv2Error
from xchmv2.labels import label_quantity
from xchmv2.patches.joining import Joined, join
from xchmv2.patches.local import Connectivity, Moments, Rule, pack, unpack
from xchmv2.patches.planes import Planes, boxed, no_objects, read_planes

if TYPE_CHECKING:
    import pandas as pd


def label_patches(
    mask: xr.DataArray,
    values: Mapping[str, xr.DataArray] | None = None,
    *,
    connectivity: Connectivity = 8,
    min_area: float | None = None,
    max_area: float | None = None,
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Find the connected patches of a mask, and sum up what lies in each.

    Parameters
    ----------
    mask : DataArray
        Boolean, of two spatial dims and any others, such as time; each plane has patches of its
        own.
    values : mapping of str to DataArray, optional
        Quantities on the same grid to sum up per patch; NaN is left out.
    connectivity : {8, 4}
        Whether pixels that touch at corners only belong together.
    min_area, max_area : float, optional
        Smallest and largest area of a patch, both inclusive [m2, true on the ground; without a
        CRS in the coordinates' own units]. Others are left out.

    Returns
    -------
    labels : DataArray
        int32, 0 outside patches; numbered from 1 in each plane, in the order of their first
        pixels row by row, whatever the chunks. Lazy if the mask is.
    table : DataFrame
        One row per patch: the coordinates of further dims, ``patch``, ``pixels``, ``area``, and
        for each value ``<name>_count``, ``_mean``, ``_min``, ``_max``, ``_sd`` (ddof=1), ``_sum``
        and ``_volume`` (sum of value times area of the cell).

    Raises
    ------
    CHMv2Error
        If the mask is not boolean, values lie on another grid, or the bounds make no sense.

    Notes
    -----
    How many patches there are is known from the data only, so the table is computed here, in one
    pass over the blocks that holds few of them at a time. Labels that are lazy go through the
    mask a second time when they are computed: give them a mask that is cheap to read again, such
    as one of heights that were written to a store, or ``persist`` it.
    """
    rule = resolve_rule(connectivity, min_area, max_area)
    planes = read_planes(mask, values or {})
    summaries = planes.summaries(rule)
    blocks = summaries.compute(**planes.scheduler)
    joined: dict[tuple[int, ...], Joined] = {}
    numbers = np.empty(blocks.shape, object)
    for index in np.ndindex(blocks.shape[:-2]):
        joined[index] = join(blocks[index], planes.chunks, rule)
        numbers[index] = joined[index].numbers
    known = da.from_array(numbers, chunks=1, name=f"patch-numbers-{tokenize(summaries.name)}")
    labels = planes.blockwise(_number, planes.mask, known, rule=rule, dtype=np.dtype("int32"))
    attrs = {"long_name": "number of the patch, 0 outside patches", "units": "1"}
    return label_quantity(planes.wrap(labels, mask), "patch", attrs), _table(planes, joined)


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
    mask : DataArray
        Boolean, of two spatial dims and any others, such as time.
    connectivity : {8, 4}
        Whether pixels that touch at corners only belong together.
    min_area, max_area : float, optional
        Smallest and largest area of a patch that stays, both inclusive [m2, true on the ground;
        without a CRS in the coordinates' own units].

    Returns
    -------
    DataArray
        Like the mask; lazy if it is. The same for any chunks.

    Raises
    ------
    CHMv2Error
        If the mask is not boolean, or the bounds make no sense.

    Notes
    -----
    A patch may reach through any number of chunks, so the first chunk of the answer needs all
    chunks of the mask. They are computed once, and wait in an eighth of a byte per pixel.
    """
    rule = resolve_rule(connectivity, min_area, max_area)
    planes = read_planes(mask, {})
    if rule.low <= 0 and math.isinf(rule.high):
        return mask.copy(deep=False)
    rows_and_cols = {planes.mask.ndim - 2: -1, planes.mask.ndim - 1: -1}
    numbers = planes.summaries(rule).rechunk(rows_and_cols)
    numbers = numbers.map_blocks(
        _join, planes.chunks, rule, dtype=object, meta=no_objects(planes.mask.ndim)
    ).rechunk(1)
    packed = planes.mask.map_blocks(
        _pack, dtype=object, meta=no_objects(planes.mask.ndim), chunks=(1,) * planes.mask.ndim
    )
    kept = planes.blockwise(_keep, packed, numbers, rule=rule, dtype=np.dtype("bool"))
    return planes.wrap(kept, mask)


def resolve_rule(
    connectivity: Connectivity, min_area: float | None, max_area: float | None
) -> Rule:
    """Check how patches are to be told apart and chosen.

    Parameters
    ----------
    connectivity : {8, 4}
        Whether pixels that touch at corners only belong together.
    min_area, max_area : float or None
        Smallest and largest area [m2].

    Returns
    -------
    Rule
        The same; without bounds, from 0 to inf.

    Raises
    ------
    CHMv2Error
        If they make no sense.
    """
    if connectivity not in (4, 8):
        raise CHMv2Error(
            "connectivity 4 (sides) or 8 (sides and corners)",
            f"connectivity={connectivity!r}",
            "pass connectivity=8",
        )
    low = 0.0 if min_area is None else float(min_area)
    high = math.inf if max_area is None else float(max_area)
    if not 0 <= low <= high:
        raise CHMv2Error(
            "0 <= min_area <= max_area [m2]",
            f"min_area={min_area} and max_area={max_area}",
            "pass areas such as min_area=200",
        )
    return Rule(connectivity, low, high)


def _join(
    blocks: npt.NDArray[np.object_], chunks: tuple[tuple[int, ...], tuple[int, ...]], rule: Rule
) -> npt.NDArray[np.object_]:
    """Task: join the patches of one plane."""
    return join(blocks.reshape(blocks.shape[-2:]), chunks, rule).numbers.reshape(blocks.shape)


def _number(
    mask: npt.NDArray[Any], numbers: npt.NDArray[np.object_], rule: Rule
) -> npt.NDArray[Any]:
    """Task: number the patches of one block."""
    plane = mask.reshape(mask.shape[-2:])
    found: npt.NDArray[Any] = numbers.item().apply(plane, rule, np.int32).reshape(mask.shape)
    return found


def _pack(mask: npt.NDArray[Any]) -> npt.NDArray[np.object_]:
    """Task: keep one block of the mask in little memory until all are known."""
    return boxed(pack(mask), mask.ndim)


def _keep(
    packed: npt.NDArray[np.object_], numbers: npt.NDArray[np.object_], rule: Rule
) -> npt.NDArray[np.bool_]:
    """Task: what stays of one block of the mask."""
    mask = unpack(packed.item())
    plane = mask.reshape(mask.shape[-2:])
    found: npt.NDArray[np.bool_] = numbers.item().apply(plane, rule, bool).reshape(mask.shape)
    return found


def _table(planes: Planes, joined: Mapping[tuple[int, ...], Joined]) -> pd.DataFrame:
    import pandas as pd

    parts = []
    for index, plane in joined.items():
        columns: dict[str, Any] = {
            name: np.repeat(coordinate[place : place + 1], len(plane.area))
            for (name, coordinate), place in zip(planes.leading, index, strict=True)
        }
        columns["patch"] = np.arange(1, len(plane.area) + 1)
        columns |= {"pixels": plane.pixels, "area": plane.area}
        for name, moments in plane.values.items():
            columns |= {f"{name}_{what}": found for what, found in _statistics(moments).items()}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _statistics(moments: Moments) -> dict[str, npt.NDArray[Any]]:
    """Read statistics off the sums; NaN where there is no value, and for the sd of one."""
    count = moments.count
    some = count > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "count": count,
            "mean": np.where(some, moments.mean, np.nan),
            "min": np.where(some, moments.low, np.nan),
            "max": np.where(some, moments.high, np.nan),
            "sd": np.where(count > 1, np.sqrt(moments.squares / (count - 1)), np.nan),
            "sum": np.where(some, moments.mean * count, np.nan),
            "volume": np.where(some, moments.volume, np.nan),
        }
