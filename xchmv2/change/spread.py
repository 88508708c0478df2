"""How far heights of two dates lie apart where nothing changed, by counts of their differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import erf, ndtri

Floats = npt.NDArray[np.float64]

#: Canopy, as against open ground: above this on both dates [m].
CANOPY = 2.0
#: With this share of the pixels, canopy or open ground tells how heights scatter there.
LEAST_SHARE = 0.02
#: Pixels within so many NMAD of the median did not change.
CLIP = 3.0

_KINDS = 3  # of pixels: ground on both dates, canopy on one, canopy on both
_RANGE, _STEP = 150.0, 0.01  # of the differences that are counted [m]
_BINS = round(2 * _RANGE / _STEP) + 1
_CENTRES = np.linspace(-_RANGE, _RANGE, _BINS)
#: From a median absolute deviation to the standard deviation of a normal distribution ...
_TO_SD = 1 / float(ndtri(0.75))
_THIRD_TO_SD = 1 / float(ndtri(2 / 3))
#: ... and of one that was cut off on both sides at CLIP standard deviations.
_CLIPPED_TO_SD = 1 / float(ndtri((1 + 0.5 * float(erf(CLIP / np.sqrt(2)))) / 2))


@dataclass(frozen=True)
class Spread:
    """What two dates differ by on stable ground.

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
    """What :func:`measure_spread` measures, in this order.

    Parameters
    ----------
    offset, nmad : float
        Median difference on stable ground, and how much single pixels scatter about it [m].
    pixels : float
        Pixels that count as stable.
    ground_nmad : float
        The same scatter where both dates show open ground [m]; `nmad` where it is not told apart.
    """

    offset: Any
    nmad: Any
    pixels: Any
    ground_nmad: Any


def measure_spread(
    before: xr.DataArray, after: xr.DataArray, stable: xr.DataArray | None = None
) -> Any:
    """Measure what two dates differ by on stable ground.

    Parameters
    ----------
    before, after : DataArray
        (y, x) heights [m].
    stable : DataArray of bool, optional
        (y, x) True where nothing changed.

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


def _summarise(counts: npt.NDArray[np.int64], given: bool) -> Floats:
    """Return the fields of StableGround from counts (3, bins)."""
    total, (ground, _, canopy) = counts.sum(), counts
    if not total:
        return np.array([np.nan, np.nan, 0.0, np.nan])
    of_canopy = not given and canopy.sum() >= LEAST_SHARE * total
    chosen = canopy if of_canopy else counts.sum(axis=0)
    found = _plain_spread(chosen) if given else _clipped_spread(chosen)
    apart = of_canopy and ground.sum() >= LEAST_SHARE * total
    # At least what is told apart, and no more than canopy: what scatters more is no open ground.
    of_ground = _clipped_spread(ground).nmad if apart else found.nmad
    ground_nmad = min(max(of_ground, _STEP), found.nmad)
    return np.array([found.offset, found.nmad, found.pixels, ground_nmad])


def _plain_spread(counts: npt.NDArray[np.int64]) -> Spread:
    offset = _median(_CENTRES, counts)
    return Spread(offset, _TO_SD * _deviation(counts, offset), int(counts.sum()))


def _clipped_spread(counts: npt.NDArray[np.int64]) -> Spread:
    """Keep what lies within some NMAD of the median, until nothing changes."""
    low, high = _shortest_third(counts)
    offset = (_CENTRES[low] + _CENTRES[high]) / 2
    nmad = max((_CENTRES[high] - _CENTRES[low] + _STEP) / 2 * _THIRD_TO_SD, _STEP)
    found = Spread(offset, nmad, 0)
    for _ in range(50):
        inside = np.abs(_CENTRES - found.offset) <= max(CLIP * found.nmad, _STEP)
        kept = np.where(inside, counts, 0)
        offset = _median(_CENTRES, kept)
        step = Spread(offset, _CLIPPED_TO_SD * _deviation(kept, offset), int(kept.sum()))
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


def _median(values: Floats, counts: npt.NDArray[np.int64]) -> float:
    """Return the median of ascending values with counts: exact up to the width of a bin."""
    total = np.cumsum(counts)
    low, high = np.searchsorted(total, [(total[-1] + 1) // 2, total[-1] // 2 + 1])
    return float((values[low] + values[high]) / 2)


def _deviation(counts: npt.NDArray[np.int64], offset: float) -> float:
    """Return the median absolute deviation from an offset."""
    apart = np.abs(_CENTRES - offset)
    order = np.argsort(apart, kind="stable")
    return _median(apart[order], counts[order])
