"""The graph of a prediction: one task per tile group, one per block, and digests of the imagery."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import Scene
from xchmv2.inference import Layer, forward_resources
from xchmv2.predict.tasks import BlendBlock, Job, SumGroup
from xchmv2.raster import Chunks, Source, assemble


def predict_blocks(scene: Scene, job: Job) -> dict[Layer, da.Array]:
    """Build the graph of a prediction: (..., y, x) float32 [m] of each layer, in uniform blocks.

    Nothing is computed, no model is loaded. A CHMv2Error refuses dask's experimental array query
    planning.
    """
    _validate_dask()
    sources, leading = _sources(scene), scene.leading_chunks
    token = tokenize(job, [source.name for source in sources], leading)
    groups = f"{GROUPS}{token}"
    tasks = _group_tasks(groups, sources, job, leading)
    layer = MaterializedLayer(tasks, annotations=_forward_annotations())
    graph = HighLevelGraph.from_collections(groups, layer, [s.array for s in sources])
    # Nothing depends on the digests of the imagery, so they run only on request.
    samples = f"chmv2-samples-{token}"
    tasks = _sample_tasks(samples, sources, job, leading)
    graph = HighLevelGraph(
        {**graph.layers, samples: MaterializedLayer(tasks)},
        {**graph.dependencies, samples: graph.dependencies[groups]},
    )
    chunks = (*leading, *job.chunks)
    return {
        layer: _layer_array(graph, groups, f"chmv2-{layer}-{token}", layer, job, chunks)
        for layer in job.layers
    }


def find_prediction(array: da.Array) -> Prediction | None:
    """Recognise a layer of a prediction that was not changed since; None for any other array."""
    named, layer = _PREDICTED.fullmatch(array.name), array.dask.layers.get(array.name)
    if named is None or layer is None:
        return None
    task = next(iter(layer.values()))
    if not isinstance(task, tuple) or not isinstance(task[0], BlendBlock):
        return None  # persisted: its tasks are values now
    samples = array.dask.layers[f"chmv2-samples-{named['token']}"]
    return Prediction(task[0].job, task[0].layer, named["token"], samples, array.dask)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a prediction's array is computed from.

    `job`: all that determines it besides the pixels of the imagery; `token`: the same for all
    layers of one prediction; `samples`: tasks of the `graph` that return a digest of each date's
    imagery, one per date chunk.
    """

    job: Job
    layer: Layer
    token: str
    samples: Mapping[Hashable, Any]
    graph: HighLevelGraph


#: Prefix of the layer whose tasks run the network.
GROUPS = "chmv2-groups-"
_PREDICTED = re.compile(rf"chmv2-({'|'.join(get_args(Layer))})-(?P<token>\w+)")


def _sources(scene: Scene) -> list[Source]:
    """Red, green, blue and the mask, if any, as dask arrays with equal chunks before y and x."""
    distinct = {id(band.array): band.array for band in scene.bands}
    arrays = {
        key: _as_dask(array, f"chmv2-imagery-{i}", scene)
        for i, (key, array) in enumerate(distinct.items())
    }
    sources = [Source(arrays[id(band.array)], band.index) for band in scene.bands]
    if scene.mask is not None:
        sources.append(Source(_as_dask(scene.mask, "chmv2-mask", scene)))
    return sources


def _as_dask(array: xr.DataArray, name: str, scene: Scene) -> da.Array:
    """Wrap what is in memory, one date a chunk, so that a task holds one date."""
    leading = scene.leading_chunks
    if array.chunks is not None:
        return array.data.rechunk(dict(enumerate(leading)))
    chunks = (*leading, *((-1,) * (array.ndim - len(leading))))
    # If computed at once, it needs no key that depends on its content, which takes time to hash.
    return da.from_array(array.values, chunks=chunks, name=None if scene.lazy else name)


def _forward_annotations() -> dict[str, Any] | None:
    """Choose resources for tasks that run the network; the user's annotations take precedence."""
    resources = forward_resources()
    return {"resources": resources, **dask.get_annotations()} if resources else None


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
                source.keys(date, ys, xs)
                for source, (ys, _), (xs, _) in zip(sources, over_y, over_x, strict=True)
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


def _validate_dask() -> None:
    if dask.config.get("array.query-planning", False):
        raise CHMv2Error(
            "dask's default array graphs",
            "the experimental setting array.query-planning=True",
            "switch it off before importing dask.array: "
            "dask.config.set({'array.query-planning': False})",
        )


#: Side of a window [px of the tile grid].
_SIDE = 32
#: Positions of the windows, as shares of both axes.
_PLACES = [(y, x) for y in (1 / 6, 1 / 2, 5 / 6) for x in (1 / 6, 1 / 2, 5 / 6)]

_Span = tuple[int, int]


@dataclass(frozen=True)
class _SampleSource:
    """Task: digests of a few source windows, one digest for each date of a chunk.

    `spans`: source pixels of each window along y and x; `offsets`: of each window and source, the
    span's start in the chunks over it; `bands`: index along the band dimension of each source's
    chunks.
    """

    spans: tuple[tuple[_Span, _Span], ...]
    offsets: tuple[tuple[_Span, ...], ...]
    bands: tuple[int | None, ...]

    def __call__(self, windows: Sequence[Sequence[Chunks]]) -> list[str]:
        pixels = [
            assemble(chunks, offset, band, span)
            for span, offsets, sources in zip(self.spans, self.offsets, windows, strict=True)
            for chunks, offset, band in zip(sources, offsets, self.bands, strict=True)
        ]
        dates = np.ndindex(pixels[0].shape[:-2])
        return [_digest([array[date] for array in pixels]) for date in dates]


def _sample_tasks(
    name: str, sources: Sequence[Source], job: Job, leading: tuple[tuple[int, ...], ...]
) -> dict[Hashable, Any]:
    """One task per date chunk; it reads nine small windows, which the job's tile grid fixes."""
    spans = tuple(dict.fromkeys(_span(job, place) for place in _PLACES))
    over = [
        [tuple(s.covering(axis, [span[axis]])[0] for axis in (0, 1)) for s in sources]
        for span in spans
    ]
    offsets = tuple(tuple((y[1], x[1]) for y, x in window) for window in over)
    task = _SampleSource(spans, offsets, tuple(source.band_chunk[1] for source in sources))
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


def _span(job: Job, place: tuple[float, float]) -> tuple[_Span, _Span]:
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
