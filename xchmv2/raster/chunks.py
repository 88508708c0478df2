"""Windows over dask chunks: the chunks that a window intersects, and their assembly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

#: Source chunks of one array that cover a window, as rows of columns.
Chunks = list[list[npt.NDArray[Any]]]


@dataclass(frozen=True, eq=False)
class Source:
    """One band, or a mask: a dask array (..., y, x), or (..., band, y, x) with the band's index."""

    array: da.Array
    band: int | None = None

    @property
    def name(self) -> tuple[str, int | None]:
        """The source's part of a graph's token."""
        return self.array.name, self.band

    @property
    def leading(self) -> tuple[tuple[int, ...], ...]:
        """Chunks of the dims before y and x, without the band dimension."""
        chunks: tuple[tuple[int, ...], ...] = self.array.chunks
        return chunks[:-2] if self.band is None else chunks[:-3]

    @cached_property
    def band_chunk(self) -> tuple[tuple[int, ...], int | None]:
        """The chunk along the band dimension that holds the band, and the index in it."""
        if self.band is None:
            return (), None
        chunk, _, local = _covering(_bounds(self.array.chunks[-3]), self.band, self.band + 1)
        return (chunk,), local

    def covering(self, axis: int, spans: Iterable[tuple[int, int]]) -> list[tuple[range, int]]:
        """Find the chunks that spans along y (0) or x (1) meet, and the offset in the first."""
        bounds = _bounds(self.array.chunks[axis - 2])
        found = (_covering(bounds, *span) for span in spans)
        return [(range(first, last), offset) for first, last, offset in found]

    def keys(self, date: Sequence[int], ys: range, xs: range) -> list[list[tuple[Any, ...]]]:
        """Return the keys of the band's chunks at one date chunk, as rows of columns."""
        head = (self.array.name, *date, *self.band_chunk[0])
        return [[(*head, y, x) for x in xs] for y in ys]


def _bounds(sizes: Sequence[int]) -> npt.NDArray[np.intp]:
    """Return the boundaries of the chunks along an axis."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _covering(bounds: npt.NDArray[np.intp], start: int, stop: int) -> tuple[int, int, int]:
    """Return first chunk of ``[start, stop)``, one past the last, and the offset in the first."""
    first = int(np.searchsorted(bounds, start, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))
    return first, last, start - int(bounds[first])


def assemble(
    chunks: Chunks,
    offset: tuple[int, int],
    band: int | None,
    span: tuple[tuple[int, int], tuple[int, int]],
) -> npt.NDArray[Any]:
    """Assemble a window (..., H, W) from the source chunks that it intersects, as rows of columns.

    The window begins at `offset`, a row and a column in the first chunk; `band` is the index along
    the third dimension from the end. Of `span`, (start, stop) along both axes, only the lengths
    matter.
    """
    whole = slice(None)
    pick = (..., whole, whole) if band is None else (..., band, whole, whole)
    views = [[np.asarray(chunk)[pick] for chunk in row] for row in chunks]
    ys = _cuts([row[0].shape[-2] for row in views], offset[0], span[0])
    xs = _cuts([view.shape[-1] for view in views[0]], offset[1], span[1])
    parts = [
        [view[..., y, x] for view, x in zip(row, xs, strict=True)]
        for row, y in zip(views, ys, strict=True)
    ]
    if len(ys) == len(xs) == 1:
        return parts[0][0]
    return np.concatenate([np.concatenate(row, axis=-1) for row in parts], axis=-2)


def _cuts(lengths: Sequence[int], offset: int, span: tuple[int, int]) -> list[slice]:
    """Return the slice of each of several consecutive chunks that the span covers."""
    cuts, left = [], span[1] - span[0]
    for length in lengths:
        taken = min(length - offset, left)
        cuts.append(slice(offset, offset + taken))
        left, offset = left - taken, 0
    return cuts
