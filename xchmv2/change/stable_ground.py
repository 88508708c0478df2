"""Offset of dates on stable ground: :func:`stable_bias`."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from xchmv2.change.alignment import find_reference
from xchmv2.change.dates import ComparisonWarning, list_dates
from xchmv2.change.error_models import measure_errors, nothing_stable, read_mask
from xchmv2.errors import warn
from xchmv2.raster import Raster, label_quantity, read_heights, spatial_dims, validate_flags

#: An offset that may be wrong by more than this is told [m].
_MOST_DOUBT = 0.25
_COLUMNS = ("offset", "offset_doubt", "nmad", "pixels")


def stable_bias(
    height: Raster,
    stable: xr.DataArray | None = None,
    *,
    to: Any = None,
    apply: bool = True,
) -> xr.DataArray | xr.Dataset:
    """Estimate each date's offset on stable ground and remove it.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m], or a Dataset with ``canopy_height``, of which only that changes.
        One date without a dim needs `to`.
    stable : DataArray of bool, optional
        (y, x) True on stable ground, on the same grid. By default it is found, see below.
    to : label or DataArray, optional
        The reference: one of the dates, the first by default, or heights (y, x) on the same
        grid, such as lidar.
    apply : bool, default True
        Whether to remove the offset, or only to report it.

    Returns
    -------
    DataArray or Dataset
        The heights less the offset of their date, which is in the coordinate
        ``removed_offset`` [m].

        With ``apply=False`` a Dataset along time of ``offset`` [m], the median difference from
        the reference on stable ground (positive: this date is higher); ``offset_doubt`` [m], how
        far it may be wrong; ``nmad`` [m], the scatter of single pixels about it; and
        ``stable_pixels``. dask-backed if the heights are: nothing is computed.

    Raises
    ------
    CHMv2Error
        If there are no dates or no such date, grids differ, `stable` is not a mask, or a date in
        memory has heights but no stable pixel.

    Warns
    -----
    ComparisonWarning
        If an offset may be wrong by more than 0.25 m; when values are read, if they are lazy. If a
        date in memory has no heights at all: its offset is NaN, as is that of any dask-backed date
        without a stable pixel, and so are its heights.

    Notes
    -----
    The offset is that of :class:`~xchmv2.change.ErrorModel`. Without `stable`, pixels count if
    they are canopy, above 2 m, on both dates: open ground is 0 m on every date and says nothing
    about the errors of tree heights; it counts only where less than 2 % is canopy. What did not
    change is told from what did by the shape of the differences' distribution, which works with up
    to about 35 % changed. It cannot where as many pixels rose as fell, or all grew alike: growth
    that all trees share is part of the offset and removed with it. So pass `stable` (roads, roofs,
    mature stands) where growth matters. All valid pixels of a given `stable` count. An error that
    depends on height or place remains.

    The offset is removed from all pixels, open ground too, and heights are not clipped at 0: with a
    positive offset, ground that was 0 m becomes negative.

    Differences are counted to 0.02 m, so the result is the same for any chunking. Pixels are
    read once more for it: store heights before that are still to be predicted.

    Examples
    --------
    >>> corrected = height.chmv2.stable_bias(roads)
    >>> offsets = height.chmv2.stable_bias(roads, apply=False)["offset"]
    """
    array = read_heights(height)
    reference, dim = find_reference(array, to)
    dims = spatial_dims(array)
    mask = None if stable is None else read_mask(stable, reference)
    validate_flags(apply=apply)
    planes = [array] if dim is None else [array.isel({dim: k}) for k in range(array.sizes[dim])]
    models = [measure_errors([(reference, plane.transpose(*dims))], mask) for plane in planes]
    dates = [
        None if dim is None else list_dates(array.isel({dim: [k]}), dim) for k in range(len(planes))
    ]
    columns = {name: [getattr(model, name) for model in models] for name in _COLUMNS}
    lazy = not all(model.computed for model in models)
    if not lazy:
        _require_stable(columns["pixels"], array, dim, own=not isinstance(to, xr.DataArray))
    told = zip(columns["offset"], columns["offset_doubt"], dates, strict=True)
    columns["offset"] = [_told(*each) for each in told]
    table = {name: da.stack(each) if lazy else np.array(each) for name, each in columns.items()}
    measured = {name: each if dim is not None else each[0] for name, each in table.items()}
    if not apply:
        return _report(measured, array, dim)
    return _correct(height, array, measured["offset"], dim)


def _require_stable(pixels: list[Any], array: xr.DataArray, dim: str | None, *, own: bool) -> None:
    """Refuse dates with heights but no stable pixel; warn of dates without heights."""
    unknown = [k for k, number in enumerate(pixels) if not number]
    if not unknown:
        return
    if dim is None or len(pixels) - len(unknown) <= own:  # the reference itself does not count
        raise nothing_stable()
    named = list_dates(array.isel({dim: unknown}), dim)
    if bool(np.isfinite(array.isel({dim: unknown}).values).any()):
        raise nothing_stable(f"the reference and on {named}")
    warn(f"there are no heights on {named}, so their offset is unknown", ComparisonWarning)


def _told(offset: Any, doubt: Any, date: str | None) -> Any:
    """Return an offset, with a warning where it may be wrong; lazily if it is."""
    if isinstance(offset, da.Array):
        return da.map_blocks(_told, offset, doubt, date, dtype=np.float64, meta=np.empty(()))
    if np.isfinite(offset) and not doubt <= _MOST_DOUBT:
        on = f" on {date}" if date else ""
        warn(
            f"the offset of {float(offset):.2f} m{on} may be wrong by {float(doubt):.2f} m: too "
            "little is stable, or its errors are alike over long distances; pass stable= with "
            "ground that did not change",
            ComparisonWarning,
        )
    return offset


def _report(measured: dict[str, Any], array: xr.DataArray, dim: str | None) -> xr.Dataset:
    named = {
        "offset": ("offset", "median difference on stable ground", "m"),
        "offset_doubt": ("offset_doubt", "largest likely error of the offset", "m"),
        "nmad": ("nmad", "NMAD of the difference on stable ground", "m"),
        "stable_pixels": ("pixels", "pixels that did not change", "1"),
    }
    dims = () if dim is None else (dim,)
    coords = {} if dim is None or dim not in array.coords else {dim: array[dim].variable}
    variables = {
        name: (dims, measured[column], {"long_name": words, "units": units})
        for name, (column, words, units) in named.items()
    }
    return xr.Dataset(variables, coords)


def _correct(height: Raster, array: xr.DataArray, offset: Any, dim: str | None) -> Raster:
    """Remove the offsets from the heights."""
    words = {"long_name": "removed offset", "units": "m"}
    removed = xr.DataArray(offset, dims=() if dim is None else (dim,))
    corrected = (array - removed).astype(array.dtype).transpose(*array.dims)
    labelled = label_quantity(corrected, str(array.name or "height"), array.attrs)
    labelled = labelled.assign_coords(removed_offset=(removed.dims, offset, words))
    if isinstance(height, xr.Dataset):
        return height.assign({array.name: labelled})
    return labelled.rename(array.name)
