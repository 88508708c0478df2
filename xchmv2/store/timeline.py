"""New dates of a store: they are appended, whatever their time, so that no date ever moves.

The new template is made in memory and published; each step of that can be killed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from xchmv2.errors import StoreError
from xchmv2.store.copies import (
    collect,
    drop_copies,
    find_changed,
    in_memory,
    publish,
    read_template,
)
from xchmv2.store.records import FORMER_RECORDS, GROUP, RECORDS, Manifest
from xchmv2.store.storage import (
    address,
    checksum,
    delete_below,
    delete_name,
    edit_metadata,
    is_icechunk,
    list_keys,
    list_names,
    read_metadata,
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
    manifest: Manifest,
    cube: Cube,
    dates: dict[str, dict[str, Any]],
    again: set[str],
    validate: Callable[[], None],
) -> Manifest:
    """Append the dates of a cube that a store of the same fingerprint does not hold yet.

    ``dates`` describe the cube's dates by label. Those in ``again`` are written anew: they keep
    their slots, but none of their regions counts as written. ``validate`` refuses to go on if this
    process is no longer the only writer.
    """
    store, known, dim = manifest.store, manifest.dates, cube.date_dim
    new = dates.keys() - known.keys() | again
    if dim is None or not new:
        return manifest
    template = read_template(manifest)
    raw = in_memory(template)
    stored = _along_dates(xr.open_zarr(raw, consolidated=False, chunks=None), dim)
    added = in_order(_along_dates(cube.dataset, dim), dim)
    added = added.isel({dim: [label in new for label in _labels(added, dim)]})
    merged = _merge(stored, _as_stored(added, stored, dim), list(known), dim)
    order = list(dict.fromkeys([*known, *_labels(added, dim)]))
    for name in list_names(raw):
        found = read_metadata(raw, name) if name != "zarr.json" else {}
        if (found.get("dimension_names") or [None])[0] == dim:
            edit_metadata(raw, name, shape=[len(order), *found["shape"][1:]])
    _write_coordinates(raw, merged, stored, dim, replaces=not is_icechunk(store))
    for name in cube.arrays:
        _name_coordinates(raw, name, {*map(str, added.variables)} - {dim})
    first = 1 + max(date["record"] for date in known.values())
    begun = {
        label: {**dates[label], "slot": order.index(label), "record": first + i}
        for i, label in enumerate(_labels(added, dim))
    }
    for date in begun.values():  # of an extension that is not known any more
        validate()
        delete_below(store, f"{RECORDS}/c/{date['record']}")
    large = {key: content for key, content in template.items() if isinstance(content, tuple)}
    changed = {**collect(raw, manifest.variables), **large}
    return publish(replace(manifest, dates=known | begun), changed, template, raw, validate)


def raise_format(manifest: Manifest, validate: Callable[[], None]) -> Manifest:
    """Bring a store of format 1 to the present one, which earlier versions refuse."""
    if not manifest.is_of_first_format:
        return manifest
    store, raised = manifest.store, replace(manifest, is_of_first_format=False)
    for region in manifest.done():
        record = manifest.parse_record(read_object(store, manifest.record_key(region)))
        validate()
        write_object(store, raised.record_key(region), b"" if record is None else record.tobytes())
    template = collect(store, manifest.variables)
    raised = publish(raised, template, template, store, validate)
    for name in (FORMER_RECORDS, f"{GROUP}/next"):  # coordinates of dates about to be moved
        delete_name(store, name)
    return raised


def restore(manifest: Manifest, cube: Cube, template_of: Callable[[], Store]) -> None:
    """Write objects of the template again where they are not as the manifest wants them.

    ``template_of`` makes the template of the cube, from which coordinates along y and x come.
    """
    store, template = manifest.store, read_template(manifest)
    changed = find_changed(manifest, template)
    made = template_of() if None in changed.values() else None
    for key, content in changed.items():
        data = read_object(made, key) if content is None and made is not None else content
        if content is None and (data is None or checksum(data) != template[key]):
            raise StoreError(
                f"coordinates along {cube.dims} as the store was begun with",
                f"others, while {key} in {address(store)} is damaged",
                "give the same coordinates as then, which repairs the store",
            )
        write_object(store, key, data or b"")
    drop_copies(manifest)


def _write_coordinates(
    raw: Store, merged: xr.Dataset, stored: xr.Dataset, dim: str, *, replaces: bool
) -> None:
    """Write coordinates of all dates; what a reader of the former dates reads stays the same."""
    units = {name: unit_of(stored[name]) for name in stored.variables}
    fixed = {name: unit for name, unit in units.items() if unit is not None}
    fresh = MemoryStore()
    plain_coordinates(merged, dim, fixed).to_zarr(
        fresh, zarr_format=3, consolidated=False, write_empty_chunks=True
    )
    for name in map(str, merged.variables):
        if name in fixed:
            whole = {"write_empty_chunks": True}
            stored_array = zarr.open_array(raw, path=name, mode="r+", config=whole)
            stored_array[:] = zarr.open_array(fresh, path=name)[:]
            continue
        # An array of another layout is replaced by its metadata; its chunks stay for its readers.
        separator = "." if replaces and read_metadata(raw, name) else "/"
        for key in list_keys(fresh, f"{name}/c/"):
            index = key.removeprefix(f"{name}/c/")
            write_object(raw, f"{name}/c{separator}{index}", read_object(fresh, key) or b"")
        keys = {"name": "default", "configuration": {"separator": separator}}
        edit_metadata(raw, name, **{**read_metadata(fresh, name), "chunk_key_encoding": keys})


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
