"""CHMv2 in plain PyTorch: configuration, image processor, model.

Names are imported when they are first used, so that those of files can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xchmv2.model.checkpoint import (
        INDEX_NAME,
        WEIGHTS_NAME,
        Checkpoint,
        json_sha256,
        resolve_checkpoint,
        state_dict_sha256,
    )
    from xchmv2.model.config import CHMv2Config, DINOv3ViTConfig
    from xchmv2.model.files import (
        CONFIG_NAME,
        DEMO,
        DEMO_FOLDER,
        IMAGE_MEAN,
        IMAGE_STD,
        MODEL,
        OVERLAP,
        PREPROCESSOR_NAME,
        TILE,
        find_folder,
        read_json,
    )
    from xchmv2.model.height import validate_spread
    from xchmv2.model.image_processor import CHMv2ImageProcessor
    from xchmv2.model.loss import (
        Curriculum,
        charbonnier,
        chmv2_loss,
        patch_gradient,
        silog,
    )
    from xchmv2.model.modeling import CHMv2ForDepthEstimation, DepthEstimatorOutput, convert_weights

__all__ = [
    "CONFIG_NAME",
    "DEMO",
    "DEMO_FOLDER",
    "IMAGE_MEAN",
    "IMAGE_STD",
    "INDEX_NAME",
    "MODEL",
    "OVERLAP",
    "PREPROCESSOR_NAME",
    "TILE",
    "WEIGHTS_NAME",
    "CHMv2Config",
    "CHMv2ForDepthEstimation",
    "CHMv2ImageProcessor",
    "Checkpoint",
    "Curriculum",
    "DINOv3ViTConfig",
    "DepthEstimatorOutput",
    "charbonnier",
    "chmv2_loss",
    "convert_weights",
    "find_folder",
    "json_sha256",
    "patch_gradient",
    "read_json",
    "resolve_checkpoint",
    "silog",
    "state_dict_sha256",
    "validate_spread",
]

_FILES = {
    "checkpoint": (
        *("Checkpoint", "INDEX_NAME", "WEIGHTS_NAME"),
        *("json_sha256", "resolve_checkpoint", "state_dict_sha256"),
    ),
    "config": ("CHMv2Config", "DINOv3ViTConfig"),
    "files": (
        *("CONFIG_NAME", "DEMO", "DEMO_FOLDER", "IMAGE_MEAN", "IMAGE_STD", "MODEL"),
        *("OVERLAP", "PREPROCESSOR_NAME", "TILE", "find_folder", "read_json"),
    ),
    "height": ("validate_spread",),
    "image_processor": ("CHMv2ImageProcessor",),
    "loss": ("Curriculum", "charbonnier", "chmv2_loss", "patch_gradient", "silog"),
    "modeling": ("CHMv2ForDepthEstimation", "DepthEstimatorOutput", "convert_weights"),
}
_MODULES = {name: f"{__name__}.{file}" for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
