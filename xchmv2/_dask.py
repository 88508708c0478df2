"""The only file that builds graphs: one task per tile group, one task per block.

A group task gathers its window from the source chunks it touches and returns the weighted sums of
its tiles. A block task adds up the groups that reach into it. The network runs in group tasks
alone, so it runs once per tile, and culling to a few blocks culls the tiles too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from xchmv2.tiling import FloatArray, TileAxis, TileRun, runs_by_block, tile_runs

#: Source chunks of one array that cover a window, as rows of columns.
Chunks = list[list[npt.NDArray[Any]]]


class Reader(Protocol):
    """Turns source pixels into a window of the grid that is predicted on."""

    def source_span(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """Source pixels that ``[start, stop)`` depends on along y (0) or x (1)."""

    def __call__(
        self,
        bands: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_] | None,
        target: tuple[tuple[int, int], tuple[int, int]],
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
            runs_by_block(axis, self.block)[index]
            for axis, index in zip((self.rows, self.cols), block, strict=True)
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
        task = _SumGroup(job, iy, ix, offsets, bands)
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
        tasks[(name, *index)] = (_BlendBlock(job, layer, by, bx, shape), keys)
    layers = {**graph.layers, name: MaterializedLayer(tasks)}
    full = HighLevelGraph(layers, {**graph.dependencies, name: {groups}})
    return da.Array(full, name, chunks, meta=np.empty((0,) * len(chunks), np.float32))


@dataclass(frozen=True)
class _SumGroup:
    """Task: the weighted sums of one group's tiles, for each date of a chunk.

    Parameters
    ----------
    job : Job
        What to do.
    iy, ix : int
        The group: indices of its runs.
    offsets : tuple of (int, int)
        Where the window begins in the chunks of each source.
    bands : tuple of (int or None)
        Index along the band dimension of each source's chunks; a fourth source is a mask.
    """

    job: Job
    iy: int
    ix: int
    offsets: tuple[tuple[int, int], ...]
    bands: tuple[int | None, ...]

    def __call__(self, chunks: Sequence[Chunks]) -> Sums | None:
        row_runs, col_runs = self.job.runs
        rows, cols = row_runs[self.iy], col_runs[self.ix]
        read = self.job.reader.source_span
        span = (read(0, rows.start, rows.stop), read(1, cols.start, cols.stop))
        red, green, blue, *mask = (
            _assemble(*source, span)
            for source in zip(chunks, self.offsets, self.bands, strict=True)
        )
        leading = red.shape[:-2]
        dates = [
            self._sum_date(
                np.stack([red[date], green[date], blue[date]]),
                mask[0][date] if mask else None,
                rows,
                cols,
            )
            for date in np.ndindex(leading)
        ]
        return stack_dates(dates, leading)

    def _sum_date(
        self,
        bands: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_] | None,
        rows: TileRun,
        cols: TileRun,
    ) -> Sums | None:
        """Sum the group at one date; a model is loaded only for valid pixels."""
        job, target = self.job, ((rows.start, rows.stop), (cols.start, cols.stop))
        window, valid = job.reader(bands, mask, target)
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


@dataclass(frozen=True)
class _BlendBlock:
    """Task: add up the groups that reach into one block.

    Parameters
    ----------
    job : Job
        What to do.
    layer : str
        The layer to derive.
    by, bx : int
        The block.
    shape : tuple of int
        Shape of the result, (..., height, width).
    """

    job: Job
    layer: Layer
    by: int
    bx: int
    shape: tuple[int, ...]

    def __call__(self, sums: Sequence[Sums | None]) -> FloatArray:
        if all(group is None for group in sums):
            return np.full(self.shape, np.nan, np.float32)
        row_runs, col_runs = self.job.runs
        top, left = self.by * self.job.block, self.bx * self.job.block
        parts = [
            BlockPart(row_runs[iy], col_runs[ix], top, left, *self.shape[-2:])
            for iy, ix in self.job.groups_of((self.by, self.bx))
        ]
        return blend(self.layer, parts, sums)


def _assemble(
    chunks: Chunks,
    offset: tuple[int, int],
    band: int | None,
    span: tuple[tuple[int, int], tuple[int, int]],
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


def _bounds(sizes: Sequence[int]) -> npt.NDArray[np.intp]:
    """Where chunks begin and end along an axis."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _covering(bounds: npt.NDArray[np.intp], start: int, stop: int) -> tuple[int, int, int]:
    """First chunk, one past the last chunk over ``[start, stop)``, and the offset in the first."""
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
