"""Masks of loss and gain, their events, and transitions: against scipy and plain loops."""

import json
import sys

import dask
import numpy as np
import pandas as pd
import pytest
import rioxarray
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize
from scipy import ndimage

from xchmv2.change import difference, gain, label_events, loss, transition
from xchmv2.errors import CHMv2Error

SQUARE = np.ones((3, 3), bool)


def field(shape=(60, 70), *, seed=0, scale=12.0, crs=32633, pixel=1.0, top=5_300_000.0):
    """Smooth random change with holes."""
    rng = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(rng.normal(0, 1, shape), 3)
    values = (values / values.std() * scale).astype("float32")
    values[rng.random(shape) < 0.01] = np.nan
    coords = {
        "y": top - pixel * (np.arange(shape[0]) + 0.5),
        "x": 500_000 + pixel * (np.arange(shape[1]) + 0.5),
    }
    attrs = {"standard_name": "canopy_height", "units": "m"}
    array = xr.DataArray(values, coords, ("y", "x"), "height_change", attrs)
    return array if crs is None else array.odc.assign_crs(crs)


def heights(**options):
    return field(**options).rename("canopy_height")


def cleaned(mask, opening, least):
    """Open, label and sieve the whole with scipy, in pixels."""
    if opening:
        mask = ndimage.binary_opening(mask, np.ones((opening, opening)))
    labels, count = ndimage.label(mask, SQUARE)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return mask & (sizes[labels] >= least)


@settings(max_examples=12)
@given(
    chunks=st.tuples(st.integers(9, 60), st.integers(11, 70)),
    opening=st.sampled_from([None, 3, 5]),
    least=st.sampled_from([0, 20, 60]),
    seed=st.integers(0, 1000),
)
def test_masks_equal_scipy_on_the_whole(chunks, opening, least, seed):
    change = field(seed=seed, crs=None)
    for function, candidates in ((loss, change <= -10), (gain, change >= 10)):
        expected = cleaned(candidates.values, opening, least)
        options = {"threshold": 10, "opening": opening, "min_area": least}
        np.testing.assert_array_equal(function(change, **options), expected)
        with no_compute():
            lazy = function(change.chunk(dict(zip("yx", chunks, strict=True))), **options)
        np.testing.assert_array_equal(lazy, expected)
        assert lazy.dtype == bool
    tiny = change[:9, :11]
    in_pixels = loss(tiny.chunk({"y": 2, "x": 1}), threshold=10, opening=opening, min_area=least)
    np.testing.assert_array_equal(in_pixels, cleaned((tiny <= -10).values, opening, least))


def test_significant_loss():
    after = heights(seed=3) + 30
    before = xr.zeros_like(after) + 30
    change = difference(before, after, sigma=5.0)
    candidates = (change.significant & (change.height_change < 0)).values
    np.testing.assert_array_equal(loss(change), cleaned(candidates, 3, 200))
    more = candidates & (change.height_change <= -18).values
    found = loss(change, threshold=-18, min_area=50)
    np.testing.assert_array_equal(found, cleaned(more, 3, 50))
    up = (change.significant & (change.height_change > 0)).values
    np.testing.assert_array_equal(gain(change, min_area=None), cleaned(up, 3, 0))
    assert found.name == "loss"
    assert found.attrs == {
        "long_name": "loss of canopy height",
        "threshold": 18,
        "opening": 3,
        "min_area": 50.0,
        "grid_mapping": "spatial_ref",
    }


def test_declared_nodata_are_no_change():
    change = field()
    holed = change.fillna(-9999.0).assign_attrs(_FillValue=-9999.0)
    for function in (loss, gain):
        expected = function(change, threshold=5)
        xr.testing.assert_equal(function(holed, threshold=5), expected)
    lost = loss(change, threshold=5)
    pd.testing.assert_frame_equal(label_events(lost, holed)[1], label_events(lost, change)[1])


def test_heights_are_no_change():
    given_ = abs(heights())
    for function in (loss, gain):
        with pytest.warns(UserWarning, match="no value is below 0: these look like heights, not"):
            function(given_, threshold=5)
        function(-given_, threshold=5)
        function(given_ * 0, threshold=5)
        function(given_.rename(None).assign_attrs(standard_name=""), threshold=5)
        with no_compute():
            lazy = function(given_.chunk(y=20), threshold=5)
        with pytest.warns(UserWarning, match="no value is below 0: these look like heights, not"):
            lazy.compute()


def test_land_cover_is_left_out():
    change = field()
    water = (change.x < change.x[25]).drop_vars("spatial_ref").broadcast_like(change)
    for array in (change, change.chunk({"y": 20, "x": 20})):
        found = loss(array, threshold=10, min_area=30, mask=water)
        expected = cleaned((change <= -10).values & ~water.values, 3, 30)
        np.testing.assert_array_equal(found, expected)
        assert (found.chunks is None) == (array.chunks is None)
    assert not loss(change, threshold=1, mask=xr.ones_like(change, bool)).any()


def test_areas_are_true():
    change = field(pixel=4.0, crs=3857, top=8_399_738.0)  # 60 degrees north: 4 m2 per pixel
    expected = cleaned((change <= -10).values, 3, 200 / 4)
    assert 0 < expected.sum() < cleaned((change <= -10).values, 3, 0).sum()
    np.testing.assert_array_equal(loss(change, threshold=10), expected)


def test_each_date_alone():
    dates = pd.date_range("2020", periods=3, freq="YS")
    change = xr.concat([field(seed=k) for k in range(3)], pd.Index(dates, name="time"))
    turned = change.transpose("x", "time", "y").chunk({"x": 17, "y": 23})
    found = loss(turned, threshold=10)
    assert found.dims == ("x", "time", "y")
    for date in dates:
        expected = loss(change.sel(time=date), threshold=10)
        np.testing.assert_array_equal(found.sel(time=date).transpose("y", "x"), expected)
    labels, table = label_events(found, turned, polygons=True)
    assert list(table.columns[:2]) == ["time", "event"]
    for row in table.itertuples():
        plane = labels.sel(time=row.time).transpose("y", "x").values
        assert row.geometry.area == pytest.approx((plane == row.event).sum())


@pytest.mark.parametrize("chunks", [None, {"y": 17, "x": 13}])
def test_events_equal_a_plain_loop(chunks):
    change = field((90, 100), seed=5)
    change = change if chunks is None else change.chunk(chunks)
    mask = loss(change, threshold=10, min_area=20)
    before = change.copy(deep=True)
    labels, table = label_events(mask, change)
    expected, count = ndimage.label(mask.values, SQUARE)
    np.testing.assert_array_equal(labels, expected)
    columns = ["event", "area", "mean_magnitude", "max_magnitude", "volume"]
    assert list(table) == columns
    assert len(table) == count > 3
    cell = 1 / 0.9996**2
    for row in table.itertuples():
        size = -change.values[expected == row.event].astype(float)
        found = [row.area, row.mean_magnitude, row.max_magnitude, row.volume]
        exact = [size.size * cell, size.mean(), size.max(), size.sum() * cell]
        np.testing.assert_allclose(found, exact, rtol=1e-6)
    xr.testing.assert_identical(change, before)
    assert (labels.chunks is None) == (chunks is None)
    assert labels.name == "event"


def test_outlines_cover_their_events():
    change = field((90, 100), seed=5)
    mask = loss(change, threshold=10, min_area=20, opening=None)
    labels, table = label_events(mask, change, polygons=True)
    _, in_parts = label_events(
        mask.chunk({"y": 17, "x": 13}), change.chunk({"y": 40}), polygons=True
    )
    assert table.crs.to_epsg() == 32633
    assert table.geometry.is_valid.all()
    assert table.geometry.geom_equals(in_parts.geometry).all()
    pd.testing.assert_frame_equal(
        table.drop(columns="geometry"), in_parts.drop(columns="geometry"), rtol=1e-9
    )
    affine = change.odc.geobox.transform
    drawn = rasterize(
        zip(table.geometry, table["event"], strict=True), mask.shape, transform=affine
    )
    np.testing.assert_array_equal(drawn, labels)


def test_events_of_south_up_data_without_a_crs():
    change = field((40, 50), crs=None)[::-1]
    mask = loss(change, threshold=8, min_area=5)
    labels, table = label_events(mask, change, polygons=True)
    assert table.crs is None
    row = table.iloc[0]
    inside = labels.where(labels == row.event, drop=True)
    left, low, right, top = row.geometry.bounds
    assert (left, right) == (float(inside.x.min()) - 0.5, float(inside.x.max()) + 0.5)
    assert (low, top) == (float(inside.y.min()) - 0.5, float(inside.y.max()) + 0.5)


def test_events_know_their_dates():
    before = heights(seed=1).assign_coords(time=pd.Timestamp("2012-08-01")) * 0 + 60
    after = (60 + heights(seed=2)).assign_coords(time=pd.Timestamp("2014-08-20"))
    change = difference(before, after, sigma=3.0)
    _, table = label_events(loss(change), change)
    assert set(table["before"]) == {pd.Timestamp("2012-08-01")}
    assert set(table["after"]) == {pd.Timestamp("2014-08-20")}


def test_events_of_a_series():
    size = abs(field(seed=4))
    dates = np.array(["2018-07-01", "2020-07-03", "NaT"], "datetime64[ns]")
    when = xr.DataArray(dates[np.arange(60 * 70).reshape(60, 70) // 70 % 3], dims=("y", "x"))
    when = when.assign_coords(y=size.y, x=size.x)
    series = xr.Dataset({"magnitude": size, "loss_date": when}).chunk({"y": 25, "x": 25})
    mask = loss(series, threshold=2, opening=None, min_area=None)
    expected = (size >= 2).values & ~np.isnat(when.values)
    np.testing.assert_array_equal(mask, expected)
    labels, table = label_events(mask, series)
    for row in table.itertuples():
        inside = when.values[labels.values == row.event]
        assert row.first_date == inside.min()
        assert row.last_date == inside.max()
    with pytest.raises(CHMv2Error, match="events of a series are losses, never gains; pass what"):
        gain(series, threshold=2)


def test_nothing_lost():
    labels, table = label_events(loss(field() * 0, threshold=5), field(), polygons=True)
    assert table.empty
    assert table.crs.to_epsg() == 32633
    assert not labels.any()


CLASSES = (2, 5, 20)


@settings(max_examples=20)
@given(chunks=st.tuples(st.integers(9, 60), st.integers(11, 70)), seed=st.integers(0, 1000))
def test_transition_equals_pandas(chunks, seed):
    before, after = abs(heights(seed=seed)), abs(heights(seed=seed + 1))
    bins = [-np.inf, *CLASSES, np.inf]
    frames = [
        pd.Series(np.digitize(array.values.ravel(), bins[1:-1])).where(
            array.notnull().values.ravel(), 4
        )
        for array in (before, after)
    ]
    counts = pd.crosstab(*frames).reindex(index=range(5), columns=range(5), fill_value=0)
    found = transition(before, after, CLASSES)
    np.testing.assert_allclose(found, counts / 0.9996**2 / 1e4, rtol=1e-6)
    with no_compute():
        lazy = transition(before.chunk(dict(zip("yx", chunks, strict=True))), after, CLASSES)
    np.testing.assert_allclose(lazy, found, rtol=1e-9)
    assert dask.is_dask_collection(lazy)
    names = ["under 2 m", "2 to 5 m", "5 to 20 m", "20 m or more", "missing"]
    assert found.before.values.tolist() == found.after.values.tolist() == names
    assert found.attrs["units"] == "ha"
    assert found.to_pandas().loc["2 to 5 m", "missing"] == found[1, 4]


def test_transition_labels_and_boundaries():
    height = xr.DataArray(np.array([[1.9, 2.0, 5.0, np.nan]]), dims=("y", "x"))
    found = transition(height, height, (2, 5), labels=["low", "shrub", "tree"])
    np.testing.assert_allclose(np.diag(found) * 1e4, 1)
    assert found.before.values.tolist() == ["low", "shrub", "tree", "missing"]
    assert "units" not in found.attrs


def test_cauaxi(data):
    values = json.loads((data / "reference_values.json").read_text())["cauaxi_nw100"]
    before, after = (
        rioxarray.open_rasterio(
            data / "chm_change_cauaxi_window" / f"CAU_CHM_{year}_nw100.tif", masked=True
        ).squeeze(drop=True)
        for year in (2012, 2014)
    )
    change = (after - before).chunk({"y": 30, "x": 41})
    for limit in (5, 10):
        plain = loss(change, threshold=limit, opening=None, min_area=None)
        # Published are losses of more than the limit; heights have two decimals.
        strictly = int(plain.sum()) - int((change == -limit).sum())
        assert strictly == values[f"cells_change_lt_minus{limit}"]
    grown = gain(change, threshold=np.nextafter(5, 6), opening=None, min_area=None)
    assert int(grown.sum()) == values["cells_change_gt_5"]
    _, losses = label_events(change < 0, change)
    _, gains = label_events(change > 0, change)
    net = gains["volume"].sum() - losses["volume"].sum()
    assert net == pytest.approx(values["volume_change_m3"], abs=0.1)
    table = transition(before, after, [np.nextafter(np.float32(10), np.float32(11))])
    assert float(table[1, 0]) * 1e4 == pytest.approx(values["new_gap_cells"])
    assert float(table[0, 1]) * 1e4 == pytest.approx(values["closed_gap_cells"])


def test_bad_input(monkeypatch):
    change = field()
    with pytest.raises(
        CHMv2Error, match=r"a threshold must be .* pass loss\(change, threshold=15\)"
    ):
        loss(change)
    with pytest.raises(CHMv2Error, match=r"pass gain\(change, threshold=15\)"):
        gain(xr.Dataset({"height_change": change}))
    for threshold in (0, np.nan):
        with pytest.raises(CHMv2Error, match="a threshold above 0 m"):
            loss(change, threshold=threshold)
    with pytest.raises(CHMv2Error, match="a threshold above 0 m, found threshold=-3"):
        gain(change, threshold=-3)
    for opening in (2, 0, 2.5):
        with pytest.raises(CHMv2Error, match="an odd side of the opening"):
            loss(change, threshold=5, opening=opening)
    with pytest.raises(CHMv2Error, match="0 <= min_area"):
        loss(change, threshold=5, min_area=-1)
    with pytest.raises(CHMv2Error, match=r"True where .* found float32 values; choose the cl"):
        loss(change, threshold=5, mask=change)
    with pytest.raises(CHMv2Error, match=r"a boolean DataArray as mask, .* found ndarray"):
        loss(change, threshold=5, mask=(change > 0).values)
    with pytest.raises(CHMv2Error, match="on the same grid"):
        loss(change, threshold=5, mask=(change > 0)[:-1])
    with pytest.raises(CHMv2Error, match=r"DataArray or a Dataset, found ndarray.*pass what"):
        loss(change.values, threshold=5)
    with pytest.raises(CHMv2Error, match=r"height_change or magnitude, found variables \['z'\]"):
        loss(xr.Dataset({"z": change}), threshold=5)
    with pytest.raises(CHMv2Error, match="on the grid and dates of the mask"):
        label_events(change < 0, change[1:])
    for classes in ((), (5, 2), (1, 1), (1, np.nan)):
        with pytest.raises(CHMv2Error, match="ascending numbers"):
            transition(change, change, classes)
    for labels in (["a"], ["a", "a"], ["a", "missing"]):
        with pytest.raises(CHMv2Error, match="2 different labels, none of them 'missing'"):
            transition(change, change, (5,), labels=labels)
    with pytest.raises(CHMv2Error, match="on the same grid"):
        transition(abs(heights()), abs(heights())[1:], (5,))
    monkeypatch.setitem(sys.modules, "geopandas", None)
    with pytest.raises(CHMv2Error, match=r'pip install "xchmv2\[zonal\]"'):
        label_events(change < 0, change, polygons=True)
