"""A small web server on loopback that answers range requests, as object stores do."""

from __future__ import annotations

import os
import re
import threading
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

#: What GDAL needs to know: no proxy between loopback and here, no listing of folders.
GDAL_SETTINGS = {"NO_PROXY": "*", "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}


class RangeHandler(SimpleHTTPRequestHandler):
    """GET and HEAD of files, whole or ``bytes=first-last``; every request is noted."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, requests, token, **kwargs):
        self.requests = requests
        self.token = token
        super().__init__(*args, **kwargs)

    def log_message(self, *args):
        """Keep the tests' output quiet."""

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, *, body):
        asked = self.headers.get("Range")
        self.requests.append((self.command, self.path, asked))
        if self.token is not None and self.token not in urlsplit(self.path).query:
            self._head(HTTPStatus.FORBIDDEN, 0)
            return
        path = self.translate_path(urlsplit(self.path).path)
        if not os.path.isfile(path):
            self._head(HTTPStatus.NOT_FOUND, 0)
            return
        size = os.path.getsize(path)
        span = _span(asked, size)
        if span is None:
            self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, f"bytes */{size}")
            return
        first, last = span
        status = HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK
        whole = f"bytes {first}-{last}/{size}" if asked else None
        self._head(status, last - first + 1, whole, self.guess_type(path))
        if body:
            with open(path, "rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))

    def _head(self, status, length, content_range=None, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()


def _span(asked, size):
    """First and last byte of a single range; None if the file has no such bytes."""
    if asked is None:
        return 0, size - 1
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.strip())
    if not match or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size - 1
    if int(first) >= size:
        return None
    return int(first), min(int(last), size - 1) if last else size - 1


class Url(str):
    """The server's address, without a slash at its end; ``requests`` is what was asked of it.

    Each request is a (method, path, range header or None).
    """

    requests: list[tuple[str, str, str | None]]


@contextmanager
def serve(folder, token=None):
    """Serve a folder on a free loopback port; yields its ``Url``.

    With a token, what is asked for without it in the query is forbidden, as with signed URLs.
    """
    requests = []
    handler = partial(RangeHandler, directory=str(folder), requests=requests, token=token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    url = Url(f"http://127.0.0.1:{server.server_port}")
    url.requests = requests
    saved = {name: os.environ.get(name) for name in GDAL_SETTINGS}
    os.environ.update(GDAL_SETTINGS)
    try:
        yield url
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        server.server_close()
        thread.join()
