"""Scores of heights against reference heights, on plain arrays.

Unless stated otherwise, values are finite float64, and a score is NaN where it is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_Floats = npt.NDArray[np.float64]

#: Edges of height classes [m]; the last is the paper's "above 30 m".
CLASSES = (0.0, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, np.inf)
# Sum of the weights of a Sobel kernel: divided by it, a slope of 1 m per pixel has gradient 1.
_SOBEL = 8.0


def mae(found: _Floats, true: _Floats) -> float:
    """Return the mean absolute error."""
    return float(np.abs(found - true).mean()) if true.size else float("nan")


def rmse(found: _Floats, true: _Floats) -> float:
    """Return the root mean squared error."""
    return float(np.sqrt(((found - true) ** 2).mean())) if true.size else float("nan")


def bias(found: _Floats, true: _Floats) -> float:
    """Return the mean error, found minus true."""
    return float((found - true).mean()) if true.size else float("nan")


def r2(found: _Floats, true: _Floats) -> float:
    """Return the coefficient of determination: the explained share of the true variance.

    NaN for fewer than two values, or if all true values are equal.
    """
    if true.size < 2 or np.ptp(true) == 0:
        return float("nan")
    return float(1 - ((found - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())


def overlap(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """Return intersection over union of two masks; NaN if both are empty."""
    either = int((found | true).sum())
    return int((found & true).sum()) / either if either else float("nan")


def block_means(heights: npt.NDArray[np.floating], block: int) -> _Floats:
    """Return the means of whole square blocks: (..., H, W) -> (..., H // block, W // block).

    NaN is left out; the mean is NaN where less than half of a block is valid.
    """
    cut, enough = _as_blocks(heights, block)
    found = np.full(enough.shape, np.nan)
    found[enough] = np.nanmean(cut[enough], axis=-1)
    return found


def block_percentiles(
    heights: npt.NDArray[np.floating], block: int, percentiles: Sequence[float]
) -> _Floats:
    """Return percentiles, 0 to 100, of whole blocks: (percentiles, H // block, W // block).

    By numpy's linear interpolation without NaN; NaN where less than half of a block is valid.
    """
    cut, enough = _as_blocks(heights, block)
    found = np.full((len(percentiles), *enough.shape), np.nan)
    if enough.any():
        found[:, enough] = np.nanpercentile(cut[enough], percentiles, axis=-1)
    return found


def _as_blocks(
    heights: npt.NDArray[np.floating], block: int
) -> tuple[_Floats, npt.NDArray[np.bool_]]:
    """Return pixels by whole block (..., H // block, W // block, N), and if half are valid."""
    *rest, height, width = heights.shape
    rows, cols = height // block, width // block
    whole = heights[..., : rows * block, : cols * block].astype(np.float64)
    whole = whole.reshape(*rest, rows, block, cols, block)
    cut = np.moveaxis(whole, -2, -3).reshape(*rest, rows, cols, block * block)
    return cut, np.isfinite(cut).sum(axis=-1) * 2 >= block**2


def edge_error(found: npt.NDArray[np.floating], true: npt.NDArray[np.floating]) -> float:
    """Return the mean absolute difference of Sobel gradients [m per pixel].

    NaN in either is left out of both; the result is NaN without 3 x 3 valid pixels.

    References
    ----------
    CHMv2, arXiv 2603.06382, section 4, defines the difference between the Sobel gradients of truth
    and prediction, without a scale; here the kernels are divided by the sum of their weights.
    """
    both = np.isfinite(found) & np.isfinite(true)
    steep = [_gradients(np.where(both, heights, np.nan)) for heights in (found, true)]
    known = np.isfinite(steep[0])
    return mae(steep[0][known], steep[1][known])


def _gradients(heights: npt.NDArray[np.floating]) -> _Floats:
    """Return Sobel gradients [m per pixel], NaN at the edges and beside missing heights."""
    found = np.full(heights.shape, np.nan)
    if min(heights.shape) < 3:
        return found
    plane = heights.astype(np.float64)
    steep = np.hypot(*(ndimage.sobel(np.nan_to_num(plane), axis) / _SOBEL for axis in (0, 1)))
    known = ndimage.binary_erosion(np.isfinite(plane), np.ones((3, 3)))
    found[known] = steep[known]
    return found


def by_class(
    found: _Floats, true: _Floats, edges: Sequence[float] = CLASSES
) -> list[tuple[int, float, float]]:
    """Return count, MAE and bias [m] of each class of true height; it includes its lower edge."""
    rows = []
    for low, high in pairwise(edges):
        inside = (true >= low) & (true < high)
        chosen = found[inside], true[inside]
        rows.append((int(inside.sum()), mae(*chosen), bias(*chosen)))
    return rows


def class_names(edges: Sequence[float] = CLASSES) -> list[str]:
    """Name height classes, such as "5 to 10 m" and "above 30 m"."""
    return [
        f"{low:g} to {high:g} m" if np.isfinite(high) else f"above {low:g} m"
        for low, high in pairwise(edges)
    ]
