import sys
import warnings

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
    assert abs(float(found["shift_y"][1]) + 1) < 0.7
    assert abs(float(found["shift_x"][1]) + 2) < 0.7
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
    message = "2021-08-15 is not moved, its shift cannot be told: only 0 of 16 windows hold edges"
    with pytest.warns(ComparisonWarning, match=message):
        found = align(heights, apply=False)
    assert np.isnan(found["shift_y"][1])
    assert found["windows"][1] == 0
    with pytest.warns(ComparisonWarning, match=message):
        assert np.isnan(align(heights)[1]).all()


def raster(values):
    """Heights of one date without a CRS."""
    return xr.DataArray(np.asarray(values, "f4"), dims=("y", "x"), name="canopy_height")


def find(reference, moved, **options):
    """The shift of one raster from another, and what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        shift = align(raster(moved), to=raster(reference), apply=False, **options)
    return shift, " ".join(str(each.message) for each in told)


def is_known(shift):
    return bool(np.isfinite(shift["shift_y"]))


@pytest.fixture(scope="module")
def worlds():
    """True heights of two forests (420, 420)."""
    return [
        synthetic_forest((420, 420), times=("2020-07-01",), seed=seed)["canopy_height"].values[0]
        for seed in (5, 6)
    ]


def unrelated(worlds, kind, side, rng):
    """Two rasters of different ground."""
    if kind == "noise":
        return rng.normal(20, 3, (2, side, side))
    first, second = rng.choice(len(worlds), 2, replace=False)
    corners = rng.integers(0, len(worlds[0]) - side + 1, (2, 2))
    cut = [
        worlds[w][i : i + side, j : j + side]
        for w, (i, j) in zip((first, second), corners, strict=True)
    ]
    return cut[0], np.rot90(cut[1], rng.integers(4) if kind == "turned" else 0)


@pytest.mark.parametrize("kind", ["noise", "forest", "turned"])
def test_different_ground_is_refused(worlds, kind):
    rng = np.random.default_rng(11)
    for side in (40, 60, 100, 160, 200, 260):
        for _ in range(3):
            shift, told = find(*unrelated(worlds, kind, side, rng))
            assert not is_known(shift)
            assert "is not moved, its shift cannot be told: " in told
    assert "check that both show the same ground, take a larger area, or pass max_shift=48" in told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "forest", "turned"])
@pytest.mark.parametrize(
    ("side", "runs"),
    [(40, 200), (60, 200), (100, 200), (128, 200), (160, 200), (200, 200), (260, 100), (400, 100)],
)
def test_different_ground_is_accepted_in_less_than_one_of_fifty(worlds, kind, side, runs):
    rng = np.random.default_rng(side)
    found = [is_known(find(*unrelated(worlds, kind, side, rng))[0]) for _ in range(runs)]
    assert np.mean(found) <= 0.02


def displace(world, dy, dx, side=320, first=50):
    """The square of a world displaced by a cubic spline."""
    inside = slice(first, first + side)
    return ndimage.shift(world.astype(float), (dy, dx), order=3, mode="nearest")[inside, inside]


def spoil(heights, how):
    """Heights as other dates show them."""
    rng, side, heights = np.random.default_rng(4), len(heights), heights.copy()
    if how == "30 % salt":
        heights[rng.random(heights.shape) < 0.3] = np.nan
    elif how == "60 % gone":
        heights[:, : side * 2 // 5] = np.nan
        heights[side * 2 // 3 :] = np.nan
    elif how == "half cleared":
        heights[:, : side // 2] = 0
    elif how == "56 % cleared":
        heights[side // 8 : -side // 8, side // 8 : -side // 8] = 0
    elif how == "88 % cleared":
        heights[side // 32 : -side // 32, side // 32 : -side // 32] = 0
    elif how == "noise 6 m":
        heights += rng.normal(0, 6, heights.shape)
    return heights


@pytest.mark.parametrize(
    ("how", "side", "bound"),
    [
        ("as it is", 320, 0.03),
        ("as it is", 60, 0.1),
        ("30 % salt", 320, 0.06),
        ("60 % gone", 320, 0.06),
        ("half cleared", 320, 0.06),
        ("56 % cleared", 320, 0.1),
        ("noise 6 m", 320, 0.1),
    ],
)
def test_true_shifts_are_found(worlds, how, side, bound):
    reference = displace(worlds[0], 0, 0, side)
    for dy, dx in ((2.37, -4.81), (-14.0, 14.0)) if side > 60 else ((2.37, -4.81),):
        shift, _ = find(reference, spoil(displace(worlds[0], dy, dx, side), how))
        assert abs(float(shift["shift_y"]) - dy) < bound
        assert abs(float(shift["shift_x"]) - dx) < bound
        assert shift["signal"] > 6
        assert np.isfinite(shift["spread"])


@pytest.mark.slow
def test_a_rim_of_forest_around_a_clearing_suffices():
    """Of 768 px, all but a rim of 24 px was cleared: 88 % of the area."""
    forest = synthetic_forest((860, 860), times=("2020-07-01",), seed=5)["canopy_height"].values[0]
    reference, moved = (displace(forest, *by, 768, 46) for by in ((0, 0), (2.37, -4.81)))
    shift, _ = find(reference, spoil(moved, "88 % cleared"))
    assert abs(float(shift["shift_y"]) - 2.37) < 0.3
    assert abs(float(shift["shift_x"]) + 4.81) < 0.3


def test_a_shift_beyond_the_search_is_refused_and_the_advice_finds_it(worlds):
    reference, moved = (displace(worlds[0], dy, 0) for dy in (0, 25))
    shift, told = find(reference, moved)
    assert not is_known(shift)
    assert "the best shift, of (25, 0) px, is beyond 24 px; pass max_shift=48" in told
    assert float(find(reference, moved, max_shift=48)[0]["shift_y"]) == pytest.approx(25, abs=0.05)
    moved = displace(worlds[0], 31, 0)
    assert "pass max_shift=48" in find(reference, moved)[1]
    assert float(find(reference, moved, max_shift=48)[0]["shift_y"]) == pytest.approx(31, abs=0.05)
    small = slice(100, 180)
    told = find(reference[small, small], displace(worlds[0], 20, 0)[small, small])[1]
    assert "a quarter of the scene; take a larger area" in told


def test_small_areas_cannot_tell(worlds):
    shift, told = find(worlds[0][:30, :90], worlds[0][:30, :90])
    assert not is_known(shift)
    assert "30 x 90 px are too few to tell a shift; take an area of at least 32 x 32 px" in told


def test_rows_and_lattices_are_refused():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :200]
    for trees in (np.sin(2 * np.pi * x / 9), np.cos(np.pi * x / 6) * np.cos(np.pi * y / 6)):
        planted = 10 + 4 * trees + rng.normal(0, 0.2, x.shape)
        shift, told = find(planted, np.roll(planted, 5, axis=1) + rng.normal(0, 0.5, x.shape))
        assert not is_known(shift)
        assert "another is nearly as good, as with rows of trees" in told


@pytest.mark.parametrize("angle", [0.3, -0.3, 2.0, -2.0])
def test_rotation_is_noticed(worlds, angle):
    inside = slice(50, 370)
    turned = ndimage.rotate(worlds[0].astype(float), angle, reshape=False, order=3)
    shift, told = find(worlds[0][inside, inside], turned[inside, inside])
    assert float(shift["rotation"]) == pytest.approx(angle, abs=0.15)
    assert "register it with a rotation and a scale first, as by ground control points" in told
    if abs(angle) == 2:
        assert not is_known(shift)
        assert f"it is turned by about {float(shift['rotation']):.1f} degrees, or scaled" in told
    else:
        assert is_known(shift)
        assert 0.9 < shift["distortion"] < 1.5
        assert "px remain in the corners" in told


def test_what_can_be_lost_is_lost_with_the_reason(worlds):
    """A date of which a corner alone is seen takes smaller windows."""
    reference = displace(worlds[0], 0, 0)
    moved = np.full_like(reference, np.nan)
    moved[:100, :100] = displace(worlds[0], 3, -5)[:100, :100]
    shift, told = find(reference, moved)
    assert not is_known(shift)
    assert "windows hold edges on both; pass window=40" in told
    found = find(reference, moved, window=40, windows=100)[0]
    assert float(found["shift_y"]) == pytest.approx(3, abs=0.1)


def test_lidar_of_two_years(data):
    folder = data / "chm_change_cauaxi_window"
    first, second = (
        rioxarray.open_rasterio(folder / f"CAU_CHM_{year}_nw100.tif", masked=True).values[0]
        for year in (2012, 2014)
    )
    still, _ = find(first, second)
    for step in ((3, -2), (14, 10), (-7, 3)):
        moved, _ = find(first, ndimage.shift(second, step, order=0, cval=np.nan))
        for name, by in zip(("shift_y", "shift_x"), step, strict=True):
            assert float(moved[name] - still[name]) == pytest.approx(by, abs=0.35)
    ducke = rioxarray.open_rasterio(data / "chm_gaps_ducke" / "ALS_CHM_DUC.tif").values[0]
    assert not is_known(find(first, ducke[:100, :100])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shift": 0}, "a max_shift between 0 and 1024 px, found max_shift=0"),
        ({"window": 8}, "window as a whole number of at least 16 px"),
        ({"windows": 1}, "windows as a whole number of at least 4"),
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
