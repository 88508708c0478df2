"""load(): STAC items to a lazy cube of imagery, with its metadata as coordinates of the dates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.raster import BLOCK, find_crs_coordinate, is_whole, meets, read_bbox
from xchmv2.stac.asset_bands import BandNames
from xchmv2.stac.cube import (
    ClearRule,
    ClearValues,
    Date,
    GroupBy,
    group_images,
    load_cube,
    resolve_clear,
)
from xchmv2.stac.grids import (
    BBOX_MARGIN,
    DEGREES,
    PLACES,
    footprint,
    overlaps,
    pixel_on_ground,
    place_in_degrees,
    resolve_area,
    validate_pixel,
    validate_place,
    validate_resolution,
)
from xchmv2.stac.image_files import Sign, gdal_settings, validate_sign, without_query
from xchmv2.stac.item_images import (
    BandValues,
    ItemImage,
    find_images,
    resolve_values,
    validate_scales,
)
from xchmv2.stac.items import StacItem, find_items, time_coordinates
from xchmv2.stac.mosaics import Access, BlockReader

#: Pixel on the ground that the model was trained at [m].
_RESOLUTION = 0.6

_OPTIONS = (
    *PLACES, "dtype", "fail_on_error", "nodata", "patch_url", "resampling", "use_overviews",
)  # fmt: skip
#: Options of ``odc.stac.load`` that ``load`` once had.
_DROPPED = ("driver", "fuse_func", "preserve_original_order")


def load(
    items: object,
    *,
    bbox: Sequence[float] | None = None,
    geobox: GeoBox | None = None,
    like: Any = None,
    crs: Any = None,
    resolution: float | None = _RESOLUTION,
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
        Place to load [degrees], by default all that the items cover; west above east means across
        180 degrees.
    geobox : GeoBox, optional
        Exact grid to load on, in place of ``bbox``, ``crs`` and ``resolution``.
    like : Dataset, DataArray or GeoBox, optional
        An object on that grid.
    crs : CRS, str or int, optional
        By default that of most items; "utm" chooses the UTM zone of the place.
    resolution : float or None, default 0.6
        Pixel on the ground [m], as in ``predict``: grids of neighbouring places coincide. None
        keeps the images' own pixels, if they share one grid.
    bands : str or three of str or int, optional
        Needed where the metadata do not name them: an asset; or red, green and blue as names of
        bands or assets, as ``"asset.number"``, or as numbers if each item has a single image.
    chunks : int or mapping, default 4096
        Side of a chunk [px], or chunk sizes by dim; each chunk holds one date by default.
    groupby : str or callable, default "solar_day"
        How items are grouped into dates, as for odc-stac: "solar_day", "time", "id", an item
        property, or a function of (item, parsed item, index).
    sign : callable, optional
        Signs URLs, such as ``planetary_computer.sign``; called with each URL when it is read, so
        that no signature expires.
    cloud_mask : str, optional
        Asset or band that marks clear pixels; becomes ``valid``.
    clear_values : int, sequence of int or callable, optional
        Values of the mask that mean a clear view, or a function from its values to booleans.
    on_error : {"raise", "nodata"}
        Whether files that do not open are refused, or left out, counted in ``unreadable_assets``
        and flagged; the latter reads the header of every file now.
    **odc_options
        ``dtype``, ``nodata``, ``resampling``, ``patch_url``, ``fail_on_error`` and
        ``use_overviews``, and ``lon`` and ``lat``, ``x`` and ``y``, ``geopolygon`` or
        ``intersects`` in place of ``bbox``, as for ``odc.stac.load``.

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
        cannot be read, or is not as its item or other files say.
    CHMv2Error
        If there are no items, or an option is not valid.

    Notes
    -----
    No pixel is read. The header is read of files whose item lacks grid or bands, and of one file
    for each collection and asset whose items lack data type or nodata value. Each file is compared
    with what was assumed about it when its pixels are read.

    An image is averaged by area if it is finer than the grid, else interpolated bilinearly,
    independently of all others; imagery coarser than the grid is marked in ``quality_flags``.
    Where images of a date overlap, each pixel comes whole from the earliest valid one. Items that
    do not overlap the place are left out. Of several items of one date the worst values are kept:
    lowest sun, largest angle, most cloud.

    Integer imagery that declares no nodata value gets 0: pixels that no image covers are black in
    all bands, which ``predict`` takes for invalid, as it does a black collar. Floats are NaN there.

    Examples
    --------
    >>> cube = xchmv2.load(search, bbox=bbox, sign=planetary_computer.sign)  # doctest: +SKIP
    >>> height = cube.chmv2.predict()  # doctest: +SKIP
    """
    place = _resolve_place(bbox, geobox, like, crs, resolution, odc_options)
    sizes = _resolve_chunks(chunks)
    _validate_options(on_error, cloud_mask, clear_values, odc_options)
    patch = odc_options.get("patch_url")
    dtype, nodata = _resolve_dtype(odc_options)
    resampling = _resolve_resampling(odc_options.get("resampling"))
    near = _near_items(find_items(items), place)
    images = find_images(
        near,
        bands=bands,
        cloud_mask=cloud_mask,
        sign=sign,
        patch=patch,
        tolerant=on_error == "nodata",
        values_known=dtype is not None and nodata is not None,
    )
    _validate_readable(images)
    for image in images:
        if image.geobox is not None:
            validate_pixel(image.item, pixel_on_ground(image.geobox))
    validate_sign(sign, next(iter(images[0].hrefs.values())))
    boxes = [image.geobox for image in images if image.geobox is not None]
    target = _resolve_grid(boxes, crs, resolution, place)
    images = _images_inside(images, target)
    stored = resolve_values(images, COLOURS, dtype, nodata)
    validate_scales(images)
    rule = mask = None
    if cloud_mask is not None:
        rule, mask = _resolve_mask(images, cloud_mask, clear_values)
    wanted = pixel_on_ground(target)
    groups = group_images(images, groupby, target)
    dates = [Date(group, _coarsest(group), wanted) for group in groups]
    reader = BlockReader(
        box=target,
        dtype=stored.dtype,
        fill=stored.fill,
        converts=dtype is not None,
        mask=mask,
        nodata=nodata,
        resampling=resampling[0],
        mask_resampling=resampling[1],
        overviews=bool(odc_options.get("use_overviews", True)),
        fail_on_error=bool(odc_options.get("fail_on_error", True)),
    )
    cube = load_cube(dates, reader, Access(sign, gdal_settings()), chunks=sizes)
    return _label(cube, dates, target, stored, rule)


def _resolve_place(
    bbox: Sequence[float] | None,
    geobox: GeoBox | None,
    like: Any,
    crs: Any,
    resolution: float | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Gather the options that say where; a whole grid excludes all others."""
    place = {name: options[name] for name in PLACES if options.get(name) is not None}
    if "intersects" in place:
        place.setdefault("geopolygon", place.pop("intersects"))
    if set(place) == {"lon", "lat"}:
        try:
            (west, east), (south, north) = (place.pop(name) for name in ("lon", "lat"))
        except (TypeError, ValueError):
            raise CHMv2Error(
                "lon and lat as two numbers each",
                f"lon={options['lon']!r:.60} and lat={options['lat']!r:.60}",
                "for example xchmv2.load(..., lon=(15.0, 15.1), lat=(45.0, 45.1))",
            ) from None
        bbox = (west, south, east, north)
    if bbox is not None:
        place["bbox"] = read_bbox(bbox)
    for name, value in (("geobox", geobox), ("like", like)):
        if value is not None:
            place[name] = value
    exact = "geobox" in place or "like" in place
    ways = {frozenset(pair) for pair in (("lon", "lat"), ("x", "y"))}
    further = [] if crs is None else ["crs"]
    if resolution not in (None, _RESOLUTION):
        further.append(f"resolution={resolution}")
    single = len(place) <= 1 and not {"lon", "lat", "x", "y"} & set(place)
    if not (single or frozenset(place) in ways) or (exact and further):
        raise CHMv2Error(
            "one way to give the place",
            ", ".join([*place, *further]),
            "leave the others out; geobox and like also set CRS and resolution",
        )
    if not exact and resolution is not None:
        validate_resolution(resolution)
    return place


def _near_items(items: Sequence[StacItem], place: Mapping[str, Any]) -> list[StacItem]:
    """Leave out items that are far away, before their metadata are read."""
    for item in items:
        validate_place(item)
    wanted = place_in_degrees(place)
    if wanted is None:
        return list(items)
    near = [item for item in items if item.bbox is None or meets(item.bbox, wanted, BBOX_MARGIN)]
    if not near:
        raise _outside([item.bbox for item in items if item.bbox is not None], wanted)
    return near


def _images_inside(images: Sequence[ItemImage], target: GeoBox) -> list[ItemImage]:
    """Leave out images that do not overlap the grid."""
    inside = [
        image
        for image in images
        if (outline := image.outline(target.crs)) and overlaps(outline, target.extent)
    ]
    if not inside:
        boxes = [footprint(p.geobox, DEGREES).boundingbox for p in images if p.geobox is not None]
        raise _outside(boxes, footprint(target, DEGREES).boundingbox)
    _validate_readable(inside)
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


def _validate_readable(images: Sequence[ItemImage]) -> None:
    """Refuse a cube without any readable image."""
    if any(image.sources for image in images):
        return
    files = [href for image in images for href in image.hrefs.values()]
    raise ImageryError(
        "at least one image that can be read",
        f"{len(files)} that cannot, such as {without_query(files[0])}",
        "check addresses and access; sign= makes URLs open, and on_error='raise' names the reason",
    )


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
    dropped = sorted(set(options) & set(_DROPPED))
    if dropped:
        raise CHMv2Error(
            "options that keep every pixel whole, from the earliest image that has it",
            f"{dropped}",
            "leave them out; groupby= says what is mosaicked, sign= and patch_url= how files open",
        )
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise CHMv2Error(
            f"options among {sorted(_OPTIONS)}",
            f"{unknown}",
            "correct them; bands=, dtype= and nodata= replace stac_cfg",
        )
    if on_error not in ("raise", "nodata"):
        raise CHMv2Error(
            "on_error as 'raise' or 'nodata'",
            f"on_error={on_error!r}",
            "leave it out to refuse files that do not open",
        )
    if clear_values is not None and cloud_mask is None:
        raise CHMv2Error(
            "clear_values together with the mask that they describe",
            "no cloud_mask",
            "name it: xchmv2.load(..., cloud_mask='asset')",
        )


def _resolve_grid(
    boxes: Sequence[GeoBox], crs: Any, resolution: float | None, place: Mapping[str, Any]
) -> GeoBox:
    """Choose the grid to load on; advice about predict becomes advice about load."""
    try:
        return resolve_area(boxes, crs=crs, resolution=resolution, place=place)
    except ImageryError as error:
        if "predict(" not in error.fix:
            raise
        option = "crs='utm'" if "CRS" in error.expected else f"resolution={_RESOLUTION}"
        fix = f"xchmv2.load(..., {option})"
        raise ImageryError(error.expected, error.found, fix) from None


def _resolve_dtype(options: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Check the user's data type and nodata value."""
    dtype, nodata = options.get("dtype"), options.get("nodata")
    try:
        dtype = None if dtype is None else np.dtype(dtype).name
    except (TypeError, ValueError):
        dtype = "unknown"
    if dtype is not None and (dtype == "unknown" or np.dtype(dtype).kind not in "iuf"):
        raise CHMv2Error(
            "dtype as one data type of integers or floats",
            f"dtype={options['dtype']!r}",
            "leave it out to keep that of the files, or say xchmv2.load(..., dtype='uint16')",
        )
    try:
        nodata = None if nodata is None else float(nodata)
    except (TypeError, ValueError):
        nodata = math.inf
    if nodata is not None and math.isinf(nodata):
        raise CHMv2Error(
            "nodata as a number",
            f"nodata={options['nodata']!r}",
            "leave it out to believe the files, or for example xchmv2.load(..., nodata=0)",
        )
    return dtype, nodata


def _resolve_resampling(wanted: Any) -> tuple[str | None, str]:
    """Resampling of the colours, all alike, and of the mask, whose classes have no mean."""
    ways = wanted if isinstance(wanted, Mapping) else {"*": wanted, "valid": "nearest"}
    colours = {ways.get(colour, ways.get("*")) for colour in COLOURS}
    found = (*colours, ways.get("valid", "nearest"))
    known = [way for way in Resampling.__members__ if way != "gauss"]
    if len(colours) > 1 or any(way not in (None, *known) for way in found):
        raise CHMv2Error(
            f"resampling as one of {known} for all colours",
            f"resampling={wanted!r}",
            "leave it out, or for example xchmv2.load(..., resampling='bilinear')",
        )
    return found[0], found[1] or "nearest"


def _resolve_mask(
    images: Sequence[ItemImage], name: str, clear_values: ClearValues | None
) -> tuple[ClearRule, tuple[str, float, bool]]:
    """Rule for clear pixels; data type and fill of the mask, and whether its nodata counts."""
    stored = resolve_values(images, ("valid",), None, None)
    infos = [image.bands["valid"] for image in images if image.sources]
    other = next((info for info in infos if info.classes != infos[0].classes), None)
    if other is not None and clear_values is None:
        raise ImageryError(
            f"one list of classes for the mask {name!r} of all items",
            f"{list(infos[0].classes)} and {list(other.classes)}",
            "say which values are clear: xchmv2.load(..., clear_values=...), or load them apart",
        )
    rule = resolve_clear(name, infos[0], stored.dtype, stored.nodata, clear_values)
    # Listed values are clear whatever the file calls them.
    return rule, (stored.dtype, rule.fill, rule.values is None)


def _coarsest(group: Sequence[ItemImage]) -> float:
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
    """Add names, attributes and the coordinates of each date."""
    coords = time_coordinates(
        [[image.item for image in date.images] for date in dates],
        native=[date.native for date in dates],
        unreadable=[sum(image.unreadable for image in date.images) for date in dates],
        upsampled=[date.upsampled for date in dates],
    )
    if rule is not None:
        cube["valid"] = rule(cube["valid"])
    cube = cube.assign_coords(coords)
    mapping = find_crs_coordinate(cube.coords)
    for name, array in cube.data_vars.items():
        attrs = {"long_name": name, "common_name": name} | _nodata(stored)
        if name == "valid":
            attrs = {"long_name": "imagery shows the ground"}
        array.attrs = attrs | ({"grid_mapping": mapping} if mapping else {})
        array.encoding = {}
    return cube.assign_attrs(source=_collections(dates), xchmv2_version=__version__)


def _nodata(stored: BandValues) -> dict[str, Any]:
    """Nodata attribute of pixels that no image covers."""
    if math.isnan(stored.fill):
        return {}
    return {"nodata": stored.fill if np.dtype(stored.dtype).kind == "f" else int(stored.fill)}


def _collections(dates: Sequence[Date]) -> str:
    names = {p.item.collection for date in dates for p in date.images if p.item.collection}
    return f"STAC collections {', '.join(sorted(names))}" if names else "STAC items"
