"""Single objects of a zarr store, below its arrays and groups: read, write, list, move.

zarr's stores are asynchronous; everything here waits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from zarr.abc.store import Store
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from xchmv2.store.locations import is_icechunk


def read_object(store: Store, key: str) -> bytes | None:
    """Read an object; None where there is none."""
    found = sync(store.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def write_object(store: Store, key: str, data: bytes, *, new: bool = False) -> None:
    """Write an object whole; with ``new``, leave one that is there as it is."""
    buffer = cpu.Buffer.from_bytes(data)
    sync(store.set_if_not_exists(key, buffer) if new else store.set(key, buffer))


def delete_object(store: Store, key: str) -> None:
    """Delete an object; none is no error."""
    sync(store.delete(key))


def list_names(store: Store, prefix: str = "") -> list[str]:
    """List the names right below a prefix, of objects and of prefixes alike."""
    return sorted({name.rstrip("/") for name in sync(_collect(store.list_dir, prefix))})


def list_keys(store: Store, prefix: str) -> list[str]:
    """List the keys of all objects below a prefix."""
    start = "" if is_icechunk(store) else prefix  # it lists only what it knows for arrays
    return sorted(key for key in sync(_collect(store.list_prefix, start)) if key.startswith(prefix))


def delete_below(store: Store, prefix: str) -> None:
    """Delete all objects below a prefix; none is no error."""
    if list_keys(store, f"{prefix}/"):
        sync(store.delete_dir(prefix))


def copy_below(store: Store, old: str, new: str) -> None:
    """Copy all objects below one prefix to another, over what is there."""
    for key in list_keys(store, f"{old}/"):
        data = read_object(store, key)
        if data is not None:
            write_object(store, f"{new}/{key.removeprefix(f'{old}/')}", data)


def move_below(store: Store, old: str, new: str) -> None:
    """Move all objects from one prefix to another, where nothing lies.

    Notes
    -----
    Killed at any moment and called again, it ends with everything moved: on a local disk it is one
    rename, elsewhere an object goes only after its copy is there.
    """
    if isinstance(store, LocalStore):
        source, target = store.root / old, store.root / new
        if source.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
        return
    copy_below(store, old, new)
    for key in list_keys(store, f"{old}/"):
        delete_object(store, key)


def remove_partial_files(store: Store) -> int:
    """Remove what a killed process left half-written on a local disk; returns how many files.

    zarr writes a file under a name that ends in ``.partial`` and renames it. Other stores write
    whole objects or none.
    """
    if not isinstance(store, LocalStore) or not store.root.is_dir():
        return 0
    leftovers = list(store.root.rglob("*.partial"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def delete_name(store: Store, name: str) -> None:
    """Delete an object or all below a prefix, on a local disk its folders too; none is no error."""
    delete_below(store, name)
    delete_object(store, name)


def remove_empty_folders(store: Store) -> None:
    """Remove what a run that wrote nothing leaves on a local disk."""
    if isinstance(store, LocalStore):
        for folder in (store.root / "xchmv2", store.root):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


async def _collect(listing: Callable[[str], AsyncIterator[str]], prefix: str) -> list[str]:
    # Called here, inside the loop, because some stores need it running.
    return [item async for item in listing(prefix)]
