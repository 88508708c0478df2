"""Features to height in one pass on a GPU, which never writes the logits.

The plain way writes and reads 256 logits a pixel, 205 MB for a tile of 448 px in float32. It stays
as the reference, and as what runs where this cannot.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

# Pixels that one program reduces, with all their logits in its registers, and channels that it
# multiplies at a time.
_ROWS, _STEP = 64, 32
_MOST_BINS, _MOST_CHANNELS = 256, 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"linear": "relu", "chmv2_mixlog": "relu", "softmax": "softmax", "sigmoid": "sigmoid"}

_broken: set[str] = set()


@dataclass(frozen=True)
class Reduction:
    """How logits become a height.

    Parameters
    ----------
    norm : {"linear", "softmax", "sigmoid", "chmv2_mixlog"}
        Normalisation of the bins' weights.
    offset : float
        What is added to every weight.
    tiny : float
        Smallest sum of weights and smallest mean.
    scale : float
        Metres per unit of the bins.
    """

    norm: str
    offset: float
    tiny: float
    scale: float


@functools.cache
def has_triton() -> bool:
    """Tell whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def can_fuse(pixels: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernel can take features [P, C] and weights [bins, C], and pays.

    Parameters
    ----------
    pixels, weight : Tensor
        On their device, in the arithmetic of the product.

    Returns
    -------
    bool
        False where gradients are wanted, off CUDA, without triton, and for sizes that are no
        powers of two.
    """
    return (
        pixels.is_cuda
        and not torch.is_grad_enabled()
        and len(pixels) > 0
        and fits(pixels.dtype, *weight.shape)
        and has_triton()
        and str(pixels.device) not in _broken
    )


def fits(dtype: torch.dtype, bins: int, channels: int) -> bool:
    """Tell whether the kernel is written for a data type and for sizes."""
    return (
        dtype in _DTYPES
        and _is_power(bins, 16, _MOST_BINS)
        and _is_power(channels, 16, _MOST_CHANNELS)
    )


def _is_power(size: int, least: int, most: int) -> bool:
    return least <= size <= most and size & (size - 1) == 0


def reduce_features(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bins: Tensor,
    how: Reduction,
    *,
    spread: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Parameters
    ----------
    pixels : Tensor [P, C]
        Features.
    weight : Tensor [bins, C]
        In the data type of the features.
    bias : Tensor [bins] or None
    bins : Tensor [bins], float32
        Centres.
    how : Reduction
    spread : bool
        Whether to compute the spread too.

    Returns
    -------
    height, spread : Tensor [P] and [P] or [0], float32
        Metres.
    """
    from xchmv2.model.kernels import height_kernel

    count, (size, channels) = len(pixels), weight.shape
    height = torch.empty(count, dtype=torch.float32, device=pixels.device)
    deviation = torch.empty(count if spread else 0, dtype=torch.float32, device=pixels.device)
    height_kernel[(-(-count // _ROWS),)](
        pixels.contiguous(),
        weight.contiguous(),
        torch.zeros_like(bins) if bias is None else bias.float(),
        bins,
        height,
        deviation,
        count,
        how.offset,
        how.tiny,
        how.scale,
        BINS=size,
        CHANNELS=channels,
        STEP=min(_STEP, channels),
        ROWS=_ROWS,
        NORM=_KINDS[how.norm],
        SPREAD=spread,
        num_warps=8,
    )
    return height, deviation


def try_reduce(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bins: Tensor,
    how: Reduction,
    *,
    spread: bool,
) -> tuple[Tensor, Tensor] | None:
    """Run the kernel, or say why not once and give None from then on; see `reduce_features`."""
    try:
        with torch.cuda.device(pixels.device):
            return reduce_features(pixels, weight, bias, bins, how, spread=spread)
    except torch.OutOfMemoryError:
        raise  # smaller batches cure it
    except Exception as error:  # a compiler, a driver or a card that this was not tried on
        _broken.add(str(pixels.device))
        warnings.warn(
            f"the fused kernel does not run on {pixels.device} ({type(error).__name__}: {error}); "
            "heights come from the plain, slower way. Another version of triton may cure it.",
            stacklevel=2,
        )
        return None
