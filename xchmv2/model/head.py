"""Dense prediction head: tokens of four stages to features at twice the fused resolution.

Four rearrangements leave the published result as it is and cost less: the class token's half of
the readout is computed once per image; the 1x1 projection of a fusion block runs before its
upsampling, with which it commutes; each of the last two 3x3 convolutions mixes channels before the
upsampling in front of it; and maps stay in channels_last from the tokens on.

References
----------
DPT, arXiv 2103.13413; CHMv2, arXiv 2603.06382.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xchmv2.model.config import CHMv2Config
from xchmv2.model.products import linear
from xchmv2.model.upsampling import (
    upsample,
    upsample_convolve,
    upsample_convolve_strips,
)


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """View patch tokens [B, P, C] as a map [B, C, rows, columns] in channels_last."""
    batch, _, channels = tokens.shape
    maps = tokens.reshape(batch, *grid, channels)  # [B, rows, columns, C]
    return maps.permute(0, 3, 1, 2)  # [B, C, rows, columns]


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
            layer(tokens_to_map(self._read_out(i, tokens), grid))
            for i, (layer, tokens) in enumerate(zip(self.layers, stages, strict=True))
        ]

    def _read_out(self, index: int, tokens: Tensor) -> Tensor:  # [B, N, C] -> [B, P, C]
        cls, patches = tokens[:, :1], tokens[:, self.prefix :]
        if self.readout_type == "project":
            return cast(Tensor, self.readout_projects[index](patches, cls))
        return patches + cls if self.readout_type == "add" else patches


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
        return upsample_convolve(self._finer(x), self._second).relu_()

    def strips(self, x: Tensor) -> Iterator[Tensor]:
        """Do the same in parts, in order; see `upsample_convolve_strips`."""
        for strip in upsample_convolve_strips(self._finer(x), self._second):
            yield strip.relu_()

    def _finer(self, x: Tensor) -> Tensor:  # [B, fused, h, w] -> [B, fused / 2, 2h, 2w]
        return upsample_convolve(x, cast(nn.Conv2d, self.head["0"]))

    @property
    def _second(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.head["2"])


class DPTHead(nn.Module):
    """Dense prediction head of CHMv2.

    Parameters
    ----------
    config : CHMv2Config

    References
    ----------
    DPT, arXiv 2103.13413.
    """

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

        Parameters
        ----------
        stages : tuple of Tensor [B, 1 + registers + patches, C]
            Tokens of the backbone's stages, shallow to deep.
        grid : tuple of int
            Rows and columns of patches.

        Returns
        -------
        Tensor [B, head_hidden_size, H, W]
            Features, not negative; ``conv_depth.last`` makes the logits from them.
        """
        return cast(Tensor, self.conv_depth(self._fuse(stages, grid)))

    def strips(self, stages: tuple[Tensor, ...], grid: tuple[int, int]) -> Iterator[Tensor]:
        """Give the same features in parts that are gone from memory one by one.

        Parameters
        ----------
        stages, grid
            As `forward` takes them.

        Yields
        ------
        Tensor [b, head_hidden_size, rows, W]
            Image by image, from top to bottom; all of them at once off the processor.
        """
        return self.conv_depth.strips(self._fuse(stages, grid))

    def _fuse(self, stages: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        maps = self.reassemble_stage(stages, grid)
        maps = [conv(x) for conv, x in zip(self.convs, maps, strict=True)][::-1]
        fused = self.fusion_layers[0](maps[0])
        for fusion, finer in zip(self.fusion_layers[1:], maps[1:], strict=True):
            fused = fusion(upsample(fused), finer)
        return cast(Tensor, fused)
