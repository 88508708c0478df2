"""The engine against a plain loop over the same tiles."""

import subprocess
import sys
import textwrap
import time

import dask
import dask.array as da
import numpy as np
import pytest
import reference
import xarray as xr
from conftest import cube, no_compute
from hypothesis import given, settings
from hypothesis import strategies as st

from xchmv2.errors import CHMv2Error
from xchmv2.inference import tiles_forwarded
from xchmv2.raster import TileAxis, tile_runs

LAYERS = ("height", "bin_spread", "overlap_disagreement")
MODEL = reference.whole_tile_model()


def splits(size):
    """Chunk sizes of an axis, slivers of one pixel included."""
    return st.lists(st.integers(1, max(1, size)), max_size=4).map(
        lambda sizes: tuple(np.diff([0, *sorted({s for s in sizes if s < size}), size]))
    )


@st.composite
def scenes(draw):
    shape = draw(st.tuples(st.integers(1, 230), st.integers(2, 230)))
    times = draw(st.sampled_from([None, 1, 2]))
    tile = draw(st.sampled_from([32, 64, 96]))
    overlap = draw(st.integers(0, tile // 2))
    origin = (-draw(st.integers(7_000_000, 8_000_000)), draw(st.integers(700_000, 900_000)))
    imagery = cube(shape, times=times, seed=draw(st.integers(0, 99)), origin=origin)
    holes = draw(st.lists(st.tuples(*(st.integers(0, n) for n in shape * 2)), max_size=3))
    imagery = imagery.astype("float32")
    for y0, x0, y1, x1 in holes:
        where = {"y": slice(*sorted((y0, y1))), "x": slice(*sorted((x0, x1)))}
        imagery["green"][where] = np.nan
    chunks = {"y": draw(splits(shape[0])), "x": draw(splits(shape[1]))}
    if times:
        chunks["time"] = draw(st.sampled_from([1, times]))
    block = draw(
        st.sampled_from([None, tile, tile + 13, 2 * tile, 150]).filter(
            lambda b: b is None or b >= tile
        )
    )
    return imagery, chunks, origin, {"tile": tile, "overlap": overlap}, block


@settings(max_examples=60)
@given(scenes())
def test_equals_a_plain_loop_over_the_same_tiles(scene):
    imagery, chunks, origin, grid, block = scene
    before = tiles_forwarded()
    lazy = imagery.chunk(chunks).chmv2.predict(
        MODEL, value_range=(0, 255), layers=LAYERS, block=block, **grid
    )
    found = lazy.compute(scheduler="sync")
    counted = tiles_forwarded() - before
    stacked = imagery.to_dataarray("band").transpose(..., "band", "y", "x").values
    needed = 0
    for date in np.ndindex(stacked.shape[:-3]):
        image = stacked[date]
        valid = np.isfinite(image).all(axis=0)
        expected, tiles = reference.predict(MODEL, image, valid, origin=origin, **grid)
        needed += tiles
        for layer, name in zip(LAYERS, found.data_vars, strict=True):
            np.testing.assert_allclose(
                found[name].values[date], expected[layer], atol=5e-4, err_msg=layer
            )
    assert counted == needed


@settings(max_examples=20)
@given(scenes(), st.randoms(use_true_random=False))
def test_one_block_forwards_only_the_tiles_that_reach_into_it(scene, random):
    imagery, chunks, origin, grid, _ = scene
    lazy = imagery.chunk(chunks).chmv2.predict(
        MODEL, value_range=(0, 255), block=grid["tile"] + 8, **grid
    )
    whole = lazy.compute(scheduler="sync")
    picked = {d: random.randrange(len(lazy.chunksizes[d])) for d in lazy.dims}
    edges = {d: np.concatenate([[0], np.cumsum(lazy.chunksizes[d])]) for d in lazy.dims}
    window = {d: slice(int(edges[d][i]), int(edges[d][i + 1])) for d, i in picked.items()}
    before = tiles_forwarded()
    part = lazy.isel(window).compute(scheduler="sync")
    counted = tiles_forwarded() - before
    xr.testing.assert_identical(part, whole.isel(window))

    ys, height = reference.starts(imagery.sizes["y"], origin=origin[0], **grid)
    xs, width = reference.starts(imagery.sizes["x"], origin=origin[1], **grid)
    valid = imagery.to_dataarray("band").notnull().all("band")
    dates = valid.isel(time=window["time"]) if "time" in valid.dims else valid.expand_dims("time")
    needed = sum(
        y < window["y"].stop
        and y + height > window["y"].start
        and x < window["x"].stop
        and x + width > window["x"].start
        and bool(date.isel(y=slice(y, y + height), x=slice(x, x + width)).any())
        for date in dates
        for y in ys
        for x in xs
    )
    assert counted == needed


def test_same_ground_in_two_areas_of_interest():
    imagery = cube((330, 350)).chunk(y=100, x=120)
    options = dict(tile=64, overlap=16, layers=LAYERS)
    wide = imagery.chmv2.predict(MODEL, **options).compute()
    window = dict(y=slice(37, 300), x=slice(21, 311))
    narrow = imagery.isel(window).chmv2.predict(MODEL, **options).compute()
    inner = dict(y=slice(64, -64), x=slice(64, -64))
    xr.testing.assert_allclose(narrow.isel(inner), wide.isel(window).isel(inner), atol=5e-4)


@settings(max_examples=10)
@given(
    st.sampled_from([None, 0.6, 0.5]),
    st.integers(0, 2),
    st.tuples(st.booleans(), st.booleans()),
    st.lists(st.tuples(*(st.integers(0, 200),) * 4), max_size=3),
    st.tuples(*(st.integers(0, 20),) * 4),
    st.integers(1, 130),
)
def test_masks_erosion_resampling_turns_and_areas(resolution, erode, turn, holes, trim, chunk):
    """All of imagery's options at once: any chunks, any area of interest, any orientation."""
    imagery = cube((200, 210), pixel=0.4, origin=(-12_000_001, 1_200_001))
    mask = xr.ones_like(imagery["red"], dtype=bool)
    for y0, x0, y1, x1 in holes:
        mask[slice(*sorted((y0, y1))), slice(*sorted((x0, x1)))] = False
    options = dict(resolution=resolution, erode=erode, tile=32, overlap=8, layers=LAYERS)
    wide = imagery.chmv2.predict(MODEL, valid=mask, **options)
    window = dict(y=slice(trim[0], 200 - trim[1]), x=slice(trim[2], 210 - trim[3]))
    flip = {d: slice(None, None, -1) for d, on in zip("yx", turn, strict=True) if on}
    part, seen = (a.isel(window).isel(flip) for a in (imagery, mask))
    found = part.chunk(y=chunk, x=chunk + 70).chmv2.predict(
        MODEL, valid=seen.chunk(y=50), block=45, **options
    )
    found = found.compute(scheduler="sync").sortby("y", ascending=False).sortby("x")
    inner = dict(y=slice(34, -34), x=slice(34, -34))
    near = wide.sel(y=found.y, x=found.x, method="nearest").isel(inner)
    for name in wide:
        np.testing.assert_allclose(found[name].isel(inner), near[name], atol=5e-4, err_msg=name)


def test_planning_small_chunks_is_quick():
    bands = da.zeros((2, 30_720, 30_720), chunks=(1, 1024, 1024), dtype="uint8")
    coords = dict(x=(np.arange(30_720) + 0.5) * 0.6, y=5e6 - (np.arange(30_720) + 0.5) * 0.6)
    names = ("red", "green", "blue")
    imagery = xr.Dataset({n: (("time", "y", "x"), bands) for n in names}, coords)
    imagery = imagery.odc.assign_crs(32633)
    start = time.process_time()  # a busy machine changes it little
    lazy = imagery.chmv2.predict(MODEL)
    assert lazy.chunks[1][0] == 1024
    assert time.process_time() - start < 10


def test_graph_is_small():
    """At most six tasks per block and date beside the source."""
    imagery = cube((1500, 1500), times=3).chunk(time=1, y=300, x=300)
    heights = imagery.chmv2.predict(MODEL, tile=64, overlap=16, block=300)
    source = set().union(*(set(band.__dask_graph__()) for band in imagery.data_vars.values()))
    own = set(heights.__dask_graph__()) - source
    assert len(own) / (3 * 5 * 5) <= 6
    stacked = imagery.to_dataarray("band").chunk(band=3)
    heights = stacked.chmv2.predict(MODEL, tile=64, overlap=16, block=300)
    own = set(heights.__dask_graph__()) - set(stacked.__dask_graph__())
    assert len(own) / (3 * 5 * 5) <= 6


def test_chunks_of_other_dims_survive():
    imagery = cube((100, 100), times=5).chunk(time=(2, 3))
    heights = imagery.chmv2.predict(MODEL, tile=64, overlap=16)
    assert heights.chunksizes["time"] == (2, 3)


def test_empty_tiles_are_not_forwarded_and_a_border_group_may_be_empty():
    imagery = cube((256, 256))
    for band in imagery.data_vars.values():
        band[:, :200] = 0
    before = tiles_forwarded()
    heights = imagery.chunk(y=128, x=128).chmv2.predict(
        MODEL, nodata=0, tile=64, overlap=0, block=128
    )
    found = heights.compute(scheduler="sync")
    np.testing.assert_array_equal(np.isnan(found), imagery["red"] == 0)
    needed = sum(
        bool((imagery["red"][y : y + 64, x : x + 64] != 0).any())
        for y in reference.starts(256, 64, 0, -8_000_000)[0]
        for x in reference.starts(256, 64, 0, 800_000)[0]
    )
    assert tiles_forwarded() - before == needed


def test_a_group_reaches_into_at_most_four_blocks():
    axis = TileAxis(5000, 448, 224, 17)
    assert {len(run.blocks) for run in tile_runs(axis, 448)} <= {1, 2}


def test_building_is_lazy_and_keys_are_stable():
    imagery = cube((300, 300), times=2).chunk(time=1, y=128, x=128)
    with no_compute():
        first = imagery.chmv2.predict(MODEL, tile=64, overlap=16)
        second = imagery.chmv2.predict(MODEL, tile=64, overlap=16)
        other = imagery.chmv2.predict(MODEL, tile=64, overlap=32)
    assert set(first.__dask_graph__()) == set(second.__dask_graph__())
    assert first.data.name != other.data.name


def test_query_planning_is_refused():
    imagery = cube((64, 64)).chunk()
    with (
        dask.config.set({"array.query-planning": True}),
        pytest.raises(CHMv2Error, match=r"expected dask's default array graphs.*query-planning"),
    ):
        imagery.chmv2.predict(MODEL, tile=64, overlap=16)


def test_a_huge_cube_is_planned_in_seconds_without_loading_the_model(tiny_checkpoint):
    script = f"""
        import time
        import dask.array as da, numpy as np, xarray as xr, odc.geo.xr
        import xchmv2
        n = 100_352
        band = da.zeros((10, n, n), chunks=(1, 4096, 4096), dtype="uint8")
        coords = dict(x=(np.arange(n) + 0.5) * 0.6, y=5e6 - (np.arange(n) + 0.5) * 0.6)
        bands = {{c: (("time", "y", "x"), band) for c in ("red", "green", "blue")}}
        cube = xr.Dataset(bands, coords)
        cube = cube.odc.assign_crs(32633)
        start = time.process_time()
        heights = cube.chmv2.predict({str(tiny_checkpoint)!r})
        seconds = time.process_time() - start
        from xchmv2.inference import models
        assert not models._predictors, "a model was loaded"
        assert heights.shape == (10, n, n) and heights.chunks[1][0] == 4096
        from tests.benchmarks.memory import peak_memory
        peak = peak_memory("cpu") / 1024
        assert seconds < 20, seconds
        assert peak < 1.5, peak
        print(f"{{seconds:.1f}} s, {{peak:.2f}} GiB")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
