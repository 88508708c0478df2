"""The exceptions and warnings: each message says what was expected and found, and the fix."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module

__all__ = [
    "CHMv2Error",
    "CheckpointError",
    "ConfigError",
    "DemoModelWarning",
    "DeviceError",
    "GridError",
    "ImageryError",
    "IncompleteStoreWarning",
    "StoreError",
]


class CHMv2Error(ValueError):
    """Input or state that xchmv2 cannot use.

    Parameters
    ----------
    expected : str
        What was expected, without the leading word "expected"; without `found`, a plain sentence.
    found : str, optional
        What was found instead: names, sizes, dims.
    fix : str
        The call or step that corrects it.

    Examples
    --------
    >>> str(CHMv2Error("a tile of a multiple of 32 px", "450", "pass tile=448"))
    'expected a tile of a multiple of 32 px, found 450; pass tile=448'
    >>> str(CHMv2Error("the heights do not vary", fix="pass sigma=4.0"))
    'the heights do not vary; pass sigma=4.0'
    """

    def __init__(self, expected: str, found: str | None = None, fix: str = "") -> None:
        # All three stay in ``args``, so that the error survives pickling from a dask worker.
        super().__init__(expected, found, fix)
        self.expected = expected
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.expected}; {self.fix}"
        return f"expected {self.expected}, found {self.found}; {self.fix}"


_PACKAGE = os.path.dirname(__file__) + os.sep


def require_library(name: str, purpose: str, extra: str) -> None:
    """Check that an optional library is installed, and name the extra that brings it."""
    try:
        import_module(name)
    except ImportError:
        raise CHMv2Error(
            f"{name}, which {purpose}, is not installed", fix=f'pip install "xchmv2[{extra}]"'
        ) from None


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the package, however deep in it the reason was found."""
    depth, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)


class DemoModelWarning(UserWarning):
    """The demonstration model is in use; its heights are valid in synthetic forest only."""


class ConfigError(CHMv2Error):
    """A setting of the model or the image processor that CHMv2 does not define."""


class CheckpointError(CHMv2Error):
    """Weights that cannot be found, are damaged, or do not fit the model."""


class ImageryError(CHMv2Error):
    """Imagery whose bands, values, dimensions or ground sampling distance do not fit the model."""


class GridError(CHMv2Error):
    """A tile, overlap or block size that cannot form a tile grid."""


class DeviceError(CHMv2Error):
    """A device or data type that is not available on this machine."""


class StoreError(CHMv2Error):
    """A store that cannot be written or read, or does not match the data to be added to it."""


class IncompleteStoreWarning(UserWarning):
    """A store in which regions have not been written yet; they read as missing data."""
