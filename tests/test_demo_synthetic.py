"""Synthetic forests: truth that is true, windows that agree, light that falls the right way."""

from __future__ import annotations

import pickle
import time

import dask
import numpy as np
import pytest
import rioxarray
import xarray as xr
from odc.geo.xr import ODCExtension  # noqa: F401  registers .odc
from scipy import ndimage
from skimage.registration import phase_cross_correlation

from xchmv2.datasets import Disturbance, synthetic_forest
from xchmv2.demo.disturbance import Chronicle
from xchmv2.demo.light import Sun, shadow_depth, sunlit
from xchmv2.demo.noise import Cutout, noise_at, noise_grid, stream
from xchmv2.demo.rendering import Moment, _clouds_over
from xchmv2.demo.stands import SPECIES, crown_radius, growth_height
from xchmv2.demo.sun import season, solar_position
from xchmv2.errors import CHMv2Error, GridError

# Private imports: light, noise, trees and sun are each held against the literature.

# rioxarray 0.19 still multiplies affine transforms with "*", which affine 3.1 wants written "@".
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

SUMMER = ("2019-07-01",)
ORIGIN = (500_000.0, 5_300_000.0)


@pytest.fixture(scope="module")
def forest() -> xr.Dataset:
    """Seed 0 with three dates and the world's own events."""
    return synthetic_forest((640, 640))


@pytest.fixture(scope="module")
def two_dates() -> xr.Dataset:
    """Two dates with one told clear-cut, one thinning and one windthrow between them."""
    x, y = ORIGIN
    events = (
        Disturbance("clear_cut", "2020-02-01", x + 100, y - 75, 5_000),
        Disturbance("thinning", "2020-11-15", x + 140, y - 140, 4_000),
        Disturbance("windthrow", "2021-01-20", x + 50, y - 140, 2_500),
    )
    return synthetic_forest(
        (400, 400), times=["2019-07-01", "2021-07-01"], seed=9, disturbances=events
    )


@pytest.fixture(scope="module")
def summers() -> list[xr.Dataset]:
    """Return one summer day of each of four worlds."""
    return [synthetic_forest((300, 300), times=SUMMER, seed=s) for s in range(4)]


def picture(ds: xr.Dataset, k: int = 0) -> np.ndarray:
    return np.stack([ds[b].values[k] for b in ("red", "green", "blue")]).astype(float)


# --- the same call gives the same forest --------------------------------------------------------


def test_same_seed_gives_the_same_forest_and_another_seed_another():
    calls = [synthetic_forest((96, 96), times=SUMMER, seed=s) for s in (5, 5, 6)]
    xr.testing.assert_identical(calls[0], calls[1])
    assert (calls[0].red != calls[2].red).mean() > 0.9


def test_other_dates_leave_a_date_as_it_is():
    alone = synthetic_forest((128, 128), times=["2022-07-01"], seed=3)
    among = synthetic_forest((128, 128), times=["2015-06-01", "2022-07-01", "2026-08-01"], seed=3)
    for name in ("red", "green", "blue", "canopy_height"):
        np.testing.assert_array_equal(alone[name].values[0], among[name].values[1])


def test_options_leave_the_trees_as_they_are():
    kwargs = {"times": SUMMER, "seed": 4}
    plain = synthetic_forest((128, 128), **kwargs)
    options = synthetic_forest(
        (128, 128), **kwargs, clouds=0.5, nodata_edge=0.3, shift_px=3.0, sun=(35.0, 200.0)
    )
    xr.testing.assert_identical(plain.canopy_height.drop_attrs(), _like(plain, options))
    assert (plain.red != options.red).mean() > 0.5


def _like(plain: xr.Dataset, other: xr.Dataset) -> xr.DataArray:
    return other.canopy_height.assign_coords(plain.canopy_height.coords).drop_attrs()


# --- any window of the world can be made alone --------------------------------------------------


@pytest.mark.parametrize(("top", "left"), [(0, 0), (37, 91), (150, 150)])
def test_window_equals_the_crop_of_a_larger_one(forest, top, left):
    res = 0.6
    origin = (float(forest.x[left]) - res / 2, float(forest.y[top]) + res / 2)
    window = synthetic_forest((130, 170), origin=origin)
    crop = forest.isel(y=slice(top, top + 130), x=slice(left, left + 170))
    np.testing.assert_allclose(window.x, crop.x, atol=1e-6)
    np.testing.assert_allclose(window.y, crop.y, atol=1e-6)
    for name in ("red", "green", "blue", "valid", "canopy_height", "land_cover"):
        np.testing.assert_array_equal(window[name].values, crop[name].values, err_msg=name)
    kinds, places = crop.event_date.values, crop.disturbance.values
    for k in np.unique(places[places > 0]):
        there = np.flatnonzero(window.event_date.values == kinds[k - 1])
        np.testing.assert_array_equal(window.disturbance.values == there[0] + 1, places == k)


@pytest.mark.parametrize("chunks", [110, (50, 200), {"y": 96, "x": -1}])
def test_lazy_equals_eager(chunks):
    kwargs = {
        "times": ("2019-07-01", "2023-09-01"),
        "seed": 2,
        "clouds": 0.3,
        "shift_px": 2.0,
        "nodata_edge": 0.2,
    }
    eager = synthetic_forest((140, 200), **kwargs)
    lazy = synthetic_forest((140, 200), **kwargs, chunks=chunks)
    xr.testing.assert_identical(eager, lazy.compute())


def test_lazy_forest_without_events_has_an_empty_table():
    ds = synthetic_forest((64, 64), times=SUMMER, chunks=32, disturbances=None).compute()
    assert ds.event_area.shape == (0,)
    assert (ds.disturbance == 0).all()


def test_same_trees_at_another_resolution():
    fine = synthetic_forest((300, 300), times=SUMMER, resolution=0.3, seed=8)
    coarse = synthetic_forest((150, 150), times=SUMMER, resolution=0.6, seed=8)
    averaged = fine.canopy_height.values[0].reshape(150, 2, 150, 2).mean((1, 3))
    assert np.corrcoef(averaged.ravel(), coarse.canopy_height.values.ravel())[0, 1] > 0.95


def test_noise_on_a_grid_equals_noise_at_points():
    y, x = np.arange(-40.0, 0.0, 0.7), np.arange(5.0, 30.0, 0.9)
    grid = noise_grid(stream(0, "test"), y, x, 3.3)
    points = noise_at(stream(0, "test"), np.repeat(y, x.size), np.tile(x, y.size), 3.3)
    np.testing.assert_allclose(grid.ravel(), points, atol=1e-5)
    large = noise_grid(stream(0, "test"), np.arange(600.0), np.arange(600.0), 5.0)
    assert abs(float(large.mean())) < 0.05
    assert float(large.std()) == pytest.approx(1.0, abs=0.05)


# --- lazy means lazy ----------------------------------------------------------------------------


def test_nothing_is_made_until_computed(monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("made too early")

    for name in ("take_picture", "true_height", "site_of"):
        monkeypatch.setattr(f"xchmv2.demo.layers.{name}", fail)
    with dask.config.set(scheduler=fail):
        ds = synthetic_forest((20_000, 20_000), chunks=2048, times=["2019-07-01", "2020-07-01"])
    assert all(ds[v].chunks is not None for v in ds if v != "event_area")
    assert ds.red.chunksizes["time"] == (1, 1)
    assert ds.sizes["y"] == 20_000


def test_equal_calls_give_equal_keys_and_small_graphs():
    a, b, other = (synthetic_forest((256, 256), chunks=128, seed=s) for s in (1, 1, 2))
    for name in ("red", "canopy_height", "disturbance", "land_cover", "event_area", "valid"):
        assert a[name].data.name == b[name].data.name
        assert a[name].data.name != other[name].data.name
    assert len(pickle.dumps(a.red.data.dask)) < 200_000


def test_corner_of_a_very_large_scene_is_made_alone():
    huge = synthetic_forest((40_000, 40_000), times=SUMMER, chunks=400, seed=0, disturbances=None)
    corner = huge.canopy_height[0, -100:, -100:].compute()
    origin = (float(corner.x[0]) - 0.3, float(corner.y[0]) + 0.3)
    alone = synthetic_forest((100, 100), times=SUMMER, seed=0, origin=origin, disturbances=None)
    np.testing.assert_array_equal(alone.canopy_height[0], corner)


# --- the truth ----------------------------------------------------------------------------------


def test_layers_have_the_right_types_dims_and_attributes(forest):
    for name in ("red", "green", "blue"):
        assert forest[name].dtype == np.uint8
        assert forest[name].dims == ("time", "y", "x")
        assert forest[name].attrs["common_name"] == name
        assert forest[name].attrs["nodata"] == 0
    assert forest.canopy_height.dtype == np.float32
    assert forest.canopy_height.attrs["standard_name"] == "canopy_height"
    assert forest.canopy_height.attrs["units"] == "m"
    assert bool(forest.valid.all())
    assert not any("grid_mapping" in forest[v].encoding for v in forest)
    assert all(
        forest[v].attrs["grid_mapping"] == "spatial_ref" for v in forest if v != "event_area"
    )
    assert np.isfinite(forest.canopy_height).all()


def test_truth_is_zero_on_water_roads_and_houses_and_tall_in_forest(forest):
    meanings = forest.land_cover.attrs["flag_meanings"].split()
    cover = forest.land_cover.values
    for name in ("road", "water", "building"):
        on_it = cover == meanings.index(name)
        assert on_it.sum() > 50, name
        assert float(forest.canopy_height.values[:, on_it].max()) == 0.0
    woods = forest.canopy_height.values[0, cover == meanings.index("forest")]
    assert np.percentile(woods, 95) > 20.0
    assert woods.max() < 60.0


def test_houses_stand_out_in_the_picture_but_not_in_the_truth(forest):
    built = forest.land_cover.values == 5
    core = ndimage.binary_erosion(built, iterations=3)
    ring = ndimage.binary_dilation(built, iterations=20) & ~ndimage.binary_dilation(
        built, iterations=4
    )
    image = picture(forest)
    assert np.abs(image[:, core].mean(1) - image[:, ring].mean(1)).max() > 15.0


def test_allometry_rises_and_growth_levels_off():
    age = np.arange(0.0, 200.0)
    for k in range(len(SPECIES)):
        species = np.full(age.size, k)
        height = growth_height(species, age)
        radius = crown_radius(species, height)
        assert height[0] == 0.0
        assert (np.diff(height) > 0).all()
        assert height[-1] < SPECIES[k].tallest
        assert np.corrcoef(height, radius)[0, 1] == pytest.approx(1.0)


def test_taller_stands_have_fewer_and_wider_crowns():
    found = []
    for seed in range(5):
        ds = synthetic_forest((320, 320), times=SUMMER, seed=seed, disturbances=None)
        height = ds.canopy_height.values[0]
        tops = (height == ndimage.maximum_filter(height, 5)) & (height > 3)
        # 4 x 4 blocks of 48 m: [block, pixel]
        blocks = height.reshape(4, 80, 4, 80).swapaxes(1, 2).reshape(16, -1)
        counts = tops.reshape(4, 80, 4, 80).swapaxes(1, 2).reshape(16, -1).sum(1)
        crowned = (blocks > 3).sum(1)
        closed = crowned > 0.6 * blocks.shape[1]
        found += list(zip(np.median(blocks, 1)[closed], (counts / crowned)[closed], strict=True))
    median, density = np.array(found).T
    assert np.corrcoef(median, np.log(density))[0, 1] < -0.5


def test_undisturbed_forest_grows():
    ds = synthetic_forest(
        (256, 256), times=["2019-07-01", "2022-07-01", "2025-07-01"], seed=1, disturbances=None
    )
    top = ds.canopy_height.coarsen(y=16, x=16).max()
    assert ds.sizes["event"] == 0
    assert (ds.disturbance == 0).all()
    # Crowns that widen may bring another tree's lumps to the top, so all but a few grow.
    grown = top.diff("time").values[top.values[:-1] > 2]
    assert (grown > 0).mean() > 0.9
    assert 0.1 < np.median(grown) < 4.0


def test_growth_stops_in_winter_and_on_request():
    winter = synthetic_forest((96, 96), times=["2020-10-01", "2021-03-20"], disturbances=None)
    np.testing.assert_array_equal(*winter.canopy_height.values)
    frozen = synthetic_forest(
        (96, 96), times=["2018-07-01", "2026-07-01"], disturbances=None, growth=False
    )
    np.testing.assert_array_equal(*frozen.canopy_height.values)


def test_clear_cut_drops_to_the_ground_and_other_events_take_some(two_dates):
    before, after = two_dates.canopy_height.values
    label, kinds = two_dates.disturbance.values[1], list(two_dates.event_kind.values)
    assert kinds == ["clear_cut", "thinning", "windthrow"]
    left = {}
    for k, kind in enumerate(kinds, start=1):
        assert before[label == k].mean() > 5.0
        left[kind] = after[label == k].mean() / before[label == k].mean()
    # Crowns from outside reach over the edge.
    assert np.percentile(after[ndimage.binary_erosion(label == 1, iterations=10)], 98) < 1.0
    assert left["clear_cut"] < 0.15
    assert 0.03 < left["windthrow"] < 0.4
    assert 0.4 < left["thinning"] < 0.95


def test_forest_outside_events_keeps_its_height(two_dates):
    before, after = two_dates.canopy_height.values
    away = ~ndimage.binary_dilation(two_dates.disturbance.values[1] > 0, iterations=20)
    assert (after - before)[away].mean() > 0.0
    # Between the crowns, one that widened may top a neighbour's lower rim, never the reverse.
    assert np.percentile((after - before)[away], 1) > -1.5


def test_area_table_equals_the_label_map(forest, two_dates):
    for ds in (forest, two_dates):
        counted = np.bincount(ds.disturbance.values.ravel(), minlength=ds.sizes["event"] + 1)[1:]
        np.testing.assert_allclose(ds.event_area, counted * 0.36)
        assert (ds.disturbance[0] == 0).all()
        assert (ds.event_area > 0).any()
        assert bool((ds.event_date.diff("event").astype(int) >= 0).all())
    np.testing.assert_allclose(two_dates.event_area, [5_000, 4_000, 2_500], rtol=0.35)


def test_labels_lie_on_forest_land_only(forest):
    struck = (forest.disturbance > 0).any("time").values
    assert struck.any()
    assert (forest.land_cover.values[struck] == 0).all()


def test_labels_belong_to_the_interval_in_which_they_happened(forest):
    times = forest.time.values
    for k in range(1, forest.sizes["time"]):
        labels = np.unique(forest.disturbance.values[k])
        dates = forest.event_date.values[labels[labels > 0] - 1]
        assert ((dates > times[k - 1]) & (dates <= times[k])).all()


def test_a_cut_grows_over_again():
    cut = Disturbance("clear_cut", "2016-01-01", ORIGIN[0] + 48, ORIGIN[1] - 48, 6_000)
    ds = synthetic_forest(
        (160, 160), times=["2015-07-01", "2017-07-01", "2030-07-01"], seed=9, disturbances=[cut]
    )
    inside = ndimage.binary_erosion(ds.disturbance.values[1] == 1, iterations=10)
    means = [ds.canopy_height.values[k][inside].mean() for k in range(3)]
    assert means[0] > 5.0
    assert means[1] < 0.5
    assert 1.5 < means[2] < 9.0


def test_told_events_may_strike_regrowth_and_the_later_one_is_labelled():
    place = (ORIGIN[0] + 48, ORIGIN[1] - 48)
    events = [
        Disturbance("clear_cut", "2016-01-01", *place, 5_000),
        Disturbance("clear_cut", "2028-01-01", *place, 2_000),
    ]
    ds = synthetic_forest(
        (160, 160), times=["2015-07-01", "2027-07-01", "2028-07-01"], seed=9, disturbances=events
    )
    assert ds.disturbance.values[1].max() == 1
    again = ndimage.binary_erosion(ds.disturbance.values[2] == 2, iterations=5)
    assert ds.canopy_height.values[1][again].mean() > 1.0
    assert ds.canopy_height.values[2][again].mean() < 0.05
    sparing = [
        events[0],
        Disturbance("clear_cut", "2028-01-01", *place, 2_000, spares_regrowth=True),
    ]
    spared = synthetic_forest(
        (160, 160), times=["2027-07-01", "2028-07-01"], seed=9, disturbances=sparing
    )
    assert (spared.disturbance == 0).all()
    assert (spared.event_area == 0.0).all()


def test_random_events_of_chosen_kinds_only():
    ds = synthetic_forest((640, 640), disturbances=("windthrow",), chunks=640)
    assert ds.sizes["event"] > 0
    assert set(ds.event_kind.values) == {"windthrow"}


# --- light, season, registration ----------------------------------------------------------------


def test_structure_is_identical_when_only_light_and_season_change():
    times = ["2020-06-20", "2020-09-05", "2020-10-12", "2020-11-25"]
    ds = synthetic_forest((200, 200), times=times, seed=9, disturbances=None, growth=False)
    for k in range(1, 4):
        np.testing.assert_array_equal(ds.canopy_height[0], ds.canopy_height[k])
        assert np.abs(picture(ds, 0) - picture(ds, k)).mean() > 5.0
    assert (np.diff(ds.sun_elevation) < 0).all()


def test_autumn_turns_broadleaf_red_and_winter_bare():
    ds = synthetic_forest(
        (300, 300), times=["2020-07-01", "2020-10-15"], seed=9, disturbances=None, sun=(45.0, 150.0)
    )
    woods = ds.canopy_height.values[0] > 8
    redness = [picture(ds, k)[0, woods].mean() / picture(ds, k)[1, woods].mean() for k in (0, 1)]
    assert redness[1] > redness[0] + 0.05
    july, october, january = (
        season(np.datetime64(t), 48.0) for t in ("2020-07-01", "2020-10-15", "2020-01-15")
    )
    assert (july.leaf, january.leaf) == (1.0, 0.0)
    assert october.colouring > july.colouring
    assert season(np.datetime64("2020-01-15"), -45.0).leaf == 1.0
    assert season(np.datetime64("2020-01-15"), 2.0).leaf == 1.0


@pytest.mark.parametrize(
    ("time", "latitude", "elevation", "azimuth"),
    [
        ("2020-06-21T12:00", 48.0, 65.4, 180.0),
        ("2020-12-21T12:00", 48.0, 18.6, 180.0),
        ("2020-03-20T06:00", 0.0, 0.0, 90.0),
        ("2020-06-21T12:00", -30.0, 36.6, 0.0),
    ],
)
def test_sun_stands_where_the_almanac_says(time, latitude, elevation, azimuth):
    found = solar_position(np.datetime64(time), latitude)
    assert found[0] == pytest.approx(elevation, abs=0.5)
    assert abs((found[1] - azimuth + 180) % 360 - 180) < 1.0


def test_mid_morning_unless_an_hour_is_given():
    ds = synthetic_forest((32, 32), times=["2020-07-01", "2020-07-02T15:00"])
    assert 90 < float(ds.sun_azimuth[0]) < 180 < float(ds.sun_azimuth[1]) < 270


@pytest.mark.parametrize("azimuth", [10.0, 80.0, 135.0, 200.0, 260.0, 315.0])
@pytest.mark.parametrize("elevation", [25.0, 50.0])
def test_a_pole_casts_its_shadow_away_from_the_sun(azimuth, elevation):
    window = Cutout(-1000, 500, 151, 151, 0.6)
    surface = np.zeros(window.shape, np.float32)
    surface[75, 75] = 18.0
    shade = shadow_depth(surface, window, Sun(elevation, azimuth)) > 0.01
    rows, cols = np.nonzero(shade)
    length = np.hypot(rows - 75, cols - 75).max() * 0.6
    assert length == pytest.approx(18.0 / np.tan(np.radians(elevation)), abs=1.5)
    heading = np.degrees(np.arctan2((cols - 75).mean(), -(rows - 75).mean()))
    assert abs((heading - azimuth) % 360 - 180) < 5.0


def test_shadow_equals_a_loop_over_the_ray():
    rng = np.random.default_rng(0)
    window, sun = Cutout(3, -7, 40, 50, 1.0), Sun(40.0, 180.0)
    surface = ndimage.gaussian_filter(rng.normal(0, 12, window.shape), 1.5).astype(np.float32)
    depth = shadow_depth(surface, window, sun)
    for row in range(40):
        ahead = np.arange(row, 40)  # the sun stands south: later rows are towards it
        rays = surface[ahead] - (ahead - row)[:, None] * np.tan(np.radians(40.0))
        np.testing.assert_allclose(depth[row], rays.max(0) - surface[row], atol=1e-4)
    assert sunlit(np.zeros((1, 1), np.float32)) == 1.0


@pytest.mark.parametrize(
    ("azimuth", "axis", "sign"), [(180.0, 0, -1), (90.0, 1, -1), (270.0, 1, 1)]
)
def test_ground_beside_trees_is_dark_on_the_far_side(azimuth, axis, sign):
    ds = synthetic_forest((400, 400), times=SUMMER, seed=42, sun=(40.0, azimuth))
    trees = ds.canopy_height.values[0] > 8
    open_land = (ds.canopy_height.values[0] < 0.1) & (ds.land_cover.values == 1)
    far = np.roll(trees, 8 * sign, axis) & open_land
    near = np.roll(trees, -8 * sign, axis) & open_land & ~far
    grey = picture(ds).mean(0)
    assert far.sum() > 100
    assert grey[far].mean() < grey[near].mean() - 20.0


def test_told_misregistration_is_found_again():
    kwargs = {"times": ["2020-07-01", "2020-07-08"], "seed": 6, "disturbances": None}
    shifted = synthetic_forest((256, 256), **kwargs, shift_px=[(0.0, 0.0), (2.3, -1.6)])
    first, second = (picture(shifted, k).mean(0) for k in (0, 1))
    found, *_ = phase_cross_correlation(second, first, upsample_factor=20)
    np.testing.assert_allclose(found, (2.3, -1.6), atol=0.15)
    still = synthetic_forest((256, 256), **kwargs)
    np.testing.assert_array_equal(still.canopy_height, shifted.canopy_height)


def test_drawn_misregistration_stays_within_its_limit():
    times = [f"2020-07-{d:02d}" for d in range(1, 29)]
    ds = synthetic_forest((16, 16), times=times, shift_px=3.0, chunks=16)
    length = np.hypot(ds.shift_y, ds.shift_x)
    assert float(length.max()) <= 3.0
    assert float(length.max()) > 2.0
    assert float(length.std()) > 0.3


# --- pictures like those of a sensor ------------------------------------------------------------


def test_pictures_have_the_statistics_of_real_imagery(summers):
    images = [picture(ds) for ds in summers]
    mean = np.mean([i.mean((1, 2)) for i in images], axis=0)
    assert mean[1] > mean[0] > mean[2]
    assert ((mean > (60, 70, 50)) & (mean < (130, 140, 110))).all()
    for image in images:
        grey = image.mean(0)
        assert 20 < grey.std() < 60
        assert np.percentile(grey, 1) > 8  # shadows are dark, not black
        assert (image >= 255).mean() < 0.01


def test_height_is_not_simply_brightness(summers):
    found = []
    for ds in summers:
        woods = ds.canopy_height.values[0] > 2
        found.append(
            np.corrcoef(picture(ds).mean(0)[woods], ds.canopy_height.values[0][woods])[0, 1]
        )
    assert np.abs(np.mean(found)) < 0.5


def test_clouds_are_masked():
    kwargs = {"times": SUMMER, "seed": 2, "resolution": 2.0, "disturbances": None}
    clear = synthetic_forest((250, 250), **kwargs)
    cloudy = synthetic_forest((250, 250), **kwargs, clouds=0.4)
    hidden = ~cloudy.valid.values[0]
    assert 0.1 < hidden.mean() < 0.95
    difference = np.abs(picture(cloudy) - picture(clear)).mean(0)
    assert difference[~hidden].max() < 12.0
    assert difference[hidden].mean() > 25.0
    white = picture(cloudy).min(0) > 215
    assert white.any()
    assert hidden[white].mean() > 0.999


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_clouds_cover_their_share_of_the_world(share):
    moment = Moment(
        "2019-07-01",
        season(np.datetime64("2019-07-01"), 48.0),
        Sun(50.0, 140.0),
        Chronicle(0),
        share,
    )
    dense, shadow = _clouds_over(moment, Cutout(0, 0, 500, 500, 40.0))
    assert (dense > 0.1).mean() == pytest.approx(share, abs=0.12)
    assert (shadow > 0.1).mean() == pytest.approx((dense > 0.1).mean(), abs=0.05)


def test_swath_edge_is_nodata_in_all_bands_and_nowhere_else():
    ds = synthetic_forest((200, 300), times=["2020-06-01", "2020-08-01"], nodata_edge=0.25)
    empty = picture(ds, 0).max(0) == 0
    assert empty.mean() == pytest.approx(0.25, abs=0.05)
    np.testing.assert_array_equal(empty, ~ds.valid.values[0])
    assert (picture(ds, 0)[:, ~empty] >= 1).all()
    assert np.isfinite(ds.canopy_height).all()


# --- place on the map ---------------------------------------------------------------------------


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:32619", "EPSG:2154", 3857])
def test_crs_and_grid_survive_rioxarray_odc_geo_and_zarr(tmp_path, crs):
    origin = (700_000.0, 6_600_000.0) if crs == "EPSG:2154" else ORIGIN
    ds = synthetic_forest((40, 60), times=SUMMER, crs=crs, origin=origin)
    epsg = int(str(crs).split(":")[-1])
    assert ds.rio.crs.to_epsg() == epsg
    assert ds.odc.geobox.crs.epsg == epsg
    assert ds.red.odc.geobox.shape == (40, 60)
    np.testing.assert_allclose(ds.rio.bounds(), ds.odc.geobox.boundingbox, atol=1e-6)
    left, top = ds.rio.bounds()[0], ds.rio.bounds()[3]
    assert abs(left - origin[0]) <= 0.31
    assert abs(top - origin[1]) <= 0.31
    assert abs(left / 0.6 - round(left / 0.6)) < 1e-4
    ds.to_zarr(tmp_path / "forest.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "forest.zarr", consolidated=False)
    assert again.rio.crs.to_epsg() == epsg
    assert again.canopy_height.odc.geobox == ds.odc.geobox
    ds.canopy_height[0].rio.to_raster(tmp_path / "height.tif")
    assert (tmp_path / "height.tif").stat().st_size > 0


# --- requests that cannot be met ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shape": (0, 10)}, r"expected a shape of two positive integers, found \(0, 10\); pass"),
        ({"shape": (10,)}, "expected a shape of two positive integers"),
        ({"shape": 64}, "expected a shape of two positive integers"),
        ({"shape": (10.5, 10)}, "expected a shape of two positive integers"),
        ({"resolution": 0.0}, "expected a resolution of 0.1 to 10.0 m, found 0.0; pass"),
        ({"resolution": -0.6}, "expected a resolution"),
        ({"origin": (0.0, np.nan)}, "expected an origin"),
        ({"times": ["2020-01-01", "2019-01-01"]}, "strictly increasing order, found 2020.*sorted"),
        ({"times": ["2020-06-01", "2020-06-01"]}, "strictly increasing"),
        ({"times": []}, "expected one date or more"),
        ({"times": ["summer"]}, "expected dates such as '2019-07-01', found .*summer"),
        ({"seed": -1}, "expected a seed that is an integer of at least 0, found -1"),
        ({"seed": 1.5}, "expected a seed"),
        ({"disturbances": ("fire",)}, "clear_cut, thinning, windthrow, found 'fire'; pass"),
        ({"disturbances": "fire"}, "found 'fire'"),
        ({"crs": "EPSG:4326"}, "expected a projected CRS in metres, found WGS 84 in degree; pass"),
        ({"crs": "EPSG:2264"}, "expected a projected CRS in metres, found .* US survey foot"),
        ({"crs": "nowhere"}, "expected a coordinate reference system, found 'nowhere'"),
        ({"clouds": 1.0}, "expected clouds from 0 to below 1, found 1.0"),
        (
            {"clouds": (0.1, 0.2)},
            "expected one value of clouds, or one for each of 1 dates, found 2",
        ),
        ({"nodata_edge": 2.0}, "expected nodata_edge from 0 to 0.9"),
        ({"shift_px": -1.0}, "expected shift_px from 0 to 64"),
        ({"shift_px": [(1.0, 1.0)] * 3}, r"one \(dy, dx\) of at most 64 px for each of 1 dates"),
        ({"sun": (3.0, 120.0)}, "expected the sun at 12 to 90 degrees .* found 3.0 degrees"),
        ({"times": ["2020-12-21T08:00"]}, "expected the sun at 12 to 90 degrees"),
        ({"chunks": 0}, "expected chunks as an integer, or one for y and one for x, found 0"),
        ({"chunks": (1, 2, 3)}, "expected chunks"),
    ],
)
def test_bad_requests_say_what_to_write_instead(kwargs, message):
    call = {"shape": (32, 32), "times": SUMMER} | kwargs
    shape = call.pop("shape")
    with pytest.raises(CHMv2Error, match=message):
        synthetic_forest(shape, **call)


def test_bad_grids_are_grid_errors():
    with pytest.raises(GridError):
        synthetic_forest((32, 32), resolution=0.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "fire"}, "expected a disturbance of kind clear_cut, thinning, windthrow"),
        ({"severity": 1.5}, "expected 0 < severity <= 1, area > 0 m2"),
        ({"area": 0.0}, "area 0.0"),
        ({"elongation": -1.0}, "elongation -1.0"),
    ],
)
def test_bad_disturbances_say_what_to_write_instead(kwargs, message):
    call = {"kind": "clear_cut", "date": "2020-01-01", "x": 0.0, "y": 0.0, "area": 100.0} | kwargs
    with pytest.raises(CHMv2Error, match=message):
        Disturbance(**call)


# --- cost ---------------------------------------------------------------------------------------


def test_a_date_is_made_in_seconds():
    start = time.process_time()
    synthetic_forest((512, 512), times=SUMMER)
    assert time.process_time() - start < 6.0


def test_real_imagery_is_alike_in_contrast(summers, data):
    path = data / "rgb_chm_bart2019" / "BART_320000_4881000_rgb_2019.tif"
    with rioxarray.open_rasterio(path) as real:
        bart = real.coarsen(y=6, x=6, boundary="trim").mean().values
    ours = picture(summers[0])

    def detail(image: np.ndarray) -> float:
        grey = image.mean(0)
        return float(np.std(grey - ndimage.gaussian_filter(grey, 2.0)))

    assert 0.5 < detail(ours) / detail(bart) < 1.5
