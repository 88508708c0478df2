"""The pixel grids of items, and the grid to load them on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

from affine import Affine
from odc.geo import CRS, Geometry
from odc.geo.geobox import GeoBox
from odc.geo.geom import unary_union
from pyproj import Transformer

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import resolve_target, validate_source
from xchmv2.raster import BBox, Grid, around_180, bbox_of, ground_pixel, meets, read_bbox
from xchmv2.stac.asset_bands import is_raster
from xchmv2.stac.item_metadata import Metadata
from xchmv2.stac.items import Asset, StacItem

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
        if not meets(places[first], places[other], BBOX_MARGIN) or _exceeds(
            places[other], places[first]
        ):
            words = (f"{name} {_rounded(places[name])}" for name in (first, other))
            raise ImageryError(
                "metadata that put an item in one place",
                f"{' and '.join(words)} in item {item}",
                "correct or remove one of them, or leave the item out",
            )


def _exceeds(one: BBox, other: BBox) -> bool:
    """Whether a box is so much larger than another that they cannot mean one image."""
    return any(one[k + 2] - one[k] > 1 + 10 * (other[k + 2] - other[k]) for k in (0, 1))


def _rounded(box: BBox) -> str:
    return f"({', '.join(f'{number:.4f}' for number in box)})"


@lru_cache(maxsize=4096)  # the bands of an item share a grid
def _degrees(box: GeoBox) -> BBox:
    return bbox_of(box)


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
    """Outline of an image in another CRS; in degrees it may go on past 180."""
    outline = box.extent if box.crs == crs else box.footprint(crs)
    return Geometry(around_180(outline.geom), crs) if crs.geographic else outline


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
    wanted = _resolve_crs(crs, boxes, place)
    if not place:
        place = {"geopolygon": _all_of(boxes, DEGREES if isinstance(wanted, str) else wanted)}
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
    target, _, _ = resolve_target(_grid(outline, pixel), resolution)
    return target.geobox


def _given_geobox(place: Mapping[str, Any]) -> GeoBox:
    """Read the grid of ``geobox`` or ``like``."""
    from odc.stac import output_geobox

    try:
        box = output_geobox((), **place)
    except (ValueError, AttributeError, TypeError):
        box = None
    if not isinstance(box, GeoBox) or box.crs is None:
        raise CHMv2Error(
            "geobox or like with coordinates and a CRS",
            f"{type(next(iter(place.values()))).__name__} without them",
            "write the CRS: other.odc.assign_crs('EPSG:...')",
        )
    return box


def _resolve_crs(crs: Any, boxes: Sequence[GeoBox], place: Mapping[str, Any]) -> Any:
    """CRS to load in, or "utm" for the zone of the place; across 180 degrees one that is whole."""
    zone = isinstance(crs, str) and crs == "utm"  # a CRS compares slowly with a text
    if crs is not None and not zone:
        try:
            chosen = CRS(crs)
        except Exception as error:  # whatever PROJ says
            raise CHMv2Error("a CRS", f"crs={crs!r}", "such as crs='EPSG:32633'") from error
        if _is_cut(chosen, _place_across_180(boxes, place)):
            raise CHMv2Error(
                "a CRS that is not cut at 180 degrees, for a place across that meridian",
                f"crs={crs!r}",
                "leave it out, or choose the UTM zone: xchmv2.load(..., crs='utm')",
            )
        return chosen
    across = _place_across_180(boxes, place)
    counts = Counter(box.crs for box in boxes)
    order = sorted(counts, key=lambda crs: (-counts[crs], str(crs)))
    if across is None:
        return "utm" if zone or order[0].geographic else order[0]
    whole = [
        found
        for found in order
        if not (found.geographic or _is_cut(found, across))
        and (not zone or found.proj.utm_zone is not None)
    ]
    if whole:
        return whole[0]
    west, south, east, north = across
    return CRS.utm(((west + east) / 2 + 180) % 360 - 180, (south + north) / 2)


def _place_across_180(boxes: Sequence[GeoBox], place: Mapping[str, Any]) -> BBox | None:
    """Box in degrees of a place that 180 degrees run through; None for any other."""
    found = [place["bbox"]] if "bbox" in place else []
    if not place and boxes:
        found = [_degrees(box) for box in boxes]
        if any(box[0] > 90 for box in found) and any(box[2] < -90 for box in found):
            found = [(w + 360, s, e + 360, n) if w < 0 else (w, s, e, n) for w, s, e, n in found]
    if not found:
        return None
    sides = list(zip(*found, strict=True))
    whole = (min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3]))
    return whole if whole[0] < 180 < whole[2] else None


def _is_cut(crs: CRS, across: BBox | None) -> bool:
    """Whether two points beside 180 degrees lie far apart in a CRS."""
    if across is None:
        return False
    latitude = (across[1] + across[3]) / 2
    project = Transformer.from_crs("OGC:CRS84", crs.proj, always_xy=True).transform
    (left, right), _ = project([179.999, -179.999], [latitude, latitude])
    return not abs(right - left) * _metres(crs) < 10_000


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


def place_in_degrees(place: Mapping[str, Any]) -> BBox | None:
    """Box in degrees around the wanted place, if it does not depend on the images."""
    if "bbox" in place:
        return read_bbox(place["bbox"])
    if "geobox" in place or "like" in place:
        return bbox_of(_given_geobox(place))
    return None
