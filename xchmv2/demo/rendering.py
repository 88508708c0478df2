"""Rendering of one date: colours of ground and trees, light, haze, clouds and the sensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.special import ndtri

from xchmv2.demo.disturbance import Chronicle, Disturbance, struck_in
from xchmv2.demo.landscape import (
    BUILDING,
    MEADOW,
    ROAD,
    ROAD_HALF_WIDTH,
    TRACK_HALF_WIDTH,
    WATER,
    Ground,
    Plane,
    Site,
    ground_of,
    site_of,
)
from xchmv2.demo.light import Sun, incidence, shadow_depth, sky_margin, sky_view, sunlit
from xchmv2.demo.noise import Cutout, draw, fractal_grid, noise_grid, place_hash, rng_of, stream
from xchmv2.demo.stands import N_CONIFERS, SPECIES
from xchmv2.demo.sun import Season, decimal_year
from xchmv2.demo.trees import MAX_RADIUS, Trees, canopy_of, population

_GAMMA = 1.8
_SKYLIGHT = np.array([0.185, 0.22, 0.285], np.float32)  # share of the light on open ground
_HAZE = np.array([176.0, 190.0, 206.0], np.float32)
_CLOUD = np.array([238.0, 240.0, 243.0], np.float32)
_BLUR_MARGIN = 4
_CLOUD_LENGTH, _CLOUD_HEIGHT = 140.0, 600.0
_MASKED_CLOUD, _MASKED_SHADOW = 0.04, 0.12
# Colours of ground and crowns in diffuse light: 8-bit display values.
_ROOFS = ((164, 116, 98), (128, 130, 134), (206, 208, 212), (146, 130, 116))
_TWIGS = (128, 116, 104)
_FRESH_CUT_YEARS = 3.5  # how long slash and bare soil show

_Picture = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Moment:
    """One date of one world: the inputs to the state of the forest and to its imagery.

    `time`: date and time of day; `clouds`: share of the sky under cloud.
    """

    time: str
    season: Season
    sun: Sun
    chronicle: Chronicle
    clouds: float = 0.0

    @property
    def seed(self) -> int:
        """Seed of the world."""
        return self.chronicle.seed

    @property
    def instant(self) -> np.datetime64:
        """Date and time of day."""
        return np.datetime64(self.time, "s")

    @property
    def stamp(self) -> int:
        """Seconds since 1970, as a seed for properties of a single image."""
        return int(self.instant.astype(np.int64))


@dataclass(frozen=True)
class _Scenery:
    """The ground, the trees and the canopy under a window.

    `height` of the canopy above ground [m]; `owner`: index of the tree that is visible from above,
    -1 without one; `surface`: elevation of ground, trees and houses [m].
    """

    window: Cutout
    site: Site
    ground: Ground
    events: tuple[Disturbance, ...]
    trees: Trees
    height: Plane
    owner: npt.NDArray[np.int64]
    surface: Plane


def true_height(moment: Moment, window: Cutout) -> Plane:
    """Return the canopy height [m] of a window: 0 on open ground, roads, water and houses."""
    return _stand_up(moment, window).height


def _stand_up(moment: Moment, window: Cutout) -> _Scenery:
    """Return the scenery of a window."""
    margin = int(np.ceil(1.3 * MAX_RADIUS / window.resolution)) + 1
    wide = window.pad(margin, margin, margin, margin)
    site = site_of(moment.seed, wide)
    year = decimal_year(moment.instant)
    near = moment.chronicle.up_to(moment.instant, wide)
    trees = population(moment.seed, site, wide, near)
    sizes = trees.size_at(moment.season.growth_clock, year)
    height, owner = canopy_of(trees, *sizes, window, moment.seed)
    ground = ground_of(moment.seed, site, window)
    bare = np.isin(ground.cover, (ROAD, WATER, BUILDING))
    height, owner = np.where(bare, np.float32(0), height), np.where(bare, -1, owner)
    relief = site.sample(site.relief, window)
    surface = relief + np.maximum(height, ground.roof_height)
    return _Scenery(window, site, ground, near, trees, height, owner, surface)


def take_picture(moment: Moment, window: Cutout) -> npt.NDArray[np.uint8]:
    """Return the image of a window and the mask of its clear pixels, (4, height, width).

    Red, green and blue, at least 1; then 1 outside clouds and their shadows, else 0.
    """
    return _expose(moment, _stand_up(moment, _lit_window(moment, window)), window)


def take_picture_and_height(moment: Moment, window: Cutout) -> tuple[npt.NDArray[np.uint8], Plane]:
    """Return :func:`take_picture`, and :func:`true_height` of the window in register.

    They are computed together if the image is in register too.
    """
    if window.dy or window.dx:
        return take_picture(moment, window), true_height(moment, replace(window, dy=0.0, dx=0.0))
    scenery = _stand_up(moment, _lit_window(moment, window))
    height = scenery.height[scenery.window.slices_of(window)]
    return _expose(moment, scenery, window), height


def _lit_window(moment: Moment, window: Cutout) -> Cutout:
    """Return a window with the margin that shades it or blurs into it."""
    around = sky_margin(window.resolution) + _BLUR_MARGIN
    return window.pad(*(around + m for m in moment.sun.margins(window.resolution)))


def _expose(moment: Moment, scenery: _Scenery, window: Cutout) -> npt.NDArray[np.uint8]:
    """Return the image of a window, from a scenery that is large enough to light it."""
    seen = window.pad(*[_BLUR_MARGIN] * 4)
    cloud, cloud_shadow = _clouds_over(moment, seen)
    radiance = _radiance(moment, scenery, seen, cloud_shadow)
    rng = rng_of(moment.seed, "sensor", moment.stamp)
    sharpness = rng.uniform(0.45, 0.65)
    radiance = ndimage.gaussian_filter(radiance, (sharpness, sharpness, 0), truncate=4.0)
    values = 255.0 * np.clip(radiance, 0.0, None) ** np.float32(1.0 / _GAMMA)
    values = _through_air(values, cloud, rng)
    inner = seen.slices_of(window)
    values = values[inner] + rng.uniform(1.2, 2.4) * _sensor_noise(moment, window)
    clear = (cloud[inner] < _MASKED_CLOUD) & (cloud_shadow[inner] < _MASKED_SHADOW)
    bands = np.clip(np.rint(values), 1, 255).astype(np.uint8)
    return np.concatenate([np.moveaxis(bands, -1, 0), clear[None].astype(np.uint8)])


def _radiance(moment: Moment, scenery: _Scenery, seen: Cutout, cloud_shadow: Plane) -> _Picture:
    """Return the radiance of the surface, 1 for a white target on flat ground."""
    near = seen.pad(*[sky_margin(seen.resolution)] * 4)
    depth = shadow_depth(scenery.surface, scenery.window, moment.sun)
    close, inner = scenery.window.slices_of(near), scenery.window.slices_of(seen)
    surface = scenery.surface[close]
    crop = near.slices_of(seen)
    facing = incidence(surface, near, moment.sun)[crop]
    sky = sky_view(surface, seen.resolution)[crop]
    albedo, leaf = _albedo(moment, scenery, seen, inner)
    # Skylight has more weight under a low sun; the exposure of an image compensates for half of it.
    up = moment.sun.direction[2]
    direct = np.clip(facing, 0.0, None) / np.float32(0.55 * up + 0.22)
    open_shade = 0.45 * (1.0 - leaf) if moment.season.leaf < 1.0 else np.float32(0.0)
    light = np.maximum(sunlit(depth[inner]), open_shade) * (1.0 - 0.75 * cloud_shadow)
    calm = scenery.ground.cover[inner] == WATER
    direct, sky = np.where(calm, 0.8, direct), np.where(calm, 1.0, sky)
    irradiance = (direct * light)[..., None] * (1.0 - _SKYLIGHT) + sky[..., None] * _SKYLIGHT
    return np.asarray(albedo * irradiance, np.float32)


def _albedo(
    moment: Moment, scenery: _Scenery, seen: Cutout, inner: tuple[slice, slice]
) -> tuple[_Picture, Plane]:
    """Return the linear reflectance of each place, and the share of foliage around it."""
    owner = scenery.owner[inner]
    crowns, share = _crown_colour(scenery.trees, moment.season)
    crowns = np.append(crowns, np.zeros((1, 3), np.float32), axis=0)
    leaf = np.append(share, 1.0).astype(np.float32)[owner]
    cover = np.where(owner >= 0, 0.4 + 0.6 * leaf, np.float32(0.0))[..., None]
    ground = _ground_colour(moment, scenery, seen, inner)
    values = ground + cover * (crowns[owner] - ground)
    grain = noise_grid(stream(moment.seed, "grain"), seen.y, seen.x, 0.8)
    values *= (1.0 + np.where(owner >= 0, 0.07, 0.03).astype(np.float32) * grain)[..., None]
    if moment.season.leaf < 1.0:
        leaf = ndimage.gaussian_filter(leaf, 2.0, truncate=2.0)
    return (values / np.float32(255.0)) ** np.float32(_GAMMA), leaf


def _clouds_over(moment: Moment, window: Cutout) -> tuple[Plane, Plane]:
    """Return the density of clouds and of their shadows over each place, 0 to 1."""
    if moment.clouds <= 0.0:
        return np.zeros(window.shape, np.float32), np.zeros(window.shape, np.float32)
    south, east, up = moment.sun.direction
    far = _CLOUD_HEIGHT / up
    key = stream(moment.seed, "clouds", moment.stamp)
    # A quantile of unit noise, so that the share refers to the world, not to each window.
    level = np.float32(ndtri(1.0 - min(moment.clouds, 0.999)))

    def density(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> Plane:
        thickness = fractal_grid(key, y, x, _CLOUD_LENGTH, 5) - level
        return np.asarray(np.clip(0.3 + thickness / np.float32(0.7), 0.0, 1.0) ** 1.5)

    over = density(window.y, window.x)
    return over, density(window.y + far * south, window.x + far * east)


def _through_air(values: _Picture, cloud: Plane, rng: np.random.Generator) -> _Picture:
    """Return the image after the gain of the date, haze and cloud."""
    haze = np.float32(rng.uniform(0.03, 0.09))
    values = values * np.float32(rng.uniform(0.96, 1.04))
    values = values * rng.uniform(0.975, 1.025, 3).astype(np.float32)
    values = values + haze * (_HAZE - values)
    return np.asarray(values + cloud[..., None] * (_CLOUD - values), np.float32)


def _sensor_noise(moment: Moment, window: Cutout) -> _Picture:
    """Return unit noise, three numbers for each pixel."""
    rows = window.row + np.arange(window.height)
    cols = window.col + np.arange(window.width)
    h = place_hash(stream(moment.seed, "noise", moment.stamp), rows[:, None], cols)
    # Two 10-bit numbers per band: their triangular distribution is close enough to a normal one.
    parts = [((h >> np.uint64(10 * k)) & np.uint64(1023)).astype(np.float32) for k in range(6)]
    bands = [(parts[2 * b] + parts[2 * b + 1] - 1023.0) / np.float32(417.8) for b in range(3)]
    return np.stack(bands, axis=-1)


def _ground_colour(
    moment: Moment, scenery: _Scenery, seen: Cutout, inner: tuple[slice, slice]
) -> _Picture:
    """Return the colour (height, width, 3) of the ground in diffuse light."""
    seed, grid = moment.seed, (seen.y, seen.x)
    patches = fractal_grid(stream(seed, "herbs"), *grid, 18.0, 4)
    fine = noise_grid(stream(seed, "litter"), *grid, 0.9)
    straw, lush = np.array([176, 162, 122], np.float32), np.array([126, 148, 90], np.float32)
    grass = straw + np.float32(moment.season.greenness) * (lush - straw)
    picture = np.empty((*seen.shape, 3), np.float32)
    picture[:] = (104, 92, 66)
    _blend(picture, np.clip(0.35 + 0.3 * patches, 0.0, 0.85), grass * 0.82)
    for event, box, struck in struck_in(scenery.events, seed, seen):
        across = event.axes(seen.y[box[0], None], seen.x[box[1]])[1]
        age = decimal_year(moment.instant) - event.year
        _paint_cut(picture[box], event, across, struck, fine[box], age)
    cover, roof = scenery.ground.cover[inner], scenery.ground.roof[inner]
    broad = fractal_grid(stream(seed, "sward"), *grid, 70.0, 3)
    sward = grass + (9.0 * broad[..., None]) * np.array([1.0, 0.45, 0.35], np.float32)
    _blend(picture, cover == MEADOW, sward)
    picture *= (1.0 + 0.06 * fine + 0.05 * patches)[..., None]
    _paint_ways(picture, scenery.site, seen, fine, grass)
    _paint_water(picture, scenery.site, seen)
    built = cover == BUILDING
    picture[built] = np.asarray(_ROOFS, np.float32)[roof[built]]
    return picture


def _blend(picture: _Picture, alpha: npt.NDArray[Any], colour: npt.ArrayLike) -> None:
    """Blend a colour into a picture, in place, with opacity alpha (0 to 1)."""
    a = alpha.astype(np.float32)[..., None]
    picture += a * (np.asarray(colour, np.float32) - picture)


def _paint_cut(
    picture: _Picture,
    event: Disturbance,
    across: npt.NDArray[np.float64],
    struck: npt.NDArray[np.bool_],
    fine: Plane,
    age: float,
) -> None:
    """Paint slash, soil and wheel tracks where trees were felled recently."""
    fresh = np.exp(-age / _FRESH_CUT_YEARS)
    rough = np.clip(0.75 + 0.25 * fine, 0.0, 1.0)
    strength = fresh * struck * rough * (0.4 if event.kind == "thinning" else 0.9)
    _blend(picture, strength, (152, 130, 102))
    if event.kind != "windthrow":
        wheels = np.clip(1.2 - np.abs(np.mod(across, 9.5) - 4.7), 0.0, 1.0)
        _blend(picture, 0.5 * strength * wheels, (186, 166, 136))


def _paint_ways(
    picture: _Picture, site: Site, window: Cutout, fine: Plane, grass: _Picture
) -> None:
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


def _paint_water(picture: _Picture, site: Site, window: Cutout) -> None:
    """Paint lakes, paler along the shore."""
    lake = site.sample(site.lake, window)
    shallow = np.exp(np.minimum(lake, 0.0) / 3.0)[..., None]
    deep, shore = np.array([40, 58, 58], np.float32), np.array([84, 92, 72], np.float32)
    inside = _inside(lake, 0.0, max(window.resolution, 1.0))
    _blend(picture, inside, deep + shallow * (shore - deep))


def _crown_colour(trees: Trees, season: Season) -> tuple[_Picture, npt.NDArray[np.float64]]:
    """Return the colour (n, 3) of trees' crowns in diffuse light, and their share of foliage."""
    # Individual trees differ by some days.
    spread = 0.5 * (draw(trees.identity, 60) - 0.5) * (0 < season.leaf < 1)
    leaf = np.where(trees.species < N_CONIFERS, 1.0, np.clip(season.leaf + spread, 0, 1))
    summer = np.array([s.colour for s in SPECIES])[trees.species]
    autumn = np.array([s.autumn for s in SPECIES])[trees.species]
    turned = np.clip(season.colouring * 1.5 - 0.5 * draw(trees.identity, 61), 0.0, 1.0)[:, None]
    foliage = summer + turned * (autumn - summer)
    bright, yellow = trees.hue[:, :1], trees.hue[:, 1:]
    foliage = foliage * (1.0 + 0.085 * bright) + yellow * np.array([9.0, 3.0, -3.0])
    twigs = np.array(_TWIGS)
    return np.asarray(twigs + leaf[:, None] * (foliage - twigs), np.float32), leaf
