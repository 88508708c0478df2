"""Figures, and how missing data look on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from xchmv2.errors import CHMv2Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

#: How missing data look: unlike any height.
MISSING = {"facecolor": "0.85", "edgecolor": "0.5", "hatch": "////"}


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises
    ------
    CHMv2Error
        If it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CHMv2Error(
            "matplotlib, to draw with", "that it is not installed", 'pip install "xchmv2[plot]"'
        ) from None


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure that needs neither a screen nor a choice of backend.

    Parameters
    ----------
    width, height : float
        Inches.

    Returns
    -------
    Figure
        With constrained layout.

    Raises
    ------
    CHMv2Error
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def missing_patch(label: str = "no data") -> Patch:
    """Return the legend entry of missing data.

    Parameters
    ----------
    label : str
        What to call it.

    Returns
    -------
    Patch
        For ``ax.legend(handles=[...])``.

    Raises
    ------
    CHMv2Error
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.patches import Patch

    return Patch(**MISSING, linewidth=0.0, label=label)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished figure and the artists in it, to be changed further or saved.

    Parameters
    ----------
    figure : Figure
        ``picture.figure.savefig("heights.png")``.
    axes : list of Axes
        One for each panel, in reading order.
    artists : list of Artist
        What shows the data, one or more for each panel: images, lines, bands.
    colour_bar : Colorbar or None
        Shared by all panels.
    """

    figure: Figure
    axes: list[Axes]
    artists: list[Any]
    colour_bar: Colorbar | None = None


def panels(
    count: int, ax: Axes | None, columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """Make panels in rows, or take the axes that were given.

    Parameters
    ----------
    count : int
        Panels wanted.
    ax : Axes or None
        Axes for a single panel.
    columns : int
        Most panels in a row.
    width, height : float
        Of a panel [inch].

    Returns
    -------
    figure : Figure
        Known to pyplot, so that a notebook shows it.
    axes : list of Axes
        As many as wanted.

    Raises
    ------
    CHMv2Error
        If axes were given for more than one panel, or there is to be less than one column.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt

    if columns < 1:
        raise CHMv2Error("at least one column", f"columns={columns}", "leave it out: columns=3")
    if ax is not None:
        if count != 1:
            raise CHMv2Error(
                "one panel, to draw on the axes that were given",
                f"{count} panels",
                "choose one date: height.isel(time=0), or leave ax out",
            )
        return cast("Figure", ax.get_figure(root=True)), [ax]
    across = min(columns, count)
    down = -(-count // across)
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(width * across + 1.2, height * down + 0.4),
        squeeze=False,
        layout="constrained",
    )
    flat = list(grid.ravel())
    for spare in flat[count:]:
        spare.remove()
    return figure, flat[:count]
