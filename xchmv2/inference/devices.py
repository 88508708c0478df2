"""Devices and precision: validate and resolve their names in this process."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from xchmv2.errors import DeviceError
from xchmv2.raster import validate_choice

#: What ``dtype=`` takes.
_DType = Literal["auto", "float32", "bfloat16"]


def validate_device(device: str, *, remote: bool = False) -> None:
    """Check a device's name and, if this process does the work, that it is present.

    Parameters
    ----------
    device : str
        Torch device, or "auto".
    remote : bool, default False
        Whether other machines do the work.

    Raises
    ------
    DeviceError
        If the name is unknown to torch, or this machine has no such device.
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
    """Turn "auto" into the precision for a device.

    Raises
    ------
    DeviceError
        If the dtype is not one of the three.
    """
    validate_choice("dtype", dtype, get_args(_DType), error=DeviceError)
    if dtype != "auto":
        return dtype
    on_cuda = device == "auto" or device.startswith("cuda")
    return "bfloat16" if on_cuda and _computes_bfloat16() else "float32"


def _computes_bfloat16() -> bool:
    """Whether the CUDA device computes in bfloat16; emulation is slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_device(device: str) -> str:
    """Name a device of this process exactly, so that 'cuda' and 'cuda:0' are one.

    Parameters
    ----------
    device : str
        Torch device, or "auto" for CUDA if available.

    Returns
    -------
    str
        For example "cpu" or "cuda:0".
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
