"""The published global CHMv2 map: heights with no GPU and no weights."""

from xchmv2.published.mirror import PUBLISHED_MAP
from xchmv2.published.opening import open_published

__all__ = ["PUBLISHED_MAP", "open_published"]
