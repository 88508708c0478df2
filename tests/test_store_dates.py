"""The dates of a store: each keeps its slot, whatever comes later, is killed or wakes up late."""

import shutil

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import cube
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import whole_tile_model
from store_run import Killed, copy_store, read_whole
from webserver import serve
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore, MemoryStore

import xchmv2
from xchmv2.change import difference, loss_area
from xchmv2.errors import IncompleteStoreWarning, StoreError
from xchmv2.store.lock import WriterLock
from xchmv2.store.records import open_manifest
from xchmv2.store.storage import list_keys, read_object

# Private imports: writing is made to fail at a chosen step.

SHAPE = (60, 70)
#: Days of the dates of the first call, and of those that are added: before, between, after.
OLD, NEW = (0, 365), (-500, 100, 2000)


@pytest.fixture(scope="module")
def model():
    return whole_tile_model()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("xchmv2.store.lock._CONFIRM", 0.0)


def imagery(*days, **coords):
    """Imagery of each day, other pixels on each."""
    each = [cube(SHAPE, times=1, seed=day + 1000) for day in days]
    each = [
        scene.assign_coords(time=scene.time + np.timedelta64(day, "D"))
        for day, scene in zip(days, each, strict=True)
    ]
    found = xr.concat(each, "time").chunk(time=1)
    return found.assign_coords({name: ("time", value) for name, value in coords.items()})


def heights(model, *days, **coords):
    return imagery(*days, **coords).chmv2.predict(model, tile=64, overlap=16, block=64)


def write(height, store, **options):
    return height.chmv2.to_zarr(store, progress=False, **options)


# Order


def test_dates_are_appended_and_open_zarr_sorts_them_lazily(model, tmp_path):
    root = tmp_path / "h.zarr"
    write(heights(model, *OLD, sun=[50.0, 40.0]), root)
    write(heights(model, *NEW), root)
    write(heights(model, 50, sun=[30.0]), root)
    days = (*OLD, *NEW, 50)
    plain = xr.open_zarr(root).canopy_height
    np.testing.assert_array_equal(plain.time, imagery(*days).time)
    np.testing.assert_array_equal(plain, heights(model, *days))

    found = xchmv2.open_zarr(root)
    assert found.chunksizes == {"time": (1,) * 6, "y": (60,), "x": (64, 6)}
    assert found.name == "canopy_height"
    assert found.data.name == xchmv2.open_zarr(root).data.name
    xr.testing.assert_equal(found.drop_vars("sun").compute(), heights(model, *sorted(days)))
    np.testing.assert_array_equal(found.sun, [np.nan, 50, 30, np.nan, 40, np.nan])
    xr.testing.assert_identical(plain.sortby("time").compute().time, found.time)


def test_text_labels_stay_in_the_order_of_arrival(model, tmp_path):
    source = imagery(*OLD).rename(time="scenario")
    for names in (["dense", "clear"], ["burnt", "thinned"]):
        named = source.assign_coords(scenario=names)
        write(named.chmv2.predict(model, tile=64, overlap=16, block=64), tmp_path / "h.zarr")
    found = xchmv2.open_zarr(tmp_path / "h.zarr")
    assert list(found.scenario.values) == ["dense", "clear", "burnt", "thinned"]


@settings(max_examples=8)
@given(st.permutations((0, 30, 365, -400)), st.lists(st.integers(1, 4), max_size=3))
def test_whatever_the_order_of_arrival_every_date_has_its_heights(model, days, cuts):
    store = MemoryStore()
    expected = heights(model, *sorted(days)).compute()
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 4], strict=True):
        if days[first:last]:
            write(heights(model, *days[first:last]), store)
    xr.testing.assert_equal(read_whole(store), expected)
    assert write(heights(model, *days), store).regions == 0
    xr.testing.assert_equal(read_whole(store), expected)


@pytest.mark.parametrize("place", ["obstore", "icechunk", "url", "shards"])
def test_dates_are_appended_wherever_the_store_lies(model, tmp_path, place):
    days, store = sorted((*OLD, *NEW)), (tmp_path / "h.zarr").as_uri()
    if place == "obstore":
        store = pytest.importorskip("obstore").store.LocalStore(tmp_path)
    if place == "icechunk":
        icechunk = pytest.importorskip("icechunk")
        repo = icechunk.Repository.create(icechunk.in_memory_storage())
        store = repo.writable_session("main")
    write(heights(model, *OLD, sun=[1.0, 2.0]), store, shards=place == "shards")
    write(heights(model, *NEW, wind=[3.0, 4.0, 5.0]), store)
    found = xchmv2.open_zarr(store)
    np.testing.assert_array_equal(found, heights(model, *days))
    np.testing.assert_array_equal(found.wind, [3, np.nan, 4, np.nan, 5])
    assert write(heights(model, *days), store).regions == 0


# Kills


@pytest.mark.parametrize(
    ("added", "place"),
    [
        (NEW, MemoryStore),
        pytest.param(NEW, LocalStore, marks=pytest.mark.slow),
        *(pytest.param((day,), MemoryStore, marks=pytest.mark.slow) for day in NEW),
    ],
)
def test_a_kill_at_any_operation_of_an_extension_shows_no_wrong_heights(
    model, tmp_path, added, place
):
    base = MemoryStore()
    write(heights(model, *OLD, sun=[50.0, 40.0]), base)
    former = read_whole(base)
    then = heights(model, *OLD, *added, wind=np.arange(2.0 + len(added)))
    undisturbed = copy_store(base)
    write(then, undisturbed)
    expected = read_whole(undisturbed)
    shown = set()
    for operations in range(200):
        store = copy_store(base)
        if place is LocalStore:
            store = copy_store(store, LocalStore(tmp_path / f"{operations}"))
        # Who opened the store before reads on, with the metadata that he has.
        opened = [xchmv2.open_zarr(store), xr.open_zarr(store).canopy_height]
        try:
            write(then, Killed(store, operations))
        except (StoreError, OSError):
            killed = True
        else:
            killed = False
        for reader in opened:
            np.testing.assert_array_equal(reader, former)
        found = read_whole(store)
        shown.add(found.sizes["time"])
        for time in found.time.values:
            pixels, right = found.sel(time=time).values, expected.sel(time=time).values
            assert (np.isnan(pixels) | (pixels == right)).all()
            assert time not in former.time.values or (pixels == right).all()
        assert {*former.time.values} <= {*found.time.values}
        write(then, store)
        xr.testing.assert_identical(read_whole(store), expected)
        if not killed:
            break
    assert operations > 15
    assert shown == {2, 2 + len(added)}


def test_coordinates_of_a_killed_extension_do_not_come_back(model):
    store = MemoryStore()
    write(heights(model, *OLD, lost=[0, 0]), store)
    for operations in range(200):
        there = copy_store(store)
        try:
            write(heights(model, *OLD, 900, lost=[0, 0, 3]), Killed(there, operations))
        except (StoreError, OSError):
            if len(open_manifest(there).dates) == 3:
                break
            write(heights(model, *OLD, 900, lost=[0, 0, 0]), there)
            assert list(xchmv2.open_zarr(there).lost.values) == [0, 0, 0]
    assert operations > 5


# Late writers


def test_what_was_planned_before_dates_were_added_writes_into_its_own_slots(model):
    store, first = MemoryStore(), heights(model, *OLD)
    waiting = write(first, store, compute=False)
    write(heights(model, *NEW), store)
    dask.compute(waiting)
    xr.testing.assert_equal(read_whole(store), heights(model, *sorted((*OLD, *NEW))).compute())
    dask.compute(waiting)  # once more, as a worker that was given up may
    xr.testing.assert_equal(read_whole(store), heights(model, *sorted((*OLD, *NEW))).compute())


def test_what_was_planned_for_a_date_that_is_written_anew_is_refused(model):
    store = MemoryStore()
    whole = imagery(*OLD, item_ids=np.array(["a", "b"], object), unreadable_assets=[0, 0])
    holes = whole.where(whole.time == whole.time[0], 0).astype("uint8")
    holes = holes.assign_coords(unreadable_assets=("time", [0, 1]))
    options = dict(tile=64, overlap=16, block=64, nodata=0)
    waiting = write(holes.chmv2.predict(model, **options), store, compute=False)
    write(whole.chmv2.predict(model, **options), store)
    with pytest.raises(StoreError, match=r"is writing 2021-07-01.* anew .*; call .*to_zarr"):
        dask.compute(waiting)
    xr.testing.assert_equal(
        xchmv2.open_zarr(store).compute(), whole.chmv2.predict(model, **options).compute()
    )
    dates = open_manifest(store).dates
    assert [date["slot"] for date in dates.values()] == [0, 1]
    assert [date["record"] for date in dates.values()] == [0, 2]


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_writer_that_lost_its_lock_changes_no_dates(model, monkeypatch, moment):
    store = MemoryStore()
    write(heights(model, *OLD), store)
    validate, calls = WriterLock.validate, []

    def suspended(lock):
        calls.append(lock)
        if len(calls) == moment:  # it wakes up after another took over and has finished
            with monkeypatch.context() as other:
                other.setattr(WriterLock, "validate", validate)
                store._store_dict.pop("xchmv2/lock.json")
                write(heights(model, *NEW), store)
        validate(lock)

    monkeypatch.setattr(WriterLock, "validate", suspended)
    with pytest.raises(StoreError, match="took over writing"):
        write(heights(model, *OLD, 50), store)
    assert len(calls) == moment
    monkeypatch.setattr(WriterLock, "validate", validate)
    assert len(open_manifest(store).dates) in (5, 6)
    write(heights(model, *OLD, *NEW, 50), store)
    days = sorted((*OLD, *NEW, 50))
    xr.testing.assert_equal(read_whole(store), heights(model, *days).compute())


# Times


def test_times_of_any_day_and_hour_follow_the_first(model, tmp_path):
    root = tmp_path / "h.zarr"
    write(heights(model, *OLD), root)  # at midnight: xarray alone would store whole days
    exact = np.array(["1999-12-31T23:59:59.123456", "2031-01-01T10:41:07.5"], "M8[ns]")
    write(heights(model, *NEW[:2]).assign_coords(time=exact), root)
    units = zarr.open_array(root, path="time", mode="r").attrs["units"]
    assert units == "microseconds since 1970-01-01"
    assert {*exact} <= {*xchmv2.open_zarr(root).time.values.astype("M8[ns]")}


def test_a_time_that_the_store_cannot_hold_exactly_is_refused(model, tmp_path):
    root = tmp_path / "h.zarr"
    write(heights(model, *OLD), root)
    before = {key: read_object(LocalStore(root), key) for key in list_keys(LocalStore(root), "")}
    height = heights(model, 50)
    height = height.assign_coords(time=height.time + np.timedelta64(7, "ns"))
    with pytest.raises(StoreError, match=r"time as datetime64\[us\], .*00007.*round it: ") as told:
        write(height, root)
    after = {key: read_object(LocalStore(root), key) for key in list_keys(LocalStore(root), "")}
    assert after == before
    rounded = eval(str(told.value).split("round it: ")[1], {"height": height})
    write(rounded, root)
    np.testing.assert_array_equal(xchmv2.open_zarr(root)[1], height[0])
    fine = tmp_path / "fine.zarr"
    write(height, fine)  # begun with it, a store holds nanoseconds
    write(heights(model, *OLD), fine)
    assert height.time.values[0] in xchmv2.open_zarr(fine).time.values.astype("M8[ns]")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (np.array([1, 2], "uint8"), [300]),
        (np.array([1, 2]), [1.5]),
        (np.array([1, 2]), [np.nan]),
        (np.array([1, 2]), ["one"]),
        (np.array([True, False]), [2]),
        (np.array([1.0, 2.0]), np.array(["2020-01-01"], "M8[ns]")),
    ],
)
def test_coordinates_that_the_store_cannot_hold_are_refused(model, old, new):
    store = MemoryStore()
    write(heights(model, *OLD, flags=old), store)
    with pytest.raises(StoreError, match=f"flags as {old.dtype}.*to another store"):
        write(heights(model, 50, flags=new), store)
    write(heights(model, 50, flags=old[:1]), store)
    np.testing.assert_array_equal(xchmv2.open_zarr(store).flags, [old[0], old[0], old[1]])


def test_every_kind_of_coordinate_is_appended_to(model):
    store = MemoryStore()
    kinds = {
        "text": np.array(["a", "bc"]),
        "empty": np.array(["", ""], object),
        "flown": np.array(["2020-05-01T10:00", "NaT"], "M8[s]"),
        "took": np.array([5, 7], "m8[s]"),
        "sun": np.array([30.1, np.nan], "float32"),
        "count": np.array([0, 0], "uint8"),
        "snow": np.array([True, False]),
    }
    write(heights(model, *OLD, **kinds), store)
    opened = xr.open_zarr(store)
    write(heights(model, 900, 901, **{name: value[::-1] for name, value in kinds.items()}), store)
    found = xchmv2.open_zarr(store)
    for name, value in kinds.items():
        both = np.concatenate([value, value[::-1]])
        assert xr.Variable("time", both).equals(xr.Variable("time", found[name].values)), name
        assert xr.Variable("time", value).equals(xr.Variable("time", opened[name].values)), name
        assert found[name].dtype.kind == value.dtype.kind or value.dtype.kind in "UO", name


def test_more_dates_than_a_chunk_of_their_coordinates_holds(model, monkeypatch):
    monkeypatch.setattr("xchmv2.store.template._DATES", 2)
    store = MemoryStore()
    write(heights(model, *OLD, 50, sun=[1.0, 2.0, 3.0]), store)
    write(heights(model, 900, -900, sun=[4.0, 5.0]), store)
    found = xchmv2.open_zarr(store)
    np.testing.assert_array_equal(found.sun, [5, 1, 3, 2, 4])
    np.testing.assert_array_equal(found, heights(model, -900, 0, 50, 365, 900))


# What is opened chains


def test_coordinates_in_memory_chain(model, tmp_path):
    facts = {"quality_flags": [0, 3], "platform": np.array(["a", "b"], object)}
    write(heights(model, *OLD, **facts), tmp_path / "h.zarr")
    write(heights(model, 50, quality_flags=[0], platform=["a"]), tmp_path / "h.zarr")
    found, expected = xchmv2.open_zarr(tmp_path / "h.zarr"), heights(model, 0, 50, 365).compute()
    assert all(coord.chunks is None for coord in found.coords.values())
    good = found.where(found.quality_flags == 0, drop=True)
    np.testing.assert_array_equal(good, expected[:2])
    np.testing.assert_array_equal(found.groupby("platform").mean()[0], expected[:2].mean("time"))
    doubled = xr.map_blocks(lambda h: h * 2, found, template=found)
    np.testing.assert_array_equal(doubled, expected * 2)
    found.drop_attrs().to_netcdf(tmp_path / "h.nc")
    np.testing.assert_array_equal(xr.open_dataset(tmp_path / "h.nc").time, found.time)


def test_attributes_of_a_dataset_survive(model, tmp_path):
    height = heights(model, *OLD).compute()
    change = difference(height[0], height[1], sigma=2.0, correlation_length=5.0)
    change.attrs["comparison_warnings"] = ["resampled"]
    write(change, tmp_path / "change.zarr")
    found = xchmv2.open_zarr(tmp_path / "change.zarr")
    assert found.attrs == change.attrs
    assert {"before", "after", "confidence", "correlation_length"} <= found.attrs.keys()
    xr.testing.assert_allclose(loss_area(found).compute(), loss_area(change).compute())
    write(
        height.to_dataset().assign_attrs(found.attrs).assign(tall=height > 5), tmp_path / "2.zarr"
    )
    assert xchmv2.open_zarr(tmp_path / "2.zarr").attrs == change.attrs


def test_trees_and_groups_open_without_a_warning(model, tmp_path):
    root = tmp_path / "h.zarr"
    write(heights(model, *OLD), root)
    with pytest.warns(ZarrUserWarning):  # as xarray advises where nobody has done it
        zarr.consolidate_metadata(root)
    write(heights(model, *NEW), root)
    tree = xr.open_datatree(root, engine="zarr")
    np.testing.assert_array_equal(tree["canopy_height"].sortby("time"), xchmv2.open_zarr(root))
    assert {"/", "/xchmv2"} == {*xr.open_groups(root, engine="zarr")}
    record = xr.open_zarr(root, group="xchmv2").checksums
    assert record.dims == ("record", "block_y", "block_x", "object", "size_and_crc32c")
    assert (record > 0).all()
    shutil.rmtree(root / "xchmv2" / "checksums" / "c")  # plain readers do not need the record
    assert xr.open_zarr(root).sizes["time"] == 5


def test_a_store_opens_over_http_which_lists_nothing(model, tmp_path):
    pytest.importorskip("aiohttp")
    expected = heights(model, *OLD).compute()
    write(expected.chunk(time=1), tmp_path / "h.zarr")
    with serve(tmp_path) as url:
        xr.testing.assert_equal(xchmv2.open_zarr(f"{url}/h.zarr").compute(), expected)
        np.testing.assert_array_equal(xr.open_zarr(f"{url}/h.zarr").canopy_height, expected)
    (tmp_path / "h.zarr" / "xchmv2/checksums/c/1/0/0/0/0").unlink()
    with serve(tmp_path) as url, pytest.warns(IncompleteStoreWarning, match="1 of 2 regions"):
        xchmv2.open_zarr(f"{url}/h.zarr")
