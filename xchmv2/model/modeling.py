"""CHMv2 as one module: imagery in, canopy height in metres out.

References
----------
CHMv2, arXiv 2603.06382.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar, Unpack

import torch
from torch import Tensor, nn

from xchmv2.errors import ConfigError, DeviceError, ImageryError
from xchmv2.model.backbone import Attention, DINOv3ViTBackbone, Embeddings, LayerScale
from xchmv2.model.checkpoint import (
    load_weights,
    resolve_checkpoint,
    save_checkpoint,
    validate_weights,
    weights_dtype,
)
from xchmv2.model.config import CHMv2Config, published_settings
from xchmv2.model.files import MODEL, HubOptions
from xchmv2.model.head import DPTHead
from xchmv2.model.height import FeaturesToHeight
from xchmv2.model.loss import chmv2_loss

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")
}
_WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Attention, Embeddings)


class CHMv2ForDepthEstimation(nn.Module):
    """Canopy height from RGB imagery: DINOv3 backbone, dense prediction head, bins of height.

    Parameters
    ----------
    config : CHMv2Config, optional
        Ours or that of transformers; the published architecture by default. Weights are random
        until they are loaded.

    References
    ----------
    CHMv2, arXiv 2603.06382; DINOv3, arXiv 2508.10104; DPT, arXiv 2103.13413.

    Examples
    --------
    >>> model = CHMv2ForDepthEstimation.from_pretrained("chmv2", device_map="auto")
    ... # doctest: +SKIP
    >>> height = model(pixel_values).predicted_depth  # doctest: +SKIP
    """

    def __init__(self, config: CHMv2Config | None = None) -> None:
        super().__init__()
        self.config = _as_config(config)
        self.backbone = DINOv3ViTBackbone(self.config.backbone)
        self.head = DPTHead(self.config)
        self.features_to_depth = FeaturesToHeight(self.config)
        _initialise(self.backbone, self.config.backbone.initializer_range)
        _initialise(self.head, self.config.initializer_range)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.conv_depth.last.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.head.conv_depth.last.weight.dtype

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> DepthEstimatorOutput | tuple[Any, ...]:
        """Estimate canopy height.

        Parameters
        ----------
        pixel_values : Tensor [B, bands, H, W]
            Normalised imagery, as `CHMv2ImageProcessor` makes it.
        labels : Tensor [B, H', W'], optional
            Reference heights [m], NaN where there is none; asks for the training loss, as it is
            at the end of the curriculum.
        output_hidden_states, output_attentions : bool, optional
            Whether to return them too.
        return_dict : bool, optional
            ``False`` for a plain tuple.

        Returns
        -------
        DepthEstimatorOutput
            With ``predicted_depth`` [B, H', W'] in metres. H' and W' equal H and W for multiples
            of 32; other sizes come out as the head's convolutions round them.

        Raises
        ------
        ImageryError
            If a shape or data type does not fit.
        """
        self.validate_pixels(pixel_values)
        out = self.backbone(
            pixel_values,
            hidden_states=bool(output_hidden_states),
            attentions=bool(output_attentions),
        )
        height, _ = self.to_height(self.head(out.stages, out.grid))
        output = DepthEstimatorOutput(
            loss=None if labels is None else chmv2_loss(height, labels),
            predicted_depth=height,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def height(self, pixel_values: Tensor, *, spread: bool = False) -> tuple[Tensor, Tensor | None]:
        """Estimate canopy height in less memory than `forward`.

        Parameters
        ----------
        pixel_values : Tensor [B, bands, H, W]
            Normalised imagery.
        spread : bool
            Whether to return the standard deviation of each pixel's distribution over the bins.

        Returns
        -------
        height : Tensor [B, H', W'], float32
            Canopy height [m].
        spread : Tensor [B, H', W'], float32, or None
            Standard deviation [m].

        Raises
        ------
        ImageryError
            If the shape or data type does not fit.
        ConfigError
            If the spread is asked for and the model has no bins.
        """
        self.validate_pixels(pixel_values)
        out = self.backbone(pixel_values)
        parts = [self.to_height(x, spread=spread) for x in self.head.strips(out.stages, out.grid)]
        batch = len(pixel_values)
        deviations = [deviation for _, deviation in parts if deviation is not None]
        height = _join([height for height, _ in parts], batch)
        return height, _join(deviations, batch) if deviations else None

    def features(self, pixel_values: Tensor) -> Tensor:
        """Run the network up to its last stage.

        Parameters
        ----------
        pixel_values : Tensor [B, bands, H, W]
            Normalised imagery.

        Returns
        -------
        Tensor [B, head_hidden_size, H', W']
            Input of `to_height`.

        Raises
        ------
        ImageryError
            If the shape or data type does not fit.
        """
        self.validate_pixels(pixel_values)
        out = self.backbone(pixel_values)
        features: Tensor = self.head(out.stages, out.grid)
        return features

    def to_height(self, features: Tensor, *, spread: bool = False) -> tuple[Tensor, Tensor | None]:
        """Make heights [m] and, if asked for, spreads [m] of features; see `height`."""
        last = self.head.conv_depth.last
        height, deviation = self.features_to_depth(features, last, spread=spread)
        return height, deviation

    def validate_pixels(self, pixel_values: Tensor) -> None:
        """Check that imagery has four dimensions, the right bands, and room for a patch.

        Raises
        ------
        ImageryError
            If one of them is missing.
        """
        bands, patch = self.config.backbone.num_channels, self.config.backbone.patch_shape
        wanted = f"pixel_values as floating point [batch, {bands}, height, width]"
        if not (isinstance(pixel_values, Tensor) and pixel_values.is_floating_point()):
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ImageryError(wanted, f"{kind}", "prepare images with CHMv2ImageProcessor")
        shape = list(pixel_values.shape)
        if len(shape) != 4 or shape[1] != bands:
            raise ImageryError(
                wanted, f"shape {shape}", "stack images along a first dimension, bands second"
            )
        if shape[2] < patch[0] or shape[3] < patch[1]:
            raise ImageryError(
                f"at least one patch of {patch[0]} x {patch[1]} px",
                f"shape {shape}",
                "use larger images, or pad them",
            )

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str] = MODEL,
        *,
        revision: str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Load a checkpoint, ready for inference.

        Parameters
        ----------
        id_or_folder : str or path
            Hub id, or folder with ``config.json`` and ``model.safetensors``.
        revision : str, optional
            Branch, tag or commit on the hub.
        device_map : "auto", device or None
            "auto" is CUDA where there is one; ``None`` is the CPU.
        dtype : torch.dtype, str or None
            Data type of the weights in memory: float32 by default, "auto" for the file's.
        torch_dtype : torch.dtype, str or None
            Older name of `dtype`.
        **hub
            Where the files are: ``token`` (str or bool), ``cache_dir`` (str or path) and
            ``local_files_only`` (bool), as in ``huggingface_hub``; and ``subfolder`` (str), a
            folder inside the repository or inside a local folder.

        Returns
        -------
        CHMv2ForDepthEstimation
            In evaluation mode.

        Raises
        ------
        CheckpointError
            If files are missing or damaged, or tensors do not fit the configuration.
        ConfigError
            If ``config.json`` or an argument holds a value that is not allowed.
        DeviceError
            If there is no such device.

        Warns
        -----
        UserWarning
            If the weights lack the key biases that ``config.json`` asks for: they are zeros then.
        """
        device = _find_device(device_map)
        dtypes = {_as_dtype(given) for given in (dtype, torch_dtype) if given is not None}
        if len(dtypes) > 1:
            raise ConfigError(
                "one data type", f"dtype={dtype!r}, torch_dtype={torch_dtype!r}", "pass dtype alone"
            )
        checkpoint = resolve_checkpoint(id_or_folder, revision, **hub)
        # Weights made in inference mode could not be trained.
        with torch.inference_mode(False):
            with torch.device("meta"):
                model = cls(checkpoint.config)  # shapes alone: random weights would be overwritten
            validate_weights(model, checkpoint.folder)
            to = dtypes.pop() if dtypes else torch.float32
            model = model.to(to or weights_dtype(checkpoint.folder)).to_empty(device=device)
            load_weights(model, checkpoint)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``, which transformers loads too."""
        save_checkpoint(self, folder)


def _join(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Join parts [b, rows, W], image by image from top to bottom, to [B, H, W]."""
    if len(parts) == 1:
        return parts[0]  # all images at once
    return torch.cat(tuple(parts), dim=1).view(batch, -1, parts[0].shape[-1])


def _find_device(device: str | int | torch.device | Mapping[str, Any] | None) -> torch.device:
    """Turn ``device_map`` into one device; refuse it if torch or this machine has none such."""
    if isinstance(device, Mapping) and set(device) == {""}:
        device = device[""]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device("cpu" if device is None else device)  # type: ignore[arg-type]
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            "device_map as 'auto' or a device of this machine, such as 'cpu' or 'cuda:0'",
            f"device_map={device!r} with {torch.cuda.device_count()} CUDA devices",
            "pass device_map='auto'",
        ) from error
    return found


def _as_config(config: CHMv2Config | None) -> CHMv2Config:
    if config is None:
        return CHMv2Config()
    if isinstance(config, CHMv2Config):
        return config
    found = published_settings(config)
    if found is None:
        raise ConfigError(
            "a CHMv2Config",
            type(config).__name__,
            "pass CHMv2Config(...), or CHMv2Config.from_dict(...)",
        )
    return CHMv2Config.from_dict(found)


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Name a data type; None is that of the file."""
    if dtype == "auto":
        return None
    found = _DTYPES.get(str(dtype).split(".")[-1])
    if found is None:
        raise ConfigError(
            f"dtype as 'auto' or one of {', '.join(_DTYPES)}", repr(dtype), "pass dtype='float32'"
        )
    return found


@torch.no_grad()
def _initialise(module: nn.Module, std: float) -> None:
    """Set initial weights as published: truncated normal, and zero biases."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, nn.LayerNorm) or name == "mask_token" or name.endswith("bias"):
                nn.init.constant_(parameter, float(name == "weight"))
            elif isinstance(part, LayerScale):
                nn.init.constant_(parameter, part.initial)
            elif isinstance(part, _WEIGHTED):
                nn.init.trunc_normal_(parameter, std=std)


@dataclass(eq=False)
class DepthEstimatorOutput(Mapping[str, Any]):
    """Output of the model, by attribute, by name or by position among what is not ``None``.

    Attributes
    ----------
    loss : Tensor or None
        Training loss.
    predicted_depth : Tensor [B, H, W], float32
        Canopy height [m].
    hidden_states : tuple of Tensor [B, N, C] or None
        Embedding and output of every block.
    attentions : tuple of Tensor [B, heads, N, N] or None
        Attention weights of every block.
    """

    loss: Tensor | None = None
    predicted_depth: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def to_tuple(self) -> tuple[Any, ...]:
        """Return what is not ``None``, in order."""
        return tuple(self._present().values())

    def _present(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


_Model = TypeVar("_Model", bound=nn.Module)

# What autocast would convert the parameters of, each time: 337 million for the published model.
_CONVERTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Attention)


def convert_weights(model: _Model, dtype: torch.dtype) -> _Model:
    """Copy a model for inference, with the weights of its matrix products in another data type.

    That is the precision of the autocast that the copy will run under. Norms, scales and tokens
    keep their data type, so that under autocast its results equal those of the model to the bit.
    """
    # Parameters in the memo are not copied: the converted weights are the only new ones.
    memo: dict[int, object] = {}
    for part in model.modules():
        if isinstance(part, _CONVERTED):
            for parameter in part.parameters(recurse=False):
                converted = parameter.detach().to(dtype)
                memo[id(parameter)] = nn.Parameter(converted, requires_grad=False)
    return copy.deepcopy(model, memo)
