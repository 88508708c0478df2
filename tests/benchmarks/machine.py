"""Which machine it is: tables are worth nothing without its name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import xarray as xr

from xchmv2._version import __version__

from .published import transformers_version

# Private imports: a table names the version that was measured.


def describe_machine(device: str, threads: int) -> dict[str, str]:
    """Tell what the figures were measured on.

    Parameters
    ----------
    device : str
        Torch device of the run.
    threads : int
        Threads of torch on the CPU.

    Returns
    -------
    dict of str
        ``name`` in one line, and the parts of it with versions.
    """
    cpu, cores = _cpu(), os.cpu_count() or 1
    name = f"{cpu}, {cores} cores, {_instructions()}"
    if device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    return {
        "name": name,
        "device": device,
        "threads": str(threads),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "xarray": xr.__version__,
        "transformers": transformers_version() or "not installed",
        "xchmv2": __version__,
    }


def load_average() -> float | None:
    """Count processes that wanted a core in the last minute; None where it is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    """Model of the CPU, as the system calls it."""
    return _told("model name") or platform.processor() or platform.machine()


def _instructions() -> str:
    """Instruction set that torch computes with, and whether it has bfloat16 products."""
    widest = torch.backends.cpu.get_cpu_capability()
    products = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    flags = _told("flags").split()
    return ", ".join([widest, *(name for flag, name in products.items() if flag in flags)])


def _told(key: str) -> str:
    """Read what Linux tells of the first core under a key; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
