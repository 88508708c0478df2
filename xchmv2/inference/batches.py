"""How many tiles go through the network at once."""

from __future__ import annotations

import functools
from typing import Literal

import torch

# On a processor larger batches gain nothing once a tile of this many pixels keeps it busy.
_PROCESSOR_BATCH_PIXELS = 448 * 448
# Activations of the head at full resolution, bfloat16, as an upper bound per input pixel.
_ACCELERATOR_BYTES_PER_PIXEL = 6_000
_MEMORY_SHARE = 0.5
_LARGEST_BATCH = 64
# Compiled, a window's last batch is filled up; tiles of 448 px keep a GPU busy eight at a time.
_COMPILED_BATCH = 8


def resolve_batch(
    batch_size: int | Literal["auto"], pixels: int, device: torch.device, *, compiled: bool
) -> int:
    """Turn "auto" into a number of tiles for a device of this process.

    Parameters
    ----------
    batch_size : int or "auto"
        What was asked for; "auto" fills half of a card's free memory, up to what keeps it busy.
    pixels : int
        Pixels of one tile, padding included.
    device : torch.device
        Where the network runs.
    compiled : bool
        Whether it is compiled.

    Returns
    -------
    int
        Tiles per forward, 1 or more.
    """
    if batch_size != "auto":
        return batch_size
    if device.type != "cuda":
        return max(1, _PROCESSOR_BATCH_PIXELS // pixels)
    fitting = int(_MEMORY_SHARE * _free_memory(device) / (pixels * _ACCELERATOR_BYTES_PER_PIXEL))
    # A power of two: a little more or less free memory gives the same batches, and the same bits.
    power = 1 << (max(1, fitting).bit_length() - 1)
    return min(_COMPILED_BATCH if compiled else _LARGEST_BATCH, power)


@functools.cache
def _free_memory(device: torch.device) -> int:
    """Memory of a card that was free when this process first asked [bytes].

    Once, so that a process keeps its batches; what others take later is met by halving them.
    """
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
