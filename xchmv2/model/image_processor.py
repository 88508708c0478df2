"""The image processor: from images to the network's input, and from its output to heights.

Its numbers are those of the processor published in transformers, without torchvision.
"""

from __future__ import annotations

import copy
import logging
import math
import operator
import os
import platform
import sys
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xchmv2.errors import ConfigError, DeviceError, ImageryError
from xchmv2.model.files import (
    IMAGE_MEAN,
    IMAGE_STD,
    PREPROCESSOR_NAME,
    HubOptions,
    find_folder,
    naming,
    read_json,
    write_json,
)

_logger = logging.getLogger(__name__)

#: Pillow's number of a filter -> torch's name of it. Pillow's box (4) and Hamming (5) have none.
_FILTERS = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
#: Published arguments that change no result of CHMv2 in the published processor either.
_WITHOUT_EFFECT = ("default_to_square", "disable_grouping", "image_seq_length")
#: What a step needs besides its own switch.
_NEEDED = {
    "do_resize": ("size", "resample", "ensure_multiple_of"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
    "do_pad": ("size_divisor",),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "resample": tuple(_FILTERS),
    "input_data_format": ("channels_first", "channels_last"),
    "data_format": ("channels_first",),
    "return_tensors": ("pt", "np"),
}
_SIZE = "{'height': ..., 'width': ...}, (height, width) or one number, in whole pixels above 0"
#: What the other settings are, where not True or False, and an example of each.
_WANTED = {
    "size": (_SIZE, "{'height': 384, 'width': 384}"),
    "crop_size": (_SIZE, "{'height': 384, 'width': 384}"),
    "size_divisor": ("a positive integer", "16"),
    "ensure_multiple_of": ("a positive integer", "16"),
    "rescale_factor": ("a positive number", "1 / 255"),
    "image_mean": ("one number, or one per channel", str(IMAGE_MEAN)),
    "image_std": ("one positive number, or one per channel", str(IMAGE_STD)),
}
#: Beyond this, and for a factor below its inverse, float32 and array sizes overflow.
_MOST = 1e9
#: Numbers of channels by which the channel axis of an array is found.
_CHANNELS = (1, 3, 4)
#: Below 1, so that the largest value falls just short of the next integer before truncation.
_TRUNCATION_STEP = 1.0 - 1e-3


@dataclass(init=False)
class CHMv2ImageProcessor:
    """Make network input of images, and heights in the images' size of network output.

    Each setting can be given here, for every call, or to one call. None here means the default.
    The steps run in this order: convert to RGB, resize, crop, rescale, normalise, pad.

    Parameters
    ----------
    do_convert_rgb : bool, optional
        Make RGB of one channel (grey) and of four (red, green, blue, alpha, laid on white).
    do_resize : bool, default False
        Resize to `size`.
    size, crop_size : dict, tuple or int, default {"height": 384, "width": 384} and None
        [px] By name, (height, width), or one number for both.
    resample : {0, 1, 2, 3}, default 3
        Nearest, or antialiased Lanczos, bilinear or bicubic (Pillow's numbers).
    ensure_multiple_of : int, default 16
        Resize to multiples of this [px].
    keep_aspect_ratio : bool, default True
        Resize both sides by one factor, so that one of them comes out as in `size`.
    do_center_crop : bool, optional
        Crop to the middle `crop_size`, padded with zeros where the image is too small.
    do_rescale, rescale_factor : bool and float, default True and 1 / 255
        Multiply values, to the range of `image_mean` and `image_std`.
    do_normalize : bool, default True
        Subtract `image_mean` and divide by `image_std`.
    image_mean, image_std : float or tuple, default (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)
        Mean and standard deviation of the training imagery, after rescaling.
    do_pad, size_divisor : bool and int, default True and 16
        Pad with zeros, image centred, to multiples of `size_divisor` [px].
    do_reduce_labels : bool, optional
        Lower the classes of segmentation maps by one; the background, 0, becomes 255.
    data_format : {"channels_first"}, optional
        Of the output; there is no other.
    input_data_format : {"channels_first", "channels_last"}, optional
        Of arrays; by default the axis of length 1, 3 or 4 holds the channels.
    device : torch.device or str, optional
        Where images are processed and returned; by default where they are.
    return_tensors : {"pt", "np"}, optional
        Stack the batch to a torch tensor or a numpy array; by default a list of tensors.
    **settings
        All of the above are given by name. ``default_to_square``, ``disable_grouping`` and
        ``image_seq_length`` are accepted too; they have no effect, here or in transformers.

    Raises
    ------
    ConfigError, DeviceError
        If a setting is unknown, its value is not allowed, or there is no such device.
    """

    do_convert_rgb: bool | None = None
    do_resize: bool = False
    size: Any = 384
    resample: int = 3
    ensure_multiple_of: int = 16
    keep_aspect_ratio: bool = True
    do_center_crop: bool | None = None
    crop_size: Any = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | tuple[float, ...] = IMAGE_MEAN
    image_std: float | tuple[float, ...] = IMAGE_STD
    do_pad: bool = True
    size_divisor: int = 16
    do_reduce_labels: bool | None = None
    data_format: str | None = None
    input_data_format: str | None = None
    device: str | None = None
    return_tensors: str | None = None

    def __init__(self, **settings: Any) -> None:
        _refuse_unknown(settings)
        for name in _names():
            value = settings.get(name)
            value = getattr(type(self), name) if value is None else value
            setattr(self, name, _validated(name, value))
        self._check_channels()

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
        pixels = [call._process_image(image) for image in _each(images, ndim=3)]
        if not pixels:
            raise ImageryError("at least one image", "none", "pass an image or a list of images")
        batch = BatchFeature(pixel_values=_collate(pixels, call.return_tensors))
        if segmentation_maps is not None:
            labels = [call._process_map(classes) for classes in _each(segmentation_maps, ndim=2)]
            if len(labels) != len(pixels):
                raise ImageryError(
                    "one segmentation map for each image",
                    f"{len(labels)} for {len(pixels)}",
                    "pass as many maps as images",
                )
            batch["labels"] = _collate(labels, call.return_tensors)
        return batch

    __call__ = preprocess

    def post_process_depth_estimation(
        self, outputs: Any, target_sizes: Tensor | Iterable[tuple[int, int] | None] | None = None
    ) -> list[dict[str, Tensor]]:
        """Resize the model's heights to the images.

        Parameters
        ----------
        outputs : DepthEstimatorOutput
            What the model returned: ``predicted_depth`` of shape (batch, height, width) [m].
        target_sizes : torch.Tensor or iterable of tuple of int, optional
            Height and width of each image [px]; None leaves heights as they are.

        Returns
        -------
        list of dict
            For each image ``{"predicted_depth": heights}``, of shape (height, width) [m].

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
        resized = []
        for image, size in zip(heights, sizes, strict=True):
            if size is not None:
                shape, batch = [int(side) for side in size], image[None, None]  # [1, 1, H, W]
                image = F.interpolate(batch, size=shape, mode="bilinear", align_corners=True)[0, 0]
            resized.append({"predicted_depth": image})
        return resized

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
            A folder with ``preprocessor_config.json``, that file, or an id on the Hugging Face
            hub, of which `revision` is a branch, tag or commit.
        **overrides
            Settings that replace those of the file; and ``token``, ``cache_dir``,
            ``local_files_only`` and ``subfolder``, as in
            `CHMv2ForDepthEstimation.from_pretrained`.

        Returns
        -------
        CHMv2ImageProcessor
            Settings that the file leaves out have their defaults; its other entries are ignored.
            A switch (True or False) that is null in the file is off; another setting that is null
            has its default.

        Raises
        ------
        CheckpointError, ConfigError
            If the file cannot be found, downloaded or read, or a setting is not allowed.
        """
        hub: Any = {n: overrides.pop(n) for n in HubOptions.__annotations__ if n in overrides}
        _refuse_unknown(overrides)
        path = _find_file(pretrained_model_name_or_path, revision, hub)
        # The published processor carries a stored data_format along and never looks at it.
        names = {*_names()} - {"data_format"} - {*overrides}
        known = {
            name: False if value is None and getattr(cls, name) is True else value
            for name, value in read_json(path).items()
            if name in names
        }
        with naming(path):
            cls(**known)
        return cls(**known, **overrides)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write ``preprocessor_config.json``, for xchmv2 and transformers, and return its path.

        The folder is made if it does not exist; the file appears whole or not at all.
        """
        path = Path(save_directory) / PREPROCESSOR_NAME
        write_json(path, self.to_dict())
        return [str(path)]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are not None and the type, as JSON holds them, by name."""
        values = {name: getattr(self, name) for name in _names()}
        values["image_processor_type"] = type(self).__name__
        return {name: values[name] for name in sorted(values) if values[name] is not None}

    def _with(self, overrides: Mapping[str, Any]) -> Self:
        """Merge settings for one call and check them all: attributes may have been assigned."""
        _refuse_unknown(overrides)
        call = copy.copy(self)
        for name in _names():
            setattr(call, name, _validated(name, overrides.get(name, getattr(self, name))))
        call._check_channels()
        for switch, needed in _NEEDED.items():
            missing = [name for name in needed if getattr(call, name) is None]
            if getattr(call, switch) and missing:
                raise ConfigError(
                    f"a value for {' and '.join(missing)} with {switch}=True",
                    "None",
                    f"pass {missing[0]}=... or {switch}=False",
                )
        return call

    def _check_channels(self) -> None:
        mean, std = self.image_mean, self.image_std
        if isinstance(mean, tuple) and isinstance(std, tuple) and len(mean) != len(std):
            raise ConfigError(
                "as many values in image_mean as in image_std",
                f"image_mean={mean}, image_std={std}",
                f"pass image_mean={IMAGE_MEAN}, image_std={IMAGE_STD}",
            )

    def _process_image(self, image: Any) -> Tensor:  # [C, H', W']
        pixels = _read(image, self.input_data_format, convert_rgb=bool(self.do_convert_rgb))
        pixels = self._resize_and_crop(pixels.to(device=self.device))
        factor = self.rescale_factor if self.do_rescale else 1.0
        if self.do_normalize:
            pixels = _normalize(pixels, factor, self.image_mean, self.image_std)
        elif self.do_rescale:
            pixels = pixels * factor
        return self._pad(pixels)

    def _process_map(self, labels: Any) -> Tensor:  # [H', W'], int64
        classes = _read(labels, "channels_first")
        if len(classes) != 1:
            raise ImageryError(
                "segmentation maps of shape (height, width)",
                f"{len(classes)} channels",
                "pass class numbers, not colours",
            )
        if self.do_reduce_labels:
            ignored = (classes == 0) | (classes == 255)
            classes = torch.where(ignored, torch.full_like(classes, 255), classes - 1)
        return self._pad(self._resize_and_crop(classes))[0].to(torch.int64)

    def _resize_and_crop(self, image: Tensor) -> Tensor:  # [C, H, W] -> [C, H', W']
        if self.do_resize:
            image = _resize(image, self._resized_shape(*image.shape[1:]), self.resample)
        if self.do_center_crop:
            image = _pad_or_crop(image, self.crop_size["height"], self.crop_size["width"])
        return image

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        target, multiple = (self.size["height"], self.size["width"]), self.ensure_multiple_of
        down, across = target[0] / height, target[1] / width
        if self.keep_aspect_ratio:  # of the two that reach the target, the one nearer to 1
            down = across = across if abs(1 - across) < abs(1 - down) else down
        high = round(down * height / multiple) * multiple  # a half goes to the even multiple
        wide = round(across * width / multiple) * multiple
        if not high or not wide:
            raise ImageryError(
                f"a size that resizes {height} x {width} px to at least {multiple} px a side",
                f"{high} x {wide} px from size {target[0]} x {target[1]}",
                "pass a larger size or a smaller ensure_multiple_of",
            )
        return high, wide

    def _pad(self, image: Tensor) -> Tensor:  # [C, H, W] -> [C, H', W']
        if not self.do_pad:
            return image
        height, width = (side + -side % self.size_divisor for side in image.shape[1:])
        return _pad_or_crop(image, height, width)


class BatchFeature(UserDict[str, Any]):
    """A batch for the model: ``pixel_values`` and ``labels``, entries and attributes alike."""

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
        device, dtype, non_blocking
            As in ``torch.Tensor.to``, where a dtype may come first too.

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
            if isinstance(value, list):
                return [move(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            wanted = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=wanted, non_blocking=non_blocking)

        self.data = {name: move(value) for name, value in self.data.items()}
        return self


def _each(images: Any, ndim: int) -> Iterator[Any]:
    """Yield single images from an image, a batch array, or lists of them, nested or not."""
    if isinstance(images, list | tuple):
        for item in images:
            yield from _each(item, ndim)
    elif _is_pil(images):
        yield images
    elif not isinstance(images, np.ndarray | Tensor):
        raise ImageryError(
            "images as PIL images, numpy arrays or torch tensors, or lists of them",
            type(images).__name__,
            "open a file first, with PIL.Image.open(path); pass an xarray object's .values",
        )
    elif images.ndim in (ndim, ndim + 1):
        yield from images if images.ndim > ndim else (images,)
    else:
        raise ImageryError(
            f"arrays of {ndim} dimensions, or {ndim + 1} for a batch",
            f"shape {tuple(images.shape)}",
            "give a one-band image its channel axis, image[None]" if ndim == 3 else "drop axes",
        )


def _read(image: Any, data_format: str | None, *, convert_rgb: bool = False) -> Tensor:
    """One image as a tensor [C, H, W] of its own dtype; uint8 if it is boolean."""
    is_pil = _is_pil(image)
    pixels = _as_tensor(_from_pil(image, convert_rgb) if is_pil else image)
    if pixels.ndim == 2:
        pixels = pixels[None]  # [H, W] -> [1, H, W]
    elif is_pil or (data_format or _find_channels(pixels)) == "channels_last":
        pixels = pixels.permute(2, 0, 1)  # [H, W, C] -> [C, H, W]
    if pixels.numel() == 0:
        raise ImageryError("an image with pixels", f"shape {tuple(pixels.shape)}", "leave it out")
    if convert_rgb and not is_pil:
        pixels = _to_rgb(pixels)
    return pixels.contiguous()


def _is_pil(image: Any) -> bool:
    # No PIL image exists where PIL was never imported, so Pillow need not be installed.
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)


def _from_pil(image: Any, convert_rgb: bool) -> np.ndarray[Any, Any]:
    if not convert_rgb:
        return np.array(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        pil = sys.modules["PIL.Image"]
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _as_tensor(image: np.ndarray[Any, Any] | Tensor) -> Tensor:
    if isinstance(image, np.ndarray) and image.dtype.kind in "buif":
        # torch refuses foreign byte order and negative strides, and warns of read-only memory.
        native = image.dtype.newbyteorder("=")
        image = torch.from_numpy(np.require(image, dtype=native, requirements=["C", "W"]))
    if not isinstance(image, Tensor) or image.is_complex():
        raise ImageryError(
            "pixels of a real number type", str(image.dtype), "convert: image.astype('float32')"
        )
    return image.to(torch.uint8) if image.dtype == torch.bool else image


def _find_channels(image: Tensor) -> str:
    first, last = image.shape[0] in _CHANNELS, image.shape[-1] in _CHANNELS
    if not first and not last:
        raise ImageryError(
            "1, 3 or 4 channels on the first or last axis",
            f"shape {tuple(image.shape)}",
            "select the bands red, green, blue, or pass input_data_format='channels_first'",
        )
    if first and last:
        _logger.warning(
            "The channels of shape %s may be first or last; they are taken as first. "
            "Pass input_data_format to choose.",
            tuple(image.shape),
        )
    return "channels_first" if first else "channels_last"


def _to_rgb(image: Tensor) -> Tensor:  # [1, 3 or 4, H, W] -> [3, H, W]
    if len(image) not in _CHANNELS:
        raise ImageryError(
            "1, 3 or 4 channels to make RGB of", str(len(image)), "select red, green and blue"
        )
    if len(image) < 4:
        return image.expand(3, -1, -1)
    # Blended with white by alpha, which runs from 0 to 1 or to the dtype's largest value.
    floating = image.dtype.is_floating_point
    top = 1 if floating else torch.iinfo(image.dtype).max
    if top > 65535 or (floating and (image.min() < 0 or image.max() > 1)):
        raise ImageryError(
            "red, green, blue and alpha as uint8, 16-bit integers, or float between 0 and 1",
            f"{image.dtype} from {image.min().item():g} to {image.max().item():g}",
            "convert them, or pass the first three channels",
        )
    scaled = image.to(torch.float32) * (1.0 / top)
    colour, alpha = scaled[:3], scaled[3:]  # [3, H, W], [1, H, W]
    blended = colour * alpha + (1 - alpha)
    return (blended if floating else blended * (top + _TRUNCATION_STEP)).to(image.dtype)


def _resize(image: Tensor, shape: tuple[int, int], resample: int) -> Tensor:
    """Resize [C, H, W], antialiased; integers are rounded and stay in the range of their dtype."""
    if tuple(image.shape[1:]) == shape:
        return image
    mode = _FILTERS[resample]
    batch = image[None] if _resizes_in_own_dtype(image, mode) else image[None].to(torch.float32)
    options: dict[str, Any] = {"align_corners": False, "antialias": True} if resample else {}
    try:
        resized = F.interpolate(batch, size=shape, mode=mode, **options)[0]
    except (NotImplementedError, ValueError) as error:
        if mode != "lanczos":
            raise
        raise ConfigError(
            "a filter that this version of torch offers",
            f"resample=1 (Lanczos), torch {torch.__version__}, device {batch.device}",
            "pass resample=3 (bicubic)",
        ) from error
    if resized.dtype == image.dtype or image.dtype.is_floating_point:
        return resized.to(image.dtype)
    limits = torch.iinfo(image.dtype)  # bicubic and Lanczos overshoot at edges
    return resized.round().clamp(limits.min, limits.max).to(image.dtype)


def _resizes_in_own_dtype(image: Tensor, mode: str) -> bool:
    """Whether the published processor resizes this dtype without converting it to float32."""
    if image.dtype != torch.uint8 or mode == "nearest-exact":
        return image.dtype in (torch.uint8, torch.float32, torch.float64)
    # torch's own uint8 kernels are for the CPU; torchvision trusts the bilinear one only where it
    # is vectorised. Its result can differ by one grey level from rounding float32.
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    vectorised = vectorised or platform.machine() in ("aarch64", "arm64")
    return image.device.type == "cpu" and (mode != "bilinear" or vectorised)


def _pad_or_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Pad [C, H, W] with zeros or crop it, centred; an odd row or column at the bottom or right."""
    rows, columns = height - image.shape[1], width - image.shape[2]
    top, left = int(rows / 2), int(columns / 2)
    return F.pad(image, (left, columns - left, top, rows - top))


def _normalize(image: Tensor, factor: float, mean: Any, std: Any) -> Tensor:
    """Rescale and normalise [C, H, W]; one channel with each mean in turn, which makes it RGB."""
    centre, spread = (
        torch.tensor(value, dtype=torch.float32, device=image.device).reshape(-1, 1, 1)
        for value in (mean, std)
    )
    if len(image) != 1 and not {len(centre), len(spread)} <= {1, len(image)}:
        raise ImageryError(
            f"{max(len(centre), len(spread))} channels, one for each mean and standard deviation",
            f"{len(image)} channels in an image of {image.shape[1]} x {image.shape[2]} px",
            "select red, green and blue, pass input_data_format, "
            "or for an alpha channel do_convert_rgb=True",
        )
    # Both in one pass over the pixels: mean and std in units of the image's values.
    scale = 1.0 / factor
    return image.to(torch.float32).sub(centre * scale).div_(spread * scale)


def _collate(tensors: list[Tensor], return_tensors: str | None) -> Any:
    """Leave the images of a batch in a list, or stack them [B, ...]."""
    if return_tensors is None:
        return tensors
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ImageryError(
            "images that have one size after processing, to stack them",
            f"sizes {', '.join(str(shape) for shape in shapes)}",
            "pass return_tensors=None for a list, or give them one size with "
            "do_center_crop=True, crop_size=(height, width)",
        )
    batch = torch.stack(tensors)
    return batch if return_tensors == "pt" else batch.numpy(force=True)


def _names() -> list[str]:
    return [item.name for item in fields(CHMv2ImageProcessor)]


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    unknown = [name for name in settings if name not in {*_names(), *_WITHOUT_EFFECT}]
    if unknown:
        raise ConfigError(
            f"settings named {', '.join(sorted(_names()))}",
            ", ".join(repr(name) for name in unknown),
            "leave it out or correct the name",
        )


def _validated(name: str, value: Any) -> Any:
    """One setting in the form that the steps use."""
    if value is None:
        return None
    if name == "device":
        return _as_device(value)
    wanted, example = _WANTED.get(name, ("True or False", "True"))
    if name in _CHOICES:
        wanted = f"one of {', '.join(map(repr, _CHOICES[name]))}"
        example = repr(_CHOICES[name][-1])
    try:
        return _convert(name, value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} as {wanted}", repr(value), f"pass {name}={example}") from None


def _convert(name: str, value: Any) -> Any:
    is_flag = name not in _CHOICES and name not in _WANTED
    if isinstance(value, bool) != is_flag:
        raise TypeError
    if is_flag:
        return value
    if name in _CHOICES:
        return _CHOICES[name][_CHOICES[name].index(value)]  # not an equal member of an enum
    if name in ("size", "crop_size"):
        if isinstance(value, Mapping):
            value = (value.get("height"), value.get("width"))
        height, width = value if isinstance(value, list | tuple) else (value, value)
        return {"height": _as_count(height), "width": _as_count(width)}
    if name in ("size_divisor", "ensure_multiple_of"):
        return _as_count(value)
    least = -_MOST if name == "image_mean" else 1 / _MOST
    if name == "rescale_factor" or isinstance(value, Real):
        return _as_number(value, least)
    values = tuple(_as_number(item, least) for item in value)
    if not values:
        raise ValueError
    return values


def _as_count(value: Any) -> int:
    if isinstance(value, bool) or not 1 <= operator.index(value) <= _MOST:
        raise ValueError
    return operator.index(value)


def _as_number(value: Any, least: float) -> float:
    number = float(value) if isinstance(value, Real) else math.nan
    if isinstance(value, bool) or not least <= number <= _MOST:
        raise ValueError
    return number


def _as_device(value: Any) -> str:
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise DeviceError(
            "a device of this machine", repr(value), "pass device='cpu', or leave device out"
        ) from error
    return str(device)


def _find_file(name: str | os.PathLike[str], revision: str | None, hub: HubOptions) -> Path:
    if isinstance(name, str | os.PathLike) and os.path.isfile(os.path.expanduser(name)):
        return Path(name).expanduser()
    return find_folder(name, revision, [PREPROCESSOR_NAME], **hub)[0] / PREPROCESSOR_NAME
