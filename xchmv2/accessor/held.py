"""What every part of the accessor holds: the object it was reached from, and nothing else."""

from __future__ import annotations

from typing import Generic, TypeVar

import xarray as xr

T = TypeVar("T", xr.Dataset, xr.DataArray)


class Held(Generic[T]):
    """The object an accessor was reached from.

    Parameters
    ----------
    obj : Dataset or DataArray
        It is never modified.
    """

    def __init__(self, obj: T) -> None:
        self._obj: T = obj

    def __repr__(self) -> str:
        from xchmv2.overview import overview

        return overview(self._obj, type(self)).text

    def _repr_html_(self) -> str:
        from xchmv2.overview import overview

        return overview(self._obj, type(self)).html
