"""Which windows of a raster lie under which polygons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from xchmv2.zonal.polygons import Geometries

#: Side of the squares, counted from the raster's first pixel, that polygons are cut into [px].
TILE = 1024

#: First row, end row, first column, end column.
Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class Piece:
    """What one polygon covers of one square of the raster.

    Parameters
    ----------
    polygon : int
        Index of the polygon.
    window : tuple of int
        Pixels it reaches into.
    wkb : bytes or None
        That part of the polygon, in pixels; None if it covers the window wholly.
    """

    polygon: int
    window: Window
    wkb: bytes | None


@dataclass(frozen=True)
class Group:
    """Pieces that are read together.

    Parameters
    ----------
    window : tuple of int
        Pixels to read.
    pieces : tuple of Piece
        With windows inside it.
    """

    window: Window
    pieces: tuple[Piece, ...]


def cut_pieces(geometries: Geometries, shape: tuple[int, int]) -> list[Group]:
    """Cut polygons at fixed squares of the raster, and tell which windows to read.

    Parameters
    ----------
    geometries : ndarray of object, shape (N,)
        Polygons in pixels, as in :class:`~xchmv2.zonal.polygons.Polygons`.
    shape : (height, width)
        Of the raster [px].

    Returns
    -------
    list of Group
        In order of squares. Neighbouring polygons that overlap much are read once; the squares
        do not depend on chunks, so neither do the sums.
    """
    squares: dict[tuple[int, int], list[Piece]] = {}
    for index, geometry in enumerate(geometries):
        for square, piece in _cut(index, geometry, shape):
            squares.setdefault(square, []).append(piece)
    return [group for square in sorted(squares) for group in _grouped(squares[square])]


def _cut(
    index: int, geometry: Any, shape: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], Piece]]:
    import shapely

    window = _window(geometry, (0, shape[0], 0, shape[1]))
    if window is None:
        return
    top, bottom, left, right = window
    shapely.prepare(geometry)
    rows = range(top // TILE, -(-bottom // TILE))
    cols = range(left // TILE, -(-right // TILE))
    for row, col in product(rows, cols):
        square = (
            max(top, row * TILE),
            min(bottom, (row + 1) * TILE),
            max(left, col * TILE),
            min(right, (col + 1) * TILE),
        )
        if (piece := _piece(index, geometry, square)) is not None:
            yield (row, col), piece


def _piece(index: int, geometry: Any, square: Window) -> Piece | None:
    """Cut one square out of a polygon; None if the two share no area."""
    import shapely

    box = shapely.box(square[2], -square[1], square[3], -square[0])
    if shapely.covers(geometry, box):
        return Piece(index, square, None)
    if not shapely.intersects(geometry, box):
        return None
    inside = shapely.covered_by(geometry, box)
    part = geometry if inside else shapely.intersection(geometry, box)
    # Cutting leaves lines and points where the two only touch.
    areas = [p for p in shapely.get_parts(part) if shapely.get_dimensions(p) == 2 and p.area > 0]
    part = shapely.MultiPolygon(_polygons(areas))
    window = _window(part, square)
    return None if window is None else Piece(index, window, shapely.to_wkb(part))


def _polygons(parts: list[Any]) -> list[Any]:
    """Flatten collections of areas to polygons."""
    import shapely

    return [polygon for part in parts for polygon in shapely.get_parts(part)]


def _window(geometry: Any, within: Window) -> Window | None:
    """Return the pixels a polygon reaches into; None if there are none."""
    if geometry.is_empty:
        return None
    low_x, low_y, high_x, high_y = geometry.bounds
    top, bottom = max(within[0], math.floor(-high_y)), min(within[1], math.ceil(-low_y))
    left, right = max(within[2], math.floor(low_x)), min(within[3], math.ceil(high_x))
    return (top, bottom, left, right) if top < bottom and left < right else None


def _grouped(pieces: list[Piece]) -> list[Group]:
    """Read pieces one by one, or all at once where that is no more to read."""
    windows = np.array([piece.window for piece in pieces])
    union = (
        int(windows[:, 0].min()),
        int(windows[:, 1].max()),
        int(windows[:, 2].min()),
        int(windows[:, 3].max()),
    )
    if _size(union) <= sum(_size(piece.window) for piece in pieces):
        return [Group(union, tuple(pieces))]
    return [Group(piece.window, (piece,)) for piece in pieces]


def _size(window: Window) -> int:
    top, bottom, left, right = window
    return (bottom - top) * (right - left)
