"""What a cell of a raster measures on the ground."""

from xchmv2.areas.cells import cell_areas, cell_sides, has_true_areas
from xchmv2.imagery import find_grid as coordinate_grid

__all__ = ["cell_areas", "cell_sides", "coordinate_grid", "has_true_areas"]
