"""Which CRS a raster is in, as far as its coordinates and attributes say."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import odc.geo.xr
import pyproj
import xarray as xr
from odc.geo import CRS

from xchmv2.errors import ImageryError

_Raster = TypeVar("_Raster", bound=xr.DataArray | xr.Dataset)
#: Attributes of a CRS coordinate that spell its CRS, in the order of rioxarray and odc-geo.
_SPELLED = (
    "spatial_ref", "crs_wkt", "proj:wkt2", "proj:code", "epsg", "epsg_code", "proj4",
    "proj4_params", "esri_pe_string",
)  # fmt: skip
#: Attributes of a raster that may do so too.
_ATTRIBUTES = (*_SPELLED, "crs", "proj4text", "proj:epsg", "proj:projjson")
#: Coordinates whose value spells it.
_VALUES = ("epsg", "crs", "spatial_ref")
#: Of STAC items: true of the files, and of a cube unless it says otherwise.
_OF_ITEMS = ("proj:code", "proj:epsg")
_LAT_LON = (("latitude", "longitude"), ("lat", "lon"))
_UNITS = {
    **dict.fromkeys(("m", "metre", "meter", "metres", "meters"), "m"),
    **dict.fromkeys(("km", "kilometre", "kilometer", "kilometres", "kilometers"), "km"),
    **dict.fromkeys(("degree", "degrees", "°", "deg"), "degrees"),
    **dict.fromkeys((f"{d}_{to}" for d in ("degree", "degrees") for to in "NE"), "degrees"),
    **dict.fromkeys(
        (f"{d}_{to}" for d in ("degree", "degrees") for to in ("north", "east")), "degrees"
    ),
}


def read_crs(array: xr.DataArray) -> tuple[CRS | None, str | None]:
    """Read the CRS of a raster, and which coordinate says it, None for either that is not there.

    From the coordinate that ``grid_mapping`` names. Without one, from any other coordinate or
    attribute that spells a CRS, which must agree; then from axes in degrees. An ImageryError
    refuses what cannot be understood, a ``grid_mapping`` whose coordinate is lost, and statements
    that contradict each other.
    """
    named = _mappings(array)
    found = {name: crs for name in named if (crs := _of_coordinate(array, name)) is not None}
    if not found and not any(name in array.coords for name in named):
        found = dict(_statements(array)) or dict(_of_items(array))
        if not found and named:
            raise ImageryError(
                "the CRS coordinate that grid_mapping names",
                f"grid_mapping={named[0]!r}, and no such coordinate",
                "open it by xr.open_zarr(..., decode_coords='all') (the same for open_dataset), or "
                "write it: imagery.rio.write_crs('EPSG:...', grid_mapping_name='spatial_ref')",
            )
    crs = _agreed(found)
    axes = _axis_units(array)
    if crs is None:
        return _of_axes(array, axes), None
    _validate_units(array, crs, axes)
    return crs, next((name for name in found if name in array.coords), None)


def find_crs(array: xr.DataArray) -> CRS | None:
    """Return the CRS of a raster, or None; see :func:`read_crs`."""
    return read_crs(array)[0]


def same_crs(one: CRS | None, other: CRS | None) -> bool:
    """Return whether two CRS are the same, whichever way they are spelled."""
    if one is None or other is None or one == other:
        return one is other or one == other
    codes = [crs.proj.to_epsg(min_confidence=20) for crs in (one, other)]
    return codes[0] is not None and codes[0] == codes[1]


def crs_label(crs: CRS) -> str:
    """Write a CRS as ``EPSG:...``, or by its name."""
    return f"EPSG:{crs.epsg}" if crs.epsg is not None else str(crs.proj.name)


def is_crs_variable(variable: xr.DataArray) -> bool:
    """Return whether a variable holds a CRS rather than data."""
    return variable.ndim == 0 and not {"grid_mapping_name", *_SPELLED}.isdisjoint(variable.attrs)


def find_crs_coordinate(coords: Mapping[Hashable, xr.DataArray]) -> str | None:
    """Return the name of the CRS coordinate of a georeferenced raster; None without one."""
    return next((str(name) for name, coord in coords.items() if is_crs_variable(coord)), None)


def crs_coordinates(array: xr.DataArray) -> list[str]:
    """Return the names of all coordinates that spell some CRS."""
    return [
        str(name)
        for name, coord in array.coords.items()
        if is_crs_variable(coord) or (name in (*_VALUES, *_OF_ITEMS) and name not in array.dims)
    ]


def with_crs_variables(raster: _Raster) -> _Raster:
    """Give the variables of a Dataset what it says of their CRS.

    A plain ``open_zarr`` leaves the CRS among the data, and attributes may be on the whole. CRS
    variables become coordinates, and each variable has the Dataset's attributes on CRS and
    transform. A DataArray is returned as it is; nothing is modified.
    """
    if isinstance(raster, xr.DataArray):
        return raster
    dataset: Any = raster
    variables = dataset.data_vars.items()
    named = {name for _, variable in variables for name in _mappings(variable)}
    crs = [n for n, v in variables if is_crs_variable(v) or (n in named and v.ndim < 2)]
    dataset = dataset.set_coords(crs)
    said = {k: dataset.attrs[k] for k in (*_ATTRIBUTES, "transform") if k in dataset.attrs}
    if said:
        dataset = dataset.assign({n: v.assign_attrs(said | v.attrs) for n, v in dataset.items()})
    return dataset  # type: ignore[no-any-return]


def without_lost_mapping(raster: _Raster) -> _Raster:
    """Drop a ``grid_mapping`` that names no coordinate, for who states the pixel size himself."""
    found: Any = raster.copy(deep=False)
    if isinstance(raster, xr.Dataset):
        return found.assign({n: without_lost_mapping(v) for n, v in found.items()})  # type: ignore[no-any-return]
    if not any(name in raster.coords for name in _mappings(found)):
        for place in (found.attrs, found.encoding):
            place.pop("grid_mapping", None)
    return found  # type: ignore[no-any-return]


def _dims(array: xr.DataArray) -> tuple[str, ...]:
    return tuple(str(dim) for dim in odc.geo.xr.spatial_dims(array) or ())


def _mappings(array: xr.DataArray) -> list[str]:
    """Names in ``grid_mapping``; of the extended form ("utm: x y") those of the array's dims."""
    texts = [place.get("grid_mapping") for place in (array.encoding, array.attrs)]
    found: dict[str, None] = {}
    for words in (str(text).split() for text in texts if text):
        if not any(word.endswith(":") for word in words):
            found |= dict.fromkeys(words)
            continue
        along: dict[str, set[str]] = {}
        for word in words:
            if word.endswith(":"):
                along[name := word[:-1]] = set()
            elif along:
                along[name].add(word)
        dims = set(_dims(array))
        found |= dict.fromkeys([n for n, over in along.items() if dims and dims <= over] or along)
    return list(found)


def _statements(array: xr.DataArray) -> Iterator[tuple[str, CRS]]:
    """Yield what coordinates and attributes say, without ``grid_mapping``."""
    for name in array.coords:
        if is_crs_variable(array[name]) or (name in _VALUES and name not in array.dims):
            crs = _of_coordinate(array, str(name))
            if crs is not None:
                yield str(name), crs
    dims = _dims(array)
    places: list[tuple[str, Mapping[str, Any], tuple[str, ...]]]
    places = [("attrs", array.attrs, _ATTRIBUTES)]
    places += [(dim, array[dim].attrs, ("crs",)) for dim in dims if dim in array.coords]
    for place, attrs, keys in places:
        for key in keys:
            if not _is_absent(attrs.get(key)):
                # Not the name of a coordinate, which it may equal.
                yield f"{place}[{key!r}]", _parse(attrs[key], f"{place}[{key!r}]")


def _of_items(array: xr.DataArray) -> Iterator[tuple[str, CRS]]:
    for name in _OF_ITEMS:
        if name in array.coords and (crs := _of_coordinate(array, name)) is not None:
            yield name, crs


def _of_coordinate(array: xr.DataArray, name: str) -> CRS | None:
    """Read the CRS of a coordinate from its attributes, else from its value; None if it has none.

    rioxarray gives a file without a CRS a coordinate with a transform alone.
    """
    if name not in array.coords:
        return None
    coord = array[name]
    places = {f"{key} of {name!r}": coord.attrs.get(key) for key in _SPELLED}
    spelled = {at: _parse(value, at) for at, value in places.items() if not _is_absent(value)}
    if spelled:
        return _agreed(spelled)
    if "grid_mapping_name" in coord.attrs:
        return _from_cf(coord.attrs, name)
    values = sorted({str(value) for value in coord.values.ravel() if not _is_absent(value)})
    if len(values) == 1:
        return _parse(values[0], f"{name}={values[0]}")
    if len(values) > 1:
        raise _unclear("one CRS", f"{name} of {', '.join(values[:3])}")
    if "GeoTransform" not in coord.attrs and name not in ("epsg", *_OF_ITEMS):
        raise _unclear("a CRS coordinate that says which", f"{name!r} with {dict(coord.attrs)}")
    return None


def _is_absent(value: Any) -> bool:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return True
    return isinstance(value, str | int | np.integer) and str(value).lower() in (
        "", "0", "none", "nan", "<na>",
    )  # fmt: skip


def _parse(value: Any, where: str) -> CRS:
    """Read any spelling of a CRS."""
    text = value.item() if isinstance(value, np.generic) else value
    text = text.get("init", text) if isinstance(text, dict) else text
    if isinstance(text, str):
        text = text.strip()
        if text.lower().startswith("+init="):  # as old versions of rasterio wrote it
            text = text[len("+init=") :].split()[0]
    try:
        if isinstance(text, int | float) or text.replace(".0", "").isdigit():
            text = f"EPSG:{int(float(text))}"
    except AttributeError:  # a dict or an object of a library
        pass
    try:
        return CRS(text)
    except (pyproj.exceptions.ProjError, ValueError, TypeError, AttributeError) as error:
        raise _unclear("a CRS that PROJ knows", f"{str(value)[:60]!r} in {where}") from error


def _from_cf(attrs: Mapping[str, Any], name: str) -> CRS:
    """Read the parameters of a CF grid mapping; by their EPSG code where they have one."""
    kind = attrs["grid_mapping_name"]
    parameters = [key for key, value in attrs.items() if isinstance(value, float | int | np.number)]
    try:
        if not parameters and kind != "latitude_longitude":
            raise KeyError("its parameters")
        found = pyproj.CRS.from_cf(dict(attrs))
    except (pyproj.exceptions.ProjError, KeyError, ValueError, TypeError) as error:
        raise _unclear("a complete CF grid mapping", f"{kind!r} in {name!r} ({error})") from error
    return CRS(found.to_epsg() or found)


def _agreed(found: Mapping[str, CRS]) -> CRS | None:
    """Return the one CRS of all statements."""
    if not found:
        return None
    (first, crs), *others = found.items()
    for name, other in others:
        if not same_crs(crs, other):
            raise ImageryError(
                "one CRS",
                f"{crs_label(crs)} in {first} and {crs_label(other)} in {name}",
                f"write the true one, for example imagery.rio.write_crs({crs_label(crs)!r})",
            )
    return crs


def _axis_units(array: xr.DataArray) -> dict[Hashable, str]:
    """Units that coordinates along the spatial dims declare: "m", "km" or "degrees"."""
    found: dict[Hashable, str] = {}
    for dim in _dims(array):
        attrs = array[dim].attrs if dim in array.coords else {}
        unit = _UNITS.get(str(attrs.get("units", "")))
        if unit is None and attrs.get("standard_name") in ("latitude", "longitude"):
            unit = "degrees"
        if unit is not None:
            found[dim] = unit
    return found


def _of_axes(array: xr.DataArray, axes: Mapping[Hashable, str]) -> CRS | None:
    """Take axes in degrees for longitude and latitude; refuse those of an unknown projection."""
    dims = _dims(array)
    if "km" in axes.values():
        raise ImageryError(
            "a CRS, and coordinates in its unit",
            "coordinates in km without a CRS",
            f"give both: {_in_metres(axes)}.rio.write_crs('EPSG:...')",
        )
    named = dims in _LAT_LON and all(dim in array.coords for dim in dims)
    if named and all(np.abs(array[d].values).max(initial=0) <= 360 for d in dims):
        return CRS("EPSG:4326")
    return CRS("EPSG:4326") if "degrees" in axes.values() else None


def _validate_units(array: xr.DataArray, crs: CRS, axes: Mapping[Hashable, str]) -> None:
    """Refuse coordinates that declare another unit than the CRS has."""
    if crs.geographic:
        wanted = "degrees"
    else:
        factors = {axis.unit_conversion_factor for axis in crs.proj.axis_info}
        wanted = {(1.0,): "m", (1000.0,): "km"}.get(tuple(factors), "")
    for dim, unit in axes.items():
        if wanted and unit != wanted:
            fix = "write the CRS of the coordinates: imagery.rio.write_crs('EPSG:4326')"
            if (unit, wanted) == ("km", "m"):
                fix = f"give them in metres: {_in_metres(axes)}"
            elif unit != "degrees":
                fix = "write the CRS of the coordinates: imagery.rio.write_crs('EPSG:...')"
            raise ImageryError(
                f"coordinates in {wanted}, the unit of {crs_label(crs)}", f"{dim} in {unit}", fix
            )


def _in_metres(axes: Mapping[Hashable, str]) -> str:
    given = ", ".join(f"{d}=imagery[{d!r}].values * 1000" for d, u in axes.items() if u == "km")
    return f"imagery.assign_coords({given})"


def _unclear(expected: str, found: str) -> ImageryError:
    return ImageryError(expected, found, "write it: imagery.rio.write_crs('EPSG:...')")
