"""Time series of canopy height at points or in polygons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.errors import CHMv2Error, warn
from xchmv2.plotting.canvas import Drawing, panels
from xchmv2.raster import Grid, Raster, find_grid, read_heights, validate_text
from xchmv2.validation.matching import place_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours that the colour-blind can tell apart (Okabe and Ito 2008), seen on white and on black.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MOST_LINES = 36
#: Names in one column of the legend.
_COLUMN = 15


def plot_series(
    height: Raster,
    places: Any,
    *,
    label: str | None = None,
    ax: Axes | None = None,
) -> Drawing:
    """Draw canopy height over time at points, or its mean in polygons.

    Parameters
    ----------
    height : DataArray or Dataset
        Heights [m], dims y, x and one more, such as time; or a Dataset with ``canopy_height``.
    places : GeoDataFrame, GeoSeries, shapely geometries, or pairs (x, y)
        Points or polygons; those without a CRS are assumed in the raster's.
    label : str, optional
        Column of a GeoDataFrame that names the lines; by default its index.
    ax : Axes, optional
        Where to draw; by default a new figure.

    Returns
    -------
    Drawing
        Figure, axes, and artists: lines, and for polygons bands from the 10th to the 90th
        percentile of heights.

    Raises
    ------
    CHMv2Error
        If there is no dim beside y and x, places are neither points nor polygons, there are more
        than 36, or a library is not installed.

    Warns
    -----
    UserWarning
        If places lie outside the raster.

    Notes
    -----
    The height at a point is that of the pixel there. Only pixels at the places are computed.

    Examples
    --------
    >>> picture = height.chmv2.plot_series(stands, label="name")
    >>> picture = height.chmv2.plot_series([(500_020.0, 5_299_960.0)])
    """
    height = read_heights(height)
    grid = find_grid(height)
    further = [dim for dim in height.dims if dim not in grid.dims]
    if len(further) != 1:
        raise CHMv2Error(
            f"heights of several dates, dims {('time', *grid.dims)}",
            f"dims {height.dims}",
            f"choose one: height.isel({further[0]}=0)"
            if further
            else "join the dates: xr.concat([before, after], 'time')",
        )
    height = height.transpose(further[0], *grid.dims)
    series, names = _read(places, label)
    kind = _kind(series)
    middle, low, high = (_points if kind == "points" else _polygons)(height, series, grid)
    figure, (panel,) = panels(1, ax, 1, 7.0 + 1.5 * ((len(names) - 1) // _COLUMN), 4.0)
    times = height[further[0]].values
    artists: list[Any] = []
    for k, (name, colour) in enumerate(zip(names, cycle(_COLOURS), strict=False)):
        marker = _MARKERS[(k // len(_COLOURS)) % len(_MARKERS)]
        artists += panel.plot(times, middle[:, k], color=colour, marker=marker, label=name)
        if low is not None and high is not None:
            band = panel.fill_between(times, low[:, k], high[:, k], color=colour, alpha=0.2, lw=0)
            artists.append(band)
    _label_axes(panel, height, str(further[0]), kind, len(names))
    return Drawing(figure, [panel], artists)


def _read(places: Any, label: str | None) -> tuple[Any, list[str]]:
    """Return places as a GeoSeries, and their names."""
    from xchmv2.zonal.polygons import as_series, require_zonal

    require_zonal()
    series, labels = as_series(_as_points(places))
    if len(series) > _MOST_LINES:
        raise CHMv2Error(
            f"at most {_MOST_LINES} lines in a figure",
            f"{len(series)} places",
            "choose some: places[:9]",
        )
    validate_text("label", label, "name")
    if label is not None and label not in labels:
        raise CHMv2Error(f"a column {label!r}", f"columns {list(labels)}", "choose one of these")
    values = labels[label] if label else next(iter(labels.values()))
    kind = _kind(series).removesuffix("s")
    prefix = "" if label or values.dtype.kind not in "iu" else f"{kind} "
    return series, [f"{prefix}{value}" for value in values]


def _as_points(places: Any) -> Any:
    """Convert pairs (x, y) to points; return anything else unchanged."""
    if isinstance(places, Sequence) and not isinstance(places, str) and len(places):
        pairs = (
            [places] if np.ndim(places[0]) == 0 and isinstance(places[0], int | float) else places
        )
        if all(isinstance(p, tuple | list | np.ndarray) and len(p) == 2 for p in pairs):
            import shapely

            return [shapely.Point(*map(float, pair)) for pair in pairs]
    return places


def _kind(series: Any) -> str:
    kinds = set(series.geom_type.dropna())
    if kinds and kinds <= {"Point"}:
        return "points"
    if kinds and kinds <= {"Polygon", "MultiPolygon"}:
        return "polygons"
    raise CHMv2Error(
        "points, or polygons",
        ", ".join(sorted(kinds)) or "nothing",
        "draw one kind at a time; lines become polygons: places.buffer(10)",
    )


def _points(height: xr.DataArray, series: Any, grid: Grid) -> tuple[npt.NDArray[Any], None, None]:
    """Take the pixel under each point, (dates, points)."""
    x, y = place_points(series, grid)
    index = [
        np.floor((values - edge) / pixel)
        for values, edge, pixel in zip((y, x), grid.edges, grid.pixel, strict=True)
    ]
    inside = np.logical_and.reduce(
        [(i >= 0) & (i < size) for i, size in zip(index, grid.shape, strict=True)]
    )
    if not inside.all():
        warn(f"{int((~inside).sum())} of {len(inside)} points are outside the raster")
    where = {
        dim: xr.DataArray(np.where(inside, i, 0).astype(int), dims="point")
        for dim, i in zip(grid.dims, index, strict=True)
    }
    (values,) = dask.compute(height.isel(where).data)
    return np.where(inside, values, np.nan), None, None


def _polygons(
    height: xr.DataArray, series: Any, grid: Grid
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Average in each polygon, with the 10th and the 90th percentile, (dates, polygons)."""
    from xchmv2.zonal import zonal

    places = series if series.crs is not None else list(series)
    found = zonal(height, places, stats=("mean", "p10", "p90")).compute()
    return found["mean"].values, found["p10"].values, found["p90"].values


def _label_axes(panel: Axes, height: xr.DataArray, dim: str, kind: str, count: int) -> None:
    name = str(height.attrs.get("long_name", "canopy height"))
    panel.set_ylabel(f"{name} [{height.attrs.get('units', 'm')}]")
    if height[dim].dtype.kind != "M":
        panel.set_xlabel(dim)
    panel.grid(alpha=0.3)
    if kind == "polygons":
        panel.set_title("mean, and 10th to 90th percentile", fontsize="medium")
    if count > 1:
        panel.legend(
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            ncols=-(-count // _COLUMN),
            fontsize="small",
            frameon=False,
        )
    for tick in panel.get_xticklabels():
        tick.set_rotation(30)
        tick.set_horizontalalignment("right")
