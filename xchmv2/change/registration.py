"""The shift between two rasters: phase correlation in windows, by majority."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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

    def _reach(self, shape: tuple[int, ...], corner: tuple[int, int]) -> tuple[slice, ...]:
        return tuple(
            slice(max(0, c - self.margin), min(size, c + self.side + self.margin))
            for c, size in zip(corner, shape, strict=True)
        )


def estimate_shift(
    reference: list[_Floats], moving: list[_Floats], windows: Windows, max_shift: float
) -> Shift:
    """Estimate the shift that most windows agree on.

    Parameters
    ----------
    reference, moving : list of ndarray
        The windows of two rasters with their margins, NaN where missing.
    windows : Windows
        The windows that they were cut by.
    max_shift : float
        Larger shifts along either axis are rejected [px].

    Returns
    -------
    Shift
        All NaN but the counts if no majority of windows agrees.

    Notes
    -----
    First each window is compared in place, by the phase of the spectra alone, which is sharp but
    biased to whole pixels. Then the windows are cut again at the whole-pixel shift most agreed on,
    and the rest is found by plain cross-correlation, which is not. Both use the magnitude of
    the gradient, smoothed by 1.5 px.
    """
    first = _Look(windows, (0, 0), "phase").find(reference, moving)
    coarse = _majority(first, max_shift)
    if not coarse.known:
        return coarse
    offset = (round(coarse.dy), round(coarse.dx))
    second = _Look(windows, offset, None).find(reference, moving)
    return _majority(second, max_shift)


@dataclass(frozen=True)
class _Look:
    """One comparison of all windows, the moving ones cut at an offset of whole pixels."""

    windows: Windows
    offset: tuple[int, int]
    normalization: str | None

    def find(self, reference: list[_Floats], moving: list[_Floats]) -> _Floats:
        """Return the shifts (n, 2) of the windows that can be compared."""
        pairs = zip(reference, moving, strict=True)
        found = [s for r, m in pairs if (s := self._compare(r, m)) is not None]
        return np.array(found).reshape(-1, 2)

    def _compare(self, reference: _Floats, moving: _Floats) -> _Floats | None:
        still, moved = _edges(self._inner(reference, (0, 0))), _edges(self._inner(moving))
        if still is None or moved is None:
            return None
        correlate = _phase_correlation()
        back, _, _ = correlate(
            still, moved, upsample_factor=_UPSAMPLING, normalization=self.normalization
        )
        found: _Floats = np.asarray(self.offset) - back
        return found

    def _inner(self, patch: _Floats, offset: tuple[int, int] | None = None) -> _Floats:
        margin, side = self.windows.margin, self.windows.side
        dy, dx = self.offset if offset is None else offset
        return patch[margin + dy : margin + dy + side, margin + dx : margin + dx + side]


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


@cache
def _phase_correlation() -> Callable[..., Any]:
    require_library("skimage", "estimates the shifts", "change")
    from skimage.registration import phase_cross_correlation

    correlate: Callable[..., Any] = phase_cross_correlation
    return correlate
