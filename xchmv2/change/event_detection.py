"""Date, magnitude and recovery of the largest loss of each pixel: :func:`events`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.change.dates import find_dates
from xchmv2.change.masks import THRESHOLD
from xchmv2.change.pixel_series import map_series, pick
from xchmv2.raster import (
    Raster,
    label_quantity,
    read_heights,
    require_heights,
    validate_number,
)

_Floats = npt.NDArray[np.float64]

_CONFIRM, _LEVEL = 2, 3


def events(height: Raster, *, threshold: float = THRESHOLD) -> xr.Dataset:
    """Find the largest loss of each pixel in three dates or more, and its recovery.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m] on at least three dates, NaN where missing, or a Dataset with
        ``canopy_height``. The dates may be irregular.
    threshold : float, default 5
        Smallest drop that counts [m]; choose it above the level of detection of two dates.

    Returns
    -------
    Dataset
        (y, x) ``loss_date``, the first date on which the canopy is gone, NaT where nothing was
        lost; ``last_seen``, the valid date before it: the loss happened in between; ``magnitude``
        [m], height before less height after, positive; ``height_before`` and ``height_after``
        [m]; ``recovery`` [1], the share of the magnitude that has grown back on the last date,
        NaN if that is the loss date; ``confirmed`` (bool): two valid dates or more on either side.
        dask-backed if the heights are, with all dates in one chunk.

    Raises
    ------
    CHMv2Error
        If there are fewer than three dates, the dates are not in strictly increasing order, the
        threshold is not positive, or heights in memory are NaN everywhere.

    Notes
    -----
    Only the valid dates of a pixel count. For each of them but the first:

    1. *before* is the median of the last three heights before it, or the lower of two; *after*
       is the median of the first three from it on, or the higher of two. At either end of the
       series there may be only one.
    2. The drop is *before* less *after*. It counts if it is above the threshold, the height on
       the date itself is below *before*, and that on the valid date before it above *after*, both
       by more than the threshold. So a single outlier, too high or too low, neither makes nor
       hides a loss, and a drop that is recovered on the next date does not count. On the first
       and the last date an outlier cannot be told from a loss: then ``confirmed`` is False.
    3. The loss is at the largest drop that counts, the earliest of equal ones.
    4. ``height_before`` and ``height_after`` are *before* and *after* there.
    5. ``recovery`` is (last - height_after) / magnitude, *last* being the lower of the last two
       heights from the loss on.

    A pixel has one loss; smaller ones before or after it are not reported.

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
    dtypes = [np.dtype("datetime64[ns]")] * 2 + [array.dtype] * 4 + [np.dtype(bool)]
    times = array[dim].values.astype("datetime64[ns]")
    find = partial(_find, times=times, threshold=threshold)
    layers = map_series(find, array, dim, dtypes, per_pixel=len(times))
    return xr.Dataset(
        {
            name: label_quantity(layer, name, attrs)
            for (name, attrs), layer in zip(_LAYERS.items(), layers, strict=True)
        },
        attrs={"threshold": float(threshold)},
    )


_LAYERS: dict[str, dict[str, str]] = {
    "loss_date": {"long_name": "first date without the canopy that was lost"},
    "last_seen": {"long_name": "last date with the canopy that was lost"},
    "magnitude": {"long_name": "canopy height lost", "units": "m"},
    "height_before": {"long_name": "canopy height before the loss", "units": "m"},
    "height_after": {"long_name": "canopy height after the loss", "units": "m"},
    "recovery": {"long_name": "share of the lost height that has grown back", "units": "1"},
    "confirmed": {"long_name": "two dates or more on either side of the loss"},
}


def _find(
    heights: _Floats, times: npt.NDArray[np.datetime64], threshold: float
) -> tuple[npt.NDArray[Any], ...]:
    """Find the losses of columns of heights (time, n)."""
    packed, when, n = _pack(heights)
    index, before, after = _largest_drop(packed, n, threshold)
    magnitude = before - after
    found = magnitude > threshold
    last = np.minimum(pick(packed, n - 1), pick(packed, np.maximum(n - 2, index)))
    with np.errstate(invalid="ignore", divide="ignore"):
        recovery = np.where(index < n - 1, (last - after) / magnitude, np.nan)
    confirmed = found & (index >= _CONFIRM) & (index <= n - _CONFIRM)
    dates = [_dates(times, pick(when, at), found) for at in (index, index - 1)]
    levels = [np.where(found, v, np.nan) for v in (magnitude, before, after, recovery)]
    return (*dates, *levels, confirmed)


def _pack(heights: _Floats) -> tuple[_Floats, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Move the valid heights of each column to its top, in order; return their dates and number."""
    missing = ~np.isfinite(heights)
    when = np.argsort(missing, axis=0, kind="stable")
    packed = np.take_along_axis(np.where(missing, np.nan, heights), when, axis=0)
    return packed, when, (~missing).sum(axis=0)


def _largest_drop(
    packed: _Floats, n: npt.NDArray[np.intp], threshold: float
) -> tuple[npt.NDArray[np.intp], _Floats, _Floats]:
    """Return the position of the largest drop of each column, and both levels; NaN for none."""
    index = np.ones(packed.shape[1], np.intp)
    above, below = (np.full(packed.shape[1], np.nan) for _ in range(2))
    for k in range(1, len(packed)):
        before = _middle(packed[max(0, k - _LEVEL) : k], lower=True)
        after = _middle(packed[k : k + _LEVEL], lower=False)
        drops = (before - after, before - packed[k], packed[k - 1] - after)
        counts = (k < n) & np.all([drop > threshold for drop in drops], axis=0)
        better = counts & ~(before - after <= above - below)  # NaN compares as False
        index = np.where(better, k, index)
        above, below = np.where(better, before, above), np.where(better, after, below)
    return index, above, below


def _middle(rows: _Floats, *, lower: bool) -> _Floats:
    """Return the median of the valid ones of up to three rows, or the lower or higher of two."""
    count = np.isfinite(rows).sum(axis=0)
    middle: _Floats = pick(np.sort(rows, axis=0), (count - 1 if lower else count) // 2)  # NaN last
    return middle


def _dates(
    times: npt.NDArray[np.datetime64],
    index: npt.NDArray[np.intp],
    found: npt.NDArray[np.bool_],
) -> npt.NDArray[np.datetime64]:
    return np.where(found, times[index], np.datetime64("NaT", "ns"))
