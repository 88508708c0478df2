"""Inference on one device: models by name, tiles in batches, blending of their heights."""

from xchmv2.inference.batches import resolve_batch
from xchmv2.inference.blending import Accumulator, BlockPart, Layer, Sums, blend, stack_dates
from xchmv2.inference.clients import active_client, forward_resources
from xchmv2.inference.devices import resolve_device
from xchmv2.inference.held import (
    clear_models,
    get_predictor,
    hold_predictor,
    seconds_per_tile,
)
from xchmv2.inference.model_spec import ModelSpec, WarmModel, WorkerReport
from xchmv2.inference.predictor import Predictor, Scaling, tiles_forwarded
from xchmv2.inference.spec import ModelLike, ModelSource, resolve_model

__all__ = [
    "Accumulator",
    "BlockPart",
    "Layer",
    "ModelLike",
    "ModelSource",
    "ModelSpec",
    "Predictor",
    "Scaling",
    "Sums",
    "WarmModel",
    "WorkerReport",
    "active_client",
    "blend",
    "clear_models",
    "forward_resources",
    "get_predictor",
    "hold_predictor",
    "resolve_batch",
    "resolve_device",
    "resolve_model",
    "seconds_per_tile",
    "stack_dates",
    "tiles_forwarded",
]
