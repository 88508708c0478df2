"""Filling of polygons by pixel centres.

GDAL's own is not used: it takes time in proportion to rows times vertices, of which real
footprints have hundreds of thousands, and through rasterio it silences a warning in a way that
threads get in each other's way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine


def edges_of(polygon: shapely.Polygon) -> npt.NDArray[np.float64]:
    """Take a polygon apart into its edges.

    Parameters
    ----------
    polygon : shapely.Polygon
        With or without holes.

    Returns
    -------
    numpy.ndarray of float64
        (4, n): x and y of the southern end, x and y of the northern end. Of two polygons that
        share an edge both get the same numbers.
    """
    points, ring = shapely.get_coordinates(shapely.get_rings(polygon), return_index=True)
    joined = ring[1:] == ring[:-1]
    edges = np.concatenate([points[:-1], points[1:]], axis=1)[joined]
    turned = edges[:, 1] > edges[:, 3]
    edges[turned] = edges[turned][:, [2, 3, 0, 1]]
    flat: npt.NDArray[np.float64] = np.ascontiguousarray(edges.T)
    return flat


def fill(
    edges: npt.NDArray[np.float64], transform: Affine, shape: tuple[int, int]
) -> npt.NDArray[np.bool_] | None:
    """Find the pixels whose centres lie inside a polygon.

    Parameters
    ----------
    edges : numpy.ndarray of float64
        (4, n) as of `edges_of`.
    transform : Affine
        From pixels to the polygon's coordinates, north up.
    shape : tuple of int
        (h, w) [px].

    Returns
    -------
    numpy.ndarray of bool or None
        (h, w), by the even-odd rule; None where no pixel is inside. Of two polygons that share an
        edge exactly one gets each pixel along it.
    """
    height, width = shape
    bottom = transform.f + height * transform.e
    x0, y0, x1, y1 = edges[:, (edges[3] > bottom) & (edges[1] <= transform.f)]
    # Row r is crossed where south <= its centre < north; rows grow southwards.
    first = np.floor((transform.f - y1) / -transform.e - 0.5).astype(np.int64) + 1
    last = np.floor((transform.f - y0) / -transform.e - 0.5).astype(np.int64)
    first, last = np.maximum(first, 0), np.minimum(last, height - 1)
    near = (first <= last) & (np.minimum(x0, x1) < transform.c + width * transform.a)
    counts = (last - first + 1)[near]
    if not counts.size:
        return None
    edge = np.repeat(np.flatnonzero(near), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    centre = transform.f + (row + 0.5) * transform.e
    crossing = x0[edge] + (centre - y0[edge]) * ((x1 - x0) / (y1 - y0 + (y1 == y0)))[edge]
    col = np.ceil((crossing - transform.c) / transform.a - 0.5).astype(np.int64)
    inside = np.zeros((height, width + 1), np.uint8)
    np.bitwise_xor.at(inside, (row, np.clip(col, 0, width)), 1)
    np.bitwise_xor.accumulate(inside, axis=1, out=inside)
    return inside[:, :width].astype(bool)
