"""Bins and their weights: height and spread against plain float64 arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference_model import published, tiny_config, tiny_settings

from xchmv2.errors import ConfigError
from xchmv2.model import height as module
from xchmv2.model.config import _CHOICES
from xchmv2.model.height import FeaturesToHeight, _height_bins, validate_spread

# Private imports: the last step alone is held against float64.

torch.set_num_threads(1)

CPU = torch.device("cpu")
COMBINATIONS = list(itertools.product(_CHOICES["bins_strategy"], _CHOICES["norm_strategy"]))


def reducer(bins="chmv2_mixlog", norm="chmv2_mixlog", count=256):
    config = tiny_config(number_output_channels=count, bins_strategy=bins, norm_strategy=norm)
    return FeaturesToHeight(config)


def reference(logits, bins, norm):
    """Mean and standard deviation of the distribution, in float64, by definition."""
    x = logits.double()
    centres = _height_bins(bins, x.shape[1], 0.001, 96.0, CPU).double()
    weights = {
        "linear": lambda: x.relu() + 0.1,
        "chmv2_mixlog": lambda: x.relu() + 1e-8,
        "softmax": lambda: x.softmax(1),
        "sigmoid": lambda: x.sigmoid(),
    }[norm]()
    weights = weights / weights.sum(1, keepdim=True)
    mean = (weights * centres).sum(1)
    spread = (weights * (centres - mean[:, None]) ** 2).sum(1).sqrt()
    scale = 8.0 if norm == "chmv2_mixlog" else 1.0
    return scale * mean, scale * spread


@pytest.mark.parametrize(("bins", "norm"), COMBINATIONS)
def test_height_and_spread_by_definition(bins, norm):
    logits = 3 * torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    height, spread = reducer(bins, norm).reduce(logits, spread=True)
    expected, deviation = reference(logits, bins, norm)
    torch.testing.assert_close(height.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread.double(), deviation, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bins", "norm"), COMBINATIONS)
def test_height_is_the_published_one(bins, norm):
    settings = tiny_settings(number_output_channels=64, bins_strategy=bins, norm_strategy=norm)
    from transformers.models.chmv2.modeling_chmv2 import CHMv2FeaturesToDepth

    theirs = CHMv2FeaturesToDepth(published().CHMv2Config(**settings))
    for scale in (1e-9, 1e-4, 1.0, 50.0):
        logits = scale * torch.randn(2, 64, 5, 7, generator=torch.Generator().manual_seed(1))
        expected = theirs(logits)[:, 0]
        rows = logits.permute(0, 2, 3, 1).reshape(-1, 64)
        height, _ = reducer(bins, norm, 64).reduce(rows)
        torch.testing.assert_close(height.view(2, 5, 7), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bins", "norm"), COMBINATIONS)
@pytest.mark.parametrize("value", [-1e4, -200.0, 0.0, 1e-12, 300.0, 1e6])
def test_extreme_logits_stay_finite(bins, norm, value):
    height, spread = reducer(bins, norm).reduce(torch.full((3, 256), value), spread=True)
    assert height.isfinite().all()
    assert spread.isfinite().all()
    assert (spread >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_reduced_in_float32(dtype):
    logits = torch.full((2, 256), -1.0, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        height, spread = reducer().reduce(logits, spread=True)
    assert height.dtype == spread.dtype == torch.float32
    torch.testing.assert_close(height, torch.full((2,), 33.147), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("bins", "norm"), COMBINATIONS)
def test_spread_of_one_bin_is_none(bins, norm):
    """A narrow distribution far from 0 m, where a difference of squares would cancel."""
    logits = torch.full((1, 256), -1e4)
    logits[0, 250] = 1e4
    _, spread = reducer(bins, norm).reduce(logits, spread=True)
    expected = reference(logits, bins, norm)[1]
    torch.testing.assert_close(spread.double(), expected, rtol=1e-2, atol=1e-4)


def test_spread_of_two_bins_is_half_their_distance():
    logits = torch.full((1, 256), -1e4)
    logits[0, [100, 101]] = 40.0
    height, spread = reducer("linear", "softmax").reduce(logits, spread=True)
    step = (96 - 0.001) / 255
    assert float(spread) == pytest.approx(step / 2, rel=1e-3)
    assert float(height) == pytest.approx(0.001 + 100.5 * step, rel=1e-6)


@pytest.mark.parametrize("strategy", _CHOICES["bins_strategy"])
def test_bins_span_the_range(strategy):
    bins = _height_bins(strategy, 256, 0.001, 96.0, CPU)
    top = 12.0 if strategy == "chmv2_mixlog" else 96.0
    assert bins.dtype == torch.float32
    assert float(bins[0]) == pytest.approx(0.001, rel=1e-5)
    assert float(bins[-1]) == pytest.approx(top, rel=1e-5)
    assert (bins.diff() > 0).all()
    assert _height_bins(strategy, 256, 0.001, 96.0, CPU) is bins


def test_bins_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        _height_bins("log", 17, 0.5, 60.0, CPU)
    assert not _height_bins("log", 17, 0.5, 60.0, CPU).is_inference()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("spread", [True, False])
def test_chunks_change_nothing(monkeypatch, layout, spread):
    features = torch.randn(2, 8, 13, 7, generator=torch.Generator().manual_seed(0))
    features = features.to(memory_format=layout)
    convolution = torch.nn.Conv2d(8, 24, 1)
    stage = reducer(count=24)
    with torch.inference_mode():
        whole = stage(features, convolution, spread=spread)
        logits = convolution(features).permute(0, 2, 3, 1).reshape(-1, 24)
        monkeypatch.setattr(module, "_CPU_LOGITS", 24 * 5)
        parts = stage(features, convolution, spread=spread)
        expected, deviation = stage.reduce(logits, spread=spread)
    for found in (whole, parts):
        torch.testing.assert_close(found[0], expected.view(2, 13, 7), rtol=1e-5, atol=1e-5)
        if spread:
            torch.testing.assert_close(found[1], deviation.view(2, 13, 7), rtol=1e-4, atol=1e-4)
        else:
            assert found[1] is None


def test_logits_are_never_whole():
    """The largest tensor of a 448-px tile would be its logits, 205 MB."""
    features, convolution = torch.zeros(1, 8, 448, 448), torch.nn.Conv2d(8, 256, 1)
    sizes = []
    stage = reducer()
    reduce = stage.reduce

    def recorded(logits, **options):
        sizes.append(logits.numel())
        return reduce(logits, **options)

    stage.reduce = recorded
    with torch.inference_mode():
        stage(features, convolution)
    assert sum(sizes) == 448 * 448 * 256
    assert max(sizes) * 4 < 10e6


def test_empty_batch():
    height, spread = reducer()(torch.zeros(0, 8, 4, 4), torch.nn.Conv2d(8, 256, 1), spread=True)
    assert height.shape == spread.shape == (0, 4, 4)


def test_one_channel_is_plain_regression():
    height, _ = reducer(count=1).reduce(torch.tensor([[-3.0], [2.5]]))
    torch.testing.assert_close(height, torch.tensor([0.001, 2.501]))


def test_spread_needs_bins():
    validate_spread(tiny_config())
    with pytest.raises(ConfigError, match=r"number_output_channels=1.*leave 'bin_spread' out"):
        validate_spread(tiny_config(number_output_channels=1))
