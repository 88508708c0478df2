"""Boxes in degrees, across 180 degrees too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import shapely
from odc.geo import CRS
from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error

#: (west, south, east, north) [degrees]: west from -180 to below 180, east above it, past 180 for
#: a box across that meridian.
BBox = tuple[float, float, float, float]

_DEGREES = CRS("EPSG:4326")
_BOUNDARY_POINTS = 9  # along each side


def read_bbox(bbox: Any, *, empty: bool = False) -> BBox:
    """Read (west, south, east, north) in degrees; west above east means across 180 degrees.

    Longitudes go from -360 to 360; `empty` allows a box without area. The result has its west from
    -180 to below 180, and its east above it. A CHMv2Error refuses what is no box of degrees.
    """
    try:
        corners = tuple(bbox)
    except TypeError:
        corners = ()
    if len(corners) != 4 or not all(isinstance(v, Real) and math.isfinite(v) for v in corners):
        raise _no_bbox(bbox)
    west, south, east, north = map(float, corners)
    across = 360 if west > east else 0
    sides = (east + across - west, north - south)
    # A box across 180 degrees of half of the Earth or more has its corners swapped.
    largest, widest = (180, 180) if across else (360, 360)
    inside = max(abs(west), abs(east)) <= largest and -90 <= south <= north <= 90
    if not inside or sides[0] > widest or (min(sides) == 0 and not empty):
        raise _no_bbox(bbox)
    turns = math.floor((west + 180) / 360) * 360
    return west - turns, south, east + across - turns, north


def _no_bbox(bbox: Any) -> CHMv2Error:
    return CHMv2Error(
        "bbox as (west, south, east, north) in degrees, south below north (west above east: across "
        "180 degrees)",
        f"bbox={bbox!r:.200}",
        "swap its corners; for other coordinates pass geobox=",
    )


def bbox_of(box: GeoBox) -> BBox:
    """Find the box in degrees around a grid; NaN where that is not on the Earth."""
    (rows, cols), edge = box.shape, np.linspace(0, 1, _BOUNDARY_POINTS)
    ends = np.repeat([0.0, 1.0], _BOUNDARY_POINTS)
    along = np.concatenate([np.tile(edge, 2), ends])
    across = np.concatenate([ends, np.tile(edge, 2)])
    x, y = box.affine * (along * cols, across * rows)
    lon, lat = box.crs.transformer_to_crs(_DEGREES, always_xy=True)(x, y)
    if not np.isfinite([lon, lat]).all():
        return (math.nan,) * 4
    lon = lon[0] + (lon - lon[0] + 180) % 360 - 180
    lon = lon - math.floor((lon.min() + 180) / 360) * 360
    return float(lon.min()), float(lat.min()), float(lon.max()), float(lat.max())


def meets(one: BBox, other: BBox, margin: float = 0.0) -> bool:
    """Whether two boxes share an area, or are nearer than the margin [degrees]."""
    if not (one[1] - margin < other[3] and other[1] - margin < one[3]):
        return False
    return any(
        one[0] + turn - margin < other[2] and other[0] - margin < one[2] + turn
        for turn in (-360, 0, 360)
    )


def join_boxes(boxes: Sequence[Sequence[float]]) -> BBox:
    """Find the box around several boxes."""
    west, south, east, north = zip(*boxes, strict=True)
    return min(west), min(south), max(east), max(north)


def write_bbox(box: Sequence[float]) -> str:
    """Write a box for a message."""
    return f"({', '.join(f'{number:.4f}' for number in box)})"


def around_180(shape: shapely.Geometry) -> shapely.Geometry:
    """Join an outline in degrees that is cut at 180 degrees: its east goes on past 180."""
    west, _, east, _ = shape.bounds
    if not east - west > 180:
        return shape
    return shapely.transform(
        shape, lambda points: points + (points < (0, -np.inf)) * np.array((360, 0))
    )
