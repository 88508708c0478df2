"""Square cells of ground that statistics are made over, at fixed places from the CRS origin."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr
from odc.geo.xr import xr_coords

from xchmv2.areas import has_true_areas
from xchmv2.errors import CHMv2Error
from xchmv2.imagery import Grid, find_crs_coordinate, find_grid, ground_pixel

#: The ground scale of a projection counts in steps of this share, so that neighbouring areas of
#: interest get the same cells; in a UTM zone it is exactly 1.
_STEP = math.log(1.01)
#: Metres per degree of a geographic CRS, from which its steps are counted.
_DEGREE = 111_195.0


@dataclass(frozen=True)
class CellAxis:
    """The cells along one axis.

    Parameters
    ----------
    bounds : tuple of int
        First pixel of each cell, and the number of pixels.
    full : tuple of int
        Pixels that each would hold if the raster went on.
    edge, size : float
        Outer edge of the first cell, and the signed size of all, in CRS units.
    """

    bounds: tuple[int, ...]
    full: tuple[int, ...]
    edge: float
    size: float

    def chunked(self, chunks: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Move the borders of chunks to borders of cells.

        Parameters
        ----------
        chunks : tuple of int
            Chunks of pixels.

        Returns
        -------
        pixels, cells : tuple of int
            Chunks of pixels that cut no cell, and the cells in each.
        """
        bounds = np.asarray(self.bounds)
        wanted = np.cumsum([0, *chunks])
        nearest = np.unique(np.abs(bounds[None] - wanted[:, None]).argmin(axis=1))
        return (
            tuple(int(n) for n in np.diff(bounds[nearest])),
            tuple(int(n) for n in np.diff(nearest)),
        )

    def within(self, start: int, stop: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return the cells of some pixels: their bounds counted from the first, and full sizes."""
        first, last = np.searchsorted(self.bounds, (start, stop))
        return (
            np.asarray(self.bounds[first : last + 1]) - start,
            np.asarray(self.full[first:last]),
        )


@dataclass(frozen=True)
class Cells:
    """The cells over a raster.

    Parameters
    ----------
    grid : Grid
        The raster's pixels.
    y, x : CellAxis
        Cells along its axes.
    """

    grid: Grid
    y: CellAxis
    x: CellAxis

    @property
    def target(self) -> Grid:
        """The cells as a raster."""
        return Grid(
            self.grid.dims,
            (len(self.y.full), len(self.x.full)),
            self.grid.crs,
            (self.y.edge, self.x.edge),
            (self.y.size, self.x.size),
        )

    def coords(self, template: xr.DataArray) -> dict[Hashable, xr.DataArray]:
        """Return the coordinates of the cells, and those of the template that stay true."""
        dims, target = self.grid.dims, self.target
        kept = {
            name: coord
            for name, coord in template.coords.items()
            if not set(coord.dims) & set(dims) and "GeoTransform" not in coord.attrs
        }
        if target.crs is None:
            return kept | {dim: self._centres(template, axis) for axis, dim in enumerate(dims)}
        mapping = find_crs_coordinate(template.coords)
        return kept | dict(
            xr_coords(target.geobox, crs_coord_name=mapping or "spatial_ref", dims=dims)
        )

    def _centres(self, template: xr.DataArray, axis: int) -> xr.DataArray:
        dim, target = self.grid.dims[axis], self.target
        values = target.edges[axis] + (np.arange(target.shape[axis]) + 0.5) * target.pixel[axis]
        return xr.DataArray(values, dims=dim, attrs=template[dim].attrs)


def resolve_cells(array: xr.DataArray, cell: float) -> Cells:
    """Lay cells over a raster.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims.
    cell : float
        Side of a cell [m on the ground; without a CRS in the coordinates' own units].

    Returns
    -------
    Cells
        Their edges are multiples of the cell from the CRS origin, so that any area of interest
        has the same. A pixel belongs to the cell that its centre lies in.

    Raises
    ------
    CHMv2Error
        If the cell is smaller than a pixel, or no number.
    """
    grid = find_grid(array)
    scales = _ground_scales(grid) if has_true_areas(array) else (1.0, 1.0)
    sides = [scale * abs(pixel) for scale, pixel in zip(scales, grid.pixel, strict=True)]
    if not (math.isfinite(cell) and cell >= max(sides) * (1 - 1e-6)):
        raise CHMv2Error(
            "cells at least as large as a pixel",
            f"cell={cell} with pixels of {sides[0]:.3g} x {sides[1]:.3g}",
            "pass their side in metres, such as cell=30",
        )
    y, x = (
        _lay(edge, pixel, size, cell / scale)
        for edge, pixel, size, scale in zip(grid.edges, grid.pixel, grid.shape, scales, strict=True)
    )
    return Cells(grid, y, x)


def whole_raster(array: xr.DataArray) -> Cells:
    """Lay a single cell over a raster.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims.

    Returns
    -------
    Cells
        One, that all pixels belong to.
    """
    grid = find_grid(array)
    y, x = (
        CellAxis((0, size), (size,), edge, pixel * size)
        for edge, pixel, size in zip(grid.edges, grid.pixel, grid.shape, strict=True)
    )
    return Cells(grid, y, x)


def _ground_scales(grid: Grid) -> tuple[float, float]:
    """Ground metres per CRS unit along both axes, at the scene's centre, in steps of 1 %."""
    metres = [side / abs(p) for side, p in zip(ground_pixel(grid), grid.pixel, strict=True)]
    crs = grid.crs.proj
    unit = _DEGREE if crs.is_geographic else float(crs.axis_info[0].unit_conversion_factor)
    if math.isclose(*metres, rel_tol=0.01):  # conformal: square cells stay square
        metres = [math.sqrt(math.prod(metres))] * 2
    tall, wide = (unit * math.exp(_STEP * round(math.log(m / unit) / _STEP)) for m in metres)
    return tall, wide


def _lay(edge: float, pixel: float, count: int, cell: float) -> CellAxis:
    """Lay cells along an axis; counted upwards, so that both orientations get the same."""
    step = abs(pixel)
    low = edge if pixel > 0 else edge + pixel * count
    index = np.arange(math.floor(low / cell) - 1, math.ceil((low + step * count) / cell) + 2)
    # The first pixel of each cell: the first whose centre is not below its edge. Coordinates are
    # rounded, and a centre on an edge must fall to the same side in every area of interest.
    first = np.ceil(np.round((index * cell - low) / step - 0.5, 6)).astype(int)
    seen = (first[:-1] < count) & (first[1:] > 0)
    bounds = np.clip(np.append(first[:-1][seen], first[1:][seen][-1]), 0, count)
    full, lowest = np.diff(first)[seen], float(index[:-1][seen][0] * cell)
    if pixel < 0:
        bounds, full = count - bounds[::-1], full[::-1]
        lowest += cell * len(full)
    return CellAxis(
        tuple(int(n) for n in bounds),
        tuple(int(n) for n in full),
        lowest,
        math.copysign(cell, pixel),
    )
