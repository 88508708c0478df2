import sys

import numpy as np
import pytest
import rioxarray
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from xchmv2.change import ComparisonWarning, align
from xchmv2.change.alignment import _shift_plane
from xchmv2.datasets import synthetic_forest
from xchmv2.errors import CHMv2Error

# Private imports: shifts are held against scipy step by step.

SHIFTS = [(0.0, 0.0), (1.3, -2.4), (-3.6, 0.7)]


@pytest.fixture(scope="module")
def forest():
    return synthetic_forest((320, 352), seed=3, shift_px=SHIFTS)


@pytest.fixture(scope="module")
def grey(forest):
    return forest[["red", "green", "blue"]].astype("float32").to_dataarray("band").mean("band")


def moved_heights(forest):
    """True heights displaced by scipy, not by what is tested."""
    planes = [
        ndimage.shift(plane, shift, order=1, cval=np.nan)
        for plane, shift in zip(forest["canopy_height"].values, SHIFTS, strict=True)
    ]
    return forest["canopy_height"].copy(data=np.stack(planes))


@pytest.mark.parametrize("what", ["imagery", "heights"])
def test_a_known_shift_is_recovered(forest, grey, what):
    found = align(grey if what == "imagery" else moved_heights(forest), apply=False)
    wrong = np.stack([found["shift_y"], found["shift_x"]], axis=1) - SHIFTS
    assert np.abs(wrong).max() < 0.2
    np.testing.assert_allclose(found["distance_y"], found["shift_y"] * 0.6, rtol=1e-3)
    assert (found["agreement"] > 0.7).all()
    assert found["shift_y"].attrs["units"] == "px"
    assert found["distance_y"].attrs["units"] == "m"
    assert found["shift_y"].dims == ("time",)


def test_aligned_dates_lie_in_register(forest):
    aligned = align(moved_heights(forest))
    left = align(aligned, apply=False)
    assert np.abs(np.stack([left["shift_y"], left["shift_x"]])).max() < 0.1
    inner = {"y": slice(10, -10), "x": slice(10, -10)}
    truth = forest["canopy_height"].isel(inner)
    before, after = (
        float(abs(h.isel(inner) - truth).mean()) for h in (moved_heights(forest), aligned)
    )
    assert after < 0.5 * before
    assert aligned.attrs == forest["canopy_height"].attrs
    np.testing.assert_array_equal(aligned[0], moved_heights(forest)[0])
    np.testing.assert_allclose(aligned["removed_shift_x"], [0, -2.4, 0.7], atol=0.2)


def test_clearings_do_not_matter(forest):
    heights = moved_heights(forest)
    heights[1, :, :160] = 0.0
    heights[2, 40:90, 30:200] = np.nan
    found = align(heights, apply=False)
    wrong = np.stack([found["shift_y"], found["shift_x"]], axis=1) - SHIFTS
    assert np.abs(wrong).max() < 0.25


def test_the_sjer_pair(data):
    folder = data / "sjer052_two_dates"
    grey = [
        rioxarray.open_rasterio(folder / f"SJER_052_rgb_{year}.tif").astype("f4").mean("band")
        for year in (2017, 2018)
    ]
    found = align(xr.concat(grey, "time"), apply=False)
    # Whole-pixel correlation of scikit-image says that 2018 must move by (1, 2) px.
    assert (round(-float(found["shift_y"][1])), round(-float(found["shift_x"][1]))) == (1, 2)
    against = align(grey[1], to=grey[0], apply=False)
    assert against["shift_y"].dims == ()
    assert float(against["shift_y"]) == float(found["shift_y"][1])


def test_lazy_and_the_same_for_any_chunks(forest):
    heights = moved_heights(forest)
    aligned = align(heights)
    chunked = heights.chunk(time=1, y=50, x=77)
    lazy = align(chunked)
    assert lazy.chunks is not None
    assert lazy.chunksizes["y"] == chunked.chunksizes["y"]
    xr.testing.assert_identical(lazy.compute(), aligned)
    turned = align(chunked.transpose("x", "time", "y"))
    assert turned.dims == ("x", "time", "y")
    xr.testing.assert_identical(turned.transpose(*aligned.dims).compute(), aligned)


def test_the_input_stays(forest):
    heights = moved_heights(forest)
    copy = heights.copy(deep=True)
    align(heights)
    xr.testing.assert_identical(heights, copy)


def test_another_reference_and_a_dataset(forest):
    heights = moved_heights(forest)
    to_last = align(heights, "2024", apply=False)
    assert float(to_last["shift_x"][2]) == 0
    np.testing.assert_allclose(to_last["shift_x"][0], -0.7, atol=0.2)
    both = xr.Dataset({"canopy_height": heights, "bin_spread": heights * 0.1})
    moved = align(both)
    xr.testing.assert_allclose(moved["bin_spread"], align(heights) * 0.1)
    with pytest.raises(CHMv2Error, match="cannot be moved; drop them first"):
        align(both.assign(land=heights[0] > 2))


def test_bands_are_moved_together(forest, grey):
    bands = forest[["red", "green", "blue"]].drop_vars(("shift_y", "shift_x"))
    moved = align(bands)
    xr.testing.assert_allclose(
        moved.to_dataarray("band").mean("band"),
        align(grey).drop_vars(("shift_y", "shift_x")),
        atol=1e-3,
    )
    assert moved["red"].dtype == np.float32
    assert bands["red"].dtype == np.uint8


def test_a_date_without_heights_stays_and_is_told(forest):
    heights = moved_heights(forest)
    heights[1] = np.nan
    with pytest.warns(ComparisonWarning, match="too few windows agree on a shift of 2021-08-15"):
        found = align(heights, apply=False)
    assert np.isnan(found["shift_y"][1])
    with pytest.warns(ComparisonWarning, match="a shift of .*, which is not moved"):
        assert np.isnan(align(heights)[1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shift": 0}, "a max_shift between 0 and 1024 px, found max_shift=0"),
        ({"window": 8}, "window as a whole number of at least 16 px"),
        ({"windows": 0}, "windows as a whole number of at least 1"),
        ({"to": "2035"}, "exactly one date, '2035', found none; the dates are 2019-07-01"),
    ],
)
def test_bad_requests(forest, options, message):
    with pytest.raises(CHMv2Error, match=message):
        align(forest["canopy_height"], **options)


def test_bad_input(forest):
    heights = forest["canopy_height"]
    with pytest.raises(CHMv2Error, match="dates to compare, or a raster to compare one date with"):
        align(heights[0])
    with pytest.raises(
        CHMv2Error, match=r"the reference is NaN in all windows; .* to=height.time.values"
    ):
        align(heights.where(heights.time > heights.time[0]))
    with pytest.raises(
        CHMv2Error, match=r"rasters on the same grid, found \(320, 352\) and \(200, 352\) pixels"
    ):
        align(heights, to=heights[0, :200])
    with pytest.raises(CHMv2Error, match=r"a raster of dims .*: to=other\.isel\(time=0\)"):
        align(heights, to=heights)
    with pytest.raises(CHMv2Error, match="strictly increasing order, found 2024-07-10"):
        align(heights[::-1])


def test_scikit_image_is_asked_for(forest, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    message = r'skimage, .* is not installed; pip install "xchmv2\[change\]"'
    with pytest.raises(CHMv2Error, match=message):
        align(forest["canopy_height"])


@settings(max_examples=30)
@given(
    dy=st.floats(-6, 6),
    dx=st.floats(-6, 6),
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_shifting_is_bilinear_and_does_not_bleed(dy, dx, rows, cols, seed):
    import dask.array as da

    rng = np.random.default_rng(seed)
    plane = rng.normal(size=(23, 17))
    plane[rng.random(plane.shape) < 0.15] = np.nan
    moved = _shift_plane(plane, dy, dx)
    for chunks in ((rows, cols), (23, cols)):
        lazy = _shift_plane(da.from_array(plane, chunks=chunks), dy, dx)
        np.testing.assert_array_equal(lazy.compute(), moved)
    # Values and weights by scipy.
    dy, dx = round(dy, 3), round(dx, 3)
    valid = np.isfinite(plane)
    options = {"shift": (-dy, -dx), "order": 1, "mode": "constant", "cval": 0.0, "prefilter": False}
    padded = [np.pad(a, 10) for a in (np.where(valid, plane, 0.0), valid.astype(float))]
    value, weight = (ndimage.shift(a, **options)[10:-10, 10:-10] for a in padded)
    clear = np.abs(weight - 0.5) > 1e-3
    assert (np.isfinite(moved) == (weight > 0.5))[clear].all()
    sure = clear & (weight > 0.5)
    np.testing.assert_allclose(moved[sure], (value / np.where(sure, weight, 1))[sure], atol=1e-9)


def test_only_the_windows_are_read(forest):
    heights = moved_heights(forest).chunk(y=100, x=100)
    aligned = align(heights)
    with no_compute():
        aligned.mean()
