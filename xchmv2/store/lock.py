"""One writer at a time: a lock in the store that lives as long as the process that owns it.

The lock is an object in the store, so it works wherever the store does. Its owner renews it.
Another process takes it over if the owner is dead, or has not renewed it for long.
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
from typing import Any

from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.store.storage import (
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
                f"another process took over writing {self._store} while this one was suspended",
                fix="let that process finish; regions already written are intact",
            )

    def _take(self) -> None:
        """Write the lock, unless another writer is active."""
        exclusive = _create(self._store, self._content())
        holder = self._holder()
        if holder is not None and not self._is_mine(holder):
            if _lives(holder):
                raise _refusal(self._store, holder)
            write_object(self._store, LOCK, self._content())
            exclusive = False
        if not exclusive:
            time.sleep(_CONFIRM)  # another may be doing the same: the last one to write owns it
            holder = self._holder()
        if holder is None or not self._is_mine(holder):
            raise _refusal(self._store, holder or {})

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
        data = read_object(self._store, LOCK)
        if data is None:
            return None
        try:
            return dict(json.loads(data))
        except ValueError:
            return {}  # half-written by a killed process

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


def _lives(holder: dict[str, Any]) -> bool:
    """Return whether the owner of a lock is running, as far as this process can tell."""
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


def _create(store: Store, content: bytes) -> bool:
    """Write the lock if there is none; returns whether the store guarantees that."""
    write_object(store, LOCK, content, new=True)
    return type(store).__name__ in ("LocalStore", "ObjectStore", "MemoryStore")


def _refusal(store: Store, holder: dict[str, Any]) -> StoreError:
    who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "another process"
    return StoreError(
        f"{who} is writing to {store}",
        fix="let it finish, or stop it and call again; if it died on another machine, the lock "
        f"{LOCK} is taken over after {_STALE / 60:.0f} minutes",
    )
