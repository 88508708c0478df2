"""Valid pixels: one rule for imagery, and for heights with declared nodata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import ndimage

_DECLARE = ("_FillValue", "nodata", "missing_value")


@dataclass(frozen=True)
class ValidPixels:
    """The rule that separates valid pixels from nodata.

    A pixel of floating-point imagery is invalid if any band is NaN, infinite or nodata; a pixel
    of integer imagery if every band is nodata, because sunlit crowns saturate single bands.

    Parameters
    ----------
    nodata : tuple of (float or None)
        Nodata value of red, green and blue; None without one.
    erode : int
        Width of the margin around invalid pixels that is invalid too [px].
    """

    nodata: tuple[float | None, float | None, float | None]
    erode: int = 0

    def __call__(
        self, bands: Sequence[npt.NDArray[Any]], mask: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Return the valid pixels of three bands (..., H, W), within ``mask`` if it is given."""
        missing = [_equals(band, value) for band, value in zip(bands, self.nodata, strict=True)]
        if any(np.issubdtype(band.dtype, np.floating) for band in bands):
            broken = [m | ~np.isfinite(band) for m, band in zip(missing, bands, strict=True)]
            invalid = np.logical_or.reduce(broken)
        else:
            invalid = np.logical_and.reduce(missing)
        if mask is not None:
            invalid |= ~mask
        if self.erode and invalid.any():
            reach = 2 * self.erode + 1
            for axis in (-2, -1):
                invalid = ndimage.maximum_filter1d(invalid, reach, axis=axis, mode="nearest")
        valid: npt.NDArray[np.bool_] = np.logical_not(invalid)
        return valid

    def never_invalid(self, dtypes: Sequence[np.dtype[Any]]) -> bool:
        """Return whether no value of the bands alone can make a pixel invalid."""
        whole = all(dtype.kind in "iu" for dtype in dtypes)
        return whole and any(value is None for value in self.nodata)


def resolve_nodata(
    bands: Sequence[xr.DataArray], nodata: float | None = None
) -> tuple[float | None, float | None, float | None]:
    """Find the nodata value of each band: the argument, else the value that the metadata declare.

    Parameters
    ----------
    bands : sequence of DataArray
        Red, green and blue.
    nodata : float, optional
        Overrides the metadata for all bands.

    Returns
    -------
    tuple of (float or None)
        One value per band.
    """
    red, green, blue = (_declared(band) if nodata is None else float(nodata) for band in bands)
    return red, green, blue


def _declared(band: xr.DataArray) -> float | None:
    """Read the nodata value that a band declares, in its attributes or its encoding.

    The encoding of decoded values is in their stored units, so it no longer applies.
    """
    stored = band.encoding
    scaled = stored.get("scale_factor", 1) != 1 or stored.get("add_offset", 0) != 0
    was = stored.get("rasterio_dtype", stored.get("dtype", band.dtype))
    decoded = scaled or np.dtype(was).kind != band.dtype.kind
    for place in (band.attrs,) if decoded else (band.attrs, stored):
        for key in ("_FillValue", "nodata", "missing_value"):
            if place.get(key) is not None:
                return float(np.asarray(place[key]).reshape(-1)[0])
    return None


def _equals(band: npt.NDArray[Any], value: float | None) -> npt.NDArray[np.bool_]:
    """Compare in the band's own dtype; a value outside its range equals no pixel."""
    if value is None or np.isnan(value):
        return np.zeros(band.shape, bool)
    if np.issubdtype(band.dtype, np.floating):
        return np.asarray(band == band.dtype.type(value))
    limits = np.iinfo(band.dtype)
    if not (limits.min <= value <= limits.max and float(value).is_integer()):
        return np.zeros(band.shape, bool)
    return np.asarray(band == band.dtype.type(int(value)))


def without_nodata(array: xr.DataArray) -> xr.DataArray:
    """Replace the nodata value that an array declares with NaN.

    Parameters
    ----------
    array : DataArray
        Heights or changes, as read from any file.

    Returns
    -------
    DataArray
        The array itself if it declares none, or NaN; else floats that no longer declare one, lazy
        if the array is.
    """
    nodata = resolve_nodata([array] * 3)[0]
    if nodata is None or math.isnan(nodata):
        return array
    floats = array if array.dtype.kind == "f" else array.astype(np.float32)
    found = floats.where(floats != floats.dtype.type(nodata))
    found.attrs = {name: value for name, value in floats.attrs.items() if name not in _DECLARE}
    return found
