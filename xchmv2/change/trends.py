"""Robust trends of height over time: :func:`trend`."""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import erfc

from xchmv2.change.dates import find_dates
from xchmv2.change.pixel_series import map_series, pick
from xchmv2.raster import Raster, label_quantity, read_heights, require_heights, validate_number

_Floats = npt.NDArray[np.float64]

_YEAR = np.timedelta64(31_557_600, "s")  # 365.25 days


def trend(height: Raster, min_obs: int = 3, *, confidence: float = 0.95) -> xr.Dataset:
    """Fit a robust trend to the heights of each pixel on irregular dates.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m] on two dates or more, NaN where missing, or a Dataset with
        ``canopy_height``.
    min_obs : int, default 3
        Least number of valid dates of a pixel, at least 2; with fewer all but ``n_obs`` is NaN.
    confidence : float, default 0.95
        Confidence of the interval of the slope.

    Returns
    -------
    Dataset
        (y, x) ``slope`` [m per year], the Theil-Sen median of the slopes between all pairs of
        dates; ``slope_low`` and ``slope_high``, its confidence interval; ``intercept`` [m], the
        height of the fit on the first date of the cube (its attribute ``time``): the median height
        less slope times the median time; ``tau``, Kendall's S / (n (n - 1) / 2), and the two-sided
        ``p_value`` of the Mann-Kendall test for a monotonic trend; ``n_obs``, valid dates. A year
        is 365.25 days. dask-backed if the heights are, with all dates in one chunk.

    Raises
    ------
    CHMv2Error
        If there is one date only, fewer dates than `min_obs`, dates that are not in strictly
        increasing order, or heights in memory that are NaN everywhere.

    Notes
    -----
    Slope and intercept are those of ``scipy.stats.theilslopes``. Let S be the number of pairs of
    dates that rise less that of pairs that fall, of N pairs. The interval runs from the slope of
    rank (N - c) / 2 to that of rank (N + c) / 2 + 1 [1]_, c being the least number with
    P(abs(S) <= c) >= confidence without a trend, and p = P(abs(S) >= the S found). Both take the
    exact distribution of S for that many values [2]_, so that the interval holds the true slope as
    often as its confidence says, or more often: in 95.2 to 98.3 % of runs at 0.95, with 5 to 15
    dates. Fewer dates cannot tell: the bounds are infinite below the number of dates in their
    attribute ``least_obs``, 5 at 0.95, and no p-value is below 0.33 on three dates or 0.083 on
    four. With equal heights, as of whole metres, p is that of the normal approximation with
    correction for ties and continuity, and the interval is wider than it need be. Pixels are tested
    one by one: neighbours are not independent, and one in twenty is below 0.05 by chance.

    References
    ----------
    .. [1] Sen 1968, J. Am. Stat. Assoc. 63, 1379.
    .. [2] Kendall 1975, Rank Correlation Methods, 4th ed., chapter 5.

    Examples
    --------
    >>> trend = height.chmv2.trend(min_obs=4)
    >>> growing = trend["slope_low"] > 0
    """
    array = read_heights(height)
    validate_number("min_obs", min_obs, 3, least=2, whole=True)
    validate_number("confidence", confidence, 0.95, above=0, below=1)
    dim = find_dates(array, least=max(2, min_obs))
    require_heights(array)
    times = array[dim].values
    fit = partial(_fit, years=(times - times[0]) / _YEAR, min_obs=min_obs, confidence=confidence)
    dtypes = [*[array.dtype] * 6, np.dtype(np.int32)]
    # Ties compare all dates with all.
    layers = map_series(fit, array, dim, dtypes, per_pixel=len(times) ** 2)
    named = _attrs(confidence, str(np.datetime_as_string(times[0], "s"))).items()
    found = zip(layers, named, strict=True)
    return xr.Dataset({name: label_quantity(layer, name, attrs) for layer, (name, attrs) in found})


def _attrs(confidence: float, start: str) -> dict[str, dict[str, Any]]:
    slope, unit = "trend of canopy height", {"units": "m year-1"}
    least = next(n for n in count(2) if 2 / math.factorial(n) <= _doubt(confidence))
    bound = unit | {"confidence": confidence, "least_obs": least}
    return {
        "slope": {"long_name": slope, **unit},
        "slope_low": {"long_name": f"lower bound of the {slope}", **bound},
        "slope_high": {"long_name": f"upper bound of the {slope}", **bound},
        "intercept": {"long_name": f"fitted height on {start}", "units": "m", "time": start},
        "tau": {"long_name": "Kendall's tau of height and time", "units": "1"},
        "p_value": {"long_name": "probability of such a tau without a trend", "units": "1"},
        "n_obs": {"long_name": "valid dates", "units": "1"},
    }


def _doubt(confidence: float) -> float:
    """Return 1 less the confidence, with room for rounding."""
    return (1 - confidence) * (1 + 1e-9)


def _fit(heights: _Floats, years: _Floats, min_obs: int, confidence: float) -> _Floats:
    """Fit columns of heights (time, n): the variables (7, n)."""
    heights = np.where(np.isfinite(heights), heights, np.nan)
    valid = np.isfinite(heights)
    n = valid.sum(axis=0)
    early, late = np.triu_indices(len(years), 1)
    rises = heights[late] - heights[early]  # [pairs, n]
    slopes = np.sort(rises / (years[late] - years[early])[:, None], axis=0)  # NaN last
    pairs = n * (n - 1) // 2
    slope = _middle(slopes, pairs)
    low, high = _interval(slopes, n, pairs, confidence)
    times = np.sort(np.where(valid, years[:, None], np.nan), axis=0)
    intercept = _middle(np.sort(heights, axis=0), n) - slope * _middle(times, n)
    s = np.nansum(np.sign(rises), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = s / pairs
    chance = _chance(s, n, _ties(heights, valid))
    fitted = np.stack([slope, low, high, intercept, tau, chance])
    return np.concatenate([np.where(n >= min_obs, fitted, np.nan), n[None]])


@cache
def _beyond(n: int) -> _Floats:
    """Return P(abs(S) >= s) for s = 0, 1, ... n (n - 1) / 2 + 1, of n values without a trend.

    The k-th value has k - 1 before it, of which any number is larger with equal probability.
    """
    inversions = np.ones(1)
    for k in range(2, n + 1):
        inversions = np.convolve(inversions, np.full(k, 1 / k))
    pairs = len(inversions) - 1
    found = np.zeros(pairs + 2)
    np.add.at(found, abs(pairs - 2 * np.arange(pairs + 1)), inversions)
    return np.minimum(np.cumsum(found[::-1])[::-1], 1.0)


def _chance(s: _Floats, n: npt.NDArray[np.intp], ties: _Floats) -> _Floats:
    """Return the two-sided p-value of the Mann-Kendall test."""
    chance = np.ones(len(s))
    for dates in np.unique(n):
        chosen = n == dates
        chance[chosen] = _beyond(int(dates))[abs(s[chosen]).astype(np.intp)]
    with np.errstate(invalid="ignore", divide="ignore"):
        score = (abs(s) - 1) / np.sqrt((n * (n - 1.0) * (2 * n + 5) - ties) / 18)
    return np.where((ties > 0) & (s != 0), erfc(score / np.sqrt(2)), chance)


def _ties(heights: _Floats, valid: npt.NDArray[np.bool_]) -> _Floats:
    """Return the sum of k (k - 1) (2 k + 5) over the groups of k equal heights."""
    alike = (heights[:, None] == heights[None]).sum(axis=1)  # [time, n]; NaN equals nothing
    return np.asarray(np.where(valid, (alike - 1.0) * (2 * alike + 5), 0.0).sum(axis=0))


def _middle(ascending: _Floats, count: npt.NDArray[Any]) -> _Floats:
    """Return the median of the first `count` of each column; NaN for none."""
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    found = (pick(ascending, low) + pick(ascending, high)) / 2
    return np.where(count > 0, found, np.nan)


def _interval(
    slopes: _Floats, n: npt.NDArray[np.intp], pairs: npt.NDArray[Any], confidence: float
) -> tuple[_Floats, _Floats]:
    """Return the slopes whose ranks bound the median; infinite where none do."""
    reach = np.zeros(len(n), np.intp)
    for dates in np.unique(n):
        reach[n == dates] = (_beyond(int(dates))[1:] <= _doubt(confidence)).argmax()
    low = (pairs - reach) // 2 - 1
    enough = low >= 0
    ends = [pick(slopes, rank) for rank in (low, pairs - 1 - low)]
    return np.where(enough, ends[0], -np.inf), np.where(enough, ends[1], np.inf)
