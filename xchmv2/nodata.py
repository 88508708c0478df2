"""Values that stand for missing heights, as rasters declare them."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from xchmv2.imagery import resolve_nodata

_DECLARE = ("_FillValue", "nodata", "missing_value")


def without_nodata(array: xr.DataArray) -> xr.DataArray:
    """Turn the value that an array declares for missing data into NaN.

    Parameters
    ----------
    array : DataArray
        Heights or changes, as read from any file.

    Returns
    -------
    DataArray
        The array itself where it declares none, or NaN; else floats, lazy where it is, that
        declare none any more.
    """
    nodata = resolve_nodata([array] * 3)[0]
    if nodata is None or math.isnan(nodata):
        return array
    floats = array if array.dtype.kind == "f" else array.astype(np.float32)
    found = floats.where(floats != floats.dtype.type(nodata))
    found.attrs = {name: value for name, value in floats.attrs.items() if name not in _DECLARE}
    return found
