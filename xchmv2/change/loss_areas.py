"""Area of canopy loss with its confidence interval: :func:`loss_area`."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.special import ndtr, ndtri


def independent_area(area, length):
    return np.maximum(area, np.pi * (length or 0.0) ** 2)


from xchmv2.change.masks import (
    MIN_AREA,
    OPENING,
    THRESHOLD,
    Change,
    gain,
    grow,
    loss,
    read_left_out,
)
from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    cell_areas,
    has_true_areas,
    name_contents,
    pixel_size,
    read_change,
    validate_number,
)

#: Errors hide losses within this distance of detected ones [m]: about a crown's radius.
_RIM = 3.0


def loss_area(
    change: Change,
    *,
    threshold: float = THRESHOLD,
    opening: int | None = OPENING,
    min_area: float | None = MIN_AREA,
    mask: xr.DataArray | None = None,
    correlation_length: float | None = None,
    confidence: float = 0.95,
) -> xr.Dataset:
    """Estimate the area that lost more than some height, with its confidence interval.

    Parameters
    ----------
    change : Dataset
        From :func:`~xchmv2.change.difference`.
    threshold : float, default 5
        Least loss that counts [m].
    opening, min_area, mask
        As for :func:`~xchmv2.change.loss`.
    correlation_length : float, optional
        Distance over which errors are correlated [m]; by default that in `change.attrs`.
    confidence : float, default 0.95
        Confidence of the interval.

    Returns
    -------
    Dataset
        Scalars ``area``, ``lower``, ``upper`` and ``standard_error`` [m2; without a CRS in the
        coordinates' own units]. Lazy if the change is.

    Raises
    ------
    CHMv2Error
        If it is not the Dataset of ``difference``, there is no correlation length, or a number
        is out of range.

    Notes
    -----
    Three masks are made, all opened and sieved alike: the *sure* loss, beyond both `threshold`
    and the level of detection; the *likely* loss, beyond `threshold` alone; and the likely *gain*,
    beyond the same height upwards. ``area`` is that of the sure loss.

    Its standard error counts the pixels that another, equally good pair of images would have put
    on the other side of the limit: each pixel of sure or likely loss is over it with p = Phi((d -
    limit) / s), d being its loss and s its error. Var = sum of a A p (1 - p), where a is the area
    of the cell and A = pi r^2 that of the disc within which errors are correlated.

    The sure loss misses losses between `threshold` and the level of detection. Errors are
    assumed to be as often positive as negative, so likely loss less likely gain estimates the area
    of both together. Errors also break a loss into pieces, of which opening and sieving remove
    the small ones, and no gain shows how many: each pixel within 3 m (a crown's radius) of the
    likely loss may have been lost too, with p = Phi((d - threshold) / s), and the upper bound
    counts them by p. The interval runs from z standard errors below ``area`` to as many above the
    larger of the two estimates and that rim, and not below 0. It is wide where the level of
    detection is far above `threshold`: the data do not say more. True gains make its upper bound
    too low by as much as they cover; an offset between the dates must have been removed before.
    It covers neither errors that both dates share, nor whether a drop of canopy is a loss.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0, correlation_length=5.0)
    >>> found = change.chmv2.loss_area(threshold=10.0)
    >>> hectares = [float(found[name]) / 1e4 for name in ("lower", "area", "upper")]
    """
    change = _require_difference(change)
    length = _resolve_length(change, correlation_length)
    _validate(confidence, threshold)
    cleaning = {"opening": opening, "min_area": min_area, "mask": mask}
    sure = loss(change, threshold=threshold, **cleaning)  # type: ignore[arg-type]
    drop = read_change(change)
    likely = loss(drop, threshold=threshold, **cleaning)  # type: ignore[arg-type]
    risen = gain(drop, threshold=threshold, **cleaning)  # type: ignore[arg-type]
    cells = cell_areas(drop)
    error = change["level_of_detection"] / ndtri(0.5 + change.attrs["confidence"] / 2)
    limit = np.maximum(change["level_of_detection"], threshold)
    over = _chance((-drop - limit) / error)
    undecided = (over * (1 - over)).where(sure | likely, 0.0)
    sd = np.sqrt((undecided * cells * independent_area(cells, length)).sum())
    area, both = (cells * sure).sum(), (cells * likely).sum() - (cells * risen).sum()
    rim = _rim(likely, mask)
    missed = (cells * _chance((-drop - threshold) / error).where(rim, 0.0)).sum()
    z = float(ndtri(0.5 + confidence / 2))
    found = {
        "area": (area, "area of loss"),
        "lower": (np.maximum(area - z * sd, 0.0), "lower bound of the area of loss"),
        "upper": (np.maximum(area, both) + missed + z * sd, "upper bound of the area of loss"),
        "standard_error": (sd, "standard error of the area of loss"),
    }
    units = {"units": "m2"} if has_true_areas(drop) else {}
    labelled = {
        name: xr.DataArray(value.data, name=name, attrs={"long_name": words, **units})
        for name, (value, words) in found.items()
    }
    attrs = {"threshold": float(threshold), "confidence": confidence}
    return xr.Dataset(labelled, attrs={**attrs, "correlation_length": length})


def _chance(score: xr.DataArray) -> xr.DataArray:
    """Return the probability that each pixel is over a limit; 0 where change is missing."""
    found: xr.DataArray = xr.apply_ufunc(
        ndtr, score, dask="parallelized", output_dtypes=[score.dtype]
    )
    return found.fillna(0.0)


def _rim(likely: xr.DataArray, left_out: xr.DataArray | None) -> xr.DataArray:
    """Return the pixels near a likely loss that are not part of it."""
    reach = max(1, round(_RIM / min(pixel_size(likely))))
    rim = grow(likely, reach) & ~likely
    return rim if left_out is None else rim & ~read_left_out(left_out, likely)


def _require_difference(change: Change) -> xr.Dataset:
    """Check that a change has its level of detection, which the interval needs."""
    needed = {"height_change", "level_of_detection"}
    if isinstance(change, xr.Dataset) and needed <= set(change.data_vars):
        return change
    raise CHMv2Error(
        "a change with its level_of_detection",
        name_contents(change),
        "pass what difference() returns",
    )


def _resolve_length(change: xr.Dataset, length: float | None) -> float:
    found = change.attrs.get("correlation_length") if length is None else length
    if found is None:
        raise CHMv2Error(
            "the interval of an area needs the correlation length of the errors",
            fix="estimate it: correlation_length=xchmv2.change.correlation_length(change)",
        )
    validate_number("correlation_length", found, 20, least=0, unit="m")
    return float(found)


def _validate(confidence: float, threshold: float) -> None:
    validate_number("confidence", confidence, 0.95, above=0, below=1)
    validate_number("threshold", threshold, 5, above=0, unit="m")
