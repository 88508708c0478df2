"""Memory of lazy analyses: what grows with the scene, and by how much a pixel."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import xarray as xr
from scipy import ndimage

from xchmv2.change import events, trend
from xchmv2.raster import label_patches, sieve

_RUN = """
import resource, sys
import dask, dask.array as da, numpy as np, xarray as xr
import xchmv2

what, side, block = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def fill(block_info):
    _, (a, b), (c, d) = block_info[None]["array-location"]
    rows, cols = np.arange(a, b)[:, None], np.arange(c, d)
    first = 15 + 3 * np.sin(rows / 37) + 0 * cols
    last = first - 12 * (np.sin(rows / 61) * np.cos(cols / 53) > 0.7)
    return np.stack([first, last]).astype("f4")

def run():
    chunks = ((2,), (block,) * (side // block), (block,) * (side // block))
    heights = da.map_blocks(fill, chunks=chunks, dtype="f4", meta=np.empty((0, 0, 0), "f4"))
    coords = {
        "time": np.array(["2019-06-01", "2023-06-01"], "M8[ns]"),
        "y": 5e6 - 0.6 * np.arange(side), "x": 5e5 + 0.6 * np.arange(side),
    }
    height = xr.DataArray(heights, coords, ("time", "y", "x"), "canopy_height")
    height = height.odc.assign_crs(32633)
    change = height.chmv2.difference("2019", "2023", sigma=2.0)
    lost = change.chmv2.loss(threshold=5)
    if what == "loss":
        return int(lost.sum())
    if what == "label_events":
        labels, table = change.chmv2.label_events(lost)
        return len(table) + int(labels.max())
    return len(height.isel(time=1, drop=True).chmv2.gaps()[1])

import odc.geo.xr
with dask.config.set(scheduler="threads", num_workers=2):
    assert run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(what, side, block):
    command = [sys.executable, "-c", _RUN, what, str(side), str(block)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def added(what, small, large, block):
    """Bytes of memory per pixel that the larger scene has more."""
    return (peak(what, large, block) - peak(what, small, block)) / (large**2 - small**2)


def test_events_are_labelled_in_little_memory():
    assert added("label_events", 2048, 4096, 1024) < 2.5


@pytest.mark.slow
@pytest.mark.parametrize(("what", "most"), [("label_events", 1.0), ("loss", 1.0), ("gaps", 1.0)])
def test_memory_of_large_scenes(what, most):
    assert added(what, 4096, 8192, 1024) < most


def cube(side):
    rng = np.random.default_rng(side)
    heights = (15 - 10.0 * (rng.random((6, side, side)) < 0.1)).astype("f4")
    time = np.array([f"20{10 + k}-06-01" for k in range(6)], "M8[ns]")
    return xr.DataArray(heights, {"time": time}, ("time", "y", "x"), "canopy_height")


@pytest.mark.parametrize(("function", "results"), [(events, 33), (trend, 28)])
def test_a_block_needs_its_results_and_little_more(function, results):
    peaks = []
    for side in (512, 768):
        height = cube(side)
        tracemalloc.start()
        function(height)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (768**2 - 512**2) < results + 10


def test_masks_in_memory_are_labelled_in_blocks():
    mask = np.zeros((2100, 2090), bool)
    mask[::3, ::2] = mask[:, 2047] = mask[2046:2050, 5:] = True
    array = xr.DataArray(mask, dims=("y", "x"))
    expected, count = ndimage.label(mask, np.ones((3, 3)))
    labels, table = label_patches(array)
    np.testing.assert_array_equal(labels, expected)
    sizes = np.bincount(expected.ravel(), minlength=count + 1)[1:]
    np.testing.assert_array_equal(table["pixels"], sizes)
    np.testing.assert_array_equal(
        sieve(array, min_area=2), np.isin(expected, 1 + np.flatnonzero(sizes > 1))
    )
