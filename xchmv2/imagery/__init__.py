"""What the imagery means: bands, value range, valid pixels, ground resolution."""

from xchmv2.imagery.bands import COLOUR_NAMES, COLOURS, ValueRange, resolve_value_range
from xchmv2.imagery.overview import describe_object
from xchmv2.imagery.resampling import WindowReader, map_axes, resolve_target, validate_source
from xchmv2.imagery.scene import Scene, read_scene, resolve_imagery

__all__ = [
    "COLOURS",
    "COLOUR_NAMES",
    "Scene",
    "ValueRange",
    "WindowReader",
    "describe_object",
    "map_axes",
    "read_scene",
    "resolve_imagery",
    "resolve_target",
    "resolve_value_range",
    "validate_source",
]
