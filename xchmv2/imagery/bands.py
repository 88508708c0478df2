"""Which variables or band indices hold red, green and blue."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import ImageryError

COLOURS = ("red", "green", "blue")

#: Names that mean a colour beyond doubt: the words, their initials, Sentinel-2's numbers.
COLOUR_NAMES = {
    "red": "red", "r": "red", "b04": "red",
    "green": "green", "g": "green", "b03": "green",
    "blue": "blue", "b": "blue", "b02": "blue",
}  # fmt: skip

BAND_DIM = "band"


@dataclass(frozen=True, eq=False)
class Band:
    """One colour: the array that holds it and, along its band dimension, where."""

    array: xr.DataArray
    index: int | None

    @property
    def name(self) -> str:
        """What the band is called in the source: its variable, or its place along ``band``."""
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
        If a colour is missing, has two candidates, or ``bands`` names what is not there.
    """
    if isinstance(imagery, xr.Dataset):
        stacked = [v for v in imagery.data_vars.values() if BAND_DIM in v.dims]
        if len(stacked) != 1:
            return _from_variables(imagery, bands)
        imagery = stacked[0]
    return _from_band_dim(imagery, bands)


def _from_variables(
    imagery: xr.Dataset, bands: Sequence[Hashable] | None
) -> tuple[Band, Band, Band]:
    spatial = {n: v for n, v in imagery.data_vars.items() if v.ndim >= 2}
    if bands is None:
        chosen = _choose({n: _words(n, v.attrs) for n, v in spatial.items()})
    else:
        chosen = _validate_choice(bands, list(spatial))
    red, green, blue = (Band(imagery[name], None) for name in chosen)
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
    """Labels of the band dimension; 1, 2, 3, ... where it has none."""
    if BAND_DIM in imagery.coords:
        return list(np.atleast_1d(imagery[BAND_DIM].values).tolist())
    return list(range(1, imagery.sizes[BAND_DIM] + 1))


def _band_words(imagery: xr.DataArray, labels: list[Hashable]) -> dict[Hashable, set[str]]:
    """Everything each band is called: its label, STAC common name, description."""
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
    """Find the one candidate for each colour by what the bands are called."""
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
    chosen = (bands,) if isinstance(bands, str) else tuple(bands)
    unknown = [band for band in chosen if band not in available]
    if len(chosen) != 3 or unknown or len(set(chosen)) != 3:
        raise ImageryError(
            f"three different bands out of {available}, as red, green, blue",
            f"bands={bands!r}",
            f"name three: .predict(..., bands={_example(available)!r})",
        )
    return chosen[0], chosen[1], chosen[2]


def _no_bands(available: list[Hashable]) -> ImageryError:
    if len(available) < 3:
        return ImageryError(
            "red, green and blue bands",
            f"{len(available)}: {available}",
            "give imagery with three bands; the model cannot do with fewer",
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
