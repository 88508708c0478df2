"""Blocks that are missing in a store, and the task that writes one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from xchmv2.errors import StoreError
from xchmv2.predict import blocks_of
from xchmv2.raster import list_items, show
from xchmv2.store.records import Manifest
from xchmv2.store.template import Cube, Encoding

_Region = Mapping[Hashable, slice | int]
#: Index ranges along some dims, or several of these.
Regions = _Region | Sequence[_Region]


@dataclass(frozen=True)
class _DatePlace:
    """Index of a date in the block, its label, and its entry in the manifest."""

    source: int
    label: str
    entry: Mapping[str, Any]

    @property
    def slot(self) -> int:
        """Its index in the store's arrays."""
        return int(self.entry["slot"])

    @property
    def record(self) -> int:
        """Its index in the record."""
        return int(self.entry["record"])


@dataclass(frozen=True, eq=False)
class WriteBlock:
    """Task: encode one block of each variable, write it, record it.

    Parameters
    ----------
    arrays, encodings : tuple
        Arrays of the store, (date, y, x) or (y, x), and how each is stored.
    record : zarr.Array
        Array (record, block along y, block along x) that is 1 where a block is written.
    dates : tuple of _DatePlace
        Dates of the block that are not written yet.
    block : tuple of int
        Index of the block along y and x.
    rows, cols : slice
        Its pixels.
    """

    arrays: tuple[zarr.Array[Any], ...]
    encodings: tuple[Encoding, ...]
    record: zarr.Array[Any]
    dates: tuple[_DatePlace, ...]
    block: tuple[int, int]
    rows: slice
    cols: slice

    def __call__(self, blocks: Sequence[npt.NDArray[Any]]) -> int:
        """Write the blocks, one of each variable; returns the number of pixels."""
        known = Manifest(self.record.store).dates
        for date in self.dates:
            if known.get(date.label) != date.entry:
                raise StoreError(
                    f"another run is writing {date.label or 'this array'} anew since this one was "
                    "planned",
                    fix="call .chmv2.to_zarr() again",
                )
            for array, encode, block in zip(self.arrays, self.encodings, blocks, strict=True):
                self._write(array, encode, np.asarray(block), date)
            try:  # after the data, so that a block that is recorded is written
                self.record[(date.record, *self.block)] = 1
            except Exception as error:
                name = f"the record of {self._name(self.record, date)}"
                raise self._failure(name, error) from error
        height, width = blocks[0].shape[-2:]
        return int(height * width * len(self.dates))

    def _write(
        self, array: zarr.Array[Any], encode: Encoding, block: npt.NDArray[Any], date: _DatePlace
    ) -> None:
        flat = block.ndim == 2
        where = (self.rows, self.cols) if flat else (date.slot, self.rows, self.cols)
        try:
            array[where] = encode(block if flat else block[date.source])
        except OverflowError as error:
            raise StoreError(
                f"heights that the encoding can hold at {self._name(array, date)}",
                str(error),
                "choose encoding='int16_cm' or 'float32' for a new store",
            ) from None
        except Exception as error:
            raise self._failure(self._name(array, date), error) from error

    def _name(self, array: zarr.Array[Any], date: _DatePlace) -> str:
        place = f"y {self.rows.start}:{self.rows.stop}, x {self.cols.start}:{self.cols.stop}"
        return ", ".join(filter(None, [array.basename or array.path, date.label, place]))

    def _failure(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"{what} could not be written ({type(error).__name__}: {error})",
            fix="correct the cause and make the same call again: regions already written are kept, "
            "and only the missing ones are computed",
        )


def missing_blocks(
    cube: Cube,
    manifest: Manifest,
    arrays: tuple[zarr.Array[Any], ...],
    encodings: Mapping[str, Encoding],
    wanted: list[dict[str, slice]] | None,
) -> tuple[dict[tuple[int, ...], WriteBlock], int]:
    """Find the blocks of a cube that are not in the store.

    ``wanted`` are the index ranges from :func:`resolve_regions`. Returns the task that writes each
    missing block, by its index in the cube, and how many of the wanted regions are written.
    """
    done, record, dates, labels = manifest.done(), manifest.record, manifest.dates, cube.labels
    found, present = {}, 0
    for index, pixels in blocks_of(next(iter(cube.arrays.values()))):
        if not _touches(wanted, cube, pixels):
            continue
        *when, rows, cols = pixels
        by, bx = index[-2:]
        span = when[0] if when else slice(0, 1)
        missing = tuple(
            _DatePlace(i - span.start, label, dates[label])
            for i, label in enumerate(labels[span], span.start)
            if (dates[label]["record"], by, bx) not in done
        )
        present += len(labels[span]) - len(missing)
        if missing:
            found[index] = WriteBlock(
                arrays, tuple(encodings.values()), record, missing, (by, bx), rows, cols
            )
    return found, present


def resolve_regions(cube: Cube, regions: Regions | None) -> list[dict[str, slice]] | None:
    """Validate the regions that a user gives and turn them into slices by dim."""
    if regions is None:
        return None
    listed = None if isinstance(regions, Mapping) else list_items(regions)
    given: list[Any] = [regions] if listed is None else listed
    sizes = {str(dim): size for dim, size in cube.dataset.sizes.items()}
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


def _touches(wanted: list[dict[str, slice]] | None, cube: Cube, pixels: tuple[slice, ...]) -> bool:
    """Whether a block has a pixel in one of the regions."""
    dims = [*([cube.date_dim] if cube.date_dim else []), *cube.dims]
    block = dict(zip(dims, pixels, strict=True))
    return wanted is None or any(
        all(block[d].start < part.stop and part.start < block[d].stop for d, part in region.items())
        for region in wanted
    )
