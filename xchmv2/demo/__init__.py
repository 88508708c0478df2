"""The demonstration: synthetic forests with known truth, a small model, and ``xchmv2 demo``."""

__all__ = []
