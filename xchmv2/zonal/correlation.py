"""What correlated errors of neighbouring pixels cost an average."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.change.correlation import MOST_WINDOWS, WINDOW, correlated_pixels
from xchmv2.change.registration import Windows
from xchmv2.zonal.pieces import Window

Floats = npt.NDArray[np.float64]


def effective_samples(
    area: npt.ArrayLike, correlation_length: npt.ArrayLike, count: npt.ArrayLike
) -> Floats:
    """Count the independent measurements in an area with spatially correlated errors.

    Parameters
    ----------
    area : array_like
        Areas [m2].
    correlation_length : array_like
        Radius of the disc that counts as one independent error [m], as from
        :func:`xchmv2.change.correlation_length`; 0 where errors are independent.
    count : array_like
        Pixels in each area.

    Returns
    -------
    ndarray of float64
        At least 1 and at most the count; NaN where there is no pixel, or no length. The standard
        error of a mean is the errors' standard deviation divided by the square root of it.

    Notes
    -----
    Errors are given the spherical variogram whose autocorrelation has the same integral: its range
    a is sqrt(5) times the correlation length. The area is taken for a disc of radius L about its
    centre: the variance of its mean is a share 1 - L/a + (L/a)^3 / 5 of a pixel's up to L = a, and
    (a/L)^2 / 5 beyond, which is a pixel's, by the number of correlated discs in the area. A longish
    area, or one of many patches, has more independent measurements than a disc, so its standard
    error is stated too large rather than too small.

    References
    ----------
    Rolstad, Haug and Denby 2009, Spatially integrated geodetic glacier mass balance and its
    uncertainty based on geostatistical analysis, Journal of Glaciology 55 (192): 666-680.
    """
    radius = np.sqrt(np.asarray(area, np.float64) / math.pi)
    length = np.asarray(correlation_length, np.float64)
    reach = np.maximum(math.sqrt(5) * length, np.finfo(float).tiny)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = radius / reach
        near = 1 - np.minimum(ratio, 1) + np.minimum(ratio, 1) ** 3 / 5
        samples = np.where(ratio < 1, 1 / near, 5 * ratio**2)
    count = np.asarray(count, np.float64)
    bounded: Floats = np.maximum(1.0, np.minimum(samples, count))
    return np.where(count > 0, bounded, np.nan)


def spread_windows(shape: tuple[int, ...]) -> list[Window]:
    """Spread windows over an array, where :func:`xchmv2.change.correlation_length` looks too.

    Parameters
    ----------
    shape : (height, width)
        Of the array [px].

    Returns
    -------
    list of (first row, end row, first column, end column)
        At most about 16.
    """
    found = Windows.spread_over((shape[0], shape[1]), WINDOW, MOST_WINDOWS, 0)
    return [(row, row + found.side, col, col + found.side) for row, col in found.corners]


def estimate_length(windows: list[npt.NDArray[Any]], *, cell: float) -> float:
    """Task: estimate the correlation length of a change from windows of it.

    Parameters
    ----------
    windows : list of ndarray, shape (D, H, W)
        Changes [m]; dates are pooled.
    cell : float
        Area of a pixel [m2].

    Returns
    -------
    float
        [m]; NaN if no window has enough pixels that did not change.

    References
    ----------
    As :func:`xchmv2.change.correlation_length`.
    """
    planes = [plane.astype(np.float64) for window in windows for plane in window]
    return math.sqrt(correlated_pixels(planes) * cell / math.pi)
