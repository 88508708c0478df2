"""Figures of imagery, canopy height and height change, on matplotlib axes."""

from xchmv2.plotting.canvas import add_scale_bar, missing_patch, new_figure, require_matplotlib
from xchmv2.plotting.error_figure import plot_errors
from xchmv2.plotting.maps import (
    CHANGE_COLOURS,
    HEIGHT_COLOURS,
    plot_change,
    plot_height,
    show_change,
    show_height,
    show_imagery,
)
from xchmv2.plotting.scatter import plot_validation
from xchmv2.plotting.series import plot_series

__all__ = [
    "CHANGE_COLOURS",
    "HEIGHT_COLOURS",
    "add_scale_bar",
    "missing_patch",
    "new_figure",
    "plot_change",
    "plot_errors",
    "plot_height",
    "plot_series",
    "plot_validation",
    "require_matplotlib",
    "show_change",
    "show_height",
    "show_imagery",
]
