"""The other side: transformers' CHMv2, and what a user would write around it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xchmv2.errors import CHMv2Error
from xchmv2.model.files import IMAGE_MEAN, IMAGE_STD
from xchmv2.raster import FloatArray, TileAxis

# Private imports: normalisation of the published checkpoint.

#: Normalised pixels (B, 3, h, w) to heights (B, h, w) [m].
Forward = Callable[[torch.Tensor], torch.Tensor]

_MEAN = np.array(IMAGE_MEAN, np.float32).reshape(3, 1, 1)
_STD = np.array(IMAGE_STD, np.float32).reshape(3, 1, 1)


def transformers_version() -> str | None:
    """Version of transformers, None where it is not installed."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def load_published(
    folder: str | os.PathLike[str], device: str, dtype: torch.dtype = torch.float32
) -> Any:
    """Load a checkpoint with transformers, with its fused attention.

    Parameters
    ----------
    folder : path
        Checkpoint folder.
    device : str
        Torch device.
    dtype : torch.dtype
        Of the weights: the way transformers itself does another precision.

    Returns
    -------
    CHMv2ForDepthEstimation
        The published implementation, ready for inference.

    Raises
    ------
    CHMv2Error
        If transformers is missing or has no CHMv2.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from transformers import CHMv2ForDepthEstimation
            from transformers.utils import logging
        except ImportError as error:
            raise CHMv2Error(
                "transformers of version 5.4 or later, to compare with",
                transformers_version() or "none",
                'install it: pip install "xchmv2[benchmark]"',
            ) from error
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        model = CHMv2ForDepthEstimation.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    return model.eval().to(device)


def published_forward(model: Any) -> Forward:
    """Wrap the published model as a function from pixels to heights."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(pixels.to(model.dtype)).predicted_depth
        return found.float()

    return forward


def careful_script(
    forward: Forward,
    image: npt.NDArray[np.uint8],
    rows: TileAxis,
    cols: TileAxis,
    *,
    batch: int,
    device: str,
) -> FloatArray:
    """Predict a scene the way a careful user would: batches of tiles, blended by their weights.

    Parameters
    ----------
    forward : callable
        The network.
    image : numpy.ndarray
        (3, H, W) uint8, all valid, in memory.
    rows, cols : TileAxis
        The tiles.
    batch : int
        Tiles per forward.
    device : str
        Torch device.

    Returns
    -------
    numpy.ndarray
        (H, W) float32 [m].
    """
    total = np.zeros(image.shape[1:], np.float32)
    tiles = list(
        product(
            zip(rows.starts, rows.weights, strict=True), zip(cols.starts, cols.weights, strict=True)
        )
    )
    for members, heights in _batches(forward, image, tiles, batch, device, rows.tile):
        for ((top, wy), (left, wx)), height in zip(members, heights, strict=True):
            total[top : top + rows.tile, left : left + cols.tile] += wy[:, None] * wx * height
    return total


def sliding_window(
    forward: Forward, image: npt.NDArray[np.uint8], tile: int, *, batch: int, device: str
) -> FloatArray:
    """Predict a scene by the common sliding window: tiles that overlap by half, averaged.

    Parameters
    ----------
    forward : callable
        The network.
    image : numpy.ndarray
        (3, H, W) uint8, at least one tile wide and high.
    tile : int
        Side of a tile [px].
    batch : int
        Tiles per forward.
    device : str
        Torch device.

    Returns
    -------
    numpy.ndarray
        (H, W) float32 [m].
    """
    rows, cols = (_half_overlapping(size, tile) for size in image.shape[1:])
    total, count = (np.zeros(image.shape[1:], np.float32) for _ in range(2))
    tiles = [((top, None), (left, None)) for top, left in product(rows, cols)]
    for members, heights in _batches(forward, image, tiles, batch, device, tile):
        for ((top, _), (left, _)), height in zip(members, heights, strict=True):
            total[top : top + tile, left : left + tile] += height
            count[top : top + tile, left : left + tile] += 1
    return total / count


def half_overlapping_tiles(shape: Sequence[int], tile: int) -> int:
    """Count the tiles of ``sliding_window`` over an image of this shape."""
    rows, cols = (len(_half_overlapping(size, tile)) for size in shape)
    return rows * cols


def _half_overlapping(size: int, tile: int) -> list[int]:
    """List starts every half tile, the last one moved inward."""
    last = size - tile
    return sorted({min(start, last) for start in range(0, last + tile // 2, tile // 2)})


def _batches(
    forward: Forward,
    image: npt.NDArray[np.uint8],
    tiles: Sequence[tuple[tuple[int, Any], tuple[int, Any]]],
    batch: int,
    device: str,
    tile: int,
) -> Iterator[tuple[Sequence[Any], FloatArray]]:
    """Cut, normalise and forward tiles, batch by batch."""
    for first in range(0, len(tiles), batch):
        members = tiles[first : first + batch]
        cuts = [image[:, y : y + tile, x : x + tile] for (y, _), (x, _) in members]
        pixels = (np.stack(cuts).astype(np.float32) / 255 - _MEAN) / _STD
        with torch.inference_mode():
            heights = forward(torch.from_numpy(pixels).to(device)).cpu().numpy()
        yield members, heights
