"""Heights to a Zarr store: regions already written are kept, missing ones are computed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr
import zarr
from dask.base import tokenize
from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.predict import Progress, delayed_sinks, leaves_process, run_sinks
from xchmv2.raster import validate_flags
from xchmv2.store.lock import WriterLock
from xchmv2.store.records import (
    Manifest,
    begin,
    consolidate,
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
    explain_failures,
    is_icechunk,
    remove_partial_files,
    resolve_store,
    validate_reachable,
)
from xchmv2.store.template import (
    Cube,
    EncodingName,
    read_cube,
    resolve_encoding,
    write_template,
)
from xchmv2.store.timeline import add_dates, in_order

#: By label: source items of a date, digest of its imagery, number of its unreadable files.
_Dates = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """Result of ``to_zarr``.

    Parameters
    ----------
    regions : int
        Regions written; a region is one block at one date.
    present : int
        Regions that the store held before.
    pixels : int
        Pixels written.
    seconds : float
        Time taken [s].
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
    """Write heights to a Zarr store that a kill, a full disk or a new date cannot damage.

    Parameters
    ----------
    height : DataArray or Dataset
        (..., y, x) from ``predict``, or any other, with at most one dim beside y and x. Several
        variables of one prediction are computed together.
    store : str, path, zarr store, obstore store or icechunk Session
        Location of the store. A URL such as "s3://bucket/canopy.zarr" is opened by fsspec. An
        icechunk session is one transaction: commit it afterwards.
    encoding : {"float32", "rounded", "int16_cm", "uint8_half_m"}
        How floating-point variables are stored. "rounded" keeps eighths of a metre in float32,
        "int16_cm" centimetres, "uint8_half_m" half metres from 0 to 127 m. Integers and booleans
        keep their data type; dates are stored as days.
    resume : bool, default True
        Resume an existing store: only missing regions are computed, and new dates are appended.
        Otherwise an existing store is refused.
    regions : mapping or sequence of mappings, optional
        Index ranges, such as ``{"time": 0, "y": slice(0, 8192)}``: only blocks that overlap one of
        them are written. Another call writes the others.
    shards : bool, default False
        Store the chunks of a block in one object: fewer objects, which GDAL up to 3.12 cannot read.
    progress : bool, default True
        Whether to show a progress bar: regions, megapixels per second, time left.
    compute : bool, default True
        False writes the empty store and returns a Delayed that fills it. No lock is held while that
        is computed: make sure that nobody else writes.
    storage_options : mapping, optional
        Options of the file system of a URL.

    Returns
    -------
    Written or dask Delayed
        How many regions were written and how many the store held before; or a Delayed that writes
        them when computed.

    Raises
    ------
    StoreError
        If the location holds something else or a half-removed store, the model, grid or options
        differ from those that the store was begun with, another process is writing, values do not
        fit the encoding, or a region cannot be written. Regions already written are kept.

    Notes
    -----
    A region is one block at one date. It is recorded after its pixels are written. A prediction is
    identified by its weights, precision, grid, bands, masks, the catalogue items of each date and a
    digest of a few windows of its imagery, so another run of the same script resumes even if the
    addresses of the imagery were signed anew. An array that was changed after ``predict`` is
    identified by its dask name: it resumes only if exactly the same is computed.

    A date never moves in the store: later calls append theirs, whatever their time, and
    ``open_zarr`` sorts them. Whoever opened the store before goes on reading it as it was.

    See Also
    --------
    xchmv2.open_zarr : Open the store.

    Examples
    --------
    >>> height = imagery.chmv2.predict()
    >>> written = height.chmv2.to_zarr("canopy.zarr", encoding="int16_cm")
    >>> height = xchmv2.open_zarr("canopy.zarr")
    """
    validate_flags(resume=resume, shards=shards, progress=progress, compute=compute)
    cube = read_cube(height)
    encodings = {
        str(name): resolve_encoding(encoding, variable)
        for name, variable in cube.dataset.data_vars.items()
    }
    target = resolve_store(store, storage_options)
    if leaves_process():
        validate_reachable(target)
    wanted = resolve_regions(cube, regions)
    _find_manifest(target)  # refuses foreign data before a lock is written there
    with nullcontext() if is_icechunk(target) else WriterLock(target) as lock:
        found = _find_manifest(target)
        if found is not None and not resume:
            raise StoreError(
                f"no store at {target}, since resume=False",
                f"one with {len(found.dates)} dates",
                "resume=True completes it (--resume in a shell); or give another name",
            )
        content = {"encoding": encoding, "variables": list(cube.arrays), **fingerprint(cube)}
        manifest = _prepare(target, found, cube, content, encodings, lock, shards=shards)
        arrays = tuple(zarr.open_array(target, path=name, mode="r+") for name in cube.arrays)
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
    lock: WriterLock | None,
    *,
    shards: bool,
) -> Manifest:
    """Make the store ready for all dates of a cube: begin it, or validate and extend it."""
    if manifest is None:
        dates = _describe_dates(cube)
        ordered = replace(cube, dataset=in_order(cube.dataset, cube.date_dim))
        entries = {
            label: {**dates[label], "slot": i, "record": i}
            for i, label in enumerate(ordered.labels)
        }
        with explain_failures(store):
            begin(store)
            write_template(store, ordered, encodings, shards=shards)
            manifest = create_manifest(store, content, entries, cube.blocks)
            consolidate(store)
            return manifest
    with explain_failures(store):
        remove_partial_files(store)
    validate_same(manifest.fingerprint, content, str(store))
    dates = _describe_dates(cube)
    known = manifest.dates
    again = set()
    for label in dates.keys() & known.keys():
        stored = {n: value for n, value in known[label].items() if n not in ("slot", "record")}
        if not int(stored.get("unreadable", 0)):
            validate_same(stored, dates[label], f"{label or 'this array'} in {store}")
        elif stored != dates[label]:  # a file that could not be read is there now, or the reverse
            again.add(label)
    _validate_items_are_new(dates, known)
    with explain_failures(store):
        add_dates(store, manifest, cube, dates, again, lock.validate if lock else lambda: None)
    return manifest


def _validate_items_are_new(dates: _Dates, known: _Dates) -> None:
    """Refuse a date whose items the store holds under another time, that of an earlier item."""
    stored = {item: label for label, date in known.items() for item in date["items"].split(";")}
    for label in dates.keys() - known.keys():
        twice = [item for item in dates[label]["items"].split(";") if item and item in stored]
        if twice:
            raise StoreError(
                "new dates of new items",
                f"item {twice[0]!r} at {label}, which is in the store at {stored[twice[0]]}",
                "the time of a date is that of its first item, which has changed: load the items "
                "that the store was begun with, or write to another store",
            )


def _describe_dates(cube: Cube) -> _Dates:
    items, lost = cube.per_date("item_ids", ""), cube.per_date("unreadable_assets", 0)
    return {
        label: {"items": str(ids), "imagery": digest, **({"unreadable": int(n)} if n else {})}
        for label, ids, n, digest in zip(
            cube.labels, items, lost, imagery_digests(cube), strict=True
        )
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
    """Write the missing regions, with a progress bar."""
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
                f"{present + bar.regions} of {present + todo} regions are written and kept; the "
                "same call writes the others"
            )
            raise
    _validate_recorded(sinks, manifest)
    return Written(todo, present, bar.pixels, bar.seconds)


def _validate_recorded(sinks: Mapping[tuple[int, ...], WriteBlock], manifest: Manifest) -> None:
    """Make sure that this process finds the regions that workers wrote."""
    found = manifest.done()
    written = {(d.record, *sink.block) for sink in sinks.values() for d in sink.dates}
    if not written <= found:
        raise StoreError(
            f"{len(written)} regions in {manifest.store}",
            f"{len(written & found)} of them",
            "give a path or URL that all computing processes resolve to the same location",
        )


def _find_manifest(store: Store, *, half_removed: bool = False) -> Manifest | None:
    """Open the metadata of a store as ``open_manifest`` does; an unreachable one is refused."""
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
    """Remove a store that ``to_zarr`` wrote, complete or half removed, and nothing else.

    Parameters
    ----------
    store : str, path, zarr store or obstore store
        Location of the store.
    storage_options : mapping, optional
        Options of the file system of a URL.

    Raises
    ------
    StoreError
        If the location holds something else, or another process is writing to it.

    Notes
    -----
    A store whose removal was interrupted is refused by ``to_zarr`` and ``open_zarr`` until it is
    removed again.
    """
    target = resolve_store(store, storage_options)
    _find_manifest(target, half_removed=True)
    with WriterLock(target):
        remove_all(target)
