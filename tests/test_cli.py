import errno
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import rioxarray
import xarray as xr
from click.testing import CliRunner
from conftest import cube

import xchmv2
from xchmv2 import cli
from xchmv2.cli import main
from xchmv2.demo import run as demonstration
from xchmv2.training import FineTuned


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def rasters(tmp_path_factory):
    """An image, and heights that its green band tells, as GeoTIFFs."""
    folder = tmp_path_factory.mktemp("rasters")
    imagery = cube((160, 192))
    wave = np.add.outer(np.sin(np.arange(160) / 15), np.cos(np.arange(192) / 20)) + 2
    imagery["green"].values[:] = wave * 60
    height = (imagery["red"] * 0 + wave * 8).astype("float32").odc.assign_crs(32633)
    imagery.to_dataarray("band").odc.assign_crs(32633).rio.to_raster(folder / "image.tif")
    height.rio.to_raster(folder / "lidar.tif")
    return folder / "image.tif", folder / "lidar.tif"


class TestMain:
    def test_as_a_module(self):
        found = subprocess.run(
            [sys.executable, "-m", "xchmv2", "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout == f"xchmv2, version {xchmv2.__version__}\n"

    def test_help_comes_without_torch(self):
        code = (
            "import sys; from click.testing import CliRunner; from xchmv2.cli import main; "
            "print(CliRunner().invoke(main, ['--help']).output); "
            "print(sorted({'torch', 'scipy', 'matplotlib', 'rioxarray'} & set(sys.modules)))"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert "fine-tune" in found.stdout
        assert found.stdout.endswith("[]\n")

    def test_help_states_the_defaults(self):
        text = " ".join(run("demo", "--help").output.split())
        assert f"[default: ({demonstration.SIZE}); x>=64]" in text
        assert f"[default: ({demonstration.SEED}); x>=0]" in text
        assert "[default: 448]" in run("fine-tune", "--help").output

    @pytest.mark.parametrize(
        "words",
        [
            ["predict-all"],
            ["demo", "--size", "10"],
            ["demo", "--seed", "-1"],
            ["fine-tune", "a.tif", "b.tif"],
            ["fine-tune", "a.tif", "b.tif", "out", "--bands", "1", "2"],
            ["fine-tune", "a.tif", "b.tif", "out", "--train", "neck"],
        ],
    )
    def test_wrong_usage(self, words):
        result = run(*words)
        assert result.exit_code == 2
        assert "Error: " in result.stderr
        assert result.stdout == ""

    def test_a_closed_pipe_is_no_error(self, monkeypatch):
        def closed(*args, **options):
            raise OSError(errno.EPIPE, "broken pipe")

        monkeypatch.setattr(demonstration, "run_demonstration", closed)
        result = run("demo")
        assert result.exit_code == 1
        assert result.output == ""


class TestDemo:
    def test_it_runs_and_then_refuses_to_overwrite(self, tmp_path, tiny_checkpoint):
        words = ["demo", tmp_path, "--size", 64, "--model", tiny_checkpoint]
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        for part in ("MAE", "forest lost", "megapixels per second", "3. Fine-tune", "demo.png"):
            assert part in result.stdout
        again = run(*words)
        assert again.exit_code == 1
        assert again.stdout == ""
        assert again.stderr.startswith("error: expected no demo.zarr or demo.png in")
        assert "xchmv2 demo --overwrite" in again.stderr
        (tmp_path / "demo.png").write_text("old")
        replaced = run(*words, "--overwrite", "--seed", 1)
        assert replaced.exit_code == 0, replaced.output
        cube = xr.open_zarr(tmp_path / "demo.zarr", consolidated=False)
        assert cube.attrs["source"].endswith("seed 1")
        assert (tmp_path / "demo.png").stat().st_size > 10_000

    def test_a_folder_that_cannot_be_made(self, tmp_path, tiny_checkpoint):
        (tmp_path / "file").touch()
        result = run("demo", tmp_path / "file" / "in", "--size", 64, "--model", tiny_checkpoint)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: [Errno")

    def test_a_model_that_is_not_there(self, tmp_path):
        result = run("demo", tmp_path, "--size", 64, "--model", "no-such-folder")
        assert result.exit_code == 1
        assert "error: expected a folder with config.json" in result.stderr


FAST = ["--tile", 64, "--epochs", 2, "--batch-size", 2, "--lr", 1e-3, "--device", "cpu"]


class TestFineTune:
    def test_it_trains_and_says_how_to_use_the_folder(self, rasters, tmp_path, tiny_checkpoint):
        image, lidar = rasters
        out = tmp_path / "tuned"
        result = run("fine-tune", image, lidar, out, "--model", tiny_checkpoint, *FAST)
        assert result.exit_code == 0, result.output
        assert "Validation MAE: " in result.stdout
        assert f"imagery.chmv2.predict(model={str(out)!r})" in result.stdout
        assert "step" in result.stderr  # the progress bar
        height = rioxarray.open_rasterio(image).chmv2.predict(model=out, tile=64, overlap=16)
        assert np.isfinite(height).all()

    def test_it_says_when_no_epoch_did_better(self, tmp_path):
        history = pd.DataFrame({"epoch": [0, 1], "validation_mae": [3.0, 3.5]})
        said = cli._describe(FineTuned(tmp_path / "tuned", history, 0))
        assert said.startswith("Validation MAE: 3.00 m before, and no epoch did better")

    def test_existing_output_is_left_alone(self, rasters, tmp_path, tiny_checkpoint):
        (tmp_path / "tuned").mkdir()
        again = run("fine-tune", *rasters, tmp_path / "tuned", "--model", tiny_checkpoint, *FAST)
        assert again.exit_code == 1
        assert "error: expected an output folder that does not exist yet" in again.stderr

    def test_options_reach_the_training(self, rasters, tmp_path, monkeypatch):
        seen = {}

        def fine_tune(imagery, reference, **options):
            seen.update(options, imagery=imagery, reference=reference)
            raise xchmv2.CHMv2Error("a", "b", "c")

        monkeypatch.setattr("xchmv2.training.fine_tune", fine_tune)
        words = "--model m --train all --epochs 3 --batch-size 4 --lr 0.01 --tile 96 --validation 0"
        words += (
            " --resolution 0.6 --bands 3 2 1 --value-range 0 3000 --nodata 0 --seed 5 --device cpu"
        )
        result = run("fine-tune", *rasters, tmp_path / "out", *words.split())
        assert result.exit_code == 1
        assert result.stderr == "error: expected a, found b; c\n"
        assert seen.pop("imagery").shape == (3, 160, 192)
        assert seen.pop("reference").shape == (1, 160, 192)
        assert seen == {
            "output": str(tmp_path / "out"),
            "model": "m",
            "train": "all",
            "epochs": 3,
            "batch_size": 4,
            "lr": 0.01,
            "tile": 96,
            "validation": 0.0,
            "resolution": 0.6,
            "bands": (3, 2, 1),
            "value_range": (0.0, 3000.0),
            "nodata": 0.0,
            "seed": 5,
            "device": "cpu",
        }

    def test_nothing_held_out(self, rasters, tmp_path, tiny_checkpoint):
        words = [*FAST, "--validation", 0, "--epochs", 1]
        result = run("fine-tune", *rasters, tmp_path / "out", "--model", tiny_checkpoint, *words)
        assert result.exit_code == 0, result.output
        assert "Nothing was held out" in result.stdout

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["missing.tif", "lidar.tif", "out"], "error: missing.tif: No such file"),
            (["image.tif", "lidar.tif", "out", "--bands", "1", "2", "9"], "three different bands"),
            (["image.tif", "lidar.tif", "out", "--tile", "50"], "a multiple of 32"),
            (
                ["image.tif", "lidar.tif", "out", "--epochs", "0"],
                "epochs, batch_size and patience above 0",
            ),
            (["image.tif", "image.tif", "out"], "reference heights with dims y and x"),
            (["image.tif", "lidar.tif", "out", "--device", "abacus"], "abacus"),
        ],
    )
    def test_bad_input(self, rasters, tmp_path, tiny_checkpoint, monkeypatch, words, message):
        monkeypatch.chdir(rasters[0].parent)
        result = run("fine-tune", "--model", tiny_checkpoint, *FAST, *words)
        assert result.exit_code == 1, result.exception
        assert result.stderr.startswith("error: ")
        assert message in result.stderr

    def test_a_file_of_several_rasters(self, monkeypatch):
        monkeypatch.setattr(rioxarray, "open_rasterio", lambda *args, **options: [])
        with pytest.raises(
            xchmv2.CHMv2Error, match=r"one raster in 'a.nc', found several; name one"
        ):
            cli._read("a.nc")
