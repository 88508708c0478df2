"""One writer at a time: a lock that lies in the store and lives as long as its owner.

It is an object in the store, so it works wherever the store does. Its owner renews it; who finds
it and can see that the owner is dead, or that it was not renewed for long, takes it over.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.store.storage import delete_object, read_object, remove_empty_folders, write_object

LOCK = "xchmv2/lock.json"
#: How often the owner renews the lock [s].
_RENEW = 20.0
#: After how long without renewal a lock on another machine is taken for dead [s].
_STALE = 180.0
#: How long to wait before believing that a lock taken without a guarantee is ours [s].
_CONFIRM = 0.5


#: Of the locks that this process holds.
_TOKENS: set[str] = set()


class WriterLock:
    """A context in which this process alone writes to a store.

    Parameters
    ----------
    store : zarr Store
        The store; it need not exist yet.

    Raises
    ------
    StoreError
        On entering, if another writer lives.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = {**_this_process(), "token": secrets.token_hex(16)}
        self._over = threading.Event()
        self._lost = False
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="xchmv2-lock")

    def __enter__(self) -> WriterLock:
        _TOKENS.add(self._owner["token"])
        try:
            self._take()
        except BaseException:
            self._release()
            raise
        self._renewer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._renewer.join()
        self._release()

    def validate(self) -> None:
        """Make sure that nobody else took the store over.

        Raises
        ------
        StoreError
            If somebody did, because this process did not renew its lock for minutes.
        """
        if self._lost:
            raise StoreError(
                f"to be the only writer of {self._store}",
                "that another process took it over while this one stood still",
                "let that one finish; what was written is in order",
            )

    def _take(self) -> None:
        """Write the lock, unless another writer lives."""
        sure = _create(self._store, self._content())
        holder = self._holder()
        if holder is not None and not self._is_mine(holder):
            if _lives(holder):
                raise _refusal(self._store, holder)
            write_object(self._store, LOCK, self._content())
            sure = False
        if not sure:
            time.sleep(_CONFIRM)  # another may be doing the same: the last one to write has it
            holder = self._holder()
        if holder is None or not self._is_mine(holder):
            raise _refusal(self._store, holder or {})

    def _release(self) -> None:
        """Remove the lock if it is ours; a store that cannot is none that others fail on."""
        _TOKENS.discard(self._owner["token"])
        with suppress(Exception):
            holder = self._holder()
            if holder is not None and self._is_mine(holder):
                delete_object(self._store, LOCK)
                remove_empty_folders(self._store)

    def _renew(self) -> None:
        while not self._over.wait(_RENEW):
            with suppress(Exception):  # the next round tries again
                holder = self._holder()
                self._lost = holder is None or not self._is_mine(holder)
                if self._lost:
                    return
                write_object(self._store, LOCK, self._content())

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "renewed": time.time()}).encode()

    def _holder(self) -> dict[str, Any] | None:
        data = read_object(self._store, LOCK)
        if data is None:
            return None
        try:
            return dict(json.loads(data))
        except ValueError:
            return {}  # torn by a kill on a disk that knows no whole files

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return bool(holder.get("token") == self._owner["token"])


def _this_process() -> dict[str, Any]:
    """Name this process and the place where its number means something."""
    return {
        "host": socket.gethostname(),
        "place": _read("/proc/sys/kernel/random/boot_id") + _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the owner of a lock is at work, as far as can be seen from here."""
    here = _this_process()
    same_place = all(holder.get(key) == here[key] for key in ("host", "place"))
    if same_place and holder.get("pid") == here["pid"]:
        return holder.get("token") in _TOKENS
    if same_place and sys.platform != "win32":
        return _runs(int(holder["pid"])) and _started(int(holder["pid"])) == holder["started"]
    return time.time() - float(holder.get("renewed", 0.0)) < _STALE


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str:
    """When a process started, so that its number used anew is not taken for it; "" if unknown."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not fields:
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link(path: str) -> str:
    with suppress(OSError):
        return os.readlink(path)
    return ""


def _create(store: Store, content: bytes) -> bool:
    """Write the lock if there is none; returns whether the store makes sure of that."""
    try:
        write_object(store, LOCK, content, new=True)
    except OSError as error:
        raise StoreError(
            f"to write to {store}",
            f"{type(error).__name__}: {error}",
            "check permissions and space; a local disk must know hard links",
        ) from error
    return type(store).__name__ in ("LocalStore", "ObjectStore", "MemoryStore")


def _refusal(store: Store, holder: dict[str, Any]) -> StoreError:
    who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "another process"
    return StoreError(
        f"to be the only writer of {store}",
        f"that {who} is writing to it",
        "let it finish, or stop it and call again; if it died on another machine, the lock "
        f"{LOCK} is taken over after {_STALE / 60:.0f} minutes",
    )
