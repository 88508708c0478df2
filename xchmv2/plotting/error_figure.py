"""Errors of a difference: spread by height, and variogram."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from xchmv2.change import ErrorModel
from xchmv2.errors import CHMv2Error
from xchmv2.plotting.canvas import Drawing, panels
from xchmv2.raster import name_contents

_BLUE = "#0072B2"


def plot_errors(errors: ErrorModel | xr.Dataset) -> Drawing:
    """Draw the spread of errors by height, and their variogram.

    Parameters
    ----------
    errors : ErrorModel or Dataset
        The model, or a change that carries it, from ``difference`` without ``sigma``; computed
        here if it is lazy.

    Returns
    -------
    Drawing
        Two panels. Left: standard deviation of the error of a pixel [m] and level of detection at
        0.95 [m] over the mean height of both dates. Right: variogram, as a share of the
        variance, over distance; beyond the dashed line nothing could be seen.

    Raises
    ------
    CHMv2Error
        If the Dataset carries no model, or matplotlib is not installed.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024")
    >>> picture = change.chmv2.plot_errors()
    """
    found = errors if isinstance(errors, ErrorModel) else ErrorModel.read(errors)
    if found is None:
        raise CHMv2Error(
            "a change that carries the errors measured on stable ground",
            name_contents(errors),
            "let difference() measure them: height.chmv2.difference('2019', '2024')",
        )
    found = found.compute()
    figure, (left, right) = panels(2, None, 2, 5.0, 3.8)
    artists: list[Any] = []
    limit = found.quantile(0.95)
    for factor, label, style in (
        (1.0, "standard deviation", "-"),
        (limit, "level of detection", "--"),
    ):
        artists += left.plot(found.heights, factor * found.spread, style, color=_BLUE, label=label)
    left.set(xlabel="mean height of both dates [m]", ylabel="error [m]", ylim=(0, None))
    left.legend(fontsize="small")
    longest = found.seen_to if np.isfinite(found.seen_to) else 2 * float(found.ranges.max())
    distance = np.geomspace(longest / 1000, 2 * longest, 300)
    artists += right.plot(distance, 1 - found.correlation(distance), color=_BLUE)
    right.axvline(longest, color="0.5", linewidth=1, linestyle="--")
    right.set(xlabel="distance [m]", ylabel="share of the variance", xscale="log", ylim=(0, 1.05))
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return Drawing(figure, [left, right], artists, None)
