"""Blending: weighted sums of tiles over a group, and blocks made from the sums of groups.

The tile weights at a pixel sum to 1 over all tiles that cover it, so a plain sum over groups is
already the blended value, and weights need not be passed on. Invalid pixels are NaN in every group
that covers them, and stay NaN in the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from xchmv2.raster import FloatArray, TileRun

#: What a prediction can return, all in metres.
Layer = Literal["height", "bin_spread", "overlap_disagreement"]

#: Arrays of one tile group over its extent, (..., H, W) float32: ``height`` and ``bin_spread`` are
#: weighted sums [m], ``scatter`` is the weighted sum of squared deviations from the group's mean.
Sums = Mapping[str, FloatArray]


class Accumulator:
    """Adds up the tiles of one group, one at a time.

    `shape` is (H, W) of the group's extent [px]; `layers` are those that will be derived.
    """

    def __init__(self, shape: tuple[int, int], layers: Sequence[Layer]) -> None:
        self._height = np.zeros(shape, np.float32)
        self._spread = np.zeros(shape, np.float32) if "bin_spread" in layers else None
        wants_scatter = "overlap_disagreement" in layers
        self._scatter = np.zeros(shape, np.float32) if wants_scatter else None
        self._weight = np.zeros(shape, np.float32) if wants_scatter else None

    def add(
        self,
        where: tuple[slice, slice],
        weights: FloatArray,
        height: FloatArray,
        spread: FloatArray | None,
    ) -> None:
        """Add one tile: its place in the extent, its weights, heights and bin spreads (h, w)."""
        if self._scatter is not None and self._weight is not None:
            # West's update of a weighted sum of squares, which subtracts no large squares.
            before = self._weight[where]
            mean = self._height[where] / np.where(before > 0, before, 1)
            after = before + weights
            self._scatter[where] += weights * before / after * (height - mean) ** 2
            self._weight[where] = after
        self._height[where] += weights * height
        if self._spread is not None and spread is not None:
            self._spread[where] += weights * spread

    def sums(self, valid: npt.NDArray[np.bool_]) -> dict[str, FloatArray]:
        """Return the sums over the extent, NaN where ``valid`` (H, W) is false."""
        found = {"height": self._height, "bin_spread": self._spread, "scatter": self._scatter}
        arrays = {name: array for name, array in found.items() if array is not None}
        for array in arrays.values():
            array[~valid] = np.nan
        return arrays


def stack_dates(dates: Sequence[Sums | None], shape: tuple[int, ...]) -> Sums | None:
    """Join the sums of several dates along leading dims: arrays of ``(*shape, H, W)``.

    An entry is None where the date holds no valid pixel in this group; so is the result if no date
    has one.
    """
    some = next((sums for sums in dates if sums is not None), None)
    if some is None:
        return None

    def joined(name: str, like: FloatArray) -> FloatArray:
        empty = np.broadcast_to(np.float32(np.nan), like.shape)
        parts = [empty if sums is None else sums[name] for sums in dates]
        if len(parts) == 1:
            return like.reshape(*shape, *like.shape)  # [*dates, H, W]
        return np.stack(parts).reshape(*shape, *like.shape)  # [*dates, H, W]

    return {name: joined(name, array) for name, array in some.items()}


@dataclass(frozen=True)
class BlockPart:
    """The part of one group that lies in one block.

    `rows`, `cols`: the group; `top`, `left`: first pixel of the block; `height`, `width`: its size
    [px].
    """

    rows: TileRun
    cols: TileRun
    top: int
    left: int
    height: int
    width: int

    @property
    def in_block(self) -> tuple[slice, slice]:
        """Where the part lies, in pixels of the block."""
        return (
            _shared(self.rows, self.top, self.height, self.top),
            _shared(self.cols, self.left, self.width, self.left),
        )

    @property
    def in_group(self) -> tuple[slice, slice]:
        """Where the part lies, in pixels of the group's extent."""
        return (
            _shared(self.rows, self.top, self.height, self.rows.start),
            _shared(self.cols, self.left, self.width, self.cols.start),
        )

    @property
    def weight(self) -> FloatArray:
        """Sum of the group's weights over the part, (h, w); strictly positive."""
        y, x = self.in_group
        weight: FloatArray = self.rows.total_weight[y, None] * self.cols.total_weight[None, x]
        return weight


def blend(layer: Layer, parts: Sequence[BlockPart], sums: Sequence[Sums | None]) -> FloatArray:
    """Add up the groups that reach into one block, in the order given: (..., height, width) [m].

    `parts` are those of the groups in this block; together they cover it. `sums` (..., H, W) are
    None where a group holds no valid pixel. The result is float32, NaN where invalid.
    """
    if layer == "overlap_disagreement":
        return _disagreement(parts, sums)
    return _add_up(layer, parts, sums)


def _shared(run: TileRun, first: int, length: int, zero: int) -> slice:
    return slice(max(run.start, first) - zero, min(run.stop, first + length) - zero)


def _add_up(
    name: str, parts: Sequence[BlockPart], sums: Sequence[Sums | None]
) -> npt.NDArray[np.float32]:
    leading = next((s["height"].shape[:-2] for s in sums if s is not None), ())
    total = np.zeros((*leading, parts[0].height, parts[0].width), np.float32)
    for part, group in zip(parts, sums, strict=True):
        value = np.nan if group is None else group[name][..., *part.in_group]
        total[..., *part.in_block] += value
    return total


def _disagreement(parts: Sequence[BlockPart], sums: Sequence[Sums | None]) -> FloatArray:
    """Combine the scatter inside groups with the scatter between them."""
    mean = _add_up("height", parts, sums)
    variance = _add_up("scatter", parts, sums)
    for part, group in zip(parts, sums, strict=True):
        if group is not None:
            where = (..., *part.in_block)
            off = group["height"][..., *part.in_group] / part.weight - mean[where]
            variance[where] += part.weight * off**2
    first = parts[0]
    count_y = first.rows.axis.coverage(first.top, first.top + first.height)
    count_x = first.cols.axis.coverage(first.left, first.left + first.width)
    variance[..., (count_y[:, None] * count_x[None, :]) == 1] = np.nan
    return np.sqrt(variance)
