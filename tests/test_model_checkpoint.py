"""Checkpoints cross between the implementations; what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    path.write_text('{"do_normalize": false}')
    assert found.mean_std() == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for wrong in ('{"image_mean": [1, 2]}', '{"image_std": [1, 0, 1]}', '{"image_mean": "x"}'):
        path.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"correct preprocessor_config.json"):
            found.mean_std()
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json as JSON"):
        resolve_checkpoint(folder)


def test_mean_and_std_are_the_processors():
    processor = CHMv2ImageProcessor()
    ours = Checkpoint("x", None, Path("nowhere"), "", "")
    assert ours.mean_std() == (tuple(processor.image_mean), tuple(processor.image_std))


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "/no/where", "~/no/where", "a/b/c", Path("no"), Path("a/b"), "no", "no/"],
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
