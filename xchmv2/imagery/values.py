"""What a pixel value means: its range, and whether it is imagery at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import ndimage

from xchmv2.errors import ImageryError

Range = tuple[float, float]
#: (low, high) for all bands, or one such pair per band.
ValueRange = Range | Sequence[Range]

_WHOLE_UINT8: Range = (0.0, 255.0)


@dataclass(frozen=True)
class ValidPixels:
    """The rule that tells imagery from nodata.

    In floating-point imagery a pixel is invalid if any band is NaN, infinite or its nodata value;
    in integer imagery if every band equals it, because sunlit crowns saturate single bands.

    Parameters
    ----------
    nodata : tuple of (float or None)
        Nodata value of red, green and blue; None where there is none.
    erode : int
        Pixels around invalid ones that are invalid too.
    """

    nodata: tuple[float | None, float | None, float | None]
    erode: int = 0

    def __call__(
        self, bands: Sequence[npt.NDArray[Any]], mask: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Tell the valid pixels of three bands (..., H, W), all of which ``mask`` must allow."""
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
        """Whether the bands alone can make no pixel invalid, whatever their values."""
        whole = all(dtype.kind in "iu" for dtype in dtypes)
        return whole and any(value is None for value in self.nodata)


def resolve_nodata(
    bands: Sequence[xr.DataArray], nodata: float | None = None
) -> tuple[float | None, float | None, float | None]:
    """Find the nodata value of each band: the argument, else what the metadata declare.

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


def resolve_value_range(
    bands: Sequence[xr.DataArray], value_range: ValueRange | None = None
) -> tuple[Range, Range, Range]:
    """Find the values that stand for black and for full brightness in each band.

    Parameters
    ----------
    bands : sequence of DataArray
        Red, green and blue.
    value_range : (low, high) or three of them, optional
        Needed for everything but uint8, which is 0 to 255: a guess from the data would make the
        heights depend on the crop.

    Returns
    -------
    tuple of (low, high)
        One pair per band.

    Raises
    ------
    ImageryError
        If the range is missing, not increasing, or of the wrong shape, or bands are not numbers.
    """
    odd = sorted({str(band.dtype) for band in bands if band.dtype.kind not in "uif"})
    if odd:
        raise ImageryError(
            "bands of integers or floating-point numbers",
            f"{' and '.join(odd)}",
            "convert them: imagery.astype('uint8')",
        )
    if value_range is None:
        return _range_from_dtype(bands)
    try:
        pairs = np.broadcast_to(np.asarray(value_range, dtype=float), (3, 2))
    except (TypeError, ValueError):
        raise _bad_range(value_range) from None
    if not (np.isfinite(pairs).all() and (pairs[:, 0] < pairs[:, 1]).all()):
        raise _bad_range(value_range)
    red, green, blue = ((float(low), float(high)) for low, high in pairs)
    return red, green, blue


def _range_from_dtype(bands: Sequence[xr.DataArray]) -> tuple[Range, Range, Range]:
    if all(band.dtype == np.uint8 for band in bands):
        return _WHOLE_UINT8, _WHOLE_UINT8, _WHOLE_UINT8
    stored = {str(b.encoding.get("rasterio_dtype", b.encoding.get("dtype"))) for b in bands}
    if stored == {"uint8"}:
        fix = (
            "it was read masked: open it unmasked, so that nodata is told by all bands together, "
            "or say .predict(..., value_range=(0, 255))"
        )
    else:
        fix = (
            "say what they are: .predict(..., value_range=(black, white)), such as (0, 0.3) for "
            "reflectance or (0, 3000) for reflectance stored as integers"
        )
    raise ImageryError(
        "uint8 imagery, or the values that are black and white in it",
        f"{' and '.join(sorted({str(band.dtype) for band in bands}))} and no value_range",
        fix,
    )


def _bad_range(value_range: object) -> ImageryError:
    return ImageryError(
        "value_range as one (low, high) with low < high, or one such pair per band",
        f"value_range={value_range!r}",
        "for example .predict(..., value_range=(0, 3000))",
    )


def _declared(band: xr.DataArray) -> float | None:
    """Read the nodata value a band declares, in attributes or in its encoding.

    The encoding of decoded values is in the units they were stored in: it says nothing any more.
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
    """Compare in the band's own dtype; a value it cannot hold equals nothing."""
    if value is None or np.isnan(value):
        return np.zeros(band.shape, bool)
    if np.issubdtype(band.dtype, np.floating):
        return np.asarray(band == band.dtype.type(value))
    limits = np.iinfo(band.dtype)
    if not (limits.min <= value <= limits.max and float(value).is_integer()):
        return np.zeros(band.shape, bool)
    return np.asarray(band == band.dtype.type(int(value)))
