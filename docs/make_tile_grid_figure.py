"""Draw docs/images/tile_grid.png: tiles, blocks and groups, blending weights, two areas.

Run from the repository root: ``python docs/make_tile_grid_figure.py`` (a few seconds; needs
matplotlib and pillow). Everything drawn comes out of ``xchmv2.raster.tiling``, with the
default tile and overlap.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from xchmv2.model.files import OVERLAP, TILE
from xchmv2.raster import TileAxis, tile_runs

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

OUT = Path(__file__).parent / "images" / "tile_grid.png"
BLOCK = 1024
STRIDE = TILE - OVERLAP
#: An image that whole tiles cover, four by five of them; a multiple of the stride from the origin.
ROWS = TileAxis(4 * STRIDE + OVERLAP, TILE, OVERLAP, origin=13 * STRIDE)
COLS = TileAxis(5 * STRIDE + OVERLAP, TILE, OVERLAP, origin=26 * STRIDE)
#: The same ground, from an area of interest that begins and ends elsewhere.
OTHER = TileAxis(1980, TILE, OVERLAP, origin=10_270)

#: Colour of a tile by the number of blocks that it reaches into.
GROUPS = {1: "#4c9f70", 2: "#e08e2b", 4: "#b03a5b"}
NAMES = {1: "inside one block", 2: "on a border of two", 4: "on a corner of four"}


def draw_plan(axis: Any) -> None:
    """Draw tiles as squares a little smaller than they are, to tell neighbours apart."""
    for rows in tile_runs(ROWS, BLOCK):
        for cols in tile_runs(COLS, BLOCK):
            colour = GROUPS[len(rows.blocks) * len(cols.blocks)]
            for top in ROWS.starts[rows.first : rows.last + 1]:
                for left in COLS.starts[cols.first : cols.last + 1]:
                    square = Rectangle(
                        (left + 8, top + 8), COLS.tile - 16, ROWS.tile - 16,
                        facecolor=mpl.colors.to_rgba(colour, 0.25), edgecolor=colour, linewidth=1.6,
                    )  # fmt: skip
                    axis.add_patch(square)
    for edge in range(0, COLS.size, BLOCK):
        axis.plot((edge, edge), (0, ROWS.size), color="black", linewidth=2.2)
    for edge in range(0, ROWS.size, BLOCK):
        axis.plot((0, COLS.size), (edge, edge), color="black", linewidth=2.2)
    axis.add_patch(Rectangle((0, 0), COLS.size, ROWS.size, fill=False, linewidth=2.2))
    axis.set_xlim(-30, COLS.size + 30)
    axis.set_ylim(ROWS.size + 30, -30)
    axis.set_aspect("equal")
    axis.set_xlabel("column [px]")
    axis.set_ylabel("row [px]")
    axis.set_title(f"tiles of {COLS.tile} px, blocks of {BLOCK} px (black)")
    entries = [
        Patch(facecolor=mpl.colors.to_rgba(colour, 0.25), edgecolor=colour, label=NAMES[count])
        for count, colour in GROUPS.items()
    ]
    axis.legend(
        handles=entries,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=3,
        frameon=False,
        columnspacing=1,
        handlelength=1.4,
    )


def draw_weights(axis: Any) -> None:
    """Draw each column of tiles as a curve, and their sum."""
    total = np.zeros(COLS.size)
    for start, stop, weights in zip(COLS.starts, COLS.stops, COLS.weights, strict=True):
        axis.plot(np.arange(start, stop), weights, linewidth=1.8)
        total[start:stop] += weights
    axis.plot(total, color="black", linewidth=1.2, linestyle=":")
    axis.set_xlim(-30, COLS.size + 30)
    axis.set_ylim(0, 1.1)
    axis.set_xlabel("column [px]")
    axis.set_ylabel("weight")
    axis.set_title("blending weights of one row; dotted: their sum")


def draw_areas(axis: Any) -> None:
    """Draw the tiles of two areas of interest where they lie on the ground."""
    for height, area in ((1, COLS), (0, OTHER)):
        ends = (area.origin, area.origin + area.size)
        axis.plot(ends, (height - 0.33, height - 0.33), color="black", linewidth=3)
        for index, (start, stop) in enumerate(zip(area.starts, area.stops, strict=True)):
            inward = (start + area.origin) % area.stride != 0
            colour = "#8a8a8a" if inward else "#3b6fb6"
            square = Rectangle(
                (start + area.origin, height - 0.2 + 0.27 * (index % 2)), stop - start, 0.22,
                facecolor=mpl.colors.to_rgba(colour, 0.35), edgecolor=colour, linewidth=1.5,
            )  # fmt: skip
            axis.add_patch(square)
    axis.set_yticks([0, 1], ["area B", "area A"])
    axis.set_ylim(-0.55, 1.5)
    axis.set_xlabel("column, counted from the CRS origin [px]")
    axis.set_title("two areas of interest on the same ground")
    entries = [
        Patch(facecolor="#3b6fb659", edgecolor="#3b6fb6", label="at a multiple of the stride"),
        Patch(facecolor="#8a8a8a59", edgecolor="#8a8a8a", label="moved inward"),
    ]
    axis.legend(
        handles=entries, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2, frameon=False
    )


def main() -> None:
    """Draw the three pictures, and write them with a palette to keep the file small."""
    figure = plt.figure(figsize=(10, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    draw_plan(left.subplots())
    above, below = right.subplots(2, 1)
    draw_weights(above)
    draw_areas(below)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=140, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
