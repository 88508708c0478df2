"""fine_tune(): training the network further on local imagery and reference heights."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import xarray as xr
from dask.base import tokenize
from torch import Tensor

from xchmv2.change.registration import Shift
from xchmv2.errors import CHMv2Error, ImageryError, warn
from xchmv2.inference import ModelSource, resolve_device
from xchmv2.model import CHMv2ForDepthEstimation, CHMv2ImageProcessor
from xchmv2.model.checkpoint import resolve_checkpoint, state_dict_sha256
from xchmv2.model.files import IMAGE_MEAN, IMAGE_STD, MODEL, TILE
from xchmv2.model.loss import LOWEST, Curriculum, charbonnier, chmv2_loss
from xchmv2.predict import progress_bar
from xchmv2.raster import validate_choice, validate_grid, validate_number
from xchmv2.training.pairs import (
    Crop,
    CropSampler,
    read_pair,
    split_crops,
    write_registration,
)
from xchmv2.training.run_state import (
    RunState,
    load_state,
    partial_folder,
    restore_best,
    save_state,
)

# Pixels drawn in an epoch, as a multiple of those with a reference height.
_PASSES_PER_EPOCH = 4
# Reference heights from which a pixel is a tree [m].
_TREE = 1.0
# Shares of the trees that the start reads as ground: from the first, SiLog would pull the others
# down to them; from the second, and below this norm of Charbonnier's gradient (about 1 otherwise),
# the bins are saturated.
_BLIND, _SATURATED, _LEAST_GRADIENT = 0.1, 0.9, 0.01
# A result is better than another if its mean absolute error is below this multiple of the other's.
_BETTER = 0.99


@dataclass(frozen=True, eq=False, repr=False)
class FineTuned:
    """Result of a fine-tuning run.

    Parameters
    ----------
    folder : Path
        Checkpoint folder: pass it as ``model=`` to ``predict``, or load it with transformers.
    history : pandas.DataFrame
        One row per epoch, the first for the untrained model: loss, training MAE, validation MAE
        and bias [m], seconds.
    best_epoch : int
        The epoch whose weights were kept.
    scores : pandas.DataFrame
        Mean absolute errors [m] on the training data and, if some were held out, on the validation
        data: of the model ``before`` and ``after``, and of a ``constant``, the median of the
        training heights everywhere.
    blind : float
        Share of the trees (reference heights of at least 1 m) that the model read as ground (below
        0.1 m) before.
    curriculum : Curriculum
        Weights of the losses that were used.
    registration : tuple of Shift
        Of each image, how far the reference heights lie from where the imagery shows them: ``dy``
        down and ``dx`` to the right [px], or the ``problem`` why it cannot be told.
    """

    folder: Path
    history: pd.DataFrame
    best_epoch: int
    scores: pd.DataFrame
    blind: float
    curriculum: Curriculum
    registration: tuple[Shift, ...]

    def __repr__(self) -> str:
        """Print the epoch kept, errors before, after and of a constant, and the registration."""
        lines = [
            f"Fine-tuned: epoch {self.best_epoch} was kept. Mean absolute errors [m]:",
            self.scores.to_string(float_format="{:.2f}".format),
        ]
        if self.blind >= _BLIND:
            lines.append(
                f"Before training, the model read {self.blind:.0%} of the trees as ground."
            )
        for k, shift in enumerate(self.registration, start=1):
            which = f" {k}" if len(self.registration) > 1 else ""
            lines.append(f"Registration of reference{which}: {write_registration(shift)}")
        return "\n".join(lines)


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
        Epochs of training without a lower validation MAE before it stops. The model of the epoch
        with the lowest is kept, the untrained one included; of the lowest training MAE if nothing
        is held out.
    seed : int, default 0
        Determines held-out blocks and crops.
    device : str, default "auto"
        Torch device.
    curriculum : Curriculum, optional
        Weights of the losses over the training. By default the published ones, unless the model
        reads at least 10 % of the trees as ground (see Notes).
    bands, value_range, nodata, valid, erode, resolution, pixel_size
        How to read the imagery, as of :func:`xchmv2.predict.predict`. They apply to every image;
        for images of several areas mask each by ``imagery.where(...)`` instead of ``valid``.
    progress : bool, default True
        Whether to show a progress bar.

    Returns
    -------
    FineTuned
        The folder, the history, and mean absolute errors before and after.

    Warns
    -----
    UserWarning
        If the result is not at least 1 % better than the model before, and than the median height
        everywhere, on the training data and on those held out.

    Raises
    ------
    ImageryError
        If the imagery does not fit the model, as for ``predict``; there are no reference heights
        under it, or one and the same everywhere; or there are fewer than two tiles to train on.
    CHMv2Error
        If reference heights lie outside 0 to 120 m, only one of imagery and reference has a CRS,
        the output exists, an option is out of range, ``<output>.partial`` belongs to a run with
        other settings, or loss, weights or heights are no longer finite: such a state is not saved.

    Notes
    -----
    SiLog takes heights below 0.1 m as 0.1 m, where its gradient is 0, and it forgives a common
    factor: of d = ln(height / reference) it minimises mean(d^2) - 0.85 mean(d)^2. So it lowers the
    heights of all other trees towards those that are read as ground: where these are a share f and
    have d = d0, the others are best at d = 0.85 f d0 / (0.15 + 0.85 f). That is a third of the
    reference for f = 5 % and d0 = ln(0.1 / 15). Hence training begins with Charbonnier where f is
    at least 10 %. Where it is at least 90 %, or Charbonnier's gradient vanishes too because one bin
    has all the weight, the logits of the last layer are first scaled down (softmax and sigmoid) or
    raised (ReLU) until the mean height is that of the reference.

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
    trainer = Trainer(network, sampler, held_out, schedule, mean=mean, std=std, seed=seed)
    _validate_heights(trainer)
    blind = trainer.blind_share()
    if curriculum is None:
        trainer.adapt(blind)
    settings = {  # everything that determines the run
        **asdict(trainer.schedule),
        "model": state_dict_sha256(network),
        "data": tokenize(*((p.image, p.valid, p.height) for p in pairs)),
        "train": train,
        "tile": tile,
        "validation": validation,
        "seed": seed,
    }
    state = run(trainer, partial_folder(folder), settings, progress=progress)
    processor = CHMv2ImageProcessor(image_mean=mean, image_std=std)
    return _finish(folder, trainer, state, processor, blind)


def _validate_heights(trainer: Trainer) -> None:
    heights = trainer.heights(trainer.seen)
    if heights.min() == heights.max():
        raise ImageryError(
            f"the reference is {heights.min():g} m on all {heights.size:,} pixels to train on, and "
            "from one height the model can only learn to predict it everywhere",
            fix="check that it holds canopy heights, or add areas with other heights: "
            "fine_tune([image, other_image], [reference, other_reference], ...)",
        )


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
    if state.epoch == 0 and schedule.soften:
        trainer.soften()
    scored = "validation" if trainer.held_out else "training"
    constant = {"constant": f"{trainer.constant_mae()[scored]:.2f} m"}
    with progress_bar(total=total, initial=done, disable=not progress, unit="step") as bar:
        while state.epoch < schedule.epochs and not (
            trainer.held_out and state.epochs_without_gain >= schedule.patience
        ):
            row = trainer.run_epoch(state.epoch + 1, bar.update)
            state.history.append(row)
            save_state(folder, state, trainer.model, trainer.optimizer)
            mae = {f"{scored}_mae": f"{row[f'{scored}_mae']:.2f} m"}
            bar.set_postfix({"loss": f"{row['loss']:.3f}", **mae, **constant})
    restore_best(folder, trainer.model)
    trainer.model.eval()
    return state


def _finish(
    folder: Path,
    trainer: Trainer,
    state: RunState,
    processor: CHMv2ImageProcessor,
    blind: float,
) -> FineTuned:
    """Write the checkpoint, delete the state of the run, and warn if nothing was gained."""
    history = pd.DataFrame(state.history).astype({"epoch": int})
    draft = partial_folder(folder) / "checkpoint"
    trainer.model.save_pretrained(draft)
    processor.save_pretrained(draft)
    history.to_csv(draft / "history.csv", index=False)
    draft.replace(folder)
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    before, after = state.history[0], state.history[state.best_epoch]
    scores = pd.DataFrame(
        {
            data: {"before": before[f"{data}_mae"], "after": after[f"{data}_mae"], "constant": mae}
            for data, mae in trainer.constant_mae().items()
        }
    ).T
    curriculum = trainer.schedule.curriculum
    shifts = tuple(pair.registration for pair in trainer.sampler.pairs)
    found = FineTuned(folder, history, state.best_epoch, scores, blind, curriculum, shifts)
    _warn_without_gain(found, trainer)
    return found


def _warn_without_gain(found: FineTuned, trainer: Trainer) -> None:
    """Warn if the result is no better than the start and than one height everywhere."""
    for data, (before, after, constant) in found.scores.iterrows():
        if after < _BETTER * min(before, constant):
            continue
        if found.blind >= _BLIND and found.curriculum.silog_until > 0:
            fix = "leaving curriculum= out, because SiLog fails where trees are read as ground"
        elif found.history[f"{data}_mae"][1:].min() > before / _BETTER:
            fix = f"a lower learning rate: fine_tune(..., lr={trainer.schedule.lr / 10:g})"
        elif data == "validation":
            fix = "reference heights from more, and more varied, areas"
        else:
            fix = f"longer training: fine_tune(..., epochs={2 * trainer.schedule.epochs})"
        warn(
            f"fine-tuning gained little or nothing: on the {data} data the mean absolute error is "
            f"{after:.2f} m, before it was {before:.2f} m, and with the median height everywhere "
            f"it is {constant:.2f} m. Check that imagery and reference show the same ground; if "
            f"they do, try {fix}."
        )
        return


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
    where, mean, std = resolve_device(device), IMAGE_MEAN, IMAGE_STD
    if isinstance(model, CHMv2ForDepthEstimation):
        network = copy.deepcopy(model).float().to(where)
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
# Largest share of the last layer's preferences that softening takes away.
_MOST_SOFTENED = 0.98


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a training.

    `epochs`: their largest number; `steps`: batches per epoch; `batch_size`: crops per batch; `lr`:
    highest learning rate, which rises over the first 6 % and falls as a cosine to 0; `patience`:
    epochs without a better validation error before training stops; `curriculum`: weights of the
    losses; `soften`: whether to desaturate the last layer first.
    """

    epochs: int
    steps: int
    batch_size: int
    lr: float
    patience: int
    curriculum: Curriculum
    soften: bool = False

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
        self.seen = _side_by_side(sampler)
        self._mean, self._std = (
            torch.tensor(values, device=model.device).view(1, 3, 1, 1) for values in (mean, std)
        )
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._trained, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=1e-3
        )

    def run_epoch(self, epoch: int, on_step: Callable[[], object]) -> dict[str, float]:
        """Train for one epoch, counted from 1, and evaluate; returns the row of the history."""
        started, losses, steps = time.perf_counter(), [], self.schedule.steps
        rng = np.random.default_rng([self.seed, epoch])
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**31)))
            for step in range(steps):
                progress = ((epoch - 1) * steps + step) / (self.schedule.epochs * steps)
                losses.append(self._step(progress, rng))
                on_step()
        row = {"epoch": epoch, "loss": float(np.mean(losses)), **self.evaluate()}
        if not math.isfinite(row["training_mae"]) or not all(
            bool(p.isfinite().all()) for p in self._trained
        ):
            raise self._diverged(f"weights or heights are not finite after epoch {epoch}")
        return {**row, "seconds": round(time.perf_counter() - started, 3)}

    def evaluate(self) -> dict[str, float]:
        """Mean absolute errors and bias [m]; NaN where nothing is held out."""
        training, held_out = self._errors(self.seen), self._errors(self.held_out)
        return {
            "training_mae": float(np.abs(training).mean()),
            "validation_mae": float(np.abs(held_out).mean()) if held_out.size else math.nan,
            "validation_bias": float(held_out.mean()) if held_out.size else math.nan,
        }

    def heights(self, crops: Sequence[Crop]) -> npt.NDArray[np.float32]:
        """Return the reference heights [m] of crops, without NaN."""
        cut = [self.sampler.cut(crop)[2] for crop in crops]
        found: npt.NDArray[np.float32] = np.concatenate([h[np.isfinite(h)] for h in cut])
        return found

    def constant_mae(self) -> dict[str, float]:
        """Mean absolute errors [m] of the training heights' median everywhere."""
        parts = {"training": self.seen, "validation": self.held_out}
        median = np.median(self.heights(self.seen))
        return {
            data: float(np.abs(self.heights(crops) - median).mean())
            for data, crops in parts.items()
            if crops
        }

    def blind_share(self) -> float:
        """Share of the trees of the training data that are read as ground; 0 without trees."""
        height = self.heights(self.seen)
        read = height + self._errors(self.seen)
        return float((read[height >= _TREE] < LOWEST).mean()) if (height >= _TREE).any() else 0.0

    def adapt(self, blind: float) -> None:
        """Leave SiLog out, and soften the last layer, where the start asks for it; see Notes."""
        if blind >= _BLIND:
            curriculum = replace(self.schedule.curriculum, silog_until=0.0)
            self.schedule = replace(self.schedule, curriculum=curriculum)
        if blind >= _SATURATED or (
            self._gradient() < _LEAST_GRADIENT
            and self.evaluate()["training_mae"] > 0.5 * self.constant_mae()["training"]
        ):
            self.schedule = replace(self.schedule, soften=True)

    def _gradient(self) -> float:
        """Norm of Charbonnier's gradient over one batch."""
        image, valid, height = self._first_batch()
        target = torch.from_numpy(height).to(self.model.device)
        charbonnier(self._heights(image, valid), target).backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, math.inf))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _first_batch(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        rng = np.random.default_rng([self.seed, 0])
        return self.sampler.draw(self.schedule.batch_size, rng)

    @torch.no_grad()
    def soften(self) -> None:
        """Weaken the last layer's preference for a bin until the mean height is the reference's."""
        image, valid, height = self._first_batch()
        known = torch.from_numpy(np.isfinite(height)).to(self.model.device)
        goal, last = float(np.nanmean(height)), self.model.head.conv_depth.last
        features = self.model.features(self._pixels(image, valid))
        weight, bias = last.weight.clone(), None if last.bias is None else last.bias.clone()
        scaled = self.model.config.norm_strategy in ("softmax", "sigmoid")

        def mean(strength: float) -> float:
            if scaled:
                last.weight.copy_(weight * (1 - strength))
            if bias is not None and last.bias is not None:
                change = -bias * strength if scaled else strength / (1 - strength)
                last.bias.copy_(bias + change)
            return float(self.model.to_height(features)[0][known].mean())

        low, high, too_low = 0.0, _MOST_SOFTENED, mean(0.0) < goal
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if (mean(middle) < goal) == too_low else (low, middle)
        mean(low)

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
            raise self._diverged(f"the loss is {loss.item()} at {progress:.0%} of its steps")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _LARGEST_GRADIENT)
        self.optimizer.step()
        return float(loss.detach())

    def _diverged(self, how: str) -> CHMv2Error:
        return CHMv2Error(
            f"training has diverged: {how}",
            fix="delete the .partial folder and lower the learning rate: "
            f"fine_tune(..., lr={self.schedule.lr / 10:g})",
        )

    def _pixels(self, image: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]) -> Tensor:
        """Normalised pixels (B, 3, h, w) of crops (B, 3, h, w) between 0 and 1."""
        device = self.model.device
        pixels = (torch.from_numpy(image).to(device) - self._mean) / self._std
        return pixels.masked_fill(~torch.from_numpy(valid).to(device)[:, None], 0.0)

    def _heights(self, image: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]) -> Tensor:
        """Heights [m] (B, h, w) of crops (B, 3, h, w) between 0 and 1."""
        device = self.model.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            return self.model.height(self._pixels(image, valid))[0]

    def _errors(self, crops: Sequence[Crop]) -> npt.NDArray[np.float32]:
        """Predicted minus reference heights [m] of crops, where there is a reference."""
        self.model.eval()
        errors = [np.empty(0, np.float32)]
        for crop in crops:
            image, valid, height = self.sampler.cut(crop)
            with torch.inference_mode():
                found = self._heights(image[None], valid[None])[0].cpu().numpy()
            errors.append((found - height)[np.isfinite(height)])
        return np.concatenate(errors)


def _side_by_side(sampler: CropSampler) -> list[Crop]:
    """Choose training crops that do not overlap one another."""
    taken = [np.zeros(pair.height.shape, bool) for pair in sampler.pairs]
    chosen, last = [], sampler.tile - 1
    for crop in sampler.crops:
        top, left, where = crop.top, crop.left, taken[crop.pair]
        # Squares of one size that overlap do so at a corner.
        if not where[np.ix_((top, top + last), (left, left + last))].any():
            where[top : top + last + 1, left : left + last + 1] = True
            chosen.append(crop)
    return chosen
