"""Converted weights give what autocast gives, and leave the model alone."""

from __future__ import annotations

import torch
from reference_model import make_pair, random_pixels, tiny_settings

from xchmv2.model.precision import convert_weights

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
