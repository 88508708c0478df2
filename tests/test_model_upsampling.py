"""The fused upsampling and convolution against the plain pair, and against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference_model import make_pair, random_pixels, tiny_settings

from xchmv2.model import head as module
from xchmv2.model.head import _tap_matrix, _upsample, _upsample_convolve, _upsample_convolve_strips

# Private imports: a layer alone is held against the plain pair.

torch.set_num_threads(1)

SIZES = [(1, 1), (1, 5), (2, 3), (7, 1), (13, 9), (16, 40), (33, 17)]


def convolution(channels=6, filters=5, *, bias=True, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Conv2d(channels, filters, 3, padding=1, bias=bias)


def random_map(height, width, batch=2, channels=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x.to(dtype, memory_format=torch.channels_last)


def plain(x, conv):
    return conv(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_fused_is_the_plain_pair(size, bias):
    conv, x = convolution(bias=bias), random_map(*size)
    found = _upsample_convolve(x, conv)
    torch.testing.assert_close(found, plain(x, conv), rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_fused_in_float64_is_exact_to_rounding():
    conv, x = convolution().double(), random_map(12, 20, dtype=torch.float64)
    torch.testing.assert_close(_upsample_convolve(x, conv), plain(x, conv), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 28, 37])
def test_strips_reach_all_that_they_need(size):
    """Outside the pixels that a strip reads, the matrix has nothing but rounding to give."""
    matrix = _tap_matrix(size, torch.float32)
    for start in range(2 * size):
        for stop in range(start + 1, min(2 * size, start + 33) + 1):
            low, high = module._reach(size, start, stop)
            assert 0 <= low < high <= size
            outside = matrix[start:stop].clone()
            outside[:, 3 * low : 3 * high] = 0
            assert outside.abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@torch.inference_mode()
def test_length_of_strips_changes_nothing(monkeypatch, rows):
    conv, x = convolution(), random_map(11, 14)
    expected = _upsample_convolve(x, conv)
    monkeypatch.setattr(module, "_STRIP_ROWS", rows)
    monkeypatch.setattr(module, "_STEP_COLUMNS", rows + 2)
    torch.testing.assert_close(_upsample_convolve(x, conv), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_empty_batch():
    assert _upsample_convolve(random_map(3, 4)[:0], convolution()).shape == (0, 5, 6, 8)


@torch.inference_mode()
def test_maps_in_any_layout():
    conv, x = convolution(), random_map(9, 6).contiguous()
    torch.testing.assert_close(_upsample_convolve(x, conv), plain(x, conv), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_autocast_gives_bfloat16_as_near_as_the_plain_pair():
    conv, x = convolution(64, 32), random_map(24, 20, channels=64)
    exact = plain(x, conv)
    with torch.autocast("cpu", torch.bfloat16):
        found, other = _upsample_convolve(x, conv), plain(x.bfloat16(), conv)
    assert found.dtype == torch.bfloat16
    error, of_plain = ((y.float() - exact).square().mean().sqrt() for y in (found, other))
    assert error < 2 * of_plain


def test_gradients_take_the_plain_pair():
    conv, x = convolution(), random_map(5, 4).requires_grad_()
    _upsample_convolve(x, conv).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    found = conv.weight.grad.clone()
    conv.zero_grad()
    plain(other, conv).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(found, conv.weight.grad)


def test_matrix_made_in_inference_mode_is_no_inference_tensor():
    with torch.inference_mode():
        assert not _tap_matrix(71, torch.float32).is_inference()


def test_upsample_keeps_corners():
    x = random_map(3, 4)
    up = _upsample(x)
    assert up.shape == (2, 6, 6, 8)
    torch.testing.assert_close(up[..., [0, -1], :][..., [0, -1]], x[..., [0, -1], :][..., [0, -1]])


@pytest.mark.parametrize("size", [(2, 3), (16, 40), (33, 17)])
@torch.inference_mode()
def test_strips_are_the_map_image_by_image(size):
    conv, x = convolution(), random_map(*size)
    strips = list(_upsample_convolve_strips(x, conv))
    assert all(len(strip) == 1 and strip.shape[2] <= module._STRIP_ROWS for strip in strips)
    whole = torch.cat(strips, dim=2).view(5, 2, 2 * size[0], 2 * size[1]).transpose(0, 1)
    assert torch.equal(whole, _upsample_convolve(x, conv))


def test_strips_of_what_is_trained_are_one_whole():
    conv, x = convolution(), random_map(20, 4)
    (whole,) = _upsample_convolve_strips(x, conv)
    torch.testing.assert_close(whole, plain(x, conv))


@pytest.mark.parametrize("spread", [True, False])
@torch.inference_mode()
def test_heights_by_strips_are_those_of_whole_features(spread):
    model, _ = make_pair(tiny_settings())
    pixels = random_pixels(3)
    found, expected = (
        model.height(pixels, spread=spread),
        model.to_height(model.features(pixels), spread=spread),
    )
    for mine, whole in zip(found, expected, strict=True):
        assert (mine is None and whole is None) or torch.equal(mine, whole)
