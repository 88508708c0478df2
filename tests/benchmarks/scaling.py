"""Part ``scaling``: how the scheduler keeps many GPU workers busy, without any GPU."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import dask.array as da
import numpy as np
import numpy.typing as npt

from xchmv2.errors import CHMv2Error
from xchmv2.inference import Layer, ModelSpec, Predictor, Scaling, hold_predictor
from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation
from xchmv2.model.files import IMAGE_MEAN, IMAGE_STD
from xchmv2.predict import predict
from xchmv2.raster import FloatArray, TileAxis, TileRun

from .imagery import ORIGIN, as_cube
from .networks import SMALLER
from .report import Table
from .settings import Settings

# Private imports: normalisation of the published checkpoint.

#: The stand-in's name in graphs; it has no weights.
SPEC = ModelSpec("stand-in", None, "0" * 64, "0" * 64, "cpu", "float32")
# A seventh of the default tile, overlap and block: the same graph, a fiftieth of the pixels.
_TILE, _OVERLAP, _BLOCK = 64, 9, 585
_THREADS = 4


class Sleeper(Predictor):
    """Takes the place of a network: sleeps as long as a GPU would compute, one at a time a worker.

    Parameters
    ----------
    seconds : float
        Time of one tile [s].
    """

    def __init__(self, seconds: float) -> None:
        model = CHMv2ForDepthEstimation(CHMv2Config.from_dict(SMALLER["tiny"]))
        mean, std = IMAGE_MEAN, IMAGE_STD
        super().__init__(model, device="cpu", dtype="float32", mean=mean, std=std)
        self._seconds = seconds
        self._cards: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._counting = threading.Lock()
        self.tiles = 0

    def accumulate(
        self,
        image: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        rows: TileRun,
        cols: TileRun,
        *,
        scaling: Scaling,
        layers: Sequence[Layer],
        batch_size: int | Literal["auto"] = "auto",
    ) -> dict[str, FloatArray] | None:
        """Sleep for the group's tiles on this worker's card; heights are 0 m."""
        from distributed import get_worker

        tiles = len(rows.tiles) * len(cols.tiles)
        with self._counting:
            self.tiles += tiles
            card = self._cards[get_worker().address]
        with card:
            time.sleep(tiles * self._seconds)
        return {"height": np.zeros(valid.shape, np.float32)}


def measure_scaling(settings: Settings) -> list[Table]:
    """Predict scenes that grow with the number of simulated GPU workers.

    Parameters
    ----------
    settings : Settings
        Numbers of workers, blocks for each, seconds per tile.

    Returns
    -------
    list of Table
        One row per number of workers.

    Raises
    ------
    CHMv2Error
        If distributed is not installed.
    """
    rows = [_run(settings, workers) for workers in settings.workers]
    title = (
        f"Scheduler: simulated GPU workers of {1e3 * settings.seconds_per_tile:g} ms per tile, "
        f"{settings.blocks_per_worker} blocks for each"
    )
    return [Table("scaling", title, rows, _NOTES)]


def _run(settings: Settings, workers: int) -> dict[str, Any]:
    """Time one number of workers, all in this process."""
    client_of, cluster_of, forwards_on_gpus = _distributed()
    blocks = workers * settings.blocks_per_worker
    tall = 2 ** (int(math.log2(blocks)) // 2)
    shape = (tall * _BLOCK, blocks // tall * _BLOCK)
    sleeper = Sleeper(settings.seconds_per_tile)
    hold_predictor(SPEC, sleeper)
    cluster = cluster_of(
        n_workers=workers,
        threads_per_worker=_THREADS,
        processes=False,
        resources={"GPU": 1},
        dashboard_address=":0",
        memory_limit=0,
    )
    with cluster, client_of(cluster) as client:
        client.wait_for_workers(workers)
        client.register_plugin(forwards_on_gpus())
        cube = as_cube(da.zeros((3, *shape), chunks=(3, _BLOCK, _BLOCK), dtype="uint8") + 1)
        grid = {"tile": _TILE, "overlap": _OVERLAP, "block": _BLOCK}
        begun, used = time.perf_counter(), time.process_time()
        heights: Any = predict(cube, SPEC, **grid)  # type: ignore[arg-type]
        client.compute(heights.data.map_blocks(_corner, dtype="f4", chunks=(1, 1))).result()
        seconds, computed = time.perf_counter() - begun, time.process_time() - used
        tasks = len(dict(heights.data.dask))
    needed = math.prod(
        len(TileAxis(size, _TILE, _OVERLAP, origin).starts)
        for size, origin in zip(shape, ORIGIN, strict=True)
    )
    ideal = needed * settings.seconds_per_tile / workers
    return {
        "workers": workers,
        "blocks": blocks,
        "tasks": tasks,
        "tiles forwarded / needed": sleeper.tiles / needed,
        "GPU time [s]": ideal,
        "elapsed [s]": seconds,
        "CPU [s]": computed,
        "CPU [ms/task]": 1e3 * computed / tasks,
        "efficiency": ideal / seconds,
    }


def _corner(block: FloatArray) -> FloatArray:
    """Keep one pixel of a block, so that results cost nothing to send."""
    return block[:1, :1]


def _distributed() -> tuple[Any, Any, Any]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise CHMv2Error(
            "dask's distributed, to simulate a cluster",
            "none",
            'install it: pip install "xchmv2[cluster]"',
        ) from error
    from xchmv2.predict.warming import ForwardsOnGPUs

    return Client, LocalCluster, ForwardsOnGPUs


_NOTES = (
    "Scheduler and all workers share one process and its cores, so this is a lower bound: on a "
    "cluster the workers have their own. Each worker declares one GPU, has four threads, and a "
    "stand-in for the network that sleeps, one group at a time. Tiles, overlap and blocks are a "
    "seventh of the default ones: the same tasks and tiles with a fiftieth of the pixels, because "
    "no one machine could do the pixel work of many. CPU: what planning, scheduler and all "
    "workers computed in that one process; where it comes near the time elapsed, it is the process "
    "that is full, not the scheduler. Efficiency: time that each GPU must compute over time "
    "elapsed, planning included."
)
