"""Gross loss and gain of an area from counts of its differences, freed of their errors.

Errors alone put a share of unchanged pixels beyond any threshold. Where their distribution is
known, the counts of the differences tell which distribution of true change they came from, and so
the area and the volume that really changed, with an interval: :func:`gross_change`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import fft, linalg
from scipy.special import ndtr, ndtri, stdtrit

_Floats = npt.NDArray[np.float64]

#: Differences are counted in bins of this width up to this distance from 0 [m]; larger ones count
#: in the last bin.
STEP, REACH = 0.1, 100.0
#: Middles of the bins [m].
DIFFERENCES = np.arange(-round(REACH / STEP), round(REACH / STEP) + 1) * np.float64(STEP)
#: Classes of the error of a pixel: so many for each doubling of the sd, from 0.25 m to 32 m.
_PER_OCTAVE, _LEAST_SD = 4, 0.25
CLASSES = _PER_OCTAVE * 7
#: Levels of correlation between 0 and 1 at which pairs of pixels are counted, and their weights
#: in an integral (Gauss-Legendre in the arc sine).
_NODES, _ARC = np.polynomial.legendre.leggauss(20)
LEVELS = np.sin(np.pi / 4 * (_NODES + 1))
_WEIGHTS = np.pi / 4 * _ARC * np.sqrt(1 - LEVELS**2)
#: Areas are counted in this part of a reference area, and logarithms of the sd in this part of 1,
#: as whole numbers: sums do not depend on their order.
_PARTS, _LOG_PARTS = 1 << 20, 1 << 12


def count_differences(
    change: npt.NDArray[np.floating], sd: npt.NDArray[np.floating], area: _Floats | float = 1.0
) -> npt.NDArray[np.int64]:
    """Count the area of pixels by their error and difference.

    Parameters
    ----------
    change : ndarray
        Differences [m].
    sd : ndarray
        Standard deviation of the error of each difference [m], broadcast against them; pixels
        without either are left out.
    area : ndarray or float, default 1
        Area of each pixel that counts, in some reference area, such as the covered share.

    Returns
    -------
    ndarray (CLASSES, len(DIFFERENCES) + 2)
        Counts that add up over the parts of an area, in any order; see :func:`read_counts`.
    """
    known = np.isfinite(change) & (sd > 0) & np.isfinite(sd)
    logs = np.log2(np.broadcast_to(sd, change.shape)[known].astype(np.float64))
    kind = np.floor(_PER_OCTAVE * (logs - np.log2(_LEAST_SD)) + 1e-6)
    kind = np.clip(kind, 0, CLASSES - 1).astype(np.int64)
    weight = np.rint(np.broadcast_to(area, change.shape)[known] * _PARTS)
    bins, middle = len(DIFFERENCES), len(DIFFERENCES) // 2
    place = np.rint(np.clip(change[known], -REACH, REACH).astype(np.float64) / STEP) + middle
    areas = np.bincount(kind * bins + place.astype(np.int64), weight, CLASSES * bins)
    pixels = [np.bincount(kind, w, CLASSES) for w in (None, np.rint(logs * _LOG_PARTS))]
    found: npt.NDArray[np.int64] = np.column_stack([areas.reshape(CLASSES, bins), *pixels]).astype(
        np.int64
    )
    return found


def read_counts(table: npt.NDArray[np.int64]) -> tuple[_Floats, _Floats, int]:
    """Return the sd [m] of the classes that hold pixels, their areas (class, bin), and the pixels.

    Areas are in the reference area of :func:`count_differences`.
    """
    held = table[table[:, -2] > 0]
    logs = held[:, -1] / held[:, -2] / _LOG_PARTS
    return np.exp2(logs), held[:, :-2] / _PARTS, int(held[:, -2].sum())


class Interval(NamedTuple):
    """An estimate with its interval; the standard error is its half width over z."""

    estimate: float
    standard_error: float
    lower: float
    upper: float


@dataclass(frozen=True)
class GrossChange:
    """What :func:`gross_change` finds."""

    #: Share of the area that fell, or rose, by the threshold or more.
    area: Interval
    #: Volume that these pixels lost or gained, over the whole area [m].
    volume: Interval
    #: Mean square of the differences between the counts and the best fit, in standard errors. Far
    #: above 1, the errors are not what they were said to be.
    misfit: float


@dataclass(frozen=True, eq=False)
class PixelErrors:
    """Errors of the differences of an area."""

    #: Standard deviation in each class of pixels [m].
    sd: _Floats
    #: Pixels of the area; of partly covered ones (sum of shares)^2 / sum of shares^2.
    pixels: float
    #: Shares of the pairs of pixels, of all in the area, whose errors are correlated by more than
    #: each of the LEVELS: see :func:`pair_shares`. 0 for independent errors.
    alike: _Floats = field(default_factory=lambda: np.zeros(len(LEVELS)))
    #: Standard error of `sd`, as a share of it, and of an offset that all differences share [m].
    sd_doubt: float = 0.05
    offset_doubt: float = 0.0
    #: (2, n) quantiles of the size of standardised errors, and the shares below them, both
    #: ascending from 0, the shares to 1, where errors are not normal: see :func:`own_shape`.
    shape: _Floats | None = None

    @property
    def mean_correlation(self) -> float:
        """Mean correlation of the errors of all pairs of different pixels."""
        return float(self.alike @ _WEIGHTS)


def gross_change(
    counts: npt.NDArray[np.number],
    differences: _Floats,
    errors: PixelErrors,
    *,
    threshold: float,
    confidence: float = 0.95,
    side: Literal["loss", "gain"] = "loss",
) -> GrossChange:
    """Estimate the share of an area, and the volume, that changed by a threshold or more.

    Parameters
    ----------
    counts : ndarray (class, bin)
        Area, or pixels, by class of error and by difference, in any unit.
    differences : ndarray (bin,)
        Middles of the bins [m], evenly spaced and ascending.
    errors : PixelErrors
        The errors of the differences.
    threshold : float
        Least change that counts [m], above 0.
    confidence : float, default 0.95
        Confidence of the intervals.
    side : {"loss", "gain"}
        Negative or positive differences.

    Returns
    -------
    GrossChange
        NaN without pixels.

    Notes
    -----
    The share F_k of the differences up to d_k is, if no errors but their distribution E were
    known, F = sum over c of w_c E((d_k - c) / s): the true changes c have the shares w_c >= 0 that
    are to be found. Classes of different error have F and w of their own. F is taken at steps of
    s / 2 within 6 s of the threshold, c at steps of 0.4 s; what lies farther out is lost or kept
    for sure. For volumes the mean of max(-threshold - d, 0) is fitted as well.

    The covariance of F is that of repeated errors over the same true change: of single pixels,
    sum over c of w_c (E_min - E_k E_l) / n, and of pairs, which mostly lie in one patch of equal
    change, sum over c of w_c times the integral over r, from 0 to 1, of S(r) phi2(u_k, u_l; r):
    phi2 is the density of two normal errors correlated by r, S(r) the share of the pairs that
    are correlated by more. What is not known about s and the offset adds two terms of rank 1.

    The estimate is that of the w that fit best in generalised least squares. The interval holds all
    values whose best fit is worse by no more than t^2, each judged by the covariance under itself.
    t is Student's quantile for 1 / R degrees of freedom, R being the mean correlation; times
    sqrt(misfit) where that is above 1, and twice as large with a `shape`, which is an estimate too.
    The interval is as wide as the data leave it: where few errors are independent, it may hold
    everything.

    References
    ----------
    Efron 2016, Biometrika 103 (1): 1-20, for the deconvolution of counts; the interval inverts
    the test of Wilks 1938, Annals of Mathematical Statistics 9 (1): 60-62.
    """
    if side == "gain":
        counts, differences = counts[:, ::-1], -differences[::-1]
    if not counts.sum() > 0:
        none = Interval(*[np.nan] * 4)
        return GrossChange(none, none, np.nan)
    problem = _Problem.build(counts, differences, errors, threshold)
    independent = 1 / (errors.mean_correlation + 1 / errors.pixels)
    quantile = float(stdtrit(max(3.0, independent), 0.5 + confidence / 2))
    # A shape that was estimated from as many errors is as uncertain as the counts themselves.
    quantile *= 1 if errors.shape is None else 2
    return problem.solve(quantile, float(ndtri(0.5 + confidence / 2)))


def own_shape(counts: npt.NDArray[np.number], differences: _Floats, sd: _Floats) -> _Floats:
    """Estimate the `shape` of errors from the quieter side of their differences.

    Real change mostly lies on one side: of losses and gains, those with the lesser share beyond
    3 sd are taken for errors alone, and mirrored.
    """
    scores, weight = differences / sd[:, None], counts.astype(np.float64)
    size = 0.1 * np.arange(161)
    sides = []
    for sign in (-1, 1):
        part = np.where(np.abs(scores) < 1e-9, weight / 2, weight * (np.sign(scores) == sign))
        found = np.histogram(np.minimum(np.abs(scores), size[-1]), size, weights=part)[0]
        sides.append(np.append(0.0, np.cumsum(found) / found.sum()) if found.any() else None)
    known = [below for below in sides if below is not None]
    return np.stack([size, max(known, key=lambda below: float(below[30]))])


def pair_shares(
    correlation: Callable[[_Floats], _Floats],
    covered: _Floats,
    sides: tuple[float, float],
    pixel: float,
) -> _Floats:
    """Return the shares of the pairs of pixels of an area that are correlated above the LEVELS.

    `correlation` takes distances [m]. `covered` is the share of each cell of a grid over the area
    that belongs to it, `sides` the height and width of a cell [m], which may be larger than a
    pixel, but about a quarter of the area's least width at most; `pixel` is the area of a pixel.
    """
    size = [2 * n for n in covered.shape]  # room for all lags without wrapping around
    overlap = fft.irfft2(np.abs(fft.rfft2(covered, size)) ** 2, size) / covered.sum()
    away = [fft.fftfreq(n, 1 / n) * side for n, side in zip(size, sides, strict=True)]
    apart, step = np.hypot(away[0][:, None], away[1]), min(sides)
    ring = np.rint(apart / step).astype(np.int64).ravel()
    mean = np.bincount(ring, overlap.ravel()) / np.maximum(np.bincount(ring), 1)
    held = np.flatnonzero(np.bincount(ring))
    # From the radius of a pixel, whose pair with itself is another term, to the farthest pair.
    edges = np.geomspace(np.sqrt(pixel / np.pi), max(apart.max(), 2 * np.sqrt(pixel)), 401)
    middle = np.sqrt(edges[1:] * edges[:-1])
    mean[0] = 1.0
    pairs = np.pi * np.diff(edges**2) * np.interp(middle, held * step, mean[held])
    pairs /= covered.sum() * sides[0] * sides[1]
    alike = correlation(middle)
    found: _Floats = (pairs * (alike > LEVELS[:, None])).sum(axis=1)
    return np.minimum(found, 1.0)


def screen_change(
    counts: npt.NDArray[np.number],
    differences: _Floats,
    errors: PixelErrors,
    *,
    threshold: float,
    confidence: float = 0.95,
    side: Literal["loss", "gain"] = "loss",
) -> tuple[bool, GrossChange]:
    """Bound gross change quickly, and tell whether :func:`gross_change` would say more.

    True where more pixels are beyond the threshold than errors alone put there, in a test of 5 %.
    The estimate is what is beyond the threshold less what errors alone put there in an unchanged
    area, the interval begins at 0, and the misfit is NaN.

    Of the pixels that truly fell by the threshold or more, symmetric errors leave half or more
    beyond it, so that twice the share found beyond it, with its error, is above the true one. The
    mean depth below it only grows by errors.
    """
    if side == "gain":
        counts, differences = counts[:, ::-1], -differences[::-1]
    shares = counts / max(float(counts.sum()), 1e-300)
    beyond = differences <= -threshold
    kernel = _Kernel(shares.sum(axis=1), errors.sd, errors.shape)
    found = float(shares[:, beyond].sum())
    chance = float(kernel.below(np.array([-threshold]))[0])
    depth = float((shares @ np.maximum(-threshold - differences, 0.0)).sum())
    shallow = float(kernel.depth(np.array([-threshold]))[0])
    z, one_sided = float(ndtri(0.5 + confidence / 2)), 1.645
    sd = _share_error(found, errors)
    worth = found > chance + one_sided * _share_error(chance, errors)
    # The mean of any function of the errors is no more correlated than they are.
    square = float((shares @ np.maximum(-threshold - differences, 0.0) ** 2).sum())
    deep = np.sqrt(square * (1 / errors.pixels + errors.mean_correlation))
    upper = min(1.0, 2 * (max(found, chance) + z * max(sd, _share_error(chance, errors))))
    area = Interval(max(found - chance, 0.0), upper / 2 / z, 0.0, upper)
    most = threshold * upper + depth + z * float(deep)
    volume = max(depth - shallow + threshold * (found - chance), 0.0)
    return worth, GrossChange(area, Interval(volume, most / 2 / z, 0.0, most), np.nan)


def _share_error(share: float, errors: PixelErrors) -> float:
    """Return the standard error of a share of the pixels beyond a limit."""
    chance = min(max(share, 0.25 / errors.pixels), 1 - 0.25 / errors.pixels)
    score = ndtri(chance)
    joint = np.exp(-(score**2) / (1 + LEVELS)) / (2 * np.pi * np.sqrt(1 - LEVELS**2))
    pairs = float((errors.alike * _WEIGHTS) @ joint)
    return float(np.sqrt(chance * (1 - chance) / errors.pixels + pairs))


#: Steps of the counts, and of true changes, in standard deviations; how far both reach from the
#: threshold; changes this near to it are told from it.
_EDGES = 0.5 * np.arange(-12, 13)
_NEAR = 0.1
_INSIDE = np.concatenate([0.4 * np.arange(-19, 0), [-_NEAR, _NEAR], 0.4 * np.arange(1, 24)])
#: Classes of error within this factor are described together, in at most so many groups.
_ALIKE, _MOST_GROUPS = 2**0.5, 8
#: Rounding and what the steps of true change cannot describe, in shares.
_ROUNDING = 1e-5
#: Lengths at which the distribution of errors that are not normal is looked up.
_LAGS = np.linspace(-16.0, 16.0, 321)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Counts of all groups, and what each true change adds to them.

    Rows are counts: the share up to each edge, and the mean depth below the threshold, for each
    group. Columns are shares w of true change: inside, 0, far below, far above, and the further
    depth of those far below.
    """

    observed: _Floats  #: (rows,)
    design: _Floats  #: (rows, columns)
    #: For each group (columns, rows, rows): covariance that a share of the area brings about.
    covariances: list[_Floats]
    #: (2, rows, columns): change of `design` with the offset and the logarithm of the sd, times
    #: their standard errors.
    slopes: _Floats
    #: (groups, columns) which shares add up to those of the groups, (groups,) their sums.
    sums: _Floats
    shares: _Floats
    area: _Floats  #: (columns,) the functionals
    volume: _Floats
    rounding: float

    @classmethod
    def build(
        cls,
        counts: npt.NDArray[np.number],
        differences: _Floats,
        errors: PixelErrors,
        threshold: float,
    ) -> _Problem:
        """Take counts and errors apart into groups of similar errors."""
        total = float(counts.sum())
        groups = [
            _describe(counts[members], differences, replace(errors, sd=errors.sd[members]),
                      threshold, total)
            for members in _group(errors.sd, counts.sum(axis=1))
        ]  # fmt: skip
        doubts = (errors.offset_doubt, errors.sd_doubt)
        columns = len(groups[0].area)
        return cls(
            np.concatenate([group.observed for group in groups]),
            _blocks([group.design for group in groups]),
            [group.covariances for group in groups],
            np.stack([
                doubt * _blocks([group.slopes[k] for group in groups])
                for k, doubt in enumerate(doubts)
            ]),
            np.kron(np.eye(len(groups)), np.arange(columns) < columns - 1).astype(np.float64),
            np.array([group.share for group in groups]),
            np.concatenate([group.area for group in groups]),
            np.concatenate([group.volume for group in groups]),
            _ROUNDING + 0.25 / errors.pixels,
        )  # fmt: skip

    def solve(self, quantile: float, normal: float) -> GrossChange:
        """Find the best fit, and the intervals of both functionals."""
        best = np.zeros(len(self.area))
        size = len(self.area) // len(self.shares)
        best[np.arange(len(self.shares)) * size + len(_INSIDE)] = self.shares
        for _ in range(3):
            fit = self.weigh(best)
            best = fit.nearest(self.sums, best)
        misfit = fit.distance(best) / len(self.observed)
        quantile = quantile * max(1.0, misfit) ** 0.5
        area, volume = (
            _Search(self, fit, best, functional, quantile).interval(top, normal)
            for functional, top in ((self.area, 1.0), (self.volume, self._deepest()))
        )
        return GrossChange(area, volume, misfit)

    def _deepest(self) -> float:
        """Return a volume that is not exceeded [m]."""
        size = len(self.area) // len(self.shares)
        depth = self.volume.reshape(-1, size)
        fallen = self.observed.reshape(len(self.shares), -1)[:, -1]
        return float((fallen * depth[:, -1]).sum() + (self.shares * depth[:, -3]).sum())

    def weigh(self, shares: _Floats) -> _Fit:
        """Return the least squares with the covariance that the errors have under some shares."""
        parts = np.split(shares, len(self.shares))
        found = _blocks([
            np.tensordot(part[kept := part > 0], group[kept], 1)
            for part, group in zip(parts, self.covariances, strict=True)
        ])  # fmt: skip
        for slope in self.slopes @ shares:
            found += np.outer(slope, slope)
        found[np.diag_indices_from(found)] += self.rounding**2
        factor = linalg.lapack.dpotrf(found, lower=1)[0]
        both = np.column_stack([self.design, self.observed])
        white = linalg.lapack.dtrtrs(factor, both, lower=1)[0]
        at_threshold = np.diag(found)[len(_EDGES) // 2 :: len(_EDGES) + 1]
        return _Fit(white[:, :-1], white[:, -1], float(np.sqrt(at_threshold.sum())))


class _Group(NamedTuple):
    """The parts of a :class:`_Problem` that one group of similar errors adds."""

    observed: _Floats
    design: _Floats
    covariances: _Floats
    slopes: _Floats
    share: float
    area: _Floats
    volume: _Floats


def _blocks(parts: list[_Floats]) -> _Floats:
    """Put matrices of one shape along the diagonal of a larger one."""
    rows, columns = parts[0].shape
    found = np.zeros((len(parts) * rows, len(parts) * columns))
    for k, part in enumerate(parts):
        found[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = part
    return found


def _group(sd: _Floats, weight: npt.NDArray[np.number]) -> list[npt.NDArray[np.int64]]:
    """Put classes of similar error together, in order; classes without pixels are left out."""
    held = np.flatnonzero(weight > 0)
    logs = np.log(sd[held])
    width = max(np.log(_ALIKE), np.ptp(logs) / _MOST_GROUPS)
    place = np.minimum(((logs - logs.min()) / (width * (1 + 1e-9))).astype(int), _MOST_GROUPS - 1)
    return [held[place == k] for k in np.unique(place)]


def _describe(
    counts: npt.NDArray[np.number],
    differences: _Floats,
    errors: PixelErrors,
    threshold: float,
    total: float,
) -> _Group:
    """Describe the counts of one group; lengths are in its standard deviation."""
    step = differences[1] - differences[0]
    classes = counts.sum(axis=1) / counts.sum()
    # Bins and errors narrower than they are made so much wider.
    coarse = step if errors.sd.min() < step else 0.0
    each = np.sqrt(errors.sd**2 + coarse**2 + step**2 / 12)
    sd = float(np.sqrt((classes * each**2).sum()))
    kernel = _Kernel(classes, each / sd, errors.shape)
    share = float(counts.sum()) / total
    observed = share * _observe(counts.sum(axis=0), (differences + threshold) / sd, coarse / sd)
    change = np.concatenate([_INSIDE, [threshold / sd]])
    apart = np.concatenate([_EDGES, [0.0]])[:, None] - change
    # Far below, far above, and the further depth of those far below.
    inside, edges = len(change), len(_EDGES)
    design = np.zeros((edges + 1, inside + 3))
    design[:-1, :inside], design[-1, :inside] = kernel.below(apart[:-1]), kernel.depth(apart[-1])
    design[:-1, inside], design[-1, inside], design[-1, -1] = 1.0, -_INSIDE[0], 1.0
    slopes = np.zeros((2, edges + 1, inside + 3))
    slopes[0, :-1, :inside] = kernel.density(apart[:-1]) / sd
    slopes[0, -1, :inside] = design_depth = kernel.below(apart[-1]) / sd
    slopes[0, -1, inside] = 1 / sd
    slopes[1, :-1, :inside] = apart[:-1] * kernel.density(apart[:-1])
    slopes[1, -1, :inside] = design[-1, :inside] - apart[-1] * design_depth * sd
    covariances = np.zeros((inside + 3, edges + 1, edges + 1))
    single, pairs = _covariances(kernel.quantiles)
    covariances[: inside - 1] = single / errors.pixels + np.tensordot(errors.alike, pairs, 1)
    covariances[inside - 1] = _between(covariances[: inside - 1], threshold / sd)
    covariances[inside, -1, -1] = 1 / errors.pixels + errors.mean_correlation
    fallen = np.concatenate([change < 0, [True, False, False]])
    below = np.concatenate([-change, [-_INSIDE[0], 0.0, 0.0]])
    area = fallen.astype(np.float64)
    volume = area * (threshold + sd * below)
    volume[-1] = sd
    return _Group(observed, design, covariances, slopes, share, area, volume)


def _observe(counts: npt.NDArray[np.number], places: _Floats, blur: float) -> _Floats:
    """Return the shares of the differences up to each edge, and their mean depth below 0."""
    held = np.flatnonzero(counts)
    shares, at, step = counts[held] / counts.sum(), places[held], places[1] - places[0]
    apart = _EDGES[:, None] - at
    part = ndtr(apart / blur) if blur else np.clip(apart / step + 0.5, 0.0, 1.0)
    return np.append(part @ shares, shares @ np.maximum(-at, 0.0))


class _Kernel:
    """Distribution of the errors of a group, which may mix several standard deviations."""

    def __init__(self, shares: _Floats, sds: _Floats, shape: _Floats | None) -> None:
        self._parts = list(zip(shares, sds, strict=True))
        self._table, self._left = shape, np.empty(0)
        if shape is not None:  # what is left of the depth beyond each quantile
            beyond = (1 - shape[1]) / 2
            steps = np.diff(shape[0]) * (beyond[1:] + beyond[:-1]) / 2
            self._left = np.append(np.cumsum(steps[::-1])[::-1], 0.0)

    def _mix(self, function: Callable[[_Floats], _Floats], apart: _Floats, power: int) -> _Floats:
        found = np.zeros_like(apart)
        for share, sd in self._parts:
            found += share * sd**power * function(apart / sd)
        return found

    def below(self, apart: _Floats) -> _Floats:
        """Return the share of the errors below some value."""
        if self._table is None:
            return self._mix(ndtr, apart, 0)
        size, inside = self._table
        return self._mix(
            lambda z: 0.5 + 0.5 * np.sign(z) * np.interp(np.abs(z), size, inside), apart, 0
        )

    def density(self, apart: _Floats) -> _Floats:
        """Return their density."""
        if self._table is None:
            return self._mix(_normal, apart, -1)
        return (self.below(apart + 0.05) - self.below(apart - 0.05)) / 0.1

    def depth(self, apart: _Floats) -> _Floats:
        """Return their mean depth below some value."""
        if self._table is None:
            return self._mix(_normal_depth, apart, 1)
        size, left = self._table[0], self._left
        return self._mix(lambda z: np.maximum(z, 0.0) + np.interp(np.abs(z), size, left), apart, 1)

    @property
    def quantiles(self) -> bytes | None:
        """Normal quantiles of errors that are not normal, at the LAGS."""
        if self._table is None:
            return None
        found: _Floats = ndtri(np.clip(self.below(_LAGS), 1e-15, 1 - 1e-15))
        return found.tobytes()


def _normal(score: _Floats) -> _Floats:
    found: _Floats = np.exp(-(score**2) / 2) / np.sqrt(2 * np.pi)
    return found


def _normal_depth(score: _Floats) -> _Floats:
    """Return the mean depth of normal errors below a value."""
    found: _Floats = score * ndtr(score) + _normal(score)
    return found


@lru_cache(4)
def _covariances(quantiles: bytes | None = None) -> tuple[_Floats, _Floats]:
    """Return the covariance of the counts for each true change inside.

    That of single pixels (changes, rows, rows), and what pairs of pixels add for each of the LEVELS
    of correlation (levels, changes, rows, rows); the last row is the depth. `quantiles` are the
    normal ones of errors in the steps of `_LAGS`, if they are not normal.
    """
    apart = np.concatenate([_EDGES, [0.0]]) - _INSIDE[:, None]
    if quantiles is not None:
        apart = np.interp(apart, _LAGS, np.frombuffer(quantiles))
    edge, deep = apart[:, :-1], apart[:, -1:]
    below, level, depth = ndtr(edge), ndtr(deep), _normal_depth(deep)
    count, rows = apart.shape
    single = np.empty((count, rows, rows))
    # Edges ascend, so that the lesser of two shares is that of the first.
    order = np.minimum.outer(np.arange(rows - 1), np.arange(rows - 1))
    single[:, :-1, :-1] = below[:, order] - below[:, :, None] * below[:, None, :]
    least = np.minimum(edge, deep)
    joint = deep * ndtr(least) + _normal(least) - depth * below
    single[:, -1, :-1] = single[:, :-1, -1] = joint
    single[:, -1, -1] = ((deep**2 + 1) * level + deep * _normal(deep) - depth**2)[:, 0]
    pairs = np.empty((len(LEVELS), count, rows, rows))
    both = np.square(level[:, 0])
    for k, (rho, weight) in enumerate(zip(LEVELS, _WEIGHTS, strict=True)):
        rest = np.sqrt(1 - rho**2)
        first, second = edge[:, :, None], edge[:, None, :]
        square = (first**2 + second**2 - 2 * rho * first * second) / rest**2
        # The density of two normal errors, and its integral over one or both of them.
        pairs[k, :, :-1, :-1] = np.exp(-square / 2) * weight / (2 * np.pi * rest)
        joint = weight * _normal(edge) * ndtr((deep - rho * edge) / rest)
        pairs[k, :, -1, :-1] = pairs[k, :, :-1, -1] = joint
        added = np.exp(-(deep[:, 0] ** 2) / (1 + rho)) * weight / (2 * np.pi * rest)
        pairs[k, :, -1, -1] = weight * (both + added / 2)
        both = both + added
    return single, pairs


def _between(covariances: _Floats, change: float) -> _Floats:
    """Interpolate covariances at a change that is not one of those inside."""
    if change >= _INSIDE[-1]:
        return np.zeros(covariances.shape[1:])
    k = int(np.searchsorted(_INSIDE, change))
    part = (change - _INSIDE[k - 1]) / (_INSIDE[k] - _INSIDE[k - 1])
    found: _Floats = (1 - part) * covariances[k - 1] + part * covariances[k]
    return found


class _Fit:
    """Least squares with weights: which shares describe the counts best."""

    def __init__(self, design: _Floats, observed: _Floats, error: float) -> None:
        self.gram, self.target = design.T @ design, observed @ design
        self.size = float(observed @ observed)
        self.error = error  #: of the count at the threshold

    def distance(self, shares: _Floats) -> float:
        """Return the square sum of standardised residuals."""
        return float(shares @ (self.gram @ shares - 2 * self.target) + self.size)

    def nearest(
        self, sums: _Floats, start: _Floats, closed: npt.NDArray[np.bool_] | bool = False
    ) -> _Floats:
        """Return the best shares >= 0 that have the sums of `start`, from which the search begins.

        An active-set method: the shares above 0 are solved for at once, those that fall below 0
        leave, and the one that would lessen the distance fastest enters. `closed` ones stay 0.
        """
        scale = 1 / np.sqrt(np.diag(self.gram) + 1e-8 * np.trace(self.gram))
        gram, target = self.gram * scale * scale[:, None], self.target * scale
        rows = sums * scale
        rows = rows / np.abs(rows).max(axis=1, keepdims=True)
        shares, count = start / scale, len(start)
        # Lagrange's conditions of all shares and sums; the least numbers keep it regular.
        system = np.zeros((count + len(rows), count + len(rows)))
        system[:count, :count], system[count:, :count], system[:count, count:] = gram, rows, rows.T
        system[np.diag_indices(len(system))] += np.where(
            np.arange(len(system)) < count, 1e-13, -1e-13
        )
        goals = np.concatenate([target, rows @ shares])
        active = np.concatenate([shares > 0, np.ones(len(rows), bool)])
        barred = np.zeros(count, bool)
        least_slope = -1e-6 - 1e-13 * float(np.abs(target).max())
        for _ in range(6 * count):
            held = np.flatnonzero(active)
            found = linalg.lapack.dgesv(system[held[:, None], held], goals[held])[2]
            inner = held[: len(held) - len(rows)]
            goal = found[: len(inner)]
            if goal.min() > 0:
                shares = np.zeros(count)
                shares[inner] = goal
                slope = found @ system[held, :count] - target
                slope[active[:count] | barred | closed] = np.inf
                enter = int(slope.argmin())
                if slope[enter] > least_slope:
                    break
                barred[:] = False
                active[enter] = True
                continue
            now = shares[inner]
            falls = goal <= 0
            with np.errstate(invalid="ignore", divide="ignore"):
                steps = np.where(falls, now / (now - goal), np.inf)
            steps[falls & (now <= 0)] = 0.0
            least = float(steps.min())
            leave = inner[steps <= least]
            # One that falls as soon as it enters would do so for ever: wait for progress.
            barred[:] = barred & (least == 0)
            barred[leave] |= least == 0
            shares[inner] = np.where(steps <= least, 0.0, now + least * (goal - now))
            active[leave] = False
        result: _Floats = np.maximum(shares, 0.0) * scale
        return result


@dataclass(frozen=True, eq=False)
class _Search:
    """The values of a functional of the shares that the counts do not contradict."""

    problem: _Problem
    fit: _Fit
    best: _Floats
    functional: _Floats
    quantile: float

    def interval(self, top: float, normal: float) -> Interval:
        """Return the estimate and the interval, between 0 and `top`."""
        estimate = min(float(self.functional @ self.best), top)
        reach = max(top - estimate, 0.0)
        lower, upper = 0.0, top
        if estimate > 1e-9 * top and self._excess(0.0) > self.quantile:
            lower = self._edge(estimate, -estimate)
        if reach > 1e-9 * top and self._excess(top) > self.quantile:
            upper = self._edge(estimate, reach)
        return Interval(estimate, (upper - lower) / 2 / normal, lower, upper)

    def _edge(self, estimate: float, span: float) -> float:
        """Find the value between the estimate and a rejected one at which rejection begins."""
        inside, outside = 0.0, 1.0
        at, known = self._guess(span), (0.0, 0.0)
        for _ in range(12):
            score = self._excess(estimate + at * span)
            if score <= self.quantile:
                inside = at
            else:
                outside = at
            if abs(score - self.quantile) < 0.03 * self.quantile or outside - inside < 1e-6:
                break
            # The excess grows about in proportion to the distance.
            slope = (score - known[1]) / (at - known[0])
            known = (at, score)
            step = at + (self.quantile - score) / slope if slope > 0 else np.inf
            low, high = inside + 0.05 * (outside - inside), outside - 0.05 * (outside - inside)
            at = float(np.clip(min(step, 6 * at), low, high))
        return estimate + at * span

    def _guess(self, span: float) -> float:
        """Return where to look first: as far as the count at the threshold may be wrong."""
        at_threshold = self.functional[np.flatnonzero(_INSIDE < 0)[-1]]
        error = 2 * self.quantile * self.fit.error * at_threshold
        return float(np.clip(error / abs(span), 1e-6, 0.5))

    def _excess(self, value: float) -> float:
        """Return how many standard errors the best fit with some value is from the best of all.

        The errors are those of the hypothesis that is tested.
        """
        sums, whole = self.problem.sums, self.functional @ self.best
        rows, start = np.vstack([sums, self.functional]), self._moved(value)
        closed = np.zeros(len(start), bool)
        if value == 0:
            rows, closed = sums, self.functional > 0
        tested = self.fit.nearest(rows, start, closed)
        fit = self.problem.weigh(tested)
        worse = fit.distance(fit.nearest(rows, tested, closed))
        best = fit.distance(fit.nearest(sums, self.best if whole else tested))
        return float(np.sqrt(max(worse - best, 0.0)))

    def _moved(self, value: float) -> _Floats:
        """Return the best shares, moved across the threshold until they have some value."""
        size = len(self.best) // len(self.problem.shares)
        shares = self.best.reshape(-1, size).copy()
        fallen = self.functional.reshape(-1, size) > 0
        now, above = float(self.functional @ self.best), int((_INSIDE < 0).sum())
        if value > now and fallen[0, -1]:  # a volume: deeper
            shares[0, -1] += (value - now) / self.functional[size - 1]
            return shares.ravel()
        column, moving = (above, fallen) if value <= now else (above - 1, ~fallen)
        moving = moving & (np.arange(size) < size - 1)
        part = 1 - value / now if value <= now else (value - now) / (1 - now)
        moved = (part * shares * moving).sum(axis=1)
        shares[moving] *= 1 - part
        shares[:, -1] *= 1 - part if value <= now else 1.0
        shares[:, column] += moved
        return shares.ravel()
