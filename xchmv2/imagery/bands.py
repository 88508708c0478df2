"""Red, green and blue: which bands hold them, and which of their values are black and white."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import ImageryError
from xchmv2.raster import list_items, show

Range = tuple[float, float]
#: (low, high) for all bands, or one such pair per band.
ValueRange = Range | Sequence[Range]

COLOURS = ("red", "green", "blue")

#: Unambiguous names of colours: the words, their initials, Sentinel-2's band numbers.
COLOUR_NAMES = {
    "red": "red", "r": "red", "b04": "red",
    "green": "green", "g": "green", "b03": "green",
    "blue": "blue", "b": "blue", "b02": "blue",
}  # fmt: skip

BAND_DIM = "band"


@dataclass(frozen=True, eq=False)
class Band:
    """One colour: the array that holds it, and its index along the band dimension."""

    array: xr.DataArray
    index: int | None

    @property
    def name(self) -> str:
        """The band's name in the source: its variable, or its number along ``band``."""
        return str(self.array.name) if self.index is None else f"{BAND_DIM} {self.index + 1}"


def select_bands(
    imagery: xr.Dataset | xr.DataArray, bands: Sequence[Hashable] | None = None
) -> tuple[Band, Band, Band]:
    """Pick red, green and blue.

    Parameters
    ----------
    imagery : Dataset or DataArray
        One variable per band, or an array with a ``band`` dimension.
    bands : sequence of three names or numbers, optional
        Variables, or labels of the ``band`` coordinate, in the order red, green, blue.

    Returns
    -------
    tuple of Band
        Red, green and blue.

    Raises
    ------
    ImageryError
        If a colour is missing or has two candidates, or ``bands`` names a missing band.
    """
    if isinstance(imagery, xr.Dataset):
        stacked = [v for v in imagery.data_vars.values() if BAND_DIM in v.dims]
        if len(stacked) != 1:
            return _from_variables(imagery, bands)
        imagery = stacked[0]
    return _from_band_dim(imagery, bands)


def resolve_value_range(
    bands: Sequence[xr.DataArray], value_range: ValueRange | None = None
) -> tuple[Range, Range, Range]:
    """Find the values that stand for black and for full brightness in each band.

    Parameters
    ----------
    bands : sequence of DataArray
        Red, green and blue.
    value_range : (low, high) or three of them, optional
        Required except for uint8, which is 0 to 255: a guess from the data would make the heights
        depend on the crop.

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


def _from_variables(
    imagery: xr.Dataset, bands: Sequence[Hashable] | None
) -> tuple[Band, Band, Band]:
    spatial = {n: v for n, v in imagery.data_vars.items() if v.ndim >= 2}
    if bands is None:
        chosen = _choose({n: _words(n, v.attrs) for n, v in spatial.items()})
    else:
        chosen = _validate_choice(bands, list(spatial))
    arrays = [imagery[name] for name in chosen]
    if any(array.sizes.get(BAND_DIM, 1) > 1 for array in arrays):
        raise ImageryError(
            f"a variable without {BAND_DIM!r} for each colour",
            f"sizes {[dict(array.sizes) for array in arrays]}",
            f"open each file with open_rasterio(path).squeeze({BAND_DIM!r}, drop=True), then put "
            "them together",
        )
    # Each file of one band was opened with a band of its own, numbered 1.
    red, green, blue = (
        Band(array.squeeze(BAND_DIM, drop=True) if BAND_DIM in array.dims else array, None)
        for array in arrays
    )
    return red, green, blue


def _from_band_dim(
    imagery: xr.DataArray, bands: Sequence[Hashable] | None
) -> tuple[Band, Band, Band]:
    if BAND_DIM not in imagery.dims:
        raise ImageryError(
            "a Dataset with red, green and blue variables, or an array with a 'band' dimension",
            f"an array with dims {imagery.dims}",
            "name the dimension: imagery.rename({...: 'band'})",
        )
    labels = _labels(imagery)
    if bands is not None:
        chosen = _validate_choice(bands, labels)
    elif len(labels) == 3 and labels == [1, 2, 3]:
        chosen = (1, 2, 3)
    else:
        chosen = _choose(_band_words(imagery, labels))
    red, green, blue = (Band(imagery, labels.index(label)) for label in chosen)
    return red, green, blue


def _labels(imagery: xr.DataArray) -> list[Hashable]:
    """Labels of the band dimension; 1, 2, 3, ... if it has none."""
    if BAND_DIM in imagery.coords:
        return list(np.atleast_1d(imagery[BAND_DIM].values).tolist())
    return list(range(1, imagery.sizes[BAND_DIM] + 1))


def _band_words(imagery: xr.DataArray, labels: list[Hashable]) -> dict[Hashable, set[str]]:
    """All names of each band: its label, STAC common name, description."""
    words = {label: _words(label, {}) for label in labels}
    sources: list[Any] = [imagery.attrs.get("long_name")]
    for name in ("common_name", "long_name", "description"):
        if name in imagery.coords and imagery[name].dims == (BAND_DIM,):
            sources.append(imagery[name].values.tolist())
    for source in sources:
        if isinstance(source, tuple | list) and len(source) == len(labels):
            for label, word in zip(labels, source, strict=True):
                words[label].add(str(word).lower())
    return words


def _words(name: Hashable, attrs: Mapping[Any, Any]) -> set[str]:
    found = [name, attrs.get("common_name"), attrs.get("long_name")]
    return {word.lower() for word in found if isinstance(word, str)}


def _choose(words: Mapping[Hashable, set[str]]) -> tuple[Hashable, Hashable, Hashable]:
    """Find the one candidate for each colour by the names of the bands."""
    candidates = {
        colour: [
            n for n, called in words.items() if colour in {COLOUR_NAMES.get(w) for w in called}
        ]
        for colour in COLOURS
    }
    double = {colour: names for colour, names in candidates.items() if len(names) > 1}
    if double:
        first = tuple(names[0] if names else "..." for names in candidates.values())
        raise ImageryError(
            "one band each for red, green and blue",
            "; ".join(f"{len(names)} for {colour}: {names}" for colour, names in double.items()),
            f"choose: .predict(..., bands={first!r})",
        )
    if not all(candidates.values()):
        raise _no_bands(list(words))
    red, green, blue = (candidates[colour][0] for colour in COLOURS)
    return red, green, blue


def _validate_choice(
    bands: Sequence[Hashable], available: list[Hashable]
) -> tuple[Hashable, Hashable, Hashable]:
    chosen = list_items(bands) or []
    known = all(isinstance(band, Hashable) and band in available for band in chosen)
    ordered = not isinstance(bands, set | frozenset | Mapping)
    if len(chosen) != 3 or not known or len(set(chosen)) != 3 or not ordered:
        raise ImageryError(
            f"three different bands of {available}, as red, green, blue",
            f"bands={show(bands)}",
            f"name three: .predict(..., bands={_example(available)!r})",
        )
    return chosen[0], chosen[1], chosen[2]


def _no_bands(available: list[Hashable]) -> ImageryError:
    if len(available) < 3:
        return ImageryError(
            "red, green and blue bands",
            f"{len(available)}: {available}",
            "give imagery with three bands; the model needs all three",
        )
    return ImageryError(
        "red, green and blue bands",
        f"{available}",
        f"name them: .predict(..., bands={_example(available)!r})",
    )


def _example(available: list[Hashable]) -> tuple[Hashable, ...]:
    """Three of the bands, in the order most sensors number them: blue first."""
    first = available[:3]
    return tuple(first if first == [1, 2, 3] else reversed(first))


_WHOLE_UINT8: Range = (0.0, 255.0)


def _range_from_dtype(bands: Sequence[xr.DataArray]) -> tuple[Range, Range, Range]:
    if all(band.dtype == np.uint8 for band in bands):
        return _WHOLE_UINT8, _WHOLE_UINT8, _WHOLE_UINT8
    stored = {str(b.encoding.get("rasterio_dtype", b.encoding.get("dtype"))) for b in bands}
    if stored == {"uint8"}:
        fix = (
            "it was read masked: open it unmasked, so that a pixel is nodata only if all bands "
            "are, or pass .predict(..., value_range=(0, 255))"
        )
    else:
        fix = (
            "pass .predict(..., value_range=(black, white)), for example (0, 0.3) for reflectance "
            "or (0, 3000) for reflectance stored as integers"
        )
    raise ImageryError(
        "uint8 imagery, or the values that stand for black and white",
        f"{' and '.join(sorted({str(band.dtype) for band in bands}))} and no value_range",
        fix,
    )


def _bad_range(value_range: object) -> ImageryError:
    return ImageryError(
        "value_range as one (low, high) with low < high, or one such pair per band",
        f"value_range={show(value_range)}",
        "for example .predict(..., value_range=(0, 3000))",
    )
