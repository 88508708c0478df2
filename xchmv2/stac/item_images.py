"""Items as images: bands, grids and values from metadata and file headers."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from odc.geo import CRS, Geometry
from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.stac.asset_bands import (
    AssetBand,
    BandInfo,
    BandNames,
    band_infos,
    find_band,
    find_colours,
)
from xchmv2.stac.grids import DEGREES, declared_geobox, footprint, pixel_on_ground, validate_pixel
from xchmv2.stac.image_files import (
    UNSCALED,
    FileBands,
    Header,
    Scale,
    Sign,
    fits,
    read_headers,
    scale_call,
)
from xchmv2.stac.items import Asset, StacItem

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class ItemImage:
    """An item as an image that can be loaded.

    Parameters
    ----------
    item : StacItem
        The item.
    sources : mapping
        Band of each variable: red, green, blue and, with a cloud mask, valid. Empty if a file
        cannot be read.
    hrefs : mapping
        Address of each asset, not signed.
    boxes : mapping
        Pixel grid of each asset, where known.
    bands : mapping
        Metadata of each variable's band, completed by the header of the file.
    unreadable : int
        Number of files that cannot be read.
    scales : mapping
        Scale and offset of each variable's band.
    named : bool
        Whether the metadata say which band is which colour.
    """

    item: StacItem
    sources: Mapping[str, AssetBand]
    hrefs: Mapping[str, str]
    boxes: Mapping[str, GeoBox]
    bands: Mapping[str, BandInfo]
    unreadable: int = 0
    scales: Mapping[str, Scale] = field(default_factory=dict)
    named: bool = False

    @property
    def order(self) -> tuple[object, ...]:
        """Place in a mosaic and among dates, whatever the order of the items."""
        item = self.item
        return (item.time, item.collection, item.id, tuple(sorted(self.hrefs.values())))

    def files(self, names: Sequence[str], converted: bool = False) -> tuple[FileBands, ...]:
        """Files that hold some variables; ``converted`` is whether any data type will do."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.sources[name].asset, []).append(name)
        return tuple(self._file(asset, part, converted) for asset, part in found.items())

    def _file(self, asset: str, names: Sequence[str], converted: bool) -> FileBands:
        sources = [self.sources[name] for name in names]
        infos = band_infos(self.item.assets[asset])
        stated = [infos[s.band - 1] if s.band <= len(infos) else None for s in sources]
        return FileBands(
            href=self.hrefs[asset],
            item=str(self.item),
            id=self.item.id,
            asset=asset,
            bands=tuple(source.band for source in sources),
            box=self.boxes[asset],
            dtypes=tuple(None if converted else self.bands[name].dtype for name in names),
            nodata=tuple(info.nodata if info else None for info in stated),
            scales=tuple(self.scales[name] for name in names),
            colours=tuple(names) if self.named and names[0] in COLOURS else (),
            names=tuple(info.words[0] if info.words else "" for info in infos),
            declared=all(info is not None and info.dtype is not None for info in stated),
            scaled=all(_stated_scale(self.item, s) is not None for s in sources),
        )

    @cached_property
    def geobox(self) -> GeoBox | None:
        """Grid of the imagery, the coarsest if its colours have several; None if unknown."""
        found = {
            source.asset: self.boxes[source.asset]
            for name, source in self.sources.items()
            if name in COLOURS and source.asset in self.boxes
        } or self.boxes
        return max(found.values(), key=pixel_on_ground) if found else None

    def outline(self, crs: CRS) -> Geometry | None:
        """Outline of the grid, else of the item; None if neither is known."""
        if self.geobox is not None:
            return footprint(self.geobox, crs)
        if self.item.geometry is None:
            return None
        return Geometry(dict(self.item.geometry), DEGREES).to_crs(crs)


@dataclass(frozen=True)
class BandValues:
    """Data type of a variable as stored, and its nodata value if it has one."""

    dtype: str
    nodata: float | None

    @property
    def fill(self) -> float:
        """Value of pixels that no image covers."""
        if self.nodata is not None:
            return self.nodata
        return math.nan if np.dtype(self.dtype).kind == "f" else 0


def find_images(
    items: Sequence[StacItem],
    *,
    bands: BandNames | None,
    cloud_mask: str | None,
    sign: Sign | None,
    patch: Sign | None = None,
    tolerant: bool = False,
    values_known: bool = False,
) -> list[ItemImage]:
    """Find bands, grid and values of each item, opening as few files as possible.

    Parameters
    ----------
    items : sequence of StacItem
        The items.
    bands, cloud_mask
        As of :func:`xchmv2.load`.
    sign, patch : callable, optional
        Makes an address open; turns an item's address into another one before that.
    tolerant : bool
        Whether files that do not open are counted instead of refused: then all are tried.
    values_known : bool
        Whether the user gives data type and nodata value, so that no file is opened for them.

    Returns
    -------
    list of ItemImage
        One for each item.

    Raises
    ------
    ImageryError
        If bands cannot be found, a file does not open, or it has no CRS.

    Notes
    -----
    Headers are read from every file whose grid or bands the metadata lack, and from the
    first file in time of each collection and asset where they lack data type or nodata value.
    All files are compared with what was assumed when their pixels are read.
    """
    drafts = [_Draft.of(item, bands, cloud_mask, patch) for item in items]
    for draft in drafts:
        draft.validate_pixels()
    headers = read_headers(_hrefs_to_open(drafts, tolerant, values_known), sign)
    errors = [found for found in headers.values() if isinstance(found, ImageryError)]
    if errors and not tolerant:
        raise errors[0]
    known = {href: h for href, h in headers.items() if not isinstance(h, ImageryError)}
    typical: dict[tuple[str, str], Header] = {}
    for draft in _in_time(drafts):
        for asset, href in draft.hrefs.items():
            if href in known:
                typical.setdefault(draft.kind(asset), known[href])
    return [draft.completed(headers, known, typical) for draft in drafts]


@dataclass(frozen=True, eq=False)
class _Draft:
    """An image before any file was opened, with the band of each variable."""

    item: StacItem
    choice: Mapping[str, AssetBand]
    hrefs: Mapping[str, str]
    named: bool

    @classmethod
    def of(
        cls,
        item: StacItem,
        bands: BandNames | None,
        cloud_mask: str | None,
        patch: Sign | None,
    ) -> _Draft:
        choice = find_colours(item, bands)
        if cloud_mask is not None:
            choice["valid"] = find_band(item, cloud_mask)
        hrefs = {source.asset: item.assets[source.asset].href for source in choice.values()}
        if patch is not None:
            hrefs = {name: patch(href) for name, href in hrefs.items()}
        return cls(item, choice, hrefs, named=bands is None or isinstance(bands, str))

    @property
    def sources(self) -> dict[str, AssetBand]:
        """Band of each variable, where the metadata name it."""
        return {name: source for name, source in self.choice.items() if source.band}

    @property
    def imagery(self) -> list[str]:
        """Assets of red, green and blue."""
        return list(dict.fromkeys(self.choice[colour].asset for colour in COLOURS))

    def kind(self, asset: str) -> tuple[str, str]:
        """Name the kind of a file: files of one kind share data type and nodata value."""
        return (self.item.collection or f"item {self.item.id}", asset)

    def silent(self) -> list[str]:
        """Assets whose grid or bands the metadata lack."""
        without = [name for name in self.hrefs if self.declared(name) is None]
        return without if self.choice["red"].band else self.imagery + without

    def declared(self, asset: str) -> GeoBox | None:
        return declared_geobox(self.item.assets[asset], self.item.properties)

    def validate_pixels(self) -> None:
        """Refuse imagery that is too coarse before any file is opened."""
        for asset in self.imagery:
            box = self.declared(asset)
            if box is not None:
                validate_pixel(self.item, pixel_on_ground(box))

    def vague(self) -> list[str]:
        """Assets whose data type or nodata value the metadata do not tell."""
        infos = [(source, self.info(source)) for source in self.sources.values()]
        return [s.asset for s, i in infos if i is None or i.dtype is None or i.nodata is None]

    def info(self, source: AssetBand) -> BandInfo | None:
        infos = band_infos(self.item.assets[source.asset])
        return infos[source.band - 1] if source.band <= len(infos) else None

    def completed(
        self,
        headers: Mapping[str, Header | ImageryError],
        known: Mapping[str, Header],
        typical: Mapping[tuple[str, str], Header],
    ) -> ItemImage:
        """Add the headers of files that were opened, else those of files of the same kind."""
        failed = sum(isinstance(headers.get(h), ImageryError) for h in set(self.hrefs.values()))
        boxes = {}
        for asset, href in self.hrefs.items():
            box = (known[href].geobox if href in known else None) or self.declared(asset)
            if box is not None:
                boxes[asset] = box
            elif not failed:
                raise _no_crs(self.item, asset)
        if failed:
            boxes = {asset: box for asset, box in boxes.items() if asset in self.imagery}
            return ItemImage(self.item, {}, self.hrefs, boxes, {}, failed)
        sources = self.sources
        if not self.choice["red"].band:
            (asset,) = self.imagery
            sources = _told_by_file(self.item, asset, known[self.hrefs[asset]]) | sources
        bands, scales = {}, {}
        for name, source in sources.items():
            own, like = known.get(self.hrefs[source.asset]), typical.get(self.kind(source.asset))
            bands[name] = self._values(name, source, own, like)
            stated, header = _stated_scale(self.item, source), own or like
            scales[name] = stated or (header.scales[source.band - 1] if header else UNSCALED)
        named = self.named and self.choice["red"].band > 0
        image = ItemImage(self.item, sources, self.hrefs, boxes, bands, 0, scales, named)
        for file in (*image.files(COLOURS), *image.files([n for n in sources if n == "valid"])):
            if file.href in known:
                file.verify_bands(known[file.href])
        return image

    def _values(
        self, name: str, source: AssetBand, own: Header | None, like: Header | None
    ) -> BandInfo:
        """Metadata of a band: those of its file before the item's, and those of like files last."""
        info = self.info(source) or BandInfo((), None, None, None)
        for header in (own, like):
            if header is not None and source.band > len(header.dtypes):
                raise ImageryError(
                    f"band {source.band} for {name} in asset {source.asset!r}",
                    f"{len(header.dtypes)} bands in its file: item {self.item}",
                    "name others: xchmv2.load(..., bands=('asset.1', 'asset.2', 'asset.3'))",
                )
        told = [
            (header.dtypes[source.band - 1], header.nodata[source.band - 1])
            if header
            else (None,) * 2
            for header in (own, like)
        ]
        (dtype, nodata), (likely, empty) = told
        return replace(
            info,
            dtype=dtype or info.dtype or likely,
            nodata=next((v for v in (nodata, info.nodata, empty) if v is not None), None),
        )


def _in_time(drafts: Iterable[_Draft]) -> list[_Draft]:
    """Order by time, collection and id: what is learned does not depend on the order of items."""
    return sorted(drafts, key=lambda d: (d.item.time, d.item.collection, d.item.id))


def _stated_scale(item: StacItem, source: AssetBand) -> Scale | None:
    """Scale and offset that the metadata of an item state for a band; None if they do not."""
    found: list[float | None] = []
    for name in ("scale", "offset"):
        value = _band_field(item.assets[source.asset], source.band, name)
        try:
            found.append(None if value is None else float(value))
        except (TypeError, ValueError):
            raise ImageryError(
                f"a number as {name} of asset {source.asset!r} in item {item}",
                f"{value!r}",
                f"correct it: item.assets[{source.asset!r}].extra_fields['raster:bands']",
            ) from None
    if found == [None, None]:
        return None
    scale, offset = found
    return (1.0 if scale is None else scale, 0.0 if offset is None else offset)


def _band_field(asset: Asset, band: int, name: str) -> Any:
    """Field of a band in ``raster:bands`` or STAC 1.1 ``bands``, else of the whole asset."""
    for key, prefix in (("raster:bands", ""), ("bands", "raster:")):
        entries = asset.fields.get(key)
        if isinstance(entries, list | tuple) and 0 < band <= len(entries):
            entry = entries[band - 1]
            if isinstance(entry, Mapping) and entry.get(prefix + name) is not None:
                return entry[prefix + name]
    return asset.fields.get(f"raster:{name}")


def _hrefs_to_open(drafts: Sequence[_Draft], tolerant: bool, values_known: bool) -> Iterable[str]:
    asked: set[tuple[str, str]] = set()
    for draft in _in_time(drafts):
        yield from (draft.hrefs[asset] for asset in draft.silent())
        if tolerant:
            yield from draft.hrefs.values()
        elif not values_known or "valid" in draft.choice:
            for asset in draft.vague():
                if draft.kind(asset) not in asked:
                    asked.add(draft.kind(asset))
                    yield draft.hrefs[asset]


def _told_by_file(item: StacItem, asset: str, header: Header) -> dict[str, AssetBand]:
    """Colours as the file names them; three bands are red, green and blue."""
    colours = header.colours
    if set(COLOURS) <= set(colours):
        return {colour: AssetBand(asset, colours.index(colour) + 1) for colour in COLOURS}
    if len(colours) == 3:
        return {colour: AssetBand(asset, band) for band, colour in enumerate(COLOURS, start=1)}
    raise ImageryError(
        "red, green and blue bands",
        f"{len(colours)} bands without names in asset {asset!r} of item {item}",
        f"name them: xchmv2.load(..., bands=('{asset}.1', '{asset}.2', '{asset}.3'))",
    )


def _no_crs(item: StacItem, asset: str) -> ImageryError:
    return ImageryError(
        "georeferenced imagery",
        f"neither the projection extension nor a CRS in the file: asset {asset!r} of item {item}",
        "add proj:code, proj:shape and proj:transform to the item, or leave it out",
    )


def resolve_values(
    images: Sequence[ItemImage], names: Sequence[str], dtype: str | None, nodata: float | None
) -> BandValues:
    """Find the data type that the files of some variables share, and one nodata value for all.

    ``dtype`` and ``nodata`` of the user override them; else an ImageryError refuses files of
    several data types. Of several nodata values the most frequent stands for all on the cube, as
    each file's own holds while it is read. Floats are NaN there. A CHMv2Error refuses a nodata
    value of the user's that the data type cannot hold.
    """
    read = sorted((p for p in images if p.sources), key=lambda image: image.order)
    if dtype is None:
        types: dict[str, ItemImage] = {}
        for image in read:
            for name in names:
                types.setdefault(str(image.bands[name].dtype), image)
        dtype = _only(types)
    if nodata is not None and not fits(nodata, dtype):
        raise CHMv2Error(
            f"nodata as a number that {dtype} can hold",
            f"nodata={nodata:g}",
            "leave it out to believe the files, or for example xchmv2.load(..., nodata=0)",
        )
    if nodata is not None or np.dtype(dtype).kind == "f":
        return BandValues(dtype, nodata)
    found = [image.bands[name].nodata for image in read for name in names]
    counts = Counter(value for value in found if value is not None)
    for value in [value for value in counts if not fits(value, dtype)]:
        del counts[value]
        if not math.isnan(value):
            warnings.warn(
                f"nodata value {value:g} is ignored: {dtype} cannot hold it", stacklevel=3
            )
    usual = min(counts, key=lambda value: (-counts[value], value), default=None)
    return BandValues(dtype, usual)


def _only(types: Mapping[str, ItemImage]) -> str:
    if len(types) > 1:
        image = list(types.values())[-1]
        raise ImageryError(
            "imagery of one data type",
            ", ".join(f"{value} in {image.item}" for value, image in types.items()),
            "load each kind apart, such as "
            f"xchmv2.load([item for item in items if item.id == {image.item.id!r}])",
        )
    return next(iter(types))


def validate_scales(images: Sequence[ItemImage]) -> None:
    """Refuse items of several scales; where all share one, the stored numbers are kept."""
    kinds: dict[tuple[Scale, ...], list[ItemImage]] = {}
    for image in sorted(images, key=lambda image: image.order):
        if image.sources:
            kinds.setdefault(tuple(image.scales[name] for name in COLOURS), []).append(image)
    if len(kinds) == 1 and len(set(next(iter(kinds)))) > 1:
        calls = [f"{c}=cube.{c}{scale_call(s)}" for c, s in zip(COLOURS, *kinds, strict=True)]
        warnings.warn(
            "stored numbers of red, green and blue have different scales and are loaded as they "
            f"are; scale them: cube.assign({', '.join(calls)})",
            stacklevel=3,
        )
    if len(kinds) < 2:
        return
    found, calls = [], []
    for (scale, *_), some in kinds.items():
        ids = [image.item.id for image in some]
        found.append(f"scale {scale[0]:g} and offset {scale[1]:g} in {', '.join(ids)}")
        items = f"[item for item in items if item.id in {ids}]"
        calls.append(f"xchmv2.load({items}, dtype='float32'){scale_call(scale)}")
    raise ImageryError(
        "imagery of one scale and offset",
        "; ".join(found),
        f"load each kind apart and scale it: {' and '.join(calls)}",
    )
