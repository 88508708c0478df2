"""load(): from STAC items to an imagery cube."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.raster import BLOCK, find_crs_coordinate, is_whole
from xchmv2.stac.asset_bands import BandNames
from xchmv2.stac.cube import (
    ClearRule,
    ClearValues,
    Date,
    GroupBy,
    group_pictures,
    load_cube,
    resolve_clear,
)
from xchmv2.stac.grids import (
    DEGREES,
    PLACES,
    footprint,
    outline_in_degrees,
    overlaps,
    pixel_on_ground,
    resolve_area,
    validate_bbox,
    validate_pixel,
    validate_resolution,
)
from xchmv2.stac.items import StacItem, find_items, time_coordinates
from xchmv2.stac.pictures import (
    BandValues,
    ImageDriver,
    Picture,
    Sign,
    find_pictures,
    plain,
    read_headers,
    resolve_values,
    validate_sign,
)

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


#: Options of ``odc.stac.load`` that are handed on as they are.
_HANDED_ON = ("fail_on_error", "fuse_func", "use_overviews", "preserve_original_order")
_OPTIONS = (*PLACES, *_HANDED_ON, "resampling", "dtype", "nodata", "patch_url", "driver")


def load(
    items: object,
    *,
    bbox: Sequence[float] | None = None,
    geobox: GeoBox | None = None,
    like: Any = None,
    crs: Any = None,
    resolution: float | None = RESOLUTION,
    bands: BandNames | None = None,
    chunks: int | Mapping[str, int] = BLOCK,
    groupby: GroupBy = "solar_day",
    sign: Sign | None = None,
    cloud_mask: str | None = None,
    clear_values: ClearValues | None = None,
    on_error: Literal["raise", "nodata"] = "raise",
    **odc_options: Any,
) -> xr.Dataset:
    """Load STAC items as a lazy cube of red, green and blue, ready for ``.chmv2.predict()``.

    Parameters
    ----------
    items : object
        pystac items, a collection or static catalogue, dicts, an ItemCollection, a pystac-client
        search, the path or URL of a JSON file with any of these, or an iterable of them.
    bbox : (west, south, east, north), optional
        Place to load [degrees]; by default all that the items cover.
    geobox : GeoBox, optional
        Exact grid to load on, in place of ``bbox``, ``crs`` and ``resolution``.
    like : Dataset, DataArray or GeoBox, optional
        Something on that grid.
    crs : CRS, str or int, optional
        By default the one most items have; "utm" chooses the place's zone.
    resolution : float or None, default 0.6
        Pixel on the ground [m], as in ``predict``: grids of neighbouring places coincide. None
        keeps the images' own pixels, if they share one grid.
    bands : str or three of str or int, optional
        Where the metadata do not tell: an asset; or red, green and blue as names of bands or
        assets, as ``"asset.number"``, or as numbers if each item has a single image.
    chunks : int or mapping, default 4096
        Side of a chunk [px], or chunks of each dim; one date a chunk.
    groupby : str or callable, default "solar_day"
        What makes one date, as for odc-stac: "solar_day", "time", "id", an item property, or a
        function of (item, parsed item, index).
    sign : callable, optional
        Makes URLs open, such as ``planetary_computer.sign``; called with each URL when it is
        read, so that it never runs out.
    cloud_mask : str, optional
        Asset or band that tells clear pixels; becomes ``valid``.
    clear_values : int, sequence of int or callable, optional
        Values of the mask that mean a clear view, or a function from its values to booleans.
    on_error : {"raise", "nodata"}
        What to do with files that do not open: refuse; or leave them out, counted in
        ``unreadable_assets`` and flagged. The latter opens every file's header now.
    **odc_options
        ``dtype``, ``nodata``, ``resampling``, ``patch_url``, ``fail_on_error``, ``fuse_func``,
        ``use_overviews``, ``preserve_original_order`` and ``driver``, and ``lon`` and ``lat``,
        ``x`` and ``y``, ``geopolygon`` or ``intersects`` in place of ``bbox``, as for
        ``odc.stac.load``.

    Returns
    -------
    Dataset
        ``red``, ``green``, ``blue`` (time, y, x) in the data type of the source, with ``valid``
        (bool) if there is a mask. Coordinates along time: ``sun_elevation``, ``sun_azimuth``,
        ``off_nadir`` [degrees], ``cloud_cover`` [percent], ``platform``, ``item_ids``,
        ``native_resolution`` [m], ``unreadable_assets``, ``quality_flags``.

    Raises
    ------
    ImageryError
        If bands, pixels, values or place of the imagery do not fit; when computed, if a file
        cannot be read.
    CHMv2Error
        If there are no items, or an option does not make sense.

    Notes
    -----
    No pixel is read. Of files whose item does not tell grid or bands the header is; and where
    items do not tell data type or nodata value, that of one file for each collection and asset.

    A date is averaged by area where its imagery is finer than the grid and interpolated
    bilinearly elsewhere, whatever other dates are like; where it is coarser, ``quality_flags``
    says so. Items that do not reach into the place are left out. Several items of one date
    give their worst: lowest sun, largest angle, most cloud.

    Integer imagery that declares no nodata value gets 0: what no image covers is black in all
    bands, and invalid to ``predict``; so is a black collar.

    Examples
    --------
    >>> cube = xchmv2.load(search, bbox=bbox, sign=planetary_computer.sign)  # doctest: +SKIP
    >>> height = cube.chmv2.predict()  # doctest: +SKIP
    """
    place = resolve_place(bbox, geobox, like, crs, resolution, odc_options)
    sizes = _resolve_chunks(chunks)
    _validate_options(on_error, cloud_mask, clear_values, odc_options)
    sign, patch, driver = _resolve_access(sign, odc_options)
    dtype, nodata = odc_options.get("dtype"), odc_options.get("nodata")
    near = near_items(find_items(items), place)
    pictures = find_pictures(
        near,
        bands=bands,
        cloud_mask=cloud_mask,
        read_headers=partial(read_headers, sign=sign),
        patch=patch,
        tolerant=on_error == "nodata",
        values_known=dtype is not None and nodata is not None,
    )
    validate_readable(pictures)
    _validate_pixels(pictures)
    validate_sign(sign, next(iter(pictures[0].hrefs.values())))
    boxes = [picture.geobox for picture in pictures if picture.geobox is not None]
    target = resolve_area(boxes, crs=crs, resolution=resolution, place=place)
    pictures = pictures_inside(pictures, target)
    stored = resolve_values(pictures, COLOURS, dtype, nodata)
    values = dict.fromkeys(COLOURS, stored)
    rule = None
    if cloud_mask is not None:
        rule, values["valid"] = _resolve_mask(pictures, cloud_mask, clear_values)
    dates = _dates(group_pictures(pictures, groupby, target), target)
    cube = load_cube(
        dates,
        target,
        values,
        chunks=sizes,
        resampling=odc_options.get("resampling"),
        driver=driver,
        options={name: odc_options[name] for name in _HANDED_ON if name in odc_options},
    )
    return _label(cube, dates, target, stored, rule)


def _resolve_chunks(chunks: Any) -> dict[str, int]:
    sizes = {"y": chunks, "x": chunks} if is_whole(chunks, 1) else chunks
    if not isinstance(sizes, Mapping) or not set(sizes) <= {"time", "y", "x"}:
        raise CHMv2Error(
            "the side of a chunk, or sizes along time, y and x",
            f"chunks={chunks!r}",
            "leave it out, or for example xchmv2.load(..., chunks=2048)",
        )
    return {"y": BLOCK, "x": BLOCK, **sizes}


def _validate_options(
    on_error: str, cloud_mask: str | None, clear_values: object, options: Mapping[str, Any]
) -> None:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise CHMv2Error(
            f"options out of {sorted(_OPTIONS)}",
            f"{unknown}",
            "correct them; bands, data type and nodata value take the place of stac_cfg",
        )
    if on_error not in ("raise", "nodata"):
        raise CHMv2Error(
            "on_error as 'raise' or 'nodata'",
            f"on_error={on_error!r}",
            "leave it out to be told of files that do not open",
        )
    if clear_values is not None and cloud_mask is None:
        raise CHMv2Error(
            "clear_values together with the mask they belong to",
            "no cloud_mask",
            "name it: xchmv2.load(..., cloud_mask='asset')",
        )


def _resolve_access(
    sign: Sign | None, options: Mapping[str, Any]
) -> tuple[Sign | None, Sign | None, Any]:
    """Decide who signs: our driver when it reads; another's is given signed addresses."""
    patch, driver = options.get("patch_url"), options.get("driver")
    if driver is None:
        return sign, patch, ImageDriver(sign, options.get("nodata"))
    if sign is None or patch is None:
        return None, sign or patch, driver
    return None, lambda href: sign(patch(href)), driver


def _validate_pixels(pictures: Sequence[Picture]) -> None:
    for picture in pictures:
        if picture.geobox is not None:
            validate_pixel(picture.item, pixel_on_ground(picture.geobox))


def _resolve_mask(
    pictures: Sequence[Picture], name: str, clear_values: ClearValues | None
) -> tuple[ClearRule, BandValues]:
    stored = resolve_values(pictures, ("valid",), None, None)
    info = next(picture.bands["valid"] for picture in pictures if picture.sources)
    rule = resolve_clear(name, info, stored.dtype, stored.nodata, clear_values)
    return rule, BandValues(stored.dtype, rule.fill)


def _dates(groups: Sequence[tuple[Picture, ...]], target: GeoBox) -> list[Date]:
    wanted = pixel_on_ground(target)
    return [Date(group, _coarsest(group), wanted) for group in groups]


def _coarsest(group: Sequence[Picture]) -> float:
    """Largest native pixel of a date [m]; NaN if none is known."""
    pixels = [pixel_on_ground(p.geobox) for p in group if p.geobox is not None]
    return max(pixels, default=math.nan)


def _label(
    cube: xr.Dataset,
    dates: Sequence[Date],
    target: GeoBox,
    stored: BandValues,
    rule: ClearRule | None,
) -> xr.Dataset:
    """Give the arrays names, attributes and the facts of each date."""
    coords = time_coordinates(
        [[picture.item for picture in date.pictures] for date in dates],
        native=[date.native for date in dates],
        unreadable=[sum(picture.unreadable for picture in date.pictures) for date in dates],
        upsampled=[date.upsampled for date in dates],
    )
    if rule is not None:
        cube["valid"] = rule(cube["valid"])
    cube = cube.drop_vars("time").assign_coords(coords)
    mapping = find_crs_coordinate(cube.coords)
    for name, array in cube.data_vars.items():
        told = {"long_name": name, "common_name": name} | _nodata(stored)
        if name == "valid":
            told = {"long_name": "imagery shows the ground"}
        array.attrs = told | ({"grid_mapping": mapping} if mapping else {})
        array.encoding = {}
    return cube.assign_attrs(source=_collections(dates), xchmv2_version=__version__)


def _nodata(stored: BandValues) -> dict[str, Any]:
    """Say how pixels that no image covers are marked."""
    dtype = np.dtype(stored.dtype)
    if stored.nodata is not None:
        return {"nodata": stored.nodata if dtype.kind == "f" else int(stored.nodata)}
    return {} if dtype.kind == "f" else {"nodata": 0}


def _collections(dates: Sequence[Date]) -> str:
    names = {p.item.collection for date in dates for p in date.pictures if p.item.collection}
    return f"STAC collections {', '.join(sorted(names))}" if names else "STAC items"
