"""Zonal statistics of heights and changes, with standard errors."""

from xchmv2.zonal.summary import to_table, zonal
from xchmv2.zonal.zone_statistics import effective_samples

__all__ = ["effective_samples", "to_table", "zonal"]
