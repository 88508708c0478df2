"""The figure of the demonstration: imagery, true height and predicted height."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from xchmv2 import plotting
from xchmv2.demo.truth import DROP, HeightScore, LossScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec
    from matplotlib.image import AxesImage

_ROWS = ("Imagery", "Truth", "Prediction")
_PANEL = 3.0  # [inch]
_DPI = 110
# Limits of the colour scales [m], the same for every forest; a few trees exceed them.
_HEIGHTS, _CHANGE = (0.0, 40.0), 30.0
_TITLE = "From imagery to canopy height and its change"
_WORDS = (
    "A synthetic forest, so that the truth is known;\n"
    "the network sees the imagery alone.\n"
    f"Loss is a drop of more than {DROP:g} m;\n"
    "outlines show clear-cuts and windthrow."
)
_CAVEAT = "Demo model: its heights mean nothing in any real forest."


def save_picture(
    path: Path, cube: xr.Dataset, heights: Sequence[HeightScore], losses: Sequence[LossScore]
) -> None:
    """Draw imagery, truth and prediction of each date, and the changes between dates.

    Parameters
    ----------
    path : Path
        PNG file to write.
    cube : Dataset
        `red`, `green`, `blue`, `valid`, `true_height` and `canopy_height` (time, y, x).
    heights, losses : sequence
        Scores of dates and of the intervals between them, for the titles.

    Raises
    ------
    CHMv2Error
        If matplotlib is not installed.
    """
    dates, steps = len(heights), len(losses)
    figure = plotting.new_figure(_PANEL * (dates + steps) + 1.0, _PANEL * 3 + 1.6)
    figure.suptitle(_TITLE, fontsize=20, fontweight="bold")
    grid = figure.add_gridspec(3, dates + steps)
    axes = _panels(figure, grid, dates, steps)
    local = _local(cube)
    for k, score in enumerate(heights):
        _show_imagery(axes[0][k], local.isel(time=k), score)
    height = _show_heights(axes, local, heights)
    change = _show_changes([row[dates:] for row in axes[1:]], local, losses)
    for row, name in zip(axes, _ROWS, strict=True):
        row[0].set_ylabel(name, fontsize=15, fontweight="bold")
    for panel in axes[-1]:
        panel.set_xlabel("metres", fontsize=9)
    _explain(figure, grid, dates, height, change)
    figure.savefig(path, dpi=_DPI)


def _panels(figure: Figure, grid: GridSpec, dates: int, steps: int) -> list[list[Axes]]:
    """Return rows of axes with equal limits; the first row has none for changes."""
    rows: list[list[Axes]] = []
    for row in range(3):
        columns = dates if row == 0 else dates + steps
        rows.append([figure.add_subplot(grid[row, column]) for column in range(columns)])
    first, *others = chain.from_iterable(rows)
    for panel in others:
        panel.sharex(first)
        panel.sharey(first)
    return rows


def _local(cube: xr.Dataset) -> xr.Dataset:
    """Return the cube with coordinates in metres from its lower left corner."""
    half = abs(float(cube["x"][1] - cube["x"][0])) / 2
    local = {dim: cube[dim] - float(cube[dim].min()) + half for dim in ("x", "y")}
    return cube.drop_vars("spatial_ref", errors="ignore").assign_coords(local)


def _show_imagery(ax: Axes, scene: xr.Dataset, score: HeightScore) -> None:
    plotting.show_imagery(ax, scene[["red", "green", "blue"]], valid=scene["valid"])
    _set_title(ax, score.date, size=14)


def _show_heights(
    axes: Sequence[Sequence[Axes]], cube: xr.Dataset, scores: Sequence[HeightScore]
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
    axes: Sequence[Sequence[Axes]], cube: xr.Dataset, scores: Sequence[LossScore]
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


def _explain(
    figure: Figure, grid: GridSpec, column: int, height: AxesImage, change: AxesImage
) -> None:
    """Draw the legend in the free corner: explanation, both colour scales, missing data."""
    corner = grid[0, column:].subgridspec(4, 1, height_ratios=(6, 1, 1, 1))
    words, first, second, missing = (figure.add_subplot(corner[row]) for row in range(4))
    for ax in (words, missing):
        ax.set_axis_off()
    words.text(0.5, 1.0, _WORDS, ha="center", va="top", fontsize=12, linespacing=1.4)
    words.text(0.5, 0.15, _CAVEAT, ha="center", va="bottom", fontsize=10, fontstyle="italic")
    for ax, image, extend, label in (
        (first, height, "max", "canopy height [m]"),
        (second, change, "both", "change [m]: brown is loss, green is growth"),
    ):
        bar = figure.colorbar(image, cax=ax, orientation="horizontal", extend=extend)
        bar.set_label(label, fontsize=11)
    handles = [plotting.missing_patch("no data: under cloud or its shadow")]
    missing.legend(handles=handles, loc="center", frameon=False, fontsize=11)
