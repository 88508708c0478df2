"""What the accessor sees in an object, and what can be done with it; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.imagery.bands import BAND_DIM, COLOURS, select_bands
from xchmv2.imagery.scene import resolve_imagery
from xchmv2.raster import (
    HEIGHT_NAME,
    Grid,
    Row,
    as_html,
    as_text,
    find_grid,
    find_period,
    ground_pixel,
    write_crs,
    write_period,
    write_pixel,
    write_sizes,
)

_NEITHER = "no canopy height; maybe imagery"
_CHANGES = ("height_change", "magnitude")


@dataclass(frozen=True)
class Overview:
    """What is told of an object.

    Parameters
    ----------
    title : str
        What it is.
    rows : tuple of (name, value)
        What was found in it.
    """

    title: str
    rows: tuple[Row, ...]

    @property
    def text(self) -> str:
        """The overview as aligned text."""
        return as_text(f"<{self.title}>", self.rows)

    @property
    def html(self) -> str:
        """The overview as a table for notebooks."""
        return as_html(self.title, self.rows)


def overview(obj: xr.Dataset | xr.DataArray, accessor: type) -> Overview:
    """Look at an object without computing anything; never raises.

    Parameters
    ----------
    obj : Dataset or DataArray
        Imagery, heights, a change, or anything else.
    accessor : type
        The accessor, whose methods are listed by the modules they come from.

    Returns
    -------
    Overview
        Bands, values, dates, CRS, ground resolution, whether ``predict`` can run, methods.
    """
    looks: tuple[tuple[str, Callable[[xr.Dataset | xr.DataArray], str]], ...] = (
        ("holds", _holds),
        ("bands", _bands),
        ("values", _values),
        ("dates", _dates),
        ("CRS", _crs),
        ("resolution", _resolution),
        ("predict()", _predict),
    )
    rows = [(name, _told(look, obj)) for name, look in looks]
    title = f"xchmv2 accessor of a {type(obj).__name__} ({write_sizes(obj.sizes)})"
    return Overview(title, (*rows, *list_methods(accessor)))


def list_methods(accessor: type) -> tuple[Row, ...]:
    """List an accessor's public methods under the names of the modules that define them."""
    topics = []
    for part in accessor.__mro__:
        names = [n for n, m in vars(part).items() if callable(m) and not n.startswith("_")]
        if names:
            topics.append(f"{part.__module__.rpartition('.')[2]}: {', '.join(names)}")
    return tuple(("" if i else "methods", topic) for i, topic in enumerate(topics))


def _told(look: Callable[[xr.Dataset | xr.DataArray], str], obj: xr.Dataset | xr.DataArray) -> str:
    """Look, and tell what stands in the way; to print an object must never fail."""
    try:
        return look(obj)
    except CHMv2Error as error:
        return f"not clear: found {error.found}"
    except Exception as error:
        return f"not clear ({type(error).__name__})"


def _holds(obj: xr.Dataset | xr.DataArray) -> str:
    """Canopy height, a change of it, or neither, by name."""
    names = set(obj.data_vars) if isinstance(obj, xr.Dataset) else {obj.name}
    known = {HEIGHT_NAME: "canopy height", **dict.fromkeys(_CHANGES, "a change of canopy height")}
    found = dict.fromkeys(words for name, words in known.items() if name in names)
    return " and ".join(found) or _NEITHER


def _bands(obj: xr.Dataset | xr.DataArray) -> str:
    found = zip(COLOURS, select_bands(obj), strict=True)
    return ", ".join(b.name if b.name == colour else f"{colour}: {b.name}" for colour, b in found)


def _values(obj: xr.Dataset | xr.DataArray) -> str:
    array = _some_array(obj)
    dask = "dask-backed" if array.chunks is not None else "not dask-backed"
    size = math.prod(n for dim, n in array.sizes.items() if dim != BAND_DIM) / 1e6
    known = ", 0 is black and 255 white" if array.dtype == "uint8" else ""
    return f"{array.dtype}{known}; {size:.3g} Mpx a band; {dask}"


def _dates(obj: xr.Dataset | xr.DataArray) -> str:
    array = _some_array(obj)
    further = {dim: size for dim, size in array.sizes.items() if dim not in _grid(obj).dims}
    further.pop(BAND_DIM, None)
    if not further:
        return "one image"
    period = find_period(array)
    return f"{write_sizes(further)}{f'; {write_period(period)}' if period else ''}"


def _crs(obj: xr.Dataset | xr.DataArray) -> str:
    return write_crs(_grid(obj).crs) or "none: write it with .rio.write_crs('EPSG:...')"


def _resolution(obj: xr.Dataset | xr.DataArray) -> str:
    grid = _grid(obj)
    if grid.crs is None:
        return "not known without a CRS"
    return f"{write_pixel(ground_pixel(grid))} on the ground"


def _predict(obj: xr.Dataset | xr.DataArray) -> str:
    try:
        resolve_imagery(obj)
    except CHMv2Error as error:
        heights = _holds(obj) != _NEITHER
        return "takes imagery" if heights else f"cannot run as it is: {error}"
    return "can run; .plan() tells what it will do"


def _grid(obj: xr.Dataset | xr.DataArray) -> Grid:
    return find_grid(_some_array(obj))


def _some_array(obj: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """Choose the red band; else heights, or the first variable that may be a raster."""
    try:
        return select_bands(obj)[0].array
    except CHMv2Error:
        pass
    if isinstance(obj, xr.DataArray):
        return obj
    rasters = [variable for variable in obj.data_vars.values() if variable.ndim >= 2]
    if not rasters:
        raise CHMv2Error("a raster", "no variable of two dims", "choose another object")
    return obj[HEIGHT_NAME] if HEIGHT_NAME in obj.data_vars else rasters[0]
