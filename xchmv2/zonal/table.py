"""Statistics of polygons as a table."""

from __future__ import annotations

from typing import Any

import xarray as xr

from xchmv2.zonal.polygons import require_zonal


def to_table(zones: xr.Dataset) -> Any:
    """Turn statistics of polygons into a GeoDataFrame, to map, join or save.

    Parameters
    ----------
    zones : Dataset
        From :func:`xchmv2.zonal.zonal`; computed if it is lazy.

    Returns
    -------
    GeoDataFrame
        One row for each polygon, and date where there are several; in the polygons' CRS. Column
        names are those of the Dataset's variables and coordinates.
    """
    require_zonal()
    import geopandas

    crs = zones.xindexes["geometry"].crs  # type: ignore[attr-defined]
    further = [dim for dim in zones.dims if dim != "geometry"]
    shapes = zones["geometry"].values
    # Polygons by number: two equal ones stay two.
    flat = zones.drop_vars("geometry").reset_coords()
    frame = flat.to_dataframe(dim_order=[*further, "geometry"]).reset_index()
    frame["geometry"] = shapes[frame["geometry"]]
    first = [*further, *(str(name) for name in zones.coords if zones[name].dims == ("geometry",))]
    first = [str(name) for name in first if name != "geometry" and name in frame]
    rest = [name for name in frame if name not in first and name != "geometry"]
    return geopandas.GeoDataFrame(frame[[*first, *rest, "geometry"]], crs=crs)
