"""Threads of one forward on a processor, which a dask worker's nanny would hold to one.

Nannies start workers with ``OMP_NUM_THREADS=1``, because the tasks of a worker run side by side.
Forwards do not: they take turns. So one forward gets as many threads as its worker has.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from xchmv2.inference.clients import active_worker

_NANNYS = "1"


def forward_threads(worker: Any | None) -> int:
    """Tell how many threads a forward gets.

    Parameters
    ----------
    worker : distributed.Worker or None
        The worker of this process, if it is one.

    Returns
    -------
    int
        The worker's threads where its nanny left torch with one, else what torch is set to. Any
        other ``OMP_NUM_THREADS`` that the worker was started with holds.
    """
    nannied = worker is not None and worker.nanny is not None
    if nannied and os.environ.get("OMP_NUM_THREADS") == _NANNYS:
        return int(worker.state.nthreads)  # type: ignore[union-attr]
    return torch.get_num_threads()


def use_forward_threads() -> None:
    """Give the forward that this thread is about to run the threads of its worker."""
    threads = forward_threads(active_worker())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
