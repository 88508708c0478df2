"""STAC items: read from any source, each field checked; their metadata as coordinates of dates."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import pystac
import shapely
import shapely.geometry
import xarray as xr
from pystac.utils import make_absolute_href, str_to_datetime

from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.raster import LARGEST_OFF_NADIR, LOWEST_SUN, BBox, around_180, read_bbox

#: A footprint of more is replaced by its box: it is only held against the place.
_MOST_VERTICES = 10_000
#: Years that a time in nanoseconds can hold.
_YEARS = range(1678, 2262)
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 60


class Metadata(dict[str, Any]):
    """Metadata of an item, asset or band, which were written by anyone: read by kind, or refused.

    The readers return None where the field is absent or null, and raise an ImageryError where it
    is not what it should be. A number may be written as text. ``owner`` says whose they are.
    """

    def __init__(self, owner: str, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.owner = owner

    def error(self, key: str, expected: str, fix: str | None = None) -> ImageryError:
        """Error about one field."""
        found = f"{_SHORT.repr(self.get(key))} in {self.owner}"
        return ImageryError(
            f"{key} {expected}", found, fix or "correct it or remove it, or leave the item out"
        )

    def _value(self, key: str) -> Any:
        """Value of a field; tables of items have NaN where there is none."""
        value = self.get(key)
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, key: str) -> str | None:
        """Read a text; an empty one is none."""
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "as text")
        return value or None

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of texts."""
        value = self._value(key)
        found = () if value is None else _as_tuple(value)
        if found is None or not all(isinstance(entry, str) for entry in found):
            raise self.error(key, "as a list of texts")
        return found

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """Read a finite number within limits."""
        value = self._value(key)
        if value is None:
            return None
        number = _as_number(value)
        if number is None or not math.isfinite(number) or not low <= number <= high:
            limits = f" from {low:g} to {high:g}" if math.isfinite(high) else ""
            raise self.error(key, f"as a number{limits}")
        return number

    def nodata(self) -> float | None:
        """Read ``nodata``, which may be NaN or infinite, as a number or as text."""
        value = self.get("nodata")
        if value is None:
            return None
        number = _as_number(value)
        if number is None:
            raise self.error("nodata", "as a number, 'nan', 'inf' or '-inf'")
        return number

    def numbers(
        self, key: str, counts: Sequence[int], expected: str | None = None
    ) -> tuple[float, ...] | None:
        """Read a list of so many finite numbers."""
        value = self._value(key)
        if value is None:
            return None
        found = [_as_number(entry) for entry in _as_tuple(value) or ()]
        known = tuple(number for number in found if number is not None and math.isfinite(number))
        if len(known) != len(found) or len(found) not in counts:
            raise self.error(key, expected or f"as {' or '.join(map(str, counts))} numbers")
        return known

    def size(self, key: str) -> tuple[int, int] | None:
        """Read rows and columns of an image."""
        expected = "as two whole numbers, rows and columns"
        sizes = self.numbers(key, (2,), expected)
        if sizes is None:
            return None
        if not all(size.is_integer() and 0 < size < 2**31 for size in sizes):
            raise self.error(key, expected)
        return int(sizes[0]), int(sizes[1])

    def time(self, key: str) -> datetime | None:
        """Read a time as UTC without a time zone."""
        value = self._value(key)
        if value is None:
            return None
        try:
            time = str_to_datetime(value) if isinstance(value, str) else value
            known = isinstance(time, datetime) and time.year in _YEARS
        except (ValueError, OverflowError):
            known = False
        if not known:
            raise self.error(key, "as a time such as '2020-07-01T10:00:00Z', from 1678 to 2261")
        found: datetime = time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time
        return found

    def mapping(self, key: str) -> Metadata:
        """Read a mapping; an absent one is empty."""
        value = self._value(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.error(key, "as a mapping")
        return Metadata(self.owner, value)

    def entries(self, key: str, known: Sequence[Any] = ()) -> tuple[Metadata, ...]:
        """Read a list of mappings.

        An entry may be a number, the index of one of the ``known`` mappings, as in items before
        STAC 0.9; without these it is there, but says nothing.
        """
        value = self._value(key)
        entries = () if value is None else _as_tuple(value)
        found = None if entries is None else [_entry(entry, known) for entry in entries]
        if found is None or any(entry is None for entry in found):
            raise self.error(key, "as a list of mappings")
        owners = (f"band {number} of {self.owner}" for number in range(1, len(found) + 1))
        return tuple(
            Metadata(owner, entry or {}) for owner, entry in zip(owners, found, strict=True)
        )


def _as_tuple(value: Any) -> tuple[Any, ...] | None:
    several = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim)
    return tuple(value) if several else None


def _as_number(value: Any) -> float | None:
    """Take a number, or one written as text."""
    if isinstance(value, bool) or not isinstance(value, Real | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _entry(value: Any, known: Sequence[Any]) -> Mapping[str, Any] | None:
    if isinstance(value, Integral) and not isinstance(value, bool):
        entry = known[int(value)] if 0 <= int(value) < len(known) else {}
        return entry if isinstance(entry, Mapping) else {}
    if value is None:
        return {}
    return value if isinstance(value, Mapping) else None


@dataclass(frozen=True)
class Asset:
    """One file of an item."""

    name: str
    #: Absolute and not signed.
    href: str
    media_type: str
    roles: frozenset[str]
    #: All other metadata, completed by those of the collection.
    fields: Metadata
    #: Bands that the item or its collection lists for all assets; not checked.
    item_bands: Sequence[Any] = ()


@dataclass(frozen=True, eq=False)
class StacItem:
    """The metadata of a STAC item that loading needs."""

    id: str
    #: Empty if the item has none.
    collection: str
    #: UTC, without a time zone: nominal time, else the start of its time span.
    time: datetime
    #: East is past 180 for an item across that meridian.
    bbox: BBox | None
    properties: Metadata
    assets: Mapping[str, Asset]
    #: The item itself, which is never modified.
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
        if geometry is None:
            return None
        try:
            shape = shapely.geometry.shape(geometry)
            known = bool((np.abs(shapely.get_coordinates(shape)) <= (360, 90)).all())
        except Exception:  # whatever broken GeoJSON makes shapely raise
            known = False
        if not known:
            whole = Metadata(f"item {self}", {"geometry": geometry})
            raise whole.error("geometry", "as GeoJSON in degrees")
        shape = around_180(shapely.make_valid(shape))
        return shape if shape.area > 0 else None


def find_items(items: object) -> list[StacItem]:
    """Read the items of any source that :func:`xchmv2.load` takes: each once, at least one."""
    found: dict[object, StacItem] = {}
    for item, base in _iter_items(items, None):
        read = _read_item(item, base)
        # Signatures stand in the queries of addresses.
        files = frozenset(asset.href.partition("?")[0] for asset in read.assets.values())
        found.setdefault((read.collection, read.id, read.time, files), read)
    if not found:
        named = isinstance(items, str | os.PathLike)
        raise CHMv2Error(
            "at least one STAC item",
            f"none in {items if named else f'the {type(items).__name__}'}",
            "widen the search: its area, its dates, its collection",
        )
    return list(found.values())


def _read_item(item: pystac.Item, base: str | None) -> StacItem:
    """Read one item; paths are relative to the item's own address, else to ``base``."""
    names = ("id", "datetime", "bbox", "links", "properties", "assets")
    content = {name: getattr(item, name) for name in names} | {"collection": item.collection_id}
    whole = Metadata(_called(content), content)
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
    own, common = item.get_self_href() or base, _collection_metadata(item)
    assets = {
        name: _read_asset(f"asset {name!r} of {whole.owner}", name, asset, own, properties, common)
        for name, asset in whole.mapping("assets").items()
    }
    return StacItem(id, collection or "", time, _read_bbox(whole), properties, assets, item)


def _read_asset(
    owner: str, name: str, asset: Any, base: str | None, item: Metadata, common: Metadata
) -> Asset:
    """Read one asset, with the metadata of the item and the collection that speak of it."""
    keys = ("href", "media_type", "roles", "extra_fields")
    whole = Metadata(owner, {key: getattr(asset, key, None) for key in keys})
    defaults = common.mapping("item_assets").get(name)
    defaults = defaults if isinstance(defaults, Mapping) else {}
    listed = (item.get("eo:bands"), item.get("bands"), common.get("bands"))
    return Asset(
        name=name,
        href=_absolute(whole, base),
        media_type=(whole.text("media_type") or "").lower(),
        roles=frozenset(whole.texts("roles")),
        fields=Metadata(owner, {**defaults, **whole.mapping("extra_fields")}),
        item_bands=next((bands for bands in listed if isinstance(bands, list)), []),
    )


def _collection_metadata(item: pystac.Item) -> Metadata:
    """Metadata of the assets in the item's collection, if that is at hand: nothing is fetched."""
    for link in item.links:
        target = link.target if link.rel in ("collection", "parent") else None
        if isinstance(target, pystac.Collection):
            content, others = target.extra_fields, target.summaries.other
            bands = content.get("bands") or others.get("eo:bands") or others.get("bands")
            found = {"item_assets": content.get("item_assets"), "bands": bands}
            return Metadata(f"collection {target.id}", found)
    return Metadata("no collection", {})


def _called(item: Mapping[str, Any]) -> str:
    collection = item.get("collection")
    prefix = f"{collection:.80}/" if isinstance(collection, str) else ""
    return f"item {prefix}{item.get('id')!s:.80}"


def _absolute(asset: Metadata, base: str | None = None) -> str:
    """Complete a relative address; an absolute path of an existing file is kept."""
    href = asset.get("href")
    try:
        if not isinstance(href, str) or not href or "\0" in href:
            raise ValueError
        if href.startswith("/vsi") or (os.path.isabs(href) and os.path.exists(href)):
            return href
        return make_absolute_href(href, base, start_is_dir=False)
    except ValueError:  # make_absolute_href raises it for an IPv6 address that is none
        fix = "correct it, remove the asset, or leave the item out"
        raise asset.error("href", "as the address of a file", fix) from None


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


def _iter_items(items: Any, base: str | None) -> Iterator[tuple[pystac.Item, str | None]]:
    """Yield items with the address of the file they were found in."""
    if isinstance(items, pystac.Item):
        yield items, base
    elif isinstance(items, pystac.Catalog):
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
                raise _not_stac(f"{type(items).__name__} {str(items)[:60]!r}")
            yield from _iter_items(item, base)
    else:
        raise _not_stac(f"{type(items).__name__} {str(items)[:60]!r}")


def _walk(catalogue: pystac.Catalog) -> Iterator[pystac.Item]:
    """Yield the items of a static catalogue; those of a whole API are refused."""
    conforms = getattr(catalogue, "conforms_to", None)
    if callable(conforms) and conforms("ITEM_SEARCH"):
        raise CHMv2Error(
            "items of a STAC API",
            f"the whole API {catalogue.id!r}",
            "search it: client.search(collections=[...], bbox=bbox, datetime=...)",
        )
    try:
        yield from catalogue.get_items(recursive=True)
    except Exception as error:  # pystac raises plain exceptions for unreadable links
        fix = "check the links in the catalogue"
        raise _broken("a catalogue whose items", repr(catalogue.id), error, fix) from error


def _iter_mapping(
    content: Mapping[str, Any], base: str | None
) -> Iterator[tuple[pystac.Item, str | None]]:
    kind = content.get("type")
    if kind == "FeatureCollection":
        for feature in Metadata("a FeatureCollection", content).entries("features"):
            yield from _iter_items(feature, base)
    elif kind == "Feature" and "assets" in content:
        yield _from_mapping(content), base
    else:
        told = f"type {kind!r:.60} and id {content.get('id')!r:.60}"
        raise _not_stac(f"a mapping of {told} with keys {sorted(map(str, content))[:8]}")


def _from_mapping(content: Mapping[str, Any]) -> pystac.Item:
    """Make a pystac item; fields that pystac would stumble over are read before."""
    whole = Metadata(_called(content), content)
    if not isinstance(content.get("properties"), Mapping):
        raise whole.error("properties", "as a mapping", "correct it, or leave the item out")
    whole.mapping("properties").time("datetime")
    whole.text("stac_version"), whole.texts("stac_extensions"), whole.entries("links")
    for name, asset in whole.mapping("assets").items():
        if not isinstance(asset, Mapping):
            raise whole.error("assets", f"with a mapping as {name!r}")
        _absolute(Metadata(f"asset {name!r} of {whole.owner}", asset))
    try:
        # The outline may have a million vertices, which pystac would copy one by one.
        item = pystac.Item.from_dict({**content, "geometry": None})
    except Exception as error:  # whatever a broken item makes pystac raise
        fix = "check it: pystac.Item.from_dict(...).validate()"
        raise _broken("STAC items that", repr(content.get("id")), error, fix) from error
    item.geometry = content.get("geometry")
    return item


def _iter_file(address: str) -> Iterator[tuple[pystac.Item, str | None]]:
    try:
        address = make_absolute_href(address)
        content = json.loads(pystac.StacIO.default().read_text(address))
    except Exception as error:  # OSError, ValueError, or pystac's plain Exception for URLs
        raise _broken(
            "a file of STAC items that", address, error, "check the path or URL"
        ) from error
    if isinstance(content, Mapping) and content.get("type") in ("Catalog", "Collection"):
        kind = pystac.Catalog if content["type"] == "Catalog" else pystac.Collection
        yield from _iter_items(kind.from_file(address), address)
    else:
        yield from _iter_items(content, address)


def _broken(what: str, name: str, error: Exception, fix: str) -> CHMv2Error:
    return CHMv2Error(f"{what} can be read", f"{name}: {type(error).__name__}: {error}", fix)


def _not_stac(found: str) -> CHMv2Error:
    return CHMv2Error(
        "STAC items",
        found,
        "pass items, an ItemCollection, a static catalogue, a pystac-client search, or the path or "
        "URL of such a file",
    )


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
    conditions = {  # lowest bit first
        "low_sun": sun_elevation < lowest_sun,
        "high_off_nadir": off_nadir > largest_off_nadir,
        "sun_elevation_unknown": sun_elevation.isnull(),
        "off_nadir_unknown": off_nadir.isnull(),
        "upsampled": upsampled,
        "partly_unreadable": unreadable,
    }
    flags = xr.zeros_like(sun_elevation, np.uint8)
    for bit, condition in enumerate(conditions.values()):
        if condition is not None:
            flags = flags | (condition.astype(np.uint8) << np.uint8(bit))
    flags.attrs = {
        "standard_name": "quality_flag",
        "long_name": "reasons to trust the heights of a date less",
        "flag_masks": np.array([1 << bit for bit in range(len(conditions))], np.uint8),
        "flag_meanings": " ".join(conditions),
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

    def along(values: Iterable[Any], dtype: Any, words: str, units: str = "") -> xr.DataArray:
        attrs = {"long_name": words} | ({"units": units} if units else {})
        return xr.DataArray(np.array(list(values), dtype), {"time": time}, "time", attrs=attrs)

    def worst(key: str, choose: Callable[[Iterable[float]], float]) -> list[float]:
        return [_worst(group, key, choose) for group in groups]

    platforms = [{item.properties.text("platform") for item in group} - {None} for group in groups]
    ids = [[item.id for item in group] for group in groups]
    elevations, angles = worst("view:sun_elevation", min), worst("view:off_nadir", max)
    coords = {
        "sun_elevation": along(elevations, float, "sun elevation above the horizon", "degree"),
        "off_nadir": along(angles, float, "view angle off nadir", "degree"),
        "cloud_cover": along(
            worst("eo:cloud_cover", max), float, "cloud cover of the item", "percent"
        ),
        "sun_azimuth": along(
            map(_azimuth, groups), float, "sun azimuth clockwise from north", "degree"
        ),
        "platform": along([";".join(sorted(map(str, p))) for p in platforms], object, "platform"),
        "item_ids": along([";".join(sorted(group)) for group in ids], object, "STAC items"),
        "native_resolution": along(
            native, float, "coarsest native pixel of the imagery on the ground", "m"
        ),
        "unreadable_assets": along(unreadable, np.int32, "files that could not be read"),
    }
    flags = quality_flags(
        coords["sun_elevation"],
        coords["off_nadir"],
        upsampled=along(upsampled, bool, "upsampled"),
        unreadable=coords["unreadable_assets"] > 0,
    )
    return {"time": flags["time"], **coords, "quality_flags": flags}


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
    found = [(_number(i, "view:sun_elevation"), _number(i, "view:sun_azimuth")) for i in group]
    suns = [sun for sun in found if not any(map(math.isnan, sun))]
    return min(suns)[1] if suns else _worst(group, "view:sun_azimuth", min)
