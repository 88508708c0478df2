"""The training loss of CHMv2: SiLog that gives way to Charbonnier, and Patch Gradient on top.

SiLog alone biases tall canopy low, Charbonnier alone collapses to the mean, and Patch Gradient from
the start leaves grid artefacts; hence the curriculum.

Heights are in metres everywhere; inside, they are divided by 8 as the paper's targets are.

References
----------
CHMv2, arXiv 2603.06382, sections 2.5 and 2.6, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xchmv2.errors import ImageryError
from xchmv2.model.height import TARGET_SCALE

#: Smallest height whose logarithm is taken; lower ones count as this [m].
LOWEST = 0.1
#: Weights of Patch Gradient's three terms: magnitude, local range, direction.
_MAGNITUDE, _RANGE, _DIRECTION = 0.3, 0.6, 0.4
_SCALES = (1, 2, 4)
_WINDOWS = (3, 5)
#: Gradients smaller than this have no direction.
_FLAT = 1e-3


def chmv2_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    progress: float = 1.0,
    curriculum: Curriculum | None = None,
) -> Tensor:
    """Training loss of CHMv2.

    Parameters
    ----------
    predicted, target : Tensor [B, H, W], float32
        Heights [m]; NaN in the target is ignored.
    progress : float, default 1
        Share of the training that is done, from 0 to 1.
    curriculum : Curriculum, optional
        The published one by default.

    Returns
    -------
    Tensor []

    Raises
    ------
    ImageryError
        If the two differ in shape.

    References
    ----------
    CHMv2, arXiv 2603.06382, section 2.6 and Algorithm 1.
    """
    if predicted.shape != target.shape:
        raise ImageryError(
            f"labels of the heights' shape, {tuple(predicted.shape)}",
            f"{tuple(target.shape)}",
            "give heights (B, H, W) in metres on the pixels of pixel_values",
        )
    predicted, target = predicted.float(), target.to(predicted.device, torch.float32)
    weights = (curriculum or Curriculum()).weights(progress)
    losses: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (silog, charbonnier, patch_gradient)
    terms = [w * f(predicted, target) for w, f in zip(weights, losses, strict=True) if w > 0]
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class Curriculum:
    """Weights of the three losses as training goes on.

    Parameters
    ----------
    silog_until : float, default 0.3
        Share of the training by which SiLog has given way to Charbonnier.
    gradient_from, gradient_until : float
        Shares of the training over which Patch Gradient is warmed up.
    gradient_weight : float, default 0.075
        Final weight of Patch Gradient.

    References
    ----------
    CHMv2, arXiv 2603.06382, section 2.6: 30k, 5k and 50k of 100k iterations.
    """

    silog_until: float = 0.3
    gradient_from: float = 0.05
    gradient_until: float = 0.5
    gradient_weight: float = 0.075

    def weights(self, progress: float) -> tuple[float, float, float]:
        """Weights of SiLog, Charbonnier and Patch Gradient at a share of the training."""
        smooth = _share(progress, 0.0, self.silog_until)
        gradient = _share(progress, self.gradient_from, self.gradient_until)
        return 1 - smooth, smooth, self.gradient_weight * gradient


def _share(value: float, start: float, stop: float) -> float:
    """Position of a value between start and stop, from 0 to 1."""
    return min(1.0, max(0.0, (value - start) / (stop - start))) if stop > start else 1.0


def silog(predicted: Tensor, target: Tensor, *, variance_focus: float = 0.85) -> Tensor:
    """Scale-invariant logarithmic error.

    Parameters
    ----------
    predicted, target : Tensor [B, H, W], float32
        Heights [m]; NaN in the target is ignored.
    variance_focus : float, default 0.85
        Share of the mean error that is forgiven; 1 forgives a common factor altogether.

    Returns
    -------
    Tensor []
        Dimensionless; 0 where no target is valid.

    References
    ----------
    Eigen et al. 2014, arXiv 1406.2283, equation 4; CHMv2, arXiv 2603.06382, section 2.6.
    """
    valid = target.isfinite()
    error = (_log(predicted) - _log(target.nan_to_num()))[valid]
    if error.numel() == 0:
        return predicted.sum() * 0
    return (error.square().mean() - variance_focus * error.mean().square()).clamp_min(1e-12).sqrt()


def charbonnier(predicted: Tensor, target: Tensor, *, epsilon: float = 1e-3) -> Tensor:
    """Smooth absolute error.

    Parameters
    ----------
    predicted, target : Tensor [B, H, W], float32
        Heights [m]; NaN in the target is ignored.
    epsilon : float, default 1e-3
        Where the error turns from quadratic to linear, in units of 8 m.

    Returns
    -------
    Tensor []
        Mean error in units of 8 m; 0 where no target is valid.

    References
    ----------
    Charbonnier et al. 1994; CHMv2, arXiv 2603.06382, section 2.6.
    """
    valid = target.isfinite()
    error = ((predicted - target.nan_to_num()) / TARGET_SCALE)[valid]
    if error.numel() == 0:
        return predicted.sum() * 0
    return (error.square() + epsilon**2).sqrt().mean()


def _log(height: Tensor) -> Tensor:
    return (height.clamp_min(LOWEST) / TARGET_SCALE).log()


def patch_gradient(
    predicted: Tensor,
    target: Tensor,
    *,
    scales: tuple[int, ...] = _SCALES,
    temperature: float = 0.1,
) -> Tensor:
    """Difference of the gradients of logarithmic heights: their size, local range and direction.

    Parameters
    ----------
    predicted, target : Tensor [B, H, W], float32
        Heights [m]; pixels near a NaN of the target are ignored.
    scales : tuple of int
        Pixels averaged into one before gradients are taken; the loss is the mean over scales.
    temperature : float, default 0.1
        Softness of the local maximum and minimum.

    Returns
    -------
    Tensor []
        Dimensionless; 0 where no target is valid.

    References
    ----------
    CHMv2, arXiv 2603.06382, section 2.6 and Algorithm 1.
    """
    valid = target.isfinite()
    p, t = _centred(_log(predicted), valid), _centred(_log(target.nan_to_num()), valid)
    terms = [
        _one_scale(_coarsen(p, scale), _coarsen(t, scale), _all_valid(valid, scale), temperature)
        for scale in scales
        if min(predicted.shape[-2:]) >= 5 * scale
    ]
    return torch.stack(terms).mean() if terms else predicted.sum() * 0


def _centred(x: Tensor, valid: Tensor) -> Tensor:
    """Subtract the mean over the valid pixels of each image; 0 elsewhere."""
    count = valid.sum(dim=(1, 2), keepdim=True).clamp_min(1)  # [B, 1, 1]
    mean = (x * valid).sum(dim=(1, 2), keepdim=True) / count
    return (x - mean) * valid


def _coarsen(x: Tensor, scale: int) -> Tensor:
    return F.avg_pool2d(x.unsqueeze(1), scale)  # [B, H, W] -> [B, 1, H / scale, W / scale]


def _all_valid(valid: Tensor, scale: int) -> Tensor:
    """Pixels of a coarser scale under which every pixel is valid, [B, 1, h, w]."""
    return _coarsen(valid.float(), scale) > 1 - 1e-6


def _one_scale(p: Tensor, t: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Patch Gradient at one scale, for maps [B, 1, h, w]."""
    gp, gt = _sobel(p), _sobel(t)  # [B, 2, h - 2, w - 2]
    mp, mt = _magnitude(gp), _magnitude(gt)  # [B, 1, h - 2, w - 2]
    inside = _eroded(valid, 3)
    loss = _MAGNITUDE * _mean((mp - mt).abs(), inside)
    for window in _WINDOWS:
        if min(mp.shape[-2:]) >= window:
            difference = _soft_range(mp, window, temperature) - _soft_range(mt, window, temperature)
            whole = _eroded(inside, window)
            loss = loss + _RANGE / len(_WINDOWS) * _mean(difference.abs(), whole)
    cosine = (gp * gt).sum(dim=1, keepdim=True) / (mp * mt)
    return loss + _DIRECTION * _mean(1 - cosine, inside & (mt > _FLAT))


def _sobel(x: Tensor) -> Tensor:  # [B, 1, h, w] -> [B, 2, h - 2, w - 2]
    smooth, slope = x.new_tensor([1.0, 2.0, 1.0]) / 4, x.new_tensor([-1.0, 0.0, 1.0]) / 2
    kernels = torch.stack([torch.outer(slope, smooth), torch.outer(smooth, slope)])
    return F.conv2d(x, kernels.unsqueeze(1))  # kernels [2, 1, 3, 3]


def _magnitude(gradient: Tensor) -> Tensor:
    return (gradient.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def _soft_range(x: Tensor, window: int, temperature: float) -> Tensor:
    """Soft maximum minus soft minimum over windows, [B, 1, h - window + 1, ...]."""
    batch, _, height, width = x.shape
    shape = (batch, 1, height - window + 1, width - window + 1)
    patches = F.unfold(x, window)  # [B, window * window, positions]
    high = (patches * torch.softmax(patches / temperature, dim=1)).sum(dim=1)
    low = (patches * torch.softmax(-patches / temperature, dim=1)).sum(dim=1)
    return (high - low).view(shape)  # [B, positions] -> [B, 1, h', w']


def _eroded(valid: Tensor, window: int) -> Tensor:
    """Positions whose whole window is valid."""
    return F.max_pool2d((~valid).float(), window, stride=1) == 0


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """Mean over the chosen positions; 0 if there are none."""
    return (x * where).sum() / where.sum().clamp_min(1)
