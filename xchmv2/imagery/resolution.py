"""What a pixel measures on the ground, and the grid to predict on."""

from __future__ import annotations

import math
from dataclasses import replace

import pyproj

from xchmv2.errors import ImageryError
from xchmv2.imagery.grid import Grid
from xchmv2.imagery.resampling import AxisMap

#: Ground resolutions the model was trained for, roughly [m]; both ends belong to it.
FINEST, COARSEST = 0.25, 1.5
#: Pixels smaller than this are a mistake in the CRS or the transform [m].
_FINEST_SOURCE = 0.01
#: Imagery coarser than this is not worth resampling: single trees cannot be seen in it [m].
_COARSEST_SOURCE = 3.0
_TOLERANCE = 0.01


def ground_pixel(grid: Grid) -> tuple[float, float]:
    """Measure a pixel on the ground, at the scene's centre, on the CRS's own ellipsoid.

    Parameters
    ----------
    grid : Grid
        A grid with a CRS.

    Returns
    -------
    tuple of float
        Height and width of a pixel [m].

    Raises
    ------
    ImageryError
        If the coordinates are outside the CRS's domain, or it is not tied to the Earth.

    Notes
    -----
    A projected metre is not always a metre on the ground: at 60 degrees north a metre of
    EPSG:3857 is half a metre.
    """
    projected = grid.crs.proj
    (top, left), (dy, dx), (rows, cols) = grid.edges, grid.pixel, grid.shape
    cx, cy = left + dx * cols / 2, top + dy * rows / 2
    reach = 50  # half the length of the measured lines [px]
    xs = [cx, cx, cx - reach * dx, cx + reach * dx]
    ys = [cy - reach * dy, cy + reach * dy, cy, cy]
    try:
        to_degrees = pyproj.Transformer.from_crs(projected, projected.geodetic_crs, always_xy=True)
        lon, lat = to_degrees.transform(xs, ys, errcheck=True)
        _, _, lengths = projected.get_geod().inv(lon[::2], lat[::2], lon[1::2], lat[1::2])
    except (pyproj.exceptions.ProjError, AttributeError, ValueError) as error:
        raise ImageryError(
            "coordinates that their CRS can place on the Earth",
            f"{projected.name} at {cx:g}, {cy:g} ({type(error).__name__})",
            "correct it: imagery.rio.write_crs('EPSG:...')",
        ) from error
    return float(lengths[0]) / (2 * reach), float(lengths[1]) / (2 * reach)


def resolve_target(grid: Grid, resolution: float | None) -> tuple[Grid, AxisMap, AxisMap]:
    """Choose the grid to predict on.

    Parameters
    ----------
    grid : Grid
        Grid of the imagery.
    resolution : float or None
        Wanted ground resolution [m]; None keeps the imagery's own pixels.

    Returns
    -------
    target : Grid
        The grid of the prediction. Under ``resolution`` its lines are multiples of the target
        pixel from the CRS origin, and it covers the imagery.
    rows, cols : AxisMap
        How target pixels lie in source pixels.

    Raises
    ------
    ImageryError
        If the imagery or the wanted resolution is outside what the model was trained for, the CRS
        is geographic, or ``resolution`` is given without a CRS.
    """
    if grid.crs is None:
        if resolution is not None:
            raise ImageryError(
                "a CRS, to know what a pixel measures on the ground",
                f"none, with resolution={resolution}",
                "write it: imagery.rio.write_crs('EPSG:...'), or leave resolution out",
            )
        return grid, AxisMap.identity(grid.shape[0]), AxisMap.identity(grid.shape[1])
    _refuse_geographic(grid)
    native = ground_pixel(grid)
    if resolution is None:
        _validate_native(native)
        return grid, AxisMap.identity(grid.shape[0]), AxisMap.identity(grid.shape[1])
    _validate_wanted(native, resolution)
    return _aligned(grid, native, resolution)


def _refuse_geographic(grid: Grid) -> None:
    if not grid.crs.geographic:
        return
    (top, left), (dy, dx), (rows, cols) = grid.edges, grid.pixel, grid.shape
    lon, lat = left + dx * cols / 2, top + dy * rows / 2
    zone = min(60, int((lon + 180) // 6) + 1)
    utm = f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"
    raise ImageryError(
        "a projected CRS, in which pixels are square on the ground",
        f"the geographic CRS {grid.crs.to_epsg() or grid.crs.proj.name}",
        f"reproject it: imagery.odc.reproject({utm!r}, resolution=0.6).chmv2.predict(...)",
    )


def _validate_native(native: tuple[float, float]) -> None:
    if min(native) >= FINEST * (1 - _TOLERANCE) and max(native) <= COARSEST * (1 + _TOLERANCE):
        return
    validate_source(native)
    raise ImageryError(
        f"imagery of {FINEST} to {COARSEST} m on the ground (the model was trained at 0.6 m)",
        f"pixels of {native[0]:.3g} x {native[1]:.3g} m",
        "resample while predicting: .predict(..., resolution=0.6)",
    )


def validate_source(native: tuple[float, float]) -> None:
    """Check that pixels are such as the model can be given, resampled or not.

    Parameters
    ----------
    native : tuple of float
        Sides of a pixel on the ground [m].

    Raises
    ------
    ImageryError
        If they are too coarse for trees to be seen, or finer than any imagery.
    """
    if not min(native) >= _FINEST_SOURCE:
        raise ImageryError(
            f"pixels of at least {_FINEST_SOURCE} m on the ground",
            f"pixels of {native[0]:.3g} x {native[1]:.3g} m",
            "check the CRS and the transform: degrees may have been labelled as metres",
        )
    if max(native) > _COARSEST_SOURCE * (1 + _TOLERANCE):
        raise ImageryError(
            f"imagery of {FINEST} to {COARSEST} m on the ground (the model was trained at 0.6 m)",
            f"pixels of {native[0]:.3g} x {native[1]:.3g} m, in which single trees cannot be seen",
            "take finer imagery; resampling does not bring the detail back",
        )


def _validate_wanted(native: tuple[float, float], resolution: float) -> None:
    if not FINEST * (1 - _TOLERANCE) <= resolution <= COARSEST * (1 + _TOLERANCE):
        raise ImageryError(
            f"a ground resolution of {FINEST} to {COARSEST} m (the model was trained at 0.6 m)",
            f"resolution={resolution}",
            "take the training resolution: .predict(..., resolution=0.6)",
        )
    validate_source(native)


def _aligned(
    grid: Grid, native: tuple[float, float], resolution: float
) -> tuple[Grid, AxisMap, AxisMap]:
    """Cover the grid by pixels of the wanted size, at whole multiples from the CRS origin."""
    edges, pixels, shape = [], [], []
    scales = [metres / abs(pixel) for metres, pixel in zip(native, grid.pixel, strict=True)]
    if math.isclose(*scales, rel_tol=_TOLERANCE):  # conformal: square pixels stay square
        scales = [math.sqrt(math.prod(scales))] * 2
    for edge, pixel, scale, size in zip(grid.edges, grid.pixel, scales, grid.shape, strict=True):
        wanted = math.copysign(resolution / _ground_scale(grid, scale), pixel)
        first = math.floor(round(edge / wanted, 6))
        last = math.ceil(round((edge + pixel * size) / wanted, 6))
        edges.append(first * wanted)
        pixels.append(wanted)
        shape.append(last - first)
    target = replace(
        grid,
        shape=(shape[0], shape[1]),
        edges=(edges[0], edges[1]),
        pixel=(pixels[0], pixels[1]),
    )
    rows, cols = (_axis_map(grid, target, axis) for axis in (0, 1))
    return target, rows, cols


def _ground_scale(grid: Grid, metres_per_unit: float) -> float:
    """Ground metres per CRS unit, in steps of 1 %.

    The steps give neighbouring areas of interest the same pixels, though the scale differs a
    little from one scene's centre to the next; in a UTM zone it becomes exactly 1.
    """
    unit = float(grid.crs.proj.axis_info[0].unit_conversion_factor)
    step = math.log1p(_TOLERANCE)
    return unit * math.exp(step * round(math.log(metres_per_unit / unit) / step))


def _axis_map(grid: Grid, target: Grid, axis: int) -> AxisMap:
    pixel = grid.pixel[axis]
    return AxisMap(
        source_size=grid.shape[axis],
        size=target.shape[axis],
        ratio=round(target.pixel[axis] / pixel, 9),
        offset=round((target.edges[axis] - grid.edges[axis]) / pixel, 6),
    )
