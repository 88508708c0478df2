"""Models by name: the description of a model in tasks, and the models that a process holds."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from xchmv2.errors import CheckpointError, DemoModelWarning, warn
from xchmv2.inference.devices import resolve_device, resolve_dtype, validate_device
from xchmv2.inference.predictor import Predictor
from xchmv2.inference.versions import validate_versions
from xchmv2.inference.workers import active_client, workers_dtype
from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation
from xchmv2.model.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    describe,
    join_sha256,
    read_shards,
    resolve_checkpoint,
    state_dict_sha256,
)
from xchmv2.model.files import (
    CONFIG_NAME,
    DEMO,
    IMAGE_MEAN,
    IMAGE_STD,
    MODEL,
    PREPROCESSOR_NAME,
    find_commit,
    find_folder,
    read_json,
)
from xchmv2.model.height import validate_spread
from xchmv2.raster import show, validate_flags


@dataclass(frozen=True)
class ModelSpec:
    """A model, a precision and a device, by name and content; small and hashable.

    Parameters
    ----------
    model : str
        Hub id, absolute folder, or ``live:`` and the content hash of a model in this process.
    revision : str or None
        Revision of a hub id.
    weights_sha256, config_sha256 : str
        Content of the weights and of the configuration files.
    device : str
        Torch device, or "auto" for the worker's own choice.
    dtype : {"float32", "bfloat16"}
        Precision of the network.
    compile : bool
        Whether the network is compiled.
    """

    model: str
    revision: str | None
    weights_sha256: str
    config_sha256: str
    device: str
    dtype: str
    compile: bool = field(default=False, kw_only=True)

    @property
    def plain(self) -> ModelSpec:
        """The spec alone, without the reports of workers; this is what goes into graphs."""
        names = [item.name for item in dataclasses.fields(ModelSpec)]
        return ModelSpec(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class WorkerReport:
    """What one dask worker reported when it was warmed up.

    Parameters
    ----------
    name, host, address : str
        The worker, as its scheduler names it.
    device : str
        Torch device that it forwards on, for example "cpu" or "cuda:0".
    card : str or None
        Identity of its GPU, the same for all processes that use it; None on a CPU.
    hardware : str
        The GPU's product name, or "CPU".
    dask_threads, torch_threads : int
        Tasks that it runs at once, and threads of one forward on the CPU.
    seconds : float
        Time that loading the model took [s]; near 0 if it was loaded before.
    """

    name: str
    host: str
    address: str
    device: str
    card: str | None
    hardware: str
    dask_threads: int
    torch_threads: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name} on {self.host}: {self.device} ({self.hardware}), "
            f"{self.dask_threads} dask threads, {self.torch_threads} torch threads, "
            f"loaded in {self.seconds:.1f} s"
        )


@dataclass(frozen=True, repr=False)
class WarmModel(ModelSpec):
    """A model that every forwarding worker of a cluster holds; pass it to ``predict``.

    Parameters
    ----------
    config : CHMv2Config
        The model's configuration, as the workers read it.
    workers : tuple of WorkerReport
        The workers that forward tiles.
    """

    config: CHMv2Config = field(compare=False)
    workers: tuple[WorkerReport, ...] = field(compare=False)

    def __repr__(self) -> str:
        head = f"<{self.model}, weights {self.weights_sha256[:12]}, {self.dtype}>"
        return "\n  ".join([head, *map(str, self.workers)])


#: A hub id, a checkpoint folder, or a live model.
ModelSource = str | os.PathLike[str] | CHMv2ForDepthEstimation
#: What ``model=`` takes: one of those, or the result of ``warmup``.
ModelLike = ModelSource | ModelSpec


def resolve_model(
    model: ModelLike = MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    spread: bool = False,
    in_process: bool = False,
    weights: bool = True,
) -> ModelSpec:
    """Find a model's files and describe it for graphs, without loading it.

    `model`, `device`, `dtype` and `compile` are those of :func:`xchmv2.predict.predict`. `spread`
    is whether the spread of the height bins will be computed, `in_process` whether this process
    will do the work, even under a distributed client, `weights` whether weights on the hub are
    fetched, if this process may need them.

    A CheckpointError refuses files that are missing or damaged, a model that does not take three
    bands, and a live model under a distributed client; a ConfigError the spread of a model without
    bins; a DeviceError an unknown device or dtype, and a device that this machine lacks; a
    CHMv2Error a cluster with another version of this package.
    """
    validate_model(model)
    validate_flags(compile=compile)
    client = None if in_process else active_client()
    if client is not None:
        validate_versions(client)
    found = _resolve(model, str(device), dtype, client, spread=spread, weights=weights)
    return dataclasses.replace(found, compile=compile or found.compile)


def _resolve(
    model: ModelLike, device: str, dtype: str, client: Any | None, *, spread: bool, weights: bool
) -> ModelSpec:
    remote = client is not None
    if isinstance(model, ModelSpec):
        return _resolve_spec(model, device, dtype, spread=spread, remote=remote)
    validate_device(device, remote=remote)
    if isinstance(model, CHMv2ForDepthEstimation):
        return _resolve_live(model, device, dtype, spread=spread, remote=remote)
    if isinstance(model, str) and model == DEMO:
        warn_of_demo()
    # A client only plans: it needs the hash of the weights, not the weights.
    found = resolve_checkpoint(model) if weights and client is None else _find_unloaded(model)
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


def validate_model(model: object) -> None:
    """Refuse, by a CheckpointError, what is neither a name, a folder, a live model nor a spec."""
    if not isinstance(model, str | os.PathLike | CHMv2ForDepthEstimation | ModelSpec):
        raise CheckpointError(
            "a hub id, a checkpoint folder, a CHMv2ForDepthEstimation or what warmup() returned",
            f"model={show(model)}",
            f"for example .predict(model={MODEL!r})",
        )


def refuse_live(model: object) -> None:
    """Refuse a model that exists in one process only, by a CheckpointError."""
    name = model.model if isinstance(model, ModelSpec) else ""
    if isinstance(model, CHMv2ForDepthEstimation) or name.startswith(_LIVE):
        raise CheckpointError(
            "a model that every worker can load by name",
            "a live model while a distributed client is active",
            _SAVE_IT,
        )


def validate_config(config: CHMv2Config, *, spread: bool = False) -> None:
    """Check that a model takes three bands, and has bins if their spread will be computed.

    A CheckpointError or ConfigError refuses it else.
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
    warn(
        "the demonstration model was trained on synthetic forest alone: its heights mean nothing "
        f"anywhere else; for real imagery use the published weights, model={MODEL!r}",
        DemoModelWarning,
    )


def _resolve_spec(
    spec: ModelSpec, device: str, dtype: str, *, spread: bool, remote: bool
) -> ModelSpec:
    """Take a model as described before; "auto" keeps its device and dtype."""
    if remote:
        refuse_live(spec)
    if isinstance(spec, WarmModel):
        validate_config(spec.config, spread=spread)
    chosen = spec.device if device == "auto" else device
    validate_device(chosen, remote=remote)
    precision = spec.dtype if dtype == "auto" else resolve_dtype(dtype, chosen)
    return dataclasses.replace(spec.plain, device=chosen, dtype=precision)


def _resolve_live(
    model: CHMv2ForDepthEstimation, device: str, dtype: str, *, spread: bool, remote: bool
) -> ModelSpec:
    resolved = resolve_dtype(dtype, device)
    validate_config(model.config, spread=spread)
    if remote:
        refuse_live(model)
    name, sha = _hold_live(model)
    return ModelSpec(name, None, sha, sha, device, resolved)


#: How names of live models begin.
_LIVE = "live:"
#: The fix where a live model cannot be used.
_SAVE_IT = (
    "save it where all workers can read it: model.save_pretrained(folder), then "
    ".predict(model=folder)"
)

# How many models of each kind a process holds; the least recently used is dropped first.
_MOST_MODELS = 4

_load_lock = threading.Lock()
_predictors: dict[tuple[str | bool, ...], Predictor] = {}
_live_models: dict[str, CHMv2ForDepthEstimation] = {}

_K = TypeVar("_K")
_T = TypeVar("_T")


def get_predictor(spec: ModelSpec) -> Predictor:
    """Return this process's predictor for a spec, loading its model on the first call.

    All threads share it. A CheckpointError refuses files that are not those of the spec.
    """
    device = resolve_device(spec.device)
    key = _key(spec, device)
    with _load_lock:
        found = _predictors.pop(key, None) or _load(spec, device)
        _keep(_predictors, key, found)
        return found


def seconds_per_tile(spec: ModelSpec, window: tuple[int, int]) -> float | None:
    """Return the mean time of tiles of a size [px] in this process [s], without loading anything.

    It includes batching and blending, not reading and writing, and is None if this process has
    forwarded no such tile, or no longer holds the model.
    """
    with _load_lock:
        found = _predictors.get(_key(spec, resolve_device(spec.device)))
    return None if found is None else found.seconds_per_tile(window)


#: Operations of the published network for one tile of 448 px, and the share of its backbone.
_OPERATIONS, _BACKBONE = 0.69e12, 0.54e12
#: Operations per second: of one CPU core as measured (docs/performance.md), and of GPUs as a third
#: of what their makers state for bfloat16, by a part of their names.
_PER_CORE = {"float32": 0.09e12, "bfloat16": 0.14e12}
_PER_GPU = {"H200": 330e12, "H100": 330e12, "A100": 104e12, "L40": 60e12, "A10": 40e12, "L4": 40e12}
_OTHER_GPU = 15e12
#: How much slower a GPU is in float32.
_FLOAT32_SHARE = 1 / 8
#: Time that a tile of even the smallest network takes [s].
_LEAST_SECONDS = 2e-3


def rough_seconds_per_tile(spec: ModelSpec, window: tuple[int, int]) -> float | None:
    """Estimate the time of a tile [s] from the size of the network and the kind of device.

    It is right by a factor of two or three, and None if the model's configuration is not here.
    `window` is (height, width) of the tile [px].
    """
    try:
        backbone = _find_config(spec).backbone
    except CheckpointError:
        return None
    tokens = math.prod(window) / math.prod(backbone.patch_shape)
    width, hidden = backbone.hidden_size, backbone.intermediate_size
    layer = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * tokens**2 * width
    operations = backbone.num_hidden_layers * layer * _OPERATIONS / _BACKBONE
    device = torch.device(resolve_device(spec.device))
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        speed = next((rate for name, rate in _PER_GPU.items() if name in card), _OTHER_GPU)
        speed *= 1 if spec.dtype == "bfloat16" else _FLOAT32_SHARE
    else:
        speed = _PER_CORE[spec.dtype] * torch.get_num_threads()
    return max(float(operations / speed), _LEAST_SECONDS)


def _find_config(spec: ModelSpec) -> CHMv2Config:
    """Read a model's configuration, which was found before."""
    if spec.model.startswith(_LIVE):
        return _find_live(spec).config
    folder, _ = find_folder(spec.model, spec.revision, (CONFIG_NAME,))
    return CHMv2Config.from_dict(read_json(folder / CONFIG_NAME))


def _key(spec: ModelSpec, device: str) -> tuple[Any, ...]:
    """Return what distinguishes the predictors of a process."""
    return (spec.weights_sha256, spec.config_sha256, device, spec.dtype, spec.compile)


def hold_predictor(spec: ModelSpec, predictor: Predictor) -> None:
    """Set the predictor that this process uses for a spec, instead of loading one.

    It is dropped like those that were loaded.
    """
    key = _key(spec, resolve_device(spec.device))
    with _load_lock:
        _predictors.pop(key, None)
        _keep(_predictors, key, predictor)


def clear_models() -> None:
    """Forget all models this process holds, live ones too, and free their memory.

    Lazy results of live models cannot be computed afterwards; others load their files again.
    """
    with _load_lock:
        _predictors.clear()
        _live_models.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _hold_live(model: CHMv2ForDepthEstimation) -> tuple[str, str]:
    """Keep a copy of a live model under its content hash, so that training cannot change it."""
    sha = state_dict_sha256(model)
    with _load_lock:
        kept = _live_models.pop(sha, None) or copy.deepcopy(model).eval()
        _keep(_live_models, sha, kept)
    return f"{_LIVE}{sha}", sha


def _keep(held: dict[_K, _T], key: _K, value: _T) -> None:
    """Hold a value as the newest, and drop the oldest beyond the limit."""
    held[key] = value
    while len(held) > _MOST_MODELS:
        del held[next(iter(held))]


def _load(spec: ModelSpec, device: str) -> Predictor:
    """Make a predictor; all predictors of a process share its one float32 copy of the model."""
    exact = (spec.weights_sha256, spec.config_sha256, device, "float32")
    held = next((p.model for key, p in _predictors.items() if key[:4] == exact), None)
    if spec.model.startswith(_LIVE):
        model, mean, std = held or _find_live(spec), IMAGE_MEAN, IMAGE_STD
        if str(model.device) != device:
            model = copy.deepcopy(model)  # another predictor may hold it where it is
    else:
        files = _checked(spec)
        mean, std = files.mean_std()
        model = held or CHMv2ForDepthEstimation.from_pretrained(files.folder, device_map=device)
        _checked(spec)  # the folder may have been replaced since
    return Predictor(
        model, device=device, dtype=spec.dtype, mean=mean, std=std, compile=spec.compile
    )


def _checked(spec: ModelSpec) -> Checkpoint:
    """Find the files of a spec, and check that they are those it was made for."""
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
            f"a process that does not hold it, or no longer does (it holds {_MOST_MODELS})",
            _SAVE_IT,
        ) from None


_ASK_WORKERS = (
    "if only the workers have the files, ask them: "
    "spec = xchmv2.warmup(client, model), then .predict(model=spec)"
)


def _find_unloaded(model: str | os.PathLike[str]) -> Checkpoint:
    """Describe a checkpoint; of one on the hub, whose hash it tells, no weights are fetched."""
    small = (CONFIG_NAME, PREPROCESSOR_NAME, INDEX_NAME)
    try:
        folder, is_local = find_folder(model, None, small)
    except CheckpointError as error:
        raise CheckpointError(
            error.expected, error.found, f"{_ASK_WORKERS}; otherwise {error.fix}"
        ) from error
    if is_local or (folder / WEIGHTS_NAME).exists():
        return resolve_checkpoint(model)
    commit = find_commit(folder, None)
    # None for weights that the hub stores inside the repository, without a hash: fetch them.
    weights = _published_sha256(str(model), commit, folder)
    if weights is None:
        return resolve_checkpoint(model)
    return describe(str(model), commit, folder, weights)


def _published_sha256(model: str, commit: str | None, folder: Path) -> str | None:
    """Ask the hub for the hash of a checkpoint's weights; None if it has none."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(model, revision=commit, files_metadata=True)
    except Exception as error:  # the hub client's errors have no common base class
        raise CheckpointError(
            f"the hash of the weights of {model!r} from the Hugging Face hub",
            f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}",
            _ASK_WORKERS,
        ) from error
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    names = [WEIGHTS_NAME]
    if WEIGHTS_NAME not in hashes and (folder / INDEX_NAME).exists():
        names = read_shards(folder / INDEX_NAME)
    return join_sha256({name: hashes[name] for name in names}) if {*names} <= {*hashes} else None
