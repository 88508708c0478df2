import errno
import json
import re
import subprocess
import sys
import warnings

import catalogue as catalogue_of
import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from click.testing import CliRunner
from conftest import cube
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

import xchmv2
from xchmv2.cli import _open_raster, main
from xchmv2.demo import run as demonstration

# Private imports: a part of the command, and a demo that takes no time.

# Two epochs of a tiny model gain nothing, which is warned of.
pytestmark = pytest.mark.filterwarnings("ignore:fine-tuning gained little")


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
            "heavy = {'torch', 'scipy', 'dask', 'odc', 'matplotlib', 'rioxarray'}; "
            "print(sorted(heavy & set(sys.modules)))"
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
            ["fine-tune", "a.tif", "b.tif", "out", "--bands", "1,2"],
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

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (KeyError("band"), "error: KeyError: 'band'; XCHMV2_DEBUG=1 shows where it was raised"),
            (RuntimeError("first\n  second"), "error: RuntimeError: first second; XCHMV2_DEBUG"),
            (AssertionError(), "error: AssertionError; XCHMV2_DEBUG=1"),
            (MemoryError(), "error: memory is full; pass a smaller --block or --tile"),
            (OSError(errno.ENOSPC, "No space left on device", "h.zarr"),
             "error: [Errno 28] No space left on device: 'h.zarr'"),
            (ModuleNotFoundError("No module named 'exactextract.x'", name="exactextract.x"),
             "error: the Python package exactextract is not installed; install it"),
            (xchmv2.CHMv2Error("a", "b", "c"), "error: expected a, found b; c"),
        ],
    )  # fmt: skip
    def test_any_error_is_one_line(self, monkeypatch, error, message):
        def fail(*args, **options):
            raise error

        monkeypatch.setattr(demonstration, "run_demonstration", fail)
        result = run("demo")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1
        monkeypatch.setenv("XCHMV2_DEBUG", "1")
        assert run("demo").stderr.startswith("Traceback (most recent call last)")

    def test_control_c(self, monkeypatch):
        said = ((), "")

        def interrupt(*args, **options):
            raise KeyboardInterrupt(*said[0])

        monkeypatch.setattr(demonstration, "run_demonstration", interrupt)
        for said in (((), "interrupted\n"), (("3 of 4",), "interrupted: 3 of 4\n")):
            result = run("demo")
            assert result.exit_code == 130
            assert result.stderr == said[1]

    def test_warnings_are_one_line_too(self, monkeypatch):
        def warn(*args, **options):
            warnings.warn("look at this", UserWarning, stacklevel=1)
            raise xchmv2.CHMv2Error("a", "b", "c")

        monkeypatch.setattr(demonstration, "run_demonstration", warn)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            result = run("demo")
        assert result.stderr == "warning: look at this\nerror: expected a, found b; c\n"


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
        assert again.stderr.startswith("error: demo.zarr and demo.png in")
        assert again.stderr.rstrip().endswith(f"xchmv2 demo {tmp_path} --overwrite")
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
        assert re.search(r"before +after +constant\ntraining .*\nvalidation ", result.stdout)
        assert f"imagery.chmv2.predict(model={str(out)!r})" in result.stdout
        assert "step" in result.stderr  # the progress bar
        height = rioxarray.open_rasterio(image).chmv2.predict(model=out, tile=64, overlap=16)
        assert np.isfinite(height).all()

    def test_existing_output_is_left_alone(self, rasters, tmp_path, tiny_checkpoint):
        (tmp_path / "tuned").mkdir()
        again = run("fine-tune", *rasters, tmp_path / "tuned", "--model", tiny_checkpoint, *FAST)
        assert again.exit_code == 1
        assert "exists already, and nothing is overwritten" in again.stderr

    def test_options_reach_the_training(self, rasters, tmp_path, monkeypatch):
        seen = {}

        def fine_tune(imagery, reference, **options):
            seen.update(options, imagery=imagery, reference=reference)
            raise xchmv2.CHMv2Error("a", "b", "c")

        monkeypatch.setattr("xchmv2.training.fine_tune", fine_tune)
        words = "--model m --train all --epochs 3 --batch-size 4 --lr 0.01 --tile 96 --validation 0"
        words += (
            " --resolution 0.6 --bands 3,2,1 --value-range 0,3000 --nodata 0 --seed 5 --device cpu"
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
            "valid": None,
        }

    def test_nothing_held_out(self, rasters, tmp_path, tiny_checkpoint):
        words = [*FAST, "--validation", 0, "--epochs", 1]
        result = run("fine-tune", *rasters, tmp_path / "out", "--model", tiny_checkpoint, *words)
        assert result.exit_code == 0, result.output
        assert "validation" not in result.stdout
        assert re.search(r"training +\d+\.\d\d", result.stdout)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["missing.tif", "lidar.tif", "out"], "error: missing.tif: No such file"),
            (["image.tif", "lidar.tif", "out", "--bands", "1,2,9"], "three different bands"),
            (["image.tif", "lidar.tif", "out", "--tile", "50"], "a multiple of 32"),
            (
                ["image.tif", "lidar.tif", "out", "--epochs", "0"],
                "epochs as a whole number of at least 1",
            ),
            (["image.tif", "image.tif", "out"], "reference heights of one date"),
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
            _open_raster("a.nc")


PREDICT = ["--tile", 64, "--overlap", 16, "--block", 96, "--device", "cpu"]


class TestPredict:
    def test_a_geotiff_in_and_a_cog_out(self, rasters, tmp_path, tiny_checkpoint):
        out = tmp_path / "height.tif"
        words = [*PREDICT, "--model", tiny_checkpoint, "--layers", "height,bin_spread"]
        result = run("predict", rasters[0], out, *words)
        assert result.exit_code == 0, result.output
        assert "megapixels per second" in result.stdout
        assert "4/4" in result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["height.tif"]
        expected = rioxarray.open_rasterio(rasters[0]).chmv2.predict(
            tiny_checkpoint, tile=64, overlap=16, block=96, layers=("height", "bin_spread")
        )
        with rasterio.open(out) as found:
            assert found.descriptions == ("canopy_height", "bin_spread")
            assert found.units == ("m", "m")
            assert found.tags(1)["chmv2_tile"] == "64"
            assert np.isnan(found.nodata)
            assert found.crs.to_epsg() == 32633
            assert found.transform.almost_equals(expected.rio.transform())
            assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            np.testing.assert_allclose(found.read(1), expected.canopy_height, atol=5e-4)
            np.testing.assert_allclose(found.read(2), expected.bin_spread, atol=5e-4)

    def test_options_mean_what_they_mean_in_python(self, rasters, tmp_path, tiny_checkpoint):
        words = [*PREDICT, "--model", tiny_checkpoint, "--bands", "3,2,1", "--value-range", "5,200"]
        words += ["--nodata", 7, "--erode", 1, "--resolution", 0.9, "--quiet"]
        result = run("predict", rasters[0], tmp_path / "h.tif", *words)
        assert (result.exit_code, result.output) == (0, "")
        expected = rioxarray.open_rasterio(rasters[0]).chmv2.predict(
            tiny_checkpoint, tile=64, overlap=16, block=96, bands=(3, 2, 1), value_range=(5, 200),
            nodata=7, erode=1, resolution=0.9,
        )  # fmt: skip
        with rasterio.open(tmp_path / "h.tif") as found:
            np.testing.assert_allclose(found.read(1), expected, atol=5e-4)

    def test_the_pixel_size_of_an_image_without_crs(self, tmp_path, tiny_checkpoint):
        bands = cube((128, 160), pixel=0.3, crs=None).to_dataarray("band")
        bands.rio.to_raster(tmp_path / "drone.tif")
        words = ["predict", tmp_path / "drone.tif", tmp_path / "h.tif", "--model", tiny_checkpoint,
                 "--resolution", 0.6, "--device", "cpu", "--tile", 64, "--overlap", 16]  # fmt: skip
        assert "pixel_size=0.6" in run(*words).output
        found = run(*words, "--pixel-size", 0.3)
        assert found.exit_code == 0, found.output
        with rasterio.open(tmp_path / "h.tif") as file:
            assert file.shape == (64, 80)
            assert file.crs is None
            assert file.transform.a == pytest.approx(0.6)

    def test_a_store_out_that_goes_on(self, rasters, tmp_path, tiny_checkpoint):
        out = tmp_path / "h.zarr"
        words = ["predict", rasters[0], out, *PREDICT, "--model", tiny_checkpoint]
        assert run(*words, "--encoding", "int16_cm").exit_code == 0
        again = run(*words)
        assert again.exit_code == 1
        assert "error: expected no " in again.stderr
        assert "--overwrite, or go on with it by --resume" in again.stderr
        other = run(*words, "--resume")
        assert other.exit_code == 1
        assert "encoding int16_cm, found encoding float32" in other.stderr
        resumed = run(*words, "--resume", "--encoding", "int16_cm")
        assert resumed.exit_code == 0
        assert "4 were there already" in resumed.stdout
        assert run(*words, "--overwrite").exit_code == 0
        assert xchmv2.open_zarr(out).notnull().all()

    def test_a_half_removed_store_is_replaced_but_not_resumed(
        self, rasters, tmp_path, tiny_checkpoint, monkeypatch
    ):
        out = tmp_path / "h.zarr"
        words = ["predict", rasters[0], out, *PREDICT, "--model", tiny_checkpoint]
        assert run(*words).exit_code == 0
        with monkeypatch.context() as patched:
            patched.setattr("xchmv2.store.records.delete_name", lambda *given: 1 / 0)
            assert "ZeroDivisionError" in run(*words, "--overwrite").stderr
        resumed = run(*words, "--resume")
        assert resumed.exit_code == 1
        assert "half removed" in resumed.stderr
        assert run(*words, "--overwrite").exit_code == 0
        assert xchmv2.open_zarr(out).notnull().all()

    def test_verify_lists_and_repairs(self, rasters, tmp_path, tiny_checkpoint):
        out = tmp_path / "h.zarr"
        words = ["predict", rasters[0], out, *PREDICT, "--model", tiny_checkpoint]
        assert run(*words).exit_code == 0
        well = run("verify", out)
        assert (well.exit_code, well.stdout) == (0, f"4 regions, 0 problems: {out}\n")
        chunk = next(path for path in (out / "canopy_height" / "c").rglob("*") if path.is_file())
        chunk.write_bytes(b"")
        (out / "x" / "c" / "0").unlink()
        assert run("verify", out).stdout.startswith("missing: x/c/0\ndamaged: y ")
        repaired = run("verify", out, "--repair")
        assert repaired.exit_code == 1
        assert "with --resume" in repaired.stdout
        assert "Wrote 1 regions" in run(*words, "--resume").stdout
        assert run("verify", out).exit_code == 0
        wrong = run("verify", tmp_path / "none.zarr")
        assert (wrong.exit_code, "there is no store at" in wrong.stderr) == (1, True)

    def test_an_existing_file_is_replaced_only_on_request(self, rasters, tmp_path, tiny_checkpoint):
        out = tmp_path / "h.tif"
        out.write_text("mine")
        words = ["predict", rasters[0], out, *PREDICT, "--model", tiny_checkpoint]
        refused = run(*words)
        assert refused.exit_code == 1
        assert "replace it by --overwrite" in refused.stderr
        assert out.read_text() == "mine"
        failed = run(*words, "--overwrite", "--overlap", 40)
        assert failed.exit_code == 1
        assert out.read_text() == "mine"
        assert run(*words, "--overwrite").exit_code == 0

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (["none.tif", "h.tif"], 1, "error: none.tif: No such file"),
            (["image.tif", "h.jpg"], 1, "error: expected OUT that ends in .tif or .zarr"),
            (["image.tif", "h.tif", "--resume"], 1, "written whole or not at all"),
            (["image.tif", "h.tif", "--tile", "50"], 1, "multiple of 32"),
            (["image.tif", "h.tif", "--block", "-5"], 2, "-5 is not in the range"),
            (["image.tif", "h.tif", "--encoding", "rounded"], 1, "a GeoTIFF keeps float32"),
            (["image.tif", "no/h.tif"], 1, "error: the folder no does not exist; create it"),
            (["image.tif", "h.tif", "--bands", "1,2"], 2, "not 3 whole numbers between commas"),
            (["image.tif", "h.tif", "--layers", "depth"], 2, "none of height"),
            (["image.tif", "h.tif", "--value-range", "0;255"], 2, "not 2 numbers"),
            (["image.tif", "thesis.zarr", "--overwrite"], 1, "an empty location, or a store"),
        ],
    )
    def test_bad_input(self, rasters, tmp_path, tiny_checkpoint, monkeypatch, words, code, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "image.tif").symlink_to(rasters[0])
        (tmp_path / "thesis.zarr").mkdir()
        (tmp_path / "thesis.zarr" / "text").touch()
        result = run("predict", "--model", tiny_checkpoint, *PREDICT, *words)
        assert result.exit_code == code, result.output
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert (tmp_path / "thesis.zarr" / "text").exists()
        assert not (tmp_path / "h.tif").exists()


def write_tif(path, bands, *, mask=None, internal=True, **options):
    """A GeoTIFF of 0.6 m; ``colorinterp`` and ``descriptions`` are set on the open file."""
    later = {key: options.pop(key) for key in ("colorinterp", "descriptions") if key in options}
    profile = {
        "driver": "GTiff", "count": len(bands), "height": 96, "width": 96, "dtype": bands.dtype,
        "crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 0.6, 0.6), **options,
    }  # fmt: skip
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal),
        rasterio.open(path, "w", **profile) as file,
    ):
        file.write(bands)
        for key, value in later.items():
            setattr(file, key, value)
        if mask is not None:
            file.write_mask(mask)
    return path


class TestWhatFilesSay:
    """Bands, colours and masks that GDAL tells, and rioxarray does not."""

    pixels = np.random.default_rng(0).integers(1, 256, (4, 96, 96)).astype("uint8")
    hole = np.where(np.arange(96) < 40, 0, 255).astype("uint8")[:, None] * np.ones(96, "uint8")

    def height(self, tmp_path, checkpoint, path, *words):
        out = tmp_path / "h.tif"
        result = run("predict", path, out, "--model", checkpoint, "--quiet", "--overwrite",
                     *PREDICT, *words)  # fmt: skip
        assert result.exit_code == 0, result.output
        return rioxarray.open_rasterio(out)[0]

    @pytest.mark.parametrize("internal", [True, False])
    @pytest.mark.parametrize("nodata", [None, 255])
    def test_masks_inside_files_and_beside_them(self, tmp_path, tiny_checkpoint, internal, nodata):
        path = write_tif(tmp_path / "m.tif", self.pixels[:3], mask=self.hole, internal=internal,
                         nodata=nodata)  # fmt: skip
        assert (tmp_path / "m.tif.msk").exists() != internal
        found = self.height(tmp_path, tiny_checkpoint, path)
        np.testing.assert_array_equal(found.isnull(), self.hole == 0)

    @pytest.mark.parametrize("nodata", [None, 255])
    def test_alpha(self, tmp_path, tiny_checkpoint, nodata):
        rgba = np.stack([*self.pixels[:3], self.hole])
        path = write_tif(tmp_path / "a.tif", rgba, nodata=nodata)
        with rasterio.open(path) as file:
            assert file.colorinterp[3].name == "alpha"
        found = self.height(tmp_path, tiny_checkpoint, path)
        np.testing.assert_array_equal(found.isnull(), self.hole == 0)
        as_a_colour = self.height(tmp_path, tiny_checkpoint, path, "--bands", "4,1,2")
        assert as_a_colour.notnull().all()

    def test_colour_interpretation_and_descriptions(self, tmp_path, tiny_checkpoint):
        colours = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
        bgr = write_tif(tmp_path / "c.tif", self.pixels[:3], colorinterp=colours)
        sixteen = write_tif(tmp_path / "d.tif", self.pixels.astype("uint16"),
                            descriptions=("Blue", "Green", "Red", "NIR"))  # fmt: skip
        plain = write_tif(tmp_path / "p.tif", self.pixels[2::-1])
        expected = self.height(tmp_path, tiny_checkpoint, plain)
        for path, words in ((bgr, ()), (sixteen, ("--value-range", "0,255"))):
            found = self.height(tmp_path, tiny_checkpoint, path, *words)
            np.testing.assert_allclose(found, expected, atol=5e-4)

    def test_contradictions_are_refused(self, tmp_path, tiny_checkpoint):
        """GDAL calls the first three bands of bytes red, green and blue, whatever they are."""
        path = write_tif(tmp_path / "x.tif", self.pixels[:3], descriptions=("Blue", "Green", "Red"))
        words = ["predict", path, tmp_path / "h.tif", "--model", tiny_checkpoint, *PREDICT]
        refused = run(*words)
        assert refused.exit_code == 1
        assert "1 (colorinterp 'red', long_name 'Blue')" in refused.stderr
        assert run(*words, "--bands", "3,2,1").exit_code == 0

    def test_masks_count_in_fine_tuning(self, tmp_path, monkeypatch):
        seen = {}

        def fine_tune(imagery, reference, **options):
            seen.update(options)
            raise xchmv2.CHMv2Error("a", "b", "c")

        monkeypatch.setattr("xchmv2.training.fine_tune", fine_tune)
        path = write_tif(tmp_path / "m.tif", self.pixels[:3], mask=self.hole)
        lidar = write_tif(tmp_path / "l.tif", self.pixels[:1])
        run("fine-tune", path, lidar, tmp_path / "out")
        np.testing.assert_array_equal(seen["valid"], self.hole > 0)


@pytest.fixture
def catalogue(tmp_path):
    """An item collection of two dates over files on disk."""
    collection = tmp_path / "items.json"
    items = []
    for year in (2019, 2021):
        path = catalogue_of.raster(tmp_path / f"{year}.tif", catalogue_of.noise(seed=year))
        items.append(
            catalogue_of.item(
                path,
                id=f"image-{year}",
                time=f"{year}-07-01T10:00:00Z",
                properties={"view:sun_elevation": year - 1979},
                **{"eo:bands": catalogue_of.names("red", "green", "blue")},
            )
        )
    collection.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return collection


class TestRun:
    def test_from_a_catalogue_to_a_store_and_on_after_new_dates(
        self, catalogue, tmp_path, tiny_checkpoint
    ):
        out = tmp_path / "h.zarr"
        words = ["run", catalogue, out, *PREDICT, "--model", tiny_checkpoint]
        everything = json.loads(catalogue.read_text())
        catalogue.write_text(json.dumps({**everything, "features": everything["features"][1:]}))
        first = run(*words)
        assert first.exit_code == 0, first.output
        assert "Wrote 1 regions" in first.stdout

        catalogue.write_text(json.dumps(everything))
        refused = run(*words)
        assert refused.exit_code == 1
        assert refused.stderr.startswith("error: expected no store at")
        assert "--resume" in refused.stderr
        more = run(*words, "--resume")
        assert more.exit_code == 0, more.output
        assert "1 were there already" in more.stdout
        found = xchmv2.open_zarr(out)
        assert list(found.time.dt.year.values) == [2019, 2021]
        assert list(found.sun_elevation.values) == [40, 42]
        assert list(found.item_ids.values) == ["image-2019", "image-2021"]
        assert list(found.quality_flags.values & 1) == [1, 1]  # the sun stood below 45 degrees
        assert found.quality_flags.attrs["flag_meanings"].startswith("low_sun")
        expected = xchmv2.load(str(catalogue)).chmv2.predict(
            str(tiny_checkpoint), tile=64, overlap=16, block=96
        )
        np.testing.assert_allclose(found, expected, atol=5e-4)

    def test_on_a_cluster(self, catalogue, tmp_path, tiny_checkpoint):
        distributed = pytest.importorskip("distributed")
        out = tmp_path / "h.zarr"
        with distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=":0"
        ) as cluster:
            words = ["--scheduler", cluster.scheduler_address, "--model", tiny_checkpoint]
            result = run("run", catalogue, out, *PREDICT, *words)
        assert result.exit_code == 0, result.output
        assert xchmv2.open_zarr(out).notnull().any()

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (["none.json", "h.zarr"], 1, "none.json"),
            (["items.json", "h.zarr", "--bbox", "1,2,3"], 2, "not 4 numbers"),
            (["items.json", "h.zarr", "--bbox", "80,10,81,11"], 1, "error: expected"),
            (["items.json", "h.zarr", "--sign", "nothing:sign"], 1, "--sign as module:name"),
            (["items.json", "h.zarr", "--bands", "a,b,c"], 1, "error: expected"),
            (["items.json", "h.tif"], 1, "OUT as a Zarr store"),
            (["items.json", "h.zarr", "--scheduler", "nonsense://x"], 1, "--scheduler as an"),
        ],
    )
    def test_bad_input(self, catalogue, tiny_checkpoint, monkeypatch, words, code, message):
        monkeypatch.chdir(catalogue.parent)
        result = run("run", "--model", tiny_checkpoint, *PREDICT, *words)
        assert result.exit_code == code, result.output
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not (catalogue.parent / "h.zarr").exists()
