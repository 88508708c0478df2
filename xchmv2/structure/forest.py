"""Which ground is forest, by height, cover and area."""

from __future__ import annotations

import xarray as xr

from xchmv2.heights import Raster, read_heights
from xchmv2.labels import label_quantity
from xchmv2.patches import sieve
from xchmv2.patches.labelling import resolve_rule
from xchmv2.patches.local import Connectivity
from xchmv2.structure.statistics import share_of_ground


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
    """Tell forest by the thresholds of the FAO: height, cover and area.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy heights [m] of two spatial dims and any others, such as time; NaN where missing.
    min_height : float, default 5
        Trees are higher than this [m].
    min_cover : float, default 0.1
        Their canopy covers more than this share of a cell.
    min_area : float, default 5000
        Such cells make patches larger than this [m2, true on the ground]: half a hectare.
    cell : float, default 30
        Side of the cells that cover is measured in [m on the ground]; see :func:`canopy_cover`.
    connectivity : {8, 4}
        Whether cells that touch at corners only belong together.
    min_valid : float, default 0.5
        Share of a cell's pixels that must not be missing; other cells are not forest.

    Returns
    -------
    DataArray
        ``forest``, boolean over the cells. Lazy if the heights are; the same for any chunks.

    Raises
    ------
    CHMv2Error
        If a parameter makes no sense, or the cell is smaller than a pixel.

    Notes
    -----
    The definition is about land use too: height cannot tell an orchard or a town's trees from
    forest, nor land that is to be planted again. A patch that the raster's edge cuts through
    counts with the area that is inside.

    References
    ----------
    FAO (2023), Global Forest Resources Assessment 2025: Terms and Definitions, 1a Forest.
    """
    resolve_rule(connectivity, min_area, None)
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
