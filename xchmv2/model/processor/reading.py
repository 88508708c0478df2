"""Read what users hand over - PIL, numpy, torch, lists of them - into channels-first tensors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from xchmv2.errors import ImageryError

logger = logging.getLogger(__name__)

DataFormat = Literal["channels_first", "channels_last"]

_CHANNELS = (1, 3, 4)
# Below 1, so that the largest value falls just short of the next integer before truncation.
_TRUNCATION_STEP = 1.0 - 1e-3


def iter_images(images: Any, ndim: int) -> Iterator[Any]:
    """Yield single images from an image, a batch array, or lists of them, nested or not.

    Parameters
    ----------
    images : PIL.Image.Image, numpy.ndarray, torch.Tensor, or list of them
        Arrays have `ndim` dimensions, or one more for a batch.
    ndim : int
        Dimensions of one image: 3 for imagery, 2 for a segmentation map.

    Yields
    ------
    PIL.Image.Image, numpy.ndarray or torch.Tensor
        One image each.

    Raises
    ------
    ImageryError
        If something else is found, or an array with other dimensions.
    """
    if isinstance(images, list | tuple):
        for item in images:
            yield from iter_images(item, ndim)
    elif _is_pil(images):
        yield images
    elif not isinstance(images, np.ndarray | torch.Tensor):
        raise ImageryError(
            "images as PIL images, numpy arrays or torch tensors, or lists of them",
            type(images).__name__,
            "open a file first, with PIL.Image.open(path); pass an xarray object's .values",
        )
    elif images.ndim == ndim + 1:
        yield from images
    elif images.ndim == ndim:
        yield images
    else:
        raise ImageryError(
            f"arrays of {ndim} dimensions, or {ndim + 1} for a batch",
            f"shape {tuple(images.shape)}",
            "give a one-band image its channel axis, image[None]" if ndim == 3 else "drop axes",
        )


def read_image(
    image: Any,
    *,
    convert_rgb: bool = False,
    data_format: DataFormat | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Read one image into a channels-first tensor of the image's own dtype.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or torch.Tensor
        Channels first or last; two dimensions are one channel.
    convert_rgb : bool, default False
        Repeat one channel three times; lay four (red, green, blue, alpha) on white.
    data_format : {"channels_first", "channels_last"}, optional
        Where an array has its channels. By default the axis of length 1, 3 or 4, and the first
        where both could be. PIL images always have them last.
    device : torch.device or str, optional
        Where the tensor goes.

    Returns
    -------
    torch.Tensor
        Shape (channels, height, width); uint8 if `image` is boolean.

    Raises
    ------
    ImageryError
        If there are no pixels, no channel axis is found, or the values are not real numbers.
    """
    is_pil = _is_pil(image)
    pixels = _as_tensor(_pil_to_array(image, convert_rgb) if is_pil else image)
    if pixels.ndim == 2:
        pixels = pixels[None]  # [1, H, W]
    elif is_pil or (data_format or _infer_data_format(pixels)) == "channels_last":
        pixels = pixels.permute(2, 0, 1)  # [C, H, W]
    if pixels.numel() == 0:
        raise ImageryError("an image with pixels", f"shape {tuple(pixels.shape)}", "leave it out")
    if convert_rgb and not is_pil:
        pixels = _to_rgb(pixels)
    return pixels.contiguous().to(device=device)


def _is_pil(image: Any) -> bool:
    # No PIL image exists where PIL was never imported, so Pillow need not be installed.
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)


def _pil_to_array(image: Any, convert_rgb: bool) -> np.ndarray[Any, Any]:
    if not convert_rgb:
        return np.array(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        pil = sys.modules["PIL.Image"]
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _as_tensor(image: np.ndarray[Any, Any] | torch.Tensor) -> torch.Tensor:
    if isinstance(image, np.ndarray) and image.dtype.kind in "buif":
        # torch refuses foreign byte order and negative strides, and warns of read-only memory.
        native = image.dtype.newbyteorder("=")
        image = torch.from_numpy(np.require(image, dtype=native, requirements=["C", "W"]))
    if not isinstance(image, torch.Tensor) or image.is_complex():
        raise ImageryError(
            "pixels of a real number type", str(image.dtype), "convert: image.astype('float32')"
        )
    return image.to(torch.uint8) if image.dtype == torch.bool else image


def _infer_data_format(image: torch.Tensor) -> DataFormat:
    first, last = image.shape[0] in _CHANNELS, image.shape[-1] in _CHANNELS
    if not first and not last:
        raise ImageryError(
            "1, 3 or 4 channels on the first or last axis",
            f"shape {tuple(image.shape)}",
            "select the bands red, green, blue, or pass input_data_format='channels_first'",
        )
    if first and last:
        logger.warning(
            "Shape %s could have its channels first or last; taken as first. "
            "Pass input_data_format to say which.",
            tuple(image.shape),
        )
    return "channels_first" if first else "channels_last"


def _to_rgb(image: torch.Tensor) -> torch.Tensor:
    channels = image.shape[0]
    if channels not in _CHANNELS:
        raise ImageryError(
            "1, 3 or 4 channels to make RGB of", str(channels), "select red, green and blue"
        )
    if channels == 1:
        return image.expand(3, -1, -1)  # [3, H, W]
    return _lay_on_white(image) if channels == 4 else image


def _lay_on_white(image: torch.Tensor) -> torch.Tensor:
    """Blend red, green and blue with white by alpha, which runs from 0 to 1 or the dtype's top."""
    floating = image.dtype.is_floating_point
    if floating and (image.min() < 0 or image.max() > 1):
        raise ImageryError(
            "float red, green, blue, alpha between 0 and 1",
            f"{image.min().item():g} to {image.max().item():g}",
            "divide by the top value, or pass the first three channels",
        )
    if not floating and torch.iinfo(image.dtype).bits > 16:
        raise ImageryError(
            "red, green, blue, alpha as float, uint8 or 16-bit integers",
            str(image.dtype),
            "convert to uint8, or pass the first three channels",
        )
    top = 1 if floating else torch.iinfo(image.dtype).max
    scaled = image.to(torch.float32) * (1.0 / top)
    colour, alpha = scaled[:3], scaled[3:]  # [3, H, W], [1, H, W]
    blended = colour * alpha + (1 - alpha)
    return (blended if floating else blended * (top + _TRUNCATION_STEP)).to(image.dtype)
