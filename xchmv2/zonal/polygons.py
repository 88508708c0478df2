"""Polygons in any CRS: read, placed on the pixels of a raster, and cut into pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.errors import CHMv2Error, require_library, warn
from xchmv2.raster import Grid

#: Distance of the vertices that are added to sides before a polygon is reprojected, which keeps the
#: sides within a tenth of a metre [degrees, m].
_SPACING = 0.01, 1000.0
#: Polygons are clipped at this distance from the raster, since a projection is valid in its own
#: region only [degrees].
_REACH = 10.0

#: Side of the squares, counted from the raster's first pixel, that polygons are cut into [px].
_TILE = 1024

#: Geometries as an object array of shapely polygons.
Geometries = npt.NDArray[np.object_]
#: First row, end row, first column, end column.
Window = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Polygons:
    """Polygons, once as they were given and once counted in a raster's pixels."""

    given: Geometries
    #: The CRS they were given in; without one, the raster's.
    crs: Any
    #: x counts columns, y counts rows downwards as negative numbers: the raster spans x from 0 to
    #: its width and y from minus its height to 0.
    on_pixels: Geometries
    #: Their index, and the columns of a GeoDataFrame.
    labels: dict[str, npt.NDArray[Any]]


def require_zonal() -> None:
    """Check that the libraries that polygons need are installed."""
    for name in ("exactextract", "geopandas", "xvec"):
        require_library(name, "polygons and points need", "zonal")


def read_polygons(polygons: Any, grid: Grid) -> Polygons:
    """Read polygons and place them on the pixels of a raster.

    Missing geometries are empty polygons; polygons that cross themselves are repaired with a
    warning. Other geometries, and a CRS on the polygons only, are refused.
    """
    import shapely

    series, labels = as_series(polygons)
    given = np.asarray(series.array, dtype=object)
    given = np.where(shapely.is_missing(given), shapely.Polygon(), given)
    _validate(given)
    placed = series
    if series.crs is not None:
        if grid.crs is None:
            raise CHMv2Error(
                f"the polygons are in {series.crs.name}, but the raster has no CRS",
                fix="write it: height.rio.write_crs('EPSG:...')",
            )
        placed = _reproject(series, grid)
    crs = series.crs if series.crs is not None else grid.crs and grid.crs.proj
    return Polygons(given, crs, _on_pixels(np.asarray(placed.array, object), grid), labels)


def _reproject(series: Any, grid: Grid) -> Any:
    """Reproject polygons to the CRS of a raster; their sides are straight in their own CRS."""
    import shapely

    target = grid.crs.proj
    if series.crs == target:
        return series
    found = np.asarray(series.array, dtype=object)
    if series.crs.is_geographic:
        found = shapely.segmentize(_clip(found, grid, series.crs), _SPACING[0])
    else:
        metre = float(series.crs.axis_info[0].unit_conversion_factor)
        found = shapely.segmentize(found, _SPACING[1] / metre)
    return type(series)(found, crs=series.crs).to_crs(target)


def _clip(geometries: Geometries, grid: Grid, crs: Any) -> Geometries:
    """Clip polygons that reach far beyond a raster, where its CRS may not be defined."""
    import shapely

    box = grid.geobox.footprint(crs).boundingbox
    low, high = np.array(box.bbox[:2]) - _REACH, np.array(box.bbox[2:]) + _REACH
    bounds = shapely.bounds(geometries)
    far = (bounds[:, :2] < low).any(axis=1) | (bounds[:, 2:] > high).any(axis=1)
    # Coordinates outside the Earth's are kept: the CRS is wrong, and reprojection will refuse it.
    far &= (np.abs(bounds) <= (360.0, 90.0, 360.0, 90.0)).all(axis=1)
    found = geometries.copy()
    found[far] = shapely.clip_by_rect(geometries[far], *low, *high)
    return found


def as_series(polygons: Any) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """Return geometries as a GeoSeries, and their index and columns by name."""
    import geopandas
    import shapely

    if isinstance(polygons, geopandas.GeoDataFrame):
        series = polygons.geometry
        columns = {
            str(name): polygons[name].to_numpy() for name in polygons.columns if name != series.name
        }
    elif isinstance(polygons, geopandas.GeoSeries):
        series, columns = polygons, {}
    else:
        members = [polygons] if isinstance(polygons, shapely.Geometry) else polygons
        if isinstance(members, str) or not hasattr(members, "__len__"):
            raise _no_polygons(type(polygons).__name__)
        if not all(member is None or isinstance(member, shapely.Geometry) for member in members):
            raise _no_polygons(f"a {type(members).__name__} of other objects")
        series, columns = geopandas.GeoSeries(list(members)), {}
    if not len(series):
        raise _no_polygons("none")
    if series.index.nlevels > 1:
        names = np.array([str(entry) for entry in series.index], dtype=object)
    else:
        names = series.index.to_numpy()
    return series, {str(series.index.name or "polygon"): names, **columns}


def _no_polygons(found: str) -> CHMv2Error:
    return CHMv2Error(
        "polygons, as a GeoDataFrame, a GeoSeries or shapely geometries",
        found,
        "read them: geopandas.read_file('stands.gpkg')",
    )


def _validate(geometries: Geometries) -> None:
    import shapely

    dimensions = shapely.get_dimensions(geometries)
    wrong = (dimensions != 2) & (dimensions >= 0) & ~shapely.is_empty(geometries)
    wrong |= shapely.get_type_id(geometries) == shapely.GeometryType.GEOMETRYCOLLECTION
    if wrong.any():
        kinds = sorted({geometry.geom_type for geometry in geometries[wrong]})
        raise CHMv2Error(
            "polygons and multipolygons",
            f"{int(wrong.sum())} of {' and '.join(kinds)}",
            "turn them into areas: polygons.buffer(10)",
        )


def _on_pixels(geometries: Geometries, grid: Grid) -> Geometries:
    """Count polygons in pixels, repaired where they cross themselves."""
    import shapely

    (top, left), (dy, dx) = grid.edges, grid.pixel
    geometries = np.where(shapely.is_missing(geometries), shapely.Polygon(), geometries)
    flat: Geometries = shapely.force_2d(geometries)
    flat = shapely.transform(flat, lambda xy: (xy - (left, top)) / (dx, -dy))
    if not np.isfinite(shapely.bounds(flat[~shapely.is_empty(flat)])).all():
        raise CHMv2Error(
            "the polygons cannot be reprojected to the raster's CRS",
            fix="check whether polygons.crs is theirs; if not: polygons.set_crs('EPSG:...', "
            "allow_override=True)",
        )
    broken = ~shapely.is_valid(flat)
    if broken.any():
        warn(
            f"{int(broken.sum())} polygons cross themselves and were repaired by "
            "shapely.make_valid; check their areas"
        )
        flat[broken] = [_keep_areas(repaired) for repaired in shapely.make_valid(flat[broken])]
    return flat


@dataclass(frozen=True)
class Piece:
    """The part of one polygon in one square of the raster, in pixels."""

    #: Index of the polygon.
    polygon: int
    #: Pixels it reaches into.
    window: Window
    geometry: Any


def cut_pieces(geometries: Geometries, shape: tuple[int, int]) -> Iterator[Piece]:
    """Cut polygons at fixed squares of the raster, in order of polygons, to bound memory.

    The squares do not depend on chunks, so neither do the sums.
    """
    import shapely

    for index, geometry in enumerate(geometries):
        top, bottom, left, right = _window(geometry, (0, shape[0], 0, shape[1]))
        if top >= bottom or left >= right:
            continue
        squares = [
            (max(top, row), min(bottom, row + _TILE), max(left, col), min(right, col + _TILE))
            for row, col in product(
                range(top - top % _TILE, bottom, _TILE), range(left - left % _TILE, right, _TILE)
            )
        ]
        parts = np.array([shapely.box(w, -s, e, -n) for n, s, w, e in squares], dtype=object)
        shapely.prepare(geometry)
        cut = ~shapely.covers(geometry, parts)
        parts[cut] = shapely.intersection(geometry, parts[cut])
        for part, square in zip(parts, squares, strict=True):
            if (part := _keep_areas(part)).area > 0:
                yield Piece(index, _window(part, square), part)


def _window(geometry: Any, within: Window) -> Window:
    """Return the window of pixels that a polygon reaches into."""
    if geometry.is_empty:
        return (0, 0, 0, 0)
    west, south, east, north = geometry.bounds
    top, bottom = max(within[0], math.floor(-north)), min(within[1], math.ceil(-south))
    return top, bottom, max(within[2], math.floor(west)), min(within[3], math.ceil(east))


def _keep_areas(geometry: Any) -> Any:
    """Drop the lines and points that remain after cutting and repairing."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(geometry))
    return shapely.multipolygons(parts[shapely.area(parts) > 0])
