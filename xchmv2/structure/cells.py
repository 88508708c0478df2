"""Grid cells over a raster, and reduction of the pixels in each across chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from odc.geo.xr import xr_coords

from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    Grid,
    cell_areas,
    find_grid,
    georeference,
    has_true_areas,
    stepped_ground_scale,
    validate_number,
)

#: Largest side of a cell [m]: a quarter of the Earth.
_LARGEST_CELL = 1e7


def resolve_cells(array: xr.DataArray, cell: float) -> _Cells:
    """Lay cells over a raster; their side is in m on the ground, without a CRS in its own units.

    Their edges are multiples of the side from the CRS origin, so that any area of interest has the
    same cells. A pixel belongs to the cell that its centre lies in.
    """
    grid = find_grid(array)
    scales = stepped_ground_scale(grid) if has_true_areas(array) else (1.0, 1.0)
    sides = [scale * abs(pixel) for scale, pixel in zip(scales, grid.pixel, strict=True)]
    validate_number("cell", cell, 30, above=0, most=_LARGEST_CELL, unit="m")
    if cell < max(sides) * (1 - 1e-6):
        raise CHMv2Error(
            "cells at least as large as a pixel",
            f"cell={cell} with pixels of {sides[0]:.3g} x {sides[1]:.3g}",
            f"pass their side in metres, such as cell={max(30.0, 2 * max(sides)):.3g}",
        )
    y, x = (
        _lay(edge, pixel, size, cell / scale)
        for edge, pixel, size, scale in zip(grid.edges, grid.pixel, grid.shape, scales, strict=True)
    )
    return _Cells(grid, y, x)


def whole_raster(array: xr.DataArray) -> _Cells:
    """Lay a single cell over a raster, which all pixels belong to."""
    grid = find_grid(array)
    y, x = (
        _CellAxis((0, size), (size,), edge, pixel * size)
        for edge, pixel, size in zip(grid.edges, grid.pixel, grid.shape, strict=True)
    )
    return _Cells(grid, y, x)


def _lay(edge: float, pixel: float, count: int, cell: float) -> _CellAxis:
    """Lay cells along an axis; counted upwards, so that both orientations get the same cells."""
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
    return _CellAxis(
        tuple(int(n) for n in bounds),
        tuple(int(n) for n in full),
        lowest,
        math.copysign(cell, pixel),
    )


@dataclass(frozen=True)
class _CellAxis:
    """The cells along one axis."""

    bounds: tuple[int, ...]  #: first pixel of each cell, and the number of pixels
    full: tuple[int, ...]  #: pixels that each cell would hold if the raster had no edge
    edge: float  #: outer edge of the first cell, in CRS units
    size: float  #: signed size of all cells, in CRS units

    def chunked(self, chunks: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return chunks of pixels as large as the given ones that cut no cell, and their cells.

        All hold the same number of cells but the last, as Zarr wants it.
        """
        count = len(self.full)
        each = max(1, round(max(chunks) * count / self.bounds[-1]))
        starts = [*range(0, count, each), count]
        pixels = np.diff(np.asarray(self.bounds)[starts])
        return tuple(int(n) for n in pixels), tuple(int(n) for n in np.diff(starts))

    def within(self, start: int, stop: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return the cells of some pixels: their bounds counted from the first, and full sizes."""
        first, last = np.searchsorted(self.bounds, (start, stop))
        bounds = np.asarray(self.bounds[first : last + 1]) - start
        return bounds, np.asarray(self.full[first:last])


@dataclass(frozen=True)
class _Cells:
    """The cells along both axes of a raster, whose pixels are `grid`."""

    grid: Grid
    y: _CellAxis
    x: _CellAxis

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
        """Return the coordinates of the cells, and those of the template that remain valid."""
        dims, target = self.grid.dims, self.target
        template = georeference(template)
        kept = {
            name: coord
            for name, coord in template.coords.items()
            if not set(coord.dims) & set(dims) and "GeoTransform" not in coord.attrs
        }
        if target.crs is None:
            return kept | {dim: self._centres(template, axis) for axis, dim in enumerate(dims)}
        mapping = str(template.attrs["grid_mapping"])
        return kept | dict(xr_coords(target.geobox, crs_coord_name=mapping, dims=dims))

    def _centres(self, template: xr.DataArray, axis: int) -> xr.DataArray:
        dim, target = self.grid.dims[axis], self.target
        values = target.edges[axis] + (np.arange(target.shape[axis]) + 0.5) * target.pixel[axis]
        return xr.DataArray(values, dims=dim, attrs=template[dim].attrs)


_Array = npt.NDArray[Any]
#: From pixels (..., y, x), their areas (y, x), and the bounds of cells along both axes.
_Kernel = Callable[[_Array, _Array, _Array, _Array], _Array]


def reduce_to_cells(
    pixels: xr.DataArray,
    cells: _Cells,
    kernel: _Kernel,
    *,
    min_valid: float,
    further: int | None = None,
    dtype: str = "float32",
) -> xr.DataArray:
    """Reduce the pixels of each cell to one value.

    Parameters
    ----------
    pixels : DataArray
        Two spatial dims and any others; NaN where missing.
    cells : Cells
        The cells over it.
    kernel : callable
        Reduction of the pixels of cells.
    min_valid : float
        Share of a cell's pixels that must not be missing; those outside the raster count as
        missing.
    further : int, optional
        Size of a last axis that the kernel adds.
    dtype : str
        Data type of the result.

    Returns
    -------
    DataArray
        The same dims, and a last one named "further" if asked for; NaN in cells with too few
        valid pixels. Lazy if the pixels are; the same for any chunks.
    """
    dims = [*(dim for dim in pixels.dims if dim not in cells.grid.dims), *cells.grid.dims]
    ordered = pixels.transpose(*dims)
    task = _Task(kernel, cells.y, cells.x, min_valid, dtype)
    added = [] if further is None else [further]
    areas = cell_areas(ordered)
    if ordered.chunks is None:
        whole = {0: {"array-location": [(0, size) for size in ordered.shape]}}
        data: Any = task(ordered.values, areas.values, whole)
    else:
        data = _lazy(task, ordered.data, areas.data, added)
    dims_out = [*dims, *(["further"] if added else [])]
    found = xr.DataArray(data, cells.coords(ordered), dims_out, pixels.name)
    return found.transpose(*pixels.dims, ...)


def mean_of_cells(pixels: _Array, area: _Array, rows: _Array, cols: _Array) -> _Array:
    """Average (..., y, x) over cells, weighted by area: (..., rows, cols); NaN is left out."""
    weight = np.where(np.isnan(pixels), 0, area)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: _Array = sum_of_cells(pixels, area, rows, cols) / _add_up(weight, rows, cols)
    return found


def sum_of_cells(pixels: _Array, area: _Array, rows: _Array, cols: _Array) -> _Array:
    """Add up value times area over cells; NaN is left out. Shapes as in mean_of_cells."""
    return _add_up(np.where(np.isnan(pixels), 0, pixels * area), rows, cols)


@dataclass(frozen=True)
class PercentilesOfCells:
    """Percentiles over cells, linear between values; NaN is left out."""

    q: tuple[float, ...]  #: [%]

    def __call__(self, pixels: _Array, area: _Array, rows: _Array, cols: _Array) -> _Array:
        """Return (..., rows, cols, q) percentiles of (..., y, x) pixels."""
        values = np.sort(_gather(pixels, rows, cols), axis=-1)  # NaN last
        count = (~np.isnan(values)).sum(axis=-1, keepdims=True)
        place = np.maximum(count - 1, 0) * (np.asarray(self.q) / 100)
        below = np.floor(place).astype(np.intp)
        above = np.minimum(below + 1, np.maximum(count - 1, 0))
        low, high = (
            np.take_along_axis(values, at, axis=-1).astype(np.float64) for at in (below, above)
        )
        found: _Array = low + (high - low) * (place - below)
        return found


@dataclass(frozen=True)
class _Task:
    """Reduction of one block of whole cells."""

    kernel: _Kernel
    y: _CellAxis
    x: _CellAxis
    min_valid: float
    dtype: str

    def __call__(self, pixels: _Array, area: _Array, block_info: Any) -> _Array:
        rows, cols = block_info[0]["array-location"][-2:]
        (y, full_y), (x, full_x) = self.y.within(*rows), self.x.within(*cols)
        there = _add_up((~np.isnan(pixels)).astype(np.float64), y, x)
        enough = (there > 0) & (there >= self.min_valid * np.outer(full_y, full_x))
        found = self.kernel(pixels, area, y, x)
        if found.ndim > enough.ndim:
            enough = enough[..., None]
        return np.where(enough, found, np.nan).astype(self.dtype)


def _lazy(task: _Task, pixels: da.Array, area: da.Array, added: Sequence[int]) -> da.Array:
    """Put whole cells into each block, and reduce each by one task."""
    *leading, by_y, by_x = pixels.chunks
    (rows, tall), (cols, wide) = task.y.chunked(by_y), task.x.chunked(by_x)
    return da.map_blocks(
        task,
        pixels.rechunk((*leading, rows, cols)),
        area.rechunk((rows, cols)),
        chunks=(*leading, tall, wide, *((n,) for n in added)),
        new_axis=pixels.ndim if added else None,
        dtype=task.dtype,
        meta=np.empty((0,) * (pixels.ndim + len(added)), task.dtype),
    )


def _add_up(values: _Array, rows: _Array, cols: _Array) -> _Array:
    """Sum over cells: (..., y, x) to (..., rows, cols)."""
    by_rows = np.add.reduceat(values, rows[:-1], axis=-2, dtype=np.float64)
    found: _Array = np.add.reduceat(by_rows, cols[:-1], axis=-1)
    return found


def _gather(pixels: _Array, rows: _Array, cols: _Array) -> _Array:
    """Line up the pixels of each cell: (..., y, x) to (..., rows, cols, pixels), NaN at the end."""
    (at_y, no_y), (at_x, no_x) = _places(rows), _places(cols)
    found = pixels[..., at_y[:, :, None, None], at_x]  # [..., rows, tall, cols, wide]
    found[..., no_y[:, :, None, None] | no_x] = np.nan
    found = np.moveaxis(found, -3, -2)  # [..., rows, cols, tall, wide]
    lined_up: _Array = found.reshape(*found.shape[:-2], -1)
    return lined_up


def _places(bounds: _Array) -> tuple[_Array, _Array]:
    """Return the pixels of each cell along an axis, and which are beyond its end."""
    sizes = np.diff(bounds)
    places = bounds[:-1, None] + np.arange(sizes.max())
    beyond = places >= bounds[1:, None]
    return np.where(beyond, bounds[:-1, None], places), beyond
