"""What each item offers: where its colours are, on what grid, with what values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from odc.geo import CRS, Geometry

from xchmv2.errors import ImageryError
from xchmv2.imagery.bands import COLOURS
from xchmv2.stac.bands import (
    BandInfo,
    BandNames,
    Choice,
    Source,
    band_infos,
    find_band,
    find_colours,
)
from xchmv2.stac.grids import (
    DEGREES,
    declared_geobox,
    footprint,
    pixel_on_ground,
    validate_pixel,
)
from xchmv2.stac.items import StacItem

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

    from xchmv2.stac.files import Header

_T = TypeVar("_T")

#: Reads the headers of files; an error in place of one that does not open.
ReadHeaders = Callable[[Iterable[str]], Mapping[str, "Header | ImageryError"]]


@dataclass(frozen=True, eq=False)
class Picture:
    """One item, with all that loading it takes.

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
        Pixel grid of each asset, as far as known.
    bands : mapping
        For each variable what the metadata tell of the band, completed by the file's header.
    unreadable : int
        Files that cannot be read.
    """

    item: StacItem
    sources: Mapping[str, Source]
    hrefs: Mapping[str, str]
    boxes: Mapping[str, GeoBox]
    bands: Mapping[str, BandInfo]
    unreadable: int = 0

    @cached_property
    def geobox(self) -> GeoBox | None:
        """Grid of the imagery, the coarsest if its colours have several."""
        found = {
            source.asset: self.boxes[source.asset]
            for name, source in self.sources.items()
            if name in COLOURS and source.asset in self.boxes
        } or self.boxes
        return max(found.values(), key=pixel_on_ground) if found else None

    def outline(self, crs: CRS) -> Geometry | None:
        """Where the imagery lies: as its grid tells, else its item; None if neither does."""
        if self.geobox is not None:
            return footprint(self.geobox, crs)
        if self.item.geometry is None:
            return None
        return Geometry(dict(self.item.geometry), DEGREES).to_crs(crs)


@dataclass(frozen=True)
class BandValues:
    """How the values of a variable are stored: data type, and nodata value if there is one."""

    dtype: str
    nodata: float | None


def find_pictures(
    items: Sequence[StacItem],
    *,
    bands: BandNames | None,
    cloud_mask: str | None,
    read_headers: ReadHeaders,
    patch: Callable[[str], str] | None = None,
    tolerant: bool = False,
    values_known: bool = False,
) -> list[Picture]:
    """Find what each item offers, opening as few files as that takes.

    Parameters
    ----------
    items : sequence of StacItem
        The items.
    bands : str or sequence, optional
        The user's names for red, green and blue.
    cloud_mask : str, optional
        The user's name for the mask.
    read_headers : callable
        Reads the headers of files.
    patch : callable, optional
        Turns the items' addresses into those to open.
    tolerant : bool
        Whether files that do not open are counted rather than refused: then all are tried.
    values_known : bool
        Whether the user tells data type and nodata value, so that no file need tell.

    Returns
    -------
    list of Picture
        One for each item.

    Raises
    ------
    ImageryError
        If bands cannot be found, a file does not open, or it has no CRS.

    Notes
    -----
    Headers are read of every file whose grid or bands the metadata do not tell, and of the first
    file per collection and asset where they do not tell data type or nodata value.
    """
    drafts = [_Draft.of(item, bands, cloud_mask, patch) for item in items]
    for draft in drafts:
        draft.validate_pixels()
    headers = dict(read_headers(set(_hrefs_to_open(drafts, tolerant, values_known))))
    errors = [found for found in headers.values() if isinstance(found, ImageryError)]
    if errors and not tolerant:
        raise errors[0]
    known = {href: h for href, h in headers.items() if not isinstance(h, ImageryError)}
    typical: dict[tuple[str, str], Header] = {}
    for draft in drafts:
        for asset, href in draft.hrefs.items():
            if href in known:
                typical.setdefault(draft.kind(asset), known[href])
    return [draft.completed(headers, known, typical) for draft in drafts]


@dataclass(frozen=True, eq=False)
class _Draft:
    """A picture before any file was opened."""

    item: StacItem
    choice: Choice
    mask: Source | None
    hrefs: Mapping[str, str]

    @classmethod
    def of(
        cls,
        item: StacItem,
        bands: BandNames | None,
        cloud_mask: str | None,
        patch: Callable[[str], str] | None,
    ) -> _Draft:
        choice = find_colours(item, bands)
        mask = None if cloud_mask is None else find_band(item, cloud_mask)
        names = dict.fromkeys((*choice.assets, *((mask.asset,) if mask else ())))
        hrefs = {name: item.assets[name].href for name in names}
        if patch is not None:
            hrefs = {name: patch(href) for name, href in hrefs.items()}
        return cls(item, choice, mask, hrefs)

    @property
    def sources(self) -> dict[str, Source]:
        """Band of each variable, as far as told without opening files."""
        found = {}
        if self.choice.bands is not None:
            pairs = zip(COLOURS, self.choice.assets, self.choice.bands, strict=True)
            found = {colour: Source(asset, band) for colour, asset, band in pairs}
        return found | ({"valid": self.mask} if self.mask else {})

    def kind(self, asset: str) -> tuple[str, str]:
        """Tell files that are taken to be alike; without a collection, each is for itself."""
        return (self.item.collection or f"item {self.item.id}", asset)

    def silent(self) -> list[str]:
        """Assets whose grid or bands the metadata do not tell."""
        without = [n for n in self.hrefs if self.declared(n) is None]
        return list(self.choice.assets) + without if self.choice.bands is None else without

    def declared(self, asset: str) -> GeoBox | None:
        return declared_geobox(self.item.assets[asset], self.item.properties)

    def validate_pixels(self) -> None:
        """Refuse imagery that is too coarse before any file is opened."""
        for asset in dict.fromkeys(self.choice.assets):
            box = self.declared(asset)
            if box is not None:
                validate_pixel(self.item, pixel_on_ground(box))

    def vague(self) -> list[str]:
        """Assets whose data type or nodata value the metadata do not tell."""
        infos = [(source, self.info(source)) for source in self.sources.values()]
        return [s.asset for s, i in infos if i is None or i.dtype is None or i.nodata is None]

    def info(self, source: Source) -> BandInfo | None:
        infos = band_infos(self.item.assets[source.asset])
        return infos[source.band - 1] if source.band <= len(infos) else None

    def completed(
        self,
        headers: Mapping[str, Header | ImageryError],
        known: Mapping[str, Header],
        typical: Mapping[tuple[str, str], Header],
    ) -> Picture:
        """Add what the headers tell; those of like files where this one was not opened."""
        failed = sum(isinstance(headers.get(h), ImageryError) for h in set(self.hrefs.values()))
        boxes = {}
        for asset, href in self.hrefs.items():
            box = known[href].geobox if href in known else self.declared(asset)
            if box is not None:
                boxes[asset] = box
            elif not failed:
                raise _no_crs(self.item, asset)
        if failed:
            boxes = {asset: box for asset, box in boxes.items() if asset in self.choice.assets}
            return Picture(self.item, {}, self.hrefs, boxes, {}, failed)
        sources = self.sources
        if self.choice.bands is None:
            sources = _told_by_file(self.item, self.choice.assets[0], known, self.hrefs) | sources
        bands = {
            name: self._values(name, source, typical, known) for name, source in sources.items()
        }
        return Picture(self.item, sources, self.hrefs, boxes, bands)

    def _values(
        self,
        name: str,
        source: Source,
        typical: Mapping[tuple[str, str], Header],
        known: Mapping[str, Header],
    ) -> BandInfo:
        info = self.info(source) or BandInfo((), None, None, None)
        header = known.get(self.hrefs[source.asset]) or typical.get(self.kind(source.asset))
        if header is None:
            return info
        if source.band > len(header.dtypes):
            raise ImageryError(
                f"band {source.band} for {name} in asset {source.asset!r}",
                f"{len(header.dtypes)} bands in its file: item {self.item}",
                "name others: xchmv2.load(..., bands=('asset.1', 'asset.2', 'asset.3'))",
            )
        nodata = header.nodata[source.band - 1]
        return BandInfo(
            info.words,
            info.colour,
            header.dtypes[source.band - 1],
            info.nodata if nodata is None else nodata,
            info.classes,
        )


def _hrefs_to_open(drafts: Sequence[_Draft], tolerant: bool, values_known: bool) -> Iterable[str]:
    asked: set[tuple[str, str]] = set()
    for draft in drafts:
        yield from (draft.hrefs[asset] for asset in draft.silent())
        if tolerant:
            yield from draft.hrefs.values()
        elif not values_known or draft.mask:
            for asset in draft.vague():
                if draft.kind(asset) not in asked:
                    asked.add(draft.kind(asset))
                    yield draft.hrefs[asset]


def _told_by_file(
    item: StacItem, asset: str, known: Mapping[str, Header], hrefs: Mapping[str, str]
) -> dict[str, Source]:
    """Colours as the file itself names them; three bands are red, green and blue."""
    colours = known[hrefs[asset]].colours
    if set(COLOURS) <= set(colours):
        return {colour: Source(asset, colours.index(colour) + 1) for colour in COLOURS}
    if len(colours) == 3:
        return {colour: Source(asset, band) for band, colour in enumerate(COLOURS, start=1)}
    raise ImageryError(
        "red, green and blue bands",
        f"{len(colours)} bands without names in asset {asset!r} of item {item}",
        f"name them: xchmv2.load(..., bands=('{asset}.1', '{asset}.2', '{asset}.3'))",
    )


def _no_crs(item: StacItem, asset: str) -> ImageryError:
    return ImageryError(
        "imagery that tells where it lies",
        f"neither the projection extension nor a CRS in the file: asset {asset!r} of item {item}",
        "add proj:code, proj:shape and proj:transform to the item, or leave it out",
    )


def resolve_values(
    pictures: Sequence[Picture], names: Sequence[str], dtype: str | None, nodata: float | None
) -> BandValues:
    """Find the one data type and nodata value that all files share.

    Parameters
    ----------
    pictures : sequence of Picture
        At least one that can be read.
    names : sequence of str
        Variables to look at.
    dtype, nodata : optional
        What the user wants instead.

    Raises
    ------
    ImageryError
        If they differ, or are not told.
    """
    types: dict[str, Picture] = {}
    empty: dict[float, Picture] = {}
    for picture in pictures:
        for name in names if picture.sources else ():
            band = picture.bands[name]
            types.setdefault(str(band.dtype), picture)
            if band.nodata is not None:
                empty.setdefault(band.nodata, picture)
    if dtype is None:
        dtype = _only(types, "data type", "load them apart, or convert: xchmv2.load(..., dtype=)")
    if nodata is None and empty:
        nodata = _only(empty, "nodata value", "load them apart, or say it: xchmv2.load(nodata=0)")
    return BandValues(dtype, nodata)


def _only(found: Mapping[_T, Picture], what: str, fix: str) -> _T:
    if len(found) > 1:
        told = ", ".join(f"{value} in {picture.item}" for value, picture in found.items())
        raise ImageryError(f"imagery of one {what}", told, fix)
    return next(iter(found))
