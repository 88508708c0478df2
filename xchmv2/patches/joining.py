"""Patches of all blocks joined across their borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from xchmv2.patches.local import Floats, Integers, Moments, Numbers, Rule, Summary, add_up


@dataclass(frozen=True, eq=False)
class Joined:
    """The patches of a raster.

    Parameters
    ----------
    numbers : ndarray of Numbers
        (block rows, block cols) what the patches of each block are called.
    pixels, area : ndarray
        Pixels and area [m2] of each patch.
    values : dict of Moments
        What lies in each.
    """

    numbers: npt.NDArray[np.object_]
    pixels: Integers
    area: Floats
    values: dict[str, Moments]


def join(
    blocks: npt.NDArray[np.object_], chunks: tuple[Sequence[int], Sequence[int]], rule: Rule
) -> Joined:
    """Join the patches of all blocks.

    Parameters
    ----------
    blocks : ndarray of Summary
        (block rows, block cols).
    chunks : tuple of sequences of int
        Rows and columns of the blocks.
    rule : Rule
        Which pixels belong together, and which patches are kept.

    Returns
    -------
    Joined
        Those that are kept, numbered from 1 in the order of their first pixels, row by row: the
        numbers do not depend on the blocks.
    """
    summaries: list[Summary] = list(blocks.ravel())
    offsets = np.cumsum([0, *(len(summary.ids) for summary in summaries)])
    part_of, count = _components(blocks, offsets, rule)
    area = add_up(part_of, _all(summaries, "area", float), count)
    first = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first, part_of, _first_pixels(blocks, chunks))
    order = np.argsort(first)
    order = order[rule.keeps(area[order])]
    number = np.zeros(count, np.int64)
    number[order] = np.arange(1, len(order) + 1)
    pixels = np.zeros(count, np.int64)
    np.add.at(pixels, part_of, _all(summaries, "pixels", np.int64))
    return Joined(
        numbers=_numbers(blocks, offsets, number[part_of]),
        pixels=pixels[order],
        area=area[order],
        values={
            name: _combine([s.values[name] for s in summaries], part_of, count).take(order)
            for name in summaries[0].values
        },
    )


def _all(summaries: Sequence[Summary], field: str, dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([getattr(s, field) for s in summaries]).astype(dtype)


def _first_pixels(
    blocks: npt.NDArray[np.object_], chunks: tuple[Sequence[int], Sequence[int]]
) -> Integers:
    """Place of the first pixel of every block's patches in the raster, counted row by row."""
    tops, lefts = (np.cumsum([0, *sizes]) for sizes in chunks)
    places = []
    for block, (i, j) in zip(blocks.ravel(), np.ndindex(blocks.shape), strict=True):
        row, col = block.first.T
        places.append((row + tops[i]) * lefts[-1] + col + lefts[j])
    return np.concatenate(places).astype(np.int64)


def _components(
    blocks: npt.NDArray[np.object_], offsets: Integers, rule: Rule
) -> tuple[npt.NDArray[Any], int]:
    """Tell which patches of blocks belong together."""
    offset = offsets[:-1].reshape(blocks.shape)
    pairs = [
        pair
        for turned, (last, first) in ((False, (1, 0)), (True, (3, 2)))
        for upper, lower in _lines(blocks, offset, turned, last, first)
        for pair in _touching(upper, lower, rule)
    ]
    one, other = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
    size = int(offsets[-1])
    links = coo_array((np.ones(len(one), bool), (one, other)), shape=(size, size))
    count, part_of = connected_components(links, directed=False)
    return part_of, int(count)


def _lines(
    blocks: npt.NDArray[np.object_], offset: Integers, turned: bool, last: int, first: int
) -> list[tuple[Integers, Integers]]:
    """Patches on both sides of each border that runs through the raster from side to side.

    Whole lines, so that patches which touch at the corner of four blocks are side by side too.
    """
    blocks, offset = (blocks.T, offset.T) if turned else (blocks, offset)
    return [
        (_line(blocks[i], offset[i], last), _line(blocks[i + 1], offset[i + 1], first))
        for i in range(len(blocks) - 1)
    ]


def _line(blocks: npt.NDArray[np.object_], offset: Integers, edge: int) -> Integers:
    """Patches along one side of a row of blocks: -1 where there is none."""
    ids = [
        np.where(block.edges[edge] > 0, block.edges[edge] + start - 1, -1)
        for block, start in zip(blocks, offset, strict=True)
    ]
    return np.concatenate(ids)


def _touching(upper: Integers, lower: Integers, rule: Rule) -> list[Integers]:
    sides = [(upper, lower)]
    if rule.connectivity == 8:
        sides += [(upper[1:], lower[:-1]), (upper[:-1], lower[1:])]
    return [np.unique(np.stack(s)[:, (s[0] >= 0) & (s[1] >= 0)], axis=1) for s in sides]


def _numbers(
    blocks: npt.NDArray[np.object_], offsets: Integers, number: Integers
) -> npt.NDArray[np.object_]:
    found = np.empty(blocks.size, object)
    for index, block in enumerate(blocks.ravel()):
        own = number[offsets[index] : offsets[index + 1]]
        found[index] = Numbers(block.ids[own > 0], own[own > 0])
    return found.reshape(blocks.shape)


def _combine(parts: Sequence[Moments], part_of: npt.NDArray[Any], n: int) -> Moments:
    """Add up the parts of each patch."""
    count, mean, squares, low, high, volume = (
        np.concatenate(fields) for fields in zip(*(part.fields for part in parts), strict=True)
    )
    total = np.zeros(n, np.int64)
    np.add.at(total, part_of, count)
    mean_all = add_up(part_of, count * mean, n) / np.maximum(total, 1)
    # The squares around the mean of the whole: those around each part's, and the parts' own.
    squares = squares + count * (mean - mean_all[part_of]) ** 2
    low_all, high_all = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low_all, part_of, low)
    np.maximum.at(high_all, part_of, high)
    return Moments(
        count=total,
        mean=mean_all,
        squares=add_up(part_of, squares, n),
        low=low_all,
        high=high_all,
        volume=add_up(part_of, volume, n),
    )
