"""Train the demonstration model: ``python -m tests.evaluation.train_demo FOLDER``.

A killed run goes on where its last epoch ended.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xchmv2.datasets import synthetic_forest
from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation, CHMv2ImageProcessor
from xchmv2.model.files import IMAGE_MEAN, IMAGE_STD
from xchmv2.model.loss import Curriculum
from xchmv2.training.pairs import Pair, read_pair, split_crops
from xchmv2.training.run_state import partial_folder
from xchmv2.training.tuning import Schedule, Trainer, run

# Private imports: it trains from scratch, which fine_tune does not.

#: Seeds of synthetic forests: those that the model was trained on, and those it never saw.
TRAINING_SEEDS = range(1000, 1120)
TEST_SEEDS = range(9000, 9012)


SEED = 0
SIDE = 640
TILE = 128
SCHEDULE = Schedule(
    epochs=42,
    steps=100,
    batch_size=8,
    lr=5e-4,
    patience=42,
    # From random weights the smooth absolute error learns fastest; gradients sharpen it at the end.
    curriculum=Curriculum(silog_until=0.0, gradient_from=0.6, gradient_until=0.9),
)
#: Patches of 8 px keep the detail that small crowns need, and the first stage is their embedding.
CONFIG = CHMv2Config(
    backbone_config={
        "patch_size": 8,
        "image_size": TILE,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "key_bias": True,
        "layer_norm_eps": 1e-6,
        # Tiles of 448 px are larger than the crops: coordinates are stretched while training.
        "pos_embed_rescale": 3.0,
        "out_indices": [0, 1, 2, 4],
        "return_class_token": True,
    },
    patch_size=8,
    reassemble_factors=[2, 1, 0.5, 0.25],
    post_process_channels=[48, 64, 96, 128],
    fusion_hidden_size=48,
    head_hidden_size=32,
    number_output_channels=64,
    max_depth=48.0,
    bins_strategy="linear",
    norm_strategy="softmax",
)


def training_pair(seed: int, side: int = SIDE) -> Pair:
    """Make one date of a synthetic forest, in a season and year drawn from its seed.

    Parameters
    ----------
    seed : int
        Seed of the forest.
    side : int, default 640
        Side of the scene [px].

    Returns
    -------
    Pair
        Imagery and true heights [m].
    """
    rng = np.random.default_rng(seed)
    date = f"{rng.integers(2016, 2026)}-{rng.integers(5, 10):02d}-{rng.integers(1, 28):02d}"
    forest = synthetic_forest((side, side), times=(date,), seed=seed).isel(time=0)
    return read_pair(forest[["red", "green", "blue"]], forest["canopy_height"])


def new_model(seed: int = SEED) -> CHMv2ForDepthEstimation:
    """Make the untrained network, with a head that starts stable without normalisation layers."""
    torch.manual_seed(seed)
    model = CHMv2ForDepthEstimation(CONFIG)
    for name, parameter in model.head.named_parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        if "convolution1.weight" in name or "head.0.weight" in name:
            parameter.data *= 2**0.5  # a ReLU follows
        if "convolution2.weight" in name:
            parameter.data *= 0.1  # residual branches start small
    last = model.head.conv_depth.last
    nn.init.trunc_normal_(last.weight, std=0.02)
    if last.bias is not None:
        last.bias.data = -torch.linspace(0, 4, CONFIG.number_output_channels)  # low heights first
    return model


def train(output: Path, *, schedule: Schedule = SCHEDULE, seeds: Any = TRAINING_SEEDS) -> Path:
    """Train on synthetic forests and write the checkpoint in float16.

    Parameters
    ----------
    output : Path
        Folder for the checkpoint; files that are there are replaced.
    schedule : Schedule
        Length and speed.
    seeds : iterable of int
        Forests to train on.

    Returns
    -------
    Path
        The folder.
    """
    with ProcessPoolExecutor(2) as pool:
        pairs = list(pool.map(partial(training_pair, side=SIDE), seeds))
    sampler, held_out = split_crops(pairs, TILE, 0.01, np.random.default_rng(SEED))
    trainer = Trainer(
        new_model(),
        sampler,
        held_out,
        schedule,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        seed=SEED,
        dtype=torch.bfloat16,
    )
    state = partial_folder(output)
    run(trainer, state, {"seed": SEED, "config": CONFIG.to_dict()}, progress=True)
    trainer.model.half().save_pretrained(output)
    CHMv2ImageProcessor().save_pretrained(output)
    shutil.rmtree(state)
    return output


if __name__ == "__main__":
    train(Path(sys.argv[1]))
