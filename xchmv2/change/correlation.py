"""Spatial correlation of errors at several ranges: fitted to block means, averaged over shapes.

The correlation is a sum of spherical functions of fixed ranges, from independent pixels to the
extent of the scene. Their shares of the variance are fitted to the semivariances of the means of
blocks of 1, 2, 4, ... pixels, whose sums are integers and so the same for any chunking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import fft, optimize

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
#: Functions of distance [m], stacked: (H, W) to (k, H, W).
_Functions = Callable[[_Floats], _Floats]

#: Standardised errors are summed in these steps, as integers.
_STEP = 0.001
#: Beyond this many standard deviations a pixel is a change, not an error; so is a block.
_CLIP, _CLIP_BLOCKS = 3.0, 4.0
# In blocks; blocks of twice the side double them.
_LAGS = (
    *((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0)),
    *((2, 2), (2, -2), (0, 3), (3, 0), (0, 4), (4, 0)),
)
_LEAST_PAIRS = 20
_UNLIKE = 0.1
# Two blocks are compared exactly up to this lag, farther ones by their centres.
_EXACT = 10
#: Integrals of the spherical correlation of range 1, and of its square, over the plane.
_INTEGRAL, _SQUARED_INTEGRAL = math.pi / 5, 0.2749


def ladder(shape: tuple[int, int], cell: tuple[float, float]) -> _Floats:
    """Return the ranges [m] that are told apart: 0, then 2 px to the extent by half octaves.

    `shape` is that of the scene [px], `cell` the sides of a pixel along y and x [m].
    """
    shortest = 2 * max(cell)
    extent = max(size * side for size, side in zip(shape, cell, strict=True))
    steps = math.floor(2 * math.log2(max(extent / shortest, 1.0)))
    return np.array([0.0, *(shortest * math.sqrt(2) ** k for k in range(steps + 1))])


def spherical(distance: Any, ranges: _Floats) -> _Floats:
    """Return the correlation of each range at distances [m]: (range, *distance.shape)."""
    reach = np.asarray(ranges, np.float64).reshape(-1, *(1,) * np.ndim(distance))
    part = np.minimum(distance / np.where(reach > 0, reach, 1.0), 1.0)
    smooth = 1 - 1.5 * part + 0.5 * part**3
    found: _Floats = np.where(reach > 0, smooth, np.equal(distance, 0))
    return found


def integral(ranges: _Floats, pixel: float) -> _Floats:
    """Return the area [m2] over which errors of each range count as one, for a pixel's area."""
    return np.maximum(_INTEGRAL * np.asarray(ranges) ** 2, pixel)


def independent_errors(ranges: _Floats, area: Any) -> Any:
    """Return the degrees of freedom with which an area [m2] shows the variance of each range."""
    return np.maximum(1.0, area / np.maximum(_SQUARED_INTEGRAL * np.asarray(ranges) ** 2, 1e-9))


class Blocks(NamedTuple):
    """Sums of standardised errors over square blocks of pixels, from a part of the scene."""

    row: int
    col: int
    sums: _Ints
    counts: _Ints


def sum_blocks(error: _Floats, row: int, col: int, side: int) -> Blocks:
    """Add up errors that are no changes over blocks counted from the scene's first pixel.

    `row` and `col` say where in the scene `error` (..., H, W) begins.
    """
    with np.errstate(invalid="ignore"):
        kept = np.abs(error) <= _CLIP
    steps = np.rint(np.where(kept, error, 0.0) / _STEP).astype(np.int64)
    sums, counts = steps, kept.astype(np.int64)
    for axis, first in ((-2, row), (-1, col)):
        starts = np.unique([0, *range(-first % side, error.shape[axis], side)])
        sums, counts = (np.add.reduceat(each, starts, axis) for each in (sums, counts))
    return Blocks(row // side, col // side, sums, counts)


def join_blocks(parts: Iterable[Blocks], shape: tuple[int, int], side: int) -> Blocks:
    """Put the blocks of all parts of a scene together."""
    whole = tuple(-(-size // side) for size in shape)
    sums, counts = np.zeros(whole, np.int64), np.zeros(whole, np.int64)
    for row, col, some, number in parts:
        place = np.s_[row : row + some.shape[0], col : col + some.shape[1]]
        sums[place] += some
        counts[place] += number
    return Blocks(0, 0, sums, counts)


class Semivariance(NamedTuple):
    """Half of the mean squared difference of block means."""

    level: int
    lag: tuple[int, int]
    value: float


def semivariances(
    sums: _Ints, counts: _Ints, level: int, stop: int, longest: float
) -> Iterator[Semivariance]:
    """Compare blocks of 2^`level` px, then coarser ones up to below `stop` or a lag [px].

    `sums` and `counts` are (fields, H, W). Blocks that have less than half of their pixels, or
    stand out among the others, such as thinned stands, are left out.
    """
    while level < stop:
        known = counts >= max(1.0, 0.5 * 4**level)
        mean = np.where(known, sums * _STEP / np.maximum(counts, 1), 0.0)
        if level >= 2 and known.sum() >= 30:
            middle = np.median(mean[known])
            spread = 1.4826 * np.median(np.abs(mean[known] - middle))
            standing_out = known & (np.abs(mean - middle) > _CLIP_BLOCKS * spread)
            sums, counts = (np.where(standing_out, 0, each) for each in (sums, counts))
            known &= ~standing_out
        used = False
        for lag in _LAGS:
            if math.hypot(*lag) * 2**level > longest:
                continue
            (one, other), (left, right) = _apart(known, lag), _apart(mean, lag)
            both = one & other
            pairs = int(both.sum())
            if pairs >= _LEAST_PAIRS:
                used = True
                squares = float(((left - right)[both] ** 2).sum())
                yield Semivariance(level, lag, squares / (2 * pairs))
        if not used or min(sums.shape[-2:]) < 4:
            return
        sums, counts, level = _halve(sums), _halve(counts), level + 1


def _apart(values: npt.NDArray[Any], lag: tuple[int, int]) -> tuple[Any, Any]:
    """Return the values of all pairs at a lag."""
    (dy, dx), (height, width) = lag, values.shape[-2:]
    low, high = max(0, -dx), max(0, dx)
    one = values[..., : max(height - dy, 0), low : max(width - high, low)]
    return one, values[..., dy:, high : max(width - low, high)]


def _halve(values: _Ints) -> _Ints:
    """Add up 2 x 2 blocks; an odd last row or column is left off."""
    height, width = (size // 2 for size in values.shape[-2:])
    even = values[..., : 2 * height, : 2 * width]
    found: _Ints = even.reshape(*values.shape[:-2], height, 2, width, 2).sum(axis=(-3, -1))
    return found


def fit_sills(
    found: list[Semivariance], ranges: _Floats, cell: tuple[float, float], pixels: float
) -> _Floats:
    """Return the share of each range in the variance of errors, by non-negative least squares.

    Each semivariance counts by its error, which grows with its lag and falls with the number of
    pixels. NaN where nothing can be compared.
    """
    if not any(each.value > 0 for each in found):
        return np.full(len(ranges), np.nan)
    tables = _block_means(lambda d: spherical(d, ranges), cell, max(each.level for each in found))
    rises = np.array(
        [tables[level][:, 0, 0] - tables[level][:, lag[0], abs(lag[1])] for level, lag, _ in found]
    )
    value = np.array([each.value for each in found])
    levels = np.array([each.level for each in found])
    reach = np.array([(math.hypot(*each.lag) + 1) * 2**each.level for each in found])
    relative = np.sqrt(0.01**2 + reach**2 / max(pixels, 1.0))
    # Errors smoother than any spherical function differ from them at the shortest lags of a level.
    unlike = _UNLIKE * np.array([value[levels == level].max() for level in levels])
    model, sills = value, np.empty(0)
    for _ in range(4):
        weight = 1 / np.maximum(np.hypot(relative * model, unlike), 1e-9)
        weighted = rises * weight[:, None]
        size = np.maximum(np.linalg.norm(weighted, axis=0), 1e-12)
        sills = optimize.nnls(weighted / size, value * weight, maxiter=100 * len(ranges))[0] / size
        model = rises @ sills
    return np.asarray(sills / sills.sum())


def _block_means(functions: _Functions, cell: tuple[float, float], level: int) -> list[_Floats]:
    """Return the mean of functions of distance over the pairs of pixels of two blocks.

    For blocks of 1, 2, ... 2^`level` px a table (k, lag, lag) of lags of 0 to 10 blocks each.
    """
    lags = np.arange(2 * _EXACT + 2)
    centres = np.hypot(lags[:, None] * cell[0], lags * cell[1])
    near = np.s_[:, : _EXACT + 1, : _EXACT + 1]
    found = [functions(centres)[near]]
    for finer in range(level):
        wide = np.array(functions(centres * 2.0**finer))
        wide[near] = found[-1]
        # A block is 2 x 2 finer ones: two of them are 2I - 1, 2I (twice) and 2I + 1 blocks apart.
        wide = np.pad(wide, ((0, 0), (1, 0), (1, 0)), mode="reflect")
        wide = (wide[:, :-2:2] + 2 * wide[:, 1:-1:2] + wide[:, 2::2]) / 4
        found.append((wide[..., :-2:2] + 2 * wide[..., 1:-1:2] + wide[..., 2::2]) / 4)
    return found


def mean_correlations(
    weights: _Floats, ranges: _Floats, cell: tuple[float, float], level: int
) -> _Floats:
    """Return the mean correlation of each range over all pairs of pixels of shapes: (..., range).

    `weights` (..., H, W) are the covered areas of blocks of 2^`level` px with sides `cell` [m].
    """
    table = _block_means(lambda d: spherical(d, ranges), cell, level)[level]
    height, width = weights.shape[-2:]
    size = [fft.next_fast_len(2 * n, real=True) for n in (height, width)]
    shared = fft.irfft2(np.abs(fft.rfft2(weights, size)) ** 2, size)
    folded = shared[..., :height, :].copy()
    folded[..., 1:, :] += shared[..., :-height:-1, :]
    pairs = folded[..., :width].copy()
    pairs[..., 1:] += folded[..., :-width:-1]
    away = np.hypot(np.arange(height)[:, None] * cell[0], np.arange(width) * cell[1])
    mean = np.array(spherical(away * 2.0**level, ranges))
    near = np.s_[:, : min(height, _EXACT + 1), : min(width, _EXACT + 1)]
    mean[near] = table[:, :height, :width]
    total = weights.sum(axis=(-2, -1))[..., None]
    found: _Floats = np.einsum("...ij,kij->...k", pairs, mean) / np.maximum(total**2, 1e-300)
    return found


def coarsen(weights: _Floats, level: int) -> _Floats:
    """Add up weights (..., H, W) over blocks of 2^`level` px."""
    side = 2**level
    pad = [(0, -size % side) for size in weights.shape[-2:]]
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 2) + pad)
    rows, cols = (size // side for size in padded.shape[-2:])
    found: _Floats = padded.reshape(*weights.shape[:-2], rows, side, cols, side).sum(axis=(-3, -1))
    return found
