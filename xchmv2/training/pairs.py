"""Imagery and reference heights on one pixel grid, in memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.errors import ImageryError
from xchmv2.imagery import (
    Grid,
    Scene,
    ValidPixels,
    WindowReader,
    find_grid,
    read_scene,
    resolve_nodata,
    resolve_target,
    resolve_value_range,
)
from xchmv2.nodata import without_nodata
from xchmv2.validation.reference import LOWEST, average_onto, validate_heights


@dataclass(frozen=True, eq=False)
class Pair:
    """One image and the heights that belong to it.

    Parameters
    ----------
    image : numpy.ndarray
        (3, H, W) float32 red, green and blue between 0 and 1; 0 where invalid.
    valid : numpy.ndarray of bool
        (H, W) pixels that hold imagery.
    height : numpy.ndarray
        (H, W) float32 reference heights [m], NaN where there is none or no imagery.
    grid : Grid, optional
        Where the pixels lie; two pairs of the same ground are told by it.
    """

    image: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    height: npt.NDArray[np.float32]
    grid: Grid | None = None


def read_pair(
    imagery: xr.Dataset | xr.DataArray,
    reference: xr.DataArray,
    *,
    bands: Sequence[Hashable] | None = None,
    value_range: Any = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
    erode: int = 0,
    resolution: float | None = None,
) -> Pair:
    """Read imagery as ``predict`` would see it, and bring the reference onto its pixels.

    Parameters
    ----------
    imagery : Dataset or DataArray
        One date of imagery; the options are those of ``predict``.
    reference : DataArray
        (y, x) canopy heights [m] on any grid; its nodata value is read from its metadata.
    bands, value_range, nodata, valid, erode, resolution
        As in :func:`xchmv2.predict.predict`.

    Returns
    -------
    Pair
        In memory: chunked input is computed.

    Raises
    ------
    ImageryError
        If the imagery does not fit the model, holds several dates, or the reference has no
        height or no overlap with the imagery.
    CHMv2Error
        If heights of the reference lie outside 0 to 120 m.
    """
    scene = read_scene(imagery, bands, valid)
    further = [str(dim) for dim in scene.template.dims if dim not in scene.grid.dims]
    if further:
        raise ImageryError(
            "one image: dims y and x beside the bands",
            f"further dims {further}",
            f"choose one: imagery.isel({further[0]}=0)",
        )
    target, rows, cols = resolve_target(scene.grid, resolution)
    arrays = [band.array for band in scene.bands]
    reader = WindowReader(ValidPixels(resolve_nodata(arrays, nodata), erode), rows, cols)
    span = ((0, target.shape[0]), (0, target.shape[1]))
    mask = None if scene.mask is None else scene.mask.values
    values, ok = reader(_read_bands(scene), mask, span)
    image = _scaled(values, resolve_value_range(arrays, value_range))
    height = align_reference(reference, target, like=scene.template)
    height = np.where(ok, height, np.float32(np.nan))
    if not np.isfinite(height).any():
        raise ImageryError(
            "reference heights under the imagery",
            "none: the two do not overlap, or only where one of them is nodata",
            "check their bounds and CRS: imagery.odc.geobox.boundingbox, "
            "reference.odc.geobox.boundingbox",
        )
    return Pair(np.where(ok, image, 0).astype(np.float32), ok, height.astype(np.float32), target)


def clean_reference(reference: xr.DataArray) -> xr.DataArray:
    """Turn the reference's nodata into NaN and refuse heights no canopy has.

    Parameters
    ----------
    reference : DataArray
        (y, x) heights [m].

    Returns
    -------
    DataArray
        float32 [m], NaN where there is no height; computed.

    Raises
    ------
    ImageryError
        If it is no such array, or holds no height at all.
    CHMv2Error
        If heights lie outside 0 to 120 m.
    """
    if not isinstance(reference, xr.DataArray):
        raise ImageryError(
            "reference heights as a DataArray",
            type(reference).__name__,
            "choose the variable: reference['canopy_height']",
        )
    found = without_nodata(reference).squeeze(drop=True).astype(np.float32).compute()
    if found.ndim > 2:
        raise ImageryError(
            "reference heights with dims y and x",
            f"sizes {dict(reference.sizes)}",
            "choose one layer: reference.isel(band=0)",
        )
    values = np.where(np.isfinite(found.values), found.values, np.float32(np.nan))
    if not np.isfinite(values).any():
        raise ImageryError(
            "reference heights [m]",
            "not one: every pixel is nodata",
            "check the nodata value and the area that was selected",
        )
    validate_heights(values)
    return found.copy(data=np.clip(values, LOWEST, None))


def align_reference(
    reference: xr.DataArray, target: Grid, *, like: xr.DataArray
) -> npt.NDArray[np.float32]:
    """Bring heights onto a grid, as for validation: averaged by area, or interpolated.

    Parameters
    ----------
    reference : DataArray
        Heights [m].
    target : Grid
        The grid wanted.
    like : DataArray
        An array on the imagery's own grid, to compare coordinates where there is no CRS.

    Returns
    -------
    numpy.ndarray
        (H, W) float32 [m].

    Raises
    ------
    ImageryError
        If the reference holds no heights, or there is no way to place it.
    CHMv2Error
        If heights lie outside 0 to 120 m.
    """
    heights = clean_reference(reference)
    if target.crs is None or heights.odc.crs is None:
        return _same_grid(heights, like)
    heights = heights.transpose(*find_grid(heights).dims)
    source = find_grid(heights).geobox
    placed = average_onto(heights.values.astype(np.float64), source, target.geobox)
    return placed.astype(np.float32)


def _same_grid(heights: xr.DataArray, like: xr.DataArray) -> npt.NDArray[np.float32]:
    """Place heights without a CRS: by coordinates where both have them, else by equal shape."""
    if dict(heights.sizes) != dict(like.sizes):
        raise ImageryError(
            "a CRS on imagery and reference, or equal dims and shapes",
            f"no CRS, {dict(like.sizes)} and {dict(heights.sizes)}",
            "write the CRS of both: array.rio.write_crs('EPSG:...')",
        )
    for dim in like.dims:
        if dim in heights.coords and dim in like.coords and like.sizes[dim] > 1:
            step = abs(float(like[dim][1] - like[dim][0]))
            heights = heights.reindex({dim: like[dim]}, method="nearest", tolerance=step / 10)
    return np.asarray(heights.transpose(*like.dims).values, np.float32)


def _read_bands(scene: Scene) -> npt.NDArray[Any]:
    """Compute red, green and blue, (3, H, W)."""
    bands = [
        band.array if band.index is None else band.array.isel(band=band.index)
        for band in scene.bands
    ]
    return np.stack([np.asarray(band.values) for band in bands])


def _scaled(values: npt.NDArray[Any], ranges: Sequence[tuple[float, float]]) -> npt.NDArray[Any]:
    low, high = (np.array(side, np.float32)[:, None, None] for side in zip(*ranges, strict=True))
    return np.clip((values.astype(np.float32) - low) / (high - low), 0, 1)
