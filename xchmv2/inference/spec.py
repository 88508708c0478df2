"""Which model a graph means, and the one copy of it that a process holds per device.

A graph carries a :class:`ModelSpec`: a few strings. Each process that runs its tasks loads the
weights it names, once, and refuses weights that are not the ones the graph was built for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import threading
import warnings
from typing import Any, TypeVar

import torch

from xchmv2 import defaults
from xchmv2.errors import CheckpointError, DemoModelWarning
from xchmv2.inference.clients import active_client, workers_dtype
from xchmv2.inference.devices import resolve_device, resolve_dtype, validate_device
from xchmv2.inference.hub import find_unloaded
from xchmv2.inference.model_spec import ModelSpec, WarmModel
from xchmv2.inference.predictor import Predictor
from xchmv2.model.checkpoint import Checkpoint, resolve_checkpoint
from xchmv2.model.config import CHMv2Config
from xchmv2.model.height import validate_spread
from xchmv2.model.modeling import CHMv2ForDepthEstimation
from xchmv2.model.weights import state_dict_sha256

#: A hub id, a checkpoint folder, or a live model.
ModelSource = str | os.PathLike[str] | CHMv2ForDepthEstimation
#: What ``model=`` takes: one of those, or what ``warmup`` returned.
ModelLike = ModelSource | ModelSpec

_LIVE = "live:"


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


def get_predictor(spec: ModelSpec) -> Predictor:
    """Return this process's predictor for a spec, loading its model on the first call.

    Parameters
    ----------
    spec : ModelSpec
        From :func:`resolve_model`, maybe in another process.

    Returns
    -------
    Predictor
        Shared by all threads.

    Raises
    ------
    CheckpointError
        If the weights found here are not those of the spec.
    """
    device = resolve_device(spec.device)
    key = _key(spec, device)
    with _load_lock:
        found = _predictors.pop(key, None) or _load(spec, device)
        _keep(_predictors, key, found)
        return found


def seconds_per_tile(spec: ModelSpec, window: tuple[int, int]) -> float | None:
    """Tell what tiles of a size took in this process so far, without loading anything.

    Parameters
    ----------
    spec : ModelSpec
        The model, in its arithmetic on its device.
    window : tuple of int
        Height and width of a tile [px].

    Returns
    -------
    float or None
        Time a tile [s], batching and blending included, reading and writing not; None where this
        process has forwarded none such, or holds the model no more.
    """
    with _load_lock:
        found = _predictors.get(_key(spec, resolve_device(spec.device)))
    return None if found is None else found.seconds_per_tile(window)


def _key(spec: ModelSpec, device: str) -> tuple[Any, ...]:
    """Return what tells one predictor of a process from another."""
    return (spec.weights_sha256, spec.config_sha256, device, spec.dtype, spec.compile)


def hold_predictor(spec: ModelSpec, predictor: Predictor) -> None:
    """Give this process the predictor to use for a spec, in place of loading one.

    Parameters
    ----------
    spec : ModelSpec
        What graphs name it by.
    predictor : Predictor
        What :func:`get_predictor` will return; let go of as loaded ones are.
    """
    key = _key(spec, resolve_device(spec.device))
    with _load_lock:
        _predictors.pop(key, None)
        _keep(_predictors, key, predictor)


def clear_models() -> None:
    """Forget all models this process holds, live ones too, and free their memory.

    Notes
    -----
    Lazy results of live models cannot be computed afterwards; others load their files again.
    """
    with _load_lock:
        _predictors.clear()
        _live_models.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# How many models of each kind a process holds; the one unused for longest goes first.
_MOST_MODELS = 4
_SAVE_IT = (
    "save it where all workers can read it: model.save_pretrained(folder), then "
    ".predict(model=folder)"
)

_load_lock = threading.Lock()
_predictors: dict[tuple[str | bool, ...], Predictor] = {}
_live_models: dict[str, CHMv2ForDepthEstimation] = {}

K = TypeVar("K")
T = TypeVar("T")


def _keep(held: dict[K, T], key: K, value: T) -> None:
    """Hold a value as the newest, and let go of the oldest beyond the limit."""
    held[key] = value
    while len(held) > _MOST_MODELS:
        del held[next(iter(held))]


def refuse_live(model: object) -> None:
    """Refuse a model that lives in one process alone.

    Raises
    ------
    CheckpointError
        If it is one.
    """
    name = model.model if isinstance(model, ModelSpec) else ""
    if isinstance(model, CHMv2ForDepthEstimation) or name.startswith(_LIVE):
        raise CheckpointError(
            "a model that every worker can load by name",
            "a live model while a distributed client is active",
            _SAVE_IT,
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
    name, sha = _register(model)
    return ModelSpec(name, None, sha, sha, device, resolved)


def _register(model: CHMv2ForDepthEstimation) -> tuple[str, str]:
    """Keep a copy of a live model under its content hash, so that training on cannot change it."""
    sha = state_dict_sha256(model)
    with _load_lock:
        kept = _live_models.pop(sha, None) or copy.deepcopy(model).eval()
        _keep(_live_models, sha, kept)
    return f"{_LIVE}{sha}", sha


def _load(spec: ModelSpec, device: str) -> Predictor:
    """Make a predictor; the process's one copy of the model in float32 serves all others too."""
    exact = (spec.weights_sha256, spec.config_sha256, device, "float32")
    held = next((p.model for key, p in _predictors.items() if key[:4] == exact), None)
    if spec.model.startswith(_LIVE):
        model, mean, std = held or _find_live(spec), defaults.IMAGE_MEAN, defaults.IMAGE_STD
        if str(model.device) != device:
            model = copy.deepcopy(model)  # another predictor may hold it where it is
    else:
        files = _checked(spec)
        mean, std = files.mean_std()
        model = held or CHMv2ForDepthEstimation.from_pretrained(files.folder, device_map=device)
    return Predictor(
        model, device=device, dtype=spec.dtype, mean=mean, std=std, compile=spec.compile
    )


def _checked(spec: ModelSpec) -> Checkpoint:
    """Find the files of a spec, and make sure that they are the ones it was made for."""
    found = resolve_checkpoint(spec.model, revision=spec.revision)
    if (found.weights_sha256, found.config_sha256) != (spec.weights_sha256, spec.config_sha256):
        raise CheckpointError(
            f"the weights the prediction was planned with, sha256 {spec.weights_sha256[:12]}",
            f"sha256 {found.weights_sha256[:12]} in {found.folder}, or another config",
            "give all workers the same files, or call predict() again",
        )
    return found


def _find_live(spec: ModelSpec) -> CHMv2ForDepthEstimation:
    try:
        return _live_models[spec.weights_sha256]
    except KeyError:
        raise CheckpointError(
            "the live model of this prediction in the computing process",
            f"a process that does not hold it, or not any more (it holds {_MOST_MODELS})",
            _SAVE_IT,
        ) from None
