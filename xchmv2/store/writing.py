"""Heights into a Zarr store: whatever is there stays, whatever is missing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import xarray as xr
from dask.base import tokenize
from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.predict import Progress, delayed_sinks, leaves_process, run_sinks
from xchmv2.store.lock import WriterLock
from xchmv2.store.records import (
    Manifest,
    begin,
    create_manifest,
    fingerprint,
    imagery_digests,
    open_manifest,
    remove_all,
    validate_same,
)
from xchmv2.store.regions import Regions, WriteBlock, missing_blocks, resolve_regions
from xchmv2.store.storage import (
    StoreLike,
    is_icechunk,
    remove_partial_files,
    resolve_store,
    validate_reachable,
)
from xchmv2.store.template import (
    Cube,
    EncodingName,
    data_arrays,
    read_cube,
    resolve_encoding,
    write_template,
)
from xchmv2.store.timeline import add_dates, finish_extension, in_order

#: By label, what a date was made from.
Dates = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """What a call of ``to_zarr`` did.

    Parameters
    ----------
    regions : int
        Regions written; a region is one block at one date.
    present : int
        Regions that were in the store before.
    pixels : int
        Pixels written.
    seconds : float
        Time it took [s].
    """

    regions: int
    present: int
    pixels: int
    seconds: float


def to_zarr(
    height: xr.DataArray | xr.Dataset,
    store: StoreLike,
    *,
    encoding: EncodingName = "float32",
    resume: bool = True,
    regions: Regions | None = None,
    shards: bool = False,
    progress: bool = True,
    compute: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Write heights to a Zarr store, in a way that a kill, a full disk or a new date cannot harm.

    Parameters
    ----------
    height : DataArray or Dataset
        (..., y, x) from ``predict``, or any other, with at most one dim beside y and x. Several
        variables of one prediction are computed together.
    store : str, path, zarr store, obstore store or icechunk Session
        Where. A URL such as "s3://bucket/canopy.zarr" is opened by fsspec. An icechunk session is
        one transaction: commit it afterwards.
    encoding : {"float32", "rounded", "int16_cm", "uint8_half_m"}
        How floating-point variables are stored. "rounded" keeps eighths of a metre in float32,
        "int16_cm" centimetres, "uint8_half_m" half metres from 0 to 127 m. Whole numbers and
        booleans stay as they are; dates are stored as days.
    resume : bool, default True
        Go on with a store that is there: only missing regions are computed, and new dates are put
        in their place. Otherwise a store that is there is refused.
    regions : mapping or sequence of mappings, optional
        Index ranges, such as ``{"time": 0, "y": slice(0, 8192)}``: only blocks that one of them
        touches are written now. Another call writes the others.
    shards : bool, default False
        Put the chunks of a block into one object. Fewer objects; GDAL up to 3.12 cannot read them.
    progress : bool, default True
        Show a bar: regions, megapixels per second, time left.
    compute : bool, default True
        False writes the empty store and returns a Delayed that fills it; while that is computed,
        it is up to you that nobody else writes.
    storage_options : mapping, optional
        Options of the file system of a URL.

    Returns
    -------
    Written or dask Delayed
        How many regions were written and were there before; or what writes them when computed.

    Raises
    ------
    StoreError
        If something else or a half-removed store lies there, what determines the pixels differs
        from what the store was begun with, another process is writing, values do not fit the
        encoding, or a region cannot be written. What is in the store stays.

    Notes
    -----
    A region is one block at one date. It is recorded as done after its data are down. A prediction
    is known by what made it (weights, arithmetic, grid, bands, masks, the catalogue items of each
    date and a digest of a few windows of its imagery), so another run of the same script goes on,
    though addresses were signed anew. An array that was changed after ``predict`` is known by its
    dask name: it goes on only if exactly the same is computed.

    See Also
    --------
    xchmv2.open_zarr : Read it again.

    Examples
    --------
    >>> height = imagery.chmv2.predict()
    >>> written = height.chmv2.to_zarr("canopy.zarr", encoding="int16_cm")
    >>> height = xchmv2.open_zarr("canopy.zarr")
    """
    cube = read_cube(height)
    encodings = {
        str(name): resolve_encoding(encoding, variable)
        for name, variable in cube.dataset.data_vars.items()
    }
    target = resolve_store(store, storage_options)
    if leaves_process():
        validate_reachable(target)
    wanted = resolve_regions(cube, regions)
    _find_manifest(target)  # refuses what is not ours, before a lock is put there
    with nullcontext() if is_icechunk(target) else WriterLock(target) as lock:
        found = _find_manifest(target)
        if found is not None and not resume:
            raise StoreError(
                f"no store at {target}, since resume=False",
                f"one with {len(found.dates)} dates",
                "resume=True goes on with it (--resume in a shell); or give another name",
            )
        content = {"encoding": encoding, "variables": list(cube.arrays), **fingerprint(cube)}
        manifest = _prepare(target, found, cube, content, encodings, shards=shards)
        arrays = data_arrays(target, cube)
        sinks, present = missing_blocks(cube, manifest, arrays, encodings, wanted)
        name = f"chmv2-write-{tokenize(str(target), list(cube.arrays), sorted(sinks))}"
        if not compute:
            return delayed_sinks(list(cube.arrays.values()), sinks, name)
        return _run(cube, sinks, present, name, manifest, lock, show=progress)


def _prepare(
    store: Store,
    manifest: Manifest | None,
    cube: Cube,
    content: dict[str, Any],
    encodings: Mapping[str, Any],
    *,
    shards: bool,
) -> Manifest:
    """Make the store ready for all dates of a cube: begin it, or check and extend it."""
    if manifest is None:
        dates = _describe_dates(cube)
        ordered = in_order(cube)
        begin(store)
        write_template(store, ordered, encodings, shards=shards)
        records = {label: {**dates[label], "record": i} for i, label in enumerate(ordered.labels)}
        return create_manifest(store, content, records, cube.blocks)
    remove_partial_files(store)
    finish_extension(store, manifest)
    validate_same(manifest.fingerprint, content, str(store))
    dates = _describe_dates(cube)
    known = manifest.dates
    again = {label for label in dates.keys() & known.keys() if _was_unreadable(known[label])}
    for label in dates.keys() & known.keys() - again:
        there = {name: value for name, value in known[label].items() if name != "record"}
        validate_same(there, dates[label], f"{label or 'this array'} in {store}")
    _validate_items_are_new(dates, known)
    add_dates(store, manifest, cube, dates, again & _changed(dates, known))
    return manifest


def _was_unreadable(date: Mapping[str, Any]) -> bool:
    """Whether some of a date's files could not be read, so that another try may find more."""
    return int(date.get("unreadable", 0)) > 0


def _changed(dates: Dates, known: Dates) -> set[str]:
    """Dates whose files are not as they were."""
    both = dates.keys() & known.keys()
    return {n for n in both if {**dates[n], "record": known[n]["record"]} != known[n]}


def _validate_items_are_new(dates: Dates, known: Dates) -> None:
    """Refuse a date that is in the store under another time, because its first item is new."""
    stored = {item: label for label, date in known.items() for item in _items(date)}
    for label in dates.keys() - known.keys():
        twice = [item for item in _items(dates[label]) if item in stored]
        if twice:
            raise StoreError(
                "new dates of new items",
                f"item {twice[0]!r} at {label}, which is in the store at {stored[twice[0]]}",
                "the date got another first item since: load the items it was begun with, or write "
                "to another store",
            )


def _items(date: Mapping[str, Any]) -> list[str]:
    return [item for item in date["items"].split(";") if item]


def _describe_dates(cube: Cube) -> Dates:
    columns = zip(cube.labels, cube.items, cube.unreadable, imagery_digests(cube), strict=True)
    return {
        label: {"items": items, "imagery": digest, **({"unreadable": lost} if lost else {})}
        for label, items, lost, digest in columns
    }


def _run(
    cube: Cube,
    sinks: Mapping[tuple[int, ...], WriteBlock],
    present: int,
    name: str,
    manifest: Manifest,
    lock: WriterLock | None,
    *,
    show: bool,
) -> Written:
    """Write what is missing, and tell of it."""
    todo = sum(len(sink.dates) for sink in sinks.values())

    with Progress(present + todo, present, show=show) as bar:

        def done(place: tuple[int, ...], pixels: int) -> None:
            bar.add(pixels, len(sinks[place].dates))
            if lock is not None:
                lock.validate()

        try:
            run_sinks(list(cube.arrays.values()), sinks, name=name, done=done)
        except Exception as error:
            error.add_note(
                f"{present + bar.regions} of {present + todo} regions are down and stay; the same "
                "call goes on with the others"
            )
            raise
    _validate_recorded(sinks, manifest)
    return Written(todo, present, bar.pixels, bar.seconds)


def _validate_recorded(sinks: Mapping[tuple[int, ...], WriteBlock], manifest: Manifest) -> None:
    """Make sure that what workers wrote is what this process reads."""
    down = manifest.done()
    written = {(d.record, *sink.block) for sink in sinks.values() for d in sink.dates}
    if not written <= down:
        raise StoreError(
            f"{len(written)} regions in {manifest.store}",
            f"{len(written & down)} of them",
            "give a path or URL that means the same place to all processes that compute",
        )


def _find_manifest(store: Store, *, half_removed: bool = False) -> Manifest | None:
    """Open the record of a store; None where it is empty, or half removed if that will do."""
    try:
        return open_manifest(store, half_removed=half_removed)
    except (StoreError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise StoreError(
            f"to reach {store}",
            f"{type(error).__name__}: {error}",
            "check its name, the network and your credentials",
        ) from error


def remove_store(store: StoreLike, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove a store that ``to_zarr`` wrote, whole or half removed, and nothing else.

    Parameters
    ----------
    store : str, path, zarr store or obstore store
        Where it lies.
    storage_options : mapping, optional
        Options of the file system of a URL.

    Raises
    ------
    StoreError
        If something else lies there, or another process is writing to it.

    Notes
    -----
    A store whose removal was interrupted is refused by ``to_zarr`` and ``open_zarr`` until it is
    removed again.
    """
    target = resolve_store(store, storage_options)
    _find_manifest(target, half_removed=True)
    with WriterLock(target):
        remove_all(target)
