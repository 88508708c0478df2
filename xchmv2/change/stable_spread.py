"""Offset, spread by height and tails of the errors of a difference, from counts of its pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression
from scipy.special import ndtri

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

#: Canopy is above this on both dates [m].
_CANOPY = 2.0
#: Least share of the pixels in canopy for canopy alone to count.
_LEAST_SHARE = 0.02
#: Differences are counted in steps, by classes of the mean height of both dates [m].
_RANGE, _STEP, _CLASS = 60.0, 0.02, 1.0
_BINS, _CLASSES = round(2 * _RANGE / _STEP) + 1, 60
#: Shape of the counts: canopy on both dates or not, class, difference.
COUNTS = (2, _CLASSES, _BINS)
_CENTRES = np.linspace(-_RANGE, _RANGE, _BINS)
_MIDDLES = (np.arange(_CLASSES) + 0.5) * _CLASS
_TO_SD = 1 / float(ndtri(0.75))

#: Heights at which the spread is told, and probabilities of the tabled absolute errors.
NODES = 32
PROBABILITIES = np.array(
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999]
)
# Pixels that a class of heights needs.
_LEAST_PIXELS = 2000
# Errors beyond this many spreads are changes.
_FARTHEST = 8.0


class _StableSpread(NamedTuple):
    """Errors of a difference, as counts of pixels show them.

    Parameters
    ----------
    offset, doubt : float
        Median error [m], and how far it depends on what counts as a change.
    core : float
        Standard deviation of the errors that are no outliers [m].
    pixels : float
        Pixels that did not change.
    heights, spread : ndarray, shape (NODES,)
        Standard deviation of the errors [m] at mean heights of both dates [m].
    quantiles : ndarray
        Quantiles of the absolute error over its spread, at PROBABILITIES.
    """

    offset: float
    doubt: float
    core: float
    pixels: float
    heights: npt.NDArray[Any]
    spread: npt.NDArray[Any]
    quantiles: npt.NDArray[Any]


def count_differences(
    change: npt.NDArray[Any], lower: npt.NDArray[Any] | None, known: npt.NDArray[np.bool_]
) -> _Ints:
    """Count known differences by (canopy on both dates or not, class of mean height, difference).

    `lower` is the lower of both heights of each pixel [m], or None where heights are unknown.
    """
    change = change[known]
    bins = np.rint((np.clip(change, -_RANGE, _RANGE) + _RANGE) / _STEP).astype(np.int64)
    if lower is not None:
        lower = lower[known]
        level = np.clip((lower + np.abs(change) / 2) / _CLASS, 0, _CLASSES - 1).astype(np.int64)
        bins += _BINS * (level + _CLASSES * (lower > _CANOPY))
    return np.bincount(bins, minlength=2 * _CLASSES * _BINS).reshape(COUNTS)


def measure_spread(counts: _Ints, given: bool) -> _StableSpread:
    """Estimate the errors from counts: of stable ground alone if `given`, else of all pixels.

    Pixels that are canopy on both dates count, if there are enough of them. Their differences are
    taken for a mixture of stable pixels and of changed ones, whose errors are alike.
    """
    total = counts.sum()
    if not total:
        none = np.full(NODES, np.nan)
        return _StableSpread(np.nan, np.nan, np.nan, 0.0, none, none, PROBABILITIES * np.nan)
    of_canopy = not given and counts[1].sum() >= _LEAST_SHARE * total
    classes = counts[1] if of_canopy else counts.sum(axis=0)
    chosen = classes.sum(axis=0)
    if given:
        offset, doubt, kept = _median(_CENTRES, chosen), 0.0, 1.0
        core = _nmad(chosen, offset)
    else:
        offset, core, kept, doubt = _stable_part(chosen)
    pixels = kept * float(chosen.sum())
    if core == 0:  # no scatter at all
        return _StableSpread(
            offset, doubt, 0.0, pixels, _MIDDLES[:NODES], np.zeros(NODES), PROBABILITIES * np.nan
        )
    # A class so low that its errors are cut off at the ground is narrower than they are.
    whole = _CANOPY + 1.25 * core <= _MIDDLES if of_canopy else np.ones(_CLASSES, bool)
    if classes[whole].sum() < min(_LEAST_PIXELS, 0.5 * chosen.sum()):
        whole[:] = True
    heights, spread = _spread_by_height(classes * whole[:, None], offset, core, given)
    scale, quantiles = _tails(classes, offset, np.interp(_MIDDLES, heights, spread), given)
    short = NODES - len(heights)
    heights, spread = (np.pad(each, (0, short), mode="edge") for each in (heights, scale * spread))
    return _StableSpread(offset, doubt, core, pixels, heights, spread, quantiles)


def rough_offset(counts: _Ints) -> float:
    """Return the middle of the shortest third of the differences, in canopy if there is some."""
    chosen = counts[1] if counts[1].sum() >= _LEAST_SHARE * counts.sum() else counts.sum(axis=0)
    return _shortest_third(chosen.sum(axis=0))[0] if chosen.any() else 0.0


def _stable_part(counts: _Ints) -> tuple[float, float, float, float]:
    """Return offset, spread and share of the stable pixels, and the doubt about the offset.

    The doubt is the largest distance between offsets of equal likelihood, from three starts, and
    of models that call a pixel changed from 1.25, 1.5 or 2 spreads on.
    """
    middle, width = _shortest_third(counts)
    if width == 0:
        return middle, 0.0, 1.0, 0.0
    gaps = np.repeat([1.25, 1.5, 2.0], 3)
    starts = np.tile([0.0, 0.7, -0.7], 3)
    m, s, kept, likely = _fit_mixtures(
        np.tile(counts, (9, 1)),
        gaps,
        middle + starts * width,
        width * np.tile([1.0, 0.7, 0.7], 3),
    )
    # Of starts that fit alike the one that keeps more.
    best = [3 * k + int(np.argmax((likely + 0.02 * kept)[3 * k : 3 * k + 3])) for k in range(3)]
    chosen = best[1]
    alike = (likely[3:6] > likely[chosen] - 0.0005) & (kept[3:6] > 0.75 * kept[chosen])
    others = np.concatenate([m[best], m[3:6][alike]])
    doubt = float(np.abs(others - m[chosen]).max())
    return float(m[chosen]), float(s[chosen]), float(kept[chosen]), doubt


def _fit_mixtures(
    counts: _Ints, gaps: _Floats, middles: _Floats, widths: _Floats, *, fixed: bool = False
) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Fit each row of counts by stable errors N(m, s), and the same moved by a gap or more.

    Expectation and maximisation of offset (unless `fixed`), spread, and the free shares of
    changes by `gaps` times s, and on in steps of 0.75 s to 8 s, both ways. Returns the offset, the
    spread, the stable share of all pixels and the mean log-likelihood.
    """
    values, weights = _coarse(counts, middles, widths)
    steps = np.arange(9) * 0.75
    shifts = gaps[:, None] + steps
    moved = np.where(shifts < 8, shifts, np.inf)
    apart = np.concatenate([np.zeros((len(gaps), 1)), moved, -moved], axis=1)[:, None]
    usable = np.isfinite(apart)
    apart = np.where(usable, apart, 0.0)
    shares = np.where(usable, 0.3 / (usable.sum(axis=2, keepdims=True) - 1), 0.0)
    shares[..., 0] = 0.7
    least = np.maximum(widths / 3, _STEP / 2)
    m, s, stable = middles.copy(), widths.copy(), np.ones(len(middles))
    density = np.ones(values.shape)
    for turn in range(300):
        score = (values - m[:, None]) / s[:, None]
        chance = np.exp(-0.5 * (score[..., None] - apart) ** 2) * shares
        density = chance.sum(axis=-1) + 1e-300
        part = chance * (weights / density)[..., None]
        sums = part.sum(axis=1)
        own = part[..., 0]
        stable = np.maximum(sums[:, 0], 1e-9)
        moved_m = m if fixed else (own * values).sum(axis=1) / stable
        variance = (own * (values - moved_m[:, None]) ** 2).sum(axis=1) / stable
        moved_s = np.maximum(np.sqrt(variance), least)
        shares = (sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-300))[:, None]
        step = np.maximum(np.abs(moved_m - m), np.abs(moved_s - s)) / widths
        m, s = moved_m, moved_s
        if turn > 20 and (step < (1e-3 if fixed else 2e-4)).all():
            break
    total = np.maximum(weights.sum(axis=1), 1.0)
    likely = (weights * np.log(density / s[:, None])).sum(axis=1) / total
    return m, s, stable / np.maximum(counts.sum(axis=1), 1), likely


def _coarse(counts: _Ints, middles: _Floats, widths: _Floats) -> tuple[_Floats, _Floats]:
    """Gather counts to steps of 0.15 widths, as far as 9 of them: mean values and counts."""
    bins = 121
    index = np.rint((_CENTRES - middles[:, None]) / (0.15 * widths[:, None]))
    rows, cols = np.nonzero((np.abs(index) <= bins // 2) & (counts > 0))
    place = rows * bins + index[rows, cols].astype(np.int64) + bins // 2
    number = counts[rows, cols].astype(np.float64)
    shape = (len(counts), bins)
    weights, sums = (
        np.bincount(place, each, shape[0] * shape[1]).reshape(shape).astype(np.float64)
        for each in (number, number * _CENTRES[cols])
    )
    return sums / np.maximum(weights, 1.0), weights


def _spread_by_height(
    classes: _Ints, offset: float, core: float, given: bool
) -> tuple[_Floats, _Floats]:
    """Return a spread that does not fall with height, at the mean heights of pooled classes."""
    near = classes[:, np.abs(_CENTRES - offset) < 3 * core].sum(axis=1)
    # Of trees of one height the mean of both dates is known by its errors, and so tells them.
    middle = (near @ _MIDDLES) / max(near.sum(), 1)
    uneven = near @ (_MIDDLES - middle) ** 2 > core**2 * near.sum()
    starts = _pool(near) if uneven else [0]
    size = classes.sum(axis=1).astype(np.float64)
    heights = np.add.reduceat(size * _MIDDLES, starts) / np.add.reduceat(size, starts)
    pooled, size = np.add.reduceat(classes, starts, axis=0), np.add.reduceat(size, starts)
    if given:
        spread = np.array([_nmad(each, offset) for each in pooled])
    else:
        start = np.full(len(starts), offset), np.full(len(starts), core)
        _, spread, kept, _ = _fit_mixtures(pooled, np.full(len(starts), 1.5), *start, fixed=True)
        size *= kept
    rising = isotonic_regression(np.maximum(spread, _STEP), weights=np.maximum(size, 1.0)).x
    return heights, np.asarray(rising)


def _pool(sizes: _Ints) -> list[int]:
    """Return the first classes of groups of neighbours that hold enough pixels."""
    reached = np.cumsum(sizes)
    starts, done = [0], 0
    for last, total in enumerate(reached):
        # Groups are smaller towards the tallest, which are few and vary most.
        enough = min(reached[-1] / 20, (reached[-1] - done) / 4)
        if total - done >= max(_LEAST_PIXELS, enough):
            starts.append(last + 1)
            done = total
    if len(starts) > 1 and reached[-1] - done < _LEAST_PIXELS:
        del starts[-1]  # too few are left for a group of their own
    return starts[:NODES]


def _tails(classes: _Ints, offset: float, spread: _Floats, given: bool) -> tuple[float, _Floats]:
    """Return the standard deviation of errors over `spread`, and quantiles of those over it.

    Changes lie mostly on one side, so the side on which fewer errors are large speaks for both.
    """
    score = (_CENTRES - offset) / spread[:, None]
    kept = (classes > 0) & (np.abs(score) <= _FARTHEST)
    value, count = score[kept], classes[kept]
    sides = [(value, count)] if given else [(side * value, count) for side in (1, -1)]
    found = []
    for each, number in sides:
        size = np.abs(each) if given else each
        half = size > 0 if not given else size >= 0
        size, own = size[half], number[half].astype(np.float64)
        if not len(size):
            continue
        order = np.argsort(size, kind="stable")
        size, rising = size[order], np.cumsum(own[order])
        place = np.searchsorted(rising, PROBABILITIES * rising[-1])
        quantiles = size[np.minimum(place, len(size) - 1)]
        scale = float(np.sqrt((own[order] * size**2).sum() / rising[-1]))
        found.append((quantiles[9], scale, quantiles))
    if not found:  # too few pixels to tell
        return 1.0, ndtri(0.5 + PROBABILITIES / 2)
    _, scale, quantiles = min(found, key=lambda each: each[0])
    return scale, quantiles / scale


def _shortest_third(counts: _Ints) -> tuple[float, float]:
    """Return the middle of the shortest run that holds a third, and the spread it implies [m]."""
    total = np.concatenate([[0], np.cumsum(counts)])
    need = (total[-1] + 2) // 3
    ends = np.searchsorted(total, total[:-1] + need)  # first end that is far enough
    lengths = np.where(ends < len(total), ends - np.arange(len(counts)), len(total) + 1)
    shortest = np.flatnonzero(lengths == lengths.min())
    start = int(shortest[len(shortest) // 2])
    middle = float(_CENTRES[start] + _CENTRES[ends[start] - 1]) / 2
    if lengths[start] == 1 and 2 * counts[start] > total[-1]:
        return middle, 0.0
    return middle, float(lengths[start]) * _STEP / 2 / float(ndtri(2 / 3))


def _median(values: _Floats, counts: npt.NDArray[Any]) -> float:
    """Return the median of ascending values with counts: exact up to the width of a bin."""
    total = np.cumsum(counts)
    low, high = np.searchsorted(total, [(total[-1] + 1) // 2, total[-1] // 2 + 1])
    return float((values[low] + values[high]) / 2)


def _nmad(counts: _Ints, offset: float) -> float:
    """Return 1.4826 times the median absolute deviation from an offset."""
    apart = np.abs(_CENTRES - offset)
    order = np.argsort(apart, kind="stable")
    return _TO_SD * _median(apart[order], counts[order])
