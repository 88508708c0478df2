"""CHMv2 in plain PyTorch: configuration, image processor, model.

Names are imported when they are first used, so that those of files can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xchmv2.model.config import CHMv2Config, DINOv3ViTConfig
    from xchmv2.model.image_processor import CHMv2ImageProcessor
    from xchmv2.model.modeling import CHMv2ForDepthEstimation, DepthEstimatorOutput

__all__ = [
    "CHMv2Config",
    "CHMv2ForDepthEstimation",
    "CHMv2ImageProcessor",
    "DINOv3ViTConfig",
    "DepthEstimatorOutput",
]

_FILES = {
    "CHMv2Config": "config",
    "CHMv2ForDepthEstimation": "modeling",
    "CHMv2ImageProcessor": "image_processor",
    "DINOv3ViTConfig": "config",
    "DepthEstimatorOutput": "modeling",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
