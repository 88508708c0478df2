"""Items as images: bands, grids and values from metadata and file headers; signing and reading."""

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
    AssetBand,
    BandInfo,
    BandNames,
    band_infos,
    find_band,
    find_colours,
)
from xchmv2.stac.grids import DEGREES, declared_geobox, footprint, pixel_on_ground, validate_pixel
from xchmv2.stac.items import StacItem

_T = TypeVar("_T")

#: Turns the address of a file into one that opens, such as ``planetary_computer.sign``.
Sign = Callable[[str], str]

_OPEN_AT_ONCE = 8
_ADVICE = (
    "check the address and your access to it (sign=planetary_computer.sign signs those of the "
    "Planetary Computer); on_error='nodata' leaves out files that do not open"
)


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
    """

    item: StacItem
    sources: Mapping[str, AssetBand]
    hrefs: Mapping[str, str]
    boxes: Mapping[str, GeoBox]
    bands: Mapping[str, BandInfo]
    unreadable: int = 0

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
    first file of each collection and asset where they lack data type or nodata value.
    """
    drafts = [_Draft.of(item, bands, cloud_mask, patch) for item in items]
    for draft in drafts:
        draft.validate_pixels()
    headers = _read_headers(_hrefs_to_open(drafts, tolerant, values_known), sign)
    errors = [found for found in headers.values() if isinstance(found, ImageryError)]
    if errors and not tolerant:
        raise errors[0]
    known = {href: h for href, h in headers.items() if not isinstance(h, ImageryError)}
    typical: dict[tuple[str, str], _Header] = {}
    for draft in drafts:
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
        return cls(item, choice, hrefs)

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
        headers: Mapping[str, _Header | ImageryError],
        known: Mapping[str, _Header],
        typical: Mapping[tuple[str, str], _Header],
    ) -> ItemImage:
        """Add the headers of files that were opened, else those of files of the same kind."""
        failed = sum(isinstance(headers.get(h), ImageryError) for h in set(self.hrefs.values()))
        boxes = {}
        for asset, href in self.hrefs.items():
            box = known[href].geobox if href in known else self.declared(asset)
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
        bands = {
            name: self._values(name, source, typical, known) for name, source in sources.items()
        }
        return ItemImage(self.item, sources, self.hrefs, boxes, bands)

    def _values(
        self,
        name: str,
        source: AssetBand,
        typical: Mapping[tuple[str, str], _Header],
        known: Mapping[str, _Header],
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
        nodata = info.nodata if nodata is None else nodata
        return replace(info, dtype=header.dtypes[source.band - 1], nodata=nodata)


def _hrefs_to_open(drafts: Sequence[_Draft], tolerant: bool, values_known: bool) -> Iterable[str]:
    asked: set[tuple[str, str]] = set()
    for draft in drafts:
        yield from (draft.hrefs[asset] for asset in draft.silent())
        if tolerant:
            yield from draft.hrefs.values()
        elif not values_known or "valid" in draft.choice:
            for asset in draft.vague():
                if draft.kind(asset) not in asked:
                    asked.add(draft.kind(asset))
                    yield draft.hrefs[asset]


def _told_by_file(item: StacItem, asset: str, header: _Header) -> dict[str, AssetBand]:
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
    """Find the data type and nodata value that the files of some variables share.

    ``dtype`` and ``nodata`` of the user override them; else an ImageryError refuses files that
    differ.
    """
    types: dict[str, ItemImage] = {}
    empty: dict[float, ItemImage] = {}
    for image in images:
        for name in names if image.sources else ():
            band = image.bands[name]
            types.setdefault(str(band.dtype), image)
            if band.nodata is not None:
                empty.setdefault(band.nodata, image)
    if dtype is None:
        dtype = _only(types, "data type", "load them apart, or convert: xchmv2.load(..., dtype=)")
    if nodata is None and empty:
        nodata = _only(empty, "nodata value", "load them apart, or say it: xchmv2.load(nodata=0)")
    return BandValues(dtype, nodata)


def _only(found: Mapping[_T, ItemImage], what: str, fix: str) -> _T:
    if len(found) > 1:
        values = ", ".join(f"{value} in {image.item}" for value, image in found.items())
        raise ImageryError(f"imagery of one {what}", values, fix)
    return next(iter(found))


@dataclass(frozen=True)
class _Header:
    """Header of a file: its grid, None without a CRS; data type, nodata and colour of each band."""

    geobox: GeoBox | None
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    colours: tuple[str, ...]


def _read_headers(hrefs: Iterable[str], sign: Sign | None) -> dict[str, _Header | ImageryError]:
    """Read the headers of files, or the errors of those that do not open, several at a time."""
    driver = RioDriver()
    settings = driver.capture_env()

    def read(href: str) -> _Header | ImageryError:
        address = href if sign is None else sign(href)
        try:
            with driver.restore_env(settings, driver.new_load(None)):
                return _read_header(address)
        except RasterioError as error:
            return _unreadable(href, address, error)

    wanted = sorted(set(hrefs))
    validate_sign(sign, *wanted[:1])
    with warnings.catch_warnings(), ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        # A missing georeference is seen in the header.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return dict(zip(wanted, pool.map(read, wanted), strict=True))


def _read_header(address: str) -> _Header:
    with rasterio.open(address, sharing=False) as file:
        return _Header(
            geobox=GeoBox(file.shape, file.transform, _crs(file.crs)) if file.crs else None,
            dtypes=tuple(file.dtypes),
            nodata=tuple(file.nodatavals),
            colours=tuple(colour.name for colour in file.colorinterp),
        )


def _crs(name: Any) -> CRS:
    """Name a CRS by its EPSG code where it has one, as items do."""
    crs = CRS(name)
    epsg = crs.to_epsg()
    return CRS(f"EPSG:{epsg}") if epsg else crs


def _unreadable(href: str, address: str, error: Exception) -> ImageryError:
    """Error that names the file and the reason, without the secrets of a signed address."""
    reason = str(error).replace(address, without_query(address))
    return ImageryError("an image that can be read", f"{without_query(href)}: {reason}", _ADVICE)


def without_query(address: str) -> str:
    """Cut the query off an address: it may hold signatures and tokens."""
    return re.sub(r"\?.*", "", address) if "://" in address else address


def validate_sign(sign: Sign | None, *hrefs: str) -> None:
    """Try it on addresses now, because an error would else come when the graph runs."""
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
    """Reads with rasterio as odc-stac does, but signs when a pixel is read and names failed files.

    A signature made when the graph is built would expire during a long run, and would make the
    keys of two identical graphs differ.

    Parameters
    ----------
    sign : callable, optional
        Applied to the address in the process that reads; it must be picklable on a cluster.
    nodata : float, optional
        Nodata value that overrides those of the files.
    """

    def __init__(self, sign: Sign | None = None, nodata: float | None = None) -> None:
        super().__init__()
        self._sign = sign
        self._nodata = nodata

    def open(self, src: Any, ctx: Any) -> _ImageReader:
        """Return a reader of one band of one file; nothing is opened yet."""
        return _ImageReader(src, ctx, self._sign, self._nodata)


class _ImageReader:
    """Reads windows of one band, as ``odc.loader`` asks for them."""

    def __init__(self, src: Any, ctx: Any, sign: Sign | None, nodata: float | None) -> None:
        self._src = src
        self._ctx = ctx
        self._sign = sign
        self._nodata = nodata

    def read(self, cfg: Any, dst_geobox: Any, **options: Any) -> Any:
        """Read the part of the file that lies on ``dst_geobox``, or raise an ImageryError."""
        href = self._src.uri
        address = href if self._sign is None else self._sign(href)
        reader = RioDriver().open(replace(self._src, uri=address), self._ctx)
        # Where the file does not declare a nodata value, that of the item holds, so that it is not
        # averaged with imagery either. The user's value is for the imagery, not for masks.
        override = self._nodata if cfg.fill_value == self._nodata else None
        cfg = replace(cfg, src_nodata_fallback=cfg.fill_value, src_nodata_override=override)
        try:
            return reader.read(cfg, dst_geobox, **options)
        except (RasterioError, ValueError) as error:
            failure = _unreadable(href, address, error)
        # Raised here, it has no cause of rasterio's, which cannot be unpickled.
        raise failure
