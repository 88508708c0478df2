"""Position of the sun, and seasonal phenology and growth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

_MID_MORNING = 10.5  # local solar time of an image without a time of day [h]
_LEAF_OUT = (110.0, 135.0)  # first and last day of the year of leaf flush at 45 degrees
_COLOURING = (262.0, 292.0)
_LEAF_FALL = (288.0, 318.0)
_SHOOT_GROWTH = (121.0, 243.0)


@dataclass(frozen=True)
class Season:
    """The state of vegetation on one date.

    Share of `leaf` on deciduous crowns, progress of autumn `colouring`, and `greenness` of meadows
    from straw to spring, all 0 to 1. `growth_clock`: decimal year that advances only during shoot
    growth, and determines the height of trees.
    """

    leaf: float
    colouring: float
    greenness: float
    growth_clock: float


def as_time(time: Any, unit: Literal["D", "s"]) -> np.datetime64:
    """Return a date in any format, to the day or the second."""
    stamp: np.datetime64 = np.datetime64(time).astype(f"datetime64[{unit}]")
    return stamp


def decimal_year(time: np.datetime64) -> float:
    """Return the date as a decimal year."""
    year = float(time.astype("datetime64[Y]").astype(int)) + 1970.0
    return year + (_day_of_year(time) - 1) / 365.25


def _day_of_year(time: np.datetime64) -> float:
    """Return the day of the year, 1 on the first of January, without the time of day."""
    day = time.astype("datetime64[D]")
    return float((day - day.astype("datetime64[Y]").astype("datetime64[D]")).astype(int)) + 1.0


def solar_position(time: np.datetime64, latitude: float) -> tuple[float, float]:
    """Return the sun's elevation and its azimuth from north [degree], without refraction.

    A time of day is local solar time, and midnight means mid-morning (10:30). After NOAA Global
    Monitoring Laboratory, "General Solar Position Calculations": declination after Spencer (1971),
    zenith and azimuth from hour angle and latitude. Solar time is taken as given, so the equation
    of time is not needed.
    """
    since = time.astype("datetime64[s]") - time.astype("datetime64[D]").astype("datetime64[s]")
    hour = int(since.astype(int)) / 3600.0 or _MID_MORNING
    g = 2.0 * np.pi / 365.0 * (_day_of_year(time) - 1.0 + (hour - 12.0) / 24.0)
    declination = (
        0.006918
        - 0.399912 * np.cos(g)
        + 0.070257 * np.sin(g)
        - 0.006758 * np.cos(2 * g)
        + 0.000907 * np.sin(2 * g)
        - 0.002697 * np.cos(3 * g)
        + 0.00148 * np.sin(3 * g)
    )
    phi, angle = np.radians(latitude), np.radians(15.0 * (hour - 12.0))
    up = np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(angle)
    east = -np.cos(declination) * np.sin(angle)
    north = np.cos(phi) * np.sin(declination) - np.sin(phi) * np.cos(declination) * np.cos(angle)
    elevation = np.degrees(np.arcsin(np.clip(up, -1.0, 1.0)))
    return float(elevation), float(np.degrees(np.arctan2(east, north)) % 360.0)


def season(time: np.datetime64, latitude: float) -> Season:
    """Return the state of vegetation on a date at a latitude [degree].

    Seasons are shifted by half a year in the south, and fade at the equator.
    """
    strength = _ramp(abs(latitude), 15.0, 30.0)
    year, day = decimal_year(time), _day_of_year(time)
    if latitude < 0:
        year, day = year + 0.5, (day + 182.6) % 365.25
    leaf = _ramp(day, *_LEAF_OUT) - _ramp(day, *_LEAF_FALL)
    green = 0.25 + 0.75 * np.exp(-(((day - 150.0) / 55.0) ** 2)) + 0.2 * _ramp(day, 250.0, 280.0)
    return Season(
        leaf=1.0 - strength * (1.0 - leaf),
        colouring=strength * _ramp(day, *_COLOURING),
        greenness=1.0 - strength * (1.0 - float(min(green, 1.0))),
        growth_clock=float(np.floor(year)) + _ramp(day, *_SHOOT_GROWTH),
    )


def _ramp(value: float, start: float, end: float) -> float:
    """Return 0 before `start`, 1 after `end`, linear between."""
    return float(np.clip((value - start) / (end - start), 0.0, 1.0))
