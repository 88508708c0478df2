"""Selection of dates by label, and comparison of the conditions of two dates."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    LARGEST_OFF_NADIR,
    LOWEST_SUN,
    Raster,
    choose_heights,
    spatial_dims,
    without_time_zone,
)


def find_dates(array: xr.DataArray, *, dated: bool = True, least: int = 1) -> str:
    """Return the name of the dim that is neither vertical nor horizontal.

    Of at least `least` dates; where they matter (`dated`), not only their order, there must be a
    coordinate. Dates must be in strictly increasing order.
    """
    others = [str(dim) for dim in array.dims if dim not in spatial_dims(array)]
    if len(others) != 1:
        others.sort(key=lambda dim: _is_dated(array, dim))
        raise CHMv2Error(
            "heights of dims (time, y, x)",
            f"dims {array.dims}",
            f"choose one: height.isel({others[0]}=0)"
            if others
            else "join the dates: xr.concat([before, after], 'time')",
        )
    dim = others[0]
    if array.sizes[dim] < least:
        raise CHMv2Error(
            f"at least {least} dates",
            f"{array.sizes[dim]} along {dim!r}",
            f"add dates: xr.concat([height, other], {dim!r})",
        )
    if dated or _is_dated(array, dim):
        _require_order(array, dim)
    return dim


def _is_dated(array: xr.DataArray, dim: str) -> bool:
    return dim in array.coords and array[dim].dtype.kind == "M"


def _require_order(array: xr.DataArray, dim: str) -> None:
    index = array.indexes.get(dim)
    if getattr(index, "tz", None) is not None:
        raise without_time_zone(dim, index)
    if not _is_dated(array, dim):
        kind = array[dim].dtype if dim in array.coords else "no coordinate"
        raise CHMv2Error(
            f"dates along {dim!r}",
            f"{kind}",
            f"give them: height.assign_coords({dim}=pd.to_datetime([...]))",
        )
    times = array[dim].values
    undated = np.isnat(times).any()
    if undated or not (np.diff(times) > np.timedelta64(0)).all():
        raise CHMv2Error(
            "dates in strictly increasing order",
            list_dates(array, dim),
            f"leave out those without a date: height.sel({dim}=height.{dim}.notnull())"
            if undated
            else f"sort them: height.sortby({dim!r}).drop_duplicates({dim!r})",
        )


def list_dates(array: xr.DataArray, dim: Hashable, most: int = 12) -> str:
    """List dates for a message."""
    if dim not in array.coords:
        return f"{array.sizes[dim]} positions without dates"
    values = array[dim].values
    labels = [str(v) for v in values[:most]]
    if values.dtype.kind == "M":
        days = np.datetime_as_string(values[:most], "D").tolist()
        labels = days if len(set(days)) == len(days) else labels
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(labels) + more


def select_date(height: Raster, label: Any) -> Raster:
    """Select the one date that a label means, without the dim.

    A label is a date or its beginning, such as "2019", 2019 or "2019-07", as long as that means
    exactly one date. One with a time zone, such as "2019-07-01T10:30:00Z", is converted to UTC,
    which the dates are assumed to be in.
    """
    array = choose_heights(height)
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
        fix = "write more of the date, such as the day"
    raise CHMv2Error(f"a label of exactly one date, {str(label)!r}", found, fix)


def _positions(index: pd.Index, label: Any) -> Any:
    """Return the positions of the dates that a label means."""
    try:
        exact = not isinstance(label, str) and index == pd.Timestamp(label)
        chosen = exact if np.any(exact) else index.get_loc(str(label))  # a year, a month, a day
        return np.atleast_1d(np.arange(len(index))[chosen])
    except (KeyError, ValueError, TypeError):
        return ()


def _in_utc(label: Any) -> Any:
    """Convert a label with a time zone to UTC; return all others unchanged."""
    try:
        moment = pd.Timestamp(label)
    except (ValueError, TypeError):
        return label
    return label if moment.tzinfo is None else moment.tz_convert(None)


#: Dates whose days of the year are further apart than this are of another season [days].
_SEASON_DAYS = 45
#: Sun elevations further apart than this cast different shadows [degrees].
_SUN_DEGREES = 15.0

_YEAR = 365.25


class ComparisonWarning(UserWarning):
    """Dates that can be compared, but with less trust in the change found."""


def date_of(array: xr.DataArray) -> np.datetime64 | None:
    """Return the date of a raster from its scalar coordinate; None if there is none."""
    for coord in array.coords.values():
        if coord.ndim == 0 and np.issubdtype(coord.dtype, np.datetime64):
            return None if np.isnat(coord.values) else np.datetime64(coord.values)
    return None


def doubts(before: xr.DataArray, after: xr.DataArray) -> list[str]:
    """List the reasons why a change between two dates deserves less trust, where known.

    Scalar coordinates hold the conditions: the date, and ``sun_elevation``, ``off_nadir`` [degrees]
    and ``quality_flags``, as :func:`xchmv2.load` gives them.
    """
    said = []
    dates = [date_of(array) for array in (before, after)]
    if not any(date is None for date in dates):
        apart = abs(np.subtract(*(pd.Timestamp(date).day_of_year for date in dates)))
        apart = min(apart, _YEAR - apart)
        if apart > _SEASON_DAYS:
            said += [f"the dates are {apart:.0f} days of the year apart: leaves and shadows differ"]
    suns = [_scalar(array, "sun_elevation") for array in (before, after)]
    if abs(suns[0] - suns[1]) > _SUN_DEGREES:
        said += [f"the sun stood at {suns[0]:.0f} and {suns[1]:.0f} degrees"]
    flags = {"first": " ".join(_flags(before)), "second": " ".join(_flags(after))}
    return said + [f"quality flags of the {date} date: {of}" for date, of in flags.items() if of]


def _flags(array: xr.DataArray) -> list[str]:
    """List the quality flags of a date; an unknown condition is not a flag."""
    found = []
    if _scalar(array, "sun_elevation") < LOWEST_SUN:
        found.append("low_sun")
    if _scalar(array, "off_nadir") > LARGEST_OFF_NADIR:
        found.append("high_off_nadir")
    coord = array.coords.get("quality_flags")
    if coord is None or coord.ndim:
        return found
    meanings = str(coord.attrs.get("flag_meanings", "")).split()
    masks = np.atleast_1d(coord.attrs.get("flag_masks", [1 << k for k in range(len(meanings))]))
    value = int(coord)
    named = [m for m, mask in zip(meanings, masks, strict=False) if value & int(mask)]
    if value and not meanings:
        named = [f"value {value}"]
    return [m for m in dict.fromkeys([*named, *found]) if not m.endswith("_unknown")]


def _scalar(array: xr.DataArray, name: str) -> float:
    coord: Any = array.coords.get(name)
    return float(coord) if coord is not None and coord.ndim == 0 else float("nan")
