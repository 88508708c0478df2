"""A store that an earlier version left half-written is resumed by this one."""

import shutil
from pathlib import Path

import dask
import pytest
import xarray as xr
from conftest import cube

import xchmv2
from xchmv2.inference import tiles_forwarded

#: Written by make_store_half_written.py, with the code before the package's modules moved.
ARCHIVE = Path(__file__).parent / "reference_data" / "store_half_written.zip"
#: Chunks that were written: of the first date, all but the lower left one.
WRITTEN = ("0/0/0", "0/0/1", "0/1/1")


def count_forwarded(action):
    before = tiles_forwarded()
    with dask.config.set(scheduler="sync"):
        action()
    return tiles_forwarded() - before


@pytest.fixture
def height(tmp_path, monkeypatch):
    """The prediction that was being written, in the folder of its store and checkpoint."""
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return (
        cube((96, 96), times=2)
        .chunk(time=1)
        .chmv2.predict("checkpoint", tile=64, block=64, overlap=16)
    )


def test_a_store_of_the_code_before_the_move_is_resumed(height):
    chunks = Path("canopy.zarr", "canopy_height", "c")
    before = {name: (chunks / name).stat().st_mtime_ns for name in WRITTEN}
    assert sum(path.is_file() for path in chunks.rglob("*")) == len(WRITTEN)
    missing = count_forwarded(height[0, 64:, :64].compute) + count_forwarded(height[1].compute)

    assert count_forwarded(lambda: height.chmv2.to_zarr("canopy.zarr", progress=False)) == missing
    assert missing < count_forwarded(height.compute)
    assert {name: (chunks / name).stat().st_mtime_ns for name in WRITTEN} == before
    xr.testing.assert_allclose(xchmv2.open_zarr("canopy.zarr").load(), height.compute(), atol=5e-4)
    assert not count_forwarded(lambda: height.chmv2.to_zarr("canopy.zarr", progress=False))
