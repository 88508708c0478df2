"""The tile grid: the windows that the network sees, their blending weights and their groups.

The grid is separable, so it is defined for one axis; an image has two. It consists of integers and
one-dimensional weights, without imagery, network or dask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import numpy.typing as npt

from xchmv2.errors import GridError
from xchmv2.raster.arguments import is_whole, show

#: Side of an output chunk [px] where the input's own chunks are unsuitable.
BLOCK = 4096
#: Largest side of the input's own chunks that the output follows [px].
LARGEST_BLOCK = 8192
#: Version of the prediction algorithm: raised whenever the same input gives other heights.
ALGORITHM = 1
#: The head returns its input's size only where height and width are multiples of this [px].
_SIZE_MULTIPLE = 32

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TileAxis:
    """The tiles along one axis of an image.

    The nominal tile starts are the multiples of the stride counted in pixels from the CRS origin,
    so the same ground gets the same tiles in every area of interest. A tile that would cross the
    image's edge is moved inward. An axis shorter than one tile has a single window, rounded up to a
    multiple of 32 px and padded beyond the image.

    `size`: pixels of the image along this axis; `tile`: side of the square window the network sees
    [px]; `overlap`: pixels shared by two neighbouring tiles; `origin`: index of the image's first
    pixel, counted from the CRS origin.
    """

    size: int
    tile: int
    overlap: int
    origin: int = 0

    @property
    def stride(self) -> int:
        """Distance between nominal tile starts [px]."""
        return self.tile - self.overlap

    @property
    def window(self) -> int:
        """Length of a network window along this axis [px]."""
        return min(self.tile, math.ceil(self.size / _SIZE_MULTIPLE) * _SIZE_MULTIPLE)

    @property
    def padding(self) -> int:
        """Pixels of the window that lie beyond the end of the image."""
        return max(0, self.window - self.size)

    @property
    def starts(self) -> tuple[int, ...]:
        """First pixel of each tile, ascending, in image pixels."""
        return _starts(self)

    @property
    def stops(self) -> tuple[int, ...]:
        """One past the last image pixel of each tile."""
        return _stops(self)

    @property
    def weights(self) -> tuple[FloatArray, ...]:
        """Blending weights of each tile over its image pixels; they sum to 1 at every pixel."""
        return _weights(self)

    def coverage(self, start: int, stop: int) -> npt.NDArray[np.intp]:
        """Count the tiles that cover each pixel of ``[start, stop)``."""
        pixels = np.arange(start, stop)
        begun = np.searchsorted(self.starts, pixels, side="right")
        ended = np.searchsorted(self.stops, pixels, side="right")
        return begun - ended


@dataclass(frozen=True)
class TileRun:
    """Tiles of one axis from `first` to `last`, both included, that intersect the same blocks."""

    axis: TileAxis
    first: int
    last: int
    blocks: tuple[int, ...]

    @property
    def start(self) -> int:
        """First pixel of the extent."""
        return self.axis.starts[self.first]

    @property
    def stop(self) -> int:
        """One past the last pixel of the extent."""
        return self.axis.stops[self.last]

    @property
    def tiles(self) -> tuple[tuple[slice, FloatArray], ...]:
        """Each tile's pixels, counted from the start of the extent, and its blending weights."""
        axis, chosen = self.axis, range(self.first, self.last + 1)
        return tuple(
            (slice(axis.starts[i] - self.start, axis.stops[i] - self.start), axis.weights[i])
            for i in chosen
        )

    @property
    def total_weight(self) -> FloatArray:
        """Sum of the tiles' weights at each pixel of the extent; 1 where no other run reaches."""
        total = np.zeros(self.stop - self.start, np.float32)
        for where, weights in self.tiles:
            total[where] += weights
        return total


@lru_cache(maxsize=256)
def tile_runs(axis: TileAxis, block: int) -> tuple[TileRun, ...]:
    """Partition the tiles of an axis by the blocks that they intersect, in ascending order.

    A block of `block` px is at least one tile, so that a tile intersects one block or two. Every
    tile is in exactly one run. A *tile group* is a pair of runs, one per image axis.
    """

    def reached(tile: int) -> tuple[int, ...]:
        return tuple(range(axis.starts[tile] // block, (axis.stops[tile] - 1) // block + 1))

    runs = []
    for blocks, tiles in groupby(range(len(axis.starts)), key=reached):
        members = list(tiles)
        runs.append(TileRun(axis, members[0], members[-1], blocks))
    return tuple(runs)


@lru_cache(maxsize=256)
def runs_by_block(axis: TileAxis, block: int) -> tuple[tuple[int, ...], ...]:
    """Return the indices of the runs of ``tile_runs`` that intersect each block of an axis.

    At most three per block, ascending.
    """
    found: list[list[int]] = [[] for _ in range(math.ceil(axis.size / block))]
    for index, run in enumerate(tile_runs(axis, block)):
        for reached in run.blocks:
            found[reached].append(index)
    return tuple(tuple(indices) for indices in found)


def origin_index(edge: float, pixel: float) -> int:
    """Count pixels from the CRS origin to an image's first edge, by the signed pixel size.

    The index is rounded to 1e-3 before halves are rounded up, so that floating-point noise on grids
    whose pixel centres sit on multiples of the pixel size cannot give two areas of interest
    different tiles.
    """
    return math.floor(round(edge / pixel, 3) + 0.5)


def validate_grid(tile: int, overlap: int, block: int | None) -> None:
    """Check that tiles, overlap and blocks [px] can form a grid; a block of None is to be chosen.

    A GridError refuses sizes that are no integers, a tile that is not a positive multiple of 32, an
    overlap that is negative or more than half a tile, and a block smaller than a tile.
    """
    sizes = {"tile": tile, "overlap": overlap, **({} if block is None else {"block": block})}
    broken = [f"{name}={show(value)}" for name, value in sizes.items() if not is_whole(value)]
    if broken:
        raise GridError(
            "tile, overlap and block in whole pixels", ", ".join(broken), "pass integers"
        )
    if tile < _SIZE_MULTIPLE or tile % _SIZE_MULTIPLE:
        nearest = max(1, round(tile / _SIZE_MULTIPLE)) * _SIZE_MULTIPLE
        raise GridError(
            f"a tile that is a multiple of {_SIZE_MULTIPLE} px",
            f"tile={tile}",
            f"the nearest that works: .predict(..., tile={nearest})",
        )
    if not 0 <= overlap <= tile // 2:
        raise GridError(
            f"an overlap of 0 to half a tile ({tile // 2} px)",
            f"overlap={overlap} with tile={tile}",
            f"lower it: .predict(..., overlap={max(0, min(overlap, tile // 2))})",
        )
    if block is not None and block < tile:
        raise GridError(
            f"a block of at least one tile ({tile} px)",
            f"block={block}",
            f"raise it or leave it out: .predict(..., block={max(tile, 2048)})",
        )


@lru_cache(maxsize=256)
def _starts(axis: TileAxis) -> tuple[int, ...]:
    """Return tile starts: nominal, counted from the CRS origin, and moved inward at the edges."""
    last_start = max(0, axis.size - axis.window)
    first = axis.origin // axis.stride
    last = max(first, math.ceil((axis.origin + last_start) / axis.stride))
    nominal = (index * axis.stride - axis.origin for index in range(first, last + 1))
    return tuple(sorted({min(max(start, 0), last_start) for start in nominal}))


@lru_cache(maxsize=256)
def _stops(axis: TileAxis) -> tuple[int, ...]:
    """Return tile ends, clipped to the image where the window is padded."""
    return tuple(min(start + axis.window, axis.size) for start in axis.starts)


@lru_cache(maxsize=256)
def _weights(axis: TileAxis) -> tuple[FloatArray, ...]:
    """Return the ramps of all tiles, divided by their sum at each pixel."""
    ramp = _ramp(axis.window, axis.overlap)
    spans = list(zip(axis.starts, axis.stops, strict=True))
    total = np.zeros(axis.size)
    for start, stop in spans:
        total[start:stop] += ramp[: stop - start]
    weights = [
        (ramp[: stop - start] / total[start:stop]).astype(np.float32) for start, stop in spans
    ]
    for shared in weights:
        shared.setflags(write=False)
    return tuple(weights)


def _ramp(length: int, overlap: int) -> npt.NDArray[np.float64]:
    """Return weights rising over the first ``overlap`` px and falling over the last; above 0."""
    if overlap == 0:
        return np.ones(length)
    rise = np.clip((np.arange(length) + 0.5) / overlap, None, 1.0)
    return np.minimum(rise, rise[::-1])
