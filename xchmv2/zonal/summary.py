"""zonal(): statistics of heights and changes under polygons."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy.stats import norm

from xchmv2.errors import CHMv2Error
from xchmv2.raster import cell_areas, find_grid, has_true_areas, is_crs_variable, without_nodata
from xchmv2.zonal.polygons import Polygons, read_polygons, require_zonal
from xchmv2.zonal.zone_statistics import (
    CHANGE_STATS,
    WITH_ERROR,
    Group,
    Rules,
    cut_layer,
    cut_pieces,
    estimate_length,
    finish,
    label,
    lazy_sums,
    percentile_of,
    resolve_stats,
    spread_windows,
    sum_group,
)


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

    Examples
    --------
    >>> summary = height.chmv2.zonal(stands, stats=("mean", "p95"))
    >>> table = xchmv2.zonal.to_table(summary)
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0, correlation_length=5.0)
    >>> lost = change.chmv2.zonal(stands)["loss_area"]
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


def label_zones(
    found: Any,
    length: Any,
    names: Sequence[str],
    values: xr.DataArray,
    polygons: Polygons,
) -> xr.Dataset:
    """Name dims, coordinates and units.

    Parameters
    ----------
    found : array, shape (names, dates, polygons)
        Statistics.
    length : float, 0-d array or None
        Correlation length behind the standard errors.
    names : sequence of str
        Of the statistics.
    values : DataArray
        What they are of, spatial dims last.
    polygons : Polygons
        What they are under.

    Returns
    -------
    Dataset
        With an xvec index of the polygons.
    """
    import xvec  # noqa: F401  (registers .xvec)

    further = values.dims[:-2]
    sizes = [values.sizes[dim] for dim in further]
    of = "change" if values.name == "height_change" else str(values.attrs.get("long_name", "value"))
    units, square = str(values.attrs.get("units", "m")), _square(values)
    variables = {
        name: ((*further, "geometry"), layer.reshape(*sizes, -1), label(name, of, units, square))
        for name, layer in zip(names, found, strict=True)
    }
    coords = {"geometry": polygons.given, **_kept(values), **_names(polygons, names, values)}
    result = xr.Dataset(variables, coords)
    if length is not None:
        attrs = {"long_name": "radius of the disc that counts as one independent error"}
        if square:
            attrs["units"] = "m"
        result["correlation_length"] = ((), length, attrs)
    for variable in result.data_vars.values():
        variable.encoding = {"_FillValue": np.nan}
    labelled: xr.Dataset = result.xvec.set_geom_indexes("geometry", crs=polygons.crs)
    return labelled


def _square(values: xr.DataArray) -> str | None:
    """Return the unit of areas, known with a CRS or where the coordinates are said to be metres."""
    if has_true_areas(values):
        return "m2"
    units = {values[dim].attrs.get("units") for dim in values.dims[-2:] if dim in values.coords}
    return "m2" if units and units <= {"m", "metre", "meter"} else None


def _kept(values: xr.DataArray) -> dict[Any, xr.DataArray]:
    """Return the coordinates that are not of the pixels, such as time."""
    plane = set(values.dims[-2:])
    return {
        name: coord.drop_vars([other for other in coord.coords if other != name])
        for name, coord in values.coords.items()
        if not set(coord.dims) & plane and not is_crs_variable(coord) and name != "spatial_ref"
    }


def _names(
    polygons: Polygons, taken: Sequence[str], values: xr.DataArray
) -> dict[str, tuple[str, Any]]:
    """Return what names the polygons, under names that nothing else has."""
    used = {
        *taken,
        "geometry",
        "correlation_length",
        *map(str, values.coords),
        *map(str, values.dims),
    }
    return {
        f"polygon_{name}" if name in used else name: ("geometry", column)
        for name, column in polygons.labels.items()
    }


def to_table(zones: xr.Dataset) -> Any:
    """Turn statistics of polygons into a GeoDataFrame, to map, join or save.

    Parameters
    ----------
    zones : Dataset
        From :func:`xchmv2.zonal.zonal`; computed if it is lazy.

    Returns
    -------
    GeoDataFrame
        One row for each polygon, and date where there are several; in the polygons' CRS. Column
        names are those of the Dataset's variables and coordinates.
    """
    require_zonal()
    import geopandas

    crs = zones.xindexes["geometry"].crs  # type: ignore[attr-defined]
    further = [dim for dim in zones.dims if dim != "geometry"]
    shapes = zones["geometry"].values
    # Polygons by number: two equal ones stay two.
    flat = zones.drop_vars("geometry").reset_coords()
    frame = flat.to_dataframe(dim_order=[*further, "geometry"]).reset_index()
    frame["geometry"] = shapes[frame["geometry"]]
    first = [*further, *(str(name) for name in zones.coords if zones[name].dims == ("geometry",))]
    first = [str(name) for name in first if name != "geometry" and name in frame]
    rest = [name for name in frame if name not in first and name != "geometry"]
    return geopandas.GeoDataFrame(frame[[*first, *rest, "geometry"]], crs=crs)


#: Change from which on a pixel is lost or gained, where no significance is known [m].
THRESHOLD = 5.0
CHANGE_NAME = "height_change"


@dataclass(frozen=True, eq=False)
class Quantity:
    """Values, and what is known of them.

    Parameters
    ----------
    values : DataArray
        Heights or changes [m].
    change : bool
        Whether they are changes.
    threshold : float or None
        Change from which on a pixel is lost or gained; None: the layer ``changed`` tells.
    layers : dict of str to DataArray or float
        ``sigma``: standard deviation of the error [m]; ``changed`` and ``least``: significant
        pixels and their level of detection [m].
    length : float or None
        Correlation length that came with the values [m].
    """

    values: xr.DataArray
    change: bool
    threshold: float | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    length: float | None = None


def read_quantity(
    values: xr.DataArray | xr.Dataset,
    threshold: float | None,
    sigma: float | xr.DataArray | None,
) -> Quantity:
    """Tell heights from changes and find what comes with them.

    Parameters
    ----------
    values : DataArray or Dataset
        Heights; a change named ``height_change``; or a Dataset from ``difference``.
    threshold : float, optional
        Change that counts [m].
    sigma : float or DataArray, optional
        Standard deviation of the error of a value [m].

    Returns
    -------
    Quantity
        Lazy where the values are.

    Raises
    ------
    CHMv2Error
        If there are neither heights nor changes, or a threshold or sigma that cannot be.
    """
    _validate(threshold, sigma)
    if isinstance(values, xr.Dataset):
        if CHANGE_NAME not in values:
            return Quantity(_only_height(values), False, layers=_given(sigma))
        return _read_change(values, threshold, sigma)
    if not isinstance(values, xr.DataArray):
        raise CHMv2Error(
            "heights or changes as a DataArray or a Dataset",
            type(values).__name__,
            "open them: xchmv2.open_zarr(...)",
        )
    change = values.name == CHANGE_NAME
    values = without_nodata(values)
    if threshold is not None and not change:
        raise CHMv2Error(
            "a change, where there is a threshold of loss and gain",
            f"an array named {values.name!r}",
            f"if it is a change, say so: change.rename({CHANGE_NAME!r})",
        )
    limit = (THRESHOLD if threshold is None else float(threshold)) if change else None
    return Quantity(values, change, limit, _given(sigma))


def _validate(threshold: float | None, sigma: float | xr.DataArray | None) -> None:
    if threshold is not None and not (np.isfinite(threshold) and threshold > 0):
        raise CHMv2Error(
            "a threshold above 0 m, the size of a change that counts",
            f"{threshold}",
            "give loss and gain one positive number: threshold=5.0",
        )
    if sigma is None or (isinstance(sigma, xr.DataArray) and sigma.chunks is not None):
        return
    least = float(sigma.min()) if isinstance(sigma, xr.DataArray) else float(sigma)
    missing = isinstance(sigma, xr.DataArray) and np.isnan(least)
    if not (missing or (np.isfinite(least) and least >= 0)):
        raise CHMv2Error(
            "sigma, a standard deviation of 0 m or more",
            f"{least}",
            "give the error of one pixel: sigma=4.0",
        )


def _given(sigma: float | xr.DataArray | None) -> dict[str, Any]:
    return {} if sigma is None else {"sigma": sigma}


def _only_height(dataset: xr.Dataset) -> xr.DataArray:
    if "canopy_height" in dataset:
        return without_nodata(dataset["canopy_height"])
    raise CHMv2Error(
        f"a Dataset with {CHANGE_NAME} or canopy_height",
        f"{[str(name) for name in dataset.data_vars]}",
        "choose the variable: dataset['...']",
    )


def _read_change(
    dataset: xr.Dataset, threshold: float | None, sigma: float | xr.DataArray | None
) -> Quantity:
    change = dataset[CHANGE_NAME]
    layers = _given(sigma)
    if sigma is None and "level_of_detection" in dataset:
        confidence = _find_attr(dataset, "confidence")
        if confidence is not None:
            quantile = float(norm.ppf(0.5 + float(confidence) / 2))
            layers["sigma"] = dataset["level_of_detection"] / quantile
    length = _find_attr(dataset, "correlation_length")
    length = None if length is None or not np.isfinite(float(length)) else float(length)
    if threshold is None and {"significant", "level_of_detection"} <= set(dataset.data_vars):
        layers["changed"] = dataset["significant"].fillna(0).astype(bool)
        layers["least"] = dataset["level_of_detection"]
        return Quantity(change, True, None, layers, length)
    return Quantity(change, True, float(threshold or THRESHOLD), layers, length)


def _find_attr(dataset: xr.Dataset, name: str) -> Any:
    """Find a number in the attributes of the level of detection, the change or the Dataset."""
    holders = [dataset.get("level_of_detection"), dataset[CHANGE_NAME], dataset]
    for holder in holders:
        found = None if holder is None else holder.attrs.get(name)
        if isinstance(found, int | float | np.number):
            return found
    return None
