"""Where the pixels lie: the grid of the imagery, its ground resolution, the grid to predict on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import odc.geo.xr  # registers the .odc accessor
import pyproj
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from xchmv2.errors import ImageryError
from xchmv2.imagery.resampling import AxisMap
from xchmv2.tiling import origin_index

#: Ground resolutions the model was trained for, roughly [m]; both ends belong to it.
FINEST, COARSEST = 0.25, 1.5
#: Pixels smaller than this are a mistake in the CRS or the transform [m].
_FINEST_SOURCE = 0.01
#: Imagery coarser than this is not worth resampling: single trees cannot be seen in it [m].
_COARSEST_SOURCE = 3.0
_TOLERANCE = 0.01
#: Coordinate differences carry the noise of large coordinates; pixel sizes have fewer decimals.
_PIXEL_DECIMALS = 8


@dataclass(frozen=True)
class Grid:
    """The regular pixel grid of an image.

    Parameters
    ----------
    dims : tuple of str
        Names of the vertical and the horizontal dimension.
    shape : tuple of int
        (height, width) [px].
    crs : odc.geo CRS or None
        Coordinate reference system.
    edges : tuple of float
        CRS coordinates of the outer edges of the first row and the first column.
    pixel : tuple of float
        Signed pixel sizes (vertical, horizontal) in CRS units.
    """

    dims: tuple[str, str]
    shape: tuple[int, int]
    crs: Any = None
    edges: tuple[float, float] = (0.0, 0.0)
    pixel: tuple[float, float] = (1.0, 1.0)

    @property
    def origin(self) -> tuple[int, int]:
        """Index of the first pixel counted from the CRS origin; zeros without a CRS."""
        if self.crs is None:
            return (0, 0)
        y, x = (origin_index(e, p) for e, p in zip(self.edges, self.pixel, strict=True))
        return (y, x)

    def turned(self, dims: tuple[Hashable, ...]) -> Grid:
        """Count the same pixels from the other end along some dims."""
        edges, pixel = list(self.edges), list(self.pixel)
        for axis, dim in enumerate(self.dims):
            if dim in dims:
                edges[axis] += pixel[axis] * self.shape[axis]
                pixel[axis] = -pixel[axis]
        return replace(self, edges=(edges[0], edges[1]), pixel=(pixel[0], pixel[1]))

    @property
    def geobox(self) -> GeoBox:
        """The same grid in odc-geo's terms."""
        (top, left), (dy, dx) = self.edges, self.pixel
        return GeoBox(self.shape, Affine(dx, 0.0, left, 0.0, dy, top), self.crs)


def find_grid(array: xr.DataArray) -> Grid:
    """Read the pixel grid of an array from its dims, coordinates and CRS.

    Parameters
    ----------
    array : DataArray
        Any array with two spatial dims.

    Returns
    -------
    Grid
        Without a CRS its edges and pixel size mean nothing.

    Raises
    ------
    ImageryError
        If there are no spatial dims, a dim is empty, or the pixels are not on a regular grid.
    """
    dims = _spatial_dims(array)
    shape = (array.sizes[dims[0]], array.sizes[dims[1]])
    crs = array.odc.crs
    if crs is None:
        return Grid(dims, shape)
    array = _with_coordinates(array, dims)
    pixels = _pixels(array, dims)
    edges = tuple(
        float(array[dim].values[0]) - pixel / 2 for dim, pixel in zip(dims, pixels, strict=True)
    )
    return Grid(dims, shape, crs, (edges[0], edges[1]), pixels)


def is_crs_variable(variable: xr.DataArray) -> bool:
    """Whether a variable holds a CRS rather than data."""
    return variable.ndim == 0 and bool({"crs_wkt", "spatial_ref"} & set(variable.attrs))


def find_crs_coordinate(coords: Mapping[Hashable, xr.DataArray]) -> str | None:
    """Name of the coordinate that holds the CRS, the CF grid mapping; None without one."""
    return next((str(name) for name, coord in coords.items() if is_crs_variable(coord)), None)


def ground_pixel(grid: Grid) -> tuple[float, float]:
    """Measure a pixel on the ground, at the scene's centre, on the CRS's own ellipsoid.

    Parameters
    ----------
    grid : Grid
        A grid with a CRS.

    Returns
    -------
    tuple of float
        Height and width of a pixel [m].

    Raises
    ------
    ImageryError
        If the coordinates are outside the CRS's domain, or it is not tied to the Earth.

    Notes
    -----
    A projected metre is not always a metre on the ground: at 60 degrees north a metre of
    EPSG:3857 is half a metre.
    """
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


def resolve_target(grid: Grid, resolution: float | None) -> tuple[Grid, AxisMap, AxisMap]:
    """Choose the grid to predict on.

    Parameters
    ----------
    grid : Grid
        Grid of the imagery.
    resolution : float or None
        Wanted ground resolution [m]; None keeps the imagery's own pixels.

    Returns
    -------
    target : Grid
        The grid of the prediction. Under ``resolution`` its lines are multiples of the target
        pixel from the CRS origin, and it covers the imagery.
    rows, cols : AxisMap
        How target pixels lie in source pixels.

    Raises
    ------
    ImageryError
        If the imagery or the wanted resolution is outside what the model was trained for, the CRS
        is geographic, or ``resolution`` is given without a CRS.
    """
    if grid.crs is None:
        if resolution is not None:
            raise ImageryError(
                "a CRS, to know what a pixel measures on the ground",
                f"none, with resolution={resolution}",
                "write it: imagery.rio.write_crs('EPSG:...'), or leave resolution out",
            )
        return grid, AxisMap.identity(grid.shape[0]), AxisMap.identity(grid.shape[1])
    _refuse_geographic(grid)
    native = ground_pixel(grid)
    if resolution is None:
        _validate_native(native)
        return grid, AxisMap.identity(grid.shape[0]), AxisMap.identity(grid.shape[1])
    _validate_wanted(native, resolution)
    return _aligned(grid, native, resolution)


def _spatial_dims(array: xr.DataArray) -> tuple[str, str]:
    dims = odc.geo.xr.spatial_dims(array)
    if dims is None:
        raise ImageryError(
            "two spatial dims named y and x",
            f"dims {array.dims}",
            "rename them: imagery.rename({...: 'y', ...: 'x'})",
        )
    return str(dims[0]), str(dims[1])


def _with_coordinates(array: xr.DataArray, dims: tuple[str, str]) -> xr.DataArray:
    """Add coordinates that the CRS variable's transform implies."""
    if all(dim in array.coords for dim in dims):
        return array
    box = array.odc.geobox
    if box is None or not box.axis_aligned:
        raise _irregular(f"a CRS but no coordinates or transform along {dims}")
    return array.assign_coords({d: c for d, c in xr_coords(box, dims=dims).items() if d in dims})


def _pixels(array: xr.DataArray, dims: tuple[str, str]) -> tuple[float, float]:
    """Signed pixel sizes; an axis of one pixel borrows from the transform or the other axis."""
    stored = _stored_pixels(array)
    dy, dx = (_spacing(array, dim, known) for dim, known in zip(dims, stored, strict=True))
    if dy is None and dx is None:
        raise _irregular("a single pixel and no transform, so no pixel size")
    return dy or -abs(dx or 0), dx or abs(dy or 0)


def _stored_pixels(array: xr.DataArray) -> tuple[float | None, float | None]:
    """Read the pixel sizes of the GeoTransform attribute: exact, but stale after subsampling."""
    for coord in array.coords.values():
        words = str(coord.attrs.get("GeoTransform", "")).split()
        if len(words) == 6:
            return float(words[5]), float(words[1])
    return None, None


def _spacing(array: xr.DataArray, dim: str, stored: float | None) -> float | None:
    """Signed step between coordinates, exactly as stored where that is known."""
    centres = np.asarray(array[dim].values, dtype=float)
    if centres.size < 2:
        return stored
    pixel = round(float(centres[-1] - centres[0]) / (centres.size - 1), _PIXEL_DECIMALS)
    if pixel == 0 or np.abs(np.diff(centres) - pixel).max() > _TOLERANCE * abs(pixel):
        steps = np.diff(centres)
        raise _irregular(f"{dim} coordinates in steps from {steps.min():g} to {steps.max():g}")
    if stored is not None and math.isclose(abs(stored), abs(pixel), rel_tol=1e-6):
        return math.copysign(stored, pixel)
    return pixel


def _irregular(found: str) -> ImageryError:
    return ImageryError(
        "pixels on a regular grid along the CRS axes",
        found,
        "resample it first: imagery.odc.reproject(imagery.odc.crs, resolution=...)",
    )


def _refuse_geographic(grid: Grid) -> None:
    if not grid.crs.geographic:
        return
    (top, left), (dy, dx), (rows, cols) = grid.edges, grid.pixel, grid.shape
    lon, lat = left + dx * cols / 2, top + dy * rows / 2
    zone = min(60, int((lon + 180) // 6) + 1)
    utm = f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"
    raise ImageryError(
        "a projected CRS, in which pixels are square on the ground",
        f"the geographic CRS {grid.crs.to_epsg() or grid.crs.proj.name}",
        f"reproject it: imagery.odc.reproject({utm!r}, resolution=0.6).chmv2.predict(...)",
    )


def _validate_native(native: tuple[float, float]) -> None:
    if min(native) >= FINEST * (1 - _TOLERANCE) and max(native) <= COARSEST * (1 + _TOLERANCE):
        return
    _validate_source(native)
    raise ImageryError(
        f"imagery of {FINEST} to {COARSEST} m on the ground (the model was trained at 0.6 m)",
        f"pixels of {native[0]:.3g} x {native[1]:.3g} m",
        "resample while predicting: .predict(..., resolution=0.6)",
    )


def _validate_source(native: tuple[float, float]) -> None:
    if not min(native) >= _FINEST_SOURCE:
        raise ImageryError(
            f"pixels of at least {_FINEST_SOURCE} m on the ground",
            f"pixels of {native[0]:.3g} x {native[1]:.3g} m",
            "check the CRS and the transform: degrees may have been labelled as metres",
        )
    if max(native) > _COARSEST_SOURCE * (1 + _TOLERANCE):
        raise ImageryError(
            f"imagery of {FINEST} to {COARSEST} m on the ground (the model was trained at 0.6 m)",
            f"pixels of {native[0]:.3g} x {native[1]:.3g} m, in which single trees cannot be seen",
            "take finer imagery; resampling does not bring the detail back",
        )


def _validate_wanted(native: tuple[float, float], resolution: float) -> None:
    if not FINEST * (1 - _TOLERANCE) <= resolution <= COARSEST * (1 + _TOLERANCE):
        raise ImageryError(
            f"a ground resolution of {FINEST} to {COARSEST} m (the model was trained at 0.6 m)",
            f"resolution={resolution}",
            "take the training resolution: .predict(..., resolution=0.6)",
        )
    _validate_source(native)


def _aligned(
    grid: Grid, native: tuple[float, float], resolution: float
) -> tuple[Grid, AxisMap, AxisMap]:
    """Cover the grid by pixels of the wanted size, at whole multiples from the CRS origin."""
    edges, pixels, shape = [], [], []
    scales = [metres / abs(pixel) for metres, pixel in zip(native, grid.pixel, strict=True)]
    if math.isclose(*scales, rel_tol=_TOLERANCE):  # conformal: square pixels stay square
        scales = [math.sqrt(math.prod(scales))] * 2
    for edge, pixel, scale, size in zip(grid.edges, grid.pixel, scales, grid.shape, strict=True):
        wanted = math.copysign(resolution / _ground_scale(grid, scale), pixel)
        first = math.floor(round(edge / wanted, 6))
        last = math.ceil(round((edge + pixel * size) / wanted, 6))
        edges.append(first * wanted)
        pixels.append(wanted)
        shape.append(last - first)
    target = replace(
        grid,
        shape=(shape[0], shape[1]),
        edges=(edges[0], edges[1]),
        pixel=(pixels[0], pixels[1]),
    )
    rows, cols = (_axis_map(grid, target, axis) for axis in (0, 1))
    return target, rows, cols


def _ground_scale(grid: Grid, metres_per_unit: float) -> float:
    """Ground metres per CRS unit, in steps of 1 %.

    The steps give neighbouring areas of interest the same pixels, though the scale differs a
    little from one scene's centre to the next; in a UTM zone it becomes exactly 1.
    """
    unit = float(grid.crs.proj.axis_info[0].unit_conversion_factor)
    step = math.log1p(_TOLERANCE)
    return unit * math.exp(step * round(math.log(metres_per_unit / unit) / step))


def _axis_map(grid: Grid, target: Grid, axis: int) -> AxisMap:
    pixel = grid.pixel[axis]
    return AxisMap(
        source_size=grid.shape[axis],
        size=target.shape[axis],
        ratio=round(target.pixel[axis] / pixel, 9),
        offset=round((target.edges[axis] - grid.edges[axis]) / pixel, 6),
    )
