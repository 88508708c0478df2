"""From source pixels to what the network may see: one window, by one rule, wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.imagery.resampling import AxisMap, resample
from xchmv2.imagery.values import ValidPixels

#: (start, stop) along the vertical and the horizontal axis.
Span2D = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class WindowReader:
    """Turns source pixels into a window of the target grid.

    Parameters
    ----------
    valid_pixels : ValidPixels
        The rule for validity.
    rows, cols : AxisMap
        How target pixels lie in source pixels.
    """

    valid_pixels: ValidPixels
    rows: AxisMap
    cols: AxisMap

    def source_span(self, target: Span2D) -> Span2D:
        """Source pixels that a window of the target grid depends on, along both axes."""
        erode = self.valid_pixels.erode
        rows, cols = (
            (max(first - erode, 0), min(last + erode, axis.source_size))
            for axis, (first, last) in self._spans(target)
        )
        return rows, cols

    def __call__(
        self,
        bands: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_] | None,
        target: Span2D,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Prepare one window.

        Parameters
        ----------
        bands : numpy.ndarray
            (3, H, W) source values over ``source_span(target)``.
        mask : numpy.ndarray of bool or None
            (H, W) pixels the user declares valid.
        target : tuple of (start, stop)
            The window, in target pixels.

        Returns
        -------
        bands : numpy.ndarray
            (3, h, w) values, float32 where resampled, else in the source's dtype.
        valid : numpy.ndarray of bool
            (h, w).
        """
        valid = self.valid_pixels(list(bands), mask)
        read = self.source_span(target)
        y, x = (
            slice(first - got[0], last - got[0])
            for (_, (first, last)), got in zip(self._spans(target), read, strict=True)
        )
        bands, valid = bands[:, y, x], valid[y, x]
        if self.rows.is_identity and self.cols.is_identity:
            return bands, valid
        return resample(bands, valid, (self.rows, self.cols), target)

    def _spans(self, target: Span2D) -> list[tuple[AxisMap, tuple[int, int]]]:
        axes = zip((self.rows, self.cols), target, strict=True)
        return [(axis, axis.source_range(*span)) for axis, span in axes]
