"""Heights as they are given, whoever made them: as floats, of one date, on one grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.raster.grid import find_grid
from xchmv2.raster.ground import ground_pixel, has_true_areas
from xchmv2.raster.labels import HEIGHT_NAME
from xchmv2.raster.valid_pixels import without_nodata

#: A raster, or a Dataset that holds one under the name ``canopy_height``.
Raster = xr.DataArray | xr.Dataset

# Two grids are the same if they agree to this share of a pixel.
_TOLERANCE = 0.01


def read_heights(height: Raster) -> xr.DataArray:
    """Take the heights out of what was given, as floats.

    Parameters
    ----------
    height : DataArray or Dataset
        Heights, or a Dataset with a variable ``canopy_height`` or with one variable only.

    Returns
    -------
    DataArray
        Of the same dims, the nodata value that it declares as NaN; integers become float32.

    Raises
    ------
    CHMv2Error
        If there are no numbers, or no saying which variable is meant.
    """
    # Before integers become floats: that drops the encoding, which may declare the value.
    return read_numbers(without_nodata(choose_heights(height)))


def require_heights(array: xr.DataArray) -> None:
    """Check that heights in memory are not missing everywhere.

    Raises
    ------
    CHMv2Error
        If they are. Nothing is computed: of a dask-backed array nothing is known.
    """
    if array.chunks is None and not bool(np.isfinite(array.values).any()):
        raise CHMv2Error(
            "heights that are valid somewhere",
            "NaN everywhere",
            "choose other dates or another area, or look at what the missing value is",
        )


def read_numbers(array: xr.DataArray) -> xr.DataArray:
    """Turn any numbers into floats; integers become float32.

    Raises
    ------
    CHMv2Error
        If there are no numbers.
    """
    if array.dtype.kind not in "fiu":
        raise CHMv2Error("heights as numbers", f"{array.dtype}", "pass heights in metres")
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def choose_heights(height: Raster) -> xr.DataArray:
    """Take the heights out of what was given, as they are.

    Parameters
    ----------
    height : DataArray or Dataset
        Heights, or a Dataset with a variable ``canopy_height`` or with one variable only.

    Returns
    -------
    DataArray
        That variable, or the array itself.

    Raises
    ------
    CHMv2Error
        If it is neither, or there is no saying which variable is meant.
    """
    if isinstance(height, xr.DataArray):
        return height
    if not isinstance(height, xr.Dataset):
        raise CHMv2Error(
            "a DataArray of heights", type(height).__name__, "pass the result of .chmv2.predict()"
        )
    if HEIGHT_NAME in height.data_vars:
        return height[HEIGHT_NAME]
    if len(height.data_vars) == 1:
        return next(iter(height.data_vars.values()))
    raise CHMv2Error(
        f"a Dataset with {HEIGHT_NAME!r}, or with one variable only",
        f"variables {[str(name) for name in height.data_vars]}",
        "pass one of them: dataset['...']",
    )


def name_contents(raster: Any) -> str:
    """Say what was given, for a message: a Dataset with its variables, or its type."""
    if isinstance(raster, xr.Dataset):
        return f"a Dataset of {[str(name) for name in raster.data_vars]}"
    return f"a {type(raster).__name__}"


def spatial_dims(array: xr.DataArray) -> tuple[str, str]:
    """Return the names of the vertical and the horizontal dim.

    Raises
    ------
    ImageryError
        If there are none, or the pixels are not on a regular grid.
    """
    return find_grid(array).dims


def pixel_size(array: xr.DataArray) -> tuple[float, float]:
    """Return height and width of a pixel on the ground [m]; without a CRS as coordinates count."""
    grid = find_grid(array)
    if has_true_areas(array):
        return ground_pixel(grid)
    return abs(grid.pixel[0]), abs(grid.pixel[1])


def require_plane(array: xr.DataArray, name: str) -> xr.DataArray:
    """Check that there is one date only, and bring the dims into order.

    Parameters
    ----------
    array : DataArray
        Heights; a further dim of size 1 is dropped.
    name : str
        What the message calls them.

    Returns
    -------
    DataArray
        (y, x).

    Raises
    ------
    CHMv2Error
        If there are several dates.
    """
    dims = spatial_dims(array)
    others = [dim for dim in array.dims if dim not in dims]
    if any(array.sizes[dim] != 1 for dim in others):
        sizes = ", ".join(f"{array.sizes[dim]} along {dim!r}" for dim in others)
        raise CHMv2Error(
            f"one date of heights as {name}",
            sizes,
            "choose one: height.sel(time='2019-07-01'), or name both: "
            "height.chmv2.difference('2019', '2024')",
        )
    return array.squeeze(others).transpose(*dims)


def on_same_grid(array: xr.DataArray, other: xr.DataArray) -> xr.DataArray:
    """Put an array on another's coordinates, which must be the same up to rounding.

    Parameters
    ----------
    array : DataArray
        Any, with two spatial dims of the same names.
    other : DataArray
        Whose coordinates it takes: arithmetic with it then loses no pixel.

    Returns
    -------
    DataArray
        The same values.

    Raises
    ------
    CHMv2Error
        If sizes, coordinates or CRS differ.
    """
    dims = spatial_dims(other)
    found = _grid_difference(array, other, dims)
    if found is not None:
        raise CHMv2Error(
            "rasters on the same grid",
            found,
            "resample one first: after.odc.reproject(before.odc.geobox, resampling='bilinear')",
        )
    return array.assign_coords({dim: other[dim].variable for dim in dims if dim in other.coords})


def _grid_difference(array: xr.DataArray, other: xr.DataArray, dims: tuple[str, str]) -> str | None:
    """Say how two grids differ; None if they do not."""
    if not set(dims) <= set(array.dims):
        return f"dims {other.dims} and {array.dims}"
    shapes = [tuple(a.sizes[dim] for dim in dims) for a in (other, array)]
    if shapes[0] != shapes[1]:
        return f"{shapes[0]} and {shapes[1]} pixels"
    crs, other_crs = array.odc.crs, other.odc.crs
    if crs is not None and other_crs is not None and crs != other_crs:
        return f"{_crs_name(other_crs)} and {_crs_name(crs)}"
    return next((said for dim in dims if (said := _offset(array, other, dim)) is not None), None)


def _crs_name(crs: Any) -> str:
    return f"EPSG:{crs.epsg}" if crs.epsg is not None else str(crs.proj.name)


def _offset(array: xr.DataArray, other: xr.DataArray, dim: str) -> str | None:
    if dim not in array.coords or dim not in other.coords:
        return None
    here, there = (np.asarray(a[dim].values, dtype=float) for a in (array, other))
    step = abs(there[-1] - there[0]) / (there.size - 1) if there.size > 1 else np.inf
    apart = np.abs(here - there).max()
    if apart <= _TOLERANCE * step and (np.isfinite(step) or apart == 0):
        return None
    return f"{dim} coordinates {apart:g} apart"
