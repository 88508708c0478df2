"""Heights from a Zarr store: float32 with NaN, whatever the encoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import IncompleteStoreWarning, warn
from xchmv2.raster import HEIGHT_NAME
from xchmv2.store.lock import LOCK
from xchmv2.store.records import find_store
from xchmv2.store.storage import (
    StoreLike,
    address,
    damaged,
    explain_failures,
    read_object,
    resolve_store,
)
from xchmv2.store.template import date_label, is_own_attribute
from xchmv2.store.timeline import in_order
from xchmv2.store.verifying import CheckedStore


def open_zarr(
    store: StoreLike, *, storage_options: Mapping[str, Any] | None = None
) -> xr.DataArray | xr.Dataset:
    """Open a store that ``.chmv2.to_zarr`` wrote, lazily.

    The result is a DataArray where ``canopy_height`` alone was written, and a Dataset where any
    other variable was.

    Parameters
    ----------
    store : str, path, zarr store, obstore store or icechunk Session
        Location of the store.
    storage_options : mapping, optional
        Options of the file system of a URL.

    Returns
    -------
    DataArray or Dataset
        ``canopy_height`` (..., y, x) float32 [m], NaN where missing, chunked by the blocks of the
        store; a Dataset if the store holds other variables. Dates are in order, one in a chunk,
        whatever the order in which they were written; text labels are in that order. Coordinates
        along one dim are in memory. The attribute ``grid_mapping`` names the coordinate of the CRS.

    Raises
    ------
    StoreError
        If there is no such store, it was half removed, or its metadata are damaged; and when a
        chunk is read whose size or checksum is not that of its record.

    Warns
    -----
    IncompleteStoreWarning
        If regions are not written yet; they read as NaN.
    """
    source = resolve_store(store, storage_options, read_only=True)
    with explain_failures(source, "read"):
        manifest = find_store(source)
        total = len(manifest.dates) * math.prod(manifest.blocks)
        done = manifest.done()
        missing = total - len(done)
        checked = source if manifest.is_of_first_format else CheckedStore(source, manifest, done)
        active = bool(missing) and read_object(source, LOCK) is not None
    if missing:
        warn(
            f"{missing} of {total} regions of {address(source)} are not written yet and read as "
            "NaN; the same call of .chmv2.to_zarr() writes them"
            + (", unless another is doing so now: the store has a lock" if active else ""),
            IncompleteStoreWarning,
        )
    content = manifest.fingerprint
    *dates, y, x = manifest.dims
    chunks = dict(zip((y, x), content["block"], strict=True))
    dataset: xr.Dataset = xr.open_zarr(
        checked, consolidated=manifest.copy is not None, decode_coords="all", chunks=chunks
    )
    wanted = content["variables"]
    # Coordinates of other dims, such as the errors of a change, are kept.
    dataset = dataset.drop_vars([name for name in dataset.data_vars if name not in wanted])
    dataset = dataset.assign({name: _as_float32(dataset[name]) for name in wanted})
    dataset = dataset.assign_coords(
        {name: c.compute().drop_encoding() for name, c in dataset.coords.items() if c.ndim < 2}
    )
    for dim in dates:
        dataset = dataset.isel({dim: slice(len(manifest.dates))})
        labels = [date_label(value) for value in dataset[dim].values]
        if dim in dataset.coords and labels != list(manifest.dates):
            raise damaged(source, str(dim))
        dataset = in_order(dataset, dim)
    if wanted == [HEIGHT_NAME]:
        return dataset[HEIGHT_NAME]
    dataset.attrs = {n: v for n, v in dataset.attrs.items() if not is_own_attribute(n)}
    return dataset


def _as_float32(variable: xr.DataArray) -> xr.DataArray:
    """Undo the float64 of scaled integers; move the CRS to attrs, which arithmetic keeps."""
    mapping = variable.encoding.get("grid_mapping")
    floating = np.issubdtype(variable.dtype, np.floating)
    variable = (variable.astype(np.float32) if floating else variable).drop_encoding()
    if mapping:
        variable.attrs["grid_mapping"] = mapping
    if floating:
        variable.encoding["_FillValue"] = np.float32(np.nan)
    return variable
