"""The arguments of ``synthetic_forest``, validated and completed with defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np

from xchmv2.demo.disturbance import KINDS, Chronicle, Disturbance
from xchmv2.demo.layers import Forest
from xchmv2.demo.light import LOWEST_SUN, Sun
from xchmv2.demo.noise import Cutout, rng_of
from xchmv2.demo.rendering import Moment
from xchmv2.demo.stands import BASE_YEAR
from xchmv2.demo.sun import as_time, season, solar_position
from xchmv2.errors import CHMv2Error, GridError

_FINEST, _COARSEST = 0.1, 10.0  # [m]


def resolve_scene(
    *,
    shape: tuple[int, int],
    resolution: float,
    times: Sequence[Any],
    seed: int,
    crs: Any,
    disturbances: Any,
    origin: tuple[float, float],
    growth: bool,
    sun: tuple[float, float] | None,
    shift_px: Any,
    clouds: Any,
    nodata_edge: float,
) -> Forest:
    """Return the scene that was requested.

    Parameters
    ----------
    shape, resolution, times, seed, crs, disturbances, origin : object
        As in :func:`xchmv2.datasets.synthetic_forest`.
    growth, sun, shift_px, clouds, nodata_edge : object
        As in :func:`xchmv2.datasets.synthetic_forest`.

    Returns
    -------
    Forest
        Complete and hashable.

    Raises
    ------
    CHMv2Error
        If an argument is invalid.
    """
    window = _resolve_window(shape, resolution, origin)
    instants = _resolve_times(times)
    chronicle = _resolve_chronicle(_resolve_seed(seed), disturbances)
    latitude = _latitude(crs, origin)
    cover = _per_date(clouds, len(instants), "clouds")
    if not all(0.0 <= c < 1.0 for c in cover):
        raise _error("clouds from 0 to below 1", f"{clouds}", "clouds=0.3")
    if not 0.0 <= nodata_edge <= 0.9:
        raise _error("nodata_edge from 0 to 0.9", f"{nodata_edge}", "nodata_edge=0.2")
    moments = tuple(
        _moment(instant, latitude, chronicle, share, growth, sun)
        for instant, share in zip(instants, cover, strict=True)
    )
    shifts = tuple(
        _resolve_shift(shift_px, k, moment, len(moments)) for k, moment in enumerate(moments)
    )
    events = tuple(_events_before(chronicle, instants, k, window) for k in range(len(instants)))
    return Forest(window, moments, shifts, events, float(nodata_edge))


def _error(expected: str, found: str, argument: str) -> CHMv2Error:
    """Return an error that ends with the call that fixes it."""
    return CHMv2Error(expected, found, f"pass {argument}")


def _resolve_window(
    shape: tuple[int, int], resolution: float, origin: tuple[float, float]
) -> Cutout:
    """Return the pixels of the scene, on the grid of whole pixels from the CRS origin."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if len(sizes) != 2 or not all(isinstance(n, Integral) and int(n) > 0 for n in sizes):
        raise GridError("a shape of two positive integers", repr(shape), "pass shape=(768, 768)")
    if not _FINEST <= resolution <= _COARSEST:
        raise GridError(
            f"a resolution of {_FINEST} to {_COARSEST} m",
            f"{resolution}",
            "pass resolution=0.6",
        )
    if len(origin) != 2 or not np.isfinite(origin).all():
        raise GridError(
            "an origin (x, y) in metres", repr(origin), "pass origin=(500_000, 5_300_000)"
        )
    row, col = round(-origin[1] / resolution), round(origin[0] / resolution)
    return Cutout(row, col, int(sizes[0]), int(sizes[1]), float(resolution))


def _resolve_times(times: Sequence[Any]) -> list[np.datetime64]:
    """Return the dates, which must be in increasing order."""
    try:
        instants = [as_time(t, "s") for t in ([times] if isinstance(times, str) else times)]
    except (TypeError, ValueError) as error:
        raise _error("dates such as '2019-07-01'", repr(times), "times=('2019-07-01',)") from error
    ordered = all(a < b for a, b in pairwise(instants))
    if not instants or np.isnat(instants).any() or not ordered:
        found = ", ".join(str(t) for t in instants) or "none"
        raise _error(
            "one date or more, in strictly increasing order", found, "times=sorted(set(times))"
        )
    return instants


def _resolve_seed(seed: int) -> int:
    """Return the seed as a plain integer."""
    if not isinstance(seed, Integral) or seed < 0:
        raise _error("a seed that is an integer of at least 0", repr(seed), "seed=0")
    return int(seed)


def _resolve_chronicle(seed: int, disturbances: Any) -> Chronicle:
    """Return the history of disturbances: random events of some kinds, and given events."""
    if disturbances is None:
        return Chronicle(seed, ())
    if isinstance(disturbances, Disturbance):
        disturbances = (disturbances,)
    if isinstance(disturbances, str):
        disturbances = KINDS if disturbances == "random" else (disturbances,)
    given = tuple(d for d in disturbances if isinstance(d, Disturbance))
    kinds = tuple(d for d in disturbances if not isinstance(d, Disturbance))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise _error(
            f"disturbances 'random', None, Disturbance objects or kinds among {', '.join(KINDS)}",
            ", ".join(repr(kind) for kind in unknown),
            "disturbances=('clear_cut',)",
        )
    return Chronicle(seed, kinds, given)


def _latitude(crs: Any, origin: tuple[float, float]) -> float:
    """Return the latitude of the origin [degree], rounded so that nearby scenes share a sun."""
    from pyproj import CRS, Transformer
    from pyproj.exceptions import CRSError

    fix = "pass a UTM zone, such as crs='EPSG:32633'"
    try:
        system = CRS.from_user_input(crs)
    except CRSError as error:
        raise CHMv2Error("a coordinate reference system", repr(crs), fix) from error
    if not system.is_projected or system.axis_info[0].unit_name != "metre":
        found = f"{system.name} in {system.axis_info[0].unit_name if system.axis_info else '?'}"
        raise CHMv2Error("a projected CRS in metres", found, fix)
    _, latitude = Transformer.from_crs(system, "EPSG:4326", always_xy=True).transform(*origin)
    if not np.isfinite(latitude):
        raise CHMv2Error(
            f"an origin inside {system.name}", repr(origin), "pass coordinates [m] of it"
        )
    return float(round(latitude))


def _moment(
    instant: np.datetime64,
    latitude: float,
    chronicle: Chronicle,
    clouds: float,
    growth: bool,
    sun: tuple[float, float] | None,
) -> Moment:
    """Return one date."""
    elevation, azimuth = solar_position(instant, latitude) if sun is None else sun
    if not LOWEST_SUN <= elevation <= 90.0:
        raise _error(
            f"the sun at {LOWEST_SUN:.0f} to 90 degrees above the horizon",
            f"{elevation:.1f} degrees on {instant} at latitude {latitude:.0f}",
            "sun=(45.0, 140.0), or choose another date, hour or place",
        )
    state = season(instant, latitude)
    state = state if growth else replace(state, growth_clock=BASE_YEAR)
    return Moment(str(instant), state, Sun(float(elevation), float(azimuth)), chronicle, clouds)


def _per_date(value: Any, n: int, name: str) -> tuple[float, ...]:
    """Return one number for each date."""
    values = (value,) * n if isinstance(value, Real) else tuple(value)
    if len(values) != n:
        raise _error(
            f"one value of {name}, or one for each of {n} dates", f"{len(values)}", f"{name}=0.0"
        )
    return tuple(float(v) for v in values)


def _resolve_shift(shift_px: Any, k: int, moment: Moment, n: int) -> tuple[float, float]:
    """Return the misregistration of date k: as given, or drawn from a disc."""
    if isinstance(shift_px, Real):
        if not 0.0 <= float(shift_px) <= 64.0:
            raise _error("shift_px from 0 to 64", f"{shift_px}", "shift_px=2.0")
        rng = rng_of(moment.seed, "shift", moment.stamp)
        length, angle = float(shift_px) * np.sqrt(rng.random()), 2 * np.pi * rng.random()
        return float(length * np.sin(angle)), float(length * np.cos(angle))
    shifts = np.asarray(shift_px, np.float64)
    if shifts.shape != (n, 2) or not (np.abs(shifts) <= 64.0).all():
        raise _error(
            f"one (dy, dx) of at most 64 px for each of {n} dates",
            f"an array of shape {shifts.shape}",
            f"shift_px={[(0.0, 0.0)] * n}",
        )
    return float(shifts[k, 0]), float(shifts[k, 1])


def _events_before(
    chronicle: Chronicle, instants: Sequence[np.datetime64], k: int, window: Cutout
) -> tuple[Disturbance, ...]:
    """Return the events in the scene between date k - 1 and date k."""
    if k == 0:
        return ()
    events = chronicle.up_to(instants[k], window, after=instants[k - 1])
    return tuple(e for e in events if _reaches_into(e, chronicle.seed, window))


def _reaches_into(event: Disturbance, seed: int, window: Cutout) -> bool:
    """Return whether an event's footprint, sampled every 2 m, intersects a window."""
    north, south, west, east = window.bounds
    if north <= -event.y <= south and west <= event.x <= east:
        return True
    offsets = np.arange(-event.reach, event.reach, 2.0)
    y, x = (a.ravel() for a in np.meshgrid(-event.y + offsets, event.x + offsets, indexing="ij"))
    seen = (y >= north) & (y <= south) & (x >= west) & (x <= east)
    return bool(event.covers_points(seed, y[seen], x[seen]).any())


def resolve_chunks(chunks: Any, shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return chunk sizes along y and x.

    Parameters
    ----------
    chunks : int, (int, int) or mapping
        Size [px] for both, for each, or by the names "y" and "x"; -1 for a single chunk.
    shape : tuple of int
        Rows and columns [px].

    Returns
    -------
    tuple of tuple of int
        Sizes of all chunks.

    Raises
    ------
    GridError
        If a size is not a positive integer or -1.
    """
    if isinstance(chunks, Mapping):
        pair: tuple[Any, ...] = (chunks.get("y", -1), chunks.get("x", -1))
    else:
        pair = (chunks, chunks) if isinstance(chunks, Integral) else tuple(chunks)
    if len(pair) != 2 or not all(
        isinstance(c, Integral) and (int(c) > 0 or int(c) == -1) for c in pair
    ):
        raise GridError(
            "chunks as an integer, or one for y and one for x", repr(chunks), "pass chunks=1024"
        )
    sizes = [n if c == -1 else min(int(c), n) for c, n in zip(pair, shape, strict=True)]
    y, x = (
        (c,) * (n // c) + ((n % c,) if n % c else ()) for c, n in zip(sizes, shape, strict=True)
    )
    return y, x
