"""Area and volume of canopy loss with their confidence intervals: :func:`loss_area`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.change.error_models import ErrorModel, errors_of, spread_of
from xchmv2.change.gross_change import (
    CLASSES,
    DIFFERENCES,
    PixelErrors,
    count_differences,
    gross_change,
    own_shape,
    pair_shares,
    read_counts,
)
from xchmv2.change.masks import THRESHOLD, Change, read_left_out
from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    cell_areas,
    has_true_areas,
    name_contents,
    pixel_size,
    read_change,
    validate_number,
)

_Floats = npt.NDArray[np.float64]

#: What is not known about the standard deviation of errors, as a share of it.
_SD_DOUBT = 0.05
#: Beyond this misfit of normal errors, their distribution is estimated from the data.
_MISFIT = 10.0
#: Pixels that are counted at once.
_BAND = 1 << 22


def loss_area(
    change: Change,
    *,
    threshold: float = THRESHOLD,
    mask: xr.DataArray | None = None,
    correlation_length: float | None = None,
    confidence: float = 0.95,
) -> xr.Dataset:
    """Estimate the area and volume that lost more than some height, with confidence intervals.

    Parameters
    ----------
    change : Dataset
        From :func:`~xchmv2.change.difference`.
    threshold : float, default 5
        Least loss that counts [m].
    mask : DataArray, optional
        Boolean on the same grid, True where change is to be left out, as for
        :func:`~xchmv2.change.loss`.
    correlation_length : float, optional
        Distance over which errors are correlated [m], as from
        :func:`~xchmv2.change.correlation_length`, 0 for independent pixels: errors of a single
        range. By default that in `change.attrs`, or the :class:`~xchmv2.change.ErrorModel` that
        the change carries; else the correlation is measured on its unchanged pixels.
    confidence : float, default 0.95
        Confidence of the intervals.

    Returns
    -------
    Dataset
        Scalars ``area``, ``lower``, ``upper`` and ``standard_error`` [m2; without a CRS in the
        coordinates' own units], ``volume``, ``volume_lower``, ``volume_upper`` and
        ``volume_standard_error`` [m3] of the canopy that these pixels lost, and ``misfit``. Lazy if
        the change is; the same for any chunks. NaN where no pixel has a change and its level
        of detection.

    Raises
    ------
    CHMv2Error
        If it is not the Dataset of ``difference``, `mask` is not boolean or on another grid, or a
        number is out of range.

    Notes
    -----
    The number does not come from a mask such as that of :func:`~xchmv2.change.loss`, so it depends
    neither on the level of detection nor on opening or a least patch: pixels are counted by their
    change and its error, and that distribution of true change is found which, with the errors
    added, gives these counts (non-negative least squares). The errors' expected share of
    false losses is removed by that, and true losses that errors hide are added. The interval
    holds all areas that the counts do not contradict, 0 included; it runs over all losses of
    `threshold` and more, however small their patches. The standard error is its half width over z.
    :func:`~xchmv2.change.gross_change.gross_change` gives the formulas.

    The standard deviation of each error is that behind its level of detection, known to 5 %; errors
    are normal, and correlated as the error model says. If the counts contradict normal errors
    (their mean square deviation is above 10 standard errors squared), the distribution of the
    errors is taken from the quieter of the sides of loss and gain, and intervals are twice as wide.
    ``misfit`` is that mean square in the end. Where it is far above 1, the errors are not what the
    change says, or loss and gain both reach into their tails: intervals are then widened by its
    square root, but trust them less.

    An offset between the dates must have been removed before. The interval covers neither
    errors that both dates share, nor whether a drop of canopy is a loss.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0, correlation_length=5.0)
    >>> found = change.chmv2.loss_area(threshold=10.0)
    >>> hectares = [float(found[name]) / 1e4 for name in ("lower", "area", "upper")]
    """
    change = _require_difference(change)
    _validate(confidence, threshold, correlation_length)
    errors = (
        errors_of(change)
        if correlation_length is None
        else ErrorModel.of_one_range(correlation_length)
    )
    drop, sd = read_change(change), spread_of(change)
    assert sd is not None
    layers = [drop, sd, cell_areas(drop) / math.prod(pixel_size(drop))]
    if mask is not None:
        layers.append(read_left_out(mask, drop))
    counts = _count([layer.transpose(*drop.dims) for layer in layers])
    finish = partial(
        _finish,
        shape=(drop.shape[0], drop.shape[1]),
        cell=pixel_size(drop),
        threshold=float(threshold),
        confidence=confidence,
    )
    if isinstance(counts, np.ndarray):
        found = finish(counts, errors.compute())
    else:
        found = _delay(finish, counts, errors)
    attrs = {"threshold": float(threshold), "confidence": confidence}
    return _label(found, has_true_areas(drop)).assign_attrs(attrs)


def _count(layers: list[xr.DataArray]) -> Any:
    """Count pixels by their error and change: (CLASSES, bins + 2), lazily if any layer is lazy."""
    parts = [layer.data for layer in layers]
    if not any(isinstance(part, da.Array) for part in parts):
        return _count_block(*parts)
    chunks = next(part.chunks for part in parts if isinstance(part, da.Array))
    lazy = [
        part.rechunk(chunks) if isinstance(part, da.Array) else da.from_array(part, chunks=chunks)
        for part in parts
    ]
    size = (CLASSES, len(DIFFERENCES) + 2)
    return da.map_blocks(
        _count_one,
        *lazy,
        chunks=(*((1,) * n for n in lazy[0].numblocks), *((n,) for n in size)),
        new_axis=(2, 3),
        dtype=np.int64,
        meta=np.empty((0, 0, 0, 0), np.int64),
    ).sum(axis=(0, 1), split_every=4)


def _count_one(*parts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return _count_block(*parts)[None, None]


def _count_block(
    change: npt.NDArray[Any],
    sd: npt.NDArray[Any],
    areas: _Floats,
    left_out: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    """Count the pixels of a block, some rows at a time."""
    found = np.zeros((CLASSES, len(DIFFERENCES) + 2), np.int64)
    rows = max(1, _BAND // max(1, change.shape[1]))
    for top in range(0, len(change), rows):
        band = slice(top, top + rows)
        kept = change[band] if left_out is None else np.where(left_out[band], np.nan, change[band])
        found += count_differences(kept, sd[band], areas[band])
    return found


def _delay(finish: Callable[..., _Floats], counts: da.Array, errors: ErrorModel) -> da.Array:
    known = dask.delayed(errors.with_numbers, pure=True)(*errors.numbers)
    found = dask.delayed(finish, pure=True)(counts, known)
    return da.from_delayed(found, (len(_FOUND),), np.float64)


def _finish(
    table: npt.NDArray[np.int64],
    errors: ErrorModel,
    shape: tuple[int, int],
    cell: tuple[float, float],
    threshold: float,
    confidence: float,
) -> _Floats:
    """Return the values of `_FOUND` from the counts of all blocks."""
    sd, counts, pixels = read_counts(table)
    if not pixels:
        return np.full(len(_FOUND), np.nan)
    cells = [min(64, size) for size in shape]
    sides = [size * side / n for size, side, n in zip(shape, cell, cells, strict=True)]
    alike = pair_shares(errors.correlation, np.ones(cells), (sides[0], sides[1]), math.prod(cell))
    # The pixels that have a change may lie close together.
    alike = np.minimum(alike * math.prod(shape) / pixels, 1.0)
    known = PixelErrors(sd, pixels, alike, _SD_DOUBT)
    find = partial(gross_change, counts, DIFFERENCES, threshold=threshold, confidence=confidence)
    found = find(known)
    if found.misfit > _MISFIT:
        own = find(replace(known, shape=own_shape(counts, DIFFERENCES, sd)))
        found = min(found, own, key=lambda result: result.misfit)
    area = counts.sum() * math.prod(cell)
    return np.array([*(area * np.array([found.area, found.volume])).ravel(), found.misfit])


#: Results in order: their long names.
_FOUND = {
    "area": "area of loss",
    "standard_error": "standard error of the area of loss",
    "lower": "lower bound of the area of loss",
    "upper": "upper bound of the area of loss",
    "volume": "canopy volume lost where there is loss",
    "volume_standard_error": "standard error of the canopy volume lost",
    "volume_lower": "lower bound of the canopy volume lost",
    "volume_upper": "upper bound of the canopy volume lost",
    "misfit": "mean square deviation of the counts from the best fit, in standard errors",
}


def _label(found: Any, true_areas: bool) -> xr.Dataset:
    variables = {}
    for k, (name, words) in enumerate(_FOUND.items()):
        unit = "1" if name == "misfit" else true_areas and ("m3" if "volume" in name else "m2")
        variables[name] = ((), found[k], {"long_name": words, **({"units": unit} if unit else {})})
    return xr.Dataset(variables)


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


def _validate(confidence: float, threshold: float, length: float | None) -> None:
    validate_number("confidence", confidence, 0.95, above=0, below=1)
    validate_number("threshold", threshold, 5, above=0, unit="m")
    validate_number("correlation_length", length, 20, least=0, unit="m", optional=True)
