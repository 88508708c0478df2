"""The tile grid of the published map: zoom-10 quadkeys in EPSG:3857, one pixel grid over all.

Rows count from the northern edge of the Mercator square, columns from 180 degrees west. Columns
may go on past 180 degrees east, into the first tiles again: so an area across that line is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mercantile
from affine import Affine
from odc.geo.geobox import GeoBox

#: Zoom level whose tiles the files are.
ZOOM = 10
#: Tiles along each axis of the Mercator square.
TILES: int = 2**ZOOM
#: Half the side of the Mercator square [m of EPSG:3857].
HALF = 20037508.342789244
#: Side of a tile [m of EPSG:3857].
TILE_SIDE: float = 2 * HALF / TILES
CRS = "EPSG:3857"

#: (start, stop) along one axis [px].
Span = tuple[int, int]
#: (left, bottom, right, top) [m of EPSG:3857].
Bounds = tuple[float, float, float, float]


@dataclass(frozen=True)
class Window:
    """Pixels ``[start, stop)`` of the whole map.

    Parameters
    ----------
    rows, cols : tuple of int
        Rows from the north, columns from 180 degrees west [px].
    """

    rows: Span
    cols: Span

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) [px]."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    def part(self, rows: Span, cols: Span) -> Window:
        """Pixels of the map at rows and columns counted within this window."""
        (top, _), (left, _) = self.rows, self.cols
        return Window((top + rows[0], top + rows[1]), (left + cols[0], left + cols[1]))


@dataclass(frozen=True)
class TilePart:
    """Where one tile and a window meet.

    Parameters
    ----------
    quadkey : str
        The tile.
    inside : Window
        Pixels counted within the tile.
    target : tuple of slice
        The same pixels counted within the window.
    transform : Affine
        From pixels of ``inside`` to EPSG:3857, between 180 degrees west and east.
    """

    quadkey: str
    inside: Window
    target: tuple[slice, slice]
    transform: Affine

    @property
    def bounds(self) -> Bounds:
        """Extent in EPSG:3857 [m]."""
        height, width = self.inside.shape
        left, top, pixel = self.transform.c, self.transform.f, self.transform.a
        return left, top - height * pixel, left + width * pixel, top

    def coarsened(self, side: int) -> TilePart:
        """Cover the same ground by at most ``side`` x ``side`` pixels."""
        height, width = (max(1, min(size, side)) for size in self.inside.shape)
        rows, cols = self.inside.shape
        scale = Affine.scale(cols / width, rows / height)
        return TilePart(
            self.quadkey,
            Window((0, height), (0, width)),
            (slice(0, height), slice(0, width)),
            self.transform * scale,
        )


@dataclass(frozen=True)
class TileGrid:
    """The pixel grid of the map.

    Parameters
    ----------
    size : int
        Side of a tile [px]; 32768 in the published map.
    """

    size: int

    @property
    def pixel(self) -> float:
        """Side of a pixel [m of EPSG:3857]."""
        return TILE_SIDE / self.size

    @property
    def side(self) -> int:
        """Side of the Mercator square [px]."""
        return TILES * self.size

    def transform(self, window: Window, start: int = 0) -> Affine:
        """From pixels of a window to metres; column ``start`` lies at the western edge -HALF."""
        left = (window.cols[0] - start) * self.pixel - HALF
        return Affine(self.pixel, 0.0, left, 0.0, -self.pixel, HALF - window.rows[0] * self.pixel)

    def geobox(self, window: Window) -> GeoBox:
        """Give the window in odc-geo's terms; x goes on past 180 degrees east."""
        return GeoBox(window.shape, self.transform(window), CRS)

    def parts(self, window: Window) -> Iterator[TilePart]:
        """Split a window into the tiles it touches, from the north-west."""
        for y, inside_rows, target_rows in self._along(window.rows):
            for x, inside_cols, target_cols in self._along(window.cols):
                tile = mercantile.Tile(x % TILES, y, ZOOM)
                inside = Window(inside_rows, inside_cols)
                origin = Window((y * self.size, 0), (x % TILES * self.size, 0))
                yield TilePart(
                    mercantile.quadkey(tile),
                    inside,
                    (target_rows, target_cols),
                    self.transform(origin.part(inside_rows, inside_cols)),
                )

    def count(self, window: Window) -> int:
        """How many tiles a window touches."""
        height, width = (
            -(-stop // self.size) - start // self.size for start, stop in (window.rows, window.cols)
        )
        return height * width

    def _along(self, span: Span) -> Iterator[tuple[int, Span, slice]]:
        """Tile indices along an axis, the span within each, and within the window."""
        start, stop = span
        for index in range(start // self.size, -(-stop // self.size)):
            first = max(start, index * self.size)
            last = min(stop, (index + 1) * self.size)
            inside = first - index * self.size, last - index * self.size
            yield index, inside, slice(first - start, last - start)


def tile_bounds(quadkey: str) -> Bounds:
    """Extent of a tile in EPSG:3857 [m]."""
    tile = mercantile.quadkey_to_tile(quadkey)
    left, top = tile.x * TILE_SIDE - HALF, HALF - tile.y * TILE_SIDE
    return left, top - TILE_SIDE, left + TILE_SIDE, top
