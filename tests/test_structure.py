"""Canopy structure, against plain loops and published values."""

import json

import numpy as np
import pandas as pd
import pytest
import rioxarray
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import xchmv2
from xchmv2 import structure
from xchmv2.errors import CHMv2Error

CELL_FUNCTIONS = {
    "canopy_cover": lambda h, cell=30.0, **more: structure.canopy_cover(h, cell=cell, **more),
    "gap_fraction": lambda h, cell=30.0, **more: structure.gap_fraction(h, cell=cell, **more),
    "rumple": structure.rumple,
    "canopy_volume": structure.canopy_volume,
    "height_percentile": lambda h, cell=30.0, **more: structure.percentile(h, 95, cell, **more),
}


def forest(shape=(60, 70), *, pixel=1.0, crs=32633, top=5_300_017.0, left=400_011.0, seed=0):
    rng = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(rng.normal(0, 1, shape), (0,) * (len(shape) - 2) + (2, 2))
    values = np.abs(values / values.std() * 10).astype("float32")
    values[rng.random(shape) < 0.05] = np.nan
    coords = {
        "y": top - pixel * (np.arange(shape[-2]) + 0.5),
        "x": left + pixel * (np.arange(shape[-1]) + 0.5),
    }
    dims = ("time", "y", "x")[-len(shape) :]
    if len(shape) == 3:
        coords["time"] = pd.date_range("2020", periods=shape[0], freq="YS")
    attrs = {"standard_name": "canopy_height", "units": "m", "chmv2_model": "some"}
    array = xr.DataArray(values, coords, dims, "canopy_height", attrs)
    return array if crs is None else array.odc.assign_crs(crs)


def naive_cells(array, cell):
    """Yield each cell of a plane: its centre, and its pixels; straight from the words."""
    ys, xs = (np.floor(np.round(array[dim].values / cell, 9)).astype(int) for dim in "yx")
    for i in pd.unique(ys):
        for j in pd.unique(xs):
            yield (i + 0.5) * cell, (j + 0.5) * cell, array.values[np.ix_(ys == i, xs == j)]


def jenness(values):
    """Surface ratio by triangles' side lengths (Heron), pixel by pixel of 1 m."""
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    found = np.full(values.shape, np.nan)
    for i in range(1, values.shape[0] - 1):
        for j in range(1, values.shape[1] - 1):
            points = [(y, x, float(values[i + y, j + x])) for y, x in ring]
            centre = np.array([0, 0, float(values[i, j])])
            total = 0.0
            for one, other in zip(points, points[1:] + points[:1], strict=True):
                one, other = np.array(one), np.array(other)
                a, b, c = (
                    np.linalg.norm(v) / 2 for v in (one - centre, other - centre, one - other)
                )
                s = (a + b + c) / 2
                total += np.sqrt(max(s * (s - a) * (s - b) * (s - c), 0))
            found[i, j] = total
    return found


def naive(name, array, cell, *, full, threshold=None):
    """Compute one statistic of all cells by a loop; NaN where under half of ``full`` is valid."""
    if name == "rumple":
        array = array.copy(data=jenness(array.values))
    rows = {}
    for y, x, pixels in naive_cells(array, cell):
        valid = pixels[~np.isnan(pixels)].astype(float)
        if len(valid) < full / 2:
            rows[y, x] = np.nan
            continue
        rows[y, x] = {
            "canopy_cover": lambda v: np.mean(v >= 5),
            "gap_fraction": lambda v: np.mean(v <= 10),
            "rumple": np.mean,
            "canopy_volume": np.sum,
            "height_percentile": lambda v: np.percentile(v, 95),
        }[name](valid)
    return rows


@pytest.mark.parametrize("name", CELL_FUNCTIONS)
@pytest.mark.parametrize("upwards", [False, True])
def test_statistics_equal_a_plain_loop(name, upwards):
    height = forest((47, 52), crs=None)
    height = height[::-1, ::-1] if upwards else height
    found = CELL_FUNCTIONS[name](height, 10.0)
    expected = naive(name, height, 10.0, full=100)
    assert found.sizes == {"y": 5, "x": 6}
    ours = {(float(y), float(x)): found.sel(y=y, x=x).item() for y in found.y for x in found.x}
    assert set(ours) == set(expected)
    np.testing.assert_allclose(
        [ours[place] for place in expected], list(expected.values()), rtol=2e-6
    )
    assert np.isnan(list(expected.values())).any()
    assert (np.diff(found.y) > 0).all() == upwards


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    chunks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cell=st.sampled_from([1.0, 3.0, 7.3, 12.0, 100.0]),
    name=st.sampled_from(sorted(CELL_FUNCTIONS)),
    seed=st.integers(0, 1000),
)
def test_chunks_play_no_part(shape, chunks, cell, name, seed):
    height = forest(shape, seed=seed)
    whole = CELL_FUNCTIONS[name](height, cell, min_valid=0.2)
    with no_compute():
        lazy = CELL_FUNCTIONS[name](
            height.chunk(dict(zip("yx", chunks, strict=True))), cell, min_valid=0.2
        )
    # Sums of areas that are interpolated chunk by chunk may differ in the last digit.
    xr.testing.assert_allclose(lazy.compute(), whole, rtol=1e-6)
    assert lazy.attrs == whole.attrs


@settings(max_examples=25)
@given(
    window=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    pixel=st.sampled_from([0.5, 0.6, 1.0, 1.3]),
    crs=st.sampled_from([32633, None]),
    turned=st.booleans(),
)
def test_any_area_of_interest_has_the_same_cells(window, pixel, crs, turned):
    height = forest((150, 150), pixel=pixel, crs=crs, top=5e6 + pixel * 3, left=4e5 - pixel * 7)
    part = height.isel(y=slice(window[0], window[0] + 80), x=slice(window[1], None))
    part = part[::-1] if turned else part
    whole = structure.percentile(height, 50, 10.0, min_valid=1.0 if pixel in (0.5, 1.0) else 0.4)
    small = structure.percentile(part, 50, 10.0, min_valid=0)
    inside = small.isel(y=slice(1, -1), x=slice(1, -1))
    same = whole.reindex(y=inside.y, x=inside.x, method="nearest", tolerance=1e-6)
    there = same.notnull()
    np.testing.assert_array_equal(inside.where(there), same)


def test_pixels_on_an_edge_belong_to_the_cell_above():
    height = xr.DataArray(np.arange(6.0)[:, None] * np.ones(6), dims=("y", "x"))
    height = height.assign_coords(y=np.arange(6.0), x=np.arange(6.0))  # centres on 0, 1, ...
    for array in (height, height[::-1]):
        found = structure.percentile(array, 0, 3.0).sortby("y")
        np.testing.assert_array_equal(found[:, 0], [0, 3])
        np.testing.assert_array_equal(found.y, [1.5, 4.5])


def test_dates_and_dims_stay():
    height = forest((3, 40, 50)).transpose("y", "time", "x")
    for name, function in CELL_FUNCTIONS.items():
        found = function(height, 10.0)
        lazy = function(height.chunk({"time": 2, "y": 13, "x": 17}), 10.0)
        assert found.dims == lazy.dims == ("y", "time", "x")
        assert found.name == name
        xr.testing.assert_allclose(lazy.compute(), found)
        alone = function(height.isel(time=1), 10.0)
        xr.testing.assert_allclose(found.isel(time=1), alone)


@pytest.mark.parametrize("name", CELL_FUNCTIONS)
def test_whole_raster(name):
    height = forest((3, 40, 50))
    found = CELL_FUNCTIONS[name](height, None)
    lazy = CELL_FUNCTIONS[name](height.chunk({"y": 13, "x": 17}), None)
    assert found.dims == ("time",)
    xr.testing.assert_allclose(lazy.compute(), found)
    plane = height[0].values.astype(float)
    plane = jenness(plane) if name == "rumple" else plane
    values = plane[~np.isnan(plane)]
    area = 1 / 0.9996**2  # near the zone's meridian, to 2e-4
    expected = {
        "canopy_cover": np.mean(values >= 5),
        "gap_fraction": np.mean(values <= 10),
        "rumple": values.mean(),
        "canopy_volume": values.sum() * area,
        "height_percentile": np.percentile(values, 95),
    }[name]
    assert float(found[0]) == pytest.approx(expected, rel=5e-4)
    mostly_missing = height.where(height.x < height.x[10])
    assert CELL_FUNCTIONS[name](mostly_missing, None).isnull().all()


@pytest.mark.parametrize("name", CELL_FUNCTIONS)
def test_cells_of_chunks_that_they_do_not_fit_are_stored(name, tmp_path):
    """Zarr wants uniform chunks; pixels of each chunk are still made once."""
    made = []

    def note(block, block_info=None):
        made.append(block_info[None]["chunk-location"])
        return block

    height = forest((2, 90, 80)).chunk(time=1, y=25, x=33)
    noted = height.copy(data=height.data.map_blocks(note, dtype="f4", meta=np.empty((0, 0, 0))))
    found = CELL_FUNCTIONS[name](noted, 7.0)
    expected = CELL_FUNCTIONS[name](height.compute(), 7.0)
    found.to_zarr(tmp_path / "plain.zarr", consolidated=False)
    assert sorted(made) == sorted(set(made))
    assert len(made) == 2 * 4 * 3
    found.chmv2.to_zarr(tmp_path / "own.zarr", progress=False)
    plain = xr.open_zarr(tmp_path / "plain.zarr", consolidated=False)
    for stored in (plain, xchmv2.open_zarr(tmp_path / "own.zarr")):
        np.testing.assert_allclose(stored[name].compute(), expected, rtol=1e-5)


@pytest.mark.parametrize("chunks", [(1,) * 60, (60,), (7,) * 8 + (4,), (59, 1)])
def test_cells_lie_in_chunks_of_about_the_size_of_the_pixels(chunks):
    found = structure.canopy_cover(forest((60, 70)).chunk(y=chunks, x=35), cell=6.0)
    rows = found.chunks[0]
    assert len(set(rows[:-1])) <= 1
    assert rows[-1] <= rows[0]
    assert rows[0] == max(1, round(max(chunks) * len(found.y) / 60))


def test_nothing_but_missing():
    height = forest() * np.nan
    for function in CELL_FUNCTIONS.values():
        for cell in (10.0, None):
            assert function(height, cell, min_valid=0).isnull().all()
            assert function(height.chunk({"y": 9}), cell, min_valid=0).isnull().all()


@pytest.mark.parametrize("name", CELL_FUNCTIONS)
def test_whole_metres_and_datasets(name):
    height = forest().fillna(0).round()
    expected = CELL_FUNCTIONS[name](height, 7.0)
    found = CELL_FUNCTIONS[name](height.astype("uint8"), 7.0)
    np.testing.assert_array_equal(found, expected)
    layers = xr.Dataset({"canopy_height": height, "bin_spread": height / 3})
    xr.testing.assert_identical(CELL_FUNCTIONS[name](layers, 7.0), expected)
    assert len(structure.gaps(layers, 3.0)[1]) == len(structure.gaps(height, 3.0)[1])
    with pytest.raises(CHMv2Error, match="canopy_height"):
        CELL_FUNCTIONS[name](layers.rename(canopy_height="a"))


def test_labels_and_crs():
    height = forest()
    before = height.copy(deep=True)
    for name, function in CELL_FUNCTIONS.items():
        found = function(height)
        assert found.name == name
        assert set(found.attrs) == {"long_name", "units", "grid_mapping"}
        assert found.odc.crs.epsg == 32633
        assert found.odc.geobox.resolution.xy == (30.0, -30.0)
        box = found.odc.geobox.boundingbox
        assert all(edge % 30 == 0 for edge in box.bbox)
        geotransform = found[found.attrs["grid_mapping"]].attrs["GeoTransform"].split()
        assert [float(word) for word in geotransform] == [box.left, 30, 0, box.top, 0, -30]
    xr.testing.assert_identical(height, before)


def test_flat_and_tilted_surfaces():
    y, x = np.mgrid[:30, :40].astype(float)
    flat = xr.DataArray(np.full(y.shape, 7.0), dims=("y", "x"))
    np.testing.assert_allclose(structure.rumple(flat, 10.0, min_valid=0.1), 1)
    tilted = xr.DataArray(0.5 * x + 2 * y, dims=("y", "x"))
    np.testing.assert_allclose(
        structure.rumple(tilted, 10.0), np.sqrt(1 + 0.5**2 + 2**2), rtol=1e-6
    )


@pytest.mark.parametrize("crs", [3857, 4326])
def test_cells_are_metres_on_the_ground(crs):
    shape, pixel = (300, 300), {3857: 1.0, 4326: 5e-6}[crs]
    top, left = {3857: (8_399_738.0, 1e6), 4326: (60.0, 12.0)}[crs]  # 60 degrees north
    height = forest(shape, pixel=pixel, crs=crs, top=top, left=left) * 0 + 10
    volume = structure.canopy_volume(height, 30.0, min_valid=0.9)
    full = volume.where(volume.notnull(), drop=True)
    assert full.size
    valid = 0.95  # the share that is not missing
    np.testing.assert_allclose(full, 30 * 30 * 10 * valid, rtol=0.05)
    lengths = abs(volume.odc.geobox.resolution.x), abs(volume.odc.geobox.resolution.y)
    degree = 111_412.0
    metres = {
        3857: (lengths[0] / 2, lengths[1] / 2),
        4326: (lengths[0] * degree / 2, lengths[1] * degree),
    }[crs]
    np.testing.assert_allclose(metres, 30, rtol=0.01)


def test_several_percentiles():
    found = structure.percentile(forest(), [25, 50, 98], 20.0)
    assert found.dims == ("percentile", "y", "x")
    np.testing.assert_array_equal(found.percentile, [25, 50, 98])
    one = structure.percentile(forest(), 50, 20.0)
    assert float(one.percentile) == 50
    assert one.attrs["long_name"] == "50th percentile of canopy height"
    np.testing.assert_array_equal(one, found.sel(percentile=50))


def test_forest_is_high_dense_and_large():
    values = np.zeros((300, 300), "float32")
    values[:90, :90] = np.where(np.arange(90) % 5 == 0, 9, 1)  # 20 % cover, 0.81 ha
    values[:90, 210:] = np.where(np.arange(90) % 10 == 0, 9, 1)  # 10 %: not more
    values[210:270, 210:270] = 9  # 0.36 ha
    values[210:, :90] = 5  # not higher
    height = xr.DataArray(values, {"y": np.arange(300.0), "x": np.arange(300.0)}, ("y", "x"))
    expected = np.zeros((10, 10), bool)
    expected[:3, :3] = True
    with no_compute():
        lazy = structure.forest_mask(height.chunk({"y": 70, "x": 110}))
    for found in (structure.forest_mask(height), lazy):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == bool
        assert found.name == "forest"
    assert structure.forest_mask(height, min_area=3600).sum() == 9
    assert structure.forest_mask(height, min_area=3599).sum() == 13
    assert not structure.forest_mask(height.where(height.x > 1e9)).any()


def test_gaps_of_the_ducke_forest(data):
    folder = data / "chm_gaps_ducke"
    height = rioxarray.open_rasterio(folder / "ALS_CHM_DUC.tif", masked=True).squeeze(drop=True)
    published = pd.read_csv(folder / "published_gap_stats_threshold10_size5-1000.csv")
    for array in (height, height.chunk({"y": 33, "x": 51})):
        labels, table = structure.gaps(array, min_area=5, max_area=1000)
        assert list(table) == ["gap", "area", "max", "min", "mean", "sd", "range"]
        assert len(table) == len(published) == 35
        pairs = {"gap": "gap_id", "area": "gap_area_m2"}
        pairs |= {name: f"chm_{name}" for name in ("max", "min", "mean", "sd", "range")}
        for ours, theirs in pairs.items():
            # Two decimals are published.
            np.testing.assert_allclose(table[ours], published[theirs], atol=0.005 + 1e-6)
        assert int((labels > 0).sum()) == published["gap_area_m2"].sum()
    assert labels.name == "gap"


def test_published_shares_and_percentiles(data):
    values = json.loads((data / "reference_values.json").read_text())
    for path, expected in values["chm_stats"].items():
        height = rioxarray.open_rasterio(data / path, masked=True).squeeze(drop=True)
        cover = [float(structure.canopy_cover(height, t, None)) for t in (2, 5)]
        found = [float(structure.percentile(height, q, None)) for q in (50, 95, 100)]
        volume = structure.canopy_volume(xr.DataArray(height.values, dims=("y", "x")), None)
        np.testing.assert_allclose(
            cover, [expected["frac_ge_2m"], expected["frac_ge_5m"]], atol=1e-5
        )
        np.testing.assert_allclose(
            found, [expected[n] for n in ("median", "p95", "max")], atol=1e-4
        )
        assert float(volume) == pytest.approx(expected["mean"] * expected["n"], rel=1e-5)
    for year, when in ((2012, "t0"), (2014, "t1")):
        path = data / "chm_change_cauaxi_window" / f"CAU_CHM_{year}_nw100.tif"
        height = rioxarray.open_rasterio(path, masked=True).squeeze(drop=True)
        labels, table = structure.gaps(height)
        assert len(table) == values["cauaxi_nw100"][f"n_gaps_8conn_{when}"]
        assert int((labels > 0).sum()) == values["cauaxi_nw100"][f"gap_cells_le10_{when}"]
        share = float(structure.gap_fraction(height, cell=None)) * height.size
        assert share == pytest.approx(values["cauaxi_nw100"][f"gap_cells_le10_{when}"], rel=1e-5)


def test_gaps_of_dates_and_missing_pixels():
    height = forest((2, 30, 35)).chunk({"y": 11, "x": 13})
    labels, table = structure.gaps(height, 4.0, connectivity=4)
    assert list(table)[:2] == ["time", "gap"]
    for time in height.time.values:
        plane = height.sel(time=time).values
        expected, count = ndimage.label(plane <= 4)
        np.testing.assert_array_equal(labels.sel(time=time), expected)
        rows = table[table["time"] == time]
        assert list(rows["gap"]) == list(range(1, count + 1))
        heights = [plane[expected == k].astype(float) for k in rows["gap"]]
        np.testing.assert_allclose(rows["mean"], [h.mean() for h in heights])
        np.testing.assert_allclose(rows["range"], [np.ptp(h) for h in heights])
    assert labels.attrs["grid_mapping"] == "spatial_ref"
    assert "standard_name" not in labels.attrs


def test_bad_input():
    height = forest()
    with pytest.raises(CHMv2Error, match=r"at least as large as a pixel, found cell=0\.5"):
        structure.canopy_cover(height, cell=0.5)
    coarse = forest(pixel=100.0)
    with pytest.raises(CHMv2Error, match=r"such as cell=\d+$") as raised:
        structure.canopy_cover(coarse)
    structure.canopy_cover(coarse, cell=float(raised.value.fix.partition("cell=")[2]))
    with pytest.raises(CHMv2Error, match="for example cell=30"):
        structure.rumple(height, cell=float("nan"))
    for function in CELL_FUNCTIONS.values():
        with pytest.raises(CHMv2Error, match=r"from 0 to 1, found min_valid=1\.5"):
            function(height, min_valid=1.5)
    for q in (-1, 101, [50, float("nan")], []):
        with pytest.raises(CHMv2Error, match="q as one or more numbers from 0 to 100"):
            structure.percentile(height, q)
    with pytest.raises(CHMv2Error, match="min_area <= max_area"):
        structure.gaps(height, min_area=9, max_area=1)
    with pytest.raises(CHMv2Error, match="a min_area of at least 0 m2"):
        structure.forest_mask(height, min_area=-1)
    with pytest.raises(CHMv2Error, match="two spatial dims"):
        structure.canopy_cover(height.rename(y="row", x="col").drop_vars("spatial_ref"))


@pytest.mark.parametrize("where", ["attrs", "encoding"])
@pytest.mark.parametrize("chunks", [None, {"y": 13, "x": 70}])
def test_declared_nodata_are_missing(where, chunks):
    """A raster that was opened without masking holds its nodata value as if it were a height."""
    known = forest().round()
    raster = known.fillna(-9999).astype("int16").chunk(chunks or {})
    raster = raster if chunks else raster.compute()
    getattr(raster, where)["_FillValue"] = -9999
    for name, function in CELL_FUNCTIONS.items():
        xr.testing.assert_allclose(function(raster).compute(), function(known))
        assert function(raster).name == name
    xr.testing.assert_equal(structure.forest_mask(raster).compute(), structure.forest_mask(known))
    labels, table = structure.gaps(raster, 5)
    expected, known_table = structure.gaps(known, 5)
    xr.testing.assert_equal(labels.compute(), expected)
    pd.testing.assert_frame_equal(table, known_table)
