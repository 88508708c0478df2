"""Date, magnitude and recovery of the largest loss of each pixel: :func:`events`."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.change.dates import find_dates
from xchmv2.change.differencing import read_bin_spread
from xchmv2.change.error_models import measure_errors
from xchmv2.change.masks import THRESHOLD
from xchmv2.change.pixel_series import map_series, pick
from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    Raster,
    label_quantity,
    read_heights,
    read_numbers,
    require_heights,
    show,
    spatial_dims,
    validate_number,
)

_Floats = npt.NDArray[np.float64]
_Indices = npt.NDArray[np.intp]
_Singles = npt.NDArray[np.float32]

#: Dates that a confirmed loss needs on either side.
_CONFIRM = 3
#: Levels that are tried; most that a date costs, 3 sigma squared; the evidence for a loss, and the
#: share that is taken off of what the two consecutive dates bring that speak most for it.
_LEVELS, _MOST, _EVIDENCE, _DISCOUNT = 16, 9.0, 6.0, 0.75
#: Heights do not err less than this [m].
_LEAST_SIGMA = 0.1


def events(
    height: Raster,
    *,
    threshold: float = THRESHOLD,
    sigma: float | Literal["measure", "bin_spread"] = "measure",
) -> xr.Dataset:
    """Find the largest loss of each pixel in three dates or more, and its recovery.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m] on at least three dates, NaN where missing, or a Dataset with
        ``canopy_height``. The dates may be irregular.
    threshold : float, default 5
        Smallest drop that counts [m].
    sigma : "measure", float or "bin_spread"
        Standard error of the height of one pixel on one date [m]. "measure" takes the NMAD of the
        difference of each two consecutive dates on stable ground, as
        :func:`~xchmv2.change.stable_bias` does, and of these the median over sqrt(2), at least
        0.1 m. "bin_spread" takes the variable of that name, for each pixel and date.

    Returns
    -------
    Dataset
        (y, x) ``loss_date``, the first date on which the canopy is gone, NaT where nothing was
        lost; ``last_seen``, the valid date before it: the loss happened in between; ``magnitude``
        [m], height before less height after, positive; ``height_before`` and ``height_after``
        [m]; ``recovery`` [1], the share of the magnitude that has grown back on the last date,
        NaN if that is the loss date; ``confirmed`` (bool). The coordinate ``sigma`` [m] is the
        error that was used, with "bin_spread" (y, x), the median of the dates. The attribute
        ``confirmable`` is the interval in which a ``loss_date`` can be confirmed, or "none" with
        fewer than six dates. dask-backed if the heights are, with all dates in one chunk.

    Raises
    ------
    CHMv2Error
        If there are fewer than three dates, the dates are not in strictly increasing order, the
        threshold or sigma is not positive, there is no ``bin_spread``, heights in memory are NaN
        everywhere, or no two consecutive dates in memory share stable pixels.

    Notes
    -----
    Only the valid dates of a pixel count. For each of them but the first:

    1. *before* is the median of the last three heights before it, or the lower of two; *after*
       is the median of the first three from it on, or the higher of two. At either end of the
       series there may be only one.
    2. The drop is *before* less *after*. It counts if it is above the threshold, the height on
       the date itself is below *before*, and that on the valid date before it above *after*, both
       by more than the threshold. So a single outlier, too high or too low, neither makes nor
       hides a loss, and a drop that is recovered on the next date does not count; on the first
       and the last date an outlier cannot be told from a loss.
    3. The loss is at the largest drop that counts, the earliest of equal ones, unless another one
       is confirmed; ``height_before`` and ``height_after`` are *before* and *after* there.
    4. ``recovery`` is (last - height_after) / magnitude, *last* being the lower of the last two
       heights from the loss on.

    A loss is *confirmed* by all dates of the pixel together. A height y costs min((y - g)^2 /
    sigma^2, 9) at a level g, so that an outlier costs no more than any other; levels are 16 steps
    from the lowest to the highest height. The gain of a date is its cost at the best single level
    less that at the best two levels, one before the loss and one from it on. The evidence is the
    sum of the gains, less three quarters of that of the two consecutive dates which have the most,
    because two bad dates in a row are no loss. The date with the most evidence is confirmed if
    this is above 6; if the median of the last five heights before it exceeds that of the first
    five from it on by more than the threshold, which are *before* and *after* then; if there are
    three dates or more on either side, and two thirds of these on their side of the middle of the
    two levels; and the date itself is below it.

    A pixel has one loss; others before or after it are not reported. With ``sigma="measure"``
    lazy heights are computed twice, so that none are held until it is known: store the heights of
    a network first. Remove the offsets of the dates, too
    (:func:`~xchmv2.change.stable_bias`).

    Examples
    --------
    >>> events = height.chmv2.events(threshold=8.0)
    >>> lost_in_2022 = events["loss_date"].dt.year == 2022
    >>> lost = events.chmv2.loss()
    """
    array = read_heights(height)
    validate_number("threshold", threshold, 5, above=0, unit="m")
    dim = find_dates(array, least=3)
    require_heights(array)
    error = _resolve_sigma(sigma, height, array, dim)
    each = error.ndim > 0
    dtypes = [np.dtype("datetime64[ns]")] * 2 + [array.dtype] * 4 + [np.dtype(bool)]
    dtypes += [array.dtype] if each else []
    times = array[dim].values.astype("datetime64[ns]")
    find = partial(_find, times=times, threshold=threshold)
    layers = map_series(find, array, dim, dtypes, error, per_pixel=_LEVELS * len(times))
    if each:
        *layers, error = layers
    attrs = {"long_name": "error of one pixel on one date", "units": "m"}
    error = label_quantity(error, "sigma", attrs)
    found = zip(layers, _LAYERS.items(), strict=True)
    return xr.Dataset(
        {name: label_quantity(layer, name, attrs) for layer, (name, attrs) in found},
        {"sigma": error.variable},
        attrs={"threshold": float(threshold), "confirmable": _confirmable(times)},
    )


_LAYERS: dict[str, dict[str, str]] = {
    "loss_date": {"long_name": "first date without the canopy that was lost"},
    "last_seen": {"long_name": "last date with the canopy that was lost"},
    "magnitude": {"long_name": "canopy height lost", "units": "m"},
    "height_before": {"long_name": "canopy height before the loss", "units": "m"},
    "height_after": {"long_name": "canopy height after the loss", "units": "m"},
    "recovery": {"long_name": "share of the lost height that has grown back", "units": "1"},
    "confirmed": {"long_name": "loss that three dates or more on either side agree on"},
}


def _confirmable(times: npt.NDArray[np.datetime64]) -> str:
    """Return the first and the last date on which a loss can be confirmed."""
    possible = times[_CONFIRM : len(times) - _CONFIRM + 1]
    ends = [str(np.datetime_as_string(possible[k], "s")) for k in (0, -1) if len(possible)]
    return "/".join(ends) or "none"


def _resolve_sigma(sigma: Any, height: Raster, array: xr.DataArray, dim: str) -> xr.DataArray:
    """Return the error of one date: one number, or the spread of each pixel and date."""
    if not isinstance(sigma, str):
        validate_number("sigma", sigma, 4.0, above=0, unit="m")
        return xr.DataArray(float(sigma))
    if sigma == "measure":
        return _measure_sigma(array, dim)
    if sigma == "bin_spread":
        return _read_spread(height, array)
    raise CHMv2Error("sigma as a number, 'measure' or 'bin_spread'", show(sigma), "pass sigma=4.0")


def _measure_sigma(array: xr.DataArray, dim: str) -> xr.DataArray:
    """Measure the error of one date from all pairs of consecutive dates; lazy if they are."""
    planes = [array.isel({dim: k}).transpose(*spatial_dims(array)) for k in range(array.sizes[dim])]
    errors = measure_errors(list(pairwise(planes)), None)
    if errors.computed and not errors.pixels:
        raise CHMv2Error(
            "no two consecutive dates share stable pixels, so their error cannot be measured",
            fix="pass it in metres, such as sigma=4.0",
        )
    return xr.DataArray(np.maximum(errors.nmad / np.sqrt(2), _LEAST_SIGMA))


def _read_spread(height: Raster, array: xr.DataArray) -> xr.DataArray:
    spread = read_numbers(read_bin_spread(height))
    return spread.where(spread > 0).broadcast_like(array)


def _find(
    heights: _Floats, sigma: _Floats, times: npt.NDArray[np.datetime64], threshold: float
) -> tuple[npt.NDArray[Any], ...]:
    """Find the losses of columns of heights (time, n), with a sigma for all or for each."""
    packed, when, n = _pack(heights)
    threes, fives = _medians(packed, n)
    index, found = _largest_drop(packed, n, threes, threshold)
    error = np.take_along_axis(sigma, when, axis=0) if sigma.ndim else sigma
    step = _confirmed_step(packed, n, error, fives, threshold)
    confirmed = step > 0
    index = np.where(confirmed, step, index)
    found |= confirmed
    before, after = (
        np.where(confirmed, pick(fives, index + far), pick(threes, index + near))
        for far, near in ((-3, -1), (2, 2))
    )
    magnitude = before - after
    last = np.minimum(pick(packed, n - 1), pick(packed, np.maximum(n - 2, index)))
    with np.errstate(invalid="ignore", divide="ignore"):
        recovery = np.where(index < n - 1, (last - after) / magnitude, np.nan)
    none = np.datetime64("NaT", "ns")
    dates = [np.where(found, times[pick(when, at)], none) for at in (index, index - 1)]
    levels = [np.where(found, v, np.nan) for v in (magnitude, before, after, recovery)]
    return (*dates, *levels, confirmed, *([np.nanmedian(sigma, axis=0)] if sigma.ndim else []))


def _pack(heights: _Floats) -> tuple[_Floats, _Indices, _Indices]:
    """Move the valid heights of each column to its top, in order; return their dates and number."""
    missing = ~np.isfinite(heights)
    when = np.argsort(missing, axis=0, kind="stable")
    packed = np.take_along_axis(np.where(missing, np.nan, heights), when, axis=0)
    return packed, when, (~missing).sum(axis=0)


def _medians(packed: _Floats, n: _Indices) -> tuple[_Floats, _Floats]:
    """Return the medians of three dates, from 2 before the first on, and of five.

    Over an end the dates inside count: of two the lower at the start, and the higher at the end; of
    four the mean of the middle two.
    """
    padded = np.full((len(packed) + 4, packed.shape[1]), np.nan)
    padded[2:-2] = packed
    columns, both = np.arange(packed.shape[1]), []
    for sign in (1, -1):  # those of two or four have one infinite neighbour, of one and three two
        padded[1], padded[0] = -sign * np.inf, sign * np.inf
        padded[n + 2, columns], padded[n + 3, columns] = sign * np.inf, -sign * np.inf
        both.append(_median_of_five(*(padded[k : k + len(packed)] for k in range(5))))
        if sign == 1:
            threes = _median_of_three(padded[:-2], padded[1:-1], padded[2:])
    with np.errstate(invalid="ignore"):
        return threes, (both[0] + both[1]) / 2


def _median_of_three(a: _Floats, b: _Floats, c: _Floats) -> _Floats:
    return np.asarray(np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c)))


def _median_of_five(a: _Floats, b: _Floats, c: _Floats, d: _Floats, e: _Floats) -> _Floats:
    low = np.maximum(np.minimum(a, b), np.minimum(c, d))
    high = np.minimum(np.maximum(a, b), np.maximum(c, d))
    return _median_of_three(low, high, e)


def _largest_drop(
    packed: _Floats, n: _Indices, threes: _Floats, threshold: float
) -> tuple[_Indices, npt.NDArray[np.bool_]]:
    """Return the position of the largest drop that counts, and whether there is one."""
    before, after = threes[: len(packed) - 1], threes[3:]
    drop = before - after
    counts = np.arange(1, len(packed))[:, None] < n
    for size in (drop, before - packed[1:], packed[:-1] - after):
        counts &= size > threshold
    drop = np.where(counts, drop, -np.inf)
    return drop.argmax(axis=0) + 1, np.asarray(counts.any(axis=0))


def _confirmed_step(
    packed: _Floats, n: _Indices, sigma: _Floats, fives: _Floats, threshold: float
) -> _Indices:
    """Return the position of the step down with the most evidence; 0 where none is confirmed."""
    at = np.zeros(packed.shape[1], np.intp)
    places = np.arange(_CONFIRM, len(packed) - _CONFIRM + 1)
    large = fives[: len(places)] - fives[5:] > threshold
    large &= places[:, None] <= n - _CONFIRM
    some = np.flatnonzero(large.any(axis=0))
    if len(some):
        y, n, large = packed[:, some].astype(np.float32), n[some], large[:, some]
        error = (sigma[:, some] if sigma.ndim else sigma).astype(np.float32)
        at[some] = _best_step(y, n, error, large)
    return at


def _best_step(y: _Singles, n: _Indices, sigma: _Singles, large: npt.NDArray[np.bool_]) -> _Indices:
    """Choose among the steps that are `large` enough, the first of which is at _CONFIRM."""
    low, high = (reach(y, axis=0) for reach in (np.fmin.reduce, np.fmax.reduce))
    levels = low + (high - low) * np.linspace(0, 1, _LEVELS, dtype=np.float32)[:, None]
    cost = _cost(y[:, None], levels, sigma[:, None] if sigma.ndim else sigma)
    sums = np.cumsum(cost, axis=0)
    flat = _cost(y, pick(levels, sums[-1].argmin(axis=0)), sigma)
    best, at = np.full(len(n), _EVIDENCE, np.float32), np.zeros(len(n), np.intp)
    dates = np.arange(len(y))[:, None]
    for k, possible in enumerate(large, start=_CONFIRM):
        above = pick(levels, sums[k - 1].argmin(axis=0))
        below = pick(levels, (sums[-1] - sums[k - 1]).argmin(axis=0))
        gain = flat - _cost(y, np.where(dates < k, above, below), sigma)
        evidence = gain.sum(axis=0) - _DISCOUNT * (gain[1:] + gain[:-1]).max(axis=0)
        middle = (above + below) / 2
        high, low = (y[:k] > middle).sum(axis=0), (y[k:] < middle).sum(axis=0)
        agree = (np.minimum(high, low) >= _CONFIRM) & (3 * high >= 2 * k) & (3 * low >= 2 * (n - k))
        better = possible & agree & (y[k] < middle) & (evidence > best)
        best, at = np.where(better, evidence, best), np.where(better, k, at)
    return at


def _cost(y: _Singles, level: _Singles, sigma: _Singles) -> _Singles:
    """Return what each date costs at a level; nothing where it, or its sigma, is missing."""
    return np.asarray(np.nan_to_num(np.minimum(((y - level) / sigma) ** 2, _MOST)))
