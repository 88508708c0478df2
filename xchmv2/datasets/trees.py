"""Trees: where they stand, what they are, and how tall and wide they are on a date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from xchmv2.datasets.events import Disturbance, struck_at
from xchmv2.datasets.landscape import ROAD_HALF_WIDTH, TRACK_HALF_WIDTH, Site
from xchmv2.datasets.noise import (
    Floats,
    Hashes,
    Window,
    draw,
    draw_normal,
    noise_at,
    place_hash,
    stream,
)
from xchmv2.datasets.species import N_CONIFERS, SPECIES, crown_radius, growth_height
from xchmv2.datasets.stands import BASE_YEAR, Ints, StandTraits, cell_of, stand_traits

MAX_HEIGHT = 48.0  # [m]
MAX_RADIUS = 9.0  # [m]
_UNDERSTOREY_SPACING = 3.3
_REGROWTH_SPACING = 1.9
_FOREVER = 1e6
_PIONEER = len(SPECIES) - 1


@dataclass(frozen=True)
class Trees:
    """Trees, one entry each, in an order that depends on their places alone.

    Parameters
    ----------
    y, x : ndarray of float64
        Stem [m].
    species : ndarray of int
        Index into `SPECIES`.
    birth, death : ndarray of float64
        Decimal years.
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
        """Return height and crown radius [m] on a date; zero for trees that do not stand.

        Parameters
        ----------
        clock : float
            Decimal year of the growth clock (:func:`xchmv2.datasets.sun.season`).
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


def _join(parts: Sequence[Trees]) -> Trees:
    """Return all trees in one, in order of place."""
    joined = Trees(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Trees)))
    return joined.where(np.lexsort((joined.x, joined.y)))


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


def _planting_places(
    seed: int, site: Site, window: Window
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


def _inside(window: Window, y: Floats, x: Floats) -> npt.NDArray[np.bool_]:
    """Return which points lie between the outermost pixel centres of a window."""
    north, south, west, east = window.bounds
    return np.asarray((y >= north) & (y <= south) & (x >= west) & (x <= east))


def _hue_of(h: Hashes, stand_hue: Floats) -> Floats:
    """Return the foliage colour of trees: the stand's and their own."""
    own = np.stack([draw_normal(h, 20), draw_normal(h, 21)], axis=-1)
    return 0.6 * stand_hue + 0.55 * own


def _overstorey(seed: int, site: Site, window: Window) -> Trees:
    """Return the trees the stands were made of."""
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


def _understorey(seed: int, site: Site, window: Window) -> Trees:
    """Return shrubs and suppressed trees, seen in gaps and along edges."""
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


def _regrowth(seed: int, events: Sequence[Disturbance], site: Site, window: Window) -> Trees:
    """Return the trees that come up after the last of some events, planted or self-sown."""
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


def _grown_radius(trees: Trees) -> Floats:
    """Return the crown radius [m] of trees in 2028, for what must not change from date to date."""
    grown = trees.vigour * growth_height(trees.species, BASE_YEAR + 8.0 - trees.birth)
    return np.asarray(np.minimum(trees.width * crown_radius(trees.species, grown), MAX_RADIUS))


def _has_room(trees: Trees, site: Site) -> npt.NDArray[np.bool_]:
    """Return which trees are far enough from roads, tracks, water and houses to stand."""
    radius = _grown_radius(trees)
    at = site.index(trees.y, trees.x)
    room = site.road[at] > ROAD_HALF_WIDTH + 1.0 + radius
    room &= site.track[at] > TRACK_HALF_WIDTH + 0.45 * radius
    room &= site.lake[at] > 1.0 + 0.8 * radius
    garden_tree = (draw(trees.identity, 30) < 0.05) & (site.yard[at] > -10.0)
    return np.asarray(room & ((site.yard[at] > 0.0) | garden_tree))


def _fell(trees: Trees, seed: int, events: Sequence[Disturbance]) -> Trees:
    """Return the trees with the deaths that events bring."""
    death = trees.death.copy()
    # A forester marks the edge of a cut by crowns, not by stems.
    lean = 0.6 * _grown_radius(trees)
    for event, struck in struck_at(events, seed, trees.y, trees.x, lean):
        hit = np.flatnonzero(struck & (trees.birth < event.year))
        h = place_hash(event.key(seed), trees.identity[hit].astype(np.int64))
        hit = hit[event.taken(h, trees.y[hit], trees.x[hit])]
        death[hit] = np.minimum(death[hit], event.year)
    return replace(trees, death=death)


def population(seed: int, site: Site, window: Window, events: Sequence[Disturbance]) -> Trees:
    """Return every tree that ever stands in a window.

    Parameters
    ----------
    seed : int
        Seed of the world.
    site : Site
        The ground, which must cover the window.
    window : Window
        Where to look for stems.
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
