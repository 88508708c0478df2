"""Training on local reference heights: fine-tuning, bias correction and the loss of CHMv2."""

from xchmv2.model.loss import Curriculum, charbonnier, chmv2_loss, patch_gradient, silog
from xchmv2.training.calibration import Calibration, calibrate
from xchmv2.training.tuning import FineTuned, fine_tune

__all__ = [
    "Calibration",
    "Curriculum",
    "FineTuned",
    "calibrate",
    "charbonnier",
    "chmv2_loss",
    "fine_tune",
    "patch_gradient",
    "silog",
]
