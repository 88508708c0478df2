"""The pixel grids of items, and the grid to load them on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

from affine import Affine
from odc.geo import CRS, Geometry
from odc.geo.geobox import GeoBox
from odc.geo.geom import box as box_geometry
from odc.geo.geom import unary_union

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import resolve_target, validate_source
from xchmv2.raster import Grid, ground_pixel
from xchmv2.stac.items import Asset, StacItem

DEGREES = CRS("EPSG:4326")
#: Options of ``odc.stac.load`` for the place, beside ``bbox``, ``geobox`` and ``like``.
PLACES = ("lon", "lat", "x", "y", "geopolygon", "intersects")
_COARSE, _FINER = 0.6, 1024
_SAME_GRID = 0.05  # share of a pixel by which native grids may differ


def declared_geobox(asset: Asset, properties: Mapping[str, Any]) -> GeoBox | None:
    """Read an asset's pixel grid from the projection extension; None if it is incomplete."""

    def find(key: str) -> Any:
        own = asset.fields.get(key)
        return properties.get(key) if own is None else own

    shape, transform, bbox = find("proj:shape"), find("proj:transform"), find("proj:bbox")
    code = find("proj:code") or find("proj:epsg") or find("proj:wkt2") or find("proj:projjson")
    if not code or not shape or len(shape) != 2:
        return None
    rows, cols = (int(size) for size in shape)
    if transform and len(transform) in (6, 9):
        affine = Affine(*(float(number) for number in transform[:6]))
    elif bbox and len(bbox) == 4:
        left, bottom, right, top = (float(number) for number in bbox)
        affine = Affine((right - left) / cols, 0, left, 0, (bottom - top) / rows, top)
    else:
        return None
    try:
        return GeoBox((rows, cols), affine, CRS(code))
    except Exception:  # PROJ does not know the code; the file may have another description
        return None


@lru_cache(maxsize=4096)  # called repeatedly for the same grids
def pixel_on_ground(box: GeoBox) -> float:
    """Longer side of a pixel at the image's centre [m]."""
    affine, (rows, cols) = box.affine, box.shape
    dy, dx = -math.hypot(affine.b, affine.e), math.hypot(affine.a, affine.d)  # rotated, perhaps
    x, y = affine * (cols / 2, rows / 2)
    grid = Grid(("y", "x"), (rows, cols), box.crs, (y - dy * rows / 2, x - dx * cols / 2), (dy, dx))
    return max(ground_pixel(grid))


def validate_pixel(item: StacItem, pixel: float) -> None:
    """Refuse imagery that is too coarse for the model, however it is resampled."""
    try:
        validate_source((pixel, pixel))
    except ImageryError as error:
        raise ImageryError(error.expected, f"{error.found}: item {item}", error.fix) from None


def footprint(box: GeoBox, crs: CRS) -> Geometry:
    """Outline of an image in another CRS."""
    return box.extent if box.crs == crs else box.footprint(crs)


def overlaps(one: Geometry, other: Geometry) -> bool:
    """Whether two outlines share an area, not only an edge."""
    return bool(one.intersects(other) and (one & other).area > 0)


def resolve_area(
    boxes: Sequence[GeoBox],
    *,
    crs: Any,
    resolution: float | None,
    place: Mapping[str, Any],
) -> GeoBox:
    """Choose the grid to load on.

    Parameters
    ----------
    boxes : sequence of GeoBox
        Grids of the images.
    crs : CRS, optional
        By default that of most images, or the UTM zone where that is in degrees.
    resolution : float or None
        Pixel on the ground [m], at multiples from the CRS origin; None keeps the images' own
        pixels, which must then share one grid.
    place : mapping
        One of ``bbox``, ``geobox``, ``like`` or ``PLACES``, or nothing for all of the images.
    """
    from odc.stac import output_geobox

    if "geobox" in place or "like" in place:
        return _given_geobox(place)
    wanted = _resolve_crs(crs, boxes)
    if not place:
        place = {"geopolygon": _all_of(boxes, DEGREES if wanted == "utm" else wanted)}
    unit = 1.0 if wanted == "utm" else _metres(wanted)
    # In tiny pixels, so that the outline is not rounded outwards twice.
    pixel = (resolution or _COARSE) / unit
    outline = output_geobox((), crs=wanted, resolution=pixel / _FINER, **place)
    if resolution is None:
        return _native(boxes, outline)
    target, _, _ = resolve_target(_grid(outline, pixel), resolution)
    return target.geobox


def _given_geobox(place: Mapping[str, Any]) -> GeoBox:
    """Read the grid of ``geobox`` or ``like``."""
    from odc.stac import output_geobox

    try:
        box = output_geobox((), **place)
    except ValueError:
        box = None
    if box is None or box.crs is None:
        raise CHMv2Error(
            "geobox or like with coordinates and a CRS",
            f"{type(next(iter(place.values()))).__name__} without them",
            "write the CRS: other.odc.assign_crs('EPSG:...')",
        )
    return box


def _resolve_crs(crs: Any, boxes: Sequence[GeoBox]) -> Any:
    """CRS to load in, or "utm" for the zone of the place."""
    if crs == "utm":
        return crs
    if crs is not None:
        try:
            return CRS(crs)
        except Exception as error:  # whatever PROJ says
            raise CHMv2Error("a CRS", f"crs={crs!r}", "such as crs='EPSG:32633'") from error
    counts = Counter(box.crs for box in boxes)
    usual = min(counts, key=lambda crs: (-counts[crs], str(crs)))
    return "utm" if usual.geographic else usual


def _metres(crs: CRS) -> float:
    """Metres per unit; roughly those of a degree, which ``resolve_target`` refuses."""
    if crs.geographic:
        return 111_000.0
    return float(crs.proj.axis_info[0].unit_conversion_factor)


def _all_of(boxes: Sequence[GeoBox], crs: CRS) -> Geometry:
    return unary_union([footprint(box, crs) for box in boxes])


def _grid(box: GeoBox, pixel: float) -> Grid:
    """Cover exactly the same ground with pixels of about the given size."""
    height, width = (
        abs(side) for side in (box.shape[0] * box.affine.e, box.shape[1] * box.affine.a)
    )
    rows, cols = (math.ceil(side / pixel) for side in (height, width))
    steps = (-height / rows, width / cols)
    return Grid(("y", "x"), (rows, cols), box.crs, (box.affine.f, box.affine.c), steps)


def _native(boxes: Sequence[GeoBox], wanted: GeoBox) -> GeoBox:
    """Cut the wanted place from the grid that all images share."""
    first = boxes[0]
    found = [f"{_words(first)} and {_words(box)}" for box in boxes if not _same_grid(first, box)]
    if wanted.crs != first.crs:
        found.append(f"{_words(first)}, to be loaded in {wanted.crs}")
    if found:
        raise ImageryError(
            "images on one grid, to keep their own pixels",
            found[0],
            "resample them: xchmv2.load(..., resolution=0.6)",
        )
    outline = wanted.extent & _all_of(boxes, first.crs).boundingbox.polygon
    corners = [~first.affine * (x, y) for x, y in _corners(outline.boundingbox)]
    cols, rows = (sorted(axis) for axis in zip(*corners, strict=True))
    left, top = math.floor(cols[0] + _SAME_GRID), math.floor(rows[0] + _SAME_GRID)
    right, bottom = math.ceil(cols[-1] - _SAME_GRID), math.ceil(rows[-1] - _SAME_GRID)
    affine = first.affine * Affine.translation(left, top)
    return GeoBox((max(bottom - top, 1), max(right - left, 1)), affine, first.crs)


def _same_grid(one: GeoBox, other: GeoBox) -> bool:
    """Whether the pixels of two grids coincide."""
    step = ~one.affine * other.affine  # where a pixel of the other lies in pixels of the one
    sizes = zip((step.a, step.b, step.d, step.e), (1.0, 0.0, 0.0, 1.0), strict=True)
    off = max(abs(step.c - round(step.c)), abs(step.f - round(step.f)))
    same = all(abs(found - wanted) <= 1e-6 for found, wanted in sizes) and off <= _SAME_GRID
    return bool(one.crs == other.crs and same and one.axis_aligned)


def _corners(bounds: Any) -> list[tuple[float, float]]:
    return [(x, y) for x in (bounds.left, bounds.right) for y in (bounds.bottom, bounds.top)]


def _words(box: GeoBox) -> str:
    affine = box.affine
    return f"{box.crs} {affine.a:g} x {affine.e:g} from {affine.c:.9g}, {affine.f:.9g}"


def validate_resolution(resolution: Any) -> None:
    """Refuse anything but a number above 0; ``resolve_target`` judges its size."""
    if (
        isinstance(resolution, bool)
        or not isinstance(resolution, Real)
        or not float(resolution) > 0
    ):
        raise CHMv2Error(
            "resolution as metres on the ground, or None",
            f"resolution={resolution!r}",
            "for example xchmv2.load(..., resolution=0.6)",
        )


def validate_bbox(bbox: Any) -> tuple[float, float, float, float]:
    """Check (west, south, east, north) in degrees."""
    try:
        west, south, east, north = (float(number) for number in bbox)
    except (TypeError, ValueError):
        west = south = east = north = math.nan
    if not (-360 <= west < east <= 360 and -90 <= south < north <= 90):
        raise CHMv2Error(
            "bbox as (west, south, east, north) in degrees",
            f"bbox={bbox!r}",
            "for other coordinates pass geobox=, like=, or x=, y= and crs=",
        )
    return west, south, east, north


def outline_in_degrees(place: Mapping[str, Any]) -> Geometry | None:
    """Outline of the wanted place, if it does not depend on the images."""
    if "bbox" in place:
        return box_geometry(*place["bbox"], crs=DEGREES)
    if "geobox" in place or "like" in place:
        return footprint(_given_geobox(place), DEGREES)
    return None
