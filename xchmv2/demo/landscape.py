"""The ground: relief, roads, tracks, lakes and farms, and the land cover that follows from them.

Smooth properties are computed on a lattice of 1.2 m that is fixed to the world. Trees and pixels of
any size read them from it, so that a tree belongs to the same stand for any window, pixel size and
misregistration of the imagery.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.demo.noise import (
    Cutout,
    Floats,
    Hashes,
    Ints,
    cells_around,
    draw,
    noise_at,
    noise_grid,
    place_hash,
    stream,
)
from xchmv2.demo.stands import stand_grid, stand_traits

_LATTICE = 1.2  # [m]
ROAD_HALF_WIDTH = 2.6
TRACK_HALF_WIDTH = 1.7
_RELIEF = ((420.0, 12.0), (150.0, 3.0), (48.0, 0.45), (9.0, 0.06))  # wavelength, standard deviation
_ROAD_LENGTH = 520.0
_LAKE_CELL = 380.0
_SHORE_LENGTH = 26.0
_FARM_CELL = 190.0
_FAR = 1e3

COVERS = ("forest", "meadow", "track", "road", "water", "building")
FOREST, MEADOW, _TRACK, ROAD, WATER, BUILDING = range(len(COVERS))

Plane = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Building:
    """One house: a rectangle under a gable roof."""

    y: float
    x: float
    half_length: float
    half_width: float
    angle: float
    wall: float
    ridge: float
    roof: int


#: Centre (y, x) and radius of a clearing [m], and a house in it.
_Farm = tuple[float, float, float, _Building]


@dataclass(frozen=True)
class Site:
    """The smooth properties of the ground on the world lattice.

    `stand`: stand ids; `relief`: elevation [m]; `road`, `track`: distance to the centre line [m];
    `lake`, `yard`: distance to the shore, and to the edge of a farm's clearing, negative inside
    [m]; `buildings`: all houses in and around the lattice.
    """

    lattice: Cutout
    stand: Ints
    relief: Plane
    road: Plane
    track: Plane
    lake: Plane
    yard: Plane
    buildings: tuple[_Building, ...]

    def index(self, y: Floats, x: Floats) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return the nearest lattice point of world coordinates [m]."""
        i = np.floor(y / _LATTICE).astype(np.intp) - self.lattice.row
        j = np.floor(x / _LATTICE).astype(np.intp) - self.lattice.col
        return np.clip(i, 0, self.relief.shape[0] - 1), np.clip(j, 0, self.relief.shape[1] - 1)

    def sample(self, plane: Plane, window: Cutout) -> Plane:
        """Interpolate one property bilinearly to the pixels of a window inside the lattice."""
        v, u = window.y / _LATTICE - 0.5, window.x / _LATTICE - 0.5
        i, j = np.floor(v).astype(np.intp), np.floor(u).astype(np.intp)
        fv, fu = (v - i).astype(np.float32)[:, None], (u - j).astype(np.float32)
        i, j = i - self.lattice.row, j - self.lattice.col
        rows = plane[i] + (plane[i + 1] - plane[i]) * fv
        left = rows[:, j]
        return np.asarray(left + (rows[:, j + 1] - left) * fu)


def is_land(seed: int, y: Floats, x: Floats, margin: float) -> npt.NDArray[np.bool_]:
    """Return whether points [m] are farther than `margin` [m] from any lake and road."""
    return np.asarray(
        (_distance_to_lake(seed, y, x) > margin) & (_road_distance(seed, y, x) > margin)
    )


def _distance_to_lake(seed: int, y: Floats, x: Floats) -> Floats:
    """Return the distance [m] from points to the nearest lake shore, negative inside.

    Accurate near the shore; 1000 m if no lake is near.
    """
    distance = np.full(y.shape, _FAR)
    wobble = noise_at(stream(seed, "shore"), y, x, _SHORE_LENGTH)
    i, j = np.floor(y / _LAKE_CELL).astype(np.int64), np.floor(x / _LAKE_CELL).astype(np.int64)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            own = _lake_distance(seed, i + di, j + dj, y, x, wobble)
            distance = np.minimum(distance, own)
    return distance


def _lake_distance(
    seed: int, i: Ints, j: Ints, y: Floats, x: Floats, wobble: npt.NDArray[Any]
) -> Floats:
    """Return the distance [m] from points to the shore of the lake of cell (i, j)."""
    cy, cx, radius = _lake_of(seed, i, j)
    return np.asarray(np.hypot(y - cy, (x - cx) * 0.8) - radius * (1.0 + 0.22 * wobble))


def _lake_of(seed: int, i: Ints, j: Ints) -> tuple[Floats, Floats, Floats]:
    """Return centre and radius [m] of the lakes of cells; the radius is negative without one."""
    h = place_hash(stream(seed, "lake"), i, j)
    radius = np.where(draw(h, 0) < 0.6, 14.0 + 42.0 * draw(h, 1) ** 1.5, -_FAR)
    return (i + draw(h, 2)) * _LAKE_CELL, (j + draw(h, 3)) * _LAKE_CELL, radius


def _road_distance(seed: int, y: Floats, x: Floats) -> Floats:
    """Return the distance [m] from points to the centre line of the nearest road.

    Exact near the road.
    """
    key = stream(seed, "road")

    def at(dy: float, dx: float) -> Floats:
        return noise_at(key, y + dy, x + dx, _ROAD_LENGTH)

    gy, gx = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    return _line_distance(at(0, 0), gy, gx, _ROAD_LENGTH)


def _line_distance(n: Floats, gy: Floats, gx: Floats, length: float) -> Floats:
    """Return the distance [m] to the zero line of noise; far where the noise is too flat."""
    slope = np.hypot(gy, gx)
    return np.asarray(np.where(slope > 0.35 / length, np.abs(n) / np.maximum(slope, 1e-9), _FAR))


def site_of(seed: int, window: Cutout) -> Site:
    """Return the ground under a window, on a lattice that is two points larger."""
    north, south, west, east = window.bounds
    row, col = int(np.floor(north / _LATTICE)) - 2, int(np.floor(west / _LATTICE)) - 2
    height, width = int(south / _LATTICE) + 4 - row, int(east / _LATTICE) + 4 - col
    lattice = Cutout(row, col, height, width, _LATTICE)
    y, x = lattice.y, lattice.x
    stand, other, border = stand_grid(seed, y, x)
    has_track = draw(place_hash(stream(seed, "track"), stand + other), 0) < 0.4
    road = _road_plane(seed, y, x)
    shore = noise_grid(stream(seed, "shore"), y, x, _SHORE_LENGTH)
    lake = np.maximum(_lake_plane(seed, y, x, shore), 7.0 - road)
    houses = _farms(seed, y, x)
    relief = sum(
        noise_grid(stream(seed, "relief", k), y, x, w) * s for k, (w, s) in enumerate(_RELIEF)
    )
    return Site(
        lattice=lattice,
        stand=stand,
        relief=np.asarray(relief, np.float32),
        road=road,
        track=np.where(has_track, border, np.float32(_FAR)),
        lake=lake,
        yard=_yard_plane(houses, y, x, shore),
        buildings=tuple(house for *_, house in houses),
    )


def _road_plane(seed: int, y: Floats, x: Floats) -> Plane:
    """Return :func:`_road_distance` on a lattice."""
    step = y[1] - y[0]
    n = noise_grid(
        stream(seed, "road"),
        np.concatenate([y[:1] - step, y, y[-1:] + step]),
        np.concatenate([x[:1] - step, x, x[-1:] + step]),
        _ROAD_LENGTH,
    ).astype(np.float64)
    gy, gx = (n[2:, 1:-1] - n[:-2, 1:-1]) / (2 * step), (n[1:-1, 2:] - n[1:-1, :-2]) / (2 * step)
    return _line_distance(n[1:-1, 1:-1], gy, gx, _ROAD_LENGTH).astype(np.float32)


def _lake_plane(seed: int, y: Floats, x: Floats, wobble: Plane) -> Plane:
    """Return :func:`_distance_to_lake` on a lattice."""
    distance = np.full(wobble.shape, _FAR, np.float32)
    for i, j in zip(*cells_around((y[0], y[-1], x[0], x[-1]), _LAKE_CELL), strict=True):
        cell = np.array([i]), np.array([j])
        cy, cx, radius = (float(v[0]) for v in _lake_of(seed, *cell))
        rows, cols = _around(y, cy, 2.0 * radius + 20.0), _around(x, cx, 2.5 * radius + 25.0)
        if radius > 0.0 and rows.start < rows.stop and cols.start < cols.stop:
            part = _lake_distance(seed, *cell, y[rows, None], x[cols], wobble[rows, cols])
            distance[rows, cols] = np.minimum(distance[rows, cols], part)
    return distance


def _around(axis: Floats, centre: float, reach: float) -> slice:
    """Return the part of a sorted axis within reach of a centre."""
    start, stop = np.searchsorted(axis, (centre - reach, centre + reach))
    return slice(int(start), int(stop))


def _farms(seed: int, y: Floats, x: Floats) -> list[_Farm]:
    """Return the buildings in and around a region, each with its clearing."""
    i, j = cells_around((y[0], y[-1], x[0], x[-1]), _FARM_CELL)
    h = place_hash(stream(seed, "farm"), i, j)
    cy, cx = (i + 0.2 + 0.6 * draw(h, 0)) * _FARM_CELL, (j + 0.2 + 0.6 * draw(h, 1)) * _FARM_CELL
    keep = (draw(h, 2) < 0.33) & (_road_distance(seed, cy, cx) > 16.0)
    keep &= _distance_to_lake(seed, cy, cx) > 30.0
    out = []
    for k in np.flatnonzero(keep):
        own = h[k : k + 1]
        radius = 17.0 + 14.0 * float(draw(own, 3)[0])
        for b in range(1 + int(3 * draw(own, 4)[0])):
            centre = float(cy[k]), float(cx[k])
            out.append((*centre, radius, _building(own, b, *centre)))
    return out


def _building(h: Hashes, b: int, cy: float, cx: float) -> _Building:
    """Return the `b`-th building of a farm; its axes follow the farm's, at right angles or not."""
    u = [float(draw(h, 10 + 10 * b + k)[0]) for k in range(7)]
    turn = 2.0 * np.pi * (u[0] + b) / 3.0
    distance = 0.0 if b == 0 else 13.0 + 4.0 * u[1]
    width = 3.0 + 3.0 * u[2]
    return _Building(
        y=cy + distance * np.sin(turn),
        x=cx + distance * np.cos(turn),
        half_length=width * (1.1 + 0.9 * u[3]),
        half_width=width,
        angle=np.pi * float(draw(h, 5)[0]) + 0.5 * np.pi * (u[4] > 0.5),
        wall=2.8 + 3.0 * u[5],
        ridge=1.0 + 2.2 * u[6],
        roof=int(4 * float(draw(h, 6 + b)[0])),
    )


def _yard_plane(houses: list[_Farm], y: Floats, x: Floats, wobble: Plane) -> Plane:
    """Return the distance [m] to the edge of farm clearings on a lattice, negative inside."""
    distance = np.full(wobble.shape, _FAR, np.float32)
    for cy, cx, radius, _ in houses:
        rows, cols = _around(y, cy, 2.0 * radius + 10.0), _around(x, cx, 2.0 * radius + 10.0)
        edge = radius * (1.0 + 0.15 * wobble[rows, cols])
        own = np.hypot(y[rows, None] - cy, x[cols] - cx) - edge
        distance[rows, cols] = np.minimum(distance[rows, cols], own)
    return distance


@dataclass(frozen=True)
class Ground:
    """What lies under the trees in a window.

    `cover`: index into `COVERS`, where "forest" is forest land with or without trees; `roof`: kind
    of roof, -1 without one; `roof_height`: its height above ground [m].
    """

    cover: npt.NDArray[np.uint8]
    roof: npt.NDArray[np.int8]
    roof_height: Plane


def ground_of(seed: int, site: Site, window: Cutout) -> Ground:
    """Return the land cover and the roofs of a window, which `site` must cover."""
    i, j = site.index(window.y, window.x)
    ids, which = np.unique(site.stand, return_inverse=True)
    meadow = stand_traits(seed, ids).meadow[which.reshape(site.stand.shape)]
    open_land = meadow[i[:, None], j] | (site.sample(site.yard, window) < 0)
    cover = np.where(open_land, MEADOW, FOREST).astype(np.uint8)
    cover[site.sample(site.track, window) < TRACK_HALF_WIDTH] = _TRACK
    cover[site.sample(site.road, window) < ROAD_HALF_WIDTH] = ROAD
    cover[site.sample(site.lake, window) < 0] = WATER
    roof, height = _roofs_of(site.buildings, window)
    cover[roof >= 0] = BUILDING
    return Ground(cover, roof, height)


def _roofs_of(
    buildings: tuple[_Building, ...], window: Cutout
) -> tuple[npt.NDArray[np.int8], Plane]:
    """Return the kind of the roofs in a window, and their height [m]."""
    roof, height = np.full(window.shape, -1, np.int8), np.zeros(window.shape, np.float32)
    y, x = window.y, window.x
    for house in buildings:
        reach = float(np.hypot(house.half_length, house.half_width))
        rows, cols = _around(y, house.y, reach), _around(x, house.x, reach)
        c, s = np.cos(house.angle), np.sin(house.angle)
        dy, dx = y[rows, None] - house.y, x[cols] - house.x
        along, across = np.abs(dx * c + dy * s), np.abs(dy * c - dx * s)
        inside = (along < house.half_length) & (across < house.half_width)
        top = house.wall + house.ridge * (1.0 - across / house.half_width)
        height[rows, cols] = np.where(inside, top, height[rows, cols])
        roof[rows, cols] = np.where(inside, house.roof, roof[rows, cols])
    return roof, height
