"""What the imagery means: bands, value range, valid pixels, pixel grid, ground resolution."""

from xchmv2.imagery.grid import Grid, find_crs_coordinate, find_grid
from xchmv2.imagery.resolution import ground_pixel, resolve_target
from xchmv2.imagery.resolved import ResolvedImagery, resolve_imagery
from xchmv2.imagery.scene import Scene, read_scene
from xchmv2.imagery.values import ValidPixels, ValueRange, resolve_nodata, resolve_value_range
from xchmv2.imagery.window import WindowReader

__all__ = [
    "Grid",
    "ResolvedImagery",
    "Scene",
    "ValidPixels",
    "ValueRange",
    "WindowReader",
    "find_crs_coordinate",
    "find_grid",
    "ground_pixel",
    "read_scene",
    "resolve_imagery",
    "resolve_nodata",
    "resolve_target",
    "resolve_value_range",
]
