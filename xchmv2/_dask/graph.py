"""The graph of a prediction: which chunks each group reads, which groups each block adds up."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from xchmv2._dask.tasks import BlendBlock, Job, SumGroup
from xchmv2.errors import CHMv2Error
from xchmv2.inference import Layer


@dataclass(frozen=True, eq=False)
class Source:
    """One band, or a mask, as a dask array.

    Parameters
    ----------
    array : dask.array.Array
        (..., y, x), or (..., band, y, x) where ``band`` is given.
    band : int or None
        Index along the third dimension from the end.
    """

    array: da.Array
    band: int | None = None

    @property
    def name(self) -> tuple[str, int | None]:
        """What the source adds to a graph's token."""
        return self.array.name, self.band

    @cached_property
    def band_chunk(self) -> tuple[tuple[int, ...], int | None]:
        """Which chunk along the band dimension holds the band, and where in it."""
        if self.band is None:
            return (), None
        chunk, _, local = _covering(_bounds(self.array.chunks[-3]), self.band, self.band + 1)
        return (chunk,), local

    def covering(self, axis: int, spans: Iterable[tuple[int, int]]) -> list[tuple[range, int]]:
        """Find the chunks over each span along y (0) or x (1), and the offset in the first."""
        bounds = _bounds(self.array.chunks[axis - 2])
        found = (_covering(bounds, *span) for span in spans)
        return [(range(first, last), offset) for first, last, offset in found]


def predict_blocks(bands: Sequence[Source], mask: Source | None, job: Job) -> dict[Layer, da.Array]:
    """Build the graph of a prediction; nothing is computed, no model is loaded.

    Parameters
    ----------
    bands : sequence of Source
        Red, green and blue with equal chunks along all dims before y and x.
    mask : Source or None
        Boolean pixels declared valid, with the same leading dims.
    job : Job
        What to do with them.

    Returns
    -------
    dict of dask.array.Array
        Per layer (..., y, x) float32 [m] in uniform square blocks.

    Raises
    ------
    CHMv2Error
        If dask's experimental array query planning is on.
    """
    _validate_dask()
    sources = [*bands, *([mask] if mask else [])]
    leading = _leading_chunks(bands[0])
    token = tokenize(job, [source.name for source in sources], leading)
    groups = f"chmv2-groups-{token}"
    tasks = _group_tasks(groups, sources, job, leading)
    graph = HighLevelGraph.from_collections(groups, tasks, [s.array for s in sources])
    chunks = (*leading, *job.chunks)
    return {
        layer: _layer_array(graph, groups, f"chmv2-{layer}-{token}", layer, job, chunks)
        for layer in job.layers
    }


def _group_tasks(
    name: str, sources: Sequence[Source], job: Job, leading: tuple[tuple[int, ...], ...]
) -> dict[Hashable, Any]:
    """One task per date chunk and tile group."""
    tasks: dict[Hashable, Any] = {}
    rows, cols = (
        list(zip(*(source.covering(axis, spans) for source in sources), strict=True))
        for axis, spans in enumerate(
            [job.reader.source_span(axis, run.start, run.stop) for run in runs]
            for axis, runs in enumerate(job.runs)
        )
    )
    dates = list(product(*(range(len(sizes)) for sizes in leading)))
    bands = tuple(source.band_chunk[1] for source in sources)
    for (iy, over_y), (ix, over_x) in product(enumerate(rows), enumerate(cols)):
        offsets = tuple((y[1], x[1]) for y, x in zip(over_y, over_x, strict=True))
        task = SumGroup(job, iy, ix, offsets, bands)
        for date in dates:
            keys = [
                [[(s.array.name, *date, *s.band_chunk[0], y, x) for x in xs] for y in ys]
                for s, (ys, _), (xs, _) in zip(sources, over_y, over_x, strict=True)
            ]
            tasks[(name, *date, iy, ix)] = (task, keys)
    return tasks


def _layer_array(
    graph: HighLevelGraph,
    groups: str,
    name: str,
    layer: Layer,
    job: Job,
    chunks: tuple[tuple[int, ...], ...],
) -> da.Array:
    """One task per date chunk and block, on top of the groups."""
    tasks: dict[Hashable, Any] = {}
    for index in product(*(range(len(sizes)) for sizes in chunks)):
        *date, by, bx = index
        shape = tuple(sizes[i] for sizes, i in zip(chunks, index, strict=True))
        keys = [(groups, *date, iy, ix) for iy, ix in job.groups_of((by, bx))]
        tasks[(name, *index)] = (BlendBlock(job, layer, by, bx, shape), keys)
    layers = {**graph.layers, name: MaterializedLayer(tasks)}
    full = HighLevelGraph(layers, {**graph.dependencies, name: {groups}})
    return da.Array(full, name, chunks, meta=np.empty((0,) * len(chunks), np.float32))


def _leading_chunks(band: Source) -> tuple[tuple[int, ...], ...]:
    """Chunks of the dims before y and x, without the band dimension."""
    chunks: tuple[tuple[int, ...], ...] = band.array.chunks
    return chunks[:-2] if band.band is None else chunks[:-3]


def _bounds(sizes: Sequence[int]) -> npt.NDArray[np.intp]:
    """Where chunks begin and end along an axis."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _covering(bounds: npt.NDArray[np.intp], start: int, stop: int) -> tuple[int, int, int]:
    """First chunk, one past the last chunk over ``[start, stop)``, and the offset in the first."""
    first = int(np.searchsorted(bounds, start, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))
    return first, last, start - int(bounds[first])


def _validate_dask() -> None:
    if dask.config.get("array.query-planning", False):
        raise CHMv2Error(
            "dask's default array graphs",
            "the experimental setting array.query-planning=True",
            "switch it off before importing dask.array: "
            "dask.config.set({'array.query-planning': False})",
        )
