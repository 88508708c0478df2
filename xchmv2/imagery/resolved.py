"""What imagery means for a prediction: bands, values, validity, and the grid to predict on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import xarray as xr

from xchmv2.imagery.grid import Grid
from xchmv2.imagery.resolution import resolve_target
from xchmv2.imagery.scene import Scene, read_scene
from xchmv2.imagery.values import (
    Range,
    ValidPixels,
    ValueRange,
    resolve_nodata,
    resolve_value_range,
)
from xchmv2.imagery.window import WindowReader


@dataclass(frozen=True, eq=False)
class ResolvedImagery:
    """Imagery that the model can be given.

    Parameters
    ----------
    scene : Scene
        Bands, mask and grid, lazy where the imagery is.
    target : Grid
        The grid of the prediction.
    reader : WindowReader
        From source pixels to windows of the target.
    ranges : tuple of (low, high)
        Values that stand for black and white in red, green and blue.
    """

    scene: Scene
    target: Grid
    reader: WindowReader
    ranges: tuple[Range, Range, Range]


def resolve_imagery(
    imagery: xr.Dataset | xr.DataArray,
    *,
    bands: Sequence[Hashable] | None = None,
    value_range: ValueRange | None = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
    erode: int = 0,
    resolution: float | None = None,
) -> ResolvedImagery:
    """Find out what imagery means; nothing is computed and no model is needed.

    Parameters
    ----------
    imagery : Dataset or DataArray
        One variable per band, or an array with a ``band`` dimension; it is not modified.
    bands, value_range, nodata, valid, erode, resolution
        As of :func:`xchmv2.predict.predict`.

    Returns
    -------
    ResolvedImagery
        What a prediction is made from.

    Raises
    ------
    ImageryError
        If the imagery does not fit the model; the message says how to make it fit.
    """
    scene = read_scene(imagery, bands, valid)
    target, rows, cols = resolve_target(scene.grid, resolution)
    arrays = [band.array for band in scene.bands]
    ranges = resolve_value_range(arrays, value_range)
    valid_pixels = ValidPixels(resolve_nodata(arrays, nodata), erode)
    return ResolvedImagery(scene, target, WindowReader(valid_pixels, rows, cols), ranges)
