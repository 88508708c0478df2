"""Patches in blocks, against scipy on the whole."""

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from xchmv2.errors import CHMv2Error
from xchmv2.raster import label_patches, sieve


def structure(connectivity):
    return np.ones((3, 3)) if connectivity == 8 else None


def plane(values, pixel=1.0, crs=None, dims=("y", "x")):
    rows, cols = values.shape[-2:]
    coords = {"y": 100 - pixel * np.arange(rows), "x": 7 + pixel * np.arange(cols)}
    array = xr.DataArray(values, coords, dims)
    return array if crs is None else array.odc.assign_crs(crs)


@st.composite
def cases(draw, smallest=1):
    side = st.integers(smallest, 23)
    shape = draw(st.tuples(side, side))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    chunks = tuple(draw(st.integers(1, size)) for size in shape)
    return mask, rng.normal(20, 5, shape), chunks


@settings(max_examples=50)
@given(case=cases(), connectivity=st.sampled_from([4, 8]))
def test_labels_equal_those_of_the_whole(case, connectivity):
    mask, _, chunks = case
    expected, count = ndimage.label(mask, structure(connectivity))
    for array in (plane(mask), plane(mask).chunk(dict(zip("yx", chunks, strict=True)))):
        labels, table = label_patches(array, connectivity=connectivity)
        np.testing.assert_array_equal(labels, expected)
        assert list(table["patch"]) == list(range(1, count + 1))
        assert labels.chunks == array.chunks


@settings(max_examples=50)
@given(case=cases(2), low=st.integers(1, 12), span=st.integers(0, 20))
def test_bounds_and_table_equal_those_of_the_whole(case, low, span):
    mask, values, chunks = case
    values[::3, ::4] = np.nan
    whole, count = ndimage.label(mask, structure(8))
    sizes = np.bincount(whole.ravel(), minlength=count + 1)[1:]
    kept = np.flatnonzero((sizes * 4 >= low * 4) & (sizes <= low + span)) + 1
    array = plane(mask, 2.0).chunk(dict(zip("yx", chunks, strict=True)))
    bounds = {"min_area": 4 * low, "max_area": 4 * (low + span)}
    labels, table = label_patches(array, {"h": plane(values, 2.0)}, **bounds)
    np.testing.assert_array_equal(labels > 0, np.isin(whole, kept))
    np.testing.assert_array_equal(sieve(array, **bounds), np.isin(whole, kept))
    assert len(table) == len(kept)
    for row, number in zip(table.itertuples(), kept, strict=True):
        inside = pd.Series(values[whole == number]).dropna()
        np.testing.assert_array_equal(np.unique(labels.values[whole == number]), row.patch)
        assert row.area == pytest.approx(4 * row.pixels)
        assert row.pixels == sizes[number - 1]
        assert row.h_count == len(inside)
        expected = [inside.mean(), inside.min(), inside.max(), inside.std(ddof=1)]
        found = [row.h_mean, row.h_min, row.h_max, row.h_sd]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        total = inside.sum() if len(inside) else np.nan
        np.testing.assert_allclose([row.h_sum, row.h_volume], [total, 4 * total], rtol=1e-9)


def test_bounds_are_true_areas():
    y = 8_399_738 - 10.0 * np.arange(30)  # 60 degrees north: 100 projected are 25 true m2
    mask = np.zeros((30, 30), bool)
    mask[2:6, 2:6] = mask[10:16, 10:16] = True
    array = xr.DataArray(mask, {"y": y, "x": 10.0 * np.arange(30)}, ("y", "x"))
    array = array.odc.assign_crs(3857)
    labels, table = label_patches(array, min_area=500)
    assert table["pixels"].tolist() == [36]
    assert table["area"][0] == pytest.approx(36 * 25, rel=0.01)
    assert labels.odc.crs.epsg == 3857
    assert labels.attrs == {
        "long_name": "number of the patch, 0 outside patches",
        "units": "1",
        "grid_mapping": "spatial_ref",
    }


def test_each_date_has_patches_of_its_own():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 20, 25)) < 0.4
    time = pd.date_range("2020", periods=3, freq="YS")
    array = plane(mask, dims=("time", "y", "x")).assign_coords(time=time)
    values = plane(rng.random((20, 25)))
    turned = array.transpose("y", "time", "x").chunk({"y": 7, "x": 6})
    labels, table = label_patches(turned, {"h": values})
    assert labels.dims == ("y", "time", "x")
    for index, date in enumerate(time):
        expected, count = ndimage.label(mask[index], structure(8))
        np.testing.assert_array_equal(labels.sel(time=date), expected)
        assert (table["time"] == date).sum() == count
    kept = sieve(turned, min_area=3).transpose(*array.dims)
    np.testing.assert_array_equal(kept, sieve(array, min_area=3))


def test_large_values_keep_their_spread():
    values = 1e6 + np.random.default_rng(0).normal(0, 0.01, (40, 40))
    mask = xr.ones_like(plane(values), bool).chunk({"y": 7, "x": 11})
    _, table = label_patches(mask, {"h": plane(values)})
    assert table["h_sd"][0] == pytest.approx(values.std(ddof=1), rel=1e-6)


def test_nothing_to_find():
    labels, table = label_patches(plane(np.zeros((5, 6), bool)), {"h": plane(np.ones((5, 6)))})
    assert not labels.any()
    assert table.empty
    assert "h_mean" in table


def test_sieve_and_labels_are_lazy():
    mask = plane(np.random.default_rng(0).random((60, 70)) < 0.5).chunk({"y": 20, "x": 30})
    with no_compute():
        kept = sieve(mask, min_area=5)
        again = sieve(mask, min_area=5)
    assert kept.chunks == mask.chunks
    assert kept.data.name == again.data.name
    before = mask.copy(deep=True)
    labels, _ = label_patches(mask, min_area=5)
    assert isinstance(labels.data, da.Array)
    np.testing.assert_array_equal(labels > 0, kept)
    xr.testing.assert_identical(mask, before)


def test_each_block_is_computed_once():
    calls = []

    def make(block_info=None):
        calls.append(block_info[None]["chunk-location"])
        return np.random.default_rng(calls[-1]).random((50, 50)) < 0.4

    blocks = da.map_blocks(make, chunks=((50,) * 8, (50,) * 8), dtype=bool, meta=np.empty((0, 0)))
    sieve(xr.DataArray(blocks, dims=("y", "x")), min_area=4).compute(scheduler="synchronous")
    assert len(calls) == len(set(calls)) == 64


def test_bad_input():
    mask = plane(np.ones((4, 5), bool))
    with pytest.raises(CHMv2Error, match="a boolean mask, found float64 values; compare first"):
        label_patches(mask.astype(float))
    with pytest.raises(CHMv2Error, match=r"connectivity 4 .* found connectivity=6"):
        sieve(mask, connectivity=6)
    for bounds in ({"min_area": -1}, {"min_area": 9, "max_area": 3}):
        with pytest.raises(CHMv2Error, match="0 <= min_area <= max_area"):
            sieve(mask, **bounds)
    with pytest.raises(CHMv2Error, match="h on the grid and dates of the mask"):
        label_patches(mask, {"h": plane(np.ones((4, 4)))})
    with pytest.raises(CHMv2Error, match="h on the grid and dates of the mask"):
        label_patches(mask, {"h": plane(np.ones((2, 4, 5)), dims=("time", "y", "x"))})
