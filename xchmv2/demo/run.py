"""``xchmv2 demo``: make a forest, predict its height, compare it with the truth, and report."""

from __future__ import annotations

import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr

import xchmv2.accessor  # noqa: F401  (registers .chmv2)
from xchmv2 import plotting
from xchmv2.demo.disturbance import Disturbance, Kind
from xchmv2.demo.synthetic import synthetic_forest
from xchmv2.demo.truth import DROP, OPENING, HeightScore, LossScore, score_heights, score_losses
from xchmv2.errors import CHMv2Error, DemoModelWarning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.image import AxesImage

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
_ROWS = ("Imagery", "Truth", "Prediction")
_PANEL = 3.0  # [inch]
_DPI = 110
# Limits of the colour scales [m], the same for every forest; a few trees exceed them.
_HEIGHTS, _CHANGE = (0.0, 40.0), 30.0
_PICTURE_TITLE = "From imagery to canopy height and its change"
_WORDS = (
    "A synthetic forest, so that the truth is known;\n"
    "the network sees the imagery alone.\n"
    f"Loss is a drop of more than {DROP:g} m;\n"
    "outlines show clear-cuts and windthrow."
)
_PICTURE_CAVEAT = "Demo model: its heights mean nothing in any real forest."


@dataclass(frozen=True)
class _Demonstration:
    """The files and scores of a demonstration.

    `store`: Zarr with imagery, truth (`true_height`) and prediction (`canopy_height`); `picture`:
    PNG file; `heights` and `losses`: one score for each date, and for each interval between dates;
    `megapixels`: all dates together; `seconds`: duration of the prediction.
    """

    store: Path
    picture: Path
    heights: list[HeightScore]
    losses: list[LossScore]
    megapixels: float
    seconds: float

    @property
    def tables(self) -> str:
        return _write_tables(self.heights, self.losses, self.megapixels, self.seconds)

    @property
    def next_steps(self) -> str:
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

    `demo.zarr` and `demo.png` go into `folder`, which is created if it does not exist, and replace
    existing ones only with `overwrite`; `size` is the side of the scene [px]; `report` is called
    with one line of text at each step. Returns files and scores. A CHMv2Error refuses existing
    files, a seed or size out of range, and a missing matplotlib.
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
    _save_picture(picture, cube, heights, losses)
    megapixels = cube["canopy_height"].size / 1e6
    return _Demonstration(store, picture, heights, losses, megapixels, seconds)


def _make_forest(seed: int, size: int) -> xr.Dataset:
    """Return imagery and truth (`true_height`), lazily, with `event_kind` as CF flags."""
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
        Disturbance(kind, day, _LEFT + x * side, _TOP - y * side, share * side**2, angle=angle)
        for kind, day, x, y, share, angle in plan
    ]


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
    """Return the scores as two tables, in lines of at most 80 characters."""
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
    """Return three numbered examples that use the files of the demonstration."""
    names = ("image.tif", "lidar.tif", "height.tif", "my-model")
    image, lidar, height, tuned = (str(store.with_name(name)) for name in names)
    paths = " ".join(map(shlex.quote, (image, lidar, tuned)))
    return f"""\
1. Open the result in Python, and write its last date as GeoTIFF for your GIS:
     import rioxarray, xarray as xr
     cube = xr.open_zarr({str(store)!r}, consolidated=False, decode_coords="all")
     print(cube)
     last = cube.isel(time=-1)
     rgb = last[["red", "green", "blue"]].to_dataarray("band")
     rgb.rio.to_raster({image!r})
     last.true_height.rio.to_raster({lidar!r})

2. Predict from a GeoTIFF. Put your own image there and leave out model= for the
   published CHMv2 weights (they are gated; the README says how to get them):
     import rioxarray, xchmv2
     image = rioxarray.open_rasterio({image!r}, chunks={{'x': 2048, 'y': 2048}})
     height = image.chmv2.predict(model="demo")
     height.rio.to_raster({height!r})

3. Fine-tune on lidar, here the forest's truth (takes some minutes without a GPU):
     xchmv2 fine-tune {paths} --model demo --tile 128 --epochs 2"""


def _save_picture(
    path: Path, cube: xr.Dataset, heights: Sequence[HeightScore], losses: Sequence[LossScore]
) -> None:
    """Draw imagery, truth and prediction of each date, and the changes between dates.

    `cube` holds `red`, `green`, `blue`, `valid`, `true_height` and `canopy_height` (time, y, x);
    the scores are for the titles.
    """
    dates, steps = len(heights), len(losses)
    figure = plotting.new_figure(_PANEL * (dates + steps) + 1.0, _PANEL * 3 + 1.6)
    figure.suptitle(_PICTURE_TITLE, fontsize=20, fontweight="bold")
    axes = figure.subplots(3, dates + steps, sharex=True, sharey=True)
    for unused in axes[0, dates:]:  # the corner of the legend
        unused.remove()
    local = _local(cube)
    for k, score in enumerate(heights):
        scene = local.isel(time=k)
        plotting.show_imagery(axes[0, k], scene[_COLOURS], valid=scene["valid"])
        _set_title(axes[0, k], score.date, size=14)
    height = _show_heights(axes, local, heights)
    change = _show_changes(axes[1:, dates:], local, losses)
    for row, name in zip(axes, _ROWS, strict=True):
        row[0].set_ylabel(name, fontsize=15, fontweight="bold")
    for panel in axes[-1]:
        panel.set_xlabel("metres", fontsize=9)
    _explain(figure, axes[0, 0].get_gridspec()[0, dates:], height, change)
    figure.savefig(path, dpi=_DPI)


def _local(cube: xr.Dataset) -> xr.Dataset:
    """Return the cube with coordinates in metres from its lower left corner."""
    half = abs(float(cube["x"][1] - cube["x"][0])) / 2
    local = {dim: cube[dim] - float(cube[dim].min()) + half for dim in ("x", "y")}
    return cube.drop_vars("spatial_ref", errors="ignore").assign_coords(local)


def _show_heights(
    axes: npt.NDArray[Any], cube: xr.Dataset, scores: Sequence[HeightScore]
) -> AxesImage:
    """Draw true and predicted heights, on one colour scale."""
    for k, score in enumerate(scores):
        scene = cube.isel(time=k)
        plotting.show_height(axes[1][k], scene["true_height"], limits=_HEIGHTS)
        image = plotting.show_height(axes[2][k], scene["canopy_height"], limits=_HEIGHTS)
        _set_title(axes[1][k], f"height {score.date[:4]}")
        _set_title(axes[2][k], f"height {score.date[:4]}: off by {score.mae:.1f} m on average")
    return image


def _show_changes(
    axes: npt.NDArray[Any], cube: xr.Dataset, scores: Sequence[LossScore]
) -> AxesImage:
    """Draw true and predicted change between dates, on one colour scale."""
    names = ("true_height", "canopy_height")
    changes = [
        [(cube[n].isel(time=b) - cube[n].isel(time=a)).rename("height_change") for n in names]
        for a, b in pairwise(range(cube.sizes["time"]))
    ]
    for k, (score, (true, predicted)) in enumerate(zip(scores, changes, strict=True)):
        plotting.show_change(axes[0][k], true, limit=_CHANGE)
        image = plotting.show_change(axes[1][k], predicted, limit=_CHANGE)
        for row in axes:
            _outline(row[k], cube.isel(time=k + 1))
        _set_title(axes[0][k], f"change {score.years}: {score.true_area:.1f} ha lost")
        _set_title(axes[1][k], f"change {score.years}: {score.found_area:.1f} ha found")
    return image


def _outline(ax: Axes, scene: xr.Dataset) -> None:
    """Outline clear-cuts and windthrow, but not thinnings, since the previous date."""
    meanings = scene["event_kind"].attrs["flag_meanings"].split()
    felled = scene["event"][[meanings[code] != "thinning" for code in scene["event_kind"].values]]
    struck = scene["disturbance"].isin(felled)
    if struck.any():
        ax.contour(scene["x"], scene["y"], struck, [0.5], colors="black", linewidths=0.8)


def _set_title(ax: Axes, title: str, size: int = 10) -> None:
    ax.set_title(title, fontsize=size)
    ax.set_xlabel("")
    ax.set_ylabel("")
    ax.tick_params(labelsize=8)
    ax.label_outer()


def _explain(figure: Figure, free: SubplotSpec, height: AxesImage, change: AxesImage) -> None:
    """Draw the legend in the free corner: explanation, both colour scales, missing data."""
    corner = free.subgridspec(4, 1, height_ratios=(6, 1, 1, 1))
    words, first, second, missing = (figure.add_subplot(corner[row]) for row in range(4))
    for ax in (words, missing):
        ax.set_axis_off()
    words.text(0.5, 1.0, _WORDS, ha="center", va="top", fontsize=12, linespacing=1.4)
    words.text(
        0.5, 0.15, _PICTURE_CAVEAT, ha="center", va="bottom", fontsize=10, fontstyle="italic"
    )
    for ax, image, extend, label in (
        (first, height, "max", "canopy height [m]"),
        (second, change, "both", "change [m]: brown is loss, green is growth"),
    ):
        bar = figure.colorbar(image, cax=ax, orientation="horizontal", extend=extend)
        bar.set_label(label, fontsize=11)
    handles = [plotting.missing_patch("no data: under cloud or its shadow")]
    missing.legend(handles=handles, loc="center", frameon=False, fontsize=11)
