"""``xchmv2 demo``: make a forest, predict its height, compare it with the truth, and report."""

from __future__ import annotations

import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

import xchmv2.accessor  # noqa: F401  (registers .chmv2)
from xchmv2 import plotting
from xchmv2.demo.disturbance import Disturbance, Kind
from xchmv2.demo.figure import save_picture
from xchmv2.demo.synthetic import synthetic_forest
from xchmv2.demo.truth import DROP, OPENING, HeightScore, LossScore, score_heights, score_losses
from xchmv2.errors import CHMv2Error, DemoModelWarning

if TYPE_CHECKING:
    from xchmv2.inference import ModelLike

#: Seed of a scene with tall forest at the clear-cuts, a lake, a farm and a meadow.
SEED = 10
#: Side of the scene [px].
SIZE = 640
_COLOURS = ["red", "green", "blue"]
_CAVEAT = (
    "The demo model was trained on synthetic forest alone: elsewhere its heights mean nothing."
)
_TIMES = ("2019-07-01", "2021-08-25", "2024-07-10")
_RESOLUTION = 0.6  # [m]
_CLOUDS = (0.0, 0.04, 0.0)
_LEFT, _TOP = 500_000.0, 5_300_000.0


@dataclass(frozen=True)
class _Demonstration:
    """The files and scores of a demonstration.

    Parameters
    ----------
    store : Path
        Zarr store with imagery, truth (`true_height`) and prediction (`canopy_height`).
    picture : Path
        PNG file.
    heights : list of HeightScore
        One for each date.
    losses : list of LossScore
        One for each interval between dates.
    megapixels, seconds : float
        Size of the imagery, all dates together [Mpx], and duration of the prediction [s].
    """

    store: Path
    picture: Path
    heights: list[HeightScore]
    losses: list[LossScore]
    megapixels: float
    seconds: float

    @property
    def tables(self) -> str:
        """The scores as text."""
        return _write_tables(self.heights, self.losses, self.megapixels, self.seconds)

    @property
    def next_steps(self) -> str:
        """Three examples to try, ready to paste."""
        return _write_next_steps(self.store)


def run_demonstration(
    folder: str | os.PathLike[str] = ".",
    *,
    seed: int = SEED,
    size: int = SIZE,
    overwrite: bool = False,
    model: ModelLike = "demo",
    report: Callable[[str], None] = lambda line: None,
) -> _Demonstration:
    """Make a synthetic forest on three dates, predict its height, and compare it with the truth.

    Parameters
    ----------
    folder : path
        Folder for `demo.zarr` and `demo.png`; created if it does not exist.
    seed : int
        Seed of the forest.
    size : int
        Side of the scene [px].
    overwrite : bool
        Whether to replace an existing `demo.zarr` and `demo.png`.
    model : str, path or CHMv2ForDepthEstimation
        Model for the prediction.
    report : callable
        Called with one line of text at each step.

    Returns
    -------
    Demonstration
        Files and scores.

    Raises
    ------
    CHMv2Error
        If files exist already, matplotlib is missing, or seed or size is out of range.
    """
    store, picture = Path(folder) / "demo.zarr", Path(folder) / "demo.png"
    plotting.require_matplotlib()
    forest = _make_forest(seed, size)
    _clear_paths([store, picture], overwrite)
    side = size * _RESOLUTION
    report(f"Growing a synthetic forest of {side:.0f} x {side:.0f} m, seen on {len(_TIMES)} dates")
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
    return _Demonstration(store, picture, heights, losses, megapixels, seconds)


def _clear_paths(paths: list[Path], overwrite: bool) -> None:
    """Create the folder, and remove existing files only if they may be overwritten."""
    there, folder = [path for path in paths if path.exists()], str(paths[0].parent)
    if there and not overwrite:
        raise CHMv2Error(
            f"{' and '.join(path.name for path in there)} in {folder!r} would be overwritten",
            fix="name another folder, or replace them: xchmv2 demo "
            f"{shlex.quote(folder)} --overwrite",
        )
    for path in there:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    paths[0].parent.mkdir(parents=True, exist_ok=True)


def _predict_into(store: Path, model: ModelLike) -> None:
    """Predict lazily from the store's imagery, and write the heights to the same store."""
    cube = xr.open_zarr(store, consolidated=False)
    with warnings.catch_warnings():
        # The report itself states that the demo model is for synthetic forest only.
        warnings.simplefilter("ignore", DemoModelWarning)
        height = cube[_COLOURS].chmv2.predict(model, valid=cube["valid"])
        # The coordinates are in the store already.
        plain = height.drop_vars(list(height.coords)).to_dataset(name="canopy_height")
        plain.assign_attrs(cube.attrs).to_zarr(store, mode="a", consolidated=False)


def _write_tables(
    heights: Sequence[HeightScore], losses: Sequence[LossScore], megapixels: float, seconds: float
) -> str:
    """Return the scores as two tables.

    Parameters
    ----------
    heights, losses : sequence
        Scores of dates and of the intervals between them.
    megapixels : float
        Size of the imagery, all dates together [Mpx].
    seconds : float
        Duration of the prediction, with reading and writing [s].

    Returns
    -------
    str
        Lines of at most 80 characters.
    """
    lines = [f"{'height':<14}{'MAE':>9}{'bias':>11}{'R2':>8}"]
    lines += [f"{s.date:<14}{s.mae:7.2f} m{s.bias:+9.2f} m{s.r2:8.2f}" for s in heights]
    lines += ["", f"{'forest lost':<14}{'truth':>10}{'found':>11}{'overlap':>10}"]
    lines += [
        f"{s.years:<14}{s.true_area:7.2f} ha{s.found_area:8.2f} ha{s.overlap:10.2f}" for s in losses
    ]
    lines += [
        "",
        f"Loss is a drop of more than {DROP:g} m, cleaned by a {OPENING} x {OPENING} opening;",
        "overlap is intersection over union. Pixels under cloud are left out of both.",
        f"Speed: {megapixels / seconds:.2f} megapixels per second.",
        _CAVEAT,
    ]
    return "\n".join(lines)


def _write_next_steps(store: Path) -> str:
    """Return three examples that use the files of the demonstration, ready to paste.

    Parameters
    ----------
    store : Path
        The Zarr store.

    Returns
    -------
    str
        Numbered paragraphs; each has a sentence, then indented lines of Python or shell.
    """
    return "\n\n".join(
        f"{number}. {words}\n" + "\n".join(f"     {line}" for line in lines)
        for number, (words, lines) in enumerate(_next_steps(store), start=1)
    )


def _next_steps(store: Path) -> list[tuple[str, list[str]]]:
    image, lidar, height = (
        store.with_name(name) for name in ("image.tif", "lidar.tif", "height.tif")
    )
    tuned = store.with_name("my-model")
    paths = " ".join(shlex.quote(str(path)) for path in (image, lidar, tuned))
    return [
        (
            "Open the result in Python, and write its last date as GeoTIFF for your GIS:",
            [
                "import rioxarray, xarray as xr",
                f'cube = xr.open_zarr({str(store)!r}, consolidated=False, decode_coords="all")',
                "print(cube)",
                "last = cube.isel(time=-1)",
                'rgb = last[["red", "green", "blue"]].to_dataarray("band")',
                f"rgb.rio.to_raster({str(image)!r})",
                f"last.true_height.rio.to_raster({str(lidar)!r})",
            ],
        ),
        (
            "Predict from a GeoTIFF. Put your own image there and leave out model= for the\n"
            "   published CHMv2 weights (they are gated; the README says how to get them):",
            [
                "import rioxarray, xchmv2",
                f"image = rioxarray.open_rasterio({str(image)!r}, chunks={{'x': 2048, 'y': 2048}})",
                'height = image.chmv2.predict(model="demo")',
                f"height.rio.to_raster({str(height)!r})",
            ],
        ),
        (
            "Fine-tune on lidar, here the forest's truth (takes some minutes without a GPU):",
            [f"xchmv2 fine-tune {paths} --model demo --tile 128 --epochs 2"],
        ),
    ]


def _make_forest(seed: int, size: int) -> xr.Dataset:
    """Return the imagery and its truth, lazily.

    Parameters
    ----------
    seed : int
        Seed of the world.
    size : int
        Side of the scene [px].

    Returns
    -------
    Dataset
        As from :func:`xchmv2.datasets.synthetic_forest`, dask-backed, with the truth named
        `true_height` and `event_kind` as CF flags, which any Zarr reader understands.
    """
    forest = synthetic_forest(
        (size, size),
        resolution=_RESOLUTION,
        times=_TIMES,
        seed=seed,
        origin=(_LEFT, _TOP),
        disturbances=("clear_cut", "thinning", "windthrow", *_events(size * _RESOLUTION)),
        clouds=_CLOUDS,
        chunks=size,
    )
    kinds, codes = np.unique(forest["event_kind"].values.astype(str), return_inverse=True)
    flags = {"flag_values": np.arange(kinds.size, dtype=np.int8), "flag_meanings": " ".join(kinds)}
    coded = ("event", codes.astype(np.int8), flags)
    return forest.rename(canopy_height="true_height").assign_coords(event_kind=coded)


def _events(side: float) -> list[Disturbance]:
    """Return events at fixed places of a square scene with a side [m], for any seed."""
    plan: list[tuple[Kind, str, float, float, float, float]] = [
        # kind, date, share of the side from the left and the top, share of the area, angle
        ("clear_cut", "2020-02-10", 0.33, 0.36, 0.075, 20.0),
        ("clear_cut", "2022-11-20", 0.66, 0.62, 0.095, -35.0),
        ("windthrow", "2023-02-20", 0.30, 0.74, 0.040, 60.0),
    ]
    return [
        Disturbance(
            kind,
            date,
            x=_LEFT + x * side,
            y=_TOP - y * side,
            area=share * side**2,
            angle=angle,
        )
        for kind, date, x, y, share, angle in plan
    ]
