"""Compiling: once a shape, the same heights, and the plain network where it fails."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import reference
import torch
from conftest import cube

from xchmv2.inference import Predictor, get_predictor, resolve_model
from xchmv2.inference import models as held
from xchmv2.inference.predictor import _CompiledFeatures
from xchmv2.model import CHMv2ForDepthEstimation

# Private imports: the compiler is replaced by one that fails.

torch.set_num_threads(1)

OPTIONS = dict(tile=64, overlap=16, block=128, batch_size=3)
compile_really = torch.compile


@pytest.fixture
def traced(monkeypatch):
    """Trace as torch.compile does, but make no code: that needs a compiler and a minute."""
    calls = []

    def trace(function, **options):
        calls.append(options)
        torch._dynamo.reset()
        return compile_really(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    return calls


@pytest.fixture
def shapes(monkeypatch):
    """Shapes that go to the compiled network."""
    found = []
    call = _CompiledFeatures.__call__

    def recorded(self, pixels):
        found.append(tuple(pixels.shape))
        return call(self, pixels)

    monkeypatch.setattr(_CompiledFeatures, "__call__", recorded)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_heights_from_one_shape(tiny_checkpoint, traced, shapes, dtype):
    imagery, layers = cube((200, 140)), ("height", "bin_spread")
    given = dict(device="cpu", dtype=dtype, layers=layers, **OPTIONS)
    expected = imagery.chmv2.predict(tiny_checkpoint, **given)
    found = imagery.chmv2.predict(tiny_checkpoint, compile=True, **given)
    for name in expected:
        tolerance = 5e-4 if dtype == "float32" else 0.05
        np.testing.assert_allclose(found[name], expected[name], atol=tolerance)
    assert traced == [{"dynamic": False}]
    assert set(shapes) == {(3, 3, 64, 64)}


def test_tiles_that_fill_a_batch_are_not_counted(traced):
    from xchmv2.inference import tiles_forwarded

    torch.manual_seed(3)
    model, before = CHMv2ForDepthEstimation(reference.tiny_config()), tiles_forwarded()
    cube((64, 64)).chmv2.predict(model, compile=True, **OPTIONS)
    assert tiles_forwarded() - before == 1


def test_what_does_not_compile_runs_plainly_with_one_warning(monkeypatch):
    calls = []

    def fail(function, **options):
        calls.append(1)
        raise RuntimeError("no working C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", fail)
    features = _CompiledFeatures(lambda pixels: pixels + 1)
    with pytest.warns(
        UserWarning,
        match=r"failed on cpu \(RuntimeError: no working C\+\+ compiler\); the network runs unc",
    ):
        assert features(torch.zeros(2)).tolist() == [1, 1]
    assert features(torch.zeros(3)).tolist() == [1, 1, 1]
    assert len(calls) == 1


def test_running_out_of_memory_is_no_failure_of_the_compiler(monkeypatch):
    def full(pixels):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda function, **options: full)
    features = _CompiledFeatures(lambda pixels: pixels)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        features(torch.zeros(2))
    assert not features._failed


def test_each_shape_is_announced_once(traced, caplog):
    features = _CompiledFeatures(lambda pixels: pixels + 1)
    with caplog.at_level(logging.INFO, "xchmv2.inference.predictor"):
        for size in (2, 3, 2, 3):
            features(torch.zeros(size))
    assert [record.getMessage()[:17] for record in caplog.records] == [
        "compiled for [2] ",
        "compiled for [3] ",
    ]


def test_compiled_and_plain_predictors_share_the_model(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(held, "_predictors", {})
    plain = resolve_model(tiny_checkpoint, device="cpu", dtype="float32")
    compiled = resolve_model(tiny_checkpoint, device="cpu", dtype="float32", compile=True)
    assert plain != compiled
    assert resolve_model(compiled).compile
    one, two = get_predictor(plain), get_predictor(compiled)
    assert one.model is two.model
    assert (one._compiled is None, two._compiled is None) == (True, False)


def test_graph_keys_tell_compiled_from_plain(tiny_checkpoint):
    lazy = cube((64, 64)).chunk()
    plain = lazy.chmv2.predict(tiny_checkpoint, **OPTIONS)
    compiled = [lazy.chmv2.predict(tiny_checkpoint, compile=True, **OPTIONS) for _ in range(2)]
    assert compiled[0].data.name == compiled[1].data.name != plain.data.name


@pytest.mark.slow
def test_compiled_code_gives_the_same_heights(tiny_checkpoint):
    """Needs a compiler; without one the plain network answers, and the warning fails the test."""
    imagery = cube((64, 100))
    given = dict(device="cpu", dtype="float32", **OPTIONS)
    expected = imagery.chmv2.predict(tiny_checkpoint, **given)
    found = imagery.chmv2.predict(tiny_checkpoint, compile=True, **given)
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_predictor_takes_compile_as_an_argument():
    model = reference.whole_tile_model()
    made = Predictor(
        model, device="cpu", dtype="float32", mean=(0, 0, 0), std=(1, 1, 1), compile=True
    )
    assert made._compiled is not None
