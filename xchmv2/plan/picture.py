"""A small drawing of the grid: blocks, and the tiles on them."""

from __future__ import annotations

from collections.abc import Sequence

from xchmv2._dask import Job

_SIDE = 140
_MOST_LINES = 40


def draw_grid(job: Job) -> str:
    """Draw blocks as thick lines and tile starts as thin ones.

    Parameters
    ----------
    job : Job
        The grid; what has more than 40 lines along an axis is left out, as nobody could see it.

    Returns
    -------
    str
        SVG in the colour of the text around it.
    """
    height, width = job.rows.size, job.cols.size
    scale = _SIDE / max(height, width)
    size = (max(1.0, height * scale), max(1.0, width * scale))
    blocks = [[job.block * i for i in range(1, len(sizes))] for sizes in job.chunks]
    tiles = [axis.starts[1:] for axis in (job.rows, job.cols)]
    return (
        f'<svg width="{size[1] + 4:.0f}" height="{size[0] + 4:.0f}" '
        f'viewBox="-2 -2 {size[1] + 4:.1f} {size[0] + 4:.1f}" fill="none" stroke="currentColor" '
        f'style="flex: none;" role="img" aria-label="tiles and blocks">'
        f'<rect width="{size[1]:.1f}" height="{size[0]:.1f}" stroke-width="1.5"/>'
        f'<path d="{_lines(tiles, size, scale)}" stroke-width="0.5" stroke-opacity="0.45"/>'
        f'<path d="{_lines(blocks, size, scale)}" stroke-width="1.5"/></svg>'
    )


def _lines(places: Sequence[Sequence[int]], size: tuple[float, float], scale: float) -> str:
    """Lines across at rows, and down at columns, as an SVG path."""
    rows, cols = ([place * scale for place in along] for along in places)
    across = [f"M0 {y:.1f}H{size[1]:.1f}" for y in rows] if len(rows) <= _MOST_LINES else []
    down = [f"M{x:.1f} 0V{size[0]:.1f}" for x in cols] if len(cols) <= _MOST_LINES else []
    return "".join(across + down)
