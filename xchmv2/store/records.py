"""Metadata of a store: its fingerprint, its dates, and the records of written regions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.store.lock import LOCK
from xchmv2.store.storage import (
    address,
    as_json,
    checksum,
    damaged,
    delete_below,
    delete_name,
    delete_object,
    is_icechunk,
    list_keys,
    list_names,
    parse_json,
    read_metadata,
    read_object,
    read_objects,
    write_object,
)
from xchmv2.store.template import can_name

GROUP = "xchmv2"
MARKER = f"{GROUP}/zarr.json"
#: Array (record, block along y, block along x, object, 2) of uint64: size [bytes] and CRC-32C of
#: each object of a region. A region without an object there is not written.
RECORDS = f"{GROUP}/checksums"
#: Records of format 1: a byte for each written region.
FORMER_RECORDS = f"{GROUP}/done"
#: Size in the record of an object that was written without a checksum, by format 1.
NO_CHECKSUM = 2**64 - 1
#: 2: a date keeps its slot, and objects have checksums. In format 1 dates were moved, so that they
#: lay in the order of time.
_FORMAT = 2

#: A written region: its record, and its block along y and x.
Region = tuple[int, int, int]


@dataclass(frozen=True)
class Manifest:
    """The metadata of a store, which lie in a group beside the data, validated.

    `fingerprint`: everything that determines the pixels except the dates; `dates`: by label, in
    order of the slots, entries of the ``slot``, the index along the dates for ever, the index in
    the ``record``, source ``items``, digest of the ``imagery`` and number of ``unreadable`` files;
    `parts`: objects of a block along y and x, chunks or one shard; `copy`: name of the copy of the
    template, None in format 1 and in icechunk; `is_of_first_format`: whether dates have no slots of
    their own yet.
    """

    store: Store
    fingerprint: dict[str, Any]
    dates: dict[str, dict[str, Any]]
    parts: tuple[int, int]
    copy: str | None = None
    is_of_first_format: bool = False

    @property
    def variables(self) -> list[str]:
        """Names of the variables."""
        return list(self.fingerprint["variables"])

    @property
    def dims(self) -> list[str]:
        """Names of the dims: at most one of the dates, and those of y and x."""
        return list(self.fingerprint["grid"]["dims"])

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks along y and x."""
        sizes = zip(self.fingerprint["grid"]["shape"], self.fingerprint["block"], strict=True)
        y, x = (-(-size // side) for size, side in sizes)
        return y, x

    @property
    def identity(self) -> int:
        """A number that differs where other pixels are wanted, whatever the dates."""
        return checksum(json.dumps(self.fingerprint, sort_keys=True).encode())[1]

    @property
    def regions(self) -> Iterator[tuple[str, Region]]:
        """Label and place of every region, whether it is written or not."""
        for label, date in self.dates.items():
            for y, x in np.ndindex(self.blocks):
                yield label, (date["record"], y, x)

    def objects(self, label: str, region: Region) -> list[str | None]:
        """Keys of the objects of a region, in the order of its record; None beyond the edge."""
        (by, bx), (ny, nx) = region[1:], self.parts
        shape, block = self.fingerprint["grid"]["shape"], self.fingerprint["block"]
        rows, cols = (-(-s * n // b) for s, n, b in zip(shape, self.parts, block, strict=True))
        slot = f"{self.dates[label]['slot']}/" if len(self.dims) > 2 else ""
        return [
            f"{name}/c/{slot}{y}/{x}" if y < rows and x < cols else None
            for name in self.variables
            for y in range(by * ny, by * ny + ny)
            for x in range(bx * nx, bx * nx + nx)
        ]

    def done(self) -> set[Region]:
        """List the written regions of the present dates."""
        known = [region for _, region in self.regions]
        keys: list[str] = []
        with suppress(Exception) if self.store.read_only else nullcontext():
            keys = list_keys(self.store, f"{GROUP}/")
        if MARKER not in keys:  # it cannot be listed, as over plain HTTP
            found = read_objects(self.store, [self.record_key(region) for region in known])
            keys = [key for key, data in found.items() if data is not None]
        listed = {*keys}
        return {region for region in known if self.record_key(region) in listed}

    def record_key(self, region: Region) -> str:
        """Key of the record of a region."""
        head, tail = (FORMER_RECORDS, "") if self.is_of_first_format else (RECORDS, "/0/0")
        return f"{head}/c/{'/'.join(map(str, region))}{tail}"

    def parse_record(self, data: bytes | None) -> npt.NDArray[np.uint64] | None:
        """Read a record: (object, 2) sizes and checksums; None if it is not written or damaged."""
        count = len(self.variables) * math.prod(self.parts)
        if data is not None and self.is_of_first_format:
            return np.full((count, 2), NO_CHECKSUM, "<u8")
        if data is None or len(data) != 16 * count:
            return None
        return np.frombuffer(data, "<u8").reshape(count, 2)

    @property
    def record_metadata(self) -> bytes:
        """The metadata by which zarr reads the records."""
        shape = (*self.blocks, len(self.variables) * math.prod(self.parts), 2)
        count = 1 + max(date["record"] for date in self.dates.values())
        grid = {"name": "regular", "configuration": {"chunk_shape": [1, 1, 1, *shape[2:]]}}
        return as_json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [count, *shape],
                "data_type": "uint64",
                "chunk_grid": grid,
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "fill_value": 0,
                "dimension_names": ["record", "block_y", "block_x", "object", "size_and_crc32c"],
                "attributes": {},
            }
        )

    def to_bytes(self) -> bytes:
        """Write it as the metadata of a group, with a checksum of its own."""
        content = {
            "fingerprint": self.fingerprint, "dates": self.dates, "parts": list(self.parts),
            "copy": self.copy, "state": "ready", "format": _FORMAT,
        }  # fmt: skip
        attributes = {**content, "crc32c": _checksum(content)}
        return as_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def open_manifest(store: Store, *, half_removed: bool = False) -> Manifest | None:
    """Open the metadata of a store; None if it is empty or its template is incomplete.

    A StoreError refuses a store that holds something else, was written by a later version, is
    damaged or half removed, or in which a former version was killed while it moved dates; with
    ``half_removed`` these last three are no errors: the first two count as empty, and moved dates
    do not matter.
    """
    data = read_object(store, MARKER)
    attrs = _attributes(data)
    state = attrs.get("state")
    if state == "creating" or (state == "removing" and half_removed):
        return None
    if state == "removing":
        raise StoreError(
            f"{address(store)} is half removed, because its removal was interrupted",
            fix="remove the rest by xchmv2.store.remove_store(...), or write anew by "
            ".chmv2.to_zarr(..., mode='w') (--overwrite in a shell)",
        )
    if state == "ready":
        return _validated(store, attrs, half_removed)
    if _data_of_copy(store) or (data and not attrs and _names(store) - {GROUP}):
        if half_removed:
            return None
        raise damaged(store, MARKER)
    foreign = _foreign_names(store)
    if foreign:
        raise StoreError(
            "an empty location, or a store that .chmv2.to_zarr() wrote",
            f"{', '.join(sorted(foreign)[:5])} in {address(store)}",
            "give another name; nothing there was changed",
        )
    return None


def find_store(store: Store) -> Manifest:
    """Open the metadata of a store that must be there."""
    with suppress(FileNotFoundError):
        manifest = open_manifest(store)
        if manifest is not None:
            return manifest
        if read_object(store, MARKER) is not None:
            raise StoreError(
                f"{address(store)} was begun, but its template is not complete",
                fix="make the call of .chmv2.to_zarr() again, unless it is running",
            )
    raise StoreError(
        f"there is no store at {address(store)}",
        fix="correct its name, or write it: height.chmv2.to_zarr(store)",
    )


def _validated(store: Store, attrs: Mapping[str, Any], half_removed: bool) -> Manifest | None:
    if type(attrs.get("format")) is int and attrs["format"] > _FORMAT:
        raise StoreError(
            f"a store of format {_FORMAT} or 1",
            f"format {attrs['format']} in {address(store)}",
            "upgrade xchmv2",
        )
    if attrs.get("pending") and not half_removed:
        raise StoreError(
            "a store whose dates are complete",
            f"one in which a former version was killed while it moved dates: {address(store)}",
            "make the call that was killed again with that version, which completes the store; or "
            "write to another store",
        )
    found = _parse(store, attrs)
    if found is None and not half_removed:
        raise damaged(store, MARKER)
    return found


def read_copy(store: Store) -> Manifest | None:
    """Read the copy of the manifest in the metadata of the root; None if it has none."""
    attrs = _attributes(_data_of_copy(store))
    return _parse(store, attrs) if attrs.get("state") == "ready" else None


def _data_of_copy(store: Store) -> bytes | None:
    """Find the manifest's copy in the metadata of the root, whatever it holds."""
    with suppress(StoreError, FileNotFoundError):
        root = parse_json(read_object(store, "zarr.json"), "zarr.json", store)
        metadata = (root.get("consolidated_metadata") or {}).get("metadata") or {}
        if GROUP in metadata and "fingerprint" in metadata[GROUP].get("attributes", {}):
            return as_json(metadata[GROUP])
    return None


def _attributes(data: bytes | None) -> dict[str, Any]:
    """Attributes of a group; empty if there are none, or the metadata cannot be read."""
    try:
        return dict(json.loads(data or b"{}").get("attributes") or {})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _checksum(content: Mapping[str, Any]) -> int:
    """CRC-32C of the attributes of a manifest but for itself, however they are formatted."""
    kept = {name: value for name, value in content.items() if name != "crc32c"}
    return checksum(json.dumps(kept, sort_keys=True).encode())[1]


def _parse(store: Store, attrs: Mapping[str, Any]) -> Manifest | None:
    """Read the attributes of a manifest, or return None if they cannot be right."""
    former = attrs.get("format") == 1
    if attrs.get("format") not in (1, _FORMAT):
        return None
    if not former and attrs.get("crc32c") != _checksum(attrs):
        return None
    try:
        content, dates = dict(attrs["fingerprint"]), dict(attrs["dates"])
        if "order" in attrs:  # format 1
            dates = {label: {"slot": i, **dates[label]} for i, label in enumerate(attrs["order"])}
        dates = dict(sorted(dates.items(), key=lambda item: int(item[1]["slot"])))
        sides = [*content["grid"]["shape"], *content["block"], *(attrs.get("parts") or (1, 1))]
        named = [*content["variables"], *content["grid"]["dims"]]
        slots = [date["slot"] for date in dates.values()]
        records = [date["record"] for date in dates.values()]
        right = (
            slots == list(range(len(dates)))
            and len({*records}) == len(records) > 0
            and all(type(n) is int and n >= 0 for n in records)
            and all(type(n) is int and n > 0 for n in sides)
            and len(sides) == 6
            and len(content["variables"]) > 0
            and all(isinstance(name, str) and can_name(name) for name in named)
            and len(content["grid"]["dims"]) in (2, 3)
            and can_name(str(attrs.get("copy")))
        )
        parts: Any = _parts(store, content) if former and right else attrs.get("parts")
        found = Manifest(store, content, dates, tuple(parts), attrs.get("copy"), former)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return found if right else None


def _parts(store: Store, content: Mapping[str, Any]) -> tuple[int, int]:
    """Objects of a block along y and x, as the metadata of the first variable tell."""
    grid = read_metadata(store, content["variables"][0])["chunk_grid"]["configuration"]
    y, x = (b // c for b, c in zip(content["block"], grid["chunk_shape"][-2:], strict=True))
    return y, x


def begin(store: Store) -> None:
    """Delete the leftovers of a killed start, and mark the store as being created.

    Nothing is deleted, nor is an existing marker replaced, because a server did not show it.
    """
    begun = _attributes(read_object(store, MARKER)).get("state") == "creating"
    others = _list_others(store)
    if begun:
        _delete_all(store)
    elif _foreign_names(store) or MARKER in others:
        raise _unreliable(store)
    _mark(store, "creating", new=not begun)
    if _attributes(read_object(store, MARKER)).get("state") != "creating":
        raise _unreliable(store)


def _list_others(store: Store) -> set[str]:
    """List everything but the lock, which this process holds, so that the listing must show it."""
    keys = {*list_keys(store, "")}
    if LOCK not in keys and not is_icechunk(store):
        raise _unreliable(store)
    return keys - {LOCK}


def _unreliable(store: Store) -> StoreError:
    return StoreError(
        f"{address(store)} answers requests in contradictory ways: what was there is not listed",
        fix="make the same call again when the server works; nothing was deleted",
    )


def _mark(store: Store, state: str, *, new: bool = False) -> None:
    content = {"zarr_format": 3, "node_type": "group", "attributes": {"state": state}}
    write_object(store, MARKER, as_json(content), new=new)


def remove_all(store: Store) -> None:
    """Delete everything but the lock, so that a kill never leaves a store that seems complete.

    The state is first set to "removing" and deleted last. Records are deleted before pixels: no
    region is ever recorded whose pixels are gone.
    """
    _mark(store, "removing")
    for records in (RECORDS, FORMER_RECORDS):
        delete_below(store, f"{records}/c")
    _delete_all(store)
    if _list_others(store) - {MARKER}:  # a listing was incomplete
        raise _unreliable(store)
    delete_object(store, MARKER)


def _delete_all(store: Store) -> None:
    """Delete everything but lock and marker; first the root, with which plain xarray opens it."""
    for name in sorted(_names(store) - {GROUP}, key=lambda name: name != "zarr.json"):
        delete_name(store, name)
    for name in list_names(store, GROUP):
        if f"{GROUP}/{name}" not in (LOCK, MARKER):
            delete_name(store, f"{GROUP}/{name}")


def _names(store: Store) -> set[str]:
    return set(list_names(store))


def _foreign_names(store: Store) -> set[str]:
    """Name everything in a store without a manifest except a lock and empty groups."""
    own = list_keys(store, f"{GROUP}/") if GROUP in _names(store) else []
    # Another writer may be writing its lock or its first attributes at this moment.
    expected = (LOCK, MARKER)
    strange = {k for k in own if k not in expected and not k.endswith(".partial")}
    found = (_names(store) - {GROUP}) | strange
    if found == {"zarr.json"} and not _attributes(read_object(store, "zarr.json")):
        return set()
    return found
