"""The state of a training run on disk, from which a killed run resumes after its last epoch.

Tensors are stored as safetensors and everything else as JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xchmv2.errors import CHMv2Error

_STATE = "state.safetensors"
_BEST = "best.safetensors"


@dataclass
class RunState:
    """State of a run between two epochs.

    `settings`: everything that determines the run; the state of a run with others is refused.
    `history`: one row per finished epoch; the first, epoch 0, is the untrained model.
    """

    settings: Mapping[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Number of the last finished epoch; -1 before the first evaluation."""
        return len(self.history) - 1

    @property
    def best_epoch(self) -> int:
        """Epoch with the lowest validation error; training error if nothing was held out."""
        return int(np.argmin(self._errors))

    @property
    def epochs_without_gain(self) -> int:
        """Epochs since the best one of training; the start counts for nothing here."""
        errors = self._errors[1:]
        return len(errors) - 1 - int(np.argmin(errors)) if errors else 0

    @property
    def _errors(self) -> list[float]:
        held_out = bool(self.history) and math.isfinite(self.history[0]["validation_mae"])
        return [row["validation_mae" if held_out else "training_mae"] for row in self.history]


def partial_folder(output: Path) -> Path:
    """Folder beside the output in which a run keeps its state until it is finished."""
    return output.with_name(f"{output.name}.partial")


def save_state(
    folder: Path, state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write weights, moments and history; a kill leaves the last epoch's state or this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": p for name, p in _trainable(model).items()}
    moments = {
        f"optimizer.{i}.{name}": value
        for i, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    header = json.dumps({"settings": state.settings, "history": state.history})
    if state.best_epoch == state.epoch:
        # First, because after a kill between the two the epoch runs again and writes the same.
        _write(folder / _BEST, weights, {"epoch": str(state.epoch)})
    _write(folder / _STATE, {**weights, **moments}, {"run": header})


def load_state(
    folder: Path, settings: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> RunState:
    """Restore an unfinished run of the same settings, or begin a new one with an empty history."""
    if not (folder / _STATE).exists():
        return RunState(settings)
    with safe_open(folder / _STATE, "pt") as file:
        run = json.loads(file.metadata()["run"])
        _validate_settings(folder, run["settings"], settings)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _restore(model, {n.removeprefix("model."): t for n, t in tensors.items() if n[:6] == "model."})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return RunState(settings, run["history"])


def restore_best(folder: Path, model: nn.Module) -> None:
    """Give the model the weights of the best epoch."""
    with safe_open(folder / _BEST, "pt") as file:
        _restore(model, {n.removeprefix("model."): file.get_tensor(n) for n in file.keys()})  # noqa: SIM118


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata)
    partial.replace(path)


def _validate_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(wanted)))
    changed = sorted(k for k in {*found, *plain} if found.get(k) != plain.get(k))
    if changed:
        raise CHMv2Error(
            f"the unfinished run in {folder} to have the same settings",
            ", ".join(f"{k}: {found.get(k)!r} there, {plain.get(k)!r} now" for k in changed),
            "call it with the same settings to resume, delete the folder, or choose another output",
        )
