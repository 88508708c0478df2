"""Heights out of a Zarr store: float32 with NaN, whatever the encoding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import IncompleteStoreWarning, StoreError
from xchmv2.raster import HEIGHT_NAME
from xchmv2.store.records import Manifest, open_manifest
from xchmv2.store.storage import StoreLike, resolve_store


def open_zarr(
    store: StoreLike, *, storage_options: Mapping[str, Any] | None = None
) -> xr.DataArray | xr.Dataset:
    """Open a store that ``.chmv2.to_zarr`` wrote, lazily.

    The result is a DataArray where ``canopy_height`` alone was written, and a Dataset where any
    other variable was.

    Parameters
    ----------
    store : str, path, zarr store, obstore store or icechunk Session
        Where it lies.
    storage_options : mapping, optional
        Options of the file system of a URL.

    Returns
    -------
    DataArray or Dataset
        ``canopy_height`` (..., y, x) float32 [m], NaN where missing, in the blocks it was written
        in; a Dataset if more than the height was written. The CRS is in ``grid_mapping`` of attrs.

    Raises
    ------
    StoreError
        If there is no such store, or it was half removed.

    Warns
    -----
    IncompleteStoreWarning
        If regions are not written yet; they read as missing.
    """
    source = resolve_store(store, storage_options, read_only=True)
    manifest = _find(source)
    _warn_if_incomplete(source, manifest)
    blocks = manifest.fingerprint["block"]
    dims = manifest.fingerprint["grid"]["dims"][-2:]
    dataset: xr.Dataset = xr.open_zarr(
        source,
        consolidated=False,
        decode_coords="all",
        chunks=dict(zip(dims, blocks, strict=True)),
    )
    wanted = manifest.fingerprint["variables"]
    dataset = dataset[wanted].assign({name: _as_float32(dataset[name]) for name in wanted})
    if wanted == [HEIGHT_NAME]:
        return dataset[HEIGHT_NAME]
    dataset.attrs = {}
    return dataset


def _find(store: Any) -> Manifest:
    try:
        manifest = open_manifest(store)
    except FileNotFoundError:
        manifest = None
    if manifest is None:
        raise StoreError(
            "a store that .chmv2.to_zarr() wrote",
            f"nothing at {store}",
            "correct its name, or write it: height.chmv2.to_zarr(store)",
        )
    if manifest.pending is not None:
        raise StoreError(
            "a store whose dates are in order",
            f"one to which dates are just being added, or were when it was killed: {store}",
            "wait for the writer; if it is dead, the same call of .chmv2.to_zarr() completes it",
        )
    return manifest


def _warn_if_incomplete(store: Any, manifest: Manifest) -> None:
    y, x = manifest.blocks
    total = len(manifest.dates) * y * x
    missing = total - len(manifest.done())
    if missing:
        warnings.warn(
            f"{missing} of {total} regions are not written in {store} and read as missing data; "
            "the call that began it goes on with them",
            IncompleteStoreWarning,
            stacklevel=3,
        )


def _as_float32(variable: xr.DataArray) -> xr.DataArray:
    """Scaled whole numbers decode to float64; the CRS moves to where arithmetic keeps it."""
    mapping = variable.encoding.get("grid_mapping")
    if np.issubdtype(variable.dtype, np.floating):
        variable = variable.astype(np.float32)
    variable = variable.drop_encoding()
    if mapping:
        variable.attrs["grid_mapping"] = mapping
    if np.issubdtype(variable.dtype, np.floating):
        variable.encoding["_FillValue"] = np.float32(np.nan)
    return variable
