"""validate(): scores of canopy heights against lidar, GEDI or plots, as in the CHMv2 paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xchmv2.errors import CHMv2Error
from xchmv2.raster import (
    Raster,
    choose_heights,
    find_grid,
    is_crs_variable,
    validate_number,
    validate_numbers,
)
from xchmv2.validation import scores
from xchmv2.validation.matching import RADIUS, Matched, Statistic, match

#: Percentiles of block heights that are compared.
_PERCENTILES = (5.0, 25.0, 50.0, 75.0, 95.0)
#: Height above which the paper reports bias separately [m].
_TALL = 30.0

_LABELS = {
    "mae": ("mean absolute error", "m"),
    "rmse": ("root mean squared error", "m"),
    "bias": ("mean error, height minus reference", "m"),
    "r2": ("coefficient of determination", "1"),
    "count": ("pixels, footprints or plots compared", "1"),
    "tall_mae": ("mean absolute error where the reference is 30 m or more", "m"),
    "tall_bias": ("mean error where the reference is 30 m or more", "m"),
    "tall_count": ("pixels, footprints or plots where the reference is 30 m or more", "1"),
    "block_r2": ("coefficient of determination of block means", "1"),
    "block_mae": ("mean absolute error of block means", "m"),
    "block_bias": ("mean error of block means", "m"),
    "block_count": ("blocks compared", "1"),
    "edge_error": ("mean absolute difference of Sobel gradients", "m per pixel"),
    "class_mae": ("mean absolute error by class of reference height", "m"),
    "class_bias": ("mean error by class of reference height", "m"),
    "class_count": ("pixels, footprints or plots by class of reference height", "1"),
    "percentile_mae": ("mean absolute error of percentiles of blocks", "m"),
    "percentile_bias": ("mean error of percentiles of blocks", "m"),
    "percentile_r2": ("coefficient of determination of percentiles of blocks", "1"),
}


def validate(
    height: Raster,
    reference: Any,
    *,
    block: int = 50,
    classes: Sequence[float] = scores.CLASSES,
    percentiles: Sequence[float] = _PERCENTILES,
    column: str | None = None,
    radius: float = RADIUS,
    statistic: Statistic | None = None,
) -> xr.Dataset:
    """Validate heights against lidar, GEDI or plots.

    Parameters
    ----------
    height : DataArray or Dataset
        Heights [m], dims y and x; along a further one, such as time, each date is compared. Or a
        Dataset with ``canopy_height``.
    reference : DataArray, GeoDataFrame or DataFrame
        A raster of heights [m] on any grid; it is averaged onto the heights' pixels, or
        interpolated if it is coarser. It may share the further dim of the heights. Or footprints:
        a GeoDataFrame of points in any CRS; a table with columns ``x`` and ``y`` in the heights'
        CRS; a DataArray along one dim with coords ``x`` and ``y``. Or plots: a GeoDataFrame of
        polygons. Footprints that GEDI's ``quality_flag`` or ``degrade_flag`` marks as bad are left
        out.
    block : int, default 50
        Side of the blocks of block-R2 and of percentiles [px of the heights], as in the paper,
        where 50 px are 30 m.
    classes : sequence of float
        Ascending edges of height classes [m].
    percentiles : sequence of float
        Percentiles of block heights that are compared; the paper uses the 95th.
    column : str, optional
        For footprints and plots, the column of heights [m]; by default ``height``, ``rh98``.
    radius : float, default 12
        For footprints, the radius on the ground [m]; a column ``radius`` overrides it.
    statistic : float or "mean", optional
        For footprints and plots, the percentile, or the mean, of the heights in each that is
        compared with its reference. By default as the column is named: ``rh95`` or ``p95`` are the
        95th percentile, ``mean`` is the mean; of footprints otherwise the 98th percentile.

    Returns
    -------
    Dataset
        ``mae``, ``rmse``, ``bias`` [m] and ``r2``, ``count``; ``tall_mae``, ``tall_bias``,
        ``tall_count`` above 30 m; ``class_mae``, ``class_bias``, ``class_count`` by
        ``height_class``. For rasters also ``block_r2``, ``block_mae``, ``block_bias``,
        ``block_count``, ``edge_error`` [m per pixel] and ``percentile_mae``, ``percentile_bias``,
        ``percentile_r2`` by ``percentile``, all of block heights. Its attrs say which
        ``statistic`` of footprints and plots was compared, and how many ``flagged`` footprints were
        left out. In memory.

    Raises
    ------
    CHMv2Error
        If heights and reference do not overlap, one has no CRS, reference heights lie outside 0
        to 120 m, nothing says which heights of plots are given, or an argument is invalid.

    Notes
    -----
    Errors are height minus reference: a bias below 0 means heights that are too low. A class
    includes its lower edge. Blocks start at the first row and column with both heights. Blocks
    with less than half, and footprints and plots with less than nine tenths, of valid pixels are
    left out. A pixel belongs to a footprint or plot if its centre lies inside.

    Of lazy heights, only those under the reference are computed and held in memory.

    References
    ----------
    CHMv2, arXiv 2603.06382, section 4: MAE, bias, block-R2 over 50 x 50 px, edge error as the
    difference of Sobel gradients, bias above 30 m, 95th percentiles of 50 x 50 px crops; RH98 of
    GEDI against the 98th percentile of heights within 12 m, of ICESat-2 within 7 m.

    Examples
    --------
    >>> scores = height.sel(time="2019-07-01").chmv2.validate(lidar)
    >>> print(f"{float(scores.bias):.1f} m")
    -1.0 m
    >>> by_height = scores["class_mae"].to_pandas()
    """
    _validate(block, classes, percentiles)
    height = choose_heights(height)
    dims = find_grid(height).dims
    further = [dim for dim in height.dims if dim not in dims]

    def score(plane: xr.DataArray, truth: Any) -> xr.Dataset:
        matched = match(plane, truth, column=column, radius=radius, statistic=statistic)
        return _score(matched, block, classes, percentiles)

    if not further:
        return _label(score(height, reference), block, classes)
    if len(further) > 1:
        raise CHMv2Error(
            "heights with at most one dim beside y and x",
            f"dims {height.dims}",
            f"choose one: height.isel({further[0]}=0)",
        )
    dim = further[0]
    dates = [
        score(height.isel({dim: k}), _reference_of(reference, height, dim, k))
        for k in range(height.sizes[dim])
    ]
    joined = xr.concat(dates, dim, join="exact", coords="minimal", compat="override")
    kept = {
        name: coord.variable
        for name, coord in height.coords.items()
        if coord.dims == (dim,) and not is_crs_variable(coord)
    }
    return _label(joined.assign_coords(kept), block, classes)


def to_table(result: xr.Dataset) -> pd.DataFrame:
    """Convert scores to one table.

    Parameters
    ----------
    result : Dataset
        From :func:`validate`.

    Returns
    -------
    DataFrame
        A row for all heights, then one for each height class and each percentile of blocks;
        columns ``count``, ``mae``, ``rmse``, ``bias``, ``r2``, NaN where a score is not defined.
        Several dates form the first level of the index.
    """
    further = [dim for dim in result.dims if dim not in ("height_class", "percentile")]
    if further:
        dim = further[0]
        names = result[dim].values if dim in result.coords else range(result.sizes[dim])
        tables = [to_table(result.isel({dim: k})) for k in range(result.sizes[dim])]
        return pd.concat(tables, keys=list(names), names=[str(dim)])
    rows = {"all": _row(result, "", "count mae rmse bias r2")}
    if "block_r2" in result:
        side = result.attrs["block"]
        rows[f"blocks of {side} px"] = _row(result, "block_", "count mae bias r2")
    for k, name in enumerate(result["height_class"].values):
        rows[str(name)] = _row(result.isel(height_class=k), "class_", "count mae bias")
    for k in range(result.sizes.get("percentile", 0)):
        name = f"p{float(result['percentile'][k]):g} of blocks"
        rows[name] = _row(result.isel(percentile=k), "percentile_", "mae bias r2")
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame = frame.reindex(columns=["count", "mae", "rmse", "bias", "r2"])
    return frame.astype({"count": "Int64"})


def _validate(block: int, classes: Sequence[float], percentiles: Sequence[float]) -> None:
    validate_number("block", block, 50, least=2, most=2**15, unit="px", whole=True)
    edges = validate_numbers(
        "classes", classes, "(0, 5, 10, 20, 30, np.inf)", ascending=True, most=np.inf
    )
    if len(edges) < 2:
        raise CHMv2Error(
            "at least two ascending edges of height classes [m]",
            f"{list(classes)}",
            "such as classes=(0, 5, 10, 20, 30, np.inf)",
        )
    validate_numbers("percentiles", percentiles, "(50, 95)", least=0, most=100)


def _reference_of(reference: Any, height: xr.DataArray, dim: Any, k: int) -> Any:
    """Return the reference of one date: the one at the same index, or the only one."""
    if not isinstance(reference, xr.DataArray) or dim not in reference.dims:
        return reference
    if reference.sizes[dim] == 1:
        return reference.isel({dim: 0})
    same = reference.sizes[dim] == height.sizes[dim] and (
        dim not in reference.coords
        or dim not in height.coords
        or bool((reference[dim].values == height[dim].values).all())
    )
    if not same:
        raise CHMv2Error(
            f"a reference of one date, or of the dates of the heights along {dim!r}",
            f"{reference.sizes[dim]} other dates",
            f"choose one: reference.isel({dim}=0)",
        )
    return reference.isel({dim: k})


def _score(
    matched: Matched, block: int, classes: Sequence[float], percentiles: Sequence[float]
) -> xr.Dataset:
    known = matched.known
    found, true = matched.height[known], matched.reference[known]
    tall = true >= _TALL
    rows = scores.by_class(found, true, classes)
    numbers: dict[str, Any] = {
        "mae": scores.mae(found, true),
        "rmse": scores.rmse(found, true),
        "bias": scores.bias(found, true),
        "r2": scores.r2(found, true),
        "count": int(known.sum()),
        "tall_mae": scores.mae(found[tall], true[tall]),
        "tall_bias": scores.bias(found[tall], true[tall]),
        "tall_count": int(tall.sum()),
        "class_mae": ("height_class", [row[1] for row in rows]),
        "class_bias": ("height_class", [row[2] for row in rows]),
        "class_count": ("height_class", [row[0] for row in rows]),
    }
    coords = {"height_class": scores.class_names(classes)}
    if not matched.is_raster:
        told = {"statistic": matched.statistic, "flagged": matched.flagged}
        return xr.Dataset(numbers, coords, told)
    numbers |= _score_blocks(matched, block, percentiles)
    words = {"long_name": "percentile", "units": "%"}
    ranks = ("percentile", list(map(float, percentiles)), words)
    return xr.Dataset(numbers, {**coords, "percentile": ranks})


def _score_blocks(matched: Matched, block: int, percentiles: Sequence[float]) -> dict[str, Any]:
    """Return the scores of blocks and edges."""
    pair = matched.height, matched.reference
    means = np.stack([scores.block_means(heights, block) for heights in pair])
    whole = np.isfinite(means).all(axis=0)
    found, true = means[:, whole]
    ranks = [scores.block_percentiles(heights, block, percentiles)[:, whole] for heights in pair]
    by_rank = {
        f"percentile_{score.__name__}": (
            "percentile",
            [score(*both) for both in zip(*ranks, strict=True)],
        )
        for score in (scores.mae, scores.bias, scores.r2)
    }
    return {
        "block_r2": scores.r2(found, true),
        "block_mae": scores.mae(found, true),
        "block_bias": scores.bias(found, true),
        "block_count": int(whole.sum()),
        "edge_error": scores.edge_error(*pair),
        **by_rank,
    }


def _label(result: xr.Dataset, block: int, classes: Sequence[float]) -> xr.Dataset:
    for name, variable in result.data_vars.items():
        variable.attrs.update(zip(("long_name", "units"), _LABELS[str(name)], strict=True))
    edges = {"class_low": classes[:-1], "class_high": classes[1:]}
    result = result.assign_coords(
        {
            name: ("height_class", np.asarray(values, np.float64), {"units": "m"})
            for name, values in edges.items()
        }
    )
    if "block_r2" in result:
        result.attrs["block"] = int(block)
    return result


def _row(result: xr.Dataset, prefix: str, names: str) -> dict[str, float]:
    return {name: result[prefix + name].item() for name in names.split()}
