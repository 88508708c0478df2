"""The model gives what the published implementation gives, for the same random weights."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import pytest
import torch
from reference_model import (
    assert_heights_close,
    make_pair,
    published_model,
    random_pixels,
    randomise,
    tiny_config,
    tiny_settings,
)

from xchmv2.errors import ConfigError, ImageryError
from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation, DepthEstimatorOutput
from xchmv2.model.config import _CHOICES

# Private imports: layers alone are held against published ones.

torch.set_num_threads(1)

COMBINATIONS = list(
    itertools.product(
        *(_CHOICES[name] for name in ("bins_strategy", "norm_strategy", "readout_type"))
    )
)
BACKBONES = {
    "gated": {"use_gated_mlp": True},
    "no key bias": {"key_bias": False},
    "no attention biases": {"query_bias": False, "key_bias": False, "value_bias": False},
    "only key bias": {"query_bias": False, "value_bias": False},
    "no other biases": {"proj_bias": False, "mlp_bias": False},
    "no registers": {"num_register_tokens": 0},
    "stages not normalised": {"apply_layernorm": False},
    "stem and early stages": {"out_indices": [0, 1, 2, 3], "apply_layernorm": False},
    "negative indices": {"out_indices": [-4, -3, -2, -1]},
    "named stages": {"out_indices": None, "out_features": ["stem", "stage2", "stage3", "stage5"]},
    "rope theta": {"rope_theta": 10.0},
    "oblong patches": {"patch_size": [8, 16], "image_size": [64, 128]},
    "large eps": {"layer_norm_eps": 1e-2},
    **{act: {"hidden_act": act} for act in ("silu", "quick_gelu", "gelu_pytorch_tanh", "relu")},
}
HEADS = {
    "regression": {"number_output_channels": 1},
    "other factors": {"reassemble_factors": [2, 3, 1, 0.25]},
    "float factors": {"reassemble_factors": [4, 2, 1, 0.3]},
    "two bins": {"number_output_channels": 2},
    "low range": {"min_depth": 0.5, "max_depth": 40.0},
}


@torch.inference_mode()
def compare(settings, *shapes):
    ours, theirs = make_pair(settings)
    for shape in shapes or [(2, 64, 96)]:
        pixels = random_pixels(*shape)
        expected = theirs(pixels).predicted_depth
        assert expected.isfinite().all()
        assert expected.std() > 0
        assert_heights_close(ours(pixels).predicted_depth, expected)


@pytest.mark.parametrize(("bins", "norm", "readout"), COMBINATIONS)
def test_every_combination(bins, norm, readout):
    settings = tiny_settings(bins_strategy=bins, norm_strategy=norm, readout_type=readout)
    compare(settings, (1, 64, 96), (3, 96, 32))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 80, 48), (2, 50, 100), (1, 17, 97)])
def test_sizes_that_are_no_multiple_of_32(shape):
    compare(tiny_settings(), shape)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    compare(tiny_settings(BACKBONES[name]))


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    compare(tiny_settings(**HEADS[name]))


def test_fewer_stages():
    settings = tiny_settings({"out_indices": [2, 5]}, post_process_channels=[8, 12])
    compare(settings)


def test_all_logits_negative():
    ours, theirs = make_pair(tiny_settings(number_output_channels=256))
    for model in (ours, theirs):
        torch.nn.init.constant_(model.head.conv_depth.head[_last(model)].weight, 0.0)
        torch.nn.init.constant_(model.head.conv_depth.head[_last(model)].bias, -1.0)
    with torch.inference_mode():
        height = ours(random_pixels()).predicted_depth
        assert_heights_close(height, theirs(random_pixels()).predicted_depth)
    torch.testing.assert_close(height, torch.full_like(height, 33.147), rtol=0, atol=1e-3)


def _last(model):
    return "4" if isinstance(model, CHMv2ForDepthEstimation) else 4


@pytest.mark.parametrize("backbone", [{}, {"out_indices": [0, 1, 2, 3]}])
@torch.inference_mode()
def test_hidden_states_and_attentions(backbone):
    ours, theirs = make_pair(tiny_settings(backbone))
    asked = {"output_hidden_states": True, "output_attentions": True}
    found, expected = ours(random_pixels(2), **asked), theirs(random_pixels(2), **asked)
    assert len(found.hidden_states) == len(expected.hidden_states) == 6
    assert len(found.attentions) == len(expected.attentions) == 5
    for mine, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    for mine, other in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert_heights_close(found.predicted_depth, expected.predicted_depth)


@torch.inference_mode()
def test_output_behaves_as_published():
    ours, theirs = make_pair(tiny_settings())
    pixels = random_pixels()
    found, expected = ours(pixels), theirs(pixels)
    assert list(found) == list(expected) == ["predicted_depth"]
    assert found[0] is found["predicted_depth"] is found.predicted_depth
    assert found.to_tuple() == (found.predicted_depth,)
    assert found[:1] == (found[0],)
    assert (found.loss, found.hidden_states, found.attentions) == (None, None, None)
    assert "loss" not in found
    with pytest.raises(KeyError):
        found["loss"]
    as_tuple = ours(pixels, output_attentions=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(theirs(pixels, output_attentions=True, return_dict=False)) == 2
    assert len(DepthEstimatorOutput(loss=pixels, predicted_depth=pixels)) == 2


@torch.inference_mode()
def test_height_is_what_forward_gives():
    ours, _ = make_pair(tiny_settings())
    height, spread = ours.height(random_pixels(2), spread=True)
    torch.testing.assert_close(height, ours(random_pixels(2)).predicted_depth, rtol=0, atol=0)
    assert height.dtype == spread.dtype == torch.float32
    assert height.shape == spread.shape == (2, 64, 96)
    assert (spread >= 0).all()
    assert ours.height(random_pixels(2))[1] is None


def test_spread_of_a_regression_is_refused():
    model = CHMv2ForDepthEstimation(tiny_config(number_output_channels=1))
    with pytest.raises(ConfigError, match=r"a model with bins.*regression.*leave 'bin_spread' out"):
        model.height(random_pixels(), spread=True)


def test_only_needed_blocks_run():
    model = CHMv2ForDepthEstimation(tiny_config({"out_indices": [0, 1, 2, 3]})).eval()
    calls = []
    for block in model.backbone.model.layer:
        block.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        model(random_pixels())
    assert len(calls) == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_agree(attention):
    settings = tiny_settings({"pos_embed_rescale": None})
    ours, _ = make_pair(settings)
    theirs = published_model(settings, attention)
    theirs.load_state_dict(ours.state_dict())
    pixels = random_pixels(2, 32, 32)
    for model in (ours, theirs):
        model.train()
        model(pixels).predicted_depth.square().mean().backward()
    published = {name: p.grad for name, p in theirs.named_parameters()}
    fused = ours.backbone.model.layer[0].attention.qkv_weight.grad
    parts = [published[f"backbone.model.layer.0.attention.{n}_proj.weight"] for n in "qkv"]
    _assert_gradients_close(fused, torch.cat(parts))
    compared = 0
    for name, parameter in ours.named_parameters():
        other = published.get(name)
        if other is not None:
            _assert_gradients_close(parameter.grad, other)
            compared += 1
    assert compared > 80


def _assert_gradients_close(mine, other):
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_training_after_inference():
    """Cached tables and bins made in inference mode must not stop a backward pass."""
    model = CHMv2ForDepthEstimation(tiny_config({"pos_embed_rescale": None}, max_depth=77.0))
    pixels = random_pixels(1, 48, 80)
    with torch.inference_mode():
        model.eval()(pixels)
    model.train()(pixels).predicted_depth.mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "mask_token" not in n]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_training_augments_positions_and_drops_paths():
    settings = tiny_settings(
        {
            "pos_embed_shift": 0.5,
            "pos_embed_jitter": 1.5,
            "drop_path_rate": 0.5,
            "attention_dropout": 0.1,
        }
    )
    model = CHMv2ForDepthEstimation(CHMv2Config(**settings))
    randomise(model)
    pixels = random_pixels()
    with torch.inference_mode():
        one, two = (model.train()(pixels).predicted_depth for _ in range(2))
        three, four = (model.eval()(pixels).predicted_depth for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(three, four)


@torch.inference_mode()
def test_augmentation_changes_positions_within_its_limits():
    config = tiny_config({"pos_embed_shift": 0.5, "pos_embed_jitter": 1.5}).backbone
    from xchmv2.model.backbone import RotaryEmbedding, _patch_coordinates

    coordinates = _patch_coordinates(4, 6, torch.device("cpu"))
    for _ in range(20):
        moved = RotaryEmbedding(config)._augment(coordinates)
        assert (moved.abs() <= (1 + 0.5) * 1.5 * 2).all()
        steps = moved.view(4, 6, 2)[1:, 1:] - moved.view(4, 6, 2)[:-1, :-1]
        torch.testing.assert_close(steps, steps[:1, :1].expand_as(steps))  # a scale and a shift


@torch.inference_mode()
def test_drop_path_keeps_the_mean():
    from xchmv2.model.backbone import LayerScale

    scale = LayerScale(tiny_config({"drop_path_rate": 0.25}).backbone).train()
    torch.nn.init.ones_(scale.lambda1)
    torch.manual_seed(0)
    out = scale(torch.zeros(4000, 1, 32), torch.ones(4000, 1, 32))
    values = out[:, 0, 0].unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    assert abs(float(out.mean()) - 1) < 0.05


@torch.inference_mode()
def test_bfloat16_is_near_float32():
    ours, _ = make_pair(tiny_settings())
    pixels = random_pixels(2)
    exact = ours.height(pixels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed, spread = ours.height(pixels, spread=True)
    low = copy.deepcopy(ours).to(torch.bfloat16)(pixels).predicted_depth
    for height in (mixed, low):
        assert height.dtype == torch.float32
        assert (height - exact).square().mean().sqrt() < 0.02 * exact.mean()
    assert spread.dtype == torch.float32


@torch.inference_mode()
def test_copies_and_pickles_are_equal():
    ours, _ = make_pair(tiny_settings())
    pixels = random_pixels()
    expected = ours(pixels).predicted_depth
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(pixels).predicted_depth, expected)


def test_threads_agree():
    ours, _ = make_pair(tiny_settings())
    found = []

    def work():
        with torch.inference_mode():
            found.append(ours(random_pixels(1, 112, 64)).predicted_depth)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(other, found[0]) for other in found)


def test_state_dict_has_the_published_keys():
    theirs = published_model(tiny_settings())
    ours = CHMv2ForDepthEstimation(tiny_config())
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def test_state_dict_errors_use_the_published_names():
    model = CHMv2ForDepthEstimation(tiny_config())
    state = model.state_dict()
    prefix = "backbone.model.layer.3.attention."
    broken = dict(state)
    del broken[f"{prefix}k_proj.weight"], broken[f"{prefix}v_proj.bias"]
    broken[f"{prefix}q_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(broken)
    for name in ("k_proj.weight", "v_proj.bias", "size mismatch for " + prefix + "q_proj.weight"):
        assert name in str(error.value)
    report = model.load_state_dict(
        {k: v for k, v in state.items() if "k_proj" not in k}, strict=False
    )
    assert len(report.missing_keys) == 10
    assert not report.unexpected_keys


def test_initial_weights_are_published_ones():
    torch.manual_seed(0)
    model = CHMv2ForDepthEstimation(
        tiny_config({"layerscale_value": 0.3, "initializer_range": 0.05})
    )
    theirs = published_model(tiny_settings({"layerscale_value": 0.3, "initializer_range": 0.05}))
    for name, other in theirs.state_dict().items():
        mine = model.state_dict()[name]
        if other.std() == 0 or other.numel() == 1:
            torch.testing.assert_close(mine, other, msg=name)
        else:
            tolerance = 4 * float(other.std()) / other.numel() ** 0.5
            assert abs(float(mine.std() - other.std())) < max(
                tolerance, 0.1 * float(other.std())
            ), name


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 64, 64), r"\[batch, 3, height, width\], found shape \[3, 64, 64\]; stack"),
        (torch.zeros(1, 4, 64, 64), r"found shape \[1, 4, 64, 64\]"),
        (
            torch.zeros(1, 3, 8, 64),
            r"one patch of 16 x 16 px, found shape \[1, 3, 8, 64\]",
        ),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "found torch.uint8; prepare images with"),
        ([[1.0]], "found list; prepare images with CHMv2ImageProcessor"),
    ],
)
def test_wrong_pixels_are_refused(pixels, message):
    model = CHMv2ForDepthEstimation(tiny_config())
    with pytest.raises(ImageryError, match=message):
        model(pixels)


def test_wrong_config_is_refused():
    with pytest.raises(ConfigError, match=r"a CHMv2Config, found dict"):
        CHMv2ForDepthEstimation({"patch_size": 16})


@pytest.mark.slow
@torch.inference_mode()
def test_published_size_at_448_px():
    """ViT-L with its 337 million parameters random; heights agree within 1 mm."""
    settings = CHMv2Config().to_dict()
    ours, theirs = make_pair(settings)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    pixels = random_pixels(1, 448, 448)
    height, expected = ours(pixels).predicted_depth, theirs(pixels).predicted_depth
    assert height.shape == (1, 448, 448)
    assert expected.std() > 0.1
    torch.testing.assert_close(height, expected, rtol=0, atol=1e-3)
