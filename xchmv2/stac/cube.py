"""The lazy cube: each date mosaicked from its images, and the rule for clear pixels of a mask."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import dask.array as da
import numpy as np
import pystac
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import COLOURS
from xchmv2.stac.asset_bands import BandInfo
from xchmv2.stac.grids import DEGREES, footprint
from xchmv2.stac.item_images import ItemImage
from xchmv2.stac.mosaics import Access, Block, BlockReader, ImageFiles, Span

#: One of odc-stac's names, or its function of (item, parsed item, index).
GroupBy = str | Callable[[pystac.Item, Any, int], Any] | None

#: Pixels that differ by less than this share are of one size.
_TOLERANCE = 0.01
#: Longest side of a cube [px]: half-way around the Earth at 0.6 m is twice as long.
_LONGEST = 2**24
#: Largest number of chunks: each takes about a kilobyte of memory before anything is read.
_MOST_CHUNKS = 2**21


@dataclass(frozen=True, eq=False)
class Date:
    """The images of one date in order of time.

    ``native`` is their coarsest pixel [m], NaN if unknown, ``wanted`` the pixel of the grid to load
    on [m].
    """

    images: tuple[ItemImage, ...]
    native: float
    wanted: float

    @property
    def upsampled(self) -> bool:
        """Whether the grid is finer than the imagery."""
        return self.native > self.wanted * (1 + _TOLERANCE)


def group_images(
    images: Sequence[ItemImage], groupby: GroupBy, geobox: GeoBox
) -> list[tuple[ItemImage, ...]]:
    """Group the images of one date, as odc-stac does, in order of the earliest time in each group.

    ``groupby`` is "solar_day" (in the local time of the grid), "time", "id", a property that every
    item must have, or a function of (item, parsed item, index).
    """
    ((longitude, _),) = geobox.extent.centroid.to_crs(DEGREES).points
    shift = timedelta(hours=int(longitude / 15))
    groups: dict[Any, list[ItemImage]] = {}
    for index, image in enumerate(images):
        groups.setdefault(_group_key(image, index, groupby, shift), []).append(image)
    ordered = [tuple(sorted(group, key=lambda image: image.order)) for group in groups.values()]
    return sorted(ordered, key=lambda group: group[0].order)


def _group_key(image: ItemImage, index: int, groupby: GroupBy, shift: timedelta) -> Any:
    item = image.item
    if callable(groupby):
        import odc.stac

        # With no files, odc-stac needs none of the metadata that items may lack.
        plain = pystac.Item(item.id, _geometry(image), None, item.time, {}, collection="images")
        return groupby(item.source, next(iter(odc.stac.parse_items([plain]))), index)
    if groupby == "solar_day":
        return (item.time + shift).date()
    if groupby == "time":
        return item.time
    if groupby in ("id", None):
        return index
    if item.properties.get(groupby) is None:
        raise CHMv2Error(
            f"a property {groupby!r} in every item",
            f"item {item} with {sorted(item.properties)}",
            "group by 'solar_day', 'time', 'id' or a property that all items have",
        )
    return item.properties[groupby]


def _geometry(image: ItemImage) -> dict[str, Any] | None:
    outline = image.outline(DEGREES)
    return None if outline is None else dict(outline.json)


def load_cube(
    dates: Sequence[Date], reader: BlockReader, access: Access, *, chunks: Mapping[str, Any]
) -> xr.Dataset:
    """Load all dates lazily, (time, y, x): one task reads all bands of a chunk of one date.

    Parameters
    ----------
    dates : sequence of Date
        In order of time.
    reader : BlockReader
        Grid, data types and resampling.
    access : Access
        How files are opened; it does not enter the keys of the graph.
    chunks : mapping
        Chunk sizes of time, y and x.

    Raises
    ------
    ImageryError
        If the grid has too many rows, columns or chunks to be held.
    CHMv2Error
        If chunk sizes do not fit.
    """
    box = reader.box
    shape = (len(dates), *box.shape)
    sizes = tuple(chunks.get(name, 1) for name in ("time", "y", "x"))
    _validate_size(box, shape, sizes)
    try:
        after, *spatial = da.core.normalize_chunks(sizes, shape=shape, dtype=reader.dtype)
    except (TypeError, ValueError) as error:
        found = f"chunks={dict(chunks)}: {error}"
        fix = "for example xchmv2.load(..., chunks={'y': 2048, 'x': 2048})"
        raise CHMv2Error(f"chunk sizes of a cube of {shape}", found, fix) from error
    sources = [
        [_image_files(image, reader) for image in date.images if image.sources] for date in dates
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
        array = da.Array(picked, key, ((1,) * len(dates), *spatial), dtype=dtype)
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
    colours = image.files(COLOURS, converted=reader.converts)
    held = [colour for file in colours for colour in _colours_of(image, file.asset)]
    mask = image.files(["valid"])[0] if "valid" in image.sources else None
    box, spans = reader.box, []
    outlines = [footprint(file.box, box.crs).boundingbox for file in colours]
    corners = [(x, y) for b in outlines for x in (b.left, b.right) for y in (b.bottom, b.top)]
    at = ~box.affine * tuple(np.array(corners).T)
    for along, size in zip(at[::-1], box.shape, strict=True):
        # A pixel more, as an outline is a polygon of some corners.
        first, last = math.floor(along.min()) - 1, math.ceil(along.max()) + 1
        spans.append((max(first, 0), max(min(last, size), 0)))
    return ImageFiles(colours, tuple(held.index(c) for c in COLOURS), mask, (spans[0], spans[1]))


def _colours_of(image: ItemImage, asset: str) -> list[str]:
    return [colour for colour in COLOURS if image.sources[colour].asset == asset]


#: Values that mean a clear view, or a function from the mask's values to booleans.
ClearValues = int | Sequence[int] | Callable[[xr.DataArray], xr.DataArray]

#: Clear values of masks whose items do not describe them.
_KNOWN: dict[str, tuple[int, ...]] = {"cloud-mask-raster": (1,)}  # Maxar ARD: 2 cloud, 3 shadow
_CLEAR_NAMES = re.compile(r"clear|valid|alpha")
_NO_DATA = re.compile(r"no.?data|missing|fill|invalid|defective|unusable|saturated", re.IGNORECASE)
_FREE = re.compile(r"clear|free|(^|[^a-z])(no|not|non)[ _-]?(cloud|shadow)", re.IGNORECASE)
_VEILED = re.compile(r"cloud|shadow|cirrus|haze|fog|smoke", re.IGNORECASE)


@dataclass(frozen=True)
class ClearRule:
    """Rule for the clear pixels of a mask: by values; by a function; else all but 0 and ``fill``.

    ``fill`` is the value where there is no mask.
    """

    values: tuple[int, ...] | None
    function: Callable[[xr.DataArray], xr.DataArray] | None
    fill: float

    def __call__(self, mask: xr.DataArray) -> xr.DataArray:
        """Turn a mask's values into booleans, lazily."""
        if self.values is not None:
            clear = mask.isin(self.values)
        elif self.function is None:
            clear = (mask != 0) & self._filled(mask)
        else:
            clear = self.function(mask)
            if np.dtype(getattr(clear, "dtype", float)).kind != "b" or clear.dims != mask.dims:
                raise ImageryError(
                    "clear_values to return booleans with the mask's own dims",
                    f"{getattr(clear, 'dtype', type(clear).__name__)} "
                    f"with dims {getattr(clear, 'dims', ())}",
                    "for example clear_values=lambda mask: (mask & 8) == 0",
                )
            clear = clear & self._filled(mask)
        return clear

    def _filled(self, mask: xr.DataArray) -> xr.DataArray:
        return mask.notnull() if np.isnan(self.fill) else mask != self.fill


def resolve_clear(
    name: str, info: BandInfo | None, dtype: str, nodata: float | None, values: ClearValues | None
) -> ClearRule:
    """Decide which values of a mask mean clear.

    Those of the user, else those that its metadata or name state beyond doubt; otherwise an
    ImageryError.
    """
    if callable(values):
        return ClearRule(None, values, _unlikely(dtype) if nodata is None else nodata)
    if values is not None:
        return _by_values(tuple(np.atleast_1d(values).tolist()), dtype, nodata)
    if info is not None and info.classes:
        return _by_values(_clear_classes(info), dtype, nodata)
    if name in _KNOWN:
        return _by_values(_KNOWN[name], dtype, nodata)
    words = [name.lower(), *(info.words if info else ())]
    if any(_CLEAR_NAMES.search(word) for word in words) and not any(map(_VEILED.search, words)):
        return ClearRule(None, None, 0 if nodata is None else nodata)
    raise ImageryError(
        "the values of the mask that mean a clear view",
        f"nothing about them in the metadata of {name!r}",
        "say which: xchmv2.load(..., clear_values=0), a tuple of values, or a function",
    )


def _by_values(values: tuple[int, ...], dtype: str, nodata: float | None) -> ClearRule:
    if nodata is not None and nodata not in values:
        return ClearRule(values, None, nodata)
    return ClearRule(values, None, 0 if 0 not in values else _unlikely(dtype, values))


def _clear_classes(info: BandInfo) -> tuple[int, ...]:
    """Classes that are neither cloud nor shadow nor missing."""
    clear = tuple(
        int(entry["value"]) for entry in info.classes if "value" in entry and _is_clear(entry)
    )
    if not clear:
        raise ImageryError(
            "a mask with a class for a clear view",
            f"classes {[str(entry.get('name')) for entry in info.classes]}",
            "say which values are clear: xchmv2.load(..., clear_values=...)",
        )
    return clear


def _is_clear(entry: Any) -> bool:
    name = str(entry.get("name") or entry.get("description") or "")
    if entry.get("nodata") or _NO_DATA.search(name):
        return False
    return bool(_FREE.search(name)) or not _VEILED.search(name)


def _unlikely(dtype: str, but: Sequence[int] = ()) -> float:
    """Find a value that the mask hardly uses: the largest but those that mean clear."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return float("nan")
    largest = int(np.iinfo(kind).max)
    return float(next(largest - step for step in range(largest) if largest - step not in but))
