"""Frozen settings: their JSON form, and refusing wrong values."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from xchmv2.errors import ConfigError
from xchmv2.model.files import CONFIG_NAME, read_json, write_json

READOUT_TYPES = ("ignore", "add", "project")
BINS_STRATEGIES = ("linear", "log", "chmv2_mixlog")
NORM_STRATEGIES = ("linear", "softmax", "sigmoid", "chmv2_mixlog")
HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")

_CHOICES: dict[str, tuple[str, ...]] = {
    "readout_type": READOUT_TYPES,
    "bins_strategy": BINS_STRATEGIES,
    "norm_strategy": NORM_STRATEGIES,
    "hidden_act": HIDDEN_ACTS,
}
# Where the smallest allowed value is neither 1 for a count nor 0 for a number.
_LEAST = {
    "num_register_tokens": 0,
    "fusion_hidden_size": 2,
    "rope_theta": 1e-6,
    "pos_embed_jitter": 1,
    "pos_embed_rescale": 1,
}
_RATES = ("attention_dropout", "drop_path_rate")


class FrozenList(tuple[Any, ...]):
    """A tuple that equals the list of the same values, as the published defaults are lists."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, tuple(other) if isinstance(other, list) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class Settings:
    """A frozen dataclass of settings that a checkpoint keeps as JSON."""

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a configuration from a mapping, ignoring the keys it does not know.

        Parameters
        ----------
        data : mapping
            The content of a ``config.json``; missing keys take their defaults.

        Raises
        ------
        ConfigError
            If ``model_type`` names another model, or a value is not allowed.
        """
        found = data.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(
                f"model_type {cls.model_type!r}",
                repr(found),
                f"give a {cls.__name__} configuration",
            )
        known = {field.name for field in fields(cast(Any, cls))}
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers, strings and dicts, as ``config.json`` holds them."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(cast(Any, self))}
        return values | {"model_type": self.model_type}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read ``config.json`` from a checkpoint folder.

        Raises
        ------
        CheckpointError
            If the file is missing or is not a JSON object.
        ConfigError
            If a value is not allowed.
        """
        return cls.from_dict(read_json(Path(folder) / CONFIG_NAME))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into a folder, which is made if it does not exist."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def normalise_fields(config: Any) -> None:
    """Bring equal settings to one form: hashable lists, and floats where floats are meant.

    The published implementation refuses an integer for a float in ``config.json``.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list | tuple):
            object.__setattr__(config, field.name, FrozenList(value))
        elif str(field.type).startswith("float") and type(value) is int:
            object.__setattr__(config, field.name, float(value))


def check_fields(config: Any) -> None:
    """Check every setting against its annotation, its choices and its limits."""
    for field in fields(config):
        name, value, kind = field.name, getattr(config, field.name), str(field.type)
        if name in _CHOICES:
            _check_choice(name, value, _CHOICES[name])
        elif kind == "bool":
            _check_choice(name, value, (True, False))
        elif kind.startswith(("int", "float")) and not ("None" in kind and value is None):
            for item in _items(name, value, kind):
                check_number(name, item, whole="int" in kind, least=_LEAST.get(name))


def _items(name: str, value: Any, kind: str) -> Iterable[Any]:
    if "Sequence" not in kind or not isinstance(value, tuple):
        return (value,)
    if len(value) != 2:
        raise ConfigError(f"{name} as one whole number or two", repr(value), "give (height, width)")
    return value


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise ConfigError(
            f"{name} as one of {', '.join(map(repr, allowed))}", repr(value), "use one of these"
        )


def check_number(name: str, value: Any, *, whole: bool, least: float | None) -> None:
    """Refuse what is no finite number, is too small, is not whole, or is a rate above 1."""
    least = least if least is not None else 1 if whole else 0
    number = as_float(value)
    fits = math.isfinite(number) and number >= least and (not whole or isinstance(value, int))
    if not fits or (name in _RATES and number >= 1):
        kind = "a whole number" if whole else "a finite number"
        below = " and below 1" if name in _RATES else ""
        raise ConfigError(
            f"{name} as {kind} of at least {least:g}{below}",
            repr(value),
            f"leave {name} out for its default",
        )


def as_float(value: Any) -> float:
    """Return a number as float, and NaN for anything else (booleans too)."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric else math.nan


def check_list(name: str, value: Any) -> None:
    """Refuse what is not a list, before anything looks inside it."""
    if not isinstance(value, FrozenList):
        raise ConfigError(f"{name} as a list", repr(value), f"write {name}=[...]")


def check_indices(indices: Sequence[int], count: int) -> None:
    """Refuse stages that do not exist, come twice, or are out of order."""
    valid = all(type(i) is int and -count <= i < count for i in indices)
    places = [i % count for i in indices] if valid else []
    if not places or sorted(set(places)) != places:
        raise ConfigError(
            f"out_indices as ascending, different numbers from 0 to {count - 1}",
            repr(list(indices)),
            "count stages from 0 (the embedding); num_hidden_layers is the last",
        )
