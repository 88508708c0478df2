"""The fused kernel, run by triton's interpreter where there is no GPU, against the plain way."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from reference_model import tiny_config

from xchmv2.model import height as fused
from xchmv2.model.config import _CHOICES
from xchmv2.model.height import FeaturesToHeight

# Private imports: the kernel alone is held against the plain way.

torch.set_num_threads(1)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton"
)
COMBINATIONS = list(itertools.product(_CHOICES["bins_strategy"], _CHOICES["norm_strategy"]))


def stage(bins="chmv2_mixlog", norm="chmv2_mixlog", count=256):
    config = tiny_config(number_output_channels=count, bins_strategy=bins, norm_strategy=norm)
    return FeaturesToHeight(config)


def random_layer(channels=128, count=256, pixels=150, scale=1.0, dtype=torch.float32, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(pixels, channels, generator=generator).relu()
    weight = scale * torch.randn(count, channels, generator=generator) / channels**0.5
    bias = scale * torch.randn(count, generator=generator) + shift
    return tuple(x.to(DEVICE, dtype) for x in (features, weight, bias))


@torch.inference_mode()
def both(head, layer, spread=True):
    features, weight, bias = layer
    found = fused._reduce_features(
        features,
        weight,
        bias,
        head._bins(len(weight), DEVICE),
        head.reduction,
        spread=spread,
    )
    logits = features.float() @ weight.float().t()
    expected = head.reduce(logits if bias is None else logits + bias.float(), spread=spread)
    return found, expected


def assert_close(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize(("bins", "norm"), COMBINATIONS)
def test_kernel_is_the_plain_way(bins, norm):
    assert_close(*both(stage(bins, norm), random_layer(scale=3.0)))


@needs_triton
@pytest.mark.parametrize("norm", _CHOICES["norm_strategy"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not CUDA, reason="the interpreter multiplies bfloat16 as if its bits were integers"
            ),
        ),
    ],
)
def test_kernel_in_low_precision_sums_in_float32(norm, dtype):
    assert_close(*both(stage(norm=norm), random_layer(dtype=dtype)))


@needs_triton
@pytest.mark.parametrize(("channels", "count"), [(16, 16), (32, 64), (256, 128)])
@pytest.mark.parametrize("pixels", [1, 64, 65])
def test_sizes(channels, count, pixels):
    assert_close(*both(stage(count=count), random_layer(channels, count, pixels)))


@needs_triton
@pytest.mark.parametrize("norm", _CHOICES["norm_strategy"])
@pytest.mark.parametrize("shift", [-1e4, 300.0, 1e6])
def test_extreme_logits(norm, shift):
    found, expected = both(stage(norm=norm), random_layer(shift=shift))
    assert found[0].isfinite().all()
    assert (found[1] >= 0).all()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("norm", _CHOICES["norm_strategy"])
def test_not_a_number_stays_one(norm):
    features, weight, bias = random_layer()
    features[3, 5] = torch.nan
    found, expected = both(stage(norm=norm), (features, weight, bias))
    for mine, other in zip(found, expected, strict=True):
        assert mine.isnan().nonzero().tolist() == other.isnan().nonzero().tolist() == [[3]]


@needs_triton
def test_without_bias_or_spread():
    features, weight, _ = random_layer()
    found, expected = both(stage(), (features, weight, None), spread=False)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].numel() == 0


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xchmv2.model.kernels import height_kernel

capability, dtype, bins, channels, norm, spread = sys.argv[1:]
sizes = {"BINS": int(bins), "CHANNELS": int(channels), "STEP": min(32, int(channels)), "ROWS": 64}
constants = {**sizes, "NORM": norm, "SPREAD": spread == "True"}
signature = dict.fromkeys(("features", "weight"), f"*{dtype}")
signature |= dict.fromkeys(("bias", "bins", "height", "spread"), "*fp32")
signature |= {"pixels": "i32"} | dict.fromkeys(("offset", "tiny", "scale"), "fp32")
signature |= dict.fromkeys(constants, "constexpr")
compiled = triton.compile(
    ASTSource(height_kernel, signature, constants),
    target=GPUTarget("cuda", int(capability), 32),
    options={"num_warps": 8},
)
print(len(compiled.asm["cubin"]), compiled.asm["ptx"].count("max.NaN.f32"))
"""
LARGER = [
    ("bf16", (256, 32), "relu", False),
    ("fp16", (256, 32), "softmax", True),
    ("fp32", (256, 32), "sigmoid", True),
    ("bf16", (256, 512), "sigmoid", True),
]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "size", "norm", "spread"),
    [
        ("bf16", (16, 16), "relu", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGER),
    ],
)
def test_kernel_compiles_without_a_gpu(capability, dtype, size, norm, spread, tmp_path):
    """The interpreter takes what the compiler refuses, and one process can only do either."""
    words = [str(word) for word in (capability, dtype, *size, norm, spread)]
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *words],
        env={**here, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    length, keeping = map(int, done.stdout.split())
    assert length > 1000
    assert keeping >= 1 + (norm == "relu")  # the interpreter's maxima all keep NaN


@pytest.mark.parametrize(
    ("dtype", "bins", "channels", "expected"),
    [
        (torch.bfloat16, 256, 128, True),
        (torch.float32, 16, 16, True),
        (torch.float64, 256, 128, False),
        (torch.float32, 1, 128, False),
        (torch.float32, 512, 128, False),
        (torch.float32, 200, 128, False),
        (torch.float32, 256, 96, False),
        (torch.float32, 256, 8, False),
    ],
)
def test_what_fits(dtype, bins, channels, expected):
    assert fused._fits(dtype, bins, channels) == expected


def test_processors_take_the_plain_way():
    features, weight, _ = (x.cpu() for x in random_layer())
    with torch.inference_mode():
        assert not fused._can_fuse(features, weight)


def test_a_kernel_that_fails_is_reported_once(monkeypatch):
    """The device is remembered, and asked no more."""

    def fail(*given, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(fused, "_reduce_features", fail)
    monkeypatch.setattr(fused, "_broken", set())
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    features, weight, bias = random_layer()
    given = (features, weight, bias, bias.float(), stage().reduction)
    with pytest.warns(
        UserWarning,
        match=r"fused kernel does not run on .*RuntimeError: no such.*"
        r"computed without it, more slowly",
    ):
        assert fused._try_reduce(*given, spread=False) is None
    assert fused._broken == {str(features.device)}


def test_running_out_of_memory_is_for_the_caller(monkeypatch):
    def fail(*given, **options):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(fused, "_reduce_features", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    features, weight, bias = random_layer()
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        fused._try_reduce(features, weight, bias, bias, stage().reduction, spread=False)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_module_takes_the_kernel(dtype, monkeypatch):
    head, convolution = stage(), torch.nn.Conv2d(128, 256, 1).to(DEVICE, dtype)
    features = torch.randn(2, 128, 40, 56, device=DEVICE, dtype=dtype).relu()
    features = features.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = head(features, convolution, spread=True)
        assert str(DEVICE) not in fused._broken
        monkeypatch.setattr(head, "_fused", lambda *given, **options: None)
        expected = head(features, convolution, spread=True)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
