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
from xchmv2.imagery.resampling import LONGEST_SIDE, WindowReader, refuse_geographic, resolve_target
from xchmv2.raster import (
    Grid,
    ValidPixels,
    crs_label,
    find_crs,
    find_grid,
    georeference,
    on_same_coordinates,
    resolve_nodata,
    same_crs,
    same_grid,
    show,
    validate_number,
    validate_raster,
    with_crs_variables,
    without_lost_mapping,
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
    pixel_size: float | None = None,
) -> tuple[Scene, Grid, WindowReader, tuple[Range, Range, Range]]:
    """Validate imagery for the model and choose the grid to predict on; nothing is computed.

    The options are those of :func:`xchmv2.predict.predict`. Returns the scene (bands, mask and
    grid, lazy where the imagery is), the grid of the prediction, the reader from source pixels to
    its windows, and the values that stand for black and white in each band. An ImageryError refuses
    imagery that does not fit the model, a CHMv2Error ``nodata``, ``erode``, ``resolution`` or
    ``pixel_size`` that is no number, or below 0 where it must not be.
    """
    validate_raster(
        imagery,
        "imagery",
        "give an array its bands, coordinates and CRS: xr.DataArray(array, {'y': y, 'x': x}, "
        "('band', 'y', 'x')).rio.write_crs('EPSG:...')",
        name="imagery",
        error=ImageryError,
    )
    _validate_numbers(nodata, erode, resolution, pixel_size)
    if pixel_size is not None:
        imagery = without_lost_mapping(imagery)
    scene = read_scene(imagery, bands, valid)
    arrays = [band.plane for band in scene.bands]
    if pixel_size is not None:
        scene = replace(scene, grid=_state_pixel_size(scene.grid, pixel_size))
    refuse_geographic(scene.grid, arrays[0], imagery)
    target, rows, cols = resolve_target(scene.grid, resolution)
    ranges = resolve_value_range(arrays, value_range)
    common = imagery.attrs if isinstance(imagery, xr.Dataset) else None
    valid_pixels = ValidPixels(resolve_nodata(arrays, nodata, common=common), erode)
    return scene, target, WindowReader(valid_pixels, rows, cols), ranges


@dataclass(frozen=True, eq=False)
class Scene:
    """Validated imagery: north up, dims in the order (..., band, y, x).

    `mask`: boolean pixels declared valid, (..., y, x); `dims`: the imagery's own order of dims,
    without ``band``; `flipped`: the indexer that turns the dims from their order in the imagery to
    north up, and back.
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
        return self.bands[0].plane


def read_scene(
    imagery: xr.Dataset | xr.DataArray, bands: Sequence[Hashable] | None, valid: xr.DataArray | None
) -> Scene:
    """Find bands and grid, turn the imagery north up, bring dims into one order; lazily.

    `valid` are pixels declared valid, on the imagery's grid, with all its dims or fewer. An
    ImageryError refuses bands, dims, sizes, grid or mask that do not fit.
    """
    _validate_mask_type(valid)
    chosen = select_bands(with_crs_variables(imagery), bands)
    given = chosen[0].array
    if 0 in given.shape:
        raise ImageryError(
            "imagery with at least one pixel",
            f"sizes {dict(given.sizes)}",
            "widen the selection; a slice along a descending y runs from high to low",
        )
    chosen = _georeferenced(chosen)
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
    valid = valid.assign_coords(  # on the corners of pixels, where the imagery was
        {d: chosen[0].array[d].variable for d in grid.dims if d in valid.dims and d in given.coords
         and d in valid.coords and valid[d].equals(given[d])}
    )  # fmt: skip
    mask = valid.isel({dim: turn for dim, turn in flipped.items() if dim in valid.dims})
    return replace(scene, mask=_place_mask(mask, scene.template))


def _georeferenced(bands: tuple[Band, Band, Band]) -> tuple[Band, Band, Band]:
    """Give each band coordinates of pixel centres and one CRS, the same for all."""
    arrays = {id(band.array): band.array for band in bands}
    true = {key: georeference(array) for key, array in arrays.items()}
    first, *others = true.values()
    for array in others:
        crs, other = find_crs(first), find_crs(array)
        if not same_crs(crs, other):
            found = [("no CRS" if c is None else crs_label(c)) for c in (crs, other)]
            raise ImageryError(
                "red, green and blue in one CRS",
                " and ".join(found),
                "write the true one: imagery.rio.write_crs('EPSG:...')",
            )
    red, green, blue = (replace(band, array=true[id(band.array)]) for band in bands)
    return red, green, blue


def _state_pixel_size(grid: Grid, pixel_size: float) -> Grid:
    """State the ground size of pixels that no CRS tells."""
    if grid.crs is not None:
        raise ImageryError(
            "pixel_size for imagery without a CRS alone",
            f"pixel_size={pixel_size} and {crs_label(grid.crs)}",
            "leave pixel_size out: the CRS gives the size of a pixel on the ground",
        )
    tall, wide = map(abs, grid.pixel)
    if max(tall, wide) > LONGEST_SIDE * min(tall, wide):
        raise ImageryError(
            "pixels as long as wide, whose size is one number",
            f"coordinates {tall:g} apart along {grid.dims[0]}, {wide:g} along {grid.dims[1]}",
            f"if the pixels are square, drop these: imagery.drop_vars({list(grid.dims)})",
        )
    return replace(grid, side=float(pixel_size))


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
            "bring each onto the first one's: imagery['green'].odc.reproject("
            "imagery['red'].odc.geobox, dst_nodata=0)",
        )
    return xr.broadcast(*arrays)


def _validate_numbers(
    nodata: object, erode: object, resolution: object, pixel_size: object
) -> None:
    if nodata is not None and (not isinstance(nodata, Real) or isinstance(nodata, bool)):
        example = "float('nan')" if str(nodata).strip().lower() == "nan" else "0"
        raise CHMv2Error(
            "nodata as one number",  # NaN and infinity are numbers here
            f"nodata={show(nodata)}",
            f"for example .predict(..., nodata={example})",
        )
    validate_number("resolution", resolution, 0.6, unit="m", optional=True)
    validate_number("pixel_size", pixel_size, 0.6, above=0, unit="m", optional=True)
    validate_number("erode", erode, 2, least=0, unit="px", whole=True)


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
        fix=f"bring it onto them: {_advise_mask(valid, template)}",
        error=ImageryError,
    )
    return valid.broadcast_like(template).transpose(*template.dims)


def _advise_mask(valid: xr.DataArray, template: xr.DataArray) -> str:
    """Write the call that brings a mask onto the imagery's coordinates."""
    grid = find_grid(template)
    if set(grid.dims) <= set(valid.dims):
        there = find_crs(valid)
        if there is not None and grid.crs is not None and not same_crs(there, grid.crs):
            return "valid.astype('uint8').odc.reproject(imagery.odc.geobox, dst_nodata=0) == 1"
        if not same_grid(valid, template):
            own = ", ".join(f"{dim!r}: imagery[{dim!r}]" for dim in grid.dims)
            half = min(map(abs, grid.pixel)) / 2
            how = f"method='nearest', tolerance={half:g}, fill_value=False"
            return f"valid.reindex({{{own}}}, {how})"
    own = ", ".join(f"{dim!r}: imagery[{dim!r}]" for dim in valid.dims)
    return f"valid.reindex({{{own}}}, fill_value=False)"
