"""Forest by the definition of the FAO, and canopy gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

from xchmv2.raster import (
    Connectivity,
    Raster,
    find_grid,
    label_patches,
    label_quantity,
    read_heights,
    sieve,
    validate_number,
)
from xchmv2.structure.statistics import share_of_ground

if TYPE_CHECKING:
    import pandas as pd


def forest_mask(
    height: Raster,
    *,
    min_height: float = 5.0,
    min_cover: float = 0.10,
    min_area: float = 5000.0,
    cell: float = 30.0,
    connectivity: Connectivity = 8,
    min_valid: float = 0.5,
) -> xr.DataArray:
    """Map forest by the thresholds of the FAO: height, canopy cover and area.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others, such as time; NaN where missing.
    min_height : float, default 5
        Least height of trees, exclusive [m].
    min_cover : float, default 0.1
        Least canopy cover of a cell, exclusive, as a share.
    min_area : float, default 5000
        Least area of a patch of such cells, exclusive [m2, true on the ground]: half a hectare.
    cell : float, default 30
        Side of the cells of canopy cover [m on the ground]; see :func:`canopy_cover`.
    connectivity : {8, 4}
        Whether cells that touch only at corners belong together.
    min_valid : float, default 0.5
        Share of a cell's pixels that must not be missing; other cells are not forest.

    Returns
    -------
    DataArray
        ``forest``, boolean over the cells. Lazy if the heights are; the same for any chunks.

    Raises
    ------
    CHMv2Error
        If a parameter is out of range, or the cell is smaller than a pixel.

    Notes
    -----
    The definition includes land use: heights cannot tell an orchard or the trees of a town from
    forest, and do not show land that is to be replanted. A patch at the raster's edge counts by
    its area inside.

    References
    ----------
    FAO (2023), Global Forest Resources Assessment 2025: Terms and Definitions, 1a Forest.

    Examples
    --------
    >>> forest = height.chmv2.forest_mask(min_height=5.0, min_cover=0.3)
    >>> share = forest.mean(("y", "x"))
    """
    validate_number("min_height", min_height, 5.0, unit="m")
    validate_number("min_cover", min_cover, 0.1, least=0, most=1)
    validate_number("min_area", min_area, 5000.0, least=0, unit="m2")
    height = read_heights(height)
    cover = share_of_ground(height > min_height, height, cell, min_valid)
    more = min_area * (1 + 1e-6)  # bounds are inclusive, the definition is not
    forest = sieve(cover > min_cover, connectivity=connectivity, min_area=more)
    return label_quantity(
        forest,
        "forest",
        {
            "long_name": f"forest: over {min_height:g} m high, {min_cover:.0%} cover, "
            f"{min_area / 1e4:g} ha"
        },
    )


def gaps(
    height: Raster,
    threshold: float = 10.0,
    *,
    min_area: float | None = None,
    max_area: float | None = None,
    connectivity: Connectivity = 8,
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Map canopy gaps and measure each of them.

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
        Whether pixels that touch only at corners belong together.

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
        If an area is negative, or `min_area` is above `max_area`.

    Notes
    -----
    The table is computed here, in one pass over the chunks. Lazy labels hold the gaps at one bit
    per pixel and do not compute the heights again. A gap that is cut by the raster's edge or by
    missing pixels counts by its visible part.

    Examples
    --------
    >>> labels, table = height.chmv2.gaps(threshold=3.0, min_area=100.0)
    >>> largest = table.nlargest(10, "area")
    """
    validate_number("threshold", threshold, 10.0, unit="m")
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
