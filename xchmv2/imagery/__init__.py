"""What the imagery means: bands, value range, valid pixels, ground resolution."""

from xchmv2.imagery.bands import (
    COLOUR_NAMES,
    COLOURS,
    ValueRange,
    propose_value_range,
    read_colour,
    resolve_value_range,
)
from xchmv2.imagery.overview import describe_object
from xchmv2.imagery.resampling import WindowReader, map_axes, resolve_target, validate_source
from xchmv2.imagery.sampling import (
    TRAINED_COLOUR,
    advise_order,
    looks_exchanged,
    sample_windows,
    take_pixels,
)
from xchmv2.imagery.scene import Scene, read_scene, resolve_imagery
