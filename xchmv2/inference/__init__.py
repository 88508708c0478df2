"""Inference on one device: models by name, tiles in batches, blending of their heights."""

from xchmv2.inference.blending import Accumulator, BlockPart, Layer, Sums, blend, stack_dates
from xchmv2.inference.predictor import Predictor, Scaling, tiles_forwarded
from xchmv2.inference.spec import (
    ModelLike,
    ModelSpec,
    clear_models,
    get_predictor,
    resolve_device,
    resolve_model,
)

__all__ = [
    "Accumulator",
    "BlockPart",
    "Layer",
    "ModelLike",
    "ModelSpec",
    "Predictor",
    "Scaling",
    "Sums",
    "blend",
    "clear_models",
    "get_predictor",
    "resolve_device",
    "resolve_model",
    "stack_dates",
    "tiles_forwarded",
]
