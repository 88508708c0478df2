"""Scores against known truth, and the training of the demonstration model."""
