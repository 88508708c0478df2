"""Which share of each pixel a polygon covers, by exactextract."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

#: Shares of a pixel below this are rounding of coordinates, not land.
_NOTHING = 1e-9


def cover(wkb: bytes | None, window: tuple[int, int, int, int]) -> npt.NDArray[np.float64]:
    """Return the share of each pixel of a window that a polygon covers.

    Parameters
    ----------
    wkb : bytes or None
        Polygon in pixels, as in :class:`~xchmv2.zonal.polygons.Polygons`; None covers everything.
    window : (first row, end row, first column, end column)
        Pixels wanted.

    Returns
    -------
    ndarray of float64, shape (rows, columns)
        Between 0 and 1, exact to rounding.

    References
    ----------
    exactextract, https://github.com/isciences/exactextract.
    """
    top, bottom, left, right = window
    shape = (bottom - top, right - left)
    if wkb is None:
        return np.ones(shape)
    import shapely
    from exactextract import exact_extract

    feature = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shapely.from_wkb(wkb)),
        "properties": {},
    }
    found = exact_extract(
        _blank(window),
        [feature],
        ["cell_id", "coverage"],
        max_cells_in_memory=4 * shape[0] * shape[1],
    )[0]["properties"]
    share = np.zeros(shape)
    share.flat[found["cell_id"]] = found["coverage"]
    share[share < _NOTHING] = 0.0
    return share


def _blank(window: tuple[int, int, int, int]) -> Any:
    """Return a raster of no values: exactextract asks for one to lay its pixels over."""
    from exactextract.raster import RasterSource

    class Blank(RasterSource):  # type: ignore[misc]
        def res(self) -> tuple[float, float]:
            return 1.0, 1.0

        def extent(self) -> tuple[float, float, float, float]:
            top, bottom, left, right = window
            return float(left), float(-bottom), float(right), float(-top)

        def nodata_value(self) -> None:
            return None

        def read_window(self, x0: int, y0: int, nx: int, ny: int) -> npt.NDArray[np.uint8]:
            return np.zeros((ny, nx), np.uint8)

        def srs_wkt(self) -> None:
            return None

    return Blank()
