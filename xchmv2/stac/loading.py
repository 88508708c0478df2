"""load(): STAC items to a lazy cube of imagery, with its metadata as coordinates of the dates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

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
from xchmv2.stac.item_images import (
    BandValues,
    ImageDriver,
    ItemImage,
    Sign,
    find_images,
    resolve_values,
    validate_sign,
    without_query,
)
from xchmv2.stac.items import StacItem, find_items, time_coordinates

#: Pixel on the ground that the model was trained at [m].
_RESOLUTION = 0.6

#: Options that are passed to ``odc.stac.load`` unchanged.
_HANDED_ON = ("fail_on_error", "fuse_func", "use_overviews", "preserve_original_order")
_OPTIONS = (*PLACES, *_HANDED_ON, "resampling", "dtype", "nodata", "patch_url", "driver")


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
        If there are no items, or an option is not valid.

    Notes
    -----
    No pixel is read. The header is read of files whose item lacks grid or bands, and of one file
    for each collection and asset whose items lack data type or nodata value.

    A date is averaged by area if its imagery is finer than the grid, else interpolated bilinearly,
    independently of other dates; imagery coarser than the grid is marked in ``quality_flags``.
    Items that do not overlap the place are left out. Of several items of one date the worst values
    are kept: lowest sun, largest angle, most cloud.

    Integer imagery that declares no nodata value gets 0: pixels that no image covers are black in
    all bands, which ``predict`` takes for invalid, as it does a black collar.

    Examples
    --------
    >>> cube = xchmv2.load(search, bbox=bbox, sign=planetary_computer.sign)  # doctest: +SKIP
    >>> height = cube.chmv2.predict()  # doctest: +SKIP
    """
    place = _resolve_place(bbox, geobox, like, crs, resolution, odc_options)
    sizes = _resolve_chunks(chunks)
    _validate_options(on_error, cloud_mask, clear_values, odc_options)
    sign, patch, driver = _resolve_access(sign, odc_options)
    dtype, nodata = odc_options.get("dtype"), odc_options.get("nodata")
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
    target = resolve_area(boxes, crs=crs, resolution=resolution, place=place)
    images = _images_inside(images, target)
    stored = resolve_values(images, COLOURS, dtype, nodata)
    values = dict.fromkeys(COLOURS, stored)
    rule = None
    if cloud_mask is not None:
        rule, values["valid"] = _resolve_mask(images, cloud_mask, clear_values)
    wanted = pixel_on_ground(target)
    groups = group_images(images, groupby, target)
    dates = [Date(group, _coarsest(group), wanted) for group in groups]
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


def _resolve_access(
    sign: Sign | None, options: Mapping[str, Any]
) -> tuple[Sign | None, Sign | None, Any]:
    """Decide who signs: our driver when it reads; another driver gets signed addresses."""
    patch, driver = options.get("patch_url"), options.get("driver")
    if driver is None:
        return sign, patch, ImageDriver(sign, options.get("nodata"))
    if sign is None or patch is None:
        return None, sign or patch, driver
    return None, lambda href: sign(patch(href)), driver


def _resolve_mask(
    images: Sequence[ItemImage], name: str, clear_values: ClearValues | None
) -> tuple[ClearRule, BandValues]:
    stored = resolve_values(images, ("valid",), None, None)
    info = next(image.bands["valid"] for image in images if image.sources)
    rule = resolve_clear(name, info, stored.dtype, stored.nodata, clear_values)
    return rule, BandValues(stored.dtype, rule.fill)


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
    cube = cube.drop_vars("time").assign_coords(coords)
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
    dtype = np.dtype(stored.dtype)
    if stored.nodata is not None:
        return {"nodata": stored.nodata if dtype.kind == "f" else int(stored.nodata)}
    return {} if dtype.kind == "f" else {"nodata": 0}


def _collections(dates: Sequence[Date]) -> str:
    names = {p.item.collection for date in dates for p in date.images if p.item.collection}
    return f"STAC collections {', '.join(sorted(names))}" if names else "STAC items"
