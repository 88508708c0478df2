"""Random numbers that depend only on seed and place: hashes, and smooth noise made from them.

With a sequential generator, a tree would change shape when its neighbour is left out. Here each
number is a hash of a key and of integer world coordinates, so that any window of an unbounded world
can be made separately and agrees with every other window bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Hashes: TypeAlias = npt.NDArray[np.uint64]
Ints: TypeAlias = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
# Standard deviation of cubic B-spline noise over uniform [-1, 1] lattice values, averaged over
# the position within a cell: sqrt(1/3) times the mean squared weight 151/315 of one axis.
_SPLINE_STD = float(np.sqrt(1.0 / 3.0) * 151.0 / 315.0)


@dataclass(frozen=True)
class Cutout:
    """A rectangle of pixels of the world.

    `row` and `col` of the first pixel count from the CRS origin, southward and eastward;
    `resolution` is in metres. `dy` and `dx` displace the imagery southward and eastward [px]
    (misregistration): a pixel shows the ground `dy` px north and `dx` px west of its coordinates.
    """

    row: int
    col: int
    height: int
    width: int
    resolution: float
    dy: float = 0.0
    dx: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Size (height, width) [px]."""
        return self.height, self.width

    @property
    def y(self) -> Floats:
        """Pixel centres, metres southward from the CRS origin, shape (height,)."""
        rows = self.row + np.arange(self.height, dtype=np.float64)
        return (rows + 0.5 - self.dy) * self.resolution

    @property
    def x(self) -> Floats:
        """Pixel centres, metres eastward from the CRS origin, shape (width,)."""
        cols = self.col + np.arange(self.width, dtype=np.float64)
        return (cols + 0.5 - self.dx) * self.resolution

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Outermost pixel centres (north, south, west, east) [m]."""
        north, south = self.y[[0, -1]].tolist()
        west, east = self.x[[0, -1]].tolist()
        return north, south, west, east

    def pad(self, top: int, bottom: int, left: int, right: int) -> Cutout:
        """Return the window with a margin on each side [px]."""
        return replace(
            self,
            row=self.row - top,
            col=self.col - left,
            height=self.height + top + bottom,
            width=self.width + left + right,
        )

    def slices_of(self, inner: Cutout) -> tuple[slice, slice]:
        """Return the slices of this window's arrays that `inner`, on the same grid, covers."""
        top, left = inner.row - self.row, inner.col - self.col
        return slice(top, top + inner.height), slice(left, left + inner.width)


def cells_around(
    bounds: tuple[float, float, float, float], size: float, margin: int = 1
) -> tuple[Ints, Ints]:
    """Return all cells (i, j) of a size [m] within bounds (north, south, west, east) and around."""
    ends = [
        (np.floor(a / size) - margin, np.floor(b / size) + margin + 1)
        for a, b in (bounds[:2], bounds[2:])
    ]
    i, j = (np.arange(*pair).astype(np.int64) for pair in ends)
    return np.repeat(i, j.size), np.tile(j, i.size)


def stream(seed: int, name: str, *index: int) -> int:
    """Return the 64-bit key of the stream of random numbers with a name, and maybe integers."""
    words = [seed, *name.encode(), *(i % 2**63 for i in index)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def rng_of(seed: int, name: str, *index: int) -> np.random.Generator:
    """Return an independent generator for numbers without a place, such as the haze of a date."""
    return np.random.default_rng(stream(seed, name, *index))


def place_hash(key: int, *coordinates: npt.NDArray[Any]) -> Hashes:
    """Return one hash per place for a key and integer coordinates, which are broadcast."""
    h = np.full((1,), key, np.uint64)
    for coordinate in coordinates:
        h = _mix((h ^ np.asarray(coordinate).astype(np.int64).astype(np.uint64)) + _GOLDEN)
    return h


def _mix(h: Hashes) -> Hashes:
    """Scramble 64-bit integers (the finaliser of splitmix64)."""
    h = (h ^ (h >> np.uint64(30))) * _MIX_A
    h = (h ^ (h >> np.uint64(27))) * _MIX_B
    return h ^ (h >> np.uint64(31))


def draw(h: Hashes, index: int) -> Floats:
    """Return the `index`-th uniform number in [0, 1) of each hash."""
    step = np.full((1,), index + 1, np.uint64) * _GOLDEN
    return np.asarray((_mix(h + step) >> np.uint64(11)) * 2.0**-53)


def draw_normal(h: Hashes, index: int) -> Floats:
    """Return the `index`-th nearly normal number of each hash (sum of four 16-bit uniforms)."""
    step = np.full((1,), index + 1, np.uint64) * _GOLDEN
    words = _mix(h + step)
    total = sum(
        ((words >> np.uint64(s)) & np.uint64(0xFFFF)).astype(float) for s in (0, 16, 32, 48)
    )
    return np.asarray((total / 65535.0 - 2.0) * np.sqrt(3.0))


def noise_grid(key: int, y: Floats, x: Floats, wavelength: float) -> npt.NDArray[np.float32]:
    """Return smooth noise (height, width) at increasing world coordinates [m].

    Zero mean, unit variance, nearly normal; `wavelength` is the spacing of its lattice [m].
    """
    i, wy = _cells(y, wavelength)
    j, wx = _cells(x, wavelength)
    values = _lattice(key, np.arange(i[0] - 1, i[-1] + 3)[:, None], np.arange(j[0] - 1, j[-1] + 3))
    rows = sum(values[i - i[0] + k] * wy[k][:, None] for k in range(4))
    rows = np.asarray(rows, np.float32)
    out = np.zeros((y.size, x.size), np.float32)
    for k in range(4):
        out += rows[:, j - j[0] + k] * wx[k].astype(np.float32)
    return out


def _cells(v: Floats, wavelength: float) -> tuple[Ints, tuple[Floats, ...]]:
    """Return the lattice cell of each coordinate and its spline weights."""
    cell = np.floor(v / wavelength)
    return cell.astype(np.int64), _spline_weights(v / wavelength - cell)


def _spline_weights(t: Floats) -> tuple[Floats, ...]:
    """Return the four cubic B-spline weights at the offset t in [0, 1) within a cell."""
    s = 1.0 - t
    return (
        s**3 / 6.0,
        (3.0 * t**3 - 6.0 * t**2 + 4.0) / 6.0,
        (3.0 * s**3 - 6.0 * s**2 + 4.0) / 6.0,
        t**3 / 6.0,
    )


def _lattice(key: int, i: Ints, j: Ints) -> Floats:
    """Return lattice values in [-1, 1] scaled to unit variance of the noise."""
    return (2.0 * draw(place_hash(key, i, j), 0) - 1.0) / _SPLINE_STD


def noise_at(key: int, y: Floats, x: Floats, wavelength: float) -> Floats:
    """Return the noise of :func:`noise_grid` at points (n,), up to rounding."""
    i, wy = _cells(y, wavelength)
    j, wx = _cells(x, wavelength)
    out = np.zeros(np.shape(y))
    for k in range(4):
        for m in range(4):
            out += wy[k] * wx[m] * _lattice(key, i - 1 + k, j - 1 + m)
    return out


def fractal_grid(
    key: int, y: Floats, x: Floats, wavelength: float, octaves: int
) -> npt.NDArray[np.float32]:
    """Return noise of some octaves, each half as long and half as strong as the last."""
    total = np.zeros((y.size, x.size), np.float32)
    for k in range(octaves):
        total += noise_grid(key + k, y, x, wavelength / 2**k) * np.float32(0.5**k)
    return total / np.float32(np.sqrt(sum(0.25**k for k in range(octaves))))
