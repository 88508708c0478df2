"""What the imagery means: bands, value range, valid pixels, pixel grid, ground resolution."""

from xchmv2.imagery.bands import COLOUR_NAMES, COLOURS
from xchmv2.imagery.overview import describe_object
from xchmv2.imagery.resampling import WindowReader, resolve_target, validate_source
from xchmv2.imagery.scene import ResolvedImagery, Scene, read_scene, resolve_imagery
from xchmv2.imagery.values import ValueRange, resolve_value_range
from xchmv2.raster.grid import Grid, find_crs_coordinate, find_grid
from xchmv2.raster.ground import ground_pixel
from xchmv2.raster.valid_pixels import ValidPixels, resolve_nodata

__all__ = [
    "COLOURS",
    "COLOUR_NAMES",
    "Grid",
    "ResolvedImagery",
    "Scene",
    "ValidPixels",
    "ValueRange",
    "WindowReader",
    "describe_object",
    "find_crs_coordinate",
    "find_grid",
    "ground_pixel",
    "read_scene",
    "resolve_imagery",
    "resolve_nodata",
    "resolve_target",
    "resolve_value_range",
    "validate_source",
]
