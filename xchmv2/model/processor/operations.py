"""What the image processor does to one image: tensor in, tensor out.

Every step gives the numbers the published processor gives (it uses torchvision), roundings
included; ``tests/reference_data`` holds its outputs.
"""

from __future__ import annotations

import math
import platform

import torch
from torch.nn import functional as F

from xchmv2.errors import ConfigError, ImageryError

# Pillow's number of a filter -> torch's name of it. Pillow's box (4) and Hamming (5) have none.
RESAMPLE_MODES = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def reduce_labels(labels: torch.Tensor) -> torch.Tensor:
    """Lower every class by one; the background, 0, becomes 255 ("ignore"), and 255 stays.

    Parameters
    ----------
    labels : torch.Tensor
        Class numbers, any shape.

    Returns
    -------
    torch.Tensor
        Same shape and dtype.
    """
    ignore = torch.full_like(labels, 255)
    return torch.where((labels == 0) | (labels == 255), ignore, labels - 1)


def resized_shape(
    shape: tuple[int, int],
    target: tuple[int, int],
    *,
    keep_aspect_ratio: bool,
    multiple_of: int,
) -> tuple[int, int]:
    """Choose the height and width an image is resized to.

    Parameters
    ----------
    shape, target : tuple of int
        Height and width in pixels: of the image, and as asked for.
    keep_aspect_ratio : bool
        Scale both sides by one factor: of the two that reach the target, the one nearer to 1.
    multiple_of : int
        Each side is rounded to the nearest multiple of this (a half goes to the even multiple).

    Returns
    -------
    tuple of int
        Height and width in pixels.

    Raises
    ------
    ImageryError
        If a side would be rounded to nothing.
    """
    scales = [wanted / have for wanted, have in zip(target, shape, strict=True)]
    if keep_aspect_ratio:
        vertical, horizontal = (abs(1 - scale) for scale in scales)
        scales = [scales[1] if horizontal < vertical else scales[0]] * 2
    height, width = (
        round(scale * have / multiple_of) * multiple_of
        for scale, have in zip(scales, shape, strict=True)
    )
    if not height or not width:
        raise ImageryError(
            f"a size that resizes {shape[0]} x {shape[1]} px to at least {multiple_of} px a side",
            f"{height} x {width} px from size {target[0]} x {target[1]}",
            "pass a larger size or a smaller ensure_multiple_of",
        )
    return height, width


def resize(image: torch.Tensor, shape: tuple[int, int], resample: int) -> torch.Tensor:
    """Resize an image, antialiased, in its own dtype.

    Parameters
    ----------
    image : torch.Tensor
        Shape (channels, height, width).
    shape : tuple of int
        New height and width in pixels.
    resample : {0, 1, 2, 3}
        Pillow's filter number: nearest, Lanczos, bilinear, bicubic.

    Returns
    -------
    torch.Tensor
        Shape (channels, *shape); integers are rounded and kept in the range of their dtype.

    Raises
    ------
    ConfigError
        If this torch has no Lanczos filter for the image's device.
    """
    if tuple(image.shape[-2:]) == shape:
        return image
    mode = RESAMPLE_MODES[resample]
    batch = image[None]  # [1, C, H, W]
    if not _resizes_in_own_dtype(image, mode):
        batch = batch.to(torch.float32)
    if mode == "nearest-exact":
        resized = F.interpolate(batch, size=shape, mode=mode)
    else:
        resized = _filter(batch, shape, mode)
    return _round_to(resized[0], image.dtype)


def _resizes_in_own_dtype(image: torch.Tensor, mode: str) -> bool:
    """Tell whether the published processor resizes this dtype without a detour by float32."""
    if image.dtype in (torch.float32, torch.float64):
        return True
    if image.dtype != torch.uint8:
        return False
    if mode == "nearest-exact":
        return True
    # torch's own uint8 kernels are for the CPU; torchvision trusts the bilinear one only where it
    # is vectorised. Its result can differ by one grey level from rounding float32.
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    vectorised = vectorised or platform.machine() in ("aarch64", "arm64")
    return image.device.type == "cpu" and (mode != "bilinear" or vectorised)


def _filter(batch: torch.Tensor, shape: tuple[int, int], mode: str) -> torch.Tensor:
    try:
        return F.interpolate(batch, size=shape, mode=mode, align_corners=False, antialias=True)
    except (NotImplementedError, ValueError) as error:
        if mode != "lanczos":
            raise
        raise ConfigError(
            "a filter that this torch offers here",
            f"resample=1 (Lanczos), torch {torch.__version__}, device {batch.device}",
            "pass resample=3 (bicubic)",
        ) from error


def _round_to(image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if image.dtype == dtype or dtype.is_floating_point:
        return image.to(dtype)
    limits = torch.iinfo(dtype)  # bicubic and Lanczos overshoot at edges
    return image.round().clamp(limits.min, limits.max).to(dtype)


def center_crop(image: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Cut the middle out of an image, padded with zeros where it is too small.

    Parameters
    ----------
    image : torch.Tensor
        Shape (channels, height, width).
    shape : tuple of int
        Height and width to cut out, in pixels.

    Returns
    -------
    torch.Tensor
        Shape (channels, *shape).
    """
    image = _pad_centred(
        image, [max(w - h, 0) for w, h in zip(shape, image.shape[-2:], strict=True)]
    )
    top, left = ((have - want) // 2 for have, want in zip(image.shape[-2:], shape, strict=True))
    return image[..., top : top + shape[0], left : left + shape[1]]


def pad_to_multiple(image: torch.Tensor, divisor: int) -> torch.Tensor:
    """Pad an image with zeros, centred, until both sides are multiples of `divisor`.

    Parameters
    ----------
    image : torch.Tensor
        Shape (channels, height, width).
    divisor : int
        In pixels.

    Returns
    -------
    torch.Tensor
        Of an odd number of added rows or columns, the extra one is at the bottom or right.
    """
    sides = image.shape[-2:]
    return _pad_centred(image, [math.ceil(side / divisor) * divisor - side for side in sides])


def _pad_centred(image: torch.Tensor, extra: list[int]) -> torch.Tensor:
    if not any(extra):
        return image
    (top, left) = (pixels // 2 for pixels in extra)
    return F.pad(image, (left, extra[1] - left, top, extra[0] - top))


def rescale_and_normalize(
    image: torch.Tensor,
    *,
    rescale_factor: float | None,
    mean: float | tuple[float, ...] | None,
    std: float | tuple[float, ...] | None,
) -> torch.Tensor:
    """Multiply by a factor, subtract the mean and divide by the standard deviation.

    Parameters
    ----------
    image : torch.Tensor
        Shape (channels, height, width).
    rescale_factor : float or None
        None leaves the values as they are.
    mean, std : float, tuple of float, or None
        Of the rescaled values, one for all channels or one each; None does not normalise. A
        one-channel image is normalised with each in turn, which makes grey RGB of it.

    Returns
    -------
    torch.Tensor
        float32 if normalised.

    Raises
    ------
    ImageryError
        If there are neither one channel nor as many as `mean` and `std`.
    """
    if mean is None or std is None:
        return image if rescale_factor is None else image * rescale_factor
    # Both in one pass over the pixels: mean and std in units of the image's values.
    scale = 1.0 if rescale_factor is None else 1.0 / rescale_factor
    centre, spread = (_per_channel(value, image) * scale for value in (mean, std))
    return image.to(torch.float32).sub(centre).div_(spread)


def _per_channel(value: float | tuple[float, ...], image: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(value, dtype=torch.float32, device=image.device)
    channels = image.shape[0]
    if values.numel() != 1 and channels not in (1, values.numel()):
        raise ImageryError(
            f"{values.numel()} channels, one for each mean and standard deviation",
            f"{channels} channels in an image of {image.shape[1]} x {image.shape[2]} px",
            "select red, green and blue, pass input_data_format, "
            "or for an alpha channel do_convert_rgb=True",
        )
    return values.reshape(-1, 1, 1)  # [channels or 1, 1, 1]
