"""Names and attributes of canopy height and derived quantities; limits of sun and view angle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import odc.geo.xr
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.raster.crs import find_crs_coordinate
from xchmv2.raster.grid import georeference

#: Name of the variable that holds canopy heights.
HEIGHT_NAME = "canopy_height"
#: Lowest sun elevation and largest off-nadir angle of the imagery in the published evaluation
#: [degrees] (arXiv:2603.06382).
LOWEST_SUN, LARGEST_OFF_NADIR = 45.0, 25.0
#: CF attributes of a canopy height [m].
HEIGHT_ATTRS = {"standard_name": "canopy_height", "long_name": "canopy height", "units": "m"}


def label_quantity(array: xr.DataArray, name: str, attrs: Mapping[str, Any]) -> xr.DataArray:
    """Give a derived quantity its own name and attributes, all of those that it will have.

    Only ``grid_mapping`` is kept of the old attributes, which may be left over from arithmetic, and
    nothing of the old encoding, so that no derived quantity is labelled as a canopy height or as
    direct model output. The input is not modified.
    """
    if odc.geo.xr.spatial_dims(array) is not None and 0 not in array.shape:
        array = georeference(array)
    mapping = array.attrs.get("grid_mapping", array.encoding.get("grid_mapping"))
    mapping = find_crs_coordinate(array.coords) if mapping is None else str(mapping)
    labelled = array.copy(deep=False).rename(name)
    labelled.attrs = {**attrs, **({"grid_mapping": mapping} if mapping else {})}
    floating = np.issubdtype(array.dtype, np.floating)
    labelled.encoding = {"_FillValue": np.nan} if floating else {}
    return labelled


def without_time_zone(dim: str, index: Any) -> CHMv2Error:
    """Return the error for times with a time zone, which neither numpy nor Zarr can hold."""
    return CHMv2Error(
        f"{dim} as times without a time zone",
        f"{index.dtype}",
        f"turn them into UTC: height.assign_coords({dim}=height.indexes[{dim!r}].tz_convert(None))",
    )
