"""Maps of imagery, canopy height and height change, one panel for each date."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import read_scene, resolve_value_range
from xchmv2.plotting.canvas import (
    FLAT,
    Drawing,
    add_scale_bar,
    coarse,
    draw,
    map_scale,
    missing_patch,
    north_up,
    panels,
)
from xchmv2.raster import (
    Raster,
    ValidPixels,
    find_grid,
    name_contents,
    read_change,
    read_heights,
    resolve_nodata,
    tell_kind,
    validate_flags,
    validate_number,
    validate_numbers,
    validate_plane,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

#: Width of a map, the least room for the width and the height of one, and of labels along them
#: [inch].
_SIDE = 4.2
_LEAST = 2.0, 1.2
_LABEL = 0.8, 0.3
#: Colour scales end at this percentile, so that a few outliers do not wash out the rest.
_HEIGHT_TOP, _CHANGE_TOP = 99.9, 99.0
_MOST_PANELS = 36


def plot_height(
    height: Raster,
    *,
    ax: Axes | None = None,
    limits: tuple[float, float] | None = None,
    columns: int = 3,
    scale_bar: bool = True,
) -> Drawing:
    """Draw canopy height: a map for each date, on one colour scale.

    Parameters
    ----------
    height : DataArray or Dataset
        Heights [m], dims y and x and at most one more, such as time; or a Dataset with
        ``canopy_height``.
    ax : Axes, optional
        Where to draw a single date; by default a new figure.
    limits : (low, high), optional
        Heights [m] at the ends of the colour scale; by default from 0 to the 99.9th percentile,
        rounded up.
    columns : int, default 3
        Most maps in a row.
    scale_bar : bool, default True
        Whether to draw one; without a CRS there is none.

    Returns
    -------
    Drawing
        Figure, axes, images and colour bar.

    Raises
    ------
    CHMv2Error
        If there are more dims or more than 36 dates, or matplotlib is not installed.

    Notes
    -----
    Large arrays are averaged to screen resolution, lazily: they are never in memory as a whole.
    Grey hatching shows where height is missing.

    Examples
    --------
    >>> picture = height.chmv2.plot(limits=(0, 40), columns=2)
    >>> picture.figure.savefig("height.png")
    """
    names, planes = _planes(read_heights(height))
    low, high = _limits(limits) or (0.0, _top(planes, _HEIGHT_TOP))
    show = partial(_draw_height, limits=(low, high))
    return _draw(names, planes, show, "canopy height [m]", ax, columns, scale_bar)


def plot_change(
    change: Raster,
    *,
    ax: Axes | None = None,
    limit: float | None = None,
    only_significant: bool = False,
    columns: int = 3,
    scale_bar: bool = True,
) -> Drawing:
    """Draw the change of canopy height, on a colour scale centred on no change.

    Parameters
    ----------
    change : DataArray or Dataset
        Later minus earlier height [m], dims y and x and at most one more; the Dataset of
        ``difference``; or a cube of heights named ``canopy_height``, of which the changes from
        date to date are drawn.
    ax : Axes, optional
        Where to draw a single map; by default a new figure.
    limit : float, optional
        Change [m] at both ends of the colour scale; by default the 99th percentile of its size,
        rounded up.
    only_significant : bool, default False
        Whether change that is not significant is drawn as 0 m; for the Dataset of ``difference``.
    columns : int, default 3
        Most maps in a row.
    scale_bar : bool, default True
        Whether to draw one; without a CRS there is none.

    Returns
    -------
    Drawing
        Figure, axes, images and colour bar.

    Raises
    ------
    CHMv2Error
        If there is no change to draw, there are more dims or more than 36 maps, or matplotlib is
        not installed.

    Notes
    -----
    Large arrays are averaged to screen resolution, as in :func:`plot_height`.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0)
    >>> picture = change.chmv2.plot_change(limit=20.0, only_significant=True)
    """
    validate_flags(only_significant=only_significant)
    array, of_heights = _read_change(change, only_significant)
    names, planes = _planes(array)
    if of_heights:
        planes = [after - before for before, after in pairwise(planes)]
        names = [f"{before} to {after}" for before, after in pairwise(names)]
    end = _top(planes, _CHANGE_TOP) if limit is None else limit
    show = partial(_draw_change, limit=end)
    label = f"{'significant ' * only_significant}change of canopy height [m]"
    return _draw(names, planes, show, label, ax, columns, scale_bar)


def _read_change(change: Raster, only_significant: bool) -> tuple[xr.DataArray, bool]:
    """Return the array to draw, and whether it holds heights, whose dates are to be subtracted."""
    if only_significant and not (isinstance(change, xr.Dataset) and "significant" in change):
        raise CHMv2Error(
            "a Dataset with 'significant'",
            name_contents(change),
            "pass what difference() returns",
        )
    if isinstance(change, xr.DataArray) and tell_kind(change) == "height":
        further = [dim for dim in change.dims if dim not in find_grid(change).dims]
        if any(change.sizes[dim] > 1 for dim in further):
            return read_heights(change), True
    array = read_change(change)
    if only_significant:
        array = array.where(change["significant"].astype(bool) | array.isnull(), 0.0)
    return array, False


def _planes(array: xr.DataArray) -> tuple[list[str], list[xr.DataArray]]:
    """Return the name and the averaged pixels of each date, in memory."""
    dims = find_grid(array).dims
    further = [dim for dim in array.dims if dim not in dims]
    if len(further) > 1:
        raise CHMv2Error(
            f"dims {dims} and at most one more",
            f"dims {array.dims}",
            f"choose one: array.isel({further[0]}=0)",
        )
    if not further:
        return [""], list(dask.compute(coarse(north_up(array))))
    count = array.sizes[further[0]]
    if not 1 <= count <= _MOST_PANELS:
        raise CHMv2Error(
            f"1 to {_MOST_PANELS} maps in a figure",
            f"{count} along {further[0]!r}",
            f"choose some: array.isel({further[0]}=slice(0, 9))",
        )
    single = [array.isel({further[0]: k}) for k in range(count)]
    return _names(array, str(further[0])), list(
        dask.compute(*(coarse(north_up(p)) for p in single))
    )


def _names(array: xr.DataArray, dim: str) -> list[str]:
    """Name dates by day, anything else as it is written."""
    if dim not in array.coords:
        return [f"{dim} {k}" for k in range(array.sizes[dim])]
    coord = array[dim]
    if np.issubdtype(coord.dtype, np.datetime64):
        return [str(day) for day in coord.dt.strftime("%Y-%m-%d").values]
    return [f"{dim} {value}" for value in coord.values]


def _top(planes: Sequence[xr.DataArray], percentile: float) -> float:
    """Return the end of a colour scale [m]."""
    sizes: npt.NDArray[Any] = np.abs(np.concatenate([plane.values.ravel() for plane in planes]))
    sizes = sizes[np.isfinite(sizes)]
    return round_limit(np.percentile(sizes, [percentile]) if sizes.size else sizes)


def _draw(
    names: Sequence[str],
    planes: Sequence[xr.DataArray],
    show: Callable[[Axes, xr.DataArray], AxesImage],
    label: str,
    ax: Axes | None,
    columns: int,
    scale_bar: bool,
) -> Drawing:
    """Draw the maps, then their colour bar and legend."""
    validate_flags(scale_bar=scale_bar)
    scale = map_scale(planes[0]) or (1.0, 1.0)
    width, height = _size(planes[0], scale)
    room = [max(size, least) for size, least in zip((width, height), _LEAST, strict=True)]
    figure, axes = panels(len(planes), ax, columns, room[0], room[1] + 0.4)
    images = []
    for panel, name, plane in zip(axes, names, planes, strict=True):
        images.append(show(panel, plane))
        panel.set_aspect(scale[0] / scale[1])
        # The scale bar of a flat map is above it, at the right.
        panel.set_title(name, loc="left" if height < FLAT * width else "center")
        _thin_ticks(panel, width, height)
        if scale_bar:
            add_scale_bar(panel, plane)
    for panel in axes if len(axes) > 1 else []:
        panel.label_outer()
    rows = 1 if ax is not None else -(-len(axes) // columns)
    bar = figure.colorbar(
        images[0],
        ax=axes,
        label=label,
        extend=_extend(planes, images[0]),
        shrink=0.8,
        aspect=20 * rows * max(1.0, height / _SIDE),
    )
    if any(bool(plane.isnull().any()) for plane in planes):
        # Below the colour bar, where it hides neither maps nor their titles.
        bar.ax.legend(
            handles=[missing_patch()],
            loc="upper left",
            bbox_to_anchor=(0.0, -0.1 / rows),
            borderaxespad=0.0,
            handlelength=2.0,
            handleheight=1.4,
            fontsize="small",
            frameon=False,
        )
    return Drawing(figure, axes, images, bar)


def _size(plane: xr.DataArray, scale: tuple[float, float]) -> tuple[float, float]:
    """Return the width and the height of a map [inch]; the height is at most twice a full width."""
    y, x = find_grid(plane).pixel
    rows, cols = plane.shape
    shape = abs(rows * y * scale[0]) / abs(cols * x * scale[1])
    height = min(_SIDE * shape, 2 * _SIDE)
    return height / shape, height


def _thin_ticks(panel: Axes, width: float, height: float) -> None:
    """Thin the labels along both axes so that they do not overlap, within or between maps."""
    from matplotlib.ticker import LinearLocator, MaxNLocator

    for axis, size, label in ((panel.xaxis, width, _LABEL[0]), (panel.yaxis, height, _LABEL[1])):
        most = int(min(8, size / label))
        few = LinearLocator(1)  # where two labels would touch, one at the edge
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]) if most else few)
    panel.tick_params(axis="x", rotation=30)
    for tick in panel.get_xticklabels():
        tick.set(horizontalalignment="right", rotation_mode="anchor")


def _extend(planes: Sequence[xr.DataArray], image: AxesImage) -> str:
    """Return the ends of the colour scale that values exceed."""
    low, high = image.get_clim()
    below = any(float(plane.min(skipna=True)) < low for plane in planes)
    above = any(float(plane.max(skipna=True)) > high for plane in planes)
    return ("neither", "min", "max", "both")[below + 2 * above]


#: Perceptually uniform: equal steps of height look equally large, in grey and to the colour-blind.
HEIGHT_COLOURS = "viridis"
#: Brown is loss, green is gain, white is none; readable by the colour-blind.
CHANGE_COLOURS = "BrBG"
#: Colour scales end at a multiple of this [m].
_ROUND = 5.0


def show_imagery(
    ax: Axes,
    imagery: xr.Dataset | xr.DataArray,
    *,
    bands: Sequence[Hashable] | None = None,
    value_range: Any = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
) -> AxesImage:
    """Draw one date of imagery in its own colours.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    imagery : Dataset or DataArray
        Bands with dims y and x; large ones are averaged while drawing.
    bands, value_range, nodata, valid
        Options for reading it, as in :func:`xchmv2.predict.predict`.

    Returns
    -------
    AxesImage
        Grey hatching shows through where there is no imagery.

    Raises
    ------
    ImageryError
        If the imagery does not fit the model.
    CHMv2Error
        If there are further dims, such as time.
    """
    scene = read_scene(imagery, bands, valid)
    arrays = [band.plane for band in scene.bands]
    validate_plane(arrays[0], "one picture", "array")
    masks = [] if scene.mask is None else [scene.mask]
    known = _known(arrays, masks, ValidPixels(resolve_nodata(arrays, nodata)))
    ranges = resolve_value_range(arrays, value_range)
    planes = [
        coarse(((band.astype("float32") - low) / (high - low)).clip(0, 1).where(known))
        for band, (low, high) in zip(arrays, ranges, strict=True)
    ]
    colours = np.stack(dask.compute(*planes), axis=-1)
    seen = np.isfinite(colours).all(axis=-1, keepdims=True)
    pixels = np.concatenate([np.where(seen, colours, 0), seen], axis=-1)
    return draw(ax, pixels, arrays[0])


def show_height(
    ax: Axes, height: xr.DataArray, *, limits: tuple[float, float] | None = None
) -> AxesImage:
    """Draw canopy height.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    height : DataArray
        (y, x) heights [m]; large arrays are averaged while drawing.
    limits : (low, high), optional
        Heights [m] at the ends of the colour scale; by default from 0 to the highest, rounded up.

    Returns
    -------
    AxesImage
        For ``figure.colorbar(image, label="canopy height [m]")``. Grey hatching shows through
        where height is NaN.

    Raises
    ------
    CHMv2Error
        If there are further dims, such as time, or it is something other than heights.
    """
    return _draw_height(ax, read_heights(height), limits)


def _limits(limits: Any) -> tuple[float, ...] | None:
    """Check the heights at the two ends of a colour bar."""
    if limits is None:
        return None
    return validate_numbers("limits", limits, "(0, 40)", count=2, ascending=True)


def _draw_height(ax: Axes, height: xr.DataArray, limits: tuple[float, float] | None) -> AxesImage:
    plane = north_up(height)
    values = coarse(plane).values
    low, high = _limits(limits) or (0.0, round_limit(values))
    return draw(ax, values, plane, cmap=HEIGHT_COLOURS, vmin=low, vmax=high)


def show_change(ax: Axes, change: xr.DataArray, *, limit: float | None = None) -> AxesImage:
    """Draw the change of canopy height, on a colour scale centred on no change.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    change : DataArray
        (y, x) later minus earlier height [m]; large arrays are averaged while drawing.
    limit : float, optional
        Change [m] at both ends of the colour scale; by default the largest, rounded up.

    Returns
    -------
    AxesImage
        For ``figure.colorbar(image, label="change [m]")``. Grey hatching shows through where
        change is NaN.

    Raises
    ------
    CHMv2Error
        If there are further dims, such as time, or it is something other than a change.
    """
    return _draw_change(ax, read_change(change), limit)


def _draw_change(ax: Axes, change: xr.DataArray, limit: float | None) -> AxesImage:
    plane = north_up(change)
    values = coarse(plane).values
    validate_number("limit", limit, 20, above=0, unit="m", optional=True)
    limit = round_limit(values) if limit is None else limit
    return draw(ax, values, plane, cmap=CHANGE_COLOURS, vmin=-limit, vmax=limit)


def round_limit(values: npt.NDArray[np.floating]) -> float:
    """Return the largest absolute value, rounded up to 5 m; 5 m if there is none."""
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    return _ROUND * max(1, math.ceil(float(largest) / _ROUND))


def _known(
    arrays: Sequence[xr.DataArray], masks: Sequence[xr.DataArray], rule: ValidPixels
) -> xr.DataArray:
    """Return the pixels that hold imagery, lazily if the imagery is lazy."""

    def tell(*planes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return rule(planes[:3], planes[3] if len(planes) > 3 else None)

    found: xr.DataArray = xr.apply_ufunc(
        tell, *arrays, *masks, dask="parallelized", output_dtypes=[bool]
    )
    return found
