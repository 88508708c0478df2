"""The image processor: from pictures to the network's input, and from its output to heights."""

from __future__ import annotations

from xchmv2.model.processor.batch import BatchFeature
from xchmv2.model.processor.image_processor import CHMv2ImageProcessor

__all__ = ["BatchFeature", "CHMv2ImageProcessor"]
