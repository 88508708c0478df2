"""Robust trends of height over time: :func:`trend`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import erfc, ndtri

from xchmv2.change.dates import find_dates
from xchmv2.change.pixel_series import map_series, pick
from xchmv2.raster import (
    Raster,
    label_quantity,
    read_heights,
    require_heights,
    validate_number,
)

_Floats = npt.NDArray[np.float64]

_YEAR = np.timedelta64(31_557_600, "s")  # 365.25 days
_VARIABLES = ("slope", "slope_low", "slope_high", "intercept", "tau", "p_value", "n_obs")


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
    Slope, interval and intercept are those of ``scipy.stats.theilslopes``, with Sen's interval
    and its correction for ties [1]_; the test is the original Mann-Kendall test with correction
    for ties and continuity. On three dates no p-value can be below 0.29, on four below 0.089; on
    five dates a monotonic series has 0.027. Pixels are tested one by one: neighbours are not
    independent, and one in twenty is below 0.05 by chance.

    References
    ----------
    .. [1] Sen 1968, J. Am. Stat. Assoc. 63, 1379.

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
    attrs = _attrs(confidence, str(np.datetime_as_string(times[0], "s")))
    return xr.Dataset(
        {
            name: label_quantity(layer, name, attrs[name])
            for name, layer in zip(_VARIABLES, layers, strict=True)
        }
    )


def _attrs(confidence: float, start: str) -> dict[str, dict[str, Any]]:
    slope = "trend of canopy height"
    return {
        "slope": {"long_name": slope, "units": "m year-1"},
        "slope_low": _bound(f"lower bound of the {slope}", confidence),
        "slope_high": _bound(f"upper bound of the {slope}", confidence),
        "intercept": {"long_name": f"fitted height on {start}", "units": "m", "time": start},
        "tau": {"long_name": "Kendall's tau of height and time", "units": "1"},
        "p_value": {"long_name": "probability of such a tau without a trend", "units": "1"},
        "n_obs": {"long_name": "valid dates", "units": "1"},
    }


def _bound(words: str, confidence: float) -> dict[str, Any]:
    return {"long_name": words, "units": "m year-1", "confidence": confidence}


def _fit(heights: _Floats, years: _Floats, min_obs: int, confidence: float) -> _Floats:
    """Fit columns of heights (time, n): the variables (7, n)."""
    heights = np.where(np.isfinite(heights), heights, np.nan)
    valid = np.isfinite(heights)
    n = valid.sum(axis=0)
    early, late = np.triu_indices(len(years), 1)
    rises = heights[late] - heights[early]  # [pairs, n]
    slopes = np.sort(rises / (years[late] - years[early])[:, None], axis=0)  # NaN last
    pairs = n * (n - 1) // 2
    ties = _ties(heights, valid)
    full = n * (n - 1.0) * (2 * n + 5)
    slope = _middle(slopes, pairs)
    low, high = _interval(slopes, pairs, np.sqrt((full - ties) / 18), confidence)
    times = np.sort(np.where(valid, years[:, None], np.nan), axis=0)
    intercept = _middle(np.sort(heights, axis=0), n) - slope * _middle(times, n)
    s = np.nansum(np.sign(rises), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = s / pairs
        score = (s - np.sign(s)) / np.sqrt((full - ties) / 18)
    chance = np.where(s == 0, 1.0, erfc(np.abs(score) / np.sqrt(2)))
    fitted = np.stack([slope, low, high, intercept, tau, chance])
    return np.concatenate([np.where(n >= min_obs, fitted, np.nan), n[None]])


def _ties(heights: _Floats, valid: npt.NDArray[np.bool_]) -> _Floats:
    """Return the sum of k (k - 1) (2 k + 5) over the groups of k equal heights."""
    alike = (heights[:, None] == heights[None]).sum(axis=1)  # [time, n]; NaN equals nothing
    found: _Floats = np.where(valid, (alike - 1.0) * (2 * alike + 5), 0.0).sum(axis=0)
    return found


def _middle(ascending: _Floats, count: npt.NDArray[Any]) -> _Floats:
    """Return the median of the first `count` of each column; NaN for none."""
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    found = (pick(ascending, low) + pick(ascending, high)) / 2
    return np.where(count > 0, found, np.nan)


def _interval(
    slopes: _Floats, pairs: npt.NDArray[Any], sd: _Floats, confidence: float
) -> tuple[_Floats, _Floats]:
    """Return the slopes whose ranks bound the median (Sen 1968, equation 2.6)."""
    reach = float(ndtri(0.5 + confidence / 2)) * sd
    high = np.minimum(np.round((pairs + reach) / 2), pairs - 1)
    low = np.maximum(np.round((pairs - reach) / 2) - 1, 0)
    return pick(slopes, low), pick(slopes, high)
