"""Validation of canopy heights against lidar, GEDI or plots, with the scores of the CHMv2 paper."""

from xchmv2.validation.comparison import to_table, validate
from xchmv2.validation.matching import Matched, match

__all__ = ["Matched", "match", "to_table", "validate"]
