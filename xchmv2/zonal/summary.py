"""Statistics of a raster under polygons."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr

from xchmv2.areas import cell_areas
from xchmv2.errors import CHMv2Error
from xchmv2.imagery import find_grid
from xchmv2.zonal.correlation import estimate_length, spread_windows
from xchmv2.zonal.graph import cut_layer, lazy_sums
from xchmv2.zonal.labelling import label_zones
from xchmv2.zonal.pieces import Group, cut_pieces
from xchmv2.zonal.polygons import Polygons, read_polygons, require_zonal
from xchmv2.zonal.quantity import Quantity, read_quantity
from xchmv2.zonal.statistics import (
    CHANGE_STATS,
    WITH_ERROR,
    finish,
    percentile_of,
    resolve_stats,
)
from xchmv2.zonal.sums import Rules, sum_group


def zonal(
    height_or_change: xr.DataArray | xr.Dataset,
    polygons: Any,
    *,
    stats: str | Sequence[str] | None = None,
    threshold: float | None = None,
    sigma: float | xr.DataArray | None = None,
    correlation_length: float | None = None,
) -> xr.Dataset:
    """Sum up heights or changes under polygons, each pixel by the share that is covered.

    Parameters
    ----------
    height_or_change : DataArray or Dataset
        Heights [m] with dims y and x, and others such as time; a change named ``height_change``;
        or the Dataset of ``difference``.
    polygons : GeoDataFrame, GeoSeries, shapely geometry or sequence of them
        Polygons and multipolygons, with holes or without, in any CRS; without one, in the
        raster's.
    stats : str or sequence of str, optional
        Of heights and changes: ``mean``, ``std``, ``min``, ``max`` [m], ``count`` [px], ``area``
        [m2], ``valid_fraction``, ``median`` and percentiles such as ``p95`` [m]. Of changes also
        ``loss_area``, ``gain_area``, ``net_area`` [ha] and ``loss_volume``, ``gain_volume``,
        ``net_volume`` [m3]. Default: all but percentiles.
    threshold : float, optional
        Change [m] from which on a pixel counts as lost or gained. Default: the pixels that
        ``difference`` found significant; 5 m where there is no such layer.
    sigma : float or DataArray, optional
        Standard deviation of the error of one pixel [m]. Default: the one that ``difference``
        worked with; without it there are no standard errors.
    correlation_length : float, optional
        Radius of the disc that counts as one independent error [m], 0 for independent pixels.
        Default: the one that ``difference`` was given, else estimated from the change as by
        :func:`xchmv2.change.correlation_length`.

    Returns
    -------
    Dataset
        One variable for each statistic, float64 with dims (further dims, geometry); where sigma is
        known, standard errors as ``mean_se`` and so on. Coordinates: ``geometry``, the polygons
        with their CRS (an xvec index), their index and columns. Lazy where the input is.

    Raises
    ------
    CHMv2Error
        If an argument cannot be, the raster has no CRS and the polygons do, or sigma is given for
        heights without a correlation length.

    Warns
    -----
    UserWarning
        If polygons lie outside the raster: their statistics are NaN. If polygons cross themselves.

    Notes
    -----
    Means and deviations are weighted by covered area on the ground. ``loss`` and ``gain`` are
    gross: of the pixels that count. ``net_volume`` is of all pixels, so it is not the difference
    of the two, which depend on what counts.

    Standard errors are those of repeated measurement, for errors with the given deviation and
    correlation length (:func:`xchmv2.zonal.effective_samples`). Those of areas come from pixels
    so near the threshold that another measurement might have called them otherwise. An error that
    all pixels share, or a bias of the change, is not in them.

    Only windows under polygons are read, in pieces of at most 1024 px. Percentiles hold the
    values under a polygon in memory, other statistics do not.

    References
    ----------
    Rolstad et al. 2009, Journal of Glaciology 55 (192): 666-680, for the standard errors.
    """
    require_zonal()
    quantity = read_quantity(height_or_change, threshold, sigma)
    names = _with_errors(resolve_stats(stats, change=quantity.change), quantity)
    grid = find_grid(quantity.values)
    placed = read_polygons(polygons, grid)
    groups = cut_pieces(placed.on_pixels, grid.shape)
    _warn_outside(placed, groups)
    values = quantity.values.transpose(..., *grid.dims)
    length = _resolve_length(quantity, correlation_length, names)
    found, length = _compute(values, quantity, placed, groups, names, length)
    return label_zones(found, length, names, values, placed)


def _with_errors(stats: tuple[str, ...], quantity: Quantity) -> tuple[str, ...]:
    if "sigma" not in quantity.layers:
        return stats
    return tuple(
        name for stat in stats for name in ((stat, f"{stat}_se") if stat in WITH_ERROR else (stat,))
    )


def _warn_outside(polygons: Polygons, groups: Sequence[Group]) -> None:
    inside = {piece.polygon for group in groups for piece in group.pieces}
    outside = [k for k in range(len(polygons.given)) if k not in inside]
    if outside:
        names = next(iter(polygons.labels.values()))
        shown = ", ".join(str(names[k]) for k in outside[:5]) + ("..." if len(outside) > 5 else "")
        warnings.warn(
            f"{len(outside)} of {len(polygons.given)} polygons are empty or outside the raster, "
            f"and NaN in the result: {shown}",
            UserWarning,
            stacklevel=3,
        )


def _resolve_length(
    quantity: Quantity, given: float | None, names: Sequence[str]
) -> float | Literal["estimate"] | None:
    """Return the correlation length, None if none is needed, or that it is to be estimated."""
    if given is not None and not (np.isfinite(given) and given >= 0):
        raise CHMv2Error(
            "a correlation length of 0 m or more",
            f"{given}",
            "give the radius of what counts as one error: correlation_length=10.0",
        )
    if not any(name.endswith("_se") for name in names):
        return None
    if given is not None or quantity.length is not None:
        return float(given if given is not None else quantity.length or 0.0)
    if not quantity.change:
        raise CHMv2Error(
            "a correlation length of the errors, with sigma",
            "none, and heights, whose own pattern says nothing of their errors",
            "give it: correlation_length=10.0, or estimate it from the difference to a reference: "
            "xchmv2.change.correlation_length(height - reference)",
        )
    return "estimate"


def _compute(
    values: xr.DataArray,
    quantity: Quantity,
    polygons: Polygons,
    groups: Sequence[Group],
    names: Sequence[str],
    length: float | Literal["estimate"] | None,
) -> tuple[Any, Any]:
    """Return an array (names, dates, polygons) and the correlation length, lazily where it is."""
    import shapely

    rules = _rules(quantity, names)
    cells = cell_areas(values)
    layers = {"area": cells.data, **_layers(quantity.layers, values)}
    flat = values.data.reshape(-1, *values.shape[-2:])
    windows = spread_windows(values.shape[-2:])
    estimate = partial(estimate_length, cell=_central_area(cells))
    sizes = shapely.area(polygons.on_pixels)
    shape = (len(names), flat.shape[0], len(sizes))
    join = partial(finish, names=tuple(names), sizes=sizes, dates=shape[1])
    wanted = length == "estimate"
    if values.chunks is not None:
        join = join if wanted else partial(join, length=length)
        task = (estimate, windows) if wanted else None
        found, estimated = lazy_sums(flat, layers, groups, rules, join, shape, task)
        return found, estimated if wanted else length
    if wanted:
        length = estimate([cut_layer(flat, window) for window in windows])
    summed = [
        sum_group(
            group,
            rules,
            cut_layer(flat, group.window),
            {name: cut_layer(layer, group.window) for name, layer in layers.items()},
        )
        for group in groups
    ]
    return join(summed, length=length), length


def _central_area(cells: xr.DataArray) -> float:
    """Return the area of the pixel in the middle; of a lazy raster no data are read for it."""
    return float(cells[tuple(size // 2 for size in cells.shape)].compute(scheduler="synchronous"))


def _rules(quantity: Quantity, names: Sequence[str]) -> Rules:
    wanted = {name.removesuffix("_se") for name in names}
    return Rules(
        percentiles=any(percentile_of(name) is not None for name in wanted),
        change=bool(wanted & set(CHANGE_STATS)),
        threshold=quantity.threshold,
    )


def _layers(layers: Mapping[str, Any], values: xr.DataArray) -> dict[str, Any]:
    """Bring layers onto the values' grid: numbers, or arrays (H, W) or (D, H, W)."""
    placed = {}
    dims = values.dims[-2:]
    for name, layer in layers.items():
        if not isinstance(layer, xr.DataArray) or not layer.ndim:
            placed[name] = np.asarray(layer, np.float64)
            continue
        _validate_layer(name, layer, values)
        if set(layer.dims) <= set(dims):
            layer = layer.broadcast_like(values.isel({d: 0 for d in values.dims[:-2]}, drop=True))
            layer = layer.transpose(*dims)
        else:
            layer = layer.broadcast_like(values).transpose(*values.dims)
        data = layer.data.reshape(-1, *layer.shape[-2:]) if layer.ndim > 2 else layer.data
        placed[name] = data if values.chunks is not None else np.asarray(data)
    return placed


def _validate_layer(name: str, layer: xr.DataArray, values: xr.DataArray) -> None:
    try:
        xr.align(layer, values, join="exact", copy=False)
        fits = set(layer.dims) <= set(values.dims)
    except ValueError:
        fits = False
    if not fits:
        raise CHMv2Error(
            f"{name} on the grid of the values, {dict(values.sizes)}",
            f"{dict(layer.sizes)}, or other coordinates",
            f"bring it there: {name}.interp_like(values)",
        )
