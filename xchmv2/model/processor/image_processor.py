"""The image processor itself: one image after another through the steps that are switched on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from xchmv2.errors import ConfigError, ImageryError
from xchmv2.model.processor.batch import BatchFeature, collate
from xchmv2.model.processor.operations import (
    center_crop,
    pad_to_multiple,
    reduce_labels,
    rescale_and_normalize,
    resize,
    resized_shape,
)
from xchmv2.model.processor.reading import iter_images, read_image
from xchmv2.model.processor.settings import ProcessorSettings


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
