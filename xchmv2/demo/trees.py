"""Trees of a synthetic forest: the population, its growth, and the surface of its crowns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from xchmv2.demo.disturbance import Disturbance, struck_at
from xchmv2.demo.landscape import ROAD_HALF_WIDTH, TRACK_HALF_WIDTH, Plane, Site
from xchmv2.demo.noise import (
    Cutout,
    Floats,
    Hashes,
    Ints,
    cells_around,
    draw,
    draw_normal,
    noise_at,
    noise_grid,
    place_hash,
    stream,
)
from xchmv2.demo.stands import (
    BASE_YEAR,
    N_CONIFERS,
    SPECIES,
    StandTraits,
    cell_of,
    crown_radius,
    growth_height,
    parameters,
    stand_traits,
)

MAX_HEIGHT = 48.0  # [m]
MAX_RADIUS = 9.0  # [m]
_UNDERSTOREY_SPACING = 3.3
_REGROWTH_SPACING = 1.9
_PIONEER = len(SPECIES) - 1
_BATCH = 1_500_000  # crown pixels that are processed at a time
_LOWEST = 0.3  # [m]; lower plants are ground cover
_LUMP_LENGTH = 2.1  # size of a branch group of a broadleaf crown [m]
# By species: share of the height by which the crown's surface drops to its rim, the power of the
# squared distance, and the relative displacement of the outline by branch groups.
_DROP = parameters("depth").astype(np.float32)
_POWER = (0.5 * parameters("profile")).astype(np.float32)
_LUMPINESS = np.where(parameters("conifer") > 0, np.float32(0.05), np.float32(0.16))


@dataclass(frozen=True)
class Trees:
    """Trees, one entry each, in an order that depends only on their positions.

    Position of the stem (`y`, `x`) [m]; index of `species`; `birth` and `death` as decimal years;
    `vigour`: height relative to a dominant tree of its age and species; `width`: crown radius
    relative to the allometry; `hue` (n, 2): brightness and yellowness of the foliage, about 0;
    `identity`: hash of the tree.
    """

    y: Floats
    x: Floats
    species: npt.NDArray[np.intp]
    birth: Floats
    death: Floats
    vigour: Floats
    width: Floats
    hue: Floats
    identity: Hashes

    def where(self, keep: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Trees:
        """Return some of the trees."""
        return Trees(*(getattr(self, f.name)[keep] for f in fields(self)))

    def size_at(self, clock: float, year: float) -> tuple[Floats, Floats]:
        """Return height and crown radius [m] on a date, 0 for trees that are not alive.

        `clock` is the decimal year of :class:`xchmv2.demo.sun.Season`'s growth clock.
        """
        standing = (self.birth < year) & (year < self.death)
        height = self.vigour * growth_height(self.species, clock - self.birth)
        height = np.where(standing, np.minimum(height, MAX_HEIGHT), 0.0)
        radius = np.minimum(self.width * crown_radius(self.species, height), MAX_RADIUS)
        return height, np.where(standing, radius, 0.0)


def population(seed: int, site: Site, window: Cutout, events: Sequence[Disturbance]) -> Trees:
    """Return all trees of any date with stems in a window, which `site` must cover.

    `events` are in order of date; those after the date of interest may be left out.
    """
    parts = [_overstorey(seed, site, window), _understorey(seed, site, window)]
    parts += [_regrowth(seed, events[: n + 1], site, window) for n in range(len(events))]
    trees = _join(parts)
    return _fell(trees.where(_has_room(trees, site)), seed, events)


def _overstorey(seed: int, site: Site, window: Cutout) -> Trees:
    y, x, h, k, traits = _planting_places(seed, site, window)
    open_place = noise_at(stream(seed, "gaps"), y, x, 21.0) > np.where(traits.planted, 2.6, 1.45)[k]
    keep = (draw(h, 2) < traits.stocking[k]) & ~(open_place & ~traits.meadow[k])
    y, x, h, k = y[keep], x[keep], h[keep], k[keep]
    species = np.where(draw(h, 3) < traits.admixture[k], traits.second[k], traits.species[k])
    solitary = traits.meadow[k]
    species = np.where(solitary, np.maximum(species, N_CONIFERS), species)
    spread = np.where(traits.planted[k], 0.07, 0.15)
    vigour = np.clip(np.exp(spread * draw_normal(h, 4)), 0.55, 1.3) * traits.site[k]
    age = traits.age[k] * (1.0 + np.where(traits.planted[k], 0.02, 0.12) * draw_normal(h, 5))
    width = np.exp(0.11 * draw_normal(h, 6)) * np.where(solitary, 1.3, 1.0)
    vigour = vigour * np.where(solitary, 0.75, 1.0)
    return _trees(y, x, h, traits.hue[k], species, BASE_YEAR - age, vigour, width)


def _planting_places(
    seed: int, site: Site, window: Cutout
) -> tuple[Floats, Floats, Hashes, npt.NDArray[np.intp], StandTraits]:
    """Return the places of overstorey trees in a window, their hashes and their stands' traits."""
    ids, which = np.unique(site.stand, return_inverse=True)
    which = which.reshape(site.stand.shape)
    traits = stand_traits(seed, ids)
    lattice = site.lattice
    places = []
    for n, box in enumerate(ndimage.find_objects(which + 1)):
        y, x = lattice.y[box[0]], lattice.x[box[1]]
        at = _lattice_of(traits, n, (y[0] - 1, y[-1] + 1), (x[0] - 1, x[-1] + 1))
        places.append((*at, np.full(at[0].size, n, np.intp)))
    i, j, k = (np.concatenate(part) for part in zip(*places, strict=True))
    h = place_hash(stream(seed, "tree"), *cell_of(ids[k]), i, j)
    jitter = np.where(traits.planted[k], 0.14, 0.36) * traits.spacing[k]
    u = i * traits.spacing[k] + jitter * (2 * draw(h, 0) - 1)
    v = j * traits.spacing[k] + jitter * (2 * draw(h, 1) - 1)
    c, s = np.cos(traits.angle[k]), np.sin(traits.angle[k])
    y, x = traits.y[k] + u * c - v * s, traits.x[k] + u * s + v * c
    keep = _inside(window, y, x)
    keep[keep] = which[site.index(y[keep], x[keep])] == k[keep]
    return y[keep], x[keep], h[keep], k[keep], traits


def _lattice_of(
    traits: StandTraits, k: int, y: tuple[float, float], x: tuple[float, float]
) -> tuple[Ints, Ints]:
    """Return the planting places (i, j) of stand k that may lie in a box [m]."""
    c, s = np.cos(traits.angle[k]), np.sin(traits.angle[k])
    corners_y = np.array([y[0], y[0], y[1], y[1]]) - traits.y[k]
    corners_x = np.array([x[0], x[1], x[0], x[1]]) - traits.x[k]
    u, v = (corners_y * c + corners_x * s), (corners_x * c - corners_y * s)
    return cells_around((u.min(), u.max(), v.min(), v.max()), float(traits.spacing[k]))


def _inside(window: Cutout, y: Floats, x: Floats) -> npt.NDArray[np.bool_]:
    """Return which points lie between the outermost pixel centres of a window."""
    north, south, west, east = window.bounds
    return np.asarray((y >= north) & (y <= south) & (x >= west) & (x <= east))


def _understorey(seed: int, site: Site, window: Cutout) -> Trees:
    """Return shrubs and suppressed trees, visible in gaps and along edges."""
    d = _UNDERSTOREY_SPACING
    i, j = cells_around(window.bounds, d)
    h = place_hash(stream(seed, "understorey"), i, j)
    y, x = (i + 0.9 * draw(h, 0)) * d, (j + 0.9 * draw(h, 1)) * d
    ids, k = np.unique(site.stand[site.index(y, x)], return_inverse=True)
    traits = stand_traits(seed, ids)
    share = np.where(traits.meadow, 0.035, 0.55)[k]
    keep = _inside(window, y, x) & (draw(h, 2) < share)
    y, x, h, k = y[keep], x[keep], h[keep], k[keep]
    broad = N_CONIFERS + (draw(h, 3) * (len(SPECIES) - N_CONIFERS)).astype(np.intp)
    species = np.where(draw(h, 4) < 0.35, traits.species[k], broad)
    birth = BASE_YEAR - traits.age[k] * (0.4 + 0.4 * draw(h, 5))
    vigour, width = 0.07 + 0.23 * draw(h, 6) ** 2, np.exp(0.15 * draw_normal(h, 7))
    return _trees(y, x, h, traits.hue[k], species, birth, vigour, width)


def _regrowth(seed: int, events: Sequence[Disturbance], site: Site, window: Cutout) -> Trees:
    """Return the regeneration after the last of some events, planted or natural."""
    event = events[-1]
    events = [e for e in events if np.hypot(e.y - event.y, e.x - event.x) < e.reach + event.reach]
    d, r = _REGROWTH_SPACING, event.reach
    i, j = cells_around((-event.y - r, -event.y + r, event.x - r, event.x + r), d)
    h = place_hash(event.key(seed), i, j)
    y, x = (i + 0.7 * draw(h, 1)) * d, (j + 0.7 * draw(h, 2)) * d
    keep = _inside(window, y, x) & (draw(h, 3) < (0.0 if event.kind == "thinning" else 0.7))
    for last, struck in struck_at(events, seed, y[keep], x[keep]):
        opened = struck if last is event else np.zeros(0, bool)
    keep[keep] = opened
    y, x, h = y[keep], x[keep], h[keep]
    ids, k = np.unique(site.stand[site.index(y, x)], return_inverse=True)
    traits = stand_traits(seed, ids)
    keep = ~traits.meadow[k]
    y, x, h, k = y[keep], x[keep], h[keep], k[keep]
    species = np.where(draw(h, 4) < 0.3, _PIONEER, traits.species[k])
    birth = event.year + 0.2 + 3.0 * draw(h, 5)
    vigour, width = np.exp(0.15 * draw_normal(h, 6)), np.exp(0.12 * draw_normal(h, 7))
    return _trees(y, x, h, traits.hue[k], species, birth, vigour, width)


def _trees(
    y: Floats,
    x: Floats,
    h: Hashes,
    stand_hue: Floats,
    species: npt.NDArray[np.intp],
    birth: Floats,
    vigour: Floats,
    width: Floats,
) -> Trees:
    """Return trees that live for ever; the colour of their foliage is the stand's and their own."""
    hue = 0.6 * stand_hue + 0.55 * np.stack([draw_normal(h, 20), draw_normal(h, 21)], axis=-1)
    death = np.full(y.size, np.inf)
    return Trees(y, x, species.astype(np.intp), birth, death, vigour, width, hue, h)


def _join(parts: Sequence[Trees]) -> Trees:
    """Return all trees as one object, in order of position."""
    joined = Trees(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Trees)))
    return joined.where(np.lexsort((joined.x, joined.y)))


def _fell(trees: Trees, seed: int, events: Sequence[Disturbance]) -> Trees:
    """Return the trees with the deaths that events cause."""
    death = trees.death.copy()
    # Crowns, not stems, define the edge of a clear-cut.
    lean = 0.6 * _grown_radius(trees)
    for event, struck in struck_at(events, seed, trees.y, trees.x, lean):
        hit = np.flatnonzero(struck & (trees.birth < event.year))
        h = place_hash(event.key(seed), trees.identity[hit].astype(np.int64))
        hit = hit[event.taken(h, trees.y[hit], trees.x[hit])]
        death[hit] = np.minimum(death[hit], event.year)
    return replace(trees, death=death)


def _grown_radius(trees: Trees) -> Floats:
    """Return the crown radius [m] of trees in 2028, for properties that are equal on all dates."""
    grown = trees.vigour * growth_height(trees.species, BASE_YEAR + 8.0 - trees.birth)
    return np.asarray(np.minimum(trees.width * crown_radius(trees.species, grown), MAX_RADIUS))


def _has_room(trees: Trees, site: Site) -> npt.NDArray[np.bool_]:
    """Return whether trees are far enough from roads, tracks, water and houses."""
    radius = _grown_radius(trees)
    at = site.index(trees.y, trees.x)
    room = site.road[at] > ROAD_HALF_WIDTH + 1.0 + radius
    room &= site.track[at] > TRACK_HALF_WIDTH + 0.45 * radius
    room &= site.lake[at] > 1.0 + 0.8 * radius
    garden_tree = (draw(trees.identity, 30) < 0.05) & (site.yard[at] > -10.0)
    return np.asarray(room & ((site.yard[at] > 0.0) | garden_tree))


def canopy_of(
    trees: Trees, height: Floats, radius: Floats, window: Cutout, seed: int
) -> tuple[Plane, npt.NDArray[np.int64]]:
    """Return the upper envelope of crowns: its height [m], and its tree, -1 where there is none.

    `height` and `radius` [m] are those of the trees; trees of height 0 are left out. `seed` is for
    the lumps of the crowns.
    """
    reach = np.maximum(radius, 0.75 * window.resolution)
    lumps = noise_grid(stream(seed, "lumps"), window.y, window.x, _LUMP_LENGTH)
    lumps = np.clip(lumps, -2.2, 1.8)
    halves = np.ceil(1.25 * reach / window.resolution).astype(np.int64)
    halves[height < _LOWEST] = 0
    keys = np.zeros(window.height * window.width, np.uint64)
    for half in np.unique(halves[halves > 0]):
        same = np.flatnonzero(halves == half)
        step = max(1, _BATCH // int(2 * half + 1) ** 2)
        for k in range(0, same.size, step):
            some = same[k : k + step]
            crowns = trees.where(some), height[some].astype(np.float32), reach[some]
            _splat(keys, window, lumps, *crowns, some, int(half))
    top = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32).reshape(window.shape)
    owner = ((keys & np.uint64(0xFFFFFFFF)).astype(np.int64) - 1).reshape(window.shape)
    # Branch groups: strong on wide broadleaf crowns, faint on conifers.
    size = np.where(parameters("conifer")[trees.species] > 0, 0.13, 0.36) * radius
    strength = np.append(size, 0.0).astype(np.float32)[owner]  # owner -1 reads the last entry
    lumps += 0.6 * noise_grid(stream(seed, "twigs"), window.y, window.x, 1.0)
    rough = np.maximum(top + strength * lumps, 0.4 * top)
    return np.where(top > 0, rough, np.float32(0)).astype(np.float32), owner


def _splat(
    keys: npt.NDArray[np.uint64],
    window: Cutout,
    lumps: Plane,
    trees: Trees,
    top: Plane,
    radius: Floats,
    numbers: npt.NDArray[np.intp],
    half: int,
) -> None:
    """Raise the surface to crowns of at most 2 * half + 1 pixels in diameter."""
    res = window.resolution
    y, x = trees.y[:, None], trees.x[:, None]
    offsets = np.arange(-half, half + 1)
    rows = np.floor(y / res + window.dy).astype(np.int64) + offsets
    cols = np.floor(x / res + window.dx).astype(np.int64) + offsets
    dy = ((rows + 0.5 - window.dy) * res - y).astype(np.float32)[:, :, None]
    dx = ((cols + 0.5 - window.dx) * res - x).astype(np.float32)[:, None, :]
    yy, xx, xy = _outlines(trees, radius)
    rho2 = yy * dy**2 + xx * dx**2 + (xy * dy) * dx  # [n, 2 half + 1, 2 half + 1]
    rows, cols = rows - window.row, cols - window.col
    in_rows = (rows >= 0) & (rows < window.height)
    in_cols = (cols >= 0) & (cols < window.width)
    tree, r, c = np.nonzero((rho2 < 1.3) & in_rows[:, :, None] & in_cols[:, None, :])
    pixel = rows[tree, r] * window.width + cols[tree, c]
    rho2 = rho2[tree, r, c] * (1.0 - _LUMPINESS[trees.species[tree]] * lumps.ravel()[pixel])
    inside = rho2 < 1.0
    tree, pixel, rho2 = tree[inside], pixel[inside], rho2[inside]
    kind = trees.species[tree]
    surface = top[tree] * (1.0 - _DROP[kind] * rho2 ** _POWER[kind])
    # Positive floats sort like their bits: one maximum over height (high bits) and tree (low bits).
    bits = surface.view(np.uint32).astype(np.uint64) << np.uint64(32)
    np.maximum.at(keys, pixel, bits | (numbers[tree] + 1).astype(np.uint64))


def _outlines(trees: Trees, radius: Floats) -> tuple[Plane, ...]:
    """Return the quadratic forms (yy, xx, 2 xy), each (n, 1, 1), that are 1 on crowns' outlines."""
    stretch = np.exp(0.10 * draw_normal(trees.identity, 50))
    turn = np.pi * draw(trees.identity, 51)
    c, s = np.cos(turn), np.sin(turn)
    p, q = 1.0 / (radius * stretch) ** 2, 1.0 / (radius / stretch) ** 2
    form = p * c**2 + q * s**2, p * s**2 + q * c**2, 2.0 * c * s * (p - q)
    return tuple(part.astype(np.float32)[:, None, None] for part in form)
