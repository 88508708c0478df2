"""A plan against what the prediction then really does."""

import dataclasses
import re
import subprocess
import sys
import tracemalloc
import xml.etree.ElementTree as ET
from pathlib import Path

import dask
import numpy as np
import pytest
import reference
import rioxarray
import xarray as xr
from conftest import cube, no_compute
from hypothesis import given, settings
from hypothesis import strategies as st

from xchmv2.accessor import CHMv2Accessor
from xchmv2.errors import CheckpointError, CHMv2Error, GridError, ImageryError
from xchmv2.inference import (
    ModelSpec,
    clear_models,
    get_predictor,
    rough_seconds_per_tile,
    tiles_forwarded,
)
from xchmv2.inference import models as held
from xchmv2.inference import models as spec
from xchmv2.inference.blending import Accumulator
from xchmv2.inference.models import _find_unloaded
from xchmv2.inference.predictor import _Stopwatch
from xchmv2.predict import PredictionPlan, plan, planning
from xchmv2.predict.planning import _Skipped

# Private imports: a plan is held against the counts and clocks of the engine.

MODEL = reference.whole_tile_model()
GRID = dict(tile=64, overlap=16)


def graph_tasks(heights):
    """Tasks of the prediction that computing it runs: of groups, and of blocks."""
    arrays = heights.data_vars.values() if isinstance(heights, xr.Dataset) else [heights]
    names = [
        {key: key[0] for key in array.data.dask.cull(array.data.__dask_keys__())}
        for array in arrays
    ]
    names = {key: name for found in names for key, name in found.items()}
    groups = sum(name.startswith("chmv2-groups") for name in names.values())
    blocks = sum(name in {array.data.name for array in arrays} for name in names.values())
    return groups, blocks


@st.composite
def requests(draw):
    shape = draw(st.tuples(st.integers(1, 200), st.integers(2, 200)))
    times = draw(st.sampled_from([None, 1, 3]))
    pixel, resolution = draw(st.sampled_from([(0.6, None), (0.3, 0.6), (0.9, 0.6)]))
    origin = (-draw(st.integers(7_000_000, 7_000_500)), draw(st.integers(800_000, 800_500)))
    imagery = cube(shape, times=times, pixel=pixel, origin=origin).astype("float32")
    for _ in range(draw(st.integers(0, 3))):
        y, x = (draw(st.integers(0, n)) for n in shape)
        where = {"y": slice(y, y + 120), "x": slice(x, x + 120)}
        if times:
            where["time"] = draw(st.integers(0, times - 1))
        imagery["green"][where] = np.nan
    tile = draw(st.sampled_from([32, 64]))
    options = dict(
        value_range=(0, 255),
        resolution=resolution,
        tile=tile,
        overlap=draw(st.integers(0, tile // 2)),
        block=draw(st.sampled_from([None, tile, 100])),
        erode=draw(st.sampled_from([0, 2])),
        layers=draw(st.sampled_from(["height", ("height", "overlap_disagreement")])),
    )
    return imagery, options


@settings(max_examples=25)
@given(requests(), st.sampled_from([1, 2]))
def test_counts_are_those_of_the_prediction(request_, together):
    imagery, options = request_
    chunked = imagery.chunk(y=70, x=90, **({"time": together} if "time" in imagery.dims else {}))
    planned = chunked.chmv2.plan(MODEL, **options)
    known = imagery.chmv2.plan(MODEL, **options)
    lazy = chunked.chmv2.predict(MODEL, **options)
    before = tiles_forwarded()
    found = lazy.compute(scheduler="sync")
    forwarded = tiles_forwarded() - before

    assert planned.skipped is None
    assert planned.forwards == planned.tiles == known.tiles
    assert known.skipped == _Skipped(known.tiles - forwarded, exact=True)
    assert known.forwards == forwarded
    assert known.skipped_share == pytest.approx(1 - forwarded / known.tiles)
    assert (planned.group_tasks, planned.block_tasks) == graph_tasks(lazy)
    assert planned.tasks == sum(graph_tasks(lazy))
    assert planned.source_sizes == dict(imagery.sizes)
    assert planned.dates == imagery.sizes.get("time", 1)
    variables = list(found.data_vars.values()) if isinstance(found, xr.Dataset) else [found]
    assert list(planned.sizes.items()) == list(variables[0].sizes.items())
    assert planned.output_bytes == sum(variable.nbytes for variable in variables)
    chunks = lazy.chunksizes
    assert planned.block_grid == (len(chunks["y"]), len(chunks["x"]))
    assert planned.lazy
    assert not known.lazy


class TestSkipped:
    IMAGERY = cube((300, 300), times=2)

    def check(self, imagery, expected_exact=True, **options):
        found = imagery.chmv2.plan(MODEL, **GRID, **options).skipped
        before = tiles_forwarded()
        imagery.chmv2.predict(MODEL, **GRID, **options).compute(scheduler="sync")
        tiles = imagery.chmv2.plan(MODEL, **GRID, **options).tiles
        really = tiles - (tiles_forwarded() - before)
        assert found.exact == expected_exact
        return found.tiles, really

    def test_nodata_of_integers(self):
        imagery = self.IMAGERY.copy(deep=True)
        for name in imagery.data_vars:
            imagery[name][{"y": slice(None, 200), "time": 1}] = 0
        found, really = self.check(imagery, nodata=0)
        assert found == really > 10
        stacked = imagery.to_dataarray("band").transpose("time", "y", "band", "x")
        assert self.check(stacked, nodata=0) == (found, really)

    def test_integers_without_nodata_are_known_unread(self):
        assert self.check(self.IMAGERY.chunk(y=100)) == (0, 0)
        assert "skipped     none" in repr(self.IMAGERY.chunk().chmv2.plan(MODEL, **GRID))

    def test_a_mask_in_memory(self):
        valid = (self.IMAGERY.y > self.IMAGERY.y[120]) & (self.IMAGERY.x < self.IMAGERY.x[200])
        found, really = self.check(self.IMAGERY.chunk(x=100), valid=valid, erode=3)
        assert found == really > 10

    def test_a_mask_over_imagery_that_is_not_read_tells_the_least(self):
        imagery = self.IMAGERY.astype("float32")
        imagery["red"][{"y": slice(None, 70)}] = np.nan
        options = dict(valid=imagery.y > imagery.y[120], value_range=(0, 255))
        found, really = self.check(imagery.chunk(), expected_exact=False, **options)
        assert 10 < found < really
        known = imagery.chunk().chmv2.plan(MODEL, **GRID, **options)
        line = f"at least {found} tiles without a valid pixel, {100 * found / known.tiles:.3g} %"
        assert line in repr(known)
        assert "at most" in repr(known.timed(2))
        lazy_mask = {**options, "valid": options["valid"].chunk()}
        for unknown in (lazy_mask, {"value_range": (0, 255)}):
            planned = imagery.chunk().chmv2.plan(MODEL, **GRID, **unknown)
            assert planned.skipped is None
            assert planned.skipped_share is None
            assert "not known before the imagery is read" in repr(planned)

    def test_a_file_opened_without_dask_is_not_read(self, tmp_path):
        stacked = cube((90, 80)).to_dataarray("band").rio.write_nodata(0)
        stacked.rio.to_raster(tmp_path / "image.tif")
        opened = rioxarray.open_rasterio(tmp_path / "image.tif")
        assert opened.chmv2.plan(MODEL, **GRID).skipped is None
        assert opened.load().chmv2.plan(MODEL, **GRID).skipped == _Skipped(0, exact=True)


class TestLaziness:
    def test_nothing_is_computed_or_loaded_or_changed(self, tiny_checkpoint, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("loaded")

        monkeypatch.setattr(held, "_load", refuse)
        imagery = cube((150, 170), times=2).chunk(time=1, y=60)
        copy = imagery.copy(deep=True)
        keys = set(imagery.__dask_graph__())
        with no_compute():
            planned = imagery.chmv2.plan(tiny_checkpoint, **GRID)
            assert repr(planned)
            assert planned._repr_html_()
            assert repr(imagery.chmv2)
            assert imagery.chmv2._repr_html_()
        assert set(imagery.__dask_graph__()) == keys
        xr.testing.assert_identical(imagery, copy)

    def test_the_plan_of_arrays_in_memory_leaves_them_alone(self):
        imagery = cube((100, 100)).astype("float32")
        imagery["red"][{"x": 3}] = np.nan
        copy = imagery.copy(deep=True)
        imagery.chmv2.plan(MODEL, value_range=(0, 255), resolution=0.8, **GRID)
        xr.testing.assert_identical(imagery, copy)

    def test_it_is_frozen(self):
        planned = plan(cube((64, 64)), MODEL, **GRID)
        assert isinstance(planned, PredictionPlan)
        with pytest.raises(dataclasses.FrozenInstanceError):
            planned.lazy = True


class TestNumbers:
    def test_ground(self):
        planned = cube((400, 500), times=2, pixel=0.3).chmv2.plan(MODEL, resolution=0.6, **GRID)
        assert planned.source_pixel == pytest.approx((0.3, 0.3), rel=1e-3)
        assert planned.pixel == pytest.approx((0.6, 0.6), rel=1e-3)
        assert planned.crs == "EPSG:32633"
        assert planned.period == ("2020-07-01", "2021-07-01")
        assert planned.megapixels == pytest.approx(2 * 200 * 250 / 1e6)
        assert planned.area == pytest.approx(0.120 * 0.150, rel=2e-3)
        assert planned.resampled
        with pytest.warns(UserWarning, match="imagery without a CRS"):
            bare = cube((100, 100), crs=None).chmv2.plan(MODEL, **GRID)
        assert (bare.crs, bare.pixel, bare.area) == (None, None, None)
        assert "not known without a CRS" in repr(bare)
        stated = cube((100, 100), crs=None).chmv2.plan(MODEL, pixel_size=0.5, **GRID)
        assert (stated.crs, stated.pixel, stated.area) == (None, (0.5, 0.5), 0.0025)

    def test_memory_of_a_task(self):
        """By hand: one group, one block, one date a chunk."""
        imagery = cube((128, 128), times=2, origin=(0, 0)).chunk(time=1)
        found = imagery.chmv2.plan(MODEL, **GRID, block=128).memory
        pixels = 128 * 128
        assert found.chunks == 3 * pixels
        assert found.window == (3 + 3 + 1 + 1) * pixels
        assert found.sums == found.gathered == 4 * pixels
        assert found.block == (4 + 1) * pixels
        assert found.of_group == (3 + 8 + 4) * pixels
        assert found.of_block == 8 * pixels + pixels
        assert imagery.compute().chmv2.plan(MODEL, **GRID).memory.chunks == 0

    def test_memory_is_that_of_what_tasks_hold(self):
        """The largest group's sums and chunks, taken from the graph itself."""
        imagery = cube((260, 300), times=2).chunk(time=2, y=100, x=130)
        options = dict(**GRID, block=100, layers=("height", "bin_spread", "overlap_disagreement"))
        found = imagery.chmv2.plan(MODEL, **options).memory
        lazy = imagery.chmv2.predict(MODEL, **options)
        graph = dict(lazy["canopy_height"].data.dask)
        groups = {k: v for k, v in graph.items() if k[0].startswith("chmv2-groups")}
        values = dask.get(graph, list(groups))
        assert found.sums == max(sum(a.nbytes for a in sums.values()) for sums in values)
        assert found.chunks == max(chunk_bytes(graph, task) for task in groups.values())
        assert found.block == 6 * 4 * 2 * 100 * 100  # the block, and five such while deriving it

    @pytest.mark.parametrize(
        ("pixel", "resolution", "dtype", "times"),
        [
            (0.6, None, "uint8", 1),
            (0.6, None, "float32", 2),
            (0.3, 0.6, "uint8", 1),
            (0.9, 0.6, "uint8", 2),
        ],
    )
    @pytest.mark.parametrize("layers", ["height", ("height", "bin_spread", "overlap_disagreement")])
    def test_memory_is_enough(self, pixel, resolution, dtype, times, layers, monkeypatch):
        """What tasks really allocate, beside their arguments and the network."""
        monkeypatch.setattr("xchmv2.predict.tasks.get_predictor", lambda spec: NoNetwork())
        imagery = cube((900, 900), times=times, pixel=pixel, dtype=dtype).chunk(y=400, x=400)
        options = dict(**GRID, resolution=resolution, block=400, value_range=(0, 255))
        found = imagery.chmv2.plan(MODEL, layers=layers, **options).memory
        lazy = imagery.chmv2.predict(MODEL, layers=layers, **options)
        array = (lazy if layers == "height" else lazy["overlap_disagreement"]).data
        graph = dict(array.dask)
        groups, sums = peaks(graph, lambda name: name.startswith("chmv2-groups"))
        blocks, _ = peaks({**graph, **sums}, lambda name: name == array.name)
        assert 0.4 < groups / (found.of_group - found.chunks) <= 1
        assert 0.4 < blocks / (found.of_block - found.gathered) <= 1

    def test_batch_and_device(self):
        planned = cube((100, 100)).chmv2.plan(MODEL, device="cpu", **GRID)
        assert planned.device == "cpu"
        assert planned.batch_size == 49  # as many as have the pixels of one tile of 448 px
        assert "cpu, 49 tiles a forward" in repr(planned)
        assert cube((100, 100)).chmv2.plan(MODEL, batch_size=3, **GRID).batch_size == 3


def chunk_bytes(graph, task):
    """Bytes of the source chunks that a group reads, of each chunk once."""
    keys = {key for source in task[1] for row in source for key in row}
    return sum(np.asarray(chunk).nbytes for chunk in dask.get(graph, list(keys)))


class NoNetwork:
    """In place of a predictor: sums, and nothing that a network takes."""

    def accumulate(self, window, valid, rows, cols, *, scaling, layers, batch_size):
        return Accumulator(valid.shape, layers).sums(valid)


def peaks(graph, chosen):
    """Highest memory that any of the chosen tasks allocates [bytes], and what they return."""
    highest, results = 0, {}
    for key, (task, arguments) in [(k, v) for k, v in graph.items() if chosen(k[0])]:
        ready = dask.get(graph, arguments)
        tracemalloc.start()
        results[key] = task(ready)
        highest = max(highest, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return highest, results


class TestTime:
    def test_it_is_known_once_this_process_forwarded_such_tiles(self):
        clear_models()
        imagery = cube((150, 170))
        before = imagery.chmv2.plan(MODEL, **GRID)
        assert before.rate == "rough"
        assert "a rough rate of such a device" in repr(before)
        assert ".plan(time=True) measures it" in repr(before)
        imagery.chmv2.predict(MODEL, **GRID)
        after = imagery.chmv2.plan(MODEL, **GRID)
        predictor = get_predictor(after.job.model)
        assert after.seconds_per_tile == predictor.seconds_per_tile((64, 64)) > 0
        assert after.seconds == after.seconds_per_tile * after.tiles
        assert "as measured in this process" in repr(after)
        assert after.rate == "measured"
        assert imagery.chmv2.plan(MODEL, tile=96, overlap=16).rate == "rough"

    def test_a_few_tiles_are_timed_on_request(self):
        clear_models()
        imagery = cube((150, 170)).chunk()
        asked = imagery.chmv2.plan(MODEL, time=True, batch_size=3, **GRID)
        assert asked.rate == "measured"
        assert asked.seconds_per_tile == imagery.chmv2.plan(MODEL, **GRID).seconds_per_tile > 0
        narrow = cube((150, 40)).chmv2.plan(MODEL, time=True, layers="bin_spread", **GRID)
        assert narrow.rate == "measured"
        assert narrow.job.cols.window == 64

    def test_rough_rates_are_those_of_the_documentation(self, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text("{}")  # the published architecture
        of = ModelSpec(str(tmp_path), None, "", "", "cpu", "float32")
        monkeypatch.setattr("torch.get_num_threads", lambda: 2)
        page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
        for dtype in ("float32", "bfloat16"):
            measured = re.search(rf"xchmv2 \| {dtype} \| eager \| ([\d.]+)", page)[1]
            found = rough_seconds_per_tile(dataclasses.replace(of, dtype=dtype), (448, 448))
            assert found == pytest.approx(1 / float(measured), rel=0.1)
        small = rough_seconds_per_tile(of, (224, 224))
        assert 0.15 < small / rough_seconds_per_tile(of, (448, 448)) < 0.25

    def test_the_rate_of_a_gpu(self, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text("{}")
        of = ModelSpec(str(tmp_path), None, "", "", "cuda:0", "bfloat16")
        rates = {}
        for card in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "Tesla T4"):
            monkeypatch.setattr("torch.cuda.get_device_name", lambda device, card=card: card)
            rates[card] = 1 / rough_seconds_per_tile(of, (448, 448))
        assert list(rates) == sorted(rates, key=rates.get, reverse=True)
        assert 10 < rates["Tesla T4"] < rates["NVIDIA H100 80GB HBM3"] < 1000

    def test_a_speed_that_is_given(self):
        planned = cube((150, 170)).chmv2.plan(MODEL, **GRID).timed(0.5)
        assert planned.seconds == 2 * planned.tiles
        assert "at 0.500 tiles a second, as given" in repr(planned)
        assert "h " in repr(planned.timed(0.001))
        assert "days" in repr(planned.timed(0.00001))

    @pytest.mark.parametrize("speed", [0, -1, True, "fast", float("nan"), float("inf")])
    def test_what_is_no_speed(self, speed):
        planned = cube((64, 64)).chmv2.plan(MODEL, **GRID)
        with pytest.raises(CHMv2Error, match=r"tiles_per_second .*above 0, found .*=20"):
            planned.timed(speed)

    def test_threads_side_by_side_count_once(self, monkeypatch):
        now = iter([0.0, 10.0, 20.0, 24.0, 30.0, 36.0, 40.0, 41.0])
        monkeypatch.setattr("xchmv2.inference.predictor.time.perf_counter", lambda: next(now))
        watch = _Stopwatch()
        assert watch.seconds_per_tile is None
        with watch.running(5):  # 0 to 10
            pass
        assert watch.seconds_per_tile == 2.0
        with watch.running(2), watch.running(2):  # 20 to 24; the first spell counts no more
            pass
        assert watch.seconds_per_tile == 1.0
        with watch.running(8):  # 30 to 36
            pass
        assert watch.seconds_per_tile == 10 / 12
        with pytest.raises(RuntimeError), watch.running(3):
            raise RuntimeError
        assert watch.seconds_per_tile == 10 / 12


class TestModel:
    def test_a_missing_model_leaves_the_rest_of_the_plan(self, tmp_path):
        planned = cube((100, 100)).chmv2.plan(tmp_path / "nowhere", **GRID)
        assert planned.tiles == cube((100, 100)).chmv2.plan(MODEL, **GRID).tiles
        assert "nowhere" in planned.model_problem
        assert "nowhere, which predict() would refuse: .model_problem says why" in repr(
            planned
        ).replace("\n" + " " * 14, " ")
        with pytest.raises(CheckpointError, match="nowhere"):
            cube((64, 64)).chmv2.predict(tmp_path / "nowhere", **GRID)

    def test_weights_that_are_not_here_are_not_fetched(self, tiny_checkpoint, monkeypatch):
        asked, found = [], _find_unloaded(tiny_checkpoint)

        def describe(model):
            asked.append(model)
            return found

        monkeypatch.setattr(spec, "_find_unloaded", describe)
        monkeypatch.setattr(spec, "resolve_checkpoint", None)
        cube((64, 64)).chmv2.plan(tiny_checkpoint, **GRID)
        assert asked == [tiny_checkpoint]

    def test_the_workers_of_a_cluster_have_their_own_devices(self, monkeypatch):
        imagery = cube((100, 100))
        imagery.chmv2.predict(MODEL, **GRID)
        monkeypatch.setattr(planning, "active_client", object)
        planned = imagery.chunk().chmv2.plan(MODEL, **GRID)
        assert (planned.device, planned.batch_size, planned.seconds) == (None, None, None)
        assert "auto on each worker of the cluster" in repr(planned)
        assert imagery.chmv2.plan(MODEL, **GRID).seconds > 0  # which is predicted here

    def test_a_model_is_named(self, tiny_checkpoint):
        planned = cube((100, 100)).chmv2.plan(tiny_checkpoint, **GRID)
        assert planned.model_problem is None
        assert planned.job.model.weights_sha256[:12] in repr(planned)
        assert "a model of this process" in repr(cube((64, 64)).chmv2.plan(MODEL, **GRID))

    def test_the_job_is_the_predictions_own(self, tiny_checkpoint):
        from xchmv2.predict import find_prediction

        imagery = cube((100, 100)).chunk()
        lazy = imagery.chmv2.predict(tiny_checkpoint, **GRID)
        assert find_prediction(lazy.data).job == imagery.chmv2.plan(tiny_checkpoint, **GRID).job

    def test_other_errors_are_those_of_predict(self):
        with pytest.raises(ImageryError, match="uint8 imagery, or the values"):
            cube((64, 64)).astype("float32").chmv2.plan(MODEL)
        with pytest.raises(GridError, match="a tile that is a multiple of 32 px"):
            cube((64, 64)).chmv2.plan(MODEL, tile=70)


class TestText:
    def test_lines(self):
        planned = cube((300, 400), times=2, pixel=0.3).chunk(time=1).chmv2.plan(
            MODEL, resolution=0.6, block=100, device="cpu", **GRID
        )  # fmt: skip
        lines = repr(planned).splitlines()
        assert len(lines) <= 18
        assert max(map(len, lines)) <= 100
        for line in [
            "<xchmv2 prediction plan, nothing computed yet>",
            "  imagery     time: 2, y: 300, x: 400; red, green, blue; uint8; dask-backed",
            "  dates       2, 2020-07-01 to 2021-07-01",
            "  CRS         EPSG:32633",
            "  resolution  0.3 m on the ground, resampled to 0.6 m",
            "  output      time: 2, y: 150, x: 200; height; float32, 240 kB",
            "  blocks      100 px: 2 x 2 = 4 a date",
        ]:
            assert line in lines
        rows, cols = planned.tile_grid
        tiles = f"64 px, overlap 16, stride 48: {rows} x {cols} = {rows * cols} a date"
        assert f"  tiles       {tiles}, {planned.tiles} in all" in lines

    def test_html_is_well_formed_and_escapes_names(self):
        names = {"red": "<b>r&", "green": "g", "blue": "b"}
        imagery = cube((300, 400)).rename(names)
        bands = ("<b>r&", "g", "b")
        html = imagery.chmv2.plan(MODEL, bands=bands, block=100, **GRID)._repr_html_()
        ET.fromstring(html)
        assert "<b>r" not in html
        assert "&lt;b&gt;r&amp;" in html
        assert "<svg" in html
        assert "--jp-content-font-color1" in html
        accessor = imagery.rename({"y": "y", "x": "x"}).chmv2._repr_html_()
        ET.fromstring(accessor)
        assert "<b>r" not in accessor

    def test_the_picture_leaves_out_what_nobody_could_see(self):
        few = cube((300, 400)).chmv2.plan(MODEL, block=100, **GRID)._repr_html_()
        blocks = re.findall(r'<path d="([^"]*)" stroke-width="1.5"', few)
        assert blocks[0].count("M") == 2 + 3
        many = cube((2100, 64)).chmv2.plan(MODEL, tile=32, overlap=0)._repr_html_()
        ET.fromstring(many)
        assert re.findall(r'<path d="([^"]*)" stroke-width="0.5"', many)[0].count("H") == 0


class TestAccessor:
    def test_imagery(self):
        text = repr(cube((100, 120), times=2).chunk(time=1).chmv2)
        for line in [
            "<xchmv2 accessor of a Dataset (time: 2, y: 100, x: 120)>",
            "  holds       no canopy height; maybe imagery",
            "  bands       red, green, blue",
            "  values      uint8, 0 is black and 255 white; 0.024 Mpx a band; dask-backed",
            "  dates       time: 2; 2020-07-01 to 2021-07-01",
            "  CRS         EPSG:32633",
            "  resolution  0.6 m on the ground",
            "  predict()   can run; .plan() tells what it will do",
            "  methods     prediction: predict, plan, to_zarr",
        ]:
            assert line in text.splitlines()

    def test_every_method_is_named(self):
        public = {name for name in dir(CHMv2Accessor) if not name.startswith("_")}
        words = set(re.findall(r"\w+", repr(xr.Dataset().chmv2)))
        assert public <= words

    @pytest.mark.parametrize(
        ("kind", "fit", "others"),
        [
            ("imagery", {"predict", "plan", "to_zarr"}, {"zonal", "loss", "difference"}),
            ("date", {"canopy_cover", "zonal", "plot", "plot_validation"}, {"difference", "loss"}),
            ("dates", {"difference", "align", "plot_series"}, {"events", "trend", "predict"}),
            ("series", {"difference", "events", "trend", "plot"}, {"predict", "gain"}),
            ("difference", {"loss", "loss_area", "zonal", "plot_change"}, {"difference", "plan"}),
            ("change", {"loss", "gain", "plot_change"}, {"loss_area", "canopy_cover"}),
            ("events", {"loss", "label_events", "to_zarr"}, {"gain", "plot", "zonal"}),
            ("mask", {"to_zarr"}, {"loss", "predict", "plot"}),
            ("labels", {"to_zarr", "zonal"}, {"plan"}),
            ("imagery and heights", {"predict", "difference"}, {"loss", "events"}),
            ("nothing", set(), {"predict", "plot", "to_zarr"}),
        ],
    )
    def test_methods_that_fit_come_first(self, kind, fit, others):
        imagery = cube((40, 50), times=3)
        height = (imagery["red"].astype("float32") / 10).rename("canopy_height")
        change = height.chmv2.difference("2020", "2021", sigma=4.0)
        obj = {
            "imagery": imagery,
            "date": height[0],
            "dates": height[:2],
            "series": height.to_dataset(),
            "difference": change,
            "change": change["height_change"],
            "events": height.chmv2.events(),
            "mask": change["significant"],
            "labels": height[0].rename(None),
            "imagery and heights": imagery.assign(canopy_height=height).isel(time=[0, 1]),
            "nothing": xr.Dataset(),
        }[kind]
        _, _, methods = repr(obj.chmv2).partition("\n  methods ")
        shown, _, rest = methods.partition("\n  others ")
        shown, rest = (set(re.findall(r"\w+", part)) for part in (shown, rest))
        assert fit <= shown
        assert others <= rest
        public = {name for name in dir(CHMv2Accessor) if not name.startswith("_")}
        assert (shown | rest) >= public
        assert not shown & rest & public

    def test_what_predict_needs_is_the_errors_own_message(self):
        imagery = cube((100, 120)).astype("float32")
        with pytest.raises(ImageryError) as refused:
            imagery.chmv2.predict(MODEL, **GRID)
        assert str(refused.value) in " ".join(repr(imagery.chmv2).split())

    def test_heights(self):
        heights = cube((100, 120)).red.astype("float32").rename("canopy_height")
        assert "  holds       canopy height" in repr(heights.chmv2)
        assert "  predict()   takes imagery" in repr(heights.to_dataset().chmv2)
        change = heights.rename("height_change")
        assert "  holds       a change of canopy height" in repr(change.chmv2)

    @pytest.mark.parametrize(
        "odd",
        [
            xr.Dataset(),
            xr.DataArray(0),
            xr.DataArray(["a", "b"]),
            xr.DataArray(np.zeros((2, 3, 4)), dims=("p", "q", "r")),
            xr.Dataset({"red": ("y", [1, 2]), 3: ("x", [1])}),
            xr.DataArray(np.zeros((0, 4)), dims=("y", "x")),
            cube((5, 5)).isel(x=[0, 1, 4]),
            cube((5, 5), crs=4326, pixel=1e-5),
            cube((5, 5), crs=32633, pixel=1e9),
        ],
    )
    def test_it_never_raises(self, odd):
        assert repr(odd.chmv2).startswith("<xchmv2 accessor of a ")
        ET.fromstring(odd.chmv2._repr_html_())

    def test_an_error_of_another_kind_is_told_too(self, monkeypatch):
        def broken(*args):
            raise KeyError("odd")

        monkeypatch.setattr("xchmv2.imagery.overview.find_grid", broken)
        assert "  CRS         not clear (KeyError)" in repr(cube((5, 5)).chmv2)


class TestDocs:
    @pytest.mark.filterwarnings("ignore::xchmv2.errors.DemoModelWarning")
    def test_the_examples_print_what_the_page_says(self):
        page = (Path(__file__).parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
        codes = re.findall(r"```python\n(# Runs as it stands.*?)```", page, re.DOTALL)
        printed = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
        shown = []
        scope = {"print": shown.append}
        for code in codes:
            exec(code, scope)
        assert len(printed) == 2
        assert [repr(each) for each in shown] == [text.rstrip("\n") for text in printed]


def test_the_accessor_is_printed_without_torch():
    code = (
        "import sys, numpy as np, xarray as xr, xchmv2\n"
        "band = (('y', 'x'), np.zeros((4, 4), 'u1'))\n"
        "ds = xr.Dataset({'red': band, 'green': band, 'blue': band})\n"
        "assert 'can run' in repr(ds.chmv2) and ds.chmv2._repr_html_()\n"
        "print([name for name in ('torch', 'matplotlib', 'geopandas') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class TestPlot:
    def test_blocks_tiles_and_those_without_a_valid_pixel(self):
        pytest.importorskip("matplotlib")
        imagery = cube((400, 600))
        imagery["red"][:200, :300] = imagery["green"][:200, :300] = imagery["blue"][:200, :300] = 0
        planned = imagery.chmv2.plan(MODEL, nodata=0, block=256, **GRID)
        axes = planned.plot()
        tiles, _, blocks, _ = [c for c in axes.collections if hasattr(c, "get_segments")]
        assert len(blocks.get_segments()) == 1
        assert len(tiles.get_segments()) == len(planned.job.rows.starts) - 1
        assert axes.get_xlim()[1] == pytest.approx(0.36, rel=0.05)
        grey = axes.collections[0]
        assert len(grey.get_paths()) == planned.skipped.tiles > 20
        assert f"{planned.skipped.tiles} without a valid pixel" in axes.get_title()
        assert planned.plot(ax=axes) is axes
        planned.plot().figure.clear()

    def test_what_is_not_known_is_not_drawn(self):
        pytest.importorskip("matplotlib")
        imagery = cube((3000, 300), crs=None).drop_vars(["x", "y"]).chunk(y=1000)
        with pytest.warns(UserWarning, match="without a CRS"):
            axes = imagery.chmv2.plan(MODEL, nodata=0, block=300, **GRID).plot()
        assert axes.get_xlabel() == "x [px]"
        assert "valid" not in axes.get_title()
        lines = [c for c in axes.collections if hasattr(c, "get_segments")]
        assert len(lines[0].get_segments()) == 0  # 62 rows of tiles are more than can be seen

    def test_a_missing_library_is_named(self, monkeypatch):
        planned = cube((64, 96)).chmv2.plan(MODEL, **GRID)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        message = r'matplotlib, which draws a plan, is not installed; pip install "xchmv2\[plot\]"'
        with pytest.raises(CHMv2Error, match=message):
            planned.plot()
