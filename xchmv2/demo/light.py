"""Sunlight on a surface: shading by slope, cast shadows and sky view factor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from xchmv2.demo.landscape import Plane
from xchmv2.demo.noise import Cutout
from xchmv2.demo.trees import MAX_HEIGHT

LOWEST_SUN = 12.0  # sun elevation [degree]
_RELIEF_ALLOWANCE = 8.0  # rise of the ground towards the sun within reach of a shadow [m]
_PENUMBRA = 1.2  # [m]: the edges of crowns transmit light
_SKY_SCALES = ((2.4, 3.0, 0.75), (6.5, 7.0, 0.6))  # (radius [m], depth [m] of darkening, weight)
_STEEPEST = 1.6  # steepest slope of crowns that is resolved


@dataclass(frozen=True)
class Sun:
    """The sun's elevation above the horizon, and its azimuth clockwise from north [degree]."""

    elevation: float
    azimuth: float

    @property
    def direction(self) -> tuple[float, float, float]:
        """Unit vector to the sun: southward, eastward, up."""
        e, a = np.radians(self.elevation), np.radians(self.azimuth)
        return float(-np.cos(a) * np.cos(e)), float(np.sin(a) * np.cos(e)), float(np.sin(e))

    @property
    def reach(self) -> float:
        """Length of the longest shadow [m]."""
        return (MAX_HEIGHT + _RELIEF_ALLOWANCE) / float(np.tan(np.radians(self.elevation)))

    def margins(self, resolution: float) -> tuple[int, int, int, int]:
        """Return the margins that cast shadows into a window [px]: top, bottom, left, right."""
        south, east, up = self.direction
        flat = float(np.sqrt(1.0 - up**2))
        down = int(np.ceil(self.reach * south / flat / resolution))
        right = int(np.ceil(self.reach * east / flat / resolution))
        return max(-down, 0), max(down, 0), max(-right, 0), max(right, 0)


def shadow_depth(surface: Plane, window: Cutout, sun: Sun) -> Plane:
    """Return the depth [m] of each place below the edge of the shadow over it, 0 in sunlight.

    `surface` is the elevation of ground, trees and buildings [m]. Shadows are cast from inside the
    window only, over at most `sun.reach`. The surface is sheared by whole pixels so that the sun's
    rays run along columns. A place then lies in shadow if any place towards the sun rises above its
    ray, which is one running maximum of fixed length. The shear follows world rows, so that windows
    agree.
    """
    south, east, _ = sun.direction
    if abs(east) > abs(south):
        w = window
        turned = Cutout(w.col, w.row, w.width, w.height, w.resolution, w.dx, w.dy)
        return _shadow_along_rows(surface.T, turned, sun, east, south).T
    return _shadow_along_rows(surface, window, sun, south, east)


def _shadow_along_rows(
    surface: Plane, window: Cutout, sun: Sun, down: float, right: float
) -> Plane:
    """Return :func:`shadow_depth` for a sun that lies closer to columns than to rows."""
    slope = right / down
    shear = np.floor((window.row + np.arange(window.height)) * slope + 0.5).astype(np.int64)
    shear -= shear.min()
    width = window.width + int(shear.max())
    # A column of the sheared array is a ray: places outside the window remain empty.
    columns = np.arange(window.width) - shear[:, None] + int(shear.max())
    rows = np.arange(window.height)[:, None]
    rise = window.resolution * np.hypot(1.0, slope) * np.tan(np.radians(sun.elevation))
    towards = 1.0 if down > 0 else -1.0
    climb = -towards * rise * np.arange(window.height)[:, None]
    rays = np.full((window.height, width), -1e9)
    rays[rows, columns] = surface + climb
    steps = max(1, int(np.ceil(sun.reach * abs(down) / np.hypot(down, right) / window.resolution)))
    origin = -(steps // 2) if towards > 0 else (steps - 1) // 2
    highest = ndimage.maximum_filter1d(rays, steps, axis=0, mode="nearest", origin=origin)
    return np.asarray((highest - rays)[rows, columns], np.float32)


def sunlit(depth: Plane) -> Plane:
    """Return the share of direct light, 0 to 1, at a depth [m] below the edge of a shadow."""
    t = np.clip(depth / _PENUMBRA, 0.0, 1.0)
    return np.asarray(1.0 - t * t * (3.0 - 2.0 * t))


def incidence(surface: Plane, window: Cutout, sun: Sun) -> Plane:
    """Return the cosine of the angle between surface normal and sun, below 0 on the far side."""
    soft = ndimage.gaussian_filter(surface, 0.45 / window.resolution, truncate=3.0)
    gy = ndimage.correlate1d(soft, [-0.5, 0.0, 0.5], axis=0) / np.float32(window.resolution)
    gx = ndimage.correlate1d(soft, [-0.5, 0.0, 0.5], axis=1) / np.float32(window.resolution)
    tame = 1.0 / np.sqrt(1.0 + (gy**2 + gx**2) / _STEEPEST**2)
    gy, gx = gy * tame, gx * tame
    south, east, up = (np.float32(v) for v in sun.direction)
    return np.asarray((up - gy * south - gx * east) / np.sqrt(1.0 + gy**2 + gx**2), np.float32)


def sky_view(surface: Plane, resolution: float) -> Plane:
    """Return the sky view factor, 0 to 1, of each place: lower in gaps and between crowns."""
    view = np.ones_like(surface)
    for radius, depth, weight in _SKY_SCALES:
        around = ndimage.gaussian_filter(surface, radius / resolution, truncate=2.0)
        hollow = np.clip((around - surface) / np.float32(depth), 0.0, None)
        view *= 1.0 - np.float32(weight) * (1.0 - np.exp(-hollow))
    return view


def sky_margin(resolution: float) -> int:
    """Return the margin that :func:`sky_view` and :func:`incidence` need around a place [px]."""
    return int(np.ceil(2.0 * _SKY_SCALES[-1][0] / resolution)) + 4
