"""Canopy structure from heights: cover, percentiles, gaps, rumple, volume, forest."""

from xchmv2.structure.forest import forest_mask, gaps
from xchmv2.structure.statistics import (
    canopy_cover,
    canopy_volume,
    gap_fraction,
    percentile,
    rumple,
)

__all__ = [
    "canopy_cover",
    "canopy_volume",
    "forest_mask",
    "gap_fraction",
    "gaps",
    "percentile",
    "rumple",
]
