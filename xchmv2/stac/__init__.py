"""From STAC items to an imagery cube."""

from xchmv2.stac.items import quality_flags
from xchmv2.stac.loading import load

__all__ = ["load", "quality_flags"]
