"""Heights to a Zarr store: regions already written are kept, missing ones are computed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import xarray as xr
from dask.base import tokenize
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from xchmv2.errors import StoreError, warn
from xchmv2.predict import Progress, delayed_sinks, leaves_process, run_sinks
from xchmv2.raster import validate_choice, validate_flags
from xchmv2.store.copies import collect, in_memory, publish, read_template
from xchmv2.store.fingerprint import fingerprint, imagery_digests, validate_same
from xchmv2.store.lock import WriterLock
from xchmv2.store.records import Manifest, Region, begin, open_manifest, remove_all
from xchmv2.store.regions import Regions, WriteBlock, missing_blocks, resolve_regions, write_pixels
from xchmv2.store.storage import (
    StoreLike,
    address,
    explain_failures,
    is_icechunk,
    is_repository,
    remove_partial_files,
    resolve_store,
    validate_reachable,
)
from xchmv2.store.template import (
    CompressorName,
    Cube,
    Encoding,
    EncodingName,
    open_pixels,
    read_cube,
    resolve_encoding,
    write_template,
)
from xchmv2.store.timeline import add_dates, in_order, raise_format, restore
from xchmv2.store.transactions import Writes, transactions
from xchmv2.store.verifying import find_damaged, forget

_Mode = Literal["a", "w-", "w"]

#: How often a run looks at its lock at most [s].
_LOOK = 1.0
#: After so many blocks that failed one after another the run ends.
_MOST_FAILURES = 50
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
    compressor: CompressorName = "blosc",
    mode: _Mode = "a",
    regions: Regions | None = None,
    shards: bool = False,
    progress: bool = True,
    compute: bool = True,
    verify: bool = True,
    fsync: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Write heights to a Zarr store that a kill, a full disk or a new date cannot damage.

    Parameters
    ----------
    height : DataArray or Dataset
        (..., y, x) from ``predict``, or any other, with at most one dim beside y and x. Several
        variables of one prediction are computed together.
    store : str, path, zarr store, obstore store, icechunk Session or Repository
        Location of the store. A URL such as "s3://bucket/canopy.zarr" is opened by fsspec. An
        icechunk session is one transaction: commit it afterwards. To a repository each date is
        committed when it is written.
    encoding : {"float32", "rounded", "int16_cm", "uint8_half_m"}
        How floating-point variables are stored. "rounded" keeps eighths of a metre in float32,
        "int16_cm" centimetres, "uint8_half_m" half metres from 0 to 127 m. Integers and booleans
        keep their data type; dates are stored as days.
    compressor : {"blosc", "gzip"}
        "gzip" is for GDAL without blosc, such as that of the package pyogrio: larger and slower. An
        existing store keeps its own.
    mode : {"a", "w-", "w"}
        "a" resumes an existing store: only missing regions are computed, and new dates are
        appended. "w-" refuses an existing store. "w" removes it first, complete or half removed,
        and writes it anew; what is no store of this package is refused.
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
    verify : bool, default True
        Whether to read the regions that the store holds of these dates and compare them with their
        checksums; those missing or damaged are computed again. False believes the records.
    fsync : bool, default True
        Whether pixels have to be on the disk before they are recorded, where the store is a local
        folder, so that a power failure leaves no record without pixels.
    storage_options : mapping, optional
        Options of the file system of a URL; of an icechunk repository the branch, by default
        ``{"branch": "main"}``.

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
    validate_flags(shards=shards, progress=progress, compute=compute, verify=verify, fsync=fsync)
    validate_choice("mode", mode, get_args(_Mode), "w", error=StoreError)
    cube = read_cube(height)
    encodings = {
        str(name): resolve_encoding(encoding, variable, compressor)
        for name, variable in cube.dataset.data_vars.items()
    }
    target = resolve_store(store, storage_options)
    if leaves_process():
        validate_reachable(target)
    if not compute and is_icechunk(target) and (leaves_process() or is_repository(store)):
        raise StoreError(
            "compute=True, because what is written has to be merged and committed",
            "compute=False for icechunk",
            "write now, height.chmv2.to_zarr(store); or give a session and compute in threads",
        )
    sizes = {str(dim): size for dim, size in cube.dataset.sizes.items()}
    wanted = resolve_regions(sizes, regions)
    content = {"encoding": encoding, "variables": list(cube.arrays), **fingerprint(cube)}
    dates = _describe_dates(cube)
    _find_manifest(target, mode)  # refuses foreign data before a lock is written there
    with nullcontext() if is_icechunk(target) else WriterLock(target) as lock:
        with explain_failures(target):
            found = _find_manifest(target, mode)
            if mode == "w":
                _validate_is_no_source(cube, target)
                remove_all(target)
                found = None
            if found is None:
                manifest = _begin(target, cube, content, dates, encodings, shards=shards)
            else:
                manifest = _continue(found, cube, content, dates, encodings, lock)
            done = manifest.done()
            if verify:
                done -= _forget_damaged(manifest, cube, done)
            raw = in_memory(read_template(manifest))
        arrays = tuple(open_pixels(raw, name) for name in cube.arrays)
        sinks, present = missing_blocks(
            cube, manifest, done, arrays, encodings, wanted, fsync=fsync
        )
        name = f"chmv2-write-{tokenize(str(target), list(cube.arrays), sorted(sinks))}"
        if not compute:
            return delayed_sinks(list(cube.arrays.values()), sinks, name)
        return _run(cube, store, sinks, present, name, manifest, lock, show=progress)


def _validate_is_no_source(cube: Cube, store: Store) -> None:
    """Refuse to remove the store from which heights are still to be read."""
    for array in cube.arrays.values():
        for name, layer in array.dask.layers.items():
            for source in layer.values() if name.startswith("original-") else ():
                source = getattr(source, "value", source)
                while hasattr(source, "array"):
                    source = source.array
                path = getattr(getattr(source, "_array", None), "store_path", None)
                if path is not None and str(path.store).endswith(str(store)):
                    raise StoreError(
                        "heights that are read from elsewhere, since mode='w' removes the store",
                        f"heights read from {address(store)} itself",
                        "write to another store, or read them first: height.load()",
                    )


def _begin(
    store: Store,
    cube: Cube,
    content: dict[str, Any],
    dates: _Dates,
    encodings: Mapping[str, Encoding],
    *,
    shards: bool,
) -> Manifest:
    ordered = replace(cube, dataset=in_order(cube.dataset, cube.date_dim))
    entries = {
        label: {**dates[label], "slot": i, "record": i} for i, label in enumerate(ordered.labels)
    }
    y, x = (1, 1) if shards else (b // c for b, c in zip(cube.block, cube.chunk, strict=True))
    remove_partial_files(store)
    begin(store)
    raw = MemoryStore()
    write_template(raw, ordered, encodings, shards=shards)
    manifest = Manifest(store, content, entries, (y, x))
    return publish(manifest, collect(raw, list(cube.arrays)), {}, raw)


def _continue(
    manifest: Manifest,
    cube: Cube,
    content: dict[str, Any],
    dates: _Dates,
    encodings: Mapping[str, Encoding],
    lock: WriterLock | None,
) -> Manifest:
    """Make an existing store ready for all dates of a cube: compare, restore and extend it."""
    store = manifest.store
    remove_partial_files(store)
    validate_same(manifest.fingerprint, content, address(store))
    known = manifest.dates
    again = set()
    for label in dates.keys() & known.keys():
        stored = {n: value for n, value in known[label].items() if n not in ("slot", "record")}
        if not int(stored.get("unreadable", 0)):
            validate_same(stored, dates[label], f"{label or 'this array'} in {address(store)}")
        elif stored != dates[label]:  # a file that could not be read is there now, or the reverse
            again.add(label)
    _validate_items_are_new(dates, known)

    def template() -> Store:
        raw = MemoryStore()
        write_template(raw, cube, encodings, shards=False)
        return raw

    validate = lock.validate if lock else lambda: None
    manifest = raise_format(manifest, validate)
    restore(manifest, cube, template)
    return add_dates(manifest, cube, dates, again, validate)


def _forget_damaged(manifest: Manifest, cube: Cube, done: set[Region]) -> set[Region]:
    """Find the regions of a cube's dates that are not as they were written; they count no more."""
    labels = {manifest.dates[label]["record"]: label for label in cube.labels}
    regions = {region: labels[region[0]] for region in done if region[0] in labels}
    bad = find_damaged(manifest, regions)
    if bad:
        warn(
            f"{len(bad)} regions of {address(manifest.store)} are missing or damaged, and are "
            "computed again; xchmv2.verify(store) lists them"
        )
        forget(manifest, {region: regions[region] for region in bad})
    return bad


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
    store: StoreLike,
    sinks: Mapping[tuple[int, ...], WriteBlock],
    present: int,
    name: str,
    manifest: Manifest,
    lock: WriterLock | None,
    *,
    show: bool,
) -> Written:
    """Write the missing regions, with a progress bar; those that fail are reported at the end."""
    todo = sum(len(sink.dates) for sink in sinks.values())
    arrays, failures = list(cube.arrays.values()), dict[tuple[int, ...], Exception]()
    in_a_row, looked = 0, -math.inf

    def write(part: Writes, target: Store, count: Callable[[Any], int]) -> None:
        def done(place: tuple[int, ...], result: Any) -> None:
            nonlocal in_a_row, looked
            in_a_row = 0
            bar.add(count(result), len(sinks[place].dates))
            if lock is not None and time.monotonic() - looked > _LOOK:  # it is a request
                lock.validate()
                looked = time.monotonic()

        def failed(place: tuple[int, ...], error: Exception) -> None:
            nonlocal in_a_row
            in_a_row += 1
            failures[place] = error
            if in_a_row == _MOST_FAILURES:
                raise _failure(sinks, failures)

        run_sinks(arrays, part, name=name, done=done, failed=failed)
        written = [sinks[place] for place in part if place not in failures]
        _validate_recorded(written, replace(manifest, store=target))

    with Progress(present + todo, present, show=show) as bar:
        try:
            with closing(transactions(store, manifest.store, sinks)) as parts:
                for part in parts:
                    write(*part)
            if failures:
                raise _failure(sinks, failures)
            if lock is not None:
                lock.validate()
        except (Exception, KeyboardInterrupt) as error:
            note = (
                f"{present + bar.regions} of {present + todo} regions are written and kept; the "
                "same call writes the others"
            )
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(note) from None
            error.add_note(note)
            raise
    return Written(todo, present, bar.pixels, bar.seconds)


def _failure(
    sinks: Mapping[tuple[int, ...], WriteBlock], failures: Mapping[tuple[int, ...], Exception]
) -> StoreError:
    """Name the first block that could not be computed, with its error, and count the others."""
    place, error = next(iter(failures.items()))
    sink = sinks[place]
    dates = [date.label for date in sink.dates if date.label]
    others = f", nor could {len(failures) - 1} other blocks" if len(failures) > 1 else ""
    found = StoreError(
        f"the block of {write_pixels(sink.rows, sink.cols)}"
        f"{' at ' if dates else ''}{', '.join(dates)} could not be computed "
        f"({type(error).__name__}: {error}){others}",
        fix="correct the cause and make the same call again: it computes only what is missing",
    )
    found.__cause__ = error
    return found


def _validate_recorded(sinks: Sequence[WriteBlock], manifest: Manifest) -> None:
    """Make sure that this process finds the regions that workers wrote."""
    with explain_failures(manifest.store):
        found = manifest.done()
    written = {(d.entry["record"], *sink.block) for sink in sinks for d in sink.dates}
    if not written <= found:
        raise StoreError(
            f"{len(written)} regions in {address(manifest.store)}",
            f"{len(written & found)} of them",
            "give a path or URL that all computing processes resolve to the same location",
        )


def _find_manifest(store: Store, mode: _Mode) -> Manifest | None:
    """Open the metadata of a store as a mode allows; an unreachable one is refused."""
    try:
        found = open_manifest(store, half_removed=mode == "w")
    except (StoreError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise StoreError(
            f"to reach {address(store)}",
            f"{type(error).__name__}: {error}",
            "check its name, the network and your credentials",
        ) from error
    if found is not None and mode == "w-":
        raise StoreError(
            f"no store at {address(store)}, since mode='w-'",
            f"one with {len(found.dates)} dates",
            "mode='a' completes it (--resume in a shell), mode='w' replaces it",
        )
    return found


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
    _find_manifest(target, "w")
    with nullcontext() if is_icechunk(target) else WriterLock(target), explain_failures(target):
        remove_all(target)
