"""Resampling of windows: area average down, bilinear up, valid where half the area is.

It is separable and each target pixel depends on the source pixels under it alone, so any window
gives the same pixels as the whole image would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

# Overlaps below this share of a source pixel are rounding of coordinates.
_SLIVER = 1e-6


@dataclass(frozen=True)
class AxisMap:
    """How the pixels of a target grid lie along one axis of the source.

    Target pixel ``t`` spans ``[t * ratio + offset, (t + 1) * ratio + offset)`` in source pixels.

    Parameters
    ----------
    source_size, size : int
        Pixels of the source and of the target.
    ratio : float
        Size of a target pixel in source pixels.
    offset : float
        Where the target begins, in source pixels.
    """

    source_size: int
    size: int
    ratio: float = 1.0
    offset: float = 0.0

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        """Map an axis onto itself."""
        return cls(size, size)

    @property
    def is_identity(self) -> bool:
        """Whether target pixels are source pixels, so that nothing need be resampled."""
        return self.ratio == 1 and self.offset == 0 and self.size == self.source_size

    def source_range(self, start: int, stop: int) -> tuple[int, int]:
        """Source pixels that the target pixels ``[start, stop)`` depend on."""
        if self.is_identity:
            return start, stop
        margin = 0 if self.ratio > 1 else 1  # bilinear looks at the next pixel
        first = math.floor(start * self.ratio + self.offset) - margin
        last = math.ceil(stop * self.ratio + self.offset) + margin
        return max(first, 0), min(last, self.source_size)


def resample(
    bands: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    axes: tuple[AxisMap, AxisMap],
    target: tuple[tuple[int, int], tuple[int, int]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Resample a window of imagery.

    Parameters
    ----------
    bands : numpy.ndarray
        (3, H, W) source values over ``axes[i].source_range(*target[i])``.
    valid : numpy.ndarray of bool
        (H, W) valid source pixels; the others have no influence on the colours.
    axes : tuple of AxisMap
        Vertical and horizontal map.
    target : tuple of (start, stop)
        Target pixels wanted along each axis.

    Returns
    -------
    bands : numpy.ndarray
        (3, h, w) float32.
    valid : numpy.ndarray of bool
        (h, w), true where at least half of the pixel's source area is valid.
    """
    area, colour = _weights(axes, target)
    weight = valid.astype(np.float32)
    seen = _apply(colour, weight)
    divisor = np.where(seen > 0, seen, 1)
    values = [_apply(colour, np.where(valid, band, 0).astype(np.float32)) for band in bands]
    return np.stack([value / divisor for value in values]), _half_valid(area, weight) & (seen > 0)


def resample_valid(
    valid: npt.NDArray[np.bool_],
    axes: tuple[AxisMap, AxisMap],
    target: tuple[tuple[int, int], tuple[int, int]],
) -> npt.NDArray[np.bool_]:
    """Tell which pixels of a resampled window are valid, as :func:`resample` does.

    Parameters
    ----------
    valid : numpy.ndarray of bool
        (H, W) valid source pixels.
    axes, target : tuple
        As of :func:`resample`.

    Returns
    -------
    numpy.ndarray of bool
        (h, w).
    """
    area, colour = _weights(axes, target)
    weight = valid.astype(np.float32)
    return _half_valid(area, weight) & (_apply(colour, weight) > 0)


def _weights(
    axes: tuple[AxisMap, AxisMap], target: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[list[sparse.csr_array], list[sparse.csr_array]]:
    """Weights of both axes, of area for validity and of colour for values."""
    spans = [(axis, *t, axis.source_range(*t)) for axis, t in zip(axes, target, strict=True)]
    area = [_area_weights(*span) for span in spans]
    return area, [_area_weights(*s) if s[0].ratio > 1 else _bilinear_weights(*s) for s in spans]


def _half_valid(
    area: list[sparse.csr_array], weight: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    whole = area[0].sum(axis=1)[:, None] * area[1].sum(axis=1)[None, :]
    enough: npt.NDArray[np.bool_] = _apply(area, weight) >= (0.5 - _SLIVER) * whole
    return enough


def _apply(
    weights: list[sparse.csr_array], values: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Weigh rows, then columns: (H, W) -> (h, w)."""
    rows, cols = weights
    result: npt.NDArray[np.float32] = (cols @ (rows @ values).T).T
    return result


@lru_cache(maxsize=1024)
def _area_weights(
    axis: AxisMap, start: int, stop: int, source: tuple[int, int]
) -> sparse.csr_array:
    """Length of source pixel j inside target pixel i, as a sparse (target, source) matrix."""
    edges = np.arange(start, stop + 1) * axis.ratio + axis.offset
    edges = np.clip(edges, 0, axis.source_size)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.floor(low) + np.arange(math.ceil(axis.ratio) + 1)
    length = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
    return _matrix(pixel, np.where(length > _SLIVER, length, 0), source)


@lru_cache(maxsize=1024)
def _bilinear_weights(
    axis: AxisMap, start: int, stop: int, source: tuple[int, int]
) -> sparse.csr_array:
    """Weights of the two source pixels around each target centre, clamped at the edges."""
    centre = (np.arange(start, stop) + 0.5) * axis.ratio + axis.offset - 0.5
    below = np.floor(centre)
    share = centre - below
    pixel = np.clip(np.stack([below, below + 1], axis=1), 0, axis.source_size - 1)
    return _matrix(pixel, np.stack([1 - share, share], axis=1), source)


def _matrix(
    pixel: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], source: tuple[int, int]
) -> sparse.csr_array:
    rows = np.broadcast_to(np.arange(len(pixel))[:, None], pixel.shape)
    keep = weight > 0
    entries = (weight[keep].astype(np.float32), (rows[keep], pixel[keep].astype(int) - source[0]))
    return sparse.csr_array(entries, shape=(len(pixel), source[1] - source[0]))
