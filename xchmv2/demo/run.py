"""The whole job on a synthetic forest: imagery, prediction, Zarr, table and picture."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

import xchmv2.accessor  # noqa: F401  (registers .chmv2)
from xchmv2 import plotting
from xchmv2.demo.forest import RESOLUTION, TIMES, make_forest
from xchmv2.demo.picture import save_picture
from xchmv2.demo.report import write_next_steps, write_tables
from xchmv2.demo.scores import HeightScore, LossScore, score_heights, score_losses
from xchmv2.errors import CHMv2Error, DemoModelWarning

if TYPE_CHECKING:
    from xchmv2.inference import ModelLike

__all__ = ["SEED", "SIZE", "Demonstration", "HeightScore", "LossScore", "run_demonstration"]

#: A scene with tall forest where the clear-cuts fall, a lake, a farm and a meadow.
SEED = 10
#: Side of the scene [px].
SIZE = 640
_COLOURS = ["red", "green", "blue"]


@dataclass(frozen=True)
class Demonstration:
    """What a demonstration made.

    Parameters
    ----------
    store : Path
        Zarr store with imagery, truth (`true_height`) and prediction (`canopy_height`).
    picture : Path
        PNG file.
    heights : list of HeightScore
        One for each date.
    losses : list of LossScore
        One for each step between dates.
    megapixels, seconds : float
        Imagery predicted from, all dates together [Mpx], and the time that took [s].
    """

    store: Path
    picture: Path
    heights: list[HeightScore]
    losses: list[LossScore]
    megapixels: float
    seconds: float

    @property
    def tables(self) -> str:
        """The scores, for people."""
        return write_tables(self.heights, self.losses, self.megapixels, self.seconds)

    @property
    def next_steps(self) -> str:
        """Three things to try, ready to paste."""
        return write_next_steps(self.store)


def run_demonstration(
    folder: str | os.PathLike[str] = ".",
    *,
    seed: int = SEED,
    size: int = SIZE,
    overwrite: bool = False,
    model: ModelLike = "demo",
    report: Callable[[str], None] = lambda line: None,
) -> Demonstration:
    """Make a synthetic forest on three dates, predict its height, and hold it against the truth.

    Parameters
    ----------
    folder : path
        Where `demo.zarr` and `demo.png` go; made if it does not exist.
    seed : int
        Seed of the forest.
    size : int
        Side of the scene [px].
    overwrite : bool
        Whether to replace a `demo.zarr` and a `demo.png` that are there.
    model : str, path or CHMv2ForDepthEstimation
        What to predict with.
    report : callable
        Told in a line what is being done.

    Returns
    -------
    Demonstration
        Files and scores.

    Raises
    ------
    CHMv2Error
        If files are there already, matplotlib is missing, or seed or size is out of range.
    """
    store, picture = Path(folder) / "demo.zarr", Path(folder) / "demo.png"
    plotting.require_matplotlib()
    forest = make_forest(seed, size)
    _make_way([store, picture], overwrite)
    side = size * RESOLUTION
    report(f"Growing a synthetic forest of {side:.0f} x {side:.0f} m, seen on {len(TIMES)} dates")
    forest.to_zarr(store, mode="w", zarr_format=3, consolidated=False)
    report(f"Predicting its canopy height into {store}")
    started = time.perf_counter()
    _predict_into(store, model)
    seconds = time.perf_counter() - started
    cube = xr.open_zarr(store, consolidated=False).load()
    heights = score_heights(cube["canopy_height"], cube["true_height"])
    losses = score_losses(cube["canopy_height"], cube["true_height"])
    report(f"Drawing {picture}")
    save_picture(picture, cube, heights, losses)
    megapixels = cube["canopy_height"].size / 1e6
    return Demonstration(store, picture, heights, losses, megapixels, seconds)


def _make_way(paths: list[Path], overwrite: bool) -> None:
    """Make the folder, and let nothing be lost that was not meant to be."""
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise CHMv2Error(
            f"no {' or '.join(path.name for path in paths)} in {str(paths[0].parent)!r}",
            " and ".join(path.name for path in there),
            "name another folder, or replace them: xchmv2 demo --overwrite",
        )
    for path in there:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    paths[0].parent.mkdir(parents=True, exist_ok=True)


def _predict_into(store: Path, model: ModelLike) -> None:
    """Predict lazily from the store's imagery, and compute into the same store."""
    cube = xr.open_zarr(store, consolidated=False)
    with warnings.catch_warnings():
        # That the demo model knows synthetic forest alone is what the report says itself.
        warnings.simplefilter("ignore", DemoModelWarning)
        height = cube[_COLOURS].chmv2.predict(model, valid=cube["valid"])
        # The coordinates are in the store already.
        plain = height.drop_vars(list(height.coords)).to_dataset(name="canopy_height")
        plain.assign_attrs(cube.attrs).to_zarr(store, mode="a", consolidated=False)
