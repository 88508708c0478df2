"""Files of a checkpoint: found in a folder or on the hub; JSON read and written."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xchmv2.errors import CheckpointError

#: Name and folder of the demonstration model.
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
#: The published checkpoint on the Hugging Face hub.
MODEL = "facebook/dinov3-vitl16-chmv2-dpt-head"
#: Normalisation of red, green and blue in the range 0 to 1 (arXiv:2603.06382).
IMAGE_MEAN = (0.420, 0.411, 0.296)
IMAGE_STD = (0.213, 0.156, 0.143)
#: Side of the window the network sees [px]: the crop size the published decoder was trained on.
TILE = 448
#: Pixels shared by neighbouring tiles.
OVERLAP = 64

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def find_folder(
    model: str | os.PathLike[str], revision: str | None, files: Sequence[str]
) -> tuple[Path, bool]:
    """Find a checkpoint's folder, downloading its files if they are on the hub.

    Parameters
    ----------
    model : str or path
        A folder, an id ``"owner/name"`` on the Hugging Face hub, or "demo" for the model that
        comes with the package. A folder takes precedence over an id; "~" is the home folder.
    revision : str or None
        Branch, tag or commit on the hub; a local folder has none and ignores it.
    files : sequence of str
        Names or patterns of the files wanted; error messages name the first.

    Returns
    -------
    folder : Path
        Absolute. Some of the files may be missing in it.
    is_local : bool
        Whether `model` is a local folder.

    Raises
    ------
    CheckpointError
        If there is no such folder, or the hub cannot be reached or refuses.
    """
    if model == DEMO:
        return DEMO_FOLDER, False
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve(), True
    if not isinstance(model, str) or path.exists() or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"a folder with {files[0]} in it, or a hub id 'owner/name'",
            f"{str(model)!r}, which " + ("is a file" if path.exists() else "does not exist here"),
            "correct the path; for a file, give the folder that holds it",
        )
    return _download(model, revision, files), False


def _download(model: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model, revision=revision, allow_patterns=list(files))
    except Exception as error:  # the client's errors have no base class but this
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"the files of {model!r}, in a folder of that name or on the Hugging Face hub",
            f"no folder of that name here, and {type(error).__name__} there: "
            f"{lines[0] if lines else 'no details'}",
            "CHMv2 weights are gated, under the DINOv3 License: accept the licence on the model's "
            "page on the Hugging Face hub and log in with `hf auth login`, or run `hf download "
            f"{model} --local-dir chmv2` where there is internet, copy that folder here and pass "
            "its path",
        ) from error
    return Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint file.

    Raises
    ------
    CheckpointError
        If the file is missing, is not JSON, or is not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"a readable {path.name}",
            f"{type(error).__name__} for {path}",
            "give a folder that holds it, as save_pretrained(folder) or `hf download` writes one",
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} as JSON in {str(path.parent)!r}",
            str(error),
            "fetch or write the file again",
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"a JSON object in {path.name}",
            f"{type(data).__name__} in {path}",
            "fetch or write the file again",
        )
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys; the file appears whole or not at all.

    Parameters
    ----------
    path : Path
        Its folder is made if it does not exist.
    data : mapping
        Of values that JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    # Beside its destination, so that a rename completes it; in a folder of its own, so that
    # writers do not collide.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as partial:
        draft = Path(partial) / path.name
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
