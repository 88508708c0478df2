"""The only place that builds graphs: one task per tile group, one task per block.

The network runs in group tasks alone, so it runs once per tile, and culling a graph to a few
blocks culls the tiles too.
"""

from xchmv2._dask.graph import Source, predict_blocks
from xchmv2._dask.tasks import Job

__all__ = ["Job", "Source", "predict_blocks"]
