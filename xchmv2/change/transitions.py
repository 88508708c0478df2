"""Area that changed from one class of height to another: :func:`transition`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.change.dates import select_date
from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    Raster,
    cell_areas,
    label_quantity,
    list_items,
    on_same_grid,
    read_heights,
    require_plane,
    validate_numbers,
)

_Array = npt.NDArray[Any]

_HECTARE = 10_000.0
#: Class of pixels without a height.
_MISSING = "missing"


def transition(
    before: Raster, after: Raster, classes: Sequence[float], *, labels: Sequence[str] | None = None
) -> xr.DataArray:
    """Cross-tabulate two dates by class of height, in hectares.

    Parameters
    ----------
    before, after : DataArray or Dataset
        (y, x) heights [m] on the same grid, NaN where missing, or Datasets with
        ``canopy_height``.
    classes : sequence of float
        Ascending heights [m] that divide the classes, such as (2, 5, 20): a height on a boundary
        belongs to the class above it. n boundaries make n + 1 classes.
    labels : sequence of str, optional
        Names of the classes, one more than boundaries; by default such as "2 to 5 m".

    Returns
    -------
    DataArray
        ``transition``, float64 of dims (before, after): hectares, true on the ground; without a
        CRS the coordinates' own units squared over 10,000. The last class of each date
        is "missing", so that the sum is the raster. Lazy if heights are. ``.to_pandas()`` makes
        a table.

    Raises
    ------
    CHMv2Error
        If the boundaries do not ascend, labels do not fit, there is more than one date in either,
        or the grids differ.
    """
    bounds = validate_numbers("classes", classes, "(2, 5, 20)", ascending=True, unit="m")
    names = [*_names(bounds, labels), _MISSING]
    first = require_plane(read_heights(before), "before")
    second = require_plane(read_heights(after), "after")
    second = on_same_grid(second, first).transpose(*first.dims)
    areas = cell_areas(first)
    table = _tabulate(first, second, areas, bounds) / _HECTARE
    found = xr.DataArray(table, {"before": names, "after": names}, ("before", "after"))
    attrs = {"long_name": "area by class of canopy height before and after"}
    attrs |= {"units": "ha"} if areas.attrs.get("units") == "m2" else {}
    return label_quantity(found, "transition", attrs)


def transition_between(
    height: Raster,
    first: Any,
    second: Any,
    classes: Sequence[float],
    *,
    labels: Sequence[str] | None = None,
) -> xr.DataArray:
    """Cross-tabulate two dates of a cube, chosen by label, as in :func:`transition`.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m], or a Dataset with ``canopy_height``.
    first, second : str or datetime64
        Labels that mean one date each, such as "2019" where there is one date in 2019.
    classes, labels
        As for :func:`transition`.

    Returns
    -------
    DataArray
        As from :func:`transition`.

    Raises
    ------
    CHMv2Error
        If a label means no date or several; the message lists the dates.

    Examples
    --------
    >>> area = height.chmv2.transition("2019", "2024", classes=(2, 5, 15))
    >>> table = area.to_pandas()
    """
    before, after = (select_date(height, label) for label in (first, second))
    return transition(before, after, classes, labels=labels)


def _names(bounds: tuple[float, ...], labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        between = [f"{low:g} to {high:g} m" for low, high in pairwise(bounds)]
        return [f"under {bounds[0]:g} m", *between, f"{bounds[-1]:g} m or more"]
    names = [str(label) for label in list_items(labels) or ()]
    if len(names) != len(bounds) + 1 or len({*names, _MISSING}) != len(names) + 1:
        raise CHMv2Error(
            f"{len(bounds) + 1} different labels, none of them {_MISSING!r}",
            f"{names}",
            "name each class, the lowest and the highest included",
        )
    return names


def _tabulate(
    first: xr.DataArray, second: xr.DataArray, areas: xr.DataArray, bounds: tuple[float, ...]
) -> Any:
    if first.chunks is None and second.chunks is None:
        return _count(first.values, second.values, areas.values, bounds)[0, 0]
    lazy = first if first.chunks is not None else second
    planes = [da.asarray(array.data).rechunk(lazy.chunks) for array in (first, second, areas)]
    size = len(bounds) + 2
    shape = {"chunks": (1, 1, size, size), "new_axis": (2, 3), "meta": np.empty((0,) * 4)}
    parts = da.map_blocks(_count, *planes, bounds=bounds, **shape)
    return parts.sum(axis=(0, 1))


def _count(first: _Array, second: _Array, areas: _Array, bounds: tuple[float, ...]) -> _Array:
    """Task: the areas of one block by class before and after, (1, 1, before, after)."""
    size = len(bounds) + 2
    before, after = (
        np.where(np.isnan(height), size - 1, np.searchsorted(bounds, height, side="right"))
        for height in (first, second)
    )
    pairs = (before * size + after).ravel()
    found = np.bincount(pairs, areas.ravel(), minlength=size * size).astype(np.float64)
    return found.reshape(1, 1, size, size)
