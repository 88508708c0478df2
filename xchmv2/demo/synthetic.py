"""Synthetic forest cubes with known truth, made from a seed: :func:`synthetic_forest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2._version import __version__
from xchmv2.demo.colour import COVERS
from xchmv2.demo.disturbance import Disturbance, Kind
from xchmv2.demo.layers import Forest, eager_layers, lazy_layers
from xchmv2.demo.scene_arguments import resolve_chunks, resolve_scene

_BANDS = {"red": 0.65, "green": 0.56, "blue": 0.48}  # centre wavelength [um]
_GRID = {"grid_mapping": "spatial_ref"}

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
    scene = resolve_scene(
        shape=shape,
        resolution=resolution,
        times=times,
        seed=seed,
        crs=crs,
        disturbances=disturbances,
        origin=origin,
        growth=growth,
        sun=sun,
        shift_px=shift_px,
        clouds=clouds,
        nodata_edge=nodata_edge,
    )
    layers = (
        eager_layers(scene) if chunks is None else lazy_layers(scene, resolve_chunks(chunks, shape))
    )
    return _label(layers, scene, crs)


def _label(layers: Mapping[str, Any], scene: Forest, crs: Any) -> xr.Dataset:
    """Return the layers with names, coordinates and attributes."""
    cube, plane = ("time", "y", "x"), ("y", "x")
    variables = {
        name: (cube, layers[name], _band_attrs(name, scene) | _GRID) for name in _BANDS
    } | {
        "canopy_height": (cube, layers["canopy_height"], _height_attrs() | _GRID),
        "valid": (cube, layers["valid"], {"long_name": "imagery shows the ground"} | _GRID),
        "disturbance": (cube, layers["disturbance"], _disturbance_attrs() | _GRID),
        "land_cover": (plane, layers["land_cover"], _cover_attrs() | _GRID),
        "event_area": ("event", layers["event_area"], {"long_name": "area struck", "units": "m2"}),
    }
    coords = _space(scene, crs) | _time(scene) | _events(scene)
    attrs = {
        "title": "Synthetic forest with known canopy height",
        "source": f"xchmv2 {__version__} synthetic_forest, seed {scene.seed}",
        "comment": "not a real place",
    }
    return xr.Dataset(variables, coords, attrs)


def _band_attrs(name: str, scene: Forest) -> dict[str, Any]:
    """Return the metadata of a band, named as in STAC."""
    return {
        "long_name": name,
        "common_name": name,
        "center_wavelength": _BANDS[name],
        "gsd": scene.window.resolution,
        "nodata": 0,
    }


def _height_attrs() -> dict[str, Any]:
    """Return the CF attributes of the truth."""
    return {"standard_name": "canopy_height", "long_name": "true canopy height", "units": "m"}


def _disturbance_attrs() -> dict[str, Any]:
    """Return the attributes of the label map."""
    return {
        "long_name": "event since the previous date",
        "comment": "values of the coordinate event; 0: none",
    }


def _cover_attrs() -> dict[str, Any]:
    """Return the CF flag attributes of the land cover."""
    return {
        "long_name": "land cover",
        "flag_values": np.arange(len(COVERS), dtype=np.uint8),
        "flag_meanings": " ".join(COVERS),
    }


def _space(scene: Forest, crs: Any) -> dict[str, Any]:
    """Return pixel centres and the CRS, named as by odc-stac."""
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.geo.xr import xr_coords

    window, res = scene.window, scene.window.resolution
    affine = Affine(res, 0.0, window.col * res, 0.0, -res, -window.row * res)
    return dict(xr_coords(GeoBox(window.shape, affine, crs), crs_coord_name="spatial_ref"))


def _time(scene: Forest) -> dict[str, Any]:
    """Return dates, sun and misregistration."""
    suns = [m.sun for m in scene.moments]
    return {
        "time": np.array([m.instant for m in scene.moments], "datetime64[ns]"),
        "sun_elevation": _along_time([s.elevation for s in suns], "sun elevation", "degree"),
        "sun_azimuth": _along_time([s.azimuth for s in suns], "sun azimuth from north", "degree"),
        "shift_y": _along_time([s[0] for s in scene.shifts], "displacement southward", "px"),
        "shift_x": _along_time([s[1] for s in scene.shifts], "displacement eastward", "px"),
    }


def _along_time(values: Sequence[float], name: str, units: str) -> Any:
    """Return a coordinate along time."""
    return "time", np.array(values, np.float64), {"long_name": name, "units": units}


def _events(scene: Forest) -> dict[str, Any]:
    """Return the table of events."""
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
