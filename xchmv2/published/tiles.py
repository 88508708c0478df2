"""The published map's tiles: its pixel grid, and the addresses of its files."""

from __future__ import annotations

import http.client
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mercantile
from affine import Affine

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error

CRS = "EPSG:3857"
#: Half the side of the Mercator square [m of EPSG:3857].
HALF = 20037508.342789244
#: The files are the tiles of this zoom level, and so many along each axis of the square.
_ZOOM = 10
_TILES: int = 2**_ZOOM

#: (start, stop) along one axis [px].
Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Rows from the north and columns from 180 degrees west of the whole map [px]."""

    rows: Span
    cols: Span

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) [px]."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    def part(self, rows: Span, cols: Span) -> Window:
        """Pixels of the map at rows and columns counted within this window."""
        (top, _), (left, _) = self.rows, self.cols
        return Window((top + rows[0], top + rows[1]), (left + cols[0], left + cols[1]))


@dataclass(frozen=True)
class TilePart:
    """Where one tile, by its quadkey, and a window meet.

    `inside`: pixels counted within the tile; `target`: the same pixels counted within the window;
    `transform`: from pixels of ``inside`` to EPSG:3857, between 180 degrees west and east.
    """

    quadkey: str
    inside: Window
    target: tuple[slice, slice]
    transform: Affine


@dataclass(frozen=True)
class TileGrid:
    """The pixel grid of the map, of tiles of ``size`` px a side; 32768 in the published map."""

    size: int

    @property
    def pixel(self) -> float:
        """Side of a pixel [m of EPSG:3857]."""
        return 2 * HALF / self.side

    @property
    def side(self) -> int:
        """Side of the Mercator square [px]."""
        return _TILES * self.size

    def transform(self, window: Window, start: int = 0) -> Affine:
        """From pixels of a window to metres; column ``start`` lies at the western edge -HALF."""
        left = (window.cols[0] - start) * self.pixel - HALF
        return Affine(self.pixel, 0.0, left, 0.0, -self.pixel, HALF - window.rows[0] * self.pixel)

    def parts(self, window: Window) -> Iterator[TilePart]:
        """Split a window into the tiles it touches, from the north-west."""
        for row, to_row, of_row in cut(window.rows, self.size):
            for col, to_col, of_col in cut(window.cols, self.size):
                inside = Window((of_row.start, of_row.stop), (of_col.start, of_col.stop))
                tile = mercantile.Tile(col[0] // self.size % _TILES, row[0] // self.size, _ZOOM)
                origin = Window((tile.y * self.size, 0), (tile.x * self.size, 0))
                transform = self.transform(origin.part(inside.rows, inside.cols))
                yield TilePart(mercantile.quadkey(tile), inside, (to_row, to_col), transform)

    def count(self, window: Window) -> int:
        """How many tiles a window touches."""
        height, width = (
            -(-stop // self.size) - start // self.size for start, stop in (window.rows, window.cols)
        )
        return height * width


def cut(span: Span, side: int, size: float = math.inf) -> Iterator[tuple[Span, slice, slice]]:
    """Cut an axis at multiples of a side: each piece, its place in the span, and its share."""
    start, stop = span
    for first in range(start // side * side, stop, side):
        last = int(min(first + side, size))
        low, high = max(first, start), min(last, stop)
        yield (first, last), slice(low - start, high - start), slice(low - first, high - first)


#: Public address of the map.
PUBLISHED_MAP = (
    "https://dataforgood-fb-data.s3.amazonaws.com/forests/v2/global/dinov3_global_chm_v2_ml3"
)
_MISSING = (404, 410)
_ATTEMPTS = 3
#: Before the second attempt; twice as long before the third [s].
_PAUSE = 0.5
_TIMEOUT = 60.0
#: How GDAL reads over the network, where the environment does not say otherwise.
_GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # The whole header of a tile, its tables of heights, mask and overviews, in one request.
    "GDAL_INGESTED_BYTES_AT_OPEN": "131072",
    "GDAL_HTTP_CONNECTTIMEOUT": "20",
    "GDAL_HTTP_TIMEOUT": "60",
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
}


@dataclass(frozen=True)
class Mirror:
    """A copy of the map, with ``chm/{quadkey}.tif`` and ``metadata/{quadkey}.geojson`` in it.

    `base`: an http(s) address or an absolute folder, without a slash at its end.
    """

    base: str

    @classmethod
    def at(cls, base_url: str | os.PathLike[str]) -> Mirror:
        """Read the user's folder, or http://, https://, file:// or s3:// address.

        Buckets are read over HTTPS, without credentials. Raises CHMv2Error if the folder does not
        exist or the kind of address is unknown.
        """
        text = os.fspath(base_url).rstrip("/")
        parts = urlsplit(text)
        if parts.scheme in ("http", "https"):
            return cls(text)
        if parts.scheme == "s3":
            return cls(f"https://{parts.netloc}.s3.amazonaws.com{parts.path}")
        if "://" in text and parts.scheme != "file":
            raise CHMv2Error(
                "a folder or an http(s):// or s3:// address",
                f"base_url={text!r}",
                f"leave base_url out to read {PUBLISHED_MAP}",
            )
        folder = (
            Path(unquote(parts.path) if parts.scheme == "file" else text).expanduser().absolute()
        )
        if not (folder / "chm").is_dir():
            raise CHMv2Error(
                "a copy of the published map, with chm/ and metadata/ in it",
                f"no folder {folder / 'chm'}",
                f"correct base_url, or leave it out to read {PUBLISHED_MAP}",
            )
        return cls(str(folder))

    @property
    def remote(self) -> bool:
        """Whether the map is read over the network."""
        return self.base.startswith(("http://", "https://"))

    @property
    def gdal_options(self) -> dict[str, str]:
        """How GDAL should read here; the environment's own settings go first."""
        if not self.remote:
            return {}
        return {name: value for name, value in _GDAL_OPTIONS.items() if name not in os.environ}

    def raster(self, quadkey: str) -> str:
        """Address of a tile's heights."""
        return f"{self.base}/chm/{quadkey}.tif"

    def footprints(self, quadkey: str) -> str:
        """Address of a tile's imagery footprints."""
        return f"{self.base}/metadata/{quadkey}.geojson"

    def exists(self, address: str) -> bool:
        """Whether a file exists; raises CHMv2Error where that cannot be determined."""
        if self.remote:
            return _ask(address, "HEAD") is not None
        return Path(address).is_file()

    def read(self, address: str) -> bytes | None:
        """Read a whole file; None if there is none, CHMv2Error if it cannot be reached."""
        if self.remote:
            return _ask(address, "GET")
        path = Path(address)
        return path.read_bytes() if path.is_file() else None


def _ask(url: str, method: str) -> bytes | None:
    """Send a request, again if the network fails; None where the server has no such file."""
    request = urllib.request.Request(
        url, method=method, headers={"User-Agent": f"xchmv2/{__version__}"}
    )
    for attempt in range(_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _MISSING:
                return None
            if error.code < 500 and error.code != 429:
                raise unreachable(url, error) from error
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if attempt + 1 < _ATTEMPTS:
            time.sleep(_PAUSE * 2**attempt)
    raise unreachable(url, failure) from failure


def unreachable(address: str, error: Exception) -> CHMv2Error:
    """Error that names the file that could not be read, and the reason."""
    # Of GDAL's errors the first in the chain names the cause.
    reason = getattr(error, "reason", None) or error.__cause__ or error
    status = f"HTTP status {error.code}, " if isinstance(error, urllib.error.HTTPError) else ""
    return CHMv2Error(
        f"the published map cannot be read: {status}{reason} ({type(error).__name__}) at {address}",
        fix="check the network and any proxy, or pass base_url= of a mirror or a local copy",
    )
