"""The pixel grids of items, and the grid to load them on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from affine import Affine
from odc.geo import CRS, Geometry
from odc.geo.geobox import GeoBox
from odc.geo.geom import unary_union
from pyproj import Transformer

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import resolve_target, validate_source
from xchmv2.raster import (
    BBox,
    Grid,
    around_180,
    bbox_of,
    ground_pixel,
    join_boxes,
    meets,
    read_bbox,
    write_bbox,
)
from xchmv2.stac.asset_bands import is_raster
from xchmv2.stac.items import Asset, Metadata, StacItem

DEGREES = CRS("EPSG:4326")
#: Options of ``odc.stac.load`` for the place, beside ``bbox``, ``geobox`` and ``like``.
PLACES = ("lon", "lat", "x", "y", "geopolygon", "intersects")
_COARSE, _FINER = 0.6, 1024
#: Boxes of items are imprecise: an item so near to the place may still overlap it [degrees].
BBOX_MARGIN = 0.01
_SAME_GRID = 0.05  # share of a pixel by which native grids may differ


def declared_geobox(asset: Asset, properties: Metadata) -> GeoBox | None:
    """Read an asset's pixel grid from the projection extension; None if it is incomplete."""

    def owner(key: str) -> Metadata:
        return properties if asset.fields.get(key) is None else asset.fields

    shape, bbox = owner("proj:shape").size("proj:shape"), owner("proj:bbox")
    transform = _read_transform(owner("proj:transform"))
    code = _read_code(owner)
    if code is None or shape is None:
        return None
    if transform is None:
        corners = bbox.numbers("proj:bbox", (4, 6))
        if corners is None:
            return None
        (left, bottom), (right, top) = corners[:2], corners[len(corners) // 2 :][:2]
        if not (left < right and bottom < top):
            raise bbox.error("proj:bbox", "as (left, bottom, right, top)")
        transform = Affine((right - left) / shape[1], 0, left, 0, (bottom - top) / shape[0], top)
    try:
        return GeoBox(shape, transform, CRS(code))
    except Exception:  # PROJ does not know the code; the file may have another description
        return None


def _read_transform(fields: Metadata) -> Affine | None:
    """Read ``proj:transform``; the order of GDAL's numbers is recognised and refused."""
    numbers = fields.numbers("proj:transform", (6, 9))
    if numbers is None:
        return None
    a, b, c, d, e, f = numbers[:6]
    if c == e == 0 and b and f and a:  # no rotation has one of a and e alone
        raise fields.error(
            "proj:transform",
            "in the order of STAC and rasterio",
            "it is in GDAL's order: set it to "
            f"{[b, c, a, e, f, d]}, or remove it, if the file has its grid",
        )
    if numbers[6:] not in ((), (0, 0, 1)) or a * e == b * d:
        raise fields.error("proj:transform", "of an image, as (a, b, c, d, e, f)")
    return Affine(a, b, c, d, e, f)


def _read_code(owner: Callable[[str], Metadata]) -> str | int | dict[str, Any] | None:
    """Read the CRS from the first field that has one."""
    code = owner("proj:code").text("proj:code")
    epsg = owner("proj:epsg").number("proj:epsg", 0, 2**31)
    wkt = owner("proj:wkt2").text("proj:wkt2")
    described = dict(owner("proj:projjson").mapping("proj:projjson"))
    return code or (int(epsg) if epsg else None) or wkt or described or None


def validate_place(item: StacItem) -> None:
    """Refuse an item whose box, outline and grids lie in different places: one of them is wrong."""
    places = {} if item.bbox is None else {"bbox": item.bbox}
    if item.outline is not None:
        places["geometry"] = read_bbox(item.outline.bounds, empty=True)
    for asset in filter(is_raster, item.assets.values()):
        box = declared_geobox(asset, item.properties)
        if box is not None:
            places[f"the grid (proj:transform, proj:shape) of asset {asset.name!r}"] = _degrees(box)
    if not places:
        return
    first, *others = places
    for other in others:
        one, two = places[first], places[other]
        # So much larger than another, a box cannot mean the same image.
        large = any(two[k + 2] - two[k] > 1 + 10 * (one[k + 2] - one[k]) for k in (0, 1))
        if large or not meets(one, two, BBOX_MARGIN):
            raise ImageryError(
                "metadata that put an item in one place",
                f"{first} {write_bbox(one)} and {other} {write_bbox(two)} in item {item}",
                "correct or remove one of them, or leave the item out",
            )


_degrees = lru_cache(maxsize=4096)(bbox_of)  # the bands of an item share a grid


@lru_cache(maxsize=4096)  # called repeatedly for the same grids
def pixel_on_ground(box: GeoBox) -> float:
    """Longer side of a pixel at the image's centre [m]."""
    affine, (rows, cols) = box.affine, box.shape
    dy, dx = -math.hypot(affine.b, affine.e), math.hypot(affine.a, affine.d)  # rotated, perhaps
    x, y = affine * (cols / 2, rows / 2)
    grid = Grid(("y", "x"), (rows, cols), box.crs, (y - dy * rows / 2, x - dx * cols / 2), (dy, dx))
    return max(ground_pixel(grid))


def validate_pixel(item: StacItem, box: GeoBox | None) -> None:
    """Refuse imagery that is too coarse for the model, however it is resampled."""
    if box is None:
        return
    try:
        validate_source((pixel_on_ground(box),) * 2)
    except ImageryError as error:
        raise ImageryError(error.expected, f"{error.found}: item {item}", error.fix) from None


def footprint(box: GeoBox, crs: CRS) -> Geometry:
    """Outline of an image in another CRS; in degrees it may go on past 180."""
    outline = box.extent if box.crs == crs else box.footprint(crs)
    return Geometry(around_180(outline.geom), crs) if crs.geographic else outline


def outline_of(boxes: Sequence[GeoBox], crs: CRS) -> Geometry:
    """Outline of several images together."""
    return unary_union([footprint(box, crs) for box in boxes])


def overlaps(one: Geometry, other: Geometry) -> bool:
    """Whether two outlines share an area, not only an edge."""
    return bool(one.intersects(other) and (one & other).area > 0)


def resolve_area(
    boxes: Sequence[GeoBox], *, crs: Any, resolution: float | None, place: Mapping[str, Any]
) -> GeoBox:
    """Choose the grid to load on.

    ``boxes`` are the grids of the images. ``crs`` is by default that of most of them, or the UTM
    zone where that is in degrees. ``resolution`` [m] puts pixels at multiples from the CRS origin;
    None keeps the images' own, which must then share one grid. ``place`` holds ``bbox``,
    ``geobox`` or some of ``PLACES``, or nothing for all of the images.
    """
    from odc.stac import output_geobox

    if "geobox" in place:
        box: GeoBox = place["geobox"]
        return box
    wanted = _resolve_crs(crs, boxes, place)
    if not place:
        place = {"geopolygon": outline_of(boxes, DEGREES if isinstance(wanted, str) else wanted)}
    unit = 1.0 if isinstance(wanted, str) else _metres(wanted)
    # In tiny pixels, so that the outline is not rounded outwards twice.
    pixel = (resolution or _COARSE) / unit
    try:
        outline = output_geobox((), crs=wanted, resolution=pixel / _FINER, **place)
    except Exception as error:  # whatever odc-geo makes of a place that is none
        raise CHMv2Error(
            f"{' and '.join(place)} as a place",
            f"{', '.join(f'{key}={value!r:.60}' for key, value in place.items())}: {error!s:.90}",
            "for example xchmv2.load(..., bbox=(west, south, east, north)) in degrees",
        ) from error
    if resolution is None:
        return _native(boxes, outline)
    try:
        target, _, _ = resolve_target(_grid(outline, pixel), resolution)
    except ImageryError as error:  # advice about predict becomes advice about load
        option = "crs='utm'" if "CRS" in error.expected else "resolution=0.6"
        fix = f"xchmv2.load(..., {option})" if "predict(" in error.fix else error.fix
        raise ImageryError(error.expected, error.found, fix) from None
    return target.geobox


def read_geobox(given: Mapping[str, Any]) -> GeoBox:
    """Read the grid of ``geobox`` or ``like``."""
    from odc.stac import output_geobox

    try:
        box = output_geobox((), **given)
    except (ValueError, AttributeError, TypeError):
        box = None
    if not isinstance(box, GeoBox) or box.crs is None:
        raise CHMv2Error(
            "geobox or like with coordinates and a CRS",
            f"{type(next(iter(given.values()))).__name__} without them",
            "write the CRS: other.odc.assign_crs('EPSG:...')",
        )
    return box


def _resolve_crs(crs: Any, boxes: Sequence[GeoBox], place: Mapping[str, Any]) -> Any:
    """CRS to load in, or "utm" for the zone of the place; across 180 degrees one that is whole."""
    zone = isinstance(crs, str) and crs == "utm"  # a CRS compares slowly with a text
    across = _place_across_180(boxes, place)
    if crs is not None and not zone:
        try:
            chosen = CRS(crs)
        except Exception as error:  # whatever PROJ says
            raise CHMv2Error("a CRS", f"crs={crs!r}", "such as crs='EPSG:32633'") from error
        if across and _is_cut(chosen, across):
            raise CHMv2Error(
                "a CRS that is not cut at 180 degrees, for a place across that meridian",
                f"crs={crs!r}",
                "leave it out, or choose the UTM zone: xchmv2.load(..., crs='utm')",
            )
        return chosen
    counts = Counter(box.crs for box in boxes)
    order = sorted(counts, key=lambda crs: (-counts[crs], str(crs)))
    if across is None:
        return "utm" if zone or order[0].geographic else order[0]
    for found in order:
        fits = found.proj.utm_zone is not None if zone else not found.geographic
        if fits and not _is_cut(found, across):
            return found
    west, south, east, north = across
    return CRS.utm(((west + east) / 2 + 180) % 360 - 180, (south + north) / 2)


def _place_across_180(boxes: Sequence[GeoBox], place: Mapping[str, Any]) -> BBox | None:
    """Box in degrees of a place that 180 degrees run through; None for any other."""
    found = [place["bbox"]] if "bbox" in place else []
    if not place:
        found = [_degrees(box) for box in boxes]
        if any(box[0] > 90 for box in found) and any(box[2] < -90 for box in found):
            found = [(w + 360, s, e + 360, n) if w < 0 else (w, s, e, n) for w, s, e, n in found]
    whole = join_boxes(found) if found else None
    return whole if whole and whole[0] < 180 < whole[2] else None


def _is_cut(crs: CRS, across: BBox) -> bool:
    """Whether two points beside 180 degrees lie far apart in a CRS."""
    latitude = (across[1] + across[3]) / 2
    project = Transformer.from_crs("OGC:CRS84", crs.proj, always_xy=True).transform
    (left, right), _ = project([179.999, -179.999], [latitude, latitude])
    return not abs(right - left) * _metres(crs) < 10_000


def _metres(crs: CRS) -> float:
    """Metres per unit; roughly those of a degree, which ``resolve_target`` refuses."""
    if crs.geographic:
        return 111_000.0
    return float(crs.proj.axis_info[0].unit_conversion_factor)


def _grid(box: GeoBox, pixel: float) -> Grid:
    """Cover exactly the same ground with pixels of about the given size."""
    affine = box.affine
    height, width = (abs(n * step) for n, step in zip(box.shape, (affine.e, affine.a), strict=True))
    rows, cols = (math.ceil(side / pixel) for side in (height, width))
    steps = (-height / rows, width / cols)
    return Grid(("y", "x"), (rows, cols), box.crs, (affine.f, affine.c), steps)


def _native(boxes: Sequence[GeoBox], wanted: GeoBox) -> GeoBox:
    """Cut the wanted place from the grid that all images share."""
    first = boxes[0]
    others = [box for box in boxes if pixel_offset(first, box) is None]
    found = [f"{_words(first)} and {_words(box)}" for box in others]
    if not first.axis_aligned:
        found = [f"a rotated grid, {_words(first)}"]
    if wanted.crs != first.crs:
        found.append(f"{_words(first)}, to be loaded in {wanted.crs}")
    if found:
        raise ImageryError(
            "images on one grid, to keep their own pixels",
            found[0],
            "resample them: xchmv2.load(..., resolution=0.6)",
        )
    outline = wanted.extent & outline_of(boxes, first.crs).boundingbox.polygon
    (top, bottom), (left, right) = (
        (math.floor(start + _SAME_GRID), math.ceil(stop - _SAME_GRID))
        for start, stop in pixel_spans(first, outline)
    )
    affine = first.affine * Affine.translation(left, top)
    return GeoBox((max(bottom - top, 1), max(right - left, 1)), affine, first.crs)


def pixel_step(source: GeoBox, target: GeoBox) -> Affine | None:
    """Target pixels in source pixels, if the axes of both grids are parallel."""
    parallel = source.crs == target.crs and source.axis_aligned and target.axis_aligned
    return ~source.affine * target.affine if parallel else None


def pixel_offset(source: GeoBox, target: GeoBox) -> tuple[int, int] | None:
    """Row and column of the source where the target begins, if the pixels of both coincide."""
    step, (rows, cols) = pixel_step(source, target), source.shape
    if step is None:
        return None
    axes = ((rows, step.e, step.f), (cols, step.a, step.c))
    if any(abs(r - 1) * n + abs(start - round(start)) > _SAME_GRID for n, r, start in axes):
        return None
    return round(step.f), round(step.c)


def grid_of(box: GeoBox) -> Grid:
    """Describe an image whose axes are those of its CRS."""
    affine = box.affine
    return Grid(("y", "x"), tuple(box.shape), box.crs, (affine.f, affine.c), (affine.e, affine.a))


def pixel_spans(box: GeoBox, outline: Geometry) -> list[tuple[float, float]]:
    """First and last row, and column, of a grid that an outline in its CRS reaches into."""
    x, y = zip(*outline.boundingbox.points, strict=True)
    cols, rows = ~box.affine * (np.array(x), np.array(y))
    return [(float(axis.min()), float(axis.max())) for axis in (rows, cols)]


def _words(box: GeoBox) -> str:
    affine = box.affine
    return f"{box.crs} {affine.a:g} x {affine.e:g} from {affine.c:.9g}, {affine.f:.9g}"
