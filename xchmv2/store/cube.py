"""What is to be written, brought into one shape: variables (date, y, x) in equal blocks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from xchmv2 import defaults
from xchmv2.errors import StoreError
from xchmv2.imagery import find_grid
from xchmv2.imagery.grid import is_crs_variable

#: Most pixels along a side of a chunk of the store.
_LONGEST_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Cube:
    """Variables on one grid, dask-backed, with equal blocks.

    Parameters
    ----------
    dataset : Dataset
        Variables of dims ``(date, y, x)`` or ``(y, x)``, whose coordinates are in memory.
    date_dim : str or None
        Name of the dim before y and x.
    dims : tuple of str
        Names of the vertical and the horizontal dim.
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
        """What the store calls each date; one empty label where there is no such dim."""
        if self.date_dim is None:
            return [""]
        return [date_label(value) for value in self.dataset[self.date_dim].values]

    @property
    def block(self) -> tuple[int, int]:
        """Sides of a block [px]."""
        y, x = (max(self.dataset.chunksizes[dim]) for dim in self.dims)
        return y, x

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks there are along y and x."""
        y, x = (len(self.dataset.chunksizes[dim]) for dim in self.dims)
        return y, x

    @property
    def chunk(self) -> tuple[int, int]:
        """Sides of a chunk of the store [px]: a block, or an equal part of one."""
        return _chunk(self.block[0]), _chunk(self.block[1])

    @property
    def items(self) -> list[str]:
        """Which catalogue items each date was made from; empty strings where it is not told."""
        return [str(value) for value in self._per_date("item_ids", "")]

    @property
    def unreadable(self) -> list[int]:
        """How many files of each date could not be read."""
        return [int(value) for value in self._per_date("unreadable_assets", 0)]

    def _per_date(self, name: str, default: Any) -> Any:
        """Values of a coordinate along the dates."""
        known = self.dataset.coords.get(name)
        if known is None or self.date_dim is None or known.dims != (self.date_dim,):
            return [default] * len(self.labels)
        return known.values


def read_cube(height: xr.DataArray | xr.Dataset) -> Cube:
    """Bring heights and other layers into the shape they are written in.

    Parameters
    ----------
    height : DataArray or Dataset
        (..., y, x) with at most one dim beside y and x.

    Returns
    -------
    Cube
        Names of a prediction's arrays are kept wherever nothing had to be done to them.

    Raises
    ------
    StoreError
        If variables differ in dims, there are several dims beside y and x, or dates come twice.
    """
    dataset = _as_dataset(height)
    first = next(iter(dataset.data_vars.values()))
    dims = find_grid(first).dims
    others = [str(dim) for dim in first.dims if dim not in dims]
    if len(others) > 1:
        raise StoreError(
            f"at most one dim beside {dims}, such as time",
            f"dims {first.dims}",
            f"write one after the other: height.isel({others[1]}=0)",
        )
    date_dim = others[0] if others else None
    wanted = (*others, *dims)
    _validate_dims(dataset, wanted)
    dataset = _with_coordinates_in_memory(dataset.transpose(*wanted), date_dim)
    if date_dim is not None:
        _validate_dates(dataset, date_dim)
    cube = Cube(_in_equal_blocks(dataset, dims), date_dim, dims)
    _validate_labels(cube)
    return cube


def date_label(value: Any) -> str:
    """Name a date, or another place along the dim before y and x."""
    if isinstance(value, np.datetime64):
        return str(np.datetime_as_string(value, unit="ns"))
    return str(value)


def _as_dataset(height: xr.DataArray | xr.Dataset) -> xr.Dataset:
    if isinstance(height, xr.DataArray):
        return height.to_dataset(name=str(height.name or "canopy_height"))
    crs = [name for name, variable in height.data_vars.items() if is_crs_variable(variable)]
    dataset = height.set_coords(crs)
    if not dataset.data_vars:
        raise StoreError(
            "at least one variable", "a Dataset of none", "write what predict() returned"
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
            "at least one pixel and one date",
            f"sizes {dict(dataset.sizes)}",
            "widen the selection",
        )


def _with_coordinates_in_memory(dataset: xr.Dataset, date_dim: str | None) -> xr.Dataset:
    """Compute coordinates; what depends on date and place at once is data."""
    mixed = [str(n) for n, c in dataset.coords.items() if c.ndim > 1 and date_dim in c.dims]
    if mixed:
        raise StoreError(
            f"coordinates along {date_dim} alone, or along y and x alone",
            f"{mixed} with dims {dataset[mixed[0]].dims}",
            f"write them as variables, height.reset_coords({mixed}), or leave them out",
        )
    return dataset.assign_coords({name: c.compute() for name, c in dataset.coords.items()})


def _in_equal_blocks(dataset: xr.Dataset, dims: tuple[str, str]) -> xr.Dataset:
    """Chunk what is in memory, and make the chunks along y and x equal but for the last."""
    variables = {name: v.variable for name, v in dataset.data_vars.items()}
    lazy = [v for v in variables.values() if v.chunks is not None]
    if lazy:
        sizes: dict[Any, Any] = dict(xr.unify_chunks(*map(xr.DataArray, lazy))[0].chunksizes)
    else:
        sizes = {dim: defaults.BLOCK if dim in dims else 1 for dim in dataset.dims}
    for dim in dims:
        found = sizes[dim]
        if lazy and (len(set(found[:-1])) > 1 or found[-1] > found[0]):
            sizes[dim] = max(found)
    return dataset.assign({name: variable.chunk(sizes) for name, variable in variables.items()})


def _validate_labels(cube: Cube) -> None:
    labels = cube.labels
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise StoreError(
            f"every {cube.date_dim} once",
            f"{twice[0]} {labels.count(twice[0])} times",
            f"combine them first, for example height.groupby({cube.date_dim!r}).max(), or load "
            "with groupby='solar_day'",
        )
    if "NaT" in labels:
        raise StoreError(
            f"a date for every {cube.date_dim}",
            "NaT",
            f"leave it out: height.sel({cube.date_dim}=height.{cube.date_dim}.notnull())",
        )


def _validate_dates(dataset: xr.Dataset, date_dim: str) -> None:
    """Check that the dates are of a kind that a store can hold and compare."""
    dates = dataset[date_dim]
    text = dates.dtype.kind in "UT" or all(isinstance(value, str) for value in dates.values)
    if dates.dtype.kind not in "Miuf" and not text:
        raise StoreError(
            f"{date_dim} as dates without time zone, numbers or text",
            f"{dates.dtype} of {type(dates.values[0]).__name__}",
            "for example height.convert_calendar('standard', use_cftime=False), or "
            f"height.assign_coords({date_dim}=pandas.to_datetime([...]))",
        )


def _chunk(side: int) -> int:
    """Largest equal part of a block that is not too long, if one is near; else the block."""
    parts = range(-(-side // _LONGEST_CHUNK), 4 * side // _LONGEST_CHUNK + 1)
    return next((side // n for n in parts if side % n == 0), side)
