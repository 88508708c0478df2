"""Where the map lies: a web address or a folder, and what is missing there as against unreachable.

A tile that is not there was never made: there is no land. The server says so with status 404 (or
410). Everything else that is not an answer, from a refused connection to status 403, is an error,
so that a bad network never passes for open sea.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error

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

    Parameters
    ----------
    base : str
        An http(s) address or an absolute folder, without a slash at its end.
    """

    base: str

    @classmethod
    def at(cls, base_url: str | os.PathLike[str]) -> Mirror:
        """Take an address as the user gives it.

        Parameters
        ----------
        base_url : str or path
            Folder, or http://, https://, file:// or s3:// address; buckets are read over HTTPS,
            without credentials.

        Returns
        -------
        Mirror
            Not looked at yet, unless it is a folder.

        Raises
        ------
        CHMv2Error
            If the folder does not exist or the kind of address is unknown.
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
        """Whether there is such a file; raises CHMv2Error where that cannot be told."""
        if self.remote:
            return _ask(address, "HEAD") is not None
        return Path(address).is_file()

    def read(self, address: str) -> bytes | None:
        """Read a whole file; None if there is none, CHMv2Error where that cannot be told."""
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
    """Say which file could not be read, and why."""
    # Of GDAL's errors the first in the chain says what happened.
    reason = getattr(error, "reason", None) or error.__cause__ or error
    status = f"HTTP status {error.code}, " if isinstance(error, urllib.error.HTTPError) else ""
    return CHMv2Error(
        "the published map to be readable",
        f"{status}{reason} ({type(error).__name__}) at {address}",
        "check the network and any proxy, or pass base_url= of a mirror or a folder with a copy",
    )
