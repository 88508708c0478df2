"""Footprints of the imagery behind the published map, and its acquisition dates."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from threading import Lock
from typing import Any

import mercantile
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import pyproj.exceptions
import shapely
import shapely.errors
import shapely.geometry
from affine import Affine
from rasterio.features import rasterize

from xchmv2.errors import CHMv2Error
from xchmv2.published.tiles import CRS, Mirror

#: Days since 1970 of a pixel whose acquisition date is not known.
UNKNOWN_DAY = np.iinfo(np.int32).min
#: The same inside a footprint, while footprints are burned.
_UNDATED = UNKNOWN_DAY + 1
#: GeoJSON without a CRS of its own is in longitude and latitude (RFC 7946).
_LON_LAT = "OGC:CRS84"
_POLYGON = 3
#: Tiles whose footprints stay in memory: more than a row of chunks is likely to cross.
_KEPT = 64
_LIBRARY_ERRORS = (shapely.errors.ShapelyError, pyproj.exceptions.ProjError)

_guard = Lock()


@dataclass(frozen=True, eq=False)
class _Footprints:
    """Outlines of the images a tile was made from.

    `polygons`: in EPSG:3857, valid, the latest date last; `days`: their acquisition dates [days
    since 1970], ``UNKNOWN_DAY`` where not known.
    """

    polygons: npt.NDArray[np.object_]
    days: npt.NDArray[np.int32]

    def burn(
        self, transform: Affine, shape: tuple[int, int]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
        """Rasterise by pixel centres; where footprints overlap, the later date counts.

        `transform` leads from pixels to EPSG:3857, north up. Returns which pixels are inside any
        footprint, and acquisition dates [days since 1970] or ``UNKNOWN_DAY``, both (h, w).
        """
        # Clipped to the pixels and one more around them, as GDAL goes through every vertex.
        left, right = (transform.c + transform.a * col for col in (-1, shape[1] + 1))
        top, bottom = (transform.f + transform.e * row for row in (-1, shape[0] + 1))
        near, index = _polygons_of(shapely.clip_by_rect(self.polygons, left, bottom, right, top))
        days = np.full(shape, UNKNOWN_DAY, np.int32)
        if len(near):
            values = np.maximum(self.days, _UNDATED)[index].tolist()
            rasterize(zip(near, values, strict=True), out=days, transform=transform)
        imaged = days != UNKNOWN_DAY
        days[days == _UNDATED] = UNKNOWN_DAY
        return imaged, days


def read_footprints(mirror: Mirror, quadkey: str) -> _Footprints | None:
    """Read the footprints of a tile, once per process; None where the map has none for it.

    A CHMv2Error refuses a file that cannot be reached, is no GeoJSON of footprints, or lies
    elsewhere.
    """
    with _guard:
        lock, found = _slot(mirror, quadkey)
    with lock:  # one thread downloads; the others of the same tile wait for it
        if not found:
            address = mirror.footprints(quadkey)
            content = mirror.read(address)
            footprints = None if content is None else _parse(content, address)
            found.append(footprints and _over_tile(footprints, quadkey, address))
    return found[0]


@functools.lru_cache(_KEPT)
def _slot(mirror: Mirror, quadkey: str) -> tuple[Lock, list[_Footprints | None]]:
    """One tile's lock, and its footprints once they are read."""
    return Lock(), []


def _parse(content: bytes, address: str) -> _Footprints | None:
    """Read a tile's GeoJSON, sorted by date, unknown dates first; None if it has no outlines."""
    try:
        collection = json.loads(content)
        features = [f for f in collection["features"] if f.get("geometry")]
        shapes = np.array([shapely.geometry.shape(f["geometry"]) for f in features], object)
        days = _to_days([(f.get("properties") or {}).get("acq_date") for f in features])
        project = pyproj.Transformer.from_crs(_crs_of(collection), CRS, always_xy=True).transform
        shapes = shapely.transform(shapes, lambda points: np.column_stack(project(*points.T)))
        if np.isinf(shapely.get_coordinates(shapes)).any():
            raise ValueError("coordinates outside the CRS that it names (degrees by default)")
        polygons, index = _polygons_of(np.asarray(shapes, object))
        # Of an outline that crosses itself, what is inside by the even-odd rule.
        polygons, part = _polygons_of(shapely.make_valid(polygons))
    except (ValueError, KeyError, TypeError, AttributeError, *_LIBRARY_ERRORS) as error:
        raise CHMv2Error(
            "a GeoJSON of imagery footprints",
            f"{type(error).__name__}: {error} at {address}",
            "download the file again, or pass another base_url",
        ) from error
    if not features:
        return None
    days = days[index[part]]
    order = np.argsort(days, kind="stable")
    return _Footprints(polygons[order], days[order])


def _crs_of(collection: dict[str, Any]) -> Any:
    """Read the CRS that older files name, by a name or an EPSG code; else degrees (RFC 7946)."""
    said = collection.get("crs")
    if not said:
        return _LON_LAT
    properties = said.get("properties") or {}
    named = properties.get("name", properties.get("code"))
    if named is None:
        raise ValueError(f"a CRS that is neither a name nor a code: {said}")
    return f"EPSG:{named}" if str(named).isdigit() else named


def _over_tile(footprints: _Footprints, quadkey: str, address: str) -> _Footprints:
    """Refuse footprints of which none touches their tile: their CRS is not the one they name."""
    box = shapely.box(*mercantile.xy_bounds(mercantile.quadkey_to_tile(quadkey)))
    if not shapely.intersects(footprints.polygons, box).any():
        raise CHMv2Error(
            f"footprints over tile {quadkey}, in longitude and latitude or in a CRS that the "
            "file names",
            f"none that touches it at {address}",
            "reproject the file, geopandas.read_file(path).set_crs('EPSG:...', allow_override=True)"
            ".to_crs(4326).to_file(path), or pass another base_url",
        )
    return footprints


def _to_days(dates: list[Any]) -> npt.NDArray[np.int32]:
    """Days since 1970, ``UNKNOWN_DAY`` for anything but an ISO 8601 text."""
    texts = pd.Series([date if isinstance(date, str) else None for date in dates], dtype=object)
    parsed = pd.to_datetime(texts, errors="coerce", utc=True, format="ISO8601")
    stamps = parsed.dt.tz_localize(None).to_numpy().astype("datetime64[D]")
    return np.where(np.isnat(stamps), UNKNOWN_DAY, stamps.astype(np.int64)).astype(np.int32)


def _polygons_of(
    shapes: npt.NDArray[np.object_],
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.intp]]:
    """Split shapes into polygons and the index of the shape of each, without lines and points."""
    parts, outer = shapely.get_parts(shapes, return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)  # collections of multipolygons
    keep = (shapely.get_type_id(parts) == _POLYGON) & ~shapely.is_empty(parts)
    return parts[keep], outer[inner][keep]
