"""An object store on loopback that fails: a proxy before moto's S3."""

import http.client
import itertools
import logging
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from xchmv2.store.storage import resolve_store

# Private imports: the store behind the proxy is opened as to_zarr opens it.

#: Failures that every client of S3 knows and tries again.
PASSING = ("500", "503", "drop", "drop late", "delay")
#: Answers that are believed.
LIES = ("403", "404", "empty list")

_ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "403": (403, "AccessDenied", "Access Denied"),
    "404": (404, "NoSuchKey", "The specified key does not exist."),
}
_EMPTY = (
    '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
    "<Prefix>{prefix}</Prefix><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys>"
    "<IsTruncated>false</IsTruncated></ListBucketResult>"
)


class Proxy(ThreadingHTTPServer):
    """Forwards requests; a share of them fails in one of ``kinds``, by a fixed seed."""

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._guard = threading.Lock()
        self.fail()

    def fail(self, *kinds, share=0.3, seed=0):
        """Fail from now on in these ways; without any, forward everything."""
        self.kinds, self.share, self._random = kinds, share, random.Random(seed)
        self.requests, self.failures = 0, Counter()

    def draw(self, request):
        with self._guard:
            self.requests += 1
            kinds = [kind for kind in self.kinds if _suits(kind, request)]
            if not kinds or self._random.random() >= self.share:
                return None
            kind = self._random.choice(kinds)
            self.failures[kind] += 1
            return kind

    def handle_error(self, request, client_address):
        """Keep the tests' output quiet: a client may give up."""


def _suits(kind, request):
    listing = "list-type" in parse_qs(urlsplit(request.path).query)
    if kind == "empty list":
        return listing
    return kind != "404" or (request.command in ("GET", "HEAD") and not listing)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep the tests' output quiet."""

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.draw(self)
        if kind in _ERRORS:
            status, code, message = _ERRORS[kind]
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            return self._send(status, {"Content-Type": "application/xml"}, text.encode())
        if kind == "empty list":
            query = parse_qs(urlsplit(self.path).query)
            bucket = self.path.strip("/").partition("?")[0]
            text = _EMPTY.format(bucket=bucket, prefix=query.get("prefix", [""])[0])
            return self._send(200, {"Content-Type": "application/xml"}, text.encode())
        if kind == "delay":
            time.sleep(0.1)
        if kind != "drop":
            answer = self._forward(body)
            if kind != "drop late":
                return self._send(*answer)
        self.close_connection = True
        return self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _forward(self, body):
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            found = connection.getresponse()
            return found.status, dict(found.getheaders()), found.read()
        finally:
            connection.close()

    def _send(self, status, headers, body):
        self.send_response(status)
        size = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
        drop = ("content-length", "connection", "transfer-encoding", "date", "server")
        for name, value in headers.items():
            if name.lower() not in drop:
                self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def s3_server():
    """Serve an S3 of nothing but memory on loopback; yields its address."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which would print every request
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def faulty_s3(target):
    """Put a proxy before an S3; yields it."""
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def options_of(endpoint, **more):
    """Options of s3fs for a server on loopback."""
    return {"endpoint_url": endpoint, "key": "test", "secret": "test", **more}


def bucket(endpoint):
    """Make a bucket; returns a function that returns the next empty store in it."""
    import s3fs

    name = f"bucket-{next(_NUMBERS)}"
    s3fs.S3FileSystem(**options_of(endpoint)).mkdir(name)
    return lambda: resolve_store(f"s3://{name}/{next(_NUMBERS)}.zarr", options_of(endpoint))


_NUMBERS = itertools.count()
