"""The networks that are measured: published architecture, smaller ones, random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xchmv2.errors import ConfigError
from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation
from xchmv2.model.files import DEMO, DEMO_FOLDER

from .timing import Action

# Private imports: the demonstration model's folder.

#: Names of ``--config``: the published ViT-L, one of 4.3 M parameters, one that costs next to
#: nothing, and the demonstration model with its own weights.
CONFIGS = ("vit-l", "small", "tiny", "demo")

#: Settings of the configs that were made up for this.
SMALLER: dict[str, dict[str, object]] = {
    "small": {
        "backbone_config": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_register_tokens": 4,
            "return_class_token": True,
            "out_indices": [2, 3, 5, 6],
        },
        "post_process_channels": [32, 64, 96, 192],
        "fusion_hidden_size": 64,
        "head_hidden_size": 32,
    },
    "tiny": {
        "backbone_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_register_tokens": 1,
            "return_class_token": True,
            "out_indices": [1, 2, 3, 4],
        },
        "post_process_channels": [4, 4, 8, 8],
        "fusion_hidden_size": 8,
        "head_hidden_size": 4,
        "number_output_channels": 16,
    },
}


def write_checkpoint(config: str, folder: Path) -> Path:
    """Write a checkpoint with random weights; the demonstration model has its own.

    Parameters
    ----------
    config : str
        One of ``CONFIGS``.
    folder : path
        Where to write.

    Returns
    -------
    Path
        Folder that both implementations load.

    Raises
    ------
    ConfigError
        If there is no such config.
    """
    if config not in CONFIGS:
        raise ConfigError(
            f"one of {', '.join(CONFIGS)}", f"config={config!r}", "for example --config small"
        )
    if config == DEMO:
        return DEMO_FOLDER
    settings = SMALLER.get(config)
    model = CHMv2ForDepthEstimation(CHMv2Config.from_dict(settings) if settings else None)
    _randomise(model)
    model.save_pretrained(folder)
    return folder


def count_flop(forward: Action) -> float:
    """Count the operations of one forward, attention by its two products included."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        forward()
    return float(counter.get_total_flops())


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Draw weights that keep activations about as large as they are, so that heights vary."""
    generator = torch.Generator().manual_seed(0)
    for name, weights in sorted(model.named_parameters()):
        drawn = torch.randn(weights.shape, generator=generator)
        if "norm" in name or "lambda" in name:
            weights.copy_(1 + 0.1 * drawn if name.endswith("weight") else 0.3 * drawn)
        elif weights.ndim >= 2 and "token" not in name:
            weights.copy_(drawn / weights[0].numel() ** 0.5)
        else:
            weights.copy_(0.1 * drawn)
