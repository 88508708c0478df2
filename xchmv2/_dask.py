"""The only file that builds graphs: one task per tile group, one task per block.

A group task gathers its window from the source chunks it touches and returns the weighted sums of
its tiles. A block task adds up the groups that reach into it. The network runs in group tasks
alone, so it runs once per tile, and culling to a few blocks culls the tiles too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from xchmv2.errors import CHMv2Error
from xchmv2.inference import (
    BlockPart,
    Layer,
    ModelSpec,
    Scaling,
    Sums,
    blend,
    get_predictor,
    stack_dates,
)
from xchmv2.tiling import FloatArray, TileAxis, TileRun, tile_runs

Span2D = tuple[tuple[int, int], tuple[int, int]]
#: Source chunks of one array that cover a window, as rows of columns.
Chunks = list[list[npt.NDArray[Any]]]


class Reader(Protocol):
    """Turns source pixels into a window of the grid that is predicted on."""

    def source_span(self, target: Span2D) -> Span2D:
        """Source pixels that a window depends on."""

    def __call__(
        self, bands: npt.NDArray[Any], mask: npt.NDArray[np.bool_] | None, target: Span2D
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return the window's (3, h, w) values and (h, w) validity."""


@dataclass(frozen=True)
class Job:
    """All that determines a prediction beside its pixels; small, hashable, in every task.

    Parameters
    ----------
    model : ModelSpec
        Which model, where, in which arithmetic.
    reader : Reader
        From source pixels to windows.
    rows, cols : TileAxis
        The tile grid.
    block : int
        Side of an output chunk [px].
    scaling : Scaling
        Value range of the source.
    layers : tuple of str
        Layers to derive.
    batch_size : int or "auto"
        Tiles per forward.
    """

    model: ModelSpec
    reader: Reader
    rows: TileAxis
    cols: TileAxis
    block: int
    scaling: Scaling
    layers: tuple[Layer, ...]
    batch_size: int | Literal["auto"]

    @property
    def runs(self) -> tuple[tuple[TileRun, ...], tuple[TileRun, ...]]:
        """Runs of tiles along both axes; a group is one of each."""
        return tile_runs(self.rows, self.block), tile_runs(self.cols, self.block)

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the blocks along both axes [px]."""
        rows, cols = (_split(axis.size, self.block) for axis in (self.rows, self.cols))
        return rows, cols

    def groups_of(self, block: tuple[int, int]) -> list[tuple[int, int]]:
        """List the at most nine groups that reach into a block, in a fixed order."""
        rows, cols = (
            [i for i, run in enumerate(runs) if index in run.blocks]
            for runs, index in zip(self.runs, block, strict=True)
        )
        return [(y, x) for y in rows for x in cols]


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

    def chunks_over(
        self, date: tuple[int, ...], span: Span2D
    ) -> tuple[list[list[tuple[Hashable, ...]]], tuple[int, int], int | None]:
        """Find the chunks over a window: their keys, the window's offset in them, the band."""
        (y_first, y_last, top), (x_first, x_last, left) = (
            _covering(sizes, *s) for sizes, s in zip(self.array.chunks[-2:], span, strict=True)
        )
        prefix: tuple[Hashable, ...] = (self.array.name, *date)
        local = None
        if self.band is not None:
            chunk, _, local = _covering(self.array.chunks[-3], self.band, self.band + 1)
            prefix = (*prefix, chunk)
        keys = [[(*prefix, y, x) for x in range(x_first, x_last)] for y in range(y_first, y_last)]
        return keys, (top, left), local


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
    row_runs, col_runs = job.runs
    dates = list(product(*(range(len(sizes)) for sizes in leading)))
    for (iy, rows), (ix, cols) in product(enumerate(row_runs), enumerate(col_runs)):
        span = job.reader.source_span(((rows.start, rows.stop), (cols.start, cols.stop)))
        for date in dates:
            found = [source.chunks_over(date, span) for source in sources]
            keys, offsets, bands = (list(part) for part in zip(*found, strict=True))
            tasks[(name, *date, iy, ix)] = (_sum_group, job, iy, ix, keys, offsets, bands)
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
        keys = [(groups, *date, iy, ix) for iy, ix in job.groups_of((by, bx))]
        shape = tuple(sizes[i] for sizes, i in zip(chunks, index, strict=True))
        tasks[(name, *index)] = (_blend_block, job, layer, by, bx, shape, keys)
    layers = {**graph.layers, name: MaterializedLayer(tasks)}
    full = HighLevelGraph(layers, {**graph.dependencies, name: {groups}})
    return da.Array(full, name, chunks, meta=np.empty((0,) * len(chunks), np.float32))


def _sum_group(
    job: Job,
    iy: int,
    ix: int,
    chunks: Sequence[Chunks],
    offsets: Sequence[tuple[int, int]],
    bands: Sequence[int | None],
) -> Sums | None:
    """Task: the weighted sums of one group's tiles, for each date of a chunk."""
    rows, cols = job.runs[0][iy], job.runs[1][ix]
    target = ((rows.start, rows.stop), (cols.start, cols.stop))
    span = job.reader.source_span(target)
    colours = [_assemble(*source, span) for source in zip(chunks, offsets, bands, strict=True)]
    mask = colours.pop() if len(colours) > 3 else None
    leading = colours[0].shape[:-2]
    return stack_dates(
        [
            _sum_date(job, rows, cols, target, [c[date] for c in colours], mask, date)
            for date in np.ndindex(leading)
        ],
        leading,
    )


def _sum_date(
    job: Job,
    rows: TileRun,
    cols: TileRun,
    target: Span2D,
    colours: Sequence[npt.NDArray[Any]],
    mask: npt.NDArray[np.bool_] | None,
    date: tuple[int, ...],
) -> Sums | None:
    """Sum one group at one date; a model is loaded only for valid pixels."""
    window, valid = job.reader(np.stack(colours), None if mask is None else mask[date], target)
    if not valid.any():
        return None
    return get_predictor(job.model).accumulate(
        window,
        valid,
        rows,
        cols,
        scaling=job.scaling,
        layers=job.layers,
        batch_size=job.batch_size,
    )


def _blend_block(
    job: Job, layer: Layer, by: int, bx: int, shape: tuple[int, ...], sums: Sequence[Sums | None]
) -> FloatArray:
    """Task: add up the groups that reach into one block."""
    if all(group is None for group in sums):
        return np.full(shape, np.nan, np.float32)
    row_runs, col_runs = job.runs
    top, left = by * job.block, bx * job.block
    parts = [
        BlockPart(row_runs[iy], col_runs[ix], top, left, shape[-2], shape[-1])
        for iy, ix in job.groups_of((by, bx))
    ]
    return blend(layer, parts, sums)


def _assemble(
    chunks: Chunks, offset: tuple[int, int], band: int | None, span: Span2D
) -> npt.NDArray[Any]:
    """Cut a window (..., H, W) out of the chunks over it."""
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
    """Tell what to take of each of consecutive chunks to get the pixels of a span."""
    cuts, left = [], span[1] - span[0]
    for length in lengths:
        taken = min(length - offset, left)
        cuts.append(slice(offset, offset + taken))
        left, offset = left - taken, 0
    return cuts


def _leading_chunks(band: Source) -> tuple[tuple[int, ...], ...]:
    """Chunks of the dims before y and x, without the band dimension."""
    chunks: tuple[tuple[int, ...], ...] = band.array.chunks
    return chunks[:-2] if band.band is None else chunks[:-3]


def _covering(sizes: Sequence[int], start: int, stop: int) -> tuple[int, int, int]:
    """First chunk, one past the last chunk over ``[start, stop)``, and the offset in the first."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    first = int(np.searchsorted(bounds, start, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))
    return first, last, start - int(bounds[first])


def _split(size: int, block: int) -> tuple[int, ...]:
    whole, rest = divmod(size, block)
    return (block,) * whole + ((rest,) if rest else ())


def _validate_dask() -> None:
    if dask.config.get("array.query-planning", False):
        raise CHMv2Error(
            "dask's default array graphs",
            "the experimental setting array.query-planning=True",
            "switch it off before importing dask.array: "
            "dask.config.set({'array.query-planning': False})",
        )
