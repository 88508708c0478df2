"""Heights and their reference, brought together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.heights import Raster, choose_heights
from xchmv2.imagery import Grid, find_grid
from xchmv2.nodata import without_nodata
from xchmv2.validation.footprints import under_footprints
from xchmv2.validation.reference import clean_heights, crop, on_grid, overlap_window

#: Radius of a GEDI footprint [m], and the percentile that is compared with its RH98.
RADIUS = 12.0
PERCENTILE = 98.0


@dataclass(frozen=True, eq=False)
class Matched:
    """Heights and reference heights of the same ground, of one date.

    Parameters
    ----------
    height, reference : ndarray of float64
        (H, W) on the heights' grid, or (N,) at points [m]; NaN where either is missing.
    """

    height: npt.NDArray[np.float64]
    reference: npt.NDArray[np.float64]

    @property
    def is_raster(self) -> bool:
        """Whether there is a picture, with neighbours, or a list of points."""
        return self.height.ndim == 2

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Where both are known."""
        return np.isfinite(self.height) & np.isfinite(self.reference)


def match(
    height: Raster,
    reference: Any,
    *,
    column: str | None = None,
    radius: float = RADIUS,
    percentile: float = PERCENTILE,
) -> Matched:
    """Bring heights of one date and a reference together.

    Parameters
    ----------
    height : DataArray or Dataset
        (y, x) heights [m], or a Dataset with ``canopy_height``; of lazy ones only what lies under
        the reference is computed.
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
        If they have no ground in common, or one of them cannot be used.
    """
    plane, grid = read_plane(height)
    if isinstance(reference, xr.DataArray):
        found = _under_raster(plane, grid, reference)
    else:
        found = Matched(*under_footprints(plane, grid, reference, column, radius, percentile))
    if not found.known.any():
        raise CHMv2Error(
            "reference heights where there are heights",
            "none: the two do not overlap, or only where one of them is missing",
            "check their bounds and CRS: height.odc.geobox.boundingbox, "
            "reference.odc.geobox.boundingbox (of points: reference.total_bounds)",
        )
    return found


def read_plane(height: Raster) -> tuple[xr.DataArray, Grid]:
    """Check that heights are of one date.

    Parameters
    ----------
    height : DataArray or Dataset
        Heights [m], or a Dataset with ``canopy_height``.

    Returns
    -------
    height : DataArray
        With dims in order.
    grid : Grid
        Its pixels.

    Raises
    ------
    CHMv2Error
        If it is no array, or has further dims.
    """
    height = choose_heights(height)
    grid = find_grid(height)
    further = [str(dim) for dim in height.dims if dim not in grid.dims]
    if further:
        raise CHMv2Error(
            f"heights of one date, with dims {grid.dims}",
            f"further dims {further}",
            f"choose one: height.isel({further[0]}=0)",
        )
    return without_nodata(height).transpose(*grid.dims), grid


def _under_raster(height: xr.DataArray, grid: Grid, reference: xr.DataArray) -> Matched:
    """Cut the part of the heights that the reference reaches into, and average it there."""
    cleaned = clean_heights(reference)
    rows, cols = overlap_window(grid, cleaned)
    part = height.isel({grid.dims[0]: rows, grid.dims[1]: cols})
    if not part.size:
        empty = np.zeros((0, 0))
        return Matched(empty, empty)
    known = on_grid(cleaned, crop(grid, rows, cols))
    values = np.asarray(part.values, np.float64)
    both = np.isfinite(values) & np.isfinite(known)
    # Blocks are to start where both are known, not where their edges happen to reach.
    inside = tuple(_extent(np.asarray(both.any(axis=axis))) for axis in (1, 0))
    first, second = (np.where(both, heights, np.nan)[inside] for heights in (values, known))
    return Matched(first, second)


def _extent(known: npt.NDArray[np.bool_]) -> slice:
    """Return the span from the first to the last that is known."""
    places = np.flatnonzero(known)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 0)
