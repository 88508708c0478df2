"""Correction of heights by reference heights: the simplest curve that pays out of fold, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from scipy import optimize, stats

from xchmv2.errors import CHMv2Error, ImageryError, warn
from xchmv2.raster import Raster, read_heights, validate_choice, validate_number
from xchmv2.validation import Matched, match, scores
from xchmv2.validation.matching import RADIUS, Statistic

_Floats = npt.NDArray[np.float64]
_Whole = npt.NDArray[np.int64]
_Aim = Literal["error", "distribution"]
_Model = Literal["none", "offset", "scale", "line", "monotone"]
#: Fewest references, and the most: of a raster with more pixels, so many are drawn.
_FEWEST, _MOST = 20, 20_000
#: Folds, blocks along the longer side of the references, and the fewest blocks without a warning.
_FOLDS, _BLOCKS, _FEW_BLOCKS = 5, 8, 5
#: Share of the error that a richer curve must gain, besides one standard error of the gain.
_GAIN = 0.01
#: Share of the error of a constant that heights must gain, and in how many standard errors.
_SKILL, _CERTAIN = 0.1, 1.645
#: Height below which a correction tapers to 0 at the ground [m].
_TAPER = 3.0
#: Most segments of a monotone curve, and the weight of slope 1 beside the references in each.
_SEGMENTS, _PRIOR = 8, 0.02
#: A residual beyond this many robust standard deviations counts less and less.
_HUBER = 1.345
#: References from this quantile upward are the tall ones of the report.
_TALL = 0.8


@dataclass(frozen=True)
class Calibration:
    """A correction of heights, and how well each candidate did on references it had not seen.

    Parameters
    ----------
    model : {"none", "offset", "scale", "line", "monotone"}
        The correction chosen; "none" leaves heights as they are.
    aim : {"error", "distribution"}
        What it was chosen for.
    heights, corrected : tuple of float
        Knots of the correction [m]: predicted heights and what they become, linear in between.
    slope : float
        Corrected metres per predicted metre above the last knot.
    highest : float
        Tallest predicted height under a reference [m]: nothing was learnt above it.
    count : int
        Number of references used.
    flagged : int
        Number of footprints left out because of their quality flag.
    blocks : int
        Number of spatial blocks that the references lie in.
    block : float
        Side of a block [m].
    skill : float
        Share of the out-of-fold error of one constant height that the best candidate avoids.
    refused : bool
        Whether nothing was corrected because the heights have no skill.
    coverage : float, optional
        Share of reference heights within one ``bin_spread`` of the corrected height, out of fold;
        0.683 if that is one standard deviation of a normal distribution. None without
        ``bin_spread``, or if the reference is no raster.
    spread_factor : float, optional
        Factor by which ``bin_spread`` becomes one standard deviation; None as `coverage`.
    report : DataFrame
        Out-of-fold errors of each candidate and of one constant height [m]: ``mae``, ``bias``,
        ``tall_bias`` where the reference is in its upper fifth, and ``distribution``, the mean
        absolute difference between corrected and reference heights of the same rank.
    """

    model: _Model
    aim: _Aim
    heights: tuple[float, ...]
    corrected: tuple[float, ...]
    slope: float
    highest: float
    count: int
    flagged: int
    blocks: int
    block: float
    skill: float
    refused: bool
    coverage: float | None
    spread_factor: float | None
    report: pd.DataFrame = field(compare=False)

    def apply(self, height: Raster) -> xr.DataArray:
        """Correct heights, lazily where they are lazy.

        Parameters
        ----------
        height : DataArray or Dataset
            Predicted heights [m], of any dims; or a Dataset with ``canopy_height``.

        Returns
        -------
        DataArray
            Corrected heights [m], 0 where they were 0, with the correction in its attrs. With the
            model "none", the same heights.
        """
        found = heights = read_heights(height)
        if self.model != "none":
            curve = _Curve(self.heights, self.corrected, self.slope)
            found = xr.apply_ufunc(
                curve, heights, dask="parallelized", output_dtypes=[heights.dtype]
            ).rename(heights.name)
        attrs: dict[str, Any] = {"heights": list(self.heights), "corrected": list(self.corrected)}
        for name in ("model", "aim", "slope", "highest", "count", "skill"):
            attrs[name] = getattr(self, name)
        return found.assign_attrs(
            heights.attrs, **{f"calibration_{k}": v for k, v in attrs.items()}
        )

    def __repr__(self) -> str:
        curve = _Curve(self.heights, self.corrected, self.slope)
        some = np.array([5.0, 10.0, 20.0, 30.0, 40.0])
        some = some[some <= max(self.highest, 10.0)]
        steps = ", ".join(f"{a:g} to {b:.1f}" for a, b in zip(some, curve(some), strict=True))
        left_out = f", {self.flagged} more left out by their quality flag" if self.flagged else ""
        doing = f"{self.model}: {steps} m"
        if self.model == "none":
            doing = f"nothing corrected: {'no skill' if self.refused else 'none is better'}"
        return (
            f"<Calibration for aim={self.aim!r}> {doing}\n"
            f"{self.count} references up to {self.highest:.1f} m of predicted height in "
            f"{self.blocks} blocks of {self.block:.0f} m{left_out}\n"
            f"skill {self.skill:.2f}; errors out of fold [m]:\n{self.report.round(2).to_string()}"
        )


def calibrate(
    height: xr.DataArray | xr.Dataset,
    reference: Any,
    *,
    aim: _Aim = "error",
    model: _Model | Literal["auto"] = "auto",
    column: str | None = None,
    radius: float = RADIUS,
    statistic: Statistic | None = None,
    reference_error: float = 1.0,
    block: float | None = None,
) -> tuple[xr.DataArray | xr.Dataset, Calibration]:
    """Correct predicted heights by reference heights, if that pays on references not used.

    Parameters
    ----------
    height : DataArray or Dataset
        Canopy height (y, x) [m]; or a Dataset of ``canopy_height`` and ``bin_spread``.
    reference : DataArray, GeoDataFrame or DataFrame
        Reference heights [m], as in :func:`~xchmv2.validation.validate`: a raster, footprints or
        plots; at least 20.
    aim : {"error", "distribution"}
        What the correction shall be best at: the least mean absolute error, or the right
        distribution of heights, above all of tall trees. Heights of a network are drawn to the
        mean where imagery does not tell; to undo that makes single heights worse.
    model : {"auto", "none", "offset", "scale", "line", "monotone"}
        Correction that is weighed against none; by default all of them.
    column, radius, statistic
        As in :func:`~xchmv2.validation.validate`.
    reference_error : float, default 1.0
        Standard deviation of the references' errors [m], for the line; the rest of the scatter is
        taken for error of the heights.
    block : float, optional
        Side of the square blocks that are left out together [m on the ground]; by default an eighth
        of the extent of the references.

    Returns
    -------
    corrected : DataArray or Dataset
        Lazy where the heights are, with the correction in attrs; ``bin_spread`` is multiplied by
        ``spread_factor`` where the reference is a raster.
    calibration : Calibration
        The correction, and the out-of-fold errors of all candidates.

    Raises
    ------
    ImageryError
        If fewer than 20 references lie on predicted heights, or all in one block.
    CHMv2Error
        If reference heights lie outside 0 to 120 m, a CRS is missing, or an argument is invalid.

    Warns
    -----
    UserWarning
        If the heights tell the references apart no better than one constant height would: nothing
        is corrected then. Or if the references lie in fewer than 5 blocks.

    Notes
    -----
    Candidates are, from simple to rich: none; h + b, tapered to 0 below 3 m; a h; a h + b, tapered
    as well, by Deming regression with errors in both variables and Huber's weights; and a monotone
    curve of up to 8 segments by non-negative least squares. All give 0 at 0. Each is fitted without
    one fifth of the spatial blocks and judged there. A richer one is taken if it gains 1 % of the
    error and one standard error of the gain, from the scatter of blocks. For
    ``aim="distribution"``, heights are paired with reference heights of the same rank instead of
    the same place.

    Heights have skill if the best candidate avoids 10 % of the error of one constant height, by
    1.645 standard errors.

    A monotone curve commutes with percentiles: fitted to RH98, it holds for pixels. For means of
    plots, the curve is applied to the heights in each plot before they are averaged. Noise of
    pixels lifts their 98th percentile, so noisy heights without bias are lowered by RH98
    (docs/fine-tuning.md has figures); plot means do not have this fault.

    Heights under the references are computed; the correction of the rest stays lazy. Of a raster
    with more than 20,000 pixels so many are drawn, always the same.

    References
    ----------
    Huber 1964, Robust Estimation of a Location Parameter. Deming 1943, Statistical Adjustment of
    Data. Roberts et al. 2017, Cross-validation strategies for data with temporal, spatial,
    hierarchical, or phylogenetic structure.

    Examples
    --------
    >>> corrected, calibration = height.sel(time="2019-07-01").chmv2.calibrate(lidar)
    >>> calibration.model
    'offset'
    """
    validate_choice("aim", aim, ("error", "distribution"))
    validate_choice("model", model, ("auto", *_CANDIDATES))
    validate_number("reference_error", reference_error, 1.0, above=0, unit="m")
    validate_number("block", block, 100, above=0, unit="m", optional=True)
    if isinstance(height, xr.Dataset) and "canopy_height" not in height:
        raise CHMv2Error(
            "a Dataset with canopy_height",
            f"{list(height.data_vars)}",
            "predict it too: imagery.chmv2.predict(layers=('height', 'bin_spread'))",
        )
    matched = match(height, reference, column=column, radius=radius, statistic=statistic)
    found = _calibrate(matched, block, aim, model, reference_error)
    corrected = found.apply(height)
    if not isinstance(height, xr.Dataset):
        return corrected, found
    height = height.assign(canopy_height=corrected)
    if found.spread_factor is None or found.refused:
        return height, found
    spread = height["bin_spread"]
    scaled = (spread * found.spread_factor).astype(spread.dtype)
    scaled = scaled.assign_attrs(spread.attrs, spread_factor=found.spread_factor)
    return height.assign(bin_spread=scaled), found


@dataclass(frozen=True)
class _Pairs:
    """References, the heights under each, and the blocks they lie in.

    `samples` are (N, Q) heights [m] whose mean is the height under a reference; `known` are (N,)
    reference heights [m]; `blocks` number the blocks (N,) from 0.
    """

    samples: _Floats
    known: _Floats
    blocks: _Whole

    @property
    def mean(self) -> _Floats:
        return np.asarray(self.samples.mean(axis=1))

    def at(self, chosen: npt.NDArray[np.bool_]) -> _Pairs:
        return _Pairs(self.samples[chosen], self.known[chosen], self.blocks[chosen])

    def ranked(self) -> _Pairs:
        """Pair heights with reference heights of the same rank."""
        return _Pairs(self.samples, _by_rank(self.known, self.mean), self.blocks)


def _by_rank(values: _Floats, others: _Floats) -> _Floats:
    """Return values in the order of others: the lowest where these are lowest, and so on."""
    found = np.empty_like(values)
    found[np.argsort(others, kind="stable")] = np.sort(values)
    return found


def _read_pairs(matched: Matched, block: float | None) -> tuple[_Pairs, float, _Floats | None]:
    """Return the pairs, the side of their blocks [m], and the spread at each, if there is one."""
    chosen = np.flatnonzero(matched.known)
    if chosen.size < _FEWEST:
        raise ImageryError(
            f"at least {_FEWEST} references on valid heights",
            f"{chosen.size}",
            "pass more references inside the predicted area",
        )
    if chosen.size > _MOST:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, _MOST, replace=False))
    if matched.samples is None or matched.centres is None:
        samples = matched.height.ravel()[chosen, None]
        where = np.stack(np.unravel_index(chosen, matched.height.shape), axis=1)
        places = where * np.array(matched.pixel)
    else:
        samples, places = matched.samples[chosen], matched.centres[chosen] * matched.pixel
    places = places - places.min(axis=0)
    side = float(places.max() / _BLOCKS) or 1.0 if block is None else float(block)
    _, blocks = np.unique(np.floor(places / side), axis=0, return_inverse=True)
    if not blocks.any():
        raise ImageryError(
            "references in at least 2 blocks",
            f"all within {places.max():.0f} m",
            "pass references spread over the predicted area, or smaller blocks: block=10",
        )
    spread = None if matched.spread is None else matched.spread.ravel()[chosen]
    return _Pairs(samples, matched.reference.ravel()[chosen], blocks.ravel()), side, spread


def _calibrate(
    matched: Matched,
    block: float | None,
    aim: _Aim,
    model: _Model | Literal["auto"],
    error: float,
) -> Calibration:
    """Choose a correction out of fold, fit it to all references, and report."""
    pairs, side, spread = _read_pairs(matched, block)
    count = int(pairs.blocks.max()) + 1
    if count < _FEW_BLOCKS:
        warn(
            f"The references lie in {count} blocks of {side:.0f} m, so the errors out of fold are "
            "uncertain: add references elsewhere"
        )
    by_place = _predict_folds(pairs, error, ranked=False)
    skill, refused = _judge_skill(pairs, by_place)
    found = by_place if aim == "error" else _predict_folds(pairs, error, ranked=True)
    offered = [name for name in _CANDIDATES if model in ("auto", name)]
    best = "none" if refused else _choose(_errors(pairs, found, aim), pairs.blocks, offered)
    curve = _CANDIDATES[best](pairs if aim == "error" else pairs.ranked(), error)
    coverage, factor = _coverage(pairs.known - found[best], spread)
    return Calibration(
        model=best,
        aim=aim,
        heights=curve.heights,
        corrected=curve.corrected,
        slope=curve.slope,
        highest=float(pairs.samples.max()),
        count=len(pairs.known),
        flagged=matched.flagged,
        blocks=count,
        block=side,
        skill=skill,
        refused=refused,
        coverage=coverage,
        spread_factor=factor,
        report=_report(pairs, found),
    )


def _predict_folds(pairs: _Pairs, error: float, *, ranked: bool) -> dict[str, _Floats]:
    """Return what each candidate, and a constant, fitted without its fold make of a reference."""
    count = int(pairs.blocks.max()) + 1
    fold = np.random.default_rng(0).permutation(count)[pairs.blocks] % min(_FOLDS, count)
    found = {name: np.full(len(fold), np.nan) for name in (*_CANDIDATES, "constant")}
    for k in np.unique(fold):
        seen, left = pairs.at(fold != k), pairs.at(fold == k)
        found["constant"][fold == k] = np.median(seen.known)
        seen = seen.ranked() if ranked else seen
        for name, fit in _CANDIDATES.items():
            found[name][fold == k] = fit(seen, error)(left.samples).mean(axis=1)
    return found


def _errors(pairs: _Pairs, found: Mapping[str, _Floats], aim: _Aim) -> dict[str, _Floats]:
    """Return absolute errors at each reference, or of each rank."""
    return {
        name: np.abs(heights - (pairs.known if aim == "error" else _by_rank(pairs.known, heights)))
        for name, heights in found.items()
    }


def _choose(errors: Mapping[str, _Floats], blocks: _Whole, offered: list[_Model]) -> _Model:
    """Return the richest candidate that pays, from simple to rich."""
    best: _Model = "none"
    for name in offered:
        enough = errors[name].mean() < (1 - _GAIN) * errors[best].mean()
        if enough and _gain_in_errors(errors[best], errors[name], blocks) > 1:
            best = name
    return best


def _judge_skill(pairs: _Pairs, found: Mapping[str, _Floats]) -> tuple[float, bool]:
    """Compare the best candidate with a constant; warn, and refuse, where it has no skill."""
    errors = _errors(pairs, found, "error")
    best = _choose(errors, pairs.blocks, list(_CANDIDATES))
    worst = errors["constant"].mean()
    skill = float(1 - errors[best].mean() / worst) if worst > 0 else 0.0
    certain = _gain_in_errors(errors["constant"], errors[best], pairs.blocks) > _CERTAIN
    if skill > _SKILL and certain:
        return skill, False
    warn(
        "The heights tell the references apart no better than one constant height would (mean "
        f"absolute error out of fold {errors[best].mean():.2f} m, of the constant {worst:.2f} m), "
        "so nothing was corrected. Check that place, date and unit of both agree; "
        "xchmv2.training.fine_tune can train the model on local lidar"
    )
    return skill, True


def _gain_in_errors(worse: _Floats, better: _Floats, blocks: _Whole) -> float:
    """Return a gain over its standard error, from the scatter of its sums in blocks."""
    sums = np.bincount(blocks, worse - better)
    spread = float(np.sqrt(len(sums) * sums.var(ddof=1)))
    return float(sums.sum()) / max(spread, 1e-9)


def _report(pairs: _Pairs, found: Mapping[str, _Floats]) -> pd.DataFrame:
    tall = pairs.known >= np.quantile(pairs.known, _TALL)
    ranks = _errors(pairs, found, "distribution")
    rows = {
        name: {
            "mae": scores.mae(heights, pairs.known),
            "bias": scores.bias(heights, pairs.known),
            "tall_bias": scores.bias(heights[tall], pairs.known[tall]),
            "distribution": float(ranks[name].mean()),
        }
        for name, heights in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _coverage(
    residual: _Floats, deviation: _Floats | None
) -> tuple[float, float] | tuple[None, None]:
    """Share of residuals within one spread, and the factor that would make it 68.3 %."""
    if deviation is None:
        return None, None
    ratio = np.abs(residual) / np.maximum(deviation, 1e-6)
    return float((ratio <= 1).mean()), float(np.quantile(ratio, 0.6827))


@dataclass(frozen=True)
class _Curve:
    """A rising curve through knots, from (0, 0), that goes on with one slope; NaN if undefined."""

    heights: tuple[float, ...] = (0.0,)
    corrected: tuple[float, ...] = (0.0,)
    slope: float = 1.0

    def __call__(self, heights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        inner = np.interp(heights, self.heights, self.corrected)
        beyond = self.slope * np.clip(heights - self.heights[-1], 0, None)
        return np.asarray(inner + beyond).astype(heights.dtype)


def _fit_none(pairs: _Pairs, error: float) -> _Curve:
    return _Curve()


def _fit_offset(pairs: _Pairs, error: float) -> _Curve:
    mean, share, seen = _tapered(pairs)
    offset = _weighted_median((pairs.known[seen] - mean[seen]) / share[seen], share[seen])
    return _line(1.0, offset)


def _fit_scale(pairs: _Pairs, error: float) -> _Curve:
    mean, _, seen = _tapered(pairs)
    return _Curve(slope=_weighted_median(pairs.known[seen] / mean[seen], mean[seen]))


def _fit_line(pairs: _Pairs, error: float) -> _Curve:
    """Fit a line with errors in both variables, by iteratively reweighted Deming regression."""
    mean, share, seen = _tapered(pairs)
    # The mean a h + b share of a plot is, over its share of canopy, a line as for a pixel.
    x, y = mean[seen] / share[seen], pairs.known[seen] / share[seen]
    slope, offset, ratio, huber = np.nan, np.nan, 1.0, np.ones(len(x))
    for _ in range(20 if len(x) > 2 else 0):
        weights = share[seen] ** 2 * huber
        (xx, xy), (_, yy) = np.cov(x, y, ddof=0, aweights=weights)
        if not xy > 0:
            return _line(np.nan, np.nan)
        more = yy - ratio * xx
        slope = (more + np.sqrt(more**2 + 4 * ratio * xy**2)) / (2 * xy)
        offset = np.average(y - slope * x, weights=weights)
        huber, scatter = _robust_weights(y - offset - slope * x)
        # What the references do not explain is error of the heights, and never much less.
        own = max(scatter**2 - error**2, (0.2 * error) ** 2) / slope**2
        ratio = error**2 / own
    return _line(float(slope), float(offset))


def _fit_monotone(pairs: _Pairs, error: float) -> _Curve:
    """Fit slopes of segments, at least 0, by reweighted least squares; slope 1 above them."""
    x = pairs.samples
    inner = x[x > 0.5]
    count = min(_SEGMENTS, len(x) // 8)
    if not inner.size or count < 1:
        return _Curve()
    knots = np.unique([0.0, *np.quantile(inner, np.linspace(0.05, 0.95, count))])
    steps = np.stack(
        [np.clip(x - low, 0, high - low).mean(axis=1) for low, high in pairwise(knots)], axis=1
    )
    target = pairs.known - np.clip(x - knots[-1], 0, None).mean(axis=1)
    weights, slopes = np.ones(len(x)), np.ones(steps.shape[1])
    for _ in range(5):
        root = np.sqrt(weights)
        prior = np.sqrt(_PRIOR * (weights @ steps**2) + 1e-9)
        slopes, _ = optimize.nnls(
            np.concatenate([root[:, None] * steps, np.diag(prior)]),
            np.concatenate([root * target, prior]),
        )
        weights, _ = _robust_weights(target - steps @ slopes)
    rises = np.cumsum(slopes * np.diff(knots))
    return _Curve(tuple(map(float, knots)), (0.0, *map(float, rises)))


def _tapered(pairs: _Pairs) -> tuple[_Floats, _Floats, npt.NDArray[np.bool_]]:
    """Return mean heights, the share of an offset that reaches them, and where that is enough."""
    share = np.clip(pairs.samples / _TAPER, 0, 1).mean(axis=1)
    return pairs.mean, share, share > 0.05


def _line(slope: float, offset: float) -> _Curve:
    """Return a line that does not fall below 0, tapered to 0 at the ground."""
    if not slope > 0:
        return _Curve(slope=np.nan)
    start = max(_TAPER, -offset / slope)
    return _Curve((0.0, start), (0.0, max(offset + slope * start, 0.0)), slope)


def _robust_weights(residual: _Floats) -> tuple[_Floats, float]:
    """Return Huber's weights of residuals, above 0, and their robust standard deviation."""
    spread = float(stats.median_abs_deviation(residual, scale="normal"))
    weights = _HUBER * spread / np.maximum(np.abs(residual), 1e-9)
    return np.clip(weights, 1e-6, 1.0), spread


def _weighted_median(values: _Floats, weights: _Floats) -> float:
    if not values.size:
        return np.nan
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


_CANDIDATES: dict[_Model, Callable[[_Pairs, float], _Curve]] = {
    "none": _fit_none,
    "offset": _fit_offset,
    "scale": _fit_scale,
    "line": _fit_line,
    "monotone": _fit_monotone,
}
