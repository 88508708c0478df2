"""What the tasks of a prediction hold in memory, the network aside."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from xchmv2.imagery import Scene, WindowReader
from xchmv2.predict.prediction import leading_chunks
from xchmv2.predict.tasks import Job
from xchmv2.raster import runs_by_block

_FLOAT32 = 4


@dataclass(frozen=True)
class TaskMemory:
    """Arrays of the largest task of each kind [bytes], without the network and its batches.

    Parameters
    ----------
    chunks : int
        Chunks of the imagery over the largest tile group; 0 for imagery in memory.
    window : int
        The pixels cut out of them, those of one date put together for the network, and their
        validity.
    sums : int
        The weighted sums of the group's tiles, which it returns.
    group_scratch : int
        What resampling the window, adding up tiles and joining dates take on the way.
    gathered : int
        The sums of all groups that reach into one block.
    block : int
        One block of one layer, which is the output.
    block_scratch : int
        What deriving it takes on the way.
    """

    chunks: int
    window: int
    sums: int
    group_scratch: int
    gathered: int
    block: int
    block_scratch: int

    @property
    def of_group(self) -> int:
        """What a task that runs the network holds at most [bytes]."""
        return self.chunks + self.window + self.sums + self.group_scratch

    @property
    def of_block(self) -> int:
        """What a task that adds up groups holds at most [bytes]."""
        return self.gathered + self.block + self.block_scratch


def find_memory(scene: Scene, job: Job, reader: WindowReader) -> TaskMemory:
    """Add up the arrays of the largest group and of the largest block.

    Parameters
    ----------
    scene : Scene
        The imagery; nothing of it is read.
    job : Job
        The grid of tiles and blocks, and what is derived.
    reader : WindowReader
        From source pixels to windows of the target.

    Returns
    -------
    TaskMemory
        In bytes.
    """
    # Any pair of runs is a group, so the largest along each axis make up the largest.
    extent = math.prod(max(run.stop - run.start for run in runs) for runs in job.runs)
    spans = _spans(job, reader)
    span = math.prod(max(stop - start for start, stop in along) for along in spans)
    dates = math.prod(max(sizes) for sizes in leading_chunks(scene))
    layers = _FLOAT32 * sum(n in job.layers for n in ("bin_spread", "overlap_disagreement"))
    sums = dates * (_FLOAT32 + layers)
    block = math.prod(max(sizes) for sizes in job.chunks) * dates * _FLOAT32
    scatter = "overlap_disagreement" in job.layers
    resampling = 0 if reader.is_identity else _resampling(scene, span, extent)
    return TaskMemory(
        chunks=_chunk_bytes(scene, spans),
        window=_window(scene, span, extent, dates, resampled=not reader.is_identity),
        sums=extent * sums,
        group_scratch=max(resampling, extent * sums if dates > 1 else 0)
        + (extent * _FLOAT32 if scatter else 0),
        gathered=_gathered(job) * sums,
        block=block,
        block_scratch=5 * block if scatter else block // 4,
    )


def _window(scene: Scene, span: int, extent: int, dates: int, *, resampled: bool) -> int:
    """Pixels of all dates as they are cut out, those of one date together, and validity."""
    sizes = [band.array.dtype.itemsize for band in scene.bands]
    per_pixel = dates * (sum(sizes) + (scene.mask is not None)) + 3 * max(sizes) + 1
    return span * per_pixel + extent * ((3 * _FLOAT32 if resampled else 0) + 1)


def _resampling(scene: Scene, span: int, extent: int) -> int:
    """One band and its weights in floats over the source, and all bands twice over the target."""
    largest = max(band.array.dtype.itemsize for band in scene.bands)
    return span * (2 * _FLOAT32 + largest) + extent * 6 * _FLOAT32


Spans = list[tuple[int, int]]


def _spans(job: Job, reader: WindowReader) -> tuple[Spans, Spans]:
    """Source pixels that the groups read, along both axes."""
    read = reader.source_span
    rows, cols = (
        [read(axis, run.start, run.stop) for run in runs] for axis, runs in enumerate(job.runs)
    )
    return rows, cols


def _gathered(job: Job) -> int:
    """Pixels of all groups that reach into the block with most of them."""
    longest = []
    for axis, runs in zip((job.rows, job.cols), job.runs, strict=True):
        lengths = [run.stop - run.start for run in runs]
        longest.append(max(sum(lengths[i] for i in b) for b in runs_by_block(axis, job.block)))
    return math.prod(longest)


def _chunk_bytes(scene: Scene, spans: tuple[Spans, Spans]) -> int:
    """Bytes of the dask chunks over the largest group, of each dask array once."""
    arrays = [band.array for band in scene.bands]
    lazy = [a for a in (*arrays, scene.mask) if a is not None and a.chunks is not None]
    by_name = {array.data.name: array for array in lazy}
    return sum(_covering_bytes(array, spans) for array in by_name.values())


def _covering_bytes(array: xr.DataArray, spans: tuple[Spans, Spans]) -> int:
    assert array.chunks is not None
    over = math.prod(
        _most_covered(sizes, along) for sizes, along in zip(array.chunks[-2:], spans, strict=True)
    )
    leading = math.prod(max(sizes) for sizes in array.chunks[:-2])
    return over * leading * array.dtype.itemsize


def _most_covered(sizes: Iterable[int], spans: Spans) -> int:
    """Pixels along an axis of the chunks over the span that needs most of them."""
    bounds = np.concatenate([[0], np.cumsum(tuple(sizes))])
    first = np.searchsorted(bounds, [start for start, _ in spans], side="right") - 1
    last = np.searchsorted(bounds, [stop for _, stop in spans], side="left")
    return int((bounds[last] - bounds[first]).max())
