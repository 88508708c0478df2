"""Linear layers through a convolution against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference_model import make_pair, random_pixels, tiny_settings

from xchmv2.model import products
from xchmv2.model.products import Linear, linear

# Private imports: a layer alone is held against torch's.

torch.set_num_threads(1)

both = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="needs a torch with MKL and oneDNN",
)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 1, 7), (2, 9, 7), (3, 4, 5, 7)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_product_is_that_of_torch(shape, bias):
    x, weight = random(*shape), random(11, 7)
    offset = random(11) if bias else None
    found = linear(x, weight, offset)
    torch.testing.assert_close(found, F.linear(x, weight, offset), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()


@torch.inference_mode()
def test_inputs_and_weights_in_any_layout():
    x, weight = random(6, 9, 14)[:, 2:7, ::2], random(7, 22)[:, ::2].t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_no_rows_give_no_rows():
    assert linear(random(0, 7), random(11, 7)).shape == (0, 11)


@both
@torch.inference_mode()
def test_only_float32_on_a_processor_goes_to_the_convolution(monkeypatch):
    taken = []
    monkeypatch.setattr(
        F, "conv2d", lambda x, *rest: taken.append(x.dtype) or torch.conv2d(x, *rest)
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        linear(random(4, 7, dtype=dtype), random(11, 7, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(random(4, 7), random(11, 7)).dtype == torch.bfloat16
    assert taken == [torch.float32]


def test_gradients_take_the_plain_way(monkeypatch):
    monkeypatch.setattr(F, "conv2d", None)
    layer, x = Linear(7, 11), random(4, 7)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((11,), 4.0))


@torch.inference_mode()
def test_model_gives_the_heights_of_torchs_own_layers(monkeypatch):
    model, _ = make_pair(tiny_settings())
    pixels = random_pixels(2)
    found = model.height(pixels, spread=True)
    monkeypatch.setattr(products, "_convolves", lambda x: False)
    for mine, plain in zip(found, model.height(pixels, spread=True), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-4)
