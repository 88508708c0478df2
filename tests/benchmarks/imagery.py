"""Imagery to measure on: what a forward costs does not depend on what is in it."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

#: Ground resolution of the imagery [m].
RESOLUTION = 0.6
#: Square kilometres of a megapixel.
KM2_PER_MPX = RESOLUTION**2
#: First pixel of every scene, counted from the CRS origin along y and x.
ORIGIN = (-8_000_000, 800_000)


def noise(side: int) -> npt.NDArray[np.uint8]:
    """(3, side, side) uint8 noise, the same each time."""
    return np.random.default_rng(0).integers(1, 256, (3, side, side), np.uint8)


def as_cube(pixels: Any) -> xr.DataArray:
    """Label (..., y, x) pixels of three bands, in the third dimension from the end.

    Parameters
    ----------
    pixels : array
        (3, H, W) or (time, 3, H, W), numpy or dask.

    Returns
    -------
    xarray.DataArray
        With coordinates of a UTM grid of 0.6 m.
    """
    shape = pixels.shape[-2:]
    corner = (ORIGIN[1] * RESOLUTION, -ORIGIN[0] * RESOLUTION)
    box = GeoBox.from_bbox(
        (
            corner[0],
            corner[1] - shape[0] * RESOLUTION,
            corner[0] + shape[1] * RESOLUTION,
            corner[1],
        ),
        "EPSG:32633",
        shape=shape,
    )
    dims = ("time", "band", "y", "x")[-pixels.ndim :]
    coords: dict[Any, Any] = {**xr_coords(box), "band": ["red", "green", "blue"]}
    if pixels.ndim == 4:
        coords["time"] = np.datetime64("2020-07-01", "ns") + np.arange(
            len(pixels)
        ) * np.timedelta64(365, "D")
    return xr.DataArray(pixels, coords, dims)


def generated(side: int, chunk: int) -> xr.DataArray:
    """Lazy imagery of (3, side, side) uint8 that is made chunk by chunk, from no file."""
    sizes = tuple(min(chunk, side - start) for start in range(0, side, chunk))
    bands = da.map_blocks(
        _pixels, chunks=((3,), sizes, sizes), dtype="u1", meta=np.empty((0, 0, 0), "u1")
    )
    return as_cube(bands)


def _pixels(block_info: Any) -> npt.NDArray[np.uint8]:
    """Pixels of one chunk, by their place."""
    _, (top, bottom), (left, right) = block_info[None]["array-location"]
    plane = np.arange(top, bottom)[:, None] * 7 + np.arange(left, right) * 3
    return np.stack([plane, plane + 40, plane + 80]).astype("u1")
