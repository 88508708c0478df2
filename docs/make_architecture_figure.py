"""Draw docs/images/architecture.png: the rooms of the package and which imports which.

Run from the repository root: ``python docs/make_architecture_figure.py`` (a second; needs
matplotlib and pillow). Arrows are read from the code. A room that is not placed here, or an import
that would point up, is an error.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "xchmv2"
OUT = Path(__file__).parent / "images" / "architecture.png"

#: What every room may import, left out of the picture.
EVERYWHERE = {
    "__init__",
    "__main__",
    "_version",
    "bars",
    "defaults",
    "display",
    "errors",
    "wording",
}
#: Small modules of which the picture shows only what they import, for those who import them.
PASSED_THROUGH = {"labels", "nodata", "overview"}
#: Measures change on predicted forests; run as a command, imported by no one else.
MEASURING = {"change/evaluate.py", "change/scenarios.py"}

#: Centre of each room, in columns and rows from below; and what it is for.
PLACES: dict[str, tuple[float, float, str]] = {
    "cli": (3.0, 10, "commands"),
    "raster": (2.0, 9, "GeoTIFF out"),
    "demo": (3.8, 9, "the whole job"),
    "accessor": (6.0, 8, ".chmv2"),
    "benchmark": (-0.2, 7.4, "how fast"),
    "datasets": (1.0, 6.0, "synthetic forests"),
    "training": (6.3, 6.2, "fine-tuning"),
    "predict": (3.66, 5.4, "arrays in and out"),
    "plan": (5.1, 5.4, "before it runs"),
    "store": (2.2, 5.2, "Zarr, resumable"),
    "cluster": (-0.2, 4.2, "workers"),
    "preparation": (4.1, 4.2, "what is asked for"),
    "_dask": (2.6, 3, "builds graphs"),
    "inference": (3.8, 1.8, "one window"),
    "stac": (8.3, 1.6, "load()"),
    "published": (10.1, 1.5, "the global map"),
    "imagery": (5.6, 0.6, "bands, values, grid"),
    "model": (2.8, -0.4, "pure PyTorch"),
    "tiling": (4.6, -0.4, "integers, weights"),
    "plotting": (8.8, 7.2, "pictures"),
    "zonal": (10.2, 6.1, "polygons"),
    "validation": (7.2, 5, "against lidar"),
    "structure": (8.6, 5, "cover, gaps"),
    "change": (10.0, 5, "two dates or more"),
    "heights": (8.0, 4, "any heights"),
    "patches": (9.6, 4, "connected pixels"),
    "areas": (8.8, 3, "true on the ground"),
}
COLOURS = {
    "#dbe7f5": "cli demo benchmark raster accessor",
    "#d9ecdf": "stac published predict plan preparation store cluster training imagery",
    "#fbe3cd": "plotting zonal change structure validation heights patches areas",
    "#e7e0f2": "_dask inference model tiling datasets",
}
LEGEND = {
    "#dbe7f5": "where one comes in",
    "#d9ecdf": "imagery and prediction",
    "#fbe3cd": "what heights say",
    "#e7e0f2": "below: graphs, network, grid, forests",
}
SIZE = (1.36, 0.62)


def read_imports() -> dict[str, set[str]]:
    """Which room imports which, in functions too, but for types alone."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).as_posix()
        room = inside.split("/")[0].removesuffix(".py")
        if room not in EVERYWHERE and inside not in MEASURING:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found.setdefault(room, set()).update(set(_imported(tree)) - EVERYWHERE - {room})
    for small in PASSED_THROUGH:
        below = found.pop(small)
        for rooms in found.values():
            if small in rooms:
                rooms.remove(small)
                rooms |= below
    return found


def _imported(node: ast.AST) -> Iterator[str]:
    """Rooms that a piece of code imports."""
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and node.module == "xchmv2":
        yield from (alias.name for alias in node.names if _is_room(alias.name))
    elif isinstance(node, ast.Import):
        names = (alias.name.split(".") for alias in node.names)
        yield from (parts[1] for parts in names if parts[0] == "xchmv2" and len(parts) > 1)
    elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("xchmv2."):
        yield str(node.module).split(".")[1]
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)


def _is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def arrows(imports: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Leave out imports that others imply: no arrow to what the end of another arrow imports.

    Raises
    ------
    ValueError
        If a room has no place, or an import would not point down.
    """
    unplaced = set(imports) ^ set(PLACES)
    if unplaced:
        raise ValueError(f"give these rooms a place, or take it away: {sorted(unplaced)}")
    rising = [(a, b) for a, rooms in imports.items() for b in rooms if PLACES[a][1] <= PLACES[b][1]]
    if rising:
        raise ValueError(f"these imports do not point down: {rising}")

    @cache
    def reached(room: str) -> frozenset[str]:
        return frozenset(imports[room]).union(*(reached(below) for below in imports[room]))

    return {
        (room, below)
        for room, rooms in imports.items()
        for below in rooms
        if not any(below in reached(other) for other in rooms)
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
    for above, below in sorted(arrows(read_imports())):
        (x0, y0, _), (x1, y1, _) = PLACES[above], PLACES[below]
        axis.annotate(
            "",
            (x1, y1 + height / 2 + 0.02),
            (x0, y0 - height / 2),
            arrowprops={"arrowstyle": "-|>", "color": "#7a7a7a", "lw": 1.1, "shrinkA": 0},
            zorder=1,
        )
    colours = {room: colour for colour, rooms in COLOURS.items() for room in rooms.split()}
    for room, (x, y, purpose) in PLACES.items():
        corner = (x - width / 2, y - height / 2)
        box = FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.09",
            facecolor=colours[room], edgecolor="#555555", linewidth=0.9, zorder=2,
        )  # fmt: skip
        axis.add_patch(box)
        axis.text(x, y + 0.12, room, ha="center", va="center", fontsize=11, zorder=3)
        axis.text(
            x, y - 0.15, purpose, ha="center", va="center", fontsize=7.8, color="#444444", zorder=3
        )
    axis.set_xlim(-0.95, 10.95)
    axis.set_ylim(-0.75, 10.35)
    axis.set_axis_off()
    entries = [Patch(facecolor=c, edgecolor="#555555", label=text) for c, text in LEGEND.items()]
    axis.legend(handles=entries, loc="upper right", frameon=False, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=140, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
