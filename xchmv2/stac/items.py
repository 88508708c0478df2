"""STAC items: reading them from any source, and their metadata as coordinates of the dates."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
import pystac
import shapely
import shapely.geometry
import xarray as xr
from pystac.utils import make_absolute_href

from xchmv2.errors import CHMv2Error
from xchmv2.raster import LARGEST_OFF_NADIR, LOWEST_SUN, BBox, around_180, read_bbox
from xchmv2.stac.item_metadata import Metadata

_FIX = (
    "pass items, an ItemCollection, a static catalogue, a pystac-client search, or the path or "
    "URL of such a file"
)
_NO_ADDRESS = "correct it, remove the asset, or leave the item out"
#: A footprint of more is replaced by its box: it is only held against the place.
_MOST_VERTICES = 10_000


@dataclass(frozen=True)
class Asset:
    """One file of an item.

    Parameters
    ----------
    name, href, media_type, roles
        As in the item; ``href`` is absolute and not signed.
    fields : Metadata
        All other metadata, completed by those of the collection.
    item_bands : sequence
        Bands that the item or its collection lists for all assets; not checked.
    """

    name: str
    href: str
    media_type: str
    roles: frozenset[str]
    fields: Metadata
    item_bands: Sequence[Any] = ()


@dataclass(frozen=True, eq=False)
class StacItem:
    """The metadata of a STAC item that loading needs.

    Parameters
    ----------
    id, collection : str
        Identity; the collection is empty if the item has none.
    time : datetime
        UTC, without a time zone: nominal time, else the start of its time span.
    bbox : tuple of float or None
        (west, south, east, north) [degrees]; east is past 180 for an item across that meridian.
    properties : Metadata
        The item's metadata.
    assets : mapping
        Files by name.
    source : pystac.Item
        The item itself, which is never modified.
    """

    id: str
    collection: str
    time: datetime
    bbox: BBox | None
    properties: Metadata
    assets: Mapping[str, Asset]
    source: pystac.Item

    def __str__(self) -> str:
        return f"{self.collection}/{self.id}" if self.collection else self.id

    @cached_property
    def outline(self) -> shapely.Geometry | None:
        """Footprint in degrees, past 180 for one across that meridian; None if it has no area.

        Of a footprint with very many vertices it is the box.
        """
        geometry = self.source.geometry
        if self.bbox is not None and _count_vertices(geometry) > _MOST_VERTICES:
            return shapely.box(*self.bbox)
        return _read_outline(Metadata(f"item {self}", {"geometry": geometry}))

    @property
    def geometry(self) -> Mapping[str, Any] | None:
        """The outline as GeoJSON."""
        return None if self.outline is None else shapely.geometry.mapping(self.outline)


def find_items(items: object) -> list[StacItem]:
    """Read the items of any source that :func:`xchmv2.load` takes: each once, at least one."""
    found: dict[object, StacItem] = {}
    for item, base in _iter_items(items, None):
        read = _read_item(item, base)
        found.setdefault(_identity(read), read)
    if not found:
        raise CHMv2Error(
            "at least one STAC item",
            f"none in {_described(items)}",
            "widen the search: its area, its dates, its collection",
        )
    return list(found.values())


def _identity(item: StacItem) -> object:
    """Identity of an item, without the signatures in the queries of its addresses."""
    files = frozenset(asset.href.partition("?")[0] for asset in item.assets.values())
    return item.collection, item.id, item.time, files


def _read_item(item: pystac.Item, base: str | None = None) -> StacItem:
    """Read one item; paths are relative to the item's own address, else to ``base``."""
    whole = Metadata(
        _called(item.id, item.collection_id),
        {
            "id": item.id,
            "collection": item.collection_id,
            "datetime": item.datetime,
            "bbox": item.bbox,
            "links": item.links,
            "properties": item.properties,
            "assets": item.assets,
        },
    )
    id, collection = whole.text("id"), whole.text("collection")
    if id is None:
        raise whole.error("id", "as text", "correct it, or leave the item out")
    properties = whole.mapping("properties")
    times = (whole.time("datetime"), *map(properties.time, ("start_datetime", "end_datetime")))
    time = next((t for t in times if t is not None), None)
    if time is None:
        raise CHMv2Error(
            "items with a datetime or start_datetime",
            f"item {item.id!r} without either",
            "give it one: item.datetime = ...",
        )
    if not isinstance(item.links, list) or not all(isinstance(k, pystac.Link) for k in item.links):
        raise whole.error("links", "as a list of pystac links")
    own = item.get_self_href() or base
    common = _collection_metadata(item)
    assets = {
        name: _read_asset(whole.owner, name, asset, own, properties, common)
        for name, asset in whole.mapping("assets").items()
    }
    return StacItem(
        id=id,
        collection=collection or "",
        time=time,
        bbox=_read_bbox(whole),
        properties=properties,
        assets=assets,
        source=item,
    )


def _read_asset(
    owner: str, name: str, asset: Any, base: str | None, item: Metadata, common: Metadata
) -> Asset:
    """Read one asset, with the metadata of the item and the collection that speak of it."""
    keys = ("href", "media_type", "roles", "extra_fields")
    plain = {key: getattr(asset, key, None) for key in keys}
    whole = Metadata(f"asset {name!r} of {owner}", plain)
    defaults = common.mapping("item_assets").get(name)
    fields = whole.mapping("extra_fields")
    listed = next(
        (
            bands
            for bands in (item.get("eo:bands"), item.get("bands"), common.get("bands"))
            if isinstance(bands, list)
        ),
        [],
    )
    return Asset(
        name=name,
        href=_absolute(whole, base),
        media_type=(whole.text("media_type") or "").lower(),
        roles=frozenset(whole.texts("roles")),
        fields=Metadata(
            whole.owner,
            {**(defaults if isinstance(defaults, Mapping) else {}), **fields},
        ),
        item_bands=listed,
    )


def _collection_metadata(item: pystac.Item) -> Metadata:
    """Metadata of the assets in the item's collection, if that is at hand: nothing is fetched."""
    for link in item.links:
        target = link.target if link.rel in ("collection", "parent") else None
        if isinstance(target, pystac.Collection):
            content = target.extra_fields
            bands = content.get("bands") or target.summaries.other.get("eo:bands")
            bands = bands or target.summaries.other.get("bands")
            found = {"item_assets": content.get("item_assets"), "bands": bands}
            return Metadata(f"collection {target.id}", found)
    return Metadata("no collection", {})


def _called(id: object, collection: object) -> str:
    return (
        f"item {collection!s:.80}/{id!s:.80}" if isinstance(collection, str) else f"item {id!s:.80}"
    )


def _href(asset: Metadata) -> str:
    href = asset.get("href")
    if not isinstance(href, str) or not href or "\0" in href:
        raise asset.error("href", "as the address of a file", _NO_ADDRESS)
    return href


def _absolute(asset: Metadata, base: str | None) -> str:
    """Complete a relative address; an absolute path of an existing file is kept."""
    href = _href(asset)
    if href.startswith("/vsi") or (os.path.isabs(href) and os.path.exists(href)):
        return href
    try:
        return make_absolute_href(href, base, start_is_dir=False)
    except ValueError:  # such as an IPv6 address that is none
        raise asset.error("href", "as the address of a file", _NO_ADDRESS) from None


def _read_bbox(item: Metadata) -> BBox | None:
    numbers = item.numbers("bbox", (4, 6))
    if numbers is None:
        return None
    half = len(numbers) // 2  # six numbers: with heights
    try:
        return read_bbox((*numbers[:2], *numbers[half : half + 2]), empty=True)
    except CHMv2Error as error:
        raise item.error("bbox", error.expected.removeprefix("bbox ")) from None


def _count_vertices(geometry: Any) -> int:
    """Count the vertices of GeoJSON, without a look at most of them."""
    parts = geometry.get("coordinates") if isinstance(geometry, Mapping) else None
    count, parts = 0, [parts]
    while parts:
        part = parts.pop()
        inner = part[0] if isinstance(part, list | tuple) and part else None
        if isinstance(inner, list | tuple) and inner and isinstance(inner[0], list | tuple):
            parts += part
        elif isinstance(inner, list | tuple):
            count += len(part)
    return count


def _read_outline(item: Metadata) -> shapely.Geometry | None:
    if item["geometry"] is None:
        return None
    try:
        shape = shapely.geometry.shape(item["geometry"])
        points = shapely.get_coordinates(shape)
        known = bool((np.abs(points) <= (360, 90)).all())
    except Exception:  # whatever broken GeoJSON makes shapely raise
        known = False
    if not known:
        raise item.error("geometry", "as GeoJSON in degrees")
    shape = around_180(shapely.make_valid(shape))
    return shape if shape.area > 0 else None


def _iter_items(items: Any, base: str | None) -> Iterator[tuple[pystac.Item, str | None]]:
    """Yield items with the address of the file they were found in."""
    if isinstance(items, pystac.Item):
        yield items, base
    elif isinstance(items, pystac.Catalog):
        _refuse_whole_api(items)
        yield from ((item, base) for item in _walk(items))
    elif isinstance(items, Mapping):
        yield from _iter_mapping(items, base)
    elif isinstance(items, str | os.PathLike):
        yield from _iter_file(os.fspath(items))
    elif callable(getattr(items, "items", None)):  # a pystac-client search
        yield from _iter_items(items.items(), base)
    elif isinstance(items, Iterable) and not (isinstance(items, np.ndarray) and items.ndim == 0):
        for item in items:
            if isinstance(item, str) and len(item) == 1:
                raise _not_stac(items)
            yield from _iter_items(item, base)
    else:
        raise _not_stac(items)


def _walk(catalogue: pystac.Catalog) -> Iterator[pystac.Item]:
    try:
        yield from catalogue.get_items(recursive=True)
    except Exception as error:  # pystac raises plain exceptions for unreadable links
        raise CHMv2Error(
            "a catalogue whose items can be read",
            f"{catalogue.id!r}: {error}",
            "check the links in the catalogue",
        ) from error


def _iter_mapping(
    content: Mapping[str, Any], base: str | None
) -> Iterator[tuple[pystac.Item, str | None]]:
    kind = content.get("type")
    if kind == "FeatureCollection":
        for feature in Metadata("a FeatureCollection", content).entries("features"):
            yield from _iter_items(feature.content, base)
    elif kind == "Feature" and "assets" in content:
        yield _from_mapping(content), base
    else:
        raise CHMv2Error(
            "STAC items",
            f"a mapping of type {kind!r:.60} and id {content.get('id')!r:.60} with keys "
            f"{sorted(map(str, content))[:8]}",
            _FIX,
        )


def _from_mapping(content: Mapping[str, Any]) -> pystac.Item:
    """Make a pystac item; fields that pystac would stumble over are read before."""
    whole = Metadata(_called(content.get("id"), content.get("collection")), content)
    if not isinstance(content.get("properties"), Mapping):
        raise whole.error("properties", "as a mapping", "correct it, or leave the item out")
    whole.mapping("properties").time("datetime")
    whole.text("stac_version"), whole.texts("stac_extensions"), whole.entries("links")
    for name, asset in whole.mapping("assets").items():
        if not isinstance(asset, Mapping):
            raise whole.error("assets", f"with a mapping as {name!r}")
        _href(Metadata(f"asset {name!r} of {whole.owner}", asset))
    try:
        # The outline may have a million vertices, which pystac would copy one by one.
        item = pystac.Item.from_dict({**content, "geometry": None})
    except Exception as error:  # whatever a broken item makes pystac raise
        raise CHMv2Error(
            "valid STAC items",
            f"{content.get('id')!r}: {type(error).__name__}: {error}",
            "check it: pystac.Item.from_dict(...).validate()",
        ) from error
    item.geometry = content.get("geometry")
    return item


def _iter_file(address: str) -> Iterator[tuple[pystac.Item, str | None]]:
    try:
        address = make_absolute_href(address)
        content = json.loads(pystac.StacIO.default().read_text(address))
    except Exception as error:  # OSError, ValueError, or pystac's plain Exception for URLs
        raise CHMv2Error(
            "a file of STAC items that can be read",
            f"{address}: {type(error).__name__}: {error}",
            "check the path or URL",
        ) from error
    if isinstance(content, Mapping) and content.get("type") in ("Catalog", "Collection"):
        kind = pystac.Catalog if content["type"] == "Catalog" else pystac.Collection
        yield from _iter_items(kind.from_file(address), address)
    else:
        yield from _iter_items(content, address)


def _refuse_whole_api(catalogue: Any) -> None:
    """Refuse to read all items of a STAC API; a client of a static catalogue is accepted."""
    conforms = getattr(catalogue, "conforms_to", None)
    if callable(conforms) and conforms("ITEM_SEARCH"):
        raise CHMv2Error(
            "items of a STAC API",
            f"the whole API {catalogue.id!r}",
            "search it: client.search(collections=[...], bbox=bbox, datetime=...)",
        )


def _described(items: object) -> str:
    if isinstance(items, str | os.PathLike):
        return str(items)
    return f"the {type(items).__name__}"


def _not_stac(items: object) -> CHMv2Error:
    return CHMv2Error("STAC items", f"{type(items).__name__} {str(items)[:60]!r}", _FIX)


#: Joins the texts of several items of one date.
_SEPARATOR = ";"

#: Bits of ``quality_flags``, lowest first.
_FLAGS = (
    "low_sun",
    "high_off_nadir",
    "sun_elevation_unknown",
    "off_nadir_unknown",
    "upsampled",
    "partly_unreadable",
)

_NUMBERS: dict[str, tuple[str, str, str, Callable[[Iterable[float]], float]]] = {
    "sun_elevation": ("view:sun_elevation", "sun elevation above the horizon", "degree", min),
    "off_nadir": ("view:off_nadir", "view angle off nadir", "degree", max),
    "cloud_cover": ("eo:cloud_cover", "cloud cover of the item", "percent", max),
}


def quality_flags(
    sun_elevation: xr.DataArray,
    off_nadir: xr.DataArray,
    *,
    upsampled: xr.DataArray | None = None,
    unreadable: xr.DataArray | None = None,
    lowest_sun: float = LOWEST_SUN,
    largest_off_nadir: float = LARGEST_OFF_NADIR,
) -> xr.DataArray:
    """Flag the reasons why the heights of a date may deserve less trust.

    Parameters
    ----------
    sun_elevation, off_nadir : DataArray
        (time,) [degrees], NaN where unknown.
    upsampled : DataArray of bool, optional
        (time,) imagery coarser than the grid it is on.
    unreadable : DataArray of bool, optional
        (time,) some of the imagery could not be read.
    lowest_sun, largest_off_nadir : float
        Limits [degrees]; a value at the limit is within it. The defaults are those of the
        published evaluation.

    Returns
    -------
    DataArray of uint8
        (time,) bits as ``flag_masks`` and ``flag_meanings`` name them; 0 means no reason.

    References
    ----------
    CHMv2, arXiv:2603.06382, evaluation on GEDI and ICESat-2.
    """
    conditions = [
        sun_elevation < lowest_sun,
        off_nadir > largest_off_nadir,
        sun_elevation.isnull(),
        off_nadir.isnull(),
        upsampled,
        unreadable,
    ]
    flags = xr.zeros_like(sun_elevation, np.uint8)
    for bit, condition in enumerate(conditions):
        if condition is not None:
            flags = flags | (condition.astype(np.uint8) << np.uint8(bit))
    flags.attrs = {
        "standard_name": "quality_flag",
        "long_name": "reasons to trust the heights of a date less",
        "flag_masks": np.array([1 << bit for bit in range(len(_FLAGS))], np.uint8),
        "flag_meanings": " ".join(_FLAGS),
        "lowest_sun_elevation": lowest_sun,
        "largest_off_nadir": largest_off_nadir,
    }
    flags.encoding = {}
    return flags.rename("quality_flags").astype(np.uint8)


def time_coordinates(
    groups: Sequence[Sequence[StacItem]],
    native: Sequence[float],
    unreadable: Sequence[int],
    upsampled: Sequence[bool],
) -> dict[str, xr.DataArray]:
    """Collect the metadata of each date as coordinates along time, the worst of several items.

    ``native`` are the coarsest native pixels [m], ``unreadable`` the numbers of files that could
    not be read, ``upsampled`` whether the imagery is coarser than the grid. Unknown values are NaN
    or "".
    """
    time = np.array([min(item.time for item in group) for group in groups], "datetime64[ns]")
    columns: dict[str, tuple[list[Any], Any, str, str | None]] = {
        name: ([_worst(group, key, choose) for group in groups], np.float64, words, units)
        for name, (key, words, units, choose) in _NUMBERS.items()
    }
    azimuths = [_azimuth(group) for group in groups]
    columns["sun_azimuth"] = (azimuths, float, "sun azimuth clockwise from north", "degree")
    platforms = [_joined(item.properties.text("platform") for item in group) for group in groups]
    columns["platform"] = (platforms, object, "platform", None)
    ids = [_SEPARATOR.join(sorted(item.id for item in group)) for group in groups]
    columns["item_ids"] = (ids, object, "STAC items", None)
    words = "coarsest native pixel of the imagery on the ground"
    columns["native_resolution"] = (list(native), np.float64, words, "m")
    words = "files that could not be read"
    columns["unreadable_assets"] = (list(unreadable), np.int32, words, None)
    coords = {
        name: _along_time(time, values, dtype, words, units)
        for name, (values, dtype, words, units) in columns.items()
    }
    flags = quality_flags(
        coords["sun_elevation"],
        coords["off_nadir"],
        upsampled=_along_time(time, list(upsampled), np.bool_),
        unreadable=coords["unreadable_assets"] > 0,
    )
    return {"time": coords["platform"]["time"], **coords, "quality_flags": flags}


def _along_time(
    time: np.ndarray[Any, Any],
    values: list[Any],
    dtype: Any,
    words: str | None = None,
    units: str | None = None,
) -> xr.DataArray:
    attrs = {k: v for k, v in (("long_name", words), ("units", units)) if v is not None}
    return xr.DataArray(np.array(values, dtype), {"time": time}, "time", attrs=attrs)


def _number(item: StacItem, key: str) -> float:
    """Read a property, NaN where unknown. Some publishers give angles off nadir a sign."""
    limit = 90.0 if key in ("view:sun_elevation", "view:off_nadir") else math.inf
    value = item.properties.number(key, -limit, limit)
    if value is None:
        return math.nan
    return abs(value) if key == "view:off_nadir" else value


def _worst(
    group: Sequence[StacItem], key: str, choose: Callable[[Iterable[float]], float]
) -> float:
    """Choose among the items that have the property."""
    known = [v for item in group if not math.isnan(v := _number(item, key))]
    return choose(known) if known else math.nan


def _azimuth(group: Sequence[StacItem]) -> float:
    """Azimuth of the lowest sun, whose elevation is the one that is reported."""
    suns = [
        (elevation, azimuth)
        for item in group
        if not math.isnan(azimuth := _number(item, "view:sun_azimuth"))
        and not math.isnan(elevation := _number(item, "view:sun_elevation"))
    ]
    if suns:
        return min(suns)[1]
    return _worst(group, "view:sun_azimuth", min)


def _joined(texts: Iterable[object]) -> str:
    return _SEPARATOR.join(sorted({str(text) for text in texts if text}))
