"""What a cell of a raster measures on the ground."""

from xchmv2.areas.cells import cell_areas, cell_sides, has_true_areas

__all__ = ["cell_areas", "cell_sides", "has_true_areas"]
