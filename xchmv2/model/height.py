"""From features to heights: the bins of height, and one fused kernel on CUDA cards."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xchmv2.errors import ConfigError
from xchmv2.model.config import BinsStrategy, CHMv2Config
from xchmv2.model.products import linear

# Targets were divided by this in training; mixlog bins are, and the mixlog norm multiplies back.
TARGET_SCALE = 8.0
# Offset that the published norms add to every weight, after the ReLU.
_OFFSETS = {"linear": 0.1, "chmv2_mixlog": 1e-8, "softmax": 0.0, "sigmoid": 0.0}
# Smallest height and sum of weights of the mixlog norm.
_TINY = 1e-12
# Logits held at once: 2 million fill 8 MB, about a CPU's cache; a GPU needs larger batches.
_CPU_LOGITS, _GPU_LOGITS = 2**21, 2**26
# Pixels that one program reduces, with all their logits in its registers, and channels that it
# multiplies at a time.
_ROWS, _STEP = 64, 32
_MOST_BINS, _MOST_CHANNELS = 256, 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"linear": "relu", "chmv2_mixlog": "relu", "softmax": "softmax", "sigmoid": "sigmoid"}
_broken: set[str] = set()


class FeaturesToHeight(nn.Module):
    """Last convolution and bins: features to height, and optionally the spread of the bins.

    It has no parameters of its own; the convolution belongs to the head.
    """

    def __init__(self, config: CHMv2Config) -> None:
        super().__init__()
        self.config = config
        self.offset = _OFFSETS[config.norm_strategy]
        self.mixlog = config.norm_strategy == "chmv2_mixlog"

    def forward(
        self, features: Tensor, convolution: nn.Conv2d, *, spread: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Make logits and reduce them to height, some pixels at a time.

        `features` [B, C, H, W] are of any data type; `convolution` is the 1x1 convolution from them
        to logits. Returns heights [m], and the standard deviation of the distribution over the bins
        [m] if the `spread` is asked for, both [B, H, W] float32. A ConfigError refuses the spread
        of a model with one output channel.
        """
        if spread:
            validate_spread(self.config)
        batch, channels, height, width = features.shape
        pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)  # [B * H * W, C]
        weight = convolution.weight.flatten(1)  # [bins, C, 1, 1] -> [bins, C]
        found = self._fused(pixels, weight, convolution.bias, spread=spread)
        heights, spreads = found or self._plain(pixels, weight, convolution.bias, spread=spread)
        shape = (batch, height, width)
        return heights.view(shape), spreads.view(shape) if spread else None

    def _plain(
        self, pixels: Tensor, weight: Tensor, bias: Tensor | None, *, spread: bool
    ) -> tuple[Tensor, Tensor]:
        """Reduce features [P, C], a few megabytes of logits at a time."""
        limit = _CPU_LOGITS if pixels.device.type == "cpu" else _GPU_LOGITS
        step = max(1, limit // len(weight))
        parts = [
            self.reduce(linear(pixels[i : i + step], weight, bias), spread=spread)
            for i in range(0, max(1, len(pixels)), step)
        ]
        heights, spreads = (torch.cat(column) for column in zip(*parts, strict=True))
        return heights, spreads

    def _fused(
        self, pixels: Tensor, weight: Tensor, bias: Tensor | None, *, spread: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Reduce features [P, C] in one kernel, or return None where that cannot run."""
        if not pixels.is_cuda:
            return None
        if torch.is_autocast_enabled("cuda"):
            pixels = pixels.to(torch.get_autocast_dtype("cuda"))
        weight = weight.to(pixels.dtype)
        if not _can_fuse(pixels, weight):
            return None
        bins = self._bins(len(weight), pixels.device)
        return _try_reduce(pixels, weight, bias, bins, self.reduction, spread=spread)

    @property
    def reduction(self) -> _Reduction:
        """How logits become a height, as the fused kernel takes it."""
        if self.mixlog:
            return _Reduction("chmv2_mixlog", self.offset, _TINY, TARGET_SCALE)
        return _Reduction(self.config.norm_strategy, self.offset, 0.0, 1.0)

    def reduce(self, logits: Tensor, *, spread: bool = False) -> tuple[Tensor, Tensor]:
        """Reduce logits [P, bins] of any data type to height [P] and spread [P] (or empty)."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if logits.shape[1] == 1:
                height = F.relu(logits[:, 0]) + self.config.min_depth
                return height, height.new_empty(0)
            return self._from_bins(logits, spread=spread)

    def _from_bins(self, logits: Tensor, *, spread: bool) -> tuple[Tensor, Tensor]:
        bins = self._bins(logits.shape[1], logits.device)  # [bins]
        weights = _bin_weights(logits, self.config.norm_strategy)  # [P, bins]
        # A matrix-vector product and a sum, because a matrix product may run in TF32.
        total = weights.sum(dim=1) + self.offset * len(bins)
        moment = torch.mv(weights, bins) + self.offset * bins.sum()
        if self.mixlog:
            total = torch.nan_to_num(total, nan=1.0, posinf=1.0).clamp_min(_TINY)
        mean, scale = moment / total, TARGET_SCALE if self.mixlog else 1.0
        height = scale * (mean.clamp_min(_TINY) if self.mixlog else mean)
        if not spread:
            return height, height.new_empty(0)
        # Squares of differences, not a difference of squares: exact, and never negative.
        squares = (bins - mean.unsqueeze(1)).square_()  # [P, bins]
        variance = (squares.mul_(weights + self.offset)).sum(dim=1) / total
        return height, scale * variance.sqrt()

    def _bins(self, count: int, device: torch.device) -> Tensor:
        c = self.config
        bins = _height_bins(c.bins_strategy, count, c.min_depth, c.max_depth, device)
        return bins.clamp_min(_TINY) if self.mixlog else bins


def validate_spread(config: CHMv2Config) -> None:
    """Check that the model has bins, without which there is no spread; else a ConfigError."""
    if config.number_output_channels == 1:
        raise ConfigError(
            "a model with bins for the layer 'bin_spread'",
            "number_output_channels=1 (plain regression)",
            "leave 'bin_spread' out of layers",
        )


@functools.lru_cache(maxsize=32)
def _height_bins(
    strategy: BinsStrategy, count: int, low: float, high: float, device: torch.device
) -> Tensor:
    """Centres of the bins [count], ascending [m], or [m / 8] for ``"chmv2_mixlog"``.

    Mixlog blends evenly spaced logarithms into even spacing, over a range of ``high / 8`` (CHMv2,
    arXiv 2603.06382, section 2.5).
    """
    # Outside the caller's inference mode: the cached tensor may be trained with later.
    with torch.inference_mode(False), torch.no_grad():
        return _make_bins(strategy, count, low, high).to(device)


def _make_bins(strategy: BinsStrategy, count: int, low: float, high: float) -> Tensor:
    top = high / TARGET_SCALE if strategy == "chmv2_mixlog" else high
    linear = _even(low, top, count)
    if strategy == "linear":
        return linear
    # The logarithms of the ends are rounded to float32, as they were in training.
    ends = torch.tensor([low, top], dtype=torch.float32, device="cpu").log()
    log = _even(ends[0].item(), ends[1].item(), count).exp()
    return log if strategy == "log" else log.lerp(linear, _even(0.0, 1.0, count))


def _even(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float32, device="cpu")


def _bin_weights(logits: Tensor, norm: str) -> Tensor:
    """Weights of the bins [..., bins] up to a factor, without the norm's offset; not negative."""
    if norm in ("linear", "chmv2_mixlog"):
        return F.relu(logits)
    if norm == "sigmoid":
        # Normalised sigmoids are the softmax of their logarithms, which cannot sum to 0.
        logits = F.logsigmoid(logits)
    return torch.softmax(logits, dim=-1)


@dataclass(frozen=True)
class _Reduction:
    """How logits become a height.

    `offset` is added to every weight, `tiny` is the smallest sum of weights and smallest mean, and
    `scale` are metres per unit of the bins.
    """

    norm: str
    offset: float
    tiny: float
    scale: float


def _can_fuse(pixels: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernel can take features [P, C] and weights [bins, C].

    Not where gradients are needed, without CUDA or triton, nor for sizes that are no powers of two.
    """
    return (
        pixels.is_cuda
        and not torch.is_grad_enabled()
        and len(pixels) > 0
        and _fits(pixels.dtype, *weight.shape)
        and _has_triton()
        and str(pixels.device) not in _broken
    )


def _fits(dtype: torch.dtype, bins: int, channels: int) -> bool:
    """Tell whether the kernel is written for a data type and for sizes."""
    return (
        dtype in _DTYPES
        and _is_power(bins, 16, _MOST_BINS)
        and _is_power(channels, 16, _MOST_CHANNELS)
    )


def _is_power(size: int, least: int, most: int) -> bool:
    return least <= size <= most and size & (size - 1) == 0


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _try_reduce(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bins: Tensor,
    how: _Reduction,
    *,
    spread: bool,
) -> tuple[Tensor, Tensor] | None:
    """Run the kernel; if it fails, warn once and return None from then on."""
    try:
        with torch.cuda.device(pixels.device):
            return _reduce_features(pixels, weight, bias, bins, how, spread=spread)
    except torch.OutOfMemoryError:
        raise  # smaller batches help
    except Exception as error:  # a compiler, a driver or a card that this was not tried on
        _broken.add(str(pixels.device))
        warnings.warn(
            f"the fused kernel does not run on {pixels.device} ({type(error).__name__}: {error}); "
            "heights are computed without it, more slowly. Another version of triton may help.",
            stacklevel=2,
        )
        return None


def _reduce_features(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bins: Tensor,
    how: _Reduction,
    *,
    spread: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on features [P, C], in whose data type the weights [bins, C] are."""
    from xchmv2.model.kernels import height_kernel

    count, (size, channels) = len(pixels), weight.shape
    height = torch.empty(count, dtype=torch.float32, device=pixels.device)
    deviation = torch.empty(count if spread else 0, dtype=torch.float32, device=pixels.device)
    height_kernel[(-(-count // _ROWS),)](
        pixels.contiguous(),
        weight.contiguous(),
        torch.zeros_like(bins) if bias is None else bias.float(),
        bins,
        height,
        deviation,
        count,
        how.offset,
        how.tiny,
        how.scale,
        BINS=size,
        CHANNELS=channels,
        STEP=min(_STEP, channels),
        ROWS=_ROWS,
        NORM=_KINDS[how.norm],
        SPREAD=spread,
        num_warps=8,
    )
    return height, deviation
