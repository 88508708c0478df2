"""Shares of pixels that polygons cover, by exactextract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from exactextract import exact_extract
from exactextract.feature import Feature, FeatureSource
from exactextract.raster import NumPyRasterSource

from xchmv2.zonal.polygons import Geometries, Pieces, Spans

_Floats = npt.NDArray[np.float64]

#: Covered shares of a pixel below this are rounding of coordinates.
_LEAST_SHARE = 1e-9


@dataclass(frozen=True, eq=False)
class Coverage:
    """The pixels under several geometries, those of one after those of another."""

    #: Each pixel's place in the window, counted along its rows, and its covered share.
    cell: npt.NDArray[np.int64]
    share: _Floats
    #: Number of pixels under each geometry.
    sizes: npt.NDArray[np.int64]

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first pixel of each geometry."""
        starts: npt.NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        return starts

    def reduce(self, numbers: npt.NDArray[Any], by: np.ufunc = np.add, empty: float = 0) -> _Floats:
        """Reduce one number per pixel to one per geometry."""
        found = np.full(len(self.sizes), empty, np.float64)
        filled = self.sizes > 0
        if filled.any():
            found[filled] = by.reduceat(numbers, self.starts[filled])
        return found


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of a polygon, or a piece of one, on coarse cells that count from the raster's corner.

    `grid` (rows, cols): sums of the weights of the pixels in each cell; `corner`: row and column of
    its first cell; `step`: side of a cell [px].
    """

    grid: _Floats
    corner: tuple[int, int]
    step: int


def weigh_pieces(
    covered: Coverage, weight: _Floats, pieces: Pieces, spans: Spans, steps: npt.NDArray[np.int64]
) -> list[Weights]:
    """Add up the weights of pixels in coarse cells, of a side [px] for each piece."""
    (top, _), (left, right) = spans
    first = pieces.window[:, ::2] // steps[:, None]
    shape = (pieces.window[:, 1::2] - 1) // steps[:, None] + 1 - first
    ends = np.cumsum(shape.prod(axis=1))
    piece = np.repeat(np.arange(len(pieces)), covered.sizes)
    row, col = np.divmod(covered.cell, right - left)
    row = (row + top) // steps[piece] - first[piece, 0]
    col = (col + left) // steps[piece] - first[piece, 1]
    cell = (ends - shape.prod(axis=1))[piece] + row * shape[piece, 1] + col
    flat = np.bincount(cell, weight, minlength=int(ends[-1]))
    return [
        Weights(grid.reshape(sides), (int(corner[0]), int(corner[1])), int(side))
        for grid, sides, corner, side in zip(
            np.split(flat, ends[:-1]), shape, first, steps, strict=True
        )
    ]


def join_weights(pieces: Sequence[Weights]) -> Weights:
    """Put the pieces of a polygon together."""
    corners = np.array([piece.corner for piece in pieces])
    ends = corners + [piece.grid.shape for piece in pieces]
    low = corners.min(axis=0)
    grid = np.zeros(ends.max(axis=0) - low)
    for piece, (row, col) in zip(pieces, corners - low, strict=True):
        grid[row : row + piece.grid.shape[0], col : col + piece.grid.shape[1]] += piece.grid
    return Weights(grid, (int(low[0]), int(low[1])), pieces[0].step)


def measure_coverage(pieces: Pieces, spans: Spans) -> Coverage:
    """Measure the shares of the pixels in a window, of rows and columns, that pieces cover."""
    (top, _), (left, right) = spans
    window = pieces.window - (top, top, left, left)
    sides = window[:, 1::2] - window[:, ::2]
    whole = shapely.area(pieces.geometry) == sides.prod(axis=1)
    parts = iter(_extract(pieces.geometry[~whole], spans) if not whole.all() else ())
    wide = right - left
    cells, shares = [], []
    for (first, end, west, east), full in zip(window, whole, strict=True):
        if full:
            cell = (np.arange(first, end)[:, None] * wide + np.arange(west, east)).ravel()
            share = np.ones(cell.size)
        else:
            cell, share = next(parts)
        cells.append(cell)
        shares.append(share)
    sizes = np.array([cell.size for cell in cells])
    return Coverage(np.concatenate(cells), np.concatenate(shares), sizes)


def _extract(
    geometries: Geometries, spans: Spans
) -> Iterator[tuple[npt.NDArray[np.int64], _Floats]]:
    """Yield the cells that each geometry covers, and the share of each."""
    (top, bottom), (left, right) = spans
    plane = np.broadcast_to(np.zeros((), np.int8), (bottom - top, right - left))
    found = exact_extract(
        NumPyRasterSource(plane, left, -bottom, right, -top),
        _Source(geometries),
        ["cell_id", "coverage"],
        # exactextract counts cells from the window's first one only if it reads it in one part.
        max_cells_in_memory=4 * plane.size,
    )
    for feature in found:
        cell, share = (feature["properties"][name] for name in ("cell_id", "coverage"))
        kept = share >= _LEAST_SHARE
        yield cell[kept], share[kept]


class _Source(FeatureSource):  # type: ignore[misc]
    """Geometries for exactextract, in binary form: as text they take as long as their coverage."""

    def __init__(self, geometries: Geometries) -> None:
        super().__init__()
        self._geometries = shapely.to_wkb(geometries)

    def count(self) -> int:
        return len(self._geometries)

    def srs_wkt(self) -> None:
        return None

    def __iter__(self) -> Iterator[_Shape]:
        return map(_Shape, self._geometries)


class _Shape(Feature):  # type: ignore[misc]
    def __init__(self, geometry: bytes) -> None:
        super().__init__()
        self._geometry = geometry

    def geometry(self) -> bytes:
        return self._geometry

    def fields(self) -> list[Any]:
        return []
