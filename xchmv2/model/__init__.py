"""CHMv2 in plain PyTorch: configuration, image processor, model.

Names are imported when they are first used, so that those of checkpoints can be read without torch.
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
    from xchmv2.model.loss import Curriculum, chmv2_loss
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
    "chmv2_loss",
    "convert_weights",
    "find_folder",
    "json_sha256",
    "read_json",
    "resolve_checkpoint",
    "state_dict_sha256",
    "validate_spread",
]

_MODULES = {
    "CHMv2Config": "xchmv2.model.config",
    "CHMv2ForDepthEstimation": "xchmv2.model.modeling",
    "CHMv2ImageProcessor": "xchmv2.model.image_processor",
    "CONFIG_NAME": "xchmv2.model.files",
    "Checkpoint": "xchmv2.model.checkpoint",
    "Curriculum": "xchmv2.model.loss",
    "DEMO": "xchmv2.model.files",
    "DEMO_FOLDER": "xchmv2.model.files",
    "DINOv3ViTConfig": "xchmv2.model.config",
    "DepthEstimatorOutput": "xchmv2.model.modeling",
    "IMAGE_MEAN": "xchmv2.model.files",
    "IMAGE_STD": "xchmv2.model.files",
    "INDEX_NAME": "xchmv2.model.checkpoint",
    "MODEL": "xchmv2.model.files",
    "OVERLAP": "xchmv2.model.files",
    "PREPROCESSOR_NAME": "xchmv2.model.files",
    "TILE": "xchmv2.model.files",
    "WEIGHTS_NAME": "xchmv2.model.checkpoint",
    "chmv2_loss": "xchmv2.model.loss",
    "convert_weights": "xchmv2.model.modeling",
    "find_folder": "xchmv2.model.files",
    "json_sha256": "xchmv2.model.checkpoint",
    "read_json": "xchmv2.model.files",
    "resolve_checkpoint": "xchmv2.model.checkpoint",
    "state_dict_sha256": "xchmv2.model.checkpoint",
    "validate_spread": "xchmv2.model.height",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
