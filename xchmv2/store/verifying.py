"""Checksums of a store: checked when it is read, when a run resumes, and by ``verify``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import WrapperStore

from xchmv2.errors import StoreError
from xchmv2.raster import show, validate_flags
from xchmv2.store.copies import find_changed, read_template, root
from xchmv2.store.lock import WriterLock
from xchmv2.store.records import MARKER, NO_CHECKSUM, Manifest, Region, find_store, read_copy
from xchmv2.store.regions import resolve_regions, touches, write_pixels
from xchmv2.store.storage import (
    DamagedError,
    StoreLike,
    address,
    checksum,
    damaged,
    delete_object,
    explain_failures,
    is_icechunk,
    read_object,
    read_objects,
    resolve_store,
    write_object,
)

#: Regions that are read at once.
_THREADS = 4

#: Whether an object is gone or differs, and its key.
_Wrong = tuple[Literal["missing", "damaged"], str]


@dataclass(frozen=True)
class Problem:
    """One region or file of a store that is not as it was written.

    Parameters
    ----------
    kind : {"missing", "damaged", "not written"}
        Whether an object is gone, differs in size or content, or the region was never written.
    key : str
        The first object concerned.
    date : str
        Label of the date; "" for a file of the template or a store without dates.
    rows, cols : slice or None
        Pixels of the region; None for a file of the template.
    """

    kind: Literal["missing", "damaged", "not written"]
    key: str
    date: str = ""
    rows: slice | None = None
    cols: slice | None = None

    def __str__(self) -> str:
        if self.rows is None or self.cols is None:
            return f"{self.kind}: {self.key}"
        place = write_pixels(self.rows, self.cols)
        return f"{self.kind}: {', '.join(filter(None, [self.date, place, self.key]))}"


@dataclass(frozen=True)
class Verified:
    """Result of ``verify``.

    Parameters
    ----------
    regions : int
        Regions of the store; a region is one block at one date.
    without_checksum : int
        Regions that a former version wrote, of which only the presence can be checked.
    problems : tuple of Problem
        What is missing, damaged or not written; empty if all is well.
    repaired : bool
        Whether files of the template were restored, and damaged regions marked to be computed.
    """

    regions: int
    without_checksum: int
    problems: tuple[Problem, ...] = field(repr=False)
    repaired: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, damaged or not written."""
        return not self.problems


def verify(
    store: StoreLike,
    *,
    repair: bool = False,
    redo: str | Mapping[Hashable, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Verified:
    """Compare everything in a store with the checksums taken when it was written.

    Parameters
    ----------
    store : str, path, zarr store, obstore store or icechunk Session
        Location of a store that ``.chmv2.to_zarr`` wrote.
    repair : bool, default False
        Restore coordinates and metadata from their copy in the store, and forget regions that are
        missing or damaged, so that the same call of ``.chmv2.to_zarr`` computes them again.
    redo : str or mapping, optional
        Regions to compute again by that call although they are well: a date, such as "2020-07-01",
        or a date and index ranges along y and x, such as
        ``{"time": "2020-07-01", "y": slice(0, 8192)}``.
    storage_options : mapping, optional
        Options of the file system of a URL.

    Returns
    -------
    Verified
        What is missing, damaged or not written.

    Raises
    ------
    StoreError
        If there is no store, nothing that could restore it is left, or with ``repair`` or ``redo``
        another process is writing to it.

    Notes
    -----
    Every object is read once, and its size and CRC-32C are compared with the record of its region.
    ``open_zarr`` compares them too when it reads, and ``.chmv2.to_zarr`` before it resumes.

    Examples
    --------
    >>> found = xchmv2.verify("canopy.zarr")
    >>> for problem in found.problems:
    ...     print(problem)
    """
    validate_flags(repair=repair)
    changes = repair or redo is not None
    target = resolve_store(store, storage_options, read_only=not changes)
    with explain_failures(target, "verify"):
        _find(target)  # refuses foreign data before a lock is written there
        locked = changes and not is_icechunk(target)
        with WriterLock(target) if locked else nullcontext():
            return _verify(target, repair=repair, redo=redo)


def _verify(
    store: Store, *, repair: bool, redo: str | Mapping[Hashable, Any] | None = None
) -> Verified:
    manifest, problems = _find(store)
    if not manifest.is_of_first_format:
        problems += _verify_template(manifest, repair)
    done = manifest.done()
    places = {region: label for label, region in manifest.regions}
    found = _compare(manifest, {region: places[region] for region in done})
    bad = {region: wrong for region, wrong in found.items() if wrong is not None}
    unwritten = places.keys() - done
    problems += [_describe(manifest, places[region], region, *bad[region]) for region in bad]
    for region in sorted(unwritten):
        key = manifest.record_key(region)
        problems.append(_describe(manifest, places[region], region, "not written", key))
    if repair:
        forget(manifest, {region: places[region] for region in bad})
    if redo is not None:
        for region in _chosen(manifest, redo) & done:
            delete_object(store, manifest.record_key(region))
    return Verified(len(places), len(found) - len(bad), tuple(problems), repair)


def _find(store: Store) -> tuple[Manifest, list[Problem]]:
    """Open a manifest, or its copy where it is damaged alone."""
    try:
        return find_store(store), []
    except DamagedError:
        copy = read_copy(store)
        if copy is None:
            raise StoreError(
                f"{MARKER} in {address(store)} is damaged, and no copy of it is left",
                fix="write the store anew: height.chmv2.to_zarr(store, mode='w')",
            ) from None
        kind: Any = "missing" if read_object(store, MARKER) is None else "damaged"
        return copy, [Problem(kind, MARKER)]


def _verify_template(manifest: Manifest, repair: bool) -> list[Problem]:
    """Compare all that is not pixels with its copies, and restore it if asked to."""
    template = read_template(manifest)
    changed = find_changed(manifest, template)
    found = read_objects(manifest.store, changed)
    problems = [
        Problem("missing" if found[key] is None else "damaged", key)
        for key in sorted(changed)
        if key != MARKER
    ]
    if repair:
        for key, content in changed.items():
            if content is not None:  # to_zarr has the others
                write_object(manifest.store, key, content)
    return problems


def find_damaged(manifest: Manifest, regions: Mapping[Region, str]) -> set[Region]:
    """Compare written regions with their records; returns those that are missing or damaged."""
    found = _compare(manifest, regions)
    return {region for region, wrong in found.items() if wrong is not None}


def _compare(manifest: Manifest, regions: Mapping[Region, str]) -> dict[Region, _Wrong | None]:
    """Find what is wrong with which object of each region; None where nothing can be compared."""

    def check(region: Region) -> tuple[bool, _Wrong | None]:
        key = manifest.record_key(region)
        record = manifest.parse_record(read_object(manifest.store, key))
        if record is None:
            return True, ("damaged", key)
        keys = manifest.objects(regions[region], region)
        wanted = {k: wanted for k, wanted in zip(keys, record.tolist(), strict=True) if k}
        compared = True
        found = read_objects(manifest.store, wanted)
        for key, (size, crc) in wanted.items():
            compared &= size != NO_CHECKSUM
            if compared and checksum(found[key]) != (size, crc):
                return True, ("missing" if found[key] is None else "damaged", key)
        return not compared, None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(regions, pool.map(check, regions), strict=True)
        return {region: wrong for region, (worth_telling, wrong) in found if worth_telling}


def forget(manifest: Manifest, regions: Mapping[Region, str]) -> None:
    """Delete regions, the record first, so that they count as not written."""
    for region, label in regions.items():
        for key in (manifest.record_key(region), *manifest.objects(label, region)):
            if key:
                delete_object(manifest.store, key)


def _pixels(manifest: Manifest, region: Region) -> tuple[slice, slice]:
    content = manifest.fingerprint
    rows, cols = (
        slice(i * side, min(i * side + side, size))
        for i, side, size in zip(
            region[1:], content["block"], content["grid"]["shape"], strict=True
        )
    )
    return rows, cols


def _describe(manifest: Manifest, label: str, region: Region, kind: Any, key: str) -> Problem:
    return Problem(kind, key, label, *_pixels(manifest, region))


def _chosen(manifest: Manifest, redo: str | Mapping[Hashable, Any]) -> set[Region]:
    """Regions that a user wants to be computed again."""
    *when, y, x = manifest.dims
    given = {when[0]: redo} if isinstance(redo, str) and when else redo
    date = given.get(when[0], "") if isinstance(given, Mapping) and when else ""
    height, width = manifest.fingerprint["grid"]["shape"]
    places = given
    if isinstance(given, Mapping):
        places = {dim: part for dim, part in given.items() if dim not in when}
    wanted = resolve_regions({y: height, x: width}, places)  # type: ignore[arg-type]
    chosen = {
        region
        for label, region in manifest.regions
        if isinstance(date, str) and label.startswith(date)
        if touches(wanted, (y, x), _pixels(manifest, region))
    }
    if not chosen:
        raise StoreError(
            f"a date of the store, such as {next(iter(manifest.dates))[:10]!r}",
            show(date),
            "for example redo='2020-07-01' or redo={'time': '2020-07-01', 'y': slice(0, 8192)}",
        )
    return chosen


class CheckedStore(WrapperStore[Store]):
    """A store that is read as the manifest describes it, and compared with its checksums.

    Metadata and coordinates come from the copy of the template, as they were when it was opened.
    A chunk is missing if its region was not ``done`` when it was opened, and is not recorded yet. A
    chunk that differs is a StoreError.
    """

    def __init__(self, store: Store, manifest: Manifest, done: set[Region]) -> None:
        super().__init__(store)
        self._manifest = manifest
        self._unwritten = {region for _, region in manifest.regions} - done
        self._slots = [date["record"] for date in manifest.dates.values()]
        self._records: dict[Region, Any] = {}
        template = read_template(manifest) if manifest.copy is not None else {}
        self._sums = {key: c for key, c in template.items() if not isinstance(c, bytes)}
        self._own = {key: c for key, c in template.items() if isinstance(c, bytes)}
        if template:
            self._own["zarr.json"] = root(manifest, template)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object, and compare it with its checksum."""
        if key in self._own:
            return prototype.buffer.from_bytes(self._own[key])
        place = self._find(key)
        if place is None and key not in self._sums:
            return await self._store.get(key, prototype, byte_range)
        for again in (False, True):  # it may have been written between record and chunk
            wanted = self._sums.get(key) if place is None else await self._wanted(*place, again)
            if wanted is None and place is not None and place[0] not in self._unwritten:
                continue  # its record was there
            found = None if wanted is None else await self._store.get(key, prototype, byte_range)
            if wanted is None or wanted[0] == NO_CHECKSUM:
                return found
            if byte_range is None:
                right = checksum(None if found is None else found.to_bytes()) == wanted
            else:  # a part of a shard has a checksum of its own
                right = (found is not None) == (wanted[0] > 0)
            if right:
                return found
        raise StoreError(
            f"{key} in {address(self._store)} is damaged, or was written anew since it was opened",
            fix="open it again; if that does not help: xchmv2.verify(store, repair=True), and make "
            "the call of .chmv2.to_zarr() again, which computes it",
        )

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of objects."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for request in requests:
            yield request[0], await self.get(*request)

    def _find(self, key: str) -> tuple[Region, int] | None:
        """Region and index in its record of a chunk; None of anything else."""
        name, _, tail = key.partition("/c/")
        numbers = tail.split("/")
        if name not in self._manifest.variables or not all(map(str.isdecimal, numbers)):
            return None
        *slot, y, x = map(int, numbers)
        ny, nx = self._manifest.parts
        region = (self._slots[slot[0] if slot else 0], y // ny, x // nx)
        variable = self._manifest.variables.index(name)
        return region, (variable * ny + y % ny) * nx + x % nx

    async def _wanted(self, region: Region, index: int, again: bool) -> tuple[int, int] | None:
        """Size and checksum of a chunk; None if its region is not recorded."""
        if again or region not in self._records:
            key = self._manifest.record_key(region)
            data = await self._store.get(key, default_buffer_prototype())
            record = self._manifest.parse_record(data.to_bytes() if data else None)
            if data is not None and record is None:
                raise damaged(self._store, key)
            if record is None:
                return None
            self._records[region] = record.tolist()
        size, crc = self._records[region][index]
        return size, crc

    def with_read_only(self, read_only: bool = False) -> CheckedStore:
        """Return it as it is."""
        return self

    def __dask_tokenize__(self) -> tuple[str, int]:
        return str(self._store), checksum(self._manifest.to_bytes())[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": {}, "_records": {}}
