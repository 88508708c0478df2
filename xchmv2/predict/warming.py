"""warmup(): load the model in every worker of a cluster before the work begins.

Two plugins stay on the cluster afterwards: one sends tile groups to the workers that declare a GPU,
the other loads the model in workers that join later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

try:
    from distributed import Client, SchedulerPlugin, Worker, WorkerPlugin
    from distributed.core import Status
except ImportError as error:
    raise ImportError('clusters need dask.distributed: pip install "xchmv2[cluster]"') from error

from xchmv2.errors import CheckpointError, CHMv2Error
from xchmv2.inference import (
    GPU,
    PACKAGES,
    ModelLike,
    ModelSpec,
    WarmModel,
    WorkerReport,
    Workers,
    ask_workers,
    common_dtype,
    forward_threads,
    forwarding_workers,
    get_predictor,
    gpu_share,
    list_workers,
    name_worker,
    refuse_live,
    resolve_device,
    resolve_dtype,
    validate_config,
    validate_device,
    validate_model,
    validate_own_versions,
    validate_versions,
    warn_of_demo,
)
from xchmv2.model import CHMv2Config
from xchmv2.model.checkpoint import resolve_checkpoint
from xchmv2.model.files import DEMO, MODEL
from xchmv2.predict.graph import GROUPS
from xchmv2.raster import show


def warmup(
    client: Client,
    model: ModelLike = MODEL,
    *,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> WarmModel:
    """Load the model once in every worker process, and check that all workers agree about it.

    Parameters
    ----------
    client : distributed.Client
        The cluster, with at least one worker.
    model : str, path or ModelSpec
        Hub id, folder that the workers can read, or "demo". The client needs no copy of it.
    device : str, default "auto"
        Torch device of the workers; "auto" is CUDA where a worker has it, or a spec's own.
    dtype : {"auto", "float32", "bfloat16"}
        Precision; "auto" is bfloat16 if every worker that forwards tiles computes in it, or a
        spec's own.

    Returns
    -------
    WarmModel
        Pass it on: ``predict(model=...)``. Printed, it shows device, threads and loading time of
        each worker that will forward tiles.

    Raises
    ------
    CHMv2Error
        If there is no worker, versions differ, or a worker cannot find or load the model; the
        message names the worker, its host and its reason.
    CheckpointError
        If workers found different files under the same name, or other files than the client.
    DeviceError
        If device or dtype are unknown.

    Warns
    -----
    UserWarning
        If several worker processes share one GPU.

    Notes
    -----
    Where some workers declare ``resources={"GPU": 1}``, forwards go to them alone and only they
    need the model. Workers that join later check versions and load the model before they take
    tasks, and do not join if they cannot.
    """
    _validate_client(client)
    validate_model(model)
    refuse_live(model)
    device, precision = str(device), str(dtype)
    if isinstance(model, ModelSpec):
        device = model.device if device == "auto" else device
        precision = model.dtype if dtype == "auto" else precision
    validate_device(device, remote=True)
    resolve_dtype(precision, "cpu")  # refuses an unknown one
    versions = validate_versions(client, PACKAGES)
    workers = list_workers(client)
    forwarding = forwarding_workers(workers)
    name, revision = _name(model)
    found = ask_workers(
        client, forwarding, _find, name, revision, device, precision, task=f"find {name!r}"
    )
    spec = _agreed(model, forwarding, found, device, precision)
    loaded = ask_workers(client, forwarding, _load, spec, task=f"load {name!r}")
    client.register_plugin(ForwardsOnGPUs())
    client.register_plugin(_LoadModel(spec, versions, only_gpus=forwarding is not workers))
    reports = [_report(address, info, loaded[address]) for address, info in forwarding.items()]
    reports.sort(key=lambda report: (report.host, report.name))
    _warn_of_shared_gpus(reports)
    if name == DEMO:
        warn_of_demo()
    config = next(iter(found.values())).config
    return WarmModel(**vars(spec), config=config, workers=tuple(reports))


def _validate_client(client: Client) -> None:
    if not isinstance(client, Client) or client.asynchronous:
        raise CHMv2Error(
            "a distributed.Client for use outside coroutines",
            "an asynchronous client" if isinstance(client, Client) else show(client),
            "make one: client = distributed.Client(cluster)",
        )
    if not list_workers(client):
        raise CHMv2Error(
            "a cluster with at least one worker",
            f"none yet at {client.scheduler.address}",
            "wait for them: client.wait_for_workers(1)",
        )


def _name(model: ModelLike) -> tuple[str, str | None]:
    """Give the name that workers look for; a folder of this machine by its absolute path."""
    if isinstance(model, ModelSpec):
        return model.model, model.revision
    path = Path(str(model)).expanduser()
    here = model != DEMO and path.is_dir()
    return (str(path.resolve()) if here else str(model)), None


@dataclass(frozen=True)
class _Found:
    """A model's files as one worker sees them, and the precision it would choose."""

    model: str
    revision: str | None
    weights_sha256: str
    config_sha256: str
    config: CHMv2Config
    dtype: str


async def _find(model: str, revision: str | None, device: str, dtype: str) -> _Found:
    """In a worker: find the files, fetching them from the hub if need be, and hash them."""
    return await asyncio.to_thread(_find_here, model, revision, device, dtype)


def _find_here(model: str, revision: str | None, device: str, dtype: str) -> _Found:
    validate_device(device)
    found = resolve_checkpoint(model, revision)
    validate_config(found.config)
    return _Found(
        model=found.model_id,
        revision=found.revision,
        weights_sha256=found.weights_sha256,
        config_sha256=found.config_sha256,
        config=found.config,
        dtype=resolve_dtype(dtype, resolve_device(device)),
    )


def _agreed(
    model: ModelLike, workers: Workers, found: Mapping[str, _Found], device: str, dtype: str
) -> ModelSpec:
    """Make one spec of what the workers found; refuse files that differ."""
    holders = defaultdict(list)
    for address, files in found.items():
        holders[files.weights_sha256, files.config_sha256].append(name_worker(workers, address))
    name, _ = _name(model)
    expected = _expected(model, name)
    if expected:
        holders[expected].insert(0, "the client")
    if len(holders) > 1:
        raise CheckpointError(
            f"the same files of {name!r} everywhere",
            "; ".join(
                f"weights {weights[:12]} and config {config[:12]} on {who[0]}"
                + (f" and {len(who) - 1} more" if len(who) > 1 else "")
                for (weights, config), who in holders.items()
            ),
            "copy one folder to all of them, or fetch the same revision from the hub",
        )
    first = next(iter(found.values()))
    names = {files.model for files in found.values()}
    revisions = {files.revision for files in found.values()}
    return ModelSpec(
        model=names.pop() if len(names) == 1 else name,
        # Commits that hold the same files may differ; then each worker takes its own.
        revision=revisions.pop() if len(revisions) == 1 else None,
        weights_sha256=first.weights_sha256,
        config_sha256=first.config_sha256,
        device=device,
        dtype=common_dtype(files.dtype for files in found.values()) if dtype == "auto" else dtype,
    )


def _expected(model: ModelLike, name: str) -> tuple[str, str] | None:
    """Hashes that this process knows: those of a spec, or of files on this machine."""
    if isinstance(model, ModelSpec):
        return model.weights_sha256, model.config_sha256
    if name != DEMO and not Path(name).is_dir():
        return None
    found = resolve_checkpoint(name)
    return found.weights_sha256, found.config_sha256


async def _load(spec: ModelSpec, dask_worker: Any) -> dict[str, Any]:
    """In a worker, which dask passes: load the model and report what it runs on."""
    start = time.perf_counter()
    await asyncio.to_thread(get_predictor, spec)
    where = torch.device(resolve_device(spec.device))
    return {
        "device": str(where),
        "card": _card(where),
        "hardware": torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU",
        "torch_threads": forward_threads(dask_worker),
        "seconds": time.perf_counter() - start,
    }


def _card(device: torch.device) -> str | None:
    """Identify a GPU among all processes and hosts."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return str(uuid) if uuid else f"{platform.node()}, {visible}, {device.index}"


def _report(address: str, info: Mapping[str, Any], loaded: Mapping[str, Any]) -> WorkerReport:
    return WorkerReport(
        name=str(info.get("name", address)),
        host=str(info.get("host", "?")),
        address=address,
        dask_threads=int(info.get("nthreads", 1)),
        **loaded,
    )


def _warn_of_shared_gpus(reports: Iterable[WorkerReport]) -> None:
    cards = defaultdict(list)
    for report in reports:
        if report.card is not None:
            cards[report.card].append(report)
    for sharing in cards.values():
        if len(sharing) > 1:
            warnings.warn(
                f"{len(sharing)} worker processes share one GPU ({sharing[0].hardware}) on "
                f"{sharing[0].host}: {', '.join(report.name for report in sharing)}. Each holds "
                "its own copy of the model there, and together they may run out of its memory. "
                "Start one process per GPU with several threads: "
                "dask_cuda.LocalCUDACluster(threads_per_worker=4), or on a single GPU "
                "LocalCluster(n_workers=1, threads_per_worker=4)",
                stacklevel=3,
            )


class ForwardsOnGPUs(SchedulerPlugin):  # type: ignore[misc]
    """Sends tile groups to the workers that declare a GPU, where any does.

    dask's default optimisation loses annotations, and it runs on the scheduler: no setting of the
    client prevents it. This plugin restricts the tasks afterwards.
    """

    name = "xchmv2-forwards-on-gpus"
    idempotent = True

    def update_graph(self, scheduler: Any, *, tasks: Iterable[Any], **kwargs: Any) -> None:
        """Restrict the tile groups among new tasks."""
        share = gpu_share(scheduler.resources.get(GPU, {}).values())
        if share is None:
            return
        for key in tasks:
            # A fused task is named after all that it was fused from.
            if GROUPS in f"{key[0] if isinstance(key, tuple) else key}-":
                task = scheduler.tasks[key]
                # One that already runs keeps the resources that it was started with.
                if task.state == "released":
                    task.resource_restrictions = {GPU: share, **(task.resource_restrictions or {})}


_log = logging.getLogger(__name__)


class _LoadModel(WorkerPlugin):  # type: ignore[misc]
    """Checks versions and loads the model in a worker before it takes its first task.

    `versions`: the client's, by package; `only_gpus`: whether workers that declare no GPU need no
    model. One per cluster: workers that join must have the model that was warmed up last.
    """

    name = "xchmv2-load-model"

    def __init__(self, spec: ModelSpec, versions: Mapping[str, str], *, only_gpus: bool) -> None:
        self._spec, self._versions, self._only_gpus = spec, versions, only_gpus

    async def setup(self, worker: Worker) -> None:
        """Load the model outside the worker's event loop; a worker that cannot is closed."""
        try:
            validate_own_versions(self._versions, str(worker.name))
            if not self._only_gpus or worker.state.total_resources.get(GPU):
                await asyncio.to_thread(get_predictor, self._spec)
        except Exception as error:
            _log.error("worker %r leaves the cluster: %s", worker.name, error)
            # dask only logs what a plugin raises, and would still send tasks to the worker.
            worker.status = Status.closing_gracefully
            worker.loop.add_callback(_leave, worker)
            raise


async def _leave(worker: Worker) -> None:
    """Close a worker and its nanny once they have started; before, each waits for the other."""
    await worker
    await worker.close(reason="it cannot run xchmv2's tasks")
