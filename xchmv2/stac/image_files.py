"""Image files: opening and signing, their headers, and the check of what was assumed about them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from odc.loader import RioDriver
from rasterio.enums import MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.stac.asset_bands import BandInfo

#: Turns the address of a file into one that opens, such as ``planetary_computer.sign``.
Sign = Callable[[str], str]
#: Scale and offset that turn stored numbers into physical values.
Scale = tuple[float, float]

#: Scale and offset of a file or item that states none.
UNSCALED: Scale = (1.0, 0.0)
_OPEN_AT_ONCE = 8
#: Corners of a file may lie apart from where its item says by this share of a pixel.
_SAME_PLACE = 0.5
_ADVICE = (
    "check the address and your access to it (sign=planetary_computer.sign signs those of the "
    "Planetary Computer); on_error='nodata' leaves out files that do not open"
)
_BELIEVE = (
    "xchmv2.load(..., on_error='nodata') reads the header of every file first and believes it"
)


class Unreadable(ImageryError):
    """A file that does not open, or a window of it that cannot be read."""


@dataclass(frozen=True)
class Header:
    """Header of a file.

    ``geobox`` is None without a CRS; data type, nodata value, scale and colour are of each band,
    ``flags`` are GDAL's kinds of masks.
    """

    geobox: GeoBox | None
    shape: tuple[int, int]
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    scales: tuple[Scale, ...]
    colours: tuple[str, ...]
    flags: tuple[tuple[MaskFlags, ...], ...]

    @classmethod
    def of(cls, file: Any) -> Header:
        """Read the header of an open file."""
        return cls(
            geobox=GeoBox(file.shape, file.transform, _crs(file.crs)) if file.crs else None,
            shape=tuple(file.shape),
            dtypes=tuple(file.dtypes),
            nodata=tuple(file.nodatavals),
            scales=tuple(zip(file.scales, file.offsets, strict=True)),
            colours=tuple(colour.name for colour in file.colorinterp),
            flags=tuple(tuple(flags) for flags in file.mask_flag_enums),
        )


@dataclass(frozen=True)
class FileBands:
    """Bands to read from one file, and what was assumed about it before it was opened."""

    #: Address, not signed.
    href: str
    item: str
    id: str
    asset: str
    #: Counted from 1.
    bands: tuple[int, ...]
    box: GeoBox
    #: Metadata of each band: what the item states, and with what files tell.
    stated: tuple[BandInfo, ...]
    assumed: tuple[BandInfo, ...]
    #: Whether the user gave a data type, to which any other is converted.
    converted: bool
    #: What the bands show as the metadata say; empty if the user or the file itself says it.
    colours: tuple[str, ...]
    #: Names of all bands of the asset, as far as the metadata name them.
    names: tuple[str, ...]

    @property
    def declared(self) -> bool:
        """Whether the item itself states the data types; else another file does."""
        return all(info.dtype is not None for info in self.stated)

    def verified(self, header: Header) -> GeoBox:
        """Return the grid of the file, or raise an ImageryError if the file is not as assumed."""
        box = header.geobox
        if box is None and header.shape == tuple(self.box.shape):
            box = self.box  # the item places a file that does not say where it is
        if box is None or not _same_place(box, self.box):
            raise self._error(
                f"{self.box.shape[0]} x {self.box.shape[1]} px at {_place(self.box)}",
                f"{header.shape[0]} x {header.shape[1]} px at {_place(box) if box else 'no place'}",
                _BELIEVE,
            )
        self.verify_bands(header)
        return box

    def verify_bands(self, header: Header) -> None:
        """Raise an ImageryError if the bands of the file are not as assumed."""
        apart = only_items([self.id])
        if max(self.bands) > len(header.dtypes):
            raise self._error(
                f"at least {max(self.bands)} bands", f"{len(header.dtypes)} bands",
                f"leave it out, or name its bands: {apart}, bands=...)",
            )  # fmt: skip
        for band, stated, assumed in zip(self.bands, self.stated, self.assumed, strict=True):
            dtype, own = header.dtypes[band - 1], header.scales[band - 1]
            if assumed.dtype not in (None, dtype) and not self.converted:
                fix = _BELIEVE if self.declared else f"load it apart: {apart})"
                raise self._error(f"data type {assumed.dtype}", dtype, fix)
            scaled, scale = stated.scaling is not None, assumed.scaling or UNSCALED
            if not np.allclose(own, scale, 1e-6, 0) and not (scaled and own == UNSCALED):
                raise self._error(
                    scale_words(scale), scale_words(own),
                    f"correct the item: item.assets[{self.asset!r}].extra_fields"
                    ".pop('raster:bands')" if scaled
                    else f"load it apart: {apart}, dtype='float32'){scale_call(own)}",
                )  # fmt: skip
        self._verify_colours(header.colours)

    def _verify_colours(self, colours: tuple[str, ...]) -> None:
        """Refuse a file that names its colours otherwise, unless GDAL did so by default."""
        found = [colours[band - 1] for band in self.bands]
        wrong = any(f in COLOURS and f != c for f, c in zip(found, self.colours, strict=False))
        if not wrong or colours[:3] == COLOURS:
            return
        fix = "name red, green and blue in this order: xchmv2.load(..., bands=(...))"
        if set(COLOURS) <= set(colours):
            own = tuple(f"{self.asset}.{colours.index(colour) + 1}" for colour in COLOURS)
            fix = f"xchmv2.load(..., bands={own}) believes the file"
        raise self._error(f"bands of {', '.join(self.colours)}", ", ".join(found), fix)

    def _error(self, expected: str, found: str, fix: str) -> ImageryError:
        why = "as the item says" if self.declared else "as in other files of the collection"
        file = without_query(self.href)
        return ImageryError(f"{expected} ({why}) in item {self.item}", f"{found} in {file}", fix)

    def masks(self, header: Header) -> tuple[int, ...]:
        """Bands whose masks count, in the file or beside it: one if they share a mask or alpha.

        GDAL calls the fourth band of some files alpha that the metadata call near infrared.
        """
        flags = header.flags[self.bands[0] - 1]
        if MaskFlags.alpha in flags:
            alpha = header.colours.index("alpha")
            name = self.names[alpha] if alpha < len(self.names) else ""
            counts = alpha + 1 not in self.bands and (not name or "alpha" in name)
            return self.bands[:1] if counts else ()
        if MaskFlags.per_dataset in flags:
            return self.bands[:1]
        return tuple(band for band in self.bands if not header.flags[band - 1])


def scale_words(scale: Scale) -> str:
    """Name a scale and an offset."""
    return f"scale {scale[0]:g} and offset {scale[1]:g}"


def only_items(ids: Sequence[str]) -> str:
    """Python that loads some items alone, without its last bracket."""
    named = f"item.id == {ids[0]!r}" if len(ids) == 1 else f"item.id in {list(ids)}"
    return f"xchmv2.load([item for item in items if {named}]"


def scale_call(scale: Scale) -> str:
    """Python that turns stored numbers into physical values."""
    return f" * {scale[0]:.12g}" + (f" + {scale[1]:.12g}" if scale[1] else "")


def _place(box: GeoBox) -> str:
    affine = box.affine
    return f"{affine.c:.9g}, {affine.f:.9g} in {box.crs}"


def _same_place(box: GeoBox, other: GeoBox) -> bool:
    """Whether two grids have one shape, and corners at one place."""
    if box.shape != other.shape:
        return False
    rows, cols = box.shape
    corners = (np.array([0, cols, 0, cols]), np.array([0, 0, rows, rows]))
    x, y = box.affine * corners
    if box.crs != other.crs:
        x, y = box.crs.transformer_to_crs(other.crs)(x, y)
    found = ~other.affine * (np.asarray(x), np.asarray(y))
    return all(
        bool((abs(one - two) <= _SAME_PLACE).all()) for one, two in zip(found, corners, strict=True)
    )


def read_headers(hrefs: Iterable[str], sign: Sign | None) -> dict[str, Header | Unreadable]:
    """Read the headers of files, or the errors of those that do not open, several at a time."""
    settings = gdal_settings()

    def read(href: str) -> Header | Unreadable:
        address = href if sign is None else sign(href)
        try:
            with gdal(settings), open_file(address) as file:
                return Header.of(file)
        except RasterioError as error:
            return unreadable(href, address, error)

    wanted = sorted(set(hrefs))
    with warnings.catch_warnings(), ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        # A missing georeference is seen in the header.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return dict(zip(wanted, pool.map(read, wanted), strict=True))


def gdal_settings() -> Mapping[str, Any]:
    """Capture the settings of GDAL here and now, for where pixels are read."""
    settings: Mapping[str, Any] = RioDriver().capture_env()
    return settings


def gdal(settings: Mapping[str, Any]) -> Any:
    """Context in which GDAL has these settings."""
    driver = RioDriver()
    return driver.restore_env(settings, driver.new_load(None))


def open_file(address: str, **options: Any) -> Any:
    """Open a file with rasterio, and its sidecars if it is local: others would cost requests."""
    remote = re.match(r"/vsi|(?!file:)\w+://", address)
    sidecars = {} if remote else {"GDAL_DISABLE_READDIR_ON_OPEN": "FALSE"}
    with rasterio.Env(**sidecars):
        return rasterio.open(address, sharing=False, **options)


def _crs(name: Any) -> CRS:
    """Name a CRS by its EPSG code where it has one, as items do."""
    crs = CRS(name)
    epsg = crs.to_epsg()
    return CRS(f"EPSG:{epsg}") if epsg else crs


def unreadable(href: str, address: str, error: Exception, where: str = "") -> Unreadable:
    """Error that names the file and the reason, without the secrets of a signed address."""
    reason = str(error.__cause__ or error).replace(address, without_query(address))
    reason = " ".join(reason.split()).rstrip(".")
    return Unreadable(
        "an image that can be read", f"{without_query(href)}{where}: {reason}", _ADVICE
    )


def without_query(address: str) -> str:
    """Cut the query off an address: it may hold signatures and tokens."""
    return re.sub(r"\?.*", "", address) if "://" in address else address


def validate_sign(sign: Sign | None, href: str) -> None:
    """Try it on an address now, because an error would else come when the graph runs."""
    if sign is None:
        return
    fix = "for example sign=planetary_computer.sign; items that are signed already need none"
    try:
        signed: Any = sign(href)
    except Exception as error:  # whatever a function of the user's raises
        found = f"{type(error).__name__}: {error}"
        raise CHMv2Error("sign as a function that takes the URL of a file", found, fix) from error
    if not isinstance(signed, str):
        raise CHMv2Error("sign to return a URL", f"{type(signed).__name__} {signed!r:.60}", fix)
