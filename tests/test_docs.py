"""The reference of the site lists what is public, and nothing that is not there."""

import re
from importlib import import_module
from pathlib import Path

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
