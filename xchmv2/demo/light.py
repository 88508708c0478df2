"""Sunlight on a surface: shading by slope, cast shadows and sky view factor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from xchmv2.demo.landscape import Plane
from xchmv2.demo.noise import Cutout
from xchmv2.demo.trees import MAX_HEIGHT

LOWEST_SUN = 12.0  # degrees
_RELIEF_ALLOWANCE = 8.0  # ground that may rise towards the sun within reach of a shadow [m]
_PENUMBRA = 1.2  # [m]: crowns' edges let light through
_SKY_SCALES = ((2.4, 3.0, 0.75), (6.5, 7.0, 0.6))  # (radius [m], depth [m] of darkening, weight)
_STEEPEST = 1.6  # slopes of crowns are not resolved beyond this


@dataclass(frozen=True)
class Sun:
    """Where the light comes from.

    Parameters
    ----------
    elevation, azimuth : float
        Above the horizon, and clockwise from north [degree].
    """

    elevation: float
    azimuth: float

    @property
    def direction(self) -> tuple[float, float, float]:
        """Unit vector to the sun: southward, eastward, up."""
        e, a = np.radians(self.elevation), np.radians(self.azimuth)
        return (
            float(-np.cos(a) * np.cos(e)),
            float(np.sin(a) * np.cos(e)),
            float(np.sin(e)),
        )

    @property
    def reach(self) -> float:
        """Length of the longest shadow [m]."""
        return (MAX_HEIGHT + _RELIEF_ALLOWANCE) / float(np.tan(np.radians(self.elevation)))

    def margins(self, resolution: float) -> tuple[int, int, int, int]:
        """Return how many pixels towards the sun cast shadows here: top, bottom, left, right."""
        south, east, up = self.direction
        flat = float(np.sqrt(1.0 - up**2))
        down = int(np.ceil(self.reach * south / flat / resolution))
        right = int(np.ceil(self.reach * east / flat / resolution))
        return max(-down, 0), max(down, 0), max(-right, 0), max(right, 0)


def _transposed(window: Cutout) -> Cutout:
    """Return the window with rows and columns exchanged."""
    return Cutout(
        window.col, window.row, window.width, window.height, window.resolution, window.dx, window.dy
    )


def shadow_depth(surface: Plane, window: Cutout, sun: Sun) -> Plane:
    """Return how far each place lies below the shadow cast over it.

    Parameters
    ----------
    surface : ndarray of float32, shape `window.shape`
        Elevation of ground and all that stands on it [m].
    window : Cutout
        Its pixels; shadows come from as far as the window reaches, at most `sun.reach`.
    sun : Sun
        Direction of light.

    Returns
    -------
    ndarray of float32, shape `window.shape`
        Metres below the shadow's edge, 0 in the sun.

    Notes
    -----
    The surface is sheared by whole pixels so that the sun's rays run along columns; there, a place
    lies in shadow if any place towards the sun rises above the ray to it, which is one running
    maximum of fixed length. The shear follows world rows, so windows agree.
    """
    south, east, _ = sun.direction
    if abs(east) > abs(south):
        return _shadow_along_rows(surface.T, _transposed(window), sun, east, south).T
    return _shadow_along_rows(surface, window, sun, south, east)


def _shadow_along_rows(
    surface: Plane, window: Cutout, sun: Sun, down: float, right: float
) -> Plane:
    """Return :func:`shadow_depth` where the sun stands more along columns than along rows."""
    slope = right / down
    shear = np.floor((window.row + np.arange(window.height)) * slope + 0.5).astype(np.int64)
    shear -= shear.min()
    width = window.width + int(shear.max())
    # A column of the sheared array is a ray: what leaves the window on one side stays empty.
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
    """Return the share of direct light, 0 to 1, at a depth [m] below the shadow's edge."""
    t = np.clip(depth / _PENUMBRA, 0.0, 1.0)
    return np.asarray(1.0 - t * t * (3.0 - 2.0 * t))


def incidence(surface: Plane, window: Cutout, sun: Sun) -> Plane:
    """Return the cosine between the surface's normal and the sun.

    Parameters
    ----------
    surface : ndarray of float32, shape `window.shape`
        Elevation [m].
    window : Cutout
        Its pixels.
    sun : Sun
        Direction of light.

    Returns
    -------
    ndarray of float32, shape `window.shape`
        Below 0 where the surface faces away.
    """
    soft = ndimage.gaussian_filter(surface, 0.45 / window.resolution, truncate=3.0)
    gy = ndimage.correlate1d(soft, [-0.5, 0.0, 0.5], axis=0) / np.float32(window.resolution)
    gx = ndimage.correlate1d(soft, [-0.5, 0.0, 0.5], axis=1) / np.float32(window.resolution)
    tame = 1.0 / np.sqrt(1.0 + (gy**2 + gx**2) / _STEEPEST**2)
    gy, gx = gy * tame, gx * tame
    south, east, up = (np.float32(v) for v in sun.direction)
    return np.asarray((up - gy * south - gx * east) / np.sqrt(1.0 + gy**2 + gx**2), np.float32)


def sky_view(surface: Plane, resolution: float) -> Plane:
    """Return the share of skylight a place receives: less in gaps and between crowns.

    Parameters
    ----------
    surface : ndarray of float32
        Elevation [m].
    resolution : float
        Pixel size [m].

    Returns
    -------
    ndarray of float32
        0 to 1.
    """
    view = np.ones_like(surface)
    for radius, depth, weight in _SKY_SCALES:
        around = ndimage.gaussian_filter(surface, radius / resolution, truncate=2.0)
        hollow = np.clip((around - surface) / np.float32(depth), 0.0, None)
        view *= 1.0 - np.float32(weight) * (1.0 - np.exp(-hollow))
    return view


def sky_margin(resolution: float) -> int:
    """Return how many pixels around a place :func:`sky_view` and :func:`incidence` look at."""
    return int(np.ceil(2.0 * _SKY_SCALES[-1][0] / resolution)) + 4
