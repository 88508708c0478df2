"""Figures, axes and scale bars, and rasters averaged to screen resolution."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy.typing as npt
import xarray as xr
from odc.geo.xr import xr_coords

from xchmv2.errors import CHMv2Error, require_library
from xchmv2.raster import (
    Grid,
    find_grid,
    ground_scale,
    has_true_areas,
    show,
    validate_number,
    validate_plane,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

#: Style of missing data, unlike that of any height.
_MISSING = {"facecolor": "0.85", "edgecolor": "0.5", "hatch": "////"}


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises
    ------
    CHMv2Error
        If it is not installed.
    """
    require_library("matplotlib", "draws the figures", "plot")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure that needs neither a screen nor a choice of backend.

    Parameters
    ----------
    width, height : float
        Size of the figure [inch].

    Returns
    -------
    Figure
        With constrained layout.

    Raises
    ------
    CHMv2Error
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def missing_patch(label: str = "no data") -> Patch:
    """Return the legend entry of missing data.

    Parameters
    ----------
    label : str
        Text of the entry.

    Returns
    -------
    Patch
        For ``ax.legend(handles=[...])``.

    Raises
    ------
    CHMv2Error
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.patches import Patch

    return Patch(**_MISSING, linewidth=0.0, label=label)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Drawing:
    """A finished figure and the artists in it, to be changed further or saved.

    Parameters
    ----------
    figure : Figure
        ``picture.figure.savefig("heights.png")``.
    axes : list of Axes
        One for each panel, in reading order.
    artists : list of Artist
        Artists of the data, one or more for each panel: images, lines, bands.
    colour_bar : Colorbar or None
        Shared by all panels.
    """

    figure: Figure
    axes: list[Axes]
    artists: list[Any]
    colour_bar: Colorbar | None = None


def panels(
    count: int, ax: Axes | None, columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """Make panels of a size [inch] in rows of at most some columns, or use the given axes.

    The figure is known to pyplot, so that a notebook shows it. A CHMv2Error refuses axes for more
    than one panel, and less than one column.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    validate_number("columns", columns, 3, least=1, whole=True)
    if ax is not None and not isinstance(ax, Axes):
        raise CHMv2Error("ax as axes of matplotlib, or None", f"ax={show(ax)}", "leave it out")
    if ax is not None:
        if count != 1:
            raise CHMv2Error(
                "one panel, to draw on the axes that were given",
                f"{count} panels",
                "choose one date: height.isel(time=0), or leave ax out",
            )
        return cast("Figure", ax.get_figure(root=True)), [ax]
    across = min(columns, count)
    down = -(-count // across)
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(width * across + 1.2, height * down + 0.4),
        squeeze=False,
        layout="constrained",
    )
    flat = list(grid.ravel())
    for spare in flat[count:]:
        spare.remove()
    return figure, flat[:count]


#: The bar is no longer than this share of the map.
_SHARE = 0.3
#: The bar would hide maps whose height is less than this share of their width.
FLAT = 0.3
_METRES = {"m", "metre", "meter"}


def map_scale(array: xr.DataArray) -> tuple[float, float] | None:
    """Return ground metres per unit of the vertical and the horizontal coordinate at the centre.

    None where the length of a unit is unknown.
    """
    grid: Grid = find_grid(array)
    if has_true_areas(array):
        return ground_scale(grid)
    units = [array[dim].attrs.get("units") if dim in array.coords else None for dim in grid.dims]
    return (1.0, 1.0) if set(units) <= _METRES else None


def add_scale_bar(ax: Axes, array: xr.DataArray) -> AnchoredSizeBar | None:
    """Draw a scale bar in the lower right corner of a map, or above a very flat map.

    Parameters
    ----------
    ax : Axes
        Axes of the map.
    array : DataArray
        Raster of the map; its CRS gives the length of a metre.

    Returns
    -------
    AnchoredSizeBar or None
        A round number of metres or kilometres on the ground. None, and nothing is drawn, without
        a CRS, unless the units of the coordinates are metres.
    """
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

    scale = map_scale(array)
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


#: No screen shows more along one side; larger arrays are averaged first [px].
_LONGEST = 1200


def north_up(array: xr.DataArray) -> xr.DataArray:
    """Flip an array so that north is up and east is right; not if it has no coordinates."""
    grid = validate_plane(array, "one picture", "array")
    y, x = grid.dims
    if grid.crs is not None and not {y, x} <= set(array.coords):
        # Coordinates of the transform, which is not that of averaged pixels.
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
    """Average a plane to screen resolution, lazily if it is lazy."""
    trimmed, window = _trimmed(plane)
    return trimmed.coarsen(window).mean()


def draw(ax: Axes, pixels: npt.NDArray[Any], plane: xr.DataArray, **options: Any) -> AxesImage:
    """Draw the pixels of a plane at its coordinates, over the hatching of missing data."""
    y, x = (str(dim) for dim in plane.dims)
    (top, bottom), (left, right) = _edges(_trimmed(plane)[0])
    image = ax.imshow(pixels, extent=(left, right, bottom, top), **options)
    ax.patch.set(**_MISSING)
    ax.set_xlabel(_label_of(plane, x))
    ax.set_ylabel(_label_of(plane, y))
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


def _label_of(plane: xr.DataArray, dim: str) -> str:
    """Return the label of an axis, with its unit if known."""
    units = {"metre": "m"}.get(found := str(plane[dim].attrs.get("units", "")), found)
    return f"{dim} [{units}]" if units else dim
