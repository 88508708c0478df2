"""Threads of one forward on a processor, which a dask worker's nanny would hold to one.

Nannies start workers with ``OMP_NUM_THREADS=1``, because the tasks of a worker run side by side.
Forwards do not: they take turns. So one forward gets as many threads as its worker has.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

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
    threads = forward_threads(_worker_here())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def _worker_here() -> Any | None:
    """Return the worker whose task this is; never imports distributed."""
    if "distributed" not in sys.modules:
        return None
    try:
        return sys.modules["distributed"].get_worker()
    except ValueError:
        return None
