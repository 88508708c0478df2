"""From heights of several dates to their change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from xchmv2.accessor.held import Held, T

if TYPE_CHECKING:
    from xchmv2.change.sigmas import Sigma


class DateMethods(Held[T]):
    """Methods of heights (time, y, x), or a Dataset with ``canopy_height``."""

    def align(
        self,
        to: Any = None,
        *,
        max_shift: float = 24.0,
        window: int = 128,
        windows: int = 36,
        apply: bool = True,
    ) -> xr.DataArray | xr.Dataset:
        """Bring dates into register; see :func:`xchmv2.change.align`."""
        from xchmv2.change import align

        return align(
            self._obj, to, max_shift=max_shift, window=window, windows=windows, apply=apply
        )

    def stable_bias(
        self, stable: xr.DataArray | None = None, *, to: Any = None, apply: bool = True
    ) -> xr.DataArray | xr.Dataset:
        """Take out what dates differ by on stable ground; see :func:`xchmv2.change.stable_bias`."""
        from xchmv2.change import stable_bias

        return stable_bias(self._obj, stable, to=to, apply=apply)

    def difference(
        self,
        first: Any,
        second: Any,
        *,
        sigma: Sigma = None,
        confidence: float = 0.95,
        correlation_length: float | None = None,
        error_correlation: float = 0.0,
        stable: xr.DataArray | None = None,
    ) -> xr.Dataset:
        """Subtract two dates, with their error; see :func:`xchmv2.change.difference_between`."""
        from xchmv2.change import difference_between

        return difference_between(
            self._obj,
            first,
            second,
            sigma=sigma,
            confidence=confidence,
            correlation_length=correlation_length,
            error_correlation=error_correlation,
            stable=stable,
        )

    def events(self, *, threshold: float = 5.0) -> xr.Dataset:
        """Find the largest loss of each pixel; see :func:`xchmv2.change.events`."""
        from xchmv2.change import events

        return events(self._obj, threshold=threshold)

    def trend(self, min_obs: int = 3, *, confidence: float = 0.95) -> xr.Dataset:
        """Fit the trend of each pixel; see :func:`xchmv2.change.trend`."""
        from xchmv2.change import trend

        return trend(self._obj, min_obs, confidence=confidence)

    def transition(
        self,
        first: Any,
        second: Any,
        classes: Sequence[float],
        *,
        labels: Sequence[str] | None = None,
    ) -> xr.DataArray:
        """Cross-tabulate two dates by height; see :func:`xchmv2.change.transition_between`."""
        from xchmv2.change import transition_between

        return transition_between(self._obj, first, second, classes, labels=labels)
