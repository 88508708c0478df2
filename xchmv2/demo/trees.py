"""Trees of a synthetic forest: the population, its growth, and the surface of its crowns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from xchmv2.demo.disturbance import Disturbance, struck_at
from xchmv2.demo.landscape import ROAD_HALF_WIDTH, TRACK_HALF_WIDTH, Building, Plane, Site
from xchmv2.demo.noise import (
    Cutout,
    Floats,
    Hashes,
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
    Ints,
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
_FOREVER = 1e6
_PIONEER = len(SPECIES) - 1
_BATCH = 1_500_000  # crown pixels that are processed at a time
_LOWEST = 0.3  # [m]; lower plants are ground cover
_LUMP_LENGTH = 2.1  # size of a branch group of a broadleaf crown [m]


@dataclass(frozen=True)
class Trees:
    """Trees, one entry each, in an order that depends only on their positions.

    Parameters
    ----------
    y, x : ndarray of float64
        Position of the stem [m].
    species : ndarray of int
        Index into `SPECIES`.
    birth, death : ndarray of float64
        Years of germination and death, as decimals.
    vigour : ndarray of float64
        Height relative to a dominant tree of its age and species.
    width : ndarray of float64
        Crown radius relative to the allometry.
    hue : ndarray of float64, shape (n, 2)
        Brightness and yellowness of the foliage, about 0.
    identity : ndarray of uint64
        Hash of the tree.
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
        """Return height and crown radius [m] on a date; zero for trees that are not alive.

        Parameters
        ----------
        clock : float
            Decimal year of the growth clock (:func:`xchmv2.demo.sun.season`).
        year : float
            Decimal year.

        Returns
        -------
        height, radius : ndarray of float64, shape (n,)
            Metres.
        """
        standing = (self.birth < year) & (year < self.death)
        height = self.vigour * growth_height(self.species, clock - self.birth)
        height = np.where(standing, np.minimum(height, MAX_HEIGHT), 0.0)
        radius = np.minimum(self.width * crown_radius(self.species, height), MAX_RADIUS)
        return height, np.where(standing, radius, 0.0)


def population(seed: int, site: Site, window: Cutout, events: Sequence[Disturbance]) -> Trees:
    """Return all trees of any date in a window.

    Parameters
    ----------
    seed : int
        Seed of the world.
    site : Site
        The ground, which must cover the window.
    window : Cutout
        Pixels that contain the stems.
    events : sequence of Disturbance
        In order of date; those after the date of interest may be left out.

    Returns
    -------
    Trees
        With births and deaths.
    """
    parts = [_overstorey(seed, site, window), _understorey(seed, site, window)]
    parts += [_regrowth(seed, events[: n + 1], site, window) for n in range(len(events))]
    trees = _join(parts)
    return _fell(trees.where(_has_room(trees, site)), seed, events)


def _overstorey(seed: int, site: Site, window: Cutout) -> Trees:
    """Return the trees of the overstorey."""
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
    return Trees(
        y=y,
        x=x,
        species=species.astype(np.intp),
        birth=BASE_YEAR - age,
        death=np.full(y.size, _FOREVER),
        vigour=vigour * np.where(solitary, 0.75, 1.0),
        width=width,
        hue=_hue_of(h, traits.hue[k]),
        identity=h,
    )


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
    d = traits.spacing[k]
    i = np.arange(np.floor(u.min() / d) - 1, np.ceil(u.max() / d) + 2).astype(np.int64)
    j = np.arange(np.floor(v.min() / d) - 1, np.ceil(v.max() / d) + 2).astype(np.int64)
    return np.repeat(i, j.size), np.tile(j, i.size)


def _inside(window: Cutout, y: Floats, x: Floats) -> npt.NDArray[np.bool_]:
    """Return which points lie between the outermost pixel centres of a window."""
    north, south, west, east = window.bounds
    return np.asarray((y >= north) & (y <= south) & (x >= west) & (x <= east))


def _hue_of(h: Hashes, stand_hue: Floats) -> Floats:
    """Return the foliage colour of trees: the stand's and their own."""
    own = np.stack([draw_normal(h, 20), draw_normal(h, 21)], axis=-1)
    return 0.6 * stand_hue + 0.55 * own


def _understorey(seed: int, site: Site, window: Cutout) -> Trees:
    """Return shrubs and suppressed trees, visible in gaps and along edges."""
    d = _UNDERSTOREY_SPACING
    north, south, west, east = window.bounds
    i = np.arange(np.floor(north / d) - 1, np.ceil(south / d) + 2).astype(np.int64)
    j = np.arange(np.floor(west / d) - 1, np.ceil(east / d) + 2).astype(np.int64)
    i, j = np.repeat(i, j.size), np.tile(j, i.size)
    h = place_hash(stream(seed, "understorey"), i, j)
    y, x = (i + 0.9 * draw(h, 0)) * d, (j + 0.9 * draw(h, 1)) * d
    ids, k = np.unique(site.stand[site.index(y, x)], return_inverse=True)
    traits = stand_traits(seed, ids)
    share = np.where(traits.meadow, 0.035, 0.55)[k]
    keep = _inside(window, y, x) & (draw(h, 2) < share)
    y, x, h, k = y[keep], x[keep], h[keep], k[keep]
    broad = N_CONIFERS + (draw(h, 3) * (len(SPECIES) - N_CONIFERS)).astype(np.intp)
    species = np.where(draw(h, 4) < 0.35, traits.species[k], broad)
    return Trees(
        y=y,
        x=x,
        species=species.astype(np.intp),
        birth=BASE_YEAR - traits.age[k] * (0.4 + 0.4 * draw(h, 5)),
        death=np.full(y.size, _FOREVER),
        vigour=0.07 + 0.23 * draw(h, 6) ** 2,
        width=np.exp(0.15 * draw_normal(h, 7)),
        hue=_hue_of(h, traits.hue[k]),
        identity=h,
    )


def _regrowth(seed: int, events: Sequence[Disturbance], site: Site, window: Cutout) -> Trees:
    """Return the regeneration after the last of some events, planted or natural."""
    event = events[-1]
    events = [e for e in events if np.hypot(e.y - event.y, e.x - event.x) < e.reach + event.reach]
    d, reach = _REGROWTH_SPACING, event.reach
    i = np.arange((-event.y - reach) // d, (-event.y + reach) // d + 1).astype(np.int64)
    j = np.arange((event.x - reach) // d, (event.x + reach) // d + 1).astype(np.int64)
    i, j = np.repeat(i, j.size), np.tile(j, i.size)
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
    return Trees(
        y=y,
        x=x,
        species=np.where(draw(h, 4) < 0.3, _PIONEER, traits.species[k]).astype(np.intp),
        birth=event.year + 0.2 + 3.0 * draw(h, 5),
        death=np.full(y.size, _FOREVER),
        vigour=np.exp(0.15 * draw_normal(h, 6)),
        width=np.exp(0.12 * draw_normal(h, 7)),
        hue=_hue_of(h, traits.hue[k]),
        identity=h,
    )


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


@dataclass(frozen=True)
class Canopy:
    """The upper surface of all crowns.

    Parameters
    ----------
    height : ndarray of float32, shape (height, width)
        Metres above ground, 0 without a crown.
    owner : ndarray of int64, shape (height, width)
        Index of the tree visible from above; -1 without one.
    """

    height: Plane
    owner: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Crowns:
    """Shapes of crowns, one entry each.

    Parameters
    ----------
    y, x : ndarray of float64
        Position of the stem [m].
    top : ndarray of float32
        Height [m].
    form : ndarray of float32, shape (n, 3)
        Quadratic form (yy, xx, 2 xy) that is 1 on the outline.
    fall : ndarray of float32, shape (n, 2)
        Share of the height by which the surface drops to the rim, and the power of the form.
    lumpiness : ndarray of float32
        Relative displacement of the outline by branch groups.
    """

    y: Floats
    x: Floats
    top: Plane
    form: Plane
    fall: Plane
    lumpiness: Plane


def canopy_of(trees: Trees, height: Floats, radius: Floats, window: Cutout, seed: int) -> Canopy:
    """Return the upper envelope of crowns.

    Parameters
    ----------
    trees : Trees
        All trees whose crowns may reach into the window.
    height, radius : ndarray of float64, shape (n,)
        Height and crown radius [m]; trees of height 0 are left out.
    window : Cutout
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
    window: Cutout,
    crowns: _Crowns,
    lumps: Plane,
    which: npt.NDArray[np.intp],
    half: int,
) -> None:
    """Raise the surface to crowns of at most 2 * half + 1 pixels in diameter."""
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
    # Positive floats sort like their bits: one maximum over height (high bits) and tree (low bits).
    bits = surface.view(np.uint32).astype(np.uint64) << np.uint64(32)
    np.maximum.at(keys, pixel, bits | (owner + 1).astype(np.uint64))


def roofs_of(buildings: tuple[Building, ...], window: Cutout) -> tuple[Plane, npt.NDArray[np.int8]]:
    """Return the roofs in a window.

    Parameters
    ----------
    buildings : tuple of Building
        Houses in and around the window.
    window : Cutout
        Pixels.

    Returns
    -------
    height : ndarray of float32, shape (height, width)
        Height of the roof above ground [m], 0 without a roof.
    roof : ndarray of int8, shape (height, width)
        Kind of roof; -1 without a roof.
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
