"""The demonstration: synthetic forest with known truth, a small model, and their run."""

__all__ = []
