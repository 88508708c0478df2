"""What a canopy height is called: the labels that predictions and the published map share."""

from __future__ import annotations

#: Name of the variable.
HEIGHT_NAME = "canopy_height"
#: CF attributes of a canopy height [m].
HEIGHT_ATTRS = {
    "standard_name": "canopy_height",
    "long_name": "canopy height",
    "units": "m",
}
