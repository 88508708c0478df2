"""Zonal statistics of heights, changes and any other raster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import dask
import numpy as np
import xarray as xr

from xchmv2.change import ErrorModel
from xchmv2.change.error_models import carried_errors, measure_errors, spread_of
from xchmv2.change.masks import THRESHOLD
from xchmv2.errors import CHMv2Error, warn
from xchmv2.raster import (
    HEIGHT_NAME,
    cell_areas,
    find_grid,
    has_true_areas,
    holds_change,
    is_crs_variable,
    name_contents,
    on_same_coordinates,
    pixel_size,
    read_change,
    read_numbers,
    read_raster,
    show,
    tell_kind,
    validate_number,
    validate_raster,
)
from xchmv2.zonal.polygons import (
    TILE,
    Pieces,
    Polygons,
    cut_pieces,
    listed,
    read_polygons,
    require_zonal,
)
from xchmv2.zonal.zone_statistics import (
    Rules,
    label_stat,
    resolve_stats,
    summarize,
)

_CHANGE_NAME = "height_change"
_BIN_SPREAD = "bin_spread"
_Sigma = float | xr.DataArray | str | None


def zonal(
    height_or_change: xr.DataArray | xr.Dataset,
    polygons: Any,
    *,
    stats: str | Sequence[str] | None = None,
    threshold: float | None = None,
    sigma: float | xr.DataArray | Literal["bin_spread"] | None = None,
    correlation_length: float | None = None,
) -> xr.Dataset:
    """Compute statistics of heights or changes in polygons, weighted by the covered area.

    Parameters
    ----------
    height_or_change : DataArray or Dataset
        Heights with dims y and x, and others such as time; a change named ``height_change``; the
        Dataset of ``difference`` or ``events``; or any other raster, such as biomass, in its own
        unit. Of a mask (bool) the statistics are those of a share.
    polygons : GeoDataFrame, GeoSeries, shapely geometry or sequence of them
        Polygons and multipolygons, with holes or without, in any CRS. Plain shapely geometries are
        in the raster's.
    stats : str or sequence of str, optional
        ``mean``, ``std``, ``min``, ``max``, ``median`` and percentiles such as ``p95``, in the
        raster's unit; ``count`` [px], ``area`` [m2] and ``valid_fraction``. Of heights also
        ``cover``, the share of the ground under canopy. Of changes also ``loss_area``,
        ``gain_area``, ``net_area`` [ha] and ``loss_volume``, ``gain_volume``, ``net_volume`` [m3].
        Default: all but percentiles and cover.
    threshold : float, optional
        Height [m] from which on a pixel is canopy, inclusive, for ``cover``; 5 m by default. Change
        [m] beyond which a pixel counts as lost or gained. Default: the pixels that ``difference``
        found significant; 5 m where there is no such layer.
    sigma : float, DataArray or "bin_spread", optional
        Standard deviation of the error of one pixel [m], on the grid of the values; "bin_spread"
        takes the variable of that name beside ``canopy_height``. Default: the one that
        ``difference`` worked with; without it there are no standard errors.
    correlation_length : float, optional
        Radius of the disc that counts as one independent error [m], 0 for independent pixels:
        errors of one range. Default: the errors that ``difference`` measured or was given, else
        those that the change shows on unchanged pixels, at several ranges.

    Returns
    -------
    Dataset
        One variable for each statistic, float64 with dims (further dims, geometry); where sigma is
        known, standard errors as ``mean_se`` and so on. Coordinates: ``geometry``, the polygons
        with their CRS (an xvec index), their index and columns. Lazy where the input is.

    Raises
    ------
    CHMv2Error
        If an argument is out of range, the polygons have coordinates that are not finite, only the
        polygons or only the raster have a CRS, or sigma is given for heights without a correlation
        length.

    Warns
    -----
    UserWarning
        If polygons lie outside the raster, so that their statistics are NaN; are invalid, such as
        those that cross themselves, and were repaired; or have sides over more than 180 degrees of
        longitude, which are taken to cross 180 degrees.

    Notes
    -----
    Means and standard deviations are weighted by covered area on the ground. Loss and gain are
    gross sums over the pixels that count. ``net_volume`` is the sum over all pixels, so it is not
    the difference of the two.

    Standard errors are those of repeated measurement, for errors with the given standard deviation
    and the correlation of an :class:`~xchmv2.change.ErrorModel`: the variance of a mean is the sum
    over all pairs of pixels of their weights, errors and correlation, whatever the polygon's shape.
    Those of areas and of cover come from pixels so near the threshold that another measurement
    might have put them on its other side. With the standard normal distribution function F, a
    pixel of height h and error s lies above a threshold t with the chance p = F((h - t) / s); of n
    pixels with areas w and the mean correlation R of their pairs, the variance of the cover is
    n R sum(w^2 p (1 - p)) / sum(w)^2. Standard errors do not include an error that all pixels
    share, or a bias of the change.

    Only chunks under polygons are read, each once. Percentiles keep the values in a polygon in
    memory, other statistics do not.

    References
    ----------
    Hugonnet et al. 2022, IEEE JSTARS 15: 6456-6472, for the standard errors.

    Examples
    --------
    >>> summary = height.chmv2.zonal(stands, stats=("mean", "p95"))
    >>> table = xchmv2.zonal.to_table(summary)
    >>> cover = height.chmv2.zonal(stands, stats="cover", threshold=2.0)["cover"]
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0, correlation_length=5.0)
    >>> lost = change.chmv2.zonal(stands)["loss_area"]
    """
    require_zonal()
    quantity = _read_quantity(height_or_change, threshold, sigma)
    names = resolve_stats(
        stats, change=quantity.change, cover=quantity.height, errors="sigma" in quantity.layers
    )
    if threshold is not None and not quantity.change and "cover" not in names:
        raise CHMv2Error(
            "stats='cover', or a change of height, with threshold=",
            f"stats={show(stats)} of an array named {quantity.values.name!r}",
            f"if it is a change, name it so: change.rename({_CHANGE_NAME!r}); for cover "
            "pass stats='cover'",
        )
    grid = find_grid(quantity.values)
    quantity = replace(quantity, values=quantity.values.transpose(..., *grid.dims))
    placed = read_polygons(polygons, grid)
    pieces = cut_pieces(placed.on_pixels, grid.shape)
    _warn_outside(placed, pieces)
    errors = _resolve_errors(quantity, correlation_length, names)
    found, length = _summarize(quantity, placed, pieces, names, errors)
    return _label(found, length, names, quantity, placed)


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


def _warn_outside(polygons: Polygons, pieces: Pieces) -> None:
    outside = np.ones(len(polygons.given), bool)
    outside[pieces.polygon] = False
    if outside.any():
        names = next(iter(polygons.labels.values()))
        warn(f"{listed(names, outside)} are empty or outside the raster; their statistics are NaN")


def _resolve_errors(
    quantity: _Quantity, length: float | None, names: Sequence[str]
) -> ErrorModel | None:
    """Return the errors of the values; None if no standard error is wanted."""
    validate_number("correlation_length", length, 10.0, least=0, unit="m", optional=True)
    if not any(name.endswith("_se") for name in names):
        return None
    if length is not None:
        return ErrorModel.of_one_range(float(length))
    if quantity.errors is not None:
        return quantity.errors
    if not quantity.change:
        raise CHMv2Error(
            "standard errors of heights need the correlation length of their errors, which heights "
            "alone do not show",
            fix="pass such as correlation_length=10.0, or estimate it from the difference to a "
            "reference: xchmv2.change.correlation_length(height - reference)",
        )
    values = quantity.values
    further = values.dims[:-2]
    planes = [
        values.isel(dict(zip(further, k, strict=True)), drop=True)
        for k in np.ndindex(values.shape[:-2])
    ]
    return measure_errors([(plane,) for plane in planes], None)


def _summarize(
    quantity: _Quantity,
    polygons: Polygons,
    pieces: Pieces,
    names: tuple[str, ...],
    errors: ErrorModel | None,
) -> tuple[Any, Any]:
    """Return an array (names, dates, polygons) and the correlation length, lazy as the values."""
    values = quantity.values.chunk()  # in memory: one chunk
    cells = cell_areas(values.chunk(dict.fromkeys(values.dims[-2:], TILE)))
    layers = {"area": cells.data, **_place_layers(quantity.layers, values)}
    layers["value"] = values.data.reshape(-1, *values.shape[-2:])
    if errors is None:  # no standard error is wanted
        layers.pop("sigma", None)
    rules, sides = Rules(names, quantity.threshold), pixel_size(values)
    found = summarize(layers, polygons.on_pixels, pieces, rules, errors, sides)
    length = None if errors is None else errors.correlation_length(sides[0] * sides[1])
    if quantity.values.chunks is not None:
        return found, length
    computed: tuple[Any, Any] = dask.compute(found, length, scheduler="synchronous")
    return computed


def _place_layers(layers: dict[str, Any], values: xr.DataArray) -> dict[str, Any]:
    """Return layers on the grid of the values: numbers, or dask arrays (H, W) or (D, H, W)."""
    placed = {}
    dims = values.dims[-2:]
    plane = values.isel({dim: 0 for dim in values.dims[:-2]}, drop=True)
    for name, layer in layers.items():
        if not isinstance(layer, xr.DataArray) or not layer.ndim:
            placed[name] = np.asarray(layer, np.float64)
            continue
        layer = on_same_coordinates(
            layer,
            values,
            expected=f"{name} on the grid of the values, {dict(values.sizes)}",
            fix=f"interpolate it: {name}.interp_like(height)",
        )
        whole = plane if set(layer.dims) <= set(dims) else values
        layer = layer.broadcast_like(whole).transpose(*whole.dims).chunk()
        placed[name] = layer.data.reshape(-1, *layer.shape[-2:]) if layer.ndim > 2 else layer.data
    return placed


def _label(
    found: Any, length: Any, names: Sequence[str], quantity: _Quantity, polygons: Polygons
) -> xr.Dataset:
    """Name dims, coordinates and units of an array (names, dates, polygons)."""
    import xvec  # noqa: F401  (registers .xvec)

    values = quantity.values
    further, square = values.dims[:-2], _square(values)
    sizes = [values.sizes[dim] for dim in further]
    variables = {
        name: (
            (*further, "geometry"),
            layer.reshape(*sizes, -1),
            label_stat(name, quantity.of, quantity.units, square, quantity.threshold),
        )
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
    """Return the unit of areas, which a CRS or the units of the coordinates tell."""
    if has_true_areas(values):
        return "m2"
    units = {values[dim].attrs.get("units") for dim in values.dims[-2:] if dim in values.coords}
    return "m2" if units and units <= {"m", "metre", "meter"} else None


def _kept(values: xr.DataArray) -> dict[Any, xr.DataArray]:
    """Return the coordinates without a spatial dim, such as time."""
    plane = set(values.dims[-2:])
    return {
        name: coord.drop_vars([other for other in coord.coords if other != name])
        for name, coord in values.coords.items()
        if not set(coord.dims) & plane and not is_crs_variable(coord) and name != "spatial_ref"
    }


def _names(
    polygons: Polygons, taken: Sequence[str], values: xr.DataArray
) -> dict[str, tuple[str, Any]]:
    """Return the index and the columns of the polygons, under names that are free."""
    used = {*taken, "geometry", "correlation_length", *values.coords, *values.dims}
    return {
        f"polygon_{name}" if name in used else name: ("geometry", column)
        for name, column in polygons.labels.items()
    }


@dataclass(frozen=True, eq=False)
class _Quantity:
    """Values with spatial dims last, with their name, unit and errors."""

    values: xr.DataArray
    of: str
    units: str | None
    #: ``sigma``: standard deviation of the error [m]; ``changed`` and ``least``: significant
    #: pixels and their level of detection [m].
    layers: dict[str, Any]
    change: bool = False
    height: bool = False
    #: Height from which on a pixel is canopy, or change from which on it is lost or gained; None
    #: where the layer ``changed`` says so.
    threshold: float | None = None
    #: Errors that came with the values.
    errors: ErrorModel | None = None


def _read_quantity(
    given: xr.DataArray | xr.Dataset, threshold: float | None, sigma: _Sigma
) -> _Quantity:
    """Read heights, a change or another raster, with the error and significance it carries."""
    if isinstance(sigma, str):
        if sigma != _BIN_SPREAD or not isinstance(given, xr.Dataset) or sigma not in given:
            raise CHMv2Error(
                f"sigma as a number or a DataArray, or {_BIN_SPREAD!r} of a Dataset that holds it",
                f"{sigma!r} of {name_contents(given)}",
                "pass such as sigma=4.0",
            )
        sigma = given[sigma]
    layers: dict[str, Any] = {} if sigma is None else {"sigma": sigma}
    if isinstance(sigma, xr.DataArray):
        layers["sigma"] = read_numbers(sigma)
    _validate(threshold, layers.get("sigma"))
    validate_raster(given, "heights or changes", "open them: xchmv2.open_zarr(...)")
    if holds_change(given):
        values = read_change(given)
        limit = float(THRESHOLD if threshold is None else threshold)
        quantity = _Quantity(values, "change", "m", layers, change=True, threshold=limit)
        if isinstance(given, xr.Dataset) and _CHANGE_NAME in given:
            return _with_significance(quantity, given, threshold)
        return quantity
    if isinstance(given, xr.Dataset):
        given = _only_height(given)
    height = tell_kind(given) in ("height", "unknown")
    limit = float(THRESHOLD if threshold is None else threshold)
    return _Quantity(*_read_values(given), layers, height=height, threshold=limit)


def _read_values(array: xr.DataArray) -> tuple[xr.DataArray, str, str | None]:
    """Read values other than a change, with their name and unit."""
    kind, called = tell_kind(array), array.attrs.get("long_name")
    if kind == "mask":
        shares = array.astype(np.float32)
        # A comparison keeps the name and attributes of what it compares.
        own = tell_kind(shares) in ("unknown", "other") and array.attrs.get("units") in (None, "1")
        return shares, str(called if own and called else "share"), "1"
    values = read_raster(array)
    units = values.attrs.get("units", "m" if kind == "height" else None)
    return values, str(called or "value"), None if units is None else str(units)


def _validate(threshold: float | None, sigma: float | xr.DataArray | None) -> None:
    validate_number("threshold", threshold, 5.0, above=0, unit="m", optional=True)
    if isinstance(sigma, xr.DataArray):
        if sigma.chunks is not None or bool(sigma.isnull().all()):
            return
        sigma = float(sigma.min())
    validate_number("sigma", sigma, 4.0, least=0, unit="m", optional=True)


def _only_height(dataset: xr.Dataset) -> xr.DataArray:
    if HEIGHT_NAME in dataset:
        return dataset[HEIGHT_NAME]
    raise CHMv2Error(
        f"a Dataset with {_CHANGE_NAME} or canopy_height",
        f"{[str(name) for name in dataset.data_vars]}",
        "choose the variable: dataset['...']",
    )


def _with_significance(
    quantity: _Quantity, dataset: xr.Dataset, threshold: float | None
) -> _Quantity:
    """Add the error and the significant pixels that ``difference`` found."""
    layers = dict(quantity.layers)
    detection = dataset.get("level_of_detection")
    own = spread_of(dataset)
    if "sigma" not in layers and own is not None:
        layers["sigma"] = own
    errors = carried_errors(dataset)
    if threshold is not None or detection is None or "significant" not in dataset:
        return replace(quantity, layers=layers, errors=errors)
    layers["changed"] = dataset["significant"].fillna(0).astype(bool)
    layers["least"] = detection
    return replace(quantity, threshold=None, layers=layers, errors=errors)
