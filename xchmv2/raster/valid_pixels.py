"""Valid pixels: one rule for imagery, and for heights with declared nodata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import ndimage

from xchmv2.errors import CHMv2Error, warn

#: Attributes and encodings that declare a nodata value.
_DECLARE = ("_FillValue", "missing_value", "nodata", "nodatavals", "fill_value")
# Declared values beyond this stand for the lowest or highest float, however they were rounded.
_HUGE = 1e38


@dataclass(frozen=True)
class ValidPixels:
    """The rule that separates valid pixels from nodata.

    A pixel of floating-point imagery is invalid if any band is NaN, infinite or nodata; a pixel of
    integer imagery if every band is nodata, because sunlit crowns saturate single bands. `nodata`
    is the value of red, green and blue, None without one; `erode` the width of the margin around
    invalid pixels that is invalid too [px].
    """

    nodata: tuple[float | None, float | None, float | None]
    erode: int = 0

    def __call__(
        self, bands: Sequence[npt.NDArray[Any]], mask: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Return the valid pixels of three bands (..., H, W), within ``mask`` if it is given."""
        missing = [
            np.asarray(_equals(band, value)) for band, value in zip(bands, self.nodata, strict=True)
        ]
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
    bands: Sequence[xr.DataArray],
    nodata: float | None = None,
    *,
    common: Mapping[Any, Any] | None = None,
) -> tuple[float | None, float | None, float | None]:
    """Find the nodata value of each band: the argument, else the value that the metadata declare.

    None where none is declared. `common` are attributes of the Dataset, for bands that declare none
    themselves. ``_FillValue``, ``missing_value``, ``nodata``, ``nodatavals`` and ``fill_value`` are
    one question. Attributes describe the values in memory, so those of the encoding count only
    where there are none, and only where values were not decoded since they were read. A CHMv2Error
    refuses different values and one that is no number; a UserWarning says that a value is ignored
    which the band's data type cannot hold.
    """
    values = [_declared(band) if nodata is None else float(nodata) for band in bands]
    if None in values and common:
        shared = _declared(xr.DataArray(np.zeros((), bands[0].dtype), attrs=dict(common)))
        values = [shared if value is None else value for value in values]
    for value, dtype in dict.fromkeys(zip(values, (b.dtype for b in bands), strict=True)):
        if value is not None and not math.isnan(value) and not can_hold(dtype, value):
            warn(
                f"the nodata value {value:g} is ignored: no {dtype} pixel can have it; if another "
                "value stands for nodata, pass nodata="
            )
    red, green, blue = (
        value if value is not None and can_hold(band.dtype, value) else None
        for value, band in zip(values, bands, strict=True)
    )
    return red, green, blue


def _declared(band: xr.DataArray) -> float | None:
    """Read the nodata value that a band declares, in its attributes or its encoding.

    The encoding of decoded values is in their stored units, so it no longer applies.
    """
    stored = band.encoding
    scaled = stored.get("scale_factor", 1) != 1 or stored.get("add_offset", 0) != 0
    was = stored.get("rasterio_dtype", stored.get("dtype", band.dtype))
    decoded = scaled or np.dtype(was).kind != band.dtype.kind
    places = [
        _read_declared(place) for place in ((band.attrs,) if decoded else (band.attrs, stored))
    ]
    for found in places:
        values = {key: value for key, value in found.items() if not math.isnan(value)}
        fits = {key: value for key, value in values.items() if can_hold(band.dtype, value)}
        if not values:
            continue
        first = next(iter((fits or values).values()))
        if all(_same_value(band.dtype, value, first) for value in fits.values()):
            return first
        raise CHMv2Error(
            "one nodata value",
            ", ".join(f"{key} {value:g}" for key, value in fits.items()),
            f"pass the right one, as nodata={first:g}, or delete the others, as in "
            f"del array.attrs[{list(fits)[-1]!r}]",
        )
    return math.nan if any(places) else None


def _read_declared(place: Mapping[Any, Any]) -> dict[str, float]:
    """Read the nodata values in attributes or an encoding by their keys."""
    found: dict[str, float] = {}
    for key in _DECLARE:
        given = [] if place.get(key) is None else np.reshape(place[key], -1).tolist()
        told = {str(value).strip().lower() for value in given if value is not None} - _NO_VALUE
        try:
            values = {float(value) for value in told}
        except ValueError:
            values = set()
        if told and len(values) != 1:
            raise CHMv2Error(
                "one number as nodata value",
                f"{key} {place[key]!r}",
                f"pass the right one, as nodata=0, or delete it: del array.attrs[{key!r}]",
            )
        if told:
            found[key] = values.pop()
    return found


_NO_VALUE = {"", "none", "null", "n/a"}


def _same_value(dtype: np.dtype[Any], one: float, other: float) -> bool:
    return one == other or bool(_equals(np.asarray(_cast(dtype, one)), other).all())


def can_hold(dtype: np.dtype[Any], value: float) -> bool:
    """Whether a pixel of a dtype can have a value, as far as its rounding."""
    if dtype.kind not in "iu":
        return True
    limits = np.iinfo(dtype)
    return bool(limits.min <= value <= limits.max and float(value).is_integer())


def _cast(dtype: np.dtype[Any], value: float) -> Any:
    """Round a value to a dtype; beyond the largest float it is the largest."""
    if dtype.kind in "iu":
        return dtype.type(int(value))
    largest = float(np.finfo(dtype).max)
    return dtype.type(max(-largest, min(value, largest)))


def _equals(band: Any, value: float | None) -> Any:
    """Compare in the band's own dtype, array or DataArray; a value beyond it equals no pixel."""
    if value is None or math.isnan(value) or not can_hold(band.dtype, value):
        return np.zeros(band.shape, bool)
    if band.dtype.kind == "f" and abs(value) > _HUGE:
        # Written as -3.4e38 or -3.4028235e38, rounded to float32 or not: no measurement is near.
        near = band.dtype.type(0.99 * float(_cast(band.dtype, value)))
        return (band <= near) if value < 0 else (band >= near)
    return band == _cast(band.dtype, value)


def without_nodata(array: xr.DataArray) -> xr.DataArray:
    """Replace the nodata value that an array declares with NaN, by :func:`resolve_nodata`.

    The array itself if it declares none, or NaN; else floats that no longer declare one, lazy if
    the array is.
    """
    nodata = resolve_nodata([array] * 3)[0]
    if nodata is None or math.isnan(nodata):
        return array
    floats = array if array.dtype.kind == "f" else array.astype(np.float32)
    found = floats.where(~_equals(floats, nodata))
    found.attrs = {name: value for name, value in floats.attrs.items() if name not in _DECLARE}
    return found
