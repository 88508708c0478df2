"""Imagery in, canopy height out, over any chunks and on any scheduler.

`xchmv2.predict.warming` needs dask.distributed, which is optional, and stands apart.
"""

from xchmv2.predict.graph import Prediction, find_prediction
from xchmv2.predict.planning import PredictionPlan, plan
from xchmv2.predict.prediction import predict
from xchmv2.predict.progress import Progress, progress_bar
from xchmv2.predict.sinks import blocks_of, compute_keys, delayed_sinks, leaves_process, run_sinks
