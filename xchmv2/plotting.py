"""Pictures of imagery, canopy height and its change, on matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import ValidPixels, find_grid, read_scene, resolve_nodata, resolve_value_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch

#: Perceptually uniform: equal steps of height look equally large, in grey and to the colour-blind.
HEIGHT_COLOURS = "viridis"
#: Brown is loss, green is gain, white is none; readable by the colour-blind.
CHANGE_COLOURS = "BrBG"
#: How missing data look: unlike any height.
_MISSING = {"facecolor": "0.85", "edgecolor": "0.5", "hatch": "////"}
#: No screen shows more along one side; larger arrays are averaged first [px].
_LONGEST = 1200
#: Colour scales end at a multiple of this [m].
_ROUND = 5.0


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises
    ------
    CHMv2Error
        If it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CHMv2Error(
            "matplotlib, to draw with", "that it is not installed", 'pip install "xchmv2[plot]"'
        ) from None


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure that needs neither a screen nor a choice of backend.

    Parameters
    ----------
    width, height : float
        Inches.

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
        How to read it, as in :func:`xchmv2.predict.predict`.

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
    arrays = [b.array if b.index is None else b.array.isel(band=b.index) for b in scene.bands]
    _validate_plane(arrays[0])
    masks = [] if scene.mask is None else [scene.mask]
    known = _known(arrays, masks, ValidPixels(resolve_nodata(arrays, nodata)))
    ranges = resolve_value_range(arrays, value_range)
    planes = [
        _coarse(((band.astype("float32") - low) / (high - low)).clip(0, 1).where(known))
        for band, (low, high) in zip(arrays, ranges, strict=True)
    ]
    colours = np.stack(dask.compute(*planes), axis=-1)
    seen = np.isfinite(colours).all(axis=-1, keepdims=True)
    pixels = np.concatenate([np.where(seen, colours, 0), seen], axis=-1)
    return _draw(ax, pixels, arrays[0])


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
        If there are further dims, such as time.
    """
    plane = _north_up(height)
    values = _coarse(plane).values
    low, high = limits or (0.0, _round_limit(values))
    return _draw(ax, values, plane, cmap=HEIGHT_COLOURS, vmin=low, vmax=high)


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
        If there are further dims, such as time.
    """
    plane = _north_up(change)
    values = _coarse(plane).values
    limit = _round_limit(values) if limit is None else limit
    return _draw(ax, values, plane, cmap=CHANGE_COLOURS, vmin=-limit, vmax=limit)


def missing_patch(label: str = "no data") -> Patch:
    """Return the legend entry of missing data.

    Parameters
    ----------
    label : str
        What to call it.

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


def _round_limit(values: npt.NDArray[np.floating]) -> float:
    """Return the largest absolute value, rounded up to 5 m; 5 m if there is none."""
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    return _ROUND * max(1, math.ceil(float(largest) / _ROUND))


def _known(
    arrays: Sequence[xr.DataArray], masks: Sequence[xr.DataArray], rule: ValidPixels
) -> xr.DataArray:
    """Tell the pixels that hold imagery, lazily where the imagery is."""

    def tell(*planes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return rule(planes[:3], planes[3] if len(planes) > 3 else None)

    found: xr.DataArray = xr.apply_ufunc(
        tell, *arrays, *masks, dask="parallelized", output_dtypes=[bool]
    )
    return found


def _validate_plane(array: xr.DataArray) -> tuple[str, str]:
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


def _north_up(array: xr.DataArray) -> xr.DataArray:
    """Turn an array so that north is up and east is right; without coordinates, as it is."""
    y, x = _validate_plane(array)
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


def _coarse(plane: xr.DataArray) -> xr.DataArray:
    """Average a plane down to what a screen shows, lazily where it is lazy."""
    trimmed, window = _trimmed(plane)
    return trimmed.coarsen(window).mean()


def _draw(ax: Axes, pixels: npt.NDArray[Any], plane: xr.DataArray, **options: Any) -> AxesImage:
    """Draw the pixels of a plane where it lies, over the hatching of missing data."""
    y, x = (str(dim) for dim in plane.dims)
    trimmed, _ = _trimmed(plane)
    (top, bottom), (left, right) = _edges(trimmed, y), _edges(trimmed, x)
    image = ax.imshow(pixels, extent=(left, right, bottom, top), **options)
    ax.patch.set(**_MISSING)
    ax.set_xlabel(_label(plane, x))
    ax.set_ylabel(_label(plane, y))
    ax.ticklabel_format(style="plain", useOffset=False)
    return image


def _edges(plane: xr.DataArray, dim: str) -> tuple[float, float]:
    """Return the coordinates of the outer edges of the first and the last pixel."""
    centres = plane[dim].values  # 0, 1, 2, ... where there is no coordinate
    half = float(centres[-1] - centres[0]) / (len(centres) - 1) / 2 if len(centres) > 1 else 0.5
    return float(centres[0]) - half, float(centres[-1]) + half


def _label(plane: xr.DataArray, dim: str) -> str:
    units = {"metre": "m"}.get(found := str(plane[dim].attrs.get("units", "")), found)
    return f"{dim} [{units}]" if units else dim
