"""Inference on one device: tiles in batches, to the device and back, summed over a window."""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xchmv2.errors import CHMv2Error, ConfigError, DeviceError
from xchmv2.inference.blending import Accumulator, Layer
from xchmv2.inference.workers import use_forward_threads
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.model.files import IMAGE_MEAN, IMAGE_STD
from xchmv2.model.modeling import convert_weights
from xchmv2.raster import FloatArray, TileAxis, TileRun, tile_runs

#: One tile along both axes: its pixels in the group's extent and its blending weights.
_Tile = tuple[tuple[slice, FloatArray], tuple[slice, FloatArray]]

_count_lock = threading.Lock()
_tiles_forwarded = _tiles_skipped = _stops = 0
_device_locks: dict[torch.device, threading.Lock] = {}


def tiles_forwarded() -> int:
    """Count the tiles this process has put through a model since it started."""
    return _tiles_forwarded


def tiles_done() -> int:
    """Count the tiles that this process has forwarded, or skipped as they hold no valid pixel."""
    return _tiles_forwarded + _tiles_skipped


def stop_forwards() -> None:
    """End the groups in work in all threads of this process, each after its batch of tiles."""
    global _stops
    _stops += 1


def skip_tiles(tiles: int) -> None:
    """Count tiles that hold no valid pixel as done."""
    global _tiles_skipped
    with _count_lock:
        _tiles_skipped += tiles


@dataclass(frozen=True)
class Scaling:
    """The values of red, green and blue that stand for black and for full brightness.

    Values outside are clipped.
    """

    low: tuple[float, float, float] = (0.0, 0.0, 0.0)
    high: tuple[float, float, float] = (255.0, 255.0, 255.0)


class Predictor:
    """A model on a device, ready for windows.

    The model is moved to the `device`; for a `dtype` of bfloat16 it is copied, with its weights in
    bfloat16. Logits to height is always float32. `mean` and `std` normalise red, green and blue in
    the range 0 to 1; a ConfigError refuses those that are not finite, and a std of 0. If the
    network is to `compile`, all batches have one size, the last of a window is filled up, so that
    it is compiled once for each tile size.
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
        _validate_normalisation(mean, std)
        self._mean = self._per_band(mean)
        self._std = self._per_band(std)
        self._compiled = _CompiledFeatures(self.model.features) if compile else None
        self._transfers = _Transfers(self._device)
        # One lock per device for all models: two forwards at once would share its memory.
        self._lock = _device_locks.setdefault(self._device, threading.Lock())
        self._batch_limit: float = math.inf
        self._warned = False
        self._watches: dict[tuple[int, int], _Stopwatch] = {}

    def seconds_per_tile(self, window: tuple[int, int]) -> float | None:
        """Return the mean time of a tile so far [s], of all threads together, with blending.

        `window` is (height, width) of the tile [px]; None before such a tile was forwarded.
        """
        watch = self._watches.get(window)
        return None if watch is None else watch.seconds_per_tile

    def time_tiles(
        self, window: tuple[int, int], batch_size: int | Literal["auto"], layers: Sequence[Layer]
    ) -> None:
        """Forward two batches of black tiles, so that the time of a tile is known.

        `window` is (height, width) of a tile [px], multiples of 32; a batch is of 64 tiles at most.
        """
        height, width = window
        compiled = self._compiled is not None
        tiles = resolve_batch(batch_size, height * width, self._device, compiled=compiled)
        length = min(tiles, _LARGEST_BATCH) * width
        (rows,) = tile_runs(TileAxis(height, height, 0), height)
        (cols,) = tile_runs(TileAxis(length, width, 0), length)
        image, valid = np.zeros((3, height, length), np.uint8), np.ones((height, length), bool)
        for _ in range(2):  # the first sets up the device, and no longer counts then
            self.accumulate(
                image, valid, rows, cols, scaling=Scaling(), layers=layers, batch_size=batch_size
            )

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

        `image` (3, H, W) holds red, green and blue over the extent of the group `rows`, `cols`, in
        the source's values, which `scaling` tells; `valid` (H, W) the pixels of imagery. Returns
        the weighted sums over the extent that `layers` are derived from, (H, W) float32 [m], NaN
        where invalid; None if no pixel is valid. A CHMv2Error refuses a height or spread that is
        not finite at a valid pixel.
        """
        tiles = [(y, x) for y, x in product(rows.tiles, cols.tiles) if valid[y[0], x[0]].any()]
        skip_tiles(len(rows.tiles) * len(cols.tiles) - len(tiles))
        if not tiles:
            return None
        total = Accumulator((valid.shape[0], valid.shape[1]), layers)
        window = _Window(image, valid, (rows.axis.padding, cols.axis.padding), scaling)
        spread = "bin_spread" in layers
        watch = self._watches.setdefault((rows.axis.window, cols.axis.window), _Stopwatch())
        with watch.running(len(tiles)):
            for (y, x), height, sd in self._forward_all(window, tiles, batch_size, spread=spread):
                where, first = (y[0], x[0]), (rows.start + y[0].start, cols.start + x[0].start)
                height = self._finite(height, valid[where], first)
                sd = None if sd is None else self._finite(sd, valid[where], first)
                total.add(where, y[1][:, None] * x[1][None, :], height, sd)
        return total.sums(valid)

    def _finite(
        self, values: FloatArray, valid: npt.NDArray[np.bool_], first: tuple[int, int]
    ) -> FloatArray:
        """Return a tile's heights or spreads, 0 where invalid pixels have none that is finite."""
        if max(values.max(), -values.min()) < _MOST_METRES:  # false for NaN
            return values
        wrong = ~(np.abs(values) < _MOST_METRES)
        count = np.count_nonzero(wrong & valid)
        if not count:
            return np.where(wrong, np.float32(0), values)
        (top, left), (row, col) = first, np.argwhere(wrong & valid)[0]
        fix = "its weights diverged in training: use earlier ones, or fine-tune with a lower lr"
        if self._autocast is not None:
            fix = "compute in float32: .predict(..., dtype='float32')"
        elif self.model.dtype == torch.float16:
            fix = "use weights of float32: .predict(model.float())"
        raise CHMv2Error(
            "a finite height at every valid pixel",
            f"{count} of {np.count_nonzero(valid)} that are not from the model, the first "
            f"{values[row, col]:g} at row {top + row}, column {left + col}, in the tile of rows "
            f"{top} to {top + len(values)}, columns {left} to {left + values.shape[1]}",
            fix,
        )

    def _forward_all(
        self,
        window: _Window,
        tiles: Sequence[_Tile],
        batch_size: int | Literal["auto"],
        *,
        spread: bool,
    ) -> Iterator[tuple[_Tile, FloatArray, FloatArray | None]]:
        """Yield each tile with its heights; halve the batch when the device is out of memory.

        A batch is computed while the one before it is added up.
        """
        done, flying, stops = 0, None, _stops
        while done < len(tiles):
            if _stops != stops:
                raise InterruptedError("the prediction was interrupted")
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
        self, window: _Window, batch: Sequence[_Tile], size: int, *, spread: bool
    ) -> _Flight:
        """Begin to forward one batch; if compiled, its last tile is repeated to fill it up."""
        filling = 0 if self._compiled is None else size - len(batch)
        pixels, valid = window.cut([*batch, *[batch[-1]] * filling])
        # uint8 is copied to the device unchanged: a quarter of the bytes.
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

    def _resolve_batch(
        self, batch_size: int | Literal["auto"], window: _Window, tile: _Tile
    ) -> int:
        pixels = (tile[0][1].size + window.padding[0]) * (tile[1][1].size + window.padding[1])
        compiled = self._compiled is not None
        return resolve_batch(batch_size, pixels, self._device, compiled=compiled)

    def _halve_batch(self, failed: int, error: Exception) -> None:
        """Lower the batch limit permanently, or raise if even one tile does not fit."""
        if failed == 1:
            raise DeviceError(
                f"memory for one tile on {self._device}",
                "too little even at batch_size=1",
                "free the device or use a smaller tile: .predict(..., tile=256)",
            ) from error
        self._batch_limit = min(self._batch_limit, failed // 2)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._device} ran out of memory at {failed} tiles per batch; continuing with "
                f"{failed // 2}. Pass batch_size= to start with that.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Window:
    """The imagery of a group's extent, from which tiles are cut."""

    image: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    padding: tuple[int, int]
    scaling: Scaling

    def cut(self, batch: Sequence[_Tile]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
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
    """A batch that the device is computing or has computed."""

    batch: Sequence[_Tile]
    heights: _Fetch
    spreads: _Fetch | None

    def land(self) -> Iterator[tuple[_Tile, FloatArray, FloatArray | None]]:
        """Wait for the batch and yield each tile with its heights and bin spreads [m]."""
        heights = self.heights.result()  # (B, h, w)
        spreads = None if self.spreads is None else self.spreads.result()
        _count(len(self.batch))
        for index, tile in enumerate(self.batch):
            inside = (slice(None, tile[0][1].size), slice(None, tile[1][1].size))
            yield tile, heights[index][inside], None if spreads is None else spreads[index][inside]


#: The square of a height below this fits in float32 [m].
_MOST_METRES = 1e18


def _validate_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    fits = len(mean) == len(std) == 3 and np.isfinite([*mean, *std]).all() and min(std) > 0
    if not fits:
        raise ConfigError(
            "mean and std as three finite numbers each, those of std above 0",
            f"mean={mean}, std={std}",
            f"pass mean={IMAGE_MEAN}, std={IMAGE_STD}",
        )


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


# On a CPU larger batches gain nothing: a tile of this many pixels keeps it busy.
_CPU_BATCH_PIXELS = 448 * 448
# Upper bound for the head's activations at full resolution in bfloat16, per input pixel.
_GPU_BYTES_PER_PIXEL = 6_000
_MEMORY_SHARE = 0.5
_LARGEST_BATCH = 64
# If compiled, a window's last batch is filled up; eight tiles of 448 px keep a GPU busy.
_COMPILED_BATCH = 8


def resolve_batch(
    batch_size: int | Literal["auto"], pixels: int, device: torch.device, *, compiled: bool
) -> int:
    """Turn a batch size of "auto" into a number of tiles for a device of this process.

    It fills half of a GPU's free memory, up to the batch that keeps it busy. `pixels` are those of
    one tile, padding included.
    """
    if batch_size != "auto":
        return batch_size
    if device.type != "cuda":
        return max(1, _CPU_BATCH_PIXELS // pixels)
    fitting = int(_MEMORY_SHARE * _free_memory(device) / (pixels * _GPU_BYTES_PER_PIXEL))
    # A power of two: slightly more or less free memory gives the same batches, and the same bits.
    power = 1 << (max(1, fitting).bit_length() - 1)
    return min(_COMPILED_BATCH if compiled else _LARGEST_BATCH, power)


@functools.cache
def _free_memory(device: torch.device) -> int:
    """Memory of a GPU that was free when this process first asked [bytes].

    Asked once, so that a process keeps its batch size; if others take memory later, it is halved.
    """
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)


class _Fetch:
    """A result that is being copied to the host; `arrived` is None if it is complete already."""

    def __init__(self, tensor: Tensor, arrived: torch.cuda.Event | None) -> None:
        self._tensor, self._arrived = tensor, arrived

    def result(self) -> FloatArray:
        if self._arrived is not None:
            self._arrived.synchronize()
        array: FloatArray = self._tensor.numpy()
        return array


class _Transfers:
    """Copies to and from one device, on a separate stream if it has streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def send(self, array: npt.NDArray[Any]) -> Tensor:
        """Begin to copy an array to the device; call `await_sent` before its use."""
        host = torch.from_numpy(array)
        if self._stream is None:
            return host.to(self._device)
        with torch.cuda.stream(self._stream):
            return host.pin_memory().to(self._device, non_blocking=True)

    def await_sent(self, *tensors: Tensor) -> None:
        """Make this thread's next computation on the device wait for tensors that were sent."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # its memory stays reserved until that work is done

    def fetch(self, tensor: Tensor) -> _Fetch:
        """Begin to copy a result to the host, once it is computed."""
        if self._stream is None:
            return _Fetch(tensor.cpu(), None)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))
        return _Fetch(host, arrived)


_log = logging.getLogger(__name__)


class _CompiledFeatures:
    """Pixels [B, 3, H, W] to features, compiled once for each shape.

    The first call for each shape takes a minute or more, which is logged. If there is no compiler,
    or it fails, one warning is given and the uncompiled function is used from then on.
    """

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self._plain = features
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._failed = False
        self._shapes: set[tuple[int, ...]] = set()

    def __call__(self, pixels: Tensor) -> Tensor:
        if self._failed:
            return self._plain(pixels)
        if tuple(pixels.shape) not in self._shapes:
            return self._first(pixels)
        return self._compile()(pixels)

    def _compile(self) -> Callable[[Tensor], Tensor]:
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, dynamic=False)
        return self._compiled

    def _first(self, pixels: Tensor) -> Tensor:
        """Compile for a shape, and fall back permanently if that fails."""
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # For example about traced position tables, which are constant for a shape.
                warnings.simplefilter("ignore")
                found = self._compile()(pixels)
        except torch.OutOfMemoryError:
            raise  # handled with smaller batches
        except Exception as error:  # errors of compilers and drivers have no common base class
            self._failed = True
            reason = next(iter(str(error).splitlines()), "")
            warnings.warn(
                f"torch.compile failed on {pixels.device} ({type(error).__name__}: {reason}); "
                "the network runs uncompiled. Leave compile=True out, or install a compiler.",
                stacklevel=2,
            )
            return self._plain(pixels)
        self._shapes.add(tuple(pixels.shape))
        seconds = time.perf_counter() - start
        _log.info("compiled for %s in %.0f s", list(pixels.shape), seconds)
        return found


class _Stopwatch:
    """Measures work that several threads do at once.

    Time runs while at least one thread works, so that simultaneous work counts once. Each spell,
    from the first thread to begin to the last to end, is added when it is over. The very first
    includes setting up the device: it counts only until there is another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self._tiles = 0
        self._first: tuple[float, int] | None = None
        self._later = (0.0, 0)

    @property
    def seconds_per_tile(self) -> float | None:
        """Mean time per tile [s]; None before any was measured."""
        seconds, tiles = self._later if self._later[1] else self._first or (0.0, 0)
        return seconds / tiles if tiles else None

    @contextmanager
    def running(self, tiles: int) -> Iterator[None]:
        """Measure the work done inside; if it fails, its tiles do not count."""
        with self._lock:
            if not self._running:
                self._since, self._tiles = time.perf_counter(), 0
            self._running += 1
        done = 0
        try:
            yield
            done = tiles
        finally:
            with self._lock:
                self._running -= 1
                self._tiles += done
                if not self._running:
                    self._add(time.perf_counter() - self._since, self._tiles)

    def _add(self, seconds: float, tiles: int) -> None:
        """Add a spell that is over, unless all of its work failed."""
        if not tiles:
            return
        if self._first is None:
            self._first = (seconds, tiles)
        else:
            self._later = (self._later[0] + seconds, self._later[1] + tiles)
