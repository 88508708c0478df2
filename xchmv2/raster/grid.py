"""The regular pixel grid of a raster, read from its coordinates and CRS."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import odc.geo.xr
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.raster.crs import (
    crs_coordinates,
    crs_label,
    find_crs,
    is_crs_variable,
    read_crs,
    same_crs,
    with_crs_variables,
)
from xchmv2.raster.tiling import origin_index
from xchmv2.raster.valid_pixels import resolve_nodata

# Largest deviation of coordinates from their grid, and between two grids, as a share of a pixel.
_TOLERANCE = 0.01
#: Pixel numbers further apart than this are taken for coordinates: few images are thinned more.
_MOST_SKIPPED = 100
#: No image has more rows or columns [px].
_LONGEST = 1_000_000


@dataclass(frozen=True)
class Grid:
    """The regular pixel grid of an image.

    `dims`: names of the vertical and the horizontal dimension; `shape`: (height, width) [px];
    `crs`: an odc-geo CRS, if any; `edges`: coordinates of the outer edges of the first row and the
    first column; `pixel`: signed sizes (vertical, horizontal) in the coordinates' units; `side`: of
    a pixel on the ground [m], where it is stated because there is no CRS.
    """

    dims: tuple[str, str]
    shape: tuple[int, int]
    crs: Any = None
    edges: tuple[float, float] = (0.0, 0.0)
    pixel: tuple[float, float] = (1.0, 1.0)
    side: float | None = None

    @property
    def origin(self) -> tuple[int, int]:
        """Index of the first pixel counted from the CRS origin; zeros without a CRS."""
        if self.crs is None:
            return (0, 0)
        y, x = (origin_index(e, p) for e, p in zip(self.edges, self.pixel, strict=True))
        return (y, x)

    def turned(self, dims: tuple[Hashable, ...]) -> Grid:
        """Return the same pixels in reverse order along some dims."""
        edges, pixel = list(self.edges), list(self.pixel)
        for axis, dim in enumerate(self.dims):
            if dim in dims:
                edges[axis] += pixel[axis] * self.shape[axis]
                pixel[axis] = -pixel[axis]
        return replace(self, edges=(edges[0], edges[1]), pixel=(pixel[0], pixel[1]))

    @property
    def geobox(self) -> GeoBox:
        """The same grid as an odc-geo GeoBox."""
        (top, left), (dy, dx) = self.edges, self.pixel
        return GeoBox(self.shape, Affine(dx, 0.0, left, 0.0, dy, top), self.crs)


def find_grid(array: xr.DataArray) -> Grid:
    """Read the pixel grid of an array from its two spatial dims, coordinates and CRS.

    Edges and signed pixel sizes are in the coordinates' units. Without a CRS, an axis that has no
    coordinates counts pixels from its first edge. An ImageryError refuses an array without spatial
    dims, an empty dim, and pixels that are not on a regular grid.
    """
    dims = _spatial_dims(array)
    for dim in dims:
        if dim in array.coords and array[dim].dtype.kind not in "fiu":
            levels = array.indexes[dim].nlevels > 1
            raise ImageryError(
                f"one number for each row or column as {dim}",
                f"{'several levels' if levels else array[dim].dtype}",
                f"reset them: array.reset_index({dim!r}).assign_coords({dim}=numbers)"
                if levels
                else f"convert them: array.assign_coords({dim}=array[{dim!r}].astype(float))",
            )
    shape = (array.sizes[dims[0]], array.sizes[dims[1]])
    crs, name = read_crs(array)
    stored = _transform(array, name)
    if crs is not None:
        _refuse_pixel_numbers(array, dims, crs, stored)
        array = _with_coordinates(array, dims, stored)
    pixels = _pixels(array, dims, crs, stored)
    edges = tuple(
        float(array[dim].values[0]) - place * pixel if dim in array.coords else 0.0
        for dim, pixel, place in zip(dims, pixels, _places(array, dims, pixels), strict=True)
    )
    return Grid(dims, shape, crs, (edges[0], edges[1]), pixels)


def validate_plane(
    array: xr.DataArray, what: str, name: str = "height", error: type[CHMv2Error] = CHMv2Error
) -> Grid:
    """Read the grid of an array that must have no dims beside y and x.

    `what` the array is and its `name` are for the error.
    """
    grid = find_grid(array)
    further = [str(dim) for dim in array.dims if dim not in grid.dims]
    if further:
        raise error(
            f"{what}, with dims {grid.dims}",
            f"further dims {further}",
            f"choose one: {name}.isel({further[0]}=0)",
        )
    return grid


def georeference(array: xr.DataArray) -> xr.DataArray:
    """Give a raster coordinates of pixel centres, and one CRS coordinate that is true.

    The CRS coordinate is that which :func:`read_crs` believes, or a new ``spatial_ref``;
    ``grid_mapping`` names it, its ``GeoTransform`` is that of the coordinates, and those that spell
    other CRS are gone. The input is not modified. Raises as :func:`find_grid` does.
    """
    grid = find_grid(array)
    crs, name = read_crs(array)
    found = array.copy(deep=False)
    if _places(array, grid.dims, grid.pixel) != _CENTRE:
        found.attrs.pop("transform")
        centres = xr_coords(grid.geobox, dims=grid.dims)
        found = found.assign_coords(
            {dim: (dim, centres[dim].values, array[dim].attrs) for dim in grid.dims}
        )
    if crs is None:
        return _with_true_transforms(found, grid)
    if name is None or not is_crs_variable(array[name]):
        name = "spatial_ref"
    coordinate = array.coords.get(name)
    if coordinate is None or not {"crs_wkt", "spatial_ref"} & set(coordinate.attrs):
        coordinate = xr_coords(grid.geobox, crs_coord_name=name, dims=grid.dims)[name]
    found = found.drop_vars(crs_coordinates(array)).assign_coords({name: coordinate.variable})
    found.attrs["grid_mapping"] = name
    found.encoding.pop("grid_mapping", None)
    return _with_true_transforms(found, grid)


def georeference_all(dataset: xr.Dataset) -> xr.Dataset:
    """Do as :func:`georeference` for a Dataset whose variables share one grid."""
    dataset = with_crs_variables(dataset)
    true = {name: georeference(array) for name, array in dataset.data_vars.items()}
    coords = next(iter(true.values())).coords
    crs = {n for array in dataset.data_vars.values() for n in crs_coordinates(array)}
    found = dataset.drop_vars(crs).assign_coords({n: c.variable for n, c in coords.items()})
    return found.assign({name: array.variable for name, array in true.items()})


def _with_true_transforms(array: xr.DataArray, grid: Grid) -> xr.DataArray:
    """Correct each ``GeoTransform``, which a selection leaves as it was."""
    if not all(dim in array.coords for dim in grid.dims):
        return array
    true = grid.geobox.transform
    stale = {}
    for name, coord in array.coords.items():
        if "GeoTransform" in coord.attrs:
            said = _as_affine(coord.attrs["GeoTransform"])
            if said is None or not _is_near(said, true):
                stale[name] = coord.variable.copy(deep=False)
                stale[name].attrs["GeoTransform"] = " ".join(map(repr, true.to_gdal()))
    return array.assign_coords(stale) if stale else array


def _is_near(one: Affine, other: Affine) -> bool:
    """Whether two transforms agree in pixel size, and in place within 1 % of a pixel."""
    sizes = np.allclose((one.a, one.e), (other.a, other.e), rtol=1e-7, atol=0)
    apart = (abs(one.c - other.c) / abs(other.a), abs(one.f - other.f) / abs(other.e))
    return bool(sizes and one.b == one.d == 0 and max(apart) <= _TOLERANCE)


def advise_reprojection(
    band: xr.DataArray, imagery: xr.DataArray | xr.Dataset, source: Any, target: Any, side: float
) -> str:
    """Write the call that reprojects imagery, and declares as nodata what lies outside.

    `band` tells dtype and nodata. `imagery` is as the user has it: it may tell its CRS in a way
    that odc-geo does not read. `source` and `target` are CRS, `side` that of a pixel in units of
    `target`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = same_crs(imagery.odc.crs, source)
    named = "" if seen else f".odc.assign_crs({crs_label(source)!r})"
    to = "imagery.odc.crs" if target.epsg is None else repr(crs_label(target))
    return f"imagery{named}.odc.reproject({to}, resolution={side:.2g}, dst_nodata={_fill(band)})"


def _fill(band: xr.DataArray) -> str:
    """Write the value of pixels without imagery: the declared nodata, else NaN or 0."""
    if band.dtype.kind not in "iu":
        return "float('nan')"
    nodata, limits = resolve_nodata([band] * 3)[0] or 0.0, np.iinfo(band.dtype)
    return str(int(nodata) if limits.min <= nodata <= limits.max else 0)


def _grid_difference(array: xr.DataArray, other: xr.DataArray) -> str | None:
    """Describe how the grids of two rasters differ: in dims, size, CRS, or coordinates.

    None if they are equal: coordinates within 1 % of a pixel, and one CRS. Where one raster lacks a
    CRS, or coordinates along a dim, those of the other are used.
    """
    grid = find_grid(other)
    dims = grid.dims
    if not set(dims) <= set(array.dims):
        return f"dims {other.dims} and {array.dims}"
    shapes = [tuple(a.sizes[dim] for dim in dims) for a in (other, array)]
    if shapes[0] != shapes[1]:
        return f"{shapes[0]} and {shapes[1]} pixels"
    crs, other_crs = find_crs(array), grid.crs
    if crs is not None and other_crs is not None and not same_crs(crs, other_crs):
        return f"{crs_label(other_crs)} and {crs_label(crs)}"
    found = (
        _offset(array, other, dim, abs(step)) for dim, step in zip(dims, grid.pixel, strict=True)
    )
    return next((said for said in found if said is not None), None)


def same_grid(array: xr.DataArray, other: xr.DataArray) -> bool:
    """Return whether two rasters share a grid: coordinates within 1 % of a pixel, and one CRS."""
    return _grid_difference(array, other) is None


def on_same_grid(array: xr.DataArray, other: xr.DataArray) -> xr.DataArray:
    """Assign an array the coordinates of another, so that arithmetic loses no pixel.

    Those along the spatial dims must be equal up to rounding: else a CHMv2Error, see
    :func:`same_grid`.
    """
    found = _grid_difference(array, other)
    if found is not None:
        raise CHMv2Error(
            "rasters on the same grid",
            found,
            "resample one first: after.odc.reproject(before.odc.geobox, resampling='bilinear')",
        )
    dims = find_grid(other).dims
    return array.assign_coords({dim: other[dim].variable for dim in dims if dim in other.coords})


def on_same_coordinates(
    array: xr.DataArray,
    other: xr.DataArray,
    *,
    expected: str,
    fix: str,
    error: type[CHMv2Error] = CHMv2Error,
) -> xr.DataArray:
    """Assign an array the grid of another; it shares any further coordinates exactly.

    `array` has some or all dims of `other`: a mask of one date, a number per date;
    ``broadcast_like(other)`` gives it the missing dims. `error`, of what it `expected` and a `fix`,
    is raised if dims, sizes, coordinates or CRS differ; see :func:`same_grid`.
    """
    try:
        if set(find_grid(other).dims) <= set(array.dims):
            array = on_same_grid(array, other)
        xr.align(array, other, join="exact", copy=False)
    except ValueError as raised:  # CHMv2Error is one
        found = raised.found if isinstance(raised, CHMv2Error) else str(raised).splitlines()[0]
    else:
        if set(array.dims) <= set(other.dims):
            return array
        found = f"other dims than {other.dims}"
    raise error(expected, f"sizes {dict(array.sizes)} ({found})", fix)


def _offset(array: xr.DataArray, other: xr.DataArray, dim: str, step: float) -> str | None:
    if dim not in array.coords or dim not in other.coords:
        return None
    here, there = (np.asarray(a[dim].values, dtype=float) for a in (array, other))
    apart = np.abs(here - there).max()
    return None if apart <= _TOLERANCE * step else f"{dim} coordinates {apart:g} apart"


def _spatial_dims(array: xr.DataArray) -> tuple[str, str]:
    dims = odc.geo.xr.spatial_dims(array)
    if dims is None:
        raise ImageryError(
            "two spatial dims named y and x",
            f"dims {array.dims}",
            "rename them: imagery.rename({...: 'y', ...: 'x'})",
        )
    return str(dims[0]), str(dims[1])


def _as_affine(words: Any) -> Affine | None:
    """Read a ``GeoTransform``, which is text, or an affine transform; None for anything else."""
    try:
        if isinstance(words, str):
            return Affine.from_gdal(*map(float, words.split()))
        return Affine(*map(float, tuple(words)[:6]))
    except (TypeError, ValueError):
        return None


def _transform(array: xr.DataArray, name: str | None) -> Affine | None:
    """Return the transform that the CRS coordinate, any other, or the attributes hold.

    It is exact, but outdated after a selection.
    """
    coords = list(array.coords.values()) if name is None else [array.coords[name]]
    words = [coord.attrs.get("GeoTransform") for coord in coords] + [array.attrs.get("transform")]
    return next((found for w in words if (found := _as_affine(w)) is not None), None)


#: Where a coordinate lies in its pixel, along y and x, as a share from the first edge.
_CENTRE = (0.5, 0.5)


def _places(
    array: xr.DataArray, dims: tuple[str, str], pixels: tuple[float, float]
) -> tuple[float, float]:
    """Find whether coordinates are of pixels' corners, as stackstac's are, by ``transform``."""
    said = _as_affine(array.attrs.get("transform"))
    if said is None or not all(dim in array.coords for dim in dims):
        return _CENTRE
    found = []
    for dim, start, size, pixel in zip(
        dims, (said.f, said.c), (said.e, said.a), pixels, strict=True
    ):
        away = (float(array[dim].values[0]) - start) / pixel
        same_size = math.isclose(abs(size), abs(pixel), rel_tol=1e-6)
        if not same_size or abs(away - round(away)) > _TOLERANCE:
            return _CENTRE
        found.append(0.0 if size * pixel > 0 else 1.0)
    return found[0], found[1]


def _refuse_pixel_numbers(
    array: xr.DataArray, dims: tuple[str, str], crs: Any, stored: Affine | None
) -> None:
    """Refuse coordinates that count pixels, beside a CRS in which they would be a place."""
    turned = any("gcps" in array[name].attrs for name in crs_coordinates(array))
    turned |= stored is not None and (stored.b != 0 or stored.d != 0)
    missing = not all(dim in array.coords for dim in dims)
    if not (turned if missing else _are_pixel_numbers(array, dims, crs, turned)):
        return
    spans = [f"{d} {array[d].values[0]:g} to {array[d].values[-1]:g}" for d in dims]
    found = f"pixel numbers, {' and '.join(spans)}" if not missing else "none"
    if turned:
        found += ", and a rotated grid"
        fix = f"resample it: {advise_reprojection(array, array, crs, crs, _side(stored))}"
    else:
        drop = [*crs_coordinates(array), *dims]
        fix = (
            f"give it those of its pixel centres: imagery.assign_coords({dims[0]}=..., "
            f"{dims[1]}=...), or state the size of a pixel instead: "
            f"imagery.drop_vars({drop}).chmv2.predict(..., pixel_size=0.6)"
        )
    raise ImageryError(f"coordinates in the unit of {crs_label(crs)}", found, fix)


def _side(transform: Affine | None) -> float:
    return 0.6 if transform is None else math.sqrt(abs(transform.determinant))


def _are_pixel_numbers(array: xr.DataArray, dims: tuple[str, str], crs: Any, turned: bool) -> bool:
    """Tell pixel numbers: whole steps along halves, from 0, or down the rows near the origin."""
    y, x = (np.asarray(array[dim].values, dtype=float) for dim in dims)
    if min(y.size, x.size) < 2:
        return turned
    step = x[1] - x[0]
    halves = all(np.array_equal(v * 2, np.round(v * 2)) for v in (y, x))
    if not halves or not 1 <= step <= _MOST_SKIPPED or step % 1 or abs(y[1] - y[0]) != step:
        return False
    from_zero = max(abs(y[0]), abs(x[0])) <= step
    near = y[1] > y[0] >= 0 and x[0] >= 0 and max(y[-1], x[-1]) < _LONGEST / 10
    return bool(from_zero or (near and (turned or not crs.geographic)))


def _with_coordinates(
    array: xr.DataArray, dims: tuple[str, str], stored: Affine | None
) -> xr.DataArray:
    """Add the coordinates implied by the transform of the CRS variable."""
    if all(dim in array.coords for dim in dims):
        return array
    if stored is None:
        raise ImageryError(
            "coordinates in the unit of the CRS",
            f"a CRS but no coordinates or transform along {dims}",
            f"give it those of its pixel centres: imagery.assign_coords({dims[0]}=..., "
            f"{dims[1]}=...)",
        )
    box = GeoBox([array.sizes[dim] for dim in dims], stored, None)
    return array.assign_coords({d: c for d, c in xr_coords(box, dims=dims).items() if d in dims})


def _pixels(
    array: xr.DataArray, dims: tuple[str, str], crs: Any, stored: Affine | None
) -> tuple[float, float]:
    """Return signed pixel sizes; one pixel takes its size from the transform or the other axis."""
    sizes = (None, None) if stored is None else (stored.e, stored.a)
    dy, dx = (_spacing(array, dims, axis, known) for axis, known in enumerate(sizes))
    if dy is None and dx is None:
        if crs is not None:
            raise ImageryError(
                "pixels of a known size",
                "a single pixel and no transform",
                "select at least two rows and columns",
            )
        return 1.0, 1.0
    return dy or -abs(dx or 0), dx or abs(dy or 0)


def _spacing(
    array: xr.DataArray, dims: tuple[str, str], axis: int, stored: float | None
) -> float | None:
    """Return the signed step between coordinates, exactly as stored if it is stored."""
    dim = dims[axis]
    if dim not in array.coords:
        return 1.0
    centres = np.asarray(array[dim].values, dtype=float)
    if centres.size < 2:
        return stored
    pixel = _without_noise(float(centres[-1] - centres[0]) / (centres.size - 1), centres)
    steps = np.diff(centres)
    if (
        not np.isfinite(pixel)
        or pixel == 0
        or np.abs(steps - pixel).max() > _TOLERANCE * abs(pixel)
    ):
        found = f"in steps from {steps.min():g} to {steps.max():g}"
        if not np.isfinite(centres).all():
            found = "that are not finite"
        raise ImageryError(
            "pixels on a regular grid",
            f"{dim} coordinates {found}",
            _make_regular(array, dims, dim),
        )
    if stored is not None and math.isclose(abs(stored), abs(pixel), rel_tol=1e-6):
        return math.copysign(stored, pixel)
    return pixel


def _without_noise(pixel: float, centres: npt.NDArray[np.float64]) -> float:
    """Round a pixel size: differences of large coordinates contain floating-point noise.

    It keeps eight decimals in metres, and more in degrees, as the coordinates allow.
    """
    noise = float(np.spacing(np.abs(centres).max()))
    if not math.isfinite(noise):
        return math.nan
    return round(pixel, max(8, math.floor(-math.log10(noise)) - 1))


def _make_regular(array: xr.DataArray, dims: tuple[str, str], dim: str) -> str:
    """Write the call that gives an irregular axis its steps; all dims if float32 rounded them."""
    centres = np.asarray(array[dim].values, dtype=float)
    steps = np.diff(centres)
    if not np.isfinite(centres).all():
        return f"give it those of its pixel centres: imagery.assign_coords({dim}=...)"
    if steps.min() * steps.max() <= 0:
        return f"sort it first: imagery.drop_duplicates({dim!r}).sortby({dim!r})"
    lines = {d: _unrounded(array[d].values) for d in dims if d in array.coords}
    if lines[dim] is not None:
        given = ", ".join(f"{d}={line}" for d, line in lines.items() if line is not None)
        return f"they were rounded to float32, recompute them: imagery.assign_coords({given})"
    step = min(steps, key=abs)  # of which gaps are multiples; else the steps only scatter
    if np.abs(steps / step - np.round(steps / step)).max() > _TOLERANCE:
        step = np.median(steps)
    count = round((centres[-1] - centres[0]) / step) + 1
    first, last = float(centres[0]), round(float(centres[0] + step * (count - 1)), 9)
    line = f"np.linspace({first!r}, {last!r}, {count})"
    fill = _fill(array)
    return (
        f"put it on one: imagery.reindex({dim}={line}, method='nearest', "
        f"tolerance={abs(step) / 2:g}, fill_value={fill}).chmv2.predict(..., nodata={fill})"
    )


def _unrounded(values: npt.NDArray[Any]) -> str | None:
    """Write the regular coordinates that float32 rounded to these; None if it did not."""
    centres = np.asarray(values, dtype=float)
    noise = float(np.spacing(np.float32(np.abs(centres).max())))
    count = centres.size - 1
    rough = (centres[-1] - centres[0]) / max(count, 1)
    if count < 1 or np.abs(centres - centres[0] - rough * np.arange(count + 1)).max() > 2 * noise:
        return None
    # The shortest number among the steps that rounding allows.
    digits = max(0, math.ceil(-math.log10(abs(rough))))
    step = next(
        s for k in range(digits, 20) if abs((s := round(rough, k)) - rough) * count <= noise
    )
    first = float(np.mean(centres - step * np.arange(count + 1)))
    first = round(first, max(0, math.ceil(-math.log10(noise))))
    return f"np.linspace({first!r}, {float(first + step * count)!r}, {count + 1})"
