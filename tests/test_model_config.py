"""Configurations: published defaults, files that both implementations read, wrong values."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from reference_model import BACKBONE, published, tiny_config, tiny_settings

from xchmv2.errors import CheckpointError, ConfigError
from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation, DINOv3ViTConfig


@pytest.mark.parametrize("name", ["CHMv2Config", "DINOv3ViTConfig"])
def test_defaults_are_the_published_ones(name):
    ours = {"CHMv2Config": CHMv2Config, "DINOv3ViTConfig": DINOv3ViTConfig}[name]().to_dict()
    theirs = getattr(published(), name)().to_dict()
    for key, value in ours.items():
        if key == "return_class_token" and key not in theirs:
            assert value is False
        elif key == "backbone_config":
            assert value == {k: theirs[key][k] for k in value}
        else:
            assert value == theirs[key], key


def test_defaults_compare_with_lists():
    config = CHMv2Config()
    assert config.reassemble_factors == [4, 2, 1, 0.5]
    assert config.post_process_channels == [128, 256, 512, 1024]
    assert config.backbone.out_indices == [6, 12, 18, 24] == config.backbone_config.out_indices
    assert config.backbone.out_indices == (6, 12, 18, 24)
    assert config.backbone.out_indices != [6, 12, 18]
    assert config.backbone.out_features == ["stage6", "stage12", "stage18", "stage24"]
    assert config.backbone.stages == (6, 12, 18, 24)
    assert CHMv2Config(reassemble_factors=None, post_process_channels=None) == config


def test_frozen_hashable_and_copied():
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_depth = 1.0
    assert len({config, tiny_config(), pickle.loads(pickle.dumps(config))}) == 1
    assert CHMv2Config.from_dict(config.to_dict()) == config
    json.dumps(config.to_dict())
    assert dataclasses.replace(config, max_depth=50.0).max_depth == 50.0


def test_partial_backbone_is_completed_as_published():
    """From the backbone's own defaults, not from those of CHMv2's backbone."""
    partial = {
        "model_type": "dinov3_vit",
        "out_indices": [2, 4, 6, 8],
        "return_class_token": True,
        "hidden_size": 192,
    }
    ours = CHMv2Config(backbone_config=dict(partial)).backbone.to_dict()
    theirs = published().CHMv2Config(backbone_config=dict(partial)).backbone_config.to_dict()
    assert ours == {key: theirs[key] for key in ours}
    assert ours["num_hidden_layers"] == 12
    without_type = {key: value for key, value in partial.items() if key != "model_type"}
    assert CHMv2Config(backbone_config=without_type).backbone.to_dict() == ours


def test_backbone_as_object_and_dict_are_one():
    given = {key: value for key, value in BACKBONE.items() if key != "model_type"}
    by_object = CHMv2Config(**tiny_settings() | {"backbone_config": DINOv3ViTConfig(**given)})
    assert by_object == tiny_config()


def test_configurations_of_transformers_are_taken():
    given = {key: value for key, value in BACKBONE.items() if key != "model_type"}
    theirs = published().DINOv3ViTConfig(**given)
    settings = tiny_settings() | {"backbone_config": theirs}
    assert CHMv2Config(**settings) == tiny_config()
    whole = published().CHMv2Config(**settings)
    assert CHMv2ForDepthEstimation(whole).config == tiny_config()
    with pytest.raises(ConfigError, match=r"model_type 'dinov3_vit', found 'vit'; give a DINOv3Vi"):
        CHMv2Config(backbone_config=published().ViTConfig())
    for wrong in (published().DINOv3ViTConfig, DINOv3ViTConfig, tiny_config):
        with pytest.raises(ConfigError, match=r"backbone_config as a dict, a DINOv3ViTConfig or N"):
            CHMv2Config(backbone_config=wrong)


def test_read_from_the_hub(tmp_path, monkeypatch):
    tiny_config().save_pretrained(tmp_path / "small")
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"revision": "v1", "token": "hf_secret", "subfolder": "small"}
    assert CHMv2Config.from_pretrained("a/b", **options) == tiny_config()
    assert asked == {
        "repo_id": "a/b",
        "revision": "v1",
        "token": "hf_secret",
        "allow_patterns": ["small/config.json"],
    }


def test_files_cross_both_ways(tmp_path):
    settings = tiny_settings(readout_type="add", max_depth=40.0)
    published().CHMv2Config(**settings).save_pretrained(tmp_path)
    assert CHMv2Config.from_pretrained(tmp_path) == CHMv2Config(**settings)
    tiny_config({"image_size": [64, 32]}, norm_strategy="softmax").save_pretrained(tmp_path / "b")
    theirs = published().AutoConfig.from_pretrained(tmp_path / "b")
    assert type(theirs).__name__ == "CHMv2Config"
    assert theirs.norm_strategy == "softmax"
    assert theirs.backbone_config.image_size == [64, 32]
    assert theirs.backbone_config.out_indices == [1, 2, 4, 5]
    assert theirs.backbone_config.return_class_token is True


def test_whole_numbers_are_saved_as_the_published_model_wants_them(tmp_path):
    config = tiny_config({"rope_theta": 100, "pos_embed_rescale": 2}, max_depth=50)
    assert config == tiny_config({"rope_theta": 100.0, "pos_embed_rescale": 2.0}, max_depth=50.0)
    config.save_pretrained(tmp_path)
    theirs = published().CHMv2Config.from_pretrained(tmp_path)
    assert theirs.max_depth == 50.0
    assert theirs.backbone_config.pos_embed_rescale == 2.0


def test_unknown_keys_of_a_file_are_ignored(tmp_path):
    data = tiny_config().to_dict() | {"backbone_type": "dinov3_vit", "id2label": {"0": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert CHMv2Config.from_pretrained(tmp_path) == tiny_config()


def test_a_misspelt_argument_is_an_error():
    with pytest.raises(TypeError, match=r"max_dept"):
        CHMv2Config(max_dept=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"readout_type": "sum"}, "readout_type as one of 'ignore', 'add', 'project', found 'sum'"),
        ({"bins_strategy": "x"}, "bins_strategy as one of 'linear', 'log', 'chmv2_mixlog'"),
        ({"norm_strategy": 3}, "one of 'linear', 'softmax', 'sigmoid', 'chmv2_mixlog', found 3"),
        ({"number_output_channels": 0}, "a whole number of at least 1, found 0; leave"),
        ({"head_hidden_size": 2.5}, "head_hidden_size as a whole number"),
        ({"fusion_hidden_size": True}, "fusion_hidden_size as a whole number of at least 2"),
        ({"min_depth": 5.0, "max_depth": 2.0}, "found min_depth=5.0, max_depth=2.0"),
        ({"min_depth": 0.0}, "0 itself only with bins_strategy='linear'"),
        ({"max_depth": float("nan")}, "max_depth as a finite number"),
        ({"max_depth": 10**400}, "max_depth as a finite number of at least 0 and at most 1e"),
        ({"min_depth": 1e-300}, "1e-6 <= min_depth < max_depth .*found min_depth=1e-300"),
        ({"fusion_hidden_size": 10**6}, "at least 2 and at most 100000, found 1000000"),
        ({"reassemble_factors": [10**6, 2, 1, 0.5]}, "whole numbers, or fractions between 0 and"),
        ({"initializer_range": "a"}, "initializer_range as a finite number"),
        ({"reassemble_factors": [4, 2.5, 1, 0.5]}, "whole numbers, or fractions between 0 and 1"),
        ({"reassemble_factors": [4, 2]}, "found 4 stages, 4 channels, 2 factors"),
        ({"post_process_channels": [8, 8]}, "found 4 stages, 2 channels, 4 factors"),
        ({"post_process_channels": 8}, "post_process_channels as a list, found 8"),
        ({"post_process_channels": [8, 8, 8, -1]}, "at least 1, found -1"),
        ({"backbone_config": 3}, "as a dict, a DINOv3ViTConfig or None, found int"),
        ({"backbone_config": {"model_type": "dinov2"}}, "model_type 'dinov3_vit', found 'dinov2'"),
        ({"backbone_config": {"out_indices": [1, 2, 3, 4]}}, "return_class_token=True and"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        CHMv2Config(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 30}, r"a multiple of 4 \* num_attention_heads, found hidden_size=30"),
        ({"hidden_act": "x"}, "hidden_act as one of 'gelu'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers as a whole number .* at most 1000, fo"),
        ({"rope_theta": 10**400}, "rope_theta as a finite number"),
        ({"key_bias": 1}, "key_bias as one of True, False, found 1"),
        ({"drop_path_rate": 1.0}, "at least 0 and below 1, found 1.0"),
        ({"pos_embed_jitter": 0.5}, "pos_embed_jitter as a finite number of at least 1"),
        ({"patch_size": [16, 16, 16]}, "patch_size as one whole number or two"),
        ({"patch_size": 16.0}, "patch_size as a whole number"),
        ({"layer_norm_eps": None}, "layer_norm_eps as a finite number"),
        ({"num_register_tokens": -1}, "num_register_tokens as a whole number of at least 0"),
        ({"out_indices": [13]}, "ascending, different numbers from 0 to 12, found"),
        ({"out_indices": [3, 2]}, "ascending"),
        ({"out_indices": []}, "ascending"),
        ({"out_indices": 5}, "out_indices as a list"),
        ({"out_features": ["stage13"]}, r"out_features from \['stem'.*found \['stage13'\]"),
        ({"out_indices": [1], "out_features": ["stage2"]}, "give only one of them"),
    ],
)
def test_wrong_backbone_values_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        DINOv3ViTConfig(**wrong)


def test_other_models_files_are_refused():
    with pytest.raises(ConfigError, match=r"model_type 'chmv2', found 'dpt'"):
        CHMv2Config.from_dict({"model_type": "dpt"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a readable config.json, found FileNotFoundError for .*config.json; give a folder"),
        ('{"patch_size": 16', "config.json as JSON"),
        ("[1, 2]", "a JSON object in config.json, found list"),
        (b"\xff\xfe\x00", "config.json as JSON"),
        ("[" * 100_000, "config.json as JSON"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        CHMv2Config.from_pretrained(tmp_path)


def test_a_wrong_value_names_its_file(tmp_path):
    (tmp_path / "config.json").write_text('{"norm_strategy": "max"}')
    message = (
        rf"norm_strategy as one of .*, found 'max' in {tmp_path}/config.json; correct config.json"
    )
    with pytest.raises(ConfigError, match=message):
        CHMv2Config.from_pretrained(tmp_path)


def test_every_name_of_the_room_is_found_and_those_of_files_without_torch():
    code = """
import sys
import xchmv2.model as model
from xchmv2.model.files import CONFIG_NAME, TILE, find_folder
assert TILE == 448 and find_folder and CONFIG_NAME
assert "torch" not in sys.modules
assert all(getattr(model, name) is not None for name in model.__all__)
assert set(model.__all__) == set(model._FILES)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
