"""Heights against lidar or GEDI, in the terms of the CHMv2 paper."""

from xchmv2.validation.matching import Matched, match
from xchmv2.validation.validate import to_table, validate

__all__ = ["Matched", "match", "to_table", "validate"]
