"""Heights and acquisition dates of windows over the published map's tiles."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mercantile
import numpy as np
import numpy.typing as npt
import pandas as pd
import rasterio
from affine import Affine
from rasterio.errors import RasterioError
from rasterio.windows import Window as RasterWindow

from xchmv2.errors import CHMv2Error
from xchmv2.published.footprints import UNKNOWN_DAY, read_footprints
from xchmv2.published.tiles import CRS, Mirror, TileGrid, TilePart, Window, unreachable

#: Requests at a time, while opening.
CONNECTIONS = 16
#: Corners of a tile may be off by this share of a pixel.
_TOLERANCE = 0.01
#: Date of an area without any.
_NOMINAL = np.datetime64("2019-01-01", "ns")
#: Footprints of more tiles than this are not read for the median date alone.
_MOST_TILES = 25
#: Side of the grid of points by which the dates of a tile are weighted.
_SAMPLES = 512


@dataclass(frozen=True)
class Reader:
    """Reads windows of the map over as many of its existing `tiles`, by quadkey, as they touch."""

    mirror: Mirror
    grid: TileGrid
    tiles: tuple[str, ...]

    def heights(self, window: Window) -> npt.NDArray[np.float32]:
        """Read canopy heights (h, w) [m].

        They are NaN where no tile is, the file's mask or nodata value says so, or no imagery was
        taken. Raises CHMv2Error if a tile or its footprints cannot be read.
        """
        found = np.full(window.shape, np.nan, np.float32)
        for part in self.parts(window):
            heights = self._read(part)
            footprints = read_footprints(self.mirror, part.quadkey)
            if footprints is not None:
                heights[~footprints.burn(part.transform, heights.shape)[0]] = np.nan
            found[part.target] = heights
        return found

    def days(self, window: Window) -> npt.NDArray[np.int32]:
        """Look up acquisition dates (h, w) [days since 1970], ``UNKNOWN_DAY`` where not known.

        No heights are read. Raises CHMv2Error if footprints cannot be read.
        """
        found = np.full(window.shape, UNKNOWN_DAY, np.int32)
        for part in self.parts(window):
            footprints = read_footprints(self.mirror, part.quadkey)
            if footprints is not None:
                found[part.target] = footprints.burn(part.transform, part.inside.shape)[1]
        return found

    def parts(self, window: Window) -> list[TilePart]:
        """Where a window meets the tiles that exist."""
        return [part for part in self.grid.parts(window) if part.quadkey in self.tiles]

    def _read(self, part: TilePart) -> npt.NDArray[np.float32]:
        """One window of one file, NaN where its mask or its nodata value says so."""
        (top, bottom), (left, right) = part.inside.rows, part.inside.cols
        window = RasterWindow(left, top, right - left, bottom - top)
        with _open_tile(self.mirror, part.quadkey, self.grid.size) as file:
            values = file.read(1, window=window)
            valid = file.dataset_mask(window=window) > 0
            if file.nodata is not None:  # GDAL forgets it where there is a mask band
                valid &= values != file.nodata
        return np.where(valid, values, np.nan).astype(np.float32)


def tile_size(mirror: Mirror, quadkey: str) -> int:
    """Read the side of the map's tiles [px] from the header of one that exists."""
    with _open_tile(mirror, quadkey) as file:
        return int(file.width)


@contextmanager
def _open_tile(mirror: Mirror, quadkey: str, size: int | None = None) -> Iterator[Any]:
    """Open a tile that fills its quadkey: pixels of another would land in the wrong place."""
    address = mirror.raster(quadkey)
    try:
        with rasterio.Env(**mirror.gdal_options), rasterio.open(address) as file:
            size = size or file.width
            bounds = mercantile.xy_bounds(mercantile.quadkey_to_tile(quadkey))
            placed = np.allclose(file.bounds, bounds, rtol=0, atol=_TOLERANCE * file.transform.a)
            if file.crs != CRS or not placed or file.shape != (size, size):
                raise CHMv2Error(
                    f"a tile of {size} x {size} px that fills its quadkey in {CRS}",
                    f"{file.width} x {file.height} px in {file.crs} over {tuple(file.bounds)} "
                    f"at {address}",
                    "pass base_url= of a copy with the published map's layout",
                )
            yield file
    except RasterioError as error:
        raise unreachable(address, error) from error


def resolve_time(
    time: Any, reader: Reader, window: Window
) -> tuple[np.datetime64, str, dict[str, str]]:
    """Validate the user's date, or look up the median acquisition date of an area.

    The median is the date by which half of the area had been imaged; 2019-01-01 where nothing is
    dated. Returns it with its description, and attributes (ACDD) with the earliest and latest date
    in the area, where they are known. A CHMv2Error refuses a ``time`` that is no date, and
    footprints that are too many or cannot be read.
    """
    if time is not None:
        return _validate_time(time), "date given for the whole map", {}
    parts = reader.parts(window)
    if len(parts) > _MOST_TILES:
        raise CHMv2Error(
            f"at most {_MOST_TILES} tiles for the median acquisition date",
            f"{len(parts)}",
            "give a date: open_published(..., time='2019-07-01')",
        )
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        sampled = list(pool.map(lambda part: _sample_days(reader, part), parts))
    days = np.concatenate([found[0] for found in sampled])
    if not days.size:
        return _NOMINAL, "nominal date: the imagery in this area has no acquisition dates", {}
    order = np.argsort(days, kind="stable")
    grown = np.cumsum(np.concatenate([found[1] for found in sampled])[order])
    dates = days[order].astype("datetime64[D]")
    median = dates[np.searchsorted(grown, grown[-1] / 2)].astype("datetime64[ns]")
    first, last = str(dates[0]), str(dates[-1])
    return (
        median,
        "median acquisition date of the imagery in this area",
        {"time_coverage_start": first, "time_coverage_end": last},
    )


def _validate_time(time: Any) -> np.datetime64:
    try:
        stamp = pd.Timestamp(str(time) if isinstance(time, str) else np.asarray(time)[()])
        if stamp is pd.NaT:
            raise ValueError("no date")
        if stamp.tzinfo is not None:
            stamp = stamp.tz_convert("UTC").tz_localize(None)
        return np.datetime64(stamp.to_datetime64(), "ns")
    except (ValueError, TypeError, OverflowError) as error:
        raise CHMv2Error(
            "one date as time=", f"{time!r}", "for example open_published(..., time='2019-07-01')"
        ) from error


def _sample_days(
    reader: Reader, part: TilePart
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Dates in a part of a tile, and the area of each there [px of the map], by sampling."""
    footprints = read_footprints(reader.mirror, part.quadkey)
    if footprints is None:
        return np.empty(0, np.int32), np.empty(0)
    rows, cols = part.inside.shape
    height, width = min(rows, _SAMPLES), min(cols, _SAMPLES)
    coarse = part.transform * Affine.scale(cols / width, rows / height)
    sampled = footprints.burn(coarse, (height, width))[1]
    days, counts = np.unique(sampled[sampled != UNKNOWN_DAY], return_counts=True)
    return days, counts.astype(np.float64) * (rows * cols / sampled.size)
