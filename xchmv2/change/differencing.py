"""Height change between two dates, with the error of each pixel: :func:`difference`."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import erfc, ndtri

from xchmv2.change.dates import ComparisonWarning, date_of, doubts, find_dates, select_date
from xchmv2.change.error_models import ErrorModel, measure_errors, read_mask, require_scatter
from xchmv2.errors import CHMv2Error, warn
from xchmv2.raster import (
    Raster,
    choose_heights,
    label_quantity,
    name_contents,
    on_same_grid,
    read_heights,
    read_numbers,
    require_heights,
    require_plane,
    show,
    validate_number,
)


def difference(
    before: Raster,
    after: Raster,
    *,
    sigma: _Sigma = None,
    confidence: float = 0.95,
    correlation_length: float | None = None,
    error_correlation: float = 0.0,
    stable: xr.DataArray | None = None,
) -> xr.Dataset:
    """Subtract two dates and test the height change of each pixel for significance.

    Parameters
    ----------
    before, after : DataArray or Dataset
        (y, x) heights [m] on the same grid, or Datasets with ``canopy_height``.
    sigma : None, float, DataArray, "bin_spread" or a pair
        Standard error of the height of one pixel on one date [m]: a number or (y, x), for both
        dates or as a pair, one for each. "bin_spread" takes the variable of that name, which the
        model gives with ``layers=("height", "bin_spread")``. Where a raster of it is missing, or
        dask-backed and not above 0, nothing is significant. None measures the errors of the
        difference itself on stable ground, as an :class:`~xchmv2.change.ErrorModel`: their spread
        by height, tails, and correlation.
    confidence : float, default 0.95
        Two-sided confidence of the level of detection.
    correlation_length : float, optional
        Distance over which errors of pixels are correlated [m], see
        :func:`~xchmv2.change.correlation_length`. It changes nothing per pixel; it is kept in
        the attributes for sums and means over areas, where n pixels do not make n independent
        errors. It means one range, and wins over the ranges that were measured.
    error_correlation : float, default 0
        Correlation of the errors of the two dates at a pixel, -1 to 1. Errors that both dates
        share, such as a tree whose height is always underestimated, cancel in the difference.
    stable : DataArray of bool, optional
        (y, x) True on stable ground, for ``sigma=None``; found as in
        :class:`~xchmv2.change.ErrorModel` by default.

    Returns
    -------
    Dataset
        ``height_change`` [m], after minus before; ``level_of_detection`` [m], the least change
        that is significant; ``z_score`` and two-sided ``p_value``; ``significant`` (bool), False
        where the change is missing. dask-backed if the heights are: nothing is computed.
        With ``sigma=None`` coordinates carry the errors: ``ErrorModel.read(change)`` returns them,
        ``change.chmv2.plot_errors()`` draws them. Their offset ``stable_offset`` [m] is *not*
        removed; :func:`~xchmv2.change.stable_bias` removes it.

    Raises
    ------
    CHMv2Error
        If there is more than one date in either, the grids differ, `after` is not later, `sigma`
        is not positive or missing, a number is out of range, or there is no pixel with both
        heights.

    Warns
    -----
    ComparisonWarning
        If the dates are of different season (more than 45 days of the year apart), the sun stood
        more than 15 degrees higher on one, or a date has quality flags: low sun, far off nadir,
        upsampled, partly unreadable. The text is in the attribute ``comparison_warnings`` too.

    Notes
    -----
    With errors s1 and s2 of the dates and their correlation r, the error of the difference is
    sqrt(s1^2 + s2^2 - 2 r s1 s2): in quadrature for r = 0. With ``sigma=None`` it is the spread
    of the differences of stable pixels of the same mean height, which includes the errors of both
    dates, correlated or not, and so takes neither a factor of sqrt(2) nor an
    `error_correlation`. On open ground it is that of the lowest canopy: a difference there is not a
    change of canopy, however little heights vary. Neither includes an offset of a whole date.
    The heights are read twice more to measure it: store those that are still to be predicted.

    z is the change over its error, and the level of detection the quantile of the confidence times
    the error: of the normal distribution (p = erfc(abs(z) / sqrt(2))), or with ``sigma=None`` of
    the errors themselves, which are large more often. Each pixel is tested by itself: of a
    million unchanged pixels, 50,000 are significant at 0.95. For patches of a minimum area see
    :func:`~xchmv2.change.loss`.
    """
    first, second = _pair(before, after)
    _validate(confidence, correlation_length, error_correlation)
    said = doubts(first, second)
    if said:
        warn("; ".join(said), ComparisonWarning)
    change = second - first
    require_heights(change)
    errors, coords = None, {}
    if sigma is None:
        errors = _measured(first, second, stable, error_correlation)
        quantile = errors.quantile(confidence)
        words = {"long_name": "level of detection over the standard deviation of errors"}
        coords = errors.to_coords() | {"detection_quantile": ((), quantile, words)}
        error = errors.spread_at((first + second) / 2)
    else:
        _refuse_stable(stable)
        sigmas = _read_sigmas(sigma, before, after, first)
        error = _combine(sigmas, error_correlation)
    attrs = _attrs(first, second, said, confidence, correlation_length)
    return _derive(change, error, confidence, errors).assign_coords(coords).assign_attrs(attrs)


def difference_between(
    height: Raster,
    first: Any,
    second: Any,
    *,
    sigma: _Sigma = None,
    confidence: float = 0.95,
    correlation_length: float | None = None,
    error_correlation: float = 0.0,
    stable: xr.DataArray | None = None,
) -> xr.Dataset:
    """Subtract two dates of a cube, chosen by label, as in :func:`difference`.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m], or a Dataset with ``canopy_height``.
    first, second : str or datetime64
        Labels that mean one date each, such as "2019" where there is one date in 2019.
    sigma : None, float, DataArray, "bin_spread" or a pair
        Standard error of the height of one pixel on one date [m], as for :func:`difference`. A
        DataArray may have a time dim: each date takes its own. None measures the error of the
        difference itself on stable ground.
    confidence : float, default 0.95
        Two-sided confidence of the level of detection.
    correlation_length : float, optional
        Distance over which errors of pixels are correlated [m]; kept in the attributes
        for sums and means over areas.
    error_correlation : float, default 0
        Correlation of the errors of the two dates at a pixel, -1 to 1.
    stable : DataArray of bool, optional
        (y, x) True on stable ground, for ``sigma=None``; found by default.

    Returns
    -------
    Dataset
        ``height_change`` [m], later minus earlier; ``level_of_detection`` [m]; ``z_score`` and
        two-sided ``p_value``; ``significant`` (bool). As from :func:`difference`.

    Raises
    ------
    CHMv2Error
        If a label means no date or several; the message lists the dates.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0)
    >>> real = change["height_change"].where(change["significant"])
    """
    dim = find_dates(choose_heights(height))
    pair = [select_date(height, label) for label in (first, second)]
    errors: Any = sigma
    if isinstance(sigma, xr.DataArray) and dim in sigma.dims:
        errors = tuple(select_date(sigma, label) for label in (first, second))
    return difference(
        *pair,
        sigma=errors,
        confidence=confidence,
        correlation_length=correlation_length,
        error_correlation=error_correlation,
        stable=stable,
    )


def _pair(before: Raster, after: Raster) -> tuple[xr.DataArray, xr.DataArray]:
    """Return both heights (y, x) on the same coordinates, the earlier first."""
    first = require_plane(read_heights(before), "before")
    second = require_plane(read_heights(after), "after")
    second = on_same_grid(second, first).transpose(*first.dims)
    dates = date_of(first), date_of(second)
    if dates[0] is not None and dates[1] is not None and not dates[0] < dates[1]:
        fix = "choose two" if dates[0] == dates[1] else "swap the two"
        raise CHMv2Error("before to be earlier than after", f"{dates[0]} and {dates[1]}", fix)
    return first, second


def _validate(confidence: float, length: float | None, correlation: float) -> None:
    validate_number("confidence", confidence, 0.95, above=0, below=1)
    validate_number("correlation_length", length, 20, least=0, unit="m", optional=True)
    validate_number("error_correlation", correlation, 0, least=-1, below=1)


def _measured(
    first: xr.DataArray, second: xr.DataArray, stable: xr.DataArray | None, correlation: float
) -> ErrorModel:
    """Return the errors of the difference."""
    if correlation:
        raise CHMv2Error(
            "sigma=None measures the error of the difference, which includes the correlation",
            fix="leave error_correlation out, or pass the error of one date, such as sigma=4.0",
        )
    mask = None if stable is None else read_mask(stable, first)
    errors = measure_errors([(first, second)], mask)
    if errors.computed:
        require_scatter(errors)
    return errors


def _refuse_stable(stable: xr.DataArray | None) -> None:
    if stable is not None:
        raise CHMv2Error(
            "stable= is used for sigma=None only", fix="leave out either stable= or sigma="
        )


def _derive(
    change: xr.DataArray, error: Any, confidence: float, errors: ErrorModel | None
) -> xr.Dataset:
    """Return change, level of detection, score, probability and significance."""
    dtype, known = change.dtype, change.notnull()
    error = (xr.ones_like(change) * error).where(known & (error > 0)).astype(dtype)
    if errors is None:
        detection = error * dtype.type(ndtri(0.5 + confidence / 2))
    else:
        detection = (error * xr.DataArray(errors.quantile(confidence))).astype(dtype)
    score = change / error
    chance = (
        xr.apply_ufunc(
            _two_sided, score, dask="parallelized", keep_attrs=True, output_dtypes=[dtype]
        )
        if errors is None
        else errors.p_value(score)
    )
    words = "change of canopy height"
    layers: dict[str, tuple[xr.DataArray, dict[str, Any]]] = {
        "height_change": (change, {"long_name": words, "units": "m"}),
        "level_of_detection": (
            detection,
            {
                "long_name": f"least {words} that is significant",
                "units": "m",
                "confidence": confidence,
            },
        ),
        "z_score": (score, {"long_name": f"{words} over its standard error", "units": "1"}),
        "p_value": (
            chance,
            {"long_name": "probability of such a change by error alone", "units": "1"},
        ),
        "significant": (
            abs(change) > detection,
            {"long_name": f"{words} beyond the level of detection", "confidence": confidence},
        ),
    }
    return xr.Dataset(
        {name: label_quantity(layer, name, attrs) for name, (layer, attrs) in layers.items()}
    )


def _two_sided(score: Any) -> Any:
    return erfc(np.abs(score) / np.sqrt(score.dtype.type(2))).astype(score.dtype)


def _attrs(
    first: xr.DataArray,
    second: xr.DataArray,
    said: list[str],
    confidence: float,
    length: float | None,
) -> dict[str, Any]:
    """Return the metadata of a comparison."""
    dates = {"before": date_of(first), "after": date_of(second)}
    attrs: dict[str, Any] = {
        name: str(np.datetime_as_string(date, "s"))
        for name, date in dates.items()
        if date is not None
    }
    attrs["confidence"] = confidence
    if length is not None:
        attrs["correlation_length"] = float(length)
    attrs["comparison_warnings"] = "; ".join(said)
    return attrs


#: Layer of :func:`xchmv2.predict.predict` that holds the error of each pixel.
_BIN_SPREAD = "bin_spread"

_Sigma = float | xr.DataArray | str | Sequence[float | xr.DataArray] | None


def _read_sigmas(
    sigma: Any, before: Raster, after: Raster, like: xr.DataArray
) -> tuple[xr.DataArray | float, xr.DataArray | float]:
    """Return the errors of the two dates."""
    if isinstance(sigma, str):
        if sigma != _BIN_SPREAD:
            raise CHMv2Error(
                f"sigma as a number, a DataArray or {_BIN_SPREAD!r}", repr(sigma), "pass sigma=4.0"
            )
        return _one_sigma(read_bin_spread(before), like), _one_sigma(read_bin_spread(after), like)
    if isinstance(sigma, Sequence):
        if len(sigma) != 2:
            raise CHMv2Error(
                "one sigma, or one for each date", f"{len(sigma)}", "pass sigma=(4.0, 5.0)"
            )
        return _one_sigma(sigma[0], like), _one_sigma(sigma[1], like)
    both = _one_sigma(sigma, like)
    return both, both


def read_bin_spread(height: Raster) -> xr.DataArray:
    """Return the error of each pixel that the model gave [m]."""
    if isinstance(height, xr.Dataset) and _BIN_SPREAD in height.data_vars:
        return height[_BIN_SPREAD]
    raise CHMv2Error(
        f"a Dataset with {_BIN_SPREAD!r}",
        name_contents(height),
        f"predict it: imagery.chmv2.predict(layers=('height', {_BIN_SPREAD!r}))",
    )


def _one_sigma(sigma: Any, like: xr.DataArray) -> xr.DataArray | float:
    """Check the error of one date."""
    if not isinstance(sigma, xr.DataArray):
        if not isinstance(sigma, Real):
            raise CHMv2Error("sigma as a number or a DataArray", show(sigma), "pass sigma=4.0")
        validate_number("sigma", sigma, 4.0, above=0, unit="m")
        return float(sigma)
    if sigma.ndim == 0:
        return _one_sigma(float(sigma), like)
    plane = require_plane(read_numbers(sigma), "sigma")
    plane = on_same_grid(plane, like).transpose(*like.dims)
    if plane.chunks is None and bool((plane <= 0).any()):
        raise _not_positive(f"a least value of {float(plane.min()):g}")
    if plane.chunks is None and not bool((plane > 0).any()):
        raise _not_positive("NaN everywhere")
    return plane.where(plane > 0).drop_vars(
        [name for name in plane.coords if name not in like.dims]
    )


def _not_positive(found: str) -> CHMv2Error:
    return CHMv2Error("a sigma above 0 m", found, "pass sigma=4.0")


def _combine(sigmas: tuple[Any, Any], correlation: float) -> Any:
    """Return the error of the difference of two dates."""
    first, second = sigmas
    variance = first**2 + second**2 - 2 * correlation * first * second
    return np.sqrt(variance)
