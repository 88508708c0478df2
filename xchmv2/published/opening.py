"""open_published(): the published global map as heights with their acquisition dates."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
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
from xchmv2.published.target import Frame, Target, resolve_target
from xchmv2.published.tile_reading import Reader, TimeLabel, resolve_time, tile_size
from xchmv2.published.tiles import CRS, HALF, PUBLISHED_MAP, Mirror, Span, TileGrid, Window
from xchmv2.raster import HEIGHT_ATTRS, HEIGHT_NAME, find_crs_coordinate, find_grid

_DATE_NAME = "acquisition_date"
_LICENSE = "CC BY 4.0 according to the registry of the data, DINOv3 License according to the paper"
_REFERENCES = "CHMv2, arXiv:2603.06382"
_WHOLE_METRES = (
    "whole metres, in pixels of 1.194 m of EPSG:3857 (times cos(latitude) on the ground)"
)
#: Side of a tile of the published map [px].
_TILE = 32768
#: More tiles than this are a mistake in the area rather than a wish.
_MOST_TILES = 10_000
_CONNECTIONS = 16


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
        Where the map lies: an http(s):// or s3:// address, or a folder, with the layout of the
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
        If the area, grid or address makes no sense, the map has no tile there, or it cannot be
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
    area = resolve_area(bbox, like, geobox)
    _validate_chunks(chunks)
    reader = _open_reader(Mirror.at(base_url), area)
    target = resolve_target(reader, area.geobox(reader.grid))
    sizes = _resolve_chunks(chunks, area, target)
    label = resolve_time(time, reader, area.window(reader.grid))
    arrays = {layer: _lazy(ReadBlock(target, layer), sizes) for layer in ("heights", "days")}
    return _label(arrays, area, reader, target, label)


@dataclass(frozen=True)
class ReadBlock:
    """The task of one chunk.

    Parameters
    ----------
    target : Target
        Pixels of the grid.
    layer : {"heights", "days"}
        What to read.
    """

    target: Target
    layer: Literal["heights", "days"]

    def __call__(self, block_info: Any = None) -> npt.NDArray[Any]:
        """Read the chunk that dask describes: (1, h, w)."""
        _, rows, cols = block_info[None]["array-location"]
        if self.layer == "heights":
            return self.target.heights(rows, cols)[None]
        days = self.target.days(rows, cols)[None]
        dates = np.where(days == UNKNOWN_DAY, 0, days).astype("datetime64[D]")
        return np.where(days == UNKNOWN_DAY, np.datetime64("NaT"), dates.astype("datetime64[ns]"))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the chunk."""
        return np.dtype("float32" if self.layer == "heights" else "datetime64[ns]")


def _validate_chunks(chunks: Any) -> None:
    if chunks is None or (isinstance(chunks, int) and not isinstance(chunks, bool) and chunks > 0):
        return
    raise CHMv2Error(
        "a chunk side of at least one pixel",
        f"chunks={chunks!r}",
        "leave it out, or for example open_published(..., chunks=2048)",
    )


def _open_reader(mirror: Mirror, area: Area | GivenGrid) -> Reader:
    """Find out which tiles exist under an area, and how many pixels they have."""
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
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        rest = list(pool.map(lambda key: mirror.exists(mirror.raster(key)), wanted[1:]))
    tiles = tuple(key for key, there in zip(wanted, [first, *rest], strict=True) if there)
    if not tiles:
        raise CHMv2Error(
            "an area that the published map covers",
            f"none of its {len(wanted)} tiles, such as {mirror.raster(wanted[0])}",
            "check the area (longitude first) and base_url; there are no tiles over open sea",
        )
    return tiles


def _resolve_chunks(
    chunks: int | None, area: Area | GivenGrid, target: Target
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of chunks along y and x."""
    if chunks is None and area.chunks is not None:
        return area.chunks
    side = chunks or target.block
    height, width = target.shape
    sizes = da.core.normalize_chunks((side, side), (height, width))
    return sizes[0], sizes[1]


def _lazy(task: ReadBlock, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> da.Array:
    """One task per chunk, under a name that tells what it reads."""
    return da.map_blocks(
        task,
        chunks=((1,), *sizes),
        dtype=task.dtype,
        meta=np.empty((0, 0, 0), task.dtype),
        name=f"chmv2-published-{task.layer}-{tokenize(task, sizes)}",
    )


def _label(
    arrays: dict[str, da.Array],
    area: Area | GivenGrid,
    reader: Reader,
    target: Target,
    label: TimeLabel,
) -> xr.Dataset:
    """Give the pixels names, coordinates, CRS, units and their origin."""
    coords = area.coords(reader.grid)
    mapping = find_crs_coordinate(coords)
    dims: tuple[Hashable, ...] = ("time", *(name for name in coords if name != mapping))
    time = xr.Variable("time", [label.time], {"long_name": label.meaning})
    origin = {
        "source": f"CHMv2 global canopy height map, Meta and World Resources Institute; "
        f"read from {reader.mirror.base}",
        "license": _LICENSE,
        "references": _REFERENCES,
    }
    common = {"grid_mapping": mapping, **origin}
    height = {**HEIGHT_ATTRS, **common, "comment": f"{_WHOLE_METRES}; {target.method}"}
    date = {"long_name": "acquisition date of the imagery", **common}
    found = xr.Dataset(
        {HEIGHT_NAME: (dims, arrays["heights"], height), _DATE_NAME: (dims, arrays["days"], date)},
        {**coords, "time": time},
        {"title": "CHMv2 global canopy height map", **origin, **label.attrs},
    )
    # Tells rioxarray and GDAL that NaN is nodata, as with predictions.
    found[HEIGHT_NAME].encoding["_FillValue"] = np.float32(np.nan)
    # Said here, or writing would have to compute all dates to choose.
    found[_DATE_NAME].encoding |= {
        "units": "days since 1970-01-01",
        "dtype": "int32",
        "_FillValue": np.int32(UNKNOWN_DAY),
    }
    return found


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
