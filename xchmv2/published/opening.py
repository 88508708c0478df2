"""open_published(): the published global map as heights with their acquisition dates."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import dask.array as da
import numpy as np
import numpy.typing as npt
import pyproj
import xarray as xr
from dask.base import tokenize
from odc.geo.geobox import GeoBox
from odc.geo.xr import spatial_dims, xr_coords

from xchmv2.errors import CHMv2Error
from xchmv2.published.footprints import UNKNOWN_DAY
from xchmv2.published.target import Frame, Target
from xchmv2.published.tile_reading import CONNECTIONS, Reader, resolve_time, tile_size
from xchmv2.published.tiles import CRS, HALF, PUBLISHED_MAP, Mirror, TileGrid, Window
from xchmv2.raster import (
    HEIGHT_ATTRS,
    HEIGHT_NAME,
    find_crs_coordinate,
    find_grid,
    georeference,
    read_bbox,
    validate_number,
    with_crs_variables,
)

_Layer = Literal["heights", "dates"]

_DATE_NAME = "acquisition_date"
_LICENSE = "CC BY 4.0 according to the registry of the data, DINOv3 License according to the paper"
_REFERENCES = "CHMv2, arXiv:2603.06382"
_WHOLE_METRES = (
    "whole metres, in pixels of 1.194 m of EPSG:3857 (times cos(latitude) on the ground)"
)
#: Side of a tile of the published map [px].
_TILE = 32768
#: An area of more tiles than this is taken for a mistake.
_MOST_TILES = 10_000
#: Latitude where the Mercator square ends [degrees].
_LAST_LATITUDE = 85.0511287798066
#: Edges this near to a pixel's edge lie on it [px].
_SNAP = 1e-6


def open_published(
    bbox: tuple[float, float, float, float] | None = None,
    *,
    like: xr.DataArray | xr.Dataset | None = None,
    geobox: GeoBox | None = None,
    time: Any = None,
    chunks: int | None = None,
    base_url: str | os.PathLike[str] = PUBLISHED_MAP,
) -> xr.Dataset:
    """Open the published global CHMv2 canopy height map as one more date of a cube, lazily.

    Give one of ``bbox``, ``like`` and ``geobox``.

    Parameters
    ----------
    bbox : (west, south, east, north), optional
        Longitudes and latitudes [degrees] of an area in the map's own pixels, 1.194 m of
        EPSG:3857, untouched. West may exceed east, for an area across 180 degrees: x then goes on
        past 20037508 m.
    like : DataArray or Dataset, optional
        A cube, such as a prediction, whose grid to resample to: area average where it is coarser
        than the map, bilinear where it is finer. It is not modified.
    geobox : odc.geo.geobox.GeoBox, optional
        The same for any other grid along the axes of its CRS.
    time : datetime-like, optional
        Date to label the heights with. By default the median acquisition date in the area; it is
        looked up at once, in up to 25 tiles. For an area of more, give it.
    chunks : int, optional
        Side of a chunk [px]. By default the chunks of ``like`` where it has any, else about 4096
        pixels of the map.
    base_url : str or path
        Where the map is: an http(s):// or s3:// address, or a folder, with the layout of the
        published one: ``chm/{quadkey}.tif`` and ``metadata/{quadkey}.geojson``.

    Returns
    -------
    Dataset
        ``canopy_height`` (time: 1, y, x) float32 [m], NaN where no imagery was taken, it was
        masked as cloud, or there is no tile; and ``acquisition_date`` (time: 1, y, x)
        datetime64[ns] of the imagery behind each pixel, NaT where not known. Dask-backed.

    Raises
    ------
    CHMv2Error
        If the area, grid or address is not valid, the map has no tile there, or it cannot be
        reached; when computed, if a tile cannot be read.
    ImageryError
        If the pixels of ``like`` are not on a regular grid.

    Notes
    -----
    Opening asks for each touched tile whether it exists and reads the header of one and, for the
    median date, the footprints. It reads no heights.

    A resampled pixel is NaN unless half of it has a height. Where footprints overlap, the later
    date counts. Dates are not resampled: each pixel has the date of the one nearest to its centre.

    References
    ----------
    CHMv2, arXiv:2603.06382.

    Examples
    --------
    >>> published = xchmv2.open_published((-71.30, 44.05, -71.28, 44.07))  # doctest: +SKIP
    >>> published = xchmv2.open_published(like=prediction)  # doctest: +SKIP
    >>> xr.concat([published["canopy_height"], prediction], "time")  # doctest: +SKIP
    """
    area = _resolve_area(bbox, like, geobox)
    validate_number("chunks", chunks, 2048, least=1, unit="px", whole=True, optional=True)
    reader = _open_reader(Mirror.at(base_url), area)
    frame = Frame(reader.grid, area.geobox(reader.grid))
    target = Target(reader, frame)
    sizes = area.chunks if chunks is None and area.chunks else None
    sizes = sizes or da.core.normalize_chunks(chunks or target.block, frame.geobox.shape)
    label = resolve_time(time, reader, frame.whole())
    return _label(target, area.coords or dict(xr_coords(frame.geobox)), sizes, label)


def _label(
    target: Target,
    coords: dict[Hashable, xr.DataArray],
    sizes: tuple[tuple[int, ...], ...],
    label: tuple[np.datetime64, str, dict[str, str]],
) -> xr.Dataset:
    """Heights and dates with their names, coordinates, CRS, units and source."""
    time, meaning, coverage = label
    mapping = find_crs_coordinate(coords)
    dims: tuple[Hashable, ...] = ("time", *(name for name in coords if name != mapping))
    origin = {
        "source": f"CHMv2 global canopy height map, Meta and World Resources Institute; "
        f"read from {target.reader.mirror.base}",
        "license": _LICENSE,
        "references": _REFERENCES,
    }
    common = {"grid_mapping": mapping, **origin}
    height = {**HEIGHT_ATTRS, **common, "comment": f"{_WHOLE_METRES}; {target.method}"}
    date = {"long_name": "acquisition date of the imagery", **common}
    heights, dates = (_lazy(target, layer, sizes) for layer in ("heights", "dates"))
    found = xr.Dataset(
        {HEIGHT_NAME: (dims, heights, height), _DATE_NAME: (dims, dates, date)},
        {**coords, "time": xr.Variable("time", [time], {"long_name": meaning})},
        {"title": "CHMv2 global canopy height map", **origin, **coverage},
    )
    # Tells rioxarray and GDAL that NaN is nodata, as with predictions.
    found[HEIGHT_NAME].encoding["_FillValue"] = np.float32(np.nan)
    # Without these, writing would compute all dates to choose an encoding.
    found[_DATE_NAME].encoding |= {
        "units": "days since 1970-01-01",
        "dtype": "int32",
        "_FillValue": np.int32(UNKNOWN_DAY),
    }
    return found


def _lazy(target: Target, layer: _Layer, sizes: tuple[tuple[int, ...], ...]) -> da.Array:
    """One task per chunk, named by what it reads."""
    dtype = np.dtype("float32" if layer == "heights" else "datetime64[ns]")
    return da.map_blocks(
        partial(_read_chunk, target, layer),
        chunks=((1,), *sizes),
        dtype=dtype,
        meta=np.empty((0, 0, 0), dtype),
        name=f"chmv2-published-{layer}-{tokenize(target, layer, sizes)}",
    )


def _read_chunk(target: Target, layer: _Layer, block_info: Any = None) -> npt.NDArray[Any]:
    """Read the chunk that dask describes: (1, h, w)."""
    _, rows, cols = block_info[None]["array-location"]
    if layer == "heights":
        return target.heights(rows, cols)[None]
    days = target.days(rows, cols)[None]
    dates = np.where(days == UNKNOWN_DAY, 0, days).astype("datetime64[D]")
    return np.where(days == UNKNOWN_DAY, np.datetime64("NaT"), dates.astype("datetime64[ns]"))


def _open_reader(mirror: Mirror, area: _Area) -> Reader:
    grid = TileGrid(_TILE)
    tiles = _existing_tiles(mirror, grid, area.window(grid))
    size = tile_size(mirror, tiles[0])
    if size != _TILE:  # the resampling margin of a coarser copy may reach into further tiles
        grid = TileGrid(size)
        tiles = _existing_tiles(mirror, grid, area.window(grid))
    return Reader(mirror, grid, tiles)


def _existing_tiles(mirror: Mirror, grid: TileGrid, window: Window) -> tuple[str, ...]:
    """Quadkeys of the tiles under a window that exist."""
    count = grid.count(window)
    if count > _MOST_TILES:
        raise CHMv2Error(
            f"an area of at most {_MOST_TILES} tiles of the map (about 39 km at the equator)",
            f"{count}",
            "open it in parts",
        )
    wanted = sorted({part.quadkey for part in grid.parts(window)})
    # The first one alone: without a network there is one failure to wait for, not hundreds.
    first = mirror.exists(mirror.raster(wanted[0]))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        rest = list(pool.map(lambda key: mirror.exists(mirror.raster(key)), wanted[1:]))
    tiles = tuple(key for key, there in zip(wanted, [first, *rest], strict=True) if there)
    if not tiles:
        raise CHMv2Error(
            "an area that the published map covers",
            f"none of its {len(wanted)} tiles, such as {mirror.raster(wanted[0])}",
            "check the area (longitude first) and base_url; there are no tiles over open sea",
        )
    return tiles


@dataclass(frozen=True, eq=False)
class _Area:
    """The area that the user asks for.

    `place`: west, south, east, north [m of EPSG:3857] in the map's own pixels, where east may lie
    past 180 degrees; or another grid. `coords`: coordinates (y, x, CRS) to keep as they are; empty
    for those of the grid. `chunks`: sizes of chunks along y and x to follow [px].
    """

    place: tuple[float, float, float, float] | GeoBox
    coords: dict[Hashable, xr.DataArray] = field(default_factory=dict)
    chunks: tuple[tuple[int, ...], ...] | None = None

    def geobox(self, grid: TileGrid) -> GeoBox:
        """Grid of the result."""
        if isinstance(self.place, GeoBox):
            return self.place
        west, south, east, north = self.place
        top, bottom = _whole((HALF - north) / grid.pixel, (HALF - south) / grid.pixel)
        cols = _whole((west + HALF) / grid.pixel, (east + HALF) / grid.pixel)
        window = Window((max(top, 0), min(bottom, grid.side)), cols)
        return GeoBox(window.shape, grid.transform(window), CRS)

    def window(self, grid: TileGrid) -> Window:
        """Pixels of the map under the area."""
        return Frame(grid, self.geobox(grid)).whole()


def _whole(start: float, stop: float) -> tuple[int, int]:
    """Whole pixels over a stretch; at least one."""
    first = math.floor(start + _SNAP)
    return first, max(math.ceil(stop - _SNAP), first + 1)


def _resolve_area(bbox: Any, like: Any, geobox: Any) -> _Area:
    choices = {"bbox": bbox, "like": like, "geobox": geobox}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        raise CHMv2Error(
            "one of bbox, like and geobox",
            " and ".join(given) or "none of them",
            "for example open_published((west, south, east, north)) in degrees, "
            "or open_published(like=height)",
        )
    if bbox is not None:
        return _from_bbox(bbox)
    return _from_geobox(geobox) if like is None else _from_cube(like)


def _from_bbox(bbox: Any) -> _Area:
    west, south, east, north = read_bbox(bbox)
    if south >= _LAST_LATITUDE or north <= -_LAST_LATITUDE:
        raise CHMv2Error(
            "bbox within 85.05 degrees of the equator, where the map ends",
            f"bbox={bbox!r}",
            "choose another area",
        )
    project = pyproj.Transformer.from_crs("OGC:CRS84", CRS, always_xy=True).transform
    beyond = 360 if east > 180 else 0
    (left, right), (bottom, top) = project(
        [west, east - beyond], [max(south, -_LAST_LATITUDE), min(north, _LAST_LATITUDE)]
    )
    return _Area((left, bottom, right + 2 * HALF if beyond else right, top))


def _from_cube(like: Any) -> _Area:
    array = georeference(_spatial_array(like))
    grid = find_grid(array)
    if grid.crs is None:
        raise CHMv2Error(
            "a cube with a CRS", "like= without one", "write it: cube.rio.write_crs('EPSG:...')"
        )
    coords = dict(
        xr_coords(grid.geobox, crs_coord_name=array.attrs["grid_mapping"], dims=grid.dims)
    )
    # Exactly the cube's own labels: recomputed ones may differ in their last bits.
    coords |= {dim: array[dim].reset_coords(drop=True) for dim in grid.dims if dim in array.coords}
    sizes = array.chunksizes
    return _Area(grid.geobox, coords, tuple(sizes[dim] for dim in grid.dims) if sizes else None)


def _spatial_array(like: Any) -> xr.DataArray:
    """Pick the array with the grid: of a Dataset, the first variable with spatial dims."""
    if isinstance(like, xr.DataArray):
        return like
    if isinstance(like, xr.Dataset):
        arrays = [
            a for a in with_crs_variables(like).data_vars.values() if spatial_dims(a) is not None
        ]
        if arrays:
            return arrays[0]
    raise CHMv2Error(
        "like= a DataArray, or a Dataset with a variable over y and x",
        f"a {type(like).__name__}" + (f" of {list(like)}" if isinstance(like, xr.Dataset) else ""),
        "pass a cube, or geobox= an odc.geo.geobox.GeoBox",
    )


def _from_geobox(geobox: Any) -> _Area:
    usable = isinstance(geobox, GeoBox) and geobox.crs is not None and geobox.axis_aligned
    if usable and all(geobox.shape):
        return _Area(geobox)
    raise CHMv2Error(
        "a GeoBox with a CRS, along its axes, of at least one pixel",
        f"geobox={geobox!r}",
        "for example odc.geo.geobox.GeoBox.from_bbox(bounds, crs='EPSG:32619', resolution=1)",
    )
