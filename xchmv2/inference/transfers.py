"""Between host and device: pixels go over while the tiles before them are computed.

On a processor nothing moves, and the same calls cost nothing.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from xchmv2.tiling import FloatArray


class Fetch:
    """A result on its way to the host.

    Parameters
    ----------
    tensor : Tensor
        The host's copy.
    arrived : torch.cuda.Event or None
        When it is complete; None if it is already.
    """

    def __init__(self, tensor: Tensor, arrived: torch.cuda.Event | None) -> None:
        self._tensor, self._arrived = tensor, arrived

    def result(self) -> FloatArray:
        """Wait for the result and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        array: FloatArray = self._tensor.numpy()
        return array


class Transfers:
    """Copies to and from one device, on a stream of their own where it has streams.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def send(self, array: npt.NDArray[Any]) -> Tensor:
        """Begin to copy an array to the device; `await_sent` comes before its use."""
        host = torch.from_numpy(array)
        if self._stream is None:
            return host.to(self._device)
        with torch.cuda.stream(self._stream):
            return host.pin_memory().to(self._device, non_blocking=True)

    def await_sent(self, *tensors: Tensor) -> None:
        """Let what this thread computes next on the device wait for tensors that were sent."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # its memory is not free before that work is done

    def fetch(self, tensor: Tensor) -> Fetch:
        """Begin to copy a result to the host, once what computes it is done."""
        if self._stream is None:
            return Fetch(tensor.cpu(), None)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))
        return Fetch(host, arrived)
