"""Reference heights matched with a canopy height map: rasters, footprints and plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import dask
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
import xarray as xr
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from odc.geo.overlap import compute_reproject_roi
from odc.geo.xr import wrap_xr, xr_reproject
from scipy import ndimage

from xchmv2.errors import CHMv2Error, require_library
from xchmv2.raster import (
    Grid,
    Raster,
    find_crs,
    find_grid,
    pixel_size,
    read_heights,
    validate_number,
    validate_plane,
    validate_text,
)

#: Radius of a GEDI footprint [m], and the height percentile compared with its RH98.
RADIUS = 12.0
_PERCENTILE = 98.0
#: What the reference height of a footprint or plot is: a percentile of its heights, or their mean.
Statistic = float | Literal["mean"]
_Floats = npt.NDArray[np.float64]
_Whole = npt.NDArray[np.int64]
#: Possible reference heights [m]; lidar noise around the ground is set to 0.
_LOWEST, _HIGHEST = 0.0, 120.0
_GROUND_NOISE = 0.5
#: Relative difference up to which pixel sizes count as equal.
_TOLERANCE = 0.01
#: Stand-in where neither grid has a CRS: within one CRS, whichever it is, no coordinates are
#: transformed.
_PLANE = CRS("EPSG:3857")
#: Names of the column of reference heights of points and plots, in order of preference.
_COLUMNS = ("height", "rh98", "rh_98", "RH98", "canopy_height")
#: Names of columns of GEDI products that mark bad shots: by 0, and by any other number than 0.
_QUALITY = ("quality_flag", "l2a_quality_flag", "l2b_quality_flag", "l4_quality_flag")
_DEGRADED = ("degrade_flag",)
#: Smallest valid share of a footprint or plot: the tallest trees may be in the missing part.
_LEAST_KNOWN = 0.9
#: Number of pixels under footprints and plots that are read together.
_BATCH = 2**21
#: Parts of equal area into which the heights of a footprint or plot are sorted.
_PARTS = 32


@dataclass(frozen=True, eq=False)
class Matched:
    """Heights and reference heights of the same ground and date.

    Parameters
    ----------
    height, reference : ndarray of float64
        (H, W) on the heights' grid, or (N,) under footprints or plots [m]; NaN where either is
        missing.
    pixel : tuple of float
        Size of a pixel of the heights on the ground, (tall, wide) [m].
    spread : ndarray of float64, optional
        (H, W) ``bin_spread`` [m] of a Dataset of heights; None without, and for footprints and
        plots.
    statistic : float or "mean", optional
        Percentile, or mean, of the heights under each footprint or plot; None for a raster.
    samples : ndarray of float64, optional
        (N, Q) the heights [m] that make up `height`: under a footprint or plot means of Q parts of
        equal area, from the lowest to the highest, or, for a percentile, `height` alone. None for a
        raster.
    centres : ndarray of float64, optional
        (N, 2) row and column [px] of footprints and plots; None for a raster.
    flagged : int
        Number of footprints left out because their quality flag says so.
    """

    height: npt.NDArray[np.float64]
    reference: npt.NDArray[np.float64]
    pixel: tuple[float, float] = (1.0, 1.0)
    spread: npt.NDArray[np.float64] | None = None
    statistic: Statistic | None = None
    samples: npt.NDArray[np.float64] | None = None
    centres: npt.NDArray[np.float64] | None = None
    flagged: int = 0

    @property
    def is_raster(self) -> bool:
        """Whether the heights are a raster rather than footprints or plots."""
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
    statistic: Statistic | None = None,
) -> Matched:
    """Match heights of one date with a reference.

    Parameters
    ----------
    height : DataArray or Dataset
        (y, x) heights [m], or a Dataset with ``canopy_height``, and its ``bin_spread`` is read
        too; of lazy heights only those under the reference are computed.
    reference : DataArray, GeoDataFrame or DataFrame
        As in :func:`~xchmv2.validation.validate`.
    column, radius, statistic
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
    if statistic != "mean":
        name = "statistic, 'mean' or a percentile"
        validate_number(name, statistic, _PERCENTILE, least=0, most=100, optional=True)
    array = read_heights(height)
    grid = validate_plane(array, "heights of one date")
    plane = array.transpose(*grid.dims)
    if isinstance(reference, xr.DataArray) and reference.ndim > 1:
        spread = height.get("bin_spread") if isinstance(height, xr.Dataset) else None
        found = _under_raster(plane, grid, reference, spread)
    else:
        found = _under_places(plane, grid, _as_table(reference), column, radius, statistic)
    if not found.known.any():
        raise CHMv2Error(
            "heights and reference do not overlap where both are valid",
            fix="check their bounds and CRS: height.odc.geobox.boundingbox, "
            "reference.odc.geobox.boundingbox (of points and plots: reference.total_bounds)",
        )
    return found


def _under_raster(
    height: xr.DataArray, grid: Grid, reference: xr.DataArray, spread: xr.DataArray | None
) -> Matched:
    """Match heights with a reference on the heights' grid, where the reference is valid."""
    known, where = place_reference(reference, grid)
    layers = [height] if spread is None else [height, spread.transpose(*grid.dims)]
    # Together, because one run of the network gives height and spread.
    read = dask.compute(*(layer.isel(where).data for layer in layers))
    values, *further = (np.asarray(layer, np.float64) for layer in read)
    both = np.isfinite(values) & np.isfinite(known)
    # Blocks start where both are valid, not at the edges of either raster.
    inside = _extents(both)
    first, second = (np.where(both, heights, np.nan)[inside] for heights in (values, known))
    return Matched(first, second, pixel_size(height), further[0][inside] if further else None)


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
    there = find_grid(cleaned)
    if (grid.crs is None) != (there.crs is None):
        lacking = "heights or imagery" if grid.crs is None else "reference"
        raise CHMv2Error(
            "a CRS on the heights or imagery and on the reference, or on neither",
            f"none on the {lacking}",
            "write it: array.rio.write_crs('EPSG:...')",
        )
    source, target = (replace(g, crs=g.crs or _PLANE).geobox for g in (there, grid))
    both = compute_reproject_roi(source, target, padding=2)
    source, target = source[both.roi_src], target[both.roi_dst]
    known = np.full(target.shape, np.nan)
    if not source.is_empty() and not target.is_empty():
        known = _average_onto(_checked(cleaned[both.roi_src].values), source, target)
    inside = _extents(np.isfinite(known))
    starts = (span.start for span in both.roi_dst)
    spans = (slice(n + part.start, n + part.stop) for n, part in zip(starts, inside, strict=True))
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


def _as_table(reference: Any) -> Any:
    """Return a table of footprints or plots; an array along one dim becomes one, by its coords."""
    if not isinstance(reference, xr.DataArray):
        return reference
    if not {"x", "y"} <= set(reference.coords) or reference.dims[0] in ("x", "y"):
        return reference
    crs = find_crs(reference)
    heights = read_heights(reference)
    table = heights.to_dataset(name=heights.name or _COLUMNS[0]).reset_coords().to_dataframe()
    if crs is None:
        return table
    require_library("geopandas", "places points in another CRS", "zonal")
    import geopandas

    places = geopandas.points_from_xy(table.pop("x"), table.pop("y"))
    return geopandas.GeoDataFrame(table, geometry=places, crs=crs.proj)


def _under_places(
    height: xr.DataArray,
    grid: Grid,
    places: Any,
    column: str | None,
    radius: float,
    statistic: Statistic | None,
) -> Matched:
    """Compute the mean or a percentile of the heights in each footprint or plot.

    NaN for those of which less than nine tenths are valid. `places` hold points or polygons, or
    columns x and y in the CRS of the heights; a column ``radius`` overrides `radius` [m on the
    ground].
    """
    sides = pixel_size(height)
    plots = _hold_plots(places)
    if getattr(places, "crs", grid) is None and grid.crs is not None:
        raise CHMv2Error(
            f"the {'plots' if plots else 'points'} have no CRS, but the heights are in "
            f"{grid.crs.proj.name}",
            fix="say which one theirs is: reference.set_crs(4326)",
        )
    pick: Callable[[int], _Pixels]
    if plots:
        shapes = _on_pixels(_reproject(places.geometry, grid, "plots"), grid)
        bounds = shapely.bounds(shapes)
        centres = (bounds[:, [1, 0]] + bounds[:, [3, 2]]) / 2
        pick = partial(_in_plot, shapes, grid.shape)
    else:
        x, y = _coordinates(places, grid)
        rows, cols = (y - grid.edges[0]) / grid.pixel[0], (x - grid.edges[1]) / grid.pixel[1]
        centres = np.stack([rows, cols], axis=1)
        pick = partial(_in_disc, centres, _radii(places, radius), sides, grid.shape)
    name, reference = _heights(places, column)
    statistic = _resolve_statistic(statistic, name, plots)
    good = _are_good(places)
    reference = np.where(good, reference, np.nan)
    near = ((centres > 0) & (centres < grid.shape)).all(axis=1) & np.isfinite(reference)
    samples = np.full((len(reference), _PARTS if statistic == "mean" else 1), np.nan)
    # Sorted by place, so that each batch reads few chunks.
    order = np.lexsort((centres[:, 1], np.floor(centres[:, 0] / 512)))
    for batch in _batches(order[near[order]], pick):
        for k, values in _read(height, grid, batch):
            samples[k] = _summarize(values, statistic)
    found = samples.mean(axis=1)
    flagged = int((~good).sum())
    return Matched(found, reference, sides, None, statistic, samples, centres, flagged)


def _hold_plots(places: Any) -> bool:
    """Return whether a table holds polygons."""
    if not hasattr(places, "geometry") or not isinstance(places, pd.DataFrame):
        return False
    kinds = set(places.geometry.geom_type.dropna())
    return bool(kinds) and kinds <= {"Polygon", "MultiPolygon"}


def _resolve_statistic(given: Statistic | None, name: str, plots: bool) -> Statistic:
    """Take what a reference height is from the argument, the column's name, or as GEDI's RH98."""
    if given is not None:
        return given
    named = re.fullmatch(r"(?:rh|z?q|p)_?(\d{1,2}|100)", name.lower())
    if named:
        return float(named[1])
    if "mean" in name.lower():
        return "mean"
    if plots:
        raise CHMv2Error(
            f"the column {name!r} does not say which heights of the plots it holds",
            fix="pass statistic='mean', or a percentile of the canopy heights: statistic=95",
        )
    return _PERCENTILE


def _are_good(places: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Return which footprints their quality flags allow; a missing flag does not."""
    good = np.ones(len(places), bool)
    used = [name for name in places.columns if str(name).lower() in (*_QUALITY, *_DEGRADED)]
    for name in used:
        flag = pd.to_numeric(places[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        good &= flag > 0 if str(name).lower() in _QUALITY else flag == 0
    if len(good) and not good.any():
        raise CHMv2Error(
            f"the quality flags rule out all {len(good)} footprints",
            fix=f"to use them all the same, leave the flags out: reference.drop(columns={used})",
        )
    return good


@dataclass(frozen=True, eq=False)
class _Pixels:
    """Rows and columns of the pixels of a raster in a footprint or plot, and their whole number.

    `total` counts pixels outside the raster too.
    """

    rows: _Whole
    cols: _Whole
    total: float


def _in_disc(
    centres: _Floats, radii: _Floats, sides: tuple[float, float], shape: tuple[int, int], k: int
) -> _Pixels:
    """Find the pixels whose centres lie in a disc, and the one at its own centre."""
    away = []
    for axis in (0, 1):
        middle, reach = int(centres[k, axis]), int(radii[k] / sides[axis]) + 1
        away.append(np.arange(middle - reach, middle + reach + 1))
    down, along = ((a + 0.5 - c) * side for a, c, side in zip(away, centres[k], sides, strict=True))
    inside = np.hypot(down[:, None], along) <= radii[k]
    inside[len(down) // 2, len(along) // 2] = True
    rows, cols = (steps[i] for steps, i in zip(away, np.nonzero(inside), strict=True))
    there = (rows >= 0) & (rows < shape[0]) & (cols >= 0) & (cols < shape[1])
    return _Pixels(rows[there], cols[there], len(rows))


def _in_plot(shapes: npt.NDArray[Any], shape: tuple[int, int], k: int) -> _Pixels:
    """Find the pixels whose centres lie in a polygon; of one between them, the pixel it lies in."""
    left, top, right, bottom = np.clip(shapely.bounds(shapes[k]), 0, np.tile(shape[::-1], 2))
    rows, cols = (
        np.arange(int(low), math.ceil(high)) for low, high in ((top, bottom), (left, right))
    )
    inside = shapely.contains_xy(shapes[k], cols + 0.5, rows[:, None] + 0.5)
    if not inside.any():
        point = shapely.get_coordinates(shapely.point_on_surface(shapes[k]))[0].astype(int)
        return _Pixels(point[1:], point[:1], 1)
    down, along = np.nonzero(inside)
    kept = shapely.clip_by_rect(shapes[k], 0, 0, *shape[::-1])
    cut = shapely.area(shapes[k]) - shapely.area(kept)
    return _Pixels(rows[down], cols[along], len(down) + cut)


def _batches(order: _Whole, pick: Callable[[int], _Pixels]) -> Iterator[list[tuple[int, _Pixels]]]:
    """Yield footprints or plots with their pixels, as many together as are read at once."""
    batch: list[tuple[int, _Pixels]] = []
    size = 0
    for k in order:
        batch.append((k, pick(k)))
        size += len(batch[-1][1].rows)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read(
    height: xr.DataArray, grid: Grid, batch: list[tuple[int, _Pixels]]
) -> Iterator[tuple[int, _Floats]]:
    """Read the valid heights in footprints or plots, and leave out those that lack too many."""
    index = (np.concatenate([getattr(p, name) for _, p in batch]) for name in ("rows", "cols"))
    where = {dim: xr.DataArray(i, dims="pixel") for dim, i in zip(grid.dims, index, strict=True)}
    (values,) = dask.compute(height.isel(where).data)
    ends = np.cumsum([len(pixels.rows) for _, pixels in batch])[:-1]
    for (k, pixels), found in zip(
        batch, np.split(np.asarray(values, np.float64), ends), strict=True
    ):
        known = found[np.isfinite(found)]
        if len(known) and len(known) >= _LEAST_KNOWN * pixels.total:
            yield k, known


def _summarize(heights: _Floats, statistic: Statistic) -> _Floats | float:
    """Return a percentile of heights, or the means of parts of equal area, from low to high."""
    if statistic != "mean":
        return float(np.percentile(heights, statistic))
    total = np.concatenate([[0.0], np.cumsum(np.sort(heights))])
    cuts = np.interp(np.linspace(0, len(heights), _PARTS + 1), np.arange(len(total)), total)
    return np.asarray(np.diff(cuts) * (_PARTS / len(heights)))


def _coordinates(points: Any, grid: Grid) -> tuple[_Floats, _Floats]:
    """Return x and y of points in the CRS of the heights."""
    if isinstance(points, pd.DataFrame) and hasattr(points, "geometry"):
        return place_points(points.geometry, grid)
    if isinstance(points, pd.DataFrame) and {"x", "y"} <= set(points.columns):
        return points["x"].to_numpy(np.float64), points["y"].to_numpy(np.float64)
    found = list(points.columns) if isinstance(points, pd.DataFrame) else type(points).__name__
    raise CHMv2Error(
        "a reference as a DataArray, points or plots as a GeoDataFrame, or a DataFrame with x, y "
        "and height",
        f"{found}",
        "make points: geopandas.GeoDataFrame(reference, geometry=geopandas.points_from_xy("
        "reference['lon'], reference['lat']), crs=4326)",
    )


def place_points(series: Any, grid: Grid) -> tuple[_Floats, _Floats]:
    """Return x and y of a GeoSeries of points in the CRS of a grid."""
    kinds = sorted(set(series.geom_type.dropna()) - {"Point"})
    if kinds:
        raise CHMv2Error(
            "points, or polygons alone",
            f"{', '.join(kinds)}",
            "make polygons of all: reference.set_geometry(reference.buffer(12))",
        )
    series = _reproject(series, grid, "points")
    return series.x.to_numpy(np.float64), series.y.to_numpy(np.float64)


def _reproject(series: Any, grid: Grid, what: str) -> Any:
    """Return a GeoSeries in the CRS of a grid; without a CRS it is taken to be in that already."""
    if series.crs is None:
        return series
    if grid.crs is None:
        raise CHMv2Error(
            f"the {what} are in {series.crs.name}, but the heights have no CRS",
            fix="write it: height.rio.write_crs('EPSG:...')",
        )
    return series.to_crs(grid.crs.proj)


def _on_pixels(series: Any, grid: Grid) -> npt.NDArray[Any]:
    """Return polygons in rows and columns of a grid, as (column, row) [px]."""
    shapes = shapely.make_valid(np.asarray(series.array, dtype=object))
    shapes = np.where(shapely.is_missing(shapes), shapely.Polygon(), shapes)
    scale, start = np.flip(grid.pixel), np.flip(grid.edges)
    found = shapely.transform(shapes, lambda at: (at - start) / scale)
    shapely.prepare(found)
    return np.asarray(found)


def _heights(points: pd.DataFrame, column: str | None) -> tuple[str, _Floats]:
    """Return the name of the column of reference heights, and the heights [m]."""
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
    fix = f"leave them out: reference[reference[{names[0]!r}].between(0, {_HIGHEST:g})]"
    return str(names[0]), _checked(heights, fix)


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
