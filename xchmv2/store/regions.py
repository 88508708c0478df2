"""Blocks that are missing in a store, and the task that writes one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, StorePath, WrapperStore

from xchmv2.errors import StoreError
from xchmv2.predict import blocks_of
from xchmv2.raster import list_items, show
from xchmv2.store.records import Manifest, Region, open_manifest
from xchmv2.store.storage import checksum, write_object
from xchmv2.store.template import Cube, Encoding

_Region = Mapping[Hashable, slice | int]
#: Index ranges along some dims, or several of these.
Regions = _Region | Sequence[_Region]


@dataclass(frozen=True)
class _DatePlace:
    """Index of a date in the block, its label and entry in the manifest, and keys to write."""

    source: int
    label: str
    entry: Mapping[str, Any]
    record: str
    objects: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class WriteBlock:
    """Task: encode one block of each variable, write it, record it.

    `identity`: that of the manifest for which this was planned; `arrays` of the store, (date, y, x)
    or (y, x), and `encodings`, how each is stored; `dates` of the block that are not written yet;
    `block`: its index along y and x; `rows`, `cols`: its pixels; `fsync`: whether these have to be
    on a local disk before they are recorded.
    """

    store: Store
    identity: int
    arrays: tuple[zarr.Array[Any], ...]
    encodings: tuple[Encoding, ...]
    dates: tuple[_DatePlace, ...]
    block: tuple[int, int]
    rows: slice
    cols: slice
    fsync: bool

    def __call__(self, blocks: Sequence[npt.NDArray[Any]]) -> int:
        """Write the blocks, one of each variable; returns the number of pixels."""
        noting = _Noting(self.store, self.fsync)
        try:
            now = open_manifest(self.store)
        except OSError as error:
            raise self._failure("a block", error) from error
        known = now.dates if now is not None and now.identity == self.identity else {}
        for date in self.dates:
            if known.get(date.label) != date.entry:
                raise StoreError(
                    f"another run is writing {date.label or 'this array'} anew since this one was "
                    "planned",
                    fix="call .chmv2.to_zarr() again",
                )
            for array, encode, block in zip(self.arrays, self.encodings, blocks, strict=True):
                place = StorePath(noting, array.path)
                noted: Any = zarr.AsyncArray(array.metadata, place)
                self._write(zarr.Array(noted), encode, np.asarray(block), date)
            record = np.array([noting.noted.get(key or "", (0, 0)) for key in date.objects], "<u8")
            try:  # after the data, so that a block that is recorded is written
                write_object(self.store, date.record, record.tobytes())
            except Exception as error:
                raise self._failure(f"the record of {self._name('', date)}", error) from error
        height, width = blocks[0].shape[-2:]
        return int(height * width * len(self.dates))

    def _write(
        self, array: zarr.Array[Any], encode: Encoding, block: npt.NDArray[Any], date: _DatePlace
    ) -> None:
        flat = block.ndim == 2
        slot = int(date.entry["slot"])
        where = (self.rows, self.cols) if flat else (slot, self.rows, self.cols)
        try:
            array[where] = encode(block if flat else block[date.source])
        except OverflowError as error:
            raise StoreError(
                f"heights that the encoding can hold at {self._name(array.path, date)}",
                str(error),
                "choose encoding='int16_cm' or 'float32' for a new store",
            ) from None
        except Exception as error:
            raise self._failure(self._name(array.path, date), error) from error

    def _name(self, variable: str, date: _DatePlace) -> str:
        place = write_pixels(self.rows, self.cols)
        return ", ".join(filter(None, [variable, date.label, place]))

    def _failure(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"{what} could not be written ({type(error).__name__}: {error})",
            fix="correct the cause and make the same call again: regions already written are kept, "
            "and only the missing ones are computed",
        )


def write_pixels(rows: slice, cols: slice) -> str:
    """Name the pixels of a block in a message."""
    return f"y {rows.start}:{rows.stop}, x {cols.start}:{cols.stop}"


class _Noting(WrapperStore[Store]):
    """A store that notes size and checksum of each object written, and can wait for the disk."""

    def __init__(self, store: Store, fsync: bool) -> None:
        super().__init__(store)
        self.noted: dict[str, tuple[int, int]] = {}
        self._folder = store.root if fsync and isinstance(store, LocalStore) else None

    async def set(self, key: str, value: Buffer) -> None:
        await self._store.set(key, value)
        self.noted[key] = checksum(value.to_bytes())
        if self._folder is not None:
            await asyncio.to_thread(_wait_for_disk, self._folder / key)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        await asyncio.gather(*starmap(self.set, values))


def _wait_for_disk(path: os.PathLike[str]) -> None:
    """Return when a file and its name are on the disk, as far as the system can tell."""
    for name in (path, os.path.dirname(path)):
        if os.name != "nt" or name == path:  # Windows opens no folders
            descriptor = os.open(name, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def missing_blocks(
    cube: Cube,
    manifest: Manifest,
    done: set[Region],
    arrays: tuple[zarr.Array[Any], ...],
    encodings: Mapping[str, Encoding],
    wanted: list[dict[str, slice]] | None,
    *,
    fsync: bool,
) -> tuple[dict[tuple[int, ...], WriteBlock], int]:
    """Find the blocks of a cube that are not in the store.

    ``done`` are the regions written, ``wanted`` the index ranges from :func:`resolve_regions`.
    Returns the task that writes each missing block, by its index in the cube, and how many of the
    wanted regions are written.
    """
    dates, labels, identity = manifest.dates, cube.labels, manifest.identity
    each = tuple(encodings.values())
    found, present = {}, 0
    for index, pixels in blocks_of(next(iter(cube.arrays.values()))):
        if not touches(wanted, manifest.dims, pixels):
            continue
        *when, rows, cols = pixels
        by, bx = index[-2:]
        span = when[0] if when else slice(0, 1)
        places = {label: (dates[label]["record"], by, bx) for label in labels[span]}
        missing = tuple(
            _DatePlace(
                i, label, dates[label], manifest.record_key(region),
                tuple(manifest.objects(label, region)),
            )
            for i, (label, region) in enumerate(places.items())
            if region not in done
        )  # fmt: skip
        present += len(places) - len(missing)
        if missing:
            found[index] = WriteBlock(
                manifest.store, identity, arrays, each, missing, (by, bx), rows, cols, fsync
            )
    return found, present


def resolve_regions(
    sizes: Mapping[str, int], regions: Regions | None
) -> list[dict[str, slice]] | None:
    """Validate the regions that a user gives and turn them into slices by dim."""
    if regions is None:
        return None
    listed = None if isinstance(regions, Mapping) else list_items(regions)
    given: list[Any] = [regions] if listed is None else listed
    for region in given:
        good = isinstance(region, Mapping) and all(
            dim in sizes and (isinstance(part, slice | int | np.integer))
            for dim, part in region.items()
        )
        if not good:
            raise StoreError(
                f"regions as index ranges along {tuple(sizes)}",
                show(region),
                "for example .to_zarr(store, regions={'time': 0, 'y': slice(0, 8192)})",
            )
    return [{str(d): _as_slice(p, sizes[str(d)]) for d, p in r.items()} for r in given]


def _as_slice(part: slice | int, size: int) -> slice:
    if isinstance(part, slice):
        start, stop, step = part.indices(size)
        if step == 1:
            return slice(start, stop)
    elif -size <= part < size:
        return slice(int(part) % size, int(part) % size + 1)
    raise StoreError(
        f"an index range within {size}",
        f"{part!r}",
        "give slice(start, stop) in pixels or dates, without a step",
    )


def touches(
    wanted: list[dict[str, slice]] | None, dims: Sequence[str], pixels: Sequence[slice]
) -> bool:
    """Whether a block has a pixel in one of the regions."""
    block = dict(zip(dims, pixels, strict=True))
    return wanted is None or any(
        all(block[d].start < part.stop and part.start < block[d].stop for d, part in region.items())
        for region in wanted
    )
