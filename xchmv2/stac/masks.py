"""Which values of a published mask mean a clear view."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import ImageryError
from xchmv2.stac.bands import BandInfo

#: Values that mean a clear view, or a function from the mask's values to booleans.
ClearValues = int | Sequence[int] | Callable[[xr.DataArray], xr.DataArray]

#: Masks published with values but without telling them in each item.
_KNOWN: dict[str, tuple[int, ...]] = {"cloud-mask-raster": (1,)}  # Maxar ARD: 2 cloud, 3 shadow
_CLEAR_NAMES = re.compile(r"clear|valid|alpha")
_NO_DATA = re.compile(r"no.?data|missing|fill|invalid|defective|unusable|saturated", re.IGNORECASE)
_FREE = re.compile(r"clear|free|(^|[^a-z])(no|not|non)[ _-]?(cloud|shadow)", re.IGNORECASE)
_VEILED = re.compile(r"cloud|shadow|cirrus|haze|fog|smoke", re.IGNORECASE)


@dataclass(frozen=True)
class ClearRule:
    """Tells clear pixels by the values of a mask.

    Parameters
    ----------
    values : tuple of int or None
        Values that mean clear; None: all but 0 and ``fill``.
    function : callable or None
        Tells them instead.
    fill : float
        Value where there is no mask.
    """

    values: tuple[int, ...] | None
    function: Callable[[xr.DataArray], xr.DataArray] | None
    fill: float

    def __call__(self, mask: xr.DataArray) -> xr.DataArray:
        """Turn a mask's values into booleans, lazily."""
        if self.values is not None:
            clear = mask.isin(self.values)
        elif self.function is None:
            clear = (mask != 0) & self._filled(mask)
        else:
            clear = self.function(mask)
            if np.dtype(getattr(clear, "dtype", float)).kind != "b" or clear.dims != mask.dims:
                raise ImageryError(
                    "clear_values to return booleans with the mask's own dims",
                    f"{getattr(clear, 'dtype', type(clear).__name__)} "
                    f"with dims {getattr(clear, 'dims', ())}",
                    "for example clear_values=lambda mask: (mask & 8) == 0",
                )
            clear = clear & self._filled(mask)
        return clear

    def _filled(self, mask: xr.DataArray) -> xr.DataArray:
        return mask.notnull() if np.isnan(self.fill) else mask != self.fill


def resolve_clear(
    name: str, info: BandInfo | None, dtype: str, nodata: float | None, values: ClearValues | None
) -> ClearRule:
    """Decide which values mean clear: the argument, else what the metadata tell beyond doubt.

    Parameters
    ----------
    name : str
        What the user calls the mask.
    info : BandInfo or None
        Its metadata.
    dtype : str
        Its data type.
    nodata : float or None
        Its declared nodata value.
    values : int, sequence of int or callable, optional
        The user's rule.

    Raises
    ------
    ImageryError
        If nothing tells.
    """
    if callable(values):
        return ClearRule(None, values, _unlikely(dtype) if nodata is None else nodata)
    if values is not None:
        return _by_values(tuple(np.atleast_1d(values).tolist()), dtype, nodata)
    if info is not None and info.classes:
        return _by_values(_clear_classes(info), dtype, nodata)
    if name in _KNOWN:
        return _by_values(_KNOWN[name], dtype, nodata)
    words = [name.lower(), *(info.words if info else ())]
    if any(_CLEAR_NAMES.search(word) for word in words) and not any(map(_VEILED.search, words)):
        return ClearRule(None, None, 0 if nodata is None else nodata)
    raise ImageryError(
        "the values of the mask that mean a clear view",
        f"nothing about them in the metadata of {name!r}",
        "say which: xchmv2.load(..., clear_values=0), a tuple of values, or a function",
    )


def _by_values(values: tuple[int, ...], dtype: str, nodata: float | None) -> ClearRule:
    if nodata is not None:
        return ClearRule(values, None, nodata)
    return ClearRule(values, None, 0 if 0 not in values else _unlikely(dtype, values))


def _clear_classes(info: BandInfo) -> tuple[int, ...]:
    """Classes that are neither cloud nor shadow nor missing."""
    clear = tuple(
        int(entry["value"]) for entry in info.classes if "value" in entry and _is_clear(entry)
    )
    if not clear:
        raise ImageryError(
            "a mask with a class for a clear view",
            f"classes {[str(entry.get('name')) for entry in info.classes]}",
            "say which values are clear: xchmv2.load(..., clear_values=...)",
        )
    return clear


def _is_clear(entry: Any) -> bool:
    name = str(entry.get("name") or entry.get("description") or "")
    if entry.get("nodata") or _NO_DATA.search(name):
        return False
    return bool(_FREE.search(name)) or not _VEILED.search(name)


def _unlikely(dtype: str, but: Sequence[int] = ()) -> float:
    """Find a value that the mask hardly uses: the largest that means nothing else."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return float("nan")
    largest = int(np.iinfo(kind).max)
    return float(next(largest - step for step in range(largest) if largest - step not in but))
