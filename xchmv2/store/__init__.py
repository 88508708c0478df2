"""Zarr stores of canopy heights, written region by region and resumable after a kill."""

from xchmv2.store.reading import open_zarr
from xchmv2.store.verifying import Problem, Verified, verify
from xchmv2.store.writing import Written, remove_store, to_zarr

__all__ = ["Problem", "Verified", "Written", "open_zarr", "remove_store", "to_zarr", "verify"]
