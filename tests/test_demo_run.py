import math
import re
import shlex
import sys
import warnings

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from conftest import no_compute
from hypothesis import given
from hypothesis import strategies as st

import xchmv2.predict
from xchmv2.cli import main
from xchmv2.demo.run import (
    SEED,
    SIZE,
    _make_forest,
    _write_next_steps,
    _write_tables,
    run_demonstration,
)
from xchmv2.demo.truth import HeightScore, LossScore, _find_loss, score_heights, score_losses
from xchmv2.errors import CHMv2Error, DemoModelWarning

# Private imports: the parts of `xchmv2 demo`, which is a command.

SMALL = dict(size=96, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint):
    """A small demonstration, made once, and what it said meanwhile."""
    lines = []
    folder = tmp_path_factory.mktemp("demo") / "new folder"
    return run_demonstration(folder, model=tiny_checkpoint, report=lines.append, **SMALL), lines


class TestForest:
    def test_stays_lazy_and_tells_kinds_as_flags(self):
        with no_compute():
            forest = _make_forest(3, 96)
        assert dict(forest.sizes)["time"] == 3
        assert "true_height" in forest
        meanings = forest.event_kind.attrs["flag_meanings"].split()
        kinds = [meanings[code] for code in forest.event_kind.values]
        assert kinds.count("clear_cut") >= 2
        assert "windthrow" in kinds

    def test_the_default_scene_shows_loss_in_both_steps_and_a_little_cloud(self):
        forest = _make_forest(SEED, SIZE)
        struck = (forest.disturbance > 0).mean(("y", "x")).values
        assert struck[0] == 0
        assert (struck[1:] > 0.07).all()
        cloud = 1 - forest.valid.mean(("y", "x")).values
        assert cloud[0] == cloud[2] == 0
        assert 0.01 < cloud[1] < 0.08


class TestRun:
    def test_the_store_holds_everything(self, made):
        store = made[0].store
        assert (store / "zarr.json").is_file()
        cube = xr.open_zarr(store, consolidated=False, decode_coords="all")
        truth = _make_forest(seed=3, size=96).compute()
        for name in ("red", "green", "blue", "valid", "true_height", "disturbance", "land_cover"):
            np.testing.assert_array_equal(cube[name], truth[name])
        assert cube.canopy_height.dims == ("time", "y", "x")
        assert cube.canopy_height.attrs["standard_name"] == "canopy_height"
        assert len(cube.canopy_height.attrs["chmv2_weights_sha256"]) == 64
        np.testing.assert_array_equal(cube.canopy_height.notnull(), truth.valid)
        assert cube.canopy_height.odc.crs == truth.red.odc.crs
        np.testing.assert_array_equal(cube.time, truth.time)
        assert cube.attrs == truth.attrs

    def test_scores_are_those_of_the_store(self, made):
        cube = xr.open_zarr(made[0].store, consolidated=False).load()
        assert made[0].heights == score_heights(cube.canopy_height, cube.true_height)
        assert made[0].losses == score_losses(cube.canopy_height, cube.true_height)
        assert made[0].megapixels == 3 * 96 * 96 / 1e6
        assert 0 < made[0].seconds < 60

    def test_the_picture(self, made):
        from matplotlib.image import imread

        picture = imread(made[0].picture)
        assert picture.shape[1] > picture.shape[0] > 900
        # Nothing runs over the edge.
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edge == 1).all()

    def test_it_says_what_it_does(self, made):
        demonstration, lines = made
        assert lines == [
            "Growing a synthetic forest of 58 x 58 m, seen on 3 dates",
            f"Predicting its canopy height into {demonstration.store}",
            f"Drawing {demonstration.picture}",
        ]
        assert "2021-08-25" in demonstration.tables

    def test_nothing_is_overwritten_unless_asked(self, made, tiny_checkpoint, monkeypatch):
        folder = made[0].store.parent
        message = (
            r"demo.zarr and demo.png in '.*new folder' would be overwritten; "
            r"name another folder, or replace them: xchmv2 demo '.*new folder' --overwrite"
        )
        with pytest.raises(CHMv2Error, match=message):
            run_demonstration(folder, model=tiny_checkpoint, **SMALL)
        with pytest.raises(CHMv2Error):
            run_demonstration(folder, model=tiny_checkpoint, size=0, overwrite=True)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(CHMv2Error, match=r'pip install "xchmv2\[plot\]"'):
            run_demonstration(folder, model=tiny_checkpoint, overwrite=True, **SMALL)
        assert made[0].store.is_dir()
        assert made[0].picture.is_file()

    def test_the_demo_models_own_warning_is_not_repeated(
        self, tmp_path, tiny_checkpoint, monkeypatch
    ):
        original = xchmv2.predict.predict

        def warning(*args, **options):
            warnings.warn("synthetic forest alone", DemoModelWarning, stacklevel=2)
            return original(*args, **options)

        monkeypatch.setattr(xchmv2.predict, "predict", warning)
        run_demonstration(tmp_path, model=tiny_checkpoint, size=64)

    # Five steps of training teach little.
    @pytest.mark.filterwarnings("ignore:fine-tuning gained little")
    def test_the_next_steps_work_as_printed(self, made, tiny_checkpoint, monkeypatch):
        blocks = re.findall(r"(?:^     .*\n?)+", made[0].next_steps, re.MULTILINE)
        assert len(blocks) == 3
        for block in blocks[:2]:
            code = re.sub("^     ", "", block, flags=re.MULTILINE)
            exec(code.replace('"demo"', repr(str(tiny_checkpoint))), {})
        height = xr.open_dataarray(made[0].store.with_name("height.tif"), engine="rasterio")
        assert np.isfinite(height).all()
        program, *words = shlex.split(blocks[2])
        assert program == "xchmv2"
        small = {"demo": str(tiny_checkpoint), "128": "32", "2": "1"}
        result = CliRunner().invoke(main, [small.get(word, word) for word in words])
        assert result.exit_code == 0, result.output
        assert made[0].store.with_name("my-model").is_dir()


def cubes(*planes):
    """Heights on some dates, pixels of 0.5 m."""
    values = np.stack([np.asarray(p, float) for p in planes])
    coords = {
        "time": np.array([f"20{10 + k}-07-01" for k in range(len(planes))], "datetime64[ns]"),
        "y": -0.5 * np.arange(values.shape[1]),
        "x": 0.5 * np.arange(values.shape[2]),
    }
    return xr.DataArray(values, coords, ("time", "y", "x"))


def naive_loss(before, after):
    """A pixel is lost if any 3 x 3 square around it dropped as a whole."""
    rows, cols = before.shape
    lost = np.zeros((rows, cols), bool)
    for y in range(rows - 2):
        for x in range(cols - 2):
            square = (slice(y, y + 3), slice(x, x + 3))
            if all(b - a > 5 for b, a in zip(before[square].flat, after[square].flat, strict=True)):
                lost[square] = True
    return lost


class TestScores:
    def test_heights(self):
        truth = cubes([[0, 10], [20, 30]])
        predicted = cubes([[2, 9], [20, np.nan]])
        (score,) = score_heights(predicted, truth)
        assert score.date == "2010-07-01"
        assert score.mae == pytest.approx(1)
        assert score.bias == pytest.approx(1 / 3)
        assert score.r2 == pytest.approx(1 - 5 / 200)

    def test_heights_without_spread_or_prediction(self):
        assert math.isnan(score_heights(cubes([[1, 2]]), cubes([[3, 3]]))[0].r2)
        assert math.isnan(score_heights(cubes([[np.nan]]), cubes([[3]]))[0].mae)

    @given(st.integers(3, 12), st.integers(3, 12), st.integers(0, 999))
    def test_loss_against_a_loop(self, rows, cols, seed):
        rng = np.random.default_rng(seed)
        before, after = rng.choice(
            [20.0, 20.0, 13.0, np.nan], (2, rows, cols), p=(0.5, 0.4, 0.08, 0.02)
        )
        after = after - 7
        np.testing.assert_array_equal(_find_loss(before, after), naive_loss(before, after))

    def test_areas_and_overlap(self):
        forest = np.full((20, 20), 15.0)
        true, found, hidden = forest.copy(), forest.copy(), forest.copy()
        true[:10, :10] = 0
        found[5:15, :10] = 0
        hidden[:, :10] = np.nan
        loss, regrowth = score_losses(cubes(forest, found, forest), cubes(forest, true, forest))
        assert (loss.years, regrowth.years) == ("2010 to 2011", "2011 to 2012")
        assert loss.true_area == loss.found_area == pytest.approx(100 * 0.25 / 1e4)
        assert loss.overlap == pytest.approx(50 / 150)
        assert regrowth.true_area == regrowth.found_area == 0
        assert math.isnan(regrowth.overlap)
        (unseen,) = score_losses(cubes(forest, hidden), cubes(forest, true))
        assert unseen.true_area == 0


class TestReport:
    def test_tables(self):
        text = _write_tables(
            [HeightScore("2019-07-01", 2.345, -0.5, 0.876)],
            [LossScore("2019 to 2021", 1.05, 0.999, 0.8)],
            megapixels=3.0,
            seconds=2.0,
        )
        assert text.splitlines()[:5] == [
            "height              MAE       bias      R2",
            "2019-07-01       2.35 m    -0.50 m    0.88",
            "",
            "forest lost        truth      found   overlap",
            "2019 to 2021     1.05 ha    1.00 ha      0.80",
        ]
        assert "1.50 megapixels per second" in text
        assert "elsewhere its heights mean nothing" in text
        assert max(map(len, text.splitlines())) <= 90

    def test_next_steps_survive_a_folder_with_spaces(self, tmp_path):
        text = _write_next_steps(tmp_path / "my demo" / "demo.zarr")
        assert shlex.split(text.splitlines()[-1])[2] == str(tmp_path / "my demo" / "image.tif")
