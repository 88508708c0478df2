"""Sums over polygons, piece by piece, and the statistics and standard errors derived from them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from scipy.special import ndtr

from xchmv2.change import ErrorModel
from xchmv2.errors import CHMv2Error
from xchmv2.raster import Chunks, Source, assemble, list_items, show
from xchmv2.zonal.polygons import Geometries, Pieces, Spans

if TYPE_CHECKING:
    from xchmv2.zonal.coverage import Coverage, Weights

_Floats = npt.NDArray[np.float64]
#: Layers by name: of a window, or for each pixel under a piece; a number holds for all.
_Read = Mapping[str, npt.NDArray[Any]]

#: Statistics of any raster, computed by default.
_HEIGHT_STATS = ("mean", "std", "min", "max", "count", "area", "valid_fraction")
#: Statistics of any pixel, of no limit that it may lie beyond.
_OF_ALL = ("net_volume", "net_volume_se")
#: Areas and volumes of change.
_CHANGE_STATS = tuple(
    f"{side}_{what}" for what in ("area", "volume") for side in ("loss", "gain", "net")
)
#: Statistics that come with a standard error where the error of a pixel is known.
_WITH_ERROR = ("mean", "cover", *_CHANGE_STATS)

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
    "cover": "share of the ground under canopy of {limit:g} m or more",
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
    stats: str | Sequence[str] | None, *, change: bool, cover: bool, errors: bool
) -> tuple[str, ...]:
    """Return the statistics wanted, each followed by its standard error where there are errors."""
    default = _HEIGHT_STATS + (_CHANGE_STATS if change else ())
    every = default + (("cover",) if cover else ())
    named = default if stats is None else tuple(list_items(stats) or (stats,))
    texts = all(isinstance(stat, str) for stat in named)
    wanted = tuple(dict.fromkeys(named)) if texts else ()
    wrong = [stat for stat in wanted if stat not in every and _percentile_of(stat) is None]
    if wrong and set(wrong) <= set(_CHANGE_STATS):
        raise CHMv2Error(
            f"a change, for {', '.join(wrong)}",
            "heights",
            "pass what difference() returns, or a DataArray named 'height_change'",
        )
    if wrong == ["cover"]:
        raise CHMv2Error(
            "canopy heights, for cover",
            "a change, or another quantity",
            "pass heights; the share of a mask is its mean: zonal(mask, polygons, stats='mean')",
        )
    if wrong or not wanted:
        raise CHMv2Error(
            f"statistics among {', '.join(every)}, median and percentiles such as p95",
            f"{wrong}" if wrong else f"stats={show(stats)}",
            "correct them: stats=('mean', 'p95')",
        )
    pairs = ((stat, f"{stat}_se") if errors and stat in _WITH_ERROR else (stat,) for stat in wanted)
    return tuple(name for pair in pairs for name in pair)


def label_stat(
    stat: str, of: str, units: str | None, square: str | None, limit: float | None
) -> dict[str, str]:
    """Return the long name of a statistic of a quantity, and its unit where that is known."""
    name = stat.removesuffix("_se")
    share = _percentile_of(name)
    if share is not None and name != "median":
        long_name = f"{100 * share:g}th percentile of {of}"
    else:
        long_name = _LONG_NAMES[name].format(of=of, limit=limit)
    if stat != name:
        long_name = f"standard error of {long_name}"
    own = {"count": "1", "valid_fraction": "1", "cover": "1", "area": square}
    unit = own.get(name, units)
    if name in _CHANGE_STATS:
        unit = square and ("ha" if name.endswith("_area") else "m3")
    return {"long_name": long_name, **({"units": unit} if unit else {})}


@dataclass(frozen=True)
class Rules:
    """The statistics wanted, and the limit of what counts."""

    #: Statistics, with ``_se`` for standard errors.
    names: tuple[str, ...]
    #: Height [m] from which on a pixel is canopy, or change [m] from which on it is lost or gained;
    #: None where the layer ``changed`` says so.
    threshold: float | None

    def need(self, *stats: str) -> bool:
        """Whether one of some statistics is wanted."""
        return not set(stats).isdisjoint(self.names)

    @property
    def sides(self) -> tuple[str, ...]:
        """Which of loss and gain are wanted."""
        wanted = {name.partition("_")[0] for name in self.names if name not in _OF_ALL}
        return tuple(side for side in ("loss", "gain") if wanted & {side, "net"})

    @property
    def percentiles(self) -> bool:
        """Whether values are kept for percentiles."""
        return any(_percentile_of(name) is not None for name in self.names)


def summarize(
    layers: Mapping[str, Any],
    geometries: Geometries,
    pieces: Pieces,
    rules: Rules,
    errors: ErrorModel | None,
    cell: tuple[float, float],
) -> da.Array:
    """Build the graph of all statistics (names, dates, polygons); nothing is computed.

    `errors` are those of the values, if their standard errors are wanted, `cell` the sides of a
    pixel on the ground [m].

    A task adds up pieces that lie in the same chunks of all layers, and reads no others. The layers
    are numbers, (H, W) or (D, H, W): ``value`` (D, H, W) and ``area`` (H, W) of each pixel; where
    they are known, ``sigma`` [m], ``changed`` and ``least``: which pixels have changed, and the
    least change that counts [m].
    """
    import shapely

    lazy = {name: Source(layer) for name, layer in layers.items() if isinstance(layer, da.Array)}
    numbers = {name: layer for name, layer in layers.items() if name not in lazy}
    sizes = shapely.area(geometries)
    shape = (len(rules.names), layers["value"].shape[0], len(sizes))
    outlines = shapely.to_wkb(pieces.geometry)
    token = tokenize(dict(layers), rules, errors, cell, sizes, shape, pieces.window, outlines)
    name, sums = f"zonal-statistics-{token}", f"zonal-sums-{token}"
    batches = _batches(pieces, list(lazy.values()))
    levels = _levels(geometries)
    tasks: dict[Any, Any] = {}
    for k, batch in enumerate(batches):
        some = pieces[batch]
        window = (*some.window[:, ::2].min(axis=0), *some.window[:, 1::2].max(axis=0))
        top, left, bottom, right = map(int, window)
        spans = (top, bottom), (left, right)
        add = partial(_sum_pieces, some, spans, levels[some.polygon], rules, numbers)
        tasks[sums, k] = _over(lazy, spans, add)
    finish = partial(
        _finish,
        order=np.argsort(np.concatenate([*batches, np.zeros(0, np.int64)])),
        polygons=pieces.polygon,
        sizes=sizes,
        rules=rules,
        shape=shape,
        cell=cell,
    )
    arrays = [source.array for source in lazy.values()]
    known: Any = errors
    if errors is not None and not errors.computed:
        delayed = dask.delayed(errors.with_numbers, pure=True)(*errors.numbers)
        arrays.append(delayed)
        known = delayed.key
    tasks[name, 0, 0, 0] = (finish, [(sums, k) for k in range(len(batches))], known)
    graph = HighLevelGraph.from_collections(name, tasks, arrays)
    return da.Array(graph, name, tuple((size,) for size in shape), meta=np.empty((0, 0, 0)))


#: Pixels in the windows of the pieces that a task adds up at once, to bound its memory.
_BATCH = 2**20


def _batches(pieces: Pieces, layers: Sequence[Source]) -> list[npt.NDArray[np.int64]]:
    """Put pieces together that lie in the same chunks of all layers."""
    if not len(pieces):
        return []
    places = []
    for axis in (0, 1):
        start, stop = pieces.window[:, 2 * axis], pieces.window[:, 2 * axis + 1]
        for sizes in {layer.array.chunks[axis - 2] for layer in layers}:
            ends = np.cumsum(sizes)
            places += [np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left")]
    together = np.unique(np.stack(places, axis=1), axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(together, kind="stable")
    window, together = pieces.window[order], together[order]
    pixels = np.prod(window[:, 1::2] - window[:, ::2], axis=1)
    before = np.cumsum(pixels) - pixels
    first = np.flatnonzero(np.diff(together, prepend=-1))
    before -= np.repeat(before[first], np.diff([*first, len(order)]))
    cuts = (np.diff(together) != 0) | (np.diff(before // _BATCH) != 0)
    return np.split(order, np.flatnonzero(cuts) + 1)


def _over(layers: Mapping[str, Source], spans: Spans, function: Callable[[_Read], Any]) -> Any:
    """Return a task that reads a window, and calls a function with the layers in it.

    It names the chunks over the window: slices of them would have dask make each chunk anew.
    """
    begins, keys = [], []
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
    spans: Spans,
    chunks: Sequence[Sequence[Chunks]],
) -> Any:
    """Task: assemble windows from the chunks over them, and call a function with them."""
    read = {}
    for name, begin, dates in zip(names, begins, chunks, strict=True):
        planes = [assemble(date, begin, None, spans) for date in dates]
        read[name] = np.concatenate(planes) if len(planes) > 1 else planes[0]
    return function(read)


def _levels(geometries: Geometries) -> npt.NDArray[np.int64]:
    """Return for each polygon the level of the blocks, of 2^level px, that tell its shape.

    They are a quarter of its width at most, unless it is more than 128 of them long.
    """
    import shapely

    width = 2 * shapely.area(geometries) / np.maximum(shapely.length(geometries), 1e-9)
    left, top, right, bottom = np.nan_to_num(shapely.bounds(geometries)).T
    fine = np.floor(np.log2(np.maximum(width / 4, 1)))
    short = np.ceil(np.log2(np.maximum(np.maximum(right - left, bottom - top) / 128, 1)))
    levels: npt.NDArray[np.int64] = np.maximum(fine, short).astype(np.int64)
    return levels


def _sum_pieces(
    pieces: Pieces,
    spans: Spans,
    levels: npt.NDArray[np.int64],
    rules: Rules,
    numbers: _Read,
    read: _Read,
) -> dict[str, Any]:
    """Add up the pixels in each piece at each date: arrays (pieces, D), or lists of `_KEPT`."""
    from xchmv2.zonal.coverage import measure_coverage, weigh_pieces

    layers = {**numbers, **read}
    covered = measure_coverage(pieces, spans)
    weigh = partial(weigh_pieces, covered, pieces=pieces, spans=spans, steps=2**levels)
    dates = []
    for date in range(len(layers["value"])):  # one by one, to need memory for one
        planes = {name: a[date] if a.ndim == 3 else a for name, a in layers.items()}
        under = {name: a.ravel()[covered.cell] if a.ndim else a for name, a in planes.items()}
        dates.append(_sum_pixels(covered, under, rules, weigh))
    return {
        name: list(zip(*(date[name] for date in dates), strict=True))
        if name in _KEPT
        else np.stack([date[name] for date in dates], axis=1)
        for name in dates[0]
    }


#: What is kept of each piece besides sums: values of pixels with their weights, and weights of
#: errors in blocks.
_KEPT = ("values", "shapes")


def _sum_pixels(
    covered: Coverage, layers: _Read, rules: Rules, weigh: Callable[..., Any]
) -> dict[str, Any]:
    """Add up the pixels of one date, each by its share, for each piece."""
    value = layers["value"].astype(np.float64)
    known = np.isfinite(value)
    value[~known] = 0.0
    share = np.where(known, covered.share, 0.0)
    weight = share * layers["area"]
    area = covered.reduce(weight)
    total = covered.reduce(weight * value)
    mean = np.divide(total, area, out=np.zeros_like(area), where=area > 0)
    sums: dict[str, Any] = {"count": covered.reduce(share), "area": area, "mean": mean}
    if rules.need("std"):
        apart = value - np.repeat(mean, covered.sizes)
        sums["scatter"] = covered.reduce(weight * apart**2)
    for name, by, empty in (("min", np.minimum, np.inf), ("max", np.maximum, -np.inf)):
        if rules.need(name):
            sums[name] = covered.reduce(np.where(known, value, empty), by, empty)
    if rules.percentiles:
        kept = [array[known] for array in (layers["value"], weight)]
        ends = np.cumsum(covered.reduce(known).astype(int))[:-1]
        sums["values"] = zip(*(np.split(array, ends) for array in kept), strict=True)
    sigma = layers.get("sigma")
    if sigma is not None:
        sigma = np.where(known, sigma, 0.0)
        sums["spread"] = covered.reduce(weight * sigma)
        sums["shapes"] = weigh(weight=weight * sigma)
    if rules.threshold is not None and rules.need("cover"):
        sums["cover"] = covered.reduce(np.where(layers["value"] >= rules.threshold, weight, 0.0))
        if sigma is not None:
            doubt = _doubt(value - rules.threshold, sigma)
            sums["cover_doubt"] = covered.reduce(weight**2 * doubt)
    if not rules.sides:
        return sums
    size = np.abs(value)
    least = layers["least"] if rules.threshold is None else rules.threshold
    changed = layers["changed"] if rules.threshold is None else size > least
    if sigma is not None:
        doubt = weight**2 * _doubt(size - least, sigma)
    for name in rules.sides:
        side = value < 0 if name == "loss" else value > 0
        lost = np.where(changed & side, weight, 0.0)
        sums[f"{name}_area"] = covered.reduce(lost)
        sums[f"{name}_volume"] = covered.reduce(lost * size)
        if sigma is None:
            continue
        own = np.where(side, doubt, 0.0)
        sums[f"{name}_area_doubt"] = covered.reduce(own)
        sums[f"{name}_volume_doubt"] = covered.reduce(own * size**2)
    return sums


def _doubt(above: _Floats, sigma: _Floats) -> _Floats:
    """Return the variance of whether a repeated measurement lies above a limit."""
    chance = ndtr(above / np.maximum(sigma, 1e-9))
    doubt: _Floats = chance * (1 - chance)
    return doubt


def _finish(
    parts: Sequence[Mapping[str, Any]],
    errors: ErrorModel | None,
    *,
    order: npt.NDArray[np.int64],
    polygons: npt.NDArray[np.int64],
    sizes: _Floats,
    rules: Rules,
    shape: tuple[int, int, int],
    cell: tuple[float, float],
) -> _Floats:
    """Task: join the pieces of each polygon, and turn sums into statistics (names, D, N)."""
    from xchmv2.zonal.coverage import join_weights

    found = np.full(shape, np.nan)
    if not parts:
        return found
    inside, starts = np.unique(polygons, return_index=True)  # pieces are in order of polygons
    pieces = {
        name: np.concatenate([part[name] for part in parts])[order]
        for name in parts[0]
        if name not in _KEPT
    }
    sums = _join(pieces, starts)
    sums["valid_fraction"] = sums["count"] / sizes[inside, None]
    kept = {name: [piece for part in parts for piece in part.get(name, ())] for name in _KEPT}
    own_pieces = np.split(order, starts[1:])
    if errors is not None:
        joined = [
            join_weights([kept["shapes"][k][date] for k in own])
            for own in own_pieces
            for date in range(shape[1])
        ]
        sums["correlated"] = _correlated(joined, errors, cell).reshape(-1, shape[1])
    for row, name in zip(found, rules.names, strict=True):
        share = _percentile_of(name)
        if share is None:
            statistic = _statistic(sums, name)
        else:
            values = kept["values"]
            statistic = np.array(
                [_quantiles([values[k] for k in own], share) for own in own_pieces]
            )
        # Without valid pixels in a polygon, the area with data is 0 and other statistics are NaN.
        known = (sums["area"] > 0) | (name in ("count", "area", "valid_fraction"))
        row[:, inside] = np.where(known, statistic, np.nan).T
    return found


def _join(pieces: Mapping[str, _Floats], starts: npt.NDArray[np.int_]) -> dict[str, _Floats]:
    """Join the sums of pieces to those of polygons, (N, D)."""
    how = {"min": np.minimum, "max": np.maximum}
    sums = {name: how.get(name, np.add).reduceat(one, starts) for name, one in pieces.items()}
    area, mean = pieces["area"], pieces["mean"]
    total = np.add.reduceat(area * mean, starts)
    sums["mean"] = np.divide(total, sums["area"], out=np.zeros_like(total), where=sums["area"] > 0)
    if "scatter" in sums:
        apart = mean - np.repeat(sums["mean"], np.diff([*starts, len(mean)]), axis=0)
        sums["scatter"] += np.add.reduceat(area * apart**2, starts)
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


def _correlated(
    shapes: Sequence[Weights], errors: ErrorModel, cell: tuple[float, float]
) -> _Floats:
    """Return the variance of the mean error of each shape over that of a pixel.

    Shapes of about one size, in blocks, are done together.
    """
    kinds: dict[tuple[int, int, int], list[int]] = {}
    for k, shape in enumerate(shapes):
        height, width = (-8 * (-size // 8) for size in shape.grid.shape)
        kinds.setdefault((shape.step, height, width), []).append(k)
    found = np.full(len(shapes), np.nan)
    for (step, height, width), members in kinds.items():
        for some in np.array_split(members, -(-len(members) * height * width // _BATCH)):
            grids = np.zeros((len(some), height, width))
            for grid, k in zip(grids, some, strict=True):
                own = shapes[k].grid
                grid[: own.shape[0], : own.shape[1]] = own
            shares = errors.mean_correlations(grids, cell, step.bit_length() - 1)
            found[some] = errors.mean_variance(shares)
    return found


def _statistic(sums: Mapping[str, _Floats], name: str) -> _Floats:
    """Turn the sums of polygons into one statistic."""
    if name.endswith("_se"):
        return _standard_error(sums, name.removesuffix("_se"))
    if name == "cover":
        return sums["cover"] / np.where(sums["area"] > 0, sums["area"], np.nan)
    if name == "net_area":
        return (sums["gain_area"] - sums["loss_area"]) / _HECTARE
    if name == "net_volume":
        return sums["mean"] * sums["area"]
    if name == "std":
        return np.sqrt(sums["scatter"] / np.where(sums["area"] > 0, sums["area"], np.nan))
    return sums[name] / _HECTARE if name.endswith("_area") else sums[name]


def _standard_error(sums: Mapping[str, _Floats], name: str) -> _Floats:
    """Return a standard error, by the correlation of errors over the polygon."""
    count, area = sums["count"], np.where(sums["area"] > 0, sums["area"], np.nan)
    if name in ("mean", "net_volume"):
        error = sums["spread"] * np.sqrt(sums["correlated"])
        return error / area if name == "mean" else error
    # The errors of neighbours are correlated: this many pixels count as one measurement.
    together = count * sums["correlated"]
    if name == "cover":
        return np.sqrt(sums["cover_doubt"] * together) / area
    sides = ("loss", "gain") if name.startswith("net") else (name.partition("_")[0],)
    doubt = sum(sums[f"{side}_{name.partition('_')[2]}_doubt"] for side in sides) * together
    return np.sqrt(doubt) / (_HECTARE if name.endswith("area") else 1)


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
