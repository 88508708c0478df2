"""The regular pixel grid of a raster, read from its coordinates and CRS."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import odc.geo.xr
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.raster.tiling import origin_index

# Largest deviation of coordinates from their grid, and between two grids, as a share of a pixel.
_TOLERANCE = 0.01


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
        Coordinates of the outer edges of the first row and the first column.
    pixel : tuple of float
        Signed pixel sizes (vertical, horizontal) in the coordinates' units.
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
        """Return the same pixels in reverse order along some dims."""
        edges, pixel = list(self.edges), list(self.pixel)
        for axis, dim in enumerate(self.dims):
            if dim in dims:
                edges[axis] += pixel[axis] * self.shape[axis]
                pixel[axis] = -pixel[axis]
        return replace(self, edges=(edges[0], edges[1]), pixel=(pixel[0], pixel[1]))

    @property
    def geobox(self) -> GeoBox:
        """The same grid as an odc-geo GeoBox."""
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
        Edges and signed pixel sizes in the coordinates' units. Without a CRS, an axis that has no
        coordinates counts pixels from its first edge.

    Raises
    ------
    ImageryError
        If there are no spatial dims, a dim is empty, or the pixels are not on a regular grid.
    """
    dims = _spatial_dims(array)
    for dim in dims:
        if dim in array.coords and array[dim].dtype.kind not in "fiu":
            levels = array.indexes[dim].nlevels > 1
            raise ImageryError(
                f"one number for each row or column as {dim}",
                f"{'several levels' if levels else array[dim].dtype}",
                f"reset them: array.reset_index({dim!r}).assign_coords({dim}=numbers)"
                if levels
                else f"convert them: array.assign_coords({dim}=array[{dim!r}].astype(float))",
            )
    shape = (array.sizes[dims[0]], array.sizes[dims[1]])
    crs = array.odc.crs
    if crs is not None:
        array = _with_coordinates(array, dims)
    pixels = _pixels(array, dims, crs)
    edges = tuple(
        float(array[dim].values[0]) - pixel / 2 if dim in array.coords else 0.0
        for dim, pixel in zip(dims, pixels, strict=True)
    )
    return Grid(dims, shape, crs, (edges[0], edges[1]), pixels)


def _grid_difference(array: xr.DataArray, other: xr.DataArray) -> str | None:
    """Describe how the grids of two rasters differ: in dims, size, CRS, or coordinates.

    Parameters
    ----------
    array, other : DataArray
        Any, with two spatial dims.

    Returns
    -------
    str or None
        None if they are equal: coordinates within 1 % of a pixel, and one CRS. Where one raster
        lacks a CRS, or coordinates along a dim, those of the other are used.
    """
    grid = find_grid(other)
    dims = grid.dims
    if not set(dims) <= set(array.dims):
        return f"dims {other.dims} and {array.dims}"
    shapes = [tuple(a.sizes[dim] for dim in dims) for a in (other, array)]
    if shapes[0] != shapes[1]:
        return f"{shapes[0]} and {shapes[1]} pixels"
    crs, other_crs = array.odc.crs, other.odc.crs
    if crs is not None and other_crs is not None and crs != other_crs:
        return f"{_crs_name(other_crs)} and {_crs_name(crs)}"
    found = (
        _offset(array, other, dim, abs(step)) for dim, step in zip(dims, grid.pixel, strict=True)
    )
    return next((said for said in found if said is not None), None)


def same_grid(array: xr.DataArray, other: xr.DataArray) -> bool:
    """Return whether two rasters share a grid: coordinates within 1 % of a pixel, and one CRS."""
    return _grid_difference(array, other) is None


def on_same_grid(
    array: xr.DataArray, other: xr.DataArray, *, what: str = "rasters", fix: str | None = None
) -> xr.DataArray:
    """Assign an array the coordinates of another, which must be equal up to rounding.

    Parameters
    ----------
    array : DataArray
        Any, with two spatial dims of the same names.
    other : DataArray
        Source of the coordinates; arithmetic between the two then loses no pixel.
    what, fix : str, optional
        Name of the array and advice in the error message.

    Returns
    -------
    DataArray
        The same values.

    Raises
    ------
    CHMv2Error
        If sizes, coordinates or CRS differ; see :func:`same_grid`.
    """
    found = _grid_difference(array, other)
    if found is not None:
        raise CHMv2Error(
            f"{what} on the same grid",
            found,
            fix
            or "resample one first: after.odc.reproject(before.odc.geobox, resampling='bilinear')",
        )
    dims = find_grid(other).dims
    return array.assign_coords({dim: other[dim].variable for dim in dims if dim in other.coords})


def on_same_coordinates(
    array: xr.DataArray,
    other: xr.DataArray,
    *,
    expected: str,
    fix: str,
    error: type[CHMv2Error] = CHMv2Error,
) -> xr.DataArray:
    """Assign an array the grid of another; it shares any further coordinates exactly.

    Parameters
    ----------
    array : DataArray
        Some or all dims of `other`: a mask of one date, a number per date.
    other : DataArray
        Any, with two spatial dims.
    expected, fix : str
        What the error message expects, and its advice.
    error : type of CHMv2Error, optional
        Raised if dims, sizes, coordinates or CRS differ; see :func:`same_grid`.

    Returns
    -------
    DataArray
        The same values; ``broadcast_like(other)`` gives it the missing dims.
    """
    try:
        if set(find_grid(other).dims) <= set(array.dims):
            array = on_same_grid(array, other)
        xr.align(array, other, join="exact", copy=False)
    except ValueError as raised:  # CHMv2Error is one
        found = raised.found if isinstance(raised, CHMv2Error) else str(raised).splitlines()[0]
    else:
        if set(array.dims) <= set(other.dims):
            return array
        found = f"other dims than {other.dims}"
    raise error(expected, f"sizes {dict(array.sizes)} ({found})", fix)


def is_crs_variable(variable: xr.DataArray) -> bool:
    """Return whether a variable holds a CRS rather than data."""
    return variable.ndim == 0 and bool({"crs_wkt", "spatial_ref"} & set(variable.attrs))


def find_crs_coordinate(coords: Mapping[Hashable, xr.DataArray]) -> str | None:
    """Return the name of the CRS coordinate (the CF grid mapping); None without one."""
    return next((str(name) for name, coord in coords.items() if is_crs_variable(coord)), None)


def _crs_name(crs: Any) -> str:
    return f"EPSG:{crs.epsg}" if crs.epsg is not None else str(crs.proj.name)


def _offset(array: xr.DataArray, other: xr.DataArray, dim: str, step: float) -> str | None:
    if dim not in array.coords or dim not in other.coords:
        return None
    here, there = (np.asarray(a[dim].values, dtype=float) for a in (array, other))
    apart = np.abs(here - there).max()
    return None if apart <= _TOLERANCE * step else f"{dim} coordinates {apart:g} apart"


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
    """Add the coordinates implied by the transform of the CRS variable."""
    if all(dim in array.coords for dim in dims):
        return array
    box = array.odc.geobox
    if box is None or not box.axis_aligned:
        raise _irregular(f"a CRS but no coordinates or transform along {dims}")
    return array.assign_coords({d: c for d, c in xr_coords(box, dims=dims).items() if d in dims})


def _pixels(array: xr.DataArray, dims: tuple[str, str], crs: Any) -> tuple[float, float]:
    """Return signed pixel sizes; one pixel takes its size from the transform or the other axis."""
    stored = _stored_pixels(array)
    dy, dx = (_spacing(array, dim, known, crs) for dim, known in zip(dims, stored, strict=True))
    if dy is None and dx is None:
        if crs is not None:
            raise _irregular("a single pixel and no transform, so no pixel size")
        return 1.0, 1.0
    return dy or -abs(dx or 0), dx or abs(dy or 0)


def _stored_pixels(array: xr.DataArray) -> tuple[float | None, float | None]:
    """Read pixel sizes from the GeoTransform attribute: exact, but outdated after subsampling."""
    for coord in array.coords.values():
        words = str(coord.attrs.get("GeoTransform", "")).split()
        if len(words) == 6:
            return float(words[5]), float(words[1])
    return None, None


def _spacing(array: xr.DataArray, dim: str, stored: float | None, crs: Any) -> float | None:
    """Return the signed step between coordinates, exactly as stored if it is stored."""
    if dim not in array.coords:
        return 1.0
    centres = np.asarray(array[dim].values, dtype=float)
    if centres.size < 2:
        return stored
    if not np.isfinite(centres).all():
        raise _irregular(f"{dim} coordinates that are not finite", dim)
    pixel = _without_noise(float(centres[-1] - centres[0]) / (centres.size - 1), centres)
    steps = np.diff(centres)
    if pixel == 0 or np.abs(steps - pixel).max() > _TOLERANCE * abs(pixel):
        found = f"{dim} coordinates in steps from {steps.min():g} to {steps.max():g}"
        raise _irregular(found, None if crs is not None else dim)
    if stored is not None and math.isclose(abs(stored), abs(pixel), rel_tol=1e-6):
        return math.copysign(stored, pixel)
    return pixel


def _without_noise(pixel: float, centres: npt.NDArray[np.float64]) -> float:
    """Round a pixel size: differences of large coordinates contain floating-point noise.

    It keeps eight decimals in metres, and more in degrees, as the coordinates allow.
    """
    noise = float(np.spacing(np.abs(centres).max()))
    return round(pixel, max(8, math.floor(-math.log10(noise)) - 1))


def _irregular(found: str, dim: str | None = None) -> ImageryError:
    """Return the error for an irregular grid; a dim without a CRS cannot be reprojected."""
    return ImageryError(
        "pixels on a regular grid" if dim else "pixels on a regular grid along the CRS axes",
        found,
        f"interpolate it first: array.interp({dim}=...)"
        if dim
        else "resample it first: imagery.odc.reproject(imagery.odc.crs, resolution=...)",
    )
