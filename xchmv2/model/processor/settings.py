"""The processor's settings: names, defaults, checks, and ``preprocessor_config.json``."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch

from xchmv2.defaults import IMAGE_MEAN, IMAGE_STD
from xchmv2.errors import CheckpointError, ConfigError, DeviceError
from xchmv2.model.files import PREPROCESSOR_NAME, find_folder, read_json, write_json
from xchmv2.model.processor.operations import RESAMPLE_MODES
from xchmv2.model.processor.reading import DataFormat

# Published arguments that change no result of CHMv2 in the published processor either.
_WITHOUT_EFFECT = frozenset({"default_to_square", "disable_grouping", "image_seq_length"})
_CHOICES = {
    "resample": tuple(RESAMPLE_MODES),
    "input_data_format": ("channels_first", "channels_last"),
    "data_format": ("channels_first",),
    "return_tensors": ("pt", "np"),
}
# What a step needs besides its own switch.
_NEEDED = {
    "do_resize": ("size", "resample", "ensure_multiple_of"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
    "do_pad": ("size_divisor",),
}


@dataclass(init=False)
class ProcessorSettings:
    """Everything that can be set on the processor, or for one call of it.

    The class that users see, ``CHMv2ImageProcessor``, documents each setting.
    """

    do_convert_rgb: bool | None = None
    do_resize: bool | None = False
    size: dict[str, int] | None = field(default_factory=lambda: {"height": 384, "width": 384})
    resample: int | None = 3
    ensure_multiple_of: int | None = 16
    keep_aspect_ratio: bool | None = True
    do_center_crop: bool | None = None
    crop_size: dict[str, int] | None = None
    do_rescale: bool | None = True
    rescale_factor: float | None = 1 / 255
    do_normalize: bool | None = True
    image_mean: float | tuple[float, ...] | None = IMAGE_MEAN
    image_std: float | tuple[float, ...] | None = IMAGE_STD
    do_pad: bool | None = True
    size_divisor: int | None = 16
    do_reduce_labels: bool | None = None
    data_format: str | None = None
    input_data_format: DataFormat | None = None
    device: str | None = None
    return_tensors: str | None = None

    def __init__(self, **settings: Any) -> None:
        _refuse_unknown(settings, self._names())
        defaults = {
            item.name: item.default_factory() if callable(item.default_factory) else item.default
            for item in fields(ProcessorSettings)
        }
        given = {name: value for name, value in settings.items() if value is not None}
        self._set({**defaults, **given})

    @classmethod
    def _names(cls) -> list[str]:
        return [item.name for item in fields(ProcessorSettings)]

    def _set(self, settings: Mapping[str, Any]) -> None:
        for name in self._names():
            if name in settings:
                setattr(self, name, _standardise(name, settings[name]))

    def _with(self, overrides: Mapping[str, Any]) -> Self:
        """Return the settings of one call, checked whole: attributes may have been assigned."""
        _refuse_unknown(overrides, self._names())
        settings = copy.copy(self)
        settings._set({**{name: getattr(self, name) for name in self._names()}, **overrides})
        for switch, needed in _NEEDED.items():
            missing = [name for name in needed if getattr(settings, name) is None]
            if getattr(settings, switch) and missing:
                raise ConfigError(
                    f"a value for {' and '.join(missing)} with {switch}=True",
                    "None",
                    f"pass {missing[0]}=... or {switch}=False",
                )
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are written to file: those that are set, and the type.

        Returns
        -------
        dict
            Values that JSON can hold, sorted by name.
        """
        values = {name: getattr(self, name) for name in self._names()}
        values["image_processor_type"] = type(self).__name__
        return {name: values[name] for name in sorted(values) if values[name] is not None}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Read the settings of a checkpoint, written by xchmv2 or by transformers.

        Parameters
        ----------
        pretrained_model_name_or_path : str or os.PathLike
            A folder with ``preprocessor_config.json``, that file, or a Hugging Face id such as
            ``"facebook/dinov3-vitl16-chmv2-dpt-head"``.
        revision : str, optional
            Branch, tag or commit on the hub.
        **overrides
            Settings that replace those of the file.

        Returns
        -------
        CHMv2ImageProcessor
            Settings that the file leaves out have their defaults; entries that are not settings
            are left aside.

        Raises
        ------
        CheckpointError
            If the file cannot be found, fetched or read.
        """
        _refuse_unknown(overrides, cls._names())
        stored = read_json(_find(pretrained_model_name_or_path, revision))
        known = {name: value for name, value in stored.items() if name in cls._names()}
        # The published processor carries a stored data_format along and never looks at it.
        known.pop("data_format", None)
        return cls(**{**known, **overrides})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write ``preprocessor_config.json``, for xchmv2 and transformers alike.

        Parameters
        ----------
        save_directory : str or os.PathLike
            Made if it is not there. The file appears whole or not at all.

        Returns
        -------
        list of str
            The path written.
        """
        path = Path(save_directory) / PREPROCESSOR_NAME
        write_json(path, self.to_dict())
        return [str(path)]


def _refuse_unknown(settings: Mapping[str, Any], names: list[str]) -> None:
    unknown = [name for name in settings if name not in names and name not in _WITHOUT_EFFECT]
    if unknown:
        raise ConfigError(
            f"settings named {', '.join(sorted(names))}",
            ", ".join(repr(name) for name in unknown),
            "leave it out or correct the name",
        )


def _standardise(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _CHOICES:
        return _as_choice(name, value)
    if name in ("size", "crop_size"):
        return _as_size(name, value)
    if name in ("size_divisor", "ensure_multiple_of"):
        return _as_count(name, value)
    if name in ("image_mean", "image_std"):
        return _as_channel_values(name, value)
    if name == "rescale_factor":
        return _as_positive(name, value)
    return _as_device(value) if name == "device" else _as_flag(name, value)


def _as_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} as True or False", repr(value), f"pass {name}=True")
    return value


def _as_choice(name: str, value: Any) -> Any:
    for choice in _CHOICES[name]:
        if value == choice and not isinstance(value, bool):
            return choice  # itself, not an equal member of an enum
    allowed = ", ".join(repr(choice) for choice in _CHOICES[name])
    raise ConfigError(
        f"{name} as one of {allowed}", repr(value), f"pass {name}={_CHOICES[name][-1]!r}"
    )


def _as_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise ConfigError(f"{name} as a positive integer", repr(value), f"pass {name}=16")
    return int(value)


def _as_positive(name: str, value: Any) -> float:
    number = _as_number(name, value)
    if not 0 < number < float("inf"):
        raise ConfigError(f"a positive {name}", repr(value), f"pass {name}=1 / 255")
    return number


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise ConfigError(f"{name} as a number", repr(value), "pass a float")
    return float(value)


def _as_channel_values(name: str, value: Any) -> float | tuple[float, ...]:
    read = _as_positive if name == "image_std" else _as_number
    if not hasattr(value, "__iter__"):
        return read(name, value)
    values = tuple(read(name, item) for item in value)
    if not values or isinstance(value, str):
        raise ConfigError(
            f"{name} as one number, or one per channel",
            repr(value),
            f"pass {name}={getattr(ProcessorSettings, name)}",
        )
    return values


def _as_size(name: str, value: Any) -> dict[str, int]:
    if hasattr(value, "__index__"):
        value = (value, value)
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping) or set(value) != {"height", "width"}:
        raise ConfigError(
            f"{name} as {{'height': ..., 'width': ...}}, (height, width) or one number, in pixels",
            repr(value),
            f"pass {name}={{'height': 384, 'width': 384}}",
        )
    return {side: _as_count(f"{name}[{side!r}]", value[side]) for side in ("height", "width")}


def _as_device(value: Any) -> str:
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise DeviceError(
            "a device of this machine", repr(value), "pass device='cpu', or leave device out"
        ) from error
    return str(device)


def _find(name: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder, _ = find_folder(name, revision, [PREPROCESSOR_NAME])
    path = folder / PREPROCESSOR_NAME
    if not path.exists():
        raise CheckpointError(
            f"{PREPROCESSOR_NAME} in {str(folder)!r}",
            "no such file",
            "CHMv2ImageProcessor() has the published settings; its save_pretrained(folder) writes "
            "them",
        )
    return path
