"""The DINOv3 vision transformer: patch embedding, rotary positions, attention blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xchmv2.model.config import DINOv3ViTConfig
from xchmv2.model.products import Linear, linear

_Table = tuple[Tensor, Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class DINOv3ViTBackbone(nn.Module):
    """Vision transformer (DINOv3, arXiv 2508.10104): pixels to tokens of the configured stages."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.rotary = RotaryEmbedding(config)
        self.model = Encoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixels: Tensor, *, hidden_states: bool = False, attentions: bool = False
    ) -> BackboneOutput:
        """Run the blocks that are needed and keep what is asked for.

        `pixels` [B, bands, H, W] are normalised; rows and columns beyond the last whole patch are
        left out. `hidden_states` and `attentions` are whether to keep all of these.
        """
        (high, wide), last = self.config.patch_shape, self.config.stages[-1]
        grid = (pixels.shape[-2] // high, pixels.shape[-1] // wide)
        table = self.rotary(grid, pixels.device, training=self.training)
        x = self.embeddings(pixels)
        kept, maps = {0: x}, []
        needed = len(self.model.layer) if hidden_states or attentions else last
        for index, block in enumerate(self.model.layer[:needed], start=1):
            x, weights = block(x, table, weights=attentions)
            maps.append(weights)
            if hidden_states or index in self.config.stages:
                kept[index] = x
        return BackboneOutput(
            stages=tuple(self._stage(i, kept[i]) for i in self.config.stages),
            grid=grid,
            hidden_states=tuple(kept.values()) if hidden_states else None,
            attentions=tuple(maps) if attentions else None,
        )

    def _stage(self, index: int, x: Tensor) -> Tensor:
        last = index == self.config.num_hidden_layers
        return cast(Tensor, self.norm(x)) if last or self.config.apply_layernorm else x


@dataclass(frozen=True)
class BackboneOutput:
    """Result of one pass through the backbone.

    `stages`: tokens of the configured stages, normalised as configured, each [B, 1 + registers +
    patches, C]; `grid`: rows and columns of patches; `hidden_states`: embedding and output of every
    block, not normalised, each [B, N, C], and `attentions`: attention weights of every block, each
    [B, heads, N, N], if asked for.
    """

    stages: tuple[Tensor, ...]
    grid: tuple[int, int]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Embeddings(nn.Module):
    """Pixels to tokens: class token, registers, then patches row by row."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_shape
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        # Only pre-training uses it, but every checkpoint has it.
        self.mask_token = nn.Parameter(torch.empty(1, 1, size))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, size))
        self.patch_embeddings = nn.Conv2d(config.num_channels, size, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, bands, H, W] -> [B, N, C]
        """Cut the image into patches and put class and register tokens in front."""
        patches = self.patch_embeddings(pixels.to(self.patch_embeddings.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # [B, C, rows, columns] -> [B, P, C]
        prefix = torch.cat((self.cls_token, self.register_tokens), dim=1)  # [1, 1 + registers, C]
        prefix = prefix.to(patches.dtype).expand(len(patches), -1, -1)
        return torch.cat((prefix, patches), dim=1)


class Encoder(nn.Module):
    """The stack of blocks; a module of its own because checkpoints name it so."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class Block(nn.Module):
    """One transformer block: attention and MLP, each normalised first and added back scaled."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_scale2 = LayerScale(config)

    def forward(
        self, x: Tensor, table: _Table, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens [B, N, C] and, if asked for, attention weights [B, heads, N, N]."""
        branch, attention = self.attention(self.norm1(x), table, weights=weights)
        x = self.layer_scale1(x, branch)
        return self.layer_scale2(x, self.mlp(self.norm2(x))), attention


class FusedQKV(nn.Module):
    """Query, key and value projections as one matrix product.

    State dicts keep the published layout, ``{q,k,v}_proj`` with one weight each; a bias that the
    configuration leaves out stays zero in training too.
    """

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.qkv_weight = nn.Parameter(torch.empty(3 * size, size))
        biased = {"q": config.query_bias, "k": config.key_bias, "v": config.value_bias}
        for name, has in biased.items():
            bias = nn.Parameter(torch.zeros(size)) if has else None
            self.register_parameter(f"{name}_bias", bias)

    def project(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, 3 * C]
        """Project tokens to queries, keys and values, side by side."""
        return linear(x, self.qkv_weight, self._bias())

    def _bias(self) -> Tensor | None:
        biases: list[Tensor | None] = [getattr(self, f"{name}_bias") for name in "qkv"]
        if all(bias is None for bias in biases):
            return None
        zeros = self.qkv_weight.new_zeros(self.qkv_weight.shape[1])
        return torch.cat([zeros if bias is None else bias for bias in biases])

    def _published(self) -> dict[str, Tensor]:
        """Name every projection as checkpoints do; the tensors are views of the parameters."""
        parts = dict(zip("qkv", self.qkv_weight.chunk(3), strict=True))
        tensors = {f"{name}_proj.weight": part for name, part in parts.items()}
        for name in parts:
            bias = getattr(self, f"{name}_bias")
            if bias is not None:
                tensors[f"{name}_proj.bias"] = bias
        return tensors

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._published().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        given: dict[str, Tensor] = {}
        for name, current in self._published().items():
            tensor = state_dict.pop(prefix + name, None)
            if tensor is None:
                missing.append(prefix + name)
            elif tensor.shape != current.shape:
                found, wanted = list(tensor.shape), list(current.shape)
                errors.append(f"size mismatch for {prefix}{name}: {found}, expected {wanted}")
                tensor = None
            given[name] = current.detach() if tensor is None else tensor
        state_dict[f"{prefix}qkv_weight"] = torch.cat([given[f"{n}_proj.weight"] for n in "qkv"])
        for name in "qkv":
            if f"{name}_proj.bias" in given:
                state_dict[f"{prefix}{name}_bias"] = given[f"{name}_proj.bias"]
        rest = (state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        super()._load_from_state_dict(*rest)


class Attention(FusedQKV):
    """Multi-head self-attention with rotary position embedding of the patches."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(config)
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(
        self, x: Tensor, table: _Table, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens [B, N, C] by attention; ``weights`` asks for [B, heads, N, N] too."""
        batch, tokens, size = x.shape
        qkv = self.project(x).view(batch, tokens, 3 * self.heads, self.head_dim).transpose(1, 2)
        if qkv.device.type == "cpu":
            # Each head's rows are read many times; on a GPU strides are free.
            qkv = qkv.contiguous()
        qk, v = qkv.tensor_split((2 * self.heads,), dim=1)  # [B, 2 * heads and heads, N, head_dim]
        cos, sin = (part.to(qk.dtype) for part in table)  # [N, head_dim / 2]
        q, k = _rotate(qk, (cos, sin)).chunk(2, dim=1)  # [B, heads, N, head_dim] each
        dropout = self.dropout if self.training else 0.0
        if weights:
            out, attention = _explicit_attention(q, k, v, dropout)
        else:
            out, attention = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), None
        out = out.transpose(1, 2).reshape(batch, tokens, size)  # [B, N, C]
        return self.o_proj(out), attention


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights [B, heads, N, N]."""
    weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return weights @ v, weights


class MLP(nn.Module):
    """Two-layer perceptron on each token, gated if the configuration says so."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(size, inner, bias=bias) if config.use_gated_mlp else None
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        """Transform each token by itself."""
        if self.gate_proj is None:
            return cast(Tensor, self.down_proj(self.activation(self.up_proj(x))))
        return cast(Tensor, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))


class LayerScale(nn.Module):
    """Adds a residual branch, scaled per channel and, in training, dropped per sample."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))
        self.initial = config.layerscale_value
        self.drop = config.drop_path_rate

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return ``x`` plus the scaled branch, both [B, N, C]."""
        if self.training and self.drop > 0:
            keep = 1.0 - self.drop
            branch = branch * branch.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)
        return torch.addcmul(x, branch, self.lambda1)


class RotaryEmbedding:
    """Rotary position embedding of the patch grid, with the random changes used in training."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        self.config = config
        self.prefix = 1 + config.num_register_tokens

    def __call__(self, grid: tuple[int, int], device: torch.device, *, training: bool) -> _Table:
        """Return the rotation table of a grid of patches, see `_rotation_table`."""
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        if not (training and self._augments):
            return _cached_table(grid, head_dim, theta, self.prefix, device)
        coordinates = self._augment(_patch_coordinates(*grid, device))
        return _rotation_table(coordinates, head_dim, theta, self.prefix)

    @property
    def _augments(self) -> bool:
        c = self.config
        return any(
            x is not None for x in (c.pos_embed_shift, c.pos_embed_jitter, c.pos_embed_rescale)
        )

    def _augment(self, coordinates: Tensor) -> Tensor:
        shift, jitter = self.config.pos_embed_shift, self.config.pos_embed_jitter
        rescale = self.config.pos_embed_rescale
        if shift is not None:
            coordinates = coordinates + coordinates.new_empty(2).uniform_(-shift, shift)
        if jitter is not None:
            coordinates = coordinates * _log_uniform(2, jitter, coordinates)
        if rescale is not None:
            coordinates = coordinates * _log_uniform(1, rescale, coordinates)
        return coordinates


def _log_uniform(size: int, limit: float, like: Tensor) -> Tensor:
    log = math.log(limit)
    return like.new_empty(size).uniform_(-log, log).exp()


@functools.lru_cache(maxsize=32)
def _cached_table(
    grid: tuple[int, int], head_dim: int, theta: float, prefix: int, device: torch.device
) -> _Table:
    # Shared between threads and calls. Two threads may both compute an entry: same values. Left
    # to the first caller's mode, a table made for inference could never be trained with.
    with torch.inference_mode(False), torch.no_grad():
        return _rotation_table(_patch_coordinates(*grid, device), head_dim, theta, prefix)


def _patch_coordinates(rows: int, columns: int, device: torch.device) -> Tensor:
    """Centres (y, x) of patches from -1 to 1, row by row: [rows * columns, 2], float32."""
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)  # [rows, columns, 2]
    return 2.0 * grid.flatten(0, 1) - 1.0  # [rows * columns, 2]


def _rotation_table(coordinates: Tensor, head_dim: int, theta: float, prefix: int) -> _Table:
    """Cosine and sine [prefix + P, head_dim / 2] of the angles that turn pairs of channels.

    Coordinates [P, 2] run from -1 to 1, `theta` is the base period. The `prefix` class and register
    tokens in front have no place, so their angle is 0.
    """
    steps = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=coordinates.device)
    frequency = 2 * math.pi / theta**steps  # [head_dim / 4]
    angle = (coordinates[:, :, None] * frequency).flatten(1)  # [P, head_dim / 2]
    angle = F.pad(angle, (0, 0, prefix, 0))  # [prefix + P, head_dim / 2]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, table: _Table) -> Tensor:
    """Turn pairs (i, i + head_dim / 2) of channels [..., N, head_dim] by a table's angles."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)  # [..., N, head_dim / 2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
