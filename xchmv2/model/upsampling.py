"""Upsampling by two, alone and fused with the convolution that follows it.

Bilinear upsampling and a convolution are both linear, so a 3x3 convolution of an upsampled map can
mix channels first, at the lower resolution, where it costs a quarter: one product of each of the
nine taps with the small map, then the interpolated sum of the nine. Interpolation is separable; per
axis it is a banded matrix that holds both the upsampling and the three shifts of the taps. It runs
over strips of rows that stay in a processor's cache, and the large map is never written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xchmv2.model.products import infers_on_processor, linear

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
    if not infers_on_processor(x):
        return _plain(x, convolution)
    batch, _, height, width = x.shape
    shape = (batch, 2 * height, 2 * width, len(convolution.weight))
    out = torch.empty(shape, dtype=_dtype(x))  # [B, 2h, 2w, K]
    for one, large in zip(x, out, strict=True):
        _Fused(one, convolution).write(large)
    return out.permute(0, 3, 1, 2)


def upsample_convolve_strips(x: Tensor, convolution: nn.Conv2d) -> Iterator[Tensor]:
    """Do the same in strips, each gone from memory before the next: a large map is never whole.

    Parameters
    ----------
    x, convolution
        As `upsample_convolve` takes them.

    Yields
    ------
    Tensor [1, K, rows, 2w]
        Image by image, from top to bottom, in channels_last; where the fused form does not pay,
        the whole map [B, K, 2h, 2w] at once.
    """
    if not infers_on_processor(x):
        yield _plain(x, convolution)
        return
    for one in x:
        for strip in _Fused(one, convolution):  # [rows, 2w, K]
            yield strip.permute(2, 0, 1).unsqueeze(0)


def _plain(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    out: Tensor = convolution(upsample(x))
    return out


class _Fused:
    """One map, upsampled by two and convolved strip by strip.

    Parameters
    ----------
    x : Tensor [C, h, w]
        The map.
    convolution : nn.Conv2d
        With C channels in and K out.
    """

    def __init__(self, x: Tensor, convolution: nn.Conv2d) -> None:
        dtype = _dtype(x)
        self._map = x.permute(1, 2, 0).to(dtype).contiguous()  # [h, w, C]
        _, self._width, channels = self._map.shape
        # [K, C, 3 (dy), 3 (dx)] -> [(dx, dy, K), C]
        weight = convolution.weight.to(dtype)
        self._taps = weight.permute(3, 2, 0, 1).reshape(-1, channels)
        self._bias = _bias(convolution, dtype).repeat(2 * self._width)  # [2w * K]
        self._matrix = _with_bias(tap_matrix(len(self._map), dtype))  # [2h, 3h + 1]

    def __iter__(self) -> Iterator[Tensor]:  # of [rows, 2w, K]
        return (self._strip(*rows) for rows in self._rows())

    def write(self, out: Tensor) -> None:
        """Fill the large map [2h, 2w, K]."""
        for start, stop in self._rows():
            self._strip(start, stop, out[start:stop])

    def _rows(self) -> Iterator[tuple[int, int]]:
        count = 2 * len(self._map)
        for start in range(0, count, _STRIP_ROWS):
            yield start, min(count, start + _STRIP_ROWS)

    def _strip(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        low, high = _reach(len(self._map), start, stop)
        taps = self._widen(self._map[low:high])  # [3 * rows + 1, 2w * K]
        band = self._matrix[start:stop, [*range(3 * low, 3 * high), -1]]
        flat = torch.mm(band, taps, out=None if out is None else out.flatten(1))
        return flat.view(stop - start, 2 * self._width, -1)

    def _widen(self, rows: Tensor) -> Tensor:  # [n, w, C] -> [3n + 1, 2w * K]
        """Apply all taps to some rows, and interpolate and sum them along x; the bias is last."""
        count, width, _ = rows.shape
        filters = len(self._taps) // 9
        matrix = tap_matrix(width, rows.dtype)  # [2w, 3w]
        flat = rows.new_empty(3 * count + 1, 2 * width * filters)
        flat[-1] = self._bias
        out = flat[:-1].view(count, 3, 2 * width, filters)
        mixed = linear(rows, self._taps).view(count, 3 * width, 3 * filters)  # (w, dx), (dy, K)
        for start in range(0, 2 * width, _STEP_COLUMNS):
            stop = min(2 * width, start + _STEP_COLUMNS)
            low, high = _reach(width, start, stop)
            band = matrix[start:stop, 3 * low : 3 * high]
            wide = torch.matmul(band, mixed[:, 3 * low : 3 * high])  # [n, step, (dy, K)]
            out[:, :, start:stop] = wide.view(count, -1, 3, filters).transpose(1, 2)
        return flat


def _with_bias(matrix: Tensor) -> Tensor:
    """Append a column of ones, for a last row of biases."""
    return F.pad(matrix, (0, 1), value=1.0)


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
