"""Correlation length of errors, and the area of one independent error."""

from __future__ import annotations

import math
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import fft, ndimage

from xchmv2.change.registration import Windows
from xchmv2.errors import CHMv2Error
from xchmv2.raster import cell_areas, read_change, spatial_dims, validate_number

_Floats = npt.NDArray[np.float64]

WINDOW, MOST_WINDOWS = 256, 16
#: Beyond this many NMAD a difference is a change, not an error.
_CLIP = 3.0
# Least share of unchanged pixels in a window that takes part.
_LEAST_SHARE = 0.25


def correlation_length(
    change: xr.Dataset | xr.DataArray, *, window: int = WINDOW, windows: int = MOST_WINDOWS
) -> float:
    """Estimate the correlation length of the errors of a change on its unchanged pixels.

    Parameters
    ----------
    change : Dataset or DataArray
        From :func:`~xchmv2.change.difference`, or its ``height_change`` (y, x) [m].
    window : int, default 256
        Side of the windows [px]; longer distances are not measured.
    windows : int, default 16
        Approximate number of windows, spread evenly over the scene. They are read at once.

    Returns
    -------
    float
        Radius [m] of the disc that counts as one independent error: its area is the sum of the
        correlation of a pixel with all others. So n pixels of a m2 hold n a / (pi r^2) independent
        errors. At least that of one pixel; NaN if no window has enough unchanged pixels.

    Notes
    -----
    The pixels within 3 NMAD of the median of each window count. Their autocovariance, averaged
    over all windows and directions, is summed up to the first distance at which it falls to 5 % of
    that at distance 0.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0)
    >>> length = change.chmv2.correlation_length()
    >>> net = change.chmv2.zonal(stands, correlation_length=length)
    """
    validate_number("window", window, 256, least=1, unit="px", whole=True)
    validate_number("windows", windows, 16, least=1, whole=True)
    plane = read_change(change)
    if plane.ndim != 2:
        extra = [dim for dim in plane.dims if dim not in spatial_dims(plane)]
        raise CHMv2Error(
            "the change between two dates",
            f"dims {plane.dims}",
            f"choose one: change.isel({extra[0]}=0)",
        )
    shape = (plane.shape[0], plane.shape[1])
    spread = Windows.spread_over(shape, window, windows, 0)
    patches = dask.compute(spread.cut(plane.data))[0]
    cell = cell_areas(plane)
    area = float(cell[tuple(size // 2 for size in shape)])
    pixels = correlated_pixels([np.asarray(patch, np.float64) for patch in patches])
    return math.sqrt(pixels * area / math.pi)


def correlated_pixels(patches: list[_Floats]) -> float:
    """Return the sum of the correlations of a pixel with all others."""
    parts = [_autocovariance(patch) for patch in patches]
    known = [part for part in parts if part is not None]
    if not known:
        return math.nan
    shared, count = (np.sum(part, axis=0) for part in zip(*known, strict=True))
    covariance = shared / np.maximum(count, 1)
    size = covariance.shape
    away = [np.minimum(np.arange(n), n - np.arange(n)) for n in size]
    distance = np.rint(np.hypot(away[0][:, None], away[1])).astype(int)
    # Rings one pixel wide, up to half a window.
    rings = np.arange(max(2, min(size) // 4))
    mean = ndimage.mean(covariance, distance, rings)
    if mean[0] <= 0:
        return math.nan
    correlation = mean / mean[0]
    low = np.flatnonzero(correlation < 0.05)
    reach = int(low[0]) if len(low) else len(rings)
    per_ring = np.bincount(distance.ravel(), minlength=len(rings))[:reach]
    return max(1.0, float((correlation[:reach] * per_ring).sum()))


def _autocovariance(patch: _Floats) -> tuple[_Floats, _Floats] | None:
    """Return the sum and the number of products at each lag; None with too few unchanged pixels."""
    known = np.isfinite(patch)
    if not known.any():
        return None
    middle = np.median(patch[known])
    spread = 1.4826 * np.median(np.abs(patch[known] - middle))
    with np.errstate(invalid="ignore"):
        stable = known & (np.abs(patch - middle) <= _CLIP * spread)
    if stable.mean() < _LEAST_SHARE or spread == 0:
        return None
    rest = np.where(stable, patch - patch[stable].mean(), 0.0)
    size = tuple(2 * n for n in patch.shape)  # room for all lags without wrapping around
    shared, count = (
        fft.irfft2(np.abs(fft.rfft2(a, size)) ** 2, size) for a in (rest, stable.astype(float))
    )
    return np.asarray(shared), np.asarray(count)


def independent_area(area: Any, length: float | None) -> Any:
    """Return the area that counts as one independent error [the units of `area`].

    Parameters
    ----------
    area : float or array
        Area of a cell.
    length : float or None
        Correlation length, as from :func:`correlation_length`; None for independent cells.

    Returns
    -------
    float or array
        At least the cell's own area.
    """
    return np.maximum(area, math.pi * (length or 0.0) ** 2)
