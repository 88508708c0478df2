"""Write processor.npz and preprocessor_config.json with the processor published in transformers.

Run in an environment of its own, made once:

    python -m venv reference-env && . reference-env/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 pillow numpy
    pip install --no-deps torchvision==0.28.0
    python tests/reference_data/make_processor_reference.py

processor.npz holds everything a test needs: the input arrays, the outputs, and under "cases" a JSON
text that says which inputs went through which settings.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

# The torchvision wheel for torch 2.13 is built for CUDA, and its compiled operators do not load
# beside torch for the CPU. What the processor uses of torchvision is Python on top of torch; only
# the import fails, because it adds fake kernels to the two operators declared here. They are never
# called.
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import CHMv2ImageProcessor  # noqa: E402

FOLDER = Path(__file__).parent
SEED = 20260311


def make_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)

    def smooth(height: int, width: int, channels: int) -> np.ndarray:
        # Waves, noise, and saturated corners where bicubic filters overshoot.
        y, x = np.mgrid[:height, :width, :1][:2]  # [height, width, 1] each
        wave = np.sin(y / 5 + np.arange(channels)) * np.cos(x / 4 - np.arange(channels))
        values = 127 + 90 * wave + rng.normal(0, 25, (height, width, channels))
        values[: height // 4, : width // 4] = 255
        values[-height // 4 :, -width // 4 :] = 0
        return values.clip(0, 255)

    labels = rng.integers(0, 6, (25, 37))
    labels[:6, :6], labels[-6:, -6:] = 0, 255
    return {
        "uint8": smooth(25, 37, 3).astype(np.uint8),
        "uint8_tall": smooth(33, 10, 3).astype(np.uint8),
        "uint8_fits": smooth(16, 32, 3).astype(np.uint8),
        "float_chw": smooth(14, 18, 3).transpose(2, 0, 1).astype(np.float32),
        "float_unit": (smooth(14, 18, 3) / 255).astype(np.float32),
        "double": smooth(17, 15, 3),
        "int16": (smooth(14, 18, 3) * 100).astype(np.int16),
        "grey": smooth(14, 18, 1).astype(np.uint8),
        "rgba": smooth(14, 18, 4).astype(np.uint8),
        "labels_uint8": labels.astype(np.uint8),
        "labels_int64": rng.integers(0, 6, (33, 10)),
    }


RESIZE = {"do_resize": True, "size": {"height": 48, "width": 48}}

# images, maps: input names. pil: the mode in which images go in as PIL images instead of arrays.
CASES: dict[str, dict] = {
    "default": {"images": ["uint8_tall"]},
    "different_sizes": {"images": ["uint8", "uint8_fits"]},
    "stacked": {"images": ["uint8_fits", "uint8_fits"], "settings": {"return_tensors": "pt"}},
    "float_0_255_chw": {"images": ["float_chw"]},
    "float_0_1": {"images": ["float_unit"], "settings": {"do_rescale": False}},
    "double_rescale_only": {"images": ["double"], "settings": {"do_normalize": False}},
    "uint8_rescale_only": {"images": ["uint8"], "settings": {"do_normalize": False}},
    "pad_only": {
        "images": ["uint8"],
        "settings": {"do_normalize": False, "do_rescale": False},
    },
    "no_pad": {"images": ["uint8_tall"], "settings": {"do_pad": False}},
    "divisor_14": {"images": ["uint8_tall"], "settings": {"size_divisor": 14}},
    "one_mean": {"images": ["uint8"], "settings": {"image_mean": 0.5, "image_std": 0.25}},
    "other_factor": {"images": ["int16"], "settings": {"rescale_factor": 1 / 25500}},
    "resize": {"images": ["uint8", "uint8_tall"], "settings": RESIZE},
    "resize_free_aspect": {
        "images": ["uint8"],
        "settings": {**RESIZE, "keep_aspect_ratio": False, "size": {"height": 18, "width": 50}},
    },
    "resize_any_multiple": {
        "images": ["uint8"],
        "settings": {**RESIZE, "ensure_multiple_of": 1, "size": {"height": 21, "width": 23}},
    },
    "resize_half_to_even": {
        "images": ["uint8"],
        "settings": {**RESIZE, "keep_aspect_ratio": False, "size": {"height": 40, "width": 24}},
    },
    "resize_float": {"images": ["float_unit"], "settings": {**RESIZE, "do_rescale": False}},
    "resize_raw": {
        "images": ["uint8"],
        "settings": {**RESIZE, "do_normalize": False, "do_rescale": False},
    },
    "resize_int16": {
        "images": ["int16"],
        "settings": {**RESIZE, "do_normalize": False, "do_rescale": False},
    },
    "resize_nearest": {"images": ["uint8_tall"], "settings": {**RESIZE, "resample": 0}},
    "resize_lanczos": {"images": ["uint8_tall"], "settings": {**RESIZE, "resample": 1}},
    "resize_bilinear": {"images": ["uint8"], "settings": {**RESIZE, "resample": 2}},
    "crop": {"images": ["uint8"], "settings": {"do_center_crop": True, "crop_size": 19}},
    "crop_larger": {
        "images": ["uint8"],
        "settings": {"do_center_crop": True, "crop_size": (31, 22), "do_pad": False},
    },
    "grey_to_rgb": {"images": ["grey"], "settings": {"do_convert_rgb": True}},
    "rgba_to_rgb": {"images": ["rgba"], "settings": {"do_convert_rgb": True}},
    "pil_rgb": {"images": ["uint8"], "pil": "RGB"},
    "pil_rgba_to_rgb": {"images": ["rgba"], "pil": "RGBA", "settings": {"do_convert_rgb": True}},
    "pil_grey_to_rgb": {"images": ["grey"], "pil": "L", "settings": {"do_convert_rgb": True}},
    "maps": {"images": ["uint8"], "maps": ["labels_uint8"]},
    "maps_reduced": {
        "images": ["uint8", "uint8_tall"],
        "maps": ["labels_uint8", "labels_int64"],
        "settings": {"do_reduce_labels": True},
    },
    "maps_resized": {
        "images": ["uint8", "uint8_tall"],
        "maps": ["labels_uint8", "labels_int64"],
        "settings": {**RESIZE, "do_reduce_labels": True},
    },
    "maps_nearest": {
        "images": ["uint8_tall"],
        "maps": ["labels_int64"],
        "settings": {**RESIZE, "resample": 0},
    },
}


def run_case(inputs: dict[str, np.ndarray], case: dict) -> dict[str, np.ndarray]:
    images = [inputs[name] for name in case["images"]]
    if "pil" in case:
        images = [Image.fromarray(image.squeeze()) for image in images]
        assert all(image.mode == case["pil"] for image in images)
    maps = [inputs[name] for name in case["maps"]] if "maps" in case else None
    batch = CHMv2ImageProcessor()(images, maps, **case.get("settings", {}))
    if maps is not None:  # other cases hold such pixel values already
        del batch["pixel_values"]
    return {
        f"{field}/{number}": np.asarray(array)
        for field, arrays in batch.items()
        for number, array in enumerate(arrays)
    }


def run_post_processing(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heights = inputs["float_chw"][:2] / 5
    outputs = SimpleNamespace(predicted_depth=torch.from_numpy(heights))
    sizes = [(23, 31), (11, 8)]
    results = CHMv2ImageProcessor().post_process_depth_estimation(outputs, target_sizes=sizes)
    return {
        "heights": heights,
        **{f"resized/{n}": result["predicted_depth"].numpy() for n, result in enumerate(results)},
    }


def write_config() -> None:
    with tempfile.TemporaryDirectory() as folder:
        CHMv2ImageProcessor().save_pretrained(folder)
        shutil.copy(Path(folder) / "preprocessor_config.json", FOLDER)


def main() -> None:
    inputs = make_inputs()
    arrays = {f"inputs/{name}": array for name, array in inputs.items()}
    for name, case in CASES.items():
        arrays |= {f"{name}/{key}": array for key, array in run_case(inputs, case).items()}
    arrays |= {f"post/{key}": array for key, array in run_post_processing(inputs).items()}
    np.savez_compressed(FOLDER / "processor.npz", cases=np.array(json.dumps(CASES)), **arrays)
    write_config()


if __name__ == "__main__":
    main()
