"""The error model of a difference: what it finds, and that intervals built on it hold."""

import dask.array as da
import numpy as np
import pytest
import rioxarray  # noqa: F401
import xarray as xr
from conftest import no_compute
from scipy import fft

import xchmv2
from xchmv2.change import ErrorModel, correlation_length, difference, error_model
from xchmv2.errors import CHMv2Error
from xchmv2.zonal import effective_samples


def field(rng, size, parts):
    """Normal errors of variance 1 with spherical correlation: parts are (share, range [px])."""
    away = np.minimum(np.arange(2 * size), 2 * size - np.arange(2 * size))
    distance = np.hypot(away[:, None], away)
    total = np.zeros((size, size))
    for share, reach in parts:
        if not reach:
            total += np.sqrt(share) * rng.standard_normal((size, size))
            continue
        part = np.minimum(distance / reach, 1)
        spectrum = np.sqrt(np.maximum(fft.fft2(1 - 1.5 * part + 0.5 * part**3).real, 0))
        noise = rng.standard_normal(distance.shape) + 1j * rng.standard_normal(distance.shape)
        total += np.sqrt(share) * fft.fft2(noise * spectrum, norm="ortho").real[:size, :size]
    return total


def on_grid(values, chunks=None, cell=1.0, name="canopy_height"):
    y, x = (cell * (np.arange(n) + 0.5) for n in values.shape)
    coords = {"y": 5e6 - y, "x": 5e5 + x}
    attrs = {"units": "m"}
    array = xr.DataArray(values.astype("f4"), coords, ("y", "x"), name, attrs).rio.write_crs(32633)
    return array if chunks is None else array.chunk(chunks)


def forest(rng, size):
    return np.clip(rng.gamma(4, 5, (size, size)), 3, 60)


@pytest.fixture(scope="module")
def two_dates():
    """Heights whose errors are 80 % of 10 px and 20 % of 100 px, with an offset and a clear-cut."""
    rng = np.random.default_rng(0)
    before = forest(rng, 400)
    after = before + 1.0 + 3 * field(rng, 400, [(0.8, 10), (0.2, 100)])
    after[100:160, 200:300] -= 15
    after[5:40, 7:90] = np.nan
    return before, np.maximum(after, 0)


def test_any_chunking_gives_the_same_bits(two_dates):
    whole = difference(*(on_grid(each) for each in two_dates))
    for chunks in ({"y": 150, "x": 130}, {"y": 400, "x": 64}):
        pair = [on_grid(each, chunks) for each in two_dates]
        with no_compute():
            lazy = difference(*pair)
        assert lazy["p_value"].data.name == difference(*pair)["p_value"].data.name
        assert all(isinstance(lazy[name].data, da.Array) for name in ("error_sill", "offset_doubt"))
        xr.testing.assert_identical(lazy.compute(), whole)


def test_what_it_finds(two_dates):
    errors = ErrorModel.read(difference(*(on_grid(each, cell=0.5) for each in two_dates)))
    assert errors.offset == pytest.approx(1.0, abs=errors.offset_doubt)
    assert errors.spread_at(20.0) == pytest.approx(3.0, abs=0.25)
    assert errors.quantile(0.95) == pytest.approx(1.96, abs=0.06)
    assert errors.seen_to == pytest.approx(100, rel=1e-3)  # half of 400 px of 0.5 m
    near, far = (errors.sills[errors.ranges <= 10].sum(), errors.sills[errors.ranges > 20].sum())
    assert near == pytest.approx(0.8, abs=0.1)
    assert far == pytest.approx(0.2, abs=0.1)
    assert errors.sills.sum() == pytest.approx(1)
    assert errors.correlation(0.0) == pytest.approx(1)
    assert "80 %" not in repr(errors)
    for words in ("offset ", "spread ", "tails ", "correlation ", "seen        to 100 m"):
        assert words in repr(errors)


def test_a_lazy_model_says_so(two_dates):
    cube = xr.concat([on_grid(each, 200) for each in two_dates], "time")
    with no_compute():
        errors = error_model(cube)
    assert not errors.computed
    assert "not computed" in repr(errors)
    with pytest.raises(CHMv2Error, match=r"not been computed; call errors\.compute\(\) first"):
        errors.standard_error(np.ones((9, 9)), (1.0, 1.0))
    assert isinstance(errors.spread_at(20.0), da.Array)
    found = errors.compute()
    assert found.computed
    assert float(errors.spread_at(20.0)) == found.spread_at(20.0)
    assert 0 < found.standard_error(np.ones((9, 9)), (1.0, 1.0)) < found.spread.max()


def test_a_change_carries_it_through_a_file(two_dates, tmp_path):
    change = difference(*(on_grid(each) for each in two_dates))
    change.to_netcdf(tmp_path / "change.nc", engine="scipy")
    change.chmv2.to_zarr(tmp_path / "change.zarr", progress=False)
    known = ErrorModel.read(change)
    for file in (
        xr.open_dataset(tmp_path / "change.nc", engine="scipy"),
        xchmv2.open_zarr(tmp_path / "change.zarr"),
    ):
        opened = ErrorModel.read(file).compute()
        np.testing.assert_array_equal(opened.sills, known.sills)
        assert opened.seen_to == known.seen_to
        assert opened.offset == known.offset
    assert ErrorModel.read(change[["height_change"]]) is None


@pytest.mark.parametrize(
    "noise",
    [
        lambda rng, h: 0.15 * h * rng.standard_normal(h.shape),
        lambda rng, h: (1 + 0.1 * h) * rng.standard_t(3, h.shape) / np.sqrt(3),
        lambda rng, h: 0.15 * h * rng.laplace(0, np.sqrt(0.5), h.shape),
    ],
    ids=["normal", "t3", "laplace"],
)
@pytest.mark.parametrize("lost", [0.0, 0.2])
def test_few_unchanged_pixels_are_significant_in_any_class_of_height(noise, lost):
    rng = np.random.default_rng(1)
    height = forest(rng, 400)
    before, after = (np.clip(height + noise(rng, height), 0, 140) for _ in range(2))
    changed = rng.random(height.shape) < lost
    after[changed] = np.maximum(after - rng.uniform(0, 12, height.shape), 0)[changed]
    found = difference(on_grid(before), on_grid(after))["significant"].values
    for low, high in ((3, 10), (10, 15), (15, 22), (22, 30), (30, 61)):
        kept = (height >= low) & (height < high) & ~changed
        assert 0.025 < found[kept].mean() < 0.075, (low, high)


@pytest.mark.parametrize("parts", [[(1, 0)], [(0.95, 0), (0.05, 80)], [(0.8, 6), (0.2, 80)]])
def test_intervals_of_means_hold(parts):
    rng = np.random.default_rng(2)
    held, size = [], 192
    for _ in range(12):
        errors = field(rng, size, parts)
        change = on_grid(3 * errors, name="height_change")
        length = correlation_length(change)
        assert length > 0
        found = ErrorModel.read(difference(on_grid(20 + 0 * errors), on_grid(20 + 3 * errors)))
        for side in (8, 48):
            for corner in (20, 100):
                square = np.s_[corner : corner + side, corner : corner + side]
                error = found.standard_error(np.ones((side, side)), (1.0, 1.0))
                held.append(abs(3 * errors[square].mean()) < 1.96 * error)
    assert np.mean(held) > 0.85


def test_one_range_is_the_disc_of_a_correlation_length():
    errors = ErrorModel.of_one_range(12.0, spread=3.0)
    assert errors.correlation_length() == pytest.approx(12.0)
    y, x = np.mgrid[-60:60, -60:60] + 0.5
    for radius in (10, 25, 55):
        disc = (np.hypot(y, x) <= radius).astype(float)
        independent = effective_samples(np.pi * radius**2, 12.0, disc.sum())
        # The closed form takes distances from the centre of the disc.
        assert 3 / np.sqrt(independent) == pytest.approx(
            errors.standard_error(disc, (1.0, 1.0)), rel=0.25
        )


def test_heights_without_scatter_are_refused(two_dates):
    before = on_grid(two_dates[0])
    with pytest.raises(CHMv2Error, match=r"cannot be estimated; pass it in metres, such as sigma"):
        difference(before, before + 1)
    assert difference(before, before + 1, sigma=4.0)["significant"].sum() == 0
