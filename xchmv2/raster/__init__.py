"""Rasters: grid, pixel size and cell areas on the ground, quantities, tiles and patches."""

from xchmv2.raster.arguments import (
    is_whole,
    list_items,
    show,
    validate_choice,
    validate_flags,
    validate_number,
    validate_numbers,
    validate_raster,
    validate_text,
)
from xchmv2.raster.bbox import (
    BBox,
    around_180,
    bbox_of,
    join_boxes,
    meets,
    read_bbox,
    write_bbox,
)
from xchmv2.raster.chunks import Chunks, Source, assemble
from xchmv2.raster.components import Connectivity
from xchmv2.raster.crs import (
    crs_label,
    find_crs,
    find_crs_coordinate,
    is_crs_variable,
    same_crs,
    with_crs_variables,
    without_lost_mapping,
)
from xchmv2.raster.display import (
    Row,
    as_html,
    as_text,
    find_period,
    write_bytes,
    write_crs,
    write_period,
    write_pixel,
    write_seconds,
    write_share,
    write_sizes,
)
from xchmv2.raster.grid import (
    Grid,
    advise_reprojection,
    find_grid,
    georeference,
    georeference_all,
    on_same_coordinates,
    on_same_grid,
    same_grid,
    validate_plane,
)
from xchmv2.raster.ground import (
    cell_areas,
    cell_sides,
    ground_pixel,
    ground_scale,
    has_true_areas,
    stepped_ground_scale,
)
from xchmv2.raster.labels import (
    HEIGHT_ATTRS,
    HEIGHT_NAME,
    LARGEST_OFF_NADIR,
    LOWEST_SUN,
    label_quantity,
    without_time_zone,
)
from xchmv2.raster.patches import (
    hold_packed,
    keep_sure_patches,
    label_patches,
    map_neighbourhoods,
    sieve,
)
from xchmv2.raster.quantities import (
    CHANGE_NAMES,
    Raster,
    choose_heights,
    holds_change,
    name_contents,
    pixel_size,
    read_change,
    read_heights,
    read_numbers,
    read_raster,
    require_heights,
    require_plane,
    spatial_dims,
    tell_kind,
)
from xchmv2.raster.tiling import (
    ALGORITHM,
    BLOCK,
    LARGEST_BLOCK,
    FloatArray,
    TileAxis,
    TileRun,
    runs_by_block,
    tile_runs,
    validate_grid,
)
from xchmv2.raster.valid_pixels import ValidPixels, can_hold, resolve_nodata, without_nodata
