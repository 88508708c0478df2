"""Which area the user wants, on which grid, with which coordinates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import pyproj
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import spatial_dims, xr_coords

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import find_crs_coordinate, find_grid
from xchmv2.published.frame import Frame
from xchmv2.published.tiles import CRS, HALF, Span, TileGrid, Window

#: Latitude where the Mercator square ends [degrees].
_LAST_LATITUDE = 85.0511287798066
# Edges this near to a pixel's edge lie on it [px].
_SNAP = 1e-6


@dataclass(frozen=True)
class Area:
    """An area in the map's own pixels.

    Parameters
    ----------
    bounds : tuple of float
        West, south, east, north [m of EPSG:3857]; east may lie past 180 degrees.
    """

    bounds: tuple[float, float, float, float]

    @property
    def chunks(self) -> None:
        """No chunks that should be followed."""
        return None

    def window(self, grid: TileGrid) -> Window:
        """Pixels of the map that the area touches."""
        west, south, east, north = self.bounds
        rows = _whole((HALF - north) / grid.pixel, (HALF - south) / grid.pixel)
        cols = _whole((west + HALF) / grid.pixel, (east + HALF) / grid.pixel)
        return Window((max(rows[0], 0), min(rows[1], grid.side)), cols)

    def geobox(self, grid: TileGrid) -> GeoBox:
        """Grid of the result."""
        return grid.geobox(self.window(grid))

    def coords(self, grid: TileGrid) -> dict[Hashable, xr.DataArray]:
        """Coordinates of the result: y, x and spatial_ref."""
        return dict(xr_coords(self.geobox(grid)))


@dataclass(frozen=True, eq=False)
class GivenGrid:
    """A grid that is given.

    Parameters
    ----------
    box : GeoBox
        The grid, along the axes of its CRS.
    given : mapping
        Coordinates (y, x, CRS) to keep as they are.
    chunks : tuple of tuple of int or None
        Sizes of chunks along y and x to follow [px].
    """

    box: GeoBox
    given: Mapping[Hashable, xr.DataArray] = field(default_factory=dict)
    chunks: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def window(self, grid: TileGrid) -> Window:
        """Pixels of the map under the grid."""
        frame = Frame(grid, self.box)
        height, width = self.box.shape
        window = frame.native or frame.window((0, height), (0, width))
        if window is None:
            raise CHMv2Error(
                "an area on the Earth between 85 degrees south and north",
                f"{self.box.crs} coordinates {tuple(self.box.boundingbox)}",
                "correct the CRS or the coordinates",
            )
        return window

    def geobox(self, grid: TileGrid) -> GeoBox:
        """Grid of the result."""
        return self.box

    def coords(self, grid: TileGrid) -> dict[Hashable, xr.DataArray]:
        """Coordinates of the result, those of the cube where it was given one."""
        return dict(self.given or xr_coords(self.box))


def resolve_area(
    bbox: tuple[float, float, float, float] | None,
    like: xr.DataArray | xr.Dataset | None,
    geobox: GeoBox | None,
) -> Area | GivenGrid:
    """Take the area as the user gives it.

    Parameters
    ----------
    bbox : tuple of float or None
        West, south, east, north [degrees].
    like : DataArray or Dataset or None
        A cube on the wanted grid.
    geobox : GeoBox or None
        The wanted grid.

    Returns
    -------
    Area or GivenGrid
        What was given, validated.

    Raises
    ------
    CHMv2Error
        If not exactly one is given, or it is no area on the Earth.
    """
    given = [name for name, value in (("bbox", bbox), ("like", like), ("geobox", geobox))
             if value is not None]  # fmt: skip
    if len(given) != 1:
        raise CHMv2Error(
            "one of bbox, like and geobox",
            " and ".join(given) or "none of them",
            "for example open_published((west, south, east, north)) in degrees, "
            "or open_published(like=height)",
        )
    if bbox is not None:
        return _from_bbox(bbox)
    if like is not None:
        return _from_cube(like)
    return _from_geobox(geobox)


def _from_bbox(bbox: Any) -> Area:
    corners = tuple(bbox) if isinstance(bbox, tuple | list) or hasattr(bbox, "__iter__") else ()
    numbers = len(corners) == 4 and all(isinstance(v, Real) and math.isfinite(v) for v in corners)
    if not numbers or not _on_earth(*corners):
        raise CHMv2Error(
            "bbox=(west, south, east, north) in degrees, south below north, within 85.05 degrees "
            "of the equator and 180 of Greenwich (west above east: across 180 degrees)",
            f"bbox={bbox!r}",
            "reproject it, or swap its corners, or pass geobox= for a grid in another CRS",
        )
    west, south, east, north = map(float, corners)
    project = pyproj.Transformer.from_crs("OGC:CRS84", CRS, always_xy=True).transform
    (left, right), (bottom, top) = project(
        [west, east], [max(south, -_LAST_LATITUDE), min(north, _LAST_LATITUDE)]
    )
    return Area((left, bottom, right + 2 * HALF if west > east else right, top))


def _on_earth(west: float, south: float, east: float, north: float) -> bool:
    longitudes = -180 <= west <= 180 and -180 <= east <= 180 and west != east
    return longitudes and -90 <= south < north <= 90 and _overlaps_map(south, north)


def _overlaps_map(south: float, north: float) -> bool:
    return south < _LAST_LATITUDE and north > -_LAST_LATITUDE


def _from_cube(like: Any) -> GivenGrid:
    array = _spatial_array(like)
    grid = find_grid(array)
    if grid.crs is None:
        raise CHMv2Error(
            "a cube with a CRS",
            "like= without one",
            "write it: cube.rio.write_crs('EPSG:...')",
        )
    name = find_crs_coordinate(array.coords) or "spatial_ref"
    coords: dict[Hashable, xr.DataArray] = dict(
        xr_coords(grid.geobox, crs_coord_name=name, dims=grid.dims)
    )
    # Exactly the cube's own labels: recomputed ones may differ in their last bits.
    coords |= {dim: array[dim].reset_coords(drop=True) for dim in grid.dims if dim in array.coords}
    sizes = array.chunksizes
    chunks = (sizes[grid.dims[0]], sizes[grid.dims[1]]) if sizes else None
    return GivenGrid(grid.geobox, coords, chunks)


def _spatial_array(like: Any) -> xr.DataArray:
    """Pick the array that tells the grid: of a Dataset, the first variable with spatial dims."""
    if isinstance(like, xr.DataArray):
        return like
    if isinstance(like, xr.Dataset):
        arrays = [a for a in like.data_vars.values() if spatial_dims(a) is not None]
        if arrays:
            return arrays[0]
    raise CHMv2Error(
        "like= a DataArray, or a Dataset with a variable over y and x",
        f"a {type(like).__name__}" + (f" of {list(like)}" if isinstance(like, xr.Dataset) else ""),
        "pass a cube, or geobox= an odc.geo.geobox.GeoBox",
    )


def _from_geobox(geobox: Any) -> GivenGrid:
    usable = isinstance(geobox, GeoBox) and geobox.crs is not None and geobox.axis_aligned
    if usable and all(geobox.shape):
        return GivenGrid(geobox)
    raise CHMv2Error(
        "a GeoBox with a CRS, along its axes, of at least one pixel",
        f"geobox={geobox!r}",
        "for example odc.geo.geobox.GeoBox.from_bbox(bounds, crs='EPSG:32619', resolution=1)",
    )


def _whole(start: float, stop: float) -> Span:
    """Whole pixels over a stretch; at least one."""
    first = math.floor(start + _SNAP)
    return first, max(math.ceil(stop - _SNAP), first + 1)
