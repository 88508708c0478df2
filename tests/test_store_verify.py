"""Checksums of a store: every damage is found, repaired, and never read as heights."""

import json
import os
import pickle
import re
import shutil
import warnings

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import cube
from reference import whole_tile_model
from store_run import copy_store
from test_store_resuming import ARCHIVE, predict
from zarr.storage import LocalStore, MemoryStore

import xchmv2
from xchmv2.errors import IncompleteStoreWarning, StoreError
from xchmv2.store.lock import WriterLock
from xchmv2.store.regions import WriteBlock, _Noting
from xchmv2.store.storage import delete_object, list_keys, read_object, write_object

# Private imports: objects of a store are damaged one by one; what is on the disk is watched.

SHAPE = (60, 130)


@pytest.fixture(scope="module")
def height():
    """Heights of two dates, with coordinates along the dates, x, and both y and x."""
    scene = cube(SHAPE, times=2).chunk(time=1)
    scene = scene.assign_coords(
        sun=("time", [50.0, 40.0]), slope=(("y", "x"), np.ones(SHAPE)), row=("y", np.arange(60))
    )
    return scene.chmv2.predict(whole_tile_model(), tile=64, overlap=16, block=64)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("xchmv2.store.lock._CONFIRM", 0.0)


def write(height, store, **options):
    return height.chmv2.to_zarr(store, progress=False, **options)


@pytest.fixture(scope="module")
def whole(height):
    store = MemoryStore()
    write(height, store)
    return store


def contents(store):
    return {key: read_object(store, key) for key in list_keys(store, "")}


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def damage(store, key, how):
    data = read_object(store, key)
    if how is None:
        delete_object(store, key)
    else:
        write_object(store, key, how(data))


def read_or_error(store):
    try:
        return xchmv2.open_zarr(store).compute()
    except (StoreError, IncompleteStoreWarning) as error:
        return error


@pytest.mark.parametrize("how", [None, cut, flipped, lambda data: b""])
def test_every_damaged_object_is_found_repaired_and_never_read(height, whole, how):
    expected, former = height.compute(), contents(whole)
    for key in former:
        store = copy_store(whole)
        damage(store, key, how)
        found = xchmv2.verify(store)
        assert not found.ok, key
        told = [str(problem) for problem in found.problems]
        region = "checksums/c/" in key or key.startswith("canopy_height/c/")
        assert key in told[0] or region, told
        read = read_or_error(store)
        if isinstance(read, StoreError):
            assert re.search(r"damaged.*verify\(", str(read)), key
        elif isinstance(read, IncompleteStoreWarning):
            assert "checksums/c/" in key
        else:
            xr.testing.assert_identical(read, expected)

        repaired = xchmv2.verify(store, repair=True)
        assert repaired.problems == found.problems
        written = write(height, store)
        assert written.regions == (1 if region else 0), key
        assert contents(store) == former, key
        assert xchmv2.verify(store).ok


def test_a_resumed_run_finds_what_is_damaged_by_itself(height, whole):
    store, former = copy_store(whole), contents(whole)
    damage(store, "canopy_height/c/1/0/2", flipped)
    damage(store, "canopy_height/c/0/0/0", None)
    damage(store, "time/c/0", None)
    damage(store, "slope/c/0/1", cut)
    assert write(height, copy_store(store), verify=False).regions == 0
    with pytest.warns(UserWarning, match="2 regions of .* are missing or damaged"):
        assert write(height, store).regions == 2
    assert contents(store) == former
    damage(store, "slope/c/0/1", cut)
    other = height.assign_coords(slope=height.slope + 1)
    with pytest.raises(StoreError, match=r"others, while slope/c/0/1 in .* is damaged"):
        write(other, store)


def test_what_cannot_be_restored_says_so(whole):
    store = copy_store(whole)
    damage(store, "xchmv2/zarr.json", cut)
    damage(store, "zarr.json", None)
    with pytest.raises(StoreError, match=r"xchmv2/zarr.json in .* is damaged; repair"):
        xchmv2.open_zarr(store)
    with pytest.raises(StoreError, match=r"no copy of it is left.*mode='w'"):
        xchmv2.verify(store, repair=True)
    with pytest.raises(StoreError, match="there is no store at"):
        xchmv2.verify(MemoryStore())


def test_a_chunk_of_which_a_single_byte_differs_is_an_error_wherever_it_is_computed(
    height, whole, tmp_path
):
    store = copy_store(whole, LocalStore(tmp_path / "h.zarr"))
    opened = xchmv2.open_zarr(store)
    assert opened.data.name == xchmv2.open_zarr(store).data.name
    damage(store, "canopy_height/c/1/0/2", flipped)
    opened = pickle.loads(pickle.dumps(opened))
    xr.testing.assert_identical(opened[0].compute(), height[0].compute())
    with pytest.raises(StoreError, match=r"canopy_height/c/1/0/2 in .* is damaged"):
        opened.compute()


def test_a_chunk_of_another_date_is_no_chunk_of_this_one(height, whole):
    store = copy_store(whole)
    write_object(store, "canopy_height/c/0/0/0", read_object(store, "canopy_height/c/1/0/0"))
    with pytest.raises(StoreError, match=r"canopy_height/c/0/0/0 in .* is damaged"):
        xchmv2.open_zarr(store).compute()


def test_shards_and_layers_have_checksums(height, tmp_path):
    several = height.to_dataset().assign(tall=height > 5)
    write(several, tmp_path / "h.zarr", shards=True)
    assert xchmv2.verify(tmp_path / "h.zarr").ok
    xr.testing.assert_equal(xchmv2.open_zarr(tmp_path / "h.zarr").compute(), several.compute())
    store = LocalStore(tmp_path / "h.zarr")
    damage(store, "tall/c/1/0/1", flipped)
    (problem,) = xchmv2.verify(store).problems
    assert (problem.kind, problem.key) == ("damaged", "tall/c/1/0/1")
    assert (problem.date[:10], problem.rows, problem.cols) == (
        "2021-07-01", slice(0, 60), slice(64, 128)
    )  # fmt: skip
    for how in (cut, None):
        with pytest.raises(StoreError, match=r"tall/c/1/0/1 in .* is damaged"):
            xchmv2.open_zarr(store).compute()
        damage(store, "tall/c/1/0/1", how)


def test_a_record_that_was_there_is_not_taken_for_a_missing_region(height, whole):
    store = copy_store(whole)
    opened = xchmv2.open_zarr(store)
    damage(store, "xchmv2/checksums/c/1/0/1/0/0", None)
    with pytest.raises(StoreError, match="open it again"):
        opened.compute()


def test_redo_marks_a_date_or_a_window_to_be_computed_again(height, whole):
    store, former = copy_store(whole), contents(whole)
    assert xchmv2.verify(store, redo="2021-07-01").ok
    with pytest.warns(IncompleteStoreWarning, match="3 of 6 regions"):
        xchmv2.open_zarr(store)
    assert write(height, store).regions == 3
    xchmv2.verify(store, redo={"time": "2020", "x": slice(100, 130)})
    assert write(height, store).regions == 2
    assert contents(store) == former
    with pytest.raises(StoreError, match=r"a date of the store, such as '2020-07-01'.*redo="):
        xchmv2.verify(store, redo="1999")
    with pytest.raises(StoreError, match="regions as index ranges along"):
        xchmv2.verify(store, redo={"z": 3})


def test_dates_of_the_first_format_are_compared_with_their_coordinate(tmp_path, monkeypatch):
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canopy.zarr/time/c/0").unlink()
    warnings.simplefilter("ignore", IncompleteStoreWarning)
    with pytest.raises(StoreError, match=r"time in .* is damaged"):
        xchmv2.open_zarr("canopy.zarr")


def test_regions_of_the_first_format_are_said_to_have_no_checksum(tmp_path, monkeypatch):
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    found = xchmv2.verify("canopy.zarr")
    assert found.without_checksum == 3
    assert {problem.kind for problem in found.problems} == {"not written"}
    write(predict(cube((96, 96), times=2)), "canopy.zarr")
    found = xchmv2.verify("canopy.zarr")
    assert found.ok
    assert (found.regions, found.without_checksum) == (8, 3)
    assert not os.path.exists("canopy.zarr/xchmv2/done")


# Overwriting


def test_mode_w_replaces_a_store_and_nothing_else(height, whole, tmp_path):
    root = tmp_path / "h.zarr"
    write(height[:1], root, encoding="int16_cm")
    with pytest.raises(StoreError, match=r"no store at .* since mode='w-'"):
        write(height, root, mode="w-")
    with pytest.raises(StoreError, match="computed in another way"):
        write(height, root)
    assert write(height, root, mode="w").regions == 6
    assert contents(LocalStore(root)) == contents(whole)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="nothing there was changed"):
        write(height, mine, mode="w")
    with pytest.raises(StoreError, match="mode as one of"):
        write(height, root, mode="r+")


def test_a_store_is_not_removed_for_heights_that_are_read_from_it(height, tmp_path):
    root = tmp_path / "h.zarr"
    write(height, root)
    for found in (xchmv2.open_zarr(root), xr.open_zarr(root).canopy_height):
        with pytest.raises(StoreError, match=r"from elsewhere.* first: height.load\(\)"):
            write(found * 2, root, mode="w")
    assert xchmv2.verify(root).ok
    doubled = (xchmv2.open_zarr(root) * 2).load()
    write(doubled, root, mode="w")
    np.testing.assert_array_equal(xchmv2.open_zarr(root), height * 2)


def test_imagery_that_cannot_be_read_removes_nothing(height, tmp_path):
    write(height, tmp_path / "h.zarr")

    def fail(block):
        raise OSError("tile 7 is gone")

    lost = cube(SHAPE, times=2).chunk(time=1)
    lost = lost.map(lambda band: band.copy(data=band.data.map_blocks(fail, dtype="u1")))
    again = lost.chmv2.predict(whole_tile_model(), tile=64, overlap=16, block=64)
    with pytest.raises(Exception, match="tile 7 is gone"):
        write(again, tmp_path / "h.zarr", mode="w")
    assert xchmv2.verify(tmp_path / "h.zarr").ok


def test_a_late_writer_of_a_store_that_was_overwritten_is_refused(height):
    store = MemoryStore()
    late = write(height, store, compute=False)
    write(height, store, mode="w", encoding="int16_cm")
    former = contents(store)
    with pytest.raises(StoreError, match="anew since this one was planned"):
        dask.compute(late)
    assert contents(store) == former


# What a file says


@pytest.mark.parametrize("name", ["../victim", "a/b", "xchmv2", ".."])
def test_names_that_are_paths_are_refused(height, tmp_path, name):
    with pytest.raises(StoreError, match="names that can be paths"):
        write(height.rename(name), tmp_path / "h.zarr")
    with pytest.raises(StoreError, match="names that can be paths"):
        write(height.rename(sun=name), tmp_path / "h.zarr")


def edited(store, change):
    """Change the attributes of a manifest and give it a checksum that fits."""
    from xchmv2.store.records import _checksum

    content = json.loads(read_object(store, "xchmv2/zarr.json"))
    change(content["attributes"])
    content["attributes"]["crc32c"] = _checksum(content["attributes"])
    write_object(store, "xchmv2/zarr.json", json.dumps(content).encode())
    root = json.loads(read_object(store, "zarr.json"))
    root["consolidated_metadata"]["metadata"]["xchmv2"] = content
    write_object(store, "zarr.json", json.dumps(root).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["fingerprint"].update(variables=["../victim"]),
        lambda a: a["fingerprint"].update(variables=[]),
        lambda a: a["fingerprint"].update(block=[0, 64]),
        lambda a: a["fingerprint"].pop("grid"),
        lambda a: a.pop("dates"),
        lambda a: a.update(dates=[1, 2]),
        lambda a: next(iter(a["dates"].values())).update(slot=7),
        lambda a: next(iter(a["dates"].values())).update(record="../../x"),
        lambda a: next(iter(a["dates"].values())).pop("record"),
        lambda a: a.update(copy="../../victim"),
        lambda a: a.update(parts=None),
        lambda a: a.update(format="2"),
    ],
)
def test_a_manifest_that_says_nonsense_is_refused(height, whole, tmp_path, change):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "zarr.json").write_text("mine")
    store = copy_store(whole, LocalStore(tmp_path / "h.zarr"))
    edited(store, change)
    for call in (xchmv2.open_zarr, xchmv2.verify, lambda store: write(height, store)):
        with pytest.raises(StoreError, match=r"xchmv2/zarr.json in .* is damaged"):
            call(store)
    write(height, store, mode="w")
    assert (victim / "zarr.json").read_text() == "mine"
    assert xchmv2.verify(store).ok


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "time/.DS_Store", "canopy_height/c/.DS_Store", "xchmv2/checksums/c/.DS_Store",
     "xchmv2/checksums/c/0/0/.nfs01", "xchmv2/checksums/c/0/0/0/0/0.abc.partial", "notes.txt"],
)  # fmt: skip
def test_stray_files_are_tolerated(height, whole, tmp_path, name):
    store = copy_store(whole, LocalStore(tmp_path / "h.zarr"))
    path = store.root / name
    path.write_bytes(b"x")
    xr.testing.assert_identical(xchmv2.open_zarr(store).compute(), height.compute())
    assert xchmv2.verify(store).ok
    assert write(height, store).regions == 0
    later = height.assign_coords(time=height.time + np.timedelta64(900, "D"))
    assert write(xr.concat([height, later], "time").chunk(time=1), MemoryStore()).regions == 12


def test_a_store_that_is_being_created_says_so(tmp_path):
    zarr.open_group(tmp_path / "h.zarr", path="xchmv2", attributes={"state": "creating"})
    with pytest.raises(StoreError, match="was begun, but its template is not complete"):
        xchmv2.open_zarr(tmp_path / "h.zarr")


def test_a_store_that_is_being_written_says_so(height, tmp_path):
    store = LocalStore(tmp_path / "h.zarr")
    write(height, store, regions={"time": 0})
    with pytest.warns(IncompleteStoreWarning, match=r"3 of 6 .*writes them$"):
        xchmv2.open_zarr(store)
    with WriterLock(store), pytest.warns(IncompleteStoreWarning, match="has a lock"):
        xchmv2.open_zarr(store)


# Disks


def test_pixels_are_on_the_disk_before_they_are_recorded(height, tmp_path, monkeypatch):
    events = []
    sync, record = os.fsync, WriteBlock.__call__
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    monkeypatch.setattr("xchmv2.store.regions.write_object", lambda *a: events.append("record"))
    with pytest.raises(StoreError, match="of them"), dask.config.set(scheduler="sync"):
        write(height, tmp_path / "h.zarr")
    assert events == ["sync", "sync", "record"] * 6
    events.clear()
    with pytest.raises(StoreError, match="of them"):
        write(height, tmp_path / "g.zarr", fsync=False)
    assert events == ["record"] * 6
    assert record is WriteBlock.__call__
    assert _Noting(MemoryStore(), True)._folder is None
