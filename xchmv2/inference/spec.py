"""Which model a graph means, and the one copy of it that a process holds per device.

A graph carries a :class:`ModelSpec`: a few strings. Each process that runs its tasks loads the
weights it names, once, and refuses weights that are not the ones the graph was built for.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch

from xchmv2 import defaults
from xchmv2.errors import CheckpointError, DemoModelWarning, DeviceError
from xchmv2.inference.predictor import Predictor
from xchmv2.model.checkpoint import Checkpoint, resolve_checkpoint
from xchmv2.model.config import CHMv2Config
from xchmv2.model.height import validate_spread
from xchmv2.model.modeling import CHMv2ForDepthEstimation
from xchmv2.model.weights import state_dict_sha256

#: What ``model=`` takes: a hub id, a checkpoint folder, or a live model.
ModelLike = str | os.PathLike[str] | CHMv2ForDepthEstimation
#: What ``dtype=`` takes.
DType = Literal["auto", "float32", "bfloat16"]

_LIVE = "live:"


@dataclass(frozen=True)
class ModelSpec:
    """A model, an arithmetic and a device, by name and content; small and hashable.

    Parameters
    ----------
    model : str
        Hub id, absolute folder, or ``live:`` and the content hash of a model in this process.
    revision : str or None
        Revision of a hub id.
    weights_sha256, config_sha256 : str
        Content of the weights and of the configuration files.
    device : str
        Torch device, or "auto" for what the worker has.
    dtype : {"float32", "bfloat16"}
        Arithmetic of the network.
    """

    model: str
    revision: str | None
    weights_sha256: str
    config_sha256: str
    device: str
    dtype: str


def resolve_model(
    model: ModelLike = defaults.MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    spread: bool = False,
    in_process: bool = False,
) -> ModelSpec:
    """Find a model's files and describe it, without loading it.

    Parameters
    ----------
    model : str, path or CHMv2ForDepthEstimation
        Hub id, checkpoint folder, "demo", or live model.
    device : str, default "auto"
        Torch device; "auto" is CUDA where the computing process has it, else the processor.
    dtype : {"auto", "float32", "bfloat16"}
        "auto" is bfloat16 where this process sees a CUDA card that supports it, else float32.
    spread : bool, default False
        Whether the spread of the height bins will be asked for.
    in_process : bool, default False
        Whether the work is sure to be done in this process, even under a distributed client.

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
    device, remote = str(device), not in_process and _has_distributed_client()
    validate_device(device, remote=remote)
    resolved = resolve_dtype(dtype, device)
    if isinstance(model, CHMv2ForDepthEstimation):
        _validate_config(model.config, spread=spread)
        if remote:
            raise CheckpointError(
                "a model that every worker can load by name",
                "a live model while a distributed client is active",
                _SAVE_IT,
            )
        name, sha = _register(model)
        return ModelSpec(name, None, sha, sha, device, resolved)
    if model == defaults.DEMO:
        _warn_of_demo()
    found = resolve_checkpoint(model)
    _validate_config(found.config, spread=spread)
    return ModelSpec(
        model=found.model_id,
        revision=found.revision,
        weights_sha256=found.weights_sha256,
        config_sha256=found.config_sha256,
        device=device,
        dtype=resolved,
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
    key = (spec.weights_sha256, spec.config_sha256, device, spec.dtype)
    with _load_lock:
        found = _predictors.pop(key, None) or _load(spec, device)
        _keep(_predictors, key, found)
        return found


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


def validate_device(device: str, *, remote: bool = False) -> None:
    """Check a device's name and, where the work is done in this process, its presence.

    Parameters
    ----------
    device : str
        Torch device, or "auto".
    remote : bool, default False
        Whether other machines do the work.

    Raises
    ------
    DeviceError
        If the name is unknown to torch, or the device is not here.
    """
    if device == "auto":
        return
    try:
        found = torch.device(device)
    except RuntimeError:
        raise DeviceError(
            "'auto' or a torch device such as 'cpu', 'cuda' or 'cuda:1'",
            f"device={device!r}",
            "pass one of those: .predict(..., device='auto')",
        ) from None
    if remote:
        return
    try:
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            f"the device {device!r} on this machine",
            f"{torch.cuda.device_count()} CUDA devices and the processor",
            "run on the processor: .predict(..., device='cpu')",
        ) from error


def resolve_dtype(dtype: str, device: str) -> str:
    """Turn "auto" into the arithmetic for a device.

    Raises
    ------
    DeviceError
        If the dtype is not one of the three.
    """
    if dtype not in get_args(DType):
        raise DeviceError(
            f"one of {', '.join(map(repr, get_args(DType)))}",
            f"dtype={dtype!r}",
            "leave it out, or pass .predict(..., dtype='float32')",
        )
    if dtype != "auto":
        return dtype
    on_cuda = device == "auto" or device.startswith("cuda")
    fast = on_cuda and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if fast else "float32"


# How many models of each kind a process holds; the one unused for longest goes first.
_MOST_MODELS = 4
_SAVE_IT = (
    "save it where all workers can read it: model.save_pretrained(folder), then "
    ".predict(model=folder)"
)

_load_lock = threading.Lock()
_predictors: dict[tuple[str, ...], Predictor] = {}
_live_models: dict[str, CHMv2ForDepthEstimation] = {}

K = TypeVar("K")
T = TypeVar("T")


def _keep(held: dict[K, T], key: K, value: T) -> None:
    """Hold a value as the newest, and let go of the oldest beyond the limit."""
    held[key] = value
    while len(held) > _MOST_MODELS:
        del held[next(iter(held))]


def _validate_config(config: CHMv2Config, *, spread: bool) -> None:
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
def _warn_of_demo() -> None:
    """Warn once in a process."""
    warnings.warn(
        "the demonstration model was trained on synthetic forest alone: its heights mean nothing "
        f"anywhere else; for real imagery use the published weights, model={defaults.MODEL!r}",
        DemoModelWarning,
        stacklevel=5,
    )


def _register(model: CHMv2ForDepthEstimation) -> tuple[str, str]:
    """Keep a copy of a live model under its content hash, so that training on cannot change it."""
    sha = state_dict_sha256(model)
    with _load_lock:
        kept = _live_models.pop(sha, None) or copy.deepcopy(model).eval()
        _keep(_live_models, sha, kept)
    return f"{_LIVE}{sha}", sha


def _load(spec: ModelSpec, device: str) -> Predictor:
    """Make a predictor; under another arithmetic the process's one copy of the model serves."""
    content = (spec.weights_sha256, spec.config_sha256, device)
    held = next((p.model for key, p in _predictors.items() if key[:3] == content), None)
    if spec.model.startswith(_LIVE):
        model, mean, std = held or _find_live(spec), defaults.IMAGE_MEAN, defaults.IMAGE_STD
        if str(model.device) != device:
            model = copy.deepcopy(model)  # another predictor may hold it where it is
    else:
        files = _checked(spec)
        mean, std = files.mean_std()
        model = held or CHMv2ForDepthEstimation.from_pretrained(files.folder, device_map=device)
    return Predictor(model, device=device, dtype=spec.dtype, mean=mean, std=std)


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


def resolve_device(device: str) -> str:
    """Name a device of this process exactly, so that 'cuda' and 'cuda:0' are one.

    Parameters
    ----------
    device : str
        Torch device, or "auto" for CUDA where there is one.

    Returns
    -------
    str
        Such as "cpu" or "cuda:0".
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def _has_distributed_client() -> bool:
    """Whether computing now would go to a distributed cluster; never imports distributed."""
    if "distributed" not in sys.modules:
        return False
    try:
        sys.modules["distributed"].default_client()
    except ValueError:
        return False
    return True
