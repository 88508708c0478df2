import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import torch
from conftest import cube

from xchmv2.errors import CheckpointError, DeviceError
from xchmv2.inference import (
    ModelSpec,
    clear_models,
    get_predictor,
    predictor,
    resolve_dtype,
    resolve_model,
    tiles_forwarded,
)
from xchmv2.inference import models as held
from xchmv2.inference import predictor as batches
from xchmv2.model import CHMv2ForDepthEstimation, CHMv2ImageProcessor

# Private imports: what a process holds, and the memory of its card, are replaced.

OPTIONS = dict(tile=64, overlap=16, block=128)


def test_out_of_memory_halves_the_batch_with_one_warning():
    imagery = cube((200, 200))
    expected = imagery.chmv2.predict(reference.whole_tile_model(), **OPTIONS)
    model = reference.WholeTileModel(reference.tiny_config(min_depth=0.002))  # another content
    model.largest_batch = 2
    before = tiles_forwarded()
    with pytest.warns(
        UserWarning, match=r"out of memory at \d+ tiles per batch; continuing with"
    ) as got:
        found = imagery.chmv2.predict(model, batch_size=8, **OPTIONS)
    assert len(got) == 1
    np.testing.assert_allclose(found, expected, atol=5e-4)
    sides = [len(reference.starts(200, 64, 16, o)[0]) for o in (-8_000_000, 800_000)]
    assert tiles_forwarded() - before == sides[0] * sides[1]


def test_one_tile_too_many_is_an_error():
    model = reference.WholeTileModel(reference.tiny_config(min_depth=0.003))
    model.largest_batch = 0
    with pytest.raises(DeviceError, match=r"memory for one tile on cpu.*smaller tile"):
        cube((64, 64)).chmv2.predict(model, **OPTIONS)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_matter(batch_size):
    imagery = cube((200, 230))
    model = CHMv2ForDepthEstimation(reference.tiny_config())
    expected = imagery.chmv2.predict(model, **OPTIONS)
    found = imagery.chmv2.predict(model, batch_size=batch_size, **OPTIONS)
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_threads_load_one_model(tiny_checkpoint, monkeypatch):
    loads = []
    original = held._load
    monkeypatch.setattr(held, "_load", lambda *given: loads.append(given) or original(*given))
    wanted = resolve_model(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(held, "_predictors", {})
    barrier = threading.Barrier(8)

    def get(_):
        barrier.wait()
        return get_predictor(wanted)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(get, range(8)))
    assert len(found) == len(loads) == 1


def test_forwards_on_one_device_are_serialised():
    a, b = (
        get_predictor(resolve_model(CHMv2ForDepthEstimation(reference.tiny_config(min_depth=d))))
        for d in (0.01, 0.02)
    )
    assert a._lock is b._lock


def test_spec_is_small_and_hashable(tiny_checkpoint):
    found = resolve_model(tiny_checkpoint)
    assert found == resolve_model(str(tiny_checkpoint))
    assert {found: 1}[found] == 1
    assert len(repr(found)) < 1000
    assert len(found.weights_sha256) == 64


def test_overwritten_checkpoint_has_another_spec_and_old_graphs_refuse_it(tmp_path):
    torch.manual_seed(1)
    CHMv2ForDepthEstimation(reference.tiny_config()).save_pretrained(tmp_path)
    lazy = cube((64, 64)).chunk().chmv2.predict(tmp_path, **OPTIONS)
    torch.manual_seed(2)
    CHMv2ForDepthEstimation(reference.tiny_config()).save_pretrained(tmp_path)
    again = cube((64, 64)).chunk().chmv2.predict(tmp_path, **OPTIONS)
    assert lazy.data.name != again.data.name
    with pytest.raises(
        CheckpointError, match=r"weights the prediction was planned with.*call predict"
    ):
        lazy.compute(scheduler="sync")
    again.compute(scheduler="sync")


def test_normalisation_of_the_checkpoint_is_used(tiny_checkpoint, tmp_path):
    model = CHMv2ForDepthEstimation.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path)
    imagery = cube((64, 64))
    plain = imagery.chmv2.predict(tmp_path, **OPTIONS)
    CHMv2ImageProcessor(image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    assert np.abs(imagery.chmv2.predict(tmp_path, **OPTIONS) - plain).max() > 1e-4


def test_live_model_is_kept_as_it_was():
    model = CHMv2ForDepthEstimation(reference.tiny_config()).eval()
    imagery = cube((64, 64))
    expected = imagery.chmv2.predict(copy.deepcopy(model), **OPTIONS)
    lazy = imagery.chunk().chmv2.predict(model, **OPTIONS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), expected)
    changed = imagery.chmv2.predict(model, **OPTIONS)
    assert np.abs(changed - expected).max() > 0


def test_live_model_of_another_process():
    unknown = ModelSpec("live:0", None, "0", "0", "cpu", "float32")
    with pytest.raises(CheckpointError, match=r"live model .* process.*model.save_pretrained"):
        get_predictor(unknown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(device="gpu"), r"'auto' or a torch device.*found device='gpu'"),
        (dict(dtype="float16"), r"'auto', 'float32', 'bfloat16'.*found dtype='float16'"),
    ],
)
def test_unknown_device_or_dtype(tiny_checkpoint, options, message):
    with pytest.raises(DeviceError, match=message):
        resolve_model(tiny_checkpoint, **options)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_devices_that_are_not_here(tiny_checkpoint, device):
    with pytest.raises(
        DeviceError, match=rf"expected the device '{device}' on this machine.*'cpu'"
    ):
        resolve_model(tiny_checkpoint, device=device)


def test_one_copy_of_a_model_serves_every_spelling(tiny_checkpoint):
    spec = resolve_model(tiny_checkpoint, device=torch.device("cpu"), dtype="float32")
    found = get_predictor(spec)
    assert get_predictor(resolve_model(tiny_checkpoint, device="cpu", dtype="float32")) is found
    if not torch.cuda.is_available():
        assert get_predictor(resolve_model(tiny_checkpoint, device="auto")) is found


@pytest.mark.parametrize(("own", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_only_where_the_card_has_its_own(monkeypatch, own, expected):
    def supported(including_emulation=True):  # as torch, which emulates it on older cards
        return own or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_dtype("auto", "cuda:0") == resolve_dtype("auto", "auto") == expected
    assert resolve_dtype("bfloat16", "cuda:0") == "bfloat16"
    assert resolve_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize("order", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_each_precision_has_its_own_weights(tiny_checkpoint, monkeypatch, order):
    monkeypatch.setattr(held, "_predictors", {})
    found = {
        dtype: get_predictor(resolve_model(tiny_checkpoint, device="cpu", dtype=dtype)).model
        for dtype in order
    }
    assert found["float32"].dtype == torch.float32
    assert found["bfloat16"].dtype == torch.bfloat16


def test_only_a_few_models_are_held(monkeypatch):
    monkeypatch.setattr(held, "_live_models", {})
    monkeypatch.setattr(held, "_predictors", {})
    depths = [0.1 * (i + 1) for i in range(6)]
    models = [CHMv2ForDepthEstimation(reference.tiny_config(min_depth=d)) for d in depths]
    specs = [resolve_model(model) for model in models]
    assert len(held._live_models) == 4
    get_predictor(specs[-1])
    with pytest.raises(CheckpointError, match=r"no longer does \(it holds 4\)"):
        get_predictor(specs[0])
    clear_models()
    with pytest.raises(CheckpointError, match=r"live model"):
        get_predictor(specs[-1])


def test_rescaling_of_the_checkpoint_is_used(tiny_checkpoint, tmp_path):
    model = CHMv2ForDepthEstimation.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path)
    imagery = cube((64, 64))
    image = imagery.to_dataarray("band").transpose("y", "x", "band").values
    for settings in (dict(rescale_factor=1 / 127.5), dict(do_rescale=False, image_std=[50.0] * 3)):
        processor = CHMv2ImageProcessor(**settings)
        processor.save_pretrained(tmp_path)
        with torch.inference_mode():
            expected = model(**processor(image, return_tensors="pt")).predicted_depth[0]
        found = imagery.chmv2.predict(tmp_path, dtype="float32", device="cpu", **OPTIONS)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bfloat16_is_close_to_float32(tiny_checkpoint):
    imagery = cube((128, 128))
    exact = imagery.chmv2.predict(tiny_checkpoint, dtype="float32", **OPTIONS)
    coarse = imagery.chmv2.predict(tiny_checkpoint, dtype="bfloat16", **OPTIONS)
    assert coarse.dtype == np.float32
    difference = np.sqrt(((coarse - exact) ** 2).mean())
    assert 0 < difference < 0.05
    assert coarse.attrs["chmv2_dtype"] == "bfloat16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(tiny_checkpoint):
    imagery = cube((200, 200))
    layers = ("height", "bin_spread", "overlap_disagreement")
    exact = imagery.chmv2.predict(tiny_checkpoint, device="cpu", layers=layers, **OPTIONS)
    cuda = imagery.chmv2.predict(
        tiny_checkpoint, device="cuda", dtype="float32", layers=layers, **OPTIONS
    )
    for name in exact:
        np.testing.assert_allclose(cuda[name], exact[name], atol=5e-3)
    coarse = imagery.chmv2.predict(tiny_checkpoint, device="cuda", **OPTIONS)
    assert np.sqrt(((coarse - exact["canopy_height"]) ** 2).mean()) < 0.05


def test_automatic_batch_on_a_cpu_keeps_the_pixels_of_one_default_tile():
    found = get_predictor(resolve_model(reference.whole_tile_model()))
    window = predictor._Window(None, None, (0, 0), predictor.Scaling())
    for side, expected in [(448, 1), (224, 4), (64, 49), (1024, 1)]:
        span = (slice(0, side), np.ones(side, np.float32))
        assert found._resolve_batch("auto", window, (span, span)) == expected


@pytest.mark.parametrize(
    ("free", "kept", "compiled", "expected"),
    [
        (10 * 2**30, 0, False, 4),
        (7 * 2**30, 3 * 2**30, False, 4),  # what torch holds but does not use is free too
        (18 * 2**30, 0, False, 8),
        (2**30, 0, False, 1),
        (10 * 2**30, 0, True, 4),
        (2**40, 0, False, 64),
        (2**40, 0, True, 8),
    ],
)
def test_automatic_batch_on_a_card_comes_from_its_free_memory(
    monkeypatch, free, kept, compiled, expected
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**50))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**20 + kept)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    card = torch.device("cuda", 0)
    batches._free_memory.cache_clear()
    assert batches.resolve_batch("auto", 448 * 448, card, compiled=compiled) == expected
    assert batches.resolve_batch(3, 448 * 448, card, compiled=compiled) == 3
    batches._free_memory.cache_clear()


def test_spec_fields_are_frozen(tiny_checkpoint):
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve_model(tiny_checkpoint).device = "cuda"
