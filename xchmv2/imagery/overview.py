"""What ``repr(obj.chmv2)`` shows: contents of an object and methods that fit it, without torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable

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
    tell_kind,
    with_crs_variables,
    write_crs,
    write_period,
    write_pixel,
    write_sizes,
)

_NEITHER = "no canopy height; maybe imagery"

# Methods of the accessor by topic.
_HEIGHT = (
    "structure: canopy_cover, gap_fraction, percentile, rumple, canopy_volume, gaps, forest_mask",
    "statistics: zonal, validate",
)
_SERIES = "pictures: plot, plot_series"
_CHANGE = (
    "losses and gains: loss, gain, label_events, correlation_length",
    "statistics: zonal",
    "pictures: plot_change",
)
_STORE = "store: to_zarr"
# Those that fit an object; "dates" are heights of two dates, "series" of three or more.
_METHODS: dict[str, tuple[str, ...]] = {
    "imagery": ("prediction: predict, plan, to_zarr",),
    "height": (
        "dates: align, stable_bias",
        *_HEIGHT,
        "statistics: calibrate",
        "pictures: plot, plot_validation",
        _STORE,
    ),
    "dates": (
        "dates: align, stable_bias, difference, error_model, transition",
        *_HEIGHT,
        _SERIES,
        _STORE,
    ),
    "series": (
        "dates: align, stable_bias, difference, error_model, transition, events, trend",
        *_HEIGHT,
        _SERIES,
        _STORE,
    ),
    "change": (*_CHANGE, _STORE),
    "difference": (*_CHANGE, "losses and gains: loss_area", "pictures: plot_errors", _STORE),
    "events": ("losses and gains: loss, label_events", _STORE),
    "mask": (_STORE,),
    "other": (),
}


def describe_object(obj: xr.Dataset | xr.DataArray, *, html: bool) -> str:
    """Look at an object without computing anything, as text or in HTML; never raises.

    Tells bands, values, dates, CRS, ground resolution, whether ``predict`` can run, and the methods
    that fit this object; the others are named in a last row.
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
    obj = with_crs_variables(obj)
    with warnings.catch_warnings():  # predict() and plan() give them
        warnings.simplefilter("ignore")
        rows = [(name, _told(look, obj)) for name, look in looks] + _list_methods(obj)
    title = f"xchmv2 accessor of a {type(obj).__name__} ({write_sizes(obj.sizes)})"
    return as_html(title, rows) if html else as_text(f"<{title}>", rows)


def _list_methods(obj: xr.Dataset | xr.DataArray) -> list[Row]:
    """List the methods that fit an object by topic, and all others in one row."""
    fitting = _by_topic(topic for kind in _kinds(obj) for topic in _METHODS[kind])
    known = _by_topic(topic for topics in _METHODS.values() for topic in topics)
    here = {name for names in fitting.values() for name in names}
    others = dict.fromkeys(name for names in known.values() for name in names if name not in here)
    told = [f"{topic}: {', '.join(names)}" for topic, names in fitting.items()] or ["none fits"]
    rows = [("" if i else "methods", topic) for i, topic in enumerate(told)]
    return [*rows, ("others", ", ".join(others))]


def _by_topic(topics: Iterable[str]) -> dict[str, dict[str, None]]:
    """Gather methods under the names of their topics, each once, in order."""
    found: dict[str, dict[str, None]] = {}
    for text in topics:
        topic, _, names = text.partition(": ")
        found.setdefault(topic, {}).update(dict.fromkeys(names.split(", ")))
    return found


def _kinds(obj: xr.Dataset | xr.DataArray) -> list[str]:
    """Tell which rows of _METHODS fit an object."""
    arrays = [obj] if isinstance(obj, xr.DataArray) else list(obj.data_vars.values())
    names = {array.name for array in arrays}
    found = {str(tell_kind(array)) if array.ndim > 1 else "other" for array in arrays}
    try:
        select_bands(obj)
        found = {"imagery", *found} - {"unknown"}
    except Exception:  # no imagery; to print an object must never fail
        pass
    if "loss_date" in names:
        return ["events"]
    known: tuple[str, ...] = ("imagery", "height", "change")
    kinds = [kind for kind in known if kind in found]
    if not kinds and len(arrays) == 1:
        kinds = ["height", "change"] if found == {"unknown"} else list(found)
    if "level_of_detection" in names:
        kinds = ["difference" if kind == "change" else kind for kind in kinds]
    several = ("height", "dates", "series")[min(_count_dates(obj), 3) - 1]
    return [several if kind == "height" else kind for kind in kinds]


def _count_dates(obj: xr.Dataset | xr.DataArray) -> int:
    """Count images or heights along all dims beside the grid and the bands; 1 where unclear."""
    try:
        return math.prod(_further_sizes(_some_array(obj)).values()) or 1
    except Exception:
        return 1


def _told(look: Callable[[xr.Dataset | xr.DataArray], str], obj: xr.Dataset | xr.DataArray) -> str:
    """Look, and tell what stands in the way; to print an object must never fail."""
    try:
        return look(obj)
    except CHMv2Error as error:
        return f"not clear: found {error.found}"
    except Exception as error:
        return f"not clear ({type(error).__name__})"


def _holds(obj: xr.Dataset | xr.DataArray) -> str:
    """Canopy height, a change of it, or neither."""
    arrays = [obj] if isinstance(obj, xr.DataArray) else obj.data_vars.values()
    kinds = {tell_kind(array) for array in arrays}
    known = {"height": "canopy height", "change": "a change of canopy height"}
    return " and ".join(words for kind, words in known.items() if kind in kinds) or _NEITHER


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
    further = _further_sizes(array)
    if not further:
        return "one image"
    period = find_period(array)
    return f"{write_sizes(further)}{f'; {write_period(period)}' if period else ''}"


def _further_sizes(array: xr.DataArray) -> dict[Hashable, int]:
    """Sizes of the dims beside the grid and the bands."""
    known = {*find_grid(array).dims, BAND_DIM}
    return {dim: size for dim, size in array.sizes.items() if dim not in known}


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
