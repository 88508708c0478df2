"""Resampling to the ground resolution: the target grid, and window-exact resampling to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from odc.geo import CRS
from scipy import sparse

from xchmv2.errors import ImageryError
from xchmv2.raster import (
    Grid,
    ValidPixels,
    advise_reprojection,
    crs_label,
    ground_pixel,
    stepped_ground_scale,
)

#: Ground resolutions the model was trained for, roughly [m]; both ends belong to it.
_FINEST, _COARSEST = 0.25, 1.5
#: Pixels smaller than this are a mistake in the CRS or the transform [m].
_FINEST_SOURCE = 0.01
#: Imagery coarser than this does not show single trees, so resampling cannot help [m].
_COARSEST_SOURCE = 3.0
_TOLERANCE = 0.01
#: Sides of a pixel may differ by this factor; the model knows round crowns.
LONGEST_SIDE = 1.2


def resolve_target(grid: Grid, resolution: float | None) -> tuple[Grid, _AxisMap, _AxisMap]:
    """Choose the grid to predict on, with the maps of its rows and columns to those of the imagery.

    `resolution` is the ground resolution to resample to [m]; None keeps the imagery's own pixels.
    The lines of a resampled grid are multiples of its pixel from the CRS origin, and it covers the
    imagery. An ImageryError refuses imagery or a resolution outside the range the model was trained
    for, pixels much longer than wide that are not resampled, a geographic CRS, and `resolution`
    without a CRS or the size of a pixel.
    """
    rows, cols = (_AxisMap(size, size) for size in grid.shape)
    if grid.crs is None and grid.side is None:
        if resolution is not None:
            raise ImageryError(
                "a CRS, which gives the size of a pixel on the ground",
                f"none, with resolution={resolution}",
                "write it: imagery.rio.write_crs('EPSG:...'), or state the size in metres: "
                ".predict(..., pixel_size=0.6)",
            )
        return grid, rows, cols
    refuse_geographic(grid)
    native = ground_pixel(grid)
    if resolution is None:
        _validate_native(native)
        return grid, rows, cols
    _validate_wanted(native, resolution)
    return _aligned(grid, resolution)


def refuse_geographic(
    grid: Grid, band: xr.DataArray | None = None, imagery: xr.DataArray | xr.Dataset | None = None
) -> None:
    """Refuse degrees; the advice keeps the nodata of a band where it and the imagery are given."""
    if grid.crs is None or not grid.crs.geographic:
        return
    (top, left), (dy, dx), (rows, cols) = grid.edges, grid.pixel, grid.shape
    lon, lat = left + dx * cols / 2, top + dy * rows / 2
    if abs(lat) > 90 or abs(lon) > 360:
        raise ImageryError(
            f"coordinates in degrees, as {crs_label(grid.crs)} has them",
            f"{lat:g}, {lon:g} in the middle",
            "correct it: imagery.rio.write_crs('EPSG:...')",
        )
    zone = int((lon + 180) // 6) % 60 + 1
    utm = CRS(f"EPSG:{(32600 if lat >= 0 else 32700) + zone}")
    call = f"imagery.odc.reproject({crs_label(utm)!r}, resolution=0.6)"
    if band is not None and imagery is not None:
        native = ground_pixel(grid)
        validate_source(native)
        call = advise_reprojection(band, imagery, grid.crs, utm, math.sqrt(math.prod(native)))
    raise ImageryError(
        "a projected CRS, in which pixels are square on the ground",
        f"the geographic CRS {grid.crs.to_epsg() or grid.crs.proj.name}",
        f"reproject it: {call}.chmv2.predict(...)",
    )


def _validate_native(native: tuple[float, float]) -> None:
    low, high = min(native), max(native)
    sizes = low >= _FINEST * (1 - _TOLERANCE) and high <= _COARSEST * (1 + _TOLERANCE)
    if sizes and high <= LONGEST_SIDE * (1 + _TOLERANCE) * low:
        return
    validate_source(native)
    expected = f"pixels at most {LONGEST_SIDE} times as long as wide"
    if not sizes:
        expected = f"imagery of {_FINEST} to {_COARSEST} m on the ground"
    raise ImageryError(
        f"{expected} (the model was trained at 0.6 m)",
        f"pixels of {native[0]:.3g} x {native[1]:.3g} m",
        "resample while predicting: .predict(..., resolution=0.6)",
    )


def validate_source(native: tuple[float, float]) -> None:
    """Check that pixels of these sides on the ground [m] suit the model, resampled or not.

    An ImageryError refuses those too coarse for trees to be seen, or finer than any imagery.
    """
    if not min(native) >= _FINEST_SOURCE:
        raise ImageryError(
            f"pixels of at least {_FINEST_SOURCE} m on the ground",
            f"pixels of {native[0]:.3g} x {native[1]:.3g} m",
            "check the CRS and the transform: degrees may have been labelled as metres",
        )
    if max(native) > _COARSEST_SOURCE * (1 + _TOLERANCE):
        raise ImageryError(
            f"imagery of {_FINEST} to {_COARSEST} m on the ground (the model was trained at 0.6 m)",
            f"pixels of {native[0]:.3g} x {native[1]:.3g} m, in which single trees cannot be seen",
            "use finer imagery; resampling does not restore detail",
        )


def _validate_wanted(native: tuple[float, float], resolution: float) -> None:
    if not _FINEST * (1 - _TOLERANCE) <= resolution <= _COARSEST * (1 + _TOLERANCE):
        raise ImageryError(
            f"a ground resolution of {_FINEST} to {_COARSEST} m (the model was trained at 0.6 m)",
            f"resolution={resolution}",
            "use the training resolution: .predict(..., resolution=0.6)",
        )
    validate_source(native)


def _aligned(grid: Grid, resolution: float) -> tuple[Grid, _AxisMap, _AxisMap]:
    """Cover the grid with pixels of the requested size, at multiples from the CRS origin.

    Without a CRS they are multiples from the first edge.
    """
    edges, pixels, shape = [], [], []
    start, scales = (0.0, 0.0), stepped_ground_scale(grid)
    if grid.crs is None:
        start = grid.edges
    for edge, pixel, origin, scale, size in zip(
        grid.edges, grid.pixel, start, scales, grid.shape, strict=True
    ):
        wanted = math.copysign(resolution / scale, pixel)
        first = math.floor(round((edge - origin) / wanted, 6))
        last = math.ceil(round((edge - origin + pixel * size) / wanted, 6))
        edges.append(origin + first * wanted)
        pixels.append(wanted)
        shape.append(last - first)
    target = replace(
        grid,
        shape=(shape[0], shape[1]),
        edges=(edges[0], edges[1]),
        pixel=(pixels[0], pixels[1]),
        side=None if grid.side is None else resolution,
    )
    return target, *map_axes(grid, target)


def map_axes(source: Grid, target: Grid) -> tuple[_AxisMap, _AxisMap]:
    """Map rows and columns of a target grid to those of a source in the same CRS and directions."""
    rows, cols = (
        _AxisMap(
            source_size=source.shape[axis],
            size=target.shape[axis],
            ratio=round(target.pixel[axis] / source.pixel[axis], 9),
            offset=round((target.edges[axis] - source.edges[axis]) / source.pixel[axis], 6),
        )
        for axis in (0, 1)
    )
    return rows, cols


# Overlaps below this share of a source pixel are rounding of coordinates.
_SLIVER = 1e-6


@dataclass(frozen=True)
class _AxisMap:
    """The map from pixels of a target grid to pixels of the source along one axis.

    Target pixel ``t`` spans ``[t * ratio + offset, (t + 1) * ratio + offset)`` in source pixels.
    """

    source_size: int
    size: int
    ratio: float = 1.0
    offset: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether target pixels are source pixels, so that nothing is resampled."""
        return self.ratio == 1 and self.offset == 0 and self.size == self.source_size

    def source_range(self, start: int, stop: int) -> tuple[int, int]:
        """Source pixels that the target pixels ``[start, stop)`` depend on."""
        if self.is_identity:
            return start, stop
        margin = 0 if self.ratio > 1 else 1  # bilinear looks at the next pixel
        first = math.floor(start * self.ratio + self.offset) - margin
        last = math.ceil(stop * self.ratio + self.offset) + margin
        return max(first, 0), min(last, self.source_size)


def _resample(
    bands: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    axes: tuple[_AxisMap, _AxisMap],
    target: tuple[tuple[int, int], tuple[int, int]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Resample a window (3, H, W), and find its valid pixels: (3, h, w) float32 and (h, w).

    The source lies over ``axes[i].source_range(*target[i])``; its invalid pixels do not affect the
    colours. A pixel is valid where at least half of its source area is.
    """
    area, colour = _weights(axes, target)
    weight = valid.astype(np.float32)
    seen = _apply(colour, weight)
    divisor = np.where(seen > 0, seen, 1)
    values = [_apply(colour, np.where(valid, band, 0).astype(np.float32)) for band in bands]
    return np.stack([value / divisor for value in values]), _half_valid(area, weight) & (seen > 0)


def _weights(
    axes: tuple[_AxisMap, _AxisMap], target: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[list[sparse.csr_array], list[sparse.csr_array]]:
    """Weights along both axes: by area for validity, by colour for values."""
    spans = [(axis, *t, axis.source_range(*t)) for axis, t in zip(axes, target, strict=True)]
    area = [_area_weights(*span) for span in spans]
    return area, [_area_weights(*s) if s[0].ratio > 1 else _bilinear_weights(*s) for s in spans]


def _half_valid(
    area: list[sparse.csr_array], weight: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    whole = area[0].sum(axis=1)[:, None] * area[1].sum(axis=1)[None, :]
    enough: npt.NDArray[np.bool_] = _apply(area, weight) >= (0.5 - _SLIVER) * whole
    return enough


def _apply(
    weights: list[sparse.csr_array], values: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Apply weights to rows, then columns: (H, W) -> (h, w)."""
    rows, cols = weights
    result: npt.NDArray[np.float32] = (cols @ (rows @ values).T).T
    return result


@lru_cache(maxsize=1024)
def _area_weights(
    axis: _AxisMap, start: int, stop: int, source: tuple[int, int]
) -> sparse.csr_array:
    """Length of source pixel j inside target pixel i, as a sparse (target, source) matrix."""
    edges = np.arange(start, stop + 1) * axis.ratio + axis.offset
    edges = np.clip(edges, 0, axis.source_size)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.floor(low) + np.arange(math.ceil(axis.ratio) + 1)
    length = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
    return _matrix(pixel, np.where(length > _SLIVER, length, 0), source)


@lru_cache(maxsize=1024)
def _bilinear_weights(
    axis: _AxisMap, start: int, stop: int, source: tuple[int, int]
) -> sparse.csr_array:
    """Weights of the two source pixels around each target centre, clamped at the edges."""
    centre = (np.arange(start, stop) + 0.5) * axis.ratio + axis.offset - 0.5
    below = np.floor(centre)
    share = centre - below
    pixel = np.clip(np.stack([below, below + 1], axis=1), 0, axis.source_size - 1)
    return _matrix(pixel, np.stack([1 - share, share], axis=1), source)


def _matrix(
    pixel: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], source: tuple[int, int]
) -> sparse.csr_array:
    rows = np.broadcast_to(np.arange(len(pixel))[:, None], pixel.shape)
    keep = weight > 0
    entries = (weight[keep].astype(np.float32), (rows[keep], pixel[keep].astype(int) - source[0]))
    return sparse.csr_array(entries, shape=(len(pixel), source[1] - source[0]))


@dataclass(frozen=True)
class WindowReader:
    """Turns source pixels into a window of the target grid, by a rule for validity and two maps."""

    valid_pixels: ValidPixels
    rows: _AxisMap
    cols: _AxisMap

    def source_span(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """Source pixels that target pixels ``[start, stop)`` depend on, along y (0) or x (1)."""
        along, erode = self._axes[axis], self.valid_pixels.erode
        first, last = along.source_range(start, stop)
        return max(first - erode, 0), min(last + erode, along.source_size)

    def __call__(
        self,
        bands: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_] | None,
        target: tuple[tuple[int, int], tuple[int, int]],
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Prepare one window: (3, h, w), float32 where resampled, and its valid pixels (h, w).

        `bands` (3, H, W) and `mask` (H, W), pixels that the user declares valid, are source values
        over ``source_span`` of both axes; `target` is the window in target pixels.
        """
        valid = self.valid_pixels(list(bands), mask)
        y, x = self._inside(target)
        bands, valid = bands[:, y, x], valid[y, x]
        if self.is_identity:
            return bands, valid
        return _resample(bands, valid, self._axes, target)

    def valid(
        self,
        bands: Sequence[npt.NDArray[Any]],
        mask: npt.NDArray[np.bool_] | None,
        target: tuple[tuple[int, int], tuple[int, int]],
    ) -> npt.NDArray[np.bool_]:
        """Compute only the (h, w) valid pixels of a window; the parameters are those of a call."""
        valid = self.valid_pixels(bands, mask)[self._inside(target)]
        if self.is_identity:
            return valid
        area, colour = _weights(self._axes, target)
        weight = valid.astype(np.float32)
        return _half_valid(area, weight) & (_apply(colour, weight) > 0)

    @property
    def is_identity(self) -> bool:
        """Whether target pixels are source pixels."""
        return self.rows.is_identity and self.cols.is_identity

    def _inside(self, target: tuple[tuple[int, int], tuple[int, int]]) -> tuple[slice, slice]:
        """Locate the window in the pixels read for it, without those read only for erosion."""
        spans = []
        for axis, span in enumerate(target):
            first, last = self._axes[axis].source_range(*span)
            read_from, _ = self.source_span(axis, *span)
            spans.append(slice(first - read_from, last - read_from))
        return spans[0], spans[1]

    @property
    def _axes(self) -> tuple[_AxisMap, _AxisMap]:
        return self.rows, self.cols
