"""Items as images: bands, grids and values from metadata and file headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from odc.geo import CRS, Geometry
from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error, ImageryError, warn
from xchmv2.imagery import COLOURS
from xchmv2.raster import can_hold
from xchmv2.stac.asset_bands import (
    AssetBand,
    BandInfo,
    BandNames,
    ask_for_bands,
    band_info,
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
    Unreadable,
    only_items,
    read_headers,
    scale_call,
    scale_words,
    validate_sign,
)
from xchmv2.stac.items import StacItem


@dataclass(frozen=True, eq=False)
class ItemImage:
    """An item as an image: its bands as the metadata tell, then completed by headers of files."""

    item: StacItem
    #: Band of red, green and blue and, with a cloud mask, of valid; none if a file is unreadable.
    sources: Mapping[str, AssetBand]
    #: Address of each asset, not signed.
    hrefs: Mapping[str, str]
    #: Whether the metadata say which band is which colour.
    named: bool
    #: Pixel grid of each asset, where known.
    boxes: Mapping[str, GeoBox] = field(default_factory=dict)
    #: Metadata of each variable's band, completed by the header of the file.
    bands: Mapping[str, BandInfo] = field(default_factory=dict)
    #: Number of files that cannot be read.
    unreadable: int = 0

    @property
    def order(self) -> tuple[object, ...]:
        """Place in a mosaic and among dates, whatever the order of the items."""
        item = self.item
        return (item.time, item.collection, item.id, tuple(sorted(self.hrefs.values())))

    @property
    def imagery(self) -> list[str]:
        """Assets of red, green and blue."""
        return list(dict.fromkeys(self.sources[colour].asset for colour in COLOURS))

    def kind(self, asset: str) -> tuple[str, str]:
        """Name the kind of a file: files of one kind share data type and nodata value."""
        return (self.item.collection or f"item {self.item.id}", asset)

    def declared(self, asset: str) -> GeoBox | None:
        """Grid of a file as the item tells it."""
        return declared_geobox(self.item.assets[asset], self.item.properties)

    def stated(self, source: AssetBand) -> BandInfo:
        """Read what the item says of a band."""
        return band_info(self.item.assets[source.asset], source.band)

    def silent(self) -> list[str]:
        """Assets whose grid or bands the metadata lack."""
        without = [name for name in self.hrefs if self.declared(name) is None]
        return without if self.sources["red"].band else self.imagery + without

    def vague(self) -> list[str]:
        """Assets whose data type or nodata value the metadata do not tell."""
        infos = [(s.asset, self.stated(s)) for s in self.sources.values() if s.band]
        return [asset for asset, info in infos if info.dtype is None or info.nodata is None]

    def files(self, names: Sequence[str], converted: bool = False) -> tuple[FileBands, ...]:
        """Files that hold some variables; ``converted`` is whether any data type will do."""
        held: dict[str, list[str]] = {}
        for name in names:
            held.setdefault(self.sources[name].asset, []).append(name)
        return tuple(
            FileBands(
                href=self.hrefs[asset],
                item=str(self.item),
                id=self.item.id,
                asset=asset,
                bands=tuple(self.sources[name].band for name in part),
                box=self.boxes[asset],
                stated=tuple(self.stated(self.sources[name]) for name in part),
                assumed=tuple(self.bands[name] for name in part),
                converted=converted,
                colours=tuple(part) if self.named and part[0] in COLOURS else (),
                names=tuple(" ".join(i.words[:1]) for i in band_infos(self.item.assets[asset])),
            )
            for asset, part in held.items()
        )

    @cached_property
    def geobox(self) -> GeoBox | None:
        """Grid of the imagery, the coarsest if its colours have several; None if unknown."""
        colours = [source.asset for name, source in self.sources.items() if name in COLOURS]
        found = [self.boxes[asset] for asset in colours if asset in self.boxes]
        return max(found or self.boxes.values(), key=pixel_on_ground, default=None)

    def outline(self, crs: CRS) -> Geometry | None:
        """Outline of the grid, else of the item; None if neither is known."""
        if self.geobox is not None:
            return footprint(self.geobox, crs)
        shape = self.item.outline
        return None if shape is None else Geometry(shape, DEGREES).to_crs(crs)

    def completed(
        self, headers: Mapping[str, Header | Unreadable], typical: Mapping[tuple[str, str], Header]
    ) -> ItemImage:
        """Add the headers of files that were opened, else those of files of the same kind."""
        own = {asset: headers.get(href) for asset, href in self.hrefs.items()}
        known = {asset: header for asset, header in own.items() if isinstance(header, Header)}
        failed = len({self.hrefs[a] for a, h in own.items() if isinstance(h, Unreadable)})
        boxes = {}
        for asset in self.hrefs:
            box = (known[asset].geobox if asset in known else None) or self.declared(asset)
            if box is not None:
                boxes[asset] = box
            elif not failed:
                raise ImageryError(
                    "georeferenced imagery",
                    "neither the projection extension nor a CRS in the file: "
                    f"asset {asset!r} of item {self.item}",
                    "add proj:code, proj:shape and proj:transform to the item, or leave it out",
                )
        if failed:
            boxes = {asset: box for asset, box in boxes.items() if asset in self.imagery}
            return replace(self, sources={}, boxes=boxes, unreadable=failed)
        sources, named = self.sources, self.named
        if not sources["red"].band:
            (asset,) = self.imagery
            sources = {**sources, **_told_by_file(self.item, asset, known[asset])}
            named = False
        bands = {
            name: self._completed_band(name, source, known.get(source.asset), typical)
            for name, source in sources.items()
        }
        image = replace(self, sources=sources, boxes=boxes, bands=bands, named=named)
        for names in (COLOURS, [name for name in sources if name == "valid"]):
            for file in image.files(names):
                if file.asset in known:
                    file.verify_bands(known[file.asset])
        return image

    def _completed_band(
        self,
        name: str,
        source: AssetBand,
        own: Header | None,
        typical: Mapping[tuple[str, str], Header],
    ) -> BandInfo:
        """Metadata of a band: those of its file before the item's, and those of like files last."""
        info, like, at = self.stated(source), typical.get(self.kind(source.asset)), source.band - 1
        for header in (own, like):
            if header is not None and at >= len(header.dtypes):
                count = len(header.dtypes)
                raise ImageryError(
                    f"band {source.band} for {name} in asset {source.asset!r}",
                    f"{count} bands in its file: item {self.item}",
                    f"name another band: cloud_mask='{source.asset}.1' is its first"
                    if name == "valid"
                    else ask_for_bands(self.item, {source.asset: count}),
                )
        stored = own.nodata[at] if own else None
        likely = like.nodata[at] if like else None
        header = own or like
        scale, offset = info.scaling or (header.scales[at] if header else UNSCALED)
        return replace(
            info,
            dtype=own.dtypes[at] if own else info.dtype or (like.dtypes[at] if like else None),
            nodata=next((v for v in (stored, info.nodata, likely) if v is not None), None),
            scale=scale,
            offset=offset,
        )


def find_images(
    items: Sequence[StacItem],
    *,
    bands: BandNames | None,
    cloud_mask: str | None,
    sign: Sign | None,
    patch: Sign | None,
    tolerant: bool,
    values_known: bool,
) -> list[ItemImage]:
    """Find bands, grid and values of each item, opening as few files as possible.

    ``patch`` turns an item's address into another one. ``tolerant`` counts files that do not open
    instead of refusing them: then all are tried. ``values_known`` is whether the user gives data
    type and nodata value, so that no file is opened for them.

    Headers are read from every file whose grid or bands the metadata lack, and from the
    first file in time of each collection and asset where they lack data type or nodata value.
    All files are compared with what was assumed when their pixels are read.
    """
    drafts = []
    for item in items:
        sources = find_colours(item, bands)
        if cloud_mask is not None:
            sources["valid"] = find_band(item, cloud_mask)
        hrefs = {source.asset: item.assets[source.asset].href for source in sources.values()}
        if patch is not None:
            hrefs = {name: patch(href) for name, href in hrefs.items()}
        named = bands is None or isinstance(bands, str)
        drafts.append(ItemImage(item, sources, hrefs, named))
    for draft in drafts:
        for asset in draft.imagery:  # too coarse imagery is refused before any file is opened
            validate_pixel(draft.item, draft.declared(asset))
    validate_sign(sign, next(iter(drafts[0].hrefs.values())))
    ordered = sorted(drafts, key=lambda draft: draft.order)  # whatever the order of the items
    headers = read_headers(_hrefs_to_open(ordered, tolerant, values_known), sign)
    errors = [found for found in headers.values() if isinstance(found, Unreadable)]
    if errors and not tolerant:
        raise errors[0]
    typical: dict[tuple[str, str], Header] = {}
    for draft in ordered:
        for asset, href in draft.hrefs.items():
            header = headers.get(href)
            if isinstance(header, Header):
                typical.setdefault(draft.kind(asset), header)
    return [draft.completed(headers, typical) for draft in drafts]


def _hrefs_to_open(
    ordered: Sequence[ItemImage], tolerant: bool, values_known: bool
) -> Iterable[str]:
    asked: set[tuple[str, str]] = set()
    for draft in ordered:
        yield from (draft.hrefs[asset] for asset in draft.silent())
        if tolerant:
            yield from draft.hrefs.values()
        elif not values_known or "valid" in draft.sources:
            for asset in draft.vague():
                if draft.kind(asset) not in asked:
                    asked.add(draft.kind(asset))
                    yield draft.hrefs[asset]


def _told_by_file(item: StacItem, asset: str, header: Header) -> dict[str, AssetBand]:
    """Colours as the file names them; three bands are red, green and blue."""
    colours, count = header.colours, len(header.colours)
    if set(COLOURS) <= set(colours):
        return {colour: AssetBand(asset, colours.index(colour) + 1) for colour in COLOURS}
    if count == 3:
        return {colour: AssetBand(asset, band) for band, colour in enumerate(COLOURS, start=1)}
    raise ImageryError(
        "red, green and blue bands",
        f"{count} bands without names in asset {asset!r} of item {item}",
        ask_for_bands(item, {asset: count}),
    )


def resolve_values(
    images: Sequence[ItemImage], names: Sequence[str], dtype: str | None, nodata: float | None
) -> tuple[str, float | None, float]:
    """Find the data type of some variables, their nodata value, and that where no image is.

    ``dtype`` and ``nodata`` of the user override them; else an ImageryError refuses files of
    several data types. Of several nodata values the most frequent stands for all on the cube, as
    each file's own holds while it is read. Floats are NaN there. A CHMv2Error refuses a nodata
    value of the user's that the data type cannot hold.
    """
    read = sorted((image for image in images if image.sources), key=lambda image: image.order)
    bands = [(image, image.bands[name]) for image in read for name in names]
    if dtype is None:
        types: dict[str, StacItem] = {}
        for image, band in bands:
            types.setdefault(str(band.dtype), image.item)
        if len(types) > 1:
            raise ImageryError(
                "imagery of one data type",
                ", ".join(f"{value} in {item}" for value, item in types.items()),
                f"load each kind apart, such as {only_items([list(types.values())[-1].id])})",
            )
        (dtype,) = types
    if nodata is not None and not can_hold(np.dtype(dtype), nodata):
        raise CHMv2Error(
            f"nodata as a number that {dtype} can hold",
            f"nodata={nodata:g}",
            "leave it out to believe the files, or for example xchmv2.load(..., nodata=0)",
        )
    if nodata is not None or np.dtype(dtype).kind == "f":
        return dtype, nodata, math.nan if nodata is None else nodata
    counts = Counter(band.nodata for _, band in bands if band.nodata is not None)
    for value in [value for value in counts if not can_hold(np.dtype(dtype), value)]:
        del counts[value]
        if not math.isnan(value):
            warn(f"nodata value {value:g} is ignored: {dtype} cannot hold it")
    usual = min(counts, key=lambda value: (-counts[value], value), default=None)
    return dtype, usual, usual or 0


def validate_scales(images: Sequence[ItemImage]) -> None:
    """Refuse items of several scales; where all share one, the stored numbers are kept."""
    kinds: dict[tuple[Scale, ...], list[str]] = {}
    for image in sorted(images, key=lambda image: image.order):
        if image.sources:
            scales = tuple(image.bands[name].scaling or UNSCALED for name in COLOURS)
            kinds.setdefault(scales, []).append(image.item.id)
    if len(kinds) == 1 and len(set(next(iter(kinds)))) > 1:
        calls = [f"{c}=cube.{c}{scale_call(s)}" for c, s in zip(COLOURS, *kinds, strict=True)]
        warn(
            "stored numbers of red, green and blue have different scales and are loaded as they "
            f"are; scale them: cube.assign({', '.join(calls)})"
        )
    if len(kinds) > 1:
        found = [f"{scale_words(scale)} in {', '.join(ids)}" for (scale, *_), ids in kinds.items()]
        calls = [
            f"{only_items(ids)}, dtype='float32'){scale_call(scale)}"
            for (scale, *_), ids in kinds.items()
        ]
        raise ImageryError(
            "imagery of one scale and offset",
            "; ".join(found),
            f"load each kind apart and scale it: {' and '.join(calls)}",
        )
