"""Dates of a cube: in order, listed for a message, one chosen by its label."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.heights import Raster, read_heights, spatial_dims


def find_dates(array: xr.DataArray, *, dated: bool = True, least: int = 1) -> str:
    """Return the name of the dim along which the dates lie.

    Parameters
    ----------
    array : DataArray
        Heights (date, y, x), in any order of dims.
    dated : bool
        Whether the dates themselves matter, not only their order.
    least : int
        How many dates are needed.

    Returns
    -------
    str
        The dim that is neither vertical nor horizontal.

    Raises
    ------
    CHMv2Error
        If there is no such dim or more than one, too few dates, or dates that are not in
        strictly increasing order.
    """
    others = [str(dim) for dim in array.dims if dim not in spatial_dims(array)]
    if len(others) != 1:
        raise CHMv2Error(
            "heights of dims (time, y, x)",
            f"dims {array.dims}",
            "put the dates together: xr.concat([...], 'time')",
        )
    dim = others[0]
    if array.sizes[dim] < least:
        raise CHMv2Error(
            f"at least {least} dates",
            f"{array.sizes[dim]} along {dim!r}",
            "add dates: xr.concat([...], 'time')",
        )
    if dated or _is_dated(array, dim):
        _require_order(array, dim)
    return dim


def _is_dated(array: xr.DataArray, dim: str) -> bool:
    return dim in array.coords and np.issubdtype(array[dim].dtype, np.datetime64)


def _require_order(array: xr.DataArray, dim: str) -> None:
    if not _is_dated(array, dim):
        kind = array[dim].dtype if dim in array.coords else "no coordinate"
        raise CHMv2Error(
            f"dates along {dim!r}",
            f"{kind}",
            f"give them: height.assign_coords({dim}=pd.to_datetime([...]))",
        )
    times = array[dim].values
    if np.isnat(times).any() or not (np.diff(times) > np.timedelta64(0)).all():
        raise CHMv2Error(
            "dates in strictly increasing order",
            list_dates(array, dim),
            f"sort them: height.sortby({dim!r}), and drop what comes twice",
        )


def list_dates(array: xr.DataArray, dim: Hashable, most: int = 12) -> str:
    """Name the dates there are, for a message."""
    if dim not in array.coords:
        return f"{array.sizes[dim]} positions without dates"
    values = array[dim].values
    dated = np.issubdtype(values.dtype, np.datetime64)
    labels = [_day(v) if dated else str(v) for v in values[:most]]
    if len(set(labels)) < len(labels):
        labels = [str(v) for v in values[:most]]
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(labels) + more


def _day(time: np.datetime64) -> str:
    return str(np.datetime_as_string(time, "D")) if not np.isnat(time) else "NaT"


def select_date(height: Raster, label: Any) -> Raster:
    """Take the one date that a label means.

    Parameters
    ----------
    height : DataArray or Dataset
        With dates along one dim.
    label : str, datetime64, date or int
        A date, or what it begins with, such as "2019", 2019 or "2019-07", as long as that means
        exactly one date. One with a time zone, such as "2019-07-01T10:30:00Z", is turned into
        UTC, which the dates are taken to be in.

    Returns
    -------
    DataArray or Dataset
        That date, without the dim.

    Raises
    ------
    CHMv2Error
        If the label means no date, or more than one; the message says which there are.
    """
    array = read_heights(height)
    dim = find_dates(array)
    label = _in_utc(label.values[()] if isinstance(label, xr.DataArray) else label)
    chosen = _positions(array.indexes[dim], label)
    if len(chosen) == 1:
        return height.isel({dim: int(chosen[0])})
    if len(chosen) == 0:
        found = f"none; the dates are {list_dates(array, dim)}"
        fix = "choose one of these"
    else:
        found = f"{len(chosen)} of them: {list_dates(array.isel({dim: chosen}), dim)}"
        fix = "write more of the date"
    raise CHMv2Error(f"a label of exactly one date, {str(label)!r}", found, fix)


def _positions(index: pd.Index, label: Any) -> Any:
    """Return the positions of the dates that a label means."""
    everything = np.arange(len(index))
    none = everything[:0]
    try:
        exact = none if isinstance(label, str) else everything[index == pd.Timestamp(label)]
        if len(exact):
            return exact
        return np.atleast_1d(everything[index.get_loc(str(label))])  # a year, a month, a day
    except (KeyError, ValueError, TypeError):
        return none


def _in_utc(label: Any) -> Any:
    """Turn a label with a time zone into UTC; leave all others as they are."""
    try:
        moment = pd.Timestamp(label)
    except (ValueError, TypeError):
        return label
    return label if moment.tzinfo is None else moment.tz_convert(None)
