"""Forests with known truth: the public face of what the demonstration is made of."""

from xchmv2.demo.disturbance import Disturbance
from xchmv2.demo.synthetic import synthetic_forest

__all__ = ["Disturbance", "synthetic_forest"]
