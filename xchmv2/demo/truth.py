"""Scores of a prediction against the truth: height by date, area of loss between dates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import ndimage

from xchmv2.validation.scores import bias, mae, overlap, r2

#: Drop in height above which a pixel counts as lost [m].
DROP = 5.0
#: Side of the square of the opening that removes smaller losses [px].
OPENING = 3


@dataclass(frozen=True)
class HeightScore:
    """Scores of height on one date: errors are predicted minus true [m].

    `r2`, the coefficient of determination, is NaN if all true heights are equal.
    """

    date: str
    mae: float
    bias: float
    r2: float


@dataclass(frozen=True)
class LossScore:
    """Scores of canopy loss in a period such as "2019 to 2021": areas [ha].

    `overlap` is the intersection over union of the two areas; NaN if both are empty.
    """

    years: str
    true_area: float
    found_area: float
    overlap: float


def score_heights(predicted: xr.DataArray, truth: xr.DataArray) -> list[HeightScore]:
    """Score heights (time, y, x) [m] on each date, where there is a prediction."""
    scores = []
    for k, date in enumerate(predicted["time"].dt.strftime("%Y-%m-%d").values):
        found, true = (a.isel(time=k).values.astype(np.float64) for a in (predicted, truth))
        known = np.isfinite(found) & np.isfinite(true)
        found, true = found[known], true[known]
        scores.append(HeightScore(str(date), mae(found, true), bias(found, true), r2(found, true)))
    return scores


def score_losses(predicted: xr.DataArray, truth: xr.DataArray) -> list[LossScore]:
    """Score the loss between consecutive dates (time, y, x), where both have a prediction."""
    hectares = (
        abs(float(truth["x"][1] - truth["x"][0]) * float(truth["y"][1] - truth["y"][0])) / 1e4
    )
    years = [str(year) for year in predicted["time"].dt.year.values]
    seen = truth.where(predicted.notnull())
    scores = []
    for before, after in pairwise(range(len(years))):
        lost, found = (
            _find_loss(heights.isel(time=before).values, heights.isel(time=after).values)
            for heights in (seen, predicted)
        )
        scores.append(
            LossScore(
                years=f"{years[before]} to {years[after]}",
                true_area=int(lost.sum()) * hectares,
                found_area=int(found.sum()) * hectares,
                overlap=overlap(found, lost),
            )
        )
    return scores


def _find_loss(
    before: npt.NDArray[np.floating], after: npt.NDArray[np.floating]
) -> npt.NDArray[np.bool_]:
    """Find where canopy fell by more than 5 m, cleaned by an opening; not where it is NaN."""
    square = np.ones((OPENING, OPENING), bool)
    opened: npt.NDArray[np.bool_] = ndimage.binary_opening(before - after > DROP, square)
    return opened
