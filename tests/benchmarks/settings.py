"""What the parts of the benchmark are told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from xchmv2.model.files import OVERLAP, TILE

# Private imports: defaults of the published checkpoint.


@dataclass(frozen=True)
class Settings:
    """Sizes and counts of one run of the benchmark.

    Parameters
    ----------
    checkpoint : str
        Folder with the weights that both implementations load.
    config : str
        What the network is called in tables.
    tile, overlap : int
        Side of a tile and what neighbouring tiles share [px].
    side : int
        Side of the scene [px].
    batch : int
        Tiles per forward.
    runs : int
        Rounds of each comparison; figures are medians.
    threads : int
        Threads of one forward on the CPU.
    device : str
        Torch device, such as "cpu" or "cuda:0".
    compiled : bool
        Whether networks are timed under torch.compile too; compiling takes a minute or more each.
    dtype : {"float32", "bfloat16"}
        Precision of all parts but ``model``, which tries both.
    clock : {"wall", "cpu"}
        What times are: time passed, or time that this process computed, which other work on a
        busy machine does not disturb. Planning and simulated workers are timed by the wall.
    patience : float
        What takes longer than this is timed once and not repeated [s].
    workers : tuple of int
        Numbers of simulated GPU workers.
    seconds_per_tile : float
        What a simulated GPU takes for one tile [s].
    blocks_per_worker : int
        Blocks that each simulated worker gets.
    graph_side, graph_dates : int
        Side [px] and dates of the cube whose graph is built.
    """

    checkpoint: str
    config: str = "small"
    tile: int = TILE
    overlap: int = OVERLAP
    side: int = 1024
    batch: int = 1
    runs: int = 5
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    device: str = "cpu"
    compiled: bool = True
    dtype: str = "float32"
    clock: str = "wall"
    patience: float = 60.0
    workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    seconds_per_tile: float = 0.01
    blocks_per_worker: int = 8
    graph_side: int = 100_352
    graph_dates: int = 10

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.checkpoint)

    @property
    def timer(self) -> Callable[[], float]:
        """The clock as a function that tells seconds."""
        return time.process_time if self.clock == "cpu" else time.perf_counter

    @property
    def block(self) -> int:
        """Side of a block that splits the scene in four, at least one tile [px]."""
        return max(self.tile, self.side // 2)
