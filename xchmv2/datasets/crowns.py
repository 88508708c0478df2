"""From trees to surfaces: the crowns' upper envelope, and the roofs of houses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xchmv2.datasets.landscape import Building, Plane
from xchmv2.datasets.noise import Floats, Window, draw, draw_normal, noise_grid, stream
from xchmv2.datasets.species import parameters
from xchmv2.datasets.trees import Trees

_BATCH = 1_500_000  # crown pixels worked on at a time
_LOWEST = 0.3  # [m]; lower plants are ground cover
_LUMP_LENGTH = 2.1  # size of a branch group of a broadleaf crown [m]


@dataclass(frozen=True)
class Canopy:
    """The upper surface of all crowns.

    Parameters
    ----------
    height : ndarray of float32, shape (height, width)
        Metres above ground, 0 where no crown is.
    owner : ndarray of int64, shape (height, width)
        Index of the tree seen from above; -1 where none is.
    """

    height: Plane
    owner: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Crowns:
    """Shapes of crowns, one entry each.

    Parameters
    ----------
    y, x : ndarray of float64
        Stem [m].
    top : ndarray of float32
        Height [m].
    form : ndarray of float32, shape (n, 3)
        Quadratic form (yy, xx, 2 xy) that is 1 on the outline.
    fall : ndarray of float32, shape (n, 2)
        Share of the height by which the surface falls to the rim, and the power of the form.
    lumpiness : ndarray of float32
        How far branch groups bend the outline.
    """

    y: Floats
    x: Floats
    top: Plane
    form: Plane
    fall: Plane
    lumpiness: Plane


def _crowns_of(trees: Trees, height: Floats, radius: Floats) -> _Crowns:
    """Return the crowns of trees of a height and radius [m], both above 0."""
    stretch = np.exp(0.10 * draw_normal(trees.identity, 50))
    turn = np.pi * draw(trees.identity, 51)
    c, s = np.cos(turn), np.sin(turn)
    p, q = 1.0 / (radius * stretch) ** 2, 1.0 / (radius / stretch) ** 2
    form = np.stack([p * c**2 + q * s**2, p * s**2 + q * c**2, 2.0 * c * s * (p - q)], axis=-1)
    fall = np.stack([parameters("depth"), 0.5 * parameters("profile")], axis=-1)[trees.species]
    lumpiness = np.where(parameters("conifer") > 0, 0.05, 0.16)[trees.species]
    f = np.float32
    return _Crowns(
        trees.y, trees.x, height.astype(f), form.astype(f), fall.astype(f), lumpiness.astype(f)
    )


def _splat(
    keys: npt.NDArray[np.uint64],
    window: Window,
    crowns: _Crowns,
    lumps: Plane,
    which: npt.NDArray[np.intp],
    half: int,
) -> None:
    """Raise the surface to the crowns of trees that all fit into 2 * half + 1 pixels."""
    res = window.resolution
    y, x = crowns.y[which, None], crowns.x[which, None]
    offsets = np.arange(-half, half + 1)
    rows = np.floor(y / res + window.dy).astype(np.int64) + offsets
    cols = np.floor(x / res + window.dx).astype(np.int64) + offsets
    dy = ((rows + 0.5 - window.dy) * res - y).astype(np.float32)[:, :, None]
    dx = ((cols + 0.5 - window.dx) * res - x).astype(np.float32)[:, None, :]
    yy, xx, xy = (crowns.form[which, k][:, None, None] for k in range(3))
    rho2 = yy * dy**2 + xx * dx**2 + (xy * dy) * dx  # [n, 2 half + 1, 2 half + 1]
    rows, cols = rows - window.row, cols - window.col
    in_rows = (rows >= 0) & (rows < window.height)
    in_cols = (cols >= 0) & (cols < window.width)
    tree, r, c = np.nonzero((rho2 < 1.3) & in_rows[:, :, None] & in_cols[:, None, :])
    owner, pixel = which[tree], rows[tree, r] * window.width + cols[tree, c]
    rho2 = rho2[tree, r, c] * (1.0 - crowns.lumpiness[owner] * lumps.ravel()[pixel])
    inside = rho2 < 1.0
    owner, pixel, rho2 = owner[inside], pixel[inside], rho2[inside]
    fall, power = crowns.fall[owner, 0], crowns.fall[owner, 1]
    surface = crowns.top[owner] * (1.0 - fall * rho2**power)
    # Positive floats sort like their bits: height above, tree below, and one maximum finds both.
    bits = surface.view(np.uint32).astype(np.uint64) << np.uint64(32)
    np.maximum.at(keys, pixel, bits | (owner + 1).astype(np.uint64))


def canopy_of(trees: Trees, height: Floats, radius: Floats, window: Window, seed: int) -> Canopy:
    """Return the upper envelope of crowns.

    Parameters
    ----------
    trees : Trees
        All that may reach into the window.
    height, radius : ndarray of float64, shape (n,)
        Their size [m]; trees of height 0 do not stand.
    window : Window
        Pixels.
    seed : int
        Seed of the world, for the lumps of the crowns.

    Returns
    -------
    Canopy
        Height and owner of each pixel.
    """
    reach = np.maximum(radius, 0.75 * window.resolution)
    crowns = _crowns_of(trees, height, reach)
    lumps = noise_grid(stream(seed, "lumps"), window.y, window.x, _LUMP_LENGTH)
    lumps = np.clip(lumps, -2.2, 1.8)
    halves = np.ceil(1.25 * reach / window.resolution).astype(np.int64)
    halves[height < _LOWEST] = 0
    keys = np.zeros(window.height * window.width, np.uint64)
    for half in np.unique(halves[halves > 0]):
        same = np.flatnonzero(halves == half)
        step = max(1, _BATCH // int(2 * half + 1) ** 2)
        for k in range(0, same.size, step):
            _splat(keys, window, crowns, lumps, same[k : k + step], int(half))
    top = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32).reshape(window.shape)
    owner = ((keys & np.uint64(0xFFFFFFFF)).astype(np.int64) - 1).reshape(window.shape)
    # Branch groups: strong on wide broadleaf crowns, faint on conifers.
    size = np.where(parameters("conifer")[trees.species] > 0, 0.13, 0.36) * radius
    strength = np.append(size, 0.0).astype(np.float32)[owner]  # owner -1 reads the last entry
    lumps += 0.6 * noise_grid(stream(seed, "twigs"), window.y, window.x, 1.0)
    rough = np.maximum(top + strength * lumps, 0.4 * top)
    return Canopy(np.where(top > 0, rough, np.float32(0)).astype(np.float32), owner)


def roofs_of(buildings: tuple[Building, ...], window: Window) -> tuple[Plane, npt.NDArray[np.int8]]:
    """Return the roofs in a window.

    Parameters
    ----------
    buildings : tuple of Building
        Houses in and around the window.
    window : Window
        Pixels.

    Returns
    -------
    height : ndarray of float32, shape (height, width)
        Roof above ground [m], 0 where there is none.
    roof : ndarray of int8, shape (height, width)
        Kind of roof; -1 where there is none.
    """
    height, roof = np.zeros(window.shape, np.float32), np.full(window.shape, -1, np.int8)
    y, x = window.y, window.x
    for house in buildings:
        reach = float(np.hypot(house.half_length, house.half_width))
        rows = slice(*np.searchsorted(y, (house.y - reach, house.y + reach)))
        cols = slice(*np.searchsorted(x, (house.x - reach, house.x + reach)))
        c, s = np.cos(house.angle), np.sin(house.angle)
        dy, dx = y[rows, None] - house.y, x[cols] - house.x
        along, across = np.abs(dx * c + dy * s), np.abs(dy * c - dx * s)
        inside = (along < house.half_length) & (across < house.half_width)
        top = house.wall + house.ridge * (1.0 - across / house.half_width)
        height[rows, cols] = np.where(inside, top, height[rows, cols])
        roof[rows, cols] = np.where(inside, house.roof, roof[rows, cols])
    return height, roof
