"""The models that a process holds: one copy per device, whatever the number of threads.

The weights that a spec names are loaded once, and refused if they are not the ones it was made for.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, TypeVar

import torch

from xchmv2 import defaults
from xchmv2.errors import CheckpointError
from xchmv2.inference.devices import resolve_device
from xchmv2.inference.model_spec import ModelSpec
from xchmv2.inference.predictor import Predictor
from xchmv2.model.checkpoint import Checkpoint, resolve_checkpoint
from xchmv2.model.modeling import CHMv2ForDepthEstimation
from xchmv2.model.weights import state_dict_sha256

#: How names of live models begin.
LIVE = "live:"
#: What cures a live model where it cannot be used.
SAVE_IT = (
    "save it where all workers can read it: model.save_pretrained(folder), then "
    ".predict(model=folder)"
)

# How many models of each kind a process holds; the one unused for longest goes first.
_MOST_MODELS = 4

_load_lock = threading.Lock()
_predictors: dict[tuple[str | bool, ...], Predictor] = {}
_live_models: dict[str, CHMv2ForDepthEstimation] = {}

K = TypeVar("K")
T = TypeVar("T")


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


def hold_live(model: CHMv2ForDepthEstimation) -> tuple[str, str]:
    """Keep a copy of a live model under its content hash, so that training on cannot change it."""
    sha = state_dict_sha256(model)
    with _load_lock:
        kept = _live_models.pop(sha, None) or copy.deepcopy(model).eval()
        _keep(_live_models, sha, kept)
    return f"{LIVE}{sha}", sha


def _keep(held: dict[K, T], key: K, value: T) -> None:
    """Hold a value as the newest, and let go of the oldest beyond the limit."""
    held[key] = value
    while len(held) > _MOST_MODELS:
        del held[next(iter(held))]


def _load(spec: ModelSpec, device: str) -> Predictor:
    """Make a predictor; the process's one copy of the model in float32 serves all others too."""
    exact = (spec.weights_sha256, spec.config_sha256, device, "float32")
    held = next((p.model for key, p in _predictors.items() if key[:4] == exact), None)
    if spec.model.startswith(LIVE):
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
            SAVE_IT,
        ) from None
