"""Numbers per polygon: heights and changes summed up under polygons, with standard errors."""

from xchmv2.zonal.correlation import effective_samples
from xchmv2.zonal.summary import zonal
from xchmv2.zonal.table import to_table

__all__ = ["effective_samples", "to_table", "zonal"]
