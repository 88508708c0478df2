"""Heights under footprints of a laser, such as GEDI's."""

from __future__ import annotations

import math
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from xchmv2.areas import has_true_areas
from xchmv2.errors import CHMv2Error
from xchmv2.imagery import Grid, ground_pixel
from xchmv2.validation.reference import validate_heights

Floats = npt.NDArray[np.float64]

#: Columns that reference heights of points may have, in order of preference.
COLUMNS = ("height", "rh98", "rh_98", "RH98", "canopy_height")
#: Footprints of which less is known have no height: what is missing may be what is tall.
_LEAST_KNOWN = 0.9
#: Footprints that are computed together.
_BATCH = 2000


def under_footprints(
    height: xr.DataArray,
    grid: Grid,
    points: Any,
    column: str | None,
    radius: float,
    percentile: float,
) -> tuple[Floats, Floats]:
    """Take a percentile of the heights in each footprint.

    Parameters
    ----------
    height : DataArray
        (y, x) heights [m].
    grid : Grid
        Its pixels.
    points : GeoDataFrame or DataFrame
        With points, or with columns x and y in the CRS of the heights.
    column : str or None
        Column of reference heights [m].
    radius : float
        Of a footprint [m on the ground]; overridden by a column ``radius``.
    percentile : float
        Between 0 and 100.

    Returns
    -------
    found, reference : ndarray of float64, shape (N,)
        [m]; NaN for footprints of which less than nine tenths are known.

    Raises
    ------
    CHMv2Error
        If points, heights or radius cannot be.
    """
    x, y = _places(points, grid)
    reference = _heights(points, column)
    radii = _radii(points, radius)
    if not 0 <= percentile <= 100:
        raise CHMv2Error(
            "a percentile from 0 to 100", f"{percentile}", "give GEDI's: percentile=98"
        )
    rows, cols = (y - grid.edges[0]) / grid.pixel[0], (x - grid.edges[1]) / grid.pixel[1]
    near = (rows > 0) & (rows < grid.shape[0]) & (cols > 0) & (cols < grid.shape[1])
    near &= np.isfinite(reference)
    found = np.full(len(reference), np.nan)
    sides = _pixel_sides(height, grid)
    # Neighbours together: each batch then touches few chunks.
    order = np.lexsort((cols, np.floor(rows / 512)))
    order = order[near[order]]
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        found[batch] = _batch(
            height, grid, rows[batch], cols[batch], radii[batch], sides, percentile
        )
    return found, reference


def _pixel_sides(height: xr.DataArray, grid: Grid) -> tuple[float, float]:
    if has_true_areas(height):
        return ground_pixel(grid)
    return abs(grid.pixel[0]), abs(grid.pixel[1])


def _batch(
    height: xr.DataArray,
    grid: Grid,
    rows: Floats,
    cols: Floats,
    radii: Floats,
    sides: tuple[float, float],
    percentile: float,
) -> Floats:
    """Read the pixels whose centres lie in footprints, and take the percentile of each."""
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
    # A footprint smaller than a pixel is that pixel.
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


def _places(points: Any, grid: Grid) -> tuple[Floats, Floats]:
    """Return x and y of points in the CRS of the heights."""
    if isinstance(points, pd.DataFrame) and hasattr(points, "geometry"):
        return _geometry_places(points, grid)
    if isinstance(points, pd.DataFrame) and {"x", "y"} <= set(points.columns):
        return points["x"].to_numpy(np.float64), points["y"].to_numpy(np.float64)
    found = list(points.columns) if isinstance(points, pd.DataFrame) else type(points).__name__
    raise CHMv2Error(
        "a reference as a DataArray, or points as a GeoDataFrame or a DataFrame with x, y and "
        "height",
        f"{found}",
        "make points: geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(lon, lat), "
        "crs=4326)",
    )


def _geometry_places(points: Any, grid: Grid) -> tuple[Floats, Floats]:
    series = points.geometry
    kinds = sorted(set(series.geom_type.dropna()) - {"Point"})
    if kinds:
        raise CHMv2Error("points", f"{', '.join(kinds)}", "take their centres: points.centroid")
    if series.crs is not None:
        if grid.crs is None:
            raise CHMv2Error(
                "a CRS on the heights, to bring points of another CRS to it",
                f"none, with points in {series.crs.name}",
                "write it: height.rio.write_crs('EPSG:...')",
            )
        series = series.to_crs(grid.crs.proj)
    return series.x.to_numpy(np.float64), series.y.to_numpy(np.float64)


def _heights(points: pd.DataFrame, column: str | None) -> Floats:
    names = [name for name in COLUMNS if name in points.columns] if column is None else [column]
    if not names or names[0] not in points.columns:
        raise CHMv2Error(
            f"a column of reference heights, such as {', '.join(COLUMNS[:2])}"
            if column is None
            else f"a column {column!r}",
            f"columns {[str(name) for name in points.columns]}",
            "name it: column='rh98'",
        )
    heights = points[names[0]].to_numpy(np.float64, na_value=np.nan)
    heights = np.where(np.isfinite(heights), heights, np.nan)
    validate_heights(heights)
    return np.clip(heights, 0, None)


def _radii(points: pd.DataFrame, radius: float) -> Floats:
    given = points["radius"] if "radius" in points.columns else radius
    radii = np.broadcast_to(np.asarray(given, np.float64), (len(points),))
    if len(radii) and not (np.isfinite(radii).all() and radii.min() > 0):
        raise CHMv2Error(
            "footprints with a radius above 0 m",
            f"{radii.min():g}",
            "give GEDI's: radius=12",
        )
    return radii
