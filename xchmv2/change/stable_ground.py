"""Offset of dates on stable ground, and its NMAD: :func:`stable_bias`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import erf, ndtri

from xchmv2.change.alignment import find_reference
from xchmv2.change.dates import ComparisonWarning, list_dates
from xchmv2.errors import CHMv2Error, warn
from xchmv2.raster import (
    Raster,
    label_quantity,
    on_same_grid,
    read_heights,
    spatial_dims,
    validate_flags,
)

_Floats = npt.NDArray[np.float64]


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
        the reference on stable ground (positive: this date is higher); ``nmad`` [m], the scatter
        of single pixels about it; and ``stable_pixels``. dask-backed if the heights are:
        nothing is computed.

    Raises
    ------
    CHMv2Error
        If there are no dates or no such date, grids differ, `stable` is not a mask, or a date in
        memory has heights but no stable pixel.

    Warns
    -----
    ComparisonWarning
        If a date in memory has no heights at all. Its offset is NaN, as is that of any dask-backed
        date without a stable pixel, and so are its heights.

    Notes
    -----
    Without `stable`, pixels count if they are canopy, above 2 m, on both dates. Open ground is 0 m
    on every date and says nothing about the errors of tree heights; it counts only where less
    than 2 % is canopy. Starting from the middle of the shortest interval that holds a third of the
    differences, those within 3 NMAD of the median are kept, until nothing changes any more.

    This assumes that at least two thirds of the canopy on both dates is stable, and that its
    differences are alike. Two consequences: growth that all trees share is part of the offset and
    removed with it, so pass `stable` (roads, roofs, mature stands) where growth matters; and an
    error that depends on height or place remains. All valid pixels of a given `stable` count.

    The offset is removed from all pixels, open ground too, and heights are not clipped at 0: with a
    positive offset, ground that was 0 m becomes negative.

    Differences are counted to 0.01 m, so the result is the same for any chunking.

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
            "stable as a boolean DataArray, True on stable ground",
            f"{kind}",
            "pass such as stable=(land_cover == 3)",
        )
    if set(stable.dims) != set(like.dims):
        extra = next((dim for dim in stable.dims if dim not in like.dims), "time")
        raise CHMv2Error(
            f"a mask of dims {like.dims}",
            f"dims {stable.dims}",
            f"choose one date of it: stable.isel({extra}=0)",
        )
    return on_same_grid(stable, like).transpose(*like.dims)


def _require_stable(found: list[Any], array: xr.DataArray, dim: str | None, *, own: bool) -> None:
    """Refuse dates with heights but no stable pixel; warn of dates without heights."""
    unknown = [k for k, measured in enumerate(found) if not measured[2]]
    if not unknown:
        return
    if dim is None or len(found) - len(unknown) <= own:  # the reference itself does not count
        raise nothing_stable()
    named = list_dates(array.isel({dim: unknown}), dim)
    if bool(np.isfinite(array.isel({dim: unknown}).values).any()):
        raise nothing_stable(f"the reference and on {named}")
    warn(f"there are no heights on {named}, so their offset is unknown", ComparisonWarning)


def nothing_stable(dates: str = "both dates") -> CHMv2Error:
    """Return the error for dates without stable pixels."""
    return CHMv2Error(
        f"no pixel is valid and stable on {dates}",
        fix="pass other dates, or stable= with ground that has heights on both",
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
    """Remove the offsets from the heights."""
    words = {"long_name": "removed offset", "units": "m"}
    removed = xr.DataArray(offset, dims=() if dim is None else (dim,))
    corrected = (array - removed).astype(array.dtype).transpose(*array.dims)
    labelled = label_quantity(corrected, str(array.name or "height"), array.attrs)
    labelled = labelled.assign_coords(removed_offset=(removed.dims, offset, words))
    if isinstance(height, xr.Dataset):
        return height.assign({array.name: labelled})
    return labelled.rename(array.name)


#: Canopy is above this on both dates, open ground is not [m].
CANOPY = 2.0
#: Least share of the pixels for an NMAD of canopy, or of open ground, of its own.
_LEAST_SHARE = 0.02
#: Pixels within this many NMAD of the median are stable.
_CLIP = 3.0

_KINDS = 3  # of pixels: ground on both dates, canopy on one, canopy on both
_RANGE, _STEP = 150.0, 0.01  # of the differences that are counted [m]
_BINS = round(2 * _RANGE / _STEP) + 1
_CENTRES = np.linspace(-_RANGE, _RANGE, _BINS)
#: From a median absolute deviation to the standard deviation of a normal distribution ...
_TO_SD = 1 / float(ndtri(0.75))
_THIRD_TO_SD = 1 / float(ndtri(2 / 3))
#: ... and of one that was cut off on both sides at CLIP standard deviations.
_CLIPPED_TO_SD = 1 / float(ndtri((1 + 0.5 * float(erf(_CLIP / np.sqrt(2)))) / 2))


@dataclass(frozen=True)
class _Spread:
    """Difference of two dates on stable ground.

    Parameters
    ----------
    offset : float
        Median of the differences [m].
    nmad : float
        1.4826 times the median absolute deviation from it [m].
    pixels : int
        Pixels that count as stable.
    """

    offset: float
    nmad: float
    pixels: int


class StableGround(NamedTuple):
    """The results of :func:`measure_spread`, in this order.

    Parameters
    ----------
    offset, nmad : float
        Median difference on stable ground, and the scatter of single pixels about it [m].
    pixels : float
        Pixels that count as stable.
    ground_nmad : float
        The same scatter where both dates show open ground [m]; `nmad` if not measured apart.
    """

    offset: Any
    nmad: Any
    pixels: Any
    ground_nmad: Any


def measure_spread(
    before: xr.DataArray, after: xr.DataArray, stable: xr.DataArray | None = None
) -> Any:
    """Measure the difference of two dates on stable ground.

    Parameters
    ----------
    before, after : DataArray
        (y, x) heights [m].
    stable : DataArray of bool, optional
        (y, x) True on stable ground.

    Returns
    -------
    ndarray or dask array, shape (4,)
        The fields of :class:`StableGround`, of after minus before; NaN if there are no such pixels.
    """
    parts = [before.data, after.data] + ([] if stable is None else [stable.data])
    if not any(isinstance(part, da.Array) for part in parts):
        return _summarise(_count(*parts), stable is not None)
    first = next(part for part in parts if isinstance(part, da.Array))
    lazy = [_as_chunked(part, first) for part in parts]
    counts = da.map_blocks(
        _count_block,
        *lazy,
        chunks=((1,) * lazy[0].numblocks[0], (1,) * lazy[0].numblocks[1], (_KINDS,), (_BINS,)),
        new_axis=(2, 3),
        dtype=np.int64,
        meta=np.empty((0, 0, 0, 0), np.int64),
    ).sum(axis=(0, 1))
    return counts.rechunk(-1).map_blocks(
        _summarise,
        given=stable is not None,
        drop_axis=(0, 1),
        new_axis=0,
        chunks=(len(StableGround._fields),),
        dtype=np.float64,
        meta=np.empty(0, np.float64),
    )


def _as_chunked(part: Any, like: da.Array) -> da.Array:
    if not isinstance(part, da.Array):
        return da.from_array(part, chunks=like.chunks)
    return part.rechunk(like.chunks)


def _count(
    before: npt.NDArray[Any], after: npt.NDArray[Any], stable: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Count differences on open ground, between ground and canopy, and in canopy: (3, bins)."""
    change = after.astype(np.float64) - before
    known = np.isfinite(change) if stable is None else np.isfinite(change) & stable
    kind = (before[known] > CANOPY).astype(np.int64) + (after[known] > CANOPY)
    bins = np.rint((np.clip(change[known], -_RANGE, _RANGE) + _RANGE) / _STEP).astype(np.int64)
    counts = np.bincount(bins + _BINS * kind, minlength=_KINDS * _BINS)
    return counts.reshape(_KINDS, _BINS)


def _count_block(*parts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return _count(*parts)[None, None]


def _summarise(counts: npt.NDArray[np.int64], given: bool) -> _Floats:
    """Return the fields of StableGround from counts (3, bins)."""
    total, (ground, _, canopy) = counts.sum(), counts
    if not total:
        return np.array([np.nan, np.nan, 0.0, np.nan])
    of_canopy = not given and canopy.sum() >= _LEAST_SHARE * total
    chosen = canopy if of_canopy else counts.sum(axis=0)
    found = _plain_spread(chosen) if given else _clipped_spread(chosen)
    apart = of_canopy and ground.sum() >= _LEAST_SHARE * total
    # At least the width of a bin, and no more than canopy: open ground does not scatter more.
    of_ground = _clipped_spread(ground).nmad if apart else found.nmad
    ground_nmad = min(max(of_ground, _STEP), found.nmad)
    return np.array([found.offset, found.nmad, found.pixels, ground_nmad])


def _plain_spread(counts: npt.NDArray[np.int64]) -> _Spread:
    offset = _median(_CENTRES, counts)
    return _Spread(offset, _TO_SD * _deviation(counts, offset), int(counts.sum()))


def _clipped_spread(counts: npt.NDArray[np.int64]) -> _Spread:
    """Keep differences within some NMAD of the median, until nothing changes."""
    low, high = _shortest_third(counts)
    offset = (_CENTRES[low] + _CENTRES[high]) / 2
    nmad = max((_CENTRES[high] - _CENTRES[low] + _STEP) / 2 * _THIRD_TO_SD, _STEP)
    found = _Spread(offset, nmad, 0)
    for _ in range(50):
        inside = np.abs(_CENTRES - found.offset) <= max(_CLIP * found.nmad, _STEP)
        kept = np.where(inside, counts, 0)
        offset = _median(_CENTRES, kept)
        step = _Spread(offset, _CLIPPED_TO_SD * _deviation(kept, offset), int(kept.sum()))
        if step == found:
            break
        found = step
    return found


def _shortest_third(counts: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return first and last bin of the shortest run that holds a third of the counts."""
    total = np.concatenate([[0], np.cumsum(counts)])
    need = (total[-1] + 2) // 3
    ends = np.searchsorted(total, total[:-1] + need)  # first end that is far enough
    lengths = np.where(ends < len(total), ends - np.arange(len(counts)), len(total) + 1)
    shortest = np.flatnonzero(lengths == lengths.min())
    start = int(shortest[len(shortest) // 2])
    return start, int(ends[start]) - 1


def _median(values: _Floats, counts: npt.NDArray[np.int64]) -> float:
    """Return the median of ascending values with counts: exact up to the width of a bin."""
    total = np.cumsum(counts)
    low, high = np.searchsorted(total, [(total[-1] + 1) // 2, total[-1] // 2 + 1])
    return float((values[low] + values[high]) / 2)


def _deviation(counts: npt.NDArray[np.int64], offset: float) -> float:
    """Return the median absolute deviation from an offset."""
    apart = np.abs(_CENTRES - offset)
    order = np.argsort(apart, kind="stable")
    return _median(apart[order], counts[order])
