"""Validated imagery: bands found, on one grid, north up, with the grid to predict on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import xarray as xr

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery.bands import (
    BAND_DIM,
    Band,
    Range,
    ValueRange,
    resolve_value_range,
    select_bands,
)
from xchmv2.imagery.resampling import WindowReader, resolve_target
from xchmv2.raster import (
    Grid,
    ValidPixels,
    find_grid,
    is_crs_variable,
    is_whole,
    on_same_coordinates,
    resolve_nodata,
    show,
    validate_raster,
)


def resolve_imagery(
    imagery: xr.Dataset | xr.DataArray,
    *,
    bands: Sequence[Hashable] | None = None,
    value_range: ValueRange | None = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
    erode: int = 0,
    resolution: float | None = None,
) -> tuple[Scene, Grid, WindowReader, tuple[Range, Range, Range]]:
    """Validate imagery for the model and choose the grid to predict on; nothing is computed.

    Parameters
    ----------
    imagery : Dataset or DataArray
        One variable per band, or an array with a ``band`` dimension; it is not modified.
    bands, value_range, nodata, valid, erode, resolution
        As for :func:`xchmv2.predict.predict`.

    Returns
    -------
    scene : Scene
        Bands, mask and grid, lazy where the imagery is.
    target : Grid
        The grid of the prediction.
    reader : WindowReader
        From source pixels to windows of the target.
    ranges : tuple of (low, high)
        Values that stand for black and white in red, green and blue.

    Raises
    ------
    ImageryError
        If the imagery does not fit the model; the message says how to make it fit.
    CHMv2Error
        If ``nodata``, ``erode`` or ``resolution`` is no number, or ``erode`` is below 0.
    """
    validate_raster(
        imagery,
        "imagery",
        "give an array its bands, coordinates and CRS: xr.DataArray(array, {'y': y, 'x': x}, "
        "('band', 'y', 'x')).rio.write_crs('EPSG:...')",
        name="imagery",
        error=ImageryError,
    )
    _validate_numbers(nodata, erode, resolution)
    scene = read_scene(imagery, bands, valid)
    target, rows, cols = resolve_target(scene.grid, resolution)
    arrays = [band.plane for band in scene.bands]
    ranges = resolve_value_range(arrays, value_range)
    valid_pixels = ValidPixels(resolve_nodata(arrays, nodata), erode)
    return scene, target, WindowReader(valid_pixels, rows, cols), ranges


@dataclass(frozen=True, eq=False)
class Scene:
    """Validated imagery: north up, dims in the order (..., band, y, x).

    Parameters
    ----------
    bands : tuple of Band
        Red, green and blue.
    mask : DataArray or None
        Boolean pixels declared valid, (..., y, x).
    grid : Grid
        Pixel grid of the imagery, north up.
    dims : tuple of Hashable
        The imagery's own order of dims, without ``band``.
    flipped : mapping
        Indexer that turns the dims from their order in the imagery to north up, and back.
    """

    bands: tuple[Band, Band, Band]
    mask: xr.DataArray | None
    grid: Grid
    dims: tuple[Hashable, ...]
    flipped: Mapping[Hashable, slice]

    @property
    def lazy(self) -> bool:
        """Whether any band is dask-backed."""
        return any(band.array.chunks is not None for band in self.bands)

    @property
    def leading_chunks(self) -> tuple[tuple[int, ...], ...]:
        """Chunks of the dims before y and x, such as time; one date each for what is in memory."""
        first = self.bands[0].array
        chunks = first.chunks or tuple((1,) * size for size in first.shape)
        return tuple(chunks[: len(self.template.dims) - 2])

    @property
    def template(self) -> xr.DataArray:
        """An array with the dims and coordinates of the result, apart from resampled ones."""
        first = self.bands[0]
        if first.index is None:
            return first.array
        return first.array.isel({BAND_DIM: first.index}, drop=True)


def read_scene(
    imagery: xr.Dataset | xr.DataArray,
    bands: Sequence[Hashable] | None,
    valid: xr.DataArray | None,
) -> Scene:
    """Find bands and grid, turn the imagery north up, bring dims into one order.

    Parameters
    ----------
    imagery : Dataset or DataArray
        One variable per band, or an array with a ``band`` dimension; it is not modified.
    bands : sequence of three names or numbers, optional
        Red, green and blue.
    valid : DataArray of bool, optional
        Pixels declared valid, on the imagery's grid, with all its dims or fewer.

    Returns
    -------
    Scene
        Lazy where the imagery is.

    Raises
    ------
    ImageryError
        If bands, dims, sizes, grid or mask do not fit.
    """
    _validate_mask_type(valid)
    chosen = select_bands(_with_crs_coordinate(imagery), bands)
    _validate_sizes(chosen[0].array)
    grid = find_grid(chosen[0].array)
    flipped = _flips(grid)
    dims = tuple(dim for dim in chosen[0].array.dims if dim != BAND_DIM)
    order = (*(dim for dim in dims if dim not in grid.dims), BAND_DIM, *grid.dims)
    turned = {  # a stacked array holds all three bands: it is turned, and later read, once
        id(array): array.isel(flipped).transpose(*order, missing_dims="ignore")
        for array in _same_dims([band.array for band in chosen])
    }
    arrays = list(turned.values()) * (3 if len(turned) == 1 else 1)
    red, green, blue = (replace(b, array=a) for a, b in zip(arrays, chosen, strict=True))
    scene = Scene((red, green, blue), None, grid.turned(tuple(flipped)), dims, flipped)
    if valid is None:
        return scene
    mask = valid.isel({dim: turn for dim, turn in flipped.items() if dim in valid.dims})
    return replace(scene, mask=_place_mask(mask, scene.template))


def _with_crs_coordinate(imagery: xr.Dataset | xr.DataArray) -> xr.Dataset | xr.DataArray:
    """Make CRS variables coordinates: a plain ``open_zarr`` leaves them among the data."""
    if isinstance(imagery, xr.DataArray):
        return imagery
    names = [name for name, variable in imagery.data_vars.items() if is_crs_variable(variable)]
    return imagery.set_coords(names)


def _validate_sizes(array: xr.DataArray) -> None:
    if 0 in array.shape:
        raise ImageryError(
            "imagery with at least one pixel",
            f"sizes {dict(array.sizes)}",
            "widen the selection; a slice along a descending y runs from high to low",
        )


def _flips(grid: Grid) -> dict[Hashable, slice]:
    """Dims that run south to north or east to west: the model knows shadows on imagery north up."""
    if grid.crs is None:
        return {}
    backwards = slice(None, None, -1)
    upside_down = (grid.pixel[0] > 0, grid.pixel[1] < 0)
    return {dim: backwards for dim, turn in zip(grid.dims, upside_down, strict=True) if turn}


def _same_dims(arrays: Sequence[xr.DataArray]) -> Sequence[xr.DataArray]:
    """Give a band that lacks a dimension of the others, such as time, that dimension."""
    if all(array.dims == arrays[0].dims for array in arrays):
        return arrays
    if len({find_grid(array).dims for array in arrays}) > 1:
        raise ImageryError(
            "red, green and blue on one grid",
            f"dims {[array.dims for array in arrays]}",
            "bring them onto one grid first: imagery.odc.reproject(...)",
        )
    return xr.broadcast(*arrays)


def _validate_numbers(nodata: object, erode: object, resolution: object) -> None:
    for name, value, example in (
        ("nodata", nodata, "nodata=float('nan')" if _spells_nan(nodata) else "nodata=0"),
        ("resolution", resolution, "resolution=0.6"),
    ):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not number:  # NaN and infinity are nodata values too
            raise CHMv2Error(
                f"{name} as one number",
                f"{name}={show(value)}",
                f"for example .predict(..., {example})",
            )
    if not is_whole(erode, 0):
        raise CHMv2Error(
            "a number of pixels, 0 or more",
            f"erode={show(erode)}",
            "pass how many pixels to trim around nodata: .predict(..., erode=2)",
        )


def _spells_nan(value: object) -> bool:
    return str(value).strip().lower() == "nan"


def _validate_mask_type(valid: object) -> None:
    if valid is None or (isinstance(valid, xr.DataArray) and valid.dtype == bool):
        return
    raise ImageryError(
        "valid as a boolean DataArray",
        f"{valid.dtype} DataArray" if isinstance(valid, xr.DataArray) else show(valid),
        "compare it with the value that stands for imagery: .predict(..., valid=mask == 255)",
    )


def _place_mask(valid: xr.DataArray, template: xr.DataArray) -> xr.DataArray:
    """Check the user's mask against the imagery and give it the imagery's dims."""
    foreign = [str(dim) for dim in valid.dims if dim not in template.dims]
    if foreign:
        raise ImageryError(
            f"valid with no other dims than {template.dims}",
            f"the further dims {foreign}",
            f"select or combine: valid.isel({foreign[0]}=0), or valid.all({foreign[0]!r})",
        )
    valid = on_same_coordinates(
        valid,
        template,
        expected="valid on the imagery's own coordinates",
        fix="bring it onto them: valid.reindex_like(imagery, method='nearest', "
        "tolerance=half a pixel, fill_value=False)",
        error=ImageryError,
    )
    return valid.broadcast_like(template).transpose(*template.dims)
