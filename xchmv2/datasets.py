"""Synthetic forests with known truth, for examples, tests and teaching."""

from xchmv2.demo.disturbance import Disturbance
from xchmv2.demo.synthetic import synthetic_forest

__all__ = ["Disturbance", "synthetic_forest"]
