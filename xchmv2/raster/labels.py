"""Labels of canopy height and of derived quantities, and limits of sun and view to trust them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.raster.grid import find_crs_coordinate

#: Name of the variable.
HEIGHT_NAME = "canopy_height"
#: Lowest sun elevation and largest view angle of the imagery that the published evaluation used
#: [degrees] (arXiv:2603.06382).
LOWEST_SUN, LARGEST_OFF_NADIR = 45.0, 25.0
#: CF attributes of a canopy height [m].
HEIGHT_ATTRS = {
    "standard_name": "canopy_height",
    "long_name": "canopy height",
    "units": "m",
}


def label_quantity(array: xr.DataArray, name: str, attrs: Mapping[str, Any]) -> xr.DataArray:
    """Give a derived quantity its own name and attributes.

    Parameters
    ----------
    array : DataArray
        The quantity, with whatever attributes arithmetic has left on it.
    name : str
        Its name.
    attrs : mapping
        All its attributes, such as ``long_name`` and ``units``.

    Returns
    -------
    DataArray
        The same values and coordinates. Of the old attributes only ``grid_mapping`` stays, so
        that nothing derived claims to be a canopy height or to come straight from a model; of the
        old encoding nothing does. The input is not modified.
    """
    labelled = array.copy(deep=False).rename(name)
    mapping = _grid_mapping(array)
    labelled.attrs = {**attrs, **({"grid_mapping": mapping} if mapping else {})}
    floating = np.issubdtype(array.dtype, np.floating)
    labelled.encoding = {"_FillValue": np.nan} if floating else {}
    return labelled


def _grid_mapping(array: xr.DataArray) -> str | None:
    """Name of the coordinate that holds the CRS, however the array refers to it."""
    named = array.attrs.get("grid_mapping", array.encoding.get("grid_mapping"))
    if named is not None:
        return str(named)
    return find_crs_coordinate(array.coords)
