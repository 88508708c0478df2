"""Ground that did not change: what dates differ by there, and how much they scatter."""

from __future__ import annotations

import warnings
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.change.align import find_reference
from xchmv2.change.conditions import ComparisonWarning
from xchmv2.change.dates import list_dates
from xchmv2.change.spread import StableGround, measure_spread
from xchmv2.errors import CHMv2Error
from xchmv2.heights import (
    Raster,
    on_same_grid,
    read_heights,
    spatial_dims,
)
from xchmv2.labels import label_quantity

Floats = npt.NDArray[np.float64]


def stable_bias(
    height: Raster,
    stable: xr.DataArray | None = None,
    *,
    to: Any = None,
    apply: bool = True,
) -> xr.DataArray | xr.Dataset:
    """Tell what dates differ by on ground that did not change, and take it out.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m], or a Dataset with ``canopy_height``, of which only that changes.
        One date without a dim needs `to`.
    stable : DataArray of bool, optional
        (y, x) True where nothing changed, on the same grid. By default it is found, see below.
    to : label or DataArray, optional
        What to compare with: one of the dates, the first by default, or heights (y, x) on the
        same grid, such as lidar.
    apply : bool, default True
        Whether to take the offset out, or only to tell it.

    Returns
    -------
    DataArray or Dataset
        The heights less the offset of their date, which is in the coordinate
        ``removed_offset`` [m].

        With ``apply=False`` a Dataset along time of ``offset`` [m], the median difference from
        the reference on stable ground (positive: this date is higher); ``nmad`` [m], how much
        single pixels scatter about it; and ``stable_pixels``. dask-backed if the heights are:
        nothing is computed.

    Raises
    ------
    CHMv2Error
        If there are no dates or no such date, grids differ, `stable` is no mask, or a date in
        memory has heights but no stable pixel.

    Warns
    -----
    ComparisonWarning
        If a date in memory has no heights at all. Its offset is NaN, as is that of any dask-backed
        date without a stable pixel, and so are its heights.

    Notes
    -----
    Without `stable`, pixels count if they are canopy, above 2 m, on both dates. Open ground is 0 m
    on every date and would tell nothing of how heights of trees scatter; it counts only where less
    than 2 % is canopy. Starting from the middle of the shortest interval that holds a third of the
    differences, those within 3 NMAD of the median are kept, until nothing changes any more.

    That assumes that of what is canopy on both dates two thirds or more did not change, and that
    what did not change is alike. Two consequences: growth that all trees share is part of the
    offset, and so is taken out with it, so where growth matters pass `stable` (roads, roofs, mature
    stands); and an error that depends on height or place remains. With `stable` all its valid
    pixels count.

    The offset is taken out of all pixels, open ground too, and heights are not cut off at 0: with a
    positive offset ground that was 0 m becomes negative.

    Differences are counted to 0.01 m, so the result is the same for any chunking.
    """
    array = read_heights(height)
    reference, dim = find_reference(array, to)
    dims = spatial_dims(array)
    mask = None if stable is None else read_mask(stable, reference)
    planes = [array] if dim is None else [array.isel({dim: k}) for k in range(array.sizes[dim])]
    found = [measure_spread(reference, plane.transpose(*dims), mask) for plane in planes]
    lazy = _is_lazy(found)
    if not lazy:
        _require_stable(found, array, dim, own=not isinstance(to, xr.DataArray))
    table = da.stack if lazy else np.stack
    columns = table(found)  # [time, 4]
    if dim is None:
        columns = columns[0]
    measured = StableGround(*(columns[..., k] for k in range(len(StableGround._fields))))
    if not apply:
        return _report(measured, array, dim)
    return _correct(height, array, measured.offset, dim)


def read_mask(stable: xr.DataArray, like: xr.DataArray) -> xr.DataArray:
    """Check a mask of stable ground."""
    if not isinstance(stable, xr.DataArray) or stable.dtype != bool:
        kind = stable.dtype if isinstance(stable, xr.DataArray) else type(stable).__name__
        raise CHMv2Error(
            "stable as a DataArray of True and False", f"{kind}", "pass stable=(land_cover == 3)"
        )
    if set(stable.dims) != set(like.dims):
        raise CHMv2Error(
            f"a mask of dims {like.dims}", f"dims {stable.dims}", "choose one date of it: .isel()"
        )
    return on_same_grid(stable, like).transpose(*like.dims)


def _require_stable(found: list[Any], array: xr.DataArray, dim: str | None, *, own: bool) -> None:
    """Refuse dates with heights but no stable pixel; warn of those that have no heights."""
    unknown = [k for k, measured in enumerate(found) if not measured[2]]
    if not unknown:
        return
    if dim is None or len(found) - len(unknown) <= own:  # the reference itself tells nothing
        raise nothing_stable()
    named = list_dates(array.isel({dim: unknown}), dim)
    if bool(np.isfinite(array.isel({dim: unknown}).values).any()):
        raise nothing_stable(f" on {named}")
    warnings.warn(f"no heights on {named}: no offset there", ComparisonWarning, stacklevel=3)


def nothing_stable(where: str = "") -> CHMv2Error:
    """Say that no pixel tells what dates differ by."""
    return CHMv2Error(
        "pixels that are valid on both dates and did not change",
        f"none{where}",
        "pass other dates, or stable= with ground that has heights on both",
    )


def _is_lazy(found: list[Any]) -> bool:
    return any(dask.is_dask_collection(item) for item in found)


def _report(measured: StableGround, array: xr.DataArray, dim: str | None) -> xr.Dataset:
    named = {
        "offset": (measured.offset, "median difference on stable ground", "m"),
        "nmad": (measured.nmad, "NMAD of the difference on stable ground", "m"),
        "stable_pixels": (measured.pixels, "pixels that did not change", "1"),
    }
    dims = () if dim is None else (dim,)
    coords = {} if dim is None or dim not in array.coords else {dim: array[dim].variable}
    variables = {
        name: (dims, values, {"long_name": words, "units": units})
        for name, (values, words, units) in named.items()
    }
    return xr.Dataset(variables, coords)


def _correct(height: Raster, array: xr.DataArray, offset: Any, dim: str | None) -> Raster:
    """Take the offsets out of the heights."""
    words = {"long_name": "offset that was taken out", "units": "m"}
    removed = xr.DataArray(offset, dims=() if dim is None else (dim,))
    corrected = (array - removed).astype(array.dtype).transpose(*array.dims)
    labelled = label_quantity(corrected, str(array.name or "height"), array.attrs)
    labelled = labelled.assign_coords(removed_offset=(removed.dims, offset, words))
    if isinstance(height, xr.Dataset):
        return height.assign({array.name: labelled})
    return labelled.rename(array.name)
