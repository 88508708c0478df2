"""The empty store: arrays, chunks, encodings and coordinates of the cube to be written."""

from __future__ import annotations

import asyncio
import datetime
import gzip
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ShardingCodec
from zarr.storage import MemoryStore

from xchmv2.errors import StoreError, warn
from xchmv2.raster import (
    BLOCK,
    find_grid,
    georeference_all,
    show,
    validate_choice,
    validate_raster,
    with_crs_variables,
    without_time_zone,
)

# Registered conventions of Zarr for the CRS and the grid: name, identifier, description.
_CONVENTIONS = (
    ("proj", "f17cb550-5864-4468-aeb7-f3180cfb622f",
     "Coordinate reference system information for geospatial data"),
    ("spatial", "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "Spatial coordinate information"),
)  # fmt: skip

#: Dates in a chunk of their coordinates. More dates replace one object, and whoever opened the
#: store when it had fewer reads it as before.
_DATES = 1024
#: Units of dates in a store.
_UNITS = {"us": "microseconds since 1970-01-01", "ns": "nanoseconds since 1970-01-01"}

_ENCODED = ("_FillValue", "missing_value", "scale_factor", "add_offset", "coordinates")


def write_template(
    store: Store, cube: Cube, encodings: Mapping[str, Encoding], *, shards: bool
) -> None:
    """Write everything but the pixels of a cube, whose dates are in their final order."""
    leading = (1,) * (cube.date_dim is not None)
    layout: dict[str, Any] = {"chunks": (*leading, *cube.chunk)}
    if shards:
        layout["shards"] = (*leading, *cube.block)
    dataset = cube.dataset.assign(
        {
            # Zeros stand in for the pixels, which are not computed here.
            name: (
                variable.dims,
                da.zeros(variable.shape, chunks=-1, dtype=variable.dtype),
                _attrs(variable),
            )
            for name, variable in cube.dataset.data_vars.items()
        }
    ).assign_attrs({"Conventions": "CF-1.11", **_georeference(cube)})
    encoding: dict[Any, dict[str, Any]] = {
        name: {"chunks": cube.block} for name, c in dataset.coords.items() if c.dims == cube.dims
    }
    encoding |= {name: {**layout, **e.for_xarray} for name, e in encodings.items()}
    for name in encodings if shards else ():  # parts of shards are read, so each has a checksum
        encoding[name]["compressors"] = (encoding[name]["compressors"], Crc32cCodec())
    plain_coordinates(dataset, cube.date_dim).to_zarr(
        store,
        mode="a",
        zarr_format=3,
        consolidated=False,
        compute=False,
        write_empty_chunks=True,
        safe_chunks=False,
        encoding=encoding,
    )


def _georeference(cube: Cube) -> dict[str, Any]:
    """CRS and grid as attributes of a group; empty without a CRS."""
    grid = find_grid(next(iter(cube.dataset.data_vars.values())))
    if grid.crs is None:
        return {}
    box = grid.geobox
    code = grid.crs.authority
    crs = {"proj:code": ":".join(map(str, code))} if all(code) else {"proj:wkt2": grid.crs.to_wkt()}
    return {
        "zarr_conventions": [
            {
                "name": name,
                "uuid": uuid,
                "description": description,
                "schema_url": "https://raw.githubusercontent.com/zarr-conventions/"
                f"{name}/refs/tags/v0.1/schema.json",
                "spec_url": f"https://github.com/zarr-conventions/{name}/blob/v0.1/README.md",
            }
            for name, uuid, description in _CONVENTIONS
        ],
        **crs,
        "spatial:dimensions": list(grid.dims),
        "spatial:shape": list(grid.shape),
        "spatial:transform_type": "affine",
        "spatial:transform": list(box.transform[:6]),
        "spatial:bbox": list(box.boundingbox.bbox),
        "spatial:registration": "pixel",
    }


def is_own_attribute(name: Any) -> bool:
    """Whether an attribute of the root describes the store, not the Dataset that was written."""
    return str(name) in ("Conventions", "zarr_conventions") or str(name).startswith(
        ("proj:", "spatial:")
    )


def _attrs(variable: xr.DataArray) -> dict[str, Any]:
    """Attributes as they are stored, without those of the source's encoding."""
    mapping = variable.encoding.get("grid_mapping")
    kept = {name: value for name, value in variable.attrs.items() if name not in _ENCODED}
    return {**({"grid_mapping": mapping} if mapping else {}), **kept}


def plain_coordinates(
    dataset: xr.Dataset, date_dim: str | None, units: Mapping[Any, str] | None = None
) -> xr.Dataset:
    """Encode coordinates for a store, whatever their source's encoding.

    Those along the dates are encoded so that later dates can follow; ``units`` are those of
    :func:`unit_of` for coordinates that a store holds already.
    """
    coords = {}
    for name, coord in dataset.coords.items():
        if coord.dtype.kind in "UT":  # Zarr v3 has no text of fixed width
            coord = coord.astype(object)
        variable = coord.variable.to_base_variable().copy(deep=False)
        # Uncompressed, since without them a reader that lacks zstd finds no place on the ground.
        variable.encoding = {"chunks": coord.shape, "compressors": None} if coord.ndim < 2 else {}
        if coord.dims == (date_dim,):
            variable = _extendable(variable, (units or {}).get(name))
        coords[name] = variable
    return dataset.drop_encoding().assign_coords(coords)


def _extendable(variable: xr.Variable, unit: str | None) -> xr.Variable:
    """Encode a coordinate along the dates; xarray's units would suit these dates alone."""
    if variable.dtype.kind == "M":
        rounded = variable.values.astype("M8[us]")
        exact = ((rounded == variable.values) | np.isnat(rounded)).all()
        unit = unit or ("us" if exact else "ns")
        attrs = {**variable.attrs, "units": _UNITS[unit], "calendar": "proleptic_gregorian"}
        numbers = variable.values.astype(f"M8[{unit}]").astype("int64")
        variable = xr.Variable(variable.dims, numbers, attrs)
    elif variable.dtype.kind == "m":
        variable = variable.astype("m8[ns]")  # which xarray writes as whole nanoseconds
    variable.encoding = {"chunks": (_DATES,), "compressors": None}
    return variable


def unit_of(stored: xr.DataArray) -> str | None:
    """Find the unit of a coordinate in a store, "us" or "ns", and "" if it holds no times.

    None if it is not encoded so that later dates can follow, as in stores of format 1.
    """
    if stored.encoding.get("chunks") != (_DATES,):
        return None
    found = {name: unit for unit, name in _UNITS.items()}
    return found.get(str(stored.encoding.get("units"))) if stored.dtype.kind == "M" else ""


EncodingName = Literal["float32", "rounded", "int16_cm", "uint8_half_m"]
CompressorName = Literal["blosc", "gzip"]


class _Gzip(GzipCodec):
    """gzip without the time in its header, so that equal pixels are equal bytes."""

    def _encode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        data = gzip.compress(chunk_bytes.as_numpy_array(), self.level, mtime=0)
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _encode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)


def open_pixels(store: Store, name: str) -> zarr.Array[Any]:
    """Open an array of a store, to write pixels."""
    array: Any = zarr.open_array(store, path=name, mode="r+")
    metadata = replace(array.metadata, codecs=tuple(map(_undated, array.metadata.codecs)))
    return zarr.Array(zarr.AsyncArray(metadata, array.store_path))


def _undated(codec: Any) -> Any:
    if isinstance(codec, ShardingCodec):
        return replace(codec, codecs=tuple(map(_undated, codec.codecs)))
    return _Gzip(level=codec.level) if isinstance(codec, GzipCodec) else codec


@dataclass(frozen=True)
class Encoding:
    """How one variable is stored.

    `dtype`: of the stored numbers; `fill`: the stored number that means "missing"; `scale`: metres
    per unit of stored integers; `step` that values stored as floating point are rounded to [m];
    `attrs`: further attributes for decoding; `compressor`: "blosc", with zstd and bit shuffling, or
    "gzip".
    """

    dtype: str
    fill: float | int | None = None
    scale: float | None = None
    step: float | None = None
    attrs: tuple[tuple[str, str], ...] = ()
    compressor: CompressorName = "blosc"

    def __call__(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Encode an array; an OverflowError counts the values that the encoding cannot hold."""
        if self.step is not None:
            values = np.round(values / np.float32(self.step)) * np.float32(self.step)
        if self.scale is not None:
            return self._whole(values)
        if np.issubdtype(values.dtype, np.datetime64):  # days since 1970, without the time of day
            days = values.astype("datetime64[D]").astype(np.int64)
            assert self.fill is not None
            return np.where(np.isnat(values), self.fill, days).astype(self.dtype)
        try:
            with np.errstate(over="raise"):
                return values.astype(self.dtype, copy=False)
        except FloatingPointError:
            raise OverflowError(f"values beyond the range of {self.dtype}") from None

    @property
    def for_xarray(self) -> dict[str, Any]:
        """The encoding in xarray's terms, with codec and fill value."""
        dtype = np.dtype(self.dtype)
        codec: Any = GzipCodec(level=5)
        if self.compressor == "blosc":
            size = dtype.itemsize
            codec = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=size)
        encoding: dict[str, Any] = {"dtype": self.dtype, "compressors": codec}
        if self.fill is not None:
            fill = dtype.type(self.fill)
            # CF's attribute for readers, and zarr's own for chunks that are not written.
            encoding |= {"_FillValue": fill, "fill_value": fill}
        if self.scale is not None:
            encoding["scale_factor"] = self.scale
        return encoding | dict(self.attrs)

    def _whole(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Divide by the scale into integers; missing values become the fill number."""
        assert self.scale is not None
        assert self.fill is not None
        limits = np.iinfo(self.dtype)
        low = limits.min + (self.fill == limits.min)
        high = limits.max - (self.fill == limits.max)
        steps = np.rint(values / np.float64(self.scale))
        missing = np.isnan(steps)
        outside = int(np.count_nonzero(~missing & ((steps < low) | (steps > high))))
        if outside:
            raise OverflowError(
                f"{outside} values outside {low * self.scale:g} to {high * self.scale:g} m, from "
                f"{np.nanmin(values):.2f} to {np.nanmax(values):.2f} m"
            )
        return np.where(missing, self.fill, steps).astype(self.dtype)


_FLOATS: Mapping[EncodingName, Encoding] = {
    "float32": Encoding("float32", np.nan),
    # A power of two, so that the lower bits are zeros.
    "rounded": Encoding("float32", np.nan, step=1 / 8),
    "int16_cm": Encoding("int16", -(2**15), scale=0.01),
    "uint8_half_m": Encoding("uint8", 255, scale=0.5),
}
_DAYS = Encoding(
    "int32",
    -(2**31),
    attrs=(("units", "days since 1970-01-01"), ("calendar", "proleptic_gregorian")),
)


def resolve_encoding(name: str, variable: xr.DataArray, compressor: str = "blosc") -> Encoding:
    """Choose the encoding of a variable.

    ``name`` is that of floating-point variables; integers and booleans keep their dtype, dates are
    stored as days. An unknown name or compressor, or another dtype, is a StoreError.
    """
    validate_choice("encoding", name, get_args(EncodingName), "int16_cm", error=StoreError)
    validate_choice("compressor", compressor, get_args(CompressorName), "gzip", error=StoreError)
    dtype, found = variable.dtype, None
    if np.issubdtype(dtype, np.floating):
        found = _FLOATS[name]  # type: ignore[index]
    elif np.issubdtype(dtype, np.datetime64):
        found = _DAYS
    elif np.issubdtype(dtype, np.integer) or dtype.kind == "b":
        found = Encoding(dtype.name)
    if found is not None:
        return replace(found, compressor=compressor)  # type: ignore[arg-type]
    raise StoreError(
        "variables of numbers, booleans or dates",
        f"{variable.name!r} of dtype {dtype}",
        f"leave it out: dataset.drop_vars({variable.name!r})",
    )


#: Longest side of a chunk of the store [px].
_LONGEST_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Cube:
    """Variables on one grid, dask-backed, with equal blocks.

    `dataset`: variables of dims ``(date, y, x)`` or ``(y, x)``, with coordinates in memory;
    `date_dim`: name of the dim before y and x, if any; `dims`: those of y and x.
    """

    dataset: xr.Dataset
    date_dim: str | None
    dims: tuple[str, str]

    @property
    def arrays(self) -> dict[str, da.Array]:
        """The variables' arrays, by name."""
        return {str(name): variable.data for name, variable in self.dataset.data_vars.items()}

    @property
    def labels(self) -> list[str]:
        """Label of each date; one empty label without such a dim."""
        if self.date_dim is None:
            return [""]
        return [date_label(value) for value in self.dataset[self.date_dim].values]

    @property
    def block(self) -> tuple[int, int]:
        """Sides of a block [px]."""
        y, x = (max(self.dataset.chunksizes[dim]) for dim in self.dims)
        return y, x

    @property
    def chunk(self) -> tuple[int, int]:
        """Sides of a chunk of the store [px]: a block, or an equal part of one."""
        return _chunk(self.block[0]), _chunk(self.block[1])

    def per_date(self, name: str, default: Any) -> Any:
        """Values of a coordinate along the dates; the default for each date without it."""
        known = self.dataset.coords.get(name)
        if known is None or self.date_dim is None or known.dims != (self.date_dim,):
            return [default] * len(self.labels)
        return known.values


def can_name(name: str) -> bool:
    """Whether a variable or coordinate may have a name, which is a path in the store."""
    forbidden = {"xchmv2", "zarr.json", ""}
    return name not in forbidden and not name.startswith((".", "__")) and not {*name} & {*"/\\\0"}


def read_cube(height: xr.DataArray | xr.Dataset) -> Cube:
    """Bring heights and other layers into the shape they are written in.

    An array that needs no change keeps its dask name, by which a prediction is recognised. A
    StoreError refuses variables of different dims, several dims beside y and x, and dates that
    occur twice.
    """
    dataset = _as_dataset(height)
    wrong = [str(name) for name in dataset.variables if not can_name(str(name))]
    if wrong:
        raise StoreError(
            "names that can be paths in a store, without / and not xchmv2",
            repr(wrong[0]),
            "rename it: height.rename("
            + ("'another')" if wrong[0] in dataset.data_vars else f"{{{wrong[0]!r}: 'another'}})"),
        )
    first = next(iter(dataset.data_vars.values()))
    dims = find_grid(first).dims
    others = [str(dim) for dim in first.dims if dim not in dims]
    if len(others) > 1:
        raise StoreError(
            f"at most one dim beside {dims}, such as time",
            f"dims {first.dims}",
            f"write one at a time: height.isel({others[1]}=0)",
        )
    date_dim = others[0] if others else None
    wanted = (*others, *dims)
    _validate_dims(dataset, wanted)
    _validate_index(dataset, others)
    dataset = georeference_all(dataset).transpose(*wanted, ...)
    dataset = _with_coordinates_in_memory(dataset, date_dim)
    dataset = _with_plain_attrs(_without_objects(dataset))
    if date_dim is not None:
        _validate_dates(dataset[date_dim], date_dim)
    return Cube(_in_equal_blocks(dataset, dims), date_dim, dims)


def date_label(value: Any) -> str:
    """Label of a date, or of another value along the dim before y and x."""
    if isinstance(value, np.datetime64):
        return str(np.datetime_as_string(value, unit="ns"))
    return str(value)


def _as_dataset(height: xr.DataArray | xr.Dataset) -> xr.Dataset:
    validate_raster(height, error=StoreError)
    if isinstance(height, xr.DataArray):
        return height.to_dataset(name=str(height.name or "canopy_height"))
    dataset = with_crs_variables(height)
    if not dataset.data_vars:
        raise StoreError(
            "at least one variable", "an empty Dataset", "write the result of predict()"
        )
    return dataset


def _validate_dims(dataset: xr.Dataset, wanted: tuple[Hashable, ...]) -> None:
    other = {str(n): v.dims for n, v in dataset.data_vars.items() if set(v.dims) != set(wanted)}
    if other:
        raise StoreError(
            f"variables of dims {wanted}, all alike",
            f"{other}",
            f"write them to a store of their own: dataset.drop_vars({list(other)})",
        )
    if any(dataset.sizes[dim] == 0 for dim in wanted):
        raise StoreError(
            "at least one pixel and one date", f"sizes {dict(dataset.sizes)}", "widen the selection"
        )


def _with_coordinates_in_memory(dataset: xr.Dataset, date_dim: str | None) -> xr.Dataset:
    """Compute coordinates; those that depend on both date and place are refused."""
    mixed = [str(n) for n, c in dataset.coords.items() if c.ndim > 1 and date_dim in c.dims]
    if mixed:
        raise StoreError(
            f"coordinates along {date_dim} alone, or along y and x alone",
            f"{mixed} with dims {dataset[mixed[0]].dims}",
            f"write them as variables, height.reset_coords({mixed}), or leave them out",
        )
    return dataset.assign_coords({name: c.compute() for name, c in dataset.coords.items()})


def _validate_index(dataset: xr.Dataset, dims: list[str]) -> None:
    """Refuse labels that Zarr cannot hold: of several levels, or times with a time zone."""
    for dim in dims:
        index = dataset.indexes.get(dim)
        if index is not None and index.nlevels > 1:
            raise StoreError(
                f"one label for each {dim}",
                f"the levels {list(index.names)}",
                f"make them coordinates: height.reset_index({dim!r})",
            )
        if getattr(index, "tz", None) is not None:
            raise without_time_zone(dim, index)


def _without_objects(dataset: xr.Dataset) -> xr.Dataset:
    """Leave out coordinates that no file can hold, such as a catalogue's dicts and sets."""
    lost = [n for n in dataset.coords if n not in dataset.dims and not _can_store(dataset[n])]
    if lost:
        warn(
            f"the coordinates {sorted(map(str, lost))} hold objects that Zarr cannot store, and "
            "are left out; write what you need of them as numbers or text before"
        )
    return dataset.drop_vars(lost)


def _can_store(coord: xr.DataArray) -> bool:
    if isinstance(coord.dtype, np.dtype) and coord.dtype != object:
        return True
    probe = xr.Dataset({"probe": (coord.dims, coord.data)})
    try:  # what an array of objects holds, and whether there is a type for it, xarray finds out
        probe.to_zarr(MemoryStore(), zarr_format=3, consolidated=False)
    except (TypeError, ValueError):
        return False
    return True


def _with_plain_attrs(dataset: xr.Dataset) -> xr.Dataset:
    """Write dates in attributes as text, and refuse what JSON cannot hold."""
    plain = dataset.copy()
    plain.attrs = {key: _plain(value, key, "height") for key, value in dataset.attrs.items()}
    several = len(dataset.data_vars) > 1
    for name, variable in plain.variables.items():
        whole = name in dataset.data_vars and not several
        holder = "height" if whole else f"height[{name!r}]"
        variable.attrs = {k: _plain(v, k, holder) for k, v in variable.attrs.items()}
    return plain


def _plain(value: Any, key: Hashable, holder: str) -> Any:
    """Return an attribute as JSON holds it."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufU":
        return value.tolist()
    if isinstance(value, np.datetime64 | np.timedelta64):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, key, holder) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, key, holder) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise StoreError(
        "attributes of numbers, text and dates",
        f"{key!r} as {show(value)}",
        f"write it as text, or leave it out: {holder}.attrs.pop({key!r})",
    )


def _in_equal_blocks(dataset: xr.Dataset, dims: tuple[str, str]) -> xr.Dataset:
    """Chunk arrays in memory, and make all chunks along y and x equal except the last."""
    variables = {name: v.variable for name, v in dataset.data_vars.items()}
    lazy = [v for v in variables.values() if v.chunks is not None]
    if lazy:
        sizes: dict[Any, Any] = dict(xr.unify_chunks(*map(xr.DataArray, lazy))[0].chunksizes)
    else:
        sizes = {dim: BLOCK if dim in dims else 1 for dim in dataset.dims}
    for dim in dims:
        found = sizes[dim]
        if lazy and (len(set(found[:-1])) > 1 or found[-1] > found[0]):
            sizes[dim] = max(found)
    return dataset.assign({name: variable.chunk(sizes) for name, variable in variables.items()})


def _validate_dates(dates: xr.DataArray, date_dim: str) -> None:
    """Refuse dates of a kind that a store cannot hold and compare, missing and repeated ones."""
    text = dates.dtype.kind in "UT" or all(isinstance(value, str) for value in dates.values)
    if dates.dtype.kind not in "Miuf" and not text:
        raise StoreError(
            f"{date_dim} as dates without time zone, numbers or text",
            f"{dates.dtype} of {type(dates.values[0]).__name__}",
            "for example height.convert_calendar('standard', use_cftime=False), or "
            f"height.assign_coords({date_dim}=pandas.to_datetime([...]))",
        )
    labels = [date_label(value) for value in dates.values]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise StoreError(
            f"every {date_dim} once",
            f"{twice[0]} {labels.count(twice[0])} times",
            f"combine them first, for example height.groupby({date_dim!r}).max(), or load with "
            "groupby='solar_day'",
        )
    if "NaT" in labels:
        raise StoreError(
            f"a date for every {date_dim}",
            "NaT",
            f"leave it out: height.sel({date_dim}=height.{date_dim}.notnull())",
        )


def _chunk(side: int) -> int:
    """Largest equal part of a block up to the longest chunk, if one is near; else the block."""
    parts = range(-(-side // _LONGEST_CHUNK), 4 * side // _LONGEST_CHUNK + 1)
    return next((side // n for n in parts if side % n == 0), side)
