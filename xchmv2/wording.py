"""How sizes, amounts and times are written for people; numbers in, short text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import xarray as xr

_STEPS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def write_sizes(sizes: Mapping[Any, int]) -> str:
    """Write dims and their sizes, such as ``time: 2, y: 100, x: 120``."""
    return ", ".join(f"{dim}: {size}" for dim, size in sizes.items())


def write_bytes(count: float) -> str:
    """Write an amount of memory in decimal units."""
    for step, unit in _STEPS:
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count:.0f} B"


def write_seconds(seconds: float) -> str:
    """Write a duration in the one or two units that matter."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min"
    return f"{round(hours / 24)} days"


def write_pixel(pixel: tuple[float, float]) -> str:
    """Write the sides of a pixel [m], once where they are equal."""
    tall, wide = (f"{side:.3g}" for side in pixel)
    return f"{tall} m" if tall == wide else f"{tall} x {wide} m"


def write_share(part: int, whole: int) -> str:
    """Write a part of a whole in percent."""
    return f"{100 * part / whole:.3g} %"


def write_crs(crs: Any) -> str | None:
    """Name a CRS by its EPSG code, else by its own name; None for none."""
    if crs is None:
        return None
    code = crs.to_epsg()
    return str(crs.proj.name) if code is None else f"EPSG:{code}"


def find_period(array: xr.DataArray) -> tuple[str, str] | None:
    """Find the first and the last day of an array's dates; None where no dim has dates."""
    for index in array.indexes.values():
        if isinstance(index, pd.DatetimeIndex | xr.CFTimeIndex) and len(index):
            return str(index.min())[:10], str(index.max())[:10]
    return None


def write_period(period: Sequence[str] | None) -> str:
    """Write days from the first to the last, once where they are one."""
    return "" if period is None else " to ".join(dict.fromkeys(period))
