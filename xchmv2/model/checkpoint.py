"""Where weights come from, and what they are: folders, the hub, content hashes.

Weights are read from safetensors files alone: nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xchmv2.defaults import MODEL
from xchmv2.errors import CheckpointError
from xchmv2.model._settings import CONFIG_NAME, read_json
from xchmv2.model.config import CHMv2Config
from xchmv2.model.weights import (
    INDEX_NAME,
    WEIGHTS_NAME,
    load_weights,
    save_checkpoint,
    state_dict_sha256,
    weight_files,
)

__all__ = [
    "DEFAULT_MODEL",
    "Checkpoint",
    "load_weights",
    "resolve_checkpoint",
    "save_checkpoint",
    "state_dict_sha256",
]

#: The published checkpoint on the Hugging Face hub.
DEFAULT_MODEL = MODEL

PREPROCESSOR_NAME = "preprocessor_config.json"

_HUB_FILES = (CONFIG_NAME, PREPROCESSOR_NAME, WEIGHTS_NAME, INDEX_NAME, "model-*.safetensors")
_IMAGE_MEAN, _IMAGE_STD = (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, identified by what is in it.

    Attributes
    ----------
    model_id : str
        Hub id, or absolute path of a local folder.
    revision : str or None
        Commit on the hub; ``None`` for a local folder.
    folder : Path
        Where the files are.
    weights_sha256 : str
        SHA-256 of ``model.safetensors``; for a sharded checkpoint, of the shards' names and
        hashes.
    config_sha256 : str
        SHA-256 of ``config.json`` and ``preprocessor_config.json``, whatever their layout.
    """

    model_id: str
    revision: str | None
    folder: Path
    weights_sha256: str
    config_sha256: str

    @property
    def config(self) -> CHMv2Config:
        """The model's configuration."""
        return CHMv2Config.from_pretrained(self.folder)

    @property
    def rescale_factor(self) -> float:
        """What pixel values are multiplied by before they are normalised; 1/255 by default."""
        settings = self._preprocessor()
        if not settings.get("do_rescale", True):
            return 1.0
        factor = settings.get("rescale_factor")
        return 1 / 255 if factor is None else _numbers("rescale_factor", factor, 1)[0]

    def mean_std(self) -> tuple[Colour, Colour]:
        """Mean and standard deviation of red, green and blue, on the rescaled values.

        Returns
        -------
        tuple of two tuples of 3 float
            From ``preprocessor_config.json`` where present, else those of CHMv2.

        Raises
        ------
        CheckpointError
            If the file holds something else than three numbers.
        """
        settings = self._preprocessor()
        if not settings.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean = _three("image_mean", settings.get("image_mean"), _IMAGE_MEAN)
        std = _three("image_std", settings.get("image_std"), _IMAGE_STD)
        if min(std) <= 0:
            raise CheckpointError("image_std above 0", repr(std), f"correct {PREPROCESSOR_NAME}")
        return mean, std

    def _preprocessor(self) -> dict[str, Any]:
        path = self.folder / PREPROCESSOR_NAME
        return read_json(path) if path.exists() else {}


def resolve_checkpoint(
    model: str | os.PathLike[str] = DEFAULT_MODEL, revision: str | None = None
) -> Checkpoint:
    """Find a checkpoint's files, downloading them if they are on the hub, and hash them.

    Parameters
    ----------
    model : str or path
        Folder with ``config.json`` and ``model.safetensors`` (or shards and their index), or an
        id on the Hugging Face hub.
    revision : str, optional
        Branch, tag or commit on the hub; a local folder has none and ignores it.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If files are missing, damaged or not safetensors, or the hub cannot be reached or refuses.
    ConfigError
        If ``config.json`` holds a value that is not allowed.

    Notes
    -----
    Hashes are kept per file (path, size, time, inode), so a second call costs little and an
    overwritten folder gives a new hash.
    """
    folder = Path(model).expanduser().resolve()
    if folder.is_dir():
        return _describe(str(folder), None, folder)
    if not isinstance(model, str) or _looks_like_path(model):
        raise CheckpointError(
            f"a folder with config.json and {WEIGHTS_NAME}, or a hub id like {DEFAULT_MODEL!r}",
            f"{str(model)!r}, which is " + ("a file" if folder.exists() else "not there"),
            "check the path; for a file, give the folder that holds it",
        )
    folder = _download(model, revision)
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return _describe(model, commit, folder)


def _looks_like_path(model: str) -> bool:
    starts = model.startswith((".", "~", "/")) or not model.strip()
    return starts or "\\" in model or model.count("/") > 1 or Path(model).exists()


def _describe(model_id: str, revision: str | None, folder: Path) -> Checkpoint:
    config = read_json(folder / CONFIG_NAME)
    CHMv2Config.from_dict(config)  # refuses a wrong one now, not in a worker later
    preprocessor = folder / PREPROCESSOR_NAME
    settings = read_json(preprocessor) if preprocessor.exists() else None
    return Checkpoint(
        model_id=model_id,
        revision=revision,
        folder=folder,
        weights_sha256=_weights_sha256(weight_files(folder)),
        config_sha256=_json_sha256({"config": config, "preprocessor": settings}),
    )


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model, revision=revision, allow_patterns=list(_HUB_FILES))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        raise CheckpointError(
            f"the files of {model!r} from the Hugging Face hub, or a local folder of that name",
            f"{type(error).__name__}: {_first_line(error)}",
            _how_to_download(model),
        ) from error
    return Path(found)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")


def _how_to_download(model: str) -> str:
    return (
        f"accept the licence at https://huggingface.co/{model} (CHMv2 weights are gated, under "
        f"the DINOv3 License), log in with `hf auth login`, run `hf download {model} --local-dir "
        "chmv2` where there is internet, copy that folder here and pass model='chmv2'"
    )


def _weights_sha256(files: tuple[Path, ...]) -> str:
    if len(files) == 1:
        return _file_sha256(files[0])
    return _json_sha256({path.name: _file_sha256(path) for path in files})


_file_hashes: dict[tuple[str, int, int, int], str] = {}


def _file_sha256(path: Path) -> str:
    """Hash a file once per content; threads that meet here may both hash it, to one result."""
    real = path.resolve()  # the hub's cache holds links
    with real.open("rb") as file:
        # Of the open file: the name may be given to another one meanwhile.
        stat = os.fstat(file.fileno())
        key = (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if key not in _file_hashes:
            _file_hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _file_hashes[key]


def _json_sha256(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _three(name: str, value: Any, default: Colour) -> Colour:
    if value is None:
        return default
    red, green, blue = _numbers(name, value, 3)
    return red, green, blue


def _numbers(name: str, value: Any, count: int) -> list[float]:
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or not all(type(v) in (int, float) for v in values):
        raise CheckpointError(
            f"{name} as {count} number(s)", repr(value), f"correct {PREPROCESSOR_NAME}"
        )
    return [float(v) for v in values]
