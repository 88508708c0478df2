"""Footprints of the imagery behind the published map, and the dates they carry."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import shapely
import shapely.errors
import shapely.geometry
from affine import Affine

from xchmv2.errors import CHMv2Error
from xchmv2.published.tiles import CRS, Mirror, TilePart

#: Days since 1970 of a pixel whose acquisition date is not known.
UNKNOWN_DAY = np.iinfo(np.int32).min
#: Property of a footprint that holds its date.
_DATE = "acq_date"
#: GeoJSON without a CRS of its own is in longitude and latitude (RFC 7946).
_LON_LAT = "OGC:CRS84"
_POLYGON = 3
#: Tiles whose footprints stay in memory: more than a row of chunks is likely to cross. 32 bytes a
#: vertex; half a million vertices is much.
_KEPT = 64


@dataclass(frozen=True, eq=False)
class Footprints:
    """Outlines of the images a tile was made from.

    Parameters
    ----------
    edges : tuple of numpy.ndarray
        Per polygon (4, n) in EPSG:3857, as of `edges_of`; the latest date last.
    days : numpy.ndarray of int32
        Per polygon, its acquisition date [days since 1970], ``UNKNOWN_DAY`` where not known.
    """

    edges: tuple[npt.NDArray[np.float64], ...]
    days: npt.NDArray[np.int32]

    def burn(self, part: TilePart) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
        """Rasterise by pixel centres; where footprints overlap, the later date counts.

        Parameters
        ----------
        part : TilePart
            Pixels (h, w) of the tile these footprints belong to.

        Returns
        -------
        imaged : numpy.ndarray of bool
            (h, w), true inside any footprint.
        days : numpy.ndarray of int32
            (h, w) acquisition dates [days since 1970] or ``UNKNOWN_DAY``.
        """
        shape = part.inside.shape
        imaged, days = np.zeros(shape, bool), np.full(shape, UNKNOWN_DAY, np.int32)
        for edges, day in zip(self.edges, self.days, strict=True):
            inside = fill(edges, part.transform, shape)
            if inside is not None:
                imaged |= inside
                days[inside] = day
        return imaged, days


_cache: OrderedDict[tuple[str, str], Footprints | None] = OrderedDict()
_locks: dict[tuple[str, str], Lock] = {}
_guard = Lock()


def read_footprints(mirror: Mirror, quadkey: str) -> Footprints | None:
    """Read the footprints of a tile, once per process.

    Parameters
    ----------
    mirror : Mirror
        Where the map lies.
    quadkey : str
        The tile.

    Returns
    -------
    Footprints or None
        None where the map has none for this tile: then nothing is known about its imagery.

    Raises
    ------
    CHMv2Error
        If the file cannot be reached or is no GeoJSON of footprints.
    """
    key = (mirror.base, quadkey)
    with _guard:
        lock = _locks.setdefault(key, Lock())
    with lock:  # one thread downloads; the others of the same tile wait for it
        with _guard:
            if key in _cache:
                _cache.move_to_end(key)
                return _cache[key]
        address = mirror.footprints(quadkey)
        content = mirror.read(address)
        found = None if content is None else parse_footprints(content, address)
        with _guard:
            _cache[key] = found
            while len(_cache) > _KEPT:
                _locks.pop(_cache.popitem(last=False)[0], None)
    return found


def parse_footprints(content: bytes, address: str) -> Footprints | None:
    """Read a tile's GeoJSON; None if it has no outlines.

    Parameters
    ----------
    content : bytes
        The file.
    address : str
        The file's address, for errors.

    Returns
    -------
    Footprints or None
        Sorted by date, unknown dates first.

    Raises
    ------
    CHMv2Error
        If the content is no GeoJSON of footprints.
    """
    try:
        collection = json.loads(content)
        features = [f for f in collection["features"] if f.get("geometry")]
        shapes = np.array([shapely.geometry.shape(f["geometry"]) for f in features], object)
        days = _to_days([(f.get("properties") or {}).get(_DATE) for f in features])
        shapes = _to_mercator(shapes, _crs_of(collection))
    except (ValueError, KeyError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
        raise CHMv2Error(
            "a GeoJSON of imagery footprints",
            f"{type(error).__name__}: {error} at {address}",
            "download the file again, or pass another base_url",
        ) from error
    polygons, index = _single_polygons(shapes)
    if not len(features):
        return None
    order = np.argsort(days[index], kind="stable")
    return Footprints(tuple(edges_of(polygons[n]) for n in order), days[index][order])


def _to_days(dates: list[Any]) -> npt.NDArray[np.int32]:
    """Days since 1970; what is no date counts as not known."""
    dates = [date if isinstance(date, str) else None for date in dates]  # numbers are not dates
    parsed = pd.to_datetime(
        pd.Series(dates, dtype=object), errors="coerce", utc=True, format="ISO8601"
    )
    stamps = parsed.dt.tz_localize(None).to_numpy().astype("datetime64[D]")
    return np.where(np.isnat(stamps), UNKNOWN_DAY, stamps.astype(np.int64)).astype(np.int32)


def _crs_of(collection: dict[str, Any]) -> str:
    """Find the CRS of a GeoJSON file; older ones may name another than longitude and latitude."""
    named = (collection.get("crs") or {}).get("properties", {}).get("name")
    return str(named) if named else _LON_LAT


def _to_mercator(shapes: npt.NDArray[np.object_], crs: str) -> npt.NDArray[np.object_]:
    project = pyproj.Transformer.from_crs(crs, CRS, always_xy=True).transform

    def move(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.column_stack(project(points[:, 0], points[:, 1]))

    return np.asarray(shapely.transform(shapes, move), object)


def _single_polygons(
    shapes: npt.NDArray[np.object_],
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.intp]]:
    """Take shapes apart into polygons; which shape each comes from. Lines and points fall away."""
    parts, outer = shapely.get_parts(shapes, return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)  # collections of multipolygons
    keep = (shapely.get_type_id(parts) == _POLYGON) & ~shapely.is_empty(parts)
    return parts[keep], outer[inner][keep]


def edges_of(polygon: shapely.Polygon) -> npt.NDArray[np.float64]:
    """Take a polygon apart into its edges.

    Parameters
    ----------
    polygon : shapely.Polygon
        With or without holes.

    Returns
    -------
    numpy.ndarray of float64
        (4, n): x and y of the southern end, x and y of the northern end. Of two polygons that
        share an edge both get the same numbers.
    """
    points, ring = shapely.get_coordinates(shapely.get_rings(polygon), return_index=True)
    joined = ring[1:] == ring[:-1]
    edges = np.concatenate([points[:-1], points[1:]], axis=1)[joined]
    turned = edges[:, 1] > edges[:, 3]
    edges[turned] = edges[turned][:, [2, 3, 0, 1]]
    flat: npt.NDArray[np.float64] = np.ascontiguousarray(edges.T)
    return flat


def fill(
    edges: npt.NDArray[np.float64], transform: Affine, shape: tuple[int, int]
) -> npt.NDArray[np.bool_] | None:
    """Find the pixels whose centres lie inside a polygon.

    Parameters
    ----------
    edges : numpy.ndarray of float64
        (4, n) as of `edges_of`.
    transform : Affine
        From pixels to the polygon's coordinates, north up.
    shape : tuple of int
        (h, w) [px].

    Returns
    -------
    numpy.ndarray of bool or None
        (h, w), by the even-odd rule; None where no pixel is inside. Of two polygons that share an
        edge exactly one gets each pixel along it.
    """
    height, width = shape
    bottom = transform.f + height * transform.e
    x0, y0, x1, y1 = edges[:, (edges[3] > bottom) & (edges[1] <= transform.f)]
    # Row r is crossed where south <= its centre < north; rows grow southwards.
    first = np.floor((transform.f - y1) / -transform.e - 0.5).astype(np.int64) + 1
    last = np.floor((transform.f - y0) / -transform.e - 0.5).astype(np.int64)
    first, last = np.maximum(first, 0), np.minimum(last, height - 1)
    near = (first <= last) & (np.minimum(x0, x1) < transform.c + width * transform.a)
    counts = (last - first + 1)[near]
    if not counts.size:
        return None
    edge = np.repeat(np.flatnonzero(near), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    centre = transform.f + (row + 0.5) * transform.e
    crossing = x0[edge] + (centre - y0[edge]) * ((x1 - x0) / (y1 - y0 + (y1 == y0)))[edge]
    col = np.ceil((crossing - transform.c) / transform.a - 0.5).astype(np.int64)
    inside = np.zeros((height, width + 1), np.uint8)
    np.bitwise_xor.at(inside, (row, np.clip(col, 0, width)), 1)
    np.bitwise_xor.accumulate(inside, axis=1, out=inside)
    return inside[:, :width].astype(bool)
