import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.evaluation import score_demo as evaluate
from tests.evaluation import train_demo as train
from tests.evaluation.train_demo import TEST_SEEDS, TRAINING_SEEDS
from xchmv2.datasets import synthetic_forest
from xchmv2.errors import DemoModelWarning
from xchmv2.inference import models as spec
from xchmv2.model import CHMv2ForDepthEstimation, CHMv2ImageProcessor
from xchmv2.model.files import DEMO_FOLDER
from xchmv2.training.tuning import Schedule

# Private imports: the demonstration model is trained in two steps.

RGB = ["red", "green", "blue"]


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DemoModelWarning)
        yield


def test_the_package_ships_small_half_precision_weights_and_a_card():
    files = {path.name: path for path in DEMO_FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(
        files
    )
    assert sum(path.stat().st_size for path in files.values() if path.is_file()) < 8e6
    with safe_open(files["model.safetensors"], "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
    card = files["README.md"].read_text()
    for word in ("synthetic", "block-R2", "MAE", "Limits", "python -m tests.evaluation.train_demo"):
        assert word in card


def test_both_implementations_load_it():
    pytest.importorskip("transformers")
    from transformers.models.chmv2.modeling_chmv2 import CHMv2ForDepthEstimation as Published

    ours = CHMv2ForDepthEstimation.from_pretrained("demo")
    theirs = Published.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = ours(pixels).predicted_depth, theirs(pixels).predicted_depth
    assert ((a - b).abs() / (1 + b)).max() < 1e-5
    assert CHMv2ImageProcessor.from_pretrained("demo").image_mean[0] == 0.42
    assert ours.config == train.CONFIG


def test_using_it_warns_once():
    code = """
        import warnings
        from xchmv2.datasets import synthetic_forest
        import xchmv2
        forest = synthetic_forest((64, 64), times=("2020-07-01",), seed=1)[["red", "green", "blue"]]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                forest.chunk().chmv2.predict("demo", tile=64, overlap=16)
        found = [w for w in caught if "demonstration model" in str(w.message)]
        assert len(found) == 1, caught
        assert "heights mean nothing" in str(found[0].message)
    """

    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_its_name_is_what_a_graph_carries(quiet):
    forest = synthetic_forest((64, 64), times=("2020-07-01",), seed=1)[RGB]
    heights = forest.chunk().chmv2.predict("demo", tile=64, overlap=16)
    assert heights.attrs["chmv2_model"] == "demo"
    assert spec.resolve_model("demo").model == "demo"


def test_it_sees_an_unseen_forest(quiet):
    """The measured figures are in the model card; here one scene, with room for its own luck."""
    summary, classes = evaluate.evaluate(seeds=[TEST_SEEDS[0]], side=300)
    assert summary["block_r2"] > 0.6
    assert summary["mae_share"] < 0.55
    assert abs(summary["bias"]) < 2
    assert list(classes.columns) == ["pixels", "mae", "bias"]
    assert classes["pixels"].sum() == 2 * 300 * 300


def test_seeds_of_training_and_test_are_apart():
    assert not set(TRAINING_SEEDS) & set(TEST_SEEDS)


def test_evaluation_arithmetic():
    truth = np.random.default_rng(0).random((1, 2, 110, 160)) * 20
    means = evaluate.blocks(truth)
    assert means.shape == (1, 2, 2, 3)
    assert means[0, 1, 1, 2] == pytest.approx(truth[0, 1, 50:100, 100:150].mean())
    table = evaluate.by_class(truth, truth + 1)
    np.testing.assert_allclose(table["mae"].dropna(), 1)
    assert np.isnan(table.loc["above 30 m", "mae"])


def test_the_training_script_trains(tmp_path, monkeypatch, quiet):
    monkeypatch.setattr(train, "SIDE", 256)
    schedule = Schedule(
        epochs=1, steps=2, batch_size=2, lr=1e-3, patience=1, curriculum=train.SCHEDULE.curriculum
    )
    folder = train.train(tmp_path / "demo", schedule=schedule, seeds=range(1, 3))
    forest = synthetic_forest((64, 64), times=("2020-07-01",), seed=1)[RGB]
    assert forest.chmv2.predict(folder, tile=64, overlap=16).notnull().all()


def test_fine_tuning_on_half_a_real_plot_helps_on_the_other_half(data, tmp_path):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[1] / "docs" / "make_bart_figure.py"
    described = importlib.util.spec_from_file_location("make_bart_figure", path)
    script = importlib.util.module_from_spec(described)
    sys.modules[described.name] = script  # dataclasses look their module up
    described.loader.exec_module(script)
    found = script.compare(data / "rgb_chm_bart2019", tmp_path / "bart", epochs=10)
    assert found.mae(found.after) < 0.8 * found.mae(found.before)
