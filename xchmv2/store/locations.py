"""Where a store lies: a path, a URL, an object of zarr, obstore or icechunk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from xchmv2.errors import StoreError

#: A path, a URL such as "s3://bucket/canopy.zarr", a zarr store, an obstore store, or an icechunk
#: session.
StoreLike = Any


def resolve_store(
    store: StoreLike,
    storage_options: Mapping[str, Any] | None = None,
    *,
    read_only: bool = False,
) -> Store:
    """Turn what a user gives into a zarr store; nothing is written or read.

    Parameters
    ----------
    store : str, path, zarr store, obstore store or icechunk Session
        Where the data lie.
    storage_options : mapping, optional
        Options of the file system of a URL, as fsspec takes them.
    read_only : bool, default False
        Whether to open a path or URL for reading alone.

    Raises
    ------
    StoreError
        If it is none of these, cannot be written, or lies on a file system that is not installed.
    """
    if isinstance(store, Store):
        return _writable(store, read_only)
    if isinstance(getattr(store, "store", None), Store):  # an icechunk session
        return _writable(store.store, read_only)
    if type(store).__module__.partition(".")[0] == "obstore":
        return ObjectStore(store, read_only=read_only)
    if isinstance(store, str | os.PathLike):
        return _at_address(os.fspath(store), storage_options, read_only)
    raise StoreError(
        "a path, a URL, a zarr or obstore store, or an icechunk session",
        f"{type(store).__name__}",
        "for example height.chmv2.to_zarr('canopy.zarr')",
    )


def is_icechunk(store: Store) -> bool:
    """Whether a store is a transaction of icechunk, which keeps its own peace among writers."""
    return type(store).__module__.partition(".")[0] == "icechunk"


def validate_reachable(store: Store) -> None:
    """Check that other processes can write to a store.

    Raises
    ------
    StoreError
        If it lies in this process's memory, or is a transaction that cannot be shared.
    """
    while isinstance(store, WrapperStore):
        store = store._store
    protocol = getattr(getattr(store, "fs", None), "protocol", "")
    if isinstance(store, MemoryStore) or "memory" in str(protocol):
        raise StoreError(
            "a store that the processes that compute can reach",
            "a store in this process's memory",
            "give a path or URL that all of them see",
        )
    if is_icechunk(store):
        raise StoreError(
            "a store that several processes can write to at once",
            "an icechunk session, which belongs to one process",
            "compute here instead: with dask.config.set(scheduler='threads'): ...",
        )


def _writable(store: Store, read_only: bool) -> Store:
    if store.read_only and not read_only:
        raise StoreError(
            "a store that can be written",
            f"the read-only {store}",
            "open it for writing; an icechunk session is read-only once it is committed: take "
            "a new one by repo.writable_session(branch)",
        )
    return store


def _at_address(
    address: str | bytes, storage_options: Mapping[str, Any] | None, read_only: bool
) -> Store:
    text = os.fsdecode(address)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in ("", "file"):
        path = Path(unquote(urlsplit(text).path) if scheme else text).expanduser().absolute()
        return LocalStore(path, read_only=read_only)
    try:
        return FsspecStore.from_url(
            text, storage_options=dict(storage_options or {}), read_only=read_only
        )
    except (ImportError, ValueError) as error:
        raise StoreError(
            "a URL of a file system that is installed",
            f"{text!r} ({error})",
            "install the one it needs, such as `pip install s3fs` for s3:// or gcsfs for gs://",
        ) from error
