"""Named facts as aligned text and as a small table for notebooks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

#: What a fact is called, and what it says.
Row = tuple[str, str]

_WIDTH = 100
# JupyterLab's and VS Code's own colours, so that both themes are readable; else the page's.
_INK = "var(--jp-content-font-color1, var(--vscode-foreground, inherit))"
_LINE = "var(--jp-border-color2, rgba(128, 128, 128, 0.4))"


def as_text(title: str, rows: Sequence[Row]) -> str:
    """Write a title and rows of text, values aligned.

    Parameters
    ----------
    title : str
        One line.
    rows : sequence of (name, value)
        Long values are wrapped to 100 columns.

    Returns
    -------
    str
        Without a newline at the end.
    """
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
    """Write the same as HTML; everything but ``picture`` is escaped.

    Parameters
    ----------
    title : str
        Heading.
    rows : sequence of (name, value)
        Cells of the table.
    picture : str, optional
        HTML or SVG to stand beside it.

    Returns
    -------
    str
        One ``div`` that brings its own style and no script.
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
