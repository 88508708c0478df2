"""Devices and precision: validate and resolve their names in this process."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from xchmv2.errors import DeviceError
from xchmv2.raster import validate_choice

#: What ``dtype=`` takes.
_DType = Literal["auto", "float32", "bfloat16"]


def validate_device(device: str, *, remote: bool = False) -> None:
    """Refuse a device that torch does not know or this machine lacks, by a DeviceError.

    Where other machines do the work (`remote`), only its name is checked.
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
            f"{torch.cuda.device_count()} CUDA devices and the CPU",
            "run on the CPU: .predict(..., device='cpu')",
        ) from error


def resolve_dtype(dtype: str, device: str) -> str:
    """Turn "auto" into the precision for a device; a DeviceError refuses an unknown precision."""
    validate_choice("dtype", dtype, get_args(_DType), error=DeviceError)
    if dtype != "auto":
        return dtype
    on_cuda = (device == "auto" or device.startswith("cuda")) and torch.cuda.is_available()
    # Emulation is slower than float32.
    fast = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def resolve_device(device: str) -> str:
    """Name a device of this process exactly, so that "cuda" and "cuda:0" are one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
