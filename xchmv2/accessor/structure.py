"""From heights to the structure of the canopy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import xarray as xr

from xchmv2.accessor.held import Held, T

if TYPE_CHECKING:
    import pandas as pd

    from xchmv2.patches.local import Connectivity


class StructureMethods(Held[T]):
    """Methods of heights, or a Dataset with ``canopy_height``."""

    def canopy_cover(
        self, threshold: float = 5.0, cell: float | None = 30.0, *, min_valid: float = 0.5
    ) -> xr.DataArray:
        """Measure the share under canopy; see :func:`xchmv2.structure.canopy_cover`."""
        from xchmv2.structure import canopy_cover

        return canopy_cover(self._obj, threshold, cell, min_valid=min_valid)

    def gap_fraction(
        self, threshold: float = 10.0, cell: float | None = 30.0, *, min_valid: float = 0.5
    ) -> xr.DataArray:
        """Measure the share under low canopy; see :func:`xchmv2.structure.gap_fraction`."""
        from xchmv2.structure import gap_fraction

        return gap_fraction(self._obj, threshold, cell, min_valid=min_valid)

    def percentile(
        self, q: float | Sequence[float], cell: float | None = 30.0, *, min_valid: float = 0.5
    ) -> xr.DataArray:
        """Take percentiles of height; see :func:`xchmv2.structure.percentile`."""
        from xchmv2.structure import percentile

        return percentile(self._obj, q, cell, min_valid=min_valid)

    def rumple(self, cell: float | None = 30.0, *, min_valid: float = 0.5) -> xr.DataArray:
        """Measure how rough the canopy is; see :func:`xchmv2.structure.rumple`."""
        from xchmv2.structure import rumple

        return rumple(self._obj, cell, min_valid=min_valid)

    def canopy_volume(self, cell: float | None = 30.0, *, min_valid: float = 0.5) -> xr.DataArray:
        """Measure the volume below the canopy; see :func:`xchmv2.structure.canopy_volume`."""
        from xchmv2.structure import canopy_volume

        return canopy_volume(self._obj, cell, min_valid=min_valid)

    def gaps(
        self,
        threshold: float = 10.0,
        *,
        min_area: float | None = None,
        max_area: float | None = None,
        connectivity: Connectivity = 8,
    ) -> tuple[xr.DataArray, pd.DataFrame]:
        """Find gaps in the canopy; see :func:`xchmv2.structure.gaps`."""
        from xchmv2.structure import gaps

        return gaps(
            self._obj,
            threshold,
            min_area=min_area,
            max_area=max_area,
            connectivity=connectivity,
        )

    def forest_mask(
        self,
        *,
        min_height: float = 5.0,
        min_cover: float = 0.10,
        min_area: float = 5000.0,
        cell: float = 30.0,
        connectivity: Connectivity = 8,
        min_valid: float = 0.5,
    ) -> xr.DataArray:
        """Tell forest by height, cover and area; see :func:`xchmv2.structure.forest_mask`."""
        from xchmv2.structure import forest_mask

        return forest_mask(
            self._obj,
            min_height=min_height,
            min_cover=min_cover,
            min_area=min_area,
            cell=cell,
            connectivity=connectivity,
            min_valid=min_valid,
        )
