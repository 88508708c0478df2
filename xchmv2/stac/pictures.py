"""The files behind STAC items: what their headers tell, and how they are signed and opened."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import rasterio
from odc.geo import CRS, Geometry
from odc.geo.geobox import GeoBox
from odc.loader import RioDriver
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.stac.asset_bands import (
    BandInfo,
    BandNames,
    Choice,
    Source,
    band_infos,
    find_band,
    find_colours,
)
from xchmv2.stac.grids import DEGREES, declared_geobox, footprint, pixel_on_ground, validate_pixel
from xchmv2.stac.items import StacItem

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


#: Turns the address of a file into one that opens, such as ``planetary_computer.sign``.
Sign = Callable[[str], str]

_OPEN_AT_ONCE = 8
_ADVICE = (
    "check the address and your access to it (sign=planetary_computer.sign signs those of the "
    "Planetary Computer); on_error='nodata' goes on without files that do not open"
)


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Parameters
    ----------
    geobox : GeoBox or None
        Its pixel grid; None without a CRS.
    dtypes : tuple of str
        Data type of each band.
    nodata : tuple of (float or None)
        Nodata value of each band.
    colours : tuple of str
        What each band shows, as the file has it: "red", "gray", "undefined", ...
    """

    geobox: GeoBox | None
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    colours: tuple[str, ...]


def read_headers(hrefs: Iterable[str], sign: Sign | None) -> dict[str, Header | ImageryError]:
    """Open files and read their headers, several at a time.

    Parameters
    ----------
    hrefs : iterable of str
        Paths or URLs, not signed.
    sign : callable, optional
        Makes them open.

    Returns
    -------
    dict
        For each its header, or the error it gave.
    """
    driver = RioDriver()
    settings = driver.capture_env()

    def read(href: str) -> Header | ImageryError:
        address = href if sign is None else sign(href)
        try:
            with driver.restore_env(settings, driver.new_load(None)):
                return _read_header(address)
        except RasterioError as error:
            return unreadable(href, address, error)

    wanted = sorted(set(hrefs))
    validate_sign(sign, *wanted[:1])
    with warnings.catch_warnings(), ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        # A missing georeference is told by the header.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return dict(zip(wanted, pool.map(read, wanted), strict=True))


def _read_header(address: str) -> Header:
    with rasterio.open(address, sharing=False) as file:
        return Header(
            geobox=GeoBox(file.shape, file.transform, _crs(file.crs)) if file.crs else None,
            dtypes=tuple(file.dtypes),
            nodata=tuple(file.nodatavals),
            colours=tuple(colour.name for colour in file.colorinterp),
        )


def _crs(told: Any) -> CRS:
    """Take a CRS by its EPSG number, where it has one, as items tell it."""
    crs = CRS(told)
    epsg = crs.to_epsg()
    return CRS(f"EPSG:{epsg}") if epsg else crs


def unreadable(href: str, address: str, error: Exception) -> ImageryError:
    """Say which file cannot be read, and why, without the secrets of a signed address."""
    reason = str(error).replace(address, plain(address))
    return ImageryError("an image that can be read", f"{plain(href)}: {reason}", _ADVICE)


def plain(address: str) -> str:
    """Cut the query off an address: signatures and tokens are there."""
    return re.sub(r"\?.*", "", address) if "://" in address else address


def validate_sign(sign: Sign | None, *hrefs: str) -> None:
    """Try it on addresses: better now than when the graph runs."""
    fix = "for example sign=planetary_computer.sign; items that are signed already need none"
    for href in hrefs:
        if sign is None:
            return
        try:
            signed: Any = sign(href)
        except Exception as error:  # whatever a function of the user's raises
            found = f"{type(error).__name__}: {error}"
            raise CHMv2Error(
                "sign as a function that takes the URL of a file", found, fix
            ) from error
        if not isinstance(signed, str):
            found = f"{type(signed).__name__} {signed!r:.60}"
            raise CHMv2Error("sign to return a URL", found, fix)


class ImageDriver(RioDriver):  # type: ignore[misc]  # odc.loader has no types
    """Reads with rasterio as odc-stac does, but signs when a pixel is read and says what failed.

    A signature made when the graph is built would run out during a long run, and would make the
    keys of two identical graphs differ.

    Parameters
    ----------
    sign : callable, optional
        Applied to the address in the process that reads; it must be picklable on a cluster.
    nodata : float, optional
        Nodata value that holds whatever the files declare.
    """

    def __init__(self, sign: Sign | None = None, nodata: float | None = None) -> None:
        super().__init__()
        self._sign = sign
        self._nodata = nodata

    def open(self, src: Any, ctx: Any) -> ImageReader:
        """Prepare to read one band of one file; nothing is opened yet."""
        return ImageReader(src, ctx, self._sign, self._nodata)


class ImageReader:
    """Reads windows of one band, as ``odc.loader`` asks for them."""

    def __init__(self, src: Any, ctx: Any, sign: Sign | None, nodata: float | None) -> None:
        self._src = src
        self._ctx = ctx
        self._sign = sign
        self._nodata = nodata

    def read(self, cfg: Any, dst_geobox: Any, **options: Any) -> Any:
        """Read the part of the file that lies on ``dst_geobox``.

        Raises
        ------
        ImageryError
            If the file cannot be read.
        """
        href = self._src.uri
        address = href if self._sign is None else self._sign(href)
        reader = RioDriver().open(replace(self._src, uri=address), self._ctx)
        # Where the file does not tell its nodata value, the one told by the item holds, so that
        # it is not averaged with imagery either.
        cfg = replace(
            cfg, src_nodata_fallback=cfg.fill_value, src_nodata_override=self._override(cfg)
        )
        try:
            return reader.read(cfg, dst_geobox, **options)
        except (RasterioError, ValueError) as error:
            failure = unreadable(href, address, error)
        # Raised out here, it drags no exception of rasterio's along: those cannot be unpickled.
        raise failure

    def _override(self, cfg: Any) -> float | None:
        """Leave masks alone: the user's nodata value is for the imagery."""
        return self._nodata if cfg.fill_value == self._nodata else None
