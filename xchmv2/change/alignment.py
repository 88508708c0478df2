"""Co-registration of dates by their shifts against a reference: :func:`align`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from xchmv2.change.dates import ComparisonWarning, find_dates, list_dates, select_date
from xchmv2.change.registration import FURTHEST, NO_REFERENCE, REGISTER, Shift, find_shifts
from xchmv2.errors import CHMv2Error, warn
from xchmv2.raster import (
    HEIGHT_NAME,
    Raster,
    choose_heights,
    has_true_areas,
    on_same_grid,
    pixel_size,
    read_numbers,
    read_raster,
    spatial_dims,
    validate_flags,
    validate_number,
)


def align(
    height: Raster,
    to: Any = None,
    *,
    max_shift: float = 24.0,  # the published geolocation error is 14 px on average
    window: int = 128,
    windows: int = 36,
    apply: bool = True,
) -> xr.DataArray | xr.Dataset:
    """Co-register dates to a fraction of a pixel.

    Parameters
    ----------
    height : DataArray or Dataset
        (time, y, x) heights, or any other raster such as one band of imagery, in any order of
        dims; integers become float32. All variables of a Dataset are moved by the shift of
        ``canopy_height``, or by that of their mean if there is none, as with bands of imagery. A
        single date without a dim needs `to`.
    to : label or DataArray, optional
        The reference: one of the dates, the first by default, or a raster (y, x) on the same
        grid.
    max_shift : float, default 24
        Largest shift searched along either axis [px], at most a quarter of the scene.
    window : int, default 128
        Side of the windows that are compared [px], at most half of the scene.
    windows : int, default 36
        Largest number of windows, spread evenly over the scene; they do not overlap.
    apply : bool, default True
        Whether to move the dates, or only to report their shifts.

    Returns
    -------
    DataArray or Dataset
        The co-registered dates on their original grid, interpolated bilinearly, with the removed
        shifts in the coordinates ``removed_shift_y`` and ``removed_shift_x`` [px]. Pixels from
        beyond the edge are NaN. dask-backed if the input is.

        With ``apply=False`` a Dataset along time of ``shift_y`` and ``shift_x`` [px], the
        displacement of a date down the rows and along the columns: the content at (r, c) of the
        reference is at (r + shift_y, c + shift_x) of the date; ``distance_y`` and ``distance_x``,
        the same on the ground [m]; ``spread``, the NMAD between windows [px]; ``agreement``, the
        share of windows that found this shift to 1 px; ``windows``, the number compared;
        ``signal``, how far the shift stands above all others searched [NMAD]; ``rotation``, the
        angle by which the date is turned, from down to right [degree]; and ``distortion``, the
        displacement that rotation and scale leave in the corners [px], 0 if it is uncertain.

    Raises
    ------
    CHMv2Error
        If there are no dates, `to` is not one of them, grids differ, or the reference has no data.

    Warns
    -----
    ComparisonWarning
        If the shift of a date cannot be told, with the reason. That date is not moved, and its
        shift is NaN. Also if a date is turned or scaled by so much that 0.5 px or more remain in
        the corners after its shift.

    Notes
    -----
    Edges are compared, the magnitude of the gradient after smoothing by 1.5 px, because they look
    alike in any season. In each window the correlation over the pixels known on both dates [1]_ is
    computed for each shift of whole pixels, and averaged over the windows. The best shift is
    accepted if it stands 6 NMAD above the median of all, three of four interleaved sets of windows
    find it to 1.5 px, and it is 1.3 times as high as any more than 4 px away. So windows over
    clearings, cloud or gaps do not matter as long as the others suffice; dates of different places
    are refused, and so are rows or lattices of trees. The fraction of a pixel is that of the
    cross-correlation of the windows at this shift [2]_. One shift is estimated per date: it
    corrects location, not distortion.

    Only the windows are read, all at once. For heights that are still to be predicted this computes
    the tiles under them, so write the heights to a store first. The shifts are applied lazily.

    Interpolation smooths dates that are moved by a fraction of a pixel, but not the reference.

    References
    ----------
    .. [1] Padfield 2012, IEEE Transactions on Image Processing 21, 2706.
    .. [2] Guizar-Sicairos et al. 2008, Optics Letters 33, 156, as in scikit-image.

    Examples
    --------
    >>> aligned = height.chmv2.align(to="2019")
    >>> shifts = height.chmv2.align(apply=False)
    >>> largest = abs(shifts["distance_x"]).max()
    """
    validate_flags(apply=apply)
    validate_number("max_shift", max_shift, 24, above=0, below=FURTHEST, unit="px")
    validate_number("window", window, 128, least=16, unit="px", whole=True)
    validate_number("windows", windows, 36, least=4, whole=True)
    array = _guide(height)
    reference, dim = find_reference(array, to)
    along = _ALONE if dim is None else dim
    if dim is None:
        height, array = height.expand_dims(along), array.expand_dims(along)
    planes = _planes(array, along)
    shifts = find_shifts(
        reference.data, planes, max_shift=max_shift, window=window, windows=windows
    )
    if shifts[0].problem == NO_REFERENCE:
        raise CHMv2Error(NO_REFERENCE, fix="choose another one: to=height.time.values[-1]")
    _tell(array, along, shifts)
    found: xr.DataArray | xr.Dataset
    if not apply:
        found = _report(array, along, shifts)
    elif isinstance(height, xr.Dataset):
        found = _move_all(height, array, along, shifts)
    else:
        found = _move(array, along, shifts)
    return found.isel({along: 0}) if dim is None else found


#: Dim of a date that is compared with a raster, and has none.
_ALONE = "only_date"


def _guide(height: Raster) -> xr.DataArray:
    """Return the raster that shifts are estimated from: the heights, or the mean of all bands."""
    if isinstance(height, xr.Dataset) and HEIGHT_NAME not in height and len(height) > 1:
        bands = [read_numbers(band, nodata=False) for band in height.data_vars.values()]
        if all(set(band.dims) == set(bands[0].dims) for band in bands):
            grey: xr.DataArray = sum(bands[1:], bands[0]) / len(bands)
            return grey
    return read_raster(choose_heights(height))


def find_reference(array: xr.DataArray, to: Any) -> tuple[xr.DataArray, str | None]:
    """Return the raster (y, x) that dates are compared with, and the dim of the dates if any.

    It is one of the dates, the first for None, or another raster on the same grid, on the
    coordinates of `array`.
    """
    dims = spatial_dims(array)
    alone = set(array.dims) == set(dims)
    if alone and not isinstance(to, xr.DataArray):
        raise CHMv2Error(
            "dates to compare, or a raster to compare one date with",
            f"dims {array.dims} and to={to!r}",
            "pass to=other_height",
        )
    dim = None if alone else find_dates(array, dated=False)
    if isinstance(to, xr.DataArray):
        other = read_raster(to)
        if set(other.dims) != set(dims):
            extra = next((dim for dim in other.dims if dim not in dims), "time")
            raise CHMv2Error(
                f"a raster of dims {dims} as to=",
                f"dims {other.dims}",
                f"choose one of its dates: to=other.isel({extra}=0)",
            )
        return on_same_grid(other, array).transpose(*dims), dim
    chosen = array.isel({dim: 0}) if to is None else choose_heights(select_date(array, to))
    return chosen.transpose(*dims), dim


def _planes(array: xr.DataArray, dim: str) -> list[Any]:
    """Return the data of the dates, each (y, x)."""
    return list(array.transpose(dim, *spatial_dims(array)).data)


def _tell(array: xr.DataArray, dim: str, shifts: list[Shift]) -> None:
    """Warn of the dates whose shift cannot be told, and of those that are turned."""
    for k, shift in enumerate(shifts):
        name = "the raster" if dim == _ALONE else list_dates(array.isel({dim: [k]}), dim)
        if not shift.known:
            warn(
                f"{name} is not moved, its shift cannot be told: {shift.problem}", ComparisonWarning
            )
        elif shift.distortion:
            left = f"after its shift up to {shift.distortion:.1f} px remain in the corners"
            turned = f"{name} is turned by {shift.rotation:.2f} degrees, or scaled"
            warn(f"{turned}: {left}; {REGISTER}", ComparisonWarning)


#: What a shift tells: name, words and unit.
_MEASURES = (
    ("shift_y", "displacement down the rows", "px"),
    ("shift_x", "displacement along the columns", "px"),
    ("distance_y", "displacement down the rows, on the ground", "m"),
    ("distance_x", "displacement along the columns, on the ground", "m"),
    ("spread", "NMAD between windows", "px"),
    ("agreement", "share of windows in agreement", "1"),
    ("windows", "windows compared", "1"),
    ("signal", "height of the shift above all others searched, in NMAD", "1"),
    ("rotation", "angle from down to right by which the date is turned", "degree"),
    ("distortion", "displacement that rotation and scale leave in the corners", "px"),
)


def _report(array: xr.DataArray, dim: str, shifts: list[Shift]) -> xr.Dataset:
    """Return the shifts as a Dataset along time."""
    pixel = pixel_size(array)
    in_metres = has_true_areas(array)
    report = xr.Dataset(coords={dim: array[dim].variable} if dim in array.coords else {})
    for name, words, unit in _MEASURES:
        kind, _, axis = name.partition("_")
        values = np.array([getattr(s, f"d{axis}" if axis else name) for s in shifts])
        values = values * pixel["yx".index(axis)] if kind == "distance" else values
        attrs = {"long_name": words, "units": unit}
        report[name] = dim, values, attrs if in_metres or unit != "m" else {"long_name": words}
    return report


def _move_all(
    dataset: xr.Dataset, guide: xr.DataArray, dim: str, shifts: list[Shift]
) -> xr.Dataset:
    """Move all variables of a Dataset that have the dims of the heights."""
    read = read_raster if HEIGHT_NAME in dataset else partial(read_numbers, nodata=False)
    moved, left = {}, []
    for name, variable in dataset.data_vars.items():
        if set(variable.dims) == set(guide.dims) and variable.dtype.kind in "fiu":
            moved[name] = _move(read(variable), dim, shifts)
        elif set(variable.dims) & set(spatial_dims(guide)):
            left.append(str(name))
    if left:
        raise CHMv2Error(
            f"numbers of dims {tuple(guide.dims)} in all variables",
            f"{left} that cannot be moved",
            f"drop them first: dataset.drop_vars({left})",
        )
    return dataset.assign(moved)


def _move(array: xr.DataArray, dim: str, shifts: list[Shift]) -> xr.DataArray:
    """Move each date back by its shift."""
    moved = [
        _shift_plane(plane, shift.dy, shift.dx) if shift.known else plane
        for plane, shift in zip(_planes(array, dim), shifts, strict=True)
    ]
    words = {"long_name": "removed displacement", "units": "px"}
    taken = {
        f"removed_shift_{axis}": (dim, [getattr(s, f"d{axis}") for s in shifts], words)
        for axis in "yx"
    }
    stack = np.stack if array.chunks is None else da.stack
    whole = array.transpose(dim, *spatial_dims(array)).copy(data=stack(moved))
    return whole.transpose(*array.dims).assign_coords(taken)


# Shifts are rounded to this before they are applied, finer than their precision; 0 stays 0 [px].
_STEP = 1e-3
# An interpolated pixel is valid if at least this share of its weight is of valid pixels.
_LEAST_VALID = 0.5


def _shift_plane(plane: Any, dy: float, dx: float) -> Any:
    """Take each pixel from (row + dy, column + dx): the weighted mean of the four around it.

    Only valid ones count; it is missing if these weigh less than half, as from beyond the edge.
    """
    dy, dx = (round(v / _STEP) * _STEP for v in (dy, dx))
    if dy == 0 and dx == 0:
        return plane
    if not isinstance(plane, da.Array):
        return _shift(plane, dy, dx)
    depth = {axis: math.ceil(abs(v)) + 1 for axis, v in enumerate((dy, dx))}
    # An axis of one chunk needs no neighbours, and may be narrower than the shift.
    narrow = [axis for axis, margin in depth.items() if margin > plane.shape[axis]]
    moved = plane.rechunk(dict.fromkeys(narrow, -1)).map_overlap(
        _shift,
        dy=dy,
        dx=dx,
        depth=depth | dict.fromkeys(narrow, 0),
        boundary=np.nan,
        meta=np.empty((0, 0), plane.dtype),
    )
    return moved.rechunk(plane.chunks)


def _shift(plane: npt.NDArray[Any], dy: float, dx: float) -> npt.NDArray[Any]:
    rows, cols = plane.shape
    row, col = math.floor(dy), math.floor(dx)
    beyond = [(max(0, -first), max(0, first + 1)) for first in (row, col)]
    valid = np.pad(~np.isnan(plane), beyond)
    filled = np.pad(np.where(np.isnan(plane), 0, plane), beyond)
    total, weight = np.zeros((2, *plane.shape))
    for down, right in np.ndindex(2, 2):
        share = round(abs(1 - down - (dy - row)), 6) * round(abs(1 - right - (dx - col)), 6)
        top, left = max(0, row) + down, max(0, col) + right
        if share > 0:
            total += share * filled[top : top + rows, left : left + cols]
            weight += share * valid[top : top + rows, left : left + cols]
    moved = np.full(plane.shape, np.nan, plane.dtype)
    enough = weight > _LEAST_VALID - 1e-9
    np.divide(total, weight, out=moved, where=enough, casting="same_kind")
    return moved
