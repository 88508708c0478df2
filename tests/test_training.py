import math
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import reference
import rioxarray  # noqa: F401  (registers .rio)
import torch
import xarray as xr
from conftest import cube
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.model import CHMv2ForDepthEstimation, CHMv2ImageProcessor
from xchmv2.model.files import IMAGE_MEAN, IMAGE_STD
from xchmv2.training import Curriculum, FineTuned, fine_tune
from xchmv2.training.pairs import Pair, read_pair, split_crops
from xchmv2.training.run_state import partial_folder
from xchmv2.training.tuning import Schedule, run

# Private imports: pairs of crops and the state of a killed run.

FAST = dict(tile=64, epochs=2, batch_size=2, lr=1e-3, progress=False, device="cpu")
SMALL = (136, 164)  # room for a training and a held-out crop


def forest(shape=(200, 260), **options):
    """Imagery whose green band tells the height, and that height."""
    imagery = cube(shape, **options)
    smooth = xr.DataArray(
        np.add.outer(np.sin(np.arange(shape[0]) / 15), np.cos(np.arange(shape[1]) / 20)) + 2,
        dims=("y", "x"),
    )
    imagery["green"] = (imagery["green"].dims, (smooth.values * 60).astype("uint8"))
    height = (imagery["red"] * 0 + smooth * 8).astype("float32")
    return imagery.odc.assign_crs(32633), height.odc.assign_crs(32633)


def without_crs(obj):
    bare = obj.drop_vars("spatial_ref")
    for array in bare.data_vars.values() if isinstance(bare, xr.Dataset) else [bare]:
        array.attrs.pop("grid_mapping", None)
        array.encoding.clear()
    return bare


@pytest.fixture
def start():
    torch.manual_seed(3)
    return CHMv2ForDepthEstimation(reference.tiny_config(initializer_range=0.1))


class TestPairs:
    def test_reading_is_what_predict_sees(self):
        imagery, height = forest()
        pair = read_pair(imagery.chunk(y=50), height.chunk(x=33))
        np.testing.assert_allclose(pair.image[1], imagery["green"] / np.float32(255), rtol=1e-6)
        np.testing.assert_allclose(pair.height, height, atol=1e-6)

    def test_reference_on_another_grid_is_aligned(self):
        imagery, height = forest()
        box = GeoBox.from_bbox(
            imagery.odc.geobox.boundingbox.buffered(3, 5), imagery.odc.crs, resolution=1.0
        )
        coarse = height.odc.reproject(box, resampling="average", dst_nodata=np.nan)
        pair = read_pair(imagery, coarse)
        known = np.isfinite(pair.height)
        assert known.mean() > 0.95
        np.testing.assert_allclose(pair.height[known], height.values[known], atol=0.7)

    def test_reference_in_another_crs(self):
        imagery, height = forest()
        other = height.odc.reproject("EPSG:3857", resolution=1.5, dst_nodata=np.nan)
        pair = read_pair(imagery, other)
        known = np.isfinite(pair.height)
        assert known.mean() > 0.8
        assert np.abs(pair.height - height.values)[known].mean() < 0.5

    def test_resolution(self):
        imagery, height = forest(pixel=0.3, origin=(-16_000_000, 1_600_000))
        pair = read_pair(imagery, height, resolution=0.6)
        assert pair.image.shape == (3, 100, 130)
        blocks = height.values.reshape(100, 2, 130, 2).mean(axis=(1, 3))
        np.testing.assert_allclose(pair.height, blocks, atol=1e-3)

    def test_nodata_of_the_reference(self):
        imagery, height = forest()
        holed = height.where(height.x > height.x[40], -9999).assign_attrs(_FillValue=-9999)
        pair = read_pair(imagery, holed)
        np.testing.assert_array_equal(np.isnan(pair.height), np.asarray(holed == -9999))

    def test_undeclared_nodata_is_counted_and_left_out(self):
        imagery, height = forest()
        with pytest.warns(UserWarning, match="8200 of 52000 values cannot be heights"):
            found = read_pair(imagery, height.where(height.x > height.x[40], -9999))
        np.testing.assert_array_equal(
            found.height, read_pair(imagery, height.where(height.x > height.x[40])).height
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda h: h.where(h.x > h.x[200], -9999),
             r"values of a block .* such as -9999; .* stand for nodata: height.where"),
            (lambda h: h * 30, r"values of a block .* in another unit, declare it: height.assign"),
            (lambda h: h * 4, r"outside, from .*feet: reference.assign_attrs\(units='ft'\)"),
            (lambda h: h * np.nan, r"imagery and reference heights do not overlap where both"),
            (lambda h: h.assign_coords(x=h.x + 5000),
             r"imagery and reference heights do not overlap where both"),
            (lambda h: h.expand_dims(time=2), r"reference heights of one date"),
        ],
    )  # fmt: skip
    def test_unusable_references(self, change, message):
        imagery, height = forest()
        with pytest.raises(CHMv2Error, match=message):
            read_pair(imagery, change(height))

    def test_reference_in_degrees_is_interpolated(self):
        imagery, height = forest()
        degrees = height.odc.reproject("EPSG:4326", resolution=5e-5, dst_nodata=np.nan)
        found = read_pair(imagery, degrees).height
        known = np.isfinite(found)
        assert len(np.unique(found[known])) > 0.8 * known.sum()

    @pytest.mark.parametrize("turn", [dict(y=slice(None, None, -1)), dict(x=slice(None, None, -1))])
    def test_without_crs_the_reference_is_placed_by_its_coordinates(self, turn):
        imagery, height = (without_crs(array) for array in forest())
        bare = height.isel(turn)
        np.testing.assert_allclose(read_pair(imagery, bare).height, height, atol=1e-6)
        np.testing.assert_allclose(read_pair(imagery, bare.T).height, height, atol=1e-6)
        with pytest.raises(ImageryError, match=r"imagery and reference heights do not overlap"):
            read_pair(imagery, bare.assign_coords(x=bare.x + 1e5))
        found = read_pair(imagery, height.isel(y=slice(1, None))).height
        assert np.isnan(found[0]).all()
        np.testing.assert_allclose(found[1:], height[1:], atol=1e-6)

    def test_a_crs_on_one_of_the_two_alone_is_refused_as_by_validate(self):
        imagery, height = forest()
        bare = without_crs(height)
        with pytest.raises(CHMv2Error, match=r"or on neither, found none on the reference") as said:
            read_pair(imagery, bare)
        with pytest.raises(CHMv2Error) as validated:
            height.chmv2.validate(bare)
        assert str(validated.value) == str(said.value)
        with pytest.raises(CHMv2Error, match=r"none on the heights or imagery; write it"):
            read_pair(without_crs(imagery), height)
        written = bare.rio.write_crs("EPSG:32633")  # the call that the message names
        np.testing.assert_allclose(read_pair(imagery, written).height, height, atol=1e-6)

    def test_reference_that_is_no_array(self):
        imagery, height = forest()
        with pytest.raises(CHMv2Error, match=r"as a DataArray, found Dataset"):
            read_pair(imagery, height.to_dataset(name="chm"))

    def test_noise_around_the_ground_is_ground(self):
        imagery, height = forest()
        pair = read_pair(imagery, height.where(height > 8, -0.2))
        assert pair.height.min() == 0

    def test_several_dates(self):
        imagery, height = forest()
        with pytest.raises(ImageryError, match=r"one date.*\['time'\]; choose one: imagery.isel"):
            read_pair(imagery.expand_dims(time=2), height)


class TestImageryIsReadAsByPredict:
    @pytest.mark.parametrize(
        ("change", "options"),
        [
            (lambda i: i[["red", "green"]], {}),
            (lambda i: i.rename(red="one"), {}),
            (lambda i: i.astype("uint16"), {}),
            (lambda i: i.astype(bool), {}),
            (lambda i: i.isel(y=slice(0, 0)), {}),
            (lambda i: i.assign_coords(x=i.x**2), {}),
            (lambda i: i.odc.assign_crs(4326), {}),
            (lambda i: i.assign_coords(x=i.x * 9, y=i.y * 9), {}),
            (lambda i: i, dict(bands=("red", "green", "nir"))),
            (lambda i: i, dict(value_range=(9, 3))),
            (lambda i: i, dict(nodata="0")),
            (lambda i: i, dict(erode=-1)),
            (lambda i: i, dict(resolution="fine")),
            (lambda i: i, dict(resolution=9.0)),
            (lambda i: i, dict(valid=xr.DataArray(np.ones((2, 2)), dims=("y", "x")))),
            (lambda i: i, dict(valid=xr.DataArray(np.ones((2, 2), bool), dims=("y", "x")))),
        ],
    )
    def test_what_predict_refuses_is_refused_in_the_same_words(
        self, start, tmp_path, change, options
    ):
        imagery, height = forest()
        with pytest.raises(CHMv2Error) as predicted:
            change(imagery).chmv2.predict(start, tile=64, overlap=16, **options)
        with pytest.raises(type(predicted.value)) as trained:
            fine_tune(change(imagery), height, start, output=tmp_path / "mine", **FAST, **options)
        assert str(trained.value) == str(predicted.value)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("resolution", [None, 1.2])
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("uint8", {}),
            ("uint8", dict(nodata=0, erode=2)),
            ("float32", dict(value_range=(0, 255), nodata=7)),
        ],
    )
    def test_pixels_without_imagery_are_left_out_as_by_predict(self, kind, options, resolution):
        imagery, height = forest((120, 140))
        imagery = imagery.astype(kind)
        if "nodata" not in options:
            imagery = imagery.map(lambda band: band.assign_attrs(nodata=0))
        missing = options.get("nodata", 0)
        for band in imagery.data_vars:
            imagery[band][20:40, 30:60] = missing  # in all bands: no imagery
        imagery["red"][70, 70:80] = missing  # in one alone: a dark crown, where whole numbers tell
        mask = xr.ones_like(imagery["red"], bool)
        mask[:, :5] = False
        options = {**options, "valid": mask, "resolution": resolution}
        pair = read_pair(imagery, height, **options)
        model = reference.whole_tile_model()
        predicted = imagery.chmv2.predict(model, tile=64, overlap=16, **options)
        np.testing.assert_array_equal(pair.valid, predicted.notnull())
        assert 0 < (~pair.valid).sum() < pair.valid.size / 2
        assert np.isnan(pair.height[~pair.valid]).all()
        assert (pair.image[:, ~pair.valid] == 0).all()


def pairs_of(height):
    known = np.isfinite(height)
    image = np.broadcast_to(np.nan_to_num(height)[None] / 40, (3, *height.shape))
    return [Pair(image.astype(np.float32), np.ones_like(known), height.astype(np.float32))]


class TestCrops:
    @given(st.integers(100, 300), st.integers(140, 300), st.integers(0, 99))
    def test_training_never_touches_what_is_held_out(self, rows, cols, seed):
        rng = np.random.default_rng(seed)
        height = rng.random((rows, cols)) * 30
        sampler, held_out = split_crops(pairs_of(height), 32, 0.2, rng)
        seen = np.zeros((rows, cols), bool)
        for crop in sampler.crops:
            seen[crop.top : crop.top + 32, crop.left : crop.left + 32] = True
        assert held_out
        for crop in held_out:
            assert not seen[crop.top : crop.top + 32, crop.left : crop.left + 32].any()
        assert sampler.weights.sum() == pytest.approx(1)

    @pytest.mark.parametrize("again", [False, True])
    def test_what_is_held_out_of_one_image_is_not_learned_from_another(self, again):
        imagery, height = forest()
        first = read_pair(imagery, height)
        window = dict(y=slice(10, 190), x=slice(7, 250))
        second = first if again else read_pair(imagery.isel(window), height)
        pairs, shifts = [first, second], [(0, 0), (0, 0) if again else (10, 7)]
        sampler, held_out = split_crops(pairs, 32, 0.1, np.random.default_rng(0))
        place = [(c.top + shifts[c.pair][0], c.left + shifts[c.pair][1]) for c in sampler.crops]
        for block in held_out:
            top, left = block.top + shifts[block.pair][0], block.left + shifts[block.pair][1]
            assert all(abs(t - top) >= 32 or abs(x - left) >= 32 for t, x in place)

    def test_tall_trees_are_drawn_more_often_than_their_area(self):
        height = np.full((300, 300), 3.0)
        height[:40, :40] = 38
        sampler, _ = split_crops(pairs_of(height), 32, 0, np.random.default_rng(0))
        _, _, drawn = sampler.draw(500, np.random.default_rng(0))
        assert (drawn > 30).mean() > 2 * (height > 30).mean()

    def test_crops_are_turned_together(self):
        height = np.add.outer(np.arange(100.0), np.arange(120.0) / 7) / 4
        sampler, _ = split_crops(pairs_of(height), 32, 0, np.random.default_rng(0))
        image, valid, drawn = sampler.draw(20, np.random.default_rng(1))
        np.testing.assert_allclose(image[:, 0] * 40, drawn, rtol=1e-5)
        assert valid.all()
        slopes = {tuple(np.sign([d[1, 0] - d[0, 0], d[0, 1] - d[0, 0]])) for d in drawn}
        assert len(slopes) == 4

    def test_too_little(self):
        with pytest.raises(ImageryError, match=r"at least two tiles of 96 px.*pass a smaller tile"):
            split_crops(pairs_of(np.ones((100, 120))), 96, 0.2, np.random.default_rng(0))


# Most runs here are too short to gain anything.
@pytest.mark.filterwarnings("ignore:fine-tuning gained little")
class TestFineTune:
    def test_it_learns_and_both_load_the_result(self, start, tmp_path):
        imagery, height = forest((160, 200))
        result = fine_tune(
            imagery.chunk(y=70), height, start, output=tmp_path / "mine", train="all",
            **{**FAST, "epochs": 6, "patience": 6},
        )  # fmt: skip
        assert isinstance(result, FineTuned)
        history = result.history
        assert list(history.columns) == [
            "epoch", "loss", "training_mae", "validation_mae", "validation_bias", "seconds",
        ]  # fmt: skip
        assert history["validation_mae"].min() < 0.6 * history["validation_mae"][0]
        assert not partial_folder(result.folder).exists()
        found = imagery.chmv2.predict(result.folder, tile=64, overlap=16)
        before = imagery.chmv2.predict(start, tile=64, overlap=16)
        assert np.abs(found - height).mean() < 0.6 * np.abs(before - height).mean()

        transformers = pytest.importorskip("transformers")
        from transformers.models.chmv2.modeling_chmv2 import CHMv2ForDepthEstimation as Published

        theirs = Published.from_pretrained(result.folder).eval()
        ours = CHMv2ForDepthEstimation.from_pretrained(result.folder)
        pixels = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            a, b = theirs(pixels).predicted_depth, ours(pixels).predicted_depth
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-5)
        assert transformers.__version__
        assert CHMv2ImageProcessor.from_pretrained(result.folder).image_mean[0] == 0.42

    def test_head_leaves_the_backbone_alone(self, start, tmp_path):
        imagery, height = forest(SMALL)
        result = fine_tune(imagery, height, start, output=tmp_path / "mine", **FAST)
        tuned = CHMv2ForDepthEstimation.from_pretrained(result.folder).state_dict()
        changed = {n for n, t in start.state_dict().items() if not torch.equal(t, tuned[n])}
        if result.best_epoch > 0:
            assert changed
        assert not {n for n in changed if n.startswith("backbone")}

    def test_same_seed_same_result(self, start, tmp_path):
        imagery, height = forest(SMALL)
        first, second = (
            fine_tune(imagery, height, start, output=tmp_path / name, **FAST).history
            for name in "ab"
        )
        assert first.drop(columns="seconds").equals(second.drop(columns="seconds"))

    def test_without_validation(self, start, tmp_path):
        imagery, height = forest(SMALL)
        result = fine_tune(imagery, height, start, output=tmp_path / "mine", validation=0.0, **FAST)
        assert result.history["validation_mae"].isna().all()
        assert result.best_epoch == result.history["training_mae"].idxmin()
        assert list(result.scores.index) == ["training"]
        assert len(result.registration) == 1
        words = r"absolute errors.*\nRegistration of reference: (in place|cannot be told)"
        assert re.search(words, repr(result), re.DOTALL)

    def test_several_images(self, start, tmp_path):
        images, heights = zip(
            *(forest((120, 130), origin=(-8_000_000, 800_000 + 500 * i)) for i in (0, 1)),
            strict=True,
        )
        fine_tune(images, heights, start, output=tmp_path / "mine", **FAST)
        with pytest.raises(CHMv2Error, match=r"as many references as images"):
            fine_tune(images, heights[:1], start, output=tmp_path / "other", **FAST)

    def test_early_stopping_keeps_the_best(self, start, tmp_path):
        imagery, height = forest(SMALL)
        options = {**FAST, "lr": 1.0, "epochs": 50, "patience": 2}
        result = fine_tune(imagery, height, start, output=tmp_path / "mine", **options)
        assert len(result.history) < 20
        mae = result.history["validation_mae"]
        assert result.best_epoch == mae.idxmin()
        assert mae[1:].idxmin() == len(mae) - 3  # the start gets no say in when to stop

    def test_resumed_run_equals_an_undisturbed_one(self, start, tmp_path, monkeypatch):
        imagery, height = forest(SMALL)
        options = {**FAST, "epochs": 4, "train": "all"}
        whole = fine_tune(imagery, height, start, output=tmp_path / "whole", **options)
        module = sys.modules[run.__module__]
        original, calls = module.save_state, []

        def dying(*args):
            original(*args)
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(module, "save_state", dying)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(imagery, height, start, output=tmp_path / "cut", **options)
        monkeypatch.setattr(module, "save_state", original)
        resumed = fine_tune(imagery, height, start, output=tmp_path / "cut", **options)
        assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))
        weights = [(f.folder / "model.safetensors").read_bytes() for f in (whole, resumed)]
        assert weights[0] == weights[1]

    def test_killed_run_goes_on(self, tmp_path):
        script = f"""
            import sys, torch
            sys.path.insert(0, {str(sys.path[0])!r})
            sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
            import reference, test_training
            torch.set_num_threads(1)
            torch.manual_seed(3)
            model = test_training.CHMv2ForDepthEstimation(reference.tiny_config())
            imagery, height = test_training.forest(test_training.SMALL)
            test_training.fine_tune(imagery, height, model, output={str(tmp_path / "mine")!r},
                                    **{{**test_training.FAST, "epochs": 4, "patience": 9}})
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        process = subprocess.Popen(command)
        state = partial_folder(tmp_path / "mine") / "state.safetensors"
        while not state.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        exec(command[-1], {})
        assert (tmp_path / "mine" / "model.safetensors").exists()
        assert not partial_folder(tmp_path / "mine").exists()

    def test_leftovers_of_another_run_are_refused(self, start, tmp_path, monkeypatch):
        imagery, height = forest(SMALL)
        module = sys.modules[run.__module__]

        def die(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "restore_best", die)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(imagery, height, start, output=tmp_path / "mine", **FAST)
        other = {**FAST, "lr": 0.5}
        with pytest.raises(
            CHMv2Error, match=r"unfinished run.*same settings, found lr: 0.001 there, 0.5 now"
        ):
            fine_tune(imagery, height, start, output=tmp_path / "mine", **other)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(train="tail"), r"train as one of 'head', 'all', found train='tail'"),
            (dict(epochs=0), r"epochs as a whole number of at least 1, found epochs=0"),
            (dict(patience=0), r"found patience=0"),
            (dict(batch_size=2.5), r"found batch_size=2.5"),
            (dict(seed=-1), r"found seed=-1"),
            (dict(lr=float("nan")), r"found lr=nan"),
            (dict(validation=1.0), r"found validation=1.0"),
            (dict(tile=100), r"multiple of 32"),
            (dict(tile=160), r"at least two tiles of 160 px"),
        ],
    )
    def test_bad_options(self, start, tmp_path, options, message):
        imagery, height = forest(SMALL)
        with pytest.raises(CHMv2Error, match=message):
            fine_tune(imagery, height, start, output=tmp_path / "mine", **{**FAST, **options})
        assert not list(tmp_path.iterdir())

    def test_diverged_run_says_so_and_writes_nothing(self, start, tmp_path):
        imagery, height = forest(SMALL)
        options = {**FAST, "lr": 1e8, "epochs": 9, "patience": 9, "train": "all"}
        with pytest.raises(CHMv2Error, match=r"training has diverged: the loss .*lr=1e\+07"):
            fine_tune(imagery, height, start, output=tmp_path / "mine", **options)
        assert not (tmp_path / "mine").exists()

    def test_weights_that_diverge_in_the_last_step_are_not_saved(
        self, start, tmp_path, monkeypatch
    ):
        imagery, height = forest((64, 64))
        options = {**FAST, "tile": 32, "train": "all", "validation": 0}
        with monkeypatch.context() as patch:
            last = lambda schedule, progress: math.inf if progress > 0.9 else 1e-3  # noqa: E731
            patch.setattr(Schedule, "rate", last)
            with pytest.raises(CHMv2Error, match=r"not finite after epoch 2; .*lr=0.0001"):
                fine_tune(imagery, height, start, output=tmp_path / "mine", **options)
        assert not (tmp_path / "mine").exists()
        shutil.rmtree(partial_folder(tmp_path / "mine"))
        lower = {**options, "lr": 1e-4}
        assert fine_tune(imagery, height, start, output=tmp_path / "mine", **lower).folder.exists()

    def test_half_precision_start(self, start, tmp_path):
        imagery, height = forest(SMALL)
        result = fine_tune(imagery, height, start.half(), output=tmp_path / "mine", **FAST)
        assert result.history["loss"][1:].notna().all()

    def test_existing_output_is_left_alone(self, start, tmp_path):
        imagery, height = forest(SMALL)
        (tmp_path / "keep").write_text("mine")
        with pytest.raises(CHMv2Error, match=r"the output folder .* exists already"):
            fine_tune(imagery, height, start, output=tmp_path, **FAST)
        assert (tmp_path / "keep").read_text() == "mine"


QUICK = {**FAST, "tile": 32, "train": "all", "lr": 4e-3}
QUADRANTS = (64, 64)  # four tiles of 32 px


class TestWhatFineTuningGained:
    def saturated(self, norm):
        """Make a model that reads 0 m everywhere, with all the weight in its lowest bin."""
        torch.manual_seed(3)
        bins = "chmv2_mixlog" if norm == "chmv2_mixlog" else "linear"
        model = CHMv2ForDepthEstimation(
            reference.tiny_config(
                norm_strategy=norm, bins_strategy=bins, initializer_range=0.1, max_depth=48.0
            )
        )
        bias = model.head.conv_depth.last.bias
        bias.data = torch.full_like(bias, -8.0)
        bias.data[0] = 8.0
        return model

    @pytest.mark.parametrize("norm", ["softmax", "chmv2_mixlog"])
    def test_a_start_that_reads_trees_as_ground_escapes(self, norm, tmp_path):
        imagery, height = forest(QUADRANTS)
        options = {**QUICK, "epochs": 5, "validation": 0}
        found = fine_tune(
            imagery, height, self.saturated(norm), output=tmp_path / "mine", **options
        )
        before, after, constant = found.scores.loc["training"]
        assert after < 0.9 * constant < before
        assert found.blind == 1
        assert found.curriculum.silog_until == 0
        assert "Before training, the model read 100% of the trees as ground" in repr(found)

    def test_published_losses_do_not_escape_and_the_advice_of_the_warning_does(self, tmp_path):
        imagery, height = forest(QUADRANTS)
        start, options = self.saturated("softmax"), {**QUICK, "epochs": 5, "validation": 0}
        published = Curriculum()
        with pytest.warns(UserWarning, match=r"on the training data .* leaving curriculum= out"):
            found = fine_tune(
                imagery, height, start, output=tmp_path / "a", curriculum=published, **options
            )
        assert found.curriculum == published
        before, after, _ = found.scores.loc["training"]
        assert after == pytest.approx(before, abs=0.01)
        fine_tune(imagery, height, start, output=tmp_path / "b", **options)  # warns no more

    def test_training_that_is_too_short_is_told_to_go_on(self, start, tmp_path):
        imagery, height = forest(QUADRANTS)
        options = {**QUICK, "validation": 0, "epochs": 1}
        with pytest.warns(UserWarning, match=r"gained little.*longer .*epochs=2\)"):
            fine_tune(imagery, height, start, output=tmp_path / "a", **{**options, "lr": 1e-9})

    def test_training_that_only_worsens_is_told_to_slow_down(self, tmp_path):
        imagery, height = forest(QUADRANTS)
        options = {**QUICK, "validation": 0}
        good = fine_tune(
            imagery, height, self.saturated("chmv2_mixlog"), output=tmp_path / "a",
            **{**options, "epochs": 5},
        )  # fmt: skip
        with pytest.warns(UserWarning, match=r"lower learning rate: fine_tune\(..., lr=0.1\)"):
            again = fine_tune(
                imagery, height, good.folder, output=tmp_path / "b", **{**options, "lr": 1.0}
            )
        assert again.best_epoch == 0
        assert again.scores.loc["training", "after"] == again.scores.loc["training", "before"]

    @pytest.mark.filterwarnings("ignore:fine-tuning gained little")
    def test_scores_are_errors_of_the_model_and_of_the_median(self, start, tmp_path):
        imagery, height = forest((64, 96))
        found = fine_tune(
            imagery, height, start, output=tmp_path / "mine", **{**QUICK, "epochs": 4},
        )  # fmt: skip
        pair = read_pair(imagery, height)
        _, held_out = split_crops([pair], 32, 0.2, np.random.default_rng(0))
        blocks = {(top, left) for top in (0, 32) for left in (0, 32, 64)}
        away = {(crop.top, crop.left) for crop in held_out}
        tuned = CHMv2ForDepthEstimation.from_pretrained(found.folder)
        parts = {"training": blocks - away, "validation": away}
        median = np.median([self.cut(pair.height, at) for at in parts["training"]])
        for data, places in parts.items():
            truth = np.stack([self.cut(pair.height, at) for at in places])
            mean, std = (np.array(v)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
            pixels = (np.stack([self.cut(pair.image, at) for at in places]) - mean) / std
            expected = [np.abs(median - truth).mean()]
            for model in (tuned, start):
                with torch.inference_mode():
                    read = model.eval().height(torch.from_numpy(pixels).float())[0].numpy()
                expected.insert(0, np.abs(read - truth).mean())
            np.testing.assert_allclose(found.scores.loc[data], expected, rtol=1e-4)
        assert list(found.scores.columns) == ["before", "after", "constant"]

    @staticmethod
    def cut(array, at):
        return array[..., at[0] : at[0] + 32, at[1] : at[1] + 32]

    @pytest.mark.filterwarnings("ignore:fine-tuning gained little")
    def test_progress_bar_has_values_only(self, start, tmp_path, capsys):
        imagery, height = forest(QUADRANTS)
        options = {**QUICK, "progress": True}
        for validation, name in ((0, "training_mae="), (0.2, "validation_mae=")):
            out = tmp_path / str(validation)
            fine_tune(imagery, height, start, output=out, validation=validation, **options)
            said = capsys.readouterr().err
            assert name in said
            assert "constant=" in said
            assert "nan" not in said

    @pytest.mark.filterwarnings("ignore:fine-tuning gained little")
    @pytest.mark.parametrize("level", [0.0, 12.5])
    def test_one_height_teaches_nothing(self, start, level, tmp_path):
        imagery, height = forest(QUADRANTS)
        flat = height * 0 + level
        with pytest.raises(ImageryError, match=rf"the reference is {level:g} m on all .* pixels"):
            fine_tune(imagery, flat, start, output=tmp_path / "mine", **QUICK)
        assert not list(tmp_path.iterdir())
        if level:
            return
        other = forest(QUADRANTS, origin=(-8_000_000, 800_500))
        both = [imagery, other[0]], [flat, other[1]]
        found = fine_tune(*both, start, output=tmp_path / "mine", **QUICK)
        assert found.folder.exists()
        assert "\nRegistration of reference 2: " in repr(found)

    def test_mostly_missing_reference(self, start, tmp_path):
        imagery, height = forest(QUADRANTS)
        few = height.where(np.random.default_rng(0).random(QUADRANTS) < 0.3)
        with pytest.raises(ImageryError, match=r"half of a tile's pixels must have heights"):
            fine_tune(imagery, few, start, output=tmp_path / "mine", **QUICK)
