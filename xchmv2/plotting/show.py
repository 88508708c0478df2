"""One plane of imagery, height or change on axes that are given."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.imagery import ValidPixels, read_scene, resolve_nodata, resolve_value_range
from xchmv2.plotting.planes import coarse, draw, north_up, validate_plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

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
    validate_plane(arrays[0])
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
        If there are further dims, such as time.
    """
    plane = north_up(height)
    values = coarse(plane).values
    low, high = limits or (0.0, round_limit(values))
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
        If there are further dims, such as time.
    """
    plane = north_up(change)
    values = coarse(plane).values
    limit = round_limit(values) if limit is None else limit
    return draw(ax, values, plane, cmap=CHANGE_COLOURS, vmin=-limit, vmax=limit)


def round_limit(values: npt.NDArray[np.floating]) -> float:
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
