"""STAC items, wherever they come from, read into one plain form."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pystac
from pystac.utils import make_absolute_href

from xchmv2.errors import CHMv2Error

_FIX = (
    "pass items, an ItemCollection, a static catalogue, a pystac-client search, or the path or "
    "URL of such a file"
)


@dataclass(frozen=True)
class Asset:
    """One file of an item.

    Parameters
    ----------
    name : str
        Its key among the item's assets.
    href : str
        Absolute path or URL, not signed.
    media_type : str
        MIME type, lower case; empty if the item does not tell.
    roles : frozenset of str
        What the file is for.
    fields : mapping
        All further metadata of the asset.
    """

    name: str
    href: str
    media_type: str
    roles: frozenset[str]
    fields: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class StacItem:
    """What loading needs to know of a STAC item; the item itself is never modified.

    Parameters
    ----------
    id, collection : str
        Identity; the collection is empty if the item does not tell.
    time : datetime
        UTC, without a time zone: nominal time, else the start of its time span.
    geometry : mapping or None
        GeoJSON footprint.
    bbox : tuple of float or None
        (west, south, east, north) [degrees].
    properties : mapping
        The item's metadata.
    assets : mapping
        Files by name.
    source : pystac.Item
        The item as it came.
    """

    id: str
    collection: str
    time: datetime
    geometry: Mapping[str, Any] | None
    bbox: tuple[float, float, float, float] | None
    properties: Mapping[str, Any]
    assets: Mapping[str, Asset]
    source: pystac.Item

    def __str__(self) -> str:
        return f"{self.collection}/{self.id}" if self.collection else self.id


def find_items(items: object) -> list[StacItem]:
    """Read items of any kind, each once, in the order they come.

    Parameters
    ----------
    items : object
        pystac items, collections or catalogues; dicts; an ItemCollection; a pystac-client search;
        paths or URLs of JSON files with any of these; or an iterable of them.

    Returns
    -------
    list of StacItem
        At least one.

    Raises
    ------
    CHMv2Error
        If there is none, or something is not STAC or cannot be read.
    """
    found: dict[object, StacItem] = {}
    for item, base in _iter_items(items, None):
        read = read_item(item, base)
        found.setdefault(_identity(read), read)
    if not found:
        raise CHMv2Error(
            "at least one STAC item",
            f"none in {_described(items)}",
            "widen the search: its area, its dates, its collection",
        )
    return list(found.values())


def _identity(item: StacItem) -> object:
    """Tell items apart; not by signatures, which are in the query of an address."""
    files = frozenset(asset.href.partition("?")[0] for asset in item.assets.values())
    return item.collection, item.id, item.time, files


def read_item(item: pystac.Item, base: str | None = None) -> StacItem:
    """Read one item; relative paths count from the item's own address, else from ``base``."""
    own = item.get_self_href() or base
    times = (item.datetime, item.common_metadata.start_datetime, item.common_metadata.end_datetime)
    time = next((t for t in times if t is not None), None)
    if time is None:
        raise CHMv2Error(
            "items with a datetime or start_datetime",
            f"item {item.id!r} without",
            "give it one: item.datetime = ...",
        )
    assets = {
        name: Asset(
            name=name,
            href=_absolute(asset.href, own),
            media_type=(asset.media_type or "").lower(),
            roles=frozenset(asset.roles or ()),
            fields=asset.extra_fields,
        )
        for name, asset in item.assets.items()
    }
    return StacItem(
        id=item.id,
        collection=item.collection_id or "",
        time=time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time,
        geometry=item.geometry,
        bbox=_bbox(item.bbox),
        properties=item.properties,
        assets=assets,
        source=item,
    )


def _absolute(href: str, base: str | None) -> str:
    """Complete a relative address; what exists on this machine is not one of a web server."""
    if href.startswith("/vsi") or (os.path.isabs(href) and os.path.exists(href)):
        return href
    return make_absolute_href(href, base, start_is_dir=False)


def _bbox(bbox: list[float] | None) -> tuple[float, float, float, float] | None:
    if not bbox or len(bbox) not in (4, 6):
        return None
    half = len(bbox) // 2  # six numbers: with heights
    return (float(bbox[0]), float(bbox[1]), float(bbox[half]), float(bbox[half + 1]))


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
    elif isinstance(items, Iterable):
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
        for feature in content.get("features", ()):
            yield from _iter_items(feature, base)
    elif kind == "Feature" and "assets" in content:
        try:
            yield pystac.Item.from_dict(dict(content)), base
        except Exception as error:  # whatever a broken item makes pystac raise
            raise CHMv2Error(
                "valid STAC items",
                f"{content.get('id')!r}: {type(error).__name__}: {error}",
                "check it: pystac.Item.from_dict(...).validate()",
            ) from error
    else:
        raise CHMv2Error(
            "STAC items", f"a mapping of type {kind!r} with keys {sorted(content)[:8]}", _FIX
        )


def _iter_file(address: str) -> Iterator[tuple[pystac.Item, str | None]]:
    address = make_absolute_href(address)
    try:
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
    """Do not walk a whole STAC API; a client of a static catalogue is fine."""
    conforms = getattr(catalogue, "conforms_to", None)
    if callable(conforms) and conforms("ITEM_SEARCH"):
        raise CHMv2Error(
            "items out of a STAC API",
            f"the whole API {catalogue.id!r}",
            "search it: client.search(collections=[...], bbox=bbox, datetime=...)",
        )


def _described(items: object) -> str:
    if isinstance(items, str | os.PathLike):
        return str(items)
    return f"the {type(items).__name__}"


def _not_stac(items: object) -> CHMv2Error:
    return CHMv2Error("STAC items", f"{type(items).__name__} {str(items)[:60]!r}", _FIX)
