"""Bias correction of heights by a line fitted to a raster of reference heights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from scipy import optimize

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.raster import read_heights, validate_plane
from xchmv2.validation.matching import place_reference

#: Fewest reference heights that a line is fitted to.
_FEWEST = 10
#: A residual beyond this many robust standard deviations counts less and less.
_HUBER = 1.345
# Median absolute deviation to standard deviation of a normal distribution.
_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Calibration:
    """A line from predicted to reference heights, and the calibration of the predicted spread.

    Parameters
    ----------
    slope : float
        Reference metres per predicted metre.
    offset : float
        Reference height where the prediction is 0 [m].
    count : int
        Reference heights used.
    mae_before, mae_after : float
        Mean absolute error on them before and after the correction [m].
    coverage : float
        Share of reference heights within one ``bin_spread`` of the corrected height; 0.683 if that
        is one standard deviation of a normal distribution. NaN without ``bin_spread``.
    spread_factor : float
        Factor by which ``bin_spread`` becomes one standard deviation; NaN without it.
    """

    slope: float
    offset: float
    count: int
    mae_before: float
    mae_after: float
    coverage: float
    spread_factor: float

    def apply(self, height: xr.DataArray) -> xr.DataArray:
        """Correct heights, lazily where they are lazy.

        Parameters
        ----------
        height : DataArray
            Predicted heights [m].

        Returns
        -------
        DataArray
            Corrected heights [m], not below 0, with the correction in its attrs.
        """
        height = read_heights(height)
        corrected = (height * self.slope + self.offset).clip(min=0).astype(height.dtype)
        return corrected.rename(height.name).assign_attrs(
            {
                **height.attrs,
                "calibration_slope": self.slope,
                "calibration_offset": self.offset,
                "calibration_count": self.count,
            }
        )


def calibrate(
    height: xr.DataArray | xr.Dataset, reference: xr.DataArray
) -> tuple[xr.DataArray | xr.Dataset, Calibration]:
    """Correct the bias of predicted heights by reference heights.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy height (y, x) [m]; or a Dataset of ``canopy_height`` and ``bin_spread``.
    reference : DataArray
        (y, x) reference heights [m] on any grid, NaN or nodata where there is none.

    Returns
    -------
    corrected : DataArray or Dataset
        Lazy where the heights are, with the correction in attrs; ``bin_spread`` is multiplied by
        ``spread_factor``.
    calibration : Calibration
        The correction and the errors before and after it.

    Raises
    ------
    ImageryError
        If the reference is points instead of a raster, fewer than 10 reference heights fall on
        predicted ones, or the latter do not vary.
    CHMv2Error
        If reference heights lie outside 0 to 120 m, or only one of heights and reference has a CRS.

    Notes
    -----
    A line is fitted by Huber's loss, so single wrong references do not pull it. Heights under the
    references are computed; the correction of the rest stays lazy.

    Points are refused. The height of a GEDI footprint, such as RH98, is near the highest of its
    hundreds of pixels, so a single pixel under it is lower by metres even where all heights are
    right. :func:`xchmv2.validation.validate` compares footprints with all of their pixels.

    References
    ----------
    Huber 1964, Robust Estimation of a Location Parameter.
    """
    _validate_reference(reference)
    values, spread = _split(height)
    known, predicted, deviation = _matched(values, spread, reference)
    slope, offset = _fit(predicted, known)
    residual = known - np.clip(slope * predicted + offset, 0, None)
    coverage, factor = _coverage(residual, deviation)
    found = Calibration(
        slope=slope,
        offset=offset,
        count=known.size,
        mae_before=float(np.abs(known - predicted).mean()),
        mae_after=float(np.abs(residual).mean()),
        coverage=coverage,
        spread_factor=factor,
    )
    corrected = found.apply(values)
    if not isinstance(height, xr.Dataset):
        return corrected, found
    height = height.assign(canopy_height=corrected)
    if spread is None:
        return height, found
    scaled = (spread * factor).astype(spread.dtype)
    scaled = scaled.assign_attrs(spread.attrs, spread_factor=factor)
    return height.assign(bin_spread=scaled), found


def _validate_reference(reference: xr.DataArray) -> None:
    """Refuse points: the height of a footprint is not the height of one of its pixels."""
    if isinstance(reference, pd.DataFrame) or reference.ndim == 1:
        raise ImageryError(
            "a raster of reference heights (y, x)",
            "points, whose heights describe footprints of many pixels and cannot be compared with "
            "single ones",
            "pass a raster, such as lidar, or compare points: height.chmv2.validate(points)",
        )


def _split(height: xr.DataArray | xr.Dataset) -> tuple[xr.DataArray, xr.DataArray | None]:
    if isinstance(height, xr.DataArray):
        return read_heights(height), None
    if "canopy_height" not in height:
        raise CHMv2Error(
            "a Dataset with canopy_height",
            f"{list(height.data_vars)}",
            "predict it too: imagery.chmv2.predict(layers=('height', 'bin_spread'))",
        )
    return read_heights(height), height.get("bin_spread")


def _matched(
    height: xr.DataArray, spread: xr.DataArray | None, reference: xr.DataArray
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Match reference, predicted height and spread where both are known, float64 (N,)."""
    grid = validate_plane(height, "heights of one date", error=ImageryError)
    layers = [array.transpose(*grid.dims) for array in (height, spread) if array is not None]
    heights, where = place_reference(reference, grid)
    picked = [array.isel(where) for array in layers]
    # Together, because one run of the network gives height and spread.
    predicted, *deviation = dask.compute(*(array.data for array in picked))
    usable = np.isfinite(heights) & np.isfinite(predicted)
    if usable.sum() < _FEWEST:
        raise ImageryError(
            f"at least {_FEWEST} reference heights on predicted ones",
            f"{int(usable.sum())}",
            "pass more reference heights inside the predicted area, in its CRS",
        )
    if np.ptp(predicted[usable]) == 0:
        raise ImageryError(
            "the predicted heights under the reference are all equal, so no line can be fitted",
            fix="pass a reference over taller and lower canopy",
        )
    found = [array[usable].astype(np.float64) for array in (heights, predicted, *deviation)]
    return found[0], found[1], found[2] if deviation else None


def _fit(predicted: npt.NDArray[Any], known: npt.NDArray[Any]) -> tuple[float, float]:
    """Slope and offset by Huber's loss, scaled by the residuals' own spread."""
    start = np.polyfit(predicted, known, 1)
    residual = known - np.polyval(start, predicted)
    scale = _MAD_TO_SIGMA * float(np.median(np.abs(residual - np.median(residual))))
    found = optimize.least_squares(
        lambda line: line[0] * predicted + line[1] - known,
        start,
        loss="huber",
        f_scale=max(_HUBER * scale, 1e-6),
    )
    return float(found.x[0]), float(found.x[1])


def _coverage(
    residual: npt.NDArray[Any], deviation: npt.NDArray[Any] | None
) -> tuple[float, float]:
    """Share of residuals within one spread, and the factor that would make it 68.3 %."""
    if deviation is None:
        return float("nan"), float("nan")
    ratio = np.abs(residual) / np.maximum(deviation, 1e-6)
    return float((ratio <= 1).mean()), float(np.quantile(ratio, 0.6827))
