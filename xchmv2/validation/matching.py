"""Reference heights matched with a canopy height map: rasters, footprints and plots."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from odc.geo.xr import wrap_xr, xr_reproject
from scipy import ndimage

from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    Grid,
    Raster,
    find_grid,
    pixel_size,
    read_heights,
    validate_number,
    validate_plane,
    validate_text,
)

#: Radius of a GEDI footprint [m], and the height percentile compared with its RH98.
RADIUS = 12.0
PERCENTILE = 98.0
_Floats = npt.NDArray[np.float64]
#: Possible reference heights [m]; lidar noise around the ground is set to 0.
_LOWEST, _HIGHEST = 0.0, 120.0
_GROUND_NOISE = 0.5
#: Relative difference up to which pixel sizes count as equal.
_TOLERANCE = 0.01
#: Stand-in where neither grid has a CRS: within one CRS, whichever it is, no coordinates are
#: transformed.
_PLANE = CRS("EPSG:3857")
#: Names of the column of reference heights of points, in order of preference.
_COLUMNS = ("height", "rh98", "rh_98", "RH98", "canopy_height")
#: Smallest valid share of a footprint: the tallest trees may be in the missing part.
_LEAST_KNOWN = 0.9
#: Number of footprints that are computed together.
_BATCH = 2000


@dataclass(frozen=True, eq=False)
class Matched:
    """Heights and reference heights of the same ground and date.

    Parameters
    ----------
    height, reference : ndarray of float64
        (H, W) on the heights' grid, or (N,) at points [m]; NaN where either is missing.
    """

    height: npt.NDArray[np.float64]
    reference: npt.NDArray[np.float64]

    @property
    def is_raster(self) -> bool:
        """Whether the heights are a raster rather than points."""
        return self.height.ndim == 2

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Where both heights are valid."""
        return np.isfinite(self.height) & np.isfinite(self.reference)


def match(
    height: Raster,
    reference: Any,
    *,
    column: str | None = None,
    radius: float = RADIUS,
    percentile: float = PERCENTILE,
) -> Matched:
    """Match heights of one date with a reference.

    Parameters
    ----------
    height : DataArray or Dataset
        (y, x) heights [m], or a Dataset with ``canopy_height``; of lazy heights only those under
        the reference are computed.
    reference : DataArray, GeoDataFrame or DataFrame
        As in :func:`~xchmv2.validation.validate`.
    column, radius, percentile
        As in :func:`~xchmv2.validation.validate`.

    Returns
    -------
    Matched
        In memory.

    Raises
    ------
    CHMv2Error
        If they do not overlap, or one of them cannot be used.
    """
    validate_text("column", column, "rh98")
    validate_number("radius", radius, RADIUS, above=0, unit="m")
    validate_number("percentile", percentile, PERCENTILE, least=0, most=100)
    plane, grid = _read_plane(height)
    if isinstance(reference, xr.DataArray):
        found = _under_raster(plane, grid, reference)
    else:
        found = Matched(*_under_footprints(plane, grid, reference, column, radius, percentile))
    if not found.known.any():
        raise CHMv2Error(
            "heights and reference do not overlap where both are valid",
            fix="check their bounds and CRS: height.odc.geobox.boundingbox, "
            "reference.odc.geobox.boundingbox (of points: reference.total_bounds)",
        )
    return found


def _read_plane(height: Raster) -> tuple[xr.DataArray, Grid]:
    """Read heights of one date, with dims in order, and their pixel grid."""
    height = read_heights(height)
    grid = validate_plane(height, "heights of one date")
    return height.transpose(*grid.dims), grid


def _under_raster(height: xr.DataArray, grid: Grid, reference: xr.DataArray) -> Matched:
    """Match heights with a reference on the heights' grid, where the reference is valid."""
    known, where = place_reference(reference, grid)
    values = np.asarray(height.isel(where).values, np.float64)
    both = np.isfinite(values) & np.isfinite(known)
    # Blocks start where both are valid, not at the edges of either raster.
    inside = _extents(both)
    first, second = (np.where(both, heights, np.nan)[inside] for heights in (values, known))
    return Matched(first, second)


def place_reference(reference: xr.DataArray, grid: Grid) -> tuple[_Floats, dict[str, slice]]:
    """Resample reference heights to a grid, for validation, calibration and training.

    `reference`: (y, x) heights [m] on any grid, nodata as its metadata declare; only pixels under
    the grid are computed. Returns float64 heights (h, w) [m] over the rows and columns of the grid
    that have a reference, NaN where it is missing, empty if the two do not overlap; and these rows
    and columns, as an indexer by dim. A CHMv2Error refuses what is no DataArray of (y, x), heights
    outside 0 to 120 m, and a CRS on only one of the two.
    """
    if not isinstance(reference, xr.DataArray):
        raise CHMv2Error(
            "reference heights as a DataArray",
            type(reference).__name__,
            "choose the variable: reference['canopy_height']",
        )
    cleaned = _clean_heights(reference)
    window = _overlap(grid, cleaned)
    known = _on_grid(cleaned, _crop(grid, *window))
    inside = _extents(np.isfinite(known))
    spans = (
        slice(span.start + part.start, span.start + part.stop)
        for span, part in zip(window, inside, strict=True)
    )
    return known[inside], dict(zip(grid.dims, spans, strict=True))


def _extents(known: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return the rows and columns from the first to the last with a valid pixel."""
    (found,) = ndimage.find_objects(known.astype(np.uint8), max_label=1)
    return found or (slice(0, 0), slice(0, 0))


def _clean_heights(reference: xr.DataArray) -> xr.DataArray:
    """Read reference heights of one date: float32 [m], dims in order; lazy heights remain lazy."""
    flat = reference.squeeze(drop=True)
    grid = find_grid(flat if flat.ndim == 2 else reference)
    # A spatial dim of one row or column is kept.
    single = [dim for dim in reference.dims if dim not in grid.dims and reference.sizes[dim] == 1]
    flat = reference.squeeze(single, drop=True)
    grid = validate_plane(flat, "reference heights of one date", "reference")
    return read_heights(flat).transpose(*grid.dims).astype(np.float32)


def _overlap(grid: Grid, reference: xr.DataArray) -> tuple[slice, slice]:
    """Return the rows and columns of a grid that a reference overlaps; empty if none."""
    there = find_grid(reference)
    if (grid.crs is None) != (there.crs is None):
        lacking = "heights or imagery" if grid.crs is None else "reference"
        raise CHMv2Error(
            "a CRS on the heights or imagery and on the reference, or on neither",
            f"none on the {lacking}",
            "write it: array.rio.write_crs('EPSG:...')",
        )
    return _spans(_placed(grid), _placed(there))


def _placed(grid: Grid) -> Grid:
    return replace(grid, crs=_PLANE) if grid.crs is None else grid


def _spans(grid: Grid, other: Grid, margin: int = 2) -> tuple[slice, slice]:
    """Return the rows and columns of a grid that another grid, in any CRS, overlaps."""
    box = other.geobox.footprint(grid.crs, npoints=20).boundingbox
    spans = []
    for axis, ends in enumerate(((box.bottom, box.top), (box.left, box.right))):
        pixels = sorted((end - grid.edges[axis]) / grid.pixel[axis] for end in ends)
        first = min(grid.shape[axis], max(0, math.floor(pixels[0]) - margin))
        last = min(grid.shape[axis], max(first, math.ceil(pixels[1]) + margin))
        spans.append(slice(first, last))
    return spans[0], spans[1]


def _crop(grid: Grid, rows: slice, cols: slice) -> Grid:
    """Return the part of a grid with some rows and columns."""
    starts = rows.start, cols.start
    edges = [e + p * n for e, p, n in zip(grid.edges, grid.pixel, starts, strict=True)]
    shape = rows.stop - rows.start, cols.stop - cols.start
    return replace(grid, shape=shape, edges=(edges[0], edges[1]))


def _on_grid(reference: xr.DataArray, grid: Grid) -> _Floats:
    """Average a reference [m] over the pixels of a grid; interpolate a coarser reference."""
    there, grid = _placed(find_grid(reference)), _placed(grid)
    spans = _spans(there, grid)
    part = reference.isel(dict(zip(there.dims, spans, strict=True))).values
    if not part.size or 0 in grid.shape:
        return np.full(grid.shape, np.nan)
    return _average_onto(_checked(part), _crop(there, *spans).geobox, grid.geobox)


def _checked(
    values: npt.NDArray[np.floating],
    fix: str = "mask them: reference.where((reference >= 0) & (reference <= 120)); or, if they are "
    "in feet: reference.assign_attrs(units='ft')",
) -> _Floats:
    """Refuse impossible reference heights, outside 0 to 120 m; lidar noise becomes 0 m."""
    wrong = (values < _LOWEST - _GROUND_NOISE) | (values > _HIGHEST)
    if wrong.any():
        raise CHMv2Error(
            f"reference heights of {_LOWEST:g} to {_HIGHEST:g} m",
            f"{int(wrong.sum())} outside, from {np.nanmin(values):g} to {np.nanmax(values):g}",
            fix,
        )
    return np.clip(values.astype(np.float64), _LOWEST, None)


def _average_onto(heights: _Floats, source: GeoBox, target: GeoBox) -> _Floats:
    """Resample heights [m] to other pixels: averaged by area, or interpolated if they are coarser.

    NaN where less than half of the averaged area is valid.
    """
    there = source.to_crs(target.crs)  # the units of two CRSs may differ
    finer = abs(there.resolution.x) <= abs(target.resolution.x) * (1 + _TOLERANCE)
    plane = wrap_xr(heights, source, nodata=np.nan)
    how = "average" if finer else "bilinear"
    placed = xr_reproject(plane, target, resampling=how, dst_nodata=np.nan).values
    if not finer:
        return np.asarray(placed, np.float64)
    # The average of a pixel uses its valid part only, however small that is.
    known = wrap_xr(np.isfinite(heights).astype(np.float64), source)
    share = xr_reproject(known, target, resampling="average", dst_nodata=np.nan).values
    return np.where(share >= 0.5 - 1e-6, placed, np.nan)


def _under_footprints(
    height: xr.DataArray,
    grid: Grid,
    points: Any,
    column: str | None,
    radius: float,
    percentile: float,
) -> tuple[_Floats, _Floats]:
    """Compute a percentile of the heights in each footprint, and its reference height, (N,) [m].

    NaN for footprints of which less than nine tenths are valid. `points` hold points, or columns x
    and y in the CRS of the heights; a column ``radius`` overrides `radius` [m on the ground].
    """
    x, y = _coordinates(points, grid)
    reference = _heights(points, column)
    radii = _radii(points, radius)
    rows, cols = (y - grid.edges[0]) / grid.pixel[0], (x - grid.edges[1]) / grid.pixel[1]
    near = (rows > 0) & (rows < grid.shape[0]) & (cols > 0) & (cols < grid.shape[1])
    near &= np.isfinite(reference)
    found = np.full(len(reference), np.nan)
    sides = pixel_size(height)
    # Sorted by place, so that each batch reads few chunks.
    order = np.lexsort((cols, np.floor(rows / 512)))
    order = order[near[order]]
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        found[batch] = _batch(
            height, grid, rows[batch], cols[batch], radii[batch], sides, percentile
        )
    return found, reference


def _batch(
    height: xr.DataArray,
    grid: Grid,
    rows: _Floats,
    cols: _Floats,
    radii: _Floats,
    sides: tuple[float, float],
    percentile: float,
) -> _Floats:
    """Read the pixels whose centres lie in footprints, and compute the percentile of each."""
    reach = [math.ceil(float(radii.max()) / side) + 1 for side in sides]
    down, along = (a.ravel() for a in np.mgrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1])
    # [points, pixels around them]
    row, col = (
        np.floor(centre).astype(int)[:, None] + step
        for centre, step in ((rows, down), (cols, along))
    )
    distance = np.hypot(
        (row + 0.5 - rows[:, None]) * sides[0], (col + 0.5 - cols[:, None]) * sides[1]
    )
    # A footprint always includes the pixel at its centre, even if it is smaller.
    inside = (distance <= radii[:, None]) | ((down == 0) & (along == 0))
    there = (row >= 0) & (row < grid.shape[0]) & (col >= 0) & (col < grid.shape[1])
    used = inside & there
    index = np.where(used, row, 0)[used], np.where(used, col, 0)[used]
    where = {dim: xr.DataArray(i, dims="pixel") for dim, i in zip(grid.dims, index, strict=True)}
    values = np.full(used.shape, np.nan)
    (values[used],) = dask.compute(height.isel(where).data)
    known = np.isfinite(values)
    enough = known.sum(axis=1) >= _LEAST_KNOWN * inside.sum(axis=1)
    found = np.full(len(rows), np.nan)
    if enough.any():
        found[enough] = np.nanpercentile(values[enough], percentile, axis=1)
    return found


def _coordinates(points: Any, grid: Grid) -> tuple[_Floats, _Floats]:
    """Return x and y of points in the CRS of the heights."""
    if isinstance(points, pd.DataFrame) and hasattr(points, "geometry"):
        return place_points(points.geometry, grid)
    if isinstance(points, pd.DataFrame) and {"x", "y"} <= set(points.columns):
        return points["x"].to_numpy(np.float64), points["y"].to_numpy(np.float64)
    found = list(points.columns) if isinstance(points, pd.DataFrame) else type(points).__name__
    raise CHMv2Error(
        "a reference as a DataArray, or points as a GeoDataFrame or a DataFrame with x, y and "
        "height",
        f"{found}",
        "make points: geopandas.GeoDataFrame(reference, geometry=geopandas.points_from_xy("
        "reference['lon'], reference['lat']), crs=4326)",
    )


def place_points(series: Any, grid: Grid) -> tuple[_Floats, _Floats]:
    """Return x and y of a GeoSeries of points in the CRS of a grid."""
    kinds = sorted(set(series.geom_type.dropna()) - {"Point"})
    if kinds:
        raise CHMv2Error(
            "points",
            f"{', '.join(kinds)}",
            "take their centres: reference.set_geometry(reference.centroid)",
        )
    if series.crs is not None:
        if grid.crs is None:
            raise CHMv2Error(
                f"the points are in {series.crs.name}, but the heights have no CRS",
                fix="write it: height.rio.write_crs('EPSG:...')",
            )
        series = series.to_crs(grid.crs.proj)
    return series.x.to_numpy(np.float64), series.y.to_numpy(np.float64)


def _heights(points: pd.DataFrame, column: str | None) -> _Floats:
    names = [name for name in _COLUMNS if name in points.columns] if column is None else [column]
    if not names or names[0] not in points.columns:
        raise CHMv2Error(
            f"a column of reference heights, such as {', '.join(_COLUMNS[:2])}"
            if column is None
            else f"a column {column!r}",
            f"columns {[str(name) for name in points.columns]}",
            "name the one that holds them, such as column='rh98'",
        )
    heights = points[names[0]].to_numpy(np.float64, na_value=np.nan)
    heights = np.where(np.isfinite(heights), heights, np.nan)
    return _checked(
        heights, f"leave them out: reference[reference[{names[0]!r}].between(0, {_HIGHEST:g})]"
    )


def _radii(points: pd.DataFrame, radius: float) -> _Floats:
    given = points["radius"] if "radius" in points.columns else radius
    radii = np.broadcast_to(np.asarray(given, np.float64), (len(points),))
    if len(radii) and not (np.isfinite(radii).all() and radii.min() > 0):
        raise CHMv2Error(
            "footprints with a radius above 0 m",
            f"{radii.min():g}",
            "give GEDI's: radius=12",
        )
    return radii
