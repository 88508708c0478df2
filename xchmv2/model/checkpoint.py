"""Checkpoints: their safetensors files, found, checked, hashed, read and written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xchmv2.errors import CheckpointError, ConfigError, warn
from xchmv2.model.config import CHMv2Config
from xchmv2.model.files import (
    CONFIG_NAME,
    MODEL,
    PREPROCESSOR_NAME,
    HubOptions,
    find_commit,
    find_folder,
    read_json,
    shortened,
    validate_file,
    write_json,
)
from xchmv2.model.image_processor import CHMv2ImageProcessor

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_IN_MEMORY, _ON_DISK = "backbone.model.layer.", "backbone.layer."
# Derived from the configuration, or used in pretraining alone; some conversions store them all the
# same: the periods of the rotary embedding under two names, the norm of local crops.
_IGNORED = re.compile(r"(inv_freq|\brope_embed(dings)?\.periods|\blocal_cls_norm\.\w+)$")
_KEY_BIAS = ".attention.k_proj.bias"
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILES = (CONFIG_NAME, PREPROCESSOR_NAME, WEIGHTS_NAME, INDEX_NAME, "model-*.safetensors")
_Colour = tuple[float, float, float]
_file_hashes: dict[tuple[str, int, int, int], str] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, identified by its content.

    `model_id`: hub id, or absolute path of a local folder; `revision`: commit on the hub, None for
    a local folder; `weights_sha256`: of ``model.safetensors``, or for a sharded checkpoint of the
    shards' names and hashes; `config_sha256`: of ``config.json`` and ``preprocessor_config.json``,
    whatever their layout.
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

    def mean_std(self) -> tuple[_Colour, _Colour]:
        """Mean and standard deviation of red, green and blue between 0 (black) and 1 (white).

        From ``preprocessor_config.json`` where present, else those of CHMv2; for another
        ``rescale_factor`` than 1 / 255 they are converted to that range. A CheckpointError or
        ConfigError refuses a file that cannot be read, a setting that is not allowed, and other
        counts than one or three numbers of each.
        """
        path = self.folder / PREPROCESSOR_NAME
        # The device that a file names is the processor's alone.
        stored = os.path.lexists(path) and CHMv2ImageProcessor.from_pretrained(path, device="cpu")
        processor = stored or CHMv2ImageProcessor()
        white = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
        if not processor.do_normalize:
            return (0.0, 0.0, 0.0), (1 / white, 1 / white, 1 / white)
        m1, m2, m3 = _three("image_mean", processor.image_mean, path)
        s1, s2, s3 = _three("image_std", processor.image_std, path)
        return (m1 / white, m2 / white, m3 / white), (s1 / white, s2 / white, s3 / white)


def resolve_checkpoint(
    model: str | os.PathLike[str] = MODEL, revision: str | None = None, **hub: Unpack[HubOptions]
) -> Checkpoint:
    """Find a checkpoint's files, downloading them if they are on the hub, and hash them.

    `model` is a folder with ``config.json`` and ``model.safetensors`` (or shards and their index),
    or an id on the Hugging Face hub, of which `revision` is a branch, tag or commit. Hashes are
    kept per file (path, size, time, inode), so a second call costs little and an overwritten folder
    gives a new hash.

    A CheckpointError refuses files that are missing, damaged or not safetensors, and a hub that
    cannot be reached or refuses; a ConfigError a setting in a file or an argument that is not
    allowed.
    """
    folder, is_local = find_folder(model, revision, _FILES, **hub)
    if is_local:
        return describe(str(folder), None, folder)
    return describe(str(model), find_commit(folder, revision), folder)


def describe(
    model_id: str, revision: str | None, folder: Path, weights_sha256: str | None = None
) -> Checkpoint:
    """Describe the checkpoint in a folder, whose weights need not be there if their hash is known.

    Raises as `resolve_checkpoint` does.
    """
    preprocessor = folder / PREPROCESSOR_NAME
    settings = {
        "config": read_json(folder / CONFIG_NAME),
        "preprocessor": read_json(preprocessor) if os.path.lexists(preprocessor) else None,
    }
    found = Checkpoint(
        model_id, revision, folder, weights_sha256 or "", config_sha256=_json_sha256(settings)
    )
    # Refuses wrong settings now, not in a worker later.
    _ = found.config, found.mean_std()
    if weights_sha256 is None:
        _validate_blocks(found.config.backbone.num_hidden_layers, folder)
        hashes = {path.name: _file_sha256(path) for path in _weight_files(folder)}
        weights_sha256 = join_sha256(hashes)
    return replace(found, weights_sha256=weights_sha256)


class _Stored(NamedTuple):
    """What a header says of a tensor."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model, whatever data type they are stored in.

    A CheckpointError refuses a tensor that does not fit, see `validate_weights`, or holds a value
    that is not finite. A UserWarning tells that ``config.json`` says ``key_bias: true`` and no
    block has one: they are zeros then.
    """
    stored, current = validate_weights(model, checkpoint.folder), model.state_dict()
    found: dict[str, Tensor] = {}
    for path in sorted({part.path for part in stored.values()}):
        with _opened(path) as file:
            for key, part in stored.items():
                if part.path == path:
                    found[key] = file.get_tensor(part.name).to(current[key].dtype)
    _refuse_not_finite(found, checkpoint.folder)
    without = [key for key in current if key not in found]
    if without:
        warn(
            f"the weights in {checkpoint.folder} lack {without[0]} and {len(without) - 1} more, "
            "which config.json asks for by key_bias: true. They are zeros here, as they were when "
            "DINOv3 was trained; the conversion in transformers leaves them out. "
            "model.save_pretrained(folder) writes them, and that folder loads without this warning"
        )
    model.load_state_dict(found | {key: torch.zeros_like(current[key]) for key in without})


def save_checkpoint(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors``, each replaced in one step.

    The folder is made if it does not exist; other files in it are kept.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        _renamed(key, _IN_MEMORY, _ON_DISK): _packed(value)
        for key, value in model.state_dict().items()
    }
    config = cast(CHMv2Config, model.config).to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    # Beside their destination, so that a rename completes each.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as partial:
        save_file(tensors, Path(partial) / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(Path(partial) / CONFIG_NAME, config)
        # safetensors writes for the owner alone; other users' workers must be able to read.
        shutil.copymode(Path(partial) / CONFIG_NAME, Path(partial) / WEIGHTS_NAME)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (Path(partial) / name).replace(target / name)


def weights_dtype(folder: Path) -> torch.dtype:
    """Return the data type of a checkpoint's first tensor."""
    first = next(iter(_read_header(folder).values()), None)
    return _DTYPES.get(first.dtype if first else "F32", torch.float32)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """List a checkpoint's safetensors files: ``model.safetensors``, or the shards of the index."""
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if os.path.lexists(single):
        return (single,)
    if os.path.lexists(index):
        return tuple(folder / name for name in read_shards(index))
    raise _no_weights(folder)


def read_shards(index: Path) -> list[str]:
    """Read the names of a checkpoint's shards.

    A CheckpointError refuses a damaged index, and one of anything but safetensors files beside it.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(
            f"a weight_map in {index.name}", shortened(repr(names)), "download or save it again"
        )
    for name in names.values():
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise CheckpointError(
                f"safetensors files beside {index.name}",
                shortened(repr(name)),
                "download or save it again",
            )
    return sorted(set(names.values()))


def _no_weights(folder: Path) -> CheckpointError:
    unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in _UNSAFE)
    found = f"{sorted(path.name for path in folder.iterdir())}"
    fix = "give a folder that model.save_pretrained(folder) or `hf download` wrote"
    if unsafe:
        found = (
            f"{', '.join(unsafe)}, blocked because loading a pickle can run any code; nothing was "
            "unpickled"
        )
        fix = (
            "convert it once where you trust it: 'Converting the original files' in the "
            "documentation (Installation) has the script"
        )
    return CheckpointError(f"{WEIGHTS_NAME} in {folder}", found, fix)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; any failure becomes a CheckpointError."""
    try:
        validate_file(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, MemoryError) as error:
        size = path.stat().st_size if path.exists() else None
        state = "no such file" if size is None else f"{size} bytes, {error}"
        raise CheckpointError(
            f"a whole safetensors file {path.name}",
            f"{state} in {path.parent}",
            "download or save it again",
        ) from error


def _read_header(folder: Path) -> dict[str, _Stored]:
    """Read what a checkpoint's tensors are, by their names in memory."""
    found: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if _IGNORED.search(name):
                    continue
                part, key = file.get_slice(name), _renamed(name, _ON_DISK, _IN_MEMORY)
                if key in found:
                    raise CheckpointError(
                        f"every tensor once in {folder}",
                        f"{key} in {found[key].path.name} and in {path.name}",
                        "download or save it again",
                    )
                found[key] = _Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _validate_blocks(count: int, folder: Path) -> None:
    """Check the number of blocks by the names of tensors, before a model of so many is built."""
    places = {key.split(".")[3] for key in _read_header(folder) if key.startswith(_IN_MEMORY)}
    if len(places) != count:
        raise CheckpointError(
            f"weights of the {count} blocks that num_hidden_layers in config.json states",
            f"those of {len(places)} in {folder}",
            "use the config.json that was saved with these weights",
        )


def validate_weights(model: nn.Module, folder: Path) -> dict[str, _Stored]:
    """Read a header, and check it against a model, on any device, "meta" too.

    A CheckpointError names the first tensors that are missing, unexpected, of another shape or not
    floating point.
    """
    found = _read_header(folder)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shared = [key for key in wanted if key in found]
    missing = [key for key in wanted if key not in found]
    if not any(key.endswith(_KEY_BIAS) for key in found):
        missing = [key for key in missing if not key.endswith(_KEY_BIAS)]
    problems = {
        "missing": missing,
        "unexpected": [key for key in found if key not in wanted],
        "misshapen": [
            f"{key} {list(found[key].shape)} instead of {list(wanted[key])}"
            for key in shared
            if found[key].shape != wanted[key]
        ],
        "not floating point": [
            f"{key} {found[key].dtype}" for key in shared if found[key].dtype not in _DTYPES
        ],
    }
    found_wrong = [_listed(kind, names) for kind, names in problems.items() if names]
    if found_wrong:
        raise CheckpointError(
            f"the {len(wanted)} tensors that config.json describes, in {folder}",
            "; ".join(found_wrong),
            "use the config.json that was saved with these weights",
        )
    return found


def _refuse_not_finite(found: Mapping[str, Tensor], folder: Path) -> None:
    wrong = [key for key, tensor in found.items() if not tensor.isfinite().all()]
    if wrong:
        dtypes = sorted({str(found[key].dtype).removeprefix("torch.") for key in wrong})
        raise CheckpointError(
            f"finite weights as {', '.join(dtypes)}, in {folder}",
            _listed("not finite", wrong),
            "download or save it again; weights too large for float16 load with dtype='float32'",
        )


def _listed(kind: str, names: list[str]) -> str:
    shown = ", ".join(map(shortened, names[:5]))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} {kind} ({shown}{more})"


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _packed(tensor: Tensor) -> Tensor:
    """Copy to the CPU, in plain order: neither a view nor channels_last."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def state_dict_sha256(model: nn.Module) -> str:
    """Hash a live model's configuration and weights.

    Equal for equal content: for copies, and on any device; not equal to a file's hash.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_packed(tensor).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def join_sha256(hashes: Mapping[str, str]) -> str:
    """Make one hash of those of weight files by name: a single one's own."""
    return _json_sha256(hashes) if len(hashes) > 1 else next(iter(hashes.values()))


def _file_sha256(path: Path) -> str:
    """Hash a file once per content; threads may both hash it at first, to one result."""
    real = path.resolve()  # the hub's cache holds links
    with real.open("rb") as file:
        # Of the open file: the name may come to belong to another one meanwhile.
        stat = os.fstat(file.fileno())
        key = (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if key not in _file_hashes:
            _file_hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _file_hashes[key]


def _json_sha256(data: Mapping[str, Any]) -> str:
    """Hash values that JSON can hold, whatever the order of their keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _three(name: str, value: float | tuple[float, ...], path: Path) -> _Colour:
    values = value if isinstance(value, tuple) else (value,)
    if len(values) not in (1, 3):
        raise ConfigError(
            f"{name} as one number or three", f"{list(values)} in {path}", f"correct {path.name}"
        )
    red, green, blue = values * (3 // len(values))
    return red, green, blue
