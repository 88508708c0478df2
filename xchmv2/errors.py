"""The exception family: every message says what was expected, what came, and how to fix it."""

from __future__ import annotations

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
    """Input or state that xchmv2 cannot work with.

    Parameters
    ----------
    expected : str
        What was expected, without the leading word "expected".
    found : str
        What came instead: names, sizes, dims.
    fix : str
        The call or step that puts it right.

    Examples
    --------
    >>> str(CHMv2Error("a tile of a multiple of 32 px", "450", "pass tile=448"))
    'expected a tile of a multiple of 32 px, found 450; pass tile=448'
    """

    def __init__(self, expected: str, found: str, fix: str) -> None:
        # All three stay in ``args``, so that the error survives pickling from a dask worker.
        super().__init__(expected, found, fix)
        self.expected = expected
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        return f"expected {self.expected}, found {self.found}; {self.fix}"


class DemoModelWarning(UserWarning):
    """The demonstration model is in use: its heights mean nothing outside synthetic forest."""


class ConfigError(CHMv2Error):
    """A model or processor setting that is outside what CHMv2 defines."""


class CheckpointError(CHMv2Error):
    """Weights that cannot be found, are damaged, or do not fit the model."""


class ImageryError(CHMv2Error):
    """Imagery whose bands, values, dimensions or ground resolution do not fit the model."""


class GridError(CHMv2Error):
    """A tile, overlap or block size that no tile grid can be made from."""


class DeviceError(CHMv2Error):
    """A device or data type that this machine does not offer."""


class StoreError(CHMv2Error):
    """A store that cannot be written or read, or does not hold what is to be added to it."""


class IncompleteStoreWarning(UserWarning):
    """A store in which regions are still missing; they read as missing data."""
