"""Converted weights give what autocast gives, and leave the model alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_model import make_pair, random_pixels, tiny_settings
from torch.nn.attention import SDPBackend, sdpa_kernel

from xchmv2.datasets import synthetic_forest
from xchmv2.errors import DemoModelWarning
from xchmv2.model.modeling import convert_weights

# Private imports: weights are converted as a Predictor converts them.

torch.set_num_threads(1)


@torch.inference_mode()
def test_converted_weights_give_the_bits_of_autocast():
    model, _ = make_pair(tiny_settings())
    low = convert_weights(model, torch.bfloat16)
    pixels = random_pixels(2)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (m.height(pixels, spread=True) for m in (model, low))
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def test_model_itself_stays_as_it_was():
    model, _ = make_pair(tiny_settings())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    low = convert_weights(model, torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.float32
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in low.parameters()}
    assert not shared


def test_matrices_are_converted_and_norms_are_not():
    model, _ = make_pair(tiny_settings())
    low = convert_weights(model, torch.bfloat16)
    kept = {name for name, p in low.named_parameters() if p.dtype == torch.float32}
    assert all("norm" in name or "lambda1" in name or "token" in name for name in kept)
    assert len(kept) == 2 + 3 + 5 * 6  # norm, tokens, and in each block two norms and two scales
    assert low.backbone.model.layer[0].attention.qkv_weight.dtype == torch.bfloat16


def test_bfloat16_on_the_demonstration_weights_stays_within_the_promise():
    """0.05 m RMS; single pixels at the edges of crowns differ by up to half a metre."""
    forest = synthetic_forest((160, 160), times=["2024-07-10"]).isel(time=0)
    imagery = forest[["red", "green", "blue"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DemoModelWarning)
        exact, coarse = (
            imagery.chmv2.predict("demo", device="cpu", dtype=dtype, tile=160, overlap=32)
            for dtype in ("float32", "bfloat16")
        )
    difference = (coarse - exact).values
    assert 0 < np.sqrt((difference**2).mean()) < 0.05
    assert np.abs(difference).max() < 1.0


@torch.inference_mode()
def test_attention_gets_what_flash_attention_takes(monkeypatch):
    """16-bit, rows of a head unbroken, neither mask nor dropout."""
    seen = []
    original = F.scaled_dot_product_attention

    def recorded(*given, **options):
        seen.append((given, options))
        return original(*given, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    model, _ = make_pair(tiny_settings())
    with torch.autocast("cpu", torch.bfloat16):
        convert_weights(model, torch.bfloat16).height(random_pixels(2))
    assert len(seen) == 5
    for given, options in seen:
        assert [x.dtype for x in given] == [torch.bfloat16] * 3
        assert [x.stride(-1) for x in given] == [1] * 3
        assert [x.shape for x in given] == [(2, 2, 1 + 2 + 24, 16)] * 3
        assert options == {"dropout_p": 0.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_flash_attention_runs_on_a_gpu():
    model, _ = make_pair(tiny_settings())
    low = convert_weights(model.cuda(), torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        height, _ = low.height(random_pixels(2).cuda())
    assert height.isfinite().all()
