"""The lazy cube: each date mosaicked from its images, and the rule for clear pixels of a mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pystac
import xarray as xr
from odc.geo.geobox import GeoBox

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.stac.asset_bands import BandInfo
from xchmv2.stac.grids import DEGREES
from xchmv2.stac.item_images import BandValues, ItemImage

#: One of odc-stac's names, or its function of (item, parsed item, index).
GroupBy = str | Callable[[pystac.Item, Any, int], Any] | None

#: File and band of each variable.
_Layout = Mapping[str, tuple[str, int]]

#: Pixels that differ by less than this share are of one size.
_TOLERANCE = 0.01
_EXTENSIONS = [
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
]


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

    @property
    def resampling(self) -> str:
        """Resampling of the date: by area where it is finer than the grid."""
        return "average" if self.native < self.wanted * (1 - _TOLERANCE) else "bilinear"

    @property
    def readable(self) -> bool:
        """Whether any image can be read."""
        return any(image.sources for image in self.images)


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
    ordered = [tuple(sorted(g, key=lambda p: (p.item.time, p.item.id))) for g in groups.values()]
    return sorted(ordered, key=lambda group: (group[0].item.time, group[0].item.id))


def _group_key(image: ItemImage, index: int, groupby: GroupBy, shift: timedelta) -> Any:
    item = image.item
    if callable(groupby):
        import odc.stac

        values = {name: BandValues("uint8", None) for name in image.sources}
        plain = _plain_item(image, values, {})
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


def load_cube(
    dates: Sequence[Date],
    geobox: GeoBox,
    values: Mapping[str, BandValues],
    *,
    chunks: Mapping[str, int],
    resampling: Any,
    driver: Any,
    options: Mapping[str, Any],
) -> xr.Dataset:
    """Load all dates lazily, (time, y, x), with ``odc.stac.load``.

    Parameters
    ----------
    dates : sequence of Date
        In order of time; at least one is readable.
    geobox : GeoBox
        The grid to load on.
    values : mapping
        Data type and nodata value of each variable.
    resampling : str, dict or None
        The user's; None resamples each date as its own pixels need.
    chunks, driver, options
        As of odc-stac.
    """
    some = next(date.resampling for date in dates if date.readable)
    members: dict[str, list[int]] = {}  # dates without a readable file join any others
    for number, date in enumerate(dates):
        members.setdefault(date.resampling if date.readable else some, []).append(number)
    parts = []
    for way, numbers in members.items():
        items = [(image, number) for number in numbers for image in dates[number].images]
        # odc-stac learns the bands from the first item: one that has them.
        items.sort(key=lambda pair: not pair[0].sources)
        ways = _resampling(resampling, way, values)
        part = _load_part(items, geobox, values, ways, chunks, driver, options)
        parts.append(part.assign_coords(time=numbers))
    if len(parts) == 1:
        return parts[0]
    return xr.concat(
        parts, "time", data_vars="all", coords="minimal", compat="override", join="override",
        combine_attrs="override",
    ).sortby("time")  # fmt: skip


def _resampling(wanted: Any, way: str, values: Mapping[str, BandValues]) -> dict[str, str]:
    """Resampling of each variable; masks hold classes, which have no mean."""
    if isinstance(wanted, Mapping):
        rest = wanted.get("*", way)
        ways = {name: wanted.get(name, rest) for name in values}
        return ways | {"valid": wanted.get("valid", "nearest")}
    return {name: wanted or way for name in values} | {"valid": "nearest"}


def _load_part(
    items: Sequence[tuple[ItemImage, int]],
    geobox: GeoBox,
    values: Mapping[str, BandValues],
    resampling: Mapping[str, str],
    chunks: Mapping[str, int],
    driver: Any,
    options: Mapping[str, Any],
) -> xr.Dataset:
    import odc.stac

    numbers = [number for _, number in items]
    some = next(_layout(image) for image, _ in items if image.sources)
    plain = [_plain_item(image, values, some) for image, _ in items]
    aliases = {
        _collection(layout): {"aliases": layout}
        for layout in (_layout(image) for image, _ in items)
    }
    cube: xr.Dataset = odc.stac.load(
        plain,
        list(values),
        geobox=geobox,
        groupby=lambda item, parsed, index: numbers[index],
        chunks=dict(chunks),
        resampling=dict(resampling),
        stac_cfg=aliases,
        driver=driver,
        **options,
    )
    return cube


def _files(image: ItemImage) -> dict[str, str]:
    """Neutral names of the assets, so that odc-stac takes none for the name of a band."""
    assets = sorted({source.asset for source in image.sources.values()})
    return {asset: f"file{number}" for number, asset in enumerate(assets)}


def _layout(image: ItemImage) -> _Layout:
    """File and band of each variable of an image."""
    files = _files(image)
    return {name: (files[s.asset], s.band) for name, s in sorted(image.sources.items())}


def _collection(layout: _Layout) -> str:
    return " ".join(f"{name}={file}.{band}" for name, (file, band) in layout.items())


def _plain_item(image: ItemImage, values: Mapping[str, BandValues], some: _Layout) -> pystac.Item:
    """Make an item with complete metadata for odc-stac; its collection names where its bands are.

    An image that cannot be read gets no assets and the layout ``some``: its part of the cube stays
    empty.
    """
    item, layout = image.item, _layout(image)
    plain = pystac.Item(
        item.id, _geometry(image), None, item.time, {},
        stac_extensions=list(_EXTENSIONS), collection=_collection(layout or some),
    )  # fmt: skip
    for asset, file in _files(image).items():
        names = {band: name for name, (where, band) in layout.items() if where == file}
        described = [
            _band(values[names[band]]) if band in names else {} for band in range(1, max(names) + 1)
        ]
        fields = {**_projection(image.boxes[asset]), "raster:bands": described}
        plain.add_asset(
            file, pystac.Asset(image.hrefs[asset], None, None, "image/tiff", ["data"], fields)
        )
    return plain


def _geometry(image: ItemImage) -> dict[str, Any] | None:
    """Outline of an image without files, whose grid odc-stac cannot know."""
    outline = None if image.sources else image.outline(DEGREES)
    return None if outline is None else dict(outline.json)


def _band(values: BandValues) -> dict[str, Any]:
    nodata = values.nodata
    number = "nan" if nodata is not None and np.isnan(nodata) else nodata
    return {"data_type": values.dtype} | ({} if nodata is None else {"nodata": number})


def _projection(box: GeoBox) -> dict[str, Any]:
    epsg = box.crs.to_epsg()
    named = {"proj:code": f"EPSG:{epsg}"} if epsg else {"proj:wkt2": box.crs.to_wkt()}
    return {
        **named,
        "proj:shape": [int(size) for size in box.shape],
        "proj:transform": [float(number) for number in box.affine[:6]],
    }


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
    if nodata is not None:
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
