"""Which pixel values stand for black and white."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from xchmv2.errors import ImageryError

Range = tuple[float, float]
#: (low, high) for all bands, or one such pair per band.
ValueRange = Range | Sequence[Range]

_WHOLE_UINT8: Range = (0.0, 255.0)


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
