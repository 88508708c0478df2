"""Whether two dates were taken under conditions that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

#: Dates whose days of the year are further apart than this are of another season [days].
SEASON_DAYS = 45
#: Suns further apart than this cast other shadows [degrees].
SUN_DEGREES = 15.0
#: Limits of the published evaluation [degrees] (arXiv:2603.06382).
LOWEST_SUN, LARGEST_OFF_NADIR = 45.0, 25.0

_YEAR = 365.25


class ComparisonWarning(UserWarning):
    """Dates that can be compared, but with less trust in the change found."""


def date_of(array: xr.DataArray) -> np.datetime64 | None:
    """Return the date of a raster from its scalar coordinate; None if it does not tell."""
    for coord in array.coords.values():
        if coord.ndim == 0 and np.issubdtype(coord.dtype, np.datetime64):
            return None if np.isnat(coord.values) else np.datetime64(coord.values)
    return None


def doubts(before: xr.DataArray, after: xr.DataArray) -> list[str]:
    """Say why a change between two dates deserves less trust.

    Parameters
    ----------
    before, after : DataArray
        Rasters with scalar coordinates: the date, and ``sun_elevation``, ``off_nadir`` [degrees]
        and ``quality_flags`` where known, as :func:`xchmv2.load` gives them.

    Returns
    -------
    list of str
        Empty if there is nothing to say, or nothing is known.
    """
    return [*_season(before, after), *_sun(before, after), *_quality((before, after))]


def _season(before: xr.DataArray, after: xr.DataArray) -> list[str]:
    dates = [date_of(array) for array in (before, after)]
    if any(date is None for date in dates):
        return []
    days = [pd.Timestamp(date).day_of_year for date in dates]
    apart = abs(days[0] - days[1]) % _YEAR
    apart = min(apart, _YEAR - apart)
    if apart <= SEASON_DAYS:
        return []
    return [f"the dates are {apart:.0f} days of the year apart: leaves and shadows differ"]


def _sun(before: xr.DataArray, after: xr.DataArray) -> list[str]:
    suns = [_scalar(array, "sun_elevation") for array in (before, after)]
    if not abs(suns[0] - suns[1]) > SUN_DEGREES:  # NaN too
        return []
    return [f"the sun stood at {suns[0]:.0f} and {suns[1]:.0f} degrees"]


def _quality(arrays: Sequence[xr.DataArray]) -> list[str]:
    said = []
    for name, array in zip(("first", "second"), arrays, strict=True):
        flags = _flags(array)
        if flags:
            said.append(f"quality flags of the {name} date: {' '.join(flags)}")
    return said


def _flags(array: xr.DataArray) -> list[str]:
    """Name what is known to be wrong with a date; that something is not known is no flag."""
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
