"""Checkpoints described without their weights: what planning for other machines needs."""

from __future__ import annotations

import os
from pathlib import Path

from xchmv2.errors import CheckpointError
from xchmv2.model.checkpoint import Checkpoint, json_sha256, resolve_checkpoint
from xchmv2.model.config import CHMv2Config
from xchmv2.model.files import CONFIG_NAME, PREPROCESSOR_NAME, find_folder, read_json
from xchmv2.model.weights import INDEX_NAME, WEIGHTS_NAME

_ASK_WORKERS = (
    "where only the workers have the files, let them say what they are: "
    "spec = xchmv2.warmup(client, model), then .predict(model=spec)"
)


def find_unloaded(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Describe a checkpoint, fetching its configuration alone where it is on the hub.

    Parameters
    ----------
    model : str or path
        Folder, id on the Hugging Face hub, or "demo".
    revision : str, optional
        Branch, tag or commit on the hub.

    Returns
    -------
    Checkpoint
        Equal to that of ``resolve_checkpoint``; its folder may lack the weights.

    Raises
    ------
    CheckpointError
        If files are missing here, or the hub cannot be reached or refuses.
    """
    small = (CONFIG_NAME, PREPROCESSOR_NAME, INDEX_NAME)
    try:
        folder, is_local = find_folder(model, revision, small)
    except CheckpointError as error:
        raise CheckpointError(
            error.expected, error.found, f"{_ASK_WORKERS}; else {error.fix}"
        ) from error
    if is_local or (folder / WEIGHTS_NAME).exists():
        return resolve_checkpoint(model, revision)
    commit = folder.name if folder.parent.name == "snapshots" else revision
    # None for files that the hub does not keep apart from the repository: then fetch them.
    weights = _published_sha256(str(model), commit, folder)
    if weights is None:
        return resolve_checkpoint(model, revision)
    return _describe(str(model), commit, folder, weights)


def _published_sha256(model: str, commit: str | None, folder: Path) -> str | None:
    """Ask the hub for the hash of a checkpoint's weights; None where it does not tell."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(model, revision=commit, files_metadata=True)
    except Exception as error:  # the client's errors have no base class but this
        raise CheckpointError(
            f"the hash of the weights of {model!r} from the Hugging Face hub",
            f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}",
            _ASK_WORKERS,
        ) from error
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    if WEIGHTS_NAME in hashes:
        return hashes[WEIGHTS_NAME]
    if not (folder / INDEX_NAME).exists():
        return None
    shards = set(read_json(folder / INDEX_NAME).get("weight_map", {}).values())
    if not shards or not shards <= set(hashes):
        return None
    return json_sha256({name: hashes[name] for name in shards})


def _describe(model_id: str, revision: str | None, folder: Path, weights: str) -> Checkpoint:
    config = read_json(folder / CONFIG_NAME)
    CHMv2Config.from_dict(config)
    preprocessor = folder / PREPROCESSOR_NAME
    settings = read_json(preprocessor) if preprocessor.exists() else None
    sha = json_sha256({"config": config, "preprocessor": settings})
    return Checkpoint(model_id, revision, folder, weights, sha)
