"""Dask clusters: the model in every worker before the work begins, forwards where the GPUs are."""

from xchmv2.cluster.warming import warmup

__all__ = ["warmup"]
