"""CHMv2 in plain PyTorch: configuration, image processor, model."""

from xchmv2.model.config import CHMv2Config, DINOv3ViTConfig
from xchmv2.model.modeling import CHMv2ForDepthEstimation
from xchmv2.model.output import DepthEstimatorOutput
from xchmv2.model.processor import CHMv2ImageProcessor

__all__ = [
    "CHMv2Config",
    "CHMv2ForDepthEstimation",
    "CHMv2ImageProcessor",
    "DINOv3ViTConfig",
    "DepthEstimatorOutput",
]
