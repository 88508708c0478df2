"""Red, green and blue: which bands hold them, and which of their values are black and white."""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import ImageryError
from xchmv2.imagery.sampling import find_range, sample_windows
from xchmv2.raster import ValidPixels, find_grid, resolve_nodata, show

Range = tuple[float, float]
#: (low, high) for all bands, or one such pair per band.
ValueRange = Range | Sequence[Range]

COLOURS = ("red", "green", "blue")

#: Names of a colour by themselves. Sensors' own names, such as B04, are none: what is red on
#: Sentinel-2 is near infrared on PlanetScope.
COLOUR_NAMES = {
    "red": "red", "r": "red",
    "green": "green", "g": "green",
    "blue": "blue", "b": "blue",
}  # fmt: skip

BAND_DIM = "band"

# Words that name another band, and words that may stand beside a colour without changing it.
_OTHERS = re.compile(
    "edge|rededge|infra|infrared|nir|near|vnir|swir|mwir|lwir|tir|ir|thermal|coastal|aerosol|uv|"
    "ultraviolet|violet|purple|cyan|yellow|orange|magenta|pan|panchromatic|cirrus|alpha|opacity|"
    "transparency|mask|ndvi|cir|dem|dsm|dtm|chm"
)
_BESIDE = re.compile(
    "band|bands|b|channel|ch|layer|colou?r|light|visible|reflectance|surface|toa|boa|sr|dn|nm|um|m|"
    "wavelength|raster|image|ortho|orthophoto|the|of"
)
_NUMBERED = re.compile(r"(?:band|channel|layer|image|raster)?[ _-]*(\d+)")
# Where something is said of a band, beside its label; of these, GDAL fills one in by default.
_SOURCES = (
    "common_name", "eo:common_name", "colorinterp", "long_name", "description", "title",
    "band_name",
)  # fmt: skip
_BY_DEFAULT = ("colorinterp",)


def read_colour(text: str) -> str | None:
    """Read which colour a name or description means, such as "Red_1", "Red (665 nm)" or "nir08".

    "red", "green" or "blue"; "other" for another band, such as near infrared or red edge; "" where
    the text says nothing, such as "Band 1"; None where it may mean a band, but it is not clear
    which.
    """
    plain = text.strip().lower()
    if plain in COLOUR_NAMES:
        return COLOUR_NAMES[plain]
    words: list[str] = _WORD.findall(plain)
    if any(_OTHERS.fullmatch(word) for word in words):
        return "other"
    colours = [colour for colour in COLOURS if colour in words]
    if len(colours) == 1 and all(w in colours or _BESIDE.fullmatch(w) for w in words):
        return colours[0]
    if not plain or _NUMBERED.fullmatch(plain) or plain in _SILENT:
        return ""
    return None


_WORD = re.compile(r"[^\W\d_]+")
_SILENT = ("gray", "grey", "undefined", "palette", "none", "nan")


@dataclass(frozen=True, eq=False)
class Band:
    """One colour: the array that holds it, and its `index` along ``band`` if it has that dimension.

    `label`: the band as ``bands=`` calls it; `named`: whether a name or description says that it
    has this colour.
    """

    array: xr.DataArray
    index: int | None
    label: Hashable = None
    named: bool = True

    @property
    def name(self) -> str:
        """The band's name in the source: its variable, or its number along ``band``."""
        return str(self.array.name) if self.index is None else f"{BAND_DIM} {self.index + 1}"

    @property
    def plane(self) -> xr.DataArray:
        """The band alone, without a band dimension; of attributes for each band, its own."""
        if self.index is None:
            return self.array
        found = self.array.isel({BAND_DIM: self.index}, drop=True)
        count, values = self.array.sizes[BAND_DIM], found.attrs.get("nodatavals")
        if values is not None and np.size(values) == count:
            found.attrs = {**found.attrs, "nodatavals": np.reshape(values, count)[self.index]}
        return found


def select_bands(
    imagery: xr.Dataset | xr.DataArray, bands: Sequence[Hashable] | None = None
) -> tuple[Band, Band, Band]:
    """Pick red, green and blue.

    Believed in this order: `bands`, three variables or labels of the ``band`` coordinate; common
    names and colour interpretation, names and descriptions, which must not contradict each other;
    the places of three bands that are numbered 1, 2, 3 and of which nothing else is said. An
    ImageryError refuses a colour that is missing or has two candidates, and names of missing bands.
    """
    if not isinstance(imagery, xr.Dataset):
        return _from_band_dim(imagery, bands)
    rasters = {n: v for n, v in imagery.data_vars.items() if v.ndim >= 2 and v.dtype != bool}
    stacked = {n: v for n, v in rasters.items() if v.sizes.get(BAND_DIM, 1) > 1}
    flat = {n: v.squeeze(BAND_DIM, drop=True) if BAND_DIM in v.dims else v
            for n, v in rasters.items() if n not in stacked}  # fmt: skip
    described = [_describe(name, variable.attrs) for name, variable in flat.items()]
    chosen: list[_Described] | None
    if bands is not None:
        bands = _listed(bands) or bands
        if len(stacked) == 1 and not (isinstance(bands, list) and set(bands) <= set(flat)):
            return _from_band_dim(next(iter(stacked.values())), bands)
        chosen = _validate(bands, described)
    else:
        chosen = _choose(described) or _by_number(described)
        named = [name for name, variable in stacked.items() if _is_named(variable)]
        if chosen and named:
            raise _several([str([band.label for band in chosen]), *map(repr, named)], named[0])
    if chosen is not None:
        return _as_bands([(flat[band.label], None, band) for band in chosen])
    if len(stacked) > 1:
        raise _several(list(map(repr, stacked)), next(iter(stacked)))
    if not stacked:
        raise _no_bands(described)
    return _from_band_dim(next(iter(stacked.values())), bands)


def _from_band_dim(
    imagery: xr.DataArray, bands: Sequence[Hashable] | None
) -> tuple[Band, Band, Band]:
    if BAND_DIM not in imagery.dims:
        raise _no_band_dim(imagery)
    described = _describe_bands(imagery)
    if bands is not None:
        chosen = _validate(bands, described)
    else:
        found = _choose(described) or _by_number(described)
        if found is None:
            raise _no_bands(described)
        chosen = found
    return _as_bands([(imagery, described.index(band), band) for band in chosen])


@dataclass(frozen=True, eq=False)
class _Described:
    """One band: its `label`, and all that is said of it, by where it stands (the label: "name")."""

    label: Hashable
    words: Mapping[str, str]

    @cached_property
    def readings(self) -> dict[str, str | None]:
        """What each of the words means, as :func:`read_colour` tells."""
        found = {source: read_colour(text) for source, text in self.words.items()}
        for source, text in self.words.items():  # "Band 3" of the first band says something
            other = _numbered(text)
            if self.number is not None and other not in (None, self.number):
                found[source] = None
        if len(self.words.get("name", "")) == 1 and any(v for k, v in found.items() if k != "name"):
            found["name"] = ""  # a, b, c: an initial counts where nothing else does
        return found

    @property
    def number(self) -> int | None:
        """The number that the label is, or consists of."""
        whole = isinstance(self.label, int) and not isinstance(self.label, bool)
        return int(str(self.label)) if whole else _numbered(self.label)

    @property
    def contradicts_itself(self) -> bool:
        """Whether two of the words mean different bands."""
        return len({colour for colour in self.readings.values() if colour}) > 1

    def says(self, colour: str) -> bool:
        """Whether words mean the colour; GDAL sets its interpretation by default, so not that."""
        return any(
            found == colour for source, found in self.readings.items() if source not in _BY_DEFAULT
        )

    def __str__(self) -> str:
        told = [f"{source} {text!r}" for source, text in self.words.items() if source != "name"]
        return f"{self.label!r} ({', '.join(told)})" if told else repr(self.label)


def _as_bands(
    found: Sequence[tuple[xr.DataArray, int | None, _Described]],
) -> tuple[Band, Band, Band]:
    red, green, blue = (
        Band(array, index, band.label, band.says(colour))
        for colour, (array, index, band) in zip(COLOURS, found, strict=True)
    )
    return red, green, blue


def _numbered(text: object) -> int | None:
    found = _NUMBERED.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    return int(found[1]) if found else None


def _describe(label: Hashable, attrs: Mapping[Any, Any]) -> _Described:
    """Gather what is said of one band: its label, and attributes of its own."""
    words = {"name": label} if isinstance(label, str) else {}
    for source in _SOURCES:
        value = attrs.get(source)
        if isinstance(value, tuple | list | np.ndarray) and np.size(value) == 1:
            value = np.reshape(value, -1)[0]
        if isinstance(value, str) and value.strip():
            words[source] = str(value)
    return _Described(label, words)


def _describe_bands(imagery: xr.DataArray) -> list[_Described]:
    """Gather what is said of each band: labels, coordinates along ``band``, and attributes."""
    count = imagery.sizes[BAND_DIM]
    labels = list(range(1, count + 1))
    if BAND_DIM in imagery.coords:
        labels = np.atleast_1d(imagery[BAND_DIM].values).tolist()
    said: dict[str, Sequence[Any]] = {}
    for source in _SOURCES:
        value = imagery.attrs.get(source)
        if value is not None:
            said[source] = _spread(value, labels)
        if source in imagery.coords and imagery[source].dims == (BAND_DIM,):
            said[source] = imagery[source].values.tolist()
    each = [{source: values[i] for source, values in said.items()} for i in range(count)]
    return [_describe(label, attrs) for label, attrs in zip(labels, each, strict=True)]


def _spread(value: Any, labels: Sequence[Hashable]) -> Sequence[Any]:
    """Give each band its own of the descriptions that an array carries.

    Selecting bands leaves attributes as they were, so that numbers count in the file's own order.
    """
    if isinstance(value, str):
        parts = re.split(r"[,;/|]", value)
        if len(parts) != len(labels) or len(parts) == 1:
            # Said of the whole array; it counts where it tells that this is no RGB.
            return [value if read_colour(value) == "other" else ""] * len(labels)
        value = parts
    if not isinstance(value, tuple | list | np.ndarray):
        return [""] * len(labels)
    values = [str(part) for part in value]
    numbers = [n for n in labels if isinstance(n, int) and 1 <= n <= len(values)]
    if len(set(numbers)) == len(labels):
        return [values[number - 1] for number in numbers]
    return values if len(values) == len(labels) else [str(values)] * len(labels)


def _choose(bands: Sequence[_Described]) -> list[_Described] | None:
    """Find the band of each colour by what is said of it; None where one is missing."""
    found = {}
    for colour in COLOURS:
        # Whatever is called so comes first: arithmetic hands metadata on to its results.
        called = [band for band in bands if band.readings.get("name") == colour]
        pools = (
            [b for b in called if b.words["name"].strip().lower() in COLOUR_NAMES],
            called,
            [b for b in bands if colour in b.readings.values()],
        )
        found[colour] = next((pool for pool in pools if pool), [])
    unclear = {id(b): b for pool in found.values() for b in pool if b.contradicts_itself}
    if unclear and all(found.values()):
        raise ImageryError(
            "metadata that agree which band is red, green and blue",
            "; ".join(str(band) for band in unclear.values()),
            f"say which are right: {_ask(bands)}",
        )
    double = {colour: pool for colour, pool in found.items() if len(pool) > 1}
    if double and all(found.values()):
        first = tuple(pool[0].label for pool in found.values())
        several = (
            f"{len(pool)} for {colour}: {[b.label for b in pool]}"
            for colour, pool in double.items()
        )
        raise ImageryError(
            "one band each for red, green and blue",
            "; ".join(several),
            f"choose: .predict(..., bands={first!r})",
        )
    return [pool[0] for pool in found.values()] if all(found.values()) else None


def _is_named(imagery: xr.DataArray) -> bool:
    """Whether names tell red, green and blue along the band dimension."""
    try:
        return _choose(_describe_bands(imagery)) is not None
    except ImageryError:
        return False


def _by_number(bands: Sequence[_Described]) -> list[_Described] | None:
    """Take three bands that are numbered 1, 2, 3, and of which nothing else is said, as RGB."""
    silent = all(reading == "" for band in bands for reading in band.readings.values())
    return list(bands) if silent and [band.number for band in bands] == [1, 2, 3] else None


def _listed(bands: object) -> list[Any] | None:
    """List three bands, numpy's numbers as Python's; None for what cannot name three."""
    if not isinstance(bands, Iterable) or isinstance(bands, str | bytes | Mapping | Set):
        return None
    try:
        found = [b.item() if hasattr(b, "item") and np.ndim(b) == 0 else b for b in bands]
    except TypeError:  # an array of no dims
        return None
    usable = all(isinstance(b, Hashable) and not isinstance(b, bool) for b in found)
    return found if usable and len(found) == 3 else None


def _validate(bands: object, described: Sequence[_Described]) -> list[_Described]:
    """Look up three bands by their labels."""
    labels = [band.label for band in described]
    given = _listed(bands)
    if given is None or len(set(given)) != 3 or any(labels.count(b) != 1 for b in given):
        raise ImageryError(
            f"three different bands of {labels}, as red, green, blue",
            f"bands={tuple(bands) if isinstance(bands, list) else bands!r}",
            _name_them(described),
        )
    return [described[labels.index(b)] for b in given]


_RELABEL = "number them: imagery.assign_coords(band=range(1, imagery.sizes['band'] + 1))"


def _no_bands(bands: Sequence[_Described]) -> ImageryError:
    silent = all(set(band.words) <= {"name"} for band in bands)
    listed = str([b.label for b in bands]) if silent else f"[{', '.join(map(str, bands))}]"
    if len(bands) < 3:
        return ImageryError(
            "red, green and blue bands",
            f"{len(bands)}: {listed}",
            "give imagery with three bands; the model needs all three",
        )
    return ImageryError("red, green and blue bands", listed, _name_them(bands))


def _name_them(bands: Sequence[_Described]) -> str:
    """Name the call, with bands only where their names leave one choice."""
    try:
        found = _choose(bands) or _guess(bands)
    except ImageryError:
        found = None
    if found is None or len(bands) < 3:
        return _ask(bands)
    return f"name them: .predict(..., bands={tuple(band.label for band in found)!r})"


def _guess(bands: Sequence[_Described]) -> list[_Described] | None:
    """Find bands whose names hold one colour among words that are not known."""
    found = []
    for colour in COLOURS:
        fits = [b for b in bands if any(_holds(text, colour) for text in b.words.values())]
        found += fits if len(fits) == 1 and not fits[0].contradicts_itself else []
    return found if len({id(band) for band in found}) == 3 else None


def _holds(text: str, colour: str) -> bool:
    words = set(_WORD.findall(text.lower()))
    return words & set(COLOURS) == {colour} and read_colour(text) != "other"


def _ask(bands: Sequence[_Described]) -> str:
    """Ask without an order: what holds for one product is wrong for another."""
    if len({band.label for band in bands}) < len(bands):
        return _RELABEL
    if all(band.number is not None for band in bands):
        return (
            "pass bands= with the numbers of red, green and blue in that order; they stand in the "
            "product's documentation (1, 2, 3 for NAIP, 3, 2, 1 for PlanetScope)"
        )
    return (
        "pass bands= with the names of red, green and blue in that order; they stand in the "
        "product's documentation (B04 is red on Sentinel-2 and near infrared on PlanetScope)"
    )


def _several(pictures: Sequence[str], first: Hashable) -> ImageryError:
    return ImageryError(
        "one picture of red, green and blue",
        f"{' and '.join(pictures)}",
        f"choose one, for example imagery[{first!r}].chmv2.predict()",
    )


def _no_band_dim(imagery: xr.DataArray) -> ImageryError:
    """Find the dimension that may hold the bands: short, and neither an axis nor time."""
    others = [d for d in imagery.dims if str(d).lower() not in _AXES and imagery.sizes[d] >= 3]
    if imagery.ndim < 3 or not others:
        fix = "give imagery with three bands; the model needs all three"
    else:
        dim = min(others, key=lambda d: imagery.sizes[d])
        fix = f"name the dimension: imagery.rename({{{str(dim)!r}: {BAND_DIM!r}}})"
    return ImageryError(
        "a Dataset with red, green and blue variables, or an array with a 'band' dimension",
        f"an array with dims {imagery.dims}",
        fix,
    )


_AXES = ("y", "x", "lat", "lon", "latitude", "longitude", "northing", "easting", "time", "t")


def resolve_value_range(
    bands: Sequence[xr.DataArray], value_range: ValueRange | None = None
) -> tuple[Range, Range, Range]:
    """Find the values that stand for black and for full brightness: (low, high) of each band.

    `value_range`, one pair or three, is required except for uint8, which is 0 to 255: a guess from
    the data would make the heights depend on the crop. An ImageryError refuses a range that is
    missing, not increasing, or of the wrong shape, and bands that are not numbers.
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


def propose_value_range(
    imagery: xr.Dataset | xr.DataArray,
    *,
    bands: Sequence[Hashable] | None = None,
    nodata: float | None = None,
) -> Range:
    """Propose a value range for imagery that is not uint8, from a small sample of its pixels.

    Parameters
    ----------
    imagery : Dataset or DataArray
        As for :func:`xchmv2.predict.predict`.
    bands, nodata
        As for :func:`xchmv2.predict.predict`.

    Returns
    -------
    (low, high)
        For all three bands: 0 to 255 for values of 8 bits in a wider type; else the 0.5 % and
        99.5 % quantiles of the sample, rounded outwards, with 0 for a low one that is near 0.

    Raises
    ------
    ImageryError
        If the bands are not found, or the sample holds no two different valid values.

    Notes
    -----
    Five windows of 128 px of the middle date are read: of lazy imagery, five chunks of a band at
    most. Look at the range before you use it, and use one for all dates and areas of a project:
    heights depend on it, and another sample gives another range.

    Examples
    --------
    >>> propose_value_range(imagery)
    (0.0, 3000.0)
    """
    planes = [band.plane for band in select_bands(imagery, bands)]
    planes = [plane.transpose(..., *find_grid(plane).dims) for plane in planes]
    if all(plane.dtype == np.uint8 for plane in planes):
        return _WHOLE_UINT8
    found = _sampled_range(planes, nodata)
    if found is None:
        raise ImageryError(
            "valid pixels of different values in a small sample",
            "none",
            "choose the range yourself: .predict(..., value_range=(low, high))",
        )
    return found


def _sampled_range(planes: Sequence[xr.DataArray], nodata: float | None) -> Range | None:
    with warnings.catch_warnings():  # predict() says so where nodata is impossible
        warnings.simplefilter("ignore")
        rule = ValidPixels(resolve_nodata(planes, nodata))
    seen = [np.stack(window)[:, rule(window)] for window in sample_windows(planes)]
    return find_range(np.concatenate(seen, axis=1))


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
        fix = _advise_range(bands)
    raise ImageryError(
        "uint8 imagery, or the values that stand for black and white",
        f"{' and '.join(sorted({str(band.dtype) for band in bands}))} and no value_range",
        fix,
    )


def _advise_range(bands: Sequence[xr.DataArray]) -> str:
    """Propose a range from a sample; only name the function where that would read dask chunks."""
    found = None
    if all(band.chunks is None for band in bands):
        try:
            found = _sampled_range(bands, None)
        except Exception:  # the message matters more than its example
            found = None
    if found is None:
        return (
            "pass .predict(..., value_range=(black, white)); "
            "xchmv2.imagery.propose_value_range(imagery) reads a small sample and proposes one"
        )
    low, high = (f"{value:.10g}" for value in found)
    return (
        f"pass .predict(..., value_range=({low}, {high})), which is what a small sample of this "
        "imagery spans; use one range for all dates and areas of a project"
    )


def _bad_range(value_range: object) -> ImageryError:
    return ImageryError(
        "value_range as one (low, high) with low < high, or one such pair per band",
        f"value_range={show(value_range)}",
        "for example .predict(..., value_range=(0, 3000))",
    )
