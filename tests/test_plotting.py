import sys
import warnings

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rioxarray  # noqa: F401  (registers .rio)
import shapely
import xarray as xr
from conftest import cube
from reference import follow

from xchmv2 import plotting
from xchmv2.change import difference
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.validation import match


@pytest.fixture
def ax():
    return plotting.new_figure(4, 4).subplots()


def plane(shape=(6, 9), *, low=0.0, high=33.0, step=2.0):
    values = np.linspace(low, high, shape[0] * shape[1]).reshape(shape)
    coords = {"y": 100 - step * np.arange(shape[0]), "x": 50 + step * np.arange(shape[1])}
    return xr.DataArray(values, coords, ("y", "x")).odc.assign_crs(32633)


class TestHeight:
    def test_place_and_scale(self, ax):
        image = plotting.show_height(ax, plane())
        assert image.get_extent() == [49, 67, 89, 101]
        assert image.get_clim() == (0, 35)
        assert image.cmap.name == "viridis"

    def test_limits(self, ax):
        assert plotting.show_height(ax, plane(), limits=(0, 50)).get_clim() == (0, 50)

    def test_missing_is_hatched_and_not_a_colour(self, ax):
        height = plane().where(plane() > 3)
        image = plotting.show_height(ax, height)
        np.testing.assert_array_equal(image.get_array().mask, height.isnull())
        assert image.cmap.get_bad()[3] == 0
        assert ax.patch.get_hatch() == plotting.missing_patch().get_hatch() == "////"
        assert plotting.missing_patch("cloud").get_label() == "cloud"

    def test_any_way_up_looks_the_same(self, ax):
        expected = plotting.show_height(ax, plane())
        found = plotting.show_height(ax, plane()[::-1, ::-1].transpose("x", "y"))
        np.testing.assert_array_equal(found.get_array(), expected.get_array())
        assert found.get_extent() == expected.get_extent()

    def test_without_coordinates_rows_run_down(self, ax):
        image = plotting.show_height(ax, xr.DataArray(plane().values, dims=("y", "x")))
        assert image.get_extent() == [-0.5, 8.5, 5.5, -0.5]

    def test_labels(self, ax):
        height = plane()
        height.x.attrs["units"] = "metre"
        plotting.show_height(ax, height)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("x [m]", "y")

    def test_nothing_known(self, ax):
        assert plotting.show_height(ax, plane() * np.nan).get_clim() == (0, 5)

    def test_one_pixel(self, ax):
        one = xr.DataArray([[3.0]], dims=("y", "x"))
        assert plotting.show_height(ax, one).get_extent() == [-0.5, 0.5, 0.5, -0.5]

    @pytest.mark.parametrize("chunks", [None, 700])
    def test_large_arrays_are_averaged(self, ax, chunks):
        height = plane((2402, 3))
        height[3:7] = np.nan
        before = height.copy(deep=True)
        given = height if chunks is None else height.chunk(chunks)
        image = plotting.show_height(ax, given)
        with warnings.catch_warnings(action="ignore"):  # numpy minds the mean of nothing
            expected = np.nanmean(height.values[:2400].reshape(800, 9), axis=1)
        np.testing.assert_allclose(image.get_array().filled(np.nan)[:, 0], expected)
        assert np.isnan(expected).sum() == 1
        assert image.get_extent() == [49, 55, 101 - 4800, 101]
        xr.testing.assert_identical(height, before)

    def test_several_dates(self, ax):
        message = (
            r"one picture, with dims \('y', 'x'\), found further dims \['time'\]; .*isel\(time=0"
        )
        with pytest.raises(CHMv2Error, match=message):
            plotting.show_height(ax, plane().expand_dims(time=2))


class TestChange:
    def test_scale_is_centred(self, ax):
        image = plotting.show_change(ax, plane(low=-12))
        assert image.get_clim() == (-35, 35)
        assert image.cmap.name == "BrBG"
        assert plotting.show_change(ax, plane(), limit=8).get_clim() == (-8, 8)


class TestImagery:
    @pytest.mark.parametrize("lazy", [False, True])
    def test_colours_and_holes(self, ax, lazy):
        imagery = cube((20, 30))
        for band in imagery.data_vars.values():
            band[3, 4] = 0
            band.attrs["nodata"] = 0
        valid = (imagery["red"] * 0 == 0) & (imagery.x > imagery.x[2])
        given = imagery.chunk(y=7) if lazy else imagery
        pixels = plotting.show_imagery(ax, given, valid=valid).get_array()
        seen = np.asarray(valid) & ~(
            (np.indices((20, 30))[0] == 3) & (np.indices((20, 30))[1] == 4)
        )
        np.testing.assert_array_equal(pixels[..., 3], seen)
        for k, name in enumerate(("red", "green", "blue")):
            expected = np.where(seen, imagery[name].values / 255, 0)
            np.testing.assert_allclose(pixels[..., k], expected, atol=1e-6)

    def test_band_dim_and_value_range(self, ax):
        stacked = cube((20, 30), dtype="uint16").to_dataarray("band")
        pixels = plotting.show_imagery(ax, stacked, value_range=(0, 100)).get_array()
        np.testing.assert_allclose(pixels[..., 1], np.clip(stacked[1] / 100, 0, 1), atol=1e-6)
        with pytest.raises(ImageryError, match="no value_range"):
            plotting.show_imagery(ax, stacked)

    def test_several_dates(self, ax):
        with pytest.raises(CHMv2Error, match=r"further dims \['time'\]"):
            plotting.show_imagery(ax, cube((20, 30), times=2))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r'matplotlib, which draws the figures, is not installed; pip install "xchmv2\[plot\]"'
    for draw in (plotting.require_matplotlib, plotting.missing_patch):
        with pytest.raises(CHMv2Error, match=message):
            draw()
    with pytest.raises(CHMv2Error, match=message):
        plotting.new_figure(1, 1)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def dates(count=3, **options):
    stack = [plane(**options) + k for k in range(count)]
    time = pd.date_range("2019-07-01", periods=count, freq="730D", name="time")
    return xr.concat(stack, time).rename("canopy_height")


def bare(array):
    """Take the CRS off."""
    array = array.drop_vars("spatial_ref")
    array.attrs.pop("grid_mapping", None)
    array.encoding.pop("grid_mapping", None)
    return array


def drawn(picture):
    """Draw it as a file would be, and check that nothing is cut off."""
    picture.figure.canvas.draw()
    whole = picture.figure.bbox
    for ax in picture.figure.axes:
        box = ax.get_tightbbox()
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= whole.x1 + 1
        assert box.y1 <= whole.y1 + 1
    return picture


class TestMaps:
    def test_one_date(self):
        picture = drawn(plotting.plot_height(plane()))
        (image,) = picture.artists
        assert image.get_clim() == (0, 35)
        assert picture.colour_bar.ax.get_ylabel() == "canopy height [m]"
        assert picture.figure.axes == [*picture.axes, picture.colour_bar.ax]

    def test_dates_share_a_scale_and_are_named(self):
        picture = drawn(plotting.plot_height(dates(5), columns=2))
        assert [ax.get_title() for ax in picture.axes[:2]] == ["2019-07-01", "2021-06-30"]
        assert len(picture.axes) == 5
        assert len({image.get_clim() for image in picture.artists}) == 1
        other = plotting.plot_height(plane().expand_dims(member=2))
        assert [ax.get_title() for ax in other.axes] == ["member 0", "member 1"]

    def test_axes_limits_and_colours_of_the_caller(self, ax):
        picture = plotting.plot_height(plane(), ax=ax, limits=(0, 12))
        assert picture.axes == [ax]
        assert picture.artists[0].get_clim() == (0, 12)
        assert picture.colour_bar.extend == "max"

    def test_few_odd_heights_do_not_wash_out_the_rest(self):
        height = plane((100, 100), high=28)
        height[50, 50] = 90
        picture = plotting.plot_height(height)
        assert picture.artists[0].get_clim() == (0, 30)
        assert picture.colour_bar.extend == "max"

    def test_missing_data_are_explained(self):
        picture = plotting.plot_height(plane().where(plane() > 3))
        legend = drawn(picture).colour_bar.ax.get_legend()
        assert legend.get_texts()[0].get_text() == "no data"
        assert plotting.plot_height(plane()).colour_bar.ax.get_legend() is None
        declared = plane().where(plane() > 3, -9999).assign_attrs(nodata=-9999)
        image = plotting.plot_height(declared).artists[0]
        np.testing.assert_array_equal(image.get_array().mask, plane() <= 3)

    @pytest.mark.parametrize("shape", [(20, 300), (300, 20), (1, 40), (40, 1), (300, 300)])
    def test_labels_keep_apart_in_any_shape(self, shape):
        height = dates(shape=shape)
        picture = drawn(plotting.plot_height(height.where(height > 1)))
        renderer = picture.figure.canvas.get_renderer()
        upright = [
            label.get_window_extent(renderer)
            for ax in picture.axes
            for label in ax.get_yticklabels()
            if label.get_visible() and label.get_text()
        ]
        assert not any(
            a.overlaps(b) for k, a in enumerate(upright) for b in upright[:k] if a.x1 == b.x1
        )
        maps = [ax.get_window_extent(renderer) for ax in picture.axes]
        legend = picture.colour_bar.ax.get_legend().get_window_extent(renderer)
        assert not any(legend.overlaps(box) for box in maps)
        if shape[0] * 10 < shape[1]:  # a bar would hide so flat a map
            bar = picture.axes[0].artists[-1].get_window_extent(renderer)
            assert not bar.overlaps(maps[0])

    def test_edges_of_a_single_row_are_those_of_its_pixels(self, ax):
        height = plane((1, 9)).rio.write_transform(plane((2, 9)).odc.geobox.affine)
        assert plotting.show_height(ax, height).get_extent() == [49, 67, 99, 101]

    def test_pixels_that_only_a_transform_places(self):
        height = plane((20, 2600)).rio.write_transform(plane((20, 2600)).odc.geobox.affine)
        placed = plotting.plot_height(height).artists[0].get_extent()
        bare = plotting.plot_height(height.drop_vars(["x", "y"])).artists[0].get_extent()
        assert bare == pytest.approx(placed)
        assert placed[:2] == pytest.approx([49, 49 + 2 * 2598])

    def test_nothing_known(self):
        drawn(plotting.plot_height(plane() * np.nan))

    def test_large_arrays_are_never_whole(self):
        sizes = []

        def note(block):
            sizes.append(block.size)
            return block

        height = plane((4000, 4000)).chunk(y=400, x=400)
        data = height.data.map_blocks(note, dtype=float, meta=np.empty((0, 0)))
        before = height.copy(deep=True)
        picture = plotting.plot_height(height.copy(data=data))
        assert max(sizes) == 400 * 400
        assert picture.artists[0].get_array().shape == (1000, 1000)
        xr.testing.assert_identical(height, before)

    def test_change_of_a_cube_goes_from_date_to_date(self):
        picture = drawn(plotting.plot_change(dates(3)))
        assert [ax.get_title() for ax in picture.axes] == [
            "2019-07-01 to 2021-06-30",
            "2021-06-30 to 2023-06-30",
        ]
        for image in picture.artists:
            np.testing.assert_allclose(image.get_array(), 1)
            assert image.get_clim() == (-5, 5)
        changes = plotting.plot_change(dates(3).rename("height_change"))
        assert len(changes.axes) == 3

    def test_change_of_two_dates(self):
        found = difference(plane(low=12), plane(), sigma=2.0)
        picture = plotting.plot_change(found)
        np.testing.assert_allclose(picture.artists[0].get_array(), found["height_change"])
        picture = plotting.plot_change(found, only_significant=True, limit=8)
        expected = found["height_change"].where(found["significant"], 0)
        np.testing.assert_allclose(picture.artists[0].get_array(), expected)
        assert "significant" in picture.colour_bar.ax.get_ylabel()
        assert picture.artists[0].get_clim() == (-8, 8)

    def test_missing_change_is_not_no_change(self):
        before = plane().where(plane() > 3)
        found = difference(before, plane(), sigma=2.0)
        image = plotting.plot_change(found, only_significant=True).artists[0]
        np.testing.assert_array_equal(image.get_array().mask, before.isnull())

    def test_errors(self, ax):
        with pytest.raises(CHMv2Error, match="one panel, to draw on the axes"):
            plotting.plot_height(dates(), ax=ax)
        with pytest.raises(CHMv2Error, match="1 to 36 maps in a figure, found 40"):
            plotting.plot_height(plane().expand_dims(time=40))
        with pytest.raises(CHMv2Error, match="at most one more"):
            plotting.plot_height(plane().expand_dims(time=2, member=2))
        with pytest.raises(CHMv2Error, match="columns as a whole number of at least 1"):
            plotting.plot_height(plane(), columns=0)
        with pytest.raises(CHMv2Error, match="heights as a DataArray or a Dataset, found ndarray"):
            plotting.plot_height(plane().values)
        with pytest.raises(CHMv2Error, match="a change as a DataArray or a Dataset, found ndarray"):
            plotting.plot_change(plane().values)
        with pytest.raises(CHMv2Error, match="a Dataset with height_change"):
            plotting.plot_change(plane().to_dataset(name="canopy_height"))
        with pytest.raises(
            CHMv2Error, match="a Dataset with 'significant', found a DataArray; pass what"
        ):
            plotting.plot_change(plane(), only_significant=True)


class TestScaleBar:
    def test_is_true_on_the_ground(self, ax):
        """At 60 degrees north 100 m on the ground are 200 m of web Mercator."""
        height = bare(plane((200, 300), step=1.0))
        height = height.assign_coords(y=height.y + 8_399_738.0).odc.assign_crs(3857)
        plotting.show_height(ax, height)
        bar = plotting.add_scale_bar(ax, height)
        assert bar.txt_label.get_text() == "20 m"
        assert bar.size_bar.get_children()[0].get_width() == pytest.approx(40, rel=0.01)

    def test_degrees(self, ax):
        x, y = 15 + np.arange(300) * 1e-5, 60 - np.arange(200) * 1e-5
        height = xr.DataArray(np.ones((200, 300)), {"latitude": y, "longitude": x})
        picture = plotting.plot_height(height.odc.assign_crs(4326))
        assert picture.axes[0].get_aspect() == pytest.approx(2, rel=0.01)
        bar = plotting.add_scale_bar(picture.axes[0], height.odc.assign_crs(4326))
        assert bar.txt_label.get_text() == "50 m"

    def test_kilometres(self, ax):
        height = plane((20, 30), step=500.0)
        plotting.show_height(ax, height)
        assert plotting.add_scale_bar(ax, height).txt_label.get_text() == "2 km"

    def test_unknown_units(self, ax):
        height = bare(plane())
        for dim in "xy":
            height[dim].attrs.clear()
        plotting.show_height(ax, height)
        assert plotting.add_scale_bar(ax, height) is None
        for dim in "xy":
            height[dim].attrs["units"] = "m"
        assert plotting.add_scale_bar(ax, height).txt_label.get_text() == "5 m"


class TestSeries:
    def test_points(self):
        height = dates()
        before = height.copy(deep=True)
        picture = drawn(plotting.plot_series(height.chunk(x=4), [(50, 100), (66, 90)]))
        first, second = picture.artists
        np.testing.assert_allclose(first.get_ydata(), height[:, 0, 0])
        np.testing.assert_allclose(second.get_ydata(), height[:, 5, 8])
        np.testing.assert_array_equal(first.get_xdata(orig=True), height.time)
        names = [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
        assert names == ["point 0", "point 1"]
        assert picture.axes[0].get_ylabel() == "canopy height [m]"
        xr.testing.assert_identical(height, before)
        one = plotting.plot_series(height, (50, 100))
        assert len(one.artists) == 1
        assert one.axes[0].get_legend() is None

    def test_points_of_another_crs(self):
        height = dates()
        points = gpd.GeoDataFrame(
            {"plot": ["a", "b"]}, geometry=gpd.points_from_xy([50, 66], [100, 90]), crs=32633
        )
        picture = plotting.plot_series(height, points.to_crs(4326), label="plot")
        np.testing.assert_allclose(picture.artists[1].get_ydata(), height[:, 5, 8])
        assert picture.artists[1].get_label() == "b"

    def test_polygons(self):
        height = dates()
        squares = [shapely.box(49, 97, 53, 101), shapely.box(57, 91, 61, 95)]
        picture = drawn(plotting.plot_series(height, squares))
        line, band, *_ = picture.artists
        np.testing.assert_allclose(line.get_ydata(), height[:, :2, :2].mean(("y", "x")), rtol=1e-6)
        assert band.get_datalim(picture.axes[0].transData).y0 <= line.get_ydata().min()

    def test_many_lines_can_be_told_apart(self):
        points = [(float(x), 100.0) for x in plane().x]
        lines = plotting.plot_series(dates(), points).artists
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 9

    def test_legend_of_many_lines_fits(self):
        points = [(float(x), 100.0) for x in plane().x] * 4
        picture = drawn(plotting.plot_series(dates(), points))
        legend, whole = picture.axes[0].get_legend().get_window_extent(), picture.figure.bbox
        assert legend.y0 >= 0
        assert legend.y1 <= whole.y1
        assert legend.x1 <= whole.x1
        assert picture.axes[0].get_window_extent().height > 0.6 * whole.height

    def test_outside(self):
        with pytest.warns(UserWarning, match="1 of 2 points are outside the raster"):
            picture = plotting.plot_series(dates(), [(50, 100), (1000, 100)])
        assert np.isnan(picture.artists[1].get_ydata()).all()

    def test_errors(self):
        with pytest.raises(CHMv2Error, match="heights of several dates"):
            plotting.plot_series(plane(), [(50, 100)])
        with pytest.raises(CHMv2Error, match=r"points, or polygons, found Point, Polygon"):
            plotting.plot_series(dates(), [shapely.Point(50, 100), shapely.box(49, 97, 53, 101)])
        cube = dates().expand_dims(layer=2, axis=1)
        with pytest.raises(CHMv2Error, match="heights of several dates") as raised:
            plotting.plot_series(cube, [(50, 100)])
        assert follow(raised, height=cube).ndim == 3
        many = [(50, 100)] * 40
        for places in (many, gpd.GeoSeries(gpd.points_from_xy(*zip(*many, strict=True)))):
            with pytest.raises(CHMv2Error, match="at most 36 lines") as raised:
                plotting.plot_series(dates(), places)
            plotting.plot_series(dates(), follow(raised, places=places))
        points = gpd.GeoDataFrame(geometry=gpd.points_from_xy([50], [100]), crs=32633)
        with pytest.raises(CHMv2Error, match="a column 'plot'"):
            plotting.plot_series(dates(), points, label="plot")
        with pytest.raises(CHMv2Error, match=r"points are in .*, but the heights have no CRS"):
            plotting.plot_series(bare(dates()), points)


class TestValidation:
    @pytest.mark.parametrize("shape", [(20, 30), (80, 90)])
    def test_scatter_and_residuals(self, shape):
        reference = plane(shape)
        noise = np.random.default_rng(0).normal(1, 2, shape)
        picture = drawn(plotting.plot_validation((reference + noise).clip(min=-5), reference))
        left, right = picture.axes
        text = left.get_title()
        assert f"n = {reference.size:,}" in text
        assert f"bias {noise.mean():+.2f} m" in text
        assert (picture.colour_bar is None) == (reference.size <= 2000)
        medians = picture.artists[1].get_ydata()
        assert np.abs(np.median(medians) - 1) < 0.3
        assert right.get_ylabel() == "height minus reference [m]"

    def test_points(self):
        height = plane((60, 60), step=1.0)
        points = pd.DataFrame({"x": [80.0, 85], "y": [70.0, 75], "height": [10.0, 20]})
        picture = drawn(plotting.plot_validation(height, points))
        assert len(picture.artists[0].get_offsets()) == 2
        again = plotting.plot_validation(match(height, points))
        assert again.axes[0].get_title() == picture.axes[0].get_title()


def test_on_a_dark_background():
    import matplotlib.pyplot as plt

    with plt.style.context("dark_background"):
        picture = drawn(plotting.plot_height(plane().where(plane() > 3)))
        assert picture.axes[0].get_title() == ""
        bar = picture.axes[0].artists[-1]
        assert bar.patch.get_facecolor()[:3] == (1, 1, 1)
        assert bar.txt_label.get_children()[0].get_color() == "black"
