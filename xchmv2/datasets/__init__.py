"""Forests with known truth, for trying the software, for tests, and for training the demo model."""

from xchmv2.datasets.events import Disturbance
from xchmv2.datasets.synthetic import synthetic_forest

__all__ = ["Disturbance", "synthetic_forest"]
