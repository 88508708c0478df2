"""Heights against their reference: scatter and residuals."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xchmv2.plotting.canvas import Drawing, panels
from xchmv2.plotting.maps import HEIGHT_COLOURS, round_limit
from xchmv2.raster import Raster
from xchmv2.validation import Matched, match, scores
from xchmv2.validation.matching import RADIUS, Statistic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Floats = npt.NDArray[np.float64]

#: More pairs than this are drawn as a density.
_MOST_DOTS = 2000
#: Width of a class of residuals [m], and the fewest heights it is drawn for.
_STEP, _FEWEST = 2.5, 5
_ORANGE = "#D55E00"


def plot_validation(
    height: Raster | Matched,
    reference: Any = None,
    *,
    column: str | None = None,
    radius: float = RADIUS,
    statistic: Statistic | None = None,
) -> Drawing:
    """Draw heights against their reference, and errors by reference height.

    Parameters
    ----------
    height : DataArray, Dataset or Matched
        Heights [m] of one date, dims y and x; a Dataset with ``canopy_height``; or what
        :func:`~xchmv2.validation.match` returned.
    reference : DataArray, GeoDataFrame or DataFrame, optional
        As in :func:`~xchmv2.validation.validate`.
    column, radius, statistic
        As in :func:`~xchmv2.validation.validate`.

    Returns
    -------
    Drawing
        Two panels. Left: all pairs, as dots or, above 2000, as a density, with the line of
        equality. Right: errors by classes of 2.5 m of reference height: median, the middle half
        and the middle nine tenths.

    Raises
    ------
    CHMv2Error
        If the two cannot be matched, or matplotlib is not installed.

    Examples
    --------
    >>> picture = height.sel(time="2019-07-01").chmv2.plot_validation(lidar)
    >>> picture.figure.savefig("validation.png")
    """
    pair = (
        height
        if isinstance(height, Matched)
        else match(height, reference, column=column, radius=radius, statistic=statistic)
    )
    known = pair.known
    found, true = pair.height[known], pair.reference[known]
    figure, (left, right) = panels(2, None, 2, 5.0, 4.6)
    artists = [_scatter(left, found, true), *_residuals(right, found, true)]
    bar = None
    if len(true) > _MOST_DOTS:
        bar = figure.colorbar(artists[0], ax=left, label="pixels")
    return Drawing(figure, [left, right], artists, bar)


def _scatter(ax: Axes, found: _Floats, true: _Floats) -> Any:
    end = round_limit(np.concatenate([found, true]))
    low = min(0.0, float(found.min()))
    if len(true) > _MOST_DOTS:
        box = (low, end, low, end)
        drawn: Any = ax.hexbin(
            true,
            found,
            gridsize=60,
            bins="log",
            mincnt=1,
            cmap=HEIGHT_COLOURS,
            extent=box,
            linewidths=0.1,
        )
    else:
        drawn = ax.scatter(true, found, s=12, alpha=0.5, color="#0072B2", linewidths=0)
    ax.plot([low, end], [low, end], color=_ORANGE, linewidth=1, linestyle="--")
    margin = 0.02 * (end - low)  # shows dots on an edge whole
    limits = low - margin, end + margin
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set(xlabel="reference height [m]", ylabel="height [m]")
    # Above the panel, as there may be dots in any corner.
    ax.set_title(
        f"n = {len(true):,}, MAE {scores.mae(found, true):.2f} m, "
        f"RMSE {scores.rmse(found, true):.2f} m\n"
        f"bias {scores.bias(found, true):+.2f} m, R² {scores.r2(found, true):.2f}",
        fontsize="medium",
    )
    return drawn


def _residuals(ax: Axes, found: _Floats, true: _Floats) -> list[Any]:
    """Draw the spread of errors in classes of reference height."""
    edges = np.arange(0.0, float(true.max()) + _STEP, _STEP)
    error = found - true
    centres, ranks = [], []
    for low, high in pairwise([*edges, edges[-1] + _STEP]):
        chosen = error[(true >= low) & (true < high)]
        if chosen.size >= _FEWEST:
            centres.append((low + high) / 2)
            ranks.append(np.percentile(chosen, [5, 25, 50, 75, 95]))
    ax.axhline(0, color=_ORANGE, linewidth=1, linestyle="--")
    ax.set(xlabel="reference height [m]", ylabel="height minus reference [m]")
    ax.grid(alpha=0.3)
    if not ranks:
        return [ax.scatter(true, error, s=12, alpha=0.5, color="#0072B2", linewidths=0)]
    p5, p25, p50, p75, p95 = np.transpose(ranks)
    thin = ax.vlines(centres, p5, p95, color="#0072B2", linewidth=1.2, label="90 % of errors")
    thick = ax.vlines(
        centres, p25, p75, color="#0072B2", linewidth=6, alpha=0.6, label="50 % of errors"
    )
    (line,) = ax.plot(centres, p50, color="#0072B2", marker="o", linewidth=1, label="median")
    ax.legend(fontsize="small", loc="best")
    return [line, thick, thin]
