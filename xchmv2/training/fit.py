"""The training loop: epochs of crops, validation on held-out blocks, early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xchmv2.errors import CHMv2Error
from xchmv2.model.loss import Curriculum, chmv2_loss
from xchmv2.model.modeling import CHMv2ForDepthEstimation
from xchmv2.training.crops import Crop, CropSampler, cut_crop
from xchmv2.training.pairs import Pair

# Share of the training over which the learning rate rises (paper: 6k of 100k iterations).
_WARM_UP = 0.06
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Parameters
    ----------
    epochs : int
        Most epochs.
    steps : int
        Batches per epoch.
    batch_size : int
        Crops per batch.
    lr : float
        Highest learning rate; it rises over the first 6 % and falls as a cosine to 0.
    patience : int
        Epochs without a better validation error before training stops.
    curriculum : Curriculum
        Weights of the losses over the training.
    """

    epochs: int
    steps: int
    batch_size: int
    lr: float
    patience: int
    curriculum: Curriculum

    def rate(self, progress: float) -> float:
        """Learning rate at a share of the training."""
        rise = min(1.0, progress / _WARM_UP)
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """A model being trained on crops.

    Parameters
    ----------
    model : CHMv2ForDepthEstimation
        Parameters that require gradients are trained.
    sampler : CropSampler
        Training crops.
    held_out : sequence of Crop
        Validation crops.
    schedule : Schedule
        Length, speed and losses.
    mean, std : tuple of float
        Normalisation of red, green and blue.
    seed : int
        With the epoch's number it determines the epoch's crops, so a resumed run draws the same.
    dtype : torch.dtype or None
        Arithmetic under autocast; None for float32.
    """

    def __init__(
        self,
        model: CHMv2ForDepthEstimation,
        sampler: CropSampler,
        held_out: Sequence[Crop],
        schedule: Schedule,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.sampler, self.held_out = model, sampler, list(held_out)
        self.schedule, self.seed, self.dtype = schedule, seed, dtype
        self._mean, self._std = (
            torch.tensor(values, device=model.device).view(1, 3, 1, 1) for values in (mean, std)
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=1e-3
        )

    def run_epoch(self, epoch: int, on_step: Callable[[float], None]) -> dict[str, float]:
        """Train for one epoch, counted from 1, and evaluate; returns the row of the history."""
        started, losses = time.perf_counter(), []
        rng = np.random.default_rng([self.seed, epoch])
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**31)))
            for step in range(self.schedule.steps):
                progress = ((epoch - 1) * self.schedule.steps + step) / self._all_steps
                losses.append(self._step(progress, rng))
                on_step(losses[-1])
        row = {"epoch": epoch, "loss": float(np.mean(losses)), **self.evaluate()}
        return {**row, "seconds": round(time.perf_counter() - started, 3)}

    def evaluate(self) -> dict[str, float]:
        """Mean absolute error and bias on the held-out blocks [m]; NaN if there are none."""
        self.model.eval()
        errors = [self._errors(self.sampler.pairs, crop) for crop in self.held_out]
        if not errors:
            return {"validation_mae": math.nan, "validation_bias": math.nan}
        error = np.concatenate(errors)
        return {
            "validation_mae": float(np.abs(error).mean()),
            "validation_bias": float(error.mean()),
        }

    @property
    def _all_steps(self) -> int:
        return self.schedule.epochs * self.schedule.steps

    def _step(self, progress: float, rng: np.random.Generator) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(progress)
        image, valid, height = self.sampler.draw(self.schedule.batch_size, rng)
        target = torch.from_numpy(height).to(self.model.device)
        loss = chmv2_loss(
            self._heights(image, valid),
            target,
            progress=progress,
            curriculum=self.schedule.curriculum,
        )
        if not loss.isfinite():
            raise CHMv2Error(
                "a finite loss",
                f"{loss.item()} at {progress:.0%} of the training: it has diverged",
                "delete the .partial folder and train slower: "
                f"fine_tune(..., lr={self.schedule.lr / 10:g})",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _LARGEST_GRADIENT)
        self.optimizer.step()
        return float(loss.detach())

    def _heights(self, image: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]) -> Tensor:
        """Heights [m] (B, h, w) of crops (B, 3, h, w) between 0 and 1."""
        device = self.model.device
        pixels = (torch.from_numpy(image).to(device) - self._mean) / self._std
        pixels = pixels.masked_fill(~torch.from_numpy(valid).to(device)[:, None], 0.0)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            return self.model.height(pixels)[0]

    def _errors(self, pairs: Sequence[Pair], crop: Crop) -> npt.NDArray[np.float32]:
        image, valid, height = cut_crop(pairs, crop, self.sampler.tile)
        with torch.inference_mode():
            found = self._heights(image[None], valid[None])[0].cpu().numpy()
        error: npt.NDArray[np.float32] = (found - height)[np.isfinite(height)]
        return error
