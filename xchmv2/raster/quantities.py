"""The quantity in a raster: canopy height, height change, a mask or another one.

Heights and changes are read as floats in metres, with declared nodata and impossible values as
NaN. Metadata take precedence over the quantity that is requested: a raster of another quantity is
refused, and one without metadata is read as the quantity requested.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.errors import CHMv2Error, warn
from xchmv2.raster.arguments import validate_raster
from xchmv2.raster.crs import with_crs_variables
from xchmv2.raster.grid import find_grid
from xchmv2.raster.ground import ground_pixel, has_true_areas
from xchmv2.raster.labels import HEIGHT_NAME
from xchmv2.raster.valid_pixels import without_nodata

#: A raster, or a Dataset that holds one.
Raster = xr.DataArray | xr.Dataset
#: Kinds of quantity that are distinguished.
_Kind = Literal["height", "change", "mask", "imagery", "other", "unknown"]

#: Lowest and highest possible canopy height [m]; no change exceeds their difference.
_LOWEST, _HIGHEST = -5.0, 150.0
#: Names of variables that hold a change; a magnitude is the magnitude of a loss.
CHANGE_NAMES = ("height_change", "magnitude")
#: Names of variables in metres that hold neither a height nor a change.
_LENGTHS = ("bin_spread", "overlap_disagreement", "level_of_detection")

_METRES = {
    1.0: ("m", "metre", "metres", "meter", "meters"),
    0.1: ("dm", "decimetre", "decimetres", "decimeter", "decimeters"),
    0.01: ("cm", "centimetre", "centimetres", "centimeter", "centimeters"),
    0.001: ("mm", "millimetre", "millimetres", "millimeter", "millimeters"),
    0.3048: ("ft", "foot", "feet", "international foot"),
    1200 / 3937: ("us-ft", "us_ft", "ftus", "us survey foot", "us survey feet"),
}
_FACTORS = {name: factor for factor, names in _METRES.items() for name in names}
# More than trees grow between two dates [m]: a block without losses, and with a gain above this,
# holds heights.
_MOST_GROWTH = 10.0
# A block with a larger share of impossible values is in another unit, or not a height.
_MOST_IMPOSSIBLE = 0.5


def tell_kind(array: xr.DataArray) -> _Kind:
    """Return the kind of quantity in a raster, from its dtype, dims, name and attributes.

    "unknown" without metadata. Arithmetic keeps name and attributes, so that ``after - before`` may
    be returned as "height": see :func:`read_change`.
    """
    if array.dtype == bool:
        return "mask"
    if array.dtype.kind not in "fiu":
        return "other"
    if array.sizes.get("band", 1) > 1:
        return "imagery"
    unit = _unit(array)
    if array.name in _LENGTHS or (unit is not None and unit.lower() not in _FACTORS):
        return "other"
    if array.name in CHANGE_NAMES or _long_name(array).startswith("change of canopy height"):
        return "change"
    called = (array.name, array.attrs.get("standard_name"))
    if HEIGHT_NAME in called or _long_name(array).startswith("canopy height"):
        return "height"
    return "unknown"


def read_heights(height: Raster) -> xr.DataArray:
    """Read canopy heights [m] from a DataArray or a Dataset.

    Of a Dataset ``canopy_height`` is read, or its only variable. The result has the same dims and
    is lazy if the input is; integers become float32. NaN replaces the declared nodata value and
    impossible heights: below -5 m, above 150 m, or infinite. ``units`` of m, dm, cm, mm and ft are
    converted, and ``scale_factor`` and ``add_offset`` that remain in the attributes are applied.
    Heights without ``units`` are read as metres: undeclared feet cannot be recognised.

    A CHMv2Error refuses what is no raster of numbers, an ambiguous variable, a quantity that is not
    a height, an unknown unit and, when values are read, a block most of whose values are impossible
    heights. A UserWarning says that a ``scale_factor`` stands on floats, which may be scaled
    already, and, when values are read, how many heights are impossible.
    """
    array = choose_heights(height)
    kind = tell_kind(array)
    if kind not in ("height", "unknown"):
        raise _wrong_kind("canopy heights", array, kind)
    found = _in_metres(array, offset=True)
    return _by_block(_drop_impossible, found, _LOWEST, _HIGHEST, "heights")


def read_change(change: Raster) -> xr.DataArray:
    """Read a change of canopy height [m], after minus before, from a DataArray or a Dataset.

    A Dataset is that of ``difference``, or of ``events``, which is a loss; a DataArray without
    metadata of its own, such as ``after - before``, is read as a change. The result has the same
    dims, is lazy if the input is, and negative where height was lost. NaN replaces the declared
    nodata value and impossible changes: beyond 155 m either way, or infinite. Units and
    ``scale_factor`` are treated as by :func:`read_heights`; an ``add_offset`` is not applied,
    because it cancels in a difference.

    A CHMv2Error refuses what is no raster of numbers, a Dataset without a change, a quantity that
    is not a change but, for example, a height, an unknown unit and, when values are read, a block
    most of whose values are impossible changes. A UserWarning says, when values are read, how many
    changes are impossible, or that the values look like heights, because the metadata of a height
    do not show whether two were subtracted.
    """
    array = _choose_change(change)
    kind = tell_kind(array)
    # Arithmetic keeps name and attributes of heights, but drops the encoding that predict() and
    # files set.
    if kind not in ("change", "height", "unknown") or (kind == "height" and array.encoding):
        raise _wrong_kind("a change of canopy height", array, kind)
    most = _HIGHEST - _LOWEST
    found = _in_metres(array, offset=False)
    found = _by_block(_drop_impossible, found, -most, most, "changes of height")
    if kind == "height":
        found = _by_block(_warn_of_heights, found)
    return -abs(found) if array.name == "magnitude" else found


def read_raster(array: xr.DataArray) -> xr.DataArray:
    """Read heights as heights, changes as changes, any other raster as numbers in its own unit."""
    readers = {"height": read_heights, "change": read_change}
    return readers.get(tell_kind(array), read_numbers)(array)


def read_numbers(array: xr.DataArray, *, nodata: bool = True) -> xr.DataArray:
    """Read a raster of any quantity as floats in its own unit; integers become float32.

    ``scale_factor`` and ``add_offset`` that remain in the attributes are applied. `nodata` is
    whether the declared nodata value becomes NaN: in imagery, one band alone does not identify
    missing pixels, as crowns saturate single bands. A CHMv2Error refuses values that are not
    numbers.
    """
    if array.dtype.kind not in "fiu":
        raise CHMv2Error("a raster of numbers", f"{array.dtype}", "pass numbers, such as heights")
    _warn_of_scale(array)
    return _scaled(_floats(array, nodata=nodata), offset=True)


def require_heights(array: xr.DataArray) -> None:
    """Check that heights in memory are not missing everywhere.

    Dask-backed heights are not checked, so that nothing is computed.
    """
    if array.chunks is None and not bool(np.isfinite(array.values).any()):
        raise CHMv2Error(
            "heights that are valid somewhere",
            "NaN everywhere",
            "choose other dates or another area, or check the declared nodata value",
        )


def choose_heights(height: Raster) -> xr.DataArray:
    """Return the DataArray of heights, unchanged, from a DataArray or a Dataset.

    Of a Dataset ``canopy_height``, or its only variable; a CHMv2Error refuses any other.
    """
    validate_raster(height)
    if isinstance(height, xr.DataArray):
        return height
    height = with_crs_variables(height)
    if HEIGHT_NAME in height.data_vars:
        return height[HEIGHT_NAME]
    if len(height.data_vars) == 1:
        return next(iter(height.data_vars.values()))
    raise CHMv2Error(
        f"a Dataset with {HEIGHT_NAME!r}, or with one variable only",
        f"variables {[str(name) for name in height.data_vars]}",
        "pass one of them: dataset['...']",
    )


def holds_change(raster: Raster) -> bool:
    """Return whether metadata declare a raster as a change of canopy height."""
    if isinstance(raster, xr.Dataset):
        return any(name in raster.data_vars for name in CHANGE_NAMES)
    return isinstance(raster, xr.DataArray) and tell_kind(raster) == "change"


def name_contents(raster: Any) -> str:
    """Describe an object for a message: a Dataset with its variables, or its type."""
    if isinstance(raster, xr.Dataset):
        return f"a Dataset of {[str(name) for name in raster.data_vars]}"
    return f"a {type(raster).__name__}"


def spatial_dims(array: xr.DataArray) -> tuple[str, str]:
    """Return the names of the vertical and the horizontal dim; raises as :func:`find_grid`."""
    return find_grid(array).dims


def pixel_size(array: xr.DataArray) -> tuple[float, float]:
    """Return the pixel size (tall, wide) on the ground [m]; in coordinate units without a CRS."""
    grid = find_grid(array)
    if has_true_areas(array):
        return ground_pixel(grid)
    return abs(grid.pixel[0]), abs(grid.pixel[1])


def require_plane(array: xr.DataArray, name: str) -> xr.DataArray:
    """Check that heights, called `name`, are of a single date, and order their dims: (y, x).

    A further dim of size 1 is dropped; a CHMv2Error refuses several dates.
    """
    dims = spatial_dims(array)
    others = [dim for dim in array.dims if dim not in dims]
    if any(array.sizes[dim] != 1 for dim in others):
        sizes = ", ".join(f"{array.sizes[dim]} along {dim!r}" for dim in others)
        raise CHMv2Error(
            f"one date of heights as {name}",
            sizes,
            "choose one: height.sel(time='2019-07-01'), or name both: "
            "height.chmv2.difference('2019', '2024')",
        )
    return array.squeeze(others).transpose(*dims)


def _choose_change(change: Raster) -> xr.DataArray:
    """Return the DataArray of change, unchanged, from a DataArray or a Dataset."""
    fix = "pass what difference() or events() returns, or after - before"
    validate_raster(change, "a change", fix, name="change")
    if isinstance(change, xr.DataArray):
        return change
    for name in CHANGE_NAMES:
        if name in change.data_vars:
            return with_crs_variables(change)[name]
    raise CHMv2Error(
        f"a Dataset with {' or '.join(CHANGE_NAMES)}",
        f"variables {sorted(map(str, change.data_vars))}",
        fix,
    )


def _long_name(array: xr.DataArray) -> str:
    return str(array.attrs.get("long_name", "")).lower()


def _unit(array: xr.DataArray) -> str | None:
    """Return the unit that an array declares; None without one."""
    unit = array.attrs.get("units", array.attrs.get("unit"))
    return None if unit is None or not str(unit).strip() else str(unit).strip()


def _wrong_kind(expected: str, array: xr.DataArray, kind: _Kind) -> CHMv2Error:
    called = "" if array.name is None else f" named {array.name!r}"
    found, fix = {
        "height": (
            f"canopy heights{called}",
            "subtract two dates: height.chmv2.difference('2019', '2024'), or after - before",
        ),
        "change": (f"a change of canopy height{called}", "pass the heights that were subtracted"),
        "mask": (f"a mask{called} (bool)", "pass the heights that it was made from"),
        "imagery": (
            f"{array.sizes.get('band', 0)} bands{called}",
            "predict heights first: imagery.chmv2.predict(), or choose a band: raster.isel(band=0)",
        ),
    }.get(
        kind,
        (
            f"{array.dtype}{called} in units of {_unit(array)!r}",
            "pass another variable, or correct its unit: array.assign_attrs(units='m')",
        ),
    )
    return CHMv2Error(expected, found, fix)


def _floats(array: xr.DataArray, *, nodata: bool = True) -> xr.DataArray:
    """Replace declared nodata with NaN, and convert numbers to floats.

    The order matters: conversion to float drops the encoding, which may declare nodata.
    """
    found = without_nodata(array) if nodata else array
    return found if found.dtype.kind == "f" else found.astype(np.float32)


def _scaled(array: xr.DataArray, *, offset: bool) -> xr.DataArray:
    """Apply the scale and offset that remain in the attributes."""
    scale = float(array.attrs.get("scale_factor", 1.0))
    shift = float(array.attrs.get("add_offset", 0.0)) if offset else 0.0
    if scale == 1.0 and shift == 0.0:
        return array
    kept = {k: v for k, v in array.attrs.items() if k not in ("scale_factor", "add_offset")}
    return _linear(array, scale, shift, kept)


def _warn_of_scale(array: xr.DataArray) -> None:
    """Say so where arithmetic may have applied a scale already, and kept the attribute."""
    stored = array.encoding.get("rasterio_dtype", array.encoding.get("dtype", array.dtype))
    if np.dtype(stored).kind == "f" and float(array.attrs.get("scale_factor", 1.0)) != 1.0:
        warn(
            f"scale_factor={array.attrs['scale_factor']} stands in the attributes and is applied; "
            "if the values are scaled already, drop it: array.drop_attrs()"
        )


def _linear(
    array: xr.DataArray, scale: float, shift: float, attrs: Mapping[str, Any]
) -> xr.DataArray:
    kind = array.dtype.type
    found: xr.DataArray = (array * kind(scale) + kind(shift)).rename(array.name)
    found.attrs = dict(attrs)
    return found


def _in_metres(array: xr.DataArray, *, offset: bool) -> xr.DataArray:
    """Convert a length of any known unit to metres."""
    unit = _unit(array)
    factor = 1.0 if unit is None else _FACTORS[unit.lower()]
    _warn_of_scale(array)
    found = _scaled(_floats(array), offset=offset)
    if factor != 1.0:
        return _linear(found, factor, 0.0, {**found.attrs, "units": "m"})
    return found if unit in (None, "m") else found.assign_attrs(units="m")


def _by_block(function: Any, array: xr.DataArray, *args: Any) -> xr.DataArray:
    """Apply a function to values in memory at once, or lazily to each block of a dask array."""
    if array.chunks is None:
        data: Any = function(array.values, *args)
    else:
        data = array.data.map_blocks(function, *args, dtype=array.dtype, meta=array.data._meta)
    return array.copy(deep=False, data=data)


def _drop_impossible(
    values: npt.NDArray[Any], low: float, high: float, what: str
) -> npt.NDArray[Any]:
    """Task: replace impossible values with NaN, and warn with their number."""
    with np.errstate(invalid="ignore"):
        impossible = (values < low) | (values > high)
    count = int(impossible.sum())
    if not count:
        return values
    known = int(values.size - np.isnan(values).sum())
    if count > _MOST_IMPOSSIBLE * known:
        raise CHMv2Error(
            f"{what} in metres, from {low:g} to {high:g}",
            f"{count} of {known} values of a block beyond that, such as {values[impossible][0]:g}",
            "if they are in another unit, declare it: height.assign_attrs(units='cm'); if they "
            f"stand for nodata: height.where((height >= {low:g}) & (height <= {high:g}))",
        )
    warnings.warn(
        f"{count} of {known} values cannot be {what} (below {low:g} or above {high:g} m, or "
        "infinite) and are set to missing",
        UserWarning,
        stacklevel=2,
    )
    return np.where(impossible, values.dtype.type(np.nan), values)


def _warn_of_heights(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Task: warn if values that should be a change look like heights."""
    known = values[np.isfinite(values)]
    if known.size and known.min() >= 0 and known.max() > _MOST_GROWTH:
        warnings.warn(
            "no value is below 0: these look like heights, not like a change of them; "
            "pass what difference() returns, or after - before",
            UserWarning,
            stacklevel=2,
        )
    return values
