"""The accessor: the functions and nothing else, with their signatures."""

import doctest
import inspect
import pickle
import pydoc
import re
import subprocess
import sys

import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import rioxarray  # noqa: F401  (registers .rio)
import shapely
import xarray as xr
from conftest import cube, no_compute
from scipy import ndimage

import xchmv2
from xchmv2 import change, plotting, predict, store, structure, training, validation, zonal
from xchmv2.accessor import CHMv2Accessor, _without_parameter
from xchmv2.errors import CHMv2Error

# A small scene leaves its offset in doubt.
pytestmark = pytest.mark.filterwarnings("ignore:the offset of:xchmv2.change.ComparisonWarning")

# Private imports: how a docstring loses a parameter is held against numpydoc's form.

FUNCTIONS = {
    "predict": predict.predict,
    "plan": predict.plan,
    "to_zarr": store.to_zarr,
    "align": change.align,
    "stable_bias": change.stable_bias,
    "difference": change.difference_between,
    "error_model": change.error_model,
    "events": change.events,
    "trend": change.trend,
    "transition": change.transition_between,
    "loss": change.loss,
    "gain": change.gain,
    "loss_area": change.loss_area,
    "correlation_length": change.correlation_length,
    "label_events": change.label_events,
    "canopy_cover": structure.canopy_cover,
    "gap_fraction": structure.gap_fraction,
    "percentile": structure.percentile,
    "rumple": structure.rumple,
    "canopy_volume": structure.canopy_volume,
    "gaps": structure.gaps,
    "forest_mask": structure.forest_mask,
    "zonal": zonal.zonal,
    "validate": validation.validate,
    "calibrate": training.calibrate,
    "plot": plotting.plot_height,
    "plot_change": plotting.plot_change,
    "plot_errors": plotting.plot_errors,
    "plot_series": plotting.plot_series,
    "plot_validation": plotting.plot_validation,
}
# Functions that hand options on, and to what.
PASSED_ON = {
    "difference": change.difference,
    "plot_validation": validation.match,
}
ATTRS = {
    "standard_name": "canopy_height",
    "long_name": "canopy height",
    "units": "m",
    "grid_mapping": "spatial_ref",
    "chmv2_model": "demo",
    "chmv2_weights_sha256": "0" * 64,
    "chmv2_dtype": "float32",
    "chmv2_tile": 448,
    "chmv2_overlap": 64,
    "xchmv2_version": "0",
}
LEFT, TOP = 500_000.0, 5_300_000.0


def forest(shape=(96, 80)):
    """Four dates of heights, (time, y, x) of 1 m, with a clearing on the last two."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, shape), 2)
    crowns = 18 + 8 * smooth / smooth.std()
    values = np.stack([crowns + rng.normal(0.2 * k, 1, shape) for k in range(4)])
    values[2:, 20:50, 10:40] = 1.0
    values[1, :5, :5] = np.nan
    coords = {
        "time": pd.to_datetime(["2019-07-01", "2021-07-03", "2022-06-28", "2024-07-01"]),
        "y": TOP - (np.arange(shape[0]) + 0.5),
        "x": LEFT + (np.arange(shape[1]) + 0.5),
    }
    array = xr.DataArray(
        values.clip(0, 60).astype("f4"), coords, ("time", "y", "x"), "canopy_height"
    )
    for dim in ("y", "x"):
        array[dim].attrs["units"] = "metre"
    return array.odc.assign_crs(32633).assign_attrs(ATTRS)


HEIGHT = forest()
BOXES = gpd.GeoDataFrame(
    {"name": ["north", "south"]},
    geometry=[
        shapely.box(LEFT + 5, TOP - 60, LEFT + 45, TOP - 15),
        shapely.box(LEFT + 30, TOP - 90, LEFT + 70, TOP - 62),
    ],
    crs=32633,
)
STABLE = xr.ones_like(HEIGHT[0], bool).drop_vars("time").where(HEIGHT.y > TOP - 18, False)
LIDAR = (HEIGHT[0] + 1).drop_vars("time").assign_attrs(ATTRS)


def differ(height):
    return change.difference_between(height, "2019", "2024", sigma=2.0, correlation_length=3.0)


# What each method is called with: from heights, or from a change of them.
OF_HEIGHT = {
    "align": lambda use: use(window=32, windows=4, max_shift=6),
    "stable_bias": lambda use: use(STABLE, to="2021"),
    "difference": lambda use: use("2019", "2024", sigma=4.0, confidence=0.9),
    "events": lambda use: use(threshold=6),
    "trend": lambda use: use(4, confidence=0.9),
    "transition": lambda use: use("2019", "2024", classes=(2, 5, 20)),
    "canopy_cover": lambda use: use(threshold=8, cell=20),
    "gap_fraction": lambda use: use(threshold=8, cell=20),
    "percentile": lambda use: use((50, 95), cell=20),
    "rumple": lambda use: use(20, min_valid=0.4),
    "canopy_volume": lambda use: use(cell=20),
    "gaps": lambda use: use(threshold=3, min_area=100),
    "forest_mask": lambda use: use(min_area=1000, cell=20),
    "zonal": lambda use: use(BOXES, stats=("mean", "p95")),
    "validate": lambda use: use(LIDAR, block=20),
}
OF_CHANGE = {
    "loss": lambda use: use(threshold=6, opening=5),
    "gain": lambda use: use(min_area=4, opening=None),
    "loss_area": lambda use: use(threshold=6),
    "correlation_length": lambda use: use(),
    "zonal": lambda use: use(BOXES, threshold=4.0),
}
# The functions that have to look at the data, or say so.
COMPUTED = {"align", "gaps", "validate", "correlation_length"}


def of(function, obj):
    return lambda *args, **options: function(obj, *args, **options)


def assert_same(found, expected):
    if isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, pd.DataFrame):
        assert type(found) is type(expected)
        pd.testing.assert_frame_equal(found, expected)
    elif isinstance(expected, float):
        assert found == expected > 0
    else:
        xr.testing.assert_identical(found.compute(), expected.compute())


def parameters(function, dropped):
    """Names, kinds and defaults, without what the object is given as."""
    every = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in every if p.name not in dropped]


class TestSignatures:
    def test_every_method_is_a_function(self):
        public = {name for name in dir(CHMv2Accessor) if not name.startswith("_")}
        assert public == set(FUNCTIONS)

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_the_same(self, name):
        function = FUNCTIONS[name]
        # label_events is of a mask, and takes the change second.
        first = "change" if name == "label_events" else next(iter(parameters(function, ())))[0]
        expected = parameters(function, (first,))
        assert inspect.Parameter.VAR_KEYWORD not in {kind for _, kind, _ in expected}
        for obj in (xr.Dataset(), xr.DataArray(0)):
            assert parameters(getattr(obj.chmv2, name), ()) == expected
        assert parameters(getattr(CHMv2Accessor, name), ("self",)) == expected

    @pytest.mark.parametrize("name", PASSED_ON)
    def test_what_is_handed_on_is_named(self, name):
        def keywords(function):
            every = parameters(function, ())
            own = {"spread"}  # of match alone: for conformal intervals, not for a picture
            return [p for p in every if p[1] is inspect.Parameter.KEYWORD_ONLY and p[0] not in own]

        assert keywords(FUNCTIONS[name]) == keywords(PASSED_ON[name])

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_it_is_known_as_a_method_of_the_function(self, name):
        method = getattr(CHMv2Accessor, name)
        assert method.__name__ == name
        assert method.__qualname__ == f"CHMv2Accessor.{name}"
        assert method.__module__ == "xchmv2.accessor"
        assert inspect.unwrap(method, stop=lambda f: f is FUNCTIONS[name]) is FUNCTIONS[name]
        assert method is getattr(CHMv2Accessor, name)
        assert pickle.loads(pickle.dumps(method)) is method


def sections(doc):
    """Headings of a numpydoc docstring, with their text."""
    parts = re.split(r"(?m)^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(doc))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


class TestHelp:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_the_docstring_is_the_functions_own(self, name):
        method, function = getattr(CHMv2Accessor, name), FUNCTIONS[name]
        found, whole = sections(method.__doc__), sections(function.__doc__)
        described = [
            word
            for line in re.findall(r"(?m)^\S.*", found.pop("Parameters", "").replace("\\\n", " "))
            for word in re.split(r",\s*", line.partition(" :")[0])
        ]
        assert described == [p[0] for p in parameters(method, ("self",))]
        whole.pop("Parameters", "")
        assert {"Returns", "Examples"} <= set(found)
        assert found == whole
        assert method.__doc__.partition("\n")[0] == function.__doc__.partition("\n")[0]

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_help_shows_signature_and_sections(self, name):
        for thing in (getattr(HEIGHT.chmv2, name), getattr(CHMv2Accessor, name)):
            shown = pydoc.render_doc(thing, renderer=pydoc.plaintext)
            for part in (f"{name}(", "Returns\n", "Examples\n", ">>> "):
                assert part in shown
            assert ("Parameters\n" in shown) == bool(parameters(FUNCTIONS[name], ())[1:])

    def test_help_on_the_accessor_shows_every_method(self):
        shown = pydoc.render_doc(CHMv2Accessor, renderer=pydoc.plaintext)
        for name in FUNCTIONS:
            assert f"\n |  {name}(self, /" in shown
        assert shown.count("|      Returns") == len(FUNCTIONS)

    def test_no_heading_is_left_without_parameters(self):
        doc = "Do it.\n\nParameters\n----------\nheight : DataArray\n    It,\n\n    and more.\n\n"
        rest = "Returns\n-------\nfloat\n    A number."
        assert _without_parameter(doc + rest, "height") == f"Do it.\n\n{rest}"
        assert _without_parameter(doc, "height") == "Do it."
        assert "height : DataArray" in _without_parameter(doc + rest, "other")


class TestExamples:
    @pytest.fixture(scope="class")
    def names(self):
        """What the examples take as given, in memory."""
        height = forest((192, 160))
        return {
            "xchmv2": xchmv2,
            "imagery": cube((64, 96), times=2),
            "height": height,
            "stands": BOXES,
            "roads": xr.ones_like(height[0], bool)
            .drop_vars("time")
            .where(height.x < LEFT + 8, False),
            "lidar": (height[0] + 1).drop_vars("time").assign_attrs(ATTRS),
        }

    # The demonstration model stands in for the published one, and says so.
    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_they_run_and_print_what_they_say(self, name, names, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        doc = re.sub(r"\.(predict|plan)\(", r'.\1("demo", ', getattr(CHMv2Accessor, name).__doc__)
        examples = doctest.DocTestParser().get_doctest(doc, dict(names), name, None, 0)
        assert len(examples.examples) > 0
        assert f".chmv2.{name}(" in "".join(example.source for example in examples.examples)
        told = []
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
        assert runner.run(examples, out=told.append).failed == 0, "".join(told)
        plt.close("all")


class TestTheSameAsTheFunction:
    @pytest.mark.parametrize("kind", ["array", "dataset"])
    @pytest.mark.parametrize("name", OF_HEIGHT)
    def test_of_heights(self, name, kind):
        height = HEIGHT.copy(deep=True)
        if kind == "dataset":
            height = height.to_dataset().assign(bin_spread=height * 0 + 3)
        before = height.copy(deep=True)
        found = OF_HEIGHT[name](getattr(height.chmv2, name))
        assert_same(found, OF_HEIGHT[name](of(FUNCTIONS[name], height)))
        if name not in ("align", "stable_bias"):  # of a Dataset they return the whole
            assert_same(found, OF_HEIGHT[name](of(FUNCTIONS[name], HEIGHT)))
        xr.testing.assert_identical(height, before)

    @pytest.mark.parametrize("name", OF_CHANGE)
    def test_of_a_change(self, name):
        found = differ(HEIGHT)
        before = found.copy(deep=True)
        result = OF_CHANGE[name](getattr(found.chmv2, name))
        assert_same(result, OF_CHANGE[name](of(FUNCTIONS[name], found)))
        xr.testing.assert_identical(found, before)

    @pytest.mark.parametrize("name", ["loss", "correlation_length", "zonal"])
    def test_of_a_change_alone(self, name):
        array = differ(HEIGHT)["height_change"]
        result = OF_CHANGE[name](getattr(array.chmv2, name))
        assert_same(result, OF_CHANGE[name](of(FUNCTIONS[name], array)))

    def test_events_and_their_outlines(self):
        found = HEIGHT.chmv2.events()
        lost = found.chmv2.loss(confirmed=False)
        assert_same(lost, change.loss(found, confirmed=False))
        assert_same(found.chmv2.label_events(lost), change.label_events(lost, found))
        assert_same(found.chmv2.label_events(mask=lost), change.label_events(lost, found))
        outlined = found.chmv2.label_events(lost, polygons=True, connectivity=4)
        assert isinstance(outlined[1], gpd.GeoDataFrame)
        expected = change.label_events(lost, found, polygons=True, connectivity=4)
        xr.testing.assert_identical(outlined[0], expected[0])
        assert outlined[1].equals(expected[1])
        array = differ(HEIGHT)["height_change"]
        assert_same(array.chmv2.label_events(lost), change.label_events(lost, array))

    @pytest.mark.parametrize("name", sorted(set(OF_HEIGHT) - COMPUTED))
    def test_lazy_stays_lazy(self, name):
        lazy = HEIGHT.chunk(y=40, x=50)
        with no_compute():
            found = OF_HEIGHT[name](getattr(lazy.chmv2, name))
        assert found.chunks
        eager = OF_HEIGHT[name](getattr(HEIGHT.chmv2, name))
        xr.testing.assert_allclose(found.compute(), eager, rtol=1e-5)

    @pytest.mark.parametrize("name", sorted(set(OF_CHANGE) - COMPUTED))
    def test_of_a_lazy_change_too(self, name):
        lazy = differ(HEIGHT.chunk(y=40, x=50))
        with no_compute():
            found = OF_CHANGE[name](getattr(lazy.chmv2, name))
        assert found.__dask_graph__()
        eager = OF_CHANGE[name](getattr(lazy.compute().chmv2, name))
        xr.testing.assert_allclose(found.compute(), eager, rtol=1e-9)
        assert found.attrs == eager.attrs


class TestPictures:
    @pytest.mark.parametrize("kind", ["array", "dataset"])
    def test_of_heights(self, kind):
        height = HEIGHT if kind == "array" else HEIGHT.to_dataset()
        found = height.chmv2.plot(limits=(0, 40), columns=2)
        assert isinstance(found, plotting.canvas.Drawing)
        assert found.axes[0].get_title() == "2019-07-01"
        assert found.artists[0].get_clim() == (0, 40)
        lines = height.chmv2.plot_series(BOXES, label="name").axes[0].get_lines()
        assert [line.get_label() for line in lines] == ["north", "south"]
        expected = HEIGHT[:, 15:60, 5:45].mean(("y", "x"))
        np.testing.assert_allclose(lines[0].get_ydata(), expected, rtol=1e-5)

    def test_of_a_change(self):
        found = differ(HEIGHT).chmv2.plot_change(limit=20, only_significant=True)
        assert found.artists[0].get_clim() == (-20, 20)
        assert "significant" in found.colour_bar.ax.get_ylabel()
        plain = differ(HEIGHT)["height_change"].chmv2.plot_change(limit=20)
        assert "significant" not in plain.colour_bar.ax.get_ylabel()

    @pytest.mark.parametrize("kind", ["array", "dataset"])
    def test_against_a_reference(self, kind):
        height = HEIGHT if kind == "array" else HEIGHT.to_dataset()
        found = height.isel(time=0).chmv2.plot_validation(LIDAR)
        assert "bias -1.00 m" in found.axes[0].get_title()


# All that is a new quantity, whether from a method or as a coordinate of what it returns.
QUANTITIES = {
    **{name: (lambda h, n=name: OF_HEIGHT[n](getattr(h.chmv2, n))) for name in OF_HEIGHT},
    **{
        f"{name} of a change": (lambda h, n=name: OF_CHANGE[n](getattr(differ(h).chmv2, n)))
        for name in OF_CHANGE
        if name != "correlation_length"
    },
    "difference by the measured error": lambda h: h.chmv2.difference("2019", "2024"),
    "shifts": lambda h: h.chmv2.align(window=32, windows=4, max_shift=6, apply=False),
    "offsets": lambda h: h.chmv2.stable_bias(STABLE, apply=False),
    "loss of a change alone": lambda h: (h[3] - h[0]).chmv2.loss(threshold=6),
    "loss from events": lambda h: h.chmv2.events().chmv2.loss(confirmed=False),
    "event numbers": lambda h: change.label_events(differ(h).chmv2.loss(), differ(h))[0],
    "zonal of a lost height": lambda h: (h[3] - h[0]).rename("height_change").chmv2.zonal(BOXES),
    "one percentile": lambda h: h.chmv2.percentile(95),
    "whole cover": lambda h: h.chmv2.canopy_cover(cell=None),
    "whole volume": lambda h: h.chmv2.canopy_volume(cell=None),
    "whole rumple": lambda h: h.chmv2.rumple(cell=None),
}
HEIGHTS = {"align", "stable_bias"}  # return heights; their coordinates are new


def assert_honest(label, array):
    """Nothing but a height says it is one, or came from the model; and it says what it is."""
    assert array.attrs.get("standard_name") != "canopy_height", label
    assert not {attr for attr in array.attrs if "chmv2" in attr}, label
    if label not in HEIGHT.coords and label not in ("geometry", "polygon", "name"):
        assert "long_name" in array.attrs or "units" in array.attrs or array.dtype.kind in "UO"


def assert_placed(array):
    """It lies where the heights lie."""
    assert array.attrs["grid_mapping"] == "spatial_ref", array.name
    assert array.rio.crs == array.odc.crs == "EPSG:32633", array.name
    if array.sizes["y"] == HEIGHT.sizes["y"]:
        assert array.y.attrs == HEIGHT.y.attrs
    else:
        assert array.y.attrs["units"] == HEIGHT.y.attrs["units"]


@pytest.mark.parametrize("keep", ["default", True, False])
@pytest.mark.parametrize("name", QUANTITIES)
def test_only_heights_are_called_heights_and_all_know_their_place(name, keep):
    with xr.set_options(keep_attrs=keep):
        found = QUANTITIES[name](HEIGHT)
    found = found[0] if isinstance(found, tuple) else found
    variables, own = dict(found.coords), [found]
    if isinstance(found, xr.Dataset):
        variables, own = variables | dict(found.data_vars), list(found.data_vars.values())
        assert not set(found.attrs) & set(ATTRS)
    elif name in HEIGHTS:
        assert (found.name, found.attrs) == (HEIGHT.name, HEIGHT.attrs)
        assert any(str(coord).startswith("removed_") for coord in found.coords)
    else:
        variables |= {found.name: found}
        assert found.name not in (None, "canopy_height")
    for label, array in variables.items():
        assert_honest(label, array)
    # Asked to drop attributes, arithmetic of xarray drops those of the CRS coordinate too.
    if {"y", "x"} <= set(found.dims) and keep is not False:
        for array in own:
            assert_placed(array)


class TestErrors:
    def test_labels_that_mean_no_date_or_several(self):
        listed = "2019-07-01, 2021-07-03, 2022-06-28, 2024-07-01"
        for method in (
            lambda *labels: HEIGHT.chmv2.difference(*labels),
            lambda *labels: HEIGHT.chmv2.transition(*labels, classes=(5,)),
        ):
            with pytest.raises(CHMv2Error, match=f"'2020', found none; the dates are {listed}"):
                method("2019", "2020")
        twice = HEIGHT.assign_coords(
            time=pd.to_datetime(["2019-07-01", "2021-07-03", "2021-09-28", "2024-07-01"])
        )
        with pytest.raises(CHMv2Error, match="2 of them: 2021-07-03, 2021-09-28; write more"):
            twice.chmv2.transition("2019", "2021", classes=(5,))

    def test_what_is_no_change(self):
        array = differ(HEIGHT)["height_change"]
        with pytest.raises(CHMv2Error, match="nor loss dates, so a threshold must be given"):
            array.chmv2.loss()
        with pytest.raises(CHMv2Error, match="height_change or magnitude, found variables"):
            HEIGHT.to_dataset().chmv2.loss(threshold=5)
        with pytest.raises(CHMv2Error, match="its level_of_detection, found a DataArray; pass"):
            array.chmv2.loss_area(correlation_length=3)
        with pytest.raises(CHMv2Error, match=r"level_of_detection, found a Dataset of \['loss_d"):
            HEIGHT.chmv2.events().chmv2.loss_area(correlation_length=3)
        with pytest.raises(CHMv2Error, match="a Dataset with height_change"):
            HEIGHT.to_dataset().chmv2.plot_change()

    @pytest.mark.parametrize(
        "method",
        [
            lambda a: a.events(),
            lambda a: a.canopy_cover(),
            lambda a: a.validate(LIDAR),
            lambda a: a.plot(),
            lambda a: a.plot_series([(LEFT + 5, TOP - 5)]),
            lambda a: a.plot_validation(LIDAR),
        ],
    )
    def test_a_dataset_of_something_else(self, method):
        imagery = xr.Dataset({"red": HEIGHT, "green": HEIGHT})
        with pytest.raises(CHMv2Error, match=r"'canopy_height', or with one .*'red', 'green'"):
            method(imagery.chmv2)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, xarray as xr, xchmv2\n"
        "heavy = ['torch', 'matplotlib', 'geopandas', 'rasterio', 'xchmv2.change']\n"
        "assert 'zonal' in dir(xr.Dataset().chmv2) and 'plot' in dir(xr.DataArray(0).chmv2)\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "assert 'zonal' in repr(xr.Dataset().chmv2)\n"
        "heavy.remove('rasterio')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "xr.Dataset().chmv2.difference\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[]", "[]", "['xchmv2.change']"]
    assert xchmv2.accessor.CHMv2Accessor is CHMv2Accessor
