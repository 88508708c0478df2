"""The grid that heights and dates of the published map are resampled to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import Resampling

from xchmv2.errors import CHMv2Error
from xchmv2.published.footprints import UNKNOWN_DAY
from xchmv2.published.tile_reading import Reader
from xchmv2.published.tiles import CRS, HALF, Span, TileGrid, Window, cut
from xchmv2.raster import BLOCK

#: Side of the square of the map that is resampled at a time [px]: small, as a chunk that ends
#: within a square computes all of it.
_SIDE = 512
#: A target pixel may measure this many pixels of the map.
_COARSEST = 4096
#: GDAL may interpolate coordinates to this share of a pixel of the map.
_TOLERANCE = 0.01
#: Half a pixel's area, less what float32 rounds away.
_HALF = 0.5 - 1e-4
#: The map's projection, cut open at Greenwich: for areas near 180 degrees.
_CRS_AROUND_180 = "+proj=webmerc +lon_0=180 +datum=WGS84 +type=crs"
#: Grids this near to the map's own, in pixels, are the map's own.
_SAME = 1e-3
_BOUNDARY_POINTS = 33
#: Pixels of the map around a part of the target that its resampling may need.
_MARGIN = 2


@dataclass(frozen=True)
class Target:
    """Pixels of the grid that the user wants: the map's own, or resampled from them.

    Resampling is the area average where the target is coarser than the map, bilinear where it is
    finer, and the nearest pixel for dates. A CHMv2Error refuses pixels that are too coarse to be
    averaged from the full map.
    """

    reader: Reader
    frame: Frame

    def __post_init__(self) -> None:
        if self.frame.native is None and self.frame.ratio > _COARSEST:
            raise CHMv2Error(
                f"pixels of at most {_COARSEST} x {_COARSEST} of the map's",
                f"pixels of {self.frame.ratio:.0f} x {self.frame.ratio:.0f}",
                "open a finer grid and coarsen it: "
                "height.coarsen(y=10, x=10, boundary='trim').mean()",
            )

    @cached_property
    def _side(self) -> int:
        """Side of the squares of the target that are resampled at a time [px]."""
        return 1 << max(0, int(math.log2(_SIDE / max(self.frame.ratio, 1))))

    @property
    def block(self) -> int:
        """Side of a chunk [px]: whole squares over about 4096 pixels of the map."""
        if self.frame.native is not None:
            return BLOCK
        return self._side * max(1, int(BLOCK / max(self.frame.ratio, 1) / self._side))

    @property
    def method(self) -> str:
        """How the pixels are derived, in words."""
        if self.frame.native is not None:
            return "pixels as published"
        kind = "area average" if self.frame.ratio > 1 else "bilinear"
        return f"resampled from the map's pixels: {kind}"

    def heights(self, rows: Span, cols: Span) -> npt.NDArray[np.float32]:
        """Canopy heights (h, w) [m], NaN where less than half of a pixel has one."""
        missing = np.float32(np.nan)
        return self._gather(rows, cols, self.reader.heights, self._heights, missing)

    def days(self, rows: Span, cols: Span) -> npt.NDArray[np.int32]:
        """Acquisition dates (h, w) [days since 1970], ``UNKNOWN_DAY`` where not known."""
        return self._gather(rows, cols, self.reader.days, self._days, np.int32(UNKNOWN_DAY))

    def _gather(
        self,
        rows: Span,
        cols: Span,
        native: Callable[[Window], npt.NDArray[Any]],
        resampled: Callable[[Window], npt.NDArray[Any]],
        missing: np.generic,
    ) -> npt.NDArray[Any]:
        """Read pixels as they are, or put them together from whole squares of the target."""
        if self.frame.native is not None:
            return native(self.frame.native.part(rows, cols))
        found = np.full((rows[1] - rows[0], cols[1] - cols[0]), missing)
        height, width = self.frame.geobox.shape
        for row, to_row, of_row in cut(rows, self._side, height):
            for col, to_col, of_col in cut(cols, self._side, width):
                found[to_row, to_col] = resampled(Window(row, col))[of_row, of_col]
        return found

    def _heights(self, square: Window) -> npt.NDArray[np.float32]:
        window = self.frame.window(square.rows, square.cols)
        missing = np.full(square.shape, np.nan, np.float32)
        if window is None:
            return missing
        heights = self.reader.heights(window)
        valid = np.isfinite(heights)
        if not valid.any():
            return missing
        # Heights and validity are weighed alike, so what is missing never counts as 0 m.
        source = np.stack([np.where(valid, heights, 0), valid]).astype(np.float32)
        kernel = Resampling.average if self.frame.ratio > 1 else Resampling.bilinear
        total, share = self._warp(source, window, square, kernel)
        return np.where(share >= _HALF, total / np.where(share > 0, share, 1), missing)

    def _days(self, square: Window) -> npt.NDArray[np.int32]:
        window = self.frame.window(square.rows, square.cols)
        if window is None:
            return np.full(square.shape, UNKNOWN_DAY, np.int32)
        source = self.reader.days(window)
        if (source == source.flat[0]).all():
            return np.full(square.shape, source.flat[0], np.int32)
        days: npt.NDArray[np.int32] = self._warp(
            source[None], window, square, Resampling.nearest, UNKNOWN_DAY
        )[0]
        return days

    def _warp(
        self,
        source: npt.NDArray[Any],
        window: Window,
        square: Window,
        kernel: Resampling,
        nodata: int | None = None,
    ) -> npt.NDArray[Any]:
        """Resample (bands, H, W) of the map to (bands, h, w) of the target."""
        geobox, frame = self.frame.geobox, self.frame
        count, height, width = source.shape
        options = {"driver": "GTiff", "count": count, "dtype": source.dtype, "nodata": nodata}
        # A file in memory rather than an array: for arrays rasterio silences a warning by filters
        # that all threads share, so that it appears now and then nevertheless.
        with MemoryFile() as memory:
            with memory.open(
                **options,
                height=height,
                width=width,
                transform=frame.grid.transform(window, frame.start),
            ) as file:
                file.write(source)
            with (
                memory.open() as file,
                WarpedVRT(
                    file,
                    src_crs=frame.crs,  # GeoTIFF cannot hold the one around 180 degrees
                    crs=geobox.crs.to_wkt(),
                    transform=geobox.affine * Affine.translation(square.cols[0], square.rows[0]),
                    height=square.shape[0],
                    width=square.shape[1],
                    resampling=kernel,
                    tolerance=_TOLERANCE,
                    # Left to itself GDAL derives the scale from the windows, and blurs by it.
                    XSCALE=1,
                    YSCALE=1,
                ) as warped,
            ):
                return np.asarray(warped.read())


@dataclass(frozen=True)
class Frame:
    """How a target grid, along the axes of its CRS, lies on the pixels of the map."""

    grid: TileGrid
    geobox: GeoBox

    def whole(self) -> Window:
        """Pixels of the map under the whole target, or a CHMv2Error if it lies outside the map."""
        if self.native is not None:
            return self.native
        height, width = self.geobox.shape
        window = self.window((0, height), (0, width))
        if window is None or not math.isfinite(self.ratio) or self.ratio == 0:
            raise CHMv2Error(
                "an area on the Earth between 85 degrees south and north",
                f"{self.geobox.crs} coordinates {tuple(self.geobox.boundingbox)}",
                "correct the CRS or the coordinates",
            )
        return window

    def window(self, rows: Span, cols: Span) -> Window | None:
        """Pixels of the map under a part of the target; None where it lies outside the map."""
        y, x = (np.linspace(*span, _BOUNDARY_POINTS) for span in (rows, cols))
        points = self._positions(  # around the part
            np.concatenate([np.repeat(rows, len(x)), np.tile(y, 2)]),
            np.concatenate([np.tile(x, 2), np.repeat(cols, len(y))]),
        )
        points = points[:, np.isfinite(points).all(axis=0)]
        if not points.size:
            return None
        first, last = np.floor(points.min(axis=1)) - _MARGIN, np.ceil(points.max(axis=1)) + _MARGIN
        top, bottom = max(int(first[0]), 0), min(int(last[0]), self.grid.side)
        left = max(int(first[1]), self.start)
        right = min(int(last[1]), self.start + self.grid.side)
        return Window((top, bottom), (left, right)) if top < bottom and left < right else None

    @cached_property
    def native(self) -> Window | None:
        """Pixels of the map that are those of the target; None where it must be resampled."""
        (height, width), affine, grid = self.geobox.shape, self.geobox.affine, self.grid
        if self.geobox.crs != CRS or affine.a <= 0 or affine.e >= 0:
            return None
        top, left = (HALF - affine.f) / grid.pixel, (affine.c + HALF) / grid.pixel
        drift = max(height, width) * max(
            abs(affine.a / grid.pixel - 1), abs(affine.e / grid.pixel + 1)
        )
        shift = max(abs(top - round(top)), abs(left - round(left)))
        if drift > _SAME or shift > _SAME:
            return None
        first_row, first_col = round(top), round(left)
        window = Window((first_row, first_row + height), (first_col, first_col + width))
        return window if first_row >= 0 and window.rows[1] <= grid.side else None

    @cached_property
    def ratio(self) -> float:
        """Side of a target pixel in the middle of the target, in pixels of the map."""
        row, col = (size // 2 for size in self.geobox.shape)
        corner, below, beside = self._positions(
            np.array([row, row + 1.0, row]), np.array([col, col, col + 1.0])
        ).T
        return math.sqrt(abs(float(np.linalg.det(np.stack([below - corner, beside - corner])))))

    @cached_property
    def _around_180(self) -> bool:
        """Whether the target is nearer to 180 degrees than to Greenwich."""
        (height, width), affine = self.geobox.shape, self.geobox.affine
        x, y = affine.c + affine.a * width / 2, affine.f + affine.e * height / 2
        to_degrees = pyproj.Transformer.from_crs(self.geobox.crs.proj, "OGC:CRS84", always_xy=True)
        longitude = to_degrees.transform(x, y)[0]
        return math.isfinite(longitude) and abs((longitude + 180) % 360 - 180) > 90

    @property
    def crs(self) -> str:
        """The map's CRS, cut open far from the target."""
        return _CRS_AROUND_180 if self._around_180 else CRS

    @property
    def start(self) -> int:
        """Column of the map that lies at the western edge of ``crs``."""
        return self.grid.side // 2 if self._around_180 else 0

    @cached_property
    def _project(self) -> pyproj.Transformer:
        return pyproj.Transformer.from_crs(self.geobox.crs.proj, self.crs, always_xy=True)

    def _positions(
        self, rows: npt.NDArray[np.float64], cols: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Rows and columns of the map, (2, n), at rows and columns (n,) of the target."""
        affine = self.geobox.affine
        east, north = self._project.transform(
            affine.c + affine.a * cols, affine.f + affine.e * rows
        )
        return np.stack(
            [(HALF - north) / self.grid.pixel, (east + HALF) / self.grid.pixel + self.start]
        )
