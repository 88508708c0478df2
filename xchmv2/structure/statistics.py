"""Canopy cover, percentiles, gap fraction, rumple and volume, over cells or the whole raster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.raster import (
    Raster,
    cell_areas,
    cell_sides,
    find_grid,
    label_quantity,
    read_heights,
    validate_number,
    validate_numbers,
)
from xchmv2.structure.cells import (
    PercentilesOfCells,
    mean_of_cells,
    reduce_to_cells,
    resolve_cells,
    sum_of_cells,
    whole_raster,
)


def canopy_cover(
    height: Raster,
    threshold: float = 5.0,
    cell: float | None = 30.0,
    *,
    min_valid: float = 0.5,
) -> xr.DataArray:
    """Measure canopy cover: the share of the ground under canopy of some height or more.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others, such as time; NaN where missing.
    threshold : float, default 5
        Least height of a canopy pixel, inclusive [m].
    cell : float or None, default 30
        Side of the cells [m on the ground]; None for one number over the whole raster.
    min_valid : float, default 0.5
        Share of a cell's pixels that must not be missing, those outside the raster included;
        other cells are NaN.

    Returns
    -------
    DataArray
        ``canopy_cover``, float32 from 0 to 1. Lazy if the heights are; the same for any chunks.

    Raises
    ------
    CHMv2Error
        If the cell is smaller than a pixel, or ``min_valid`` is not a share.
    ImageryError
        If there are no spatial dims on a regular grid.

    Notes
    -----
    The edges of cells are multiples of their side from the CRS origin, and a pixel belongs to the
    cell that holds its centre: any area of interest has the same cells. Where a projected metre
    is not one on the ground (EPSG:3857), and in degrees, the scale is taken at the scene's centre
    in steps of 1 %. Without a CRS, cells are in the coordinates' own units.

    Examples
    --------
    >>> cover = height.chmv2.canopy_cover(threshold=2.0, cell=10.0)
    >>> of_the_scene = height.chmv2.canopy_cover(cell=None)
    """
    validate_number("threshold", threshold, 5.0, unit="m")
    height = read_heights(height)
    attrs = {"long_name": f"share of the ground under canopy of {threshold:g} m or more"}
    share = share_of_ground(height >= threshold, height, cell, min_valid)
    return label_quantity(share, "canopy_cover", {**attrs, "units": "1"})


def gap_fraction(
    height: Raster,
    threshold: float = 10.0,
    cell: float | None = 30.0,
    *,
    min_valid: float = 0.5,
) -> xr.DataArray:
    """Measure the gap fraction: the share of the ground with canopy of some height or less.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others; NaN where missing.
    threshold : float, default 10
        Greatest height of a gap pixel, inclusive [m], as in :func:`gaps`.
    cell, min_valid
        As in :func:`canopy_cover`.

    Returns
    -------
    DataArray
        ``gap_fraction``, float32 from 0 to 1. Lazy if the heights are; the same for any chunks.

    Raises
    ------
    CHMv2Error
        If the cell is smaller than a pixel, or ``min_valid`` is not a share.

    Examples
    --------
    >>> gaps = height.chmv2.gap_fraction(threshold=3.0, cell=20.0)
    """
    validate_number("threshold", threshold, 5.0, unit="m")
    height = read_heights(height)
    attrs = {"long_name": f"share of the ground with canopy of {threshold:g} m or less"}
    share = share_of_ground(height <= threshold, height, cell, min_valid)
    return label_quantity(share, "gap_fraction", {**attrs, "units": "1"})


def rumple(height: Raster, cell: float | None = 30.0, *, min_valid: float = 0.5) -> xr.DataArray:
    """Measure the rumple index: the area of the canopy surface over that of the ground.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others; NaN where missing.
    cell, min_valid
        As in :func:`canopy_cover`. A pixel at the raster's rim, or beside a missing one, counts
        as missing, because the surface over it is not known.

    Returns
    -------
    DataArray
        ``rumple``, float32, 1 for a flat canopy. Lazy if the heights are; the same for any chunks.

    Raises
    ------
    CHMv2Error
        If the cell is smaller than a pixel, or ``min_valid`` is not a share.

    References
    ----------
    Jenness (2004), Wildlife Society Bulletin 32(3), 829-839.

    Examples
    --------
    >>> rumple = height.chmv2.rumple(cell=20.0)
    """
    attrs = {"long_name": "area of the canopy surface over that of the ground", "units": "1"}
    return label_quantity(
        _mean(_surface_ratio(read_heights(height)), cell, min_valid), "rumple", attrs
    )


def canopy_volume(
    height: Raster, cell: float | None = 30.0, *, min_valid: float = 0.5
) -> xr.DataArray:
    """Measure canopy volume: the volume between the ground and the canopy surface.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others; NaN where missing.
    cell, min_valid
        As in :func:`canopy_cover`. Missing pixels add nothing: a cell that is half missing has
        half the volume. ``min_valid=0`` keeps all valid pixels.

    Returns
    -------
    DataArray
        ``canopy_volume``, float64 [m3, over true areas; without a CRS, m times the coordinates'
        own units squared]. Lazy if the heights are; the same for any chunks.

    Raises
    ------
    CHMv2Error
        If the cell is smaller than a pixel, or ``min_valid`` is not a share.

    Examples
    --------
    >>> volume = height.chmv2.canopy_volume(cell=10.0)
    >>> growth = volume.diff("time")
    """
    _validate_share(min_valid)
    height = read_heights(height)
    units = cell_areas(height).attrs.get("units")
    attrs = {"long_name": "volume below the canopy surface"}
    attrs |= {"units": "m3"} if units == "m2" else {}
    if cell is None:
        volume = _whole_sum(height, min_valid)
    else:
        volume = reduce_to_cells(
            height, resolve_cells(height, cell), sum_of_cells, min_valid=min_valid, dtype="float64"
        )
    return label_quantity(volume, "canopy_volume", attrs)


def percentile(
    height: Raster,
    q: float | Sequence[float],
    cell: float | None = 30.0,
    *,
    min_valid: float = 0.5,
) -> xr.DataArray:
    """Compute percentiles of canopy height.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others; NaN where missing.
    q : float or sequence of float
        Percentiles [%], such as 95.
    cell, min_valid
        As in :func:`canopy_cover`. Growth is best followed in the 95th percentile of 10 m cells.

    Returns
    -------
    DataArray
        ``height_percentile``, float32 [m], linear between values. Several lie along a first dim
        ``percentile``; one has a scalar coordinate of that name. Lazy if the heights are; the same
        for any chunks. With ``cell=None`` all pixels of a plane go into one chunk.

    Raises
    ------
    CHMv2Error
        If ``q`` is outside 0 to 100, the cell is smaller than a pixel, or ``min_valid`` is not
        a share.

    Examples
    --------
    >>> p95 = height.chmv2.percentile(95, cell=10.0)
    >>> quartiles = height.chmv2.percentile((25, 50, 75))
    >>> median = quartiles.sel(percentile=50)
    """
    _validate_share(min_valid)
    wanted = validate_numbers("q", [q] if np.ndim(q) == 0 else q, "95", least=0, most=100)
    height = read_heights(height)
    cells = whole_raster(height) if cell is None else resolve_cells(height, cell)
    found = reduce_to_cells(
        height, cells, PercentilesOfCells(wanted), min_valid=min_valid, further=len(wanted)
    ).rename(further="percentile")
    if cell is None:
        found = found.isel(dict.fromkeys(cells.grid.dims, 0), drop=True)
    units = {"units": "%", "long_name": "percentile"}
    found = found.assign_coords(percentile=("percentile", list(wanted), units))
    found = found.transpose("percentile", ...)
    name = "percentile of canopy height"
    if np.ndim(q) == 0:
        found, name = found.isel(percentile=0), f"{wanted[0]:g}th {name}"
    return label_quantity(found, "height_percentile", {"long_name": name, "units": "m"})


def share_of_ground(
    condition: xr.DataArray, height: xr.DataArray, cell: float | None, min_valid: float
) -> xr.DataArray:
    """Measure the share of the ground where a condition holds; unknown without a height."""
    return _mean(condition.astype("float32").where(height.notnull()), cell, min_valid)


def _mean(pixels: xr.DataArray, cell: float | None, min_valid: float) -> xr.DataArray:
    _validate_share(min_valid)
    if cell is None:
        area = cell_areas(pixels).where(pixels.notnull()).sum(find_grid(pixels).dims)
        return (_whole_sum(pixels, min_valid) / area).astype("float32")
    cells = resolve_cells(pixels, cell)
    return reduce_to_cells(pixels, cells, mean_of_cells, min_valid=min_valid)


def _whole_sum(pixels: xr.DataArray, min_valid: float) -> xr.DataArray:
    """Add up value times area over the whole raster."""
    dims = find_grid(pixels).dims
    valid = pixels.notnull().mean(dims)
    total = (pixels * cell_areas(pixels)).sum(dims)
    return total.where((valid > 0) & (valid >= min_valid))


def _validate_share(min_valid: float) -> None:
    validate_number("min_valid", min_valid, 0.5, least=0, most=1)


_Array = npt.NDArray[Any]


def _surface_ratio(height: xr.DataArray) -> xr.DataArray:
    """Divide the area of the canopy's surface over each pixel by that of the pixel.

    At least 1; NaN where the pixel or one of its eight neighbours is missing.
    """
    grid = find_grid(height).dims
    ordered = height.transpose(..., *grid)
    tall, wide = cell_sides(ordered)
    if height.chunks is None:
        margin = [(0, 0)] * (height.ndim - 2) + [(1, 1), (1, 1)]
        padded = np.pad(ordered.values, margin, constant_values=np.nan)
        data: Any = _ratio(padded, tall.values, wide.values)
    else:
        data = _lazy(ordered.data, tall.data, wide.data)
    return ordered.copy(data=data).transpose(*height.dims)


def _lazy(height: da.Array, tall: da.Array, wide: da.Array) -> da.Array:
    index = tuple(range(height.ndim))
    depth = {axis: int(axis >= height.ndim - 2) for axis in index}
    boundary = {axis: np.nan if reach else "none" for axis, reach in depth.items()}
    padded = da.overlap.overlap(height, depth, boundary)
    return da.blockwise(
        _ratio,
        index,
        padded,
        index,
        tall,
        index[-2:],
        wide,
        index[-2:],
        adjust_chunks=dict(enumerate(height.chunks)),
        align_arrays=False,
        dtype=height.dtype,
        meta=np.empty((0,) * height.ndim, height.dtype),
    )


def _ratio(padded: _Array, tall: _Array, wide: _Array) -> _Array:
    """Task: the ratio of one block, whose heights have a margin of one pixel.

    Each triangle has its corners at the centres of the pixel, of a neighbour that shares a side
    with it, and of one beside that which shares a corner: it rises along one axis by the first
    step and along the other by the second. The part that lies on the pixel is as steep.
    """
    rows, cols = padded.shape[-2] - 2, padded.shape[-1] - 2

    def moved(down: int, right: int) -> _Array:
        return padded[..., 1 + down : 1 + down + rows, 1 + right : 1 + right + cols]

    tall, wide = tall.astype(padded.dtype), wide.astype(padded.dtype)
    total = np.zeros((*padded.shape[:-2], rows, cols), padded.dtype)
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        first, second = (tall, wide) if down else (wide, tall)
        flat = 1 + ((moved(down, right) - moved(0, 0)) / first) ** 2
        for turn in (-1, 1):
            corner = moved(down or turn, right or turn)
            total += np.sqrt(flat + ((corner - moved(down, right)) / second) ** 2)
    return total / 8
