"""Which place is wanted, and what of the items lies there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.stac.files import plain
from xchmv2.stac.grids import (
    DEGREES,
    PLACES,
    footprint,
    outline_in_degrees,
    overlaps,
    validate_bbox,
    validate_resolution,
)
from xchmv2.stac.items import StacItem
from xchmv2.stac.pictures import Picture

#: Pixel on the ground that the model was trained at [m].
RESOLUTION = 0.6
#: Boxes of items are rough: so far outside of the place they may still reach into it [degrees].
_MARGIN = 0.01


def resolve_place(
    bbox: Sequence[float] | None,
    geobox: GeoBox | None,
    like: Any,
    crs: Any,
    resolution: float | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Gather what says where; a whole grid leaves nothing else to say."""
    place = {name: options[name] for name in PLACES if options.get(name) is not None}
    if "intersects" in place:
        place.setdefault("geopolygon", place.pop("intersects"))
    if bbox is not None:
        place["bbox"] = validate_bbox(bbox)
    for name, value in (("geobox", geobox), ("like", like)):
        if value is not None:
            place[name] = value
    exact = "geobox" in place or "like" in place
    ways = {frozenset(pair) for pair in (("lon", "lat"), ("x", "y"))}
    further = [] if crs is None else ["crs"]
    if resolution not in (None, RESOLUTION):
        further.append(f"resolution={resolution}")
    single = len(place) <= 1 and not {"lon", "lat", "x", "y"} & set(place)
    if not (single or frozenset(place) in ways) or (exact and further):
        raise CHMv2Error(
            "one way to say where",
            ", ".join([*place, *further]),
            "leave the others out; geobox and like also tell CRS and resolution",
        )
    if not exact and resolution is not None:
        validate_resolution(resolution)
    return place


def near_items(items: Sequence[StacItem], place: Mapping[str, Any]) -> list[StacItem]:
    """Leave out items that are far away, before anything is asked of them."""
    outline = outline_in_degrees(place)
    if outline is None:
        return list(items)
    west, south, east, north = outline.boundingbox.buffered(_MARGIN)
    near = [
        item
        for item in items
        if item.bbox is None
        or item.bbox[0] > item.bbox[2]  # across the antimeridian
        or (
            item.bbox[0] < east
            and item.bbox[2] > west
            and item.bbox[1] < north
            and item.bbox[3] > south
        )
    ]
    if not near:
        boxes = [item.bbox for item in items if item.bbox is not None]
        raise _outside(boxes, outline.boundingbox)
    return near


def pictures_inside(pictures: Sequence[Picture], target: GeoBox) -> list[Picture]:
    """Leave out pictures that do not reach into the grid."""
    inside = [
        picture
        for picture in pictures
        if (outline := picture.outline(target.crs)) and overlaps(outline, target.extent)
    ]
    if not inside:
        boxes = [footprint(p.geobox, DEGREES).boundingbox for p in pictures if p.geobox is not None]
        raise _outside(boxes, footprint(target, DEGREES).boundingbox)
    validate_readable(inside)
    return inside


def _outside(boxes: Sequence[Sequence[float]], wanted: Sequence[float]) -> ImageryError:
    west, south = (min(box[side] for box in boxes) for side in (0, 1))
    east, north = (max(box[side] for box in boxes) for side in (2, 3))
    covered, asked = (
        f"({', '.join(f'{number:.4f}' for number in box)})"
        for box in ((west, south, east, north), wanted)
    )
    return ImageryError(
        "a place that the imagery covers at least in part",
        f"imagery over {covered}, and {asked} asked for (west, south, east, north)",
        "check the order of the numbers, or search where you want to load",
    )


def validate_readable(pictures: Sequence[Picture]) -> None:
    """Refuse a cube of which nothing can be read."""
    if any(picture.sources for picture in pictures):
        return
    files = [href for picture in pictures for href in picture.hrefs.values()]
    raise ImageryError(
        "at least one image that can be read",
        f"{len(files)} that cannot, such as {plain(files[0])}",
        "check addresses and access; sign= makes URLs open, and on_error='raise' tells more",
    )
