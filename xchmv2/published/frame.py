"""How any grid lies on the map, also across 180 degrees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyproj
from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error
from xchmv2.published.tiles import CRS, HALF, Span, TileGrid, Window

#: The same projection, cut open at Greenwich: for areas near 180 degrees.
_CRS_AROUND_180 = "+proj=webmerc +lon_0=180 +datum=WGS84 +type=crs"
# Grids this near to the map's own, in pixels, are the map's own.
_SAME = 1e-3
_BOUNDARY_POINTS = 33


@dataclass(frozen=True)
class Frame:
    """How a target grid lies on the map.

    Parameters
    ----------
    grid : TileGrid
        Pixels of the map.
    geobox : GeoBox
        The target grid.
    """

    grid: TileGrid
    geobox: GeoBox

    @cached_property
    def around_180(self) -> bool:
        """Whether the target is nearer to 180 degrees than to Greenwich."""
        (height, width), affine = self.geobox.shape, self.geobox.affine
        x, y = affine.c + affine.a * width / 2, affine.f + affine.e * height / 2
        to_degrees = pyproj.Transformer.from_crs(self.geobox.crs.proj, "OGC:CRS84", always_xy=True)
        longitude = to_degrees.transform(x, y)[0]
        return math.isfinite(longitude) and abs((longitude + 180) % 360 - 180) > 90

    @property
    def crs(self) -> str:
        """The map's CRS, cut open far from the target."""
        return _CRS_AROUND_180 if self.around_180 else CRS

    @property
    def start(self) -> int:
        """Column of the map that lies at the western edge of ``crs``."""
        return self.grid.side // 2 if self.around_180 else 0

    @cached_property
    def _project(self) -> pyproj.Transformer:
        return pyproj.Transformer.from_crs(self.geobox.crs.proj, self.crs, always_xy=True)

    def positions(
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

    def _boundary(self, rows: Span, cols: Span) -> npt.NDArray[np.float64]:
        """Positions (2, n) on the map of points around a part of the target."""
        y, x = (np.linspace(*span, _BOUNDARY_POINTS) for span in (rows, cols))
        ys = np.concatenate([np.repeat(rows, len(x)), np.tile(y, 2)])
        xs = np.concatenate([np.tile(x, 2), np.repeat(cols, len(y))])
        found = self.positions(ys, xs)
        return found[:, np.isfinite(found).all(axis=0)]

    def window(self, rows: Span, cols: Span, margin: int = 2) -> Window | None:
        """Pixels of the map under a part of the target; None where it lies outside the map."""
        points = self._boundary(rows, cols)
        if not points.size:
            return None
        first, last = np.floor(points.min(axis=1)) - margin, np.ceil(points.max(axis=1)) + margin
        top, bottom = max(int(first[0]), 0), min(int(last[0]), self.grid.side)
        left = max(int(first[1]), self.start)
        right = min(int(last[1]), self.start + self.grid.side)
        return Window((top, bottom), (left, right)) if top < bottom and left < right else None

    @cached_property
    def ratio(self) -> float:
        """Side of a target pixel in the middle of the target, in pixels of the map."""
        row, col = (size // 2 for size in self.geobox.shape)
        corner, below, beside = self.positions(
            np.array([row, row + 1.0, row]), np.array([col, col, col + 1.0])
        ).T
        area = float(np.linalg.det(np.stack([below - corner, beside - corner])))
        if not math.isfinite(area) or area == 0:
            raise CHMv2Error(
                "an area on the Earth between 85 degrees south and north",
                f"{self.geobox.crs} coordinates {tuple(self.geobox.boundingbox)}",
                "correct the CRS or the coordinates",
            )
        return math.sqrt(abs(area))

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
