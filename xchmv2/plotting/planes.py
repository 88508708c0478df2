"""Planes of pixels on matplotlib axes: turned, averaged to what a screen shows, in their place."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import xarray as xr
from odc.geo.xr import xr_coords

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import find_grid
from xchmv2.plotting.canvas import MISSING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

#: No screen shows more along one side; larger arrays are averaged first [px].
_LONGEST = 1200


def validate_plane(array: xr.DataArray) -> tuple[str, str]:
    """Return the vertical and the horizontal dim of an array that has no others."""
    dims = find_grid(array).dims
    further = [str(dim) for dim in array.dims if dim not in dims]
    if further:
        raise CHMv2Error(
            f"one picture, with dims {dims}",
            f"further dims {further}",
            f"choose one: array.isel({further[0]}=0)",
        )
    return dims


def north_up(array: xr.DataArray) -> xr.DataArray:
    """Turn an array so that north is up and east is right; without coordinates, as it is."""
    y, x = validate_plane(array)
    grid = find_grid(array)
    if grid.crs is not None and not {y, x} <= set(array.coords):
        # Coordinates that a transform implies: of averaged pixels it would say nothing true.
        implied = xr_coords(grid.geobox, dims=(y, x))
        array = array.assign_coords({dim: implied[dim] for dim in (y, x)})
    turned = {
        dim: slice(None, None, -1)
        for dim, step in ((y, -1), (x, 1))
        if dim in array.coords and step * float(array[dim][-1] - array[dim][0]) < 0
    }
    return array.transpose(y, x).isel(turned)


def _trimmed(plane: xr.DataArray) -> tuple[xr.DataArray, dict[Hashable, int]]:
    """Cut a plane to whole multiples of the windows that a screen's pixels average over."""
    factor = math.ceil(max(plane.shape) / _LONGEST)
    window = {dim: min(factor, size) for dim, size in plane.sizes.items()}
    whole = {dim: slice(0, size - size % window[dim]) for dim, size in plane.sizes.items()}
    return plane.isel(whole), window


def coarse(plane: xr.DataArray) -> xr.DataArray:
    """Average a plane down to what a screen shows, lazily where it is lazy."""
    trimmed, window = _trimmed(plane)
    return trimmed.coarsen(window).mean()


def draw(ax: Axes, pixels: npt.NDArray[Any], plane: xr.DataArray, **options: Any) -> AxesImage:
    """Draw the pixels of a plane where it lies, over the hatching of missing data."""
    y, x = (str(dim) for dim in plane.dims)
    (top, bottom), (left, right) = _edges(_trimmed(plane)[0])
    image = ax.imshow(pixels, extent=(left, right, bottom, top), **options)
    ax.patch.set(**MISSING)
    ax.set_xlabel(label_of(plane, x))
    ax.set_ylabel(label_of(plane, y))
    ax.ticklabel_format(style="plain", useOffset=False)
    return image


def _edges(plane: xr.DataArray) -> list[tuple[float, float]]:
    """Return the coordinates of the outer edges of the first and the last row, and column."""
    grid = find_grid(plane)
    sides = zip(grid.dims, grid.edges, grid.pixel, grid.shape, strict=True)
    return [
        (edge, edge + pixel * size)
        if grid.crs is not None or dim in plane.coords
        else (-0.5, size - 0.5)  # pixels are counted by their centres
        for dim, edge, pixel, size in sides
    ]


def label_of(plane: xr.DataArray, dim: str) -> str:
    """Name an axis, with its unit where that is known."""
    units = {"metre": "m"}.get(found := str(plane[dim].attrs.get("units", "")), found)
    return f"{dim} [{units}]" if units else dim
