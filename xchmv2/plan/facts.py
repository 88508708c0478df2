"""The plan itself: numbers that follow from the grid of a prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Self

from xchmv2._dask import Job
from xchmv2.errors import CHMv2Error
from xchmv2.plan.memory import TaskMemory
from xchmv2.plan.skipping import Skipped


@dataclass(frozen=True, repr=False)
class PlannedWork:
    """What is known of a prediction before it runs.

    Parameters
    ----------
    job : Job
        Tile grid, blocks, layers and model, as the prediction's tasks hold them.
    source_sizes, sizes : mapping of str to int
        Dims of the imagery without its bands, and of the result, in the result's order [px].
    values : str
        dtype of the imagery.
    lazy : bool
        Whether the result will be dask-backed; else ``predict`` computes at once.
    resampled : bool
        Whether the imagery is resampled to another grid.
    period : tuple of str or None
        First and last day.
    crs : str or None
        EPSG code or name.
    source_pixel, pixel : tuple of float or None
        Height and width of a pixel on the ground, of imagery and result [m]; None without a CRS.
    date_chunks : int
        Chunks of dates: tasks handle those of one chunk together.
    skipped : Skipped or None
        Tiles without a valid pixel; None where it takes reading the imagery to know.
    memory : TaskMemory
        Arrays of the largest tasks.
    model_problem : str or None
        Why ``predict`` would refuse the model.
    device, batch_size, seconds_per_tile : optional
        Device of this process, tiles a forward there, and what a tile of this size took this
        process so far [s]. None under a distributed client, whose workers have their own; the
        time is None too before this process has forwarded such tiles.
    """

    job: Job
    source_sizes: Mapping[str, int]
    sizes: Mapping[str, int]
    values: str
    lazy: bool
    resampled: bool
    period: tuple[str, str] | None
    crs: str | None
    source_pixel: tuple[float, float] | None
    pixel: tuple[float, float] | None
    date_chunks: int
    skipped: Skipped | None
    memory: TaskMemory
    model_problem: str | None = None
    device: str | None = None
    batch_size: int | None = None
    seconds_per_tile: float | None = None
    #: Whether the time a tile was given to :meth:`timed` and not measured.
    assumed: bool = False

    @property
    def dates(self) -> int:
        """Images: the product of all dims but the two spatial ones."""
        return math.prod(self.sizes.values()) // (self.job.rows.size * self.job.cols.size)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Tiles along y and x."""
        return len(self.job.rows.starts), len(self.job.cols.starts)

    @property
    def tiles(self) -> int:
        """Tiles of all dates, skipped ones included."""
        return math.prod(self.tile_grid) * self.dates

    @property
    def forwards(self) -> int:
        """Tiles that will be put through the network, or at most will as far as is known."""
        return self.tiles - (0 if self.skipped is None else self.skipped.tiles)

    @property
    def skipped_share(self) -> float | None:
        """Share of the tiles that hold no valid pixel, 0 to 1; at least that if not exact."""
        return None if self.skipped is None else self.skipped.tiles / self.tiles

    @property
    def block_grid(self) -> tuple[int, int]:
        """Blocks along y and x."""
        rows, cols = self.job.chunks
        return len(rows), len(cols)

    @property
    def group_tasks(self) -> int:
        """Tasks that run the network."""
        return math.prod(len(runs) for runs in self.job.runs) * self.date_chunks

    @property
    def block_tasks(self) -> int:
        """Tasks that make the output's chunks, for all layers."""
        return math.prod(self.block_grid) * self.date_chunks * len(self.job.layers)

    @property
    def tasks(self) -> int:
        """Tasks of the prediction, without those that read the imagery."""
        return self.group_tasks + self.block_tasks

    @property
    def megapixels(self) -> float:
        """Pixels of the result over all dates, one layer [Mpx]."""
        return math.prod(self.sizes.values()) / 1e6

    @property
    def area(self) -> float | None:
        """Ground that one date covers, by the pixel at its centre [km2]; None without a CRS."""
        if self.pixel is None:
            return None
        return self.job.rows.size * self.job.cols.size * math.prod(self.pixel) / 1e6

    @property
    def output_bytes(self) -> int:
        """Size of the result in memory, all layers [bytes]."""
        return 4 * math.prod(self.sizes.values()) * len(self.job.layers)

    @property
    def seconds(self) -> float | None:
        """Time the network takes on one device [s], for ``forwards``; None if not known."""
        return None if self.seconds_per_tile is None else self.forwards * self.seconds_per_tile

    def timed(self, tiles_per_second: float) -> Self:
        """Return the same plan at a speed that you know.

        Parameters
        ----------
        tiles_per_second : float
            Tiles that all devices together forward in a second, as
            ``python -m xchmv2.benchmark`` measures for one.

        Returns
        -------
        PlannedWork
            With ``seconds``.

        Raises
        ------
        CHMv2Error
            If it is not a number above 0.
        """
        number = isinstance(tiles_per_second, Real) and not isinstance(tiles_per_second, bool)
        if not number or not 0 < tiles_per_second < math.inf:
            raise CHMv2Error(
                "tiles a second as a number above 0",
                f"tiles_per_second={tiles_per_second!r}",
                "for example plan.timed(20)",
            )
        return replace(self, seconds_per_tile=1 / float(tiles_per_second), assumed=True)
