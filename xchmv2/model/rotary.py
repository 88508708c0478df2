"""Rotary position embedding: where a patch lies in the image, as angles between channels.

References
----------
RoFormer, arXiv 2104.09864; DINOv3, arXiv 2508.10104.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xchmv2.model.config import DINOv3ViTConfig

Table = tuple[Tensor, Tensor]


def patch_coordinates(rows: int, columns: int, device: torch.device) -> Tensor:
    """Centres of patches on a scale from -1 to 1 along each axis.

    Returns
    -------
    Tensor [rows * columns, 2], float32
        (y, x) of each patch, row by row.
    """
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)  # [rows, columns, 2]
    return 2.0 * grid.flatten(0, 1) - 1.0  # [rows * columns, 2]


def rotation_table(coordinates: Tensor, head_dim: int, theta: float, prefix: int) -> Table:
    """Cosine and sine of the angle by which each pair of channels is turned.

    Parameters
    ----------
    coordinates : Tensor [P, 2], float32
        Patch centres from -1 to 1.
    head_dim : int
        Channels of one attention head.
    theta : float
        Base period.
    prefix : int
        Class and register tokens in front; they have no place, so their angle is 0.

    Returns
    -------
    tuple of two Tensor [prefix + P, head_dim / 2], float32
    """
    steps = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=coordinates.device)
    frequency = 2 * math.pi / theta**steps  # [head_dim / 4]
    angle = (coordinates[:, :, None] * frequency).flatten(1)  # [P, head_dim / 2]
    angle = F.pad(angle, (0, 0, prefix, 0))  # [prefix + P, head_dim / 2]
    return angle.cos(), angle.sin()


@functools.lru_cache(maxsize=32)
def _cached_table(
    grid: tuple[int, int], head_dim: int, theta: float, prefix: int, device: torch.device
) -> Table:
    # Shared between threads and calls. Two threads may both compute an entry: same values. Left
    # to the first caller's mode, a table made for inference could never be trained with.
    with torch.inference_mode(False), torch.no_grad():
        return rotation_table(patch_coordinates(*grid, device), head_dim, theta, prefix)


def _log_uniform(size: int, limit: float, like: Tensor) -> Tensor:
    log = math.log(limit)
    return like.new_empty(size).uniform_(-log, log).exp()


class RotaryEmbedding:
    """Rotary position embedding of the patch grid, with the random changes used in training."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        self.config = config
        self.prefix = 1 + config.num_register_tokens

    def __call__(self, grid: tuple[int, int], device: torch.device, *, training: bool) -> Table:
        """Return the rotation table of a grid of patches, see `rotation_table`."""
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        if not (training and self._augments):
            return _cached_table(grid, head_dim, theta, self.prefix, device)
        coordinates = self._augment(patch_coordinates(*grid, device))
        return rotation_table(coordinates, head_dim, theta, self.prefix)

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


def rotate(x: Tensor, table: Table) -> Tensor:
    """Turn pairs of channels (i, i + head_dim / 2) by the angles of the table.

    Parameters
    ----------
    x : Tensor [..., N, head_dim]
    table : tuple of two Tensor [N, head_dim / 2]
    """
    cos, sin = table
    first, second = x.chunk(2, dim=-1)  # [..., N, head_dim / 2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
