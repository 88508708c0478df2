"""The shift between two rasters: phase correlation in windows, by majority."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from xchmv2.errors import require_library

_Floats = npt.NDArray[np.float64]

#: Windows agree if their shifts differ by no more than this [px].
_AGREEMENT = 1.0
#: Least valid share of a window, on both dates, for it to take part.
_LEAST_VALID = 0.75
#: Least share of the windows taking part that makes a majority.
_LEAST_AGREEMENT = 0.25
# Edges look alike in any season; raw values do not. Width of the smoothing before them [px].
_EDGE_WIDTH = 1.5
_UPSAMPLING = 50


@dataclass(frozen=True)
class Shift:
    """Displacement of one raster from another.

    Parameters
    ----------
    dy, dx : float
        Displacement along rows and columns [px]: the content at (r, c) of the reference is
        at (r + dy, c + dx). NaN if no shift was found.
    spread : float
        NMAD of the windows in agreement, the larger of both axes [px].
    agreement : float
        Share of the windows taking part that agree on it.
    windows : int
        Number of windows taking part.
    """

    dy: float
    dx: float
    spread: float
    agreement: float
    windows: int

    @property
    def known(self) -> bool:
        """Whether a shift was found."""
        return bool(np.isfinite(self.dy))


@dataclass(frozen=True)
class Windows:
    """Squares spread evenly over a scene, in which shifts are estimated.

    Parameters
    ----------
    side : int
        Side of a square [px].
    margin : int
        How far beyond it the other raster is read [px].
    corners : tuple of (row, column)
        First pixels of the squares.
    """

    side: int
    margin: int
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def spread_over(cls, shape: tuple[int, int], side: int, most: int, margin: int) -> Windows:
        """Lay at most about `most` windows over a scene, evenly and inside it."""
        side = min(side, *shape)
        longest = max(1, round(math.sqrt(most)))
        rows, cols = (
            np.unique(
                np.linspace(0, size - side, min(longest, -(-size // side))).round().astype(int)
            )
            for size in shape
        )
        return cls(side, margin, tuple((int(r), int(c)) for r in rows for c in cols))

    def cut(self, plane: Any) -> list[Any]:
        """Cut the windows with their margins, where inside the scene; lazily from dask."""
        return [plane[self._reach(plane.shape, corner)] for corner in self.corners]

    def padded(self, patches: list[npt.NDArray[Any]], shape: tuple[int, int]) -> list[_Floats]:
        """Pad patches from :meth:`cut` with NaN where they reach beyond the scene."""
        full = self.side + 2 * self.margin
        padded = []
        for patch, corner in zip(patches, self.corners, strict=True):
            reach = self._reach(shape, corner)
            square = np.full((full, full), np.nan)
            start = [s.start - (c - self.margin) for s, c in zip(reach, corner, strict=True)]
            square[tuple(slice(a, a + n) for a, n in zip(start, patch.shape, strict=True))] = patch
            padded.append(square)
        return padded

    def inner(self, patch: _Floats, offset: tuple[int, int]) -> _Floats:
        """Cut the square from a padded patch, moved by an offset."""
        dy, dx = (self.margin + step for step in offset)
        return patch[dy : dy + self.side, dx : dx + self.side]

    def _reach(self, shape: tuple[int, ...], corner: tuple[int, int]) -> tuple[slice, ...]:
        return tuple(
            slice(max(0, c - self.margin), min(size, c + self.side + self.margin))
            for c, size in zip(corner, shape, strict=True)
        )


def estimate_shift(
    reference: list[_Floats], moving: list[_Floats], windows: Windows, max_shift: float
) -> Shift:
    """Estimate the shift that most windows agree on.

    `reference` and `moving` are the windows of two rasters with their margins, NaN where missing;
    larger shifts than `max_shift` [px] are rejected. All is NaN but the counts without a majority.

    First each window is compared in place, by the phase of the spectra alone, which is sharp but
    biased to whole pixels. Then the windows are cut again at the whole-pixel shift most agreed on,
    and the rest is found by plain cross-correlation, which is not. Both use the magnitude of
    the gradient, smoothed by 1.5 px.
    """
    first = _compare_all(reference, moving, windows, (0, 0), "phase")
    coarse = _majority(first, max_shift)
    if not coarse.known:
        return coarse
    offset = (round(coarse.dy), round(coarse.dx))
    second = _compare_all(reference, moving, windows, offset, None)
    return _majority(second, max_shift)


def _compare_all(
    reference: list[_Floats],
    moving: list[_Floats],
    windows: Windows,
    offset: tuple[int, int],
    normalization: str | None,
) -> _Floats:
    """Return the shifts (n, 2) of the windows that can be compared.

    The moving ones are cut at an offset of whole pixels.
    """
    require_library("skimage", "estimates the shifts", "change")
    from skimage.registration import phase_cross_correlation

    found = []
    for pair in zip(reference, moving, strict=True):
        still, moved = (
            _edges(windows.inner(patch, step))
            for patch, step in zip(pair, ((0, 0), offset), strict=True)
        )
        if still is not None and moved is not None:
            back, _, _ = phase_cross_correlation(
                still, moved, upsample_factor=_UPSAMPLING, normalization=normalization
            )
            found.append(np.asarray(offset) - back)
    return np.array(found).reshape(-1, 2)


def _edges(patch: _Floats) -> _Floats | None:
    """Return the edges in a window, fading out towards its rim; None if there are too few."""
    valid = np.isfinite(patch)
    if valid.mean() < _LEAST_VALID:
        return None
    filled = np.where(valid, patch, np.median(patch[valid]))
    strength = ndimage.gaussian_gradient_magnitude(filled, _EDGE_WIDTH)
    known = ndimage.binary_erosion(valid, iterations=round(2 * _EDGE_WIDTH), border_value=1)
    taper = np.multiply.outer(np.hanning(patch.shape[0]), np.hanning(patch.shape[1])) * known
    total = taper.sum()
    if total == 0 or np.ptp(strength[known]) <= 1e-9 * (1 + np.abs(filled).max()):
        return None
    edges: _Floats = (strength - (strength * taper).sum() / total) * taper
    return edges


def _majority(shifts: _Floats, max_shift: float) -> Shift:
    """Return the shift that most windows agree on."""
    n = len(shifts)
    inside = shifts[(np.abs(shifts) <= max_shift).all(axis=1)]
    apart = np.abs(inside[:, None] - inside[None]).max(axis=-1)  # [k, k]
    votes = (apart <= _AGREEMENT).sum(axis=1)
    if not len(inside) or votes.max() < _LEAST_AGREEMENT * n:
        return Shift(np.nan, np.nan, np.nan, 0.0 if n else np.nan, n)
    agreeing = inside[apart[votes.argmax()] <= _AGREEMENT]
    dy, dx = np.median(agreeing, axis=0)
    spread = 1.4826 * np.median(np.abs(agreeing - (dy, dx)), axis=0).max()
    return Shift(float(dy), float(dx), float(spread), len(agreeing) / n, n)
