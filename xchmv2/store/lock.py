"""One writer at a time: a lock in the store that lives as long as the process that owns it.

The lock is an object in the store, so it works wherever the store does. Its owner renews it.
Another process takes it over if the owner is dead, or has not renewed it for long. Clocks of two
machines may differ, so a lock that seems to be stale, or of the future, is watched first: whoever
renews it lives. A lock that no version of this package wrote is nobody's, and taken over at once.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from xchmv2.errors import StoreError, warn
from xchmv2.store.storage import (
    address,
    delete_object,
    explain_failures,
    read_object,
    remove_empty_folders,
    write_object,
)

LOCK = "xchmv2/lock.json"
#: How often the owner renews the lock [s].
_RENEW = 20.0
#: A lock of another machine is stale after this time without renewal [s].
_STALE = 180.0
#: How long such a lock is watched first: its owner renews it once in this time [s].
_WATCH = 1.5 * _RENEW
#: How long to wait for competing writers where the store cannot create an object exclusively [s].
_CONFIRM = 0.5
#: Tokens of the locks that this process holds.
_TOKENS: set[str] = set()


class WriterLock:
    """A context in which only this process writes; a StoreError refuses to enter a second one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = {**_this_process(), "token": secrets.token_hex(16)}
        self._over = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="xchmv2-lock")

    def __enter__(self) -> WriterLock:
        _TOKENS.add(self._owner["token"])
        try:
            with explain_failures(self._store):
                self._take()
        except BaseException:
            self._release()
            raise
        self._renewer.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._renewer.join()
        self._release()

    def validate(self) -> None:
        """Look now that no other process took the store over, after minutes without renewal."""
        with explain_failures(self._store):
            held = self._is_held()
        if not held:
            raise StoreError(
                f"another process took over writing {address(self._store)} while this one was "
                "suspended",
                fix="let that process finish; regions already written are intact",
            )

    def _take(self) -> None:
        """Write the lock, unless another writer is active."""
        exclusive = _create(self._store, self._content())
        holder = self._holder()
        if holder is not None and not self._is_mine(holder):
            if self._lives(holder):
                raise _refusal(self._store, holder)
            write_object(self._store, LOCK, self._content())
            exclusive = False
        if not exclusive:
            time.sleep(_CONFIRM)  # another may be doing the same: the last one to write owns it
            holder = self._holder()
        if holder is None or not self._is_mine(holder):
            raise _refusal(self._store, holder or {})

    def _lives(self, holder: dict[str, Any]) -> bool:
        """Return whether the owner of a lock is running, as far as this process can tell."""
        here = _this_process()
        if not holder:
            return False
        if all(holder[key] == here[key] for key in ("host", "place")):
            if holder["pid"] == here["pid"]:
                return holder["token"] in _TOKENS
            if sys.platform != "win32":
                return _runs(holder["pid"]) and _started(holder["pid"]) == holder["started"]
        if 0 <= time.time() - holder["renewed"] < _STALE:
            return True
        warn(
            f"{_name(holder)} seems to have stopped writing to {address(self._store)}; waiting "
            f"{_WATCH:.0f} s to see whether it renews its lock"
        )
        time.sleep(_WATCH)
        return self._holder() not in (None, holder)

    def _release(self) -> None:
        """Remove the lock if it is ours; if that fails, it becomes stale."""
        _TOKENS.discard(self._owner["token"])
        with suppress(Exception):
            if self._is_held():
                delete_object(self._store, LOCK)
                remove_empty_folders(self._store)

    def _renew(self) -> None:
        while not self._over.wait(_RENEW):
            with suppress(Exception):  # the next round tries again
                if not self._is_held():
                    return
                write_object(self._store, LOCK, self._content())

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "renewed": time.time()}).encode()

    def _holder(self) -> dict[str, Any] | None:
        """Read the lock; None if there is none, empty if no version of this package wrote it."""
        data = read_object(self._store, LOCK)
        if data is None:
            return None
        try:
            found = json.loads(data)
            kinds = {"host": str, "place": str, "started": str, "token": str, "pid": int}
            good = all(type(found[key]) is kind for key, kind in kinds.items())
            good &= 0 < found["pid"] < 2**31 and math.isfinite(found["renewed"])
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            return {}
        return found if good else {}

    def _is_held(self) -> bool:
        return self._is_mine(self._holder() or {})

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return bool(holder.get("token") == self._owner["token"])


def _this_process() -> dict[str, Any]:
    """Identify this process, and the machine and container in which its id is unique."""
    return {
        "host": socket.gethostname(),
        "place": _boot_and_namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _started(pid: int) -> str:
    """Return the start time of a process, which a later one of its id lacks; "" if unknown."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    return ""


def _boot_and_namespace() -> str:
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return boot + namespace


def _create(store: Any, content: bytes) -> bool:
    """Write the lock if there is none; returns whether the store guarantees that.

    An object store is asked twice: one that knows no conditions writes twice.
    """
    put: Any = store.fs._pipe_file if isinstance(store, FsspecStore) else write_object
    for _ in range(2 if "mode" in inspect.signature(put).parameters else 0):
        try:
            sync(put(f"{store.path}/{LOCK}", content, mode="create"))
        except FileExistsError:
            return True
        except OSError:  # it refuses conditions, or everything
            break
    write_object(store, LOCK, content, new=True)
    return type(store).__name__ in ("LocalStore", "ObjectStore", "MemoryStore")


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _refusal(store: Store, holder: dict[str, Any]) -> StoreError:
    return StoreError(
        f"{_name(holder)} is writing to {address(store)}",
        fix="let it finish, or stop it and call again; if it died on another machine, the lock "
        f"{LOCK} is taken over {_STALE / 60:.0f} minutes after its last renewal",
    )
