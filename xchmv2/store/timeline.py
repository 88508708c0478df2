"""New dates of a store: they are appended, whatever their time, so that no date ever moves.

First arrays are lengthened. No reader sees that, because the root of the store holds the metadata
that they open. Then the manifest is replaced: from this moment the store has the new dates. Last,
the metadata in the root are replaced. Each step can be killed, and the next call begins anew with
the dates that the manifest has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from xchmv2.errors import StoreError
from xchmv2.store.records import GROUP, Manifest, consolidate
from xchmv2.store.storage import (
    delete_below,
    edit_metadata,
    is_icechunk,
    list_keys,
    read_metadata,
    read_nodes,
    read_object,
    write_object,
)
from xchmv2.store.template import Cube, date_label, plain_coordinates, unit_of


def in_order(dataset: xr.Dataset, dim: str | None) -> xr.Dataset:
    """Sort by date or number; text labels keep their order."""
    if dim not in dataset.coords or dataset[dim].dtype.kind not in "Mmifu":
        return dataset
    order = np.argsort(dataset[dim].values, kind="stable")
    return dataset if (np.diff(order) == 1).all() else dataset.isel({dim: order})


def add_dates(
    store: Store,
    manifest: Manifest,
    cube: Cube,
    dates: dict[str, dict[str, Any]],
    again: set[str],
    validate: Callable[[], None],
) -> None:
    """Append the dates of a cube that a store of the same fingerprint does not hold yet.

    ``dates`` describe the cube's dates by label. Those in ``again`` are written anew: they keep
    their slots, but none of their regions counts as written. ``validate`` refuses to go on if this
    process is no longer the only writer.
    """
    known, dim, former = manifest.dates, cube.date_dim, manifest.is_of_first_format
    new = dates.keys() - known.keys() | again
    if not former:  # a call may have been killed before it was done with the metadata
        _set_length(store, dim, len(known), validate)
        consolidate(store)
    if dim is None or not new:
        return
    root = store.supports_consolidated_metadata and not former
    stored = _along_dates(xr.open_zarr(store, consolidated=root, chunks=None), dim)
    added = in_order(_along_dates(cube.dataset, dim), dim)
    added = added.isel({dim: [label in new for label in _labels(added, dim)]})
    merged = _merge(stored, _as_stored(added, stored, dim), list(known), dim)
    if former:
        delete_below(store, f"{GROUP}/next")  # coordinates, where dates were about to be moved
        manifest.commit(known)
        consolidate(store)
    order = list(dict.fromkeys([*known, *_labels(added, dim)]))
    _set_length(store, dim, len(order), validate)
    _write_coordinates(store, merged, stored, dim, validate)
    for name in cube.arrays:
        validate()
        _name_coordinates(store, name, {*map(str, added.variables)} - {dim})
    first = 1 + max(date["record"] for date in known.values())
    begun = {
        label: {**dates[label], "slot": order.index(label), "record": first + i}
        for i, label in enumerate(_labels(added, dim))
    }
    validate()
    manifest.commit(known | begun)
    consolidate(store)


def _set_length(store: Store, dim: str | None, count: int, validate: Callable[[], None]) -> None:
    """Set the number of dates in the metadata of all arrays; chunks are left alone."""
    for name, found in read_nodes(store).items():
        along_dates = (found.get("dimension_names") or [None])[0] == dim
        if dim is not None and along_dates and found["shape"][0] != count:
            validate()
            edit_metadata(store, name, shape=[count, *found["shape"][1:]])


def _write_coordinates(
    store: Store, merged: xr.Dataset, stored: xr.Dataset, dim: str, validate: Callable[[], None]
) -> None:
    """Write coordinates of all dates; what a reader of the former dates reads stays the same."""
    units = {name: unit_of(stored[name]) for name in stored.variables}
    fixed = {name: unit for name, unit in units.items() if unit is not None}
    raw = MemoryStore()
    plain_coordinates(merged, dim, fixed).to_zarr(
        raw, zarr_format=3, consolidated=False, write_empty_chunks=True
    )
    for name in map(str, merged.variables):
        validate()
        if name in fixed:
            zarr.open_array(store, path=name, mode="r+")[:] = zarr.open_array(raw, path=name)[:]
            continue
        # An array of another layout is replaced by its metadata; its chunks stay for its readers.
        replaces = bool(read_metadata(store, name)) and not is_icechunk(store)
        separator = "." if replaces else "/"
        keys = {"name": "default", "configuration": {"separator": separator}}
        content = {**read_metadata(raw, name), "chunk_key_encoding": keys}
        if is_icechunk(store):  # it takes no chunk without metadata, and is one transaction
            edit_metadata(store, name, **content)
        for key in list_keys(raw, f"{name}/c/"):
            index = key.removeprefix(f"{name}/c/")
            write_object(store, f"{name}/c{separator}{index}", read_object(raw, key) or b"")
        edit_metadata(store, name, **content)


def _name_coordinates(store: Store, variable: str, names: set[str]) -> None:
    """Name coordinates in the attribute of a variable by which xarray finds them."""
    attributes = read_metadata(store, variable)["attributes"]
    named = names.union(str(attributes.get("coordinates", "")).split())
    edit_metadata(
        store, variable, attributes={**attributes, "coordinates": " ".join(sorted(named))}
    )


def _labels(dataset: xr.Dataset, dim: str) -> list[str]:
    return [date_label(value) for value in dataset[dim].values]


def _along_dates(dataset: xr.Dataset, dim: str) -> xr.Dataset:
    """Variables along the dates alone, in memory; dates without a coordinate are numbered."""
    positions = np.arange(dataset.sizes[dim])
    others = [name for name, variable in dataset.variables.items() if variable.dims != (dim,)]
    found = dataset.drop_vars(others).reset_coords().load()
    return found if dim in found.coords else found.assign_coords({dim: positions})


def _merge(stored: xr.Dataset, added: xr.Dataset, labels: list[str], dim: str) -> xr.Dataset:
    """Coordinates of stored and added dates in the order of the slots."""
    parts = [stored, added]
    names = {name: None for part in parts for name in part.data_vars}
    filled = [_with_all(part, list(names), parts, dim) for part in parts]
    merged = xr.concat(filled, dim, data_vars="all", join="override", combine_attrs="override")
    # A date that is written anew keeps its place, with its new coordinates.
    rows = {label: row for row, label in enumerate([*labels, *_labels(added, dim)])}
    return merged.isel({dim: list(rows.values())}).set_coords(list(names))


def _with_all(part: xr.Dataset, names: list[Any], parts: list[xr.Dataset], dim: str) -> xr.Dataset:
    """Add the coordinates that only the other part has, as missing values."""
    for name in [name for name in names if name not in part]:
        other = next(p[name] for p in parts if name in p)
        part = part.assign({name: (dim, _missing(other, part.sizes[dim]), other.attrs)})
    return part


def _missing(like: xr.DataArray, count: int) -> np.ndarray[Any, Any]:
    """Missing values of the kind of a coordinate."""
    if like.dtype.kind in "OUT":
        return np.full(count, "", object)
    if like.dtype.kind in "Mm":
        return np.full(count, "NaT", like.dtype)
    if like.dtype.kind == "f":
        return np.full(count, np.nan, like.dtype)
    raise StoreError(
        f"the coordinate {like.name!r} must be on both old and new dates, as {like.dtype} has no "
        "missing value",
        fix=f"add it to the other dates, or leave it out: height.drop_vars({like.name!r})",
    )


def _as_stored(added: xr.Dataset, stored: xr.Dataset, dim: str) -> xr.Dataset:
    """Bring coordinates to the data types in the store; values that do not fit are refused."""
    found = {}
    for name in [name for name in added.variables if name in stored.variables]:
        given, dtype = added[name].variable.to_base_variable(), stored[name].dtype
        kinds = {given.dtype.kind, dtype.kind}
        if kinds <= {*"OUT"}:
            dtype = np.dtype(object)
        elif dtype.kind == "M" and (unit := unit_of(stored[name])):
            dtype = np.dtype(f"M8[{unit}]")
        numbers = {*"iu"} if name == dim else {*"iuf"}
        alike = len(kinds) == 1 or kinds <= {*"OUT"} or kinds <= numbers
        with np.errstate(all="ignore"):
            kept = given.astype(dtype) if alike else given
        wrong = ((kept != given) & ~(kept.isnull() & given.isnull())).values
        if not alike or (wrong.any() and (dtype.kind != "f" or name == dim)):
            raise _misfit(str(name), dtype, given.values[wrong if alike else slice(1)][0])
        found[name] = kept
    return added.assign(found)


def _misfit(name: str, dtype: np.dtype[Any], value: Any) -> StoreError:
    rounded = f"height.assign_coords({name}=height.{name}.astype({dtype.name!r}))"
    return StoreError(
        f"{name} as {dtype}, in which the store holds it",
        repr(value),
        f"round it: {rounded}" if dtype == "M8[us]" else "write these dates to another store",
    )
