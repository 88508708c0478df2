"""The names that users may rely on, and that all others carry an underscore."""

import ast
import subprocess
import sys
from importlib import import_module

import pytest
from structure import PACKAGE, module_name, room_of

import xchmv2

#: What each public room offers. Taking a name away, or adding one, is a decision about the API.
PUBLIC = {
    "xchmv2": """
        CHMv2Config CHMv2Error CHMv2ForDepthEstimation CHMv2ImageProcessor __version__ change
        datasets errors imagery load model open_published open_zarr plotting predict published stac
        store structure training validation verify warmup zonal""",
    "xchmv2.change": """
        ComparisonWarning ErrorModel align correlation_length difference difference_between
        error_model events gain label_events loss loss_area stable_bias transition
        transition_between trend""",
    "xchmv2.structure": """
        canopy_cover canopy_volume forest_mask gap_fraction gaps percentile rumple""",
    "xchmv2.zonal": "effective_samples to_table zonal",
    "xchmv2.validation": "Matched match to_table validate",
    "xchmv2.training": """
        Calibration Curriculum FineTuned calibrate charbonnier chmv2_loss fine_tune patch_gradient
        silog""",
    "xchmv2.plotting": """
        CHANGE_COLOURS HEIGHT_COLOURS add_scale_bar missing_patch new_figure plot_change
        plot_errors plot_height plot_series plot_validation require_matplotlib show_change
        show_height show_imagery""",
    "xchmv2.datasets": "Disturbance synthetic_forest",
    "xchmv2.stac": "load quality_flags",
    "xchmv2.store": "Problem Verified Written open_zarr remove_store to_zarr verify",
    "xchmv2.published": "PUBLISHED_MAP open_published",
    "xchmv2.model": """
        CHMv2Config CHMv2ForDepthEstimation CHMv2ImageProcessor DINOv3ViTConfig
        DepthEstimatorOutput""",
    "xchmv2.errors": """
        CHMv2Error CheckpointError ConfigError DemoModelWarning DeviceError GridError ImageryError
        IncompleteStoreWarning StoreError""",
}


@pytest.mark.parametrize("room", PUBLIC)
def test_the_public_names_of_a_room(room):
    module = import_module(room)
    assert sorted(module.__all__) == PUBLIC[room].split()
    for name in module.__all__:
        assert hasattr(module, name)


class TestImport:
    def run(self, code):
        code = f"import sys, xarray; before = set(sys.modules)\n{code}"
        return subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )

    def test_it_brings_nothing_but_the_accessor(self):
        found = self.run(
            "import xchmv2\n"
            "print(*sorted(n for n in set(sys.modules) - before if n.startswith('xchmv2')))\n"
            "print(*sorted({n.partition('.')[0] for n in set(sys.modules) - before}\n"
            "              - {'xchmv2'} - set(sys.stdlib_module_names)))\n"
            "print(*({'torch', 'dask', 'scipy', 'rasterio'} & set(sys.modules)))\n"
        )
        ours, others, heavy = found.stdout.split("\n")[:3]
        assert ours.split() == ["xchmv2", "xchmv2._version", "xchmv2.accessor", "xchmv2.errors"]
        assert others == heavy == ""

    def test_rooms_are_reached_without_torch_or_the_others(self):
        found = self.run(
            "import xchmv2\n"
            "assert xchmv2.change.loss and xchmv2.zonal.zonal\n"
            "from xchmv2.datasets import synthetic_forest\n"
            "assert xchmv2.datasets.synthetic_forest is synthetic_forest\n"
            "print('torch' in sys.modules, 'xchmv2.stac' in sys.modules)\n"
        )
        assert found.stdout == "False False\n"

    def test_each_name_is_reached_from_the_package(self):
        found = self.run(
            "import xchmv2\nfor n in xchmv2.__all__: print(n, getattr(xchmv2, n) is not None)"
        )
        assert found.stdout.split() == [w for n in xchmv2.__all__ for w in (n, "True")]
        assert dir(xchmv2) == sorted(xchmv2.__all__)

    def test_rooms_need_no_optional_dependency(self):
        """In an environment of the core alone, all but what drives a cluster is reached."""
        optional = ["distributed", "skimage", "matplotlib", "geopandas", "exactextract", "xvec"]
        optional += ["hvplot", "triton", "icechunk", "transformers", "ipywidgets"]
        rooms = [name.removeprefix("xchmv2.") for name in PUBLIC if name != "xchmv2"]
        code = (
            f"sys.modules.update(dict.fromkeys({optional!r}))\n"
            "import xchmv2, xarray as xr\n"
            f"[getattr(xchmv2, room) for room in {rooms!r}]\n"
            "heights = xr.DataArray(0).chmv2\n"
            "[getattr(heights, name) for name in dir(heights) if not name.startswith('_')]\n"
            "try: xchmv2.warmup\n"
            "except ImportError as error: print(error)"
        )
        found = self.run(code)
        assert 'pip install "xchmv2[cluster]"' in found.stdout

    def test_what_is_not_there_is_refused_by_name(self):
        with pytest.raises(AttributeError, match="module 'xchmv2' has no attribute 'chnage'"):
            xchmv2.chnage  # noqa: B018


def defined(tree):
    """Names without an underscore that a module defines at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def used(tree, modules):
    """Names of other modules that a module imports, or reads from a module it imports."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                bound |= {alias.asname or alias.name: whole} if whole in modules else {}
                yield whole
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.replace(":", ".")  # what the accessor delegates to
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{bound.get(node.value.id)}.{node.attr}"


#: Used by no other module of the package, and public all the same.
KEPT = {
    # The training of the demonstration model, in tests/evaluation, runs them.
    "xchmv2.training.pairs.Pair",
    "xchmv2.training.tuning.Schedule",
    "xchmv2.training.tuning.Trainer",
    "xchmv2.training.tuning.run",
    # The benchmarks register it with a cluster of simulated GPUs.
    "xchmv2.predict.warming.ForwardsOnGPUs",
    # The benchmarks and the tests of the demonstration weights read its folder.
    "xchmv2.model.files.DEMO_FOLDER",
    # Its table would be wider than a line.
    "xchmv2.demo.stands.Species",
}


def is_block(module, name):
    """Whether it is a block of the network, which repr(model) and named_modules() show."""
    found = getattr(import_module(module), name)
    return isinstance(found, type) and module.startswith("xchmv2.model.")


def unused_names():
    """Names without an underscore that no other module of the package uses, by module."""
    trees = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    uses = {name: set(used(tree, trees)) for name, tree in trees.items()}
    doors = [import_module(name) for name in trees if room_of(name) == name.rpartition(".")[2]]
    offered = {name for door in doors for name in getattr(door, "__all__", vars(door))}
    return [
        f"{module}.{name}"
        for module, tree in sorted(trees.items())
        for name in sorted(set(defined(tree)) - offered)
        if not any(f"{module}.{name}" in uses[other] for other in uses if other != module)
    ]


def test_what_only_its_own_module_uses_has_an_underscore():
    unused = set(unused_names()) - KEPT
    assert [name for name in sorted(unused) if not is_block(*name.rsplit(".", 1))] == []
