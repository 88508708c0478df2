"""Canopy height from high-resolution imagery with CHMv2, inside xarray and dask.

Importing the package registers the ``.chmv2`` accessor; it does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import xchmv2.accessor  # noqa: F401  (registers .chmv2)
from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error

if TYPE_CHECKING:
    from xchmv2 import (
        change,
        datasets,
        errors,
        imagery,
        model,
        plotting,
        predict,
        published,
        stac,
        store,
        structure,
        training,
        validation,
        zonal,
    )
    from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation, CHMv2ImageProcessor
    from xchmv2.predict.warming import warmup
    from xchmv2.published import open_published
    from xchmv2.stac import load
    from xchmv2.store import open_zarr, verify

__all__ = [
    "CHMv2Config",
    "CHMv2Error",
    "CHMv2ForDepthEstimation",
    "CHMv2ImageProcessor",
    "__version__",
    "change",
    "datasets",
    "errors",
    "imagery",
    "load",
    "model",
    "open_published",
    "open_zarr",
    "plotting",
    "predict",
    "published",
    "stac",
    "store",
    "structure",
    "training",
    "validation",
    "verify",
    "warmup",
    "zonal",
]

# Names that need more than xarray, and the modules they are in: imported when first used. All
# others of __all__ are modules.
_LAZY = {
    "CHMv2Config": "xchmv2.model",
    "CHMv2ForDepthEstimation": "xchmv2.model",
    "CHMv2ImageProcessor": "xchmv2.model",
    "load": "xchmv2.stac",
    "open_published": "xchmv2.published",
    "open_zarr": "xchmv2.store",
    "verify": "xchmv2.store",
    "warmup": "xchmv2.predict.warming",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
