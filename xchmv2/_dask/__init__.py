"""The only place that builds graphs: one task per tile group, one task per block.

The network runs in group tasks alone, so it runs once per tile, and culling a graph to a few
blocks culls the tiles too.
"""

from xchmv2._dask.graph import Prediction, find_prediction, predict_blocks
from xchmv2._dask.sources import Source
from xchmv2._dask.tasks import Job
from xchmv2._dask.writing import (
    blocks_of,
    compute_keys,
    delayed_sinks,
    distributed_client,
    leaves_process,
    run_sinks,
)

__all__ = [
    "Job",
    "Prediction",
    "Source",
    "blocks_of",
    "compute_keys",
    "delayed_sinks",
    "distributed_client",
    "find_prediction",
    "leaves_process",
    "predict_blocks",
    "run_sinks",
]
