"""load(): STAC items to a lazy cube of imagery, with its metadata as coordinates of the dates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import dask.array as da
import numpy as np
import pystac
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from rasterio.enums import Resampling

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.raster import (
    BLOCK,
    bbox_of,
    find_crs_coordinate,
    is_whole,
    join_boxes,
    meets,
    read_bbox,
    show,
    validate_choice,
    validate_number,
    write_bbox,
)
from xchmv2.stac.asset_bands import BandNames, ClearRule, ClearValues, class_names, resolve_clear
from xchmv2.stac.grids import (
    BBOX_MARGIN,
    DEGREES,
    PLACES,
    footprint,
    outline_of,
    overlaps,
    pixel_on_ground,
    pixel_spans,
    read_geobox,
    resolve_area,
    validate_pixel,
    validate_place,
)
from xchmv2.stac.image_files import Sign, gdal_settings, without_query
from xchmv2.stac.item_images import ItemImage, find_images, resolve_values, validate_scales
from xchmv2.stac.items import StacItem, find_items, time_coordinates
from xchmv2.stac.mosaics import Access, Block, BlockReader, ImageFiles, Span

#: Pixel on the ground that the model was trained at [m].
_RESOLUTION = 0.6
#: Imagery is coarser than the grid if its pixels are larger by more than this share.
_TOLERANCE = 0.01

_OPTIONS = (
    *PLACES, "dtype", "fail_on_error", "nodata", "patch_url", "resampling", "use_overviews",
)  # fmt: skip
#: Options of ``odc.stac.load`` that ``load`` once had.
_DROPPED = ("driver", "fuse_func", "preserve_original_order")

#: One of odc-stac's names, or its function of (item, parsed item, index).
_GroupBy = str | Callable[[pystac.Item, Any, int], Any] | None

_GROUPS = "group by 'solar_day', 'time', 'id' or a property that all items have"
#: Longest side of a cube [px]: half-way around the Earth at 0.6 m is twice as long.
_LONGEST = 2**24
#: Largest number of chunks: each takes about a kilobyte of memory before anything is read.
_MOST_CHUNKS = 2**21


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
    groupby: _GroupBy = "solar_day",
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
    _validate_options(on_error, groupby, cloud_mask, clear_values, odc_options)
    dtype, nodata = _resolve_dtype(odc_options)
    resampling = _resolve_resampling(odc_options.get("resampling"))
    images = find_images(
        _near_items(find_items(items), place),
        bands=bands,
        cloud_mask=cloud_mask,
        sign=sign,
        patch=odc_options.get("patch_url"),
        tolerant=on_error == "nodata",
        values_known=dtype is not None and nodata is not None,
    )
    _validate_readable(images)
    for image in images:
        validate_pixel(image.item, image.geobox)
    boxes = [image.geobox for image in images if image.geobox is not None]
    target = resolve_area(boxes, crs=crs, resolution=resolution, place=place)
    images = _images_inside(images, target)
    stored, _, fill = resolve_values(images, COLOURS, dtype, nodata)
    validate_scales(images)
    rule, mask = _resolve_mask(images, cloud_mask, clear_values)
    groups = _group_images(images, groupby, target)
    reader = BlockReader(
        box=target,
        dtype=stored,
        fill=fill,
        converts=dtype is not None,
        mask=mask,
        nodata=nodata,
        resampling=resampling[0],
        mask_resampling=resampling[1],
        overviews=bool(odc_options.get("use_overviews", True)),
        fail_on_error=bool(odc_options.get("fail_on_error", True)),
    )
    cube = _load_cube(groups, reader, Access(sign, gdal_settings()), sizes)
    if rule is not None:
        cube["valid"] = rule(cube["valid"])
    return _label(cube, groups, reader)


def _resolve_place(
    bbox: Sequence[float] | None,
    geobox: GeoBox | None,
    like: Any,
    crs: Any,
    resolution: float | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Gather the options that say where; a whole grid excludes all others."""
    named = {name: options.get(name) for name in PLACES}
    given = {"bbox": bbox, "geobox": geobox, "like": like} | named
    place = {name: value for name, value in given.items() if value is not None}
    exact = bool({"geobox", "like"} & set(place))
    further = [] if crs is None else ["crs"]
    if resolution not in (None, _RESOLUTION):
        further.append(f"resolution={resolution}")
    pairs = ({"lon", "lat"}, {"x", "y"})
    ways = (set(), *pairs, *({name} for name in given if name not in set().union(*pairs)))
    if set(place) not in ways or (exact and further):
        raise CHMv2Error(
            "one way to give the place",
            ", ".join([*place, *further]),
            "leave the others out; geobox and like also set CRS and resolution",
        )
    if exact:
        return {"geobox": read_geobox(place)}
    validate_number("resolution", resolution, _RESOLUTION, above=0, unit="m", optional=True)
    if "intersects" in place:
        place["geopolygon"] = place.pop("intersects")
    if "lon" in place:
        try:
            (west, east), (south, north) = (place.pop(name) for name in ("lon", "lat"))
        except (TypeError, ValueError):
            raise CHMv2Error(
                "lon and lat as two numbers each",
                f"lon={show(options['lon'])} and lat={show(options['lat'])}",
                "for example xchmv2.load(..., lon=(15.0, 15.1), lat=(45.0, 45.1))",
            ) from None
        place["bbox"] = (west, south, east, north)
    if "bbox" in place:
        place["bbox"] = read_bbox(place["bbox"])
    return place


def _near_items(items: Sequence[StacItem], place: Mapping[str, Any]) -> list[StacItem]:
    """Leave out items that are far away, before their metadata are read."""
    for item in items:
        validate_place(item)
    wanted = bbox_of(place["geobox"]) if "geobox" in place else place.get("bbox")
    if wanted is None:
        return list(items)
    near = [item for item in items if item.bbox is None or meets(item.bbox, wanted, BBOX_MARGIN)]
    if not near:
        raise _outside([item.bbox for item in items if item.bbox is not None], wanted)
    return near


def _images_inside(images: Sequence[ItemImage], target: GeoBox) -> list[ItemImage]:
    """Leave out images that do not overlap the grid."""
    outlines = [image.outline(target.crs) for image in images]
    pairs = zip(images, outlines, strict=True)
    inside = [image for image, shape in pairs if shape and overlaps(shape, target.extent)]
    if not inside:
        boxes = [footprint(i.geobox, DEGREES).boundingbox for i in images if i.geobox is not None]
        raise _outside(boxes, footprint(target, DEGREES).boundingbox)
    _validate_readable(inside)
    return inside


def _outside(boxes: Sequence[Sequence[float]], wanted: Sequence[float]) -> ImageryError:
    asked = f"{write_bbox(wanted)} asked for (west, south, east, north)"
    return ImageryError(
        "a place that the imagery covers at least in part",
        f"imagery over {write_bbox(join_boxes(boxes))}, and {asked}",
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


def _wrong(name: str, value: object, expected: str, example: object) -> CHMv2Error:
    fix = f"leave it out, or for example xchmv2.load(..., {name}={example!r})"
    return CHMv2Error(f"{name} as {expected}", f"{name}={show(value)}", fix)


def _resolve_chunks(chunks: Any) -> dict[str, int]:
    sizes = {"y": chunks, "x": chunks} if is_whole(chunks, 1) else chunks
    if not isinstance(sizes, Mapping) or not set(sizes) <= {"time", "y", "x"}:
        raise _wrong("chunks", chunks, "the side of a chunk, or sizes along time, y and x", 2048)
    return {"y": BLOCK, "x": BLOCK, **sizes}


def _validate_options(
    on_error: str,
    groupby: object,
    cloud_mask: str | None,
    clear_values: object,
    options: Mapping[str, Any],
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
    validate_choice("on_error", on_error, ("raise", "nodata"))
    if not (callable(groupby) or isinstance(groupby, str | None)):
        raise _wrong("groupby", groupby, "a name, a property or a function", "solar_day")
    if clear_values is not None and cloud_mask is None:
        raise CHMv2Error(
            "clear_values together with the mask that they describe",
            "no cloud_mask",
            "name it: xchmv2.load(..., cloud_mask='asset')",
        )


def _resolve_dtype(options: Mapping[str, Any]) -> tuple[str | None, float | None]:
    dtype, nodata = options.get("dtype"), options.get("nodata")
    try:
        name = None if dtype is None else np.dtype(dtype).name
    except (TypeError, ValueError):
        name = "object"
    if name is not None and np.dtype(name).kind not in "iuf":
        raise _wrong("dtype", dtype, "one data type of integers or floats", "uint16")
    try:
        value = None if nodata is None else float(nodata)
    except (TypeError, ValueError):
        value = math.inf
    if value is not None and math.isinf(value):
        raise _wrong("nodata", nodata, "a number", 0)
    return name, value


def _resolve_resampling(wanted: Any) -> tuple[str | None, str]:
    """Resampling of the colours, all alike, and of the mask, whose classes have no mean."""
    ways = wanted if isinstance(wanted, Mapping) else {"*": wanted, "valid": "nearest"}
    colours = {ways.get(colour, ways.get("*")) for colour in COLOURS}
    found = (*colours, ways.get("valid", "nearest"))
    known = [way for way in Resampling.__members__ if way != "gauss"]
    if len(colours) > 1 or any(way not in (None, *known) for way in found):
        raise _wrong("resampling", wanted, f"one of {known} for all colours", "bilinear")
    return found[0], found[1] or "nearest"


def _resolve_mask(
    images: Sequence[ItemImage], name: str | None, clear_values: ClearValues | None
) -> tuple[ClearRule | None, tuple[str, float, bool] | None]:
    """Rule for clear pixels; data type and fill of the mask, and whether its nodata counts."""
    if name is None:
        return None, None
    dtype, nodata, _ = resolve_values(images, ("valid",), None, None)
    first, *others = [(image.item, image.bands["valid"]) for image in images if image.sources]
    other = next((found for found in others if found[1].classes != first[1].classes), None)
    if other is not None and clear_values is None:
        raise ImageryError(
            f"one list of classes for the mask {name!r} of all items",
            " and ".join(f"{class_names(info)} in item {item}" for item, info in (first, other)),
            "say which values are clear: xchmv2.load(..., clear_values=...), or load them apart",
        )
    rule = resolve_clear(name, first[1], dtype, nodata, clear_values, first[0])
    # Listed values are clear whatever the file calls them.
    return rule, (dtype, rule.fill, rule.values is None)


def _label(
    cube: xr.Dataset, groups: Sequence[Sequence[ItemImage]], reader: BlockReader
) -> xr.Dataset:
    """Add names, attributes and the coordinates of each date."""
    pixels = [[pixel_on_ground(i.geobox) for i in group if i.geobox] for group in groups]
    native = [max(found, default=math.nan) for found in pixels]
    coords = time_coordinates(
        [[image.item for image in group] for group in groups],
        native=native,
        unreadable=[sum(image.unreadable for image in group) for group in groups],
        upsampled=[pixel > pixel_on_ground(reader.box) * (1 + _TOLERANCE) for pixel in native],
    )
    cube = cube.assign_coords(coords)
    mapping = find_crs_coordinate(cube.coords)
    fill, kind = reader.fill, np.dtype(reader.dtype).kind
    nodata = {} if math.isnan(fill) else {"nodata": fill if kind == "f" else int(fill)}
    for name, array in cube.data_vars.items():
        attrs = {"long_name": name, "common_name": name} | nodata
        if name == "valid":
            attrs = {"long_name": "imagery shows the ground"}
        array.attrs = attrs | ({"grid_mapping": mapping} if mapping else {})
        array.encoding = {}
    names = sorted({i.item.collection for group in groups for i in group} - {""})
    source = f"STAC collections {', '.join(names)}" if names else "STAC items"
    return cube.assign_attrs(source=source, xchmv2_version=__version__)


def _group_images(
    images: Sequence[ItemImage], groupby: _GroupBy, geobox: GeoBox
) -> list[tuple[ItemImage, ...]]:
    """Group the images of one date, as odc-stac does, in order of the earliest time in each group.

    ``groupby`` is "solar_day" (in the local time of the grid), "time", "id", a property that every
    item must have, or a function of (item, parsed item, index).
    """
    ((longitude, _),) = geobox.extent.centroid.to_crs(DEGREES).points
    shift = timedelta(hours=int(longitude / 15))
    groups: dict[Any, list[ItemImage]] = {}
    for index, image in enumerate(images):
        key = _group_key(image, index, groupby, shift)
        try:
            groups.setdefault(key, []).append(image)
        except TypeError:  # it cannot be a key
            what = "groupby to return" if callable(groupby) else f"{groupby!r} as"
            found = f"{show(key)} of item {image.item}"
            raise CHMv2Error(f"{what} one number or text", found, _GROUPS) from None
    ordered = [tuple(sorted(group, key=lambda image: image.order)) for group in groups.values()]
    return sorted(ordered, key=lambda group: group[0].order)


def _group_key(image: ItemImage, index: int, groupby: _GroupBy, shift: timedelta) -> Any:
    item = image.item
    if callable(groupby):
        import odc.stac

        # With no files, odc-stac needs none of the metadata that items may lack.
        outline = image.outline(DEGREES)
        geometry = None if outline is None else dict(outline.json)
        plain = pystac.Item(item.id, geometry, None, item.time, {}, collection="images")
        return groupby(item.source, next(iter(odc.stac.parse_items([plain]))), index)
    if groupby == "solar_day":
        return (item.time + shift).date()
    if groupby == "time":
        return item.time
    if groupby in ("id", None):
        return index
    if item.properties.get(groupby) is None:
        found = f"item {item} with {sorted(item.properties)}"
        raise CHMv2Error(f"a property {groupby!r} in every item", found, _GROUPS)
    return item.properties[groupby]


def _load_cube(
    groups: Sequence[Sequence[ItemImage]],
    reader: BlockReader,
    access: Access,
    chunks: Mapping[str, Any],
) -> xr.Dataset:
    """Load all dates lazily, (time, y, x): one task reads all bands of a chunk of one date.

    ``groups`` are the images of each date in order of time; ``access`` does not enter the keys of
    the graph. An ImageryError refuses a grid of too many rows, columns or chunks to be held, a
    CHMv2Error chunk sizes that do not fit.
    """
    box = reader.box
    shape = (len(groups), *box.shape)
    sizes = tuple(chunks.get(name, 1) for name in ("time", "y", "x"))
    _validate_size(box, shape, sizes)
    try:
        after, *spatial = da.core.normalize_chunks(sizes, shape=shape, dtype=reader.dtype)
    except (TypeError, ValueError) as error:
        found = f"chunks={dict(chunks)}: {error}"
        fix = "for example xchmv2.load(..., chunks={'y': 2048, 'x': 2048})"
        raise CHMv2Error(f"chunk sizes of a cube of {shape}", found, fix) from error
    sources = [
        [_image_files(image, reader) for image in group if image.sources] for group in groups
    ]
    token = tokenize(reader, sources, spatial)
    read = f"load-{token}"
    rows, cols = (_spans(sizes) for sizes in spatial)
    tasks = {
        (read, d, i, j): (reader.read, access, _touching(images, (row, col)), (row, col))
        for d, images in enumerate(sources)
        for i, row in enumerate(rows)
        for j, col in enumerate(cols)
    }
    graph = HighLevelGraph.from_collections(read, tasks, [])
    dtypes = dict.fromkeys(COLOURS, reader.dtype)
    if reader.mask is not None:
        dtypes["valid"] = reader.mask[0]
    dims = ("time", *box.dimensions)
    arrays = {}
    for place, (name, dtype) in enumerate(dtypes.items()):
        key = f"load-{name}-{token}"
        layer = {(key, *block): (_pick, (read, *block), place) for _, *block in tasks}
        picked = HighLevelGraph({**graph.layers, key: layer}, {**graph.dependencies, key: {read}})
        array = da.Array(picked, key, ((1,) * len(groups), *spatial), dtype=dtype)
        arrays[name] = (dims, array.rechunk((after, *spatial)))
    return xr.Dataset(arrays, coords=xr_coords(box))


def _validate_size(box: GeoBox, shape: tuple[int, ...], sizes: tuple[Any, ...]) -> None:
    """Refuse a grid whose coordinates or tasks alone would exhaust the memory."""
    count = math.prod(
        math.ceil(side / size) if isinstance(size, int) and size > 0 else 1
        for side, size in zip(shape, sizes, strict=True)
    )
    if max(box.shape) <= _LONGEST and count <= _MOST_CHUNKS:
        return
    raise ImageryError(
        f"a cube of up to {_LONGEST:,} px along a side and {_MOST_CHUNKS:,} chunks",
        f"{shape[0]} dates of {box.shape[0]:,} x {box.shape[1]:,} px in {count:,} chunks",
        "load a part of it: xchmv2.load(..., bbox=(west, south, east, north)), or larger chunks=",
    )


def _spans(sizes: Sequence[int]) -> list[Span]:
    stops = np.cumsum(sizes).tolist()
    return [(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]


def _touching(images: Sequence[ImageFiles], block: Block) -> tuple[ImageFiles, ...]:
    return tuple(
        image
        for image in images
        if all(a < d and c < b for (a, b), (c, d) in zip(image.place, block, strict=True))
    )


def _pick(block: tuple[Any, Any], place: int) -> Any:
    """Task: one variable of a block that was read, as a date of its own."""
    pixels, mask = block
    return (mask if place == len(COLOURS) else pixels[place])[np.newaxis]


def _image_files(image: ItemImage, reader: BlockReader) -> ImageFiles:
    """Say what is read of an image, and where it lies on the grid to load on."""
    files, box, spans = image.files(COLOURS, converted=reader.converts), reader.box, []
    held = [c for file in files for c in COLOURS if image.sources[c].asset == file.asset]
    mask = image.files(["valid"])[0] if "valid" in image.sources else None
    outline = outline_of([file.box for file in files], box.crs)
    for (first, last), size in zip(pixel_spans(box, outline), box.shape, strict=True):
        # A pixel more, as an outline is a polygon of some corners.
        start, stop = math.floor(first) - 1, math.ceil(last) + 1
        spans.append((max(start, 0), max(min(stop, size), 0)))
    return ImageFiles(files, tuple(held.index(c) for c in COLOURS), mask, (spans[0], spans[1]))
