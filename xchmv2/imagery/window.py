"""From source pixels to what the network may see: one window, by one rule, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.imagery.resampling import AxisMap, resample, resample_valid
from xchmv2.imagery.values import ValidPixels


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

    def source_span(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """Source pixels that target pixels ``[start, stop)`` depend on, along y (0) or x (1)."""
        along, erode = self._axes[axis], self.valid_pixels.erode
        first, last = along.source_range(start, stop)
        return max(first - erode, 0), min(last + erode, along.source_size)

    def __call__(
        self,
        bands: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_] | None,
        target: tuple[tuple[int, int], tuple[int, int]],
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Prepare one window.

        Parameters
        ----------
        bands : numpy.ndarray
            (3, H, W) source values over ``source_span`` of both axes.
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
        y, x = self._inside(target)
        bands, valid = bands[:, y, x], valid[y, x]
        if self.is_identity:
            return bands, valid
        return resample(bands, valid, self._axes, target)

    def valid(
        self,
        bands: Sequence[npt.NDArray[Any]],
        mask: npt.NDArray[np.bool_] | None,
        target: tuple[tuple[int, int], tuple[int, int]],
    ) -> npt.NDArray[np.bool_]:
        """Tell the (h, w) valid pixels of a window alone; the parameters are those of a call."""
        valid = self.valid_pixels(bands, mask)[self._inside(target)]
        return valid if self.is_identity else resample_valid(valid, self._axes, target)

    @property
    def is_identity(self) -> bool:
        """Whether target pixels are source pixels."""
        return self.rows.is_identity and self.cols.is_identity

    def _inside(self, target: tuple[tuple[int, int], tuple[int, int]]) -> tuple[slice, slice]:
        """Where the window lies in what was read for it."""
        y, x = (self._without_margin(axis, span) for axis, span in enumerate(target))
        return y, x

    @property
    def _axes(self) -> tuple[AxisMap, AxisMap]:
        return self.rows, self.cols

    def _without_margin(self, axis: int, span: tuple[int, int]) -> slice:
        """Cut off what was read for erosion alone."""
        first, last = self._axes[axis].source_range(*span)
        read_from, _ = self.source_span(axis, *span)
        return slice(first - read_from, last - read_from)
