"""The files and bands of an item that hold red, green and blue, and its mask and clear pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import ImageryError
from xchmv2.imagery import COLOUR_NAMES, COLOURS, read_colour
from xchmv2.raster import is_whole, show
from xchmv2.stac.items import Asset, Metadata, StacItem

#: An asset; or names or numbers of red, green and blue.
BandNames = str | Sequence[str | int]

_NOT_DATA = {"thumbnail", "overview", "metadata", "tiles", "browse", "preview"}
_RASTER_TYPES = re.compile(r"image/(tiff|geotiff|vnd\.stac\.geotiff|jp2|png|jpeg|webp)|hdf|netcdf")
_RASTER_NAMES = re.compile(r"\.(tiff?|jp2|vrt|img)($|\?)", re.IGNORECASE)

#: Letters in the name of an asset that say in which order its bands are; or that it is not RGB.
_ORDER = re.compile(r"(?<![a-z])([rgb]{3})(n|nir|ir|a)?(?![a-z])")
_FALSE_COLOURS = re.compile(r"(?<![a-z])(nrg|irrg|cir|nir|false|pseudo)")
_DTYPES = re.compile(r"u?int(8|16|32|64)|float(16|32|64)")
_LISTED = 8  # bands in a message


@dataclass(frozen=True)
class BandInfo:
    """Metadata of one band."""

    #: Its names in lower case, the common name first.
    words: tuple[str, ...] = ()
    #: Red, green or blue, if the names mean one.
    colour: str | None = None
    dtype: str | None = None
    nodata: float | None = None
    #: Classes of the classification extension, each with a whole number as its value.
    classes: tuple[Mapping[str, Any], ...] = ()
    #: Of physical values: stored value * scale + offset.
    scale: float | None = None
    offset: float | None = None
    #: Whether its names mean several colours.
    doubtful: bool = False

    @property
    def scaling(self) -> tuple[float, float] | None:
        """Scale and offset; None if neither is stated."""
        if self.scale is None and self.offset is None:
            return None
        return (1.0 if self.scale is None else self.scale, self.offset or 0.0)


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
    if not bands and (asset.fields.get("eo:common_name") or asset.fields.get("data_type")):
        bands = (Metadata(asset.fields.owner, {}),)  # a single band may be described by its asset
    return tuple(_band_info(band, asset) for band in bands)


def band_info(asset: Asset, number: int) -> BandInfo:
    """Read what is said of one band, or of the asset for all of them."""
    bands = _listed_bands(asset)
    listed = number <= len(bands)
    return _band_info(bands[number - 1] if listed else Metadata(asset.fields.owner, {}), asset)


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
    merged = []
    for parts in zip(*lists.values(), strict=True):
        content = {key: value for part in parts for key, value in part.items() if value is not None}
        merged.append(Metadata(parts[0].owner, content))
    return tuple(merged)


def _band_info(band: Metadata, asset: Asset) -> BandInfo:
    name = band.text("name")
    for entry in asset.item_bands if name else ():
        if isinstance(entry, Mapping) and entry.get("name") == name:
            band = Metadata(band.owner, {**entry, **band})

    def owner(key: str) -> Metadata:
        return asset.fields if band.get(key) is None else band

    def scaled(key: str) -> float | None:
        found = owner(f"raster:{key}").number(f"raster:{key}")
        return owner(key).number(key) if found is None else found

    common = [t.lower() for key in ("common_name", "eo:common_name") if (t := owner(key).text(key))]
    others = [t.lower() for key in ("name", "description") if (t := band.text(key))]
    colours = _colours_of(common, others)
    return BandInfo(
        words=(*common, *others),
        colour=next(iter(colours)) if len(colours) == 1 else None,
        dtype=_dtype(owner("data_type")),
        nodata=owner("nodata").nodata(),
        classes=_classes(owner("classification:classes")),
        scale=scaled("scale"),
        offset=scaled("offset"),
        doubtful=len(colours) > 1,
    )


def _colours_of(common: list[str], others: list[str]) -> set[str | None]:
    """Colours that names mean, None for another band; those of the common name if they agree."""
    exact = {COLOUR_NAMES[word] for word in others if word in COLOUR_NAMES}
    meant: set[str | None] = {COLOUR_NAMES.get(word) for word in common}
    if exact or meant == {None}:
        # A common name of another band, such as rededge071, may well have "red" in its description.
        return meant | exact
    return meant | (set(map(read_colour, others)) & set(COLOURS))


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
            classes.append(Metadata(entry.owner, {**entry, "value": int(value)}))
    return tuple(classes)


def find_colours(item: StacItem, bands: BandNames | None) -> dict[str, AssetBand]:
    """Find red, green and blue; an ImageryError asks for them where the metadata name none.

    ``bands`` are an asset, or red, green and blue as names of bands or assets, ``asset.number``,
    or numbers where the item has one image. Else a ``visual`` asset is taken, or a file that has
    all three colours, or one file each; among equals cloud-optimised before other files, then by
    name. Common names go before names and descriptions of bands, these before names of assets.
    An image whose bands nothing names is left to its file.
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
        if choice:
            return choice
    return _one_file_each(item, rasters) or _only_file(item, rasters)


def find_band(item: StacItem, name: str) -> AssetBand:
    """Find one band, such as a mask, by asset, ``asset.number``, or name of the band.

    An ImageryError refuses an item that has no such band, and an asset of several.
    """
    if name in item.assets:
        if len(band_infos(item.assets[name])) > 1:
            raise _refused(item, f"one band, as {name}.1", "name one of them", name)
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
    fix = "leave such items out, or name a band they have"
    raise _refused(item, f"a band or asset {name!r} in every item", fix)


def _named(item: StacItem, bands: Sequence[str | int]) -> dict[str, AssetBand]:
    names = list(bands) if isinstance(bands, Sequence) or np.ndim(bands) == 1 else []
    known = all(is_whole(name) or isinstance(name, str) for name in names)
    if len(names) != 3 or not known or len(set(names)) != 3:
        expected = "an asset, or three different bands as red, green, blue"
        raise ImageryError(expected, f"bands={bands!r}", ask_for_bands(item))
    if all(map(is_whole, names)):
        rasters = _rasters(item)
        if len(rasters) != 1:
            expected = "band numbers for items with one image"
            raise _refused(item, expected, f"say in which: {ask_for_bands(item)}")
        names = [f"{rasters[0].name}.{number}" for number in names]
    return {c: find_band(item, str(band)) for c, band in zip(COLOURS, names, strict=True)}


def _in_asset(item: StacItem, name: str) -> dict[str, AssetBand]:
    if name not in item.assets:
        fix = "leave such items out, or name an asset they have"
        raise _refused(item, f"an asset {name!r} in every item", fix)
    asset = item.assets[name]
    infos = band_infos(asset)
    choice = _complete(item, asset, infos)
    if not choice and not _is_silent(infos):
        raise _no_colours(item, [asset])
    return choice or _undescribed(item, asset)


def _is_silent(infos: Sequence[BandInfo]) -> bool:
    """Whether the metadata do not name the bands, or only number them."""
    return all(read_colour(word) == "" for info in infos for word in info.words)


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
    return tuple(COLOUR_NAMES[letter] for letter in found[1])


def _complete(
    item: StacItem, asset: Asset, infos: Sequence[BandInfo]
) -> dict[str, AssetBand] | None:
    if any(info.doubtful for info in infos):
        raise _no_colours(item, [asset], "whose names contradict each other")
    found = {colour: _band_of(item, asset, infos, colour) for colour in COLOURS}
    if not all(found.values()):
        return None
    if _order_in(asset.name) not in (None, tuple(sorted(COLOURS, key=found.__getitem__))):
        raise _no_colours(item, [asset], "whose name states another order")
    return {colour: AssetBand(asset.name, band) for colour, band in found.items()}


def _band_of(item: StacItem, asset: Asset, infos: Sequence[BandInfo], colour: str) -> int:
    """Find the number of the band of a colour, else 0; of several, the one called exactly so."""
    exact = {
        n: info.words.count(colour) for n, info in enumerate(infos, 1) if info.colour == colour
    }
    best = [number for number, count in exact.items() if count == max(exact.values())]
    if len(best) > 1:
        raise _no_colours(item, [asset], f"of which {len(best)} are {colour}")
    return best[0] if best else 0


def _one_file_each(item: StacItem, rasters: Sequence[Asset]) -> dict[str, AssetBand] | None:
    first: dict[str, AssetBand] = {}
    for asset in rasters:
        infos, name = band_infos(asset), asset.name.lower()
        for colour in COLOURS:
            band = _band_of(item, asset, infos, colour)
            if band:
                first.setdefault(colour, AssetBand(asset.name, band))
        if len(infos) > 1 or name not in COLOUR_NAMES:
            continue
        if _is_silent(infos):
            first.setdefault(COLOUR_NAMES[name], AssetBand(asset.name, 1))
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
        if choice:
            return choice
        if not _is_silent(infos):
            raise _no_colours(item, rasters, "though the item lists other bands")
    return _undescribed(item, asset)


def _no_colours(item: StacItem, assets: Sequence[Asset], why: str = "") -> ImageryError:
    names = [asset.name for asset in assets]
    return _refused(item, "red, green and blue bands", ask_for_bands(item), *names, why=why)


def _refused(item: StacItem, expected: str, fix: str, *assets: str, why: str = "") -> ImageryError:
    """Error that lists images of an item, by default all, and their bands."""
    parts = []
    for name in assets or [asset.name for asset in _rasters(item)]:
        infos = band_infos(item.assets[name])
        names = [_words(info) for info in infos[:_LISTED]] + ["..."] * (len(infos) > _LISTED)
        parts.append(f"{name} ({', '.join(names)})" if names else name)
    listed = "; ".join(parts)
    found = f"assets {listed}" if parts else f"no image among the assets {sorted(item.assets)}"
    return ImageryError(expected, f"{found}{why and ' '}{why} in item {item}", fix)


def ask_for_bands(item: StacItem, counts: Mapping[str, int] | None = None) -> str:
    """Ask for the bands of the colours, of all that the item may have; no order is proposed.

    ``counts`` are the numbers of bands of assets whose file was opened.
    """
    rasters, names, known = _rasters(item), [], True
    for asset in rasters:
        count = (counts or {}).get(asset.name) or len(_listed_bands(asset))
        known = known and count > 0
        names += [f"{asset.name}.{number}" for number in range(1, max(count, 1) + 1)]
    if known and len(names) < 3:
        return "leave such items out: they have no three bands"
    more = ["..."] if len(names) > _LISTED or not known else []
    listed = ", ".join([*map(repr, names[:_LISTED]), *more])
    other = "; or name an asset" if len(rasters) > 1 else ""
    order = "name them in the order red, green, blue: xchmv2.load(..., bands=(...))"
    return f"{order}, of {listed}{other}"


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


def _words(info: BandInfo) -> str:
    """First name of a band; all of them where they contradict each other."""
    words = [f"{word:.40}" for word in info.words]
    return (" = " if info.doubtful else "").join(words if info.doubtful else words[:1]) or "?"


#: Values that mean a clear view, or a function from the mask's values to booleans.
ClearValues = int | Sequence[int] | Callable[[xr.DataArray], xr.DataArray]

#: Clear values of masks whose items do not describe them.
_KNOWN: dict[str, tuple[int, ...]] = {"cloud-mask-raster": (1,)}  # Maxar ARD: 2 cloud, 3 shadow
_CLEAR_NAMES = re.compile(r"clear|valid|alpha")
_NO_DATA = re.compile(r"no.?data|missing|fill|invalid|defective|unusable|saturated", re.IGNORECASE)
_FREE = re.compile(r"clear|free|(^|[^a-z])(no|not|non)[ _-]?(cloud|shadow)", re.IGNORECASE)
_VEILED = re.compile(r"cloud|shadow|cirrus|haze|fog|smoke", re.IGNORECASE)


@dataclass(frozen=True)
class ClearRule:
    """Rule for the clear pixels of a mask: by values; by a function; else all but 0 and ``fill``.

    ``fill`` is the value where there is no mask.
    """

    values: tuple[int, ...] | None
    function: Callable[[xr.DataArray], xr.DataArray] | None
    fill: float

    def __call__(self, mask: xr.DataArray) -> xr.DataArray:
        """Turn a mask's values into booleans, lazily."""
        if self.values is not None:
            return mask.isin(self.values)
        known = mask.notnull() if np.isnan(self.fill) else mask != self.fill
        if self.function is None:
            return (mask != 0) & known
        clear = self.function(mask)
        dtype, dims = getattr(clear, "dtype", type(clear).__name__), getattr(clear, "dims", ())
        if str(dtype) != "bool" or dims != mask.dims:
            raise ImageryError(
                "clear_values to return booleans with the mask's own dims",
                f"{dtype} with dims {dims}",
                "for example clear_values=lambda mask: (mask & 8) == 0",
            )
        return clear & known


def resolve_clear(
    name: str,
    info: BandInfo,
    dtype: str,
    nodata: float | None,
    values: ClearValues | None,
    item: object = "",
) -> ClearRule:
    """Decide which values of a mask mean clear.

    Those of the user, else those that its metadata or name state beyond doubt; otherwise an
    ImageryError that names the ``item``.
    """
    if callable(values):
        return ClearRule(None, values, _unlikely(dtype) if nodata is None else nodata)
    clear = _KNOWN.get(name)
    if values is not None:
        clear = tuple(np.atleast_1d(values).tolist())
    elif info.classes:
        clear = tuple(int(entry["value"]) for entry in info.classes if _is_clear(entry))
        if not clear:
            raise ImageryError(
                "a mask with a class for a clear view",
                f"{class_names(info)} in {name!r} of item {item}",
                "say which values are clear: xchmv2.load(..., clear_values=...)",
            )
    if clear is not None:
        unused = 0 if 0 not in clear else _unlikely(dtype, clear)
        return ClearRule(clear, None, unused if nodata is None or nodata in clear else nodata)
    words = [name.lower(), *info.words]
    if any(_CLEAR_NAMES.search(word) for word in words) and not any(map(_VEILED.search, words)):
        return ClearRule(None, None, 0 if nodata is None else nodata)
    raise ImageryError(
        "the values of the mask that mean a clear view",
        f"nothing about them in the metadata of {name!r} of item {item}",
        "say which: xchmv2.load(..., clear_values=0), a tuple of values, or a function",
    )


def class_names(info: BandInfo) -> str:
    """List the classes of a mask for a message."""
    return "classes " + show([f"{entry['value']} {entry.get('name')}" for entry in info.classes])


def _is_clear(entry: Any) -> bool:
    name = str(entry.get("name") or entry.get("description") or "")
    if entry.get("nodata") or _NO_DATA.search(name):
        return False
    return bool(_FREE.search(name)) or not _VEILED.search(name)


def _unlikely(dtype: str, but: Sequence[int] = ()) -> float:
    """Find a value that the mask hardly uses: the largest but those that mean clear."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return float("nan")
    largest = int(np.iinfo(kind).max)
    return float(next(largest - step for step in range(largest) if largest - step not in but))
