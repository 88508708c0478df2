"""The files and bands of an item that hold red, green and blue, and its mask."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from xchmv2.errors import ImageryError
from xchmv2.imagery import COLOUR_NAMES, COLOURS
from xchmv2.stac.items import Asset, StacItem

#: An asset; or names or numbers of red, green and blue.
BandNames = str | Sequence[str | int]

_NOT_DATA = {"thumbnail", "overview", "metadata", "tiles", "browse", "preview"}
_RASTER_TYPES = re.compile(r"image/(tiff|geotiff|vnd\.stac\.geotiff|jp2|png|jpeg|webp)|hdf|netcdf")
_RASTER_NAMES = re.compile(r"\.(tiff?|jp2|vrt|img)($|\?)", re.IGNORECASE)


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
    classes : tuple of mapping
        Classes of the classification extension.
    """

    words: tuple[str, ...]
    colour: str | None
    dtype: str | None
    nodata: float | None
    classes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class AssetBand:
    """One band of one asset, counted from 1; 0 if only the file may name its bands."""

    asset: str
    band: int


def band_infos(asset: Asset) -> tuple[BandInfo, ...]:
    """Merge ``eo:bands``, ``raster:bands`` and STAC 1.1 ``bands``; empty without any of them."""
    fields = asset.fields
    lists = [fields.get(key) or () for key in ("raster:bands", "eo:bands", "bands")]
    if not any(lists) and (fields.get("eo:common_name") or fields.get("data_type")):
        return (_band_info({}, fields),)  # STAC 1.1 lets a single band be described by its asset
    return tuple(
        _band_info({k: v for part in parts if part for k, v in part.items()}, fields)
        for parts in zip_longest(*lists)
    )


def _band_info(band: Mapping[str, Any], asset: Mapping[str, Any]) -> BandInfo:
    def find(key: str) -> Any:
        return band.get(key) if band.get(key) is not None else asset.get(key)

    common = [str(find(key)).lower() for key in ("common_name", "eo:common_name") if find(key)]
    others = [str(band[key]).lower() for key in ("name", "description") if band.get(key)]
    # Where there is a common name it decides: "B03" is green on one sensor and red on another.
    colours = {COLOUR_NAMES[word] for word in common or others if word in COLOUR_NAMES}
    return BandInfo(
        words=(*common, *others),
        colour=colours.pop() if len(colours) == 1 else None,
        dtype=str(find("data_type")) if find("data_type") else None,
        nodata=None if find("nodata") is None else float(find("nodata")),
        classes=tuple(find("classification:classes") or ()),
    )


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
        If the metadata do not name the colours.
    """
    if isinstance(bands, str):
        return _in_asset(item, bands)
    if bands is not None:
        return _named(item, bands)
    rasters = sorted(_rasters(item), key=_preference)
    infos = {asset.name: band_infos(asset) for asset in rasters}
    for asset in rasters:
        if _is_visual(asset) and not infos[asset.name]:
            return _undescribed(asset.name)
        choice = _complete(asset.name, infos[asset.name])
        if choice is not None:
            return choice
    return _one_file_each(infos) or _only_file(item, infos)


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
        for index, info in enumerate(band_infos(raster), start=1):
            if name.lower() in info.words:
                return AssetBand(raster.name, index)
    raise ImageryError(
        f"a band or asset {name!r} in every item",
        f"{_listed(item)} in item {item}",
        "leave such items out, or name a band they have",
    )


def _named(item: StacItem, bands: Sequence[str | int]) -> dict[str, AssetBand]:
    if len(bands) != 3 or len(set(bands)) != 3:
        raise ImageryError(
            "an asset, or three different bands as red, green, blue",
            f"bands={bands!r}",
            "for example xchmv2.load(..., bands=('image.1', 'image.2', 'image.3'))",
        )
    if all(isinstance(band, int) for band in bands):
        rasters = _rasters(item)
        if len(rasters) != 1:
            raise ImageryError(
                "band numbers for items with one image",
                f"{_listed(item)} in item {item}",
                "say in which: xchmv2.load(..., bands=('asset.1', 'asset.2', 'asset.3'))",
            )
        bands = [f"{rasters[0].name}.{band}" for band in bands]
    return {c: find_band(item, str(band)) for c, band in zip(COLOURS, bands, strict=True)}


def _in_asset(item: StacItem, name: str) -> dict[str, AssetBand]:
    if name not in item.assets:
        raise ImageryError(
            f"an asset {name!r} in every item",
            f"{_listed(item)} in item {item}",
            "leave such items out, or name an asset they have",
        )
    return _complete(name, band_infos(item.assets[name])) or _undescribed(name)


def _undescribed(name: str) -> dict[str, AssetBand]:
    """Leave the bands of an asset to its file, which alone may name them."""
    return dict.fromkeys(COLOURS, AssetBand(name, 0))


def _complete(name: str, infos: Sequence[BandInfo]) -> dict[str, AssetBand] | None:
    """All three colours in one asset."""
    colours = [info.colour for info in infos]
    if not set(COLOURS) <= set(colours):
        return None
    return {colour: AssetBand(name, colours.index(colour) + 1) for colour in COLOURS}


def _one_file_each(infos: Mapping[str, Sequence[BandInfo]]) -> dict[str, AssetBand] | None:
    first: dict[str, AssetBand] = {}
    for name, bands in infos.items():
        for index, info in enumerate(bands, start=1):
            if info.colour:
                first.setdefault(info.colour, AssetBand(name, index))
        if not bands and name.lower() in COLOUR_NAMES:
            first.setdefault(COLOUR_NAMES[name.lower()], AssetBand(name, 1))
    return {colour: first[colour] for colour in COLOURS} if len(first) == 3 else None


def _only_file(item: StacItem, infos: Mapping[str, Sequence[BandInfo]]) -> dict[str, AssetBand]:
    """Take a single image whose bands the metadata do not describe: its file may."""
    if len(infos) == 1:
        ((name, bands),) = infos.items()
        if not any(info.words for info in bands):
            return _undescribed(name)
    raise ImageryError(
        "red, green and blue bands",
        f"{_listed(item)} in item {item}",
        "name them: xchmv2.load(..., bands=('asset.1', 'asset.2', 'asset.3')), or an asset",
    )


def _rasters(item: StacItem) -> list[Asset]:
    return [asset for asset in item.assets.values() if _is_raster(asset)]


def _is_raster(asset: Asset) -> bool:
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


def _listed(item: StacItem) -> str:
    """Assets and their bands, as a user may name them."""
    rasters = _rasters(item)
    if not rasters:
        return f"no image among the assets {sorted(item.assets)}"
    parts = []
    for asset in rasters:
        names = [info.words[0] if info.words else "?" for info in band_infos(asset)]
        parts.append(f"{asset.name} ({', '.join(names)})" if names else asset.name)
    return f"assets {'; '.join(parts)}"
