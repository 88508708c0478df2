"""A bar that says how long things on a map are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import xarray as xr

from xchmv2.areas import has_true_areas
from xchmv2.imagery import Grid, find_grid, ground_pixel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

#: The bar is no longer than this share of the map.
_SHARE = 0.3
#: Maps of less height than this share of their width would be hidden by it.
FLAT = 0.3
_METRES = {"m", "metre", "meter"}


def ground_scale(array: xr.DataArray) -> tuple[float, float] | None:
    """Return ground metres per unit of the vertical and the horizontal coordinate.

    Parameters
    ----------
    array : DataArray
        With two spatial dims.

    Returns
    -------
    (float, float) or None
        At the array's centre; None where a unit's length is not known.
    """
    grid: Grid = find_grid(array)
    if has_true_areas(array):
        height, width = ground_pixel(grid)
        return height / abs(grid.pixel[0]), width / abs(grid.pixel[1])
    units = [array[dim].attrs.get("units") if dim in array.coords else None for dim in grid.dims]
    return (1.0, 1.0) if set(units) <= _METRES else None


def add_scale_bar(ax: Axes, array: xr.DataArray) -> AnchoredSizeBar | None:
    """Draw a scale bar in the lower right corner of a map; above it, if it is very flat.

    Parameters
    ----------
    ax : Axes
        With the map.
    array : DataArray
        What the map shows; its CRS says how long a metre is.

    Returns
    -------
    AnchoredSizeBar or None
        A round number of metres or kilometres on the ground. None, and nothing is drawn, without
        a CRS, unless the coordinates say that they are metres.
    """
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

    scale = ground_scale(array)
    if scale is None:
        return None
    left, right = ax.get_xlim()
    tall = abs(ax.get_ylim()[1] - ax.get_ylim()[0])
    flat = tall * scale[0] < abs(right - left) * scale[1] * FLAT
    above = {"bbox_to_anchor": (1, 1), "bbox_transform": ax.transAxes} if flat else {}
    length = _round_length(abs(right - left) * scale[1] * _SHARE)
    name = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    bar = AnchoredSizeBar(
        ax.transData,
        length / scale[1],
        name,
        "lower right",
        pad=0.3,
        borderpad=0.4,
        sep=3,
        color="black",
        size_vertical=min(tall, abs(right - left) * scale[1] / scale[0]) * 0.01,
        fill_bar=True,
        label_top=True,
        **above,
    )
    # Black on white, whatever the map and the style of the figure are.
    bar.patch.set(facecolor="white", edgecolor="none", alpha=0.8)
    ax.add_artist(bar)
    return bar


def _round_length(most: float) -> float:
    """Return the greatest 1, 2 or 5 times a power of ten that is not more [m]."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (5.0, 2.0, 1.0) if step * power <= most * (1 + 1e-9))
