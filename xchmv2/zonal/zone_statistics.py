"""Sums under polygons, piece by piece, and the statistics and standard errors they give."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from scipy.special import ndtr

from xchmv2.change.correlation import MOST_WINDOWS, WINDOW, correlated_pixels
from xchmv2.change.registration import Windows
from xchmv2.errors import CHMv2Error
from xchmv2.zonal.polygons import Geometries

Floats = npt.NDArray[np.float64]

#: What is summed up by default.
HEIGHT_STATS = ("mean", "std", "min", "max", "count", "area", "valid_fraction")
#: Areas and volumes of change.
CHANGE_STATS = (
    "loss_area",
    "gain_area",
    "net_area",
    "loss_volume",
    "gain_volume",
    "net_volume",
)
#: Statistics that come with a standard error where the error of a pixel is known.
WITH_ERROR = ("mean", *CHANGE_STATS)

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


def percentile_of(stat: str) -> float | None:
    """Return the share that a percentile's name stands for, such as 0.95 for p95; else None."""
    if stat == "median":
        return 0.5
    found = _PERCENTILE.fullmatch(stat)
    return float(found[1]) / 100 if found else None


def resolve_stats(stats: str | Sequence[str] | None, *, change: bool) -> tuple[str, ...]:
    """Return the statistics wanted.

    Parameters
    ----------
    stats : str, sequence of str or None
        Names; None takes all but percentiles.
    change : bool
        Whether the values are changes.

    Returns
    -------
    tuple of str
        Without repetition.

    Raises
    ------
    CHMv2Error
        If one is not known, or is one of change and the values are none.
    """
    every = HEIGHT_STATS + (CHANGE_STATS if change else ())
    wanted = (
        every
        if stats is None
        else tuple(dict.fromkeys([stats] if isinstance(stats, str) else stats))
    )
    wrong = [stat for stat in wanted if stat not in every and percentile_of(stat) is None]
    if wrong and set(wrong) <= set(CHANGE_STATS):
        raise CHMv2Error(
            f"a change, to sum up {', '.join(wrong)}",
            "heights",
            "give zonal the result of difference(before, after), or a DataArray named "
            "'height_change'",
        )
    if wrong or not wanted:
        raise CHMv2Error(
            f"statistics among {', '.join(every)}, median and percentiles such as p95",
            f"{list(wrong)}",
            "correct them: stats=('mean', 'p95')",
        )
    return wanted


def label(stat: str, of: str, units: str, square: str | None) -> dict[str, str]:
    """Return the attributes of a statistic.

    Parameters
    ----------
    stat : str
        Its name, with ``_se`` for its standard error.
    of : str
        What it is a statistic of.
    units : str
        Of the values.
    square : str or None
        Unit of areas, ``"m2"``; None where it is not known.

    Returns
    -------
    dict
        ``long_name`` and, where known, ``units``.
    """
    name = stat.removesuffix("_se")
    share = percentile_of(name)
    if share is not None and name != "median":
        long_name = f"{100 * share:g}th percentile of {of}"
    else:
        long_name = _LONG_NAMES[name].format(of=of)
    if stat != name:
        long_name = f"standard error of {long_name}"
    unit: str | None = units
    if name == "count" or name == "valid_fraction":
        unit = "1"
    elif name == "area":
        unit = square
    elif name.endswith("_area"):
        unit = "ha" if square else None
    elif name.endswith("_volume"):
        unit = "m3" if square else None
    return {"long_name": long_name, **({"units": unit} if unit else {})}


def finish(
    parts: Sequence[Sequence[tuple[int, Part]]],
    length: float | None = None,
    *,
    names: Sequence[str],
    sizes: Floats,
    dates: int,
) -> Floats:
    """Task: turn sums into statistics.

    Parameters
    ----------
    parts : sequence of sequence of (int, Part)
        Polygon and sums, in order of pieces.
    length : float or None
        Correlation length of errors [m], for standard errors.
    names : sequence of str
        Statistics, with ``_se`` for standard errors.
    sizes : ndarray of float64, shape (N,)
        Size of each polygon [px].
    dates : int
        Number of dates, D.

    Returns
    -------
    ndarray of float64, shape (names, D, N)
        NaN where there is no data.
    """
    whole: dict[int, Part] = {}
    for polygon, part in (pair for group in parts for pair in group):
        whole[polygon] = whole[polygon] + part if polygon in whole else part
    found = np.full((len(names), dates, len(sizes)), np.nan)
    for polygon, part in whole.items():
        for row, name in enumerate(names):
            known = part.sums["area"] > 0
            if name == "valid_fraction":
                values = part.sums["count"] / sizes[polygon]
            else:
                values = _statistic(part, name, length)
            # A polygon on the raster without data has an area of data, and it is 0.
            kept = known | (name in ("count", "area", "valid_fraction"))
            found[row, :, polygon] = np.where(kept, values, np.nan)
    return found


def _statistic(part: Part, name: str, length: float | None) -> Any:
    share = percentile_of(name)
    if share is not None:
        return quantile(part.values, part.weights, share)
    if name.endswith("_se"):
        return _standard_error(part, name.removesuffix("_se"), float(length or 0.0))
    area = np.where(part.sums["area"] > 0, part.sums["area"], np.nan)
    if name == "net_area":
        return (part.sums["gain_area"] - part.sums["loss_area"]) / _HECTARE
    if name == "net_volume":
        return part.mean * area
    if name.endswith("_area"):
        return part.sums[name] / _HECTARE
    if name == "std":
        return np.sqrt(part.scatter / area)
    plain = {"mean": part.mean, "min": part.low, "max": part.high, **part.sums}
    return plain[name]


def _standard_error(part: Part, name: str, length: float) -> Any:
    """Return a standard error, by the effective number of independent pixels."""
    sums = part.sums
    count, area = sums["count"], np.where(sums["area"] > 0, sums["area"], np.nan)
    independent = effective_samples(area, length, count)
    if name in ("mean", "net_volume"):
        error = np.sqrt(sums["variance"] / area / independent)
        return error if name == "mean" else error * area
    sides = ("loss", "gain") if name.startswith("net") else (name.partition("_")[0],)
    # Neighbours are in doubt together: as many pixels go together as make one measurement.
    together = count / independent
    doubt = sum(sums[f"{side}_{name.partition('_')[2]}_doubt"] for side in sides) * together
    if name.endswith("area"):
        return np.sqrt(doubt) / _HECTARE
    return np.sqrt(
        doubt + sum(_height_variance(sums, side, area / count, length) for side in sides)
    )


def _height_variance(sums: dict[str, Floats], side: str, pixel: Floats, length: float) -> Floats:
    """Variance of the volume over the area called loss or gain, by the error of its heights."""
    area = sums[f"{side}_area"]
    independent = effective_samples(area, length, area / pixel)
    mean = np.divide(sums[f"{side}_variance"], area, out=np.zeros_like(area), where=area > 0)
    found: Floats = np.where(area > 0, mean * area**2 / np.nan_to_num(independent, nan=1.0), 0.0)
    return found


def effective_samples(
    area: npt.ArrayLike, correlation_length: npt.ArrayLike, count: npt.ArrayLike
) -> Floats:
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
    bounded: Floats = np.maximum(1.0, np.minimum(samples, count))
    return np.where(count > 0, bounded, np.nan)


def spread_windows(shape: tuple[int, ...]) -> list[Window]:
    """Spread windows over an array, where :func:`xchmv2.change.correlation_length` looks too.

    Parameters
    ----------
    shape : (height, width)
        Of the array [px].

    Returns
    -------
    list of (first row, end row, first column, end column)
        At most about 16.
    """
    found = Windows.spread_over((shape[0], shape[1]), WINDOW, MOST_WINDOWS, 0)
    return [(row, row + found.side, col, col + found.side) for row, col in found.corners]


def estimate_length(windows: list[npt.NDArray[Any]], *, cell: float) -> float:
    """Task: estimate the correlation length of a change from windows of it.

    Parameters
    ----------
    windows : list of ndarray, shape (D, H, W)
        Changes [m]; dates are pooled.
    cell : float
        Area of a pixel [m2].

    Returns
    -------
    float
        [m]; NaN if no window has enough pixels that did not change.

    References
    ----------
    As :func:`xchmv2.change.correlation_length`.
    """
    planes = [plane.astype(np.float64) for window in windows for plane in window]
    return math.sqrt(correlated_pixels(planes) * cell / math.pi)


@dataclass(frozen=True)
class Rules:
    """What is summed up.

    Parameters
    ----------
    percentiles : bool
        Whether values are kept for percentiles.
    change : bool
        Whether values are changes, with loss and gain.
    threshold : float or None
        Change [m] from which on a pixel is lost or gained; None: a mask tells.
    """

    percentiles: bool = False
    change: bool = False
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Sums over what a polygon covers, one number for each date (D,).

    Parameters
    ----------
    sums : dict of str to ndarray
        Sums of weights: they add up.
    mean, scatter : ndarray
        Mean, and sum of squares about it, weighted by area.
    low, high : ndarray
        Extremes; infinite where there is no data.
    values, weights : list of ndarray
        Values and their areas, for percentiles: one array (D, n) and (n,) for each piece.
    """

    sums: dict[str, Floats]
    mean: Floats
    scatter: Floats
    low: Floats
    high: Floats
    values: list[npt.NDArray[Any]]
    weights: list[Floats]

    def __add__(self, other: Part) -> Part:
        """Join what two pieces cover."""
        area, more = self.sums["area"], other.sums["area"]
        total = area + more
        share = np.divide(more, total, out=np.zeros_like(total), where=total > 0)
        step = other.mean - self.mean
        return Part(
            {name: self.sums[name] + other.sums[name] for name in self.sums},
            self.mean + step * share,
            self.scatter + other.scatter + step**2 * area * share,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.values + other.values,
            self.weights + other.weights,
        )


def sum_group(
    group: Group, rules: Rules, values: npt.NDArray[Any], layers: Mapping[str, npt.NDArray[Any]]
) -> list[tuple[int, Part]]:
    """Task: sum up the pieces of one group.

    Parameters
    ----------
    group : Group
        Pieces and the window they lie in.
    rules : Rules
        What to sum up.
    values : ndarray, shape (D, H, W)
        Heights or changes in the window.
    layers : mapping of str to ndarray
        ``area`` (H, W) of each pixel; where there are any, ``sigma`` of each value and ``changed``,
        the pixels that have changed, of any shape that broadcasts against the values.

    Returns
    -------
    list of (int, Part)
        Polygon and its sums.
    """
    return [
        (piece.polygon, _sum_piece(group, piece, rules, values, layers)) for piece in group.pieces
    ]


def _sum_piece(
    group: Group,
    piece: Piece,
    rules: Rules,
    values: npt.NDArray[Any],
    layers: Mapping[str, npt.NDArray[Any]],
) -> Part:
    top, bottom, left, right = piece.window
    rows = slice(top - group.window[0], bottom - group.window[0])
    cols = slice(left - group.window[2], right - group.window[2])
    share = cover(piece.wkb, piece.window)
    under = share > 0
    full = {name: np.broadcast_to(layer, values.shape) for name, layer in layers.items()}
    dates = []
    for date, plane in enumerate(values):  # one by one, to need memory for one
        # Only pixels under the polygon are kept: (1, n).
        chosen = plane[rows, cols][under].astype(np.float64)[None]
        flat = {name: layer[date, rows, cols][under][None] for name, layer in full.items()}
        dates.append(sum_pixels(chosen, share[under], flat, rules))
    return _stack_dates(dates)


def _stack_dates(dates: Sequence[Part]) -> Part:
    """Put the sums of single dates together."""
    first = dates[0]
    joined = {
        name: np.concatenate([getattr(part, name) for part in dates])
        for name in ("mean", "scatter", "low", "high")
    }
    return Part(
        {name: np.concatenate([part.sums[name] for part in dates]) for name in first.sums},
        **joined,
        values=[np.concatenate([part.values[0] for part in dates])] if first.values else [],
        weights=[np.concatenate([part.weights[0] for part in dates])] if first.weights else [],
    )


def sum_pixels(
    values: Floats, share: Floats, layers: Mapping[str, npt.NDArray[Any]], rules: Rules
) -> Part:
    """Sum up pixels.

    Parameters
    ----------
    values : ndarray, shape (D, n)
        Heights or changes.
    share : ndarray, shape (n,)
        How much of each pixel counts.
    layers : mapping of str to ndarray, shape (D, n)
        As in :func:`sum_group`.
    rules : Rules
        What to sum up.

    Returns
    -------
    Part
        The sums.
    """
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    weight = np.where(known, share * layers["area"], 0.0)
    area = weight.sum(axis=1)
    total = (weight * filled).sum(axis=1)
    mean = np.divide(total, area, out=np.zeros_like(area), where=area > 0)
    sums = {"count": (share * known).sum(axis=1), "area": area}
    if "sigma" in layers:
        sums["variance"] = (weight * np.where(known, layers["sigma"], 0.0) ** 2).sum(axis=1)
    if rules.change:
        sums |= _sum_change(filled, weight, layers, rules)
    return Part(
        sums,
        mean,
        (weight * (filled - mean[:, None]) ** 2).sum(axis=1),
        np.where(known, values, np.inf).min(axis=1, initial=np.inf),
        np.where(known, values, -np.inf).max(axis=1, initial=-np.inf),
        [values.astype(np.float32)] if rules.percentiles else [],
        [weight] if rules.percentiles else [],
    )


def _sum_change(
    change: Floats, weight: Floats, layers: Mapping[str, npt.NDArray[Any]], rules: Rules
) -> dict[str, Floats]:
    """Sum up area and volume of loss and gain, and how uncertain each pixel's part in them is."""
    size = np.abs(change)
    least = layers["least"] if rules.threshold is None else rules.threshold
    changed = layers["changed"] if rules.threshold is None else size > least
    changed = changed.astype(bool) & (weight > 0)
    sums = {}
    for name, side in (("loss", change < 0), ("gain", change > 0)):
        lost = np.where(changed & side, weight, 0.0)
        sums[f"{name}_area"] = lost.sum(axis=1)
        sums[f"{name}_volume"] = (lost * size).sum(axis=1)
        if "sigma" not in layers:
            continue
        sigma = np.where(weight > 0, layers["sigma"], 0.0)
        sums[f"{name}_variance"] = (lost * sigma**2).sum(axis=1)
        # How likely a repeated measurement would call the pixel changed.
        chance = ndtr((size - least) / np.maximum(sigma, 1e-9))
        doubt = np.where(side, weight**2 * chance * (1 - chance), 0.0)
        sums[f"{name}_area_doubt"] = doubt.sum(axis=1)
        sums[f"{name}_volume_doubt"] = (doubt * size**2).sum(axis=1)
    return sums


def quantile(values: Sequence[npt.NDArray[Any]], weights: Sequence[Floats], q: float) -> Floats:
    """Weighted quantile of each date: the least value that so much of the area does not exceed.

    Parameters
    ----------
    values : sequence of ndarray, shape (D, n)
        Values.
    weights : sequence of ndarray, shape (D, n)
        Areas; 0 where there is no value.
    q : float
        Between 0 and 1.

    Returns
    -------
    ndarray of float64, shape (D,)
        NaN where there is no value. numpy's ``method="inverted_cdf"``.
    """
    found = []
    for value, weight in zip(np.concatenate(values, 1), np.concatenate(weights, 1), strict=True):
        value, weight = value[weight > 0], weight[weight > 0]
        if not value.size:
            found.append(np.nan)
            continue
        order = np.argsort(value, kind="stable")
        rising = np.cumsum(weight[order])
        place = np.searchsorted(rising, q * rising[-1] * (1 - 1e-12))
        found.append(float(value[order][min(place, value.size - 1)]))
    return np.array(found)


#: One array's chunks over a window: [chunk of the leading dim][row][column].
Chunks = Sequence[Sequence[Sequence[npt.NDArray[Any]]]]


@dataclass(frozen=True, eq=False)
class Source:
    """A dask array that windows are read from, chunk by chunk.

    Parameters
    ----------
    array : dask.array.Array
        (D, H, W) or (H, W).

    Notes
    -----
    A task names the chunks it reads. A slice of the array for each window would be fused with the
    chunk it cuts, and each window would then make that chunk anew.
    """

    array: da.Array

    def over(self, window: Window) -> tuple[list[Any], tuple[int, int]]:
        """Return the keys of the chunks over a window, and where the first of them begins."""
        top, bottom, left, right = window
        rows, first_row = _covering(self.array.chunks[-2], top, bottom)
        cols, first_col = _covering(self.array.chunks[-1], left, right)
        name = self.array.name
        heads = [(k,) for k in range(self.array.numblocks[0])] if self.array.ndim == 3 else [()]
        keys = [[[(name, *head, row, col) for col in cols] for row in rows] for head in heads]
        return keys, (first_row, first_col)


def _covering(sizes: Sequence[int], start: int, stop: int) -> tuple[range, int]:
    """Return the chunks over a span, and where the first begins."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    first = int(np.searchsorted(bounds, start, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))
    return range(first, last), int(bounds[first])


def read_window(chunks: Chunks, begin: tuple[int, int], window: Window) -> npt.NDArray[Any]:
    """Put a window together from the chunks over it.

    Parameters
    ----------
    chunks : nested sequence of ndarray
        The chunks.
    begin : (row, column)
        Where the first of them begins.
    window : tuple of int
        Pixels wanted.

    Returns
    -------
    ndarray, shape (D, h, w) or (h, w)
        The pixels.
    """
    top, bottom, left, right = window
    dates = []
    for rows in chunks:
        bands, y = [], begin[0]
        for row in rows:
            parts, x = [], begin[1]
            for chunk in row:
                ys, xs = slice(max(0, top - y), bottom - y), slice(max(0, left - x), right - x)
                parts.append(chunk[..., ys, xs])
                x += chunk.shape[-1]
            bands.append(np.concatenate(parts, axis=-1))
            y += row[0].shape[-2]
        dates.append(np.concatenate(bands, axis=-2))
    return np.concatenate(dates, axis=0) if len(dates) > 1 else dates[0]


@dataclass(frozen=True, eq=False)
class SumWindow:
    """Task: read the window of a group and sum up its pieces.

    Parameters
    ----------
    group : Group
        What to sum up.
    rules : Rules
        How.
    names : tuple of str
        Of the lazy layers.
    begins : tuple of (int, int)
        Where the first chunk of the values and of each lazy layer begins.
    known : dict of str to ndarray
        Layers in memory: numbers, or arrays cut to the window.
    """

    group: Group
    rules: Rules
    names: tuple[str, ...]
    begins: tuple[tuple[int, int], ...]
    known: Mapping[str, npt.NDArray[Any]]

    def __call__(self, chunks: Sequence[Chunks]) -> list[tuple[int, Part]]:
        """Return polygons and their sums."""
        values, *layers = (
            read_window(each, begin, self.group.window)
            for each, begin in zip(chunks, self.begins, strict=True)
        )
        named = dict(zip(self.names, layers, strict=True))
        return sum_group(self.group, self.rules, values, {**self.known, **named})


def cut_layer(layer: npt.NDArray[Any], window: Window) -> npt.NDArray[Any]:
    """Cut a window out of a layer; a number stays what it is."""
    top, bottom, left, right = window
    return layer[..., top:bottom, left:right] if layer.ndim else layer


def lazy_sums(
    values: da.Array,
    layers: Mapping[str, Any],
    groups: Sequence[Group],
    rules: Rules,
    join: Callable[..., npt.NDArray[np.float64]],
    shape: tuple[int, int, int],
    estimate: tuple[Callable[..., float], Sequence[Window]] | None,
) -> tuple[da.Array, da.Array | None]:
    """Build the graph; nothing is computed.

    Parameters
    ----------
    values : dask.array.Array, shape (D, H, W)
        Heights or changes.
    layers : mapping of str to array
        As in :func:`~xchmv2.zonal.zone_statistics.sum_group`, lazy or not.
    groups : sequence of Group
        What to read.
    rules : Rules
        What to sum up.
    join : callable
        Turns all sums into statistics of the given shape; takes the correlation length where there
        is an estimate of it.
    shape : (names, D, polygons)
        Of the result.
    estimate : (callable, windows) or None
        Turns windows of the values into a correlation length.

    Returns
    -------
    statistics : dask.array.Array
        In one chunk.
    length : dask.array.Array or None
        The estimate, without dims.
    """
    lazy = {name: layer for name, layer in layers.items() if isinstance(layer, da.Array)}
    sources = [Source(array) for array in (values, *lazy.values())]
    known = {name: layer for name, layer in layers.items() if name not in lazy}
    token = tokenize(values, layers, groups, rules, join, estimate)
    sums, joined, lengths = (f"chmv2-{word}-{token}" for word in ("sums", "zones", "length"))
    tasks: dict[Any, Any] = {}
    for index, group in enumerate(groups):
        over = [source.over(group.window) for source in sources]
        cut = {name: cut_layer(layer, group.window) for name, layer in known.items()}
        task = SumWindow(group, rules, tuple(lazy), tuple(begin for _, begin in over), cut)
        tasks[(sums, index)] = (task, [keys for keys, _ in over])
    if estimate is not None:
        tasks[(lengths,)] = _estimate(sources[0], *estimate)
    found = [(sums, index) for index in range(len(groups))]
    tasks[(joined, 0, 0, 0)] = (join, found, *([(lengths,)] if estimate else []))
    arrays = [source.array for source in sources]
    graph = HighLevelGraph.from_collections(joined, MaterializedLayer(tasks), arrays)
    chunks = tuple((size,) for size in shape)
    statistics = da.Array(graph, joined, chunks, meta=np.empty((0, 0, 0)))
    return statistics, _alias(graph, lengths, joined) if estimate else None


def _estimate(
    source: Source, estimate: Callable[..., float], windows: Sequence[Window]
) -> tuple[Any, ...]:
    over = [source.over(window) for window in windows]
    task = partial(_read_and_estimate, estimate, tuple(windows), tuple(b for _, b in over))
    return (task, [keys for keys, _ in over])


def _read_and_estimate(
    estimate: Callable[..., float],
    windows: Sequence[Window],
    begins: Sequence[tuple[int, int]],
    chunks: Sequence[Chunks],
) -> npt.NDArray[np.float64]:
    """Task: estimate the correlation length."""
    read = [
        read_window(each, begin, window)
        for each, begin, window in zip(chunks, begins, windows, strict=True)
    ]
    return np.asarray(estimate(read), np.float64)


def _alias(graph: HighLevelGraph, name: str, layer: str) -> da.Array:
    """Return the correlation length, a task among those of a layer, as an array of its own."""
    own = f"{name}-array"
    tasks = {(own,): (np.asarray, (name,))}
    layers = {**graph.layers, own: MaterializedLayer(tasks)}
    full = HighLevelGraph(layers, {**graph.dependencies, own: {layer}})
    return da.Array(full, own, (), meta=np.empty(()))


#: Side of the squares, counted from the raster's first pixel, that polygons are cut into [px].
TILE = 1024

#: First row, end row, first column, end column.
Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class Piece:
    """What one polygon covers of one square of the raster.

    Parameters
    ----------
    polygon : int
        Index of the polygon.
    window : tuple of int
        Pixels it reaches into.
    wkb : bytes or None
        That part of the polygon, in pixels; None if it covers the window wholly.
    """

    polygon: int
    window: Window
    wkb: bytes | None


@dataclass(frozen=True)
class Group:
    """Pieces that are read together.

    Parameters
    ----------
    window : tuple of int
        Pixels to read.
    pieces : tuple of Piece
        With windows inside it.
    """

    window: Window
    pieces: tuple[Piece, ...]


def cut_pieces(geometries: Geometries, shape: tuple[int, int]) -> list[Group]:
    """Cut polygons at fixed squares of the raster, and tell which windows to read.

    Parameters
    ----------
    geometries : ndarray of object, shape (N,)
        Polygons in pixels, as in :class:`~xchmv2.zonal.polygons.Polygons`.
    shape : (height, width)
        Of the raster [px].

    Returns
    -------
    list of Group
        In order of squares. Neighbouring polygons that overlap much are read once; the squares
        do not depend on chunks, so neither do the sums.
    """
    squares: dict[tuple[int, int], list[Piece]] = {}
    for index, geometry in enumerate(geometries):
        for square, piece in _cut(index, geometry, shape):
            squares.setdefault(square, []).append(piece)
    return [group for square in sorted(squares) for group in _grouped(squares[square])]


def _cut(
    index: int, geometry: Any, shape: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], Piece]]:
    import shapely

    window = _window(geometry, (0, shape[0], 0, shape[1]))
    if window is None:
        return
    top, bottom, left, right = window
    shapely.prepare(geometry)
    rows = range(top // TILE, -(-bottom // TILE))
    cols = range(left // TILE, -(-right // TILE))
    for row, col in product(rows, cols):
        square = (
            max(top, row * TILE),
            min(bottom, (row + 1) * TILE),
            max(left, col * TILE),
            min(right, (col + 1) * TILE),
        )
        if (piece := _piece(index, geometry, square)) is not None:
            yield (row, col), piece


def _piece(index: int, geometry: Any, square: Window) -> Piece | None:
    """Cut one square out of a polygon; None if the two share no area."""
    import shapely

    box = shapely.box(square[2], -square[1], square[3], -square[0])
    if shapely.covers(geometry, box):
        return Piece(index, square, None)
    if not shapely.intersects(geometry, box):
        return None
    inside = shapely.covered_by(geometry, box)
    part = geometry if inside else shapely.intersection(geometry, box)
    # Cutting leaves lines and points where the two only touch.
    areas = [p for p in shapely.get_parts(part) if shapely.get_dimensions(p) == 2 and p.area > 0]
    part = shapely.MultiPolygon(_polygons(areas))
    window = _window(part, square)
    return None if window is None else Piece(index, window, shapely.to_wkb(part))


def _polygons(parts: list[Any]) -> list[Any]:
    """Flatten collections of areas to polygons."""
    import shapely

    return [polygon for part in parts for polygon in shapely.get_parts(part)]


def _window(geometry: Any, within: Window) -> Window | None:
    """Return the pixels a polygon reaches into; None if there are none."""
    if geometry.is_empty:
        return None
    low_x, low_y, high_x, high_y = geometry.bounds
    top, bottom = max(within[0], math.floor(-high_y)), min(within[1], math.ceil(-low_y))
    left, right = max(within[2], math.floor(low_x)), min(within[3], math.ceil(high_x))
    return (top, bottom, left, right) if top < bottom and left < right else None


def _grouped(pieces: list[Piece]) -> list[Group]:
    """Read pieces one by one, or all at once where that is no more to read."""
    windows = np.array([piece.window for piece in pieces])
    union = (
        int(windows[:, 0].min()),
        int(windows[:, 1].max()),
        int(windows[:, 2].min()),
        int(windows[:, 3].max()),
    )
    if _size(union) <= sum(_size(piece.window) for piece in pieces):
        return [Group(union, tuple(pieces))]
    return [Group(piece.window, (piece,)) for piece in pieces]


def _size(window: Window) -> int:
    top, bottom, left, right = window
    return (bottom - top) * (right - left)


#: Shares of a pixel below this are rounding of coordinates, not land.
_NOTHING = 1e-9


def cover(wkb: bytes | None, window: tuple[int, int, int, int]) -> npt.NDArray[np.float64]:
    """Return the share of each pixel of a window that a polygon covers.

    Parameters
    ----------
    wkb : bytes or None
        Polygon in pixels, as in :class:`~xchmv2.zonal.polygons.Polygons`; None covers everything.
    window : (first row, end row, first column, end column)
        Pixels wanted.

    Returns
    -------
    ndarray of float64, shape (rows, columns)
        Between 0 and 1, exact to rounding.

    References
    ----------
    exactextract, https://github.com/isciences/exactextract.
    """
    top, bottom, left, right = window
    shape = (bottom - top, right - left)
    if wkb is None:
        return np.ones(shape)
    import shapely
    from exactextract import exact_extract

    feature = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shapely.from_wkb(wkb)),
        "properties": {},
    }
    found = exact_extract(
        _blank(window),
        [feature],
        ["cell_id", "coverage"],
        max_cells_in_memory=4 * shape[0] * shape[1],
    )[0]["properties"]
    share = np.zeros(shape)
    share.flat[found["cell_id"]] = found["coverage"]
    share[share < _NOTHING] = 0.0
    return share


def _blank(window: tuple[int, int, int, int]) -> Any:
    """Return a raster of no values: exactextract asks for one to lay its pixels over."""
    from exactextract.raster import RasterSource

    class Blank(RasterSource):  # type: ignore[misc]
        def res(self) -> tuple[float, float]:
            return 1.0, 1.0

        def extent(self) -> tuple[float, float, float, float]:
            top, bottom, left, right = window
            return float(left), float(-bottom), float(right), float(-top)

        def nodata_value(self) -> None:
            return None

        def read_window(self, x0: int, y0: int, nx: int, ny: int) -> npt.NDArray[np.uint8]:
            return np.zeros((ny, nx), np.uint8)

        def srs_wkt(self) -> None:
            return None

    return Blank()
