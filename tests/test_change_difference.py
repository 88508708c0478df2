import datetime
import warnings

import numpy as np
import pandas as pd
import pytest
import rioxarray
import scipy.stats
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from test_change_stable import pair

from xchmv2.change import ComparisonWarning, difference, difference_between, stable_bias
from xchmv2.errors import CHMv2Error

LAYERS = ["height_change", "level_of_detection", "z_score", "p_value", "significant"]


@pytest.fixture
def heights():
    return with_crs(pair(shape=(60, 70)))


def with_crs(heights):
    coords = {"y": 5e6 - 0.6 * np.arange(60), "x": 5e5 + 0.6 * np.arange(70)}
    placed = heights.assign_coords(coords).odc.assign_crs(32633)
    placed.attrs |= {"grid_mapping": "spatial_ref", "chmv2_model": "demo"}
    return placed


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_errors_of_two_dates_combine_in_quadrature(heights, confidence):
    found = difference(heights[0], heights[1], sigma=(3.0, 4.0), confidence=confidence)
    change = (heights[1] - heights[0]).values.astype(float)
    np.testing.assert_allclose(found["height_change"], change, atol=1e-5)
    np.testing.assert_allclose(found["z_score"], change / 5, rtol=1e-5, atol=1e-6)
    expected = 2 * scipy.stats.norm.sf(np.abs(change) / 5)
    np.testing.assert_allclose(found["p_value"], expected, rtol=1e-3, atol=1e-7)
    limit = scipy.stats.norm.ppf(0.5 + confidence / 2) * 5
    np.testing.assert_allclose(found["level_of_detection"], limit, rtol=1e-6)
    np.testing.assert_array_equal(found["significant"], np.abs(change) > limit)


def test_shared_error_cancels(heights):
    first, second = heights
    known = {r: difference(first, second, sigma=4, error_correlation=r) for r in (0.0, 0.5, 0.9)}
    sds = [float(c["level_of_detection"][0, 0]) / 1.959964 for c in known.values()]
    np.testing.assert_allclose(sds, [4 * 2**0.5, 4, 4 * 0.2**0.5], rtol=1e-5)


def test_measured_error_is_that_of_the_difference_itself():
    rng = np.random.default_rng(3)
    truth = rng.uniform(10, 30, (300, 300))
    first, second = (
        xr.DataArray(truth + rng.normal(0, 2, truth.shape), dims=("y", "x")) for _ in range(2)
    )
    found = difference(first, second)
    limit = float(found["level_of_detection"][0, 0])
    assert limit == pytest.approx(1.96 * 2 * 2**0.5, rel=0.02)
    assert float(found["significant"].mean()) == pytest.approx(0.05, abs=0.005)
    assert float(found["stable_offset"]) == pytest.approx(0, abs=0.05)


def test_open_ground_says_nothing_about_canopy():
    rng = np.random.default_rng(4)
    cover, shape = rng.random((300, 300)) < 0.6, (300, 300)
    truth = np.where(cover, rng.uniform(10, 30, shape), 0.0)
    cut = truth.copy()
    cut[:40] = 0.0
    first, second = (
        xr.DataArray(t + np.where(t > 0, rng.normal(0, 2, shape), abs(rng.normal(0, 0.2, shape))),
                     dims=("y", "x"))
        for t in (truth, cut)
    )  # fmt: skip
    limit = difference(first, second)["level_of_detection"].values / 1.96
    of_canopy = (second - first).values[cut > 0].std()
    assert np.ptp(limit) < 0.2  # the lowest canopy speaks for the ground
    np.testing.assert_allclose(limit, of_canopy, rtol=0.1)
    still = difference(first.where(first > 2, 0), second.where(second > 2, 0))
    assert np.isfinite(still["z_score"]).all()


def test_offset_is_told_and_stays():
    heights = pair(offset=1.5)
    found = difference(heights[0], heights[1])
    assert float(found["stable_offset"]) == pytest.approx(1.5, abs=0.1)
    np.testing.assert_allclose(found["height_change"], heights[1] - heights[0])
    corrected = stable_bias(heights)
    found = difference(corrected[0], corrected[1])
    assert float(found["stable_offset"]) == pytest.approx(0, abs=0.02)


def test_bin_spread(heights):
    spread = abs(heights) * 0.1 + 1
    cube = xr.Dataset({"canopy_height": heights, "bin_spread": spread})
    found = difference_between(cube, "2019", "2024", sigma="bin_spread")
    sd = np.hypot(spread[0], spread[1])
    np.testing.assert_allclose(found["z_score"], (heights[1] - heights[0]) / sd, rtol=1e-4)
    same = difference_between(heights, "2019", "2024", sigma=spread)
    xr.testing.assert_identical(same, found)
    with pytest.raises(CHMv2Error, match="a Dataset with 'bin_spread', found a DataArray"):
        difference(heights[0], heights[1], sigma="bin_spread")
    with pytest.raises(CHMv2Error, match=r"found a Dataset of \['canopy_height'\]; predict it"):
        difference_between(cube[["canopy_height"]], "2019", "2024", sigma="bin_spread")


@settings(max_examples=6)
@given(
    rows=st.integers(15, 60),
    cols=st.integers(15, 70),
    sigma=st.sampled_from([None, 3.0, "map"]),
)
def test_lazy_and_the_same_for_any_chunks(rows, cols, sigma):
    heights = with_crs(pair(shape=(60, 70)))
    heights[0, 3:6, 2] = np.nan
    sigma = abs(heights[0]).drop_vars("time") + 1 if isinstance(sigma, str) else sigma
    expected = difference(heights[0], heights[1], sigma=sigma)
    chunked = heights.chunk(time=1, y=rows, x=cols)
    lazy_sigma = sigma.chunk(y=7) if isinstance(sigma, xr.DataArray) else sigma
    with no_compute():
        found = difference(chunked[0], chunked[1], sigma=lazy_sigma)
    assert all(found[name].chunks is not None for name in LAYERS)
    xr.testing.assert_identical(found.compute(), expected)


def test_labels_and_the_input(heights):
    copy = heights.copy(deep=True)
    found = difference(heights[0], heights[1], sigma=4, correlation_length=20)
    xr.testing.assert_identical(heights, copy)
    assert list(found) == LAYERS
    for layer in found.values():
        assert layer.dims == ("y", "x")
        assert layer.attrs["grid_mapping"] == "spatial_ref"
        assert not {"standard_name", "chmv2_model"} & set(layer.attrs)
        assert layer.odc.crs.epsg == 32633
    assert found["height_change"].attrs["units"] == "m"
    assert found["significant"].dtype == bool
    assert found["height_change"].dtype == np.float32
    assert found.attrs == {
        "before": "2019-07-01T00:00:00",
        "after": "2024-07-01T00:00:00",
        "confidence": 0.95,
        "correlation_length": 20.0,
        "comparison_warnings": "",
    }


def test_missing_heights_are_no_change(heights):
    heights[0, 5] = np.nan
    heights[1, 6] = np.nan
    found = difference(heights[0], heights[1], sigma=1.0)
    for name in LAYERS[:4]:
        assert np.isnan(found[name][5:7]).all()
        assert np.isfinite(found[name][7:]).all()
    assert not found["significant"][5:7].any()


def test_coordinates_that_differ_by_rounding_lose_no_pixel(heights):
    other = heights[1].assign_coords(x=heights["x"] + 1e-9)
    found = difference(heights[0], other, sigma=4)
    assert found.sizes == {"y": 60, "x": 70}


@pytest.mark.parametrize("declared", ["attrs", "encoding"])
def test_declared_nodata_are_missing(heights, declared):
    whole = heights.round().astype(np.int16)
    whole[0, 7, 3] = -9999
    getattr(whole, declared)["_FillValue"] = -9999
    found = difference(whole[0], whole[1], sigma=4)
    assert np.isnan(found["height_change"][7, 3])
    assert int(found["height_change"].isnull().sum()) == 1
    assert not found["significant"][7, 3]
    corrected = stable_bias(whole)
    assert np.isnan(corrected[0, 7, 3])
    assert int(corrected.isnull().sum()) == 1


def test_what_is_declared_missing_is_not_declared_of_the_result(heights):
    whole = heights.round().astype(np.int16).assign_attrs(_FillValue=-9999)
    assert "_FillValue" not in stable_bias(whole).attrs
    assert whole.attrs["_FillValue"] == -9999


def test_declared_nodata_of_sigma_are_missing(heights):
    sigma = xr.full_like(heights[0].drop_vars("time"), 4.0).assign_attrs(_FillValue=-9999.0)
    sigma[7, 3] = -9999
    found = difference(heights[0], heights[1], sigma=sigma)
    assert int(found["level_of_detection"].isnull().sum()) == 1
    assert np.isnan(found["level_of_detection"][7, 3])


@pytest.mark.parametrize("sigma", [None, 4.0])
@pytest.mark.parametrize("lazy", [False, True])
def test_attributes_stay_whatever_xarray_is_set_to(heights, sigma, lazy):
    heights["y"].attrs["units"] = "metre"
    cube = heights.chunk(y=23) if lazy else heights
    with xr.set_options(keep_attrs=False):
        found = difference(cube[0], cube[1], sigma=sigma)
    for layer in found.values():
        assert layer.odc.crs.epsg == 32633
        assert layer.attrs["grid_mapping"] == "spatial_ref"
        assert layer["y"].attrs == {"units": "metre"}


@pytest.mark.parametrize(
    "label",
    [
        2024,
        np.datetime64("2024"),
        datetime.date(2024, 7, 1),
        datetime.datetime(2024, 7, 1, 10, 30, 5),
        "2024-07-01T10:30:05Z",
        "2024-07-01T12:30:05+02:00",
        pd.Timestamp("2024-07-01T10:30:05", tz="UTC"),
        xr.DataArray(np.datetime64("2024-07-01T10:30:05", "ns")),
    ],
)
def test_labels_of_other_kinds(heights, label):
    times = np.array(["2019-07-01T09:00", "2024-07-01T10:30:05"], "datetime64[ns]")
    found = difference_between(heights.assign_coords(time=times), "2019", label, sigma=4)
    assert found.attrs["after"] == "2024-07-01T10:30:05"


@pytest.mark.parametrize("label", [None, 2023, ["2024"], "2024-07-01T10:30:00-08:00"])
def test_labels_of_no_date(heights, label):
    with pytest.raises(CHMv2Error, match="found none; the dates are 2019-07-01, 2024-07-01;"):
        difference_between(heights, "2019", label, sigma=4)


def test_labels_mean_one_date(heights):
    later = heights[1].assign_coords(time=np.datetime64("2024-09-01", "ns"))
    cube = xr.concat([heights, later.expand_dims("time")], "time")
    found = difference_between(cube, "2019-07", "2024-07", sigma=4)
    assert found.attrs["after"] == "2024-07-01T00:00:00"
    exact = difference_between(cube, np.datetime64("2019-07-01"), "2024-07-01", sigma=4)
    xr.testing.assert_identical(exact, found)
    several = "one date, '2024', found 2 of them: 2024-07-01, 2024-09-01; write more of the date"
    with pytest.raises(CHMv2Error, match=several):
        difference_between(cube, "2019", "2024")
    none = "'2021', found none; the dates are 2019-07-01, 2024-07-01, 2024-09-01; choose one"
    with pytest.raises(CHMv2Error, match=none):
        difference_between(cube, "2019", "2021")
    with pytest.raises(CHMv2Error, match="'no date', found none; the dates are"):
        difference_between(cube, "no date", "2021")
    with pytest.raises(CHMv2Error, match="before to be earlier than after, found 2024"):
        difference_between(cube, "2024-09", "2019")
    with pytest.raises(CHMv2Error, match=r"found 2019.* and 2019.*; choose two"):
        difference_between(cube, "2019", "2019")
    with pytest.raises(CHMv2Error, match="strictly increasing order, found 2024-09-01"):
        difference_between(cube[::-1], "2019", "2024-07")


def dated(heights, days, **coords):
    """Two dates so many days apart in the year, with more coordinates along time."""
    start = np.datetime64("2019-06-15", "ns")
    times = np.array([start, start + (5 * 365 + 1 + days) * np.timedelta64(1, "D")])
    return heights.assign_coords(time=times, **{n: ("time", v) for n, v in coords.items()})


def test_conditions_that_differ_are_told(heights):
    flags = xr.DataArray(
        np.array([0, 0b10110], np.uint8),
        dims="time",
        attrs={
            "flag_masks": np.array([1, 2, 4, 8, 16], np.uint8),
            "flag_meanings": "low_sun high_off_nadir sun_elevation_unknown off_nadir_unknown "
            "upsampled",
        },
    )
    cube = dated(heights, 92, sun_elevation=[62.0, 40.0]).assign_coords(quality_flags=flags)
    with pytest.warns(ComparisonWarning) as told:
        found = difference(cube[0], cube[1], sigma=4)
    text = str(told[0].message)
    assert found.attrs["comparison_warnings"] == text
    assert "the dates are 92 days of the year apart" in text
    assert "the sun stood at 62 and 40 degrees" in text
    assert "quality flags of the second date: high_off_nadir upsampled low_sun" in text


@pytest.mark.parametrize(("days", "told"), [(40, False), (50, True), (330, False), (200, True)])
def test_seasons_are_compared_around_the_year(heights, days, told):
    cube = dated(heights, days)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        difference(cube[0], cube[1], sigma=4)
    assert bool(caught) == told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -4}, "a sigma above 0 m, found sigma=-4"),
        ({"sigma": 0}, "a sigma above 0 m, found sigma=0"),
        ({"sigma": np.nan}, "a sigma above 0 m, found sigma=nan"),
        ({"sigma": "spread"}, "a DataArray or 'bin_spread', found 'spread'"),
        ({"sigma": np.ones((60, 70))}, "a number or a DataArray, found ndarray of shape"),
        ({"sigma": (1, 2, 3)}, "one for each date, found 3"),
        ({"sigma": 4, "confidence": 95}, "a confidence between 0 and 1, found confidence=95"),
        (
            {"sigma": 4, "correlation_length": -1},
            "at least 0 m, or None, found correlation_length=-1",
        ),
        ({"sigma": 4, "error_correlation": 1}, "from -1 to below 1, found error_correlation=1"),
        ({"error_correlation": 0.5}, "which includes the correlation; leave error_correlation out"),
    ],
)
def test_bad_options(heights, options, message):
    with pytest.raises(CHMv2Error, match=message):
        difference(heights[0], heights[1], **options)


def test_bad_input(heights):
    first, second = heights
    with pytest.raises(CHMv2Error, match="found a least value of -1"):
        difference(first, second, sigma=xr.full_like(first.drop_vars("time"), -1))
    with pytest.raises(CHMv2Error, match="one date of heights as before, found 2 along 'time'"):
        difference(heights, second)
    with pytest.raises(CHMv2Error, match=r"\(60, 70\) and \(59, 70\) pixels; resample one first"):
        difference(first, second[1:])
    with pytest.raises(CHMv2Error, match=r"x coordinates 0\.6 apart"):
        difference(first, second.assign_coords(x=second["x"] + 0.6))
    with pytest.raises(CHMv2Error, match="EPSG:32633 and EPSG:32634"):
        difference(first, second.odc.assign_crs(32634))
    with pytest.raises(CHMv2Error, match="valid somewhere, found NaN everywhere; choose other"):
        difference(first, second.where(False))
    with pytest.raises(CHMv2Error, match="valid somewhere, found NaN everywhere"):
        difference(first, second.where(False), sigma=4)
    with pytest.raises(CHMv2Error, match="no pixel is valid and stable on both dates"):
        difference(first, second, stable=first > 1000)
    with pytest.raises(CHMv2Error, match="a sigma above 0 m, found NaN everywhere"):
        difference(first, second, sigma=xr.full_like(first.drop_vars("time"), np.nan))
    with pytest.raises(CHMv2Error, match=r"do not vary on stable ground, .* sigma=4\.0"):
        difference(first, first.assign_coords(time=second["time"]))
    with pytest.raises(CHMv2Error, match="stable= is used for sigma=None only; leave out"):
        difference(first, second, sigma=4, stable=first > 2)
    with pytest.raises(CHMv2Error, match=r"'canopy_height', or with one variable only, found"):
        difference(xr.Dataset({"a": first, "b": first}), second)
    with pytest.raises(CHMv2Error, match="heights as a DataArray or a Dataset, found ndarray"):
        difference(first.values, second)


def test_lidar_of_two_dates(data):
    folder = data / "chm_change_cauaxi_window"
    before, after = (
        rioxarray.open_rasterio(folder / f"CAU_CHM_{year}_nw100.tif") for year in (2012, 2014)
    )
    change = difference(before, after, sigma=1.0)["height_change"]
    # From reference_values.json, computed with numpy.
    assert float(change.mean()) == pytest.approx(-0.3977, abs=1e-4)
    assert float(change.median()) == pytest.approx(0.12, abs=1e-4)
    assert float(change.sum()) == pytest.approx(-3976.8, abs=0.1)
    assert int((change < -5).sum()) == 1213
    assert int((change > 5).sum()) == 858
