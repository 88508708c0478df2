"""Pixel size on the ground: sides and areas of cells on the ellipsoid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import pyproj
import xarray as xr
from dask.base import tokenize

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.raster.crs import find_crs
from xchmv2.raster.grid import Grid, find_grid
from xchmv2.raster.labels import label_quantity

_Floats = npt.NDArray[np.float64]
#: Distance between the nodes at which areas of a projection are computed [m]; linear
#: interpolation between them is accurate to a millionth.
_NODE_SPACING = 10_000.0
_MOST_NODES = 257
#: Smallest half side of the parallelogram at a node [m]: long against the rounding of
#: coordinates, short against the radius of the Earth.
_REACH = 200.0
#: Steps to which the ground scale of a projection is rounded, as a share.
_STEP = 0.01
#: Metres per degree of a geographic CRS, from which its steps are counted.
_DEGREE = 111_195.0


def has_true_areas(array: xr.DataArray) -> bool:
    """Return whether the areas of an array's cells on the ground are known.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims.

    Returns
    -------
    bool
        True with a geographic or projected CRS. Without one, or with one that is not tied to the
        Earth, False: :func:`cell_areas` then uses the coordinates' own units.
    """
    return _earthbound(find_crs(array))


def cell_areas(array: xr.DataArray) -> xr.DataArray:
    """Compute the area of each cell of a raster on the ground.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims; further dims are ignored.

    Returns
    -------
    DataArray
        float64 of the two spatial dims, vertical first: the area of each cell. With a CRS it is
        the area on the ground [m2], on the CRS's own ellipsoid; without one it is in the
        coordinates' own units, and 1 without coordinates. dask-backed in the array's own chunks if
        the array is; read-only if not.

    Raises
    ------
    ImageryError
        If the cells are not on a regular grid.
    CHMv2Error
        If coordinates are outside the CRS's domain.

    Notes
    -----
    In a geographic CRS the area of each row is that of the ellipsoid between its two parallels.
    In a projected CRS the parallelogram that the grid spans on the ellipsoid is computed at nodes
    10 km apart and interpolated, to within a millionth. A projected square metre is not a square
    metre on the ground: in EPSG:3857 at 60 degrees north it is a quarter of one.
    """
    grid = find_grid(array)
    true = _earthbound(grid.crs)
    areas = _measure_areas(grid) if true else _Nodes.constant(abs(math.prod(grid.pixel)))
    plane = _plane(array, grid)
    return _label(plane.copy(data=_fill(areas, plane)), true)


def cell_sides(array: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Compute the sides of a raster's cells on the ground.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims; further dims are ignored.

    Returns
    -------
    tall, wide : DataArray
        float64 of the two spatial dims: length of each cell along the vertical and the horizontal
        axis, on the ground [m] with a CRS, else in the coordinates' own units. Lazy as in
        :func:`cell_areas`.

    Raises
    ------
    ImageryError
        If the cells are not on a regular grid.
    CHMv2Error
        If coordinates are outside the CRS's domain.
    """
    grid = find_grid(array)
    if true := _earthbound(grid.crs):
        tall, wide = _measure_sides(grid)
    else:
        tall, wide = (_Nodes.constant(abs(side)) for side in grid.pixel)
    plane = _plane(array, grid)

    def label(nodes: _Nodes, what: str) -> xr.DataArray:
        attrs = {"long_name": f"{what} of a cell"} | ({"units": "m"} if true else {})
        return label_quantity(plane.copy(data=_fill(nodes, plane)), f"cell_{what}", attrs)

    return label(tall, "height"), label(wide, "width")


def ground_pixel(grid: Grid) -> tuple[float, float]:
    """Compute the height and width of a pixel on the ground [m] at the centre of a grid with a CRS.

    On the CRS's own ellipsoid: a projected metre is not always a metre on the ground; at 60 degrees
    north a metre of EPSG:3857 is half a metre. Without a CRS it is the ``side`` that the grid
    states. An ImageryError refuses coordinates outside the CRS's domain, and a CRS not tied to the
    Earth.
    """
    if grid.crs is None and grid.side is not None:
        return grid.side, grid.side
    projected = grid.crs.proj
    (top, left), (dy, dx), (rows, cols) = grid.edges, grid.pixel, grid.shape
    cx, cy = left + dx * cols / 2, top + dy * rows / 2
    reach = 50  # half the length of the measured lines [px]
    xs = [cx, cx, cx - reach * dx, cx + reach * dx]
    ys = [cy - reach * dy, cy + reach * dy, cy, cy]
    try:
        to_degrees = pyproj.Transformer.from_crs(projected, projected.geodetic_crs, always_xy=True)
        lon, lat = to_degrees.transform(xs, ys, errcheck=True)
        _, _, lengths = projected.get_geod().inv(lon[::2], lat[::2], lon[1::2], lat[1::2])
    except (pyproj.exceptions.ProjError, AttributeError, ValueError) as error:
        raise ImageryError(
            "coordinates that their CRS can place on the Earth",
            f"{projected.name} at {cx:g}, {cy:g} ({type(error).__name__})",
            "correct it: imagery.rio.write_crs('EPSG:...')",
        ) from error
    return float(lengths[0]) / (2 * reach), float(lengths[1]) / (2 * reach)


def ground_scale(grid: Grid) -> tuple[float, float]:
    """Compute the metres on the ground of a unit of the vertical and the horizontal coordinate.

    At the scene's centre; raises as :func:`ground_pixel` does.
    """
    tall, wide = (
        side / abs(pixel) for side, pixel in zip(ground_pixel(grid), grid.pixel, strict=True)
    )
    return tall, wide


def stepped_ground_scale(grid: Grid) -> tuple[float, float]:
    """Compute :func:`ground_scale` in steps of 1 %.

    They give neighbouring areas of interest the same pixels and cells, although the scale differs
    slightly between the centres of scenes; in a UTM zone it is exactly 1.
    """
    scales = ground_scale(grid)
    if grid.crs is None:
        return scales
    if math.isclose(*scales, rel_tol=_STEP):  # conformal: squares remain squares
        scales = (math.sqrt(math.prod(scales)),) * 2
    crs, step = grid.crs.proj, math.log1p(_STEP)
    unit = _DEGREE if crs.is_geographic else float(crs.axis_info[0].unit_conversion_factor)
    tall, wide = (unit * math.exp(step * round(math.log(scale / unit) / step)) for scale in scales)
    return tall, wide


def _plane(array: xr.DataArray, grid: Grid) -> xr.DataArray:
    """Select one plane of an array, with its vertical dim first."""
    further = {dim: 0 for dim in array.dims if dim not in grid.dims}
    return array.isel(further, drop=True).transpose(*grid.dims)


def _label(areas: xr.DataArray, true: bool) -> xr.DataArray:
    if true:
        return label_quantity(areas, "cell_area", {"long_name": "cell area", "units": "m2"})
    attrs = {"long_name": "cell area in the coordinates' own units"}
    if {areas[dim].attrs.get("units") for dim in areas.dims} <= {"m", "metre", "meter"}:
        attrs["units"] = "m2"
    return label_quantity(areas, "cell_area", attrs)


def _fill(nodes: _Nodes, plane: xr.DataArray) -> Any:
    """Interpolate to all cells of a plane, in its chunks if it has any."""
    if plane.chunks is None:
        found = nodes.at(*(np.arange(size) for size in plane.shape))
        found.flags.writeable = False
        return found
    name = f"cell-areas-{tokenize(nodes, plane.chunks)}"
    return da.map_blocks(
        _at, nodes, chunks=plane.chunks, name=name, dtype="float64", meta=np.empty((0, 0))
    )


def _at(nodes: _Nodes, block_info: Any) -> _Floats:
    """Task: interpolate to the cells of one chunk."""
    return nodes.at(*(np.arange(*span) for span in block_info[None]["array-location"]))


def _earthbound(crs: Any) -> bool:
    return crs is not None and bool(crs.proj.is_geographic or crs.proj.is_projected)


@dataclass(frozen=True)
class _Nodes:
    """Areas or lengths at some rows and columns of a grid, interpolated linearly between them.

    `rows`, `cols`: ascending cell indices; `areas`: (rows, cols) area, or length of a side, of a
    cell.
    """

    rows: _Floats
    cols: _Floats
    areas: _Floats

    @classmethod
    def constant(cls, area: float) -> _Nodes:
        """Return nodes for cells of equal area."""
        return cls(np.zeros(1), np.zeros(1), np.full((1, 1), area))

    def at(self, rows: npt.NDArray[Any], cols: npt.NDArray[Any]) -> _Floats:
        """Interpolate to (rows, cols) of the grid."""
        at_rows = np.stack([np.interp(rows, self.rows, column) for column in self.areas.T], axis=1)
        if len(self.cols) == 1:
            return np.broadcast_to(at_rows, (len(rows), len(cols)))
        left = np.clip(np.searchsorted(self.cols, cols, "right") - 1, 0, len(self.cols) - 2)
        share = (cols - self.cols[left]) / (self.cols[left + 1] - self.cols[left])
        weight = np.zeros((len(self.cols), len(cols)))
        weight[left, np.arange(len(cols))] = 1 - share
        weight[left + 1, np.arange(len(cols))] = share
        found: _Floats = at_rows @ weight
        return found


def _measure_areas(grid: Grid) -> _Nodes:
    """Compute the areas of a grid's cells on the ellipsoid [m2], or refuse those off the Earth."""
    if grid.crs.proj.is_geographic:
        return _measure_rows(grid)
    rows, cols, down, along = _measure_nodes(grid)
    areas = np.linalg.norm(np.cross(down, along), axis=-1)
    if np.ptp(areas, axis=1).max() <= 1e-9 * areas.max():  # cylindrical: equal along a row
        cols, areas = cols[:1], areas[:, :1]
    return _Nodes(rows, cols, areas)


def _measure_sides(grid: Grid) -> tuple[_Nodes, _Nodes]:
    """Compute the heights and the widths of a grid's cells on the ellipsoid [m]."""
    if grid.crs.proj.is_geographic:
        return _measure_row_sides(grid)
    rows, cols, *sides = _measure_nodes(grid)
    tall, wide = (np.linalg.norm(side, axis=-1) for side in sides)
    return _Nodes(rows, cols, tall), _Nodes(rows, cols, wide)


def _measure_row_sides(grid: Grid) -> tuple[_Nodes, _Nodes]:
    """Compute the sides of the cells of a geographic CRS along their centre lines."""
    ellipsoid = grid.crs.proj.get_geod()
    radians = float(grid.crs.proj.axis_info[0].unit_conversion_factor)
    (dy, dx), (top, _) = grid.pixel, grid.edges
    rows = np.arange(grid.shape[0], dtype=float)
    latitude = (top + (rows + 0.5) * dy) * radians
    bend = 1 - ellipsoid.es * np.sin(latitude) ** 2
    tall = ellipsoid.a * (1 - ellipsoid.es) / bend**1.5 * abs(dy) * radians
    wide = ellipsoid.a / np.sqrt(bend) * np.cos(latitude) * abs(dx) * radians
    return _Nodes(rows, np.zeros(1), tall[:, None]), _Nodes(rows, np.zeros(1), wide[:, None])


def _measure_nodes(grid: Grid) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Return rows and columns of nodes, and the sides of their cells as geocentric vectors [m]."""
    metres = float(grid.crs.proj.axis_info[0].unit_conversion_factor)
    (dy, dx), (top, left) = grid.pixel, grid.edges
    counts = (
        min(1 + math.ceil((size - 1) * abs(pixel) * metres / _NODE_SPACING), _MOST_NODES, size)
        for size, pixel in zip(grid.shape, grid.pixel, strict=True)
    )
    rows, cols = (np.linspace(0, n - 1, k) for n, k in zip(grid.shape, counts, strict=True))
    y, x = (top + (rows + 0.5) * dy)[:, None], (left + (cols + 0.5) * dx)[None, :]
    reach_y, reach_x = (max(abs(pixel) / 2, _REACH / metres) for pixel in grid.pixel)

    def across(to_y: float, to_x: float) -> _Floats:
        start, end = (
            _geocentric(grid.crs, *np.broadcast_arrays(y + k * to_y, x + k * to_x)) for k in (-1, 1)
        )
        return np.asarray(end - start)

    down, along = across(reach_y, 0), across(0, reach_x)
    return rows, cols, down * (abs(dy) / (2 * reach_y)), along * (abs(dx) / (2 * reach_x))


def _geocentric(crs: Any, y: _Floats, x: _Floats) -> _Floats:
    """Convert projected to geocentric coordinates (..., 3) [m], continuous at poles and seams."""
    projected = crs.proj.to_2d()
    geodetic = projected.geodetic_crs
    to_degrees = pyproj.Transformer.from_crs(projected, geodetic, always_xy=True)
    lon, lat = to_degrees.transform(x, y)
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        raise CHMv2Error(
            "coordinates that their CRS can place on the Earth",
            f"{projected.name} with x {x.min():g} to {x.max():g}, y {y.min():g} to {y.max():g}",
            "correct the CRS: array.rio.write_crs('EPSG:...')",
        )
    radians = float(geodetic.axis_info[0].unit_conversion_factor)
    lon, lat = lon * radians, lat * radians
    ellipsoid = projected.get_geod()
    prime_vertical = ellipsoid.a / np.sqrt(1 - ellipsoid.es * np.sin(lat) ** 2)
    ring = prime_vertical * np.cos(lat)
    axis = prime_vertical * (1 - ellipsoid.es) * np.sin(lat)
    return np.stack([ring * np.cos(lon), ring * np.sin(lon), axis], axis=-1)


def _measure_rows(grid: Grid) -> _Nodes:
    """Compute the areas of geographic cells as shares of zones between parallels [m2]."""
    ellipsoid = grid.crs.proj.get_geod()
    radians = float(grid.crs.proj.axis_info[0].unit_conversion_factor)
    (dy, dx), (top, _) = grid.pixel, grid.edges
    lines = (top + np.arange(grid.shape[0] + 1) * dy) * radians
    if np.abs(lines).max() > math.pi / 2 + 0.01 * abs(dy) * radians:
        raise CHMv2Error(
            "latitudes of at most 90 degrees",
            f"{grid.dims[0]} edges from {lines[0] / radians:g} to {lines[-1] / radians:g}",
            "correct the CRS: array.rio.write_crs('EPSG:...')",
        )
    sine = np.sin(np.clip(lines, -math.pi / 2, math.pi / 2))
    zone = sine / (1 - ellipsoid.es * sine**2)
    e = math.sqrt(ellipsoid.es)
    zone = zone + (np.arctanh(e * sine) / e if e else sine)
    areas = np.abs(np.diff(zone)) * ellipsoid.b**2 / 2 * abs(dx) * radians
    return _Nodes(np.arange(grid.shape[0], dtype=float), np.zeros(1), areas[:, None])
