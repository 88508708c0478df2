"""Linear layers, through oneDNN where it beats MKL on a CPU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`torch.nn.Linear` whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., K]
        """Apply the layer."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply [..., C] by a weight [K, C] and add a bias [K], as `torch.nn.functional.linear`.

    In float32 torch gives matrix products to MKL and convolutions to oneDNN. A 1x1 convolution of
    maps in channels_last is the same product on the same memory, and it is faster: oneDNN adds the
    bias on the way, while for MKL the output is filled with it first.
    """
    if not _convolves(x):
        return F.linear(x, weight, bias)
    *outer, channels = x.shape
    row = x.reshape(1, 1, -1, channels).permute(0, 3, 1, 2)  # [1, C, 1, N] in channels_last
    out = F.conv2d(row, weight[:, :, None, None], bias)  # [1, K, 1, N]
    return out.permute(0, 2, 3, 1).reshape(*outer, len(weight))


def infers_on_cpu(x: Tensor) -> bool:
    """Tell whether operations may be rearranged: inference on a CPU, not compiled, not empty."""
    busy = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not busy and x.numel() > 0


def _convolves(x: Tensor) -> bool:
    """Tell whether the product goes to oneDNN: float32 inference on a CPU."""
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and infers_on_cpu(x) and _has_mkl_and_onednn()


@functools.cache
def _has_mkl_and_onednn() -> bool:
    return all(part.is_available() for part in (torch.backends.mkl, torch.backends.mkldnn))
