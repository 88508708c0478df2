"""Text and HTML for representations: sizes, durations, and tables of named properties."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
import xarray as xr

from xchmv2.raster.crs import crs_label

#: Name and value of a property.
Row = tuple[str, str]

_WIDTH = 100
# Colours of JupyterLab and VS Code, readable in light and dark themes; else those of the page.
_INK = "var(--jp-content-font-color1, var(--vscode-foreground, inherit))"
_LINE = "var(--jp-border-color2, rgba(128, 128, 128, 0.4))"
_STEPS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def as_text(title: str, rows: Sequence[Row]) -> str:
    """Write a title and rows of text with aligned values, wrapped to 100 columns."""
    left = max(len(name) for name, _ in rows) + 4
    lines = [title]
    for name, value in rows:
        lines += textwrap.wrap(
            value,
            _WIDTH,
            initial_indent=f"  {name}".ljust(left),
            subsequent_indent=" " * left,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def as_html(title: str, rows: Sequence[Row], picture: str = "") -> str:
    """Write a title and rows as HTML; everything but ``picture``, shown beside them, is escaped.

    One ``div`` with inline styles and no script.
    """
    cell = f"text-align: left; vertical-align: top; padding: 2px 8px; color: {_INK};"
    body = "".join(
        f'<tr style="background: transparent;"><th style="{cell} font-weight: 600;">'
        f'{escape(name)}</th><td style="{cell}">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return (
        f'<div style="color: {_INK}; border: 1px solid {_LINE}; padding: 8px; max-width: 60em;">'
        f'<div style="font-weight: 600; padding: 0 8px 4px;">{escape(title)}</div>'
        f'<div style="display: flex; gap: 12px; align-items: flex-start;">'
        f'<table style="border-collapse: collapse; margin: 0;">{body}</table>{picture}</div></div>'
    )


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
    """Write a duration in its one or two largest units."""
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
    """Write the sides of a pixel [m], as one number if they are equal."""
    tall, wide = (f"{side:.3g}" for side in pixel)
    return f"{tall} m" if tall == wide else f"{tall} x {wide} m"


def write_share(part: int, whole: int) -> str:
    """Write a part of a whole in percent."""
    return f"{100 * part / whole:.3g} %"


def write_crs(crs: Any) -> str | None:
    """Name a CRS by its EPSG code, else by its own name; None without a CRS."""
    return None if crs is None else crs_label(crs)


def find_period(array: xr.DataArray) -> tuple[str, str] | None:
    """Find the first and the last date of an array; None if no dim has dates."""
    for index in array.indexes.values():
        if isinstance(index, pd.DatetimeIndex | xr.CFTimeIndex) and len(index):
            return str(index.min())[:10], str(index.max())[:10]
    return None


def write_period(period: Sequence[str] | None) -> str:
    """Write a period by its first and last day, or the one day if they are equal."""
    return "" if period is None else " to ".join(dict.fromkeys(period))
