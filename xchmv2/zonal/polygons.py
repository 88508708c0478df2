"""Polygons in any CRS: read, placed on the pixels of a raster, and cut into pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.errors import CHMv2Error, require_library, warn
from xchmv2.raster import Grid, crs_label

#: Distance of the vertices that are added to sides before a polygon is reprojected, which keeps the
#: sides within a tenth of a metre [degrees, m].
_SPACING = 0.01, 1000.0
#: Polygons are clipped at this distance from the raster, since a projection is valid in its own
#: region only [degrees].
_REACH = 10.0

#: Side of the squares, counted from the raster's first pixel, that polygons are cut into [px].
TILE = 1024

#: Advice for a CRS that is not that of the coordinates.
_RELABEL = "such as: polygons.set_crs('EPSG:...', allow_override=True)"

#: Geometries as an object array of shapely polygons.
Geometries = npt.NDArray[np.object_]
#: Rows and columns of a window, each as (start, stop).
Spans = tuple[tuple[int, int], tuple[int, int]]


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

    Missing geometries are empty polygons; invalid ones are repaired with a warning. Other
    geometries, coordinates that are not finite, and a CRS on the polygons or the raster only are
    refused; geometries without anything that could hold a CRS are in the raster's.
    """
    import shapely

    series, labels = as_series(polygons)
    names = next(iter(labels.values()))
    given = np.asarray(series.array, dtype=object)
    given = np.where(shapely.is_missing(given), shapely.Polygon(), given)
    _validate(given, names)
    _validate_crs(series.crs, hasattr(polygons, "crs"), grid)
    crs = series.crs if series.crs is not None else grid.crs and grid.crs.proj
    found = given
    if crs is not None and crs.is_geographic:
        largest = np.abs(shapely.get_coordinates(given)).max(axis=0, initial=0)
        if (largest > (360, 90)).any():
            raise CHMv2Error(
                f"longitudes and latitudes, as polygons.crs says ({crs.name})",
                f"x up to {largest[0]:g} and y up to {largest[1]:g} in size",
                f"correct it, {_RELABEL}",
            )
        found, crossing = _unroll(given)
        if crossing.any():
            warn(
                f"{listed(names, crossing)} have sides of more than 180 degrees of longitude, "
                "which were taken to cross 180 degrees"
            )
    invalid = ~shapely.is_valid(found)
    if invalid.any():
        warn(
            f"{listed(names, invalid)} are invalid "
            f"({shapely.is_valid_reason(found[invalid][0]).partition('[')[0]}) and were repaired "
            "by shapely.make_valid; check their areas"
        )
        found = _repair(found)
    if crs is not None:
        found = _reproject(found, crs, grid)
    return Polygons(given, crs, _on_pixels(found, grid), labels)


def listed(names: npt.NDArray[Any], which: npt.NDArray[np.bool_]) -> str:
    """Count some polygons, and name the first."""
    shown = ", ".join(str(name) for name in names[which][:5])
    count = int(which.sum())
    return f"{count} of {len(names)} polygons ({shown}{', ...' if count > 5 else ''})"


def _validate(geometries: Geometries, names: npt.NDArray[Any]) -> None:
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
    points, owner = shapely.get_coordinates(geometries, return_index=True)
    broken = np.zeros(len(geometries), bool)
    broken[owner[~np.isfinite(points).all(axis=1)]] = True
    if broken.any():
        raise CHMv2Error(
            "finite coordinates",
            f"NaN or infinite ones in {listed(names, broken)}",
            f"correct them, or leave them out: polygons.drop({names[broken].tolist()})",
        )


def _validate_crs(crs: Any, holder: bool, grid: Grid) -> None:
    if crs is not None and grid.crs is None:
        raise CHMv2Error(
            f"the polygons are in {crs.name}, but the raster has no CRS",
            fix="write it: height.rio.write_crs('EPSG:...')",
        )
    if crs is None and holder and grid.crs is not None:
        label = crs_label(grid.crs)
        raise CHMv2Error(
            f"polygons with a CRS, as the raster has one ({label})",
            "none",
            f"set theirs; if it is that of the raster: polygons.set_crs({label!r})",
        )


def _unroll(geometries: Geometries) -> tuple[Geometries, npt.NDArray[np.bool_]]:
    """Join polygons whose longitudes jump at 180 degrees, and tell which these are.

    A side from 179.9 to -179.9 runs over 180 degrees, not around the Earth; one from -180 to 180
    is the edge of a map of the whole Earth.
    """
    import shapely

    parts, owner = shapely.get_parts(geometries, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    step = np.abs(np.diff(points[:, 0]))
    jumps = (np.diff(ring) == 0) & (step > 180) & (step < 360 - 1e-6)
    crossing = np.zeros(len(geometries), bool)
    crossing[owner[part[ring[:-1][jumps]]]] = True
    found = geometries.copy()
    for k in np.flatnonzero(crossing):
        found[k] = shapely.multipolygons([_unroll_part(one) for one in parts[owner == k]])
    return found, crossing


def _unroll_part(polygon: Any) -> Any:
    import shapely

    rings = [shapely.get_coordinates(ring) for ring in (polygon.exterior, *polygon.interiors)]
    for ring in rings:
        ring[:, 0] = np.unwrap(ring[:, 0], period=360)
        ring[:, 0] += 360 * np.round((rings[0][0, 0] - ring[0, 0]) / 360)
    if any(abs(ring[0, 0] - ring[-1, 0]) > 1 for ring in rings):  # around a pole
        return polygon
    return shapely.Polygon(rings[0], rings[1:])


def _reproject(geometries: Geometries, crs: Any, grid: Grid) -> Geometries:
    """Reproject polygons to the CRS of a raster; their sides are straight in their own CRS.

    Longitudes become those within 180 degrees of the raster's middle.
    """
    import geopandas
    import shapely

    target = grid.crs.proj
    found = geometries
    if crs.is_geographic:
        low, high = _box(grid, crs)
        found = _around(found, (low[0] + high[0]) / 2)
    if crs == target:
        return found
    if crs.is_geographic:
        bounds = shapely.bounds(found)
        low, high = low - _REACH, high + _REACH
        far = (bounds[:, :2] < low).any(axis=1) | (bounds[:, 2:] > high).any(axis=1)
        found = found.copy()
        found[far] = shapely.clip_by_rect(found[far], *low, *high)
        found = shapely.segmentize(found, _SPACING[0])
    else:
        metre = float(crs.axis_info[0].unit_conversion_factor)
        found = shapely.segmentize(found, _SPACING[1] / metre)
    found = np.asarray(geopandas.GeoSeries(found, crs=crs).to_crs(target).array, object)
    if target.is_geographic and np.isfinite(shapely.get_coordinates(found)).all():
        low, high = _box(grid, target)
        found = _around(_repair(_unroll(found)[0]), (low[0] + high[0]) / 2)
    return found


def _box(grid: Grid, crs: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the lowest and the highest longitude and latitude of a raster."""
    import shapely

    if grid.crs.proj.is_geographic:
        bounds = np.array(grid.geobox.boundingbox.bbox)
    else:
        outline = np.array([grid.geobox.footprint(crs).geom], dtype=object)
        bounds = shapely.bounds(_unroll(outline)[0][0])
    return bounds[:2], bounds[2:]


def _around(geometries: Geometries, middle: float) -> Geometries:
    """Move what is farther than 180 degrees east or west of a longitude to the other side of it."""
    import shapely

    found = geometries.copy()
    west, _, east, _ = shapely.bounds(geometries).T
    low, high = middle - 180, middle + 180
    for k in np.flatnonzero((west < low) | (east > high)):
        parts = []
        for turn in range(math.floor((west[k] - low) / 360), math.ceil((east[k] - low) / 360)):
            moved = shapely.transform(geometries[k], lambda xy, turn=turn: xy - (360 * turn, 0))
            parts.append(_keep_areas(shapely.clip_by_rect(moved, low, -90, high, 90)))
        found[k] = shapely.union_all(parts)  # what was cut at 180 degrees is one again
    return found


def as_series(polygons: Any) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """Return geometries as a GeoSeries, and their index and columns by name."""
    import geopandas
    import shapely

    columns = {}
    if isinstance(polygons, geopandas.GeoDataFrame):
        series = polygons.geometry
        columns = {str(n): polygons[n].to_numpy() for n in polygons.columns if n != series.name}
    elif isinstance(polygons, geopandas.GeoSeries):
        series = polygons
    else:
        members = [polygons] if isinstance(polygons, shapely.Geometry) else polygons
        if isinstance(members, str) or not hasattr(members, "__len__"):
            raise _no_polygons(type(polygons).__name__)
        if not all(member is None or isinstance(member, shapely.Geometry) for member in members):
            raise _no_polygons(f"a {type(members).__name__} of other objects")
        series = geopandas.GeoSeries(list(members))
    if not len(series):
        raise _no_polygons("none")
    names = series.index.to_numpy()
    if series.index.nlevels > 1:
        names = np.array([str(entry) for entry in names], dtype=object)
    return series, {str(series.index.name or "polygon"): names, **columns}


def _no_polygons(found: str) -> CHMv2Error:
    return CHMv2Error(
        "polygons, as a GeoDataFrame, a GeoSeries or shapely geometries",
        found,
        "read them: geopandas.read_file('stands.gpkg')",
    )


def _on_pixels(geometries: Geometries, grid: Grid) -> Geometries:
    """Count polygons in pixels."""
    import shapely

    (top, left), (dy, dx) = grid.edges, grid.pixel
    flat: Geometries = shapely.force_2d(geometries)
    flat = shapely.transform(flat, lambda xy: (xy - (left, top)) / (dx, -dy))
    if not np.isfinite(shapely.get_coordinates(flat)).all():
        raise CHMv2Error(
            "the polygons cannot be reprojected to the raster's CRS",
            fix=f"check whether polygons.crs is theirs, and correct it, {_RELABEL}",
        )
    return _repair(flat)


def _repair(geometries: Geometries) -> Geometries:
    import shapely

    found, broken = geometries.copy(), ~shapely.is_valid(geometries)
    found[broken] = [_keep_areas(repaired) for repaired in shapely.make_valid(found[broken])]
    return found


def _keep_areas(geometry: Any) -> Any:
    """Drop the lines and points that remain after cutting and repairing."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(geometry))
    return shapely.multipolygons(parts[shapely.area(parts) > 0])


@dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of polygons, each in one square of the raster, in pixels; in order of polygons."""

    #: Index of each piece's polygon.
    polygon: npt.NDArray[np.int64]
    #: Pixels that each reaches into: first row, end row, first column, end column.
    window: npt.NDArray[np.int64]
    geometry: Geometries

    def __len__(self) -> int:
        return len(self.polygon)

    def __getitem__(self, which: npt.NDArray[Any]) -> Pieces:
        return Pieces(self.polygon[which], self.window[which], self.geometry[which])


def cut_pieces(geometries: Geometries, shape: tuple[int, int]) -> Pieces:
    """Cut polygons at fixed squares of the raster, to bound memory.

    The squares do not depend on chunks, so neither do the sums.
    """
    import shapely

    limits = np.array([0, shape[0], 0, shape[1]])
    windows = _windows(geometries, limits)
    first, last = windows[:, ::2] // TILE, (windows[:, 1::2] - 1) // TILE
    tall, wide = np.maximum(last - first + 1, 0).T
    counts = tall * wide
    polygon = np.repeat(np.arange(len(geometries)), counts)
    place = np.arange(len(polygon)) - np.repeat(np.cumsum(counts) - counts, counts)
    row, col = first[polygon].T + np.divmod(place, wide[polygon])
    window = windows[polygon]
    low, high = window[:, ::2], window[:, 1::2]
    square = np.stack([row, col], axis=1) * TILE
    low, high = np.maximum(low, square), np.minimum(high, square + TILE)
    boxes = shapely.box(low[:, 1], -high[:, 0], high[:, 1], -low[:, 0])
    parts = geometries[polygon]
    # Most polygons lie on the raster and in one square: these are whole.
    bounds = shapely.bounds(parts)
    cut = counts[polygon] > 1
    cut |= ~shapely.covers(shapely.box(0, -shape[0], shape[1], 0), shapely.box(*bounds.T))
    shapely.prepare(geometries[np.unique(polygon[cut])])
    full = cut.copy()
    full[cut] = shapely.covers(parts[cut], boxes[cut])
    parts[full] = boxes[full]
    cut &= ~full
    found = shapely.intersection(parts[cut], boxes[cut])
    parts[cut] = [_keep_areas(part) for part in found]
    squares = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    kept = shapely.area(parts) > 0
    return Pieces(polygon[kept], _windows(parts[kept], squares[kept]), parts[kept])


def _windows(geometries: Geometries, within: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the windows of pixels that polygons reach into, empty for empty ones."""
    import shapely

    west, south, east, north = np.nan_to_num(shapely.bounds(geometries)).T
    found = np.stack([np.floor(-north), np.ceil(-south), np.floor(west), np.ceil(east)], axis=1)
    low, high = within[..., ::2], within[..., 1::2]
    # Places far from the raster are beyond whole numbers.
    found[:, ::2] = np.clip(found[:, ::2], low, high)
    found[:, 1::2] = np.clip(found[:, 1::2], low, high)
    return found.astype(np.int64)
