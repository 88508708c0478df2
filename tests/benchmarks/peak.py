"""How fast this machine multiplies matrices: what a network can reach at most."""

from __future__ import annotations

import torch

from .timing import Action, timed

# A product must take this long, so that starting it costs nothing [s].
_LONG_ENOUGH = 0.03
_SIDES = (256, 512, 1024, 2048, 4096, 8192)


def matmul(device: str, dtype: torch.dtype) -> tuple[Action, float]:
    """Prepare a product of two square matrices that keeps the device busy.

    Parameters
    ----------
    device : str
        Torch device.
    dtype : torch.dtype
        Precision.

    Returns
    -------
    action : callable
        Multiplies once.
    flop : float
        Operations of one product.
    """
    side = _SIDES[0]
    for side in _SIDES:
        product = _product(side, device, dtype)
        product()
        if timed(product, device) > _LONG_ENOUGH:
            break
    return _product(side, device, dtype), 2.0 * side**3


def _product(side: int, device: str, dtype: torch.dtype) -> Action:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right
