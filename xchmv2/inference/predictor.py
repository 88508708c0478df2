"""One window of imagery in, the weighted sums of its tiles out, on one device."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from xchmv2.errors import ConfigError, DeviceError
from xchmv2.inference.batches import resolve_batch
from xchmv2.inference.blending import Accumulator, Layer
from xchmv2.inference.compiling import CompiledFeatures
from xchmv2.inference.speed import Stopwatch
from xchmv2.inference.threads import use_forward_threads
from xchmv2.inference.transfers import Fetch, Transfers
from xchmv2.model.modeling import CHMv2ForDepthEstimation
from xchmv2.model.precision import convert_weights
from xchmv2.tiling import FloatArray, TileRun

#: One tile along both axes: its pixels in the group's extent and its blending weights.
Tile = tuple[tuple[slice, FloatArray], tuple[slice, FloatArray]]

_count_lock = threading.Lock()
_tiles_forwarded = 0
_device_locks: dict[torch.device, threading.Lock] = {}


def tiles_forwarded() -> int:
    """Count the tiles this process has put through a model since it started.

    Returns
    -------
    int
        Tiles forwarded; take the difference of two calls to count those of one computation.
    """
    return _tiles_forwarded


@dataclass(frozen=True)
class Scaling:
    """The values that stand for black and for full brightness, per band.

    Parameters
    ----------
    low, high : tuple of float
        One value for each of red, green and blue; values outside are clipped.
    """

    low: tuple[float, float, float] = (0.0, 0.0, 0.0)
    high: tuple[float, float, float] = (255.0, 255.0, 255.0)


class Predictor:
    """A model on a device, ready for windows.

    Parameters
    ----------
    model : CHMv2ForDepthEstimation
        The model; it is moved to the device. For bfloat16 it is copied, with its weights in
        bfloat16.
    device : str
        A torch device.
    dtype : {"float32", "bfloat16"}
        Arithmetic of the network. Logits to height is always float32.
    mean, std : tuple of float
        Normalisation of red, green and blue in the range 0 to 1.
    compile : bool, default False
        Whether the network is compiled. Batches then always have one size, the last of a window
        filled up, so that it is compiled once for a size of tile.
    """

    def __init__(
        self,
        model: CHMv2ForDepthEstimation,
        *,
        device: str,
        dtype: str,
        mean: Sequence[float],
        std: Sequence[float],
        compile: bool = False,
    ) -> None:
        self._device = torch.device(device)
        self._autocast = torch.bfloat16 if dtype == "bfloat16" else None
        model = model.to(self._device).eval()
        self.model = convert_weights(model, self._autocast) if self._autocast else model
        self._mean = self._per_band(mean)
        self._std = self._per_band(std)
        self._compiled = CompiledFeatures(self.model.features) if compile else None
        self._transfers = Transfers(self._device)
        # One lock a device, whatever the model: two forwards at once would share its memory.
        self._lock = _device_locks.setdefault(self._device, threading.Lock())
        self._batch_limit: float = math.inf
        self._warned = False
        self._watches: dict[tuple[int, int], Stopwatch] = {}

    def seconds_per_tile(self, window: tuple[int, int]) -> float | None:
        """Tell what a tile took here so far, batching and blending included.

        Parameters
        ----------
        window : tuple of int
            Height and width of the tile [px].

        Returns
        -------
        float or None
            Time a tile [s], of all threads together; None where no such tile was forwarded yet.
        """
        watch = self._watches.get(window)
        return None if watch is None else watch.seconds_per_tile

    def accumulate(
        self,
        image: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        rows: TileRun,
        cols: TileRun,
        *,
        scaling: Scaling,
        layers: Sequence[Layer],
        batch_size: int | Literal["auto"] = "auto",
    ) -> dict[str, FloatArray] | None:
        """Forward the tiles of a group that hold a valid pixel and add them up.

        Parameters
        ----------
        image : numpy.ndarray
            (3, H, W) red, green and blue over the group's extent, in the source's values.
        valid : numpy.ndarray of bool
            (H, W) pixels that hold imagery.
        rows, cols : TileRun
            The group; H and W are the lengths of their extents.
        scaling : Scaling
            Value range of the source.
        layers : sequence of str
            Layers that will be derived from the sums.
        batch_size : int or "auto"
            Tiles per forward.

        Returns
        -------
        dict of numpy.ndarray or None
            Weighted sums over the extent, (H, W) float32 [m], NaN where invalid; None if no
            pixel is valid.
        """
        tiles = [(y, x) for y, x in product(rows.tiles, cols.tiles) if valid[y[0], x[0]].any()]
        if not tiles:
            return None
        total = Accumulator((valid.shape[0], valid.shape[1]), layers)
        window = _Window(image, valid, (rows.axis.padding, cols.axis.padding), scaling)
        spread = "bin_spread" in layers
        watch = self._watches.setdefault((rows.axis.window, cols.axis.window), Stopwatch())
        with watch.running(len(tiles)):
            for (y, x), height, sd in self._forward_all(window, tiles, batch_size, spread=spread):
                total.add((y[0], x[0]), y[1][:, None] * x[1][None, :], height, sd)
        return total.sums(valid)

    def _forward_all(
        self,
        window: _Window,
        tiles: Sequence[Tile],
        batch_size: int | Literal["auto"],
        *,
        spread: bool,
    ) -> Iterator[tuple[Tile, FloatArray, FloatArray | None]]:
        """Yield each tile with its heights; halve the batch when the device is out of memory.

        A batch is on its way while the one before it is taken in.
        """
        done, flying = 0, None
        while done < len(tiles):
            size = min(self._batch_limit, self._resolve_batch(batch_size, window, tiles[0]))
            batch = tiles[done : done + int(size)]
            try:
                launched = self._launch(window, batch, int(size), spread=spread)
            except torch.OutOfMemoryError as error:
                self._halve_batch(len(batch), error)
                continue
            done += len(batch)
            if flying is not None:
                yield from flying.land()
            flying = launched
        if flying is not None:
            yield from flying.land()

    def _launch(
        self, window: _Window, batch: Sequence[Tile], size: int, *, spread: bool
    ) -> _Flight:
        """Begin to forward one batch; compiled, it is filled up to its size by its last tile."""
        filling = 0 if self._compiled is None else size - len(batch)
        pixels, valid = window.cut([*batch, *[batch[-1]] * filling])
        # uint8 crosses to the device as it is: a quarter of the bytes.
        host = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)
        sent = self._transfers.send(host), self._transfers.send(~valid)
        if self._device.type == "cpu":
            use_forward_threads()
        with self._lock, torch.inference_mode():
            self._transfers.await_sent(*sent)
            inputs = self._normalise(*sent, window.scaling)
            with torch.autocast(
                self._device.type, self._autocast, enabled=self._autocast is not None
            ):
                height, sd = self._height(inputs, spread=spread)
            _validate_size(height, inputs)
            heights = self._transfers.fetch(height)
            spreads = None if sd is None else self._transfers.fetch(sd)
        return _Flight(batch, heights, spreads)

    def _height(
        self, inputs: torch.Tensor, *, spread: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._compiled is None:
            return self.model.height(inputs, spread=spread)
        return self.model.to_height(self._compiled(inputs), spread=spread)

    def _normalise(
        self, pixels: torch.Tensor, missing: torch.Tensor, scaling: Scaling
    ) -> torch.Tensor:
        """Scale to 0-1, normalise; invalid pixels become the training mean colour, 0."""
        low, high = self._per_band(scaling.low), self._per_band(scaling.high)
        values = ((pixels.float() - low) / (high - low)).clamp_(0, 1)  # [B, 3, h, w]
        values = (values - self._mean) / self._std
        return values.masked_fill_(missing[:, None], 0.0)

    def _per_band(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device).view(1, 3, 1, 1)

    def _resolve_batch(self, batch_size: int | Literal["auto"], window: _Window, tile: Tile) -> int:
        pixels = (tile[0][1].size + window.padding[0]) * (tile[1][1].size + window.padding[1])
        compiled = self._compiled is not None
        return resolve_batch(batch_size, pixels, self._device, compiled=compiled)

    def _halve_batch(self, failed: int, error: Exception) -> None:
        """Lower the batch limit for good, or give up if one tile is already too many."""
        if failed == 1:
            raise DeviceError(
                f"memory for one tile on {self._device}",
                "not enough even at batch_size=1",
                "free the device or take a smaller tile: .predict(..., tile=256)",
            ) from error
        self._batch_limit = min(self._batch_limit, failed // 2)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._device} ran out of memory at {failed} tiles a batch; going on with "
                f"{failed // 2}. Pass batch_size= to start there.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Window:
    """The imagery of a group's extent, from which tiles are cut."""

    image: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    padding: tuple[int, int]
    scaling: Scaling

    def cut(self, batch: Sequence[Tile]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return the tiles' pixels (B, 3, h, w) and valid masks (B, h, w), padded."""
        pixels = np.stack([self.image[:, y[0], x[0]] for y, x in batch])
        valid = np.stack([self.valid[y[0], x[0]] for y, x in batch])
        if any(self.padding):
            after = [(0, n) for n in self.padding]
            pixels = np.pad(pixels, [(0, 0), (0, 0), *after], mode="reflect")
            valid = np.pad(valid, [(0, 0), *after], mode="reflect")
        return pixels, valid


@dataclass(frozen=True)
class _Flight:
    """A batch that the device computes, or has computed."""

    batch: Sequence[Tile]
    heights: Fetch
    spreads: Fetch | None

    def land(self) -> Iterator[tuple[Tile, FloatArray, FloatArray | None]]:
        """Wait for the batch and yield each tile with its heights and bin spreads [m]."""
        heights = self.heights.result()  # (B, h, w)
        spreads = None if self.spreads is None else self.spreads.result()
        _count(len(self.batch))
        for index, tile in enumerate(self.batch):
            inside = (slice(None, tile[0][1].size), slice(None, tile[1][1].size))
            yield tile, heights[index][inside], None if spreads is None else spreads[index][inside]


def _validate_size(height: torch.Tensor, inputs: torch.Tensor) -> None:
    if height.shape[-2:] != inputs.shape[-2:]:
        raise ConfigError(
            f"heights of the tile's own size, {tuple(inputs.shape[-2:])} px",
            f"{tuple(height.shape[-2:])} px from this model",
            "use a config whose reassemble_factors double from last to first, as (4, 2, 1, 0.5)",
        )


def _count(tiles: int) -> None:
    global _tiles_forwarded
    with _count_lock:
        _tiles_forwarded += tiles
