"""Patches of change as numbered events, with a table and, on request, polygons."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.change.masks import Change
from xchmv2.errors import require_library
from xchmv2.raster import (
    Connectivity,
    find_grid,
    hold_packed,
    label_patches,
    label_quantity,
    read_change,
    validate_flags,
)

if TYPE_CHECKING:
    import geopandas as gpd
    import pandas as pd


def label_events(
    mask: xr.DataArray,
    change: Change,
    *,
    polygons: bool = False,
    connectivity: Connectivity = 8,
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Label and measure each patch of a mask of loss or gain.

    Parameters
    ----------
    mask : DataArray
        Boolean, from :func:`loss` or :func:`gain`.
    change : Dataset or DataArray
        The source of the mask: the Dataset of :func:`difference` or :func:`events`, or
        height change [m].
    polygons : bool, default False
        Whether to add the outline of each event; needs geopandas.
    connectivity : {8, 4}
        Whether pixels that touch only at corners belong together.

    Returns
    -------
    labels : DataArray
        ``event``, int32, 0 outside events; numbered from 1 in the order of first pixels, row by
        row. Lazy if the mask is; the same for any chunks.
    table : DataFrame or GeoDataFrame
        One row per event: ``event``, ``area`` [m2, true on the ground; without a CRS in the
        coordinates' own units], ``mean_magnitude`` and ``max_magnitude`` [m, absolute],
        ``volume`` [m3, magnitude times area]. Then the dates: ``before`` and ``after`` where the
        change has them in its attributes; ``first_date`` and ``last_date``, the earliest and the
        latest loss in it, where the change has ``loss_date``. Further dims come first. With
        ``polygons`` a column ``geometry`` in the CRS of the mask.

    Raises
    ------
    CHMv2Error
        If the mask is not boolean, the change lies on another grid or holds none, or geopandas is
        needed and not installed.

    Notes
    -----
    A lazy mask is computed here and held at one bit per pixel; then the table in one pass over the
    change, which is read again for it. The labels, and polygons, need neither any more.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0)
    >>> labels, table = change.chmv2.label_events(change.chmv2.loss())
    >>> largest = table.nlargest(10, "area")
    """
    validate_flags(polygons=polygons)
    if polygons:
        require_library("geopandas", "holds the outlines of events", "zonal")
    values = {"magnitude": abs(read_change(change))}
    if isinstance(change, xr.Dataset) and "loss_date" in change:
        values["date"] = _seconds(change["loss_date"])
    labels, found = label_patches(hold_packed(mask), values, connectivity=connectivity)
    attrs = {"long_name": "number of the event, 0 outside events", "units": "1"}
    labels = label_quantity(labels, "event", attrs)
    table = _table(labels, found, change)
    return labels, _with_outlines(labels, table) if polygons else table


def _table(labels: xr.DataArray, found: pd.DataFrame, change: Change) -> pd.DataFrame:
    import pandas as pd

    others = [str(dim) for dim in labels.dims if dim not in find_grid(labels).dims]
    table = found[[*others, "patch", "area"]].rename(columns={"patch": "event"})
    table["mean_magnitude"] = found["magnitude_mean"]
    table["max_magnitude"] = found["magnitude_max"]
    table["volume"] = found["magnitude_volume"]
    for name in ("before", "after"):
        if name in change.attrs:
            table[name] = pd.Timestamp(change.attrs[name])
    if "date_min" in found:
        for name, which in (("first_date", "date_min"), ("last_date", "date_max")):
            table[name] = pd.to_datetime(found[which], unit="s")
    return table


def _seconds(dates: xr.DataArray) -> xr.DataArray:
    """Count seconds since 1970, which a float64 holds exactly; NaN for no date."""
    seconds = dates.astype("datetime64[s]")
    return seconds.astype("int64").astype("float64").where(seconds.notnull())


def _with_outlines(labels: xr.DataArray, table: pd.DataFrame) -> gpd.GeoDataFrame:
    """Add the outline of each event; its parts in different chunks are joined."""
    import geopandas as gpd
    from shapely import union_all

    grid = find_grid(labels)
    ordered = labels.transpose(..., *grid.dims)
    parts: dict[tuple[int, ...], list[Any]] = {}
    for (*place, event), outline in _all_outlines(ordered, grid.geobox.affine):
        parts.setdefault((*place, event), []).append(outline)
    # In the order of the table: planes, and events in each. A straight side that was cut at the
    # border of a chunk keeps a vertex there, unless it is simplified.
    outlines = [union_all(parts[key]).simplify(0) for key in sorted(parts)]
    crs = None if grid.crs is None else grid.crs.proj
    return gpd.GeoDataFrame(table, geometry=gpd.GeoSeries(outlines, crs=crs), crs=crs)


def _all_outlines(labels: xr.DataArray, affine: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Outline the labels of each chunk: ((plane, event), polygon)."""
    if labels.chunks is None:
        return _outlines(labels.values, (0,) * labels.ndim, affine)
    starts = product(*(np.cumsum([0, *sizes[:-1]]).tolist() for sizes in labels.chunks))
    blocks = labels.data.to_delayed().ravel()
    outline = dask.delayed(_outlines)
    tasks = [outline(*each, affine) for each in zip(blocks, starts, strict=True)]
    return [found for part in dask.compute(*tasks) for found in part]


def _outlines(
    labels: npt.NDArray[Any], start: tuple[int, ...], affine: Any
) -> list[tuple[tuple[int, ...], Any]]:
    """Outline the labels of one chunk, whose first pixel is at ``start`` of the raster."""
    from affine import Affine
    from rasterio.features import shapes
    from shapely.geometry import shape

    here = affine * Affine.translation(start[-1], start[-2])
    found = []
    for index in np.ndindex(labels.shape[:-2]):
        plane = tuple(first + i for first, i in zip(start, index, strict=False))
        values = np.ascontiguousarray(labels[index], dtype=np.int32)
        for outline, event in shapes(values, mask=values > 0, connectivity=4, transform=here):
            found.append(((*plane, int(event)), shape(outline)))
    return found
