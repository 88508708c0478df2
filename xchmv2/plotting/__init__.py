"""Pictures of imagery, canopy height and its change, on matplotlib axes."""

from xchmv2.plotting.canvas import missing_patch, new_figure, require_matplotlib
from xchmv2.plotting.maps import plot_change, plot_height
from xchmv2.plotting.scale_bar import add_scale_bar
from xchmv2.plotting.scatter import plot_validation
from xchmv2.plotting.series import plot_series
from xchmv2.plotting.show import (
    CHANGE_COLOURS,
    HEIGHT_COLOURS,
    show_change,
    show_height,
    show_imagery,
)

__all__ = [
    "CHANGE_COLOURS",
    "HEIGHT_COLOURS",
    "add_scale_bar",
    "missing_patch",
    "new_figure",
    "plot_change",
    "plot_height",
    "plot_series",
    "plot_validation",
    "require_matplotlib",
    "show_change",
    "show_height",
    "show_imagery",
]
