"""Windows of the published map's tiles, their masks and acquisition dates."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import rasterio
from rasterio.errors import RasterioError
from rasterio.windows import Window as RasterWindow

from xchmv2.errors import CHMv2Error
from xchmv2.published.footprints import UNKNOWN_DAY, read_footprints
from xchmv2.published.tiles import CRS, Mirror, TileGrid, TilePart, Window, tile_bounds, unreachable

# Corners of a tile may be off by this share of a pixel.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Reader:
    """Reads windows of the map over as many tiles as they touch.

    Parameters
    ----------
    mirror : Mirror
        Where the map lies.
    grid : TileGrid
        Its pixel grid.
    tiles : tuple of str
        Quadkeys that exist; all others are open sea.
    """

    mirror: Mirror
    grid: TileGrid
    tiles: tuple[str, ...]

    def heights(self, window: Window) -> npt.NDArray[np.float32]:
        """Read canopy heights.

        Parameters
        ----------
        window : Window
            Pixels (h, w) of the map.

        Returns
        -------
        numpy.ndarray of float32
            (h, w) [m]; NaN where no tile is, the file's mask or nodata value says so, or no
            imagery was taken.

        Raises
        ------
        CHMv2Error
            If a tile or its footprints cannot be read.
        """
        found = np.full(window.shape, np.nan, np.float32)
        for part in self._parts(window):
            heights = self._read(part)
            footprints = read_footprints(self.mirror, part.quadkey)
            if footprints is not None:
                heights[~footprints.burn(part)[0]] = np.nan
            found[part.target] = heights
        return found

    def days(self, window: Window) -> npt.NDArray[np.int32]:
        """Look up acquisition dates; no heights are read.

        Parameters
        ----------
        window : Window
            Pixels (h, w) of the map.

        Returns
        -------
        numpy.ndarray of int32
            (h, w) [days since 1970], ``UNKNOWN_DAY`` where not known.

        Raises
        ------
        CHMv2Error
            If footprints cannot be read.
        """
        found = np.full(window.shape, UNKNOWN_DAY, np.int32)
        for part in self._parts(window):
            footprints = read_footprints(self.mirror, part.quadkey)
            if footprints is not None:
                found[part.target] = footprints.burn(part)[1]
        return found

    def _parts(self, window: Window) -> list[TilePart]:
        return [part for part in self.grid.parts(window) if part.quadkey in self.tiles]

    def _read(self, part: TilePart) -> npt.NDArray[np.float32]:
        """One window of one file, NaN where its mask or its nodata value says so."""
        (top, bottom), (left, right) = part.inside.rows, part.inside.cols
        window = RasterWindow(left, top, right - left, bottom - top)
        address = self.mirror.raster(part.quadkey)
        try:
            with rasterio.Env(**self.mirror.gdal_options), rasterio.open(address) as file:
                _validate_tile(file, part.quadkey, self.grid.size)
                values = file.read(1, window=window)
                valid = file.dataset_mask(window=window) > 0
                nodata = file.nodata
        except RasterioError as error:
            raise unreachable(address, error) from error
        if nodata is not None:  # GDAL forgets it where there is a mask band
            valid &= values != nodata
        return np.where(valid, values, np.nan).astype(np.float32)


def tile_size(mirror: Mirror, quadkey: str) -> int:
    """Read the side of the map's tiles [px] from the header of one.

    Parameters
    ----------
    mirror : Mirror
        Where the map lies.
    quadkey : str
        A tile that exists.

    Returns
    -------
    int
        32768 in the published map.

    Raises
    ------
    CHMv2Error
        If the tile cannot be read or is not laid out as the published map is.
    """
    address = mirror.raster(quadkey)
    try:
        with rasterio.Env(**mirror.gdal_options), rasterio.open(address) as file:
            _validate_tile(file, quadkey, file.width)
            return int(file.width)
    except RasterioError as error:
        raise unreachable(address, error) from error


def _validate_tile(file: Any, quadkey: str, size: int) -> None:
    """Refuse a file that does not fill its quadkey: its pixels would land in the wrong place."""
    tolerance = _TOLERANCE * (file.transform.a or 1)
    placed = all(
        math.isclose(found, wanted, rel_tol=0, abs_tol=tolerance)
        for found, wanted in zip(file.bounds, tile_bounds(quadkey), strict=True)
    )
    if file.crs is not None and file.crs == CRS and placed and file.shape == (size, size):
        return
    raise CHMv2Error(
        f"a tile of {size} x {size} px that fills its quadkey in {CRS}",
        f"{file.width} x {file.height} px in {file.crs} over {tuple(file.bounds)} at {file.name}",
        "pass base_url= of a copy with the published map's layout",
    )


#: The middle of the years most of the imagery is from; for areas without any date.
_NOMINAL = np.datetime64("2019-01-01", "D")
#: Footprints are read for so many tiles without being asked; each may take megabytes.
_MOST_TILES = 25
_CONNECTIONS = 8
#: Dates are looked up at so many by so many places of a tile.
_SAMPLES = 512


@dataclass(frozen=True)
class TimeLabel:
    """A date for the heights of an area.

    Parameters
    ----------
    time : numpy.datetime64
        The date, in nanoseconds.
    meaning : str
        What it is.
    coverage : tuple of str or None
        Earliest and latest acquisition in the area, as ISO dates, where they were looked up.
    """

    time: np.datetime64
    meaning: str
    coverage: tuple[str, str] | None = None

    @property
    def attrs(self) -> dict[str, str]:
        """Attributes that tell when the area was imaged (ACDD)."""
        if self.coverage is None:
            return {}
        first, last = self.coverage
        return {"time_coverage_start": first, "time_coverage_end": last}


def resolve_time(time: Any, reader: Reader, window: Window) -> TimeLabel:
    """Take the user's date, or look up the median acquisition date of an area.

    Parameters
    ----------
    time : datetime-like or None
        The user's date.
    reader : Reader
        Reads the map.
    window : Window
        The area.

    Returns
    -------
    TimeLabel
        The median is weighted by area; where nothing is dated it is 2019-01-01.

    Raises
    ------
    CHMv2Error
        If ``time`` is no date, too many footprints would have to be read, or they cannot be.
    """
    if time is not None:
        return TimeLabel(_validate_time(time), "date given for the whole map")
    parts = [part for part in reader.grid.parts(window) if part.quadkey in reader.tiles]
    if len(parts) > _MOST_TILES:
        raise CHMv2Error(
            f"at most {_MOST_TILES} tiles, to look up the median acquisition date in",
            f"{len(parts)}",
            "give a date: open_published(..., time='2019-07-01')",
        )
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        found = list(pool.map(lambda part: _dated_areas(reader, part), parts))
    days = np.concatenate([days for days, _ in found])
    areas = np.concatenate([areas for _, areas in found])
    if not days.size:
        label = "nominal date: the imagery in this area has no acquisition dates"
        return TimeLabel(_NOMINAL.astype("datetime64[ns]"), label)
    return _median(days, areas)


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
            "time= one date", f"time={time!r}", "for example open_published(..., time='2019-07-01')"
        ) from error


def _dated_areas(
    reader: Reader, part: TilePart
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Dates in a part of a tile, and the area of each there [px of the map], by sampling."""
    footprints = read_footprints(reader.mirror, part.quadkey)
    if footprints is None:
        return np.empty(0, np.int32), np.empty(0)
    sampled = footprints.burn(part.coarsened(_SAMPLES))[1]
    days, counts = np.unique(sampled[sampled != UNKNOWN_DAY], return_counts=True)
    return days, counts * (np.prod(part.inside.shape) / sampled.size)


def _median(days: npt.NDArray[np.int32], areas: npt.NDArray[np.float64]) -> TimeLabel:
    """Find the date by which half of the area had been imaged."""
    order = np.argsort(days, kind="stable")
    grown = np.cumsum(areas[order])
    middle = int(days[order][np.searchsorted(grown, grown[-1] / 2)])
    first, last = (str(np.datetime64(int(day), "D")) for day in (days.min(), days.max()))
    time = np.datetime64(middle, "D").astype("datetime64[ns]")
    return TimeLabel(time, "median acquisition date of the imagery in this area", (first, last))
