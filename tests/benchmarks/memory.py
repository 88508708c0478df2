"""Peak memory of one piece of work, in a process of its own."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def in_child(work: Callable[..., T], *args: Any, device: str, threads: int) -> tuple[T, float]:
    """Run a function in a fresh process.

    Parameters
    ----------
    work : callable
        Function of a module, so that it goes by name.
    *args
        Its arguments.
    device : str
        Torch device that it uses.
    threads : int
        Threads of torch.

    Returns
    -------
    result
        What the function returned.
    peak : float
        Memory at the highest [MiB]: allocated on the device for CUDA, else all of the process,
        Python and libraries included.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, work, args, device, threads).result()


def peak_memory(device: str) -> float:
    """Tell this process's memory at the highest [MiB], on the device for CUDA."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a new process begins there with what its parent had.
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _measured(
    work: Callable[..., T], args: tuple[Any, ...], device: str, threads: int
) -> tuple[T, float]:
    torch.set_num_threads(threads)
    return work(*args), peak_memory(device)
