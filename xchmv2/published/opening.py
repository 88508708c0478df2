"""The published map as a cube of one date: validate, plan, label. Heights are not read."""

from __future__ import annotations

import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.base import tokenize
from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error
from xchmv2.imagery import find_crs_coordinate
from xchmv2.labels import HEIGHT_ATTRS, HEIGHT_NAME
from xchmv2.published.area import Area, GivenGrid, resolve_area
from xchmv2.published.dates import TimeLabel, resolve_time
from xchmv2.published.footprints import UNKNOWN_DAY
from xchmv2.published.mirror import PUBLISHED_MAP, Mirror
from xchmv2.published.reading import Reader, tile_size
from xchmv2.published.target import Target, resolve_target
from xchmv2.published.tiles import TileGrid, Window

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
