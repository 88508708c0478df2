"""What a raster holds: kinds, units, impossible values, and grids that are the same."""

import warnings

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import rioxarray  # noqa: F401  (registers .rio)
import xarray as xr
from conftest import cube, no_compute
from hypothesis import given
from hypothesis import strategies as st

from xchmv2 import change, plotting, structure
from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    on_same_grid,
    read_change,
    read_heights,
    read_raster,
    same_grid,
    tell_kind,
)
from xchmv2.training import calibrate

LEFT, TOP = 500_000.0, 5_300_000.0


def raster(values, **attrs):
    values = np.asarray(values)
    coords = {
        "y": TOP - (np.arange(values.shape[-2]) + 0.5),
        "x": LEFT + (np.arange(values.shape[-1]) + 0.5),
    }
    array = xr.DataArray(values, coords, ("y", "x"), attrs=attrs)
    return array.odc.assign_crs(32633)


def forest(shape=(12, 10), seed=0):
    return np.random.default_rng(seed).uniform(1, 40, shape).astype("f4")


def written(array):
    """As predict() and open_zarr() return heights: named, labelled, with an encoding."""
    attrs = {"standard_name": "canopy_height", "long_name": "canopy height", "units": "m"}
    array = array.rename("canopy_height").assign_attrs(attrs)
    array.encoding["_FillValue"] = np.float32(np.nan)
    return array


HEIGHT = raster(forest())
LATER = raster(forest(seed=1))


class TestKinds:
    def test_what_the_metadata_tell(self):
        assert tell_kind(HEIGHT) == "unknown"
        assert tell_kind(written(HEIGHT)) == "height"
        assert tell_kind(HEIGHT > 5) == "mask"
        assert tell_kind(HEIGHT.assign_attrs(units="Mg/ha")) == "other"
        assert tell_kind(HEIGHT.rename("bin_spread").assign_attrs(units="m")) == "other"
        assert tell_kind(HEIGHT.rename("height_change")) == "change"
        bands = xr.concat([HEIGHT] * 3, "band").astype("uint8")
        assert tell_kind(bands) == "imagery"

    def test_layers_of_a_difference(self):
        found = change.difference(HEIGHT, LATER, sigma=3.0)
        kinds = {name: tell_kind(layer) for name, layer in found.data_vars.items()}
        assert kinds == {
            "height_change": "change",
            "level_of_detection": "other",
            "z_score": "other",
            "p_value": "other",
            "significant": "mask",
        }

    @pytest.mark.parametrize(
        "odd",
        [
            HEIGHT > 5,
            HEIGHT.rename("height_change"),
            HEIGHT.assign_attrs(units="Mg/ha"),
            HEIGHT.assign_attrs(units="%"),
            xr.concat([HEIGHT] * 3, "band"),
        ],
        ids=["mask", "change", "biomass", "share", "imagery"],
    )
    @pytest.mark.parametrize(
        "use",
        [
            structure.canopy_cover,
            structure.gaps,
            plotting.plot_height,
            lambda odd: change.difference(odd, odd, sigma=2.0),
            lambda odd: change.trend(xr.concat([odd] * 3, "time")),
        ],
        ids=["cover", "gaps", "plot", "difference", "trend"],
    )
    def test_what_is_no_height_is_refused(self, use, odd):
        with pytest.raises(CHMv2Error, match="expected canopy heights, found"):
            use(odd)


class TestUnits:
    @pytest.mark.parametrize(
        ("unit", "factor"),
        [("m", 1), ("Metres", 1), ("cm", 100), ("mm", 1000), ("ft", 1 / 0.3048), ("feet", 3.28084)],
    )
    def test_converted(self, unit, factor):
        given_ = (HEIGHT * factor).assign_attrs(units=unit)
        found = read_heights(given_)
        np.testing.assert_allclose(found, HEIGHT, rtol=1e-5)
        assert found.attrs["units"] == "m"
        assert given_.attrs["units"] == unit
        cover = structure.canopy_cover(given_, 10.0, cell=None)
        xr.testing.assert_allclose(cover, structure.canopy_cover(HEIGHT, 10.0, cell=None))

    def test_integers_of_centimetres_with_nodata(self):
        stored = (HEIGHT * 100).round().astype("int16").assign_attrs(units="cm", nodata=-9999)
        stored[0, 0] = -9999
        found = read_heights(stored)
        assert np.isnan(found[0, 0])
        np.testing.assert_allclose(found[1:], HEIGHT[1:], atol=0.006)

    def test_scale_and_offset_left_in_the_attributes(self):
        stored = ((HEIGHT - 10) / 0.5).round().astype("int16")
        stored = stored.assign_attrs(scale_factor=0.5, add_offset=10.0, _FillValue=-99)
        found = read_heights(stored)
        np.testing.assert_allclose(found, HEIGHT, atol=0.26)
        assert not {"scale_factor", "add_offset", "_FillValue"} & set(found.attrs)
        # In a difference the offset has cancelled.
        floats = ((LATER - HEIGHT) / 0.5).assign_attrs(scale_factor=0.5, add_offset=10)
        with pytest.warns(UserWarning, match="scale_factor=0.5 stands in the attributes and is ap"):
            moved = read_change(floats)
        np.testing.assert_allclose(moved, LATER - HEIGHT, atol=1e-4)

    def test_a_scale_that_arithmetic_has_applied_already(self):
        stored = (HEIGHT * 100).round().astype("int16").assign_attrs(scale_factor=0.01)
        with xr.set_options(keep_attrs=True):
            metres = stored * 0.01
        with pytest.warns(UserWarning, match=r"drop it: array.drop_attrs\(\)"):
            read_heights(metres)
        np.testing.assert_allclose(read_heights(metres.drop_attrs()), HEIGHT, atol=0.006)

    def test_the_advice_works(self):
        with pytest.raises(CHMv2Error) as caught:
            read_heights(HEIGHT.assign_attrs(units="m above ground"))
        assert "assign_attrs(units='m')" in str(caught.value)
        xr.testing.assert_equal(read_heights(HEIGHT.assign_attrs(units="m")), HEIGHT)


class TestImpossible:
    @pytest.mark.parametrize("lazy", [False, True])
    def test_a_spike_is_missing_and_counted(self, lazy):
        spiked = HEIGHT.copy()
        spiked[2, 3], spiked[4, 5], spiked[6, 7] = 1043.0, -32.0, np.inf
        given_ = spiked.chunk(y=-1, x=-1) if lazy else spiked
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if lazy:
                with no_compute():
                    found = structure.canopy_cover(given_, cell=None)
        with pytest.warns(UserWarning, match="3 of 120 values cannot be heights"):
            found = structure.canopy_cover(given_, cell=None).compute()
        whole = HEIGHT.where(spiked == HEIGHT)
        np.testing.assert_allclose(found, structure.canopy_cover(whole, cell=None))

    @pytest.mark.parametrize("lazy", [False, True])
    def test_a_block_of_them_asks_about_unit_and_nodata(self, lazy):
        centimetres = HEIGHT * 100
        given_ = centimetres.chunk(y=-1) if lazy else centimetres
        with pytest.raises(CHMv2Error, match="in another unit, declare it") as caught:
            structure.percentile(given_, 95, cell=None).compute()
        # What it says, pasted.
        fix = str(caught.value)
        assert "height.assign_attrs(units='cm')" in fix
        height = centimetres
        found = eval("height.assign_attrs(units='cm')", {"height": height})
        np.testing.assert_allclose(read_heights(found), HEIGHT, rtol=1e-5)
        height = HEIGHT.where(HEIGHT > 30, -9999.0)
        with pytest.raises(CHMv2Error, match="stand for nodata: height") as caught:
            read_heights(height)
        call = str(caught.value).rpartition("nodata: ")[2]
        found = read_heights(eval(call, {"height": height}))
        assert int(found.notnull().sum()) == int((HEIGHT > 30).sum())

    @given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 3))
    def test_the_same_for_any_chunks(self, rows, cols, spikes):
        spiked = HEIGHT.copy()
        places = np.random.default_rng(spikes).choice(HEIGHT.size, spikes, replace=False)
        spiked.values.ravel()[places] = 400.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = read_heights(spiked)
            other = read_heights(spiked.chunk(y=max(rows, 4), x=max(cols, 4))).compute()
        xr.testing.assert_identical(one, other)

    def test_identical_calls_give_identical_keys(self):
        lazy = HEIGHT.chunk(y=5)
        assert read_heights(lazy).data.name == read_heights(lazy).data.name

    def test_other_quantities_are_left_alone(self):
        biomass = (HEIGHT * 20).assign_attrs(units="Mg/ha")
        xr.testing.assert_identical(read_raster(biomass), biomass)


class TestChange:
    def test_heights_are_refused_lazily_too(self):
        for height in (written(HEIGHT), written(HEIGHT.chunk(y=4))):
            for use in (
                lambda h: change.gain(h, threshold=5),
                lambda h: change.loss(h, threshold=5),
                plotting.plot_change,
                change.correlation_length,
                lambda h: change.label_events(h > 5, h),
            ):
                with pytest.raises(CHMv2Error, match="a change of canopy height, found canopy h"):
                    use(height)

    @pytest.mark.parametrize("lazy", [False, True])
    def test_a_plain_difference_of_heights_is_a_change(self, lazy):
        before, after = written(HEIGHT), written(LATER)
        if lazy:
            before, after = before.chunk(y=4), after.chunk(y=4)
        with xr.set_options(keep_attrs=True):
            plain = after - before
        assert plain.attrs["standard_name"] == "canopy_height"
        found = change.loss(plain, threshold=5, opening=None, min_area=None)
        xr.testing.assert_equal(found.compute(), (LATER - HEIGHT <= -5).rename("loss"))

    @pytest.mark.parametrize("lazy", [False, True])
    def test_values_that_look_like_heights_warn_when_read(self, lazy):
        masked = written(HEIGHT).where(HEIGHT > 3)
        assert not masked.encoding
        with pytest.warns(UserWarning, match="look like heights, not like a change"):
            change.gain(masked.chunk(y=4) if lazy else masked, threshold=5).compute()

    def test_events_are_a_loss_wherever_a_change_is_taken(self):
        times = pd.to_datetime(["2019", "2020", "2021", "2022"])
        cube = xr.concat([HEIGHT * 0 + 20] * 2 + [HEIGHT * 0 + 1] * 2, "time")
        found = change.events(cube.assign_coords(time=times))
        np.testing.assert_allclose(read_change(found), -19)
        np.testing.assert_allclose(read_change(found["magnitude"]), -19)
        assert bool(change.loss(found["magnitude"], threshold=5, min_area=None).all())
        assert not bool(change.gain(found["magnitude"], threshold=5).any())

    def test_change_in_feet(self):
        feet = ((LATER - HEIGHT) / 0.3048).rename("height_change").assign_attrs(units="ft")
        found = change.loss(feet, threshold=5, opening=None, min_area=None)
        xr.testing.assert_equal(found, (LATER - HEIGHT <= -5).rename("loss"))


class TestSameGrid:
    def test_within_a_hundredth_of_a_pixel(self):
        near = HEIGHT.assign_coords(x=HEIGHT.x + 0.009, y=HEIGHT.y - 0.009)
        far = HEIGHT.assign_coords(x=HEIGHT.x + 0.02)
        assert same_grid(near, HEIGHT)
        assert not same_grid(far, HEIGHT)
        assert not same_grid(HEIGHT.odc.assign_crs(32634), HEIGHT)
        xr.testing.assert_equal(on_same_grid(near, HEIGHT).x, HEIGHT.x)

    def test_one_row(self):
        row = HEIGHT.isel(y=[3])
        assert same_grid(row.assign_coords(y=row.y + 0.005), row)
        assert not same_grid(row.assign_coords(y=row.y + 0.5), row)

    def test_a_micrometre_is_taken_everywhere(self):
        moved = HEIGHT.assign_coords(x=HEIGHT.x + 1e-6)
        sigma = xr.full_like(moved, 3.0)
        found = change.difference(HEIGHT, LATER.assign_coords(x=LATER.x - 1e-6), sigma=sigma)
        assert found.sizes == HEIGHT.sizes
        change.loss(found, mask=moved > 100)
        dask_sigma = sigma.copy(data=da.from_array(sigma.values))
        assert change.difference(HEIGHT, LATER, sigma=dask_sigma).sizes == HEIGHT.sizes

    @pytest.mark.filterwarnings("ignore::xchmv2.errors.DemoModelWarning")
    def test_a_mask_of_valid_pixels_for_predict(self):
        imagery = cube((64, 64))
        valid = (imagery["red"] > 20).drop_vars("spatial_ref")
        found = imagery.chmv2.plan(
            "demo", valid=valid.assign_coords(x=valid.x + 1e-6), tile=64, overlap=0
        )
        assert found.tiles == 1
        with pytest.raises(CHMv2Error, match="valid on the imagery's own coordinates"):
            imagery.chmv2.plan(
                "demo", valid=valid.assign_coords(x=valid.x + 0.1), tile=64, overlap=0
            )


def test_calibrate_reads_heights_as_all_do():
    shape = (40, 40)
    metres = raster(forest(shape))
    centimetres = (metres * 100).round().astype("int16").assign_attrs(units="cm")
    one, found = calibrate(centimetres, metres * 1.1 + 1)
    other, expected = calibrate(metres, metres * 1.1 + 1)
    assert found.slope == pytest.approx(expected.slope, abs=1e-3)
    assert one.attrs["units"] == "m"
    np.testing.assert_allclose(one, other, atol=0.02)
