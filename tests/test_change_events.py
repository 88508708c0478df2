import statistics
import sys

import numpy as np
import pytest
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st

from xchmv2.change import events, trend
from xchmv2.errors import CHMv2Error

TIMES = np.array(
    ["2010-07-01", "2012-06-20", "2013-08-01", "2018-07-05", "2023-07-07"], "datetime64[ns]"
)


def cube(*pixels, times=TIMES):
    """A row of pixels, each a series of heights."""
    heights = np.array(pixels, dtype="f4").T[:, None, :]
    attrs = {"standard_name": "canopy_height", "units": "m", "chmv2_model": "demo"}
    return xr.DataArray(heights, {"time": times}, ("time", "y", "x"), "canopy_height", attrs)


def only(found, name):
    return found[name].values.ravel()[0]


def test_a_loss_with_its_dates_levels_and_recovery():
    found = events(cube([20, 21, 3, 4, 9]))
    assert only(found, "loss_date") == TIMES[2]
    assert only(found, "last_seen") == TIMES[1]
    assert only(found, "height_before") == 20
    assert only(found, "height_after") == 4
    assert only(found, "magnitude") == 16
    assert only(found, "recovery") == pytest.approx(0.0)  # the lower of 4 and 9 less 4
    assert only(found, "confirmed")
    assert found.attrs["threshold"] == 5


def test_recovery():
    found = events(cube([20, 2, 4, 12, 14]))
    assert only(found, "loss_date") == TIMES[1]
    assert only(found, "height_after") == 4
    assert only(found, "recovery") == pytest.approx((12 - 4) / 16)
    assert np.isnan(only(events(cube([20, 20, 20, 20, 2])), "recovery"))


@pytest.mark.parametrize(
    "heights",
    [
        [20, 20, 2, 20, 20],  # one date too low
        [20, 20, 45, 20, 20],  # one too high
        [10, 11, 12, 13, 14],
        [20, 18, 16, 14, 16],
        [np.nan] * 5,
        [20, np.nan, np.nan, np.nan, np.nan],
    ],
)
def test_no_loss(heights):
    found = events(cube(heights, [20] * 5)).isel(x=[0])
    assert np.isnat(only(found, "loss_date"))
    assert np.isnan(only(found, "magnitude"))
    assert not only(found, "confirmed")


def test_a_bad_date_beside_a_loss_does_not_move_it():
    for heights in ([20, 20, 2, 15, 2], [20, 20, 45, 2, 2], [20, 20, 3, 2, 2], [8, 20, 20, 2, 2]):
        found = events(cube(heights))
        date = TIMES[2] if heights[2] < 4 else TIMES[3]
        assert only(found, "loss_date") == date
        assert only(found, "confirmed")


def test_a_bad_date_before_a_loss_does_not_hide_it():
    found = events(cube([20, 2, 21, 20, 2, 2], times=np.append(TIMES, TIMES[-1] + 1)))
    assert only(found, "loss_date") == TIMES[4]
    assert only(found, "height_before") == 20


def test_at_the_ends_one_date_cannot_be_confirmed():
    for heights, date in (([20, 20, 20, 20, 2], 4), ([20, 2, 2, 2, 2], 1)):
        found = events(cube(heights))
        assert only(found, "loss_date") == TIMES[date]
        assert not only(found, "confirmed")
    assert only(events(cube([20, 20, 20, 2, 2])), "confirmed")


def test_missing_dates_are_skipped():
    found = events(cube([20, np.nan, 2, np.nan, 3]))
    assert only(found, "loss_date") == TIMES[2]
    assert only(found, "last_seen") == TIMES[0]


def naive(heights, threshold):
    """The algorithm of the docstring, in plain words, for one pixel."""
    valid = [(t, h) for t, h in enumerate(heights) if np.isfinite(h)]
    best, at = threshold, None
    for k in range(1, len(valid)):
        before = statistics.median_low(h for _, h in valid[max(0, k - 3) : k])
        after = statistics.median_high(h for _, h in valid[k : k + 3])
        here, previous = valid[k][1], valid[k - 1][1]
        gone = before - here > threshold and previous - after > threshold
        if gone and before - after > best:
            best, at, levels = before - after, k, (before, after)
    if at is None:
        return None
    before, after = levels
    last = min(h for _, h in valid[at:][-2:])
    recovery = (last - after) / (before - after) if at < len(valid) - 1 else np.nan
    confirmed = at >= 2 and len(valid) - at >= 2
    return valid[at][0], valid[at - 1][0], before, after, recovery, confirmed


@settings(max_examples=40)
@given(dates=st.integers(3, 9), seed=st.integers(0, 999), missing=st.sampled_from([0.0, 0.4]))
def test_equal_to_the_algorithm_in_plain_words(dates, seed, missing):
    rng = np.random.default_rng(seed)
    heights = rng.choice([1.0, 2, 4, 15, 18, 20, 25], (12, dates))
    heights[rng.random(heights.shape) < missing] = np.nan
    times = (np.datetime64("2000-01-01", "ns") + np.arange(dates) * np.timedelta64(300, "D"))[:]
    found = events(cube(*heights, times=times)).isel(y=0)
    for k, series in enumerate(heights):
        here, expected = found.isel(x=k), naive(series, 5.0)
        assert np.isnat(here["loss_date"]) == (expected is None)
        if expected is None:
            continue
        when, seen, before, after, recovery, confirmed = expected
        assert here["loss_date"] == times[when]
        assert here["last_seen"] == times[seen]
        assert (here["height_before"], here["height_after"]) == (before, after)
        np.testing.assert_allclose(here["recovery"], recovery, rtol=1e-5)
        assert bool(here["confirmed"]) == confirmed
        assert here["magnitude"] > 5


def test_lazy_and_the_same_for_any_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    heights = rng.choice([1.0, 2, 15, 18, 20, 25, np.nan], (5, 20, 30)).astype("f4")
    heights = xr.DataArray(heights, {"time": TIMES}, ("time", "y", "x"), "canopy_height")
    copy = heights.copy(deep=True)
    with no_compute():
        lazy = events(heights.chunk(time=2, y=7, x=11))
    expected = events(heights)
    xr.testing.assert_identical(lazy.compute(), expected)
    xr.testing.assert_identical(heights, copy)
    turned = events(heights.transpose("y", "time", "x"))
    xr.testing.assert_identical(turned, expected)
    monkeypatch.setattr(sys.modules["xchmv2.change.pixel_series"], "_SLAB", 40)
    xr.testing.assert_identical(events(heights), expected)


def test_labels():
    found = events(cube([20, 21, 3, 4, 9]))
    for layer in found.values():
        assert not {"standard_name", "chmv2_model"} & set(layer.attrs)
        assert layer.attrs["long_name"]
    assert found["magnitude"].attrs["units"] == "m"
    assert found["loss_date"].dtype == "datetime64[ns]"


@pytest.mark.parametrize("function", [events, trend])
@pytest.mark.parametrize("lazy", [False, True])
def test_attributes_stay_whatever_xarray_is_set_to(function, lazy):
    heights = cube([20, 21, 3, 4, 9], [20, 21, 22, 23, 24]).assign_coords(
        y=("y", [5e6], {"units": "metre"}), x=[5e5, 5e5 + 1]
    )
    heights = heights.odc.assign_crs(32633)
    with xr.set_options(keep_attrs=False):
        found = function(heights.chunk(x=1) if lazy else heights)
    for layer in found.values():
        assert layer.odc.crs.epsg == 32633
        assert layer.attrs["grid_mapping"] == "spatial_ref"
        assert layer["y"].attrs == {"units": "metre"}


@pytest.mark.parametrize("function", [events, trend])
def test_any_order_of_dims(function):
    heights = cube([20, 21, 3, 4, 9], [20, 21, 22, 23, 24])
    expected = function(heights)
    assert all(layer.dims == ("y", "x") for layer in expected.values())
    for dims in (("y", "x", "time"), ("x", "time", "y")):
        xr.testing.assert_identical(function(heights.transpose(*dims)), expected)
        lazy = heights.transpose(*dims).chunk(time=2, x=1)
        xr.testing.assert_identical(function(lazy).compute(), expected)


def test_bad_input():
    heights = cube([20, 21, 3, 4, 9])
    with pytest.raises(CHMv2Error, match="at least 3 dates, found 2 along 'time'"):
        events(heights[:2])
    with pytest.raises(CHMv2Error, match="strictly increasing order"):
        events(heights[::-1])
    for function in (events, trend):
        with pytest.raises(CHMv2Error, match="valid somewhere, found NaN everywhere"):
            function(heights.where(False))
    with pytest.raises(CHMv2Error, match="a threshold above 0 m, found threshold=-5"):
        events(heights, threshold=-5)
    with pytest.raises(CHMv2Error, match="dates along 'time', found no coordinate"):
        events(heights.drop_vars("time"))
