"""The dask workers that forward tiles: their devices, precision and threads."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from xchmv2.errors import CHMv2Error
from xchmv2.inference.devices import resolve_device, resolve_dtype

#: The dask resource of the workers that alone shall forward tiles, where any declares it.
GPU = "GPU"
_MOST_NAMED = 3

#: What a scheduler knows about its workers, by address.
Workers = Mapping[str, Mapping[str, Any]]


def active_client() -> Any | None:
    """Return the client that a computation would use now; never imports distributed."""
    return _ask_distributed("default_client")


def _ask_distributed(function: str) -> Any | None:
    """Call a function of distributed; None where it raises a ValueError or is not imported."""
    if "distributed" not in sys.modules:
        return None
    try:
        return getattr(sys.modules["distributed"], function)()
    except ValueError:
        return None


def list_workers(client: Any) -> Workers:
    """Ask a cluster's scheduler for its workers; an asynchronous client knows none."""
    if client.asynchronous:
        return {}
    # Not client.scheduler_info(): a callback of the client may empty what that is about to return.
    workers: Workers = client.sync(client.scheduler.identity)["workers"]
    return workers


def forwarding_workers(workers: Workers) -> Workers:
    """Pick the workers that forward tiles: those that declare a GPU, else all."""
    declared = {address: info for address, info in workers.items() if _gpus(info) > 0}
    return declared or workers


def gpu_share(declared: Iterable[float]) -> float | None:
    """Choose how much of the resource one tile group takes, from what each worker declares.

    That is half of the smallest amount, so that one group is prepared while another is on the GPU;
    None where no worker declares any.
    """
    least = min((amount for amount in declared if amount > 0), default=None)
    return None if least is None else least / 2


def forward_resources() -> dict[str, float] | None:
    """Resources that a task which forwards tiles needs on the active cluster, if any."""
    client = active_client()
    if client is None:
        return None
    share = gpu_share(_gpus(info) for info in list_workers(client).values())
    return None if share is None else {GPU: share}


def workers_dtype(client: Any, device: str, dtype: str) -> str:
    """Turn "auto" into a precision that every worker which will forward tiles computes in.

    It is "float32" where there is no worker yet, or the client is asynchronous.
    """
    if dtype != "auto" or device == "cpu":
        return resolve_dtype(dtype, device)
    workers = forwarding_workers(list_workers(client))
    if client.asynchronous or not workers:
        return "float32"
    found = ask_workers(client, workers, _fastest_dtype, device, task="report its precision")
    return common_dtype(found.values())


def common_dtype(found: Iterable[str]) -> str:
    """Return bfloat16 only if all workers compute in it."""
    return "bfloat16" if set(found) == {"bfloat16"} else "float32"


def ask_workers(
    client: Any, workers: Workers, function: Callable[..., Any], *args: Any, task: str
) -> dict[str, Any]:
    """Run a coroutine function once in each worker process, outside its tasks.

    The function is defined in a module, so that it is pickled by name. Returns the answers by
    address; a CHMv2Error names each worker that cannot do the `task`, its host and its reason.
    """
    answers = client.run(function, *args, workers=list(workers), on_error="return")
    failed = {address: found for address, found in answers.items() if isinstance(found, Exception)}
    if failed:
        raise CHMv2Error(
            f"every worker that forwards tiles to {task}",
            f"{len(failed)} of {len(answers)} that cannot: {_reasons(workers, failed)}",
            "correct that on the workers named and call again; if only some workers shall forward "
            "tiles, start those with --resources 'GPU=1'",
        ) from next(iter(failed.values()))
    return dict(answers)


def name_worker(workers: Workers, address: str) -> str:
    """Name a worker and its host for a message."""
    info = workers.get(address, {})
    return f"worker {info.get('name', address)!r} ({address}) on {info.get('host', 'its host')}"


def _reasons(workers: Workers, failed: Mapping[str, Exception]) -> str:
    named = [
        f"{name_worker(workers, address)}: {type(error).__name__}: {error}"
        for address, error in list(failed.items())[:_MOST_NAMED]
    ]
    more = len(failed) - len(named)
    return " | ".join(named) + (f" | and {more} more" if more else "")


def _gpus(info: Mapping[str, Any]) -> float:
    return float((info.get("resources") or {}).get(GPU, 0))


async def _fastest_dtype(device: str) -> str:
    """In a worker: resolve "auto"; in a thread, because the first use of CUDA takes seconds."""
    return await asyncio.to_thread(lambda: resolve_dtype("auto", resolve_device(device)))


def forward_threads(worker: Any | None) -> int:
    """Count the threads that a forward gets in this process, which may be that of a worker.

    They are the worker's where its nanny limited torch to one, else the setting of torch. Any other
    ``OMP_NUM_THREADS`` that the worker was started with is kept.
    """
    nannied = worker is not None and worker.nanny is not None
    if nannied and os.environ.get("OMP_NUM_THREADS") == "1":
        return int(worker.state.nthreads)  # type: ignore[union-attr]
    return torch.get_num_threads()


def use_forward_threads() -> None:
    """Give the forward that this thread is about to run the threads of its worker."""
    threads = forward_threads(_ask_distributed("get_worker"))
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
