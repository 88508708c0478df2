"""The structure of the package, measured from its imports: ``python tests/structure.py``.

Prints lines, files, rooms, floors and circles. A room is a folder or a file right below the
package; it stands one floor above the highest room that it imports. Imports inside functions
count, and so do those for types alone.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "xchmv2"

#: The rooms from the ground up: a room imports rooms of lower storeys, and those that it is said
#: to lean on in BESIDE.
STOREYS = (
    {"errors", "_version"},
    {"raster", "model"},
    {"imagery", "inference"},
    {"predict"},
    {"change", "structure", "zonal", "validation", "training", "plotting", "store", "stac"}
    | {"published"},
    {"accessor"},
    {"demo"},
    {"datasets", "cli"},
    {"xchmv2", "__main__"},
)
#: Arrows between rooms of one storey.
BESIDE = {
    "zonal": {"change"},
    "training": {"change", "validation"},
    "plotting": {"change", "validation", "zonal"},
}
#: Rooms that know no network.
APART = {"raster", "imagery", "change", "structure", "zonal", "validation", "stac", "published"}


@cache
def parse(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """Name of a file as it is imported."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, known: Iterable[str]) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    known, found = set(known), set()
    folder = module_name(path.parent / "__init__.py")
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            # Relative imports reach their own folder alone; ruff refuses those of parents.
            module = ".".join(filter(None, (folder if node.level else "", node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # The accessor and the package's own door name what they import when it is asked for.
            found |= {node.value.partition(":")[0]} if ":" in node.value else set()
    return {name for name in found if name in known}


def read_files() -> dict[Path, int]:
    """Every file of the package, and its number of lines."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}


def read_classes() -> dict[str, list[str]]:
    """Every name of a class, and the modules that define one of that name."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in read_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module_name(path))
    return dict(found)


def read_modules() -> dict[str, set[str]]:
    """Every module of the package, and what it imports."""
    files = {module_name(path): path for path in read_files()}
    return {name: imports_of(path, files) for name, path in files.items()}


def room_of(module: str) -> str:
    """Room of a module: the first name below the package, or the package's own door."""
    return module.split(".")[1] if "." in module else module


def read_rooms(modules: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Every room, and the rooms it imports."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, imported in modules.items():
        rooms[room_of(module)] |= {room_of(name) for name in imported} - {room_of(module)}
    return dict(rooms)


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle of a graph, as a path; empty where there is none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def count_floors(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """Floor of each room, counted from 1."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        floors[room] = 1 + max((floors[below] for below in rooms.get(room, ())), default=0)
    return floors


def upward_arrows(rooms: Mapping[str, set[str]]) -> list[str]:
    """Arrows between rooms that the order of storeys does not allow.

    Raises
    ------
    ValueError
        If a room has no storey, or a storey has a room that is gone.
    """
    storey = {room: level for level, names in enumerate(STOREYS) for room in names}
    if unplaced := storey.keys() ^ rooms.keys():
        raise ValueError(f"place these rooms in STOREYS, or take them away: {sorted(unplaced)}")
    return [
        f"{room} -> {below}"
        for room, imported in sorted(rooms.items())
        for below in sorted(imported)
        if storey[below] >= storey[room] and below not in BESIDE.get(room, ())
    ]


def reaches(rooms: Mapping[str, set[str]], start: str) -> set[str]:
    """All rooms that a room imports, straight or through others."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        fresh = rooms.get(ahead.pop(), set()) - found
        found |= fresh
        ahead += fresh
    return found


def main() -> None:
    """Print the figures."""
    modules = read_modules()
    rooms = read_rooms(modules)
    lines = read_files()
    circle = find_circle(modules) or find_circle(rooms)
    print(f"lines {sum(lines.values())}, files {len(lines)}, rooms {len(rooms)}")
    if circle:
        print(f"circle {' -> '.join(circle)}")
        return
    floors = count_floors(rooms)
    print(f"floors {max(floors.values())}, circles 0, arrows upwards {len(upward_arrows(rooms))}")
    for room in sorted(rooms, key=lambda name: (-floors[name], name)):
        own = [path for path in lines if room_of(module_name(path)) == room]
        size = sum(lines[path] for path in own)
        imported = ", ".join(sorted(rooms[room])) or "-"
        print(f"{floors[room]:3} {room:12} {size:6} lines {len(own):3} files  imports {imported}")


if __name__ == "__main__":
    main()
