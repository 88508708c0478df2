import datetime
import errno
import json
import os
import re
import shutil
import threading

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import rasterio
import rioxarray  # noqa: F401  (registers .rio)
import xarray as xr
import zarr
from conftest import cube, no_compute
from reference import whole_tile_model
from store_run import Killed
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xchmv2
from xchmv2.errors import CHMv2Error, IncompleteStoreWarning, StoreError
from xchmv2.inference import tiles_forwarded
from xchmv2.predict import sinks as writing
from xchmv2.store import remove_store
from xchmv2.store.lock import WriterLock
from xchmv2.store.records import open_manifest
from xchmv2.store.storage import list_keys
from xchmv2.store.template import Encoding, resolve_encoding

# Private imports: writing is made to fail at a chosen step.

GRID = dict(tile=64, overlap=16, block=128)


@pytest.fixture(scope="module")
def model():
    return whole_tile_model()


def imagery(times=2, shape=(200, 300), **options):
    return cube(shape, times=times, **options).chunk(time=1, y=100, x=128)


def heights(model, source=None, **options):
    return (imagery() if source is None else source).chmv2.predict(model, **GRID | options)


def write(height, store, **options):
    return height.chmv2.to_zarr(store, progress=False, **options)


def forwards(action):
    before = tiles_forwarded()
    result = action()
    return tiles_forwarded() - before, result


def data_bytes(root, name="canopy_height"):
    files = (root / name / "c").rglob("*")
    return {str(f.relative_to(root)): f.read_bytes() for f in files if f.is_file()}


# Writing and reading


def test_round_trip_keeps_heights_coordinates_attrs_and_crs(model, tmp_path):
    source = imagery()
    source["green"][:, 20:90, 30:90].values  # noqa: B018  (reading does not change the input)
    holes = source.where(~((source.x > source.x[40]) & (source.y > source.y[60])), 0)
    height = heights(model, holes.astype("uint8"), nodata=0)
    done = write(height, tmp_path / "h.zarr")

    assert (done.regions, done.present, done.pixels) == (12, 0, 2 * 200 * 300)
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert np.isnan(found).any()
    assert found.dtype == np.float32
    assert found.attrs == height.attrs
    assert found.rio.crs.to_epsg() == found.odc.crs.to_epsg() == 32633
    assert found.odc.geobox == height.odc.geobox
    assert found.chunksizes["y"] == (128, 72)
    xr.testing.assert_identical(found.drop_encoding().compute(), height.drop_encoding().compute())


def test_forwards_each_tile_once_and_reads_no_pixels_when_nothing_is_missing(model, tmp_path):
    height = heights(model)
    direct, _ = forwards(height.compute)
    first, _ = forwards(lambda: write(height, tmp_path / "h.zarr"))
    again, done = forwards(lambda: write(height, tmp_path / "h.zarr"))
    assert first == direct
    assert again == 0
    assert (done.regions, done.present) == (0, 12)


def test_several_layers_are_computed_together(model, tmp_path):
    layers = heights(model, layers=("height", "bin_spread", "overlap_disagreement"))
    one, _ = forwards(heights(model).compute)
    all_three, _ = forwards(lambda: write(layers, tmp_path / "h.zarr"))
    assert all_three == one
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert set(found) == {"canopy_height", "bin_spread", "overlap_disagreement"}
    xr.testing.assert_equal(found.compute(), layers.compute())


@pytest.mark.parametrize("shards", [False, True])
def test_chunks_are_parts_of_a_block_and_shards_are_whole_ones(model, tmp_path, shards):
    source = cube((4200, 2100), times=None).chunk(y=2096, x=2096)
    height = source.red.astype("f4").rename("canopy_height").chmv2
    height.to_zarr(tmp_path / "h.zarr", shards=shards, progress=False)
    array = zarr.open_array(tmp_path / "h.zarr", path="canopy_height", mode="r")
    assert array.chunks == (699, 699) or array.chunks == (2096 // 4,) * 2
    assert 2096 % array.chunks[0] == 0
    assert array.shards == ((2096, 2096) if shards else None)
    np.testing.assert_array_equal(xchmv2.open_zarr(tmp_path / "h.zarr"), source.red)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h,
        lambda h: h.isel(time=0),
        lambda h: h.isel(time=0, drop=True).transpose("x", "y"),
        lambda h: h.isel(y=slice(30, None), x=slice(7, 250)),
        lambda h: h.rename(time="scenario").assign_coords(scenario=["b", "a"]),
        lambda h: h.drop_vars("time"),
        lambda h: h.compute(),
        lambda h: h.drop_vars("spatial_ref").drop_attrs(),
        lambda h: h.transpose("x", "time", "y"),
    ],
)
def test_any_heights_can_be_written(model, tmp_path, change):
    height = change(heights(model))
    before = height.copy()
    write(height, tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    np.testing.assert_array_equal(found.transpose(*height.dims), height)
    for name, coord in height.coords.items():
        assert (found[name].values == coord.values).all()
    xr.testing.assert_identical(height, before)
    plain = xr.open_zarr(tmp_path / "h.zarr").canopy_height
    np.testing.assert_array_equal(plain.transpose(*height.dims), height)


def test_text_and_flags_along_time_survive(model, tmp_path):
    source = imagery()
    source = source.assign_coords(
        item_ids=("time", np.array(["a", "b c"], object)),
        quality_flags=("time", np.array([0, 3], "uint8"), {"flag_masks": [1, 2]}),
        sun_elevation=("time", [30.5, np.nan], {"units": "degree"}),
    )
    write(heights(model, source), tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert list(found.item_ids.values) == ["a", "b c"]
    assert list(found.quality_flags.values) == [0, 3]
    assert found.quality_flags.attrs["flag_masks"] == [1, 2]
    assert found.sun_elevation.attrs["units"] == "degree"
    np.testing.assert_array_equal(found.sun_elevation, [30.5, np.nan])


# Metadata others read


def test_plain_xarray_finds_the_crs_as_a_coordinate(model, tmp_path):
    write(heights(model), tmp_path / "h.zarr")
    plain = xr.open_zarr(tmp_path / "h.zarr", consolidated=False)
    assert plain.canopy_height.rio.crs.to_epsg() == 32633
    assert plain.canopy_height.odc.crs.to_epsg() == 32633
    assert set(plain.data_vars) == {"canopy_height"}


def test_geozarr_attributes_tell_crs_and_grid(model, tmp_path):
    height = heights(model)
    write(height, tmp_path / "h.zarr")
    attrs = dict(zarr.open_group(tmp_path / "h.zarr", mode="r").attrs)
    assert attrs["proj:code"] == "EPSG:32633"
    assert attrs["spatial:dimensions"] == ["y", "x"]
    assert attrs["spatial:shape"] == [200, 300]
    assert attrs["spatial:transform"] == pytest.approx(list(height.odc.geobox.transform)[:6])
    assert attrs["spatial:bbox"] == pytest.approx(list(height.odc.geobox.boundingbox.bbox))


@pytest.mark.skipif(
    tuple(map(int, rasterio.__gdal_version__.split(".")[:2])) < (3, 11),
    reason="this GDAL does not know the codecs of Zarr v3",
)
def test_gdal_reads_pixels_and_crs(model, tmp_path):
    height = heights(model)
    write(height, tmp_path / "h.zarr")
    with rasterio.open(f'ZARR:"{tmp_path / "h.zarr"}":/canopy_height:1') as found:
        assert found.crs.to_epsg() == 32633
        assert found.transform.almost_equals(height.odc.geobox.transform, 1e-6)
        np.testing.assert_array_equal(found.read(1), height.isel(time=1))


# Encodings


@pytest.mark.parametrize(
    ("name", "error"),
    [("float32", 0), ("rounded", 1 / 16), ("int16_cm", 0.005), ("uint8_half_m", 0.25)],
)
def test_encodings_keep_what_they_promise(tmp_path, name, error):
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 96, (2, 150, 170)).astype("f4")
    values[:, 20:40] = np.nan
    values[0] = np.nan  # a date without any value
    height = cube((150, 170), times=2).red.astype("f4").copy(data=values).rename("canopy_height")
    write(height.chunk(time=1, y=64, x=64), tmp_path / "h.zarr", encoding=name)
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
    assert float(abs(found - values).max()) <= error + 1e-5


@pytest.mark.parametrize(
    ("name", "bad", "limits"),
    [("uint8_half_m", 127.5, "0 to 127 m"), ("uint8_half_m", -0.5, "0 to 127 m"),
     ("int16_cm", 400.0, "-327.67 to 327.67 m"), ("int16_cm", -327.68, "-327.67 to 327.67 m")],
)  # fmt: skip
def test_heights_outside_an_encoding_are_counted_and_refused(tmp_path, name, bad, limits):
    height = cube((100, 200)).red.astype("f4").rename("canopy_height") * 0 + 10
    height[3:5, 150] = bad
    lazy = height.chunk(y=100, x=100)
    with pytest.raises(StoreError, match="2 values outside " + limits) as caught:
        write(lazy, tmp_path / "h.zarr", encoding=name)
    assert "x 100:200" in str(caught.value)
    with pytest.warns(IncompleteStoreWarning, match="of 2 regions"):
        found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert np.isnan(found[:, 100:]).all()  # nothing cut off was written


def test_values_on_the_limits_are_kept():
    encode = Encoding("uint8", 255, scale=0.5)
    np.testing.assert_array_equal(encode(np.array([0, 127.2, -0.2, np.nan])), [0, 254, 0, 255])


def test_dates_and_whole_numbers_keep_their_meaning(tmp_path):
    base = cube((40, 50), times=1)
    days = np.full((1, 40, 50), np.datetime64("2019-05-01", "ns"))
    days[:, 3] = np.datetime64("NaT")
    dataset = xr.Dataset(
        {
            "canopy_height": base.red.astype("f4"),
            "acquisition_date": (base.red.dims, days),
            "count": base.green.astype("int32"),
            "tall": base.blue > 100,
        }
    )
    write(dataset, tmp_path / "h.zarr", encoding="int16_cm")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    np.testing.assert_array_equal(found.acquisition_date, days)
    np.testing.assert_array_equal(found["count"], dataset["count"])
    np.testing.assert_array_equal(found.tall, dataset.tall)


def test_unknown_encoding_and_dtype_are_refused(tmp_path):
    height = cube((40, 50)).red.astype("f4")
    with pytest.raises(StoreError, match="encoding='int8'"):
        write(height, tmp_path / "h.zarr", encoding="int8")
    with pytest.raises(StoreError, match="complex64"):
        resolve_encoding("float32", height.astype("complex64"))


# Resuming


def test_only_missing_regions_and_the_tiles_that_reach_into_them_are_computed(model, tmp_path):
    height = heights(model)
    write(height, tmp_path / "h.zarr")
    root = tmp_path / "h.zarr"
    before = data_bytes(root)
    (root / "xchmv2/checksums/c/1/0/1/0/0").unlink()
    (root / "canopy_height/c/1/0/1").unlink()

    needed, _ = forwards(height.isel(time=1, y=slice(0, 128), x=slice(128, 256)).compute)
    again, done = forwards(lambda: write(height, root))
    assert (done.regions, done.present) == (1, 11)
    assert again == needed
    assert data_bytes(root) == before


def test_regions_limit_what_is_written_now(model, tmp_path):
    height, root = heights(model), tmp_path / "h.zarr"
    assert write(height, root, regions={"time": 1}).regions == 6
    some = [{"time": slice(0, 1), "y": slice(0, 10)}, {"time": 0, "x": slice(299, 300)}]
    assert write(height, root, regions=some).regions == 4
    with pytest.warns(IncompleteStoreWarning, match="2 of 12 regions"):
        xchmv2.open_zarr(root)
    assert write(height, root).regions == 2
    xr.testing.assert_equal(xchmv2.open_zarr(root).compute(), height.compute())


@pytest.mark.parametrize(
    "regions", [{"band": 0}, "all", [0], {"time": 5}, {"y": slice(0, 10, 2)}, {"y": "a"}]
)
def test_regions_that_make_no_sense_are_refused(model, tmp_path, regions):
    with pytest.raises(StoreError, match="range"):
        write(heights(model), tmp_path / "h.zarr", regions=regions)


def test_a_store_begun_by_something_else_is_refused_with_the_fields(model, tmp_path):
    root = tmp_path / "h.zarr"
    source = imagery()
    write(heights(model), root)
    before = data_bytes(root)
    cases = {
        "overlap": heights(model, overlap=32),
        "value_range": heights(model, value_range=(0, 200)),
        "nodata": heights(model, nodata=3),
        "erode": heights(model, nodata=3, erode=2),
        "valid mask": heights(model, valid=source.red > 3),
        "bands": heights(model, bands=("blue", "green", "red")),
        "layers": heights(model, layers=("height", "bin_spread")),
        "block": heights(model, block=192),
        "resolution": heights(model, resolution=1.2),
        "dtype": heights(model, dtype="bfloat16"),
        "weights": heights(whole_tile_model()),
        "grid": heights(model, imagery(shape=(200, 301))),
    }
    for field, other in cases.items():
        with pytest.raises(StoreError, match=f"[ ;]{field} ") as caught:
            write(other, root)
        assert field in str(caught.value).split("found")[1]
    with pytest.raises(StoreError, match=r"encoding float32.*encoding int16_cm"):
        write(heights(model), root, encoding="int16_cm")
    assert data_bytes(root) == before


def test_other_imagery_under_the_same_date_is_refused(model, tmp_path):
    root = tmp_path / "h.zarr"
    source = imagery().assign_coords(item_ids=("time", np.array(["a", "b"], object)))
    write(heights(model, source), root)
    with pytest.raises(StoreError, match=r"2021-07-01.*imagery"):
        write(heights(model, source.assign(red=source.red ^ (source.time == source.time[1]))), root)
    renamed = source.assign_coords(item_ids=("time", np.array(["c", "b"], object)))
    with pytest.raises(StoreError, match=r"items a.*items c"):
        write(heights(model, renamed), root)


def test_chunks_and_names_of_the_imagery_do_not_matter(model, tmp_path):
    root = tmp_path / "h.zarr"
    source = imagery()
    write(heights(model, source), root)
    same = source.chunk(y=77, x=300).map_blocks(lambda d: d.copy())  # other names, other chunks
    assert write(heights(model, same), root).regions == 0
    assert write(heights(model, source.compute().chunk(time=1)), root).regions == 0


def test_a_changed_array_never_passes_for_the_prediction(model, tmp_path):
    root = tmp_path / "h.zarr"
    height = heights(model)
    write(height, root)
    with xr.set_options(keep_attrs=True):
        changed = [
            height * 2,
            height.where(height > 5),
            height.fillna(0),
            height.isel(y=slice(None)),
        ]
    for other in changed[:3]:
        with pytest.raises(StoreError, match="arrays computed in another way"):
            write(other.rename("canopy_height"), root)
    other = tmp_path / "twice.zarr"
    write(height * 2, other)
    assert write(heights(model) * 2, other).regions == 0  # the same computed again is known
    with pytest.raises(StoreError, match="arrays"):
        write(height * 3, other)


def test_resume_false_refuses_what_is_there(model, tmp_path):
    root = tmp_path / "h.zarr"
    write(heights(model), root, mode="w-")
    with pytest.raises(StoreError, match="mode='w-'"):
        write(heights(model), root, mode="w-")


def test_foreign_places_are_left_alone(model, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    for name in ("folder", "other.zarr"):
        with pytest.raises(StoreError, match="nothing there was changed"):
            write(heights(model), tmp_path / name)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["thesis.tex"]
    assert xr.open_zarr(tmp_path / "other.zarr", consolidated=False).a.values == [1.0]


def test_a_folder_of_our_name_that_is_not_ours_is_left_alone(model, tmp_path):
    precious = tmp_path / "src" / "xchmv2" / "lib" / "precious.py"
    precious.parent.mkdir(parents=True)
    precious.write_text("work")
    with pytest.raises(StoreError, match="nothing there was changed"):
        write(heights(model), tmp_path / "src")
    assert precious.read_text() == "work"


def test_another_layer_under_the_same_name_is_refused(model, tmp_path):
    layers = heights(model, layers=("height", "bin_spread"))
    write(layers[["canopy_height"]], tmp_path / "h.zarr", regions={"time": 0})
    with pytest.raises(StoreError, match="bin_spread"):
        write(layers.bin_spread.rename("canopy_height"), tmp_path / "h.zarr")
    assert write(layers.canopy_height, tmp_path / "h.zarr").regions == 6


def test_other_dims_for_the_dates_are_refused(model, tmp_path):
    height = heights(model)
    write(height, tmp_path / "h.zarr")
    for other in (height.isel(time=0), height.rename(time="date")):
        with pytest.raises(StoreError, match="begun"):
            write(other, tmp_path / "h.zarr")
    placeless = height.drop_vars("spatial_ref").drop_attrs()
    write(placeless, tmp_path / "g.zarr")
    with pytest.raises(StoreError, match="grid "):
        write(placeless.assign_coords(x=height.x + 1000), tmp_path / "g.zarr")


def test_leftovers_of_a_killed_write_are_removed(model, tmp_path):
    root = tmp_path / "h.zarr"
    height = heights(model)
    write(height, root, regions={"time": 0})
    torn = root / "canopy_height" / "c" / "1" / "0" / "0.abc.partial"
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"half a chunk")
    write(height, root)
    assert not list(root.rglob("*.partial"))
    assert not (root / "xchmv2" / "lock.json").exists()


# Dates


def later(source, days):
    return source.assign_coords(time=source.time + np.timedelta64(days, "D"))


def test_new_dates_between_old_ones_are_put_in_order_and_only_they_are_computed(model, tmp_path):
    root = tmp_path / "h.zarr"
    facts = {"sun_elevation": ("time", [50.0, 40.0, 60.0])}
    old = imagery(times=3).assign_coords(facts)
    new = later(imagery(times=2, seed=5), 100)
    both = xr.concat([old.drop_vars("sun_elevation"), new], "time").sortby("time").chunk(time=1)
    write(heights(model, old), root)
    each, _ = forwards(heights(model, new).compute)

    more, done = forwards(lambda: write(heights(model, both), root))
    assert (done.regions, done.present) == (12, 18)
    assert more == each
    found = xchmv2.open_zarr(root)
    assert (found.time.values == both.time.values).all()
    xr.testing.assert_equal(
        found.drop_vars("sun_elevation").compute(), heights(model, both).compute()
    )
    np.testing.assert_array_equal(found.sun_elevation, [50, np.nan, 40, np.nan, 60])

    earlier = later(imagery(times=1, seed=6), -900)  # the new dates alone, before all others
    assert write(heights(model, earlier), root).present == 0
    found = xchmv2.open_zarr(root)
    assert found.sizes["time"] == 6
    np.testing.assert_array_equal(found[0], heights(model, earlier)[0])
    np.testing.assert_array_equal(found[1:], heights(model, both))
    assert "time" not in found.spatial_ref.dims


def test_unsorted_dates_are_stored_in_order(model, tmp_path):
    source = imagery(times=3).isel(time=[2, 0, 1])
    write(heights(model, source), tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    xr.testing.assert_equal(found.compute(), heights(model, source).sortby("time").compute())


def test_dates_that_share_a_chunk_are_written_one_by_one(model, tmp_path):
    source = imagery(times=3).chunk(time=2)
    root = tmp_path / "h.zarr"
    write(heights(model, source), root, regions={"time": 0})
    write(heights(model, source), root)
    xr.testing.assert_equal(xchmv2.open_zarr(root).compute(), heights(model, source).compute())


def test_a_date_that_comes_twice_is_refused(model, tmp_path):
    source = imagery(times=2)
    twice = source.assign_coords(time=source.time.values[[0, 0]])
    with pytest.raises(StoreError, match=r"2020-07-01.* 2 times"):
        write(heights(model, twice), tmp_path / "h.zarr")
    lost = source.assign_coords(time=np.array(["2020-01-01", "NaT"], "M8[ns]"))
    with pytest.raises(StoreError, match="NaT"):
        write(heights(model, lost), tmp_path / "h.zarr")


def test_a_day_whose_first_item_changed_is_not_stored_twice(model, tmp_path):
    root = tmp_path / "h.zarr"
    source = imagery(times=1).assign_coords(item_ids=("time", np.array(["a"], object)))
    write(heights(model, source), root)
    grown = source.assign_coords(
        time=source.time - np.timedelta64(5, "m"), item_ids=("time", np.array(["a;b"], object))
    )
    with pytest.raises(StoreError, match=r"item 'a' at .*, which is in the store at"):
        write(heights(model, grown), root)


def test_a_date_with_unreadable_files_is_tried_again(model, tmp_path):
    root = tmp_path / "h.zarr"
    whole = imagery().assign_coords(
        item_ids=("time", np.array(["a", "b"], object)), unreadable_assets=("time", [0, 0])
    )
    holes = whole.where(whole.time == whole.time[0], 0).astype("uint8")
    holes = holes.assign_coords(unreadable_assets=("time", [0, 1]))
    write(heights(model, holes, nodata=0), root)
    assert write(heights(model, holes, nodata=0), root).regions == 0
    assert np.isnan(xchmv2.open_zarr(root)[1]).all()
    assert write(heights(model, whole, nodata=0), root).regions == 6
    found = xchmv2.open_zarr(root)
    np.testing.assert_array_equal(found, heights(model, whole, nodata=0))
    assert list(found.unreadable_assets.values) == [0, 0]
    assert write(heights(model, whole, nodata=0), root).regions == 0
    with pytest.raises(StoreError, match="imagery"):
        write(
            heights(model, holes.assign_coords(unreadable_assets=("time", [0, 0])), nodata=0), root
        )


def test_coordinates_that_only_some_dates_have(model, tmp_path):
    root = tmp_path / "h.zarr"
    new = later(imagery(times=1, seed=5), 100)
    flown = np.array(["2020-10-09T10:00"], "M8[ns]")
    write(heights(model), root)
    write(heights(model, new.assign_coords(flown=("time", flown), wind=("time", [3.5]))), root)
    found = xchmv2.open_zarr(root)
    assert np.isnat(found.flown.values[[0, 2]]).all()
    assert found.flown.values[1] == flown[0]
    np.testing.assert_array_equal(found.wind, [np.nan, 3.5, np.nan])
    flagged = later(imagery(times=1, seed=6), 200).assign_coords(flags=("time", [1]))
    with pytest.raises(StoreError, match="'flags' must be on both old and new dates"):
        write(heights(model, flagged), root)


class Dying(WrapperStore):
    """A store that fails at its n-th write below a prefix, as if the process had died there."""

    def __init__(self, store, writes=0, prefix=""):
        super().__init__(store)
        self.left, self.prefix = writes, prefix

    async def set(self, key, value):
        if key.startswith(self.prefix) and not key.endswith("lock.json"):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await super().set(key, value)


def test_death_at_any_write_of_a_start_or_an_extension_is_survived(model, monkeypatch):
    monkeypatch.setattr("xchmv2.store.lock._CONFIRM", 0.0)
    old, new = imagery(times=2, shape=(100, 130)), later(imagery(1, (100, 130), seed=5), 100)
    both = xr.concat([old, new], "time").sortby("time").chunk(time=1)
    first, then = heights(model, old), heights(model, both)
    whole = MemoryStore()
    write(first, whole)
    write(then, whole)
    expected = then.compute()
    xr.testing.assert_equal(xchmv2.open_zarr(whole).compute(), expected)

    deaths = 0
    for writes in range(0, 500, 2):
        store = MemoryStore()
        try:
            write(first, dying := Dying(store, writes))
            write(then, dying)
        except (StoreError, OSError):
            deaths += 1
        else:
            break
        write(first, store)  # the call that died, or the one before it, again
        write(then, store)
        xr.testing.assert_equal(xchmv2.open_zarr(store).compute(), expected)
    assert deaths > 15
    assert writes == 2 * deaths


# Removal


@pytest.mark.parametrize("place", [MemoryStore, LocalStore])
def test_a_killed_removal_never_leaves_what_passes_for_whole(tmp_path, monkeypatch, place):
    monkeypatch.setattr("xchmv2.store.lock._CONFIRM", 0.0)
    height = cube((20, 90), times=2).red.chunk(time=1, y=20, x=50).astype("float32")
    height = height.rename("canopy_height")
    outcomes = set()
    for operations in range(200):
        store = MemoryStore() if place is MemoryStore else LocalStore(tmp_path / f"{operations}")
        write(height, store)
        try:
            remove_store(Killed(store, operations))
        except StoreError:
            outcomes.add(state_after_kill(height, store))
        else:
            break
        remove_store(store)
        assert list_keys(store, "") == []
        assert write(height, store).present == 0
        xr.testing.assert_equal(xchmv2.open_zarr(store).compute(), height)
    assert operations > 20
    assert outcomes == {"whole", "half removed"}
    with pytest.raises(StoreError, match="there is no store at"):
        xchmv2.open_zarr(store)


def state_after_kill(height, store):
    """Hold what a killed removal left against the promise: whole, or refused."""
    if zarr.open_group(store, path="xchmv2", mode="r").attrs["state"] != "ready":
        with pytest.raises(StoreError, match="half removed"):
            xchmv2.open_zarr(store)
        with pytest.raises(StoreError, match=r"half removed.*remove_store\(.*--overwrite"):
            write(height, store)
        return "half removed"
    xr.testing.assert_equal(xchmv2.open_zarr(store).compute(), height)
    assert write(height, store).regions == 0
    return "whole"


def test_removal_leaves_no_folder_and_takes_no_foreign_one(model, tmp_path):
    write(heights(model), tmp_path / "h.zarr")
    remove_store(tmp_path / "h.zarr")
    assert not (tmp_path / "h.zarr").exists()
    remove_store(tmp_path / "h.zarr")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="nothing there was changed"):
        remove_store(tmp_path / "folder")
    assert (tmp_path / "folder" / "thesis.tex").exists()


# One graph or several


@pytest.mark.parametrize("most", [1, 7, 2048])
def test_bands_of_rows_hand_their_border_groups_on(model, tmp_path, monkeypatch, most):
    height = heights(model, imagery(1, (500, 300)))
    once, _ = forwards(height.compute)
    monkeypatch.setattr(writing, "_MOST_BLOCKS_HERE", most)
    banded, _ = forwards(lambda: write(height, tmp_path / "h.zarr"))
    assert banded == once
    np.testing.assert_array_equal(xchmv2.open_zarr(tmp_path / "h.zarr"), height)


def test_compute_false_writes_the_template_and_returns_what_fills_it(model, tmp_path):
    height, root = heights(model), tmp_path / "h.zarr"
    later = write(height, root, compute=False)
    with pytest.warns(IncompleteStoreWarning, match="12 of 12"):
        xchmv2.open_zarr(root)
    assert dask.compute(later) == (2 * 200 * 300,)
    xr.testing.assert_equal(xchmv2.open_zarr(root).compute(), height.compute())


def test_nothing_but_a_sample_is_computed_before_writing(model, tmp_path):
    read = []

    def spy(block):
        read.append(block.shape)
        return block

    source = imagery(1, (1000, 1000)).chunk(y=50, x=50)
    spied = xr.map_blocks(
        lambda d: d.map(lambda v: v.copy(data=spy(v.values))), source, template=source
    )
    write(heights(model, spied), tmp_path / "h.zarr", compute=False)
    assert 0 < len(read) <= 3 * 9 * 4 * 2


def test_progress_tells_regions_and_speed(model, tmp_path, capsys):
    heights(model).chmv2.to_zarr(tmp_path / "h.zarr", progress=True)
    told = capsys.readouterr().err
    assert "12/12" in told
    assert "Mpx/s" in told
    write(heights(model), tmp_path / "g.zarr")
    assert capsys.readouterr().err == ""


# Failures


def test_a_full_disk_names_the_region_and_resuming_completes(model):
    height, store = heights(model), MemoryStore()
    with pytest.raises(StoreError, match="No space left on device") as caught:
        write(height, Dying(store, 6, "canopy_height/c/"))
    assert "canopy_height, 20" in str(caught.value)
    assert "y 0:128" in str(caught.value) or "y 128:200" in str(caught.value)
    there = len(open_manifest(store).done())
    assert 0 < there < 12
    assert write(height, store).present == there
    xr.testing.assert_equal(xchmv2.open_zarr(store).compute(), height.compute())


@pytest.mark.parametrize("writes", [0, 1, 5, 12])
def test_a_full_disk_at_the_start_is_told_and_the_same_call_completes(model, writes):
    height, store = heights(model), MemoryStore()
    with pytest.raises(StoreError, match=r"to write to .*No space left.* the same call again"):
        write(height, Dying(store, writes))
    assert write(height, store).regions == 12


def test_a_zip_file_is_made_of_a_complete_store(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    height = heights(model)
    with pytest.raises(StoreError, match="can be replaced, found a ZipStore") as caught:
        write(height, zarr.storage.ZipStore("a.zip", mode="w"))
    calls = re.findall(r"[\w.]+\((?:[^()]|\([^()]*\))*\)", caught.value.fix)
    assert len(calls) == 2
    for call in calls:
        eval(call, {"height": height, "shutil": shutil})
    packed = xchmv2.open_zarr(zarr.storage.ZipStore("canopy.zip", mode="r"))
    xr.testing.assert_equal(packed.compute(), height.compute())


def test_times_with_a_zone_are_written_in_utc_as_the_message_says(model, tmp_path):
    local = pd.to_datetime(["2020-07-01 23:30", "2021-07-01 23:30"]).tz_localize("America/Lima")
    height = heights(model, imagery().assign_coords(time=local))
    with pytest.raises(CHMv2Error, match=r"without a time zone, found datetime64\[\w+, America/"):
        write(height, tmp_path / "h.zarr")
    with pytest.raises(CHMv2Error, match="without a time zone") as caught:
        height.compute().chmv2.trend(min_obs=2)
    fixed = eval(caught.value.fix.partition(": ")[2], {"height": height})
    write(fixed, tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert str(found.time.values[0])[:16] == "2020-07-02T04:30"
    np.testing.assert_array_equal(found, height)


def test_labels_of_several_levels(model, tmp_path):
    levels = dict(year=("time", [2020, 2021]), month=("time", [7, 7]))
    source = imagery().drop_vars("time").assign_coords(levels).set_index(time=["year", "month"])
    height = heights(model, source)
    with pytest.raises(StoreError, match=r"one label for each time, found the levels") as caught:
        write(height, tmp_path / "h.zarr")
    write(eval(caught.value.fix.partition(": ")[2], {"height": height}), tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert found.year.values.tolist() == [2020, 2021]
    np.testing.assert_array_equal(found, height)


def test_coordinates_of_objects_are_left_out_with_one_warning(model, tmp_path):
    objects = np.empty(2, object)
    objects[:] = [{"a": 1}, {2, 3}]
    one = np.empty((), object)
    one[()] = {"proj:code": "EPSG:32633"}
    coords = dict(properties=("time", objects), item=one, name=("time", ["a", None]))
    height = heights(model, imagery().assign_coords(coords))
    with pytest.warns(UserWarning, match=r"\['item', 'properties'\] hold objects") as told:
        write(height, tmp_path / "h.zarr")
    assert len(told) == 1
    assert told[0].filename == __file__
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert {"item", "properties"}.isdisjoint(found.coords)
    assert "name" in found.coords
    np.testing.assert_array_equal(found, height)


def test_attributes_that_json_does_not_know(model, tmp_path):
    height = heights(model)
    height.attrs |= {"when": np.datetime64("2020-07-01"), "days": [datetime.date(2020, 7, 1)]}
    height.attrs |= {"nested": {"gsd": np.float32(0.5)}, "sizes": np.array([1, 2])}
    height["time"].attrs["made"] = datetime.datetime(2020, 7, 1, 12)
    height["x"].attrs["tags"] = {"a"}
    with pytest.raises(StoreError, match="numbers, text and dates, found 'tags' as") as caught:
        write(height, tmp_path / "h.zarr")
    eval(caught.value.fix.rpartition(": ")[2], {"height": height})
    write(height, tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert found.attrs["when"] == "2020-07-01"
    assert found.attrs["days"] == ["2020-07-01"]
    assert found.attrs["nested"] == {"gsd": 0.5}
    assert found.time.attrs["made"] == "2020-07-01T12:00:00"
    assert height.attrs["when"] == np.datetime64("2020-07-01")
    assert write(height, tmp_path / "h.zarr").regions == 0


def test_chunks_of_unknown_size(model, tmp_path):
    height = heights(model, imagery(1)).isel(time=0, drop=True)
    height = height.drop_vars(["x", "y", "spatial_ref"])
    data = height.data[height.data[:, 0] > -99]
    unknown = xr.DataArray(data, dims=("y", "x"), name="canopy_height")
    with pytest.raises(StoreError, match="of known size, found dask chunks of unknown") as caught:
        write(unknown, tmp_path / "h.zarr")
    eval(caught.value.fix, {"height": unknown})
    write(unknown, tmp_path / "h.zarr")
    np.testing.assert_array_equal(xchmv2.open_zarr(tmp_path / "h.zarr"), height)


def test_an_unreadable_source_leaves_what_is_written(model, tmp_path):
    source = imagery(1, (800, 300))
    broken = source.assign(
        red=source.red.copy(data=source.red.data.map_blocks(_fail_low, dtype="u1"))
    )
    root = tmp_path / "h.zarr"
    with pytest.raises(StoreError, match=r"y 128:256, x 0:128 at .*\(OSError: tile 7 is gone\)"):
        write(heights(model, broken), root)
    with pytest.raises(StoreError, match=r"imagery|digest"):
        write(heights(model, source.assign(red=255 - source.red)), root)


def _fail_low(block, block_info=None):
    if block_info and block_info[0]["chunk-location"][1] == 2:
        raise OSError("tile 7 is gone")
    return block


def test_a_second_writer_is_refused_while_the_first_lives(model, tmp_path):
    root = tmp_path / "h.zarr"
    store = LocalStore(root)
    with (
        WriterLock(store),
        pytest.raises(StoreError, match=f"process {os.getpid()} on .* is writing"),
    ):
        write(heights(model), root)
    assert write(heights(model), root).regions == 12


def test_two_threads_that_write_at_once_leave_one_whole_store(model, tmp_path):
    height, root, errors = heights(model), tmp_path / "h.zarr", []

    def run():
        try:
            write(height, root)
        except StoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) < 4
    assert [str(error) for error in errors if "is writing to" not in str(error)] == []
    xr.testing.assert_equal(xchmv2.open_zarr(root).compute(), height.compute())


@pytest.mark.parametrize(
    ("holder", "refused"),
    [
        ({"pid": 2**22 - 1}, False),  # no such process
        ({"started": "1"}, False),  # the number was used anew
        ({"host": "elsewhere"}, True),
    ],
)
def test_a_lock_is_taken_over_from_the_dead_alone(model, tmp_path, holder, refused):
    store = LocalStore(tmp_path / "h.zarr")
    with WriterLock(store) as lock:
        content = json.loads(lock._content())
    (store.root / "xchmv2").mkdir(parents=True)
    (store.root / "xchmv2" / "lock.json").write_text(json.dumps({**content, **holder}))
    if refused:
        with pytest.raises(StoreError, match="elsewhere"):
            write(heights(model), store)
    else:
        assert write(heights(model), store).regions == 12


@pytest.mark.parametrize("taken", [True, False])
def test_a_lost_lock_stops_the_run(tmp_path, monkeypatch, taken):
    monkeypatch.setattr("xchmv2.store.lock._RENEW", 0.01)
    store, file = LocalStore(tmp_path), tmp_path / "xchmv2" / "lock.json"
    with WriterLock(store) as lock:
        lock.validate()
        file.write_text(json.dumps({"token": "another"})) if taken else file.unlink()
        lock._renewer.join(5)
        with pytest.raises(StoreError, match="another process took over writing"):
            lock.validate()
    assert file.exists() == taken  # it is the other's


def test_a_lock_that_could_not_be_removed_does_not_lock_this_process_out(model, tmp_path):
    store = LocalStore(tmp_path / "h.zarr")
    with WriterLock(store):
        content = (store.root / "xchmv2" / "lock.json").read_text()
    (store.root / "xchmv2").mkdir(parents=True)
    (store.root / "xchmv2" / "lock.json").write_text(content)
    assert write(heights(model), store).regions == 12


def test_disks_without_hard_links(model, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="must support hard links"):
        write(heights(model), tmp_path / "h.zarr")


# Places


def test_stores_of_zarr_fsspec_obstore_and_icechunk(model, tmp_path):
    obstore = pytest.importorskip("obstore")
    icechunk = pytest.importorskip("icechunk")
    height = heights(model)
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    session = repo.writable_session("main")
    (tmp_path / "obstore").mkdir()
    places = [
        MemoryStore(),
        LocalStore(tmp_path / "local.zarr"),
        str(tmp_path / "path.zarr"),
        (tmp_path / "url.zarr").as_uri(),
        obstore.store.LocalStore(tmp_path / "obstore"),
        session,
    ]
    expected = height.compute()
    for place in places:
        assert write(height, place, regions={"time": 0}).regions == 6
        assert write(height, place).present == 6
        xr.testing.assert_equal(xchmv2.open_zarr(place).compute(), expected)
    session.commit("heights")
    later = repo.writable_session("main")
    assert write(height, later).regions == 0
    with pytest.raises(StoreError, match="read-only"):
        write(height, session)


def test_places_that_cannot_be_are_refused(model, tmp_path):
    with pytest.raises(StoreError, match="a path, a URL"):
        write(heights(model), 7)
    with pytest.raises(StoreError, match="file system that is installed"):
        write(heights(model), "nosuch://bucket/h.zarr")
    with pytest.raises(StoreError, match="there is no store at"):
        xchmv2.open_zarr(tmp_path / "none.zarr")
    assert not (tmp_path / "none.zarr").exists()


def test_memory_of_this_process_is_refused_where_others_compute(model):
    height = heights(model).compute()
    for store in (MemoryStore(), WrapperStore(MemoryStore()), "memory://heights.zarr"):
        with (
            dask.config.set(scheduler="processes"),
            pytest.raises(StoreError, match="in this process's memory"),
        ):
            write(height, store)


@pytest.mark.parametrize(
    "dates",
    [
        [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)],
        [datetime.datetime(2020, 1, d, tzinfo=datetime.UTC) for d in (1, 2)],
        [True, False],
    ],
)
def test_dates_that_cannot_be_stored_are_refused_before_anything_is_written(model, tmp_path, dates):
    height = heights(model).assign_coords(time=np.asarray(dates))
    with pytest.raises(StoreError, match="dates without time zone, numbers or text"):
        write(height, tmp_path / "h.zarr")
    assert not (tmp_path / "h.zarr").exists()


def test_part_of_the_variables_or_coordinates_in_memory(model, tmp_path):
    layers = heights(model, layers=("height", "bin_spread"))
    mixed = layers.assign(bin_spread=layers.bin_spread.compute())
    mixed = mixed.assign_coords(slope=(("y", "x"), da.ones((200, 300), chunks=33)))
    write(mixed, tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    xr.testing.assert_equal(found.compute(), mixed.compute())
    clash = mixed.assign_coords(when=(("time", "y"), np.ones((2, 200))))
    with pytest.raises(StoreError, match="coordinates along time alone"):
        write(clash, tmp_path / "g.zarr")


def test_too_many_dims_and_mixed_variables_are_refused(model, tmp_path):
    height = heights(model)
    with pytest.raises(StoreError, match="at most one dim beside"):
        write(height.expand_dims(member=2), tmp_path / "h.zarr")
    with pytest.raises(StoreError, match="all alike"):
        write(height.to_dataset().assign(slope=height.isel(time=0)), tmp_path / "h.zarr")
    with pytest.raises(StoreError, match="at least one"):
        write(height.isel(time=slice(0)), tmp_path / "h.zarr")


# In other people's hands


def test_plain_xarray_writes_the_lazy_result(model, tmp_path):
    height = heights(model)
    height.to_zarr(tmp_path / "plain.zarr", zarr_format=3, consolidated=False)
    found = xr.open_zarr(tmp_path / "plain.zarr", consolidated=False)
    np.testing.assert_array_equal(found.canopy_height, height)
    assert found.canopy_height.rio.crs.to_epsg() == 32633


def test_a_window_a_month_a_function_and_a_raster_of_the_lazy_result(model, tmp_path):
    height = heights(model)
    whole = height.compute()
    with no_compute():
        window = height.isel(y=slice(10, 50), x=slice(100, 180))
        mean = height.groupby("time.year").mean()
        halved = xr.map_blocks(_halve, height, template=height)
    xr.testing.assert_equal(window.compute(), whole.isel(y=slice(10, 50), x=slice(100, 180)))
    np.testing.assert_allclose(mean.compute(), whole.groupby("time.year").mean(), rtol=1e-6)
    np.testing.assert_array_equal(halved.compute(), whole / 2)
    kept = height.persist()
    assert isinstance(kept.data, da.Array)
    xr.testing.assert_identical(kept.compute(), whole)
    write(kept, tmp_path / "kept.zarr")
    np.testing.assert_array_equal(xchmv2.open_zarr(tmp_path / "kept.zarr"), whole)
    height.isel(time=0).rio.to_raster(tmp_path / "h.tif")
    with rasterio.open(tmp_path / "h.tif") as raster:
        np.testing.assert_array_equal(raster.read(1), whole[0])
        assert raster.crs.to_epsg() == 32633


def _halve(array):
    return array / 2
