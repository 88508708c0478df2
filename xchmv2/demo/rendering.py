"""Rendering of one date: ground and trees, light, haze, clouds and the sensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.special import ndtri

from xchmv2.demo.colour import (
    BUILDING,
    ROAD,
    WATER,
    Ground,
    Picture,
    crown_colour,
    ground_colour,
    ground_of,
    leaf_of,
)
from xchmv2.demo.disturbance import Chronicle, Disturbance
from xchmv2.demo.landscape import Plane, Site, site_of
from xchmv2.demo.light import Sun, incidence, shadow_depth, sky_margin, sky_view, sunlit
from xchmv2.demo.noise import Cutout, fractal_grid, noise_grid, place_hash, rng_of, stream
from xchmv2.demo.sun import Season, decimal_year
from xchmv2.demo.trees import MAX_RADIUS, Canopy, Trees, canopy_of, population

_GAMMA = 1.8
_SKYLIGHT = np.array([0.185, 0.22, 0.285], np.float32)  # share of the light on open ground
_HAZE = np.array([176.0, 190.0, 206.0], np.float32)
_CLOUD = np.array([238.0, 240.0, 243.0], np.float32)
_BLUR_MARGIN = 4
_CLOUD_LENGTH, _CLOUD_HEIGHT = 140.0, 600.0
_MASKED_CLOUD, _MASKED_SHADOW = 0.04, 0.12


@dataclass(frozen=True)
class Moment:
    """One date of one world: the inputs to the state of the forest and to its imagery.

    Parameters
    ----------
    time : str
        Date and time of day.
    season : Season
        State of vegetation.
    sun : Sun
        Direction of light.
    chronicle : Chronicle
        History of disturbances in the world, and its seed.
    clouds : float
        Share of the sky under cloud.
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
    """The ground, the trees and the canopy under a window."""

    window: Cutout
    site: Site
    ground: Ground
    events: tuple[Disturbance, ...]
    trees: Trees
    canopy: Canopy
    surface: Plane


def true_height(moment: Moment, window: Cutout) -> Plane:
    """Return the canopy height of a window.

    Parameters
    ----------
    moment : Moment
        The date.
    window : Cutout
        Pixels.

    Returns
    -------
    ndarray of float32, shape `window.shape`
        Metres above ground; 0 on open ground, roads, water and houses.
    """
    return _stand_up(moment, window).canopy.height


def _stand_up(moment: Moment, window: Cutout) -> _Scenery:
    """Return the scenery of a window."""
    margin = int(np.ceil(1.3 * MAX_RADIUS / window.resolution)) + 1
    wide = window.pad(margin, margin, margin, margin)
    site = site_of(moment.seed, wide)
    year = decimal_year(moment.instant)
    near = moment.chronicle.up_to(moment.instant, wide)
    trees = population(moment.seed, site, wide, near)
    height, radius = trees.size_at(moment.season.growth_clock, year)
    canopy = canopy_of(trees, height, radius, window, moment.seed)
    ground = ground_of(moment.seed, site, window)
    bare = np.isin(ground.cover, (ROAD, WATER, BUILDING))
    canopy = Canopy(np.where(bare, np.float32(0), canopy.height), np.where(bare, -1, canopy.owner))
    relief = site.sample(site.relief, window)
    surface = relief + np.maximum(canopy.height, ground.roof_height)
    return _Scenery(window, site, ground, near, trees, canopy, surface)


def take_picture(moment: Moment, window: Cutout) -> npt.NDArray[np.uint8]:
    """Return the image of a window and the mask of its clear pixels.

    Parameters
    ----------
    moment : Moment
        The date.
    window : Cutout
        Pixels, misregistered where `dy` and `dx` say so.

    Returns
    -------
    ndarray of uint8, shape (4, height, width)
        Red, green and blue, at least 1; then 1 outside clouds and their shadows, else 0.
    """
    return _expose(moment, _stand_up(moment, _lit_window(moment, window)), window)


def take_picture_and_height(moment: Moment, window: Cutout) -> tuple[npt.NDArray[np.uint8], Plane]:
    """Return :func:`take_picture` and :func:`true_height`, computed together if in register.

    Parameters
    ----------
    moment : Moment
        The date.
    window : Cutout
        Pixels.

    Returns
    -------
    picture : ndarray of uint8, shape (4, height, width)
        As from :func:`take_picture`.
    height : ndarray of float32, shape `window.shape`
        Metres above ground, as from :func:`true_height` of the window in register.
    """
    if window.dy or window.dx:
        return take_picture(moment, window), true_height(moment, replace(window, dy=0.0, dx=0.0))
    scenery = _stand_up(moment, _lit_window(moment, window))
    height = scenery.canopy.height[scenery.window.slices_of(window)]
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


def _radiance(moment: Moment, scenery: _Scenery, seen: Cutout, cloud_shadow: Plane) -> Picture:
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
) -> tuple[Picture, Plane]:
    """Return the linear reflectance of each place, and the share of foliage around it."""
    owner = scenery.canopy.owner[inner]
    trees = scenery.trees
    crowns = np.append(crown_colour(trees, moment.season), np.zeros((1, 3), np.float32), axis=0)
    leaf = np.append(leaf_of(trees, moment.season), 1.0).astype(np.float32)[owner]
    cover = np.where(owner >= 0, 0.4 + 0.6 * leaf, np.float32(0.0))[..., None]
    ground = ground_colour(
        moment.seed,
        scenery.site,
        scenery.ground.cover[inner],
        seen,
        moment.season,
        decimal_year(moment.instant),
        scenery.events,
    )
    values = ground + cover * (crowns[owner] - ground)
    grain = noise_grid(stream(moment.seed, "grain"), seen.y, seen.x, 0.8)
    values *= (1.0 + np.where(owner >= 0, 0.07, 0.03).astype(np.float32) * grain)[..., None]
    if moment.season.leaf < 1.0:
        leaf = ndimage.gaussian_filter(leaf, 2.0, truncate=2.0)
    return (values / np.float32(255.0)) ** np.float32(_GAMMA), leaf


def _clouds_over(moment: Moment, window: Cutout) -> tuple[Plane, Plane]:
    """Return the clouds over a window.

    Parameters
    ----------
    moment : Moment
        The date.
    window : Cutout
        Pixels.

    Returns
    -------
    dense, shadow : ndarray of float32, shape `window.shape`
        Density of the clouds, and of their shadows, over each place, 0 to 1.
    """
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


def _through_air(values: Picture, cloud: Plane, rng: np.random.Generator) -> Picture:
    """Return the image after the gain of the date, haze and cloud."""
    haze = np.float32(rng.uniform(0.03, 0.09))
    values = values * np.float32(rng.uniform(0.96, 1.04))
    values = values * rng.uniform(0.975, 1.025, 3).astype(np.float32)
    values = values + haze * (_HAZE - values)
    return np.asarray(values + cloud[..., None] * (_CLOUD - values), np.float32)


def _sensor_noise(moment: Moment, window: Cutout) -> Picture:
    """Return unit noise, three numbers for each pixel."""
    rows = window.row + np.arange(window.height)
    cols = window.col + np.arange(window.width)
    h = place_hash(stream(moment.seed, "noise", moment.stamp), rows[:, None], cols)
    # Two 10-bit numbers per band: their triangular distribution is close enough to a normal one.
    parts = [((h >> np.uint64(10 * k)) & np.uint64(1023)).astype(np.float32) for k in range(6)]
    bands = [(parts[2 * b] + parts[2 * b + 1] - 1023.0) / np.float32(417.8) for b in range(3)]
    return np.stack(bands, axis=-1)
