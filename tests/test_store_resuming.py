"""A store that an earlier version left half-written is resumed and extended by this one."""

import shutil
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import cube
from store_run import Killed, copy_store, read_whole
from zarr.storage import LocalStore

import xchmv2
from xchmv2.errors import StoreError
from xchmv2.inference import tiles_forwarded
from xchmv2.store import remove_store

#: Written by make_store_half_written.py, with the code before the package's modules moved, when
#: dates were moved in the store and had no slots.
ARCHIVE = Path(__file__).parent / "reference_data" / "store_half_written.zip"
#: Chunks that were written: of the first date, all but the lower left one.
WRITTEN = ("0/0/0", "0/0/1", "0/1/1")


def count_forwarded(action):
    before = tiles_forwarded()
    with dask.config.set(scheduler="sync"):
        action()
    return tiles_forwarded() - before


def predict(source):
    return source.chunk(time=1).chmv2.predict("checkpoint", tile=64, block=64, overlap=16)


@pytest.fixture
def height(tmp_path, monkeypatch):
    """The prediction that was being written, in the folder of its store and checkpoint."""
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return predict(cube((96, 96), times=2))


@pytest.fixture
def more(height):
    """The prediction with two dates more, at other times of day than xarray's units can tell."""
    old, new = cube((96, 96), times=2), cube((96, 96), times=2, seed=5)
    times = np.array(["2019-03-01T10:41:07.5", "2020-09-01T11:00"], "M8[ns]")
    return predict(xr.concat([old, new.assign_coords(time=times)], "time"))


def write(height, store="canopy.zarr"):
    return height.chmv2.to_zarr(store, progress=False)


def attributes(store="canopy.zarr"):
    return zarr.open_group(store, path="xchmv2", mode="r").attrs


def test_a_store_of_the_code_before_the_move_is_resumed(height):
    chunks = Path("canopy.zarr", "canopy_height", "c")
    before = {name: (chunks / name).stat().st_mtime_ns for name in WRITTEN}
    assert sum(path.is_file() for path in chunks.rglob("*")) == len(WRITTEN)
    missing = count_forwarded(height[0, 64:, :64].compute) + count_forwarded(height[1].compute)

    assert count_forwarded(lambda: write(height)) == missing
    assert missing < count_forwarded(height.compute)
    assert {name: (chunks / name).stat().st_mtime_ns for name in WRITTEN} == before
    xr.testing.assert_allclose(xchmv2.open_zarr("canopy.zarr").load(), height.compute(), atol=5e-4)
    assert not count_forwarded(lambda: write(height))
    assert attributes()["format"] == 2  # the code that began it refuses it now


def test_a_store_without_slots_is_extended(height, more):
    write(height)
    before = xchmv2.open_zarr("canopy.zarr")
    plain = xr.open_zarr("canopy.zarr", consolidated=False).canopy_height
    former = before.compute()
    assert write(more).present == 8
    assert attributes()["format"] == 2  # which earlier versions refuse
    found = read_whole("canopy.zarr")
    xr.testing.assert_equal(found.time, more.sortby("time").time)
    np.testing.assert_allclose(found, more.sortby("time"), atol=5e-4)
    np.testing.assert_array_equal(found.sel(time=former.time), former)
    np.testing.assert_array_equal(before, former)
    np.testing.assert_array_equal(plain, former)
    assert "/xchmv2" in xr.open_groups("canopy.zarr", engine="zarr")
    assert not count_forwarded(lambda: write(more))


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_while_a_store_without_slots_is_extended(height, more, step):
    write(height)
    base = copy_store(LocalStore("canopy.zarr"))
    former = xchmv2.open_zarr(base).compute()
    write(more, undisturbed := copy_store(base))
    expected = xchmv2.open_zarr(undisturbed).compute()
    with dask.config.set(scheduler="sync"):
        for operations in range(0, 200, step):
            store = copy_store(base)
            before = xchmv2.open_zarr(store)
            try:
                write(more, Killed(store, operations))
                killed = False
            except (StoreError, OSError):
                killed = True
            np.testing.assert_array_equal(before, former)
            # Who opens it as the former layout sees the former dates, or has to consolidate.
            if "consolidated_metadata" in zarr_json(store):
                found = read_whole(store)
                np.testing.assert_array_equal(found.sel(time=former.time), former)
                right = expected.sel(time=found.time)
                assert (found.isnull() | (found == right)).all()
            write(more, store)
            xr.testing.assert_identical(read_whole(store), expected)
            if not killed:
                break
    assert operations > 20


def zarr_json(store):
    return store._store_dict["zarr.json"].to_bytes().decode()


def test_a_store_in_which_dates_are_half_moved_is_refused(height, more):
    write(height)
    zarr.open_group("canopy.zarr", path="xchmv2", mode="r+").attrs["pending"] = {"moves": [[0, 1]]}
    for action in (lambda: write(more), lambda: xchmv2.open_zarr("canopy.zarr")):
        with pytest.raises(
            StoreError, match=r"killed while it moved dates.*again with that version"
        ):
            action()
    remove_store("canopy.zarr")
    assert write(more).present == 0


def test_a_store_of_a_later_version_is_refused(height):
    zarr.open_group("canopy.zarr", path="xchmv2", mode="r+").attrs["format"] = 3
    for action in (lambda: write(height), lambda: xchmv2.open_zarr("canopy.zarr")):
        with pytest.raises(StoreError, match=r"format 2 or 1, found format 3.*upgrade xchmv2"):
            action()
