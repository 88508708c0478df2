"""Inference on one device: models by name, tiles in batches, blending of their heights."""

from xchmv2.inference.blending import BlockPart, Layer, Sums, blend, stack_dates
from xchmv2.inference.devices import resolve_device, resolve_dtype, validate_device
from xchmv2.inference.models import (
    ModelLike,
    ModelSource,
    ModelSpec,
    WarmModel,
    WorkerReport,
    clear_models,
    get_predictor,
    hold_predictor,
    refuse_live,
    resolve_model,
    rough_seconds_per_tile,
    seconds_per_tile,
    validate_config,
    validate_model,
    warn_of_demo,
)
from xchmv2.inference.predictor import (
    Predictor,
    Scaling,
    resolve_batch,
    skip_tiles,
    stop_forwards,
    tiles_done,
    tiles_forwarded,
)
from xchmv2.inference.versions import PACKAGES, validate_own_versions, validate_versions
from xchmv2.inference.workers import (
    GPU,
    Workers,
    active_client,
    ask_workers,
    common_dtype,
    forward_resources,
    forward_threads,
    forwarding_workers,
    gpu_share,
    list_workers,
    name_worker,
)
