"""Upsampling by two, alone and fused with the convolution that follows it.

Bilinear upsampling and a convolution are both linear, so a 3x3 convolution of an upsampled map can
mix channels first, at the lower resolution, where it costs a quarter: one product of each of the
nine taps with the small map, then the interpolated sum of the nine. Interpolation is separable; per
axis it is a banded matrix that holds both the upsampling and the three shifts of the taps. It runs
over strips of rows that stay in a processor's cache, and the large map is never written.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of a strip and columns of a step along it: small enough for caches and for the bands of the
# matrices, large enough for a matrix product.
_STRIP_ROWS, _STEP_COLUMNS = 32, 16


def upsample(x: Tensor) -> Tensor:
    """Double height and width bilinearly, corner pixels on corner pixels."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


def upsample_convolve(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Double a map's height and width, then convolve it.

    Parameters
    ----------
    x : Tensor [B, C, h, w]
        In channels_last.
    convolution : nn.Conv2d
        3x3, with zero padding of 1.

    Returns
    -------
    Tensor [B, K, 2h, 2w]
        In channels_last.
    """
    if not _fuses(x):
        return _plain(x, convolution)
    batch, _, height, width = x.shape
    shape = (batch, 2 * height, 2 * width, len(convolution.weight))
    out = torch.empty(shape, dtype=_dtype(x))  # [B, 2h, 2w, K]
    for one, large in zip(x.permute(0, 2, 3, 1), out, strict=True):
        _fuse(one.to(out.dtype), convolution, large)
    return out.permute(0, 3, 1, 2)


def _fuses(x: Tensor) -> bool:
    """Tell whether the fused form pays: on processors, where arithmetic is what is short."""
    busy = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not busy


def _plain(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    out: Tensor = convolution(upsample(x))
    return out


def _fuse(x: Tensor, convolution: nn.Conv2d, out: Tensor) -> None:
    """Write the upsampled and convolved map of ``x`` [h, w, C] to ``out`` [2h, 2w, K]."""
    height, width, channels = x.shape
    # [K, C, 3 (dy), 3 (dx)] -> [C, (dx, dy, K)]
    taps = convolution.weight.to(x.dtype).permute(1, 3, 2, 0).reshape(channels, -1)
    bias = _bias(convolution, x.dtype).repeat(2 * width)  # [2w * K]
    matrix = tap_matrix(height, x.dtype)  # [2h, 3h]
    for start in range(0, 2 * height, _STRIP_ROWS):
        stop = min(2 * height, start + _STRIP_ROWS)
        low, high = _reach(height, start, stop)
        wide = _widen(x[low:high], taps)  # [rows, 3 (dy), 2w, K]
        band = matrix[start:stop, 3 * low : 3 * high]
        torch.addmm(bias, band, wide.flatten(2).flatten(0, 1), out=out[start:stop].flatten(1))


def _widen(rows: Tensor, taps: Tensor) -> Tensor:  # [n, w, C], [C, 9K] -> [n, 3 (dy), 2w, K]
    """Apply all taps to some rows, and interpolate and sum them along x."""
    count, width, channels = rows.shape
    filters = taps.shape[1] // 9
    matrix = tap_matrix(width, rows.dtype)  # [2w, 3w]
    out = rows.new_empty(count, 3, 2 * width, filters)
    mixed = rows.reshape(-1, channels).mm(taps)  # [n * w, (dx, dy, K)]
    mixed = mixed.view(count, 3 * width, 3 * filters)  # [n, (w, dx), (dy, K)]
    for start in range(0, 2 * width, _STEP_COLUMNS):
        stop = min(2 * width, start + _STEP_COLUMNS)
        low, high = _reach(width, start, stop)
        band = matrix[start:stop, 3 * low : 3 * high]
        wide = torch.matmul(band, mixed[:, 3 * low : 3 * high])  # [n, step, (dy, K)]
        out[:, :, start:stop] = wide.view(count, -1, 3, filters).transpose(1, 2)
    return out


@functools.lru_cache(maxsize=32)
def tap_matrix(size: int, dtype: torch.dtype) -> Tensor:
    """Weights that upsample by two along one axis and sum the three taps of a convolution.

    Parameters
    ----------
    size : int
        Pixels along the axis.
    dtype : torch.dtype

    Returns
    -------
    Tensor [2 * size, 3 * size]
        Row i, column 3 * l + d: what pixel l, as seen through tap d, gives to output pixel i.
    """
    with torch.inference_mode(False), torch.no_grad():
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        unit = torch.eye(size, dtype=exact).unsqueeze(0)  # [1, l, size]
        up = F.interpolate(unit, scale_factor=2.0, mode="linear", align_corners=True)[0].t()
        padded = F.pad(up, (0, 0, 1, 1))  # [2 * size + 2, size], zero beyond the edges
        shifted = [padded[tap : tap + 2 * size] for tap in range(3)]
        return torch.stack(shifted, dim=-1).flatten(1).to(dtype)


def _reach(size: int, start: int, stop: int) -> tuple[int, int]:
    """Tell which pixels of an axis the outputs ``[start, stop)`` depend on."""
    step, last = size - 1, 2 * size - 1
    low = max(0, start - 1) * step // last
    return low, min(size, min(last, stop) * step // last + 2)


def _dtype(x: Tensor) -> torch.dtype:
    """Arithmetic that a convolution would have here."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def _bias(convolution: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    if convolution.bias is None:
        return convolution.weight.new_zeros(len(convolution.weight), dtype=dtype)
    return convolution.bias.to(dtype)
