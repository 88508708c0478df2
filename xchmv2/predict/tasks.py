"""The tasks of a prediction, and the job they share.

A group task turns source chunks into the weighted sums of its tiles; a block task adds up the
groups that reach into it. Both are small objects, so that a graph of many thousands stays small.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import WindowReader, advise_order, looks_exchanged, take_pixels
from xchmv2.inference import (
    BlockPart,
    Layer,
    ModelSpec,
    Scaling,
    Sums,
    blend,
    get_predictor,
    skip_tiles,
    stack_dates,
)
from xchmv2.raster import Chunks, FloatArray, TileAxis, TileRun, assemble, runs_by_block, tile_runs


@dataclass(frozen=True)
class Job:
    """All that determines a prediction besides its pixels; small, hashable, in every task.

    `reader` leads from source pixels to windows; `rows` and `cols` are the tile grid; `block` is
    the side of an output chunk [px]; `scaling` the value range of the source; `batch_size` the
    tiles per forward; `bands` are the names of red, green and blue in the source; `masked` is
    whether a mask of valid pixels was given; `unnamed` what ``bands=`` calls the three bands, if no
    name tells that they are red, green and blue.
    """

    model: ModelSpec
    reader: WindowReader
    rows: TileAxis
    cols: TileAxis
    block: int
    scaling: Scaling
    layers: tuple[Layer, ...]
    batch_size: int | Literal["auto"]
    bands: tuple[str, ...] = ()
    masked: bool = False
    unnamed: tuple[Hashable, ...] = ()

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


@dataclass(frozen=True)
class SumGroup:
    """Task: the weighted sums of one group's tiles, for each date of a chunk.

    `iy`, `ix`: the group, by the indices of its runs; `offsets`: the window's start in the chunks
    of each source; `bands`: index along the band dimension of each source's chunks. A fourth source
    is a mask.
    """

    job: Job
    iy: int
    ix: int
    offsets: tuple[tuple[int, int], ...]
    bands: tuple[int | None, ...]

    def __call__(self, chunks: Sequence[Chunks]) -> Sums | None:
        """Sum the group; None where no pixel is valid."""
        row_runs, col_runs = self.job.runs
        rows, cols = row_runs[self.iy], col_runs[self.ix]
        read = self.job.reader.source_span
        span = (read(0, rows.start, rows.stop), read(1, cols.start, cols.stop))
        red, green, blue, *mask = (
            assemble(*source, span) for source in zip(chunks, self.offsets, self.bands, strict=True)
        )
        leading = red.shape[:-2]
        dates = []
        for date in np.ndindex(leading):
            bands = np.stack([red[date], green[date], blue[date]])
            try:
                dates.append(self._sum_date(bands, mask[0][date] if mask else None, rows, cols))
            except CHMv2Error as error:
                if math.prod(leading) == 1 or error.found is None:
                    raise
                found = f"{error.found}, date {len(dates) + 1} of {math.prod(leading)} in a chunk"
                raise type(error)(error.expected, found, error.fix) from error
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
            skip_tiles(len(rows.tiles) * len(cols.tiles))
            return None
        scaling = job.scaling
        if job.unnamed and looks_exchanged(take_pixels(window, valid, scaling.low, scaling.high)):
            # The same text for every group of a call, so that Python shows it once.
            warnings.warn(advise_order(job.unnamed), UserWarning, stacklevel=2)
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
class BlendBlock:
    """Task: add up the groups that reach into one block, `by` and `bx`, and derive a layer.

    `shape` is that of the result, (..., height, width).
    """

    job: Job
    layer: Layer
    by: int
    bx: int
    shape: tuple[int, ...]

    def __call__(self, sums: Sequence[Sums | None]) -> FloatArray:
        """Blend the groups; NaN where none of them has a valid pixel."""
        if all(group is None for group in sums):
            return np.full(self.shape, np.nan, np.float32)
        row_runs, col_runs = self.job.runs
        top, left = self.by * self.job.block, self.bx * self.job.block
        parts = [
            BlockPart(row_runs[iy], col_runs[ix], top, left, *self.shape[-2:])
            for iy, ix in self.job.groups_of((self.by, self.bx))
        ]
        return blend(self.layer, parts, sums)


def _split(size: int, block: int) -> tuple[int, ...]:
    whole, rest = divmod(size, block)
    return (block,) * whole + ((rest,) if rest else ())
