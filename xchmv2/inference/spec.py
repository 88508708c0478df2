"""Which model a graph means: what ``model=`` takes, described by a few strings."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from typing import Any

from xchmv2 import defaults
from xchmv2.errors import CheckpointError, DemoModelWarning
from xchmv2.inference.clients import active_client, workers_dtype
from xchmv2.inference.devices import resolve_dtype, validate_device
from xchmv2.inference.held import LIVE, SAVE_IT, hold_live
from xchmv2.inference.hub import find_unloaded
from xchmv2.inference.model_spec import ModelSpec, WarmModel
from xchmv2.model.checkpoint import resolve_checkpoint
from xchmv2.model.config import CHMv2Config
from xchmv2.model.height import validate_spread
from xchmv2.model.modeling import CHMv2ForDepthEstimation

#: A hub id, a checkpoint folder, or a live model.
ModelSource = str | os.PathLike[str] | CHMv2ForDepthEstimation
#: What ``model=`` takes: one of those, or what ``warmup`` returned.
ModelLike = ModelSource | ModelSpec


def resolve_model(
    model: ModelLike = defaults.MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    spread: bool = False,
    in_process: bool = False,
    weights: bool = True,
) -> ModelSpec:
    """Find a model's files and describe it, without loading it.

    Parameters
    ----------
    model : str, path, CHMv2ForDepthEstimation or ModelSpec
        Hub id, checkpoint folder, "demo", live model, or what ``xchmv2.warmup`` returned.
    device : str, default "auto"
        Torch device; "auto" is CUDA where the computing process has it, else the processor.
    dtype : {"auto", "float32", "bfloat16"}
        "auto" is bfloat16 where this process, or under a distributed client every worker that
        will forward tiles, has a CUDA card that supports it, else float32.
    compile : bool, default False
        Whether the network is compiled before it is used.
    spread : bool, default False
        Whether the spread of the height bins will be asked for.
    in_process : bool, default False
        Whether the work is sure to be done in this process, even under a distributed client.
    weights : bool, default True
        Whether weights that are on the hub are to be fetched, where this process may need them.

    Returns
    -------
    ModelSpec
        The description that goes into graphs.

    Raises
    ------
    CheckpointError
        If the files are missing or damaged, the model does not take three bands, or a live model
        meets a distributed client.
    ConfigError
        If the spread is wanted of a model without bins.
    DeviceError
        If the device or dtype is unknown, or no such device is here.
    """
    client = None if in_process else active_client()
    found = _resolve(model, str(device), dtype, client, spread=spread, weights=weights)
    return dataclasses.replace(found, compile=compile or found.compile)


def _resolve(
    model: ModelLike,
    device: str,
    dtype: str,
    client: Any | None,
    *,
    spread: bool,
    weights: bool,
) -> ModelSpec:
    remote = client is not None
    if isinstance(model, ModelSpec):
        return _resolve_spec(model, device, dtype, spread=spread, remote=remote)
    validate_device(device, remote=remote)
    if isinstance(model, CHMv2ForDepthEstimation):
        return _resolve_live(model, device, dtype, spread=spread, remote=remote)
    if model == defaults.DEMO:
        warn_of_demo()
    # A client only plans: it needs to know the weights, not to have them.
    found = resolve_checkpoint(model) if weights and client is None else find_unloaded(model)
    validate_config(found.config, spread=spread)
    return ModelSpec(
        model=found.model_id,
        revision=found.revision,
        weights_sha256=found.weights_sha256,
        config_sha256=found.config_sha256,
        device=device,
        dtype=resolve_dtype(dtype, device)
        if client is None
        else workers_dtype(client, device, dtype),
    )


def refuse_live(model: object) -> None:
    """Refuse a model that lives in one process alone.

    Raises
    ------
    CheckpointError
        If it is one.
    """
    name = model.model if isinstance(model, ModelSpec) else ""
    if isinstance(model, CHMv2ForDepthEstimation) or name.startswith(LIVE):
        raise CheckpointError(
            "a model that every worker can load by name",
            "a live model while a distributed client is active",
            SAVE_IT,
        )


def validate_config(config: CHMv2Config, *, spread: bool = False) -> None:
    """Check that a model takes three bands and can give what is asked for.

    Parameters
    ----------
    config : CHMv2Config
        The model's configuration.
    spread : bool, default False
        Whether the spread of the height bins will be asked for.

    Raises
    ------
    CheckpointError, ConfigError
        If it does not.
    """
    channels = config.backbone.num_channels
    if channels != 3:
        raise CheckpointError(
            "a model that takes three bands",
            f"num_channels={channels} in its config",
            "use a CHMv2 checkpoint for red, green and blue",
        )
    if spread:
        validate_spread(config)


@functools.cache
def warn_of_demo() -> None:
    """Warn once in a process that the demonstration model is in use."""
    warnings.warn(
        "the demonstration model was trained on synthetic forest alone: its heights mean nothing "
        f"anywhere else; for real imagery use the published weights, model={defaults.MODEL!r}",
        DemoModelWarning,
        stacklevel=6,
    )


def _resolve_spec(
    spec: ModelSpec, device: str, dtype: str, *, spread: bool, remote: bool
) -> ModelSpec:
    """Take a model as it was described before; "auto" leaves device and dtype as they are."""
    if remote:
        refuse_live(spec)
    if isinstance(spec, WarmModel):
        validate_config(spec.config, spread=spread)
    chosen = spec.device if device == "auto" else device
    validate_device(chosen, remote=remote)
    arithmetic = spec.dtype if dtype == "auto" else resolve_dtype(dtype, chosen)
    return dataclasses.replace(spec.plain, device=chosen, dtype=arithmetic)


def _resolve_live(
    model: CHMv2ForDepthEstimation, device: str, dtype: str, *, spread: bool, remote: bool
) -> ModelSpec:
    resolved = resolve_dtype(dtype, device)
    validate_config(model.config, spread=spread)
    if remote:
        refuse_live(model)
    name, sha = hold_live(model)
    return ModelSpec(name, None, sha, sha, device, resolved)
