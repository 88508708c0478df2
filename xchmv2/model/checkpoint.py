"""Where weights come from, and what they are: folder, revision, content hashes.

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

from xchmv2.defaults import IMAGE_MEAN, IMAGE_STD, MODEL
from xchmv2.errors import CheckpointError
from xchmv2.model.config import CHMv2Config
from xchmv2.model.files import CONFIG_NAME, PREPROCESSOR_NAME, find_folder, read_json
from xchmv2.model.weights import INDEX_NAME, WEIGHTS_NAME, weight_files

_FILES = (CONFIG_NAME, PREPROCESSOR_NAME, WEIGHTS_NAME, INDEX_NAME, "model-*.safetensors")

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

    def mean_std(self) -> tuple[Colour, Colour]:
        """Mean and standard deviation of red, green and blue between 0 (black) and 1 (white).

        Returns
        -------
        tuple of two tuples of 3 float
            From ``preprocessor_config.json`` where present, else those of CHMv2; stated for other
            rescaled values than 0 to 1, they are brought to that range.

        Raises
        ------
        CheckpointError
            If the file holds something else than three numbers.
        """
        settings = self._preprocessor()
        white = 255 * _rescale_factor(settings)
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if settings.get("do_normalize", True):
            mean = _three("image_mean", settings.get("image_mean") or list(IMAGE_MEAN))
            std = _three("image_std", settings.get("image_std") or list(IMAGE_STD))
        if min(std) <= 0:
            raise CheckpointError("image_std above 0", repr(std), f"correct {PREPROCESSOR_NAME}")
        (m1, m2, m3), (s1, s2, s3) = mean, std
        return (m1 / white, m2 / white, m3 / white), (s1 / white, s2 / white, s3 / white)

    def _preprocessor(self) -> dict[str, Any]:
        path = self.folder / PREPROCESSOR_NAME
        return read_json(path) if path.exists() else {}


def resolve_checkpoint(
    model: str | os.PathLike[str] = MODEL, revision: str | None = None
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
    folder, is_local = find_folder(model, revision, _FILES)
    if is_local:
        return _describe(str(folder), None, folder)
    # The hub's cache names a snapshot by its commit.
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return _describe(str(model), commit, folder)


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
        config_sha256=json_sha256({"config": config, "preprocessor": settings}),
    )


def _weights_sha256(files: tuple[Path, ...]) -> str:
    if len(files) == 1:
        return _file_sha256(files[0])
    return json_sha256({path.name: _file_sha256(path) for path in files})


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


def json_sha256(data: Mapping[str, Any]) -> str:
    """Hash what JSON can hold, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _rescale_factor(settings: Mapping[str, Any]) -> float:
    """Tell what 8-bit values are multiplied by before they are normalised."""
    if not settings.get("do_rescale", True):
        return 1.0
    factor = settings.get("rescale_factor") or 1 / 255
    if type(factor) not in (int, float) or factor <= 0:
        raise CheckpointError(
            "rescale_factor as one number above 0", repr(factor), f"correct {PREPROCESSOR_NAME}"
        )
    return float(factor)


def _three(name: str, value: Any) -> Colour:
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(type(v) in (int, float) for v in values):
        raise CheckpointError(
            f"{name} as one number or three", repr(value), f"correct {PREPROCESSOR_NAME}"
        )
    red, green, blue = map(float, values)
    return red, green, blue
