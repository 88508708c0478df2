"""Files of a checkpoint: found in a folder or on the hub; JSON read and written."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, Unpack

from xchmv2.errors import CheckpointError, CHMv2Error, ConfigError

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
#: Settings and indices are some kB [bytes].
_MOST_JSON = 2**20

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
#: Types of the arguments that say where files are, what each is, and an example.
_SOURCE: dict[str, tuple[type | tuple[type, ...], str, str]] = {
    "revision": (str, "a branch, tag or commit", "'main'"),
    "token": ((str, bool), "a token, or True for that of `hf auth login`", "True"),
    "cache_dir": ((str, os.PathLike), "a folder", "'models'"),
    "local_files_only": (bool, "True or False", "True"),
    "subfolder": (str, "the name of a folder inside the checkpoint", "''"),
}


class HubOptions(TypedDict, total=False):
    """Where a checkpoint's files are, in the words of ``huggingface_hub``.

    `token`: True for the stored one, False for none; `cache_dir`: folder of downloaded files,
    instead of the hub's own cache; `local_files_only`: whether to use downloaded files alone,
    without asking the hub; `subfolder`: inside the repository, or inside a local folder, that which
    holds the files.
    """

    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    subfolder: str


def find_folder(
    model: str | os.PathLike[str],
    revision: str | None,
    files: Sequence[str],
    **hub: Unpack[HubOptions],
) -> tuple[Path, bool]:
    """Find a checkpoint's folder, downloading its files if they are on the hub.

    `model` is a folder, an id ``"owner/name"`` on the Hugging Face hub, of which `revision` is a
    branch, tag or commit, or "demo" for the model that comes with the package. A folder takes
    precedence over an id; "~" is the home folder. `files` are names or patterns of the files
    wanted; error messages name the first. Returns the absolute path, in which some of the files may
    be missing, and whether it is a local folder, for which of `hub` only ``subfolder`` counts.

    A CheckpointError tells that there is no such folder, or that the hub cannot be reached or
    refuses; a ConfigError refuses another argument that is unknown or of the wrong type.
    """
    options = _checked_options({**hub, "revision": revision})
    subfolder = PurePosixPath(options.pop("subfolder", ""))
    folder, is_local = _find_local(model, files), True
    if folder is None:
        patterns = [str(subfolder / name) for name in files]
        folder, is_local = _download(str(model), patterns, options), False
    if subfolder.parts and not (folder / subfolder).is_dir():
        raise CheckpointError(
            f"a folder {str(subfolder)!r} in {folder}",
            f"the folders {sorted(path.name for path in folder.glob('*/'))}",
            "correct subfolder=, or leave it out",
        )
    return folder / subfolder, is_local and model != DEMO


def find_commit(folder: Path, revision: str | None) -> str | None:
    """Tell the commit of downloaded files: the hub's cache names a snapshot by it."""
    snapshots = (part for part in (folder, *folder.parents) if part.parent.name == "snapshots")
    return next((part.name for part in snapshots), revision)


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check arguments for the hub, and leave out those that are None."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in _SOURCE:
            raise ConfigError(f"arguments named {', '.join(_SOURCE)}", repr(name), "leave it out")
        types, wanted, example = _SOURCE[name]
        inside = name != "subfolder" or _is_inside(value)
        if not (isinstance(value, types) and inside):
            # A token must not be printed.
            found = type(value).__name__ if name == "token" else repr(value)
            raise ConfigError(f"{name} as {wanted}", found, f"pass {name}={example}")
    return given


def _is_inside(subfolder: Any) -> bool:
    path = Path(str(subfolder))
    return not path.is_absolute() and ".." not in path.parts


def _find_local(model: Any, files: Sequence[str]) -> Path | None:
    """Find a folder of this machine; None for an id on the hub."""
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(
            f"a folder with {files[0]} in it, or a hub id 'owner/name'",
            type(model).__name__,
            "pass its path; of a model in memory, the folder that "
            "model.save_pretrained(folder) wrote",
        )
    if model == DEMO:
        return DEMO_FOLDER
    try:
        path = Path(model).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (RuntimeError, OSError):  # nobody's home, or too long for a name
        is_folder = exists = False
    if is_folder:
        return path.resolve()
    if not isinstance(model, str) or exists or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"a folder with {files[0]} in it, or a hub id 'owner/name'",
            f"{str(model)!r}, which " + ("is a file" if exists else "does not exist here"),
            "correct the path; for a file, give the folder that holds it",
        )
    return None


def _download(model: str, files: list[str], options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model, revision=options.pop("revision", None), allow_patterns=files, **options
        )
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


def validate_file(path: Path, most: float = math.inf) -> None:
    """Check that a path is a file of at most `most` bytes; opening a pipe would wait for ever.

    A CheckpointError refuses anything else, an OSError what cannot be looked at.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        kind = "a folder, pipe, socket or device"
        raise CheckpointError(
            f"a file {path.name}" + f" of at most {most} bytes" * (most < math.inf),
            f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else f"{kind} at {path}",
            "download or save it again",
        )


def shortened(text: str, most: int = 300) -> str:
    """Cut what a file says to what a message can show."""
    return text if len(text) <= most else f"{text[:most]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shortened(name)!r} twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint file.

    A CheckpointError refuses a file that is missing, larger than 1 MiB, not JSON, or not an object,
    and an object in it that has a key twice.
    """
    try:
        validate_file(path, _MOST_JSON)
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"a readable {path.name}",
            f"{type(error).__name__} for {path}",
            "give a folder that holds it, as save_pretrained(folder) or `hf download` writes one",
        ) from error
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors about values that it holds."""
    try:
        yield
    except CHMv2Error as error:
        raise type(error)(
            shortened(error.expected),
            f"{shortened(str(error.found))} in {path}",
            f"correct {path.name}, or download or save it again",
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys; the file appears whole or not at all.

    Its folder is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    # Beside its destination, so that a rename completes it; in a folder of its own, so that
    # writers do not collide.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as partial:
        draft = Path(partial) / path.name
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
