"""Under what circumstances an image was taken, and whether its heights can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.stac.items import StacItem

#: The published evaluation uses imagery within these limits only [degrees] (arXiv:2603.06382).
LOWEST_SUN, LARGEST_OFF_NADIR = 45.0, 25.0

#: Joins what several items of one date say.
SEPARATOR = ";"

#: Bits of ``quality_flags``, lowest first.
FLAGS = (
    "low_sun",
    "high_off_nadir",
    "sun_elevation_unknown",
    "off_nadir_unknown",
    "upsampled",
    "partly_unreadable",
)

_NUMBERS: dict[str, tuple[str, str, str, Callable[[Iterable[float]], float]]] = {
    "sun_elevation": ("view:sun_elevation", "sun elevation above the horizon", "degree", min),
    "off_nadir": ("view:off_nadir", "view angle off nadir", "degree", max),
    "cloud_cover": ("eo:cloud_cover", "cloud cover of the item", "percent", max),
}


def quality_flags(
    sun_elevation: xr.DataArray,
    off_nadir: xr.DataArray,
    *,
    upsampled: xr.DataArray | None = None,
    unreadable: xr.DataArray | None = None,
    lowest_sun: float = LOWEST_SUN,
    largest_off_nadir: float = LARGEST_OFF_NADIR,
) -> xr.DataArray:
    """Say per date why its heights may deserve less trust.

    Parameters
    ----------
    sun_elevation, off_nadir : DataArray
        (time,) [degrees], NaN where unknown.
    upsampled : DataArray of bool, optional
        (time,) imagery coarser than the grid it is on.
    unreadable : DataArray of bool, optional
        (time,) some of the imagery could not be read.
    lowest_sun, largest_off_nadir : float
        Limits [degrees]; a value at the limit is within it. The defaults are those of the
        published evaluation.

    Returns
    -------
    DataArray of uint8
        (time,) bits as ``flag_masks`` and ``flag_meanings`` name them; 0 is all well.

    References
    ----------
    CHMv2, arXiv:2603.06382, evaluation on GEDI and ICESat-2.
    """
    conditions = [
        sun_elevation < lowest_sun,
        off_nadir > largest_off_nadir,
        sun_elevation.isnull(),
        off_nadir.isnull(),
        upsampled,
        unreadable,
    ]
    flags = xr.zeros_like(sun_elevation, np.uint8)
    for bit, condition in enumerate(conditions):
        if condition is not None:
            flags = flags | (condition.astype(np.uint8) << np.uint8(bit))
    flags.attrs = {
        "standard_name": "quality_flag",
        "long_name": "reasons to trust the heights of a date less",
        "flag_masks": np.array([1 << bit for bit in range(len(FLAGS))], np.uint8),
        "flag_meanings": " ".join(FLAGS),
        "lowest_sun_elevation": lowest_sun,
        "largest_off_nadir": largest_off_nadir,
    }
    flags.encoding = {}
    return flags.rename("quality_flags").astype(np.uint8)


def time_coordinates(
    groups: Sequence[Sequence[StacItem]],
    native: Sequence[float],
    unreadable: Sequence[int],
    upsampled: Sequence[bool],
) -> dict[str, xr.DataArray]:
    """Collect what the items of each date say, the worst of several.

    Parameters
    ----------
    groups : sequence of sequences of StacItem
        The items of each date.
    native : sequence of float
        Coarsest native pixel of each date [m].
    unreadable : sequence of int
        Files of each date that could not be read.
    upsampled : sequence of bool
        Whether a date's imagery is coarser than the grid.

    Returns
    -------
    dict
        Coordinates along time; NaN or "" where the items do not tell.
    """
    time = np.array([min(item.time for item in group) for group in groups], "datetime64[ns]")
    columns: dict[str, tuple[list[Any], Any, str, str | None]] = {
        name: ([_worst(group, key, choose) for group in groups], np.float64, words, units)
        for name, (key, words, units, choose) in _NUMBERS.items()
    }
    columns["sun_azimuth"] = (
        [_azimuth(group) for group in groups],
        np.float64,
        "sun azimuth clockwise from north",
        "degree",
    )
    columns["platform"] = ([_platforms(group) for group in groups], object, "platform", None)
    columns["item_ids"] = ([_ids(group) for group in groups], object, "STAC items", None)
    words = "coarsest native pixel of the imagery on the ground"
    columns["native_resolution"] = (list(native), np.float64, words, "m")
    words = "files that could not be read"
    columns["unreadable_assets"] = (list(unreadable), np.int32, words, None)
    coords = {
        name: _along_time(time, values, dtype, words, units)
        for name, (values, dtype, words, units) in columns.items()
    }
    flags = quality_flags(
        coords["sun_elevation"],
        coords["off_nadir"],
        upsampled=_along_time(time, list(upsampled), np.bool_),
        unreadable=coords["unreadable_assets"] > 0,
    )
    return {"time": coords["platform"]["time"], **coords, "quality_flags": flags}


def _along_time(
    time: np.ndarray[Any, Any],
    values: list[Any],
    dtype: Any,
    words: str | None = None,
    units: str | None = None,
) -> xr.DataArray:
    attrs = {k: v for k, v in (("long_name", words), ("units", units)) if v is not None}
    return xr.DataArray(np.array(values, dtype), {"time": time}, "time", attrs=attrs)


def _number(properties: Mapping[str, Any], key: str) -> float:
    value = properties.get(key)
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _worst(
    group: Sequence[StacItem], key: str, choose: Callable[[Iterable[float]], float]
) -> float:
    """Choose among the items that tell."""
    told = [v for item in group if not math.isnan(v := _number(item.properties, key))]
    return choose(told) if told else math.nan


def _azimuth(group: Sequence[StacItem]) -> float:
    """Azimuth that belongs to the sun elevation told: that of the lowest sun."""
    suns = [
        (elevation, azimuth)
        for item in group
        if not math.isnan(azimuth := _number(item.properties, "view:sun_azimuth"))
        and not math.isnan(elevation := _number(item.properties, "view:sun_elevation"))
    ]
    if suns:
        return min(suns)[1]
    return _worst(group, "view:sun_azimuth", min)


def _platforms(group: Sequence[StacItem]) -> str:
    told = {str(item.properties["platform"]) for item in group if item.properties.get("platform")}
    return SEPARATOR.join(sorted(told))


def _ids(group: Sequence[StacItem]) -> str:
    return SEPARATOR.join(sorted(item.id for item in group))
