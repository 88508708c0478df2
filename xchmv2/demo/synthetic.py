"""Synthetic forest cubes with known truth, made from a seed: :func:`synthetic_forest`.

From the arguments to a scene (:class:`xchmv2.demo.layers.Forest`), from the scene to its layers,
and from these to a labelled dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2._version import __version__
from xchmv2.demo.disturbance import KINDS, Chronicle, Disturbance, Kind
from xchmv2.demo.landscape import COVERS
from xchmv2.demo.layers import Forest, eager_layers, lazy_layers
from xchmv2.demo.light import LOWEST_SUN, Sun
from xchmv2.demo.noise import Cutout, rng_of
from xchmv2.demo.rendering import Moment
from xchmv2.demo.stands import BASE_YEAR
from xchmv2.demo.sun import as_time, season, solar_position
from xchmv2.errors import CHMv2Error, GridError

_BANDS = {"red": 0.65, "green": 0.56, "blue": 0.48}  # centre wavelength [um]
_GRID = {"grid_mapping": "spatial_ref"}
_FINEST, _COARSEST = 0.1, 10.0  # [m]

Chunks = int | tuple[int, int] | Mapping[str, int]


def synthetic_forest(
    shape: tuple[int, int] = (768, 768),
    *,
    resolution: float = 0.6,
    times: Sequence[str | np.datetime64] = ("2019-07-01", "2021-08-15", "2024-07-10"),
    seed: int = 0,
    crs: Any = "EPSG:32633",
    disturbances: Literal["random"] | Sequence[Kind | Disturbance] | None = "random",
    origin: tuple[float, float] = (500_000.0, 5_300_000.0),
    growth: bool = True,
    sun: tuple[float, float] | None = None,
    shift_px: float | Sequence[tuple[float, float]] = 0.0,
    clouds: float | Sequence[float] = 0.0,
    nodata_edge: float = 0.0,
    chunks: Chunks | None = None,
) -> xr.Dataset:
    """Make an imagery cube of a forest, with its true canopy height and disturbances.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns [px].
    resolution : float
        Pixel size [m].
    times : sequence of str or datetime64
        Dates, in order. A time of day is local solar time; without one, mid-morning (10:30).
    seed : int
        Seed of the world.
    crs : str, int or CRS
        Projected CRS in metres. The forest is drawn in its metres.
    disturbances : "random", None or sequence
        Disturbances before and between the dates: random events of all kinds, none, random events
        of the kinds named ("clear_cut", "thinning", "windthrow"), or exactly the
        :class:`Disturbance` objects given. Kinds and objects may be mixed.
    origin : tuple of float
        Map coordinates (x, y) of the upper left corner [m], rounded to the pixel grid. The world
        is unbounded: another origin is another place in it, and overlapping scenes agree.
    growth : bool
        Whether trees grow from date to date. Without growth, trees remain as in 2020 and no
        regrowth follows an event, so that two dates differ only in light, season and events.
    sun : tuple of float, optional
        Elevation and azimuth [degree] for all dates, instead of the sun of date and latitude.
    shift_px : float or sequence of (dy, dx)
        Misregistration of the imagery: the largest displacement [px], drawn for each date, or the
        displacement of each date southward and eastward. The truth is not displaced.
    clouds : float or sequence of float
        Share of the world under cloud, 0 to below 1, for all dates or for each.
    nodata_edge : float
        Share of the scene outside the slanting edge of the sensor's swath, 0 to 0.9.
    chunks : int, (int, int) or mapping, optional
        Chunk size in y and x [px] of lazy, dask-backed variables; each date is its own chunk.
        Values do not depend on them.

    Returns
    -------
    xarray.Dataset
        `red`, `green`, `blue` : uint8 (time, y, x), 0 in all three outside the footprint only;
        `canopy_height` : float32 (time, y, x) [m], 0 on open ground, roads, water and houses;
        `valid` : bool (time, y, x), False outside the footprint and under clouds and their shadows;
        `disturbance` : int32 (time, y, x), the event (1, 2, ...) that affected forest at a place
        between the previous date and this one, 0 for none; the later of two;
        `land_cover` : uint8 (y, x), see its `flag_meanings`;
        `event_kind`, `event_date`, `event_severity`, `event_x`, `event_y` (coordinates) and
        `event_area` [m2] along `event`, which lists the labels. An event
        that met no forest inside the scene has area 0; events before the first date shape the
        forest and are not listed. `sun_elevation`, `sun_azimuth` [degree], `shift_y` and
        `shift_x` [px] lie along `time`.

    Raises
    ------
    CHMv2Error
        If an argument is invalid; the message names it and a valid value.

    Notes
    -----
    With `chunks`, the variables are lazy, and equal calls give equal graph keys. All values are
    functions of seed, place and date: other dates, shapes or options do not change the
    trees.

    Examples
    --------
    >>> forest = synthetic_forest((64, 64), times=["2020-07-01"], seed=1)
    >>> forest.canopy_height.dims
    ('time', 'y', 'x')
    """
    window = _resolve_window(shape, resolution, origin)
    instants = _resolve_times(times)
    chronicle = _resolve_chronicle(seed, disturbances)
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
    intervals = ((), *(chronicle.up_to(b, window, after=a) for a, b in pairwise(instants)))
    events = tuple(
        tuple(e for e in interval if _reaches_into(e, chronicle.seed, window))
        for interval in intervals
    )
    scene = Forest(window, moments, shifts, events, float(nodata_edge))
    if chunks is None:
        return _label(eager_layers(scene), scene, crs)
    return _label(lazy_layers(scene, _resolve_chunks(chunks, window.shape)), scene, crs)


def _error(expected: str, found: str, argument: str) -> CHMv2Error:
    return CHMv2Error(expected, found, f"pass {argument}")


def _resolve_window(
    shape: tuple[int, int], resolution: float, origin: tuple[float, float]
) -> Cutout:
    """Return the pixels of the scene, on the grid of whole pixels from the CRS origin."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if len(sizes) != 2 or not all(isinstance(n, Integral) and int(n) > 0 for n in sizes):
        raise GridError("a shape of two positive integers", repr(shape), "pass shape=(768, 768)")
    if not _FINEST <= resolution <= _COARSEST:
        expected = f"a resolution of {_FINEST} to {_COARSEST} m"
        raise GridError(expected, f"{resolution}", "pass resolution=0.6")
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


def _resolve_chronicle(seed: int, disturbances: Any) -> Chronicle:
    """Return the history of disturbances: random events of some kinds, and given events."""
    if not isinstance(seed, Integral) or seed < 0:
        raise _error("a seed that is an integer of at least 0", repr(seed), "seed=0")
    if isinstance(disturbances, str | Disturbance):
        disturbances = KINDS if disturbances == "random" else (disturbances,)
    asked = () if disturbances is None else tuple(disturbances)
    given = tuple(d for d in asked if isinstance(d, Disturbance))
    kinds = tuple(d for d in asked if not isinstance(d, Disturbance))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise _error(
            f"disturbances 'random', None, Disturbance objects or kinds among {', '.join(KINDS)}",
            ", ".join(repr(kind) for kind in unknown),
            "disturbances=('clear_cut',)",
        )
    return Chronicle(int(seed), kinds, given)


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


def _reaches_into(event: Disturbance, seed: int, window: Cutout) -> bool:
    """Return whether an event's footprint, sampled every 2 m, intersects a window."""
    north, south, west, east = window.bounds
    if north <= -event.y <= south and west <= event.x <= east:
        return True
    offsets = np.arange(-event.reach, event.reach, 2.0)
    y, x = (a.ravel() for a in np.meshgrid(-event.y + offsets, event.x + offsets, indexing="ij"))
    seen = (y >= north) & (y <= south) & (x >= west) & (x <= east)
    return bool(event.covers_points(seed, y[seen], x[seen]).any())


def _resolve_chunks(chunks: Any, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of all chunks along y and x [px]; -1 stands for a single chunk."""
    from dask.array.core import normalize_chunks

    if isinstance(chunks, Mapping):
        chunks = (chunks.get("y", -1), chunks.get("x", -1))
    pair = (chunks, chunks) if isinstance(chunks, Integral) else tuple(chunks)
    if len(pair) != 2 or not all(isinstance(c, Integral) and (int(c) > 0 or c == -1) for c in pair):
        raise GridError(
            "chunks as an integer, or one for y and one for x", repr(chunks), "pass chunks=1024"
        )
    sizes: tuple[tuple[int, ...], ...] = normalize_chunks(tuple(map(int, pair)), shape)
    return sizes


def _label(layers: Mapping[str, Any], scene: Forest, crs: Any) -> xr.Dataset:
    """Return the layers with names, coordinates and attributes (bands as in STAC, else CF)."""
    planes: dict[str, dict[str, Any]] = {
        name: {
            "long_name": name,
            "common_name": name,
            "center_wavelength": wavelength,
            "gsd": scene.window.resolution,
            "nodata": 0,
        }
        for name, wavelength in _BANDS.items()
    } | {
        "canopy_height": {
            "standard_name": "canopy_height",
            "long_name": "true canopy height",
            "units": "m",
        },
        "valid": {"long_name": "imagery shows the ground"},
        "disturbance": {
            "long_name": "event since the previous date",
            "comment": "values of the coordinate event; 0: none",
        },
        "land_cover": {
            "long_name": "land cover",
            "flag_values": np.arange(len(COVERS), dtype=np.uint8),
            "flag_meanings": " ".join(COVERS),
        },
    }
    variables: dict[str, Any] = {
        name: (("time", "y", "x")[-layers[name].ndim :], layers[name], attrs | _GRID)
        for name, attrs in planes.items()
    }
    area = {"long_name": "area struck", "units": "m2"}
    variables["event_area"] = ("event", layers["event_area"], area)
    attrs = {
        "title": "Synthetic forest with known canopy height",
        "source": f"xchmv2 {__version__} synthetic_forest, seed {scene.seed}",
        "comment": "not a real place",
    }
    return xr.Dataset(variables, _space(scene, crs) | _time(scene) | _events(scene), attrs)


def _space(scene: Forest, crs: Any) -> dict[str, Any]:
    """Return pixel centres and the CRS, named as by odc-stac."""
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.geo.xr import xr_coords

    window, res = scene.window, scene.window.resolution
    affine = Affine(res, 0.0, window.col * res, 0.0, -res, -window.row * res)
    return dict(xr_coords(GeoBox(window.shape, affine, crs), crs_coord_name="spatial_ref"))


def _time(scene: Forest) -> dict[str, Any]:
    suns = [m.sun for m in scene.moments]
    return {
        "time": np.array([m.instant for m in scene.moments], "datetime64[ns]"),
        "sun_elevation": _along_time([s.elevation for s in suns], "sun elevation", "degree"),
        "sun_azimuth": _along_time([s.azimuth for s in suns], "sun azimuth from north", "degree"),
        "shift_y": _along_time([s[0] for s in scene.shifts], "displacement southward", "px"),
        "shift_x": _along_time([s[1] for s in scene.shifts], "displacement eastward", "px"),
    }


def _along_time(values: Sequence[float], name: str, units: str) -> Any:
    return "time", np.array(values, np.float64), {"long_name": name, "units": units}


def _events(scene: Forest) -> dict[str, Any]:
    events = [event for interval in scene.events for event in interval]

    def column(values: list[Any], dtype: npt.DTypeLike) -> Any:
        return "event", np.array(values, dtype)

    return {
        "event": np.arange(1, len(events) + 1, dtype=np.int32),
        "event_kind": column([e.kind for e in events], object),
        "event_date": column([e.day for e in events], "datetime64[ns]"),
        "event_severity": column([e.severity for e in events], np.float64),
        "event_x": column([e.x for e in events], np.float64),
        "event_y": column([e.y for e in events], np.float64),
    }
