"""Gaps in the canopy: connected ground where it is low."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

from xchmv2.heights import Raster, read_heights
from xchmv2.imagery import find_grid
from xchmv2.labels import label_quantity
from xchmv2.patches import label_patches
from xchmv2.patches.local import Connectivity

if TYPE_CHECKING:
    import pandas as pd


def gaps(
    height: Raster,
    threshold: float = 10.0,
    *,
    min_area: float | None = None,
    max_area: float | None = None,
    connectivity: Connectivity = 8,
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Find gaps in the canopy.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others, such as time; NaN where missing.
    threshold : float, default 10
        Height up to which a pixel belongs to a gap, inclusive [m].
    min_area, max_area : float, optional
        Smallest and largest area of a gap, both inclusive [m2, true on the ground; without a CRS
        in the coordinates' own units].
    connectivity : {8, 4}
        Whether pixels that touch at corners only belong together.

    Returns
    -------
    labels : DataArray
        ``gap``, int32: the number of the gap, 0 outside gaps and where height is missing. Lazy if
        the heights are; the same for any chunks.
    table : DataFrame
        One row per gap: ``gap`` (its number, from 1 in the order of first pixels, row by row;
        anew for each date, which is then a first column), ``area`` [m2], and of the heights in it
        ``max``, ``min``, ``mean``, ``sd`` (ddof=1; NaN for one pixel) and ``range`` [m].

    Raises
    ------
    CHMv2Error
        If the area bounds make no sense.

    Notes
    -----
    The table is computed here, in one pass over the chunks. Lazy labels compute the heights a
    second time: write predicted heights to a store, or ``persist`` them, before looking for gaps.
    A gap that the raster's edge, or missing pixels, cut through counts with what is seen of it.
    """
    height = read_heights(height)
    low = height <= threshold
    labels, found = label_patches(
        low, {"height": height}, connectivity=connectivity, min_area=min_area, max_area=max_area
    )
    others = [str(dim) for dim in height.dims if dim not in find_grid(height).dims]
    table = found[[*others, "patch", "area"]].rename(columns={"patch": "gap"})
    for name in ("max", "min", "mean", "sd"):
        table[name] = found[f"height_{name}"]
    table["range"] = table["max"] - table["min"]
    attrs = {
        "long_name": f"number of the gap with canopy of {threshold:g} m or less, 0 outside gaps",
        "units": "1",
    }
    return label_quantity(labels, "gap", attrs), table
