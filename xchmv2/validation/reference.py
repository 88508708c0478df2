"""Reference rasters on any grid, averaged onto the pixels of the heights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xarray as xr
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from odc.geo.xr import wrap_xr, xr_reproject

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import Grid, find_grid
from xchmv2.nodata import without_nodata

Floats = npt.NDArray[np.float64]

#: Heights that a canopy can have [m]; noise of lidar around the ground is taken for 0.
LOWEST, HIGHEST = 0.0, 120.0
_GROUND_NOISE = 0.5
#: Pixels are of the same size if they agree to this share.
_TOLERANCE = 0.01
#: Where neither has a CRS, coordinates are taken as they are: between two grids of one CRS nothing
#: is transformed, whichever it is.
_PLANE = CRS("EPSG:3857")


def clean_heights(reference: xr.DataArray) -> xr.DataArray:
    """Turn the reference's nodata into NaN, lazily where it is lazy.

    Parameters
    ----------
    reference : DataArray
        (y, x) heights [m], with a nodata value in its metadata or none.

    Returns
    -------
    DataArray
        float32 with dims in order.

    Raises
    ------
    CHMv2Error
        If there are further dims.
    """
    flat = reference.squeeze(drop=True)
    grid = find_grid(flat if flat.ndim == 2 else reference)
    # Of one row or column, that dim is to stay.
    single = [dim for dim in reference.dims if dim not in grid.dims and reference.sizes[dim] == 1]
    flat = reference.squeeze(single, drop=True)
    if set(flat.dims) - set(grid.dims):
        raise CHMv2Error(
            "reference heights of one date, dims y and x",
            f"sizes {dict(reference.sizes)}",
            "choose one layer: reference.isel(band=0)",
        )
    found = without_nodata(flat).transpose(*grid.dims).astype(np.float32)
    return found.where(np.isfinite(found))


def validate_heights(values: npt.NDArray[np.floating]) -> None:
    """Refuse heights that no canopy has.

    Parameters
    ----------
    values : ndarray
        Heights [m], NaN where there is none.

    Raises
    ------
    CHMv2Error
        If some lie outside 0 to 120 m.
    """
    wrong = (values < LOWEST - _GROUND_NOISE) | (values > HIGHEST)
    if wrong.any():
        raise CHMv2Error(
            f"reference heights of {LOWEST:g} to {HIGHEST:g} m",
            f"{int(wrong.sum())} outside, from {np.nanmin(values):g} to {np.nanmax(values):g}",
            "mask them: reference.where((reference >= 0) & (reference <= 120)); heights in feet: "
            "reference * 0.3048",
        )


def overlap_window(grid: Grid, reference: xr.DataArray) -> tuple[slice, slice]:
    """Find the pixels of a grid that a reference reaches into.

    Parameters
    ----------
    grid : Grid
        Of the heights.
    reference : DataArray
        (y, x), in any CRS.

    Returns
    -------
    rows, cols : slice
        Empty where the two share no ground.

    Raises
    ------
    CHMv2Error
        If only one of them has a CRS.
    """
    there = find_grid(reference)
    if (grid.crs is None) != (there.crs is None):
        lacking = "heights" if grid.crs is None else "reference"
        raise CHMv2Error(
            "a CRS on heights and reference, or on neither",
            f"none on the {lacking}",
            "write it: array.rio.write_crs('EPSG:...')",
        )
    return _spans(_placed(grid), _placed(there))


def _placed(grid: Grid) -> Grid:
    return replace(grid, crs=_PLANE) if grid.crs is None else grid


def _spans(grid: Grid, other: Grid, margin: int = 2) -> tuple[slice, slice]:
    """Return rows and columns of a grid that another one, in any CRS, reaches into."""
    box = other.geobox.footprint(grid.crs, npoints=20).boundingbox
    spans = []
    for axis, ends in enumerate(((box.bottom, box.top), (box.left, box.right))):
        pixels = sorted((end - grid.edges[axis]) / grid.pixel[axis] for end in ends)
        first = min(grid.shape[axis], max(0, math.floor(pixels[0]) - margin))
        last = min(grid.shape[axis], max(first, math.ceil(pixels[1]) + margin))
        spans.append(slice(first, last))
    return spans[0], spans[1]


def crop(grid: Grid, rows: slice, cols: slice) -> Grid:
    """Return the grid of some rows and columns of a grid."""
    starts = rows.start, cols.start
    edges = [e + p * n for e, p, n in zip(grid.edges, grid.pixel, starts, strict=True)]
    shape = rows.stop - rows.start, cols.stop - cols.start
    return replace(grid, shape=shape, edges=(edges[0], edges[1]))


def on_grid(reference: xr.DataArray, grid: Grid) -> Floats:
    """Average a reference over the pixels of the heights.

    Parameters
    ----------
    reference : DataArray
        (y, x) heights [m], NaN where there is none; what lies under the grid is computed.
    grid : Grid
        Of the heights.

    Returns
    -------
    ndarray of float64, shape (H, W)
        [m]; NaN where less than half a pixel is known. A reference that is coarser than the
        heights is interpolated between its pixels instead: there is nothing to average.

    Raises
    ------
    CHMv2Error
        If heights lie outside 0 to 120 m.
    """
    there, grid = _placed(find_grid(reference)), _placed(grid)
    spans = _spans(there, grid)
    part = reference.isel(dict(zip(there.dims, spans, strict=True))).values
    if not part.size:
        return np.full(grid.shape, np.nan)
    return average_onto(_checked(part), crop(there, *spans).geobox, grid.geobox)


def _checked(values: npt.NDArray[np.floating]) -> Floats:
    validate_heights(values)
    return np.clip(values.astype(np.float64), LOWEST, None)


def average_onto(heights: Floats, source: GeoBox, target: GeoBox) -> Floats:
    """Bring heights onto other pixels: averaged by area, or interpolated where they are coarser.

    Parameters
    ----------
    heights : ndarray of float64, shape (h, w)
        [m]; NaN where there is none.
    source, target : GeoBox
        Their pixels, and the pixels wanted; in any CRS.

    Returns
    -------
    ndarray of float64, shape (H, W)
        [m]; NaN where less than half of what is averaged is known.
    """
    there = source.to_crs(target.crs)  # pixels of two CRSs may be of two units
    finer = abs(there.resolution.x) <= abs(target.resolution.x) * (1 + _TOLERANCE)
    plane = wrap_xr(heights, source, nodata=np.nan)
    how = "average" if finer else "bilinear"
    placed = xr_reproject(plane, target, resampling=how, dst_nodata=np.nan).values
    if not finer:
        return np.asarray(placed, np.float64)
    # Of a pixel of which a corner is known, the average is that corner's.
    known = wrap_xr(np.isfinite(heights).astype(np.float64), source)
    share = xr_reproject(known, target, resampling="average", dst_nodata=np.nan).values
    return np.where(share >= 0.5 - 1e-6, placed, np.nan)
