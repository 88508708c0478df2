"""From a change of heights to what was lost and gained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import xarray as xr

from xchmv2.accessor.held import Held, T

if TYPE_CHECKING:
    import geopandas as gpd
    import pandas as pd

    from xchmv2.patches.local import Connectivity


class LossMethods(Held[T]):
    """Methods of a change: from ``difference`` or ``events``, or height change [m] alone."""

    def loss(
        self,
        *,
        threshold: float | None = None,
        opening: int | None = 3,
        min_area: float | None = 200.0,
        mask: xr.DataArray | None = None,
        connectivity: Connectivity = 8,
    ) -> xr.DataArray:
        """Map where canopy was lost; see :func:`xchmv2.change.loss`."""
        from xchmv2.change import loss

        return loss(
            self._obj,
            threshold=threshold,
            opening=opening,
            min_area=min_area,
            mask=mask,
            connectivity=connectivity,
        )

    def gain(
        self,
        *,
        threshold: float | None = None,
        opening: int | None = 3,
        min_area: float | None = 200.0,
        mask: xr.DataArray | None = None,
        connectivity: Connectivity = 8,
    ) -> xr.DataArray:
        """Map where canopy was gained; see :func:`xchmv2.change.gain`."""
        from xchmv2.change import gain

        return gain(
            self._obj,
            threshold=threshold,
            opening=opening,
            min_area=min_area,
            mask=mask,
            connectivity=connectivity,
        )

    def loss_area(
        self,
        *,
        threshold: float = 5.0,
        opening: int | None = 3,
        min_area: float | None = 200.0,
        mask: xr.DataArray | None = None,
        correlation_length: float | None = None,
        confidence: float = 0.95,
    ) -> xr.Dataset:
        """Estimate the area of loss, with its interval; see :func:`xchmv2.change.loss_area`."""
        from xchmv2.change import loss_area

        return loss_area(
            self._obj,
            threshold=threshold,
            opening=opening,
            min_area=min_area,
            mask=mask,
            correlation_length=correlation_length,
            confidence=confidence,
        )

    def correlation_length(self, *, window: int = 256, windows: int = 16) -> float:
        """Measure how far errors are alike; see :func:`xchmv2.change.correlation_length`."""
        from xchmv2.change import correlation_length

        return correlation_length(self._obj, window=window, windows=windows)

    @overload
    def label_events(
        self,
        mask: xr.DataArray,
        *,
        polygons: Literal[False] = False,
        connectivity: Connectivity = 8,
    ) -> tuple[xr.DataArray, pd.DataFrame]: ...

    @overload
    def label_events(
        self, mask: xr.DataArray, *, polygons: Literal[True], connectivity: Connectivity = 8
    ) -> tuple[xr.DataArray, gpd.GeoDataFrame]: ...

    @overload
    def label_events(
        self, mask: xr.DataArray, *, polygons: bool, connectivity: Connectivity = 8
    ) -> tuple[xr.DataArray, pd.DataFrame | gpd.GeoDataFrame]: ...

    def label_events(
        self, mask: xr.DataArray, *, polygons: bool = False, connectivity: Connectivity = 8
    ) -> tuple[xr.DataArray, Any]:
        """Measure each patch of a mask of loss or gain; see :func:`xchmv2.change.label_events`."""
        from xchmv2.change import label_events

        return label_events(mask, self._obj, polygons=polygons, connectivity=connectivity)
