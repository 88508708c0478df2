"""New dates of a store: merged in order with the dates that it holds, safely against a kill.

The new coordinates are first written aside. Then a journal in the manifest lists the dates that
have to move, and loses an entry with each one that has moved; the next writer that finds a journal
completes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.store.records import GROUP, Manifest
from xchmv2.store.storage import copy_below, delete_below, move_below
from xchmv2.store.template import Cube, date_label, write_coordinates

_ASIDE = f"{GROUP}/next"


def in_order(cube: Cube) -> Cube:
    """Sort the dates of a cube, for its labels and coordinates alone."""
    return Cube(_sorted(cube.dataset, cube.date_dim), cube.date_dim, cube.dims)


def add_dates(
    store: Store, manifest: Manifest, cube: Cube, dates: dict[str, Any], again: set[str]
) -> None:
    """Make room for the dates of a cube that a store of the same fingerprint does not hold yet.

    ``dates`` are the items and imagery digest of the cube's dates by label, ``again`` the labels
    of stored dates that are written anew.
    """
    known = manifest.dates
    fresh = {label: dates[label] for label in cube.labels if label not in known}
    if cube.date_dim is None or not (fresh or again):
        return
    stored = xr.open_zarr(store, consolidated=False, chunks=None, decode_coords="all")
    merged = _merge(_along_dates(stored, cube.date_dim), cube, again)
    names = write_coordinates(store, _ASIDE, merged)
    order, old = merged.labels, manifest.order
    first = len(known)
    records = {
        label: {**content, "record": first + i} for i, (label, content) in enumerate(fresh.items())
    }
    # From the last to the first, so that each date moves to a free index.
    moves = [[i, order.index(label)] for i, label in reversed(list(enumerate(old)))]
    manifest.update(
        generation=manifest.generation + 1,
        pending={
            "order": order,
            "dates": {
                n: {**dates[n], "record": d["record"]} if n in again else d
                for n, d in known.items()
            }
            | records,
            "forget": [known[label]["record"] for label in again],
            "moves": [move for move in moves if move[0] != move[1]],
            "variables": list(cube.arrays),
            "coordinates": names,
            "named": [name for name in names if name != cube.date_dim],
        },
    )
    finish_extension(store, manifest)


def finish_extension(store: Store, manifest: Manifest) -> None:
    """Complete an extension that was begun, if there is one."""
    pending = manifest.pending
    if pending is None:
        delete_below(store, _ASIDE)
        return
    count = len(pending["order"])
    for record in pending["forget"]:
        manifest.forget(record)
    for name in pending["variables"]:
        array = zarr.open_array(store, path=name, mode="r+")
        _lengthen(array, count)
        named = {*str(array.attrs.get("coordinates", "")).split(), *pending["named"]}
        array.update_attributes({"coordinates": " ".join(sorted(named))})
    while pending["moves"]:
        old, new = pending["moves"][0]
        for name in pending["variables"]:
            move_below(store, f"{name}/c/{old}", f"{name}/c/{new}")
        pending = {**pending, "moves": pending["moves"][1:]}
        manifest.update(pending=pending)
    for name in pending["coordinates"]:
        delete_below(store, f"{name}/c")
        copy_below(store, f"{_ASIDE}/{name}", name)
    _lengthen(manifest.record, count)
    manifest.update(dates=pending["dates"], order=pending["order"], pending=None)
    delete_below(store, _ASIDE)


def _lengthen(array: zarr.Array[Any], count: int) -> None:
    if array.shape[0] < count:
        array.resize((count, *array.shape[1:]))


def _along_dates(dataset: xr.Dataset, dim: str) -> xr.Dataset:
    """Variables along the dates alone, in memory; dates without a coordinate are numbered."""
    positions = np.arange(dataset.sizes[dim])
    others = [name for name, variable in dataset.variables.items() if variable.dims != (dim,)]
    found = dataset.drop_vars(others).reset_coords().load()
    return found if dim in found.coords else found.assign_coords({dim: positions})


def _merge(stored: xr.Dataset, cube: Cube, again: set[str]) -> Cube:
    """Coordinates of old and new dates in order, as a cube without pixels."""
    dim = cube.date_dim
    assert dim is not None
    labels = [date_label(value) for value in stored[dim].values]
    kept = [i for i, label in enumerate(labels) if label not in again]
    fresh = [i for i, name in enumerate(cube.labels) if name not in labels or name in again]
    parts = [stored.isel({dim: kept}), _along_dates(cube.dataset, dim).isel({dim: fresh})]
    names = [name for part in parts for name in part.data_vars]
    filled = [_with_all(part, names, parts, dim) for part in parts]
    merged = xr.concat(filled, dim, data_vars="all", join="override", combine_attrs="override")
    return Cube(_sorted(merged.set_coords(list(merged.data_vars)), dim), dim, cube.dims)


def _with_all(part: xr.Dataset, names: list[Any], parts: list[xr.Dataset], dim: str) -> xr.Dataset:
    """Add the coordinates that only the other part has, as missing values."""
    for name in {name for name in names if name not in part}:
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


def _sorted(dataset: xr.Dataset, dim: str | None) -> xr.Dataset:
    """Sort by date or number; text labels keep their order."""
    if dim not in dataset.coords or dataset[dim].dtype.kind not in "Mmifu":
        return dataset
    return dataset.sortby(dim)
