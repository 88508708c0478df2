"""From heights to numbers at places: under polygons, and against a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import xarray as xr

from xchmv2.accessor.held import Held, T


class PlaceMethods(Held[T]):
    """Methods of heights, or a Dataset with ``canopy_height``; ``zonal`` also of a change."""

    def zonal(
        self,
        polygons: Any,
        *,
        stats: str | Sequence[str] | None = None,
        threshold: float | None = None,
        sigma: float | xr.DataArray | None = None,
        correlation_length: float | None = None,
    ) -> xr.Dataset:
        """Sum up heights or changes under polygons; see :func:`xchmv2.zonal.zonal`."""
        from xchmv2.zonal import zonal

        return zonal(
            self._obj,
            polygons,
            stats=stats,
            threshold=threshold,
            sigma=sigma,
            correlation_length=correlation_length,
        )

    def validate(
        self,
        reference: Any,
        *,
        block: int = 50,
        classes: Sequence[float] = (0.0, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, math.inf),
        percentiles: Sequence[float] = (5.0, 25.0, 50.0, 75.0, 95.0),
        column: str | None = None,
        radius: float = 12.0,
        percentile: float = 98.0,
    ) -> xr.Dataset:
        """Hold heights against lidar or GEDI; see :func:`xchmv2.validation.validate`."""
        from xchmv2.validation import validate

        return validate(
            self._obj,
            reference,
            block=block,
            classes=classes,
            percentiles=percentiles,
            column=column,
            radius=radius,
            percentile=percentile,
        )
