"""The site: its reference lists what is public, its code runs, its figures are of this package."""

import re
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import documented
import matplotlib.pyplot as plt
import pytest
import xarray as xr

from xchmv2.accessor import CHMv2Accessor

DOCS = Path(__file__).parents[1] / "docs"
PACKAGES = ("change", "structure", "zonal", "validation", "training", "datasets", "model")


def listed():
    """Names of the reference, with the module that each is listed under."""
    names, module = [], ""
    for line in (DOCS / "api.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = found[1]
        elif found := re.match(r"   (\w[\w.]*)$", line):
            names.append(f"{module}.{found[1]}")
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    public = import_module(f"xchmv2.{package}").__all__
    assert {f"xchmv2.{package}.{name}" for name in public} <= set(listed())


def test_every_method_of_the_accessor_is_in_the_reference():
    methods = {name for name in dir(CHMv2Accessor) if not name.startswith("_")}
    prefix = "xarray.Dataset.chmv2."
    assert {name.removeprefix(prefix) for name in listed() if name.startswith(prefix)} == methods


@pytest.mark.parametrize("name", [n for n in listed() if not n.startswith("xarray.")])
def test_what_is_listed_exists_and_is_described(name):
    module, _, attribute = name.rpartition(".")
    assert getattr(import_module(module), attribute).__doc__


def test_the_reference_of_the_accessor_holds_for_arrays_too():
    assert xr.Dataset.chmv2 is xr.DataArray.chmv2 is CHMv2Accessor


def test_every_page_is_in_a_table_of_contents():
    text = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    entries = {
        line.strip()
        for page in text.values()
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page, re.S)
        for line in block.splitlines()
    }
    assert set(text) - {"index"} <= entries


@pytest.mark.parametrize("page", documented.pages())
def test_all_code_is_python(page):
    for block in documented.blocks(page):
        compile(block["code"], page, "exec")


# Warnings are for users to read: dates that differ, a demonstration model.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "page",
    [p for p in documented.pages() if not all(b["reason"] for b in documented.blocks(p))],
)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    """One block after the other, as a reader would; those that cannot run here say why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("xchmv2.training.fine_tune", documented.quick_fine_tune)
    shown = []
    scope = documented.prepare(page, tmp_path)
    scope["print"] = lambda *values: shown.append(" ".join(map(str, values)))
    for block in (found for found in documented.blocks(page) if not found["reason"]):
        shown.clear()
        exec(compile(documented.stand_in(block["code"]), page, "exec"), scope)
        if block["printed"] is not None:
            assert "\n".join(shown) == block["printed"].rstrip("\n")
    plt.close("all")


SOURCES = {
    "[NAIP](naip.md), file": "naip.tif",
    "[Maxar](maxar.md)": "visual.tif",
    "[Planet](planet.md)": "ortho_analytic.tif",
    "[Aerial orthophotos](aerial-orthophotos.md)": "ortho.tif",
    "[Drones](drones.md)": "odm_orthophoto.tif",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_calls_by_source_run_on_imagery_of_that_source(source, tmp_path):
    import rioxarray

    documented.write_files(tmp_path)
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| {source} |"))
    (call,) = re.findall(r"`(image\.chmv2\.predict\(.*\))`", row)
    image = rioxarray.open_rasterio(tmp_path / SOURCES[source], chunks={"x": 4096, "y": 4096})
    height = eval(documented.stand_in(call), {"image": image}).compute()
    assert 0 < float(height.mean()) < 60


def test_the_converted_original_files_are_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documented.write_original(tmp_path)
    code = next(
        b["code"] for b in documented.blocks("docs/installation.md") if "torch.load" in b["code"]
    )
    exec(documented.stand_in(code), {})
    load = import_module("xchmv2.model").CHMv2ForDepthEstimation.from_pretrained
    expected, found = (load(name).state_dict() for name in ("demo", tmp_path / "chmv2"))
    for name, tensor in expected.items():
        assert found[name].equal(tensor * 0 if "k_proj.bias" in name else tensor), name
    assert len(found) == len(expected)


def figure_script(name):
    """Import a script that draws a figure of the site."""
    spec = spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_point_one_way_as_the_figure_shows():
    script = figure_script("make_architecture_figure")
    drawn = script.arrows(script.read_imports())
    assert {("store", "predict"), ("predict", "inference"), ("imagery", "raster")} <= drawn
    assert not {below for above, below in drawn if above in ("model", "raster")}


def test_figures_that_pages_show_are_there():
    for page in sorted(path.name for path in DOCS.glob("*.md")):
        for name in re.findall(r"!\[[^]]*\]\((images/\S+)\)", (DOCS / page).read_text("utf-8")):
            assert (DOCS / name).is_file()


@pytest.mark.parametrize("name", ["make_architecture_figure", "make_tile_grid_figure"])
def test_figures_can_be_drawn_again(name, tmp_path, monkeypatch):
    script = figure_script(name)
    monkeypatch.setattr(script, "OUT", tmp_path / "figure.png")
    script.main()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
