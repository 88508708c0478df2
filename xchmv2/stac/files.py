"""The files behind the items: their headers, and how their pixels are read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import rasterio
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from odc.loader import RioDriver
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from xchmv2.errors import CHMv2Error, ImageryError

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
