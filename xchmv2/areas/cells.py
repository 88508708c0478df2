"""Areas and sides of cells in xarray."""

from __future__ import annotations

import math
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.base import tokenize

from xchmv2.areas.ellipsoid import Floats, Nodes, measure_areas, measure_sides
from xchmv2.imagery import Grid, find_grid
from xchmv2.labels import label_quantity


def has_true_areas(array: xr.DataArray) -> bool:
    """Whether the areas of an array's cells are known on the ground.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims.

    Returns
    -------
    bool
        True with a geographic or projected CRS; False without one, or with one that is not tied
        to the Earth: :func:`cell_areas` is then in the coordinates' own units.
    """
    return _earthbound(array.odc.crs)


def cell_areas(array: xr.DataArray) -> xr.DataArray:
    """Measure the cells of a raster on the ground.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims; further dims play no part.

    Returns
    -------
    DataArray
        float64 of the two spatial dims, vertical first: the area of each cell. With a CRS it is
        true on the ground [m2], on the CRS's own ellipsoid; without one it is in the coordinates'
        own units, and 1 where there are no coordinates. dask-backed in the array's own chunks if
        the array is. Read-only if not.

    Raises
    ------
    ImageryError
        If the cells are not on a regular grid.
    CHMv2Error
        If coordinates are outside the CRS's domain.

    Notes
    -----
    In a geographic CRS the area of each row is that of the ellipsoid between its two parallels.
    In a projected one the parallelogram that the grid spans on the ellipsoid is measured at nodes
    of 10 km and interpolated; that is good to a millionth. A projected square metre is not a
    square metre on the ground: in EPSG:3857 at 60 degrees north it is a quarter of one.
    """
    grid = find_grid(array)
    true = _earthbound(grid.crs)
    areas = measure_areas(grid) if true else Nodes.constant(abs(math.prod(grid.pixel)))
    plane = _plane(array, grid)
    return _label(plane.copy(data=_fill(areas, plane)), true)


def cell_sides(array: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Measure the sides of a raster's cells on the ground.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims; further dims play no part.

    Returns
    -------
    tall, wide : DataArray
        float64 of the two spatial dims: length of each cell along the vertical and the horizontal
        axis, true on the ground [m] with a CRS, else in the coordinates' own units. Lazy as in
        :func:`cell_areas`.

    Raises
    ------
    ImageryError
        If the cells are not on a regular grid.
    CHMv2Error
        If coordinates are outside the CRS's domain.
    """
    grid = find_grid(array)
    true = _earthbound(grid.crs)
    if true:
        sides = measure_sides(grid)
    else:
        sides = (Nodes.constant(abs(grid.pixel[0])), Nodes.constant(abs(grid.pixel[1])))
    plane = _plane(array, grid)
    units = {"units": "m"} if true else {}
    tall, wide = (
        label_quantity(plane.copy(data=_fill(side, plane)), name, {"long_name": words, **units})
        for side, name, words in zip(
            sides,
            ("cell_height", "cell_width"),
            ("height of a cell", "width of a cell"),
            strict=True,
        )
    )
    return tall, wide


def _plane(array: xr.DataArray, grid: Grid) -> xr.DataArray:
    """Choose one plane of an array, its vertical dim first."""
    further = {dim: 0 for dim in array.dims if dim not in grid.dims}
    return array.isel(further, drop=True).transpose(*grid.dims)


def _label(areas: xr.DataArray, true: bool) -> xr.DataArray:
    if true:
        return label_quantity(areas, "cell_area", {"long_name": "cell area", "units": "m2"})
    attrs = {"long_name": "cell area in the coordinates' own units"}
    if {areas[dim].attrs.get("units") for dim in areas.dims} <= {"m", "metre", "meter"}:
        attrs["units"] = "m2"
    return label_quantity(areas, "cell_area", attrs)


def _fill(nodes: Nodes, plane: xr.DataArray) -> Any:
    """Return the areas of all cells of a plane, in its chunks if it has any."""
    if plane.chunks is None:
        found = nodes.at(*(np.arange(size) for size in plane.shape))
        found.flags.writeable = False
        return found
    name = f"cell-areas-{tokenize(nodes, plane.chunks)}"
    return da.map_blocks(
        _at, nodes, chunks=plane.chunks, name=name, dtype="float64", meta=np.empty((0, 0))
    )


def _at(nodes: Nodes, block_info: Any) -> Floats:
    """Task: the areas of one chunk."""
    return nodes.at(*(np.arange(*span) for span in block_info[None]["array-location"]))


def _earthbound(crs: Any) -> bool:
    return crs is not None and bool(crs.proj.is_geographic or crs.proj.is_projected)
