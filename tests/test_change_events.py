import itertools
import statistics
import sys

import numpy as np
import pytest
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from xchmv2.change import events, loss, stable_bias, trend
from xchmv2.errors import CHMv2Error

TIMES = np.array(
    ["2010-07-01", "2012-06-20", "2013-08-01", "2018-07-05", "2023-07-07"], "datetime64[ns]"
)


YEARLY = np.arange("2000", "2016", dtype="M8[Y]").astype("M8[ns]")


def cube(*pixels, times=TIMES):
    """A row of pixels, each a series of heights."""
    heights = np.array(pixels, dtype="f4").T[:, None, :]
    attrs = {"standard_name": "canopy_height", "units": "m", "chmv2_model": "demo"}
    return xr.DataArray(heights, {"time": times}, ("time", "y", "x"), "canopy_height", attrs)


def only(found, name):
    return found[name].values.ravel()[0]


def test_a_loss_with_its_dates_levels_and_recovery():
    found = events(cube([20, 21, 3, 4, 9]), sigma=1)
    assert only(found, "loss_date") == TIMES[2]
    assert only(found, "last_seen") == TIMES[1]
    assert only(found, "height_before") == 20
    assert only(found, "height_after") == 4
    assert only(found, "magnitude") == 16
    assert only(found, "recovery") == pytest.approx(0.0)  # the lower of 4 and 9 less 4
    assert not only(found, "confirmed")  # which takes three dates on either side
    assert found.attrs == {"threshold": 5, "confirmable": "none"}


def test_a_confirmed_loss_has_medians_of_five():
    found = events(cube([9, 19, 20, 21, 20, 22, 4, 3, 5, 6], times=YEARLY[:10]), sigma=1)
    assert only(found, "loss_date") == YEARLY[6]
    assert only(found, "last_seen") == YEARLY[5]
    assert (only(found, "height_before"), only(found, "height_after")) == (20, 4.5)
    assert only(found, "magnitude") == 15.5
    assert only(found, "recovery") == pytest.approx((5 - 4.5) / 15.5)
    assert only(found, "confirmed")
    assert found.attrs["confirmable"] == "2003-01-01T00:00:00/2007-01-01T00:00:00"
    assert found["sigma"].item() == 1


def test_a_confirmed_loss_goes_before_a_larger_one_that_is_not():
    found = events(cube([30, 30, 30, 30, 20, 20, 20, 20, 20, 0], times=YEARLY[:10]), sigma=1)
    assert only(found, "loss_date") == YEARLY[4]
    assert only(found, "confirmed")
    assert not only(events(cube([30] * 9 + [0], times=YEARLY[:10]), sigma=1), "confirmed")


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
        assert only(found, "loss_date") == TIMES[2 if heights[2] < 4 else 3]


def test_a_bad_date_before_a_loss_does_not_hide_it():
    found = events(cube([20, 2, 21, 20, 2, 2], times=np.append(TIMES, TIMES[-1] + 1)))
    assert only(found, "loss_date") == TIMES[4]
    assert only(found, "height_before") == 20


def test_missing_dates_are_skipped():
    found = events(cube([20, np.nan, 2, np.nan, 3]), sigma=1)
    assert only(found, "loss_date") == TIMES[2]
    assert only(found, "last_seen") == TIMES[0]


def confirmed_step(y, sigma, threshold):
    """The step that is confirmed, in plain words: its position, 0 for none, and both levels."""
    levels = min(y) + (max(y) - min(y)) * np.arange(16) / 15

    def costs(part, level):
        return np.minimum(((part - level) / sigma) ** 2, 9)

    def fit(part):
        return min(levels, key=lambda level: costs(part, level).sum())

    best, at = 6.0, (0, None, None)
    for k in range(3, len(y) - 2):
        before, after = y[:k], y[k:]
        above, below = fit(before), fit(after)
        gains = costs(y, fit(y)) - np.append(costs(before, above), costs(after, below))
        evidence = gains.sum() - 0.75 * max(a + b for a, b in itertools.pairwise(gains))
        middle = (above + below) / 2
        high, low = (before > middle).sum(), (after < middle).sum()
        agree = high >= max(3, 2 * k / 3) and low >= max(3, 2 * len(after) / 3)
        last, first = np.median(before[-5:]), np.median(after[:5])
        if agree and y[k] < middle and last - first > threshold and evidence > best:
            best, at = evidence, (k, last, first)
    return at


def naive(heights, threshold, sigma):
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
    step, *both = (
        confirmed_step(np.array([h for _, h in valid]), sigma, threshold) if valid else [0]
    )
    if step:
        at, levels = step, both
    if at is None:
        return None
    before, after = levels
    last = min(h for _, h in valid[at:][-2:])
    recovery = (last - after) / (before - after) if at < len(valid) - 1 else np.nan
    return valid[at][0], valid[at - 1][0], before, after, recovery, step > 0


@settings(max_examples=15)
@given(dates=st.integers(3, 13), seed=st.integers(0, 999), missing=st.sampled_from([0.0, 0.4]))
def test_equal_to_the_algorithm_in_plain_words(dates, seed, missing):
    rng = np.random.default_rng(seed)
    heights = rng.choice([1.0, 2, 4, 15, 18, 20, 25], (12, dates)).astype("f4")
    after = np.arange(dates) >= rng.integers(2, dates + 1, (6, 1))
    heights[6:] = 20 - 13 * after + rng.normal(0, 3, (6, dates))
    heights[rng.random(heights.shape) < missing] = np.nan
    times = np.datetime64("2000-01-01", "ns") + np.arange(dates) * np.timedelta64(300, "D")
    found = events(cube(*heights, times=times), sigma=2.0).isel(y=0)
    for k, series in enumerate(heights.astype(float)):
        here, expected = found.isel(x=k), naive(series, 5.0, 2.0)
        assert np.isnat(here["loss_date"]) == (expected is None)
        if expected is None:
            continue
        when, seen, before, after, recovery, confirmed = expected
        assert here["loss_date"] == times[when]
        assert here["last_seen"] == times[seen]
        np.testing.assert_allclose(here["height_before"], before, rtol=1e-6)
        np.testing.assert_allclose(here["height_after"], after, rtol=1e-6)
        np.testing.assert_allclose(here["recovery"], recovery, rtol=1e-5, atol=1e-5)
        assert bool(here["confirmed"]) == confirmed
        assert here["magnitude"] > 5


def forest(dates=9, shape=(20, 30), *, seed=0, sd=2.0):
    """Noisy heights on yearly dates with gaps; a third of the scene is lost on the fifth date."""
    rng = np.random.default_rng(seed)
    heights = rng.normal(20, sd, (dates, *shape))
    heights[4:, :, : shape[1] // 3] -= 12
    heights[rng.random(heights.shape) < 0.1] = np.nan
    coords = {
        "time": YEARLY[:dates],
        "y": 5e6 - np.arange(shape[0]),
        "x": np.arange(shape[1]) + 5e5,
    }
    return xr.DataArray(heights.astype("f4"), coords, ("time", "y", "x"), "canopy_height")


def with_spread(heights):
    spread = abs(heights * 0 + np.linspace(1, 3, heights.sizes["time"]).astype("f4")[:, None, None])
    return heights.to_dataset().assign(bin_spread=spread.rename("bin_spread"))


@pytest.mark.parametrize("sigma", ["measure", 2.0, "bin_spread"])
def test_lazy_and_the_same_for_any_chunks(monkeypatch, sigma):
    heights = with_spread(forest())
    copy = heights.copy(deep=True)
    chunked = heights.chunk(time=2, y=11, x=16)
    with no_compute():
        lazy = events(chunked, sigma=sigma)
        again = events(chunked, sigma=sigma)
    for name in lazy.variables:
        layers = [getattr(found[name].data, "name", None) for found in (lazy, again)]
        assert layers[0] == layers[1]
    assert sigma == 2.0 or lazy["sigma"].chunks is not None
    expected = events(heights, sigma=sigma)
    assert 0.2 < expected["confirmed"].mean() < 0.4
    xr.testing.assert_identical(lazy.compute(), expected)
    xr.testing.assert_identical(heights, copy)
    turned = events(heights.transpose("y", "time", "x"), sigma=sigma)
    xr.testing.assert_identical(turned, expected)
    monkeypatch.setattr(sys.modules["xchmv2.change.pixel_series"], "_SLAB", 400)
    xr.testing.assert_identical(events(heights, sigma=sigma), expected)


def test_sigma_is_measured_from_consecutive_dates():
    heights = forest(6, (80, 90), sd=2.5)
    assert events(heights)["sigma"].item() == pytest.approx(2.5, rel=0.03)
    assert events(heights.where(heights < 0, 20))["sigma"].item() == 0.1
    pairs = [stable_bias(heights[k : k + 2], apply=False)["nmad"][1] for k in range(5)]
    assert events(heights)["sigma"].item() == pytest.approx(np.median(pairs) / 2**0.5, rel=0.03)
    apart = heights.where(heights["time"].dt.year % 2 == 0)
    with pytest.raises(CHMv2Error, match=r"no two consecutive dates share stable .*as sigma=4"):
        events(apart)
    assert events(apart, sigma=4.0)["sigma"] == 4
    assert np.isnan(events(apart.chunk())["sigma"].values)


def test_the_spread_of_each_date_counts():
    heights = with_spread(cube([20, 20, 20, 20, 10, 10, 10, 10], times=YEARLY[:8]))
    assert only(events(heights, sigma="bin_spread"), "confirmed")
    assert events(heights, sigma="bin_spread")["sigma"].values == pytest.approx(2)
    for spread in (
        heights["bin_spread"] * 20,
        heights["bin_spread"].where(heights.time.dt.year < 2005),
    ):
        other = heights.assign(bin_spread=spread)
        assert not only(events(other, sigma="bin_spread"), "confirmed")
    with pytest.raises(CHMv2Error, match="a Dataset with 'bin_spread', found a DataArray"):
        events(heights["canopy_height"], sigma="bin_spread")


def scene(kind, dates, pixels, sd, rng):
    """Unchanged trees of 20 m with errors, and bad readings of some kind."""
    y = 20 + rng.normal(0, sd, (dates, pixels))
    if kind in ("outliers", "both"):
        y[rng.random(y.shape) < 0.1] = 2
    if kind in ("two bad", "both"):
        k = rng.integers(0, dates - 1, pixels)
        for date in (k, k + 1):
            y[date, np.arange(pixels)] = 3 + rng.normal(0, 1, pixels)
    return cube(*y.T, times=YEARLY[:dates])


def shares(dates, pixels, seed):
    """Confirmed share of unchanged pixels by kind (sd 2.5, 4), and of losses of 8 m (sd 2.5)."""
    rng, found = np.random.default_rng(seed), {}
    for kind in ("plain", "outliers", "two bad"):
        for sd in (2.5, 4.0):
            heights = scene(kind, dates, pixels, sd, rng)
            found[kind, sd] = float(events(heights, sigma=sd)["confirmed"].mean())
    heights = scene("plain", dates, pixels, 2.5, rng)
    heights[dates // 2 :] -= 8
    return found, float(events(heights, sigma=2.5)["confirmed"].mean())


@pytest.mark.parametrize("dates", [3, 7, 10])
def test_few_losses_are_confirmed_where_nothing_was_lost(dates):
    found, recall = shares(dates, 3000, seed=dates)
    assert max(found.values()) < 0.02
    assert recall > {3: -1, 7: 0.6, 10: 0.9}[dates]


@pytest.mark.slow
@pytest.mark.parametrize("dates", range(3, 16))
def test_confirmed_losses_over_many_pixels(dates):
    found, recall = shares(dates, 40_000, seed=100 + dates)
    assert max(found.values()) < 0.015
    assert recall > (0.9 if dates >= 10 else 0.55 if dates >= 6 else -1)


def blocks(*changes, dates=8, side=24, sd=0.0, seed=0):
    """Trees of 30 m; of each (rows, cols, first date, drop) some are lost."""
    heights = np.random.default_rng(seed).normal(30, sd, (dates, side, side))
    for rows, cols, date, drop in changes:
        heights[date:, rows, cols] -= drop
    coords = {"time": YEARLY[:dates], "y": 5e6 - np.arange(side), "x": np.arange(side) + 5e5}
    return xr.DataArray(heights.astype("f4"), coords, ("time", "y", "x"), "canopy_height")


ALL = {"opening": None, "min_area": None}
UP, DOWN = slice(2, 10), slice(12, 20)


def test_loss_takes_confirmed_losses_unless_asked():
    found = events(blocks((UP, UP, 4, 12), (DOWN, UP, 7, 12)), sigma=2.0)
    with pytest.warns(UserWarning, match="first seen before 2003-01-01 or after 2005-01-01 cannot"):
        lost = loss(found, **ALL)
    assert int(lost.sum()) == 64
    assert "sigma" not in lost.coords
    xr.testing.assert_identical(loss(found, confirmed=True, **ALL), lost)
    assert int(loss(found, confirmed=False, **ALL).sum()) == 128
    with pytest.raises(CHMv2Error, match="confirmed as True or False, found confirmed='no'"):
        loss(found, confirmed="no")
    with pytest.raises(CHMv2Error, match="among the losses of a series; leave it out, or pass"):
        loss(found["magnitude"], threshold=5, confirmed=True)


def test_a_short_series_says_that_nothing_can_be_confirmed():
    found = events(blocks((UP, UP, 2, 12), dates=5).chunk(x=10), sigma=2.0)
    for asked in (None, True):
        with (
            no_compute(),
            pytest.warns(UserWarning, match="no loss can be confirmed, which") as said,
        ):
            lost = loss(found, confirmed=asked, **ALL)
        assert not lost.any()
    assert "pass confirmed=False" in str(said[0].message)
    assert int(loss(found, confirmed=False, **ALL).sum()) == 64


def test_a_hazy_last_date_is_no_loss():
    heights = blocks(sd=1.0)
    heights[-1] = 3
    found = events(heights)
    assert float(found["loss_date"].notnull().mean()) > 0.9
    assert not loss(found, confirmed=True, **ALL).any()


def test_patches_of_equal_date_stay_by_half_of_their_pixels():
    # Not confirmed, on the last date: 8 columns drop by 12 m, which is 3 sigma, a half of them by
    # 14 m or, in another block, less than a half. Beside each a block of the date before.
    half, less = slice(2, 6), slice(2, 5)
    heights = blocks(
        (UP, UP, 7, 12), (UP, half, 7, 2), (DOWN, UP, 7, 12), (DOWN, less, 7, 2),
        (UP, slice(10, 14), 6, 14), (DOWN, slice(10, 14), 6, 11),
    )  # fmt: skip
    found = events(heights, sigma=4.0)
    expected = np.zeros((24, 24), bool)
    expected[UP, 2:14] = True
    for chunks in ({}, {"y": 7, "x": 5}, {"y": 24, "x": 3}):
        lost = loss(found.chunk(chunks) if chunks else found, confirmed=False, **ALL)
        np.testing.assert_array_equal(lost, expected)
    assert not loss(events(heights, sigma=4.5), confirmed=False, **ALL).any()


@settings(max_examples=6)
@given(seed=st.integers(0, 999), rows=st.integers(13, 40), cols=st.integers(11, 40))
def test_patches_equal_those_of_scipy_for_any_chunks(seed, rows, cols):
    rng = np.random.default_rng(seed)
    shape = (40, 40)
    when = rng.choice(np.append(YEARLY[3:6], np.datetime64("NaT")), shape)
    layers = {
        "magnitude": rng.uniform(5, 20, shape), "loss_date": when,
        "confirmed": rng.random(shape) < 0.45,
    }  # fmt: skip
    found = xr.Dataset(
        {name: (("y", "x"), layer) for name, layer in layers.items()},
        {"y": -np.arange(40), "x": np.arange(40), "sigma": 4.0},
    )
    for confirmed in (True, False):
        sure = layers["confirmed"] | (~np.bool_(confirmed) & (layers["magnitude"] >= 12.8))
        expected = np.zeros(shape, bool)
        for date in YEARLY[3:6]:
            label, n = ndimage.label(when == date, np.ones((3, 3)))
            share = ndimage.mean(sure, label, np.arange(n + 1))
            expected |= (label > 0) & (share[label] >= 0.5)
        lazy = found.chunk(y=rows, x=cols)
        with no_compute():
            lost = loss(lazy, confirmed=confirmed, **ALL)
        np.testing.assert_array_equal(lost, expected)
        np.testing.assert_array_equal(loss(found, confirmed=confirmed, **ALL), expected)


def test_patches_remove_false_losses_and_keep_true_ones():
    heights = blocks((UP, UP, 7, 20), (DOWN, DOWN, 5, 8), dates=10, side=60, sd=4.0, seed=3)
    found = events(heights)
    truth = (heights[0] * 0).astype(bool)
    truth[UP, UP] = True
    assert float(found["loss_date"].notnull().where(~truth).mean()) > 0.1
    lost = loss(found, confirmed=False, min_area=36)
    outside = lost.where(~truth, False)
    outside[DOWN, DOWN] = False
    assert float(outside.mean()) < 0.001
    assert float(lost.where(truth, False).sum()) > 0.85 * 64
    assert bool((loss(found, confirmed=True, min_area=36) <= lost).all())


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
    with pytest.raises(CHMv2Error, match="a sigma above 0 m, found sigma=0"):
        events(heights, sigma=0)
    with pytest.raises(CHMv2Error, match="'measure' or 'bin_spread', found 'guess'; pass sigma=4"):
        events(heights, sigma="guess")
    with pytest.raises(CHMv2Error, match="dates along 'time', found no coordinate"):
        events(heights.drop_vars("time"))
