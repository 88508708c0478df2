"""Standard errors of the heights of two dates, and of their difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.heights import Raster, name_contents, on_same_grid, read_heights, require_plane

#: Layer of :func:`xchmv2.predict.predict` that tells the error of each pixel.
BIN_SPREAD = "bin_spread"

Sigma = float | xr.DataArray | str | Sequence[float | xr.DataArray] | None


def read_sigmas(
    sigma: Any, before: Raster, after: Raster, like: xr.DataArray
) -> tuple[xr.DataArray | float, xr.DataArray | float]:
    """Return the errors of the two dates."""
    if isinstance(sigma, str):
        if sigma != BIN_SPREAD:
            raise CHMv2Error(
                f"sigma as a number, a DataArray or {BIN_SPREAD!r}", repr(sigma), "pass sigma=4.0"
            )
        return _one_sigma(_spread_of(before), like), _one_sigma(_spread_of(after), like)
    if isinstance(sigma, Sequence):
        if len(sigma) != 2:
            raise CHMv2Error(
                "one sigma, or one for each date", f"{len(sigma)}", "pass sigma=(4.0, 5.0)"
            )
        return _one_sigma(sigma[0], like), _one_sigma(sigma[1], like)
    both = _one_sigma(sigma, like)
    return both, both


def _spread_of(height: Raster) -> xr.DataArray:
    if isinstance(height, xr.Dataset) and BIN_SPREAD in height.data_vars:
        return height[BIN_SPREAD]
    raise CHMv2Error(
        f"a Dataset with {BIN_SPREAD!r}",
        name_contents(height),
        f"predict it: .chmv2.predict(layers=('height', {BIN_SPREAD!r}))",
    )


def _one_sigma(sigma: Any, like: xr.DataArray) -> xr.DataArray | float:
    """Check the error of one date."""
    if not isinstance(sigma, xr.DataArray):
        try:
            value = float(sigma)
        except (TypeError, ValueError):
            raise CHMv2Error(
                "sigma as a number or a DataArray", type(sigma).__name__, "pass sigma=4.0"
            ) from None
        if not (np.isfinite(value) and value > 0):
            raise _not_positive(f"{value:g}")
        return value
    if sigma.ndim == 0:
        return _one_sigma(float(sigma), like)
    plane = require_plane(read_heights(sigma), "sigma")
    plane = on_same_grid(plane, like).transpose(*like.dims)
    if plane.chunks is None and bool((plane <= 0).any()):
        raise _not_positive(f"a least value of {float(plane.min()):g}")
    if plane.chunks is None and not bool((plane > 0).any()):
        raise _not_positive("NaN everywhere")
    return plane.where(plane > 0).drop_vars(_foreign(plane, like))


def _foreign(array: xr.DataArray, like: xr.DataArray) -> list[Any]:
    """Name the coordinates that an array has besides its grid."""
    return [name for name in array.coords if name not in like.dims]


def _not_positive(found: str) -> CHMv2Error:
    return CHMv2Error("a sigma above 0 m", found, "pass sigma=4.0")


def combine(sigmas: tuple[Any, Any], correlation: float) -> Any:
    """Return the error of the difference of two dates."""
    first, second = sigmas
    variance = first**2 + second**2 - 2 * correlation * first * second
    return np.sqrt(variance)
