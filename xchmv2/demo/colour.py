"""Land cover of a synthetic scene, and the colours of ground and crowns in diffuse light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xchmv2.demo.disturbance import Disturbance, struck_in
from xchmv2.demo.landscape import ROAD_HALF_WIDTH, TRACK_HALF_WIDTH, Plane, Site
from xchmv2.demo.noise import Cutout, draw, fractal_grid, noise_grid, stream
from xchmv2.demo.stands import N_CONIFERS, SPECIES, stand_traits
from xchmv2.demo.sun import Season
from xchmv2.demo.trees import Trees, roofs_of

COVERS = ("forest", "meadow", "track", "road", "water", "building")
FOREST, _MEADOW, _TRACK, ROAD, WATER, BUILDING = range(len(COVERS))

_ROOFS = ((164, 116, 98), (128, 130, 134), (206, 208, 212), (146, 130, 116))
_TWIGS = (128, 116, 104)
_FRESH_CUT_YEARS = 3.5  # how long slash and bare soil show

Picture = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ground:
    """Land cover and buildings in a window.

    Parameters
    ----------
    cover : ndarray of uint8, shape (height, width)
        Index into `COVERS`; "forest" is forest land, with or without trees.
    roof_height : ndarray of float32, shape (height, width)
        Height of roofs above ground [m].
    """

    cover: npt.NDArray[np.uint8]
    roof_height: Plane


def ground_of(seed: int, site: Site, window: Cutout) -> Ground:
    """Return the land cover and the roofs of a window.

    Parameters
    ----------
    seed : int
        Seed of the world.
    site : Site
        Covers the window.
    window : Cutout
        Pixels.

    Returns
    -------
    Ground
        Cover classes and roofs.
    """
    i, j = site.index(window.y, window.x)
    ids, which = np.unique(site.stand, return_inverse=True)
    meadow = stand_traits(seed, ids).meadow[which.reshape(site.stand.shape)]
    open_land = meadow[i[:, None], j] | (site.sample(site.yard, window) < 0)
    cover = np.where(open_land, _MEADOW, FOREST).astype(np.uint8)
    cover[site.sample(site.track, window) < TRACK_HALF_WIDTH] = _TRACK
    cover[site.sample(site.road, window) < ROAD_HALF_WIDTH] = ROAD
    cover[site.sample(site.lake, window) < 0] = WATER
    roof_height, roof = roofs_of(site.buildings, window)
    cover[roof >= 0] = BUILDING
    return Ground(cover, roof_height)


def ground_colour(
    seed: int,
    site: Site,
    cover: npt.NDArray[np.uint8],
    window: Cutout,
    season: Season,
    year: float,
    events: Sequence[Disturbance],
) -> Picture:
    """Return the colour of the ground in diffuse light.

    Parameters
    ----------
    seed : int
        Seed of the world.
    site : Site
        Covers the window.
    cover : ndarray of uint8, shape `window.shape`
        Cover classes.
    window : Cutout
        Pixels.
    season : Season
        State of vegetation.
    year : float
        Decimal year.
    events : sequence of Disturbance
        Past events.

    Returns
    -------
    ndarray of float32, shape (height, width, 3)
        8-bit display values.
    """
    grid = window.y, window.x
    patches = fractal_grid(stream(seed, "herbs"), *grid, 18.0, 4)
    fine = noise_grid(stream(seed, "litter"), *grid, 0.9)
    grass = _grass(season)
    picture = np.empty((*window.shape, 3), np.float32)
    picture[:] = (104, 92, 66)
    _blend(picture, np.clip(0.35 + 0.3 * patches, 0.0, 0.85), grass * 0.82)
    for event, box, struck in struck_in(events, seed, window):
        y, x = window.y[box[0], None], window.x[box[1]]
        _paint_cut(picture[box], event, event.axes(y, x)[1], struck, fine[box], year)
    meadow = (cover == _MEADOW).astype(np.float32)
    broad = fractal_grid(stream(seed, "sward"), *grid, 70.0, 3)
    sward = grass + (9.0 * broad[..., None]) * np.array([1.0, 0.45, 0.35], np.float32)
    _blend(picture, meadow, sward)
    picture *= (1.0 + 0.06 * fine + 0.05 * patches)[..., None]
    _paint_ways(picture, site, window, fine, grass)
    _paint_water(picture, site, window)
    roof = roofs_of(site.buildings, window)[1]
    built = cover == BUILDING
    picture[built] = np.asarray(_ROOFS, np.float32)[roof[built]]
    return picture


def _grass(season: Season) -> Picture:
    """Return the colour of a meadow in a season."""
    straw, lush = np.array([176, 162, 122], np.float32), np.array([126, 148, 90], np.float32)
    return straw + np.float32(season.greenness) * (lush - straw)


def _blend(
    picture: Picture, alpha: npt.NDArray[np.floating], colour: Sequence[float] | Picture
) -> None:
    """Blend a colour into a picture, in place, with opacity alpha (0 to 1)."""
    a = alpha.astype(np.float32)[..., None]
    picture += a * (np.asarray(colour, np.float32) - picture)


def _paint_cut(
    picture: Picture,
    event: Disturbance,
    across: npt.NDArray[np.float64],
    struck: npt.NDArray[np.bool_],
    fine: Plane,
    year: float,
) -> None:
    """Paint slash, soil and wheel tracks where trees were felled recently."""
    fresh = np.exp(-(year - event.year) / _FRESH_CUT_YEARS)
    rough = np.clip(0.75 + 0.25 * fine, 0.0, 1.0)
    strength = fresh * struck * rough * (0.4 if event.kind == "thinning" else 0.9)
    _blend(picture, strength, (152, 130, 102))
    if event.kind != "windthrow":
        wheels = np.clip(1.2 - np.abs(np.mod(across, 9.5) - 4.7), 0.0, 1.0)
        _blend(picture, 0.5 * strength * wheels, (186, 166, 136))


def _paint_ways(picture: Picture, site: Site, window: Cutout, fine: Plane, grass: Picture) -> None:
    """Paint yards, tracks with a grassy middle, and paved roads with verges."""
    soft = max(window.resolution, 0.8)
    yard, track = site.sample(site.yard, window), site.sample(site.track, window)
    road = site.sample(site.road, window)
    _blend(picture, 0.7 * _inside(yard + 1.5 * fine, -11.0, 4.0), (176, 166, 146))
    gravel = np.clip(0.75 + 0.12 * fine, 0.0, 1.0)
    _blend(picture, gravel * _inside(track, TRACK_HALF_WIDTH, soft), (186, 170, 138))
    _blend(picture, 0.45 * _inside(track, 0.5, soft), grass)
    _blend(picture, 0.7 * _inside(road + 0.6 * fine, ROAD_HALF_WIDTH + 2.0, 1.5), grass * 1.06)
    _blend(picture, _inside(road, ROAD_HALF_WIDTH, soft), (142, 140, 138))


def _inside(distance: Plane, edge: float, softness: float) -> Plane:
    """Return 1 inside an edge at a distance [m], 0 outside, and a soft transition between."""
    return np.asarray(np.clip((edge - distance) / np.float32(softness) + 0.5, 0.0, 1.0))


def _paint_water(picture: Picture, site: Site, window: Cutout) -> None:
    """Paint lakes, paler along the shore."""
    lake = site.sample(site.lake, window)
    shallow = np.exp(np.minimum(lake, 0.0) / 3.0)[..., None]
    deep, shore = np.array([40, 58, 58], np.float32), np.array([84, 92, 72], np.float32)
    _blend(
        picture, _inside(lake, 0.0, max(window.resolution, 1.0)), deep + shallow * (shore - deep)
    )


def leaf_of(trees: Trees, season: Season) -> npt.NDArray[np.float64]:
    """Return the share of foliage on each tree; individual trees differ by some days."""
    spread = np.clip(
        season.leaf + 0.5 * (draw(trees.identity, 60) - 0.5) * (0 < season.leaf < 1), 0, 1
    )
    return np.where(trees.species < N_CONIFERS, 1.0, spread)


def crown_colour(trees: Trees, season: Season) -> Picture:
    """Return the colour of each tree's crown in diffuse light.

    Parameters
    ----------
    trees : Trees
        Any number n.
    season : Season
        State of vegetation.

    Returns
    -------
    ndarray of float32, shape (n, 3)
        8-bit display values.
    """
    summer = np.array([s.colour for s in SPECIES])[trees.species]
    autumn = np.array([s.autumn for s in SPECIES])[trees.species]
    turned = np.clip(season.colouring * 1.5 - 0.5 * draw(trees.identity, 61), 0.0, 1.0)[:, None]
    foliage = summer + turned * (autumn - summer)
    bright, yellow = trees.hue[:, :1], trees.hue[:, 1:]
    foliage = foliage * (1.0 + 0.085 * bright) + yellow * np.array([9.0, 3.0, -3.0])
    leaf = leaf_of(trees, season)[:, None]
    return np.asarray(np.array(_TWIGS) + leaf * (foliage - np.array(_TWIGS)), np.float32)
