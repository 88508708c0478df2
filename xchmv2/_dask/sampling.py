"""A digest of what a prediction reads, from a few small windows of each date.

Names of lazy arrays cannot tell whether two runs see the same imagery: they hold signed
addresses, and change with every date that is added. A look at the pixels can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from xchmv2._dask.sources import Source
from xchmv2._dask.tasks import Chunks, Job, assemble

#: Side of a window [px of the tile grid].
_SIDE = 32
#: Where the windows lie, as shares of both axes.
_PLACES = [(y, x) for y in (1 / 6, 1 / 2, 5 / 6) for x in (1 / 6, 1 / 2, 5 / 6)]

Span = tuple[int, int]


@dataclass(frozen=True)
class SampleSource:
    """Task: digests of a few source windows, one digest for each date of a chunk.

    Parameters
    ----------
    spans : tuple of (y span, x span)
        Source pixels of each window.
    offsets : tuple of tuple of (int, int)
        For each window and source, where the span begins in the chunks over it.
    bands : tuple of (int or None)
        Index along the band dimension of each source's chunks.
    """

    spans: tuple[tuple[Span, Span], ...]
    offsets: tuple[tuple[Span, ...], ...]
    bands: tuple[int | None, ...]

    def __call__(self, windows: Sequence[Sequence[Chunks]]) -> list[str]:
        pixels = [
            assemble(chunks, offset, band, span)
            for span, offsets, sources in zip(self.spans, self.offsets, windows, strict=True)
            for chunks, offset, band in zip(sources, offsets, self.bands, strict=True)
        ]
        dates = np.ndindex(pixels[0].shape[:-2])
        return [_digest([array[date] for array in pixels]) for date in dates]


def sample_tasks(
    name: str, sources: Sequence[Source], job: Job, leading: tuple[tuple[int, ...], ...]
) -> Mapping[Hashable, Any]:
    """One task per date chunk; it reads what lies over nine places.

    Parameters
    ----------
    name : str
        Name of the graph's layer.
    sources : sequence of Source
        Bands and mask.
    job : Job
        Says where the windows lie, so that the chunks of the source do not matter.
    leading : tuple of tuple of int
        Chunks of the dims before y and x.
    """
    spans = tuple(dict.fromkeys(_span(job, place) for place in _PLACES))
    over = [
        [tuple(s.covering(axis, [span[axis]])[0] for axis in (0, 1)) for s in sources]
        for span in spans
    ]
    offsets = tuple(tuple((y[1], x[1]) for y, x in window) for window in over)
    task = SampleSource(spans, offsets, tuple(source.band_chunk[1] for source in sources))
    return {
        (name, *date): (
            task,
            [
                [s.keys(date, y[0], x[0]) for s, (y, x) in zip(sources, w, strict=True)]
                for w in over
            ],
        )
        for date in product(*(range(len(sizes)) for sizes in leading))
    }


def _span(job: Job, place: tuple[float, float]) -> tuple[Span, Span]:
    """Source pixels behind a small window of the tile grid."""
    spans = []
    for axis, (along, share) in enumerate(zip((job.rows, job.cols), place, strict=True)):
        start = max(0, min(int(along.size * share) - _SIDE // 2, along.size - _SIDE))
        spans.append(job.reader.source_span(axis, start, min(start + _SIDE, along.size)))
    return spans[0], spans[1]


def _digest(arrays: Sequence[np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
