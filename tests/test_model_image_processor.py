"""The image processor against outputs of the published one, and everything it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xchmv2.errors import CheckpointError, CHMv2Error, ConfigError, DeviceError, ImageryError
from xchmv2.model import CHMv2ImageProcessor
from xchmv2.model.image_processor import BatchFeature

# Private imports: the type of a result that is called nowhere.

REFERENCE = Path(__file__).parent / "reference_data"
PUBLISHED = np.load(REFERENCE / "processor.npz")
CASES = json.loads(str(PUBLISHED["cases"]))


def published_input(name):
    return PUBLISHED[f"inputs/{name}"]


def published_outputs(case):
    outputs = {}
    for key in PUBLISHED.files:
        if key.startswith(f"{case}/"):
            outputs.setdefault(key.split("/")[1], []).append(PUBLISHED[key])
    return outputs


def has_lanczos():
    image = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    try:
        torch.nn.functional.interpolate(image, size=4, mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        return False
    return True


def run_case(case, wrap=lambda image: image):
    if case["settings"].get("resample") == 1 and not has_lanczos():
        pytest.skip(f"torch {torch.__version__} has no Lanczos filter (resample=1)")
    images = [published_input(name) for name in case["images"]]
    if "pil" in case:
        image_module = pytest.importorskip("PIL.Image")
        images = [image_module.fromarray(image.squeeze()) for image in images]
    maps = [wrap(published_input(name)) for name in case["maps"]] if "maps" in case else None
    return CHMv2ImageProcessor()([wrap(image) for image in images], maps, **case["settings"])


def assert_equals_published(batch, expected):
    for field, arrays in expected.items():
        assert len(batch[field]) == len(arrays)
        for ours, theirs in zip(batch[field], arrays, strict=True):
            assert ours.numpy().dtype == theirs.dtype
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-6)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 36, 3), dtype=np.uint8)


# --- the published numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_equals_published(name):
    case = {"settings": {}, **CASES[name]}
    assert_equals_published(run_case(case), published_outputs(name))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "pil" not in case])
def test_torch_input_equals_published(name):
    case = {"settings": {}, **CASES[name]}
    assert_equals_published(run_case(case, torch.from_numpy), published_outputs(name))


def test_settings_of_the_object_equal_settings_of_the_call():
    case = {"settings": {}, **CASES["maps_resized"]}
    settings = case["settings"]
    batch = CHMv2ImageProcessor(**settings)(
        [published_input(name) for name in case["images"]],
        [published_input(name) for name in case["maps"]],
    )
    assert_equals_published(batch, published_outputs("maps_resized"))


def test_default_is_written_out():
    """The defaults once more by hand: (v / 255 - mean) / std, centred in multiples of 16."""
    pixels = published_input("uint8_tall")
    expected = np.zeros((48, 16, 3))
    mean, std = np.array([0.420, 0.411, 0.296]), np.array([0.213, 0.156, 0.143])
    expected[7:40, 3:13] = (pixels / 255 - mean) / std
    result = CHMv2ImageProcessor()(pixels, return_tensors="np").pixel_values
    np.testing.assert_allclose(result, expected.transpose(2, 0, 1)[None], atol=1e-5)


# --- forms of input ------------------------------------------------------------------------------


def test_every_container_of_images_gives_the_same(image):
    processor = CHMv2ImageProcessor(return_tensors="pt")
    expected = processor(image).pixel_values.expand(2, -1, -1, -1)
    first = image.transpose(2, 0, 1)
    for images in (
        [image, image],
        (image, first),
        [[image], [image]],
        np.stack([image, image]),
        np.stack([first, first]),
        torch.from_numpy(np.stack([first, first])),
        [image[None], image[None]],
        [torch.from_numpy(image), image],
    ):
        assert torch.equal(processor(images=images).pixel_values, expected)


def test_arrays_that_torch_cannot_take_directly(image):
    processor = CHMv2ImageProcessor(return_tensors="pt")
    expected = processor(image.astype("f4")).pixel_values
    flipped = np.ascontiguousarray(image[::-1])[::-1]
    frozen = image.copy()
    frozen.flags.writeable = False
    for odd in (flipped, frozen, image.astype(">f4"), image.astype(">u2"), image.astype("f2")):
        assert torch.equal(processor(odd).pixel_values, expected)


def test_input_is_not_modified(image):
    single = torch.from_numpy(image.astype("f4"))
    before = single.clone()
    CHMv2ImageProcessor()([single, single.to(torch.float64)])
    assert torch.equal(single, before)


def test_data_format_by_name(image):
    narrow = image[:, :3]  # 20 x 3 x 3: channels could only be last
    square = image[:3, :3]
    processor = CHMv2ImageProcessor(return_tensors="np", do_pad=False)
    last = processor(square, input_data_format="channels_last").pixel_values
    first = processor(square.transpose(2, 0, 1), input_data_format="channels_first").pixel_values
    np.testing.assert_array_equal(last, first)
    assert processor(narrow).pixel_values.shape == (1, 3, 20, 3)


def test_ambiguous_channels_are_taken_as_first_and_logged(image, caplog):
    strip = image[:3]  # 3 x 36 x 3
    batch = CHMv2ImageProcessor(do_pad=False, return_tensors="np")(strip)
    assert batch.pixel_values.shape == (1, 3, 36, 3)
    assert "input_data_format" in caplog.text


def test_grey_float_becomes_rgb_of_equal_channels():
    """As published for float32, which normalises the one channel with all three means."""
    grey = published_input("grey")
    processor = CHMv2ImageProcessor(return_tensors="pt")
    expected = processor(grey, do_convert_rgb=True).pixel_values
    assert torch.equal(processor(grey.astype("f4")).pixel_values, expected)
    assert torch.equal(processor(grey).pixel_values, expected)


def test_float_rgba_is_laid_on_white():
    rgba = published_input("rgba").astype("f4") / 255
    expected = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    options = {"do_rescale": False, "do_normalize": False, "do_pad": False, "do_convert_rgb": True}
    (result,) = CHMv2ImageProcessor(**options)(rgba).pixel_values
    np.testing.assert_allclose(result.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_pil_palette_with_transparency():
    image_module = pytest.importorskip("PIL.Image")
    palette = image_module.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 0] + [0, 0, 0] * 255)
    options = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": True}
    (opaque,) = CHMv2ImageProcessor()(palette, **options).pixel_values
    assert opaque[:, 0, 0].tolist() == [255, 0, 0]
    palette.info["transparency"] = 0
    (clear,) = CHMv2ImageProcessor()(palette, **options).pixel_values
    assert clear[:, 0, 0].tolist() == [255, 255, 255]


def test_boolean_maps_are_classes_0_and_1(image):
    mask = image[..., 0] > 127
    labels = CHMv2ImageProcessor(do_pad=False, return_tensors="np")(image, mask).labels
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels[0], mask)


def test_works_where_pillow_and_torchvision_are_not_installed():
    code = """
import sys
sys.modules.update({"PIL": None, "PIL.Image": None, "torchvision": None, "transformers": None})
import numpy as np
from xchmv2.model import CHMv2ImageProcessor
batch = CHMv2ImageProcessor()(np.zeros((16, 16, 3), "u1"), do_resize=True, return_tensors="pt")
assert batch.pixel_values.shape == (1, 3, 384, 384)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.gpu
def test_device_gives_the_same(image):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    processor = CHMv2ImageProcessor(return_tensors="pt")
    there = processor(image, device="cuda").pixel_values
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), processor(image).pixel_values, rtol=0, atol=1e-5)
    resized = processor(image, device="cuda", do_resize=True, size=32).pixel_values.cpu()
    expected = processor(image, do_resize=True, size=32).pixel_values
    # uint8 kernels of the CPU round their weights: up to one grey level, 1 / 255 / 0.143
    torch.testing.assert_close(resized, expected, rtol=0, atol=0.0275)


# --- heights in the images' size -----------------------------------------------------------------


def test_post_processing_equals_published():
    outputs = SimpleNamespace(predicted_depth=torch.from_numpy(PUBLISHED["post/heights"]))
    expected = [PUBLISHED[f"post/resized/{number}"] for number in range(2)]
    sizes = [array.shape for array in expected]
    for target_sizes in (sizes, torch.tensor(sizes)):
        results = CHMv2ImageProcessor().post_process_depth_estimation(outputs, target_sizes)
        for result, array in zip(results, expected, strict=True):
            assert list(result) == ["predicted_depth"]
            np.testing.assert_allclose(result["predicted_depth"].numpy(), array, atol=1e-5)


def test_post_processing_holds_the_corners():
    heights = torch.rand(2, 9, 7)
    outputs = SimpleNamespace(predicted_depth=heights)
    results = CHMv2ImageProcessor().post_process_depth_estimation(outputs, [(20, 1), None])
    assert results[0]["predicted_depth"].shape == (20, 1)
    assert torch.equal(results[1]["predicted_depth"], heights[1])
    (first, _) = CHMv2ImageProcessor().post_process_depth_estimation(outputs, [(31, 40)] * 2)
    corners = first["predicted_depth"][[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, heights[0][[0, 0, -1, -1], [0, -1, 0, -1]])


def test_post_processing_without_sizes_changes_nothing():
    heights = torch.rand(2, 9, 7)
    results = CHMv2ImageProcessor().post_process_depth_estimation(
        SimpleNamespace(predicted_depth=heights)
    )
    assert all(torch.equal(r["predicted_depth"], h) for r, h in zip(results, heights, strict=True))


def test_post_processing_wants_one_size_per_image():
    outputs = SimpleNamespace(predicted_depth=torch.rand(2, 9, 7))
    with pytest.raises(ConfigError, match=r"expected 2 target sizes.*found 1; pass target_sizes"):
        CHMv2ImageProcessor().post_process_depth_estimation(outputs, [(9, 7)])


# --- the batch -----------------------------------------------------------------------------------


def test_return_tensors(image):
    processor = CHMv2ImageProcessor()
    assert isinstance(processor(image).pixel_values, list)
    assert isinstance(processor(image, return_tensors="pt").pixel_values, torch.Tensor)
    assert isinstance(processor(image, return_tensors="np").pixel_values, np.ndarray)


def test_batch_unpacks_into_arguments(image):
    def forward(pixel_values, labels=None):
        return pixel_values, labels

    batch = CHMv2ImageProcessor()(image, image[..., 0], return_tensors="pt")
    pixel_values, labels = forward(**batch)
    assert pixel_values is batch.pixel_values
    assert labels is batch["labels"]
    assert list(batch) == ["pixel_values", "labels"]


def test_batch_to(image):
    batch = CHMv2ImageProcessor()(image, image[..., 0], return_tensors="pt")
    assert batch.to("cpu", torch.float16) is batch
    assert batch.pixel_values.dtype == torch.float16
    assert batch.labels.dtype == torch.int64
    assert batch.to(torch.float64).pixel_values.dtype == torch.float64
    assert batch.to(dtype=torch.float32).pixel_values.dtype == torch.float32
    batch.to(torch.device("meta"))
    assert batch.pixel_values.is_meta
    assert batch.labels.is_meta


def test_batch_of_lists_to(image):
    batch = CHMv2ImageProcessor()([image, image[:7]]).to(torch.float16)
    assert [tensor.dtype for tensor in batch.pixel_values] == [torch.float16] * 2
    arrays = CHMv2ImageProcessor()(image, return_tensors="np").to("cpu")
    assert isinstance(arrays.pixel_values, np.ndarray)


def test_batch_refusals(image):
    batch = BatchFeature({"pixel_values": torch.zeros(1)})
    with pytest.raises(AttributeError, match="no entry or attribute 'pixels'"):
        _ = batch.pixels
    with pytest.raises(ConfigError, match=r"expected a device or a torch dtype, found 1.5; write"):
        batch.to(1.5)


def test_batch_can_be_copied_and_pickled():
    batch = BatchFeature({"pixel_values": torch.ones(2)})
    for other in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert torch.equal(other.pixel_values, batch.pixel_values)


# --- settings ------------------------------------------------------------------------------------


def test_published_defaults():
    processor = CHMv2ImageProcessor()
    stored = json.loads((REFERENCE / "preprocessor_config.json").read_text())
    del stored["image_processor_type"]
    for name, value in stored.items():
        ours = getattr(processor, name)
        assert ours == (tuple(value) if isinstance(value, list) else value)
    assert processor.do_center_crop is None
    assert processor.crop_size is None
    assert processor.do_reduce_labels is None


def test_settings_are_brought_to_one_form():
    processor = CHMv2ImageProcessor(
        size=64, crop_size=[32, 48], image_mean=[0, 0.5, 1], image_std=2, do_pad=None
    )
    assert processor.size == {"height": 64, "width": 64}
    assert processor.crop_size == {"height": 32, "width": 48}
    assert processor.image_mean == (0.0, 0.5, 1.0)
    assert processor.image_std == 2.0
    assert processor.do_pad is True


def test_a_call_does_not_change_the_processor(image):
    processor = CHMv2ImageProcessor()
    processor(image, do_pad=False, size=32, return_tensors="pt")
    assert processor == CHMv2ImageProcessor()


def test_none_switches_a_step_off(image):
    off = CHMv2ImageProcessor()(image, do_pad=None).pixel_values[0]
    assert off.shape == (3, 20, 36)


def test_assigned_settings_count_and_are_checked(image):
    processor = CHMv2ImageProcessor()
    processor.do_pad = False
    assert processor(image).pixel_values[0].shape == (3, 20, 36)
    processor.size_divisor = "16"
    with pytest.raises(ConfigError, match="size_divisor as a positive integer"):
        processor(image)


def test_arguments_without_effect_are_taken(image):
    options = {"disable_grouping": True, "default_to_square": True, "image_seq_length": 4}
    plain = CHMv2ImageProcessor()(image, return_tensors="pt")
    other = CHMv2ImageProcessor(**options)(image, return_tensors="pt", **options)
    assert torch.equal(plain.pixel_values, other.pixel_values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resized": True}, "settings named crop_size, .*found 'do_resized'; .*correct"),
        ({"pad_size": 64}, "settings named .*found 'pad_size'"),
        ({"do_resize": 1}, "do_resize as True or False, found 1; pass do_resize=True"),
        ({"resample": 4}, "resample as one of 0, 1, 2, 3, found 4; pass resample=3"),
        ({"resample": True}, "resample as one of 0, 1, 2, 3, found True"),
        ({"size": {"shortest_edge": 64}}, r"size as \{'height'.*found \{'shortest_edge': 64\}"),
        ({"size": (1, 2, 3)}, r"size as .*found \(1, 2, 3\)"),
        (
            {"size": 0},
            r"size as \{'height'.*one number, in whole pixels above 0, found 0; pass size=",
        ),
        ({"crop_size": "10"}, "crop_size as .*found '10'"),
        ({"size_divisor": 0}, "size_divisor as a positive integer, found 0; pass size_divisor=16"),
        ({"ensure_multiple_of": 1.5}, "ensure_multiple_of as a positive integer, found 1.5"),
        ({"rescale_factor": 0}, "rescale_factor as a positive number, found 0; pass .*=1 / 255"),
        ({"rescale_factor": "x"}, "rescale_factor as a positive number, found 'x'"),
        ({"image_std": (1, 0, 1)}, r"image_std as one positive number, or .*found \(1, 0, 1\)"),
        ({"image_mean": ()}, r"image_mean as one number, or one per channel, found \(\)"),
        ({"image_mean": "a"}, "image_mean as one number, or one per channel, found 'a'"),
        ({"image_mean": 10**400}, "image_mean as one number, or one per channel, found 1000"),
        ({"image_std": 1e-320}, "image_std as one positive number, or one per channel, found 1e-3"),
        ({"size_divisor": 10**30}, "size_divisor as a positive integer, found 1000"),
        ({"image_mean": (1, 2)}, r"values in image_mean as in image_std, found image_mean=\(1.0, "),
        ({"return_tensors": "tf"}, "return_tensors as one of 'pt', 'np', found 'tf'"),
        ({"input_data_format": "last"}, "input_data_format as one of 'channels_first', 'chan"),
        ({"data_format": "channels_last"}, "data_format as one of 'channels_first', found"),
    ],
)
def test_wrong_settings_are_refused(image, settings, message):
    with pytest.raises(ConfigError, match=message):
        CHMv2ImageProcessor(**settings)
    with pytest.raises(ConfigError, match=message):
        CHMv2ImageProcessor()(image, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_center_crop": True}, "a value for crop_size with do_center_crop=True, found None"),
        ({"image_mean": None}, "a value for image_mean with do_normalize=True.*do_normalize=False"),
        ({"size_divisor": None}, "a value for size_divisor with do_pad=True"),
        ({"do_resize": True, "size": None}, "a value for size with do_resize=True"),
        ({"rescale_factor": None}, "a value for rescale_factor with do_rescale=True"),
    ],
)
def test_a_step_without_its_setting_is_refused(image, settings, message):
    with pytest.raises(ConfigError, match=message):
        CHMv2ImageProcessor()(image, **settings)


@pytest.mark.parametrize("device", ["warp", "xpu:7"])
def test_unknown_device(image, device):
    with pytest.raises(DeviceError, match=f"a device of this machine, found '{device}'; pass"):
        CHMv2ImageProcessor()(image, device=device)


# --- images that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        ([], {}, "at least one image, found none"),
        (np.zeros((0, 3, 8, 8)), {}, "at least one image, found none"),
        ("image.tif", {}, r"PIL images, numpy arrays or torch.*found str; open .*PIL.Image.open"),
        ([[1, 2], [3, 4]], {}, "PIL images, numpy arrays.*found int"),
        (np.zeros((8, 9)), {}, r"arrays of 3 dim.*4 for a batch, found shape \(8, 9\); .*image\["),
        (np.zeros((8, 9, 5)), {}, r"1, 3 or 4 channels .*found shape \(8, 9, 5\); select"),
        (np.zeros((8, 0, 3)), {}, r"an image with pixels, found shape \(3, 8, 0\)"),
        (np.zeros((8, 9, 3), complex), {}, "pixels of a real number type, found complex128"),
        (torch.zeros((3, 8, 9), dtype=torch.complex64), {}, "found torch.complex64; convert"),
        (np.full((8, 9, 3), "a"), {}, "pixels of a real number type, found <U1"),
        (np.zeros((8, 9, 4)), {}, "3 channels, one for each mean.*found 4 channels .*convert_rgb"),
        (
            np.zeros((3, 8, 9)),
            {"input_data_format": "channels_last"},
            "found 9 channels in an image of 3 x 8 px; .*input_data_format",
        ),
        (
            np.full((8, 9, 4), 2.0),
            {"do_convert_rgb": True},
            "or float between 0 and 1, found torch.float64 from 2 to 2",
        ),
        (
            np.zeros((8, 9, 4), "i4"),
            {"do_convert_rgb": True},
            "as uint8, 16-bit integers, or float .*found torch.int32",
        ),
        (
            np.zeros((5, 8, 9)),
            {"do_convert_rgb": True, "input_data_format": "channels_first"},
            "1, 3 or 4 channels to make RGB of, found 5",
        ),
        (
            np.zeros((8, 90, 3)),
            {"do_resize": True, "size": 16},
            "resizes 8 x 90 px to at least 16 px a side, found 0 x 16 px from size 16 x 16",
        ),
        (
            [np.zeros((8, 9, 3)), np.zeros((40, 9, 3))],
            {"return_tensors": "pt"},
            r"one size after processing.*found sizes \(3, 16, 16\), \(3, 48, 16\); pass",
        ),
    ],
)
def test_wrong_images_are_refused(images, settings, message):
    with pytest.raises(ImageryError, match=message):
        CHMv2ImageProcessor()(images, **settings)


def test_wrong_maps_are_refused(image):
    processor = CHMv2ImageProcessor()
    with pytest.raises(ImageryError, match="one segmentation map for each image, found 2 for 1"):
        processor(image, [image[..., 0]] * 2)
    image_module = pytest.importorskip("PIL.Image")
    with pytest.raises(ImageryError, match=r"of shape \(height, width\), found 3 channels"):
        processor(image, image_module.fromarray(image))


def test_lanczos_missing_from_torch_is_explained(image, monkeypatch):
    def interpolate(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    with pytest.raises(ConfigError, match=r"found resample=1 \(Lanczos\), torch .*resample=3"):
        CHMv2ImageProcessor()(image, do_resize=True, resample=1)
    with pytest.raises(NotImplementedError):
        CHMv2ImageProcessor()(image, do_resize=True)


# --- preprocessor_config.json --------------------------------------------------------------------


def test_file_equals_that_of_transformers(tmp_path):
    (path,) = CHMv2ImageProcessor().save_pretrained(tmp_path / "new" / "folder")
    expected = (REFERENCE / "preprocessor_config.json").read_bytes()
    assert Path(path).read_bytes() == expected
    assert [p.name for p in Path(path).parent.iterdir()] == ["preprocessor_config.json"]


@pytest.mark.parametrize("source", [REFERENCE, REFERENCE / "preprocessor_config.json"])
def test_reads_the_file_of_transformers(source):
    assert CHMv2ImageProcessor.from_pretrained(source) == CHMv2ImageProcessor()
    assert CHMv2ImageProcessor.from_pretrained(str(source)) == CHMv2ImageProcessor()


def test_file_round_trip(tmp_path):
    processor = CHMv2ImageProcessor(
        do_convert_rgb=True,
        do_resize=True,
        size=(32, 64),
        do_center_crop=True,
        crop_size=16,
        image_mean=0.5,
        do_pad=False,
        device="cpu",
        return_tensors="pt",
    )
    processor.save_pretrained(tmp_path)
    assert CHMv2ImageProcessor.from_pretrained(tmp_path) == processor
    changed = CHMv2ImageProcessor.from_pretrained(tmp_path, do_pad=True)
    assert changed.do_pad is True
    assert changed.size == processor.size


def test_published_checkpoint_file_with_entries_that_are_no_settings(tmp_path):
    stored = {
        "image_processor_type": "CHMv2ImageProcessorFast",
        "data_format": "channels_first",
        "crop_size": None,
        "processor_class": None,
        "image_mean": [0.4, 0.4, 0.3],
        "pad_size": None,
        "invented_in_2031": {"a": 1},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    processor = CHMv2ImageProcessor.from_pretrained(tmp_path)
    assert processor == CHMv2ImageProcessor(image_mean=(0.4, 0.4, 0.3))


@pytest.mark.parametrize("name", ["do_normalize", "do_rescale", "do_pad", "keep_aspect_ratio"])
def test_a_switch_that_is_null_in_the_file_is_off(tmp_path, image, name):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({name: None}))
    processor = CHMv2ImageProcessor.from_pretrained(tmp_path)
    assert processor == CHMv2ImageProcessor(**{name: False})
    pixels = processor(image, return_tensors="pt").pixel_values
    expected = CHMv2ImageProcessor()(image, return_tensors="pt", **{name: None}).pixel_values
    assert torch.equal(pixels, expected)
    assert getattr(CHMv2ImageProcessor.from_pretrained(tmp_path, **{name: True}), name) is True


def test_another_setting_that_is_null_in_the_file_has_its_default(tmp_path):
    names = ("image_mean", "image_std", "rescale_factor", "size", "crop_size", "do_center_crop")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict.fromkeys(names)))
    assert CHMv2ImageProcessor.from_pretrained(tmp_path) == CHMv2ImageProcessor()


def test_a_wrong_value_names_the_file_or_the_argument(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": "x", "device": "warp"}')
    for name in ("size as", "a device of this machine"):
        given = {"size": 32} if name.startswith("a device") else {"device": "cpu"}
        message = rf"{name}.*' in {tmp_path}/pre.*; correct preprocessor_config.json, or download"
        with pytest.raises(CHMv2Error, match=message):
            CHMv2ImageProcessor.from_pretrained(tmp_path, **given)
    good = CHMv2ImageProcessor.from_pretrained(tmp_path, size=32, device="cpu")
    assert good.size == {"height": 32, "width": 32}
    with pytest.raises(ConfigError, match=r"found 'y'; pass size=\{'height'"):
        CHMv2ImageProcessor.from_pretrained(tmp_path, size="y", device="cpu")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (path,) = CHMv2ImageProcessor(size=32).save_pretrained(tmp_path)
    before = Path(path).read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        CHMv2ImageProcessor().save_pretrained(tmp_path)
    assert Path(path).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["preprocessor_config.json"]


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"found FileNotFoundError.*; .*save_pretrained"):
        CHMv2ImageProcessor.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"JSON in .*fetch or write the file again"):
        CHMv2ImageProcessor.from_pretrained(tmp_path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"a JSON object in .*found list"):
        CHMv2ImageProcessor.from_pretrained(tmp_path)
    path.write_text('{"do_resize": "yes"}')
    with pytest.raises(ConfigError, match="do_resize as True or False, found 'yes'"):
        CHMv2ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no-such-folder", "./no/folder", "~/model", "/no/model", "a/b/c"])
def test_missing_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(CheckpointError, match=f"hub id 'owner/name', found '{name}', which does"):
        CHMv2ImageProcessor.from_pretrained(name)
    with pytest.raises(CheckpointError, match="which does not exist here"):
        CHMv2ImageProcessor.from_pretrained(Path("some/folder"))


def test_unknown_argument_of_from_pretrained():
    with pytest.raises(ConfigError, match="found 'use_fats'"):
        CHMv2ImageProcessor.from_pretrained(REFERENCE, use_fats=True)


def test_hub_options(monkeypatch, tmp_path):
    CHMv2ImageProcessor(size=32).save_pretrained(tmp_path / "sub")
    asked = {}

    def download(repo_id, **options):
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"token": False, "cache_dir": tmp_path, "local_files_only": True}
    found = CHMv2ImageProcessor.from_pretrained("a/b", subfolder="sub", do_pad=False, **options)
    assert found == CHMv2ImageProcessor(size=32, do_pad=False)
    assert asked == options | {"revision": None, "allow_patterns": ["sub/preprocessor_config.json"]}
    assert CHMv2ImageProcessor.from_pretrained(tmp_path, subfolder="sub").size["width"] == 32


def test_hub(monkeypatch):
    calls = []

    def download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, allow_patterns, revision))
        return str(REFERENCE)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert CHMv2ImageProcessor.from_pretrained("a/b", revision="v1") == CHMv2ImageProcessor()
    assert calls == [("a/b", ["preprocessor_config.json"], "v1")]


@pytest.mark.parametrize("name", ["LocalEntryNotFoundError", "OfflineModeIsEnabled", "OSError"])
def test_no_network(monkeypatch, name):
    import huggingface_hub.errors

    error = getattr(huggingface_hub.errors, name, OSError)

    def download(*args, **kwargs):
        raise error("cannot reach the hub\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = (
        rf"found no folder .*{name} there: cannot reach the hub; .*gated.*model's page.*hf auth "
        r"login.*hf download a/b --local-dir.*pass its path"
    )
    with pytest.raises(CheckpointError, match=message):
        CHMv2ImageProcessor.from_pretrained("a/b")


def test_gated(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    class Gated(GatedRepoError):
        def __init__(self):
            Exception.__init__(self, "access is restricted")

        def __str__(self):
            return "access is restricted"

    def download(*args, **kwargs):
        raise Gated

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"access is restricted; .*accept the licence"):
        CHMv2ImageProcessor.from_pretrained("a/b")
