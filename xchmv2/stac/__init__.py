"""From STAC items to an imagery cube."""

from xchmv2.stac.facts import quality_flags
from xchmv2.stac.loading import load

__all__ = ["load", "quality_flags"]
