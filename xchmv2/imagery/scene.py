"""Validated imagery: bands found, on one grid, north up, dims in one order."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import xarray as xr

from xchmv2.errors import ImageryError
from xchmv2.imagery.bands import BAND_DIM, Band, select_bands
from xchmv2.imagery.grid import Grid, find_grid, is_crs_variable


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
        Indexer that turns the dims between north up and as they came.
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
    def template(self) -> xr.DataArray:
        """An array with the dims and coordinates of the result, but for resampled ones."""
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
    chosen = select_bands(_with_crs_coordinate(imagery), bands)
    _validate_sizes(chosen[0].array)
    grid = find_grid(chosen[0].array)
    flipped = _flips(grid)
    arrays = [band.array.isel(flipped) for band in chosen]
    dims = tuple(dim for dim in arrays[0].dims if dim != BAND_DIM)
    order = [dim for dim in dims if dim not in grid.dims]
    red, green, blue = (
        Band(array.transpose(*order, *([BAND_DIM] if index is not None else []), *grid.dims), index)
        for array, index in zip(_same_dims(arrays), (b.index for b in chosen), strict=True)
    )
    template = Scene((red, green, blue), None, find_grid(red.array), dims, flipped)
    if valid is None:
        return template
    mask = _read_mask(valid.isel({d: s for d, s in flipped.items() if d in valid.dims}), template)
    return Scene(template.bands, mask, template.grid, dims, flipped)


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
    """Dims that run south to north or east to west: the model knows shadows as they fall."""
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


def _read_mask(valid: xr.DataArray, scene: Scene) -> xr.DataArray:
    """Check the user's mask against the imagery and give it the imagery's dims."""
    template = scene.template
    if not isinstance(valid, xr.DataArray) or valid.dtype != bool:
        raise ImageryError(
            "valid as a boolean DataArray",
            f"{getattr(valid, 'dtype', type(valid).__name__)}",
            "compare it with the value that means imagery: .predict(..., valid=mask == 255)",
        )
    foreign = [dim for dim in valid.dims if dim not in template.dims]
    try:
        if foreign:
            raise ValueError(f"it has the further dims {foreign}")
        xr.align(valid, template, join="exact", copy=False)
    except ValueError as error:
        raise ImageryError(
            f"valid on the imagery's grid, dims out of {template.dims}",
            f"dims {valid.dims}, sizes {dict(valid.sizes)} ({str(error).splitlines()[0]})",
            "bring it onto that grid: valid.reindex_like(imagery, method='nearest')",
        ) from None
    return valid.broadcast_like(template).transpose(*template.dims)
