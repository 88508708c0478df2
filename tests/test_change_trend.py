import sys
import warnings

import numpy as np
import pymannkendall
import pytest
import scipy.stats
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import follow

from xchmv2.change import trend
from xchmv2.errors import CHMv2Error

NAMES = ("slope", "slope_low", "slope_high", "intercept", "tau", "p_value")


def series(dates=9, shape=(6, 7), *, seed=0, missing=0.3, whole=True):
    """Random heights on irregular dates, with gaps and, if whole metres, with ties."""
    rng = np.random.default_rng(seed)
    days = np.sort(rng.choice(6000, dates, replace=False)).astype("timedelta64[D]")
    heights = rng.normal(10, 3, (dates, *shape)) + np.arange(dates)[:, None, None] * 0.5
    heights = np.round(heights) if whole else heights
    heights[rng.random(heights.shape) < missing] = np.nan
    time = (np.datetime64("2001-02-03") + days).astype("datetime64[ns]")
    attrs = {"standard_name": "canopy_height", "units": "m", "chmv2_model": "demo"}
    return xr.DataArray(heights, {"time": time}, ("time", "y", "x"), "canopy_height", attrs)


def one_by_one(heights, confidence=0.95):
    """What scipy and pymannkendall say of each pixel."""
    time = heights["time"].values
    years = (time - time[0]) / np.timedelta64(1, "D") / 365.25
    out = np.full((len(NAMES), *heights.shape[1:]), np.nan)
    for at in np.ndindex(heights.shape[1:]):
        values = heights.values[(slice(None), *at)]
        ok = np.isfinite(values)
        if ok.sum() < 3:
            continue
        sen = scipy.stats.theilslopes(values[ok], years[ok], confidence)
        test = pymannkendall.original_test(values[ok])
        lines = (sen.slope, sen.low_slope, sen.high_slope, sen.intercept)
        out[(slice(None), *at)] = (*lines, test.Tau, test.p)
    return out


@settings(max_examples=25)
@given(
    dates=st.integers(3, 14),
    seed=st.integers(0, 999),
    missing=st.sampled_from([0.0, 0.3, 0.7]),
    whole=st.booleans(),
    confidence=st.sampled_from([0.8, 0.95, 0.99]),
)
def test_equal_to_scipy_and_pymannkendall(dates, seed, missing, whole, confidence):
    heights = series(dates, (4, 5), seed=seed, missing=missing, whole=whole)
    found = trend(heights, confidence=confidence)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of pymannkendall where all are equal
        expected = one_by_one(heights, confidence)
    for name, values in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_array_equal(found["n_obs"], heights.notnull().sum("time"))


@settings(max_examples=8)
@given(rows=st.integers(1, 6), cols=st.integers(1, 7), times=st.integers(1, 9))
def test_lazy_and_the_same_for_any_chunks(rows, cols, times):
    heights = series().astype("f4")
    with no_compute():
        lazy = trend(heights.chunk(time=times, y=rows, x=cols))
    xr.testing.assert_identical(lazy.compute(), trend(heights))


def test_labels_and_the_input():
    heights = series().astype("f4")
    copy = heights.copy(deep=True)
    found = trend(heights.transpose("x", "y", "time"))
    xr.testing.assert_identical(heights, copy)
    assert set(found) == {*NAMES, "n_obs"}
    assert found["slope"].attrs == {"long_name": "trend of canopy height", "units": "m year-1"}
    assert found["intercept"].attrs["time"] == str(np.datetime_as_string(heights.time[0], "s"))
    assert found["slope"].dtype == np.float32
    assert found["slope"].dims == ("y", "x")
    xr.testing.assert_identical(found.transpose("y", "x"), trend(heights))


def test_a_known_slope_per_year_of_365_25_days():
    time = np.datetime64("2000-01-01", "ns") + np.array([0, 400, 1461, 5000]) * np.timedelta64(
        1, "D"
    )
    years = np.array([0, 400, 1461, 5000]) / 365.25
    heights = xr.DataArray((7 + 0.5 * years)[:, None, None], {"time": time}, ("time", "y", "x"))
    found = trend(heights)
    assert found["slope"].item() == pytest.approx(0.5)
    assert found["intercept"].item() == pytest.approx(7)
    assert found["tau"].item() == 1


def test_few_observations():
    heights = series(4, missing=0.0)
    heights[:2, 0] = np.nan
    found = trend(heights)
    assert np.isnan(found["slope"][0]).all()
    assert (found["n_obs"][0] == 2).all()
    assert np.isfinite(trend(heights, 2)["slope"][0]).all()
    nothing = trend(heights.where(False).chunk())
    assert np.isnan(nothing["p_value"]).all()
    assert (nothing["n_obs"] == 0).all()


def test_memory_is_bounded_by_slabs(monkeypatch):
    heights = series(8)
    expected = trend(heights)
    monkeypatch.setattr(sys.modules["xchmv2.change.pixel_series"], "_SLAB", 200)
    xr.testing.assert_identical(trend(heights), expected)


def undated(heights):
    return heights.assign_coords(time=heights.time.where(np.arange(len(heights)) > 0))


def test_bad_input():
    heights = series()
    with pytest.raises(CHMv2Error, match="at least 3 dates, found 1 along 'time'"):
        trend(heights[:1])
    with pytest.raises(CHMv2Error, match="at least 5 dates, found 4"):
        trend(heights[:4], 5)
    with pytest.raises(CHMv2Error, match=r"strictly increasing order, found .*sort them"):
        trend(heights[::-1])
    for wrong in (heights[::-1], heights[[0, 1, 1, 2]], undated(heights)):
        with pytest.raises(CHMv2Error, match="strictly increasing order") as raised:
            trend(wrong)
        assert set(trend(follow(raised, height=wrong)).data_vars) >= {"slope"}
    layers = heights.expand_dims(layer=2, axis=1)
    with pytest.raises(CHMv2Error, match=r"dims \(time, y, x\), found dims") as raised:
        trend(layers)
    xr.testing.assert_equal(trend(follow(raised, height=layers)), trend(heights))
    with pytest.raises(CHMv2Error, match=r"dims \(time, y, x\), found dims"):
        trend(heights[0])
    with pytest.raises(CHMv2Error, match="dates along 'time', found int64"):
        trend(heights.assign_coords(time=np.arange(9)))
    with pytest.raises(CHMv2Error, match="min_obs as a whole number of at least 2, found"):
        trend(heights, 1)
    with pytest.raises(CHMv2Error, match="a confidence between 0 and 1, found confidence=95"):
        trend(heights, confidence=95)
    with pytest.raises(CHMv2Error, match="canopy heights, found a mask"):
        trend(heights > 3)
