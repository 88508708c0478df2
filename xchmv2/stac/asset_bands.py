"""The files and bands of an item that hold red, green and blue, and its mask."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np

from xchmv2.errors import ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.stac.item_metadata import Metadata
from xchmv2.stac.items import Asset, StacItem

#: An asset; or names or numbers of red, green and blue.
BandNames = str | Sequence[str | int]

_NOT_DATA = {"thumbnail", "overview", "metadata", "tiles", "browse", "preview"}
_RASTER_TYPES = re.compile(r"image/(tiff|geotiff|vnd\.stac\.geotiff|jp2|png|jpeg|webp)|hdf|netcdf")
_RASTER_NAMES = re.compile(r"\.(tiff?|jp2|vrt|img)($|\?)", re.IGNORECASE)

#: Names that are a colour. Band numbers are none: blue is B02 of one sensor and B01 of another.
_COLOUR_NAMES = {word: colour for colour in COLOURS for word in (colour, colour[0])}
#: Words beside that of a colour that make it another band.
_OTHERS = {"edge", "rededge", "infra", "infrared", "near", "nir", "coastal", "deep", "mask"}
#: Names of a band that only number it.
_NUMBER = re.compile(r"(band[ _-]?)?\d+")
#: Letters in the name of an asset that say in which order its bands are; or that it is not RGB.
_ORDER = re.compile(r"(?<![a-z])([rgb]{3})(n|nir|ir|a)?(?![a-z])")
_FALSE_COLOURS = re.compile(r"(?<![a-z])(nrg|irrg|cir|nir|false|pseudo)")
_DTYPES = re.compile(r"u?int(8|16|32|64)|float(16|32|64)")
_LISTED = 8  # bands in a message


@dataclass(frozen=True)
class BandInfo:
    """Metadata of one band.

    Parameters
    ----------
    words : tuple of str
        Its names in lower case, the common name first.
    colour : str or None
        Red, green or blue, if the names mean one.
    dtype : str or None
        Data type.
    nodata : float or None
        Nodata value.
    classes : tuple of Metadata
        Classes of the classification extension, each with a whole number as its value.
    scale, offset : float or None
        Of physical values: stored value * scale + offset.
    doubtful : bool
        Whether its names mean several colours.
    """

    words: tuple[str, ...]
    colour: str | None
    dtype: str | None
    nodata: float | None
    classes: tuple[Metadata, ...] = ()
    scale: float | None = None
    offset: float | None = None
    doubtful: bool = False


@dataclass(frozen=True)
class AssetBand:
    """One band of one asset, counted from 1; 0 if only the file may name its bands."""

    asset: str
    band: int


def band_infos(asset: Asset) -> tuple[BandInfo, ...]:
    """Merge ``eo:bands``, ``raster:bands`` and STAC 1.1 ``bands``; empty without any of them.

    What the item or its collection says about a band of the same name completes it.
    """
    bands = _listed_bands(asset)
    if bands:
        return tuple(_band_info(band, asset) for band in bands)
    if asset.fields.get("eo:common_name") or asset.fields.get("data_type"):
        # STAC 1.1 lets a single band be described by its asset.
        return (_band_info(Metadata(asset.fields.owner, {}), asset),)
    return ()


def _listed_bands(asset: Asset) -> tuple[Metadata, ...]:
    """Metadata of each band, where the asset lists its bands."""
    lists = {
        key: found
        for key in ("raster:bands", "eo:bands", "bands")
        if (found := asset.fields.entries(key, asset.item_bands))
    }
    if len({len(found) for found in lists.values()}) > 1:
        counts = " and ".join(f"{len(found)} in {key}" for key, found in lists.items())
        raise ImageryError(
            "one number of bands",
            f"{counts} of {asset.fields.owner}",
            "correct them or remove one of them, or leave the item out",
        )
    return tuple(
        Metadata(
            parts[0].owner,
            {key: v for part in parts for key, v in part.items() if v is not None},
        )
        for parts in zip(*lists.values(), strict=True)
    )


def _band_info(band: Metadata, asset: Asset) -> BandInfo:
    name = band.text("name")
    for entry in asset.item_bands if name else ():
        if isinstance(entry, Mapping) and entry.get("name") == name:
            band = replace(band, content={**entry, **band})

    def owner(key: str) -> Metadata:
        return asset.fields if band.get(key) is None else band

    common = [t.lower() for key in ("common_name", "eo:common_name") if (t := owner(key).text(key))]
    others = [t.lower() for key in ("name", "description") if (t := band.text(key))]
    scales = [
        owner(f"raster:{key}").number(f"raster:{key}") or owner(key).number(key)
        for key in ("scale", "offset")
    ]
    colours = _colours_of(common, others)
    return BandInfo(
        words=(*common, *others),
        colour=next(iter(colours)) if len(colours) == 1 else None,
        dtype=_dtype(owner("data_type")),
        nodata=owner("nodata").nodata(),
        classes=_classes(owner("classification:classes")),
        scale=scales[0],
        offset=scales[1],
        doubtful=len(colours) > 1,
    )


def _colours_of(common: list[str], others: list[str]) -> set[str | None]:
    """Colours that names mean, None for another band; those of the common name if they agree."""
    exact: set[str | None] = {_COLOUR_NAMES[word] for word in others if word in _COLOUR_NAMES}
    named = exact or {colour for word in others if (colour := _colour_in(word))}
    meant = {_COLOUR_NAMES.get(word) for word in common}
    # A common name of another band, such as rededge071, may well have "red" in its description.
    return meant | (exact if meant == {None} else named)


def _colour_in(text: str) -> str | None:
    """Colour that a text is about: "Band 4 - Red", not "Red edge 1"."""
    words = set(re.findall("[a-z]+", text))
    colours = words.intersection(COLOURS)
    return colours.pop() if len(colours) == 1 and not words & _OTHERS else None


def _dtype(band: Metadata) -> str | None:
    name = band.text("data_type")
    if name is None or name == "other":
        return None
    if not _DTYPES.fullmatch(name):
        raise band.error("data_type", "as a type of real numbers, such as 'uint8'")
    return name


def _classes(band: Metadata) -> tuple[Metadata, ...]:
    classes = []
    for entry in band.entries("classification:classes"):
        value = entry.number("value", -(2**31), 2**32)
        if value is not None:
            if not value.is_integer():
                raise entry.error("value", "of a class as a whole number")
            classes.append(replace(entry, content={**entry, "value": int(value)}))
    return tuple(classes)


def find_colours(item: StacItem, bands: BandNames | None) -> dict[str, AssetBand]:
    """Find red, green and blue.

    Parameters
    ----------
    item : StacItem
        The item.
    bands : str or three of them, optional
        An asset, or red, green and blue as names of bands or assets, ``asset.number``, or numbers
        where the item has one image.

    Returns
    -------
    dict
        Band of red, green and blue, of a ``visual`` asset if there is one, else of a file that has
        all three colours, else of one file each; among equals cloud-optimised before other files,
        then by name.

    Raises
    ------
    ImageryError
        If the metadata do not name the colours, or contradict each other.

    Notes
    -----
    Common names go before names and descriptions of bands, these before names of assets. Band
    numbers such as B02 mean no colour. An image whose bands nothing names is left to its file.
    """
    if isinstance(bands, str):
        return _in_asset(item, bands)
    if bands is not None:
        return _named(item, bands)
    rasters = sorted(_rasters(item), key=_preference)
    for asset in rasters:
        infos = band_infos(asset)
        if _is_visual(asset) and _is_silent(infos):
            return _undescribed(item, asset)
        choice = _complete(item, asset, infos)
        if choice is not None:
            return choice
    return _one_file_each(item, rasters) or _only_file(item, rasters)


def find_band(item: StacItem, name: str) -> AssetBand:
    """Find one band, such as a mask, by asset, ``asset.number``, or name of the band.

    An ImageryError refuses an item that has no such band, and an asset of several.
    """
    if name in item.assets:
        found = len(band_infos(item.assets[name]))
        if found > 1:
            raise ImageryError(
                f"one band, as {name}.1",
                f"{found} bands in asset {name!r} of item {item}",
                f"name one of them: {_listed(item)}",
            )
        return AssetBand(name, 1)
    asset, _, number = name.rpartition(".")
    if asset in item.assets and number.isdecimal() and int(number) > 0:
        return AssetBand(asset, int(number))
    for raster in sorted(_rasters(item), key=_preference):
        same = [n for n, info in enumerate(band_infos(raster), 1) if name.lower() in info.words]
        if len(same) > 1:
            raise ImageryError(
                f"one band {name!r}",
                f"{len(same)} in asset {raster.name!r} of item {item}",
                "name it by its number: " + " or ".join(f"'{raster.name}.{n}'" for n in same),
            )
        if same:
            return AssetBand(raster.name, same[0])
    raise ImageryError(
        f"a band or asset {name!r} in every item",
        f"{_listed(item)} in item {item}",
        "leave such items out, or name a band they have",
    )


def _named(item: StacItem, bands: Sequence[str | int]) -> dict[str, AssetBand]:
    names = list(bands) if isinstance(bands, Sequence) or np.ndim(bands) == 1 else []
    numbers = [isinstance(name, Integral) and not isinstance(name, bool) for name in names]
    known = all(
        number or isinstance(name, str) for number, name in zip(numbers, names, strict=True)
    )
    if len(names) != 3 or not known or len(set(names)) != 3:
        raise ImageryError(
            "an asset, or three different bands as red, green, blue", f"bands={bands!r}", _ask(item)
        )
    if all(numbers):
        rasters = _rasters(item)
        if len(rasters) != 1:
            raise ImageryError(
                "band numbers for items with one image",
                f"{_listed(item)} in item {item}",
                f"say in which: {_ask(item)}",
            )
        names = [f"{rasters[0].name}.{number}" for number in names]
    return {c: find_band(item, str(band)) for c, band in zip(COLOURS, names, strict=True)}


def _in_asset(item: StacItem, name: str) -> dict[str, AssetBand]:
    if name not in item.assets:
        raise ImageryError(
            f"an asset {name!r} in every item",
            f"{_listed(item)} in item {item}",
            "leave such items out, or name an asset they have",
        )
    asset = item.assets[name]
    infos = band_infos(asset)
    choice = _complete(item, asset, infos)
    if choice is None and not _is_silent(infos):
        raise _no_colours(item, [asset])
    return choice or _undescribed(item, asset)


def _is_silent(infos: Sequence[BandInfo]) -> bool:
    """Whether the metadata do not name the bands, or only number them."""
    return all(_NUMBER.fullmatch(word) for info in infos for word in info.words)


def _undescribed(item: StacItem, asset: Asset) -> dict[str, AssetBand]:
    """Leave the bands of an asset to its file, which alone may name them."""
    if 0 < len(_listed_bands(asset)) < 3:
        raise _no_colours(item, [asset])
    order = _order_in(asset.name)
    if order not in (None, COLOURS) or _FALSE_COLOURS.search(asset.name.lower()):
        raise _no_colours(item, [asset], "named so and not described")
    return dict.fromkeys(COLOURS, AssetBand(asset.name, 0))


def _order_in(name: str) -> tuple[str, ...] | None:
    """Order of the colours that the name of an asset states."""
    found = _ORDER.search(name.lower())
    if found is None or len(set(found[1])) < 3:
        return None
    return tuple(_COLOUR_NAMES[letter] for letter in found[1])


def _complete(
    item: StacItem, asset: Asset, infos: Sequence[BandInfo]
) -> dict[str, AssetBand] | None:
    """All three colours in one asset."""
    if any(info.doubtful for info in infos):
        raise _no_colours(item, [asset], "whose names contradict each other")
    found = {colour: _band_of(item, asset, infos, colour) for colour in COLOURS}
    bands = {colour: AssetBand(asset.name, band) for colour, band in found.items() if band}
    if len(bands) < 3:
        return None
    order = tuple(sorted(COLOURS, key=lambda colour: bands[colour].band))
    if _order_in(asset.name) not in (None, order):
        raise _no_colours(item, [asset], "whose name states another order")
    return bands


def _band_of(item: StacItem, asset: Asset, infos: Sequence[BandInfo], colour: str) -> int | None:
    """Find the number of the band of one colour; of several, the only one called exactly so."""
    found = [number for number, info in enumerate(infos, 1) if info.colour == colour]
    most = max((infos[number - 1].words.count(colour) for number in found), default=0)
    best = [number for number in found if infos[number - 1].words.count(colour) == most]
    if len(best) > 1:
        raise _no_colours(item, [asset], f"of which {len(best)} are {colour}")
    return best[0] if best else None


def _one_file_each(item: StacItem, rasters: Sequence[Asset]) -> dict[str, AssetBand] | None:
    first: dict[str, AssetBand] = {}
    for asset in rasters:
        infos, name = band_infos(asset), asset.name.lower()
        for colour in COLOURS:
            band = _band_of(item, asset, infos, colour)
            if band:
                first.setdefault(colour, AssetBand(asset.name, band))
        if len(infos) > 1 or name not in _COLOUR_NAMES:
            continue
        if _is_silent(infos):
            first.setdefault(_COLOUR_NAMES[name], AssetBand(asset.name, 1))
        elif name in COLOURS and any(info.words and info.colour != name for info in infos):
            raise _no_colours(item, [asset], "whose name means another colour")
    return {colour: first[colour] for colour in COLOURS} if len(first) == 3 else None


def _only_file(item: StacItem, rasters: Sequence[Asset]) -> dict[str, AssetBand]:
    """Take a single image: as the item lists its bands; else undescribed, as its file may."""
    if len(rasters) != 1 or not _is_silent(band_infos(rasters[0])):
        raise _no_colours(item, rasters)
    (asset,) = rasters
    if not _listed_bands(asset):
        owner = Metadata(f"item {item}", {"bands": list(asset.item_bands)})
        infos = tuple(_band_info(band, asset) for band in owner.entries("bands"))
        choice = _complete(item, asset, infos)
        if choice is None and not _is_silent(infos):
            raise _no_colours(item, rasters, "though the item lists other bands")
        if choice is not None:
            return choice
    return _undescribed(item, asset)


def _no_colours(item: StacItem, assets: Sequence[Asset], why: str = "") -> ImageryError:
    """Say which bands there are, and ask for the colours; no order is proposed."""
    found = f"{_listed(item, assets)}{' ' if why else ''}{why} in item {item}"
    return ImageryError("red, green and blue bands", found, _ask(item))


def _ask(item: StacItem) -> str:
    """Ask for the bands of the colours, of all that the item may have."""
    names, known = [], True
    for asset in _rasters(item):
        count = len(_listed_bands(asset))
        known = known and count > 0
        names += [f"{asset.name}.{number}" for number in range(1, max(count, 1) + 1)]
    if known and len(names) < 3:
        return "leave such items out: they have no three bands"
    more = ["..."] if len(names) > _LISTED or not known else []
    listed = ", ".join([*map(repr, names[:_LISTED]), *more])
    return (
        f"name them in the order red, green, blue: xchmv2.load(..., bands=(...)), of {listed}; "
        "or name an asset"
    )


def _rasters(item: StacItem) -> list[Asset]:
    return [asset for asset in item.assets.values() if is_raster(asset)]


def is_raster(asset: Asset) -> bool:
    """Whether an asset is an image, by role, type or name."""
    if (asset.roles | {asset.name.lower()}) & _NOT_DATA:
        return False
    if asset.media_type:
        return _RASTER_TYPES.search(asset.media_type) is not None
    return "data" in asset.roles or _RASTER_NAMES.search(asset.href) is not None


def _is_visual(asset: Asset) -> bool:
    return "visual" in asset.roles or asset.name.lower() == "visual"


def _preference(asset: Asset) -> tuple[bool, bool, bool, str]:
    optimised = "profile=cloud-optimized" in asset.media_type
    return (not _is_visual(asset), not optimised, "jp2" in asset.media_type, asset.name)


def _listed(item: StacItem, rasters: Sequence[Asset] | None = None) -> str:
    """Assets and their bands, as a user may name them."""
    rasters = _rasters(item) if rasters is None else rasters
    if not rasters:
        return f"no image among the assets {sorted(item.assets)}"
    parts = []
    for asset in rasters:
        infos = band_infos(asset)
        names = [_words(info) for info in infos[:_LISTED]]
        names += ["..."] * (len(infos) > _LISTED)
        parts.append(f"{asset.name} ({', '.join(names)})" if names else asset.name)
    return f"assets {'; '.join(parts)}"


def _words(info: BandInfo) -> str:
    """First name of a band; all of them where they contradict each other."""
    words = [f"{word:.40}" for word in info.words]
    return (" = " if info.doubtful else "").join(words if info.doubtful else words[:1]) or "?"
