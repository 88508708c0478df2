"""The published global CHMv2 map: heights with no GPU and no weights."""

from xchmv2.published.opening import open_published
from xchmv2.published.tiles import PUBLISHED_MAP

__all__ = ["PUBLISHED_MAP", "open_published"]
