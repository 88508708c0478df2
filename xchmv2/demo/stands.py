"""Stands of a synthetic forest and their tree species."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xchmv2.demo.noise import Floats, Hashes, Ints, draw, noise_at, noise_grid, place_hash, stream

_CELL = 125.0  # spacing of the stands' centres [m]
BASE_YEAR = 2020.0  # the year in which a stand has its stated age
_WARP = 9.0  # standard deviation of the displacement of borders [m]
_WARP_LENGTH = 55.0
_ID_STRIDE = 2**24
_MAX_AGE = 150.0


@dataclass(frozen=True)
class StandTraits:
    """Properties of stands, one entry each.

    Centre (`y`, `x`) [m]; `meadow`: open land with single trees; `age` in 2020 [year]; main and
    `second` species, the latter with a share `admixture`; `planted` in rows in the direction
    `angle` [radian], else scattered; `spacing` of stems [m]; `stocking`: share of planting places
    with a tree; `site`: height relative to an average site; `hue` (n, 2): brightness and
    yellowness of the foliage, about 0.
    """

    y: Floats
    x: Floats
    meadow: npt.NDArray[np.bool_]
    age: Floats
    species: npt.NDArray[np.intp]
    second: npt.NDArray[np.intp]
    admixture: Floats
    planted: npt.NDArray[np.bool_]
    spacing: Floats
    angle: Floats
    stocking: Floats
    site: Floats
    hue: Floats


def cell_of(ids: Ints) -> tuple[Ints, Ints]:
    """Return the cell (i, j) of each stand."""
    i = ids // _ID_STRIDE
    return i, ids - i * _ID_STRIDE - _ID_STRIDE // 2


def stand_traits(seed: int, ids: Ints) -> StandTraits:
    """Return the properties of stands, by their ids."""
    i, j = cell_of(ids)
    y, x = _centres(seed, i, j)
    h = place_hash(stream(seed, "stand traits"), i, j)
    species, second = _species_of(h)
    # One in six stands is a thicket; the others range from pole stage to old growth.
    young = draw(h, 3) < 0.17
    age = np.where(young, 4.0 + 16.0 * draw(h, 4), 18.0 + (_MAX_AGE - 18.0) * draw(h, 4) ** 1.5)
    planted = (draw(h, 5) < 0.6) & (species < N_CONIFERS) & (age < 75.0)
    site = 1.0 + 0.09 * noise_at(stream(seed, "site"), y, x, 400.0)
    typical = np.clip(growth_height(species, age) * site, 2.0, None)
    meadow = draw(h, 6) < 0.08
    spacing = np.maximum(1.7, (1.25 + 0.30 * draw(h, 7)) * crown_radius(species, typical))
    return StandTraits(
        y=y,
        x=x,
        meadow=meadow,
        age=age,
        species=species,
        second=second,
        admixture=np.where(planted, 0.05, 0.5) * draw(h, 8),
        planted=planted,
        spacing=np.where(meadow, 13.0, spacing),
        angle=np.pi * draw(h, 9),
        stocking=np.where(meadow, 0.03 + 0.2 * draw(h, 10) ** 3, 0.97 - 0.35 * draw(h, 10) ** 2),
        site=site,
        hue=np.stack([_draw_hue(h, 11), _draw_hue(h, 12)], axis=-1),
    )


def _centres(seed: int, i: Ints, j: Ints) -> tuple[Floats, Floats]:
    """Return the centres [m] of the stands of cells."""
    h = place_hash(stream(seed, "stand centre"), i, j)
    return (i + 0.08 + 0.84 * draw(h, 0)) * _CELL, (j + 0.08 + 0.84 * draw(h, 1)) * _CELL


def _species_of(h: Hashes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return main and admixed species: conifers dominate half of all stands."""
    n_broad = len(SPECIES) - N_CONIFERS
    conifer = draw(h, 0) < 0.5
    kind = draw(h, 1)
    main = np.where(conifer, kind * N_CONIFERS, N_CONIFERS + kind * n_broad).astype(np.intp)
    return main, (draw(h, 2) * len(SPECIES)).astype(np.intp)


def _draw_hue(h: Hashes, index: int) -> Floats:
    """Return numbers between -1 and 1 with a triangular distribution."""
    return np.asarray(draw(h, 2 * index + 40) + draw(h, 2 * index + 41) - 1.0)


def stands_at(seed: int, y: Floats, x: Floats) -> Ints:
    """Return the ids of the stands that contain points [m]."""
    wy = y + _WARP * noise_at(stream(seed, "warp y"), y, x, _WARP_LENGTH)
    wx = x + _WARP * noise_at(stream(seed, "warp x"), y, x, _WARP_LENGTH)
    cells = np.floor(wy / _CELL).astype(np.int64), np.floor(wx / _CELL).astype(np.int64)
    return _nearest(seed, wy, wx, *cells)[0]


def _nearest(
    seed: int, y: Floats, x: Floats, i: Ints, j: Ints
) -> tuple[Ints, Ints, Floats, Floats]:
    """Return the two nearest stands to points in cells (i, j), and the squared distances."""
    first, second = np.full(y.shape, np.inf), np.full(y.shape, np.inf)
    ids, others = np.zeros(y.shape, np.int64), np.zeros(y.shape, np.int64)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            cy, cx = _centres(seed, i + di, j + dj)
            candidate = _stand_id(i + di, j + dj)
            d = (y - cy) ** 2 + (x - cx) ** 2
            closer, closer2 = d < first, d < second
            others = np.where(closer, ids, np.where(closer2, candidate, others))
            second = np.where(closer, first, np.where(closer2, d, second))
            ids = np.where(closer, candidate, ids)
            first = np.where(closer, d, first)
    return ids, others, first, second


def _stand_id(i: Ints, j: Ints) -> Ints:
    """Return one integer for the stand of cell (i, j)."""
    return np.asarray(i * _ID_STRIDE + j + _ID_STRIDE // 2)


def stand_grid(seed: int, y: Floats, x: Floats) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Return the stand map of a grid of increasing world coordinates [m].

    The id of the stand at each point, that of the stand behind the nearest border, and the
    distance to that border [m].
    """
    wy = y[:, None] + _WARP * noise_grid(stream(seed, "warp y"), y, x, _WARP_LENGTH)
    wx = x + _WARP * noise_grid(stream(seed, "warp x"), y, x, _WARP_LENGTH)
    i, j = np.floor(wy / _CELL).astype(np.int64), np.floor(wx / _CELL).astype(np.int64)
    ids, others = np.zeros(i.shape, np.int64), np.zeros(i.shape, np.int64)
    border = np.zeros(i.shape, np.float32)
    # Cell by cell, so that the centres are scalars and the arrays remain in the cache.
    cells = _stand_id(i, j)
    order = np.argsort(cells, axis=None, kind="stable")
    found, starts = np.unique(cells.ravel()[order], return_index=True)
    for cell, part in zip(found, np.split(order, starts[1:]), strict=True):
        at = cell_of(np.array([cell]))
        a, b, near, far = _nearest(seed, wy.ravel()[part], wx.ravel()[part], *at)
        (ay, bx), (oy, ox) = _centres(seed, *cell_of(a)), _centres(seed, *cell_of(b))
        ids.ravel()[part], others.ravel()[part] = a, b
        border.ravel()[part] = 0.5 * (far - near) / np.hypot(ay - oy, bx - ox)
    return ids, others, border


@dataclass(frozen=True)
class Species:
    """One species, or a group of species that look alike from above.

    `conifer`: crowns are evergreen, pointed and smooth, else deciduous, domed and lumpy. Growth
    (Chapman-Richards): height = tallest * (1 - exp(-rate * age)) ** shape [m, 1/year]. Crown
    radius = radius + slenderness * height [m]. From top to rim, the crown's surface drops by a
    share `depth` of the height, with the power `profile` of the distance from the stem: 1 for a
    cone, from 2 for a dome. `colour` and `autumn`: red, green and blue of sunlit foliage (8 bits).
    """

    name: str
    conifer: bool
    tallest: float
    rate: float
    shape: float
    radius: float
    slenderness: float
    depth: float
    profile: float
    colour: tuple[float, float, float]
    autumn: tuple[float, float, float]


SPECIES = (
    Species("spruce", True, 38, 0.026, 1.6, 0.60, 0.068, 0.58, 1.0, (101, 113, 75), (101, 112, 75)),
    Species("fir", True, 41, 0.023, 1.7, 0.65, 0.074, 0.52, 1.1, (94, 110, 85), (94, 109, 85)),
    Species("pine", True, 30, 0.034, 1.3, 0.75, 0.092, 0.36, 1.5, (112, 124, 90), (114, 122, 90)),
    Species("beech", False, 36, 0.023, 1.4, 0.80, 0.148, 0.40, 2.3, (120, 148, 82), (176, 134, 84)),
    Species("oak", False, 30, 0.022, 1.2, 0.90, 0.172, 0.42, 2.6, (130, 146, 88), (162, 128, 82)),
    Species(
        "birch", False, 25, 0.045, 1.2, 0.60, 0.118, 0.46, 1.9, (142, 162, 102), (206, 180, 88)
    ),
)
N_CONIFERS = sum(s.conifer for s in SPECIES)  # conifers come first


def parameters(name: str) -> npt.NDArray[np.float64]:
    """Return one parameter of every species, in the order of `SPECIES`."""
    return np.array([getattr(s, name) for s in SPECIES], np.float64)


def growth_height(species: npt.NDArray[np.intp], age: Floats) -> Floats:
    """Return the height [m] of dominant trees from their age [year], 0 below age 0.

    Chapman-Richards: Richards (1959), J. Exp. Bot. 10, 290-300.
    """
    grown = 1.0 - np.exp(-parameters("rate")[species] * np.maximum(age, 0.0))
    return np.asarray(parameters("tallest")[species] * grown ** parameters("shape")[species])


def crown_radius(species: npt.NDArray[np.intp], height: Floats) -> Floats:
    """Return the crown radius [m] of trees from their height [m], by species allometry."""
    return np.asarray(parameters("radius")[species] + parameters("slenderness")[species] * height)
