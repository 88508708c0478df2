"""Draw docs/images/architecture.png: the rooms of the package and which imports which.

Run from the repository root: ``python docs/make_architecture_figure.py`` (a second; needs
matplotlib and pillow). ``tests/structure.py`` reads the imports from the code, and a room stands
one floor above the highest room that it imports. A room that has no column here, or an import that
points up, is an error.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "images" / "architecture.png"

sys.path.append(str(ROOT / "tests"))
import structure  # noqa: E402

#: Rooms that every room may import, and the package's own doors: left out of the figure.
EVERYWHERE = {"xchmv2", "__main__", "_version", "errors"}

#: Column of each room, and its subject.
ROOMS: dict[str, tuple[float, str]] = {
    "cli": (0.4, "commands"),
    "datasets": (5.2, "synthetic forest"),
    "demo": (3.2, "demonstration"),
    "accessor": (5.6, ".chmv2"),
    "store": (3.7, "Zarr, GeoTIFF"),
    "training": (1.5, "fine-tuning"),
    "plotting": (7.6, "figures, maps"),
    "predict": (1.7, "graph, plan"),
    "stac": (0.0, "load()"),
    "zonal": (9.6, "polygons"),
    "inference": (2.3, "one window"),
    "imagery": (0.4, "bands, values"),
    "published": (4.2, "global map"),
    "structure": (6.1, "cover, gaps"),
    "validation": (8.0, "lidar, GEDI"),
    "change": (9.9, "two dates or more"),
    "model": (2.3, "pure PyTorch"),
    "raster": (5.6, "grid, areas, patches"),
}
COLOURS = {
    "#dbe7f5": "cli datasets demo accessor",
    "#d9ecdf": "store training predict stac published imagery",
    "#fbe3cd": "plotting zonal structure validation change",
    "#e7e0f2": "inference model raster",
}
LEGEND = {
    "#dbe7f5": "entry points",
    "#d9ecdf": "imagery, prediction, storage",
    "#fbe3cd": "analysis of heights",
    "#e7e0f2": "foundations",
}
SIZE = (1.6, 0.56)


def read_imports() -> dict[str, set[str]]:
    """Which room imports which, without those that every room may import.

    Raises
    ------
    ValueError
        If imports form a circle or point up.
    """
    rooms = structure.read_rooms(structure.read_modules())
    if wrong := structure.find_circle(rooms) or structure.upward_arrows(rooms):
        raise ValueError(f"these imports do not point down: {wrong}")
    return {room: rooms[room] - EVERYWHERE for room in rooms.keys() - EVERYWHERE}


def arrows(imports: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Leave out imports that others imply: no arrow to what the end of another arrow imports.

    Raises
    ------
    ValueError
        If a room has no column.
    """
    unplaced = set(imports) ^ set(ROOMS)
    if unplaced:
        raise ValueError(f"give these rooms a column, or remove it: {sorted(unplaced)}")
    return {
        (room, below)
        for room, rooms in imports.items()
        for below in rooms
        if not any(below in structure.reaches(imports, other) for other in rooms)
    }


def main() -> None:
    """Draw boxes and arrows, and write the picture with a palette to keep it small."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch, Patch
    from PIL import Image

    figure, axis = plt.subplots(figsize=(9.6, 8.2), layout="constrained")
    width, height = SIZE
    imports = read_imports()
    floors = structure.count_floors(imports)
    places = {room: (ROOMS[room][0], float(floors[room])) for room in imports}
    for above, below in sorted(arrows(imports)):
        (x0, y0), (x1, y1) = places[above], places[below]
        axis.annotate(
            "",
            (x1, y1 + height / 2 + 0.02),
            (x0, y0 - height / 2),
            arrowprops={"arrowstyle": "-|>", "color": "#7a7a7a", "lw": 1.1, "shrinkA": 0},
            zorder=1,
        )
    colours = {room: colour for colour, rooms in COLOURS.items() for room in rooms.split()}
    for room, (x, y) in sorted(places.items()):
        corner = (x - width / 2, y - height / 2)
        box = FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.09",
            facecolor=colours[room], edgecolor="#555555", linewidth=0.9, zorder=2,
        )  # fmt: skip
        axis.add_patch(box)
        style: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 3}
        axis.text(x, y + 0.12, room, fontsize=11, **style)
        axis.text(x, y - 0.15, ROOMS[room][1], fontsize=7.8, color="#444444", **style)
    axis.set_xlim(-0.9, 10.8)
    axis.set_ylim(0.6, max(floors.values()) + 0.5)
    axis.set_axis_off()
    entries = [Patch(facecolor=c, edgecolor="#555555", label=text) for c, text in LEGEND.items()]
    axis.legend(handles=entries, loc="upper right", frameon=False, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=140, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
