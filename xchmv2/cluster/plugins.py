"""What stays behind in a cluster: forwards go to GPUs, workers that join later are made ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from distributed import SchedulerPlugin, Worker, WorkerPlugin
from distributed.core import Status

from xchmv2._dask.graph import GROUPS
from xchmv2.cluster.versions import validate_own_versions
from xchmv2.inference import ModelSpec, get_predictor
from xchmv2.inference.clients import GPU, gpu_share

_log = logging.getLogger(__name__)


class ForwardsOnGPUs(SchedulerPlugin):  # type: ignore[misc]
    """Sends tile groups to the workers that declare a GPU, where there are such.

    dask's default optimisation forgets annotations, and it is the scheduler that optimises: no
    setting of the client prevents it. This looks at the tasks after that.
    """

    name = "xchmv2-forwards-on-gpus"
    idempotent = True

    def update_graph(self, scheduler: Any, *, tasks: Iterable[Any], **kwargs: Any) -> None:
        """Restrict the tile groups among new tasks."""
        share = gpu_share(scheduler.resources.get(GPU, {}).values())
        if share is None:
            return
        for key in tasks:
            # Fused with others, a task is named after all of them.
            if GROUPS in f"{key[0] if isinstance(key, tuple) else key}-":
                task = scheduler.tasks[key]
                # One that runs already holds what it was started with.
                if task.state == "released":
                    task.resource_restrictions = {GPU: share, **(task.resource_restrictions or {})}


class LoadModel(WorkerPlugin):  # type: ignore[misc]
    """Checks versions and loads the model in a worker before it takes its first task.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    versions : mapping
        The client's versions by package.
    only_gpus : bool
        Whether workers that declare no GPU do without the model.

    Notes
    -----
    One per cluster: the model that was warmed up last is the one that workers must have to join.
    """

    name = "xchmv2-load-model"

    def __init__(self, spec: ModelSpec, versions: Mapping[str, str], *, only_gpus: bool) -> None:
        self._spec, self._versions, self._only_gpus = spec, versions, only_gpus

    async def setup(self, worker: Worker) -> None:
        """Load the model, aside from the worker's event loop; without it the worker is closed."""
        try:
            validate_own_versions(self._versions, str(worker.name))
            if not self._only_gpus or worker.state.total_resources.get(GPU):
                await asyncio.to_thread(get_predictor, self._spec)
        except Exception as error:
            _log.error("worker %r leaves the cluster: %s", worker.name, error)
            # dask only logs what a plugin raises, and would send it tasks all the same.
            worker.status = Status.closing_gracefully
            worker.loop.add_callback(_leave, worker)
            raise


async def _leave(worker: Worker) -> None:
    """Close a worker and its nanny, once they have started: before, each waits for the other."""
    await worker
    await worker.close(reason="it cannot run xchmv2's tasks")
