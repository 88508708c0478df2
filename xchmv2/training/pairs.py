"""Pairs of imagery and reference heights on one grid, and the training crops drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from numpy.lib.stride_tricks import sliding_window_view

from xchmv2.change.registration import Shift, find_shifts, smooth
from xchmv2.errors import ImageryError, warn
from xchmv2.imagery import resolve_imagery
from xchmv2.raster import Grid, find_grid, spatial_dims, validate_plane
from xchmv2.validation.matching import place_reference


@dataclass(frozen=True, eq=False)
class Pair:
    """One image and its reference heights on the same pixels.

    `image`: (3, H, W) float32 red, green and blue from 0 to 1, 0 where invalid; `valid`: (H, W)
    pixels that hold imagery; `height`: (H, W) float32 reference heights [m], NaN where there is
    none or the imagery is invalid; `grid`: by which two pairs of the same ground are recognised;
    `registration`: displacement of the heights from the imagery, as far as it can be told.
    """

    image: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    height: npt.NDArray[np.float32]
    grid: Grid | None = None
    registration: Shift = field(default_factory=Shift)


def read_pair(imagery: xr.Dataset | xr.DataArray, reference: xr.DataArray, **options: Any) -> Pair:
    """Read imagery by the reader of ``predict``, and reference heights by that of ``validate``.

    The imagery is of one date, its options those of :func:`~xchmv2.imagery.resolve_imagery`;
    `reference` is (y, x) heights [m] on any grid. Chunked input is computed. An ImageryError
    refuses imagery that does not fit the model, holds several dates, or has no reference height
    under its valid pixels; a CHMv2Error an option out of range, a reference that is no raster of
    one date or has heights outside 0 to 120 m, and a CRS on only one of the two.
    """
    scene, target, reader, ranges = resolve_imagery(imagery, **options)
    validate_plane(scene.template, "imagery of one date", "imagery", ImageryError)
    mask = None if scene.mask is None else scene.mask.values
    span = ((0, target.shape[0]), (0, target.shape[1]))
    pixels = np.stack([np.asarray(band.plane.values) for band in scene.bands])
    values, ok = reader(pixels, mask, span)
    low, high = (np.array(side, np.float32)[:, None, None] for side in zip(*ranges, strict=True))
    image = np.clip((values.astype(np.float32) - low) / (high - low), 0, 1)
    height = np.full(target.shape, np.nan, np.float32)
    known, where = place_reference(reference, target)
    height[tuple(where.values())] = known
    height[~ok] = np.nan
    if not np.isfinite(height).any():
        raise ImageryError(
            "imagery and reference heights do not overlap where both are valid",
            fix="check their bounds and CRS: imagery.odc.geobox.boundingbox, "
            "reference.odc.geobox.boundingbox",
        )
    registration = _register(np.where(ok, image, np.nan), height)
    if not _is_in_place(registration):
        _warn_displaced(registration, reference, target)
    return Pair(np.where(ok, image, 0).astype(np.float32), ok, height, target, registration)


#: Offset from which on a reference is said to be displaced [px]: shadows and lean feign up to 2.
_LEAST_OFFSET = 3.0
#: Largest offset that is looked for [px]; light from so many sides; number of windows compared.
_MAX_OFFSET, _LIGHTS, _WINDOWS = 40.0, 12, 16
#: Smoothing of the heights before their slopes; brightness that varies less than this is removed.
_SLOPE_WIDTH, _BACKGROUND_WIDTH = 1.0, 8.0


def _register(image: npt.NDArray[np.float32], height: npt.NDArray[np.float32]) -> Shift:
    """Find the displacement of reference heights (H, W) from imagery (bands, H, W), NaN if invalid.

    The sides of crowns that face the sun are bright, whatever a model knows of the colours. So the
    brightness, without its variation over more than 8 px, is correlated by
    :func:`~xchmv2.change.registration.find_shifts` with the slope of the heights towards each of
    twelve directions, and the best of those that are accepted counts. It is known to 1 or 2 px:
    shadows and the lean of trees displace the imagery too.
    """
    grey = image.mean(axis=0, dtype=np.float64)
    bright = grey - smooth(grey, _BACKGROUND_WIDTH)[0]
    down, along = np.gradient(smooth(height.astype(np.float64), _SLOPE_WIDTH)[0])
    known = np.isfinite(height)
    slopes = [
        np.where(known, math.cos(angle) * down + math.sin(angle) * along, np.nan)
        for angle in np.linspace(0, 2 * math.pi, _LIGHTS, endpoint=False)
    ]
    found = find_shifts(bright, slopes, max_shift=_MAX_OFFSET, windows=_WINDOWS, edges=False)
    return max(found, key=lambda shift: (shift.known, shift.signal))


def write_registration(shift: Shift) -> str:
    """Say where reference heights lie, or why that cannot be told."""
    if not shift.known:
        return f"cannot be told ({shift.problem.partition(';')[0]})"
    lies = f"{shift.dy:.1f} px down and {shift.dx:.1f} px to the right of the imagery"
    return f"in place, {lies}" if _is_in_place(shift) else f"displaced, {lies}"


def _is_in_place(shift: Shift) -> bool:
    return not math.hypot(shift.dy, shift.dx) >= _LEAST_OFFSET


def _warn_displaced(shift: Shift, reference: xr.DataArray, grid: Grid) -> None:
    """Tell how far a reference lies off, and how to move it."""
    y, x = spatial_dims(reference)
    down, right = (
        -step * size for step, size in zip((shift.dy, shift.dx), grid.pixel, strict=True)
    )
    there = find_grid(reference.isel({d: 0 for d in reference.dims if d not in (y, x)})).crs
    first = "" if there == grid.crs else "take reference.odc.reproject(imagery.odc.crs) and "
    lies = f"{round(shift.dy)} px down and {round(shift.dx)} px to the right of"
    moved = f"{y}=reference.{y} + {down:.2f}, {x}=reference.{x} + {right:.2f}"
    warn(
        f"the reference heights lie {lies} where the imagery shows them, and training would blur "
        f"the model's heights; {first}move it: reference.assign_coords({moved})"
    )


#: Edges of the height classes that crops are drawn by [m].
_CLASS_EDGES = (1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 35.0)
#: Least share of a crop's pixels that must have a reference height.
_LEAST_COVER = 0.5
# Candidate crops start at every eighth of a tile.
_STEPS_PER_TILE = 8


@dataclass(frozen=True)
class Crop:
    """A square of one pair: the pair's index, and its first row and column [px]."""

    pair: int
    top: int
    left: int


@dataclass(frozen=True, eq=False)
class CropSampler:
    """Draws training crops of `tile` px by height class: candidates, and their probabilities."""

    crops: list[Crop]
    weights: npt.NDArray[np.float64]
    pairs: Sequence[Pair]
    tile: int

    def draw(
        self, count: int, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Draw crops, turned and mirrored at random: image, validity and height [m].

        Of shapes (count, 3, tile, tile), (count, tile, tile) and (count, tile, tile).
        """
        turned = []
        for i in rng.choice(len(self.crops), count, p=self.weights):
            turns, step = int(rng.integers(4)), 1 - 2 * int(rng.integers(2))
            parts = self.cut(self.crops[i])
            turned.append([np.rot90(part, turns, (-2, -1))[..., ::step] for part in parts])
        images, valids, heights = (np.stack(part) for part in zip(*turned, strict=True))
        return images, valids, heights

    def cut(
        self, crop: Crop
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Cut image (3, tile, tile), validity and heights [m] of one crop."""
        pair = self.pairs[crop.pair]
        where = (
            slice(crop.top, crop.top + self.tile),
            slice(crop.left, crop.left + self.tile),
        )
        return pair.image[:, *where], pair.valid[where], pair.height[where]


def split_crops(
    pairs: Sequence[Pair], tile: int, validation: float, rng: np.random.Generator
) -> tuple[CropSampler, list[Crop]]:
    """Hold out spatial blocks for validation and list the crops that touch none of them.

    Crops and blocks have sides of `tile` [px]; `validation` is the share, 0 to below 1, of the
    blocks with reference heights to hold out. Training crops overlap no held-out block, not even
    one of another pair on the same ground (of the same CRS). An ImageryError refuses fewer than two
    tiles of training data.
    """
    blocks = [crop for i in range(len(pairs)) for crop in _blocks(pairs, i, tile)]
    count = max(round(validation * len(blocks)), int(validation > 0 and len(blocks) > 1))
    held_out = [blocks[i] for i in sorted(rng.permutation(len(blocks))[:count])]
    candidates, classes = [], []
    for i, pair in enumerate(pairs):
        blocked = [_seen_from(pair, pairs[crop.pair], crop, tile) for crop in held_out]
        crops, counts = _candidates(i, pair, tile, [area for area in blocked if area])
        candidates += crops
        classes.append(counts)
    left = len(blocks) - count
    if left < 2 or len(candidates) < 2:
        raise ImageryError(
            f"at least two tiles of {tile} px with reference heights to train on",
            f"{len(blocks)} in all, {left} after {count} were held out for validation",
            "half of a tile's pixels must have heights: pass a smaller tile, such as "
            f"tile={max(32, tile // 64 * 32)}, or more reference heights",
        )
    return CropSampler(candidates, _by_class(np.concatenate(classes)), pairs, tile), held_out


def _blocks(pairs: Sequence[Pair], index: int, tile: int) -> list[Crop]:
    """Squares side by side, moved inward at the far edges, that hold enough heights."""
    known = np.isfinite(pairs[index].height)
    if min(known.shape) < tile:
        return []
    tops, lefts = (
        [min(i * tile, size - tile) for i in range(round(size / tile))] for size in known.shape
    )
    return [
        Crop(index, top, left)
        for top, left in product(tops, lefts)
        if known[top : top + tile, left : left + tile].mean() >= _LEAST_COVER
    ]


def _seen_from(
    pair: Pair, other: Pair, crop: Crop, tile: int
) -> tuple[float, float, float, float] | None:
    """Rows and columns of a pair that a block of another pair, or of the same, covers."""
    corners = np.array([(crop.top, crop.left), (crop.top + tile, crop.left + tile)], float)
    if pair is not other:
        if pair.grid is None or other.grid is None or pair.grid.crs != other.grid.crs:
            return None
        corners = corners * other.grid.pixel + other.grid.edges
        corners = np.sort((corners - pair.grid.edges) / pair.grid.pixel, axis=0)
    (first, near), (last, far) = corners.tolist()
    return first, last, near, far


def _candidates(
    index: int, pair: Pair, tile: int, blocked: list[tuple[float, float, float, float]]
) -> tuple[list[Crop], npt.NDArray[np.float64]]:
    """Crops outside the held-out areas, and their pixel counts by height class."""
    classes = len(_CLASS_EDGES) + 1
    step = tile // _STEPS_PER_TILE
    rows, cols = (size // step for size in pair.height.shape)
    if min(rows, cols) < _STEPS_PER_TILE:
        return [], np.zeros((0, classes))
    height = pair.height[: rows * step, : cols * step]
    label = np.where(np.isfinite(height), np.digitize(height, _CLASS_EDGES), -1)
    # Counted in squares of one step, then summed over the squares of each crop.
    parts = label.reshape(rows, step, cols, step)
    squares = np.stack([(parts == k).sum(axis=(1, 3)) for k in range(classes)], axis=-1)
    window = (_STEPS_PER_TILE, _STEPS_PER_TILE)
    counts = sliding_window_view(squares, window, axis=(0, 1)).sum(axis=(-2, -1))
    top, left = np.indices(counts.shape[:2]) * step
    free = counts.sum(axis=-1) >= _LEAST_COVER * tile**2
    for first, last, near, far in blocked:
        free &= (top + tile <= first) | (top >= last) | (left + tile <= near) | (left >= far)
    crops = [Crop(index, int(t), int(x)) for t, x in zip(top[free], left[free], strict=True)]
    return crops, counts[free].astype(np.float64)


def _by_class(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probability of each crop, if a height class is drawn first, then a crop with that class.

    Classes are drawn by the square root of their share, so that rare tall trees are drawn more
    often than by area, without dominating the training.
    """
    totals = counts.sum(axis=0)
    share = np.sqrt(totals / totals.sum())
    per_class = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    weights = per_class @ (share / share.sum())
    return np.asarray(weights / weights.sum())
