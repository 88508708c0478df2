"""The benchmark: every part runs small, and its rows hold what they say."""

import itertools
import json
import os
import runpy
import sys
import time
from collections import Counter
from dataclasses import replace

import click.testing
import numpy as np
import pytest
import reference
import torch

from tests.benchmarks import command, graph, model, published, scene, size, tiles
from tests.benchmarks.choice import measure_choice
from tests.benchmarks.imagery import ORIGIN, as_cube, generated, noise
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.memory import in_child
from tests.benchmarks.networks import CONFIGS, SMALLER, count_flop, write_checkpoint
from tests.benchmarks.peak import matmul
from tests.benchmarks.report import Table, to_json, update_document
from tests.benchmarks.settings import Settings
from tests.benchmarks.timing import Times, interleave
from xchmv2.errors import CHMv2Error, ConfigError
from xchmv2.inference import ModelSpec, Predictor, clear_models, get_predictor, hold_predictor
from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run that takes milliseconds."""
    folder = write_checkpoint("tiny", tmp_path_factory.mktemp("tiny"))
    return Settings(
        str(folder), "tiny", tile=64, overlap=9, side=150, batch=2, runs=2, threads=1,
        compiled=False, workers=(1, 2), seconds_per_tile=1e-4, blocks_per_worker=4,
        graph_side=2 * 4096, graph_dates=2,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """No processes: children take seconds to start; one test starts one."""

    def run(work, *args, device, threads):
        return work(*args), 100.0

    for part in (model, size, graph):
        monkeypatch.setattr(part, "in_child", run)


class TestTiming:
    def test_ratios_are_medians_of_pairs_under_a_fake_clock(self):
        spent = {"a": iter([9, 1, 2, 4]), "b": iter([9, 3, 2, 40])}
        now = [0.0]
        order = []

        def action(name):
            def run():
                order.append(name)
                now[0] += next(spent[name])

            return run

        found = interleave({n: action(n) for n in "ab"}, 3, clock=lambda: now[0])
        assert "".join(order) == "abababab"
        assert found.seconds == {"a": (1, 2, 4), "b": (3, 2, 40)}
        assert found.median("a") == 2
        assert found.shortest("b") == 2
        assert found.ratio("a", "b") == 3  # of 3, 1 and 10
        assert found.ratio("b", "a") == pytest.approx(1 / 3)
        assert found.best_of(["a", "b", "gone"]) == "a"
        assert found.best_of(["gone"]) is None

    def test_what_fails_or_takes_too_long_is_not_repeated(self):
        now = [0.0]
        calls = []

        def slow():
            calls.append("slow")
            now[0] += 100

        def broken():
            raise OSError("no compiler\nin sight")

        def quick():
            now[0] += 1

        found = interleave(
            {"slow": slow, "broken": broken, "quick": quick}, 3, patience=60, clock=lambda: now[0]
        )
        assert found.failed == {"broken": "OSError: no compiler"}
        assert found.seconds == {"slow": (100,), "quick": (1, 1, 1)}
        assert len(calls) == 2
        assert found.ratio("quick", "slow") == 100

    def test_processor_time_is_not_spent_asleep(self, settings):
        wait = {"sleep": lambda: time.sleep(0.05)}
        for clock, least, most in (("wall", 0.05, 60), ("cpu", 0, 0.04)):
            timer = replace(settings, clock=clock).timer
            assert least <= interleave(wait, 1, clock=timer).median("sleep") < most

    def test_matrix_products_count_their_operations(self):
        action, flop = matmul("cpu", torch.float32)
        assert flop == 2 * len(action()) ** 3


def test_operations_are_those_of_linear_layers_and_attention():
    layer = torch.nn.Linear(8, 16)
    assert count_flop(lambda: layer(torch.ones(3, 8))) == 2 * 3 * 8 * 16
    q = torch.ones(1, 1, 5, 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flop(lambda: attend(q, q, q)) == 2 * (2 * 5 * 5 * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child may inherit the figure")
def test_memory_is_that_of_the_work_alone():
    held = np.ones(1200 * 2**20, np.uint8)  # of this process, not of the child
    found, peak = in_child(len, "abc", device="cpu", threads=1)
    assert found == 3
    assert 50 < peak < 1200
    assert held.all()


class TestNetworks:
    def test_both_implementations_load_the_same_random_weights(self, settings):
        pixels = model.tiles(settings)
        with torch.inference_mode():
            ours, theirs = (
                model.load(settings, who, "float32")(pixels) for who in (model.OURS, model.THEIRS)
            )
        assert ours.std() > 0.01  # not one height everywhere
        assert ((ours - theirs).abs() / (1 + theirs)).max() < 1e-5

    def test_vit_l_is_the_published_architecture(self):
        assert "vit-l" not in SMALLER
        assert CHMv2Config().backbone.num_hidden_layers == 24
        assert CHMv2Config().backbone.hidden_size == 1024
        assert set(SMALLER) | {"vit-l", "demo"} == set(CONFIGS)

    def test_an_unknown_config(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"expected one of vit-l, .*, found config='huge'; for example"
        ):
            write_checkpoint("huge", tmp_path)


class TestScripts:
    def test_the_careful_script_has_the_heights_of_predict(self, settings):
        image = noise(settings.side)
        forward = published.published_forward(published.load_published(settings.folder, "cpu"))
        options = {"batch": settings.batch, "device": "cpu"}
        script = published.careful_script(forward, image, *scene.scene_axes(settings), **options)
        found = scene.predicted(settings, as_cube(image).chunk(y=75, x=75)).values
        np.testing.assert_allclose(script, found, atol=5e-4)

    def test_the_sliding_window_averages_tiles_that_overlap_by_half(self, settings):
        image = noise(150)
        shapes = []

        def first_column(pixels):
            shapes.append(tuple(pixels.shape))
            return torch.ones(len(pixels), 64, 64) * pixels[:, 0, :1, :1]

        found = published.sliding_window(first_column, image, 64, batch=3, device="cpu")
        starts = [0, 32, 64, 86]
        assert published.half_overlapping_tiles((150, 150), 64) == 16
        assert sum(shape[0] for shape in shapes) == 16
        assert max(shape[0] for shape in shapes) == 3
        at = [s for s in starts if s <= 90 < s + 64]
        corners = [(image[0, y, x] / 255 - 0.42) / 0.213 for y, x in itertools.product(at, at)]
        assert found[90, 90] == pytest.approx(np.mean(corners), abs=1e-4)

    def test_transformers_missing(self, settings, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        monkeypatch.setattr(published, "transformers_version", lambda: None)
        with pytest.raises(CHMv2Error, match=r"expected transformers .* found none; .*benchmark"):
            published.load_published(settings.folder, "cpu")

    def test_imagery_lies_where_its_tiles_are_counted_from(self):
        cube = as_cube(np.zeros((2, 3, 32, 40), np.uint8))
        assert cube.dims == ("time", "band", "y", "x")
        assert float(cube.x[0]) == pytest.approx((ORIGIN[1] + 0.5) * 0.6)
        assert float(cube.y[0]) == pytest.approx(-(ORIGIN[0] + 0.5) * 0.6)
        lazy = generated(100, 40)
        assert lazy.shape == (3, 100, 100)
        np.testing.assert_array_equal(lazy.values, generated(100, 100).values)


class TestParts:
    def test_model(self, settings, here):
        (table,) = model.measure_model(settings)
        assert [(r["implementation"], r["precision"]) for r in table.rows] == [
            ("xchmv2", "float32"), ("transformers", "float32"),
            ("xchmv2", "bfloat16"), ("transformers", "bfloat16"), ("best of each", ""),
        ]  # fmt: skip
        for row in table.rows[:4]:
            assert row["tiles/s"] > 0
            assert row["share of peak"] > 0
            assert (row["ratio"] is None) == (row["implementation"] == "transformers")
        assert table.rows[-1]["remark"].count("against") == 1

    def test_a_network_that_would_take_too_long_is_not_run(self, settings, here):
        (table,) = model.measure_model(replace(settings, patience=0.0))
        assert {row["tiles/s"] for row in table.rows} == {None}
        assert table.rows[0]["remark"].startswith("not run: ")

    def test_compiled_rows_say_why_they_are_empty(self, settings):
        times = Times({}, {"xchmv2 float32 compiled": "InvalidCxxCompiler: no compiler"})
        row = model._row(settings, times, {}, 1.0, "xchmv2", "float32", "compiled")
        assert row["tiles/s"] is None
        assert row["remark"] == "InvalidCxxCompiler: no compiler"

    def test_scene(self, settings):
        (table,) = scene.measure_scene(settings)
        rows = {row["way"]: row for row in table.rows}
        ys, xs = (reference.starts(150, 64, 9, origin)[0] for origin in ORIGIN)
        assert rows[scene.COMPUTE]["tiles"] == len(ys) * len(xs)
        assert rows[scene.SLIDING]["tiles"] == 16
        assert rows[scene.CAREFUL]["times as fast as the script"] == 1
        assert rows[scene.BARE]["bare forwards / time"] == 1
        for row in rows.values():
            assert row["km2/s"] == pytest.approx(0.36 * row["Mpx/s"])

    def test_size(self, settings, here):
        (table,) = size.measure_size(settings)
        assert [row["side [px]"] for row in table.rows] == [150, 300, 600]
        for row in table.rows:
            ys, xs = (reference.starts(row["side [px]"], 64, 9, origin)[0] for origin in ORIGIN)
            assert row["tiles"] == len(ys) * len(xs)
            assert row["ms/tile"] * row["tiles"] == pytest.approx(
                1e3 * row["s/Mpx"] * row["side [px]"] ** 2 / 1e6
            )

    def test_graph(self, settings, here):
        (table,) = graph.measure_graph(settings)
        assert [row["blocks"] for row in table.rows] == [2 * 4, 2 * 16]
        # Per date: 3 x 3 groups, 2 x 2 blocks; 7 x 7 and 4 x 4; and one digest of the imagery.
        assert [row["tasks"] for row in table.rows] == [2 * (9 + 4 + 1), 2 * (49 + 16 + 1)]

    def test_scaling(self, settings):
        pytest.importorskip("distributed")
        from tests.benchmarks.scaling import measure_scaling

        (table,) = measure_scaling(settings)
        assert [row["workers"] for row in table.rows] == [1, 2]
        for row in table.rows:
            assert row["tiles forwarded / needed"] == 1
            assert 0 < row["efficiency"] < 1
            assert row["CPU [s]"] > 0

    def test_tiles(self, settings):
        counted, batches, blocks = tiles.measure_tiles(settings)
        assert {row["forwarded / needed"] for row in counted.rows} == {1}
        valid = np.zeros((640, 640), bool)
        valid[:, :213] = True
        ys, xs = (reference.starts(640, 64, 9, origin)[0] for origin in ORIGIN)
        needed = sum(valid[y : y + 64, x : x + 64].any() for y, x in itertools.product(ys, xs))
        assert {row["needed"] for row in counted.rows} == {needed}
        assert {row["tiles of the grid"] for row in counted.rows} == {len(ys) * len(xs)}
        assert [row["batch"] for row in batches.rows] == [1, 2, 4]
        assert batches.rows[0]["time added"] == pytest.approx(0, abs=1e-12)  # of measured times
        assert blocks.rows[0]["time added"] == 0

    def test_choice(self, settings):
        (table,) = measure_choice(replace(settings, side=160, tile=128, runs=1))
        rows = {(row["tile [px]"], row["overlap [px]"]): row for row in table.rows}
        assert set(rows) == {(128, overlap) for overlap in (0, 9, 18, 32, 64)}
        assert rows[128, 64]["RMS change [m]"] == 0
        assert rows[128, 0]["RMS change [m]"] > 0.01
        assert rows[128, 18]["cost"] == 1
        assert rows[128, 64]["cost"] == pytest.approx((110 / 64) ** 2)


def test_small_batches_are_added_up():
    groups = Counter({9: 2, 3: 4, 1: 4})  # 34 tiles
    seconds = {1: 2.0, 2: 3.0, 4: 4.0}  # 1 s a tile at best
    alone = 2 * (4 + 4 + 2) + 4 * 3.5 + 4 * 2
    assert tiles.cost_of_groups(groups, 4, seconds) == pytest.approx(alone / 34)
    assert tiles.cost_of_groups(groups, 1, seconds) == 1
    found = tiles.group_sizes(448, 64, 4096, 8)
    ys, xs = (len(reference.starts(8 * 4096, 448, 64, origin)[0]) for origin in ORIGIN)
    assert sum(size * count for size, count in found.items()) == ys * xs
    assert found.total() == 15**2


class TestReport:
    rows = (
        {"a": 1, "b": 0.12345, "c": None, "d": "x | y"},
        {"a": 12345, "b": 0.0, "c": 2, "d": ""},
    )

    def test_markdown(self):
        assert Table("part", "Title", self.rows, "Notes.").to_markdown() == (
            "**Title**\n\n| a | b | c | d |\n| --- | --- | --- | --- |\n"
            "| 1 | 0.123 | - | x / y |\n| 12,345 | 0.00 | 2 |  |\n\nNotes.\n"
        )

    def test_json(self):
        found = json.loads(to_json({"name": "m"}, {"tile": 64}, [Table("part", "T", self.rows)]))
        assert found["tables"][0]["rows"][0]["b"] == 0.12345
        assert found["machine"] == {"name": "m"}

    def test_a_document_is_updated_between_markers(self, tmp_path):
        path = tmp_path / "doc.md"
        path.write_text("a\n<!-- benchmark: size -->\nold\n<!-- end: size -->\nb\n")
        update_document(path, "size", "new \\1")
        update_document(path, "size", "new \\1")
        assert path.read_text() == ("a\n<!-- benchmark: size -->\nnew \\1\n<!-- end: size -->\nb\n")
        with pytest.raises(CHMv2Error, match=r"expected <!-- benchmark: model --> .*without them"):
            update_document(path, "model", "new")

    def test_the_machine_has_a_name(self):
        machine = describe_machine("cpu", 1)
        assert f"{os.cpu_count()} cores" in machine["name"]
        assert machine["torch"] == torch.__version__


class TestCommand:
    def run(self, *given):
        return click.testing.CliRunner().invoke(command.main, list(given))

    def test_tables_on_screen_and_in_files(self, tmp_path, here, monkeypatch):
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
        document = tmp_path / "doc.md"
        document.write_text("<!-- benchmark: size -->\n<!-- end: size -->\n")
        options = ["--config", "tiny", "--tile", "64", "--overlap", "9", "--side", "96"]
        found = self.run(
            "size", *options, "--output", str(tmp_path), "--update", str(document), "--no-compile"
        )
        assert found.exit_code == 0, found.output
        name = describe_machine("cpu", 1)["name"]
        line = "python -m tests.benchmarks size --config tiny --tile 64 --overlap 9 --side 96"
        for text in (found.output, document.read_text(), (tmp_path / "benchmark.md").read_text()):
            assert name in text
            assert f"{line} --no-compile`" in text
            assert "| 16 x | 384 |" in text
        parsed = json.loads((tmp_path / "benchmark.json").read_text())
        assert parsed["machine"]["name"] == name
        assert parsed["settings"]["tile"] == 64
        assert [row["area"] for row in parsed["tables"][0]["rows"]] == ["1 x", "4 x", "16 x"]

    def test_all_parts_are_there(self):
        assert list(command.PARTS) == [
            "model", "scene", "size", "graph", "scaling", "tiles", "choice"
        ]  # fmt: skip
        assert self.run("--help").exit_code == 0

    def test_errors_are_one_line(self):
        found = self.run("graph", "--tile", "450")
        assert found.exit_code == 1
        assert "Error: expected a tile that is a multiple of 32 px, found tile=450" in found.output
        assert self.run("nonsense").exit_code == 2

    def test_a_gpu_gets_a_larger_scene_and_has_no_processor_clock(self, monkeypatch, tmp_path):
        monkeypatch.setattr(command, "validate_device", lambda device: None)
        monkeypatch.setattr(command, "resolve_device", lambda device: "cuda:0")
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
        given = {"tile": 64, "overlap": 0, "device": "auto", "dtype": "auto", "clock": "wall"}
        found = command._settings(tmp_path, "tiny", given | {"batch": 3, "side": None})
        assert (found.side, found.block, found.batch, found.device) == (8192, 4096, 3, "cuda:0")
        found = self.run("graph", "--clock", "cpu")
        assert found.exit_code == 1
        assert "Error: expected --clock wall on a GPU, found --clock cpu" in found.output

    def test_the_module_runs(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module("tests.benchmarks", run_name="__main__")
        assert "Usage: python -m tests.benchmarks" in capsys.readouterr().out


def test_a_predictor_is_held_for_a_spec():
    spec = ModelSpec("somebody's", None, "1" * 64, "2" * 64, "cpu", "float32")
    network = CHMv2ForDepthEstimation(reference.tiny_config())
    held = Predictor(network, device="cpu", dtype="float32", mean=(0, 0, 0), std=(1, 1, 1))
    hold_predictor(spec, held)
    assert get_predictor(spec) is held
    clear_models()
    with pytest.raises(CHMv2Error, match="somebody's"):
        get_predictor(spec)
