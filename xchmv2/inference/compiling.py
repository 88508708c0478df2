"""torch.compile for one network and few shapes, and the plain network where it does not work."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class CompiledFeatures:
    """Pixels to features, compiled once for each shape that comes.

    Parameters
    ----------
    features : callable
        From pixels [B, 3, H, W] to features.

    Notes
    -----
    The first call of each shape takes a minute or more, which is logged. Where there is no
    compiler, or it fails, one warning is given and the plain function serves from then on.
    """

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self._plain = features
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._failed = False
        self._shapes: set[tuple[int, ...]] = set()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the features; callers take turns."""
        if self._failed:
            return self._plain(pixels)
        if tuple(pixels.shape) not in self._shapes:
            return self._first(pixels)
        return self._compile()(pixels)

    def _compile(self) -> Callable[[Tensor], Tensor]:
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, dynamic=False)
        return self._compiled

    def _first(self, pixels: Tensor) -> Tensor:
        """Compile for a shape, and fall back for good if that fails."""
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # Such as that tables of positions are traced: they are constant for a shape.
                warnings.simplefilter("ignore")
                found = self._compile()(pixels)
        except torch.OutOfMemoryError:
            raise  # smaller batches cure it
        except Exception as error:  # a compiler's, a driver's: there is no family of them
            self._failed = True
            reason = next(iter(str(error).splitlines()), "")
            warnings.warn(
                f"torch.compile failed on {pixels.device} ({type(error).__name__}: {reason}); "
                "the network runs uncompiled. Leave compile=True out, or install a compiler.",
                stacklevel=2,
            )
            return self._plain(pixels)
        self._shapes.add(tuple(pixels.shape))
        seconds = time.perf_counter() - start
        _log.info("compiled for %s in %.0f s", list(pixels.shape), seconds)
        return found
