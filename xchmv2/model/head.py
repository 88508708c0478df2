"""The DPT head: features of the backbone's stages, reassembled, fused and upsampled."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xchmv2.model.config import CHMv2Config
from xchmv2.model.products import infers_on_cpu, linear

# Rows of a strip and columns of a step along it: small enough for caches and for the bands of the
# matrices, large enough for a matrix product.
_STRIP_ROWS, _STEP_COLUMNS = 32, 16


class DPTHead(nn.Module):
    """Dense prediction head of CHMv2 (DPT, arXiv 2103.13413)."""

    def __init__(self, config: CHMv2Config) -> None:
        super().__init__()
        fused, channels = config.fusion_hidden_size, config.post_process_channels
        self.reassemble_stage = Reassemble(config)
        self.convs = nn.ModuleList(
            nn.Conv2d(channel, fused, kernel_size=3, padding=1, bias=False) for channel in channels
        )
        self.fusion_layers = nn.ModuleList(
            Fusion(fused, first=i == 0) for i in range(len(channels))
        )
        self.conv_depth = OutputConvolutions(config)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)

    def forward(self, stages: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """Fuse the stages from coarse to fine.

        Tokens of the backbone's `stages`, shallow to deep, are [B, 1 + registers + patches, C];
        `grid` are rows and columns of patches. Returns features [B, head_hidden_size, H, W], not
        negative; ``conv_depth.last`` makes the logits from them.
        """
        return cast(Tensor, self.conv_depth(self._fuse(stages, grid)))

    def strips(self, stages: tuple[Tensor, ...], grid: tuple[int, int]) -> Iterator[Tensor]:
        """Yield the same features in parts, each of which can be freed before the next.

        [b, head_hidden_size, rows, W]: on a CPU image by image, from top to bottom; on a GPU all at
        once.
        """
        return self.conv_depth.strips(self._fuse(stages, grid))

    def _fuse(self, stages: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        maps = self.reassemble_stage(stages, grid)
        maps = [conv(x) for conv, x in zip(self.convs, maps, strict=True)][::-1]
        fused = self.fusion_layers[0](maps[0])
        for fusion, finer in zip(self.fusion_layers[1:], maps[1:], strict=True):
            fused = fusion(_upsample(fused), finer)
        return cast(Tensor, fused)


class Reassemble(nn.Module):
    """Tokens of every stage to maps of different scales."""

    def __init__(self, config: CHMv2Config) -> None:
        super().__init__()
        size, channels = config.backbone.hidden_size, config.post_process_channels
        self.readout_type = config.readout_type
        self.prefix = 1 + config.backbone.num_register_tokens
        self.layers = nn.ModuleList(
            ReassembleLayer(size, channel, factor)
            for channel, factor in zip(channels, config.reassemble_factors, strict=False)
        )
        if config.readout_type == "project":
            self.readout_projects = nn.ModuleList(Readout(size) for _ in channels)

    def forward(self, stages: tuple[Tensor, ...], grid: tuple[int, int]) -> list[Tensor]:
        """Return one map [B, channels, h, w] per stage [B, N, C]."""
        return [
            layer(_tokens_to_map(self._read_out(i, tokens), grid))
            for i, (layer, tokens) in enumerate(zip(self.layers, stages, strict=True))
        ]

    def _read_out(self, index: int, tokens: Tensor) -> Tensor:  # [B, N, C] -> [B, P, C]
        cls, patches = tokens[:, :1], tokens[:, self.prefix :]
        if self.readout_type == "project":
            return cast(Tensor, self.readout_projects[index](patches, cls))
        return patches + cls if self.readout_type == "add" else patches


class ReassembleLayer(nn.Module):
    """Brings one stage to its number of channels and its scale."""

    def __init__(self, size: int, channels: int, factor: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(size, channels, kernel_size=1)
        self.resize = _resize_layer(channels, factor)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, channels, h * f, w * f]
        """Project, then resize."""
        return cast(Tensor, self.resize(self.projection(x)))


def _resize_layer(channels: int, factor: float) -> nn.Module:
    if factor == 1:
        return nn.Identity()
    if factor > 1:
        return nn.ConvTranspose2d(channels, channels, int(factor), stride=int(factor))
    return nn.Conv2d(channels, channels, kernel_size=3, stride=int(1 / factor), padding=1)


class Readout(nn.ModuleList):
    """Brings the class token into each patch token by one linear layer and a GELU.

    The layer is published as ``Linear(2 * C, C)`` on [patch, class]; its two halves are applied
    apart, so that the class half is computed once per image.
    """

    def __init__(self, size: int) -> None:
        super().__init__([nn.Linear(2 * size, size)])

    def forward(self, patches: Tensor, cls: Tensor) -> Tensor:
        """Combine patches [B, P, C] with the class token [B, 1, C]."""
        layer = cast(nn.Linear, self[0])
        of_patch, of_class = layer.weight.chunk(2, dim=1)  # [C, C] each
        return F.gelu(linear(patches, of_patch) + linear(cls, of_class, layer.bias))


def _tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """View patch tokens [B, P, C] as a map [B, C, rows, columns] in channels_last."""
    batch, _, channels = tokens.shape
    maps = tokens.reshape(batch, *grid, channels)  # [B, rows, columns, C]
    return maps.permute(0, 3, 1, 2)  # [B, C, rows, columns]


class Fusion(nn.Module):
    """Adds a finer stage to the fused map and refines it; its resolution is doubled after it."""

    def __init__(self, channels: int, *, first: bool) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, kernel_size=1)
        self.residual_layer1 = None if first else ResidualUnit(channels)
        self.residual_layer2 = ResidualUnit(channels)

    def forward(self, fused: Tensor, finer: Tensor | None = None) -> Tensor:
        """Return a map [B, C, h, w] from the fused map and a finer stage."""
        if finer is not None and self.residual_layer1 is not None:
            fused = self.residual_layer1(_resized_like(finer, fused)).add_(fused)
        return cast(Tensor, self.projection(self.residual_layer2(fused)))


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.convolution2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
        """Refine a map."""
        inner = self.convolution1(F.relu(x)).relu_()
        return cast(Tensor, self.convolution2(inner)).add_(x)


def _resized_like(x: Tensor, target: Tensor) -> Tensor:
    """Resize where shapes differ: with an odd number of patches halves do not double back."""
    size = target.shape[-2:]
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class OutputConvolutions(nn.Module):
    """The last convolutions; keys 0, 2 and 4 as published, 1 and 3 have no parameters."""

    def __init__(self, config: CHMv2Config) -> None:
        super().__init__()
        fused, hidden = config.fusion_hidden_size, config.head_hidden_size
        self.head = nn.ModuleDict(
            {
                "0": nn.Conv2d(fused, fused // 2, kernel_size=3, padding=1),
                "2": nn.Conv2d(fused // 2, hidden, kernel_size=3, padding=1),
                "4": nn.Conv2d(hidden, config.number_output_channels, kernel_size=1),
            }
        )

    @property
    def last(self) -> nn.Conv2d:
        """The 1x1 convolution from features to logits."""
        return cast(nn.Conv2d, self.head["4"])

    def forward(self, x: Tensor) -> Tensor:  # [B, fused, h, w] -> [B, hidden, 4h, 4w]
        """Everything but the last convolution, whose output would be the largest by far."""
        return _upsample_convolve(self._finer(x), self._second).relu_()

    def strips(self, x: Tensor) -> Iterator[Tensor]:
        """Do the same in parts, in order; see `_upsample_convolve_strips`."""
        for strip in _upsample_convolve_strips(self._finer(x), self._second):
            yield strip.relu_()

    def _finer(self, x: Tensor) -> Tensor:  # [B, fused, h, w] -> [B, fused / 2, 2h, 2w]
        return _upsample_convolve(x, cast(nn.Conv2d, self.head["0"]))

    @property
    def _second(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.head["2"])


def _upsample(x: Tensor) -> Tensor:
    """Double height and width bilinearly, corner pixels on corner pixels."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


def _upsample_convolve(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Double a map's height and width, then convolve it: [B, C, h, w] to [B, K, 2h, 2w].

    In and out in channels_last; the convolution is 3x3, with zero padding of 1.
    """
    if not infers_on_cpu(x):
        return _plain(x, convolution)
    batch, _, height, width = x.shape
    shape = (batch, 2 * height, 2 * width, len(convolution.weight))
    out = torch.empty(shape, dtype=_dtype(x))  # [B, 2h, 2w, K]
    for one, large in zip(x, out, strict=True):
        _Fused(one, convolution).write(large)
    return out.permute(0, 3, 1, 2)


def _upsample_convolve_strips(x: Tensor, convolution: nn.Conv2d) -> Iterator[Tensor]:
    """Do the same in strips [1, K, rows, 2w], so that a large map is never whole in memory.

    Image by image, from top to bottom; on a GPU and in training the whole map at once.
    """
    if not infers_on_cpu(x):
        yield _plain(x, convolution)
        return
    for one in x:
        for strip in _Fused(one, convolution):  # [rows, 2w, K]
            yield strip.permute(2, 0, 1).unsqueeze(0)


def _plain(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    out: Tensor = convolution(_upsample(x))
    return out


class _Fused:
    """One map [C, h, w], upsampled by two and convolved from C to K channels, strip by strip."""

    def __init__(self, x: Tensor, convolution: nn.Conv2d) -> None:
        dtype = _dtype(x)
        self._map = x.permute(1, 2, 0).to(dtype).contiguous()  # [h, w, C]
        _, self._width, channels = self._map.shape
        # [K, C, 3 (dy), 3 (dx)] -> [(dx, dy, K), C]
        weight = convolution.weight.to(dtype)
        self._taps = weight.permute(3, 2, 0, 1).reshape(-1, channels)
        self._bias = _bias(convolution, dtype).repeat(2 * self._width)  # [2w * K]
        # A last column of ones, for a last row of biases.
        self._matrix = F.pad(_tap_matrix(len(self._map), dtype), (0, 1), value=1.0)  # [2h, 3h + 1]

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
        matrix = _tap_matrix(width, rows.dtype)  # [2w, 3w]
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


@functools.lru_cache(maxsize=32)
def _tap_matrix(size: int, dtype: torch.dtype) -> Tensor:
    """Weights that upsample by two along one axis and sum the three taps of a convolution.

    Row i, column 3 * l + d: weight of pixel l, as seen through tap d, in output pixel i.
    """
    with torch.inference_mode(False), torch.no_grad():
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        unit = torch.eye(size, dtype=exact).unsqueeze(0)  # [1, l, size]
        up = F.interpolate(unit, scale_factor=2.0, mode="linear", align_corners=True)[0].t()
        padded = F.pad(up, (0, 0, 1, 1))  # [2 * size + 2, size], zero beyond the edges
        shifted = [padded[tap : tap + 2 * size] for tap in range(3)]
        return torch.stack(shifted, dim=-1).flatten(1).to(dtype)


def _reach(size: int, start: int, stop: int) -> tuple[int, int]:
    """Pixels of an axis that the outputs ``[start, stop)`` depend on."""
    step, last = size - 1, 2 * size - 1
    low = max(0, start - 1) * step // last
    return low, min(size, min(last, stop) * step // last + 2)


def _dtype(x: Tensor) -> torch.dtype:
    """Precision in which a convolution would run here."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def _bias(convolution: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    if convolution.bias is None:
        return convolution.weight.new_zeros(len(convolution.weight), dtype=dtype)
    return convolution.bias.to(dtype)
