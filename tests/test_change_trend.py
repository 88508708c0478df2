import itertools
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


def counted(n):
    """P(abs(S) >= s) of all orders of n values, by s."""
    signs = [
        abs(sum(np.sign(b - a) for a, b in itertools.combinations(order, 2)))
        for order in itertools.permutations(range(n))
    ]
    return {s: np.mean([other >= s for other in signs]) for s in {0, *signs}}


def one_by_one(heights):
    """What scipy and pymannkendall say of each pixel."""
    time = heights["time"].values
    years = (time - time[0]) / np.timedelta64(1, "D") / 365.25
    out = np.full((4, *heights.shape[1:]), np.nan)
    for at in np.ndindex(heights.shape[1:]):
        values = heights.values[(slice(None), *at)]
        ok = np.isfinite(values)
        if ok.sum() < 3:
            continue
        sen = scipy.stats.theilslopes(values[ok], years[ok])
        test = pymannkendall.original_test(values[ok])
        p = test.p
        if len(set(values[ok])) == ok.sum():
            p = scipy.stats.kendalltau(years[ok], values[ok], method="exact").pvalue
        out[(slice(None), *at)] = (sen.slope, sen.intercept, test.Tau, p)
    return out


@settings(max_examples=20)
@given(
    dates=st.integers(3, 14),
    seed=st.integers(0, 999),
    missing=st.sampled_from([0.0, 0.3, 0.7]),
    whole=st.booleans(),
)
def test_equal_to_scipy_and_pymannkendall(dates, seed, missing, whole):
    heights = series(dates, (4, 5), seed=seed, missing=missing, whole=whole)
    found = trend(heights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of pymannkendall where all are equal
        expected = one_by_one(heights)
    for name, values in zip(("slope", "intercept", "tau", "p_value"), expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_array_equal(found["n_obs"], heights.notnull().sum("time"))


def test_p_values_approach_those_of_the_normal_distribution():
    heights = series(40, (1, 30), missing=0.0, whole=False)
    expected = [pymannkendall.original_test(heights.values[:, 0, k]).p for k in range(30)]
    np.testing.assert_allclose(trend(heights)["p_value"][0], expected, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("dates", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_bounds_by_counting_all_orders(dates, confidence):
    heights = series(dates, (2, 3), missing=0.0, whole=False, seed=dates)
    found, chances = trend(heights, confidence=confidence), counted(dates)
    years = (heights.time - heights.time[0]).values / np.timedelta64(1, "D") / 365.25
    # The largest rank from below and above with which no more than 1 - confidence is left out.
    pairs = dates * (dates - 1) // 2
    ranks = [
        a
        for a in range(1, pairs // 2 + 1)
        if chances.get(pairs - 2 * a + 2, 0) <= 1 - confidence + 1e-9
    ]
    assert found["slope_low"].attrs["least_obs"] == {0.8: 4, 0.95: 5, 0.99: 6}[confidence]
    assert bool(ranks) == (dates >= found["slope_low"].attrs["least_obs"])
    for y, x in np.ndindex(2, 3):
        values = heights.values[:, y, x]
        slopes = sorted((values[j] - values[i]) / (years[j] - years[i])
                        for i, j in itertools.combinations(range(dates), 2))  # fmt: skip
        expected = (slopes[max(ranks) - 1], slopes[-max(ranks)]) if ranks else (-np.inf, np.inf)
        here = found.isel(y=y, x=x)
        np.testing.assert_allclose((here["slope_low"], here["slope_high"]), expected)


def covered(errors, dates, pixels, seed):
    """Share of intervals at 0.95 that hold the slope, and of p-values below 0.05 without one."""
    rng = np.random.default_rng(seed)
    heights = series(dates, (1, pixels), seed=seed, missing=0.0, whole=False)
    years = (heights.time - heights.time[0]).values / np.timedelta64(1, "D") / 365.25
    noise = 3 * {
        "normal": rng.standard_normal,
        "heavy tails": lambda shape: np.clip(rng.standard_t(3, shape), -20, 20),
        "whole metres": lambda shape: np.round(3 * rng.standard_normal(shape)) / 3,
        "gaps": lambda shape: np.where(rng.random(shape) < 0.25, np.nan, rng.normal(size=shape)),
    }[errors](heights.shape)
    rising = trend(heights * 0 + 70 + 0.3 * years[:, None, None] + noise)
    still = trend(heights * 0 + 70 + noise)
    known = rising["n_obs"] >= 3
    inside = (rising["slope_low"] <= 0.3 + 1e-9) & (rising["slope_high"] >= 0.3 - 1e-9)
    return float(inside.where(known).mean()), float((still["p_value"] < 0.05).where(known).mean())


ERRORS = ("normal", "heavy tails", "whole metres", "gaps")


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("dates", [3, 6, 10])
def test_intervals_hold_the_true_slope(errors, dates):
    share, false = covered(errors, dates, 3000, seed=dates)
    assert share > 0.94
    assert false < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("dates", range(3, 16))
def test_intervals_hold_the_true_slope_in_many_runs(errors, dates):
    share, false = covered(errors, dates, 40_000, seed=dates + 100)
    assert share > 0.949
    assert false < 0.053


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
