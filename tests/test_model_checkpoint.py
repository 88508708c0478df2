"""Checkpoints cross between the implementations; what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from reference_model import (
    assert_heights_close,
    make_pair,
    published,
    random_pixels,
    randomise,
    tiny_config,
    tiny_settings,
    write_published,
)
from safetensors.torch import load_file, save_file

from xchmv2.errors import CheckpointError, ConfigError, DeviceError
from xchmv2.model import CHMv2ForDepthEstimation, CHMv2ImageProcessor
from xchmv2.model import checkpoint as module
from xchmv2.model.checkpoint import (
    Checkpoint,
    load_weights,
    resolve_checkpoint,
    save_checkpoint,
    state_dict_sha256,
)
from xchmv2.model.files import MODEL, read_json, write_json

# Private imports: files are written wrong on purpose.

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    write_published(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Apply a function to the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **options):
    return CHMv2ForDepthEstimation.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    "settings",
    [
        tiny_settings(),
        tiny_settings({"use_gated_mlp": True, "key_bias": False}, readout_type="add"),
        tiny_settings({"num_register_tokens": 0}, number_output_channels=1),
    ],
)
@torch.inference_mode()
def test_from_published_and_back(tmp_path, settings):
    theirs = write_published(tmp_path / "theirs", settings)
    ours = load(tmp_path / "theirs")
    expected = theirs(random_pixels()).predicted_depth
    assert not ours.training
    assert_heights_close(ours(random_pixels()).predicted_depth, expected)
    ours.save_pretrained(tmp_path / "ours")
    back, report = published().CHMv2ForDepthEstimation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values())
    assert_heights_close(back.eval()(random_pixels()).predicted_depth, expected)
    auto = published().AutoModelForDepthEstimation.from_pretrained(tmp_path / "ours")
    assert type(auto).__name__ == "CHMv2ForDepthEstimation"
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@torch.inference_mode()
def test_both_layouts_load(folder):
    expected = load(folder)(random_pixels()).predicted_depth
    names = load_file(folder / "model.safetensors").keys()
    assert any(name.startswith("backbone.layer.0.") for name in names)

    def as_in_memory(tensors):
        renamed = {
            key.replace("backbone.layer.", "backbone.model.layer."): value
            for key, value in tensors.items()
        }
        buffer = {"backbone.rope_embeddings.inv_freq": torch.ones(4)}
        return renamed | buffer

    rewrite(folder, as_in_memory)
    assert torch.equal(load(folder)(random_pixels()).predicted_depth, expected)


def test_sharded_checkpoint(tmp_path):
    theirs = write_published(tmp_path / "single")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    one, many = load(tmp_path / "single"), load(tmp_path / "shards")
    assert state_dict_sha256(one) == state_dict_sha256(many)
    sha = resolve_checkpoint(tmp_path / "shards").weights_sha256
    next(iter((tmp_path / "shards").glob("model-00002*"))).unlink()
    with pytest.raises(CheckpointError, match=r"a whole safetensors .*model-00002.*no such file"):
        resolve_checkpoint(tmp_path / "shards")
    assert len(sha) == 64


@pytest.mark.parametrize("weight_map", ["null", "[]", '{"a": "../../x.safetensors"}'])
def test_broken_index(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(CheckpointError, match=r"index.json"):
        load(folder)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_data_types(folder, stored):
    rewrite(folder, lambda tensors: {key: value.to(stored) for key, value in tensors.items()})
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}
    assert load(folder, dtype="auto").dtype == stored
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        assert {p.dtype for p in load(folder, dtype=dtype).parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"dtype as 'auto' or one of float32.*found 'int8'"):
        load(folder, dtype="int8")


def test_torch_dtype_is_dtype(folder):
    rewrite(folder, lambda tensors: {key: value.half() for key, value in tensors.items()})
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(folder, torch_dtype="auto").dtype == torch.float16
    assert load(folder, torch_dtype="float16", dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ConfigError, match=r"one data type, found dtype='auto', torch_dtype='float"):
        load(folder, dtype="auto", torch_dtype="float16")
    with pytest.raises(ConfigError, match=r"dtype as 'auto' or one of .*found 'half'"):
        load(folder, torch_dtype="half")


def test_half_precision_is_saved_as_it_is(folder, tmp_path):
    load(folder, dtype="bfloat16").save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = published().CHMv2ForDepthEstimation.from_pretrained(tmp_path / "half")
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "cpu", None, torch.device("cpu"), {"": "cpu"}])
def test_devices(folder, device_map):
    model = load(folder, device_map=device_map)
    assert model.device.type in {"cpu", "cuda"}


@pytest.mark.parametrize("device_map", ["gpu", "cuda:99", {"head": "cpu"}, 3.5])
def test_unknown_devices_are_refused(folder, device_map):
    with pytest.raises(DeviceError, match=r"pass device_map='auto'"):
        load(folder, device_map=device_map)


def test_loaded_in_inference_mode_can_be_trained(folder):
    with torch.inference_mode():
        model = load(folder)
    model.train()(random_pixels()).predicted_depth.mean().backward()
    assert model.head.conv_depth.last.weight.grad is not None


K_PROJ = "backbone.layer.1.attention.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != K_PROJ},
            r"1 missing \(backbone.model.layer.1.attention.k_proj.weight\); use the config.json",
        ),
        (lambda t: t | {"extra": torch.ones(1)}, r"1 unexpected \(extra\)"),
        (
            lambda t: t | {K_PROJ: torch.ones(3, 2)},
            r"1 misshapen \(.*k_proj.weight \[3, 2\] instead of \[32, 32\]\)",
        ),
        (lambda t: t | {K_PROJ: torch.ones(32, 32).long()}, r"1 not floating point \(.*k_proj"),
        (
            lambda t: {k: v for k, v in t.items() if "mlp" not in k},
            r"20 missing \(.*mlp.up_proj.weight.* and 15 more\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_key_bias_of_another_conversion_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"]["key_bias"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"5 unexpected \(.*k_proj.bias"):
        load(folder)


@torch.inference_mode()
def test_key_biases_that_the_conversion_leaves_out_are_zeros(folder, tmp_path):
    def without(tensors):
        return {key: value for key, value in tensors.items() if "k_proj.bias" not in key}

    def zeros(tensors):
        return {k: torch.zeros_like(v) if "k_proj.bias" in k else v for k, v in tensors.items()}

    rewrite(folder, zeros)
    expected = load(folder)(random_pixels()).predicted_depth
    rewrite(folder, without)
    message = r"lack backbone.model.layer.0.attention.k_proj.bias and 4 more.*key_bias: true"
    with pytest.warns(UserWarning, match=message) as caught:
        model = load(folder)
    assert Path(caught[0].filename).name == "test_model_checkpoint.py"
    assert torch.equal(model(random_pixels()).predicted_depth, expected)
    theirs = published().CHMv2ForDepthEstimation.from_pretrained(folder).eval()
    assert_heights_close(expected, theirs(random_pixels()).predicted_depth)
    model.save_pretrained(tmp_path / "whole")  # what the warning says
    assert torch.equal(load(tmp_path / "whole")(random_pixels()).predicted_depth, expected)


def test_some_key_biases_missing_is_damage(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != K_PROJ.replace("weight", "bias")})
    with pytest.raises(CheckpointError, match=r"1 missing \(backbone.model.layer.1.*k_proj.bias\)"):
        load(folder)


def test_tensors_of_pretraining_are_ignored(folder):
    expected = state_dict_sha256(load(folder))
    extra = {
        "backbone.local_cls_norm.weight": torch.full((32,), torch.nan),
        "backbone.local_cls_norm.bias": torch.ones(32),
        "backbone.rope_embed.periods": torch.ones(4),
        "backbone.rope_embeddings.periods": torch.ones(4),
    }
    rewrite(folder, lambda tensors: tensors | extra)
    assert state_dict_sha256(load(folder)) == expected
    for name in ("backbone.rope_embed.period", "local_cls_norms.weight", "head.periods"):
        rewrite(folder, lambda tensors, name=name: tensors | {name: torch.ones(1)})
        with pytest.raises(CheckpointError, match=rf"1 unexpected \({name}\)"):
            load(folder)
        rewrite(folder, lambda tensors, name=name: {k: v for k, v in tensors.items() if k != name})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_are_not_finite_are_refused(folder, value, dtype):
    def spoil(tensors):
        tensors[K_PROJ] = tensors[K_PROJ].to(dtype)
        tensors[K_PROJ][3, 4] = value
        return tensors

    rewrite(folder, spoil)
    message = r"finite weights as float32, in .*found 1 not finite \(.*layer.1.attention.k_proj.wei"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_weights_too_large_for_a_data_type_are_refused(folder):
    rewrite(folder, lambda tensors: tensors | {K_PROJ: torch.full((32, 32), 1e6)})
    with pytest.raises(CheckpointError, match=r"weights as float16.*load with dtype='float32'"):
        load(folder, dtype="float16")
    assert load(folder, dtype="float32").dtype == torch.float32


def test_sizes_are_checked_before_anything_is_allocated(folder, monkeypatch):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"] |= {"hidden_size": 65_536, "intermediate_size": 99_999}
    path.write_text(json.dumps(config | {"fusion_hidden_size": 90_000}))  # terabytes

    def allocate(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(torch.nn.Module, "to_empty", allocate)
    with pytest.raises(
        CheckpointError, match=r"misshapen \(.*\[1, 1, 32\] instead of \[1, 1, 65536"
    ):
        load(folder)


def test_blocks_are_counted_before_a_model_is_built(folder, monkeypatch):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"]["num_hidden_layers"] = 1000
    path.write_text(json.dumps(config))
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    with pytest.raises(CheckpointError, match=r"of the 1000 blocks .*found those of 5 in .*config"):
        load(folder)


def replace(path, kind):
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, TemporaryDirectory() as short:
            made.bind(f"{short}/s")  # the length of the name is limited
            Path(short, "s").rename(path)
    elif kind == "large":
        path.touch()
        os.truncate(path, 2**40)
    elif kind == "unreadable":
        path.write_bytes(b"\xff\xfe{}")
    elif kind == "deep":
        path.write_text('{"a":' * 10_000 + "1" + "}" * 10_000)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "dangling": "nowhere"}[kind])


KINDS = ["folder", "pipe", "socket", "device", "loop", "dangling", "large", "unreadable", "deep"]
SHARD = "model-00001-of-00001.safetensors"
NAMES = ["config.json", "preprocessor_config.json", "model.safetensors"]
NAMES += ["model.safetensors.index.json", SHARD]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused(folder, name, kind):
    """At once: opening a pipe would wait for ever, and reading a device would never end."""
    CHMv2ImageProcessor().save_pretrained(folder)
    if name in NAMES[3:]:
        weights, index = folder / "model.safetensors", folder / NAMES[3]
        index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(weights), SHARD)}))
        weights.rename(folder / SHARD)
        resolve_checkpoint(folder)
    replace(folder / name, kind)
    with pytest.raises(CheckpointError, match=name):
        load(folder)
    if name == NAMES[1]:
        with pytest.raises(CheckpointError, match=name):
            CHMv2ImageProcessor.from_pretrained(folder)


def test_a_key_that_is_there_twice_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "max_depth": 50.0}')
    with pytest.raises(CheckpointError, match=r"config.json as JSON in .*found 'max_depth' twice"):
        load(folder)


def header(tensors, size, length=None):
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def stored(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "data",
    [
        header({}, 0, length=2**63),
        header({}, 0, length=2**64 - 1),
        header({}, 0, length=90_000_000),
        header({"a": stored(0, 8), "b": stored(4, 12)}, 12),
        header({"a": stored(0, 8), "b": stored(0, 8)}, 8),
        header({"a": stored(0, 8)}, 4),
        header({"a": stored(100, 108)}, 8),
        header({"a": stored(0, 8, (2**62, 2**62))}, 8),
        header({"a": stored(0, 8, (-2,))}, 8),
        header({"a": stored(0, 8, dtype="Q9")}, 8),
        header([], 0),
        header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000, 0),
        header(b"\xff\xfe", 0),
    ],
)
def test_headers_that_lie_are_refused(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a whole safetensors file model.safetensors, found"):
        load(folder)


@pytest.mark.parametrize(
    "shard",
    [5, None, ["a"], "", "..", "/etc/passwd", "a\0b.safetensors", "x" * 5000, "a.bin"],
)
def test_shards_are_safetensors_files_beside_the_index(folder, shard):
    (folder / "model.safetensors").unlink()
    (folder / NAMES[3]).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"files beside model.safetensors.index.json, found"):
        load(folder)


def test_messages_show_the_beginning_of_what_is_long(folder):
    rewrite(folder, lambda tensors: tensors | {"x" * 100_000: torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(x{300}\.\.\.\)") as raised:
        load(folder)
    assert len(str(raised.value)) < 1000
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_depth": ["x" * 100_000]}))
    with pytest.raises(ConfigError, match=r"x\.\.\. in .*config.json") as raised:
        load(folder)
    assert len(str(raised.value)) < 1000


def test_a_tensor_stored_twice_is_refused(tmp_path):
    theirs = write_published(tmp_path / "single")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    first, second = sorted((tmp_path / "shards").glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    message = rf"every tensor once in .*{first.name} and in {second.name}; download or save"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "shards")


def test_truncated_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    for size in (len(data) - 100, 1000, 5, 0):
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"a whole safetensors file .* again"):
            resolve_checkpoint(folder)


def test_missing_files(folder):
    (folder / "model.safetensors").rename(folder / "model.old")
    with pytest.raises(CheckpointError, match=r"expected model.safetensors in .*hf download"):
        resolve_checkpoint(folder)
    (folder / "model.old").rename(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a readable config.json, found FileNotFoundError"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "x.ckpt"])
def test_pickles_are_never_opened(folder, name):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (folder / "exploded",)

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=rf"{name}, blocked because .*nothing was unpickled"):
        load(folder)
    assert not (folder / "exploded").exists()


def test_wrong_config_is_found_before_any_weight(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_strategy": "max"}))
    with pytest.raises(ConfigError, match=r"norm_strategy"):
        resolve_checkpoint(folder)


def test_checkpoint_of_a_folder(folder):
    import hashlib

    found = resolve_checkpoint(str(folder))
    assert found == resolve_checkpoint(folder)
    assert hash(found) == hash(resolve_checkpoint(folder))
    assert (found.model_id, found.revision, found.folder) == (str(folder), None, folder)
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert found.weights_sha256 == expected
    assert found.config == tiny_config()


def test_hash_follows_the_content(folder, monkeypatch):
    first = resolve_checkpoint(folder)
    opened = []
    digest = module.hashlib.file_digest
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *a: opened.append(a) or digest(*a))
    assert resolve_checkpoint(folder) == first
    assert not opened
    write_published(folder, seed=1)
    second = resolve_checkpoint(folder)
    assert second.weights_sha256 != first.weights_sha256
    assert second.config_sha256 == first.config_sha256
    assert len(opened) == 1


def test_config_hash_is_of_the_content(folder):
    first = resolve_checkpoint(folder).config_sha256
    config = json.loads((folder / "config.json").read_text())
    reordered = dict(sorted(config.items(), reverse=True))
    (folder / "config.json").write_text(json.dumps(reordered, indent=7))
    assert resolve_checkpoint(folder).config_sha256 == first
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    second = resolve_checkpoint(folder).config_sha256
    assert second != first
    (folder / "config.json").write_text(json.dumps(config | {"max_depth": 50.0}))
    assert resolve_checkpoint(folder).config_sha256 not in {first, second}


def test_mean_and_std(folder):
    found = resolve_checkpoint(folder)
    default = ((0.420, 0.411, 0.296), (0.213, 0.156, 0.143))
    assert found.mean_std() == default
    path = folder / "preprocessor_config.json"
    path.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5}')
    assert found.mean_std() == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    path.write_text('{"image_mean": null}')
    assert found.mean_std() == default
    for off in ("false", "null"):
        path.write_text(f'{{"do_normalize": {off}}}')
        assert found.mean_std() == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        path.write_text(f'{{"do_rescale": {off}, "image_mean": 102, "image_std": 51}}')
        assert found.mean_std() == ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    path.write_text('{"device": "cuda:77"}')  # where the processor works, not the model
    assert found.mean_std() == default
    for wrong in (
        '{"image_mean": [1, 2]}',
        '{"image_mean": [1, 2], "image_std": [1, 2]}',
        '{"image_std": [1, 0, 1]}',
        '{"image_mean": "x"}',
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=rf"in {path}; correct preprocessor_config.json"):
            found.mean_std()
        with pytest.raises(ConfigError, match=r"image_"):  # when planned, not in a worker later
            resolve_checkpoint(folder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json as JSON"):
        resolve_checkpoint(folder)


def test_mean_and_std_are_the_processors():
    processor = CHMv2ImageProcessor()
    ours = Checkpoint("x", None, Path("nowhere"), "", "")
    assert ours.mean_std() == (tuple(processor.image_mean), tuple(processor.image_std))


@pytest.mark.parametrize(
    "model",
    [
        *("./nowhere", "/no/where", "~/no/where", "a/b/c", Path("no"), Path("a/b"), "no", "no/"),
        *("~nobody-of-this-name/model", "x" * 5_000, "a\0b"),
    ],
)
def test_folders_that_do_not_exist(model):
    message = r"a folder with config.json .*which does not exist here"
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(model)


def test_a_file_is_no_folder(folder):
    with pytest.raises(CheckpointError, match=r"which is a file; .*give the folder that holds it"):
        resolve_checkpoint(folder / "model.safetensors")


def test_relative_folder_is_named_absolutely(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve_checkpoint("model").model_id == str(folder)


def test_hub(folder, monkeypatch):
    import huggingface_hub

    snapshot = folder.parent / "snapshots" / "abc123"
    snapshot.parent.mkdir()
    snapshot.symlink_to(folder)
    asked = {}

    def download(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_checkpoint(revision="main")
    assert (found.model_id, found.revision) == (MODEL, "abc123")
    assert (asked["repo_id"], asked["revision"]) == (MODEL, "main")
    assert not any(pattern.endswith((".bin", "*")) for pattern in asked["patterns"])
    assert found.weights_sha256 == resolve_checkpoint(folder).weights_sha256
    assert load(MODEL, revision="main").config == tiny_config()


def test_hub_options(folder, monkeypatch, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "small").symlink_to(folder)
    asked = {}

    def download(repo_id, **options):
        asked.clear()
        asked.update(options, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"token": "hf_secret", "cache_dir": tmp_path, "local_files_only": True}
    model = load("a/b", revision="v1", subfolder="small", torch_dtype="bfloat16", **options)
    assert model.dtype == torch.bfloat16
    patterns = asked.pop("allow_patterns")
    assert asked == options | {"repo_id": "a/b", "revision": "v1"}
    assert patterns[0] == "small/config.json"
    assert all(pattern.startswith("small/") for pattern in patterns)
    found = resolve_checkpoint("a/b", "v1", subfolder="./small/")
    assert asked["allow_patterns"] == patterns
    assert (found.model_id, found.revision) == ("a/b", "abc123")
    assert asked.keys() == {"repo_id", "revision", "allow_patterns"}  # what is not given stays out
    with pytest.raises(CheckpointError, match=r"a folder 'big' in .*found the folders \['small'\]"):
        load("a/b", subfolder="big")


def test_subfolder_of_a_folder(folder):
    expected = state_dict_sha256(load(folder))
    for name in (folder.parent, str(folder.parent)):
        assert state_dict_sha256(load(name, subfolder="model", token=None)) == expected
    assert resolve_checkpoint(folder.parent, subfolder="model") == resolve_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"found the folders \['model'\]; correct subfolder="):
        load(folder.parent, subfolder="models")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": 5}, "token as a token, or True for that of `hf auth login`, found int; pass to"),
        ({"token": ["hf_secret"]}, "found list; pass token=True"),
        ({"cache_dir": 3}, "cache_dir as a folder, found 3; pass cache_dir='models'"),
        ({"local_files_only": "yes"}, "as True or False, found 'yes'; pass local_files_only=True"),
        ({"revision": 2}, "revision as a branch, tag or commit, found 2; pass revision='main'"),
        ({"subfolder": 1}, "subfolder as the name of a folder inside the checkpoint, found 1"),
        ({"subfolder": "../model"}, r"subfolder as .*found '../model'; pass subfolder=''"),
        ({"subfolder": "/etc"}, "subfolder as .*found '/etc'"),
        ({"local_file_only": True}, "arguments named revision, token, .*found 'local_file_only'"),
    ],
)
def test_wrong_options_are_refused(folder, options, message):
    for model in (folder, "a/b"):
        with pytest.raises(ConfigError, match=message):
            load(model, **options)


@pytest.mark.parametrize("model", [0.5, None, b"model", ["a/b"], torch.nn.Linear(1, 1)])
def test_what_is_no_name_is_refused(model):
    message = r"a folder with config.json in it, or a hub id 'owner/name', found \w+; pass its path"
    with pytest.raises(CheckpointError, match=message):
        load(model)


@pytest.mark.parametrize("error", ["offline", "gated", "unknown", "invalid"])
def test_hub_errors_say_how_to_download(monkeypatch, error):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    raised = {
        "offline": LocalEntryNotFoundError("\n\ncannot reach the hub\nmore"),
        "gated": OSError("401: access is restricted"),
        "unknown": OSError("404: no such repository"),
        "invalid": ValueError("not a repository name"),
    }[error]

    def download(*args, **kwargs):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint()
    message = str(caught.value)
    for part in (MODEL, type(raised).__name__, "DINOv3 License", "gated", "hf download"):
        assert part in message
    assert str(raised).strip().splitlines()[0] in message


def test_saving_is_atomic(folder, monkeypatch):
    from xchmv2.model import checkpoint as weights

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = load(folder)
    randomise(model, seed=5)

    def fail(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", fail)
        with pytest.raises(OSError, match=r"disk full"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_checkpoint(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
    assert state_dict_sha256(load(folder)) == state_dict_sha256(model)
    modes = {path.stat().st_mode for path in folder.iterdir() if path.is_file()}
    assert len(modes) == 1
    assert os.stat(folder / "model.safetensors").st_mode & 0o444


def test_json_written_by_many_threads_is_always_whole(tmp_path):
    path = tmp_path / "new" / "config.json"
    write_json(path, {"writer": -1})

    def write_and_read(writer):
        for _ in range(20):
            write_json(path, {"writer": writer, "filler": "x" * 10_000 * writer})
            assert len(read_json(path)) == 2

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_and_read, range(8)))
    assert [found.name for found in path.parent.iterdir()] == ["config.json"]


def test_content_hash_of_a_live_model(folder):
    model = load(folder)
    sha = state_dict_sha256(model)
    assert sha == state_dict_sha256(copy.deepcopy(model)) == state_dict_sha256(load(folder))
    assert sha != state_dict_sha256(load(folder, dtype="bfloat16"))
    with torch.no_grad():
        model.backbone.model.layer[2].attention.qkv_weight[0, 0] += 1
    assert sha != state_dict_sha256(model)
    other = CHMv2ForDepthEstimation(tiny_config(max_depth=50.0))
    other.load_state_dict(load(folder).state_dict())
    assert sha != state_dict_sha256(other)


def test_load_weights_into_a_given_model(folder):
    model = CHMv2ForDepthEstimation(tiny_config())
    load_weights(model, resolve_checkpoint(folder))
    assert state_dict_sha256(model) == state_dict_sha256(load(folder))
    other = CHMv2ForDepthEstimation(tiny_config(number_output_channels=9))
    with pytest.raises(CheckpointError, match=r"2 misshapen \(head.conv_depth.head.4.weight"):
        load_weights(other, resolve_checkpoint(folder))


def test_threads_resolve_alike(folder):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_checkpoint(folder))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4


def test_save_and_load_keep_every_bit(tmp_path):
    ours, _ = make_pair(tiny_settings())
    ours.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config == ours.config
    with torch.inference_mode():
        assert torch.equal(
            again(random_pixels()).predicted_depth, ours(random_pixels()).predicted_depth
        )


# --- files that were changed at random -----------------------------------------------------------

ODD = [None, True, False, 0, -1, 1, 2, 3, 17, 10**6, 10**30, 10**400, 1.5, -0.5, 1e-320, 1e300]
ODD += [float("nan"), float("inf"), "", "x", "gelu", [], [1], [1, 2, 3], [[1]], [None], {}]
ODD += [{"a": 1}, {"height": 8, "width": 8}, ["stage1"], [1, 2, 4, 5], [-1]]


def places(node, path=()):
    """List the ways to every value of a JSON document."""
    keys = node if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield (*path, key)
        if isinstance(node[key], dict | list):
            yield from places(node[key], (*path, key))


def mutated(data, rng):
    """Leave out, scale or replace one or two values of a JSON document."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 1, 2])):
        *way, last = rng.choice(list(places(data)))
        node = data
        for key in way:
            node = node[key]
        how = rng.random()
        if how < 0.15:
            del node[last]
        elif how < 0.3 and type(node[last]) in (int, float):
            node[last] *= rng.choice([-1, 2, 0.5, 1000])
        else:
            node[last] = rng.choice(ODD)
    return data


def attempt(read, folder):
    """Return what a folder gives, or None and the sentence that refuses it."""
    try:
        return read(folder), ""
    except (ConfigError, CheckpointError) as error:
        return None, str(error)


def test_mutated_configurations_are_refused_or_meant(folder):
    """Every trial gives a sentence that names the file, or the model that the file describes."""
    path, rng, loaded, refused = folder / "config.json", random.Random(14), 0, 0
    good = json.loads(path.read_text())
    pixels = random_pixels(1, 32, 32)
    for _ in range(200):
        data = mutated(good, rng)
        path.write_text(json.dumps(data))
        model, message = attempt(load, folder)
        if model is None:
            assert "config.json" in message
            refused += 1
            continue
        loaded += 1
        ours = model.config.to_dict()
        for mine, theirs in ((ours, data), (ours["backbone_config"], data["backbone_config"])):
            for name in {*mine} & {*theirs} - {"backbone_config"}:
                assert mine[name] == theirs[name] or theirs[name] is None, name
        with torch.inference_mode():
            assert model(pixels).predicted_depth.isfinite().all()
    assert loaded > 40
    assert refused > 80


def test_mutated_preprocessor_files_mean_the_same_to_both_readers(folder):
    """Predictions normalise as the image processor does, or both refuse the file."""
    CHMv2ImageProcessor().save_pretrained(folder)
    path, rng, loaded, refused = folder / "preprocessor_config.json", random.Random(14), 0, 0
    good = json.loads(path.read_text())
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype="uint8")
    for _ in range(400):
        path.write_text(json.dumps(mutated(good, rng)))
        checkpoint, message = attempt(resolve_checkpoint, folder)
        processor, _ = attempt(CHMv2ImageProcessor.from_pretrained, folder)
        if checkpoint is None:
            assert "preprocessor_config.json" in message
            refused += 1
            continue
        off = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        (found,) = processor(image, **off).pixel_values
        mean, std = (np.reshape(colour, (3, 1, 1)) for colour in checkpoint.mean_std())
        expected = (image / 255 - mean) / std
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
        loaded += 1
    assert loaded > 50
    assert refused > 100
