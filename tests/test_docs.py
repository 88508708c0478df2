"""The site: its reference lists what is public, its code runs, its figures are of this package."""

import re
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import rioxarray  # noqa: F401  gives .rio
import xarray as xr

from xchmv2.accessor import CHMv2Accessor
from xchmv2.datasets import synthetic_forest

DOCS = Path(__file__).parents[1] / "docs"
#: A block of code, whether it is marked as tested, and what the page says that it prints.
BLOCK = re.compile(
    r"(?P<tested><!-- tested -->\n)?```python\n(?P<code>.*?)```\n"
    r"(?:\n```text\n(?P<printed>.*?)```)?",
    re.DOTALL,
)
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


def pages():
    return sorted(path.name for path in DOCS.glob("*.md"))


def blocks(page):
    return list(BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", [p for p in pages() if blocks(p)])
def test_all_code_is_python(page):
    for block in blocks(page):
        compile(block["code"], page, "exec")


def raster(name, *, size=96, pixel=0.6, crs="EPSG:26917", extra=None, dtype="uint8", factor=1):
    """Write a synthetic image as a source delivers it: bands first, ``extra`` being a fourth."""
    forest = synthetic_forest((size, size), times=("2024-07-01",), seed=1).isel(time=0)
    bands = [forest[colour].values.astype(dtype) * factor for colour in ("red", "green", "blue")]
    if extra is not None:
        fourth = np.full((size, size), extra, dtype)
        fourth[:8] = 0
        bands = [np.where(fourth, band, 0) for band in bands] if extra == 255 else bands
        bands.append(fourth)
    centres = (np.arange(size) + 0.5) * pixel
    coords = {"y": 3_290_000 - centres, "x": 400_000 + centres}
    image = xr.DataArray(np.stack(bands).astype(dtype), coords, ("band", "y", "x"))
    image.rio.write_crs(crs).rio.to_raster(name)


def write_files():
    """Write the files that the pages open, in the form that they describe."""
    raster("naip.tif", extra=120)
    raster("visual.tif", pixel=0.305, crs="EPSG:32617")
    raster("ortho_visual.tif", pixel=0.5, crs="EPSG:32617")
    raster("ortho_analytic.tif", pixel=0.5, extra=3000, dtype="uint16", factor=10)
    raster("ortho.tif", pixel=0.2, crs="EPSG:2154")
    raster("odm_orthophoto.tif", pixel=0.05, crs="EPSG:32617", extra=255, size=192)


@pytest.mark.filterwarnings("ignore::xchmv2.errors.DemoModelWarning")
@pytest.mark.parametrize("page", [p for p in pages() if any(b["tested"] for b in blocks(p))])
def test_tested_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    """With the demonstration model in place of the published one; one block after the other."""
    monkeypatch.chdir(tmp_path)
    write_files()
    shown = []
    scope = {"print": lambda *values: shown.append(" ".join(map(str, values)))}
    for block in (found for found in blocks(page) if found["tested"]):
        shown.clear()
        code = re.sub(r"\.predict\((?!\"demo\")", '.predict("demo", ', block["code"])
        exec(compile(code, page, "exec"), scope)
        if block["printed"] is not None:
            assert "\n".join(shown) == block["printed"].rstrip("\n")


def figure_script(name):
    """Import a script that draws a figure of the site."""
    spec = spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_point_one_way_as_the_figure_shows():
    script = figure_script("make_architecture_figure")
    drawn = script.arrows(script.read_imports())
    assert {("accessor", "predict"), ("_dask", "inference"), ("imagery", "tiling")} <= drawn
    assert not {below for above, below in drawn if above in ("model", "tiling")}


def test_figures_that_pages_show_are_there():
    for page in pages():
        for name in re.findall(r"!\[[^]]*\]\((images/\S+)\)", (DOCS / page).read_text("utf-8")):
            assert (DOCS / name).is_file()


@pytest.mark.parametrize("name", ["make_architecture_figure", "make_tile_grid_figure"])
def test_figures_can_be_drawn_again(name, tmp_path, monkeypatch):
    script = figure_script(name)
    monkeypatch.setattr(script, "OUT", tmp_path / "figure.png")
    script.main()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
