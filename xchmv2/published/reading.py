"""Pixels of the map in its own grid: heights, and the dates of the imagery behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import RasterioError
from rasterio.windows import Window as RasterWindow

from xchmv2.errors import CHMv2Error
from xchmv2.published.footprints import UNKNOWN_DAY, read_footprints
from xchmv2.published.mirror import Mirror, unreachable
from xchmv2.published.tiles import CRS, TileGrid, TilePart, Window, tile_bounds

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
