"""The error of a difference of heights: :class:`ErrorModel`, which all intervals read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask._task_spec import Alias, Task, convert_legacy_graph
from dask.base import clone_key, tokenize
from dask.highlevelgraph import HighLevelGraph
from scipy.special import ndtri
from scipy.stats import t as student

from xchmv2.change.correlation import (
    Blocks,
    Semivariance,
    coarsen,
    fit_sills,
    independent_errors,
    integral,
    join_blocks,
    ladder,
    mean_correlations,
    semivariances,
    spherical,
    sum_blocks,
)
from xchmv2.change.dates import find_dates
from xchmv2.change.registration import Windows
from xchmv2.change.stable_spread import (
    COUNTS,
    NODES,
    PROBABILITIES,
    count_differences,
    measure_spread,
    rough_offset,
)
from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    Raster,
    on_same_grid,
    pixel_size,
    read_change,
    read_heights,
    require_heights,
    spatial_dims,
    validate_number,
)

_Floats = npt.NDArray[np.float64]

_NORMAL = ndtri(0.5 + PROBABILITIES / 2)


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Errors of the difference of two dates: offset, spread by height, tails and correlation.

    Parameters
    ----------
    offset : float
        Median difference on stable ground [m]; NaN for a series, whose dates each have their own.
    offset_doubt : float
        How far the offset may be wrong [m]: the larger of 1.96 standard errors, by the
        correlation, and of its dependence on what is taken for a change.
    pixels : float
        Pixels that did not change.
    nmad : float
        Standard deviation of the errors that are no outliers [m], of all heights together.
    heights, spread : ndarray, shape (n,)
        Standard deviation of the error of a pixel [m] at mean heights of both dates [m].
    quantiles : ndarray, shape (15,)
        Quantiles of the absolute error over its spread, at ``ErrorModel.probabilities``.
    ranges : ndarray, shape (k,)
        Ranges of the spherical correlation functions [m]; 0 for errors of single pixels.
    sills : ndarray, shape (k,)
        Share of each in the variance; their sum is 1.
    area : float
        Area on which the errors were seen [m2]; infinite where the correlation is given.
    seen_to : float
        Half the extent of the scene [m]: correlation at larger distances cannot be seen.

    Notes
    -----
    The error of a pixel of mean height h is e = spread(h) u. u has variance 1, the tabled
    quantiles, and the correlation at a distance d::

        rho(d) = sum of sills[j] (1 - 1.5 d / ranges[j] + 0.5 (d / ranges[j])^3),  d < ranges[j]

    So a change is significant beyond quantile(confidence) spread(h), and the mean over a shape of
    area A has the variance spread^2 sum(sills[j] R[j]), with R[j] the mean correlation of all pairs
    of its pixels.

    Pixels that are canopy, above 2 m, on both dates count (all pixels of a given `stable`, or where
    less than 2 % are canopy). A mixture of stable errors and of the same moved by 1.5 spreads or
    more gives the offset; the same in classes of height the spread, which does not fall with
    height (one class, if heights vary no more than errors do: the mean of both dates is then known
    by its errors). Quantiles are those of the side (rise or fall) on which fewer errors are large,
    since most changes lie on the other. The semivariances of block means, from 1 px to half the
    extent, without pixels beyond 3 spreads and blocks that stand out by 4, give the sills. Errors
    that the whole scene shares are seen in the offset alone: with R[j] over the scene, the spread
    is the scatter over sqrt(1 - sum(sills[j] R[j])), at most sqrt(2) times it.

    It cannot see: errors that both dates share; an error of whole dates, beyond the offset;
    correlation beyond ``seen_to``; and changes that look like errors, as many rises as falls,
    unless `stable` leaves them out.

    Of dask-backed heights the numbers are small dask arrays; :meth:`compute` gets them.

    References
    ----------
    Hugonnet et al. 2022, Uncertainty analysis of digital elevation models by spatial inference
    from stable terrain, IEEE JSTARS 15: 6456-6472, for the spread by class and the sum of
    correlations at several ranges. Rolstad, Haug and Denby 2009, Journal of Glaciology 55 (192):
    666-680, for the errors of means.

    Examples
    --------
    >>> errors = xchmv2.change.error_model(height.sel(time=["2019", "2024"]))
    >>> print(errors.compute())
    >>> change = height.chmv2.difference("2019", "2024")
    >>> errors = xchmv2.change.ErrorModel.read(change)
    """

    offset: Any
    offset_doubt: Any
    pixels: Any
    nmad: Any
    heights: Any
    spread: Any
    quantiles: Any
    ranges: _Floats
    sills: Any
    area: Any
    seen_to: float

    #: Probabilities of ``quantiles``.
    probabilities = PROBABILITIES

    @classmethod
    def of_one_range(cls, correlation_length: float, spread: float = math.nan) -> ErrorModel:
        """Return normal errors of one range, whose integral is the disc of a correlation length.

        Parameters
        ----------
        correlation_length : float
            Radius of the disc that counts as one independent error [m]; 0 for independent pixels.
        spread : float, optional
            Standard deviation of the error of a pixel [m], at any height.
        """
        reach = np.array([math.sqrt(5) * correlation_length])
        nodes = np.array([0.0]), np.array([spread])
        return cls(
            0.0, math.nan, math.nan, spread, *nodes, _NORMAL, reach, np.ones(1), math.inf, math.inf
        )

    @classmethod
    def read(cls, change: xr.Dataset) -> ErrorModel | None:
        """Return the model that a change carries, from ``difference`` or a store; else None.

        Parameters
        ----------
        change : Dataset
            From :func:`~xchmv2.change.difference`, or opened again.
        """
        if not set(_COORDS) <= set(change.variables):
            return None
        found = {name: change[coord].data for coord, (name, *_) in _COORDS.items()}
        numbers = {name: _alone(value) for name, value in found.items()}
        ranges = np.asarray(change["error_range"].values, np.float64)
        return cls(**numbers, ranges=ranges, seen_to=float(change["error_sill"].attrs["seen_to"]))

    def to_coords(self) -> dict[str, tuple[Any, ...]]:
        """Return the model as coordinates of a Dataset, which :meth:`read` takes."""
        coords: dict[str, tuple[Any, ...]] = {
            "error_probability": ("error_probability", PROBABILITIES, {"units": "1"}),
            "error_range": ("error_range", self.ranges, {"units": "m"}),
        }
        for coord, (name, dims, words, units) in _COORDS.items():
            attrs = {"long_name": words, "units": units}
            if name == "sills":
                attrs["seen_to"] = self.seen_to  # type: ignore[assignment]
            coords[coord] = (dims, getattr(self, name), attrs)
        return coords

    @property
    def computed(self) -> bool:
        """Whether the numbers are in memory."""
        return not any(dask.is_dask_collection(getattr(self, f.name)) for f in fields(self))

    def compute(self) -> ErrorModel:
        """Return the model with its numbers in memory."""
        names = [f.name for f in fields(self) if dask.is_dask_collection(getattr(self, f.name))]
        found = dask.compute(*(getattr(self, name) for name in names))
        return replace(self, **dict(zip(names, map(_alone, found), strict=True)))

    @property
    def numbers(self) -> list[Any]:
        """The fields that are lazy where the heights are, for :meth:`with_numbers`."""
        return [getattr(self, name) for name, *_ in _COORDS.values()]

    def with_numbers(self, *numbers: Any) -> ErrorModel:
        """Return the model with these for its :attr:`numbers`."""
        names = (name for name, *_ in _COORDS.values())
        return replace(self, **dict(zip(names, numbers, strict=True)))

    def spread_at(self, height: Any) -> Any:
        """Return the standard deviation of the error [m] at mean heights of both dates [m].

        Parameters
        ----------
        height : float, array or DataArray
            Heights [m]; beyond those that were seen the spread of the nearest.
        """
        if isinstance(height, xr.DataArray):
            return height.copy(data=self.spread_at(height.data))
        return _by_block(_interpolate, height, self.heights, self.spread)

    def quantile(self, confidence: float) -> Any:
        """Return the quantile of the absolute error over its spread at a two-sided confidence."""
        return _by_block(partial(_quantile, confidence), None, self.quantiles)

    def p_value(self, score: Any) -> Any:
        """Return the two-sided probability of an error over its spread as large as `score`."""
        if isinstance(score, xr.DataArray):
            return score.copy(data=self.p_value(score.data))
        return _by_block(_chance, score, self.quantiles)

    def correlation(self, distance: Any) -> Any:
        """Return the correlation of the errors of two pixels at distances [m]."""
        shares = spherical(np.asarray(distance, np.float64), self.ranges)
        return (shares.T @ self.sills).T

    def correlation_length(self, pixel: float = 0.0) -> Any:
        """Return the radius [m] of the disc that counts as one error of pixels of an area [m2]."""
        return np.sqrt(self.sills @ integral(self.ranges, pixel) / math.pi)

    def standard_error(
        self, weights: npt.ArrayLike, cell: tuple[float, float], spread: float | None = None
    ) -> float:
        """Return the standard error of the mean difference over a shape [m].

        Parameters
        ----------
        weights : array_like, shape (h, w)
            Covered area of each pixel of the shape, in any unit; 0 outside.
        cell : tuple of float
            Sides of a pixel along y and x [m].
        spread : float, optional
            Standard deviation of the error of a pixel there [m]; the mean spread by default.

        Returns
        -------
        float
            Widened by Student's t over the normal quantile at 0.95, so that 1.96 of it on both
            sides hold the true mean in 95 % of cases although the sills are estimates.

        Raises
        ------
        CHMv2Error
            If the model is not in memory.
        """
        if not self.computed:
            raise CHMv2Error("this model has not been computed", fix="call errors.compute() first")
        area = np.asarray(weights, np.float64)[None]
        level = max(0, math.ceil(math.log2(max(area.shape) / _MOST_CELLS)))
        shares = self.mean_correlations(coarsen(area, level), cell, level)
        told = len(np.unique(self.heights))  # the others repeat the tallest
        size = float(np.mean(self.spread[:told])) if spread is None else spread
        return size * float(np.sqrt(self.mean_variance(shares))[0])

    def mean_correlations(self, weights: _Floats, cell: tuple[float, float], level: int) -> _Floats:
        """Return the mean correlation of each range over all pairs of pixels of shapes (n, h, w).

        The weights are those of blocks of 2^`level` px.
        """
        return mean_correlations(weights, self.ranges, cell, level)

    def mean_variance(self, shares: _Floats) -> _Floats:
        """Return the variance of means over that of a pixel, widened for few degrees of freedom."""
        return _widened(self.sills * shares, self.ranges, self.area)

    def __repr__(self) -> str:
        head = "<xchmv2.change.ErrorModel>"
        if not self.computed:
            return f"{head}\nnot computed: call .compute()"
        lines = [head]
        if np.isfinite(self.offset_doubt):
            lines.append(f"offset      {self.offset:.2f} m (+- {self.offset_doubt:.2f} m)")
        if np.isfinite(self.spread).any():
            low, high = (f"{self.spread[k]:.2f} m at {self.heights[k]:.0f} m" for k in (0, -1))
            lines.append(f"spread      {low}" + (f" to {high}" if low != high else ""))
            lines.append(
                f"tails       95 % within {self.quantile(0.95):.2f} spreads (normal: 1.96)"
            )
        shares = [
            f"{100 * share:.0f} % {f'to {reach:.3g} m' if reach else 'of single pixels'}"
            for reach, share in zip(self.ranges, self.sills, strict=True)
            if share >= 0.005
        ]
        lines.append(f"correlation {', '.join(shares)}")
        if np.isfinite(self.seen_to):
            lines.append(f"seen        to {self.seen_to:.0f} m, on {self.pixels:.0f} pixels")
        return "\n".join(lines)


#: Shapes are taken together to so many blocks a side.
_MOST_CELLS = 64

#: Coordinates that carry a model: field, dims, long name, unit.
_COORDS: Mapping[str, tuple[str, Any, str, str]] = {
    "stable_offset": ("offset", (), "median change on stable ground", "m"),
    "offset_doubt": ("offset_doubt", (), "largest likely error of the offset", "m"),
    "stable_pixels": ("pixels", (), "pixels that did not change", "1"),
    "stable_nmad": ("nmad", (), "NMAD of the change on stable ground", "m"),
    "stable_area": ("area", (), "area that did not change", "m2"),
    "error_height": ("heights", "error_class", "mean height of both dates", "m"),
    "error_spread": ("spread", "error_class", "standard deviation of errors", "m"),
    "error_quantile": ("quantiles", "error_probability", "absolute error over its spread", "1"),
    "error_sill": ("sills", "error_range", "share in the variance of errors", "1"),
}


def error_model(height: Raster, stable: xr.DataArray | None = None) -> ErrorModel:
    """Estimate the errors of differences between consecutive dates.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights [m] on two dates or more, or a Dataset with ``canopy_height``.
    stable : DataArray of bool, optional
        (y, x) True on stable ground, on the same grid. By default it is found, see
        :class:`ErrorModel`.

    Returns
    -------
    ErrorModel
        For two dates of their difference; for more of the differences of consecutive dates, each
        less its own offset, pooled. The error of one date is that over sqrt(2). With dask arrays
        for numbers if the heights are dask-backed: nothing is computed.

    Raises
    ------
    CHMv2Error
        If there are fewer than two dates, `stable` is not a mask on the same grid, or heights in
        memory have no valid pixel or do not vary on stable ground.

    Notes
    -----
    Pixels are read twice, in part: 36 windows of 128 px for a first spread, then all. Of heights
    that are still to be predicted this runs the network twice, so store them first.

    Examples
    --------
    >>> errors = height.chmv2.error_model()
    >>> of_tall_trees = errors.spread_at(25.0)
    """
    array = read_heights(height)
    dim = find_dates(array, least=2, dated=False)
    require_heights(array)
    dims = spatial_dims(array)
    planes = [array.isel({dim: k}).transpose(*dims) for k in range(array.sizes[dim])]
    mask = None if stable is None else read_mask(stable, planes[0])
    found = measure_errors(list(pairwise(planes)), mask)
    if found.computed:
        require_scatter(found)
    return found


def correlation_length(change: xr.Dataset | xr.DataArray) -> float:
    """Estimate the correlation length of the errors of a change on its unchanged pixels.

    Parameters
    ----------
    change : Dataset or DataArray
        From :func:`~xchmv2.change.difference`, or its ``height_change`` (y, x) [m].

    Returns
    -------
    float
        Radius [m] of the disc that counts as one independent error: its area is the integral of
        the correlation over all distances. At least that of one pixel. One number stands for all
        ranges: :class:`ErrorModel` tells them apart.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0)
    >>> length = change.chmv2.correlation_length()
    """
    known = ErrorModel.read(change) if isinstance(change, xr.Dataset) else None
    tall, wide = pixel_size(read_change(change))
    return float((known or _measure_change(change)).compute().correlation_length(tall * wide))


def carried_errors(change: xr.Dataset) -> ErrorModel | None:
    """Return the errors that a change carries: of one range where a correlation length is given."""
    holders = [change.get("level_of_detection"), change.get("height_change"), change]
    given = [each.attrs.get("correlation_length") for each in holders if each is not None]
    for length in given:
        if isinstance(length, int | float | np.number) and np.isfinite(length):
            validate_number("correlation_length", float(length), 20, least=0, unit="m")
            return ErrorModel.of_one_range(float(length))
    return ErrorModel.read(change)


def spread_of(change: xr.Dataset) -> xr.DataArray | None:
    """Return the standard deviation of the error of each pixel of a change [m], if it is known."""
    detection = change.get("level_of_detection")
    if detection is None:
        return None
    if "detection_quantile" in detection.coords:
        return detection / detection["detection_quantile"]
    confidence = detection.attrs.get("confidence", change.attrs.get("confidence"))
    return None if confidence is None else detection / float(ndtri(0.5 + float(confidence) / 2))


def errors_of(change: xr.Dataset | xr.DataArray) -> ErrorModel:
    """Return the errors of a change between two dates: as carried, or as its pixels show."""
    found = carried_errors(change) if isinstance(change, xr.Dataset) else None
    return found or _measure_change(change)


def _measure_change(change: xr.Dataset | xr.DataArray) -> ErrorModel:
    plane = read_change(change)
    others = [dim for dim in plane.dims if dim not in spatial_dims(plane)]
    if others:
        raise CHMv2Error(
            "the change between two dates",
            f"dims {plane.dims}",
            f"choose one: change.isel({others[0]}=0)",
        )
    return measure_errors([(plane.transpose(*spatial_dims(plane)),)], None)


def require_scatter(errors: ErrorModel) -> None:
    """Check that errors in memory could be estimated."""
    if not errors.pixels:
        raise nothing_stable()
    if not (errors.spread > 0).all():
        raise CHMv2Error(
            "the heights do not vary on stable ground, so their error cannot be estimated",
            fix="pass it in metres, such as sigma=4.0",
        )


def nothing_stable(dates: str = "both dates") -> CHMv2Error:
    """Return the error for dates without stable pixels."""
    return CHMv2Error(
        f"no pixel is valid and stable on {dates}",
        fix="pass other dates, or stable= with ground that has heights on both",
    )


def read_mask(stable: xr.DataArray, like: xr.DataArray) -> xr.DataArray:
    """Check a mask of stable ground."""
    if not isinstance(stable, xr.DataArray) or stable.dtype != bool:
        kind = stable.dtype if isinstance(stable, xr.DataArray) else type(stable).__name__
        raise CHMv2Error(
            "stable as a boolean DataArray, True on stable ground",
            f"{kind}",
            "pass such as stable=(land_cover == 3)",
        )
    if set(stable.dims) != set(like.dims):
        extra = next((dim for dim in stable.dims if dim not in like.dims), "time")
        raise CHMv2Error(
            f"a mask of dims {like.dims}",
            f"dims {stable.dims}",
            f"choose one date of it: stable.isel({extra}=0)",
        )
    return on_same_grid(stable, like).transpose(*like.dims)


#: Windows that are read first: their side [px] and number.
_WINDOW, _WINDOWS = 128, 36
#: Most blocks of pixels along an axis: their sums are held for the whole scene.
_MOST_BLOCKS = 1024
# Largest share of the variance that all pixels of a scene are taken to share.
_MOST_ALIKE = 0.5
# Semivariances tell a range better than that many independent means: by simulation, 1.2 to 3 times.
_MORE_FREE = 1.5
# Chunks of heights in memory [px], rows that are looked at, and parts that are added up at once.
_CHUNK, _BAND, _TOGETHER = 1024, 256, 4


class _Sample(NamedTuple):
    """What the windows show: offset of each pair, spread by height, and close semivariances."""

    offsets: list[float]
    heights: _Floats
    spread: _Floats
    near: list[Semivariance]


class _Part(NamedTuple):
    """Counts of differences, and block sums of standardised errors for each pair."""

    counts: npt.NDArray[np.int64]
    blocks: list[list[Blocks]]


@dataclass(frozen=True)
class _Scene:
    """What is known of a scene without reading it."""

    shape: tuple[int, int]
    #: Sides of a pixel along y and x [m].
    cell: tuple[float, float]
    #: Whether stable ground is given.
    given: bool
    #: Whether differences of several pairs of dates are pooled.
    pooled: bool

    @property
    def level(self) -> int:
        """Blocks of all pixels are of 2^level px; smaller ones are compared in windows."""
        return max(2, math.ceil(math.log2(max(self.shape) / _MOST_BLOCKS)))

    @property
    def longest(self) -> float:
        """Longest distance [px] at which blocks are compared."""
        return min(self.shape) / 2


def measure_errors(
    pairs: Sequence[tuple[xr.DataArray, ...]], stable: xr.DataArray | None
) -> ErrorModel:
    """Estimate the errors of differences: of pairs of heights (y, x), or of single changes."""
    like = pairs[0][0]
    shape = (like.shape[0], like.shape[1])
    scene = _Scene(shape, pixel_size(like), stable is not None, len(pairs) > 1)
    layers = [[plane.data for plane in pair] for pair in pairs]
    layers += [] if stable is None else [[stable.data]]
    lazy = any(isinstance(each, da.Array) for group in layers for each in group)
    numbers = _estimate(_as_chunked(layers), scene, lazy)
    found = numbers if lazy else numbers.compute(scheduler="synchronous")
    ends = np.cumsum([1, 1, 1, 1, NODES, NODES, len(PROBABILITIES)])
    offset, doubt, pixels, nmad, heights, spread, quantiles, sills = (
        found[a:b] for a, b in zip([0, *ends], [*ends, None], strict=True)
    )
    alone = [each[0] if lazy else float(each[0]) for each in (offset, doubt, pixels, nmad)]
    tall, wide = scene.cell
    seen_to = min(scene.shape[0] * tall, scene.shape[1] * wide) / 2
    ranges = ladder(scene.shape, scene.cell)
    area = alone[2] * tall * wide
    offset, doubt, pixels, nmad = alone
    return ErrorModel(
        offset, doubt, pixels, nmad, heights, spread, quantiles, ranges, sills, area, seen_to
    )


def _as_chunked(layers: list[list[Any]]) -> list[list[da.Array]]:
    """Return all layers as dask arrays of the same chunks."""
    lazy = [each for group in layers for each in group if isinstance(each, da.Array)]
    chunks = lazy[0].chunks if lazy else _CHUNK
    return [
        [
            each.rechunk(chunks) if isinstance(each, da.Array) else da.from_array(each, chunks)
            for each in group
        ]
        for group in layers
    ]


def _estimate(layers: list[list[da.Array]], scene: _Scene, lazy: bool) -> da.Array:
    """Build the graph of a model's numbers.

    Chunks are read anew for the windows and for the counts, so that neither is held for the other,
    nor for what is computed with the model.
    """
    token = tokenize([[each.name for each in group] for group in layers], scene)
    first, second = (
        [[_read_again(each, what) if lazy else each for each in group] for group in layers]
        for what in ("some", "all")
    )
    # The windows of all pairs are read together.
    pairs = len(layers) - scene.given
    cut = Windows.spread_over(scene.shape, _WINDOW, max(9, _WINDOWS // pairs), 0)
    windows = [[cut.cut(each) for each in group] for group in first]
    sample, look, name = (f"errors-{what}-{token}" for what in ("sample", "look", "model"))
    tasks: dict[Any, Any] = {
        sample: (
            partial(_sample, scene),
            [[[part.__dask_keys__() for part in each] for each in group] for group in windows],
        )
    }
    rows, cols = (np.cumsum([0, *sizes]) for sizes in second[0][0].chunks)
    keys: list[Any] = []
    for i, j in np.ndindex(len(rows) - 1, len(cols) - 1):
        blocks = [[(each.name, i, j) for each in group] for group in second]
        keys.append((look, i, j))
        tasks[keys[-1]] = (partial(_look, scene, int(rows[i]), int(cols[j])), sample, blocks)
    turn = 0
    while len(keys) > 1:
        together = [keys[k : k + _TOGETHER] for k in range(0, len(keys), _TOGETHER)]
        keys = [(f"errors-sum-{token}", turn, k) for k in range(len(together))]
        tasks.update({key: (_add, some) for key, some in zip(keys, together, strict=True)})
        turn += 1
    tasks[name, 0] = (partial(_finish, scene), sample, keys[0])
    read = [part for group in windows for each in group for part in each]
    graph = HighLevelGraph.from_collections(
        name, tasks, [*read, *(each for group in second for each in group)]
    )
    size = 4 + 2 * NODES + len(PROBABILITIES) + len(ladder(scene.shape, scene.cell))
    return da.Array(graph, name, ((size,),), np.float64)


def _read_again(array: da.Array, what: str) -> da.Array:
    """Return an array under keys of its own, so that its chunks are computed once more.

    What is in memory stays. (:func:`dask.graph_manipulation.clone` does not rename the tasks that
    dask builds now.)
    """
    seed, graph = f"errors-{what}", convert_legacy_graph(dict(array.dask))
    # An alias of a task is renamed with it; one of a future, or of data, stays.
    names = {
        key: clone_key(key, seed)
        for key, node in graph.items()
        if isinstance(node, Task)
        or (isinstance(node, Alias) and node.target in graph and node.target != key)
    }
    first = (array.name, *(0 for _ in array.chunks))
    if first not in names:
        return array
    tasks = {
        names.get(key, key): node.substitute(names, key=names.get(key, key))
        for key, node in graph.items()
    }
    name = names[first][0]
    copy = HighLevelGraph({name: tasks}, {name: set()})
    return da.Array(copy, name, array.chunks, meta=array._meta)


def _split(scene: _Scene, groups: Sequence[Sequence[Any]]) -> tuple[Sequence[Sequence[Any]], Any]:
    """Return the pairs, and the stable ground if it is given."""
    return (groups[:-1], groups[-1][0]) if scene.given else (groups, None)


def _read_pair(pair: Sequence[Any], stable: Any) -> tuple[_Floats, _Floats | None, Any]:
    """Return the difference of a pair, the lower height, and which pixels count."""
    if len(pair) == 1:
        change, lower = np.asarray(pair[0], np.float64), None
    else:
        change = pair[1].astype(np.float64) - pair[0]
        lower = np.minimum(pair[0], pair[1])
    known = np.isfinite(change)
    return change, lower, known if stable is None else known & stable


def _standardise(
    change: _Floats, lower: _Floats | None, known: Any, offset: float, sample: Any
) -> _Floats:
    """Return errors over their spread; NaN where they do not count."""
    middle = 0.0 if lower is None else lower + np.abs(change) / 2
    spread = np.interp(middle, sample.heights, sample.spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(known, (change - offset) / spread, np.nan)


def _sample(scene: _Scene, keys: Sequence[Sequence[Sequence[Any]]]) -> _Sample:
    """Task: measure what the windows show."""
    groups = [[np.stack([np.block(part) for part in each]) for each in group] for group in keys]
    pairs, stable = _split(scene, groups)
    read = [_read_pair(pair, stable) for pair in pairs]
    each = [count_differences(*some) for some in read]
    offsets = [rough_offset(counts) if scene.pooled else 0.0 for counts in each]
    if scene.pooled:
        each = [
            count_differences(change - offset, lower, known)
            for (change, lower, known), offset in zip(read, offsets, strict=True)
        ]
    found = measure_spread(np.sum(each, axis=0), scene.given)
    sample = _Sample([offset + found.offset for offset in offsets], found.heights, found.spread, [])
    errors = np.concatenate(
        [
            _standardise(*some, offset, sample)
            for some, offset in zip(read, sample.offsets, strict=True)
        ]
    )
    sums = sum_blocks(errors, 0, 0, 1)
    near = semivariances(sums.sums, sums.counts, 0, scene.level, scene.longest)
    return sample._replace(near=list(near))


def _look(scene: _Scene, row: int, col: int, sample: _Sample, groups: Any) -> _Part:
    """Task: count the differences of a chunk, and add up its errors over blocks, by bands."""
    pairs, stable = _split(scene, groups)
    counts = np.zeros(COUNTS, np.int64)
    blocks: list[list[Blocks]] = [[] for _ in pairs]
    for top in range(0, pairs[0][0].shape[0], _BAND):
        band = slice(top, top + _BAND)
        own = None if stable is None else stable[band]
        for pair, offset, found in zip(pairs, sample.offsets, blocks, strict=True):
            change, lower, known = _read_pair([each[band] for each in pair], own)
            errors = _standardise(change, lower, known, offset, sample)
            found.append(sum_blocks(errors, row + top, col, 2**scene.level))
            moved = change - offset if scene.pooled and np.isfinite(offset) else change
            counts += count_differences(moved, lower, known)
    return _Part(counts, blocks)


def _add(parts: Sequence[_Part]) -> _Part:
    """Task: join parts of a scene."""
    blocks = [
        [each for some in one for each in some]
        for one in zip(*(p.blocks for p in parts), strict=True)
    ]
    return _Part(np.sum([part.counts for part in parts], axis=0), blocks)


def _finish(scene: _Scene, sample: _Sample, part: _Part) -> _Floats:
    """Task: turn counts and block sums into the numbers of a model, one after another."""
    found = measure_spread(part.counts, scene.given)
    side = 2**scene.level
    joined = [join_blocks(blocks, scene.shape, side) for blocks in part.blocks]
    sums, counts = (np.stack([each[k] for each in joined]) for k in (2, 3))
    far = semivariances(sums, counts, scene.level, 99, scene.longest)
    ranges = ladder(scene.shape, scene.cell)
    sills = fit_sills([*sample.near, *far], ranges, scene.cell, found.pixels)
    shared = sills * _mean_over(counts.sum(axis=0), ranges, scene)
    # Errors that all pixels share are seen in the offset, not in the scatter about it.
    alike = min(float(shared.sum()), _MOST_ALIKE)
    whole = 1 / math.sqrt(1 - alike) if math.isfinite(alike) else 1.0
    area = max(found.pixels / len(joined), 1.0) * math.prod(scene.cell)
    own = 1.96 * found.core * whole * math.sqrt(float(_widened(shared, ranges, area)))
    offset, doubt = found.offset, np.fmax(found.doubt, own)
    if scene.pooled:
        offset = doubt = np.nan
    return np.concatenate(
        [
            [offset, doubt, found.pixels, found.core],
            found.heights,
            found.spread * whole,
            found.quantiles,
            sills,
        ]
    )


def _widened(parts: _Floats, ranges: _Floats, area: Any) -> _Floats:
    """Add up the parts of a variance that each range makes, widened by Student's t."""
    variance = parts.sum(axis=-1)
    freedom = independent_errors(ranges, area)
    freedom = _MORE_FREE * variance**2 / np.maximum((parts**2 / freedom).sum(axis=-1), 1e-300)
    widened = student.ppf(0.975, np.maximum(freedom, 2.0)) / float(ndtri(0.975))
    return np.asarray(variance * widened**2)


def _mean_over(counts: npt.NDArray[np.int64], ranges: _Floats, scene: _Scene) -> _Floats:
    """Return the mean correlation of each range over all pairs of pixels that count in a scene."""
    further = max(0, math.ceil(math.log2(max(counts.shape) / _MOST_CELLS)))
    blocks = coarsen(counts.astype(np.float64), further)
    return mean_correlations(blocks, ranges, scene.cell, scene.level + further)


def _alone(value: Any) -> Any:
    """Return a number for an array of one number in memory."""
    return value if isinstance(value, da.Array) or np.ndim(value) else float(value)


def _by_block(function: Any, array: Any, *vectors: Any) -> Any:
    """Call a function of each block of an array, or of None, and small vectors of one length."""
    if not any(isinstance(each, da.Array) for each in (array, *vectors)):
        return function(array, *vectors)
    if array is not None and not isinstance(array, da.Array):
        array = da.from_array(np.asarray(array), -1)
    axes = () if array is None else tuple(range(array.ndim))
    arguments = [] if array is None else [array, axes]
    for each in vectors:
        arguments += [each if isinstance(each, da.Array) else da.from_array(each, -1), (-1,)]
    dtype = np.float64 if array is None else array.dtype
    call = function if array is not None else partial(function, None)
    meta = np.empty((0,) * len(axes), dtype)
    return da.blockwise(call, axes, *arguments, dtype=dtype, concatenate=True, meta=meta)


def _interpolate(height: Any, heights: _Floats, spread: _Floats) -> Any:
    found = np.interp(height, heights, spread)
    found = np.where(np.isfinite(height), found, np.nan)
    return found.astype(getattr(height, "dtype", np.float64))


def _surviving(quantiles: _Floats) -> tuple[_Floats, _Floats]:
    """Return errors over their spread, and the logarithm of the share that is larger."""
    return np.concatenate([[0.0], quantiles]), np.concatenate([[0.0], np.log1p(-PROBABILITIES)])


def _quantile(confidence: float, _: None, quantiles: _Floats) -> Any:
    size, logs = _surviving(quantiles)
    wanted = math.log1p(-confidence)
    beyond = max(0.0, logs[-1] - wanted) * size[-1] / -logs[-1]
    return np.asarray(np.interp(-wanted, -logs, size) + beyond)


def _chance(score: Any, quantiles: _Floats) -> Any:
    """Return a probability, whose logarithm runs straight between quantiles.

    Beyond the last it falls as on average before it: no faster than errors were seen to.
    """
    size, logs = _surviving(quantiles)
    given = np.abs(score)
    beyond = np.maximum(given - size[-1], 0.0) * logs[-1] / size[-1]
    found = np.exp(np.interp(given, size, logs) + beyond)
    return np.where(np.isfinite(size[-1]), found, np.nan).astype(given.dtype)
