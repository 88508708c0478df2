"""The address of a store, and its single objects: read, write, list and delete."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from google_crc32c import value as crc32c
from zarr.abc.store import Store
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from xchmv2.errors import StoreError
from xchmv2.raster import show

#: Objects that are read at once.
_REQUESTS = 64

#: A path, URL, zarr store, obstore store, or icechunk session or repository.
StoreLike = Any


def resolve_store(
    store: StoreLike, storage_options: Mapping[str, Any] | None = None, *, read_only: bool = False
) -> Store:
    """Turn the address that a user gives into a zarr store; nothing is written or read.

    A StoreError refuses what is no :data:`StoreLike`, cannot be written, or lies on a file system
    that is not installed.
    """
    if not isinstance(storage_options, Mapping | None):
        raise StoreError(
            "storage_options as a mapping, or None",
            f"storage_options={show(storage_options)}",
            "for example storage_options={'anon': True}",
        )
    if isinstance(store, Store):
        return _writable(store, read_only)
    if is_repository(store):
        branch = (storage_options or {}).get("branch", "main")
        begin = store.readonly_session if read_only else store.writable_session
        return _writable(begin(branch).store, read_only)
    if isinstance(getattr(store, "store", None), Store):  # an icechunk session
        return _writable(store.store, read_only)
    if type(store).__module__.partition(".")[0] == "obstore":
        return ObjectStore(store, read_only=read_only)
    if isinstance(store, str | os.PathLike):
        return _at_address(os.fspath(store), storage_options, read_only)
    raise StoreError(
        "a path, a URL, a zarr or obstore store, or an icechunk session or repository",
        f"{type(store).__name__}",
        "for example height.chmv2.to_zarr('canopy.zarr')",
    )


@contextmanager
def explain_failures(store: Store, action: str = "write to") -> Iterator[None]:
    """Turn an error of the file system, such as a full disk, into a StoreError."""
    try:
        yield
    except OSError as error:
        local = "permissions and free space (a local disk must support hard links)"
        what = local if isinstance(store, LocalStore) else "the network, your credentials and quota"
        raise StoreError(
            f"to {action} {address(store)}",
            f"{type(error).__name__}: {error}",
            f"check {what}, and make the same call again: regions already written are kept",
        ) from error


def address(store: Store) -> str:
    """Name a store as a user does."""
    if is_icechunk(store):
        return "an icechunk session"
    files, path = getattr(store, "fs", None), getattr(store, "path", "")
    return str(store) if files is None else str(files.unstrip_protocol(path))


def is_icechunk(store: Store) -> bool:
    """Whether a store is a transaction of icechunk, which isolates writers by itself."""
    return type(store).__module__.partition(".")[0] == "icechunk"


def is_repository(store: StoreLike) -> bool:
    """Whether a user gave a repository of icechunk, in which a run makes its own transactions."""
    return type(store).__module__.partition(".")[0] == "icechunk" and hasattr(
        store, "writable_session"
    )


def validate_reachable(store: Store) -> None:
    """Refuse a store in this process's memory, if other processes compute."""
    while isinstance(store, WrapperStore):
        store = store._store
    protocol = getattr(getattr(store, "fs", None), "protocol", "")
    if isinstance(store, MemoryStore) or "memory" in str(protocol):
        raise StoreError(
            "a store that all computing processes can reach",
            "a store in this process's memory",
            "give a path or URL that all of them can reach",
        )


def _writable(store: Store, read_only: bool) -> Store:
    if store.read_only and not read_only:
        raise StoreError(
            "a store that can be written",
            f"the read-only {address(store)}",
            "open it for writing; a committed icechunk session is read-only: open a new one with "
            "repo.writable_session(branch)",
        )
    if not (read_only or store.supports_deletes):
        raise StoreError(
            "a store whose objects can be replaced",
            f"a {type(store).__name__}",
            "write a folder, height.chmv2.to_zarr('canopy.zarr'), and pack it when it is complete: "
            "shutil.make_archive('canopy', 'zip', 'canopy.zarr')",
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


def read_object(store: Store, key: str) -> bytes | None:
    """Read an object; None if it does not exist."""
    return read_objects(store, [key])[key]


def read_objects(store: Store, keys: Iterable[str]) -> dict[str, bytes | None]:
    """Read objects, many at once; None for each that does not exist."""
    free = asyncio.Semaphore(_REQUESTS)

    async def read(key: str) -> tuple[str, bytes | None]:
        async with free:
            found = await store.get(key, default_buffer_prototype())
        return key, None if found is None else found.to_bytes()

    async def read_all() -> list[tuple[str, bytes | None]]:
        await store._ensure_open()  # a zip file is read only then
        return await asyncio.gather(*map(read, keys))

    return dict(sync(read_all()))


def checksum(data: bytes | None) -> tuple[int, int]:
    """Size in bytes and CRC-32C of an object; (0, 0) where there is none."""
    return (0, 0) if data is None else (len(data), crc32c(data))


def write_object(store: Store, key: str, data: bytes, *, new: bool = False) -> None:
    """Write a whole object; with ``new``, leave an existing one as it is."""
    buffer = cpu.Buffer.from_bytes(data)
    sync(store.set_if_not_exists(key, buffer) if new else store.set(key, buffer))


def edit_metadata(store: Store, path: str, **fields: Any) -> None:
    """Change fields in the metadata of an array or group, all at once."""
    content = {**read_metadata(store, path), **fields}
    write_object(store, f"{path}/zarr.json".lstrip("/"), as_json(content))


def as_json(content: Any) -> bytes:
    """Write JSON as zarr does."""
    return json.dumps(content, indent=2).encode()


def parse_json(data: bytes | None, key: str, store: Store) -> dict[str, Any]:
    """Read a JSON object; empty if there is none. Anything else is a StoreError."""
    try:
        return dict(json.loads(data or b"{}"))
    except (ValueError, TypeError, RecursionError):
        raise damaged(store, key) from None


class DamagedError(StoreError):
    """A file of a store whose content cannot be right."""


def damaged(store: Store, what: str) -> DamagedError:
    """Return the error for a file whose content cannot be right, with the way out."""
    return DamagedError(
        f"{what} in {address(store)} is damaged",
        fix="repair the store: xchmv2.verify(store, repair=True), or in a shell "
        "`xchmv2 verify STORE --repair`; then make the call of .chmv2.to_zarr() again",
    )


def delete_object(store: Store, key: str) -> None:
    """Delete an object if it exists."""
    sync(store.delete(key))


def read_metadata(store: Store, path: str) -> dict[str, Any]:
    """Read the metadata of an array or group; empty if there is none."""
    key = f"{path}/zarr.json".lstrip("/")
    return parse_json(read_object(store, key), key, store)


def list_names(store: Store, prefix: str = "") -> list[str]:
    """List the names right below a prefix, of objects and of prefixes alike."""
    return sorted({name.rstrip("/") for name in sync(_collect(store.list_dir, prefix))})


def list_keys(store: Store, prefix: str) -> list[str]:
    """List the keys of all objects below a prefix."""
    start = "" if is_icechunk(store) else prefix  # it lists only what it knows for arrays
    return sorted(key for key in sync(_collect(store.list_prefix, start)) if key.startswith(prefix))


def delete_below(store: Store, prefix: str) -> None:
    """Delete all objects below a prefix, if there are any."""
    if list_keys(store, f"{prefix}/"):
        sync(store.delete_dir(prefix))


def remove_partial_files(store: Store) -> None:
    """Remove files that a killed process left half-written on a local disk.

    zarr writes a file under a name that ends in ``.partial`` and renames it. Other stores write
    whole objects or none.
    """
    if isinstance(store, LocalStore):
        for path in list(store.root.rglob("*.partial")):
            path.unlink(missing_ok=True)


def delete_name(store: Store, name: str) -> None:
    """Delete an object or all objects below a prefix, on a local disk with their folders."""
    delete_below(store, name)
    delete_object(store, name)


def remove_empty_folders(store: Store) -> None:
    """Remove the folders that a run which wrote nothing leaves on a local disk."""
    if isinstance(store, LocalStore):
        for folder in (store.root / "xchmv2", store.root):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


async def _collect(listing: Callable[[str], AsyncIterator[str]], prefix: str) -> list[str]:
    # Called here because some stores need a running event loop.
    return [item async for item in listing(prefix)]
