"""Sums over polygons, piece by piece, and the statistics and standard errors derived from them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from scipy.special import ndtr

from xchmv2.change.correlation import MOST_WINDOWS, WINDOW, correlated_pixels
from xchmv2.change.registration import Windows
from xchmv2.errors import CHMv2Error
from xchmv2.raster import Chunks, Source, assemble, list_items, show
from xchmv2.zonal.polygons import Geometries, Piece, Window

_Floats = npt.NDArray[np.float64]
#: Layers by name: of a window, or for each pixel under a piece; a number holds for all.
_Read = Mapping[str, npt.NDArray[Any]]

#: Statistics of any raster, computed by default.
_HEIGHT_STATS = ("mean", "std", "min", "max", "count", "area", "valid_fraction")
#: Areas and volumes of change.
_CHANGE_STATS = tuple(
    f"{side}_{what}" for what in ("area", "volume") for side in ("loss", "gain", "net")
)
#: Statistics that come with a standard error where the error of a pixel is known.
_WITH_ERROR = ("mean", *_CHANGE_STATS)

_HECTARE = 1e4
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d+)?|100)")
_LONG_NAMES = {
    "mean": "mean {of}",
    "median": "median {of}",
    "std": "standard deviation of {of}",
    "min": "lowest {of}",
    "max": "highest {of}",
    "count": "pixels with data, by the share that is covered",
    "area": "area with data",
    "valid_fraction": "share of the polygon that has data",
    "loss_area": "area of loss",
    "gain_area": "area of gain",
    "net_area": "area of gain minus area of loss",
    "loss_volume": "canopy volume lost where there is loss",
    "gain_volume": "canopy volume gained where there is gain",
    "net_volume": "change of canopy volume, of all pixels",
}


def _percentile_of(stat: str) -> float | None:
    """Return the share that a percentile's name stands for, such as 0.95 for p95; else None."""
    if stat == "median":
        return 0.5
    found = _PERCENTILE.fullmatch(stat)
    return float(found[1]) / 100 if found else None


def resolve_stats(
    stats: str | Sequence[str] | None, *, change: bool, errors: bool
) -> tuple[str, ...]:
    """Return the statistics wanted, each followed by its standard error where there are errors."""
    every = _HEIGHT_STATS + (_CHANGE_STATS if change else ())
    named = every if stats is None else tuple(list_items(stats) or (stats,))
    texts = all(isinstance(stat, str) for stat in named)
    wanted = tuple(dict.fromkeys(named)) if texts else ()
    wrong = [stat for stat in wanted if stat not in every and _percentile_of(stat) is None]
    if wrong and set(wrong) <= set(_CHANGE_STATS):
        raise CHMv2Error(
            f"a change, for {', '.join(wrong)}",
            "heights",
            "pass what difference() returns, or a DataArray named 'height_change'",
        )
    if wrong or not wanted:
        raise CHMv2Error(
            f"statistics among {', '.join(every)}, median and percentiles such as p95",
            f"{wrong}" if wrong else f"stats={show(stats)}",
            "correct them: stats=('mean', 'p95')",
        )
    pairs = ((stat, f"{stat}_se") if errors and stat in _WITH_ERROR else (stat,) for stat in wanted)
    return tuple(name for pair in pairs for name in pair)


def label_stat(stat: str, of: str, units: str | None, square: str | None) -> dict[str, str]:
    """Return the long name of a statistic of a quantity, and its unit where that is known."""
    name = stat.removesuffix("_se")
    share = _percentile_of(name)
    if share is not None and name != "median":
        long_name = f"{100 * share:g}th percentile of {of}"
    else:
        long_name = _LONG_NAMES[name].format(of=of)
    if stat != name:
        long_name = f"standard error of {long_name}"
    own = {"count": "1", "valid_fraction": "1", "area": square}
    unit = own.get(name, units)
    if name in _CHANGE_STATS:
        unit = square and ("ha" if name.endswith("_area") else "m3")
    return {"long_name": long_name, **({"units": unit} if unit else {})}


@dataclass(frozen=True)
class Rules:
    """The statistics wanted, and the rule for loss and gain."""

    #: Statistics, with ``_se`` for standard errors.
    names: tuple[str, ...]
    #: Change [m] from which on a pixel is lost or gained; None where the layer ``changed`` says so.
    threshold: float | None

    @property
    def change(self) -> bool:
        """Whether loss and gain are wanted."""
        return any(name.removesuffix("_se") in _CHANGE_STATS for name in self.names)

    @property
    def percentiles(self) -> bool:
        """Whether values are kept for percentiles."""
        return any(_percentile_of(name) is not None for name in self.names)


def summarize(
    layers: Mapping[str, Any],
    geometries: Geometries,
    pieces: Sequence[Piece],
    rules: Rules,
    length: float | da.Array | None,
) -> da.Array:
    """Build the graph of all statistics (names, dates, polygons); nothing is computed.

    Each piece is a task, and reads the chunks over its window only. The layers are numbers, (H, W)
    or (D, H, W): ``value`` (D, H, W) and ``area`` (H, W) of each pixel; where they are known,
    ``sigma`` [m], ``changed`` and ``least``: which pixels have changed, and the least change that
    counts [m].
    """
    import shapely

    lazy = {name: Source(layer) for name, layer in layers.items() if isinstance(layer, da.Array)}
    numbers = {name: layer for name, layer in layers.items() if name not in lazy}
    sizes = shapely.area(geometries)
    shape = (len(rules.names), layers["value"].shape[0], len(sizes))
    token = tokenize(
        dict(layers), rules, length, sizes, shape, [shapely.to_wkb(p.geometry) for p in pieces]
    )
    name, sums = f"zonal-statistics-{token}", f"zonal-sums-{token}"
    tasks: dict[Any, Any] = {
        (sums, k): _over(lazy, piece.window, partial(_sum_piece, piece, rules, numbers))
        for k, piece in enumerate(pieces)
    }
    polygons = np.array([piece.polygon for piece in pieces], dtype=int)
    finish = partial(_finish, polygons=polygons, sizes=sizes, rules=rules, shape=shape)
    arrays = [source.array for source in lazy.values()]
    if isinstance(length, da.Array):
        arrays.append(length)
    lengths = (length.name,) if isinstance(length, da.Array) else length
    tasks[name, 0, 0, 0] = (finish, [(sums, k) for k in range(len(pieces))], lengths)
    graph = HighLevelGraph.from_collections(name, tasks, arrays)
    return da.Array(graph, name, tuple((size,) for size in shape), meta=np.empty((0, 0, 0)))


def estimate_length(change: da.Array, cell: float) -> da.Array:
    """Estimate the correlation length [m] of changes (D, H, W) with cells of an area [m2].

    As :func:`xchmv2.change.correlation_length`, lazily; dates are pooled.
    """
    found = Windows.spread_over((change.shape[1], change.shape[2]), WINDOW, MOST_WINDOWS, 0)
    windows = [(row, row + found.side, col, col + found.side) for row, col in found.corners]
    read = [_over({"value": Source(change)}, window, dict) for window in windows]
    name = f"zonal-length-{tokenize(change, cell)}"
    tasks = {(name,): (partial(_estimate, cell), read)}
    return da.Array(HighLevelGraph.from_collections(name, tasks, [change]), name, (), dtype=float)


def _estimate(cell: float, windows: Sequence[_Read]) -> _Floats:
    """Task: estimate the correlation length."""
    planes = [plane.astype(np.float64) for read in windows for plane in read["value"]]
    return np.asarray(math.sqrt(correlated_pixels(planes) * cell / math.pi))


def _over(layers: Mapping[str, Source], window: Window, function: Callable[[_Read], Any]) -> Any:
    """Return a task that reads a window, and calls a function with the layers in it.

    It names the chunks over the window: slices of them would have dask make each chunk anew.
    """
    spans, begins, keys = (window[:2], window[2:]), [], []
    for layer in layers.values():
        (ys, top), (xs, left) = (layer.covering(axis, [spans[axis]])[0] for axis in (0, 1))
        begins.append((top, left))
        dates = np.ndindex(*(len(sizes) for sizes in layer.leading))
        keys.append([layer.keys(date, ys, xs) for date in dates])
    return partial(_read_and_call, function, tuple(layers), begins, spans), keys


def _read_and_call(
    function: Callable[[_Read], Any],
    names: Sequence[str],
    begins: Sequence[tuple[int, int]],
    spans: tuple[tuple[int, int], tuple[int, int]],
    chunks: Sequence[Sequence[Chunks]],
) -> Any:
    """Task: assemble windows from the chunks over them, and call a function with them."""
    read = {}
    for name, begin, dates in zip(names, begins, chunks, strict=True):
        planes = [assemble(date, begin, None, spans) for date in dates]
        read[name] = np.concatenate(planes) if len(planes) > 1 else planes[0]
    return function(read)


#: Covered shares of a pixel below this are rounding of coordinates.
_LEAST_SHARE = 1e-9


def _sum_piece(piece: Piece, rules: Rules, numbers: _Read, read: _Read) -> dict[str, list[Any]]:
    """Add up the pixels in a piece, for each date."""
    layers = {**numbers, **read}
    cells, share = _cover(piece, layers["area"])
    dates = []
    for date in range(len(layers["value"])):  # one by one, to need memory for one
        planes = {name: a[date] if a.ndim == 3 else a for name, a in layers.items()}
        under = {name: a.ravel()[cells] if a.ndim else a for name, a in planes.items()}
        dates.append(_sum_pixels(share, under, rules))
    return {name: [date[name] for date in dates] for name in dates[0]}


def _cover(piece: Piece, plane: _Floats) -> tuple[npt.NDArray[np.int64], _Floats]:
    """Return the cells of a window that a piece covers, and the share of each."""
    import shapely
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    top, bottom, left, right = piece.window
    found = exact_extract(
        NumPyRasterSource(plane, left, -bottom, right, -top),
        {"type": "Feature", "geometry": shapely.geometry.mapping(piece.geometry), "properties": {}},
        ["cell_id", "coverage"],
        # exactextract counts cells from the window's first one only if it reads it in one part.
        max_cells_in_memory=4 * plane.size,
    )[0]["properties"]
    kept = found["coverage"] >= _LEAST_SHARE
    return found["cell_id"][kept], found["coverage"][kept]


def _sum_pixels(share: _Floats, layers: _Read, rules: Rules) -> dict[str, Any]:
    """Add up the pixels of one date, each by its share."""
    value = layers["value"].astype(np.float64)
    known = np.isfinite(value)
    value[~known] = 0.0
    weight = np.where(known, share * layers["area"], 0.0)
    area = weight.sum()
    mean = (weight * value).sum() / area if area else 0.0
    sums = {
        "count": share[known].sum(),
        "area": area,
        "mean": mean,
        "scatter": (weight * (value - mean) ** 2).sum(),
        "min": value[known].min(initial=np.inf),
        "max": value[known].max(initial=-np.inf),
    }
    if rules.percentiles:
        sums["values"] = layers["value"][known], weight[known]
    sigma = np.where(known, layers["sigma"], 0.0) if "sigma" in layers else None
    if sigma is not None:
        sums["variance"] = (weight * sigma**2).sum()
    if not rules.change:
        return sums
    size = np.abs(value)
    least = layers["least"] if rules.threshold is None else rules.threshold
    changed = layers["changed"] if rules.threshold is None else size > least
    for name, side in (("loss", value < 0), ("gain", value > 0)):
        lost = np.where(changed & side, weight, 0.0)
        sums[f"{name}_area"] = lost.sum()
        sums[f"{name}_volume"] = (lost * size).sum()
        if sigma is None:
            continue
        sums[f"{name}_variance"] = (lost * sigma**2).sum()
        # How likely a repeated measurement would call the pixel changed.
        chance = ndtr((size - least) / np.maximum(sigma, 1e-9))
        doubt = np.where(side, weight**2 * chance * (1 - chance), 0.0)
        sums[f"{name}_area_doubt"] = doubt.sum()
        sums[f"{name}_volume_doubt"] = (doubt * size**2).sum()
    return sums


def _finish(
    parts: Sequence[Mapping[str, Any]],
    length: float | npt.NDArray[Any] | None,
    *,
    polygons: npt.NDArray[np.int_],
    sizes: _Floats,
    rules: Rules,
    shape: tuple[int, int, int],
) -> _Floats:
    """Task: join the pieces of each polygon, and turn sums into statistics (names, D, N)."""
    found = np.full(shape, np.nan)
    if not parts:
        return found
    inside, starts = np.unique(polygons, return_index=True)  # pieces are in order of polygons
    sums = _join(parts, starts)
    sums["valid_fraction"] = sums["count"] / sizes[inside, None]
    values = np.split(np.arange(len(parts)), starts[1:])
    for row, name in zip(found, rules.names, strict=True):
        share = _percentile_of(name)
        if share is None:
            statistic = _statistic(sums, name, float(length or 0.0))
        else:
            under = [[parts[k]["values"] for k in pieces] for pieces in values]
            statistic = np.array([_quantiles(pieces, share) for pieces in under])
        # Without valid pixels in a polygon, the area with data is 0 and other statistics are NaN.
        known = (sums["area"] > 0) | (name in ("count", "area", "valid_fraction"))
        row[:, inside] = np.where(known, statistic, np.nan).T
    return found


def _join(parts: Sequence[Mapping[str, Any]], starts: npt.NDArray[np.int_]) -> dict[str, _Floats]:
    """Join the sums of pieces to those of polygons, (N, D)."""
    columns = {
        name: np.array([part[name] for part in parts]) for name in parts[0] if name != "values"
    }
    area, mean = columns["area"], columns["mean"]
    sums = {name: np.add.reduceat(column, starts) for name, column in columns.items()}
    total = np.add.reduceat(area * mean, starts)
    sums["mean"] = np.divide(total, sums["area"], out=np.zeros_like(total), where=sums["area"] > 0)
    apart = mean - np.repeat(sums["mean"], np.diff([*starts, len(parts)]), axis=0)
    sums["scatter"] += np.add.reduceat(area * apart**2, starts)
    sums["min"] = np.minimum.reduceat(columns["min"], starts)
    sums["max"] = np.maximum.reduceat(columns["max"], starts)
    return sums


def _quantiles(pieces: Sequence[Any], q: float) -> list[float]:
    """Return each date's quantile, weighted by area (numpy's "inverted_cdf")."""
    found = []
    for date in zip(*pieces, strict=True):
        value, weight = (np.concatenate(each) for each in zip(*date, strict=True))
        order = np.argsort(value, kind="stable")
        rising = np.cumsum(weight[order])
        place = np.searchsorted(rising, q * rising[-1] * (1 - 1e-12)) if value.size else 0
        found.append(float(value[order][min(place, value.size - 1)]) if value.size else np.nan)
    return found


def _statistic(sums: Mapping[str, _Floats], name: str, length: float) -> _Floats:
    """Turn the sums of polygons into one statistic."""
    if name.endswith("_se"):
        return _standard_error(sums, name.removesuffix("_se"), length)
    if name == "net_area":
        return (sums["gain_area"] - sums["loss_area"]) / _HECTARE
    if name == "net_volume":
        return sums["mean"] * sums["area"]
    if name == "std":
        return np.sqrt(sums["scatter"] / np.where(sums["area"] > 0, sums["area"], np.nan))
    return sums[name] / _HECTARE if name.endswith("_area") else sums[name]


def _standard_error(sums: Mapping[str, _Floats], name: str, length: float) -> _Floats:
    """Return a standard error, by the effective number of independent pixels."""
    count, area = sums["count"], np.where(sums["area"] > 0, sums["area"], np.nan)
    independent = effective_samples(area, length, count)
    if name in ("mean", "net_volume"):
        error = np.sqrt(sums["variance"] / area / independent)
        return error if name == "mean" else error * area
    sides = ("loss", "gain") if name.startswith("net") else (name.partition("_")[0],)
    # The errors of neighbours are correlated: this many pixels count as one measurement.
    together = count / independent
    doubt = sum(sums[f"{side}_{name.partition('_')[2]}_doubt"] for side in sides) * together
    if name.endswith("area"):
        return np.sqrt(doubt) / _HECTARE
    return np.sqrt(
        doubt + sum(_height_variance(sums, side, area / count, length) for side in sides)
    )


def _height_variance(
    sums: Mapping[str, _Floats], side: str, pixel: _Floats, length: float
) -> _Floats:
    """Return the variance of the volume of loss or gain that the error of heights causes."""
    area = sums[f"{side}_area"]
    independent = effective_samples(area, length, area / pixel)
    mean = np.divide(sums[f"{side}_variance"], area, out=np.zeros_like(area), where=area > 0)
    found: _Floats = np.where(area > 0, mean * area**2 / np.nan_to_num(independent, nan=1.0), 0.0)
    return found


def effective_samples(
    area: npt.ArrayLike, correlation_length: npt.ArrayLike, count: npt.ArrayLike
) -> _Floats:
    """Count the independent measurements in an area with spatially correlated errors.

    Parameters
    ----------
    area : array_like
        Areas [m2].
    correlation_length : array_like
        Radius of the disc that counts as one independent error [m], as from
        :func:`xchmv2.change.correlation_length`; 0 where errors are independent.
    count : array_like
        Pixels in each area.

    Returns
    -------
    ndarray of float64
        At least 1 and at most the count; NaN where there is no pixel, or no length. The standard
        error of a mean is the errors' standard deviation divided by the square root of it.

    Notes
    -----
    Errors are given the spherical variogram whose autocorrelation has the same integral: its range
    a is sqrt(5) times the correlation length. The area is taken for a disc of radius L about its
    centre: the variance of its mean is a share 1 - L/a + (L/a)^3 / 5 of a pixel's up to L = a, and
    (a/L)^2 / 5 beyond, which is a pixel's, by the number of correlated discs in the area. A longish
    area, or one of many patches, has more independent measurements than a disc, so its standard
    error is stated too large rather than too small.

    References
    ----------
    Rolstad, Haug and Denby 2009, Spatially integrated geodetic glacier mass balance and its
    uncertainty based on geostatistical analysis, Journal of Glaciology 55 (192): 666-680.
    """
    radius = np.sqrt(np.asarray(area, np.float64) / math.pi)
    length = np.asarray(correlation_length, np.float64)
    reach = np.maximum(math.sqrt(5) * length, np.finfo(float).tiny)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = radius / reach
        near = 1 - np.minimum(ratio, 1) + np.minimum(ratio, 1) ** 3 / 5
        samples = np.where(ratio < 1, 1 / near, 5 * ratio**2)
    count = np.asarray(count, np.float64)
    bounded: _Floats = np.maximum(1.0, np.minimum(samples, count))
    return np.where(count > 0, bounded, np.nan)
