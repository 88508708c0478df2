"""The image processor: from pictures to the network's input, and from its output to heights."""

from __future__ import annotations

import copy
import logging
import math
import os
import platform
import sys
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch.nn import functional as F

from xchmv2.errors import CheckpointError, ConfigError, DeviceError, ImageryError
from xchmv2.model.files import (
    IMAGE_MEAN,
    IMAGE_STD,
    PREPROCESSOR_NAME,
    find_folder,
    read_json,
    write_json,
)

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


class BatchFeature(UserDict[str, Any]):
    """A batch for the model: a mapping whose entries are attributes too.

    Parameters
    ----------
    data : mapping, optional
        ``pixel_values`` (and ``labels`` where segmentation maps were given): an array of the
        whole batch, or a list with one tensor per image.

    Examples
    --------
    >>> batch = BatchFeature({"pixel_values": torch.zeros(1, 3, 32, 32)})
    >>> batch.pixel_values is batch["pixel_values"]
    True
    >>> sorted({**batch})
    ['pixel_values']
    """

    def __getattr__(self, name: str) -> Any:
        # ``data`` is missing only while an instance is being unpickled or copied.
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"{type(self).__name__} has no entry or attribute {name!r}")

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Move every tensor to a device, convert the floating point ones, and return self.

        Parameters
        ----------
        device : torch.device, str or int, optional
            Where to; a dtype may stand here too, as in ``torch.Tensor.to``.
        dtype : torch.dtype, optional
            For floating point tensors; labels keep their integers.
        non_blocking : bool, default False
            Copy asynchronously from pinned memory.

        Returns
        -------
        BatchFeature
            This object, changed.

        Raises
        ------
        ConfigError
            If the first argument is neither a device nor a dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if not isinstance(device, torch.device | str | int | None):
            raise ConfigError("a device or a torch dtype", repr(device), "write .to('cuda')")

        def move(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(move(item) for item in value)
            if not isinstance(value, torch.Tensor):
                return value
            wanted = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=wanted, non_blocking=non_blocking)

        self.data = {name: move(value) for name, value in self.data.items()}
        return self


def collate(tensors: list[torch.Tensor], return_tensors: str | None) -> Any:
    """Stack the images of a batch in the form asked for.

    Parameters
    ----------
    tensors : list of torch.Tensor
        One per image, each (channels, height, width) or (height, width).
    return_tensors : {"pt", "np"} or None
        A torch tensor, a numpy array, or the list as it is.

    Returns
    -------
    torch.Tensor, numpy.ndarray or list of torch.Tensor
        With the image as first dimension.

    Raises
    ------
    ImageryError
        If images of different sizes are to be stacked.
    """
    if return_tensors is None:
        return tensors
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ImageryError(
            "images that have one size after processing, to stack them",
            f"sizes {', '.join(str(shape) for shape in shapes)}",
            "pass return_tensors=None for a list, or bring them to one size with "
            "do_center_crop=True, crop_size=(height, width)",
        )
    batch = torch.stack(tensors)  # [B, ...]
    return batch if return_tensors == "pt" else batch.numpy(force=True)


# Published arguments that change no result of CHMv2 in the published processor either.
_WITHOUT_EFFECT = frozenset({"default_to_square", "disable_grouping", "image_seq_length"})
_CHOICES = {
    "resample": tuple(RESAMPLE_MODES),
    "input_data_format": ("channels_first", "channels_last"),
    "data_format": ("channels_first",),
    "return_tensors": ("pt", "np"),
}
# What a step needs besides its own switch.
_NEEDED = {
    "do_resize": ("size", "resample", "ensure_multiple_of"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
    "do_pad": ("size_divisor",),
}


@dataclass(init=False)
class ProcessorSettings:
    """Everything that can be set on the processor, or for one call of it.

    The class that users see, ``CHMv2ImageProcessor``, documents each setting.
    """

    do_convert_rgb: bool | None = None
    do_resize: bool | None = False
    size: dict[str, int] | None = field(default_factory=lambda: {"height": 384, "width": 384})
    resample: int | None = 3
    ensure_multiple_of: int | None = 16
    keep_aspect_ratio: bool | None = True
    do_center_crop: bool | None = None
    crop_size: dict[str, int] | None = None
    do_rescale: bool | None = True
    rescale_factor: float | None = 1 / 255
    do_normalize: bool | None = True
    image_mean: float | tuple[float, ...] | None = IMAGE_MEAN
    image_std: float | tuple[float, ...] | None = IMAGE_STD
    do_pad: bool | None = True
    size_divisor: int | None = 16
    do_reduce_labels: bool | None = None
    data_format: str | None = None
    input_data_format: DataFormat | None = None
    device: str | None = None
    return_tensors: str | None = None

    def __init__(self, **settings: Any) -> None:
        _refuse_unknown(settings, self._names())
        defaults = {
            item.name: item.default_factory() if callable(item.default_factory) else item.default
            for item in fields(ProcessorSettings)
        }
        given = {name: value for name, value in settings.items() if value is not None}
        self._set({**defaults, **given})

    @classmethod
    def _names(cls) -> list[str]:
        return [item.name for item in fields(ProcessorSettings)]

    def _set(self, settings: Mapping[str, Any]) -> None:
        for name in self._names():
            if name in settings:
                setattr(self, name, _standardise(name, settings[name]))

    def _with(self, overrides: Mapping[str, Any]) -> Self:
        """Return the settings of one call, checked whole: attributes may have been assigned."""
        _refuse_unknown(overrides, self._names())
        settings = copy.copy(self)
        settings._set({**{name: getattr(self, name) for name in self._names()}, **overrides})
        for switch, needed in _NEEDED.items():
            missing = [name for name in needed if getattr(settings, name) is None]
            if getattr(settings, switch) and missing:
                raise ConfigError(
                    f"a value for {' and '.join(missing)} with {switch}=True",
                    "None",
                    f"pass {missing[0]}=... or {switch}=False",
                )
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are written to file: those that are set, and the type.

        Returns
        -------
        dict
            Values that JSON can hold, sorted by name.
        """
        values = {name: getattr(self, name) for name in self._names()}
        values["image_processor_type"] = type(self).__name__
        return {name: values[name] for name in sorted(values) if values[name] is not None}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Read the settings of a checkpoint, written by xchmv2 or by transformers.

        Parameters
        ----------
        pretrained_model_name_or_path : str or os.PathLike
            A folder with ``preprocessor_config.json``, that file, or a Hugging Face id such as
            ``"facebook/dinov3-vitl16-chmv2-dpt-head"``.
        revision : str, optional
            Branch, tag or commit on the hub.
        **overrides
            Settings that replace those of the file.

        Returns
        -------
        CHMv2ImageProcessor
            Settings that the file leaves out have their defaults; entries that are not settings
            are left aside.

        Raises
        ------
        CheckpointError
            If the file cannot be found, fetched or read.
        """
        _refuse_unknown(overrides, cls._names())
        stored = read_json(_find(pretrained_model_name_or_path, revision))
        known = {name: value for name, value in stored.items() if name in cls._names()}
        # The published processor carries a stored data_format along and never looks at it.
        known.pop("data_format", None)
        return cls(**{**known, **overrides})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write ``preprocessor_config.json``, for xchmv2 and transformers alike.

        Parameters
        ----------
        save_directory : str or os.PathLike
            Made if it is not there. The file appears whole or not at all.

        Returns
        -------
        list of str
            The path written.
        """
        path = Path(save_directory) / PREPROCESSOR_NAME
        write_json(path, self.to_dict())
        return [str(path)]


def _refuse_unknown(settings: Mapping[str, Any], names: list[str]) -> None:
    unknown = [name for name in settings if name not in names and name not in _WITHOUT_EFFECT]
    if unknown:
        raise ConfigError(
            f"settings named {', '.join(sorted(names))}",
            ", ".join(repr(name) for name in unknown),
            "leave it out or correct the name",
        )


def _standardise(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _CHOICES:
        return _as_choice(name, value)
    if name in ("size", "crop_size"):
        return _as_size(name, value)
    if name in ("size_divisor", "ensure_multiple_of"):
        return _as_count(name, value)
    if name in ("image_mean", "image_std"):
        return _as_channel_values(name, value)
    if name == "rescale_factor":
        return _as_positive(name, value)
    return _as_device(value) if name == "device" else _as_flag(name, value)


def _as_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} as True or False", repr(value), f"pass {name}=True")
    return value


def _as_choice(name: str, value: Any) -> Any:
    for choice in _CHOICES[name]:
        if value == choice and not isinstance(value, bool):
            return choice  # itself, not an equal member of an enum
    allowed = ", ".join(repr(choice) for choice in _CHOICES[name])
    raise ConfigError(
        f"{name} as one of {allowed}", repr(value), f"pass {name}={_CHOICES[name][-1]!r}"
    )


def _as_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise ConfigError(f"{name} as a positive integer", repr(value), f"pass {name}=16")
    return int(value)


def _as_positive(name: str, value: Any) -> float:
    number = _as_number(name, value)
    if not 0 < number < float("inf"):
        raise ConfigError(f"a positive {name}", repr(value), f"pass {name}=1 / 255")
    return number


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise ConfigError(f"{name} as a number", repr(value), "pass a float")
    return float(value)


def _as_channel_values(name: str, value: Any) -> float | tuple[float, ...]:
    read = _as_positive if name == "image_std" else _as_number
    if not hasattr(value, "__iter__"):
        return read(name, value)
    values = tuple(read(name, item) for item in value)
    if not values or isinstance(value, str):
        raise ConfigError(
            f"{name} as one number, or one per channel",
            repr(value),
            f"pass {name}={getattr(ProcessorSettings, name)}",
        )
    return values


def _as_size(name: str, value: Any) -> dict[str, int]:
    if hasattr(value, "__index__"):
        value = (value, value)
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping) or set(value) != {"height", "width"}:
        raise ConfigError(
            f"{name} as {{'height': ..., 'width': ...}}, (height, width) or one number, in pixels",
            repr(value),
            f"pass {name}={{'height': 384, 'width': 384}}",
        )
    return {side: _as_count(f"{name}[{side!r}]", value[side]) for side in ("height", "width")}


def _as_device(value: Any) -> str:
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise DeviceError(
            "a device of this machine", repr(value), "pass device='cpu', or leave device out"
        ) from error
    return str(device)


def _find(name: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder, _ = find_folder(name, revision, [PREPROCESSOR_NAME])
    path = folder / PREPROCESSOR_NAME
    if not path.exists():
        raise CheckpointError(
            f"{PREPROCESSOR_NAME} in {str(folder)!r}",
            "no such file",
            "CHMv2ImageProcessor() has the published settings; its save_pretrained(folder) writes "
            "them",
        )
    return path


class DepthOutput(Protocol):
    """What the model returns, as far as the processor looks at it."""

    @property
    def predicted_depth(self) -> torch.Tensor:
        """Heights in metres, of shape (batch, height, width)."""


class CHMv2ImageProcessor(ProcessorSettings):
    """Make network input of images, and heights in the images' size of network output.

    Each setting can be given here, for every call, or to one call. None here means the default.
    The steps run in this order: convert to RGB, resize, crop, rescale, normalise, pad.

    Parameters
    ----------
    do_convert_rgb : bool, optional
        Make RGB of one channel (grey) and of four (red, green, blue, alpha, laid on white).
    do_resize : bool, default False
        Resize to `size`.
    size : dict, tuple or int, default {"height": 384, "width": 384}
        In pixels: by name, (height, width), or one number for both.
    resample : {0, 1, 2, 3}, default 3
        Pillow's number of the filter: nearest, Lanczos, bilinear, bicubic. All but nearest are
        antialiased.
    ensure_multiple_of : int, default 16
        Resize to multiples of this.
    keep_aspect_ratio : bool, default True
        Resize both sides by one factor, so that one of them comes out as in `size`.
    do_center_crop : bool, optional
        Cut out the middle, padded with zeros where the image is too small.
    crop_size : dict, tuple or int, optional
        As `size`.
    do_rescale : bool, default True
        Multiply by `rescale_factor`.
    rescale_factor : float, default 1 / 255
        Brings the values to the range of `image_mean` and `image_std`.
    do_normalize : bool, default True
        Subtract `image_mean` and divide by `image_std`.
    image_mean : float or tuple of float, default (0.420, 0.411, 0.296)
        Of the training imagery, after rescaling.
    image_std : float or tuple of float, default (0.213, 0.156, 0.143)
        Of the training imagery, after rescaling.
    do_pad : bool, default True
        Pad with zeros, image centred, to multiples of `size_divisor`.
    size_divisor : int, default 16
        In pixels.
    do_reduce_labels : bool, optional
        Lower the classes of segmentation maps by one; the background, 0, becomes 255.
    data_format : {"channels_first"}, optional
        Of the output; there is no other.
    input_data_format : {"channels_first", "channels_last"}, optional
        Of arrays; by default found from the shape.
    device : torch.device or str, optional
        Where images are processed and returned; by default where they are.
    return_tensors : {"pt", "np"}, optional
        Stack the batch to a torch tensor or a numpy array; by default a list of tensors.
    **settings
        All of the above are given by name. ``default_to_square``, ``disable_grouping`` and
        ``image_seq_length`` are taken too; they change nothing, here or in transformers.

    Raises
    ------
    ConfigError
        If a name is not one of these or a value is outside what it can be.

    Notes
    -----
    The numbers are those of the processor published in transformers, without torchvision.
    """

    def __call__(
        self, images: Any, segmentation_maps: Any = None, **overrides: Any
    ) -> BatchFeature:
        """Do what `preprocess` does.

        Parameters
        ----------
        images, segmentation_maps, **overrides
            As in `preprocess`.

        Returns
        -------
        BatchFeature
            As from `preprocess`.
        """
        return self.preprocess(images, segmentation_maps, **overrides)

    def preprocess(
        self, images: Any, segmentation_maps: Any = None, **overrides: Any
    ) -> BatchFeature:
        """Make the network's input of images.

        Parameters
        ----------
        images : PIL.Image.Image, numpy.ndarray, torch.Tensor, or list of them
            Each (height, width, channels) or (channels, height, width); arrays with one dimension
            more are batches. Values 0-255 by default; see `rescale_factor` and `do_rescale`.
        segmentation_maps : PIL.Image.Image, numpy.ndarray, torch.Tensor, or list, optional
            Class numbers of shape (height, width), one map per image. They go through the same
            resizing (with the same filter: bicubic blends classes), cropping and padding.
        **overrides
            Settings for this call; None switches a step off.

        Returns
        -------
        BatchFeature
            ``pixel_values``, float32 of shape (batch, 3, height, width), and ``labels``, int64 of
            shape (batch, height, width), if maps were given. Lists without `return_tensors`.

        Raises
        ------
        ConfigError
            If a setting is unknown, has a wrong value, or lacks another that it needs.
        ImageryError
            If an image cannot be read, or images of different sizes are to be stacked.
        """
        call = self._with(overrides)
        pixel_values = [call._process_image(image) for image in iter_images(images, ndim=3)]
        if not pixel_values:
            raise ImageryError("at least one image", "none", "pass an image or a list of images")
        batch = BatchFeature(pixel_values=collate(pixel_values, call.return_tensors))
        if segmentation_maps is not None:
            labels = [call._process_map(labels) for labels in iter_images(segmentation_maps, 2)]
            _validate_count(len(labels), len(pixel_values))
            batch["labels"] = collate(labels, call.return_tensors)
        return batch

    def post_process_depth_estimation(
        self,
        outputs: DepthOutput,
        target_sizes: torch.Tensor | Iterable[tuple[int, int] | None] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Bring the model's heights to the size of the images.

        Parameters
        ----------
        outputs : object with ``predicted_depth``
            What the model returned; heights in metres, of shape (batch, height, width).
        target_sizes : torch.Tensor or iterable of tuple of int, optional
            Height and width for each image, in pixels; by default, and for None, the size stays.

        Returns
        -------
        list of dict
            For each image ``{"predicted_depth": heights}``, of shape (height, width), in metres.

        Raises
        ------
        ConfigError
            If there is not one target size for each image.

        Notes
        -----
        Bilinear, with the centres of the corner pixels held in place (``align_corners=True``), as
        published. Padding is stretched over the image rather than cut off; heights of an image
        whose sides are multiples of 32 need no resizing at all.
        """
        heights = outputs.predicted_depth  # [B, H, W]
        sizes = [None] * len(heights) if target_sizes is None else list(target_sizes)
        if len(sizes) != len(heights):
            raise ConfigError(
                f"{len(heights)} target sizes, one for each image",
                str(len(sizes)),
                "pass target_sizes=[(height, width), ...]",
            )
        pairs = zip(heights, sizes, strict=True)
        return [{"predicted_depth": _resize_heights(image, size)} for image, size in pairs]

    def _process_image(self, image: Any) -> torch.Tensor:
        pixels = read_image(
            image,
            convert_rgb=bool(self.do_convert_rgb),
            data_format=self.input_data_format,
            device=self.device,
        )
        pixels = self._reshape(pixels)
        pixels = rescale_and_normalize(
            pixels,
            rescale_factor=self.rescale_factor if self.do_rescale else None,
            mean=self.image_mean if self.do_normalize else None,
            std=self.image_std if self.do_normalize else None,
        )
        return self._pad(pixels)

    def _process_map(self, labels: Any) -> torch.Tensor:
        classes = read_image(labels, data_format="channels_first")
        if classes.shape[0] != 1:
            raise ImageryError(
                "segmentation maps of shape (height, width)",
                f"{classes.shape[0]} channels",
                "pass class numbers, not colours",
            )
        if self.do_reduce_labels:
            classes = reduce_labels(classes)
        return self._pad(self._reshape(classes))[0].to(torch.int64)  # [H, W]

    def _reshape(self, image: torch.Tensor) -> torch.Tensor:
        if self.do_resize and self.size and self.resample is not None:
            shape = resized_shape(
                (image.shape[1], image.shape[2]),
                (self.size["height"], self.size["width"]),
                keep_aspect_ratio=bool(self.keep_aspect_ratio),
                multiple_of=self.ensure_multiple_of or 1,
            )
            image = resize(image, shape, self.resample)
        if self.do_center_crop and self.crop_size:
            image = center_crop(image, (self.crop_size["height"], self.crop_size["width"]))
        return image

    def _pad(self, image: torch.Tensor) -> torch.Tensor:
        if self.do_pad and self.size_divisor:
            return pad_to_multiple(image, self.size_divisor)
        return image


def _validate_count(maps: int, images: int) -> None:
    if maps != images:
        raise ImageryError(
            "one segmentation map for each image", f"{maps} for {images}", "pass as many"
        )


def _resize_heights(image: torch.Tensor, size: Any) -> torch.Tensor:
    if size is None:
        return image
    shape = [int(side) for side in size]
    batch = image[None, None]  # [1, 1, H, W]
    return F.interpolate(batch, size=shape, mode="bilinear", align_corners=True)[0, 0]
