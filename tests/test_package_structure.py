"""The package keeps its shape: rooms without circles, files and names that tell one thing."""

import ast
from collections import defaultdict
from pathlib import Path

import structure

TESTS = Path(__file__).parent
#: Prefixes of test files that belong to no room of the package.
BESIDE_THE_ROOMS = {
    "advice",
    "benchmarks",
    "docs",
    "evaluation",
    "notebooks",
    "package",
    "public_names",
    "real_imagery",
}


def test_no_circles():
    modules = structure.read_modules()
    assert not structure.find_circle(modules)
    assert not structure.find_circle(structure.read_rooms(modules))


def test_imports_point_down():
    assert not structure.upward_arrows(structure.read_rooms(structure.read_modules()))


def test_circles_and_arrows_upwards_are_found():
    modules = structure.read_modules()
    rooms = structure.read_rooms({**modules, "xchmv2.raster.grid": {"xchmv2.predict.graph"}})
    assert "raster -> predict" in structure.upward_arrows(rooms)
    assert {"raster", "predict"} <= set(structure.find_circle(rooms))


def test_these_rooms_know_no_network():
    rooms = structure.read_rooms(structure.read_modules())
    for room in structure.APART:
        assert not structure.reaches(rooms, room) & {"model", "inference", "predict"}, room


def test_the_package_stays_small():
    """Few floors, files that can be read in one sitting, and not many of them."""
    lines = structure.read_files()
    rooms = structure.read_rooms(structure.read_modules())
    assert max(structure.count_floors(rooms).values()) <= 9
    assert not {path.name: count for path, count in lines.items() if count > 900}
    assert len(lines) <= 170
    assert sum(lines.values()) <= 34_600


def test_file_names_are_unique():
    places = defaultdict(list)
    for path in structure.read_files():
        if path.name not in ("__init__.py", "__main__.py"):
            places[path.name].append(str(path.relative_to(structure.PACKAGE)))
    assert not [found for found in places.values() if len(found) > 1]


def test_a_class_name_means_one_thing():
    classes = structure.read_classes()
    assert not {name: modules for name, modules in classes.items() if len(modules) > 1}


def test_tests_are_named_after_rooms():
    rooms = set(structure.read_rooms(structure.read_modules())) | BESIDE_THE_ROOMS
    names = [path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")]
    strangers = [
        name for name in names if not any(f"{name}_".startswith(f"{room}_") for room in rooms)
    ]
    assert names
    assert not strangers


def is_private(node):
    """Whether a node of a syntax tree imports what is no public face of a room."""
    if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("xchmv2"):
        return False
    folder = structure.PACKAGE.parent.joinpath(*node.module.split("."))
    inside = node.module.count(".") > 1
    names = [alias.name for alias in node.names]
    return inside or any(
        name.startswith("_") or (node.module != "xchmv2" and (folder / f"{name}.py").is_file())
        for name in names
    )


def test_private_imports_give_their_reason():
    files = [
        path
        for path in TESTS.rglob("*.py")
        if any(map(is_private, ast.walk(structure.parse(path))))
    ]
    assert len(files) > 9
    silent = [path.name for path in files if "# Private imports: " not in path.read_text("utf-8")]
    assert not silent, "import from the room's door, or say why not: # Private imports: ..."
