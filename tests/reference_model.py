"""The published implementation of the model, small and with every weight random."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch

from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation

BACKBONE = {
    "model_type": "dinov3_vit",
    "image_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 5,
    "num_register_tokens": 2,
    "key_bias": True,
    "layer_norm_eps": 1e-6,
    "out_indices": [1, 2, 4, 5],
    "return_class_token": True,
}
HEAD = {
    "post_process_channels": [8, 12, 16, 20],
    "fusion_hidden_size": 16,
    "head_hidden_size": 8,
    "number_output_channels": 24,
}


def tiny_settings(backbone: dict[str, Any] | None = None, **head: Any) -> dict[str, Any]:
    """Settings of a model of 100 thousand parameters, as both implementations take them."""
    return HEAD | head | {"backbone_config": BACKBONE | (backbone or {})}


def tiny_config(backbone: dict[str, Any] | None = None, **head: Any) -> CHMv2Config:
    return CHMv2Config(**tiny_settings(backbone, **head))


@functools.cache
def published() -> Any:
    """Import transformers once, whatever it or its dependencies warn about while imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers import CHMv2ForDepthEstimation as _  # noqa: F401  # the import is lazy
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def published_model(settings: dict[str, Any], attention: str = "eager") -> Any:
    """Build the published model, not yet randomised."""
    settings = settings | {"backbone_config": dict(settings["backbone_config"])}
    config = published().CHMv2Config(**settings)
    config._attn_implementation = attention
    config.backbone_config._attn_implementation = attention
    return published().CHMv2ForDepthEstimation(config).eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Give every parameter random values: norms, scales, biases and tokens too.

    Matrices keep the size of activations about constant, so that no layer is drowned by another.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.2 * noise
        elif "lambda1" in name:
            noise = 0.3 + 0.1 * noise
        elif parameter.ndim >= 2 and "token" not in name:
            noise = gain * noise / parameter[0].numel() ** 0.5
        else:
            noise = 0.1 * noise
        parameter.copy_(noise)


def make_pair(settings: dict[str, Any], seed: int = 0) -> tuple[CHMv2ForDepthEstimation, Any]:
    """Build our model and the published one with the same random weights."""
    theirs = published_model(settings)
    randomise(theirs, seed)
    ours = CHMv2ForDepthEstimation(CHMv2Config.from_dict(settings)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def write_published(folder: Path, settings: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """Write a checkpoint folder with the published implementation; return its model."""
    model = published_model(settings or tiny_settings())
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


def random_pixels(batch: int = 1, height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def assert_heights_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    """Compare heights [m] within ``relative * (1 + height)``."""
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative)
