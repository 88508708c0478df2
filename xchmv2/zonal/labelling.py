"""Statistics of polygons as a Dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.areas import has_true_areas
from xchmv2.imagery.grid import is_crs_variable
from xchmv2.zonal.polygons import Polygons
from xchmv2.zonal.statistics import label


def label_zones(
    found: Any,
    length: Any,
    names: Sequence[str],
    values: xr.DataArray,
    polygons: Polygons,
) -> xr.Dataset:
    """Name dims, coordinates and units.

    Parameters
    ----------
    found : array, shape (names, dates, polygons)
        Statistics.
    length : float, 0-d array or None
        Correlation length behind the standard errors.
    names : sequence of str
        Of the statistics.
    values : DataArray
        What they are of, spatial dims last.
    polygons : Polygons
        What they are under.

    Returns
    -------
    Dataset
        With an xvec index of the polygons.
    """
    import xvec  # noqa: F401  (registers .xvec)

    further = values.dims[:-2]
    sizes = [values.sizes[dim] for dim in further]
    of = "change" if values.name == "height_change" else str(values.attrs.get("long_name", "value"))
    units, square = str(values.attrs.get("units", "m")), _square(values)
    variables = {
        name: ((*further, "geometry"), layer.reshape(*sizes, -1), label(name, of, units, square))
        for name, layer in zip(names, found, strict=True)
    }
    coords = {"geometry": polygons.given, **_kept(values), **_names(polygons, names, values)}
    result = xr.Dataset(variables, coords)
    if length is not None:
        attrs = {"long_name": "radius of the disc that counts as one independent error"}
        if square:
            attrs["units"] = "m"
        result["correlation_length"] = ((), length, attrs)
    for variable in result.data_vars.values():
        variable.encoding = {"_FillValue": np.nan}
    labelled: xr.Dataset = result.xvec.set_geom_indexes("geometry", crs=polygons.crs)
    return labelled


def _square(values: xr.DataArray) -> str | None:
    """Return the unit of areas, known with a CRS or where the coordinates are said to be metres."""
    if has_true_areas(values):
        return "m2"
    units = {values[dim].attrs.get("units") for dim in values.dims[-2:] if dim in values.coords}
    return "m2" if units and units <= {"m", "metre", "meter"} else None


def _kept(values: xr.DataArray) -> dict[Any, xr.DataArray]:
    """Return the coordinates that are not of the pixels, such as time."""
    plane = set(values.dims[-2:])
    return {
        name: coord.drop_vars([other for other in coord.coords if other != name])
        for name, coord in values.coords.items()
        if not set(coord.dims) & plane and not is_crs_variable(coord) and name != "spatial_ref"
    }


def _names(
    polygons: Polygons, taken: Sequence[str], values: xr.DataArray
) -> dict[str, tuple[str, Any]]:
    """Return what names the polygons, under names that nothing else has."""
    used = {
        *taken,
        "geometry",
        "correlation_length",
        *map(str, values.coords),
        *map(str, values.dims),
    }
    return {
        f"polygon_{name}" if name in used else name: ("geometry", column)
        for name, column in polygons.labels.items()
    }
