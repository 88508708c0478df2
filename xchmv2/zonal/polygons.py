"""Polygons as users give them, and where they lie on a raster's pixels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.errors import CHMv2Error
from xchmv2.raster import Grid

#: Sides of polygons of another CRS are straight there: they are bent at points so far apart, which
#: leaves them less than a tenth of a metre off [degrees, m].
_BEND = 0.01, 1000.0
#: What lies further from the raster than this is cut off: projections end somewhere [degrees].
_REACH = 10.0

#: Geometries as an object array of shapely polygons.
Geometries = npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Polygons:
    """Polygons, once as they were given and once counted in a raster's pixels.

    Parameters
    ----------
    given : ndarray of object, shape (N,)
        In the CRS they came in.
    crs : pyproj CRS or None
        That CRS; without one, the raster's.
    on_pixels : ndarray of object, shape (N,)
        The same in pixels: x counts columns, y counts rows downwards as negative numbers, so that
        the raster spans x from 0 to its width and y from minus its height to 0.
    labels : dict of str to ndarray, shape (N,)
        What names the polygons: their index, and the columns of a GeoDataFrame.
    """

    given: Geometries
    crs: Any
    on_pixels: Geometries
    labels: dict[str, npt.NDArray[Any]]


def require_zonal() -> None:
    """Refuse to go on without the libraries that polygons need.

    Raises
    ------
    CHMv2Error
        If one is not installed.
    """
    try:
        import exactextract  # noqa: F401
        import geopandas  # noqa: F401
        import xvec  # noqa: F401
    except ImportError as error:
        raise CHMv2Error(
            "geopandas, exactextract and xvec, to work with polygons",
            f"that {error.name} is not installed",
            'pip install "xchmv2[zonal]"',
        ) from None


def read_polygons(polygons: Any, grid: Grid) -> Polygons:
    """Read polygons and place them on the pixels of a raster.

    Parameters
    ----------
    polygons : GeoDataFrame, GeoSeries, shapely geometry or sequence of them
        Polygons and multipolygons; without a CRS of their own they are in the raster's.
    grid : Grid
        The raster's pixels.

    Returns
    -------
    Polygons
        In the order given. Missing geometries are empty polygons.

    Raises
    ------
    CHMv2Error
        If there are no polygons, other geometries, or a CRS on the polygons only.

    Warns
    -----
    UserWarning
        If polygons cross themselves; they are repaired.
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
                "a CRS on the raster, to bring polygons of another CRS to it",
                f"none, with polygons in {series.crs.name}",
                "write it: height.rio.write_crs('EPSG:...')",
            )
        placed = _bring(series, grid)
    crs = series.crs if series.crs is not None else grid.crs and grid.crs.proj
    return Polygons(given, crs, _on_pixels(np.asarray(placed.array, object), grid), labels)


def _bring(series: Any, grid: Grid) -> Any:
    """Bring polygons to the CRS of a raster, along their sides as they are in their own."""
    import shapely

    target = grid.crs.proj
    if series.crs == target:
        return series
    found = np.asarray(series.array, dtype=object)
    if series.crs.is_geographic:
        found = shapely.segmentize(_near(found, grid, series.crs), _BEND[0])
    else:
        metre = float(series.crs.axis_info[0].unit_conversion_factor)
        found = shapely.segmentize(found, _BEND[1] / metre)
    return type(series)(found, crs=series.crs).to_crs(target)


def _near(geometries: Geometries, grid: Grid, crs: Any) -> Geometries:
    """Cut off what lies a continent away from a raster: its CRS may have no place for it."""
    import shapely

    box = grid.geobox.footprint(crs).boundingbox
    low, high = np.array(box.bbox[:2]) - _REACH, np.array(box.bbox[2:]) + _REACH
    bounds = shapely.bounds(geometries)
    far = (bounds[:, :2] < low).any(axis=1) | (bounds[:, 2:] > high).any(axis=1)
    # Not what is nowhere on the Earth: that is a wrong CRS, and to be refused.
    far &= (np.abs(bounds) <= (360.0, 90.0, 360.0, 90.0)).all(axis=1)
    found = geometries.copy()
    found[far] = shapely.clip_by_rect(geometries[far], *low, *high)
    return found


def as_series(polygons: Any) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """Return a GeoSeries, and what names its members."""
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
            raise _no_polygons(f"a {type(members).__name__} of other things")
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
            "turn them into areas: polygons.buffer(...)",
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
            "polygons that the raster's CRS can place",
            "coordinates that are not finite",
            "check the CRS of the polygons: polygons.crs",
        )
    broken = ~shapely.is_valid(flat)
    if broken.any():
        warnings.warn(
            f"{int(broken.sum())} polygons cross themselves and were repaired by "
            "shapely.make_valid: check their areas",
            UserWarning,
            stacklevel=4,
        )
        flat[broken] = shapely.make_valid(flat[broken])
    return flat
