"""fine_tune(): training the network further on local imagery and reference heights."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import xarray as xr
from dask.base import tokenize
from torch import Tensor

from xchmv2.errors import CHMv2Error
from xchmv2.inference import ModelSource, resolve_device
from xchmv2.model import CHMv2ForDepthEstimation, CHMv2ImageProcessor
from xchmv2.model.checkpoint import resolve_checkpoint, state_dict_sha256
from xchmv2.model.files import IMAGE_MEAN, IMAGE_STD, MODEL, TILE
from xchmv2.model.loss import Curriculum, chmv2_loss
from xchmv2.predict import progress_bar
from xchmv2.raster import validate_choice, validate_grid, validate_number
from xchmv2.training.pairs import Crop, CropSampler, Pair, cut_crop, read_pair, split_crops
from xchmv2.training.run_state import (
    RunState,
    load_state,
    partial_folder,
    remove_state,
    restore_best,
    save_state,
)

# Pixels drawn in an epoch, as a multiple of those with a reference height.
_PASSES_PER_EPOCH = 4


@dataclass(frozen=True, eq=False)
class FineTuned:
    """Result of a fine-tuning run.

    Parameters
    ----------
    folder : Path
        Checkpoint folder: pass it as ``model=`` to ``predict``, or load it with transformers.
    history : pandas.DataFrame
        One row per epoch, the first for the untrained model: loss, validation MAE and bias [m],
        seconds.
    best_epoch : int
        The epoch whose weights were kept.
    """

    folder: Path
    history: pd.DataFrame
    best_epoch: int


def fine_tune(
    imagery: xr.Dataset | xr.DataArray | Sequence[xr.Dataset | xr.DataArray],
    reference: xr.DataArray | Sequence[xr.DataArray],
    model: ModelSource = MODEL,
    *,
    output: str | os.PathLike[str],
    train: Literal["head", "all"] = "head",
    epochs: int = 20,
    batch_size: int = 8,
    lr: float = 1e-4,
    tile: int = TILE,
    validation: float = 0.2,
    patience: int = 5,
    seed: int = 0,
    device: str = "auto",
    curriculum: Curriculum | None = None,
    bands: Sequence[Hashable] | None = None,
    value_range: Any = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
    erode: int = 0,
    resolution: float | None = None,
    pixel_size: float | None = None,
    progress: bool = True,
) -> FineTuned:
    """Train a model further on reference heights, for example from lidar.

    Parameters
    ----------
    imagery : Dataset, DataArray or a sequence of them
        One date of imagery each, in any chunking; read into memory.
    reference : DataArray or a sequence of them
        Canopy heights [m] for each image, on any grid.
    model : str, path or CHMv2ForDepthEstimation
        Model to start from.
    output : path
        Checkpoint folder to write; it must not exist. The state of an unfinished run is kept
        beside it in ``<output>.partial``, and the same call resumes after its last epoch.
    train : {"head", "all"}
        Train the head on a frozen backbone, as CHMv2 was trained, or everything.
    epochs : int, default 20
        Largest number of epochs; each draws four times the number of reference pixels.
    batch_size : int, default 8
        Crops per step.
    lr : float, default 1e-4
        Highest learning rate.
    tile : int, default 448
        Side of a crop [px], a multiple of 32.
    validation : float, default 0.2
        Share of the area held out for validation, in squares of one tile, because neighbouring
        pixels are too similar for a random split. 0 for none.
    patience : int, default 5
        Epochs without a lower validation MAE before training stops.
    seed : int, default 0
        Determines held-out blocks and crops.
    device : str, default "auto"
        Torch device.
    curriculum : Curriculum, optional
        Weights of the losses over the training; the published one by default.
    bands, value_range, nodata, valid, erode, resolution, pixel_size
        How to read the imagery, as of :func:`xchmv2.predict.predict`. They apply to every image;
        for images of several areas mask each by ``imagery.where(...)`` instead of ``valid``.
    progress : bool, default True
        Whether to show a progress bar.

    Returns
    -------
    FineTuned
        The folder and the history.

    Raises
    ------
    ImageryError
        If the imagery does not fit the model, as for ``predict``; there are no reference heights
        under it; or there are fewer than two tiles to train on.
    CHMv2Error
        If reference heights lie outside 0 to 120 m, only one of imagery and reference has a CRS,
        the output exists, an option is out of range, or ``<output>.partial`` belongs to a run with
        other settings.

    References
    ----------
    CHMv2, arXiv 2603.06382, section 2.6 and Algorithm 1.
    """
    folder = Path(output)
    if folder.exists():
        raise CHMv2Error(
            f"the output folder {folder} exists already, and nothing is overwritten",
            fix="choose another name, or delete it",
        )
    validate_choice("train", train, ("head", "all"))
    for name, count in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        validate_number(name, count, 5, least=1, whole=True)
    validate_number("seed", seed, 0, least=0, whole=True)
    validate_number("lr", lr, 1e-4, above=0)
    validate_number("validation", validation, 0.2, least=0, below=1)
    validate_grid(tile, 0, None)
    reading = {
        "bands": bands,
        "value_range": value_range,
        "nodata": nodata,
        "valid": valid,
        "erode": erode,
        "resolution": resolution,
        "pixel_size": pixel_size,
    }
    pairs = [read_pair(*pair, **reading) for pair in _paired(imagery, reference)]
    sampler, held_out = split_crops(pairs, tile, validation, np.random.default_rng(seed))
    network, mean, std = _starting_point(model, train, device)
    known = sum(int(np.isfinite(pair.height).sum()) for pair in pairs)
    schedule = Schedule(
        epochs=epochs,
        steps=max(1, math.ceil(_PASSES_PER_EPOCH * known / (tile**2 * batch_size))),
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        curriculum=curriculum or Curriculum(),
    )
    settings = {  # everything that determines the run
        **asdict(schedule),
        "model": state_dict_sha256(network),
        "data": tokenize(*((p.image, p.valid, p.height) for p in pairs)),
        "train": train,
        "tile": tile,
        "validation": validation,
        "seed": seed,
    }
    trainer = Trainer(network, sampler, held_out, schedule, mean=mean, std=std, seed=seed)
    state = run(trainer, partial_folder(folder), settings, progress=progress)
    return _finish(folder, trainer, state, CHMv2ImageProcessor(image_mean=mean, image_std=std))


def run(trainer: Trainer, folder: Path, settings: dict[str, Any], *, progress: bool) -> RunState:
    """Train to the end, resuming from the state in the folder; the model gets its best weights.

    The state is kept after each epoch; `settings` are everything that determines the run.
    """
    state = load_state(folder, settings, trainer.model, trainer.optimizer)
    schedule = trainer.schedule
    total, done = schedule.epochs * schedule.steps, max(0, state.epoch) * schedule.steps
    if state.epoch < 0:
        row = {"epoch": 0, "loss": math.nan, **trainer.evaluate(), "seconds": 0.0}
        state.history.append(row)
        save_state(folder, state, trainer.model, trainer.optimizer)
    with progress_bar(total=total, initial=done, disable=not progress, unit="step") as bar:
        while state.epoch < schedule.epochs and state.epoch - state.best_epoch < schedule.patience:
            row = trainer.run_epoch(state.epoch + 1, lambda loss: bar.update())
            state.history.append(row)
            save_state(folder, state, trainer.model, trainer.optimizer)
            shown = {"loss": f"{row['loss']:.3f}"}
            if math.isfinite(row["validation_mae"]):  # something is held out
                shown["mae"] = f"{row['validation_mae']:.2f} m"
            bar.set_postfix(shown)
    restore_best(folder, trainer.model)
    trainer.model.eval()
    return state


def _finish(
    folder: Path, trainer: Trainer, state: RunState, processor: CHMv2ImageProcessor
) -> FineTuned:
    """Write the checkpoint, then delete the state of the run."""
    history = pd.DataFrame(state.history).astype({"epoch": int})
    draft = partial_folder(folder) / "checkpoint"
    trainer.model.save_pretrained(draft)
    processor.save_pretrained(draft)
    history.to_csv(draft / "history.csv", index=False)
    draft.replace(folder)
    remove_state(partial_folder(folder))
    return FineTuned(folder, history, state.best_epoch)


def _paired(
    imagery: xr.Dataset | xr.DataArray | Sequence[xr.Dataset | xr.DataArray],
    reference: xr.DataArray | Sequence[xr.DataArray],
) -> list[tuple[xr.Dataset | xr.DataArray, xr.DataArray]]:
    images = [imagery] if isinstance(imagery, xr.Dataset | xr.DataArray) else list(imagery)
    heights = [reference] if isinstance(reference, xr.DataArray) else list(reference)
    if len(images) != len(heights) or not images:
        raise CHMv2Error(
            "as many references as images, at least one",
            f"{len(images)} images and {len(heights)} references",
            "pass one reference for each image, in the same order",
        )
    return list(zip(images, heights, strict=True))


def _starting_point(
    model: ModelSource, train: str, device: str
) -> tuple[CHMv2ForDepthEstimation, tuple[float, ...], tuple[float, ...]]:
    """Load or copy the model and freeze what is not trained; returns its normalisation too."""
    where = resolve_device(device)
    if isinstance(model, CHMv2ForDepthEstimation):
        network = copy.deepcopy(model).float().to(where)
        mean, std = IMAGE_MEAN, IMAGE_STD
    else:
        checkpoint = resolve_checkpoint(model)
        network = CHMv2ForDepthEstimation.from_pretrained(checkpoint.folder, device_map=where)
        mean, std = checkpoint.mean_std()
    network.requires_grad_(True)
    network.backbone.requires_grad_(train == "all")
    return network, mean, std


# Share of the training over which the learning rate rises (paper: 6k of 100k iterations).
_WARM_UP = 0.06
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a training.

    `epochs`: their largest number; `steps`: batches per epoch; `batch_size`: crops per batch; `lr`:
    highest learning rate, which rises over the first 6 % and falls as a cosine to 0; `patience`:
    epochs without a better validation error before training stops; `curriculum`: weights of the
    losses.
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

    Parameters that require gradients are trained; `mean` and `std` normalise red, green and blue.
    `seed` determines, with the number of the epoch, its crops, so that a resumed run draws the
    same. `dtype` is the precision under autocast, None for float32.
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
        started, losses, steps = time.perf_counter(), [], self.schedule.steps
        rng = np.random.default_rng([self.seed, epoch])
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**31)))
            for step in range(steps):
                progress = ((epoch - 1) * steps + step) / (self.schedule.epochs * steps)
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
                f"training has diverged: the loss is {loss.item()} at {progress:.0%} of its steps",
                fix="delete the .partial folder and lower the learning rate: "
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
