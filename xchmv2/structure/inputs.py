"""What structure is measured in: heights as floats, missing ones NaN."""

from __future__ import annotations

import xarray as xr

from xchmv2.change.inputs import Raster, read_heights
from xchmv2.nodata import without_nodata


def read_known_heights(height: Raster) -> xr.DataArray:
    """Take the heights out of what was given, and turn the nodata value they declare into NaN.

    Parameters
    ----------
    height : DataArray or Dataset
        Heights [m], or a Dataset that holds them.

    Returns
    -------
    DataArray
        Floats of the same dims, lazy where the heights are.

    Raises
    ------
    CHMv2Error
        If there are no numbers, or no saying which variable is meant.
    """
    # Before integers become floats: that drops the encoding, which may declare the value.
    known = without_nodata(height) if isinstance(height, xr.DataArray) else height
    return without_nodata(read_heights(known))
