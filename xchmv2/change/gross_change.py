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
from scipy import fft, integrate, interpolate, linalg, optimize
from scipy.special import ndtr, ndtri, stdtrit

_Floats = npt.NDArray[np.float64]
_Function = Callable[[_Floats], _Floats]

#: Differences are counted in bins of this width up to this distance from 0 [m]; larger ones count
#: in the last bin.
_STEP, _REACH = 0.1, 100.0
#: Middles of the bins [m].
DIFFERENCES = np.arange(-round(_REACH / _STEP), round(_REACH / _STEP) + 1) * np.float64(_STEP)
#: Classes of the error of a pixel: so many for each doubling of the sd, from 0.25 m to 32 m.
_PER_OCTAVE, _LEAST_SD = 4, 0.25
CLASSES = _PER_OCTAVE * 7
#: Levels of correlation between 0 and 1 at which pairs of pixels are counted, and their weights
#: in an integral (Gauss-Legendre in the arc sine).
_NODES, _ARC = np.polynomial.legendre.leggauss(20)
_LEVELS = np.sin(np.pi / 4 * (_NODES + 1))
_WEIGHTS = np.pi / 4 * _ARC * np.sqrt(1 - _LEVELS**2)
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
    place = np.rint(np.clip(change[known], -_REACH, _REACH).astype(np.float64) / _STEP) + middle
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


class _Interval(NamedTuple):
    """An estimate with its interval; the standard error is its half width over z."""

    estimate: float
    standard_error: float
    lower: float
    upper: float


@dataclass(frozen=True)
class _GrossChange:
    """What :func:`gross_change` finds."""

    #: Share of the area that fell, or rose, by the threshold or more.
    area: _Interval
    #: Volume that these pixels lost or gained, over the whole area [m].
    volume: _Interval
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
    #: each of the _LEVELS: see :func:`pair_shares`. 0 for independent errors.
    alike: _Floats = field(default_factory=lambda: np.zeros(len(_LEVELS)))
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
) -> _GrossChange:
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
    _GrossChange
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
        none = _Interval(*[np.nan] * 4)
        return _GrossChange(none, none, np.nan)
    problem = _Problem(counts, differences, errors, threshold)
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
        sides.append(np.append(0.0, np.cumsum(found)) / max(found.sum(), 1e-300))
    return np.stack([size, max(sides, key=lambda below: (below[30], below[-1]))])


def pair_shares(
    correlation: _Function,
    covered: _Floats,
    sides: tuple[float, float],
    pixel: float,
) -> _Floats:
    """Return the shares of the pairs of pixels of an area that are correlated above the _LEVELS.

    `correlation` takes distances [m]. `covered` is the share of each cell of a grid over the area
    that belongs to it, `sides` the height and width of a cell [m], which may be larger than a
    pixel, but about a quarter of the area's least width at most; `pixel` is the area of a pixel.
    """
    size = [2 * n for n in covered.shape]  # room for all lags without wrapping around
    overlap = fft.irfft2(np.abs(fft.rfft2(covered, size)) ** 2, size) / covered.sum()
    away = [fft.fftfreq(n, 1 / n) * side for n, side in zip(size, sides, strict=True)]
    apart, step = np.hypot(away[0][:, None], away[1]), min(sides)
    rings, ring = np.unique(np.rint(apart / step).ravel(), return_inverse=True)
    mean = np.bincount(ring, overlap.ravel()) / np.bincount(ring)
    mean[0] = 1.0
    # From the radius of a pixel, whose pair with itself is another term, to the farthest pair.
    edges = np.geomspace(np.sqrt(pixel / np.pi), max(apart.max(), 2 * np.sqrt(pixel)), 401)
    middle = np.sqrt(edges[1:] * edges[:-1])
    pairs = np.pi * np.diff(edges**2) * np.interp(middle, rings * step, mean)
    pairs /= covered.sum() * sides[0] * sides[1]
    alike = correlation(middle)
    found: _Floats = (pairs * (alike > _LEVELS[:, None])).sum(axis=1)
    return np.minimum(found, 1.0)


#: Steps of the counts, and of true changes, in standard deviations; how far both reach from the
#: threshold; changes this near to it are told from it.
_EDGES = 0.5 * np.arange(-12, 13)
_NEAR = 0.1
_INSIDE = np.concatenate([0.4 * np.arange(-19, 0), [-_NEAR, _NEAR], 0.4 * np.arange(1, 24)])
#: Classes of error within this factor are described together, in at most so many groups.
_ALIKE, _MOST_GROUPS = 2**0.5, 4
#: Rounding and what the steps of true change cannot describe, in shares.
_ROUNDING = 1e-5
#: Sums hold as rows of the least squares that weigh so much more than the others.
_HEAVY = 1e5
#: Changes so far off that errors do not matter, in standard deviations.
_FAR = 50.0


class _Problem:
    """Counts of all groups, and what each true change adds to them.

    Rows are counts: the share up to each edge, and the mean depth below the threshold, for each
    group. Columns are shares w of true change: inside, 0, far below, far above, and the further
    depth of those far below.
    """

    def __init__(
        self,
        counts: npt.NDArray[np.number],
        differences: _Floats,
        errors: PixelErrors,
        threshold: float,
    ) -> None:
        shares = counts / counts.sum()
        self.groups = [
            _describe(
                shares[members], differences, replace(errors, sd=errors.sd[members]), threshold
            )
            for members in _group(errors.sd, shares.sum(axis=1))
        ]
        designs = linalg.block_diag(*[group.design for group in self.groups])
        observed = np.concatenate([group.observed for group in self.groups])
        self.both = np.column_stack([designs, observed])
        # The shares of each group, but for the last, add up to its share of the area.
        size = designs.shape[1] // len(self.groups)
        sums = np.kron(np.eye(len(self.groups)), np.arange(size) < size - 1)
        self.sums = np.column_stack([sums, [group.share for group in self.groups]])
        self.rounding = _ROUNDING + 0.25 / errors.pixels

    def solve(self, quantile: float, normal: float) -> _GrossChange:
        """Find the best fit, and the intervals of the area and the volume."""
        best = np.concatenate([
            group.share * (np.arange(len(group.covariances)) == len(_INSIDE))
            for group in self.groups
        ])  # fmt: skip
        for _ in range(3):
            best, distance = self._fit(self._weigh(best))
        misfit = distance / len(self.both)
        quantile *= max(1.0, misfit) ** 0.5
        area, volume = np.concatenate([group.functionals for group in self.groups], axis=1)
        deepest = sum(group.deepest for group in self.groups)
        return _GrossChange(
            self._interval(best, area, 1.0, quantile, normal),
            self._interval(best, volume, deepest, quantile, normal),
            misfit,
        )

    def _weigh(self, shares: _Floats) -> _Floats:
        """Return design and counts in standard errors, as they are under some shares."""
        parts = list(zip(np.split(shares, len(self.groups)), self.groups, strict=True))
        found = linalg.block_diag(*[np.tensordot(w, group.covariances, 1) for w, group in parts])
        joint = np.concatenate([group.slopes @ w for w, group in parts], axis=1)
        found += joint.T @ joint + self.rounding**2 * np.eye(len(found))
        factor = linalg.cholesky(found, lower=True)
        white: _Floats = linalg.solve_triangular(factor, self.both, lower=True)
        return white

    def _fit(self, white: _Floats, *fixed: _Floats) -> tuple[_Floats, float]:
        """Return the shares that fit best, and the square sum of their residuals.

        `fixed` are functionals, each with the value at its end, which hold as the sums do.
        """
        rows = np.vstack([self.sums, *fixed])
        system = np.vstack([_HEAVY * np.abs(white).max() * rows, white])
        shares, distance = optimize.nnls(
            system[:, :-1], system[:, -1], maxiter=20 * system.shape[1]
        )
        return shares, distance**2

    def _interval(
        self, best: _Floats, functional: _Floats, top: float, quantile: float, normal: float
    ) -> _Interval:
        """Return the estimate of a functional, and the values that the counts do not contradict."""
        estimate = min(float(functional @ best), top)
        start = self._weigh(best)

        def excess(value: float) -> float:
            """Return how much farther than it may be the best fit with some value is."""
            fixed = np.append(functional, value)
            own = self._weigh(self._fit(start, fixed)[0])
            worse = self._fit(own, fixed)[1] - self._fit(own)[1]
            return float(np.sqrt(max(worse, 0.0))) - quantile

        def edge(limit: float) -> float:
            """Find where values are too far, on the way from the estimate to a limit."""
            span, ends = limit - estimate, {0.0: -quantile, 1.0: excess(limit)}
            if ends[1.0] <= 0:
                return limit
            return estimate + span * float(
                optimize.brentq(
                    lambda part: ends.get(part) or excess(estimate + part * span),
                    0.0, 1.0, xtol=1e-6, rtol=0.02,
                )
            )  # fmt: skip

        lower, upper = edge(0.0), edge(top)
        return _Interval(estimate, (upper - lower) / 2 / normal, lower, upper)


class _Group(NamedTuple):
    """The part of a :class:`_Problem` that one group of similar errors adds."""

    observed: _Floats  #: (rows,)
    design: _Floats  #: (rows, columns)
    #: (columns, rows, rows): covariance that a share of the area brings about.
    covariances: _Floats
    #: (2, rows, columns): change of `design` by the standard errors of the offset and of the sd.
    slopes: _Floats
    share: float  #: of the area
    functionals: _Floats  #: (2, columns): area and volume [m]
    deepest: float  #: volume that is not exceeded [m]


def _group(sd: _Floats, weight: npt.NDArray[np.number]) -> list[npt.NDArray[np.int64]]:
    """Put classes of similar error together, in order; classes without pixels are left out."""
    held = np.flatnonzero(weight > 0)
    logs = np.log(sd[held])
    width = max(np.log(_ALIKE), np.ptp(logs) / _MOST_GROUPS)
    place = np.minimum(((logs - logs.min()) / (width * (1 + 1e-9))).astype(int), _MOST_GROUPS - 1)
    return [held[place == k] for k in np.unique(place)]


def _describe(
    counts: _Floats, differences: _Floats, errors: PixelErrors, threshold: float
) -> _Group:
    """Describe the counts of one group; lengths are in its standard deviation."""
    share, step = float(counts.sum()), differences[1] - differences[0]
    classes = counts.sum(axis=1) / share
    # Bins and errors narrower than they are made so much wider.
    coarse = step if errors.sd.min() < step else 0.0
    each = np.sqrt(errors.sd**2 + coarse**2 + step**2 / 12)
    sd = float(np.sqrt(classes @ each**2))
    kernel = _Kernel(classes, each / sd, errors.shape)
    observed = share * _observe(counts.sum(axis=0), (differences + threshold) / sd, coarse / sd)
    change = np.concatenate([_INSIDE, [threshold / sd, -_FAR, _FAR]])
    apart = np.append(_EDGES, 0.0)[:, None] - change
    below, density, depth = kernel.below(apart), kernel.density(apart), kernel.depth(apart)
    matrices = np.zeros((3, len(apart), len(change) + 1))
    matrices[0, :, :-1] = np.vstack([below[:-1], np.minimum(depth[-1], -_INSIDE[0])])
    matrices[1, :, :-1] = np.vstack([density[:-1], below[-1]]) * errors.offset_doubt / sd
    matrices[2, :, :-1] = (
        np.vstack([(apart * density)[:-1], (depth - apart * below)[-1]]) * errors.sd_doubt
    )
    functionals = np.zeros((2, len(change) + 1))
    functionals[0, :-1] = change < 0
    fallen = threshold + sd * np.minimum(-change, -_INSIDE[0])
    functionals[1, :-1] = np.where(change < 0, fallen, 0.0)
    # The last column: the further depth of those far below.
    matrices[0, -1, -1], functionals[1, -1] = 1.0, sd
    scores = apart.T[: len(_INSIDE)]
    if errors.shape is not None or len(errors.sd) > 1:  # a mixture has heavier tails
        scores = ndtri(np.clip(kernel.below(scores), 1e-15, 1 - 1e-15))
    single, pairs = _covariances(scores.tobytes())
    inside = single / errors.pixels + np.tensordot(errors.alike, pairs, 1)
    covariances = np.zeros((len(change) + 1, *inside.shape[1:]))
    covariances[: len(_INSIDE)] = inside
    covariances[len(_INSIDE)] = interpolate.interp1d(
        _INSIDE, inside, axis=0, bounds_error=False, fill_value=0.0
    )(threshold / sd)
    covariances[len(_INSIDE) + 1, -1, -1] = 1 / errors.pixels + errors.mean_correlation
    deepest = sd * observed[-1] + share * fallen.max()
    return _Group(observed, matrices[0], covariances, matrices[1:], share, functionals, deepest)


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
        self.shares, self.sds = shares, sds
        self.standard: tuple[_Function, _Function] = ndtr, _normal_depth
        if shape is not None:
            self.standard = _tabulated(*shape)

    def below(self, apart: _Floats) -> _Floats:
        """Return the share of the errors below some value."""
        scores = np.multiply.outer(1 / self.sds, apart)
        return np.tensordot(self.shares, self.standard[0](scores), 1)

    def density(self, apart: _Floats) -> _Floats:
        """Return their density."""
        return (self.below(apart + 0.05) - self.below(apart - 0.05)) / 0.1

    def depth(self, apart: _Floats) -> _Floats:
        """Return their mean depth below some value."""
        scores = np.multiply.outer(1 / self.sds, apart)
        return np.tensordot(self.shares * self.sds, self.standard[1](scores), 1)


def _tabulated(size: _Floats, inside: _Floats) -> tuple[_Function, _Function]:
    """Return the share of standardised errors below a value, and their mean depth below it."""
    left = integrate.cumulative_trapezoid((1 - inside[::-1]) / 2, -size[::-1], initial=0)[::-1]
    return (
        lambda z: 0.5 + 0.5 * np.sign(z) * np.interp(np.abs(z), size, inside),
        lambda z: np.maximum(z, 0.0) + np.interp(np.abs(z), size, left),
    )


def _normal(score: _Floats) -> _Floats:
    found: _Floats = np.exp(-(score**2) / 2) / np.sqrt(2 * np.pi)
    return found


def _normal_depth(score: _Floats) -> _Floats:
    """Return the mean depth of normal errors below a value."""
    found: _Floats = score * ndtr(score) + _normal(score)
    return found


@lru_cache(8)
def _covariances(scores: bytes) -> tuple[_Floats, _Floats]:
    """Return the covariance of the counts for each true change inside.

    That of single pixels (changes, rows, rows), and what pairs of pixels add for each of `_LEVELS`
    (levels, changes, rows, rows); the last row is the depth. `scores` are the
    distances of rows from changes, as normal quantiles.
    """
    apart = np.frombuffer(scores).reshape(len(_INSIDE), -1)
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
    pairs = np.empty((len(_LEVELS), count, rows, rows))
    both = np.square(level[:, 0])
    for k, (rho, weight) in enumerate(zip(_LEVELS, _WEIGHTS, strict=True)):
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
