import sys
import warnings

import numpy as np
import pytest
import xarray as xr
from conftest import cube

from xchmv2 import plotting
from xchmv2.errors import CHMv2Error, ImageryError


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
    message = (
        r'matplotlib, to draw with, found that it is not installed; pip install "xchmv2\[plot\]"'
    )
    for draw in (plotting.require_matplotlib, plotting.missing_patch):
        with pytest.raises(CHMv2Error, match=message):
            draw()
    with pytest.raises(CHMv2Error, match=message):
        plotting.new_figure(1, 1)
