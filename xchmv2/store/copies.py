"""The template of a store, and its copy: all that is not pixels, restored where it is damaged.

The copy is one object, named by its content. The manifest names the copy that is valid, so both
change at once. The root holds a copy of the manifest and of all metadata, from which plain xarray
opens the store. Whatever is lost alone is thus held elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from zarr.abc.store import Store
from zarr.storage import MemoryStore

from xchmv2.store.records import GROUP, MARKER, RECORDS, Manifest
from xchmv2.store.storage import (
    as_json,
    checksum,
    damaged,
    delete_object,
    is_icechunk,
    list_keys,
    list_names,
    read_metadata,
    read_object,
    read_objects,
    write_object,
)

_COPIES = f"{GROUP}/template"
_ROOT = "zarr.json"
_CHUNK = re.compile(r"c([./]\d+)*")

#: By key: an object of the template, or size and checksum of one that is not copied, a chunk of
#: coordinates along both y and x.
_Template = Mapping[str, bytes | tuple[int, int]]


def collect(store: Store, variables: list[str]) -> _Template:
    """Read the template of a store: everything but pixels and our own metadata."""
    content = read_metadata(store, "")
    content.pop("consolidated_metadata", None)  # which root() adds
    found: dict[str, bytes | tuple[int, int]] = {_ROOT: as_json(content)}
    for name in {*list_names(store), *variables} - {GROUP, _ROOT}:
        metadata = read_metadata(store, name)
        keys = [f"{name}/{_ROOT}"] if metadata or name in variables else []
        if name not in variables:  # beside chunks other files may lie there
            listed = list_keys(store, f"{name}/") if metadata else []
            keys += [key for key in listed if _CHUNK.fullmatch(key.removeprefix(f"{name}/"))]
        for key, data in read_objects(store, keys).items():
            if data is None:
                raise damaged(store, key)
            large = len(metadata.get("shape", ())) > 1 and not key.endswith(_ROOT)
            found[key] = checksum(data) if large else data
    return found


def read_template(manifest: Manifest) -> _Template:
    """Read the template from its copy; if that is damaged, from the objects that it copies."""
    if manifest.copy is None:
        return collect(manifest.store, manifest.variables)
    data = read_object(manifest.store, f"{_COPIES}/{manifest.copy}")
    if data is not None and _name(data) == manifest.copy:
        return _parse(data)
    found = collect(manifest.store, manifest.variables)
    if _name(_dump(found)) != manifest.copy:
        raise damaged(manifest.store, f"{_COPIES}/{manifest.copy}")
    return found


def publish(
    manifest: Manifest,
    template: _Template,
    former: _Template,
    made: Store,
    validate: Callable[[], None] = lambda: None,
) -> Manifest:
    """Write the changed objects of a template, then the manifest, then the root.

    Until the manifest is written a reader of the former one finds all that it needs: objects are
    only extended. ``made`` holds the new template. ``validate`` refuses to go on if this process is
    no longer the only writer.
    """
    store, data = manifest.store, _dump(template)
    manifest = replace(manifest, copy=None if is_icechunk(store) else _name(data))
    if manifest.copy is not None:
        validate()
        write_object(store, f"{_COPIES}/{manifest.copy}", data)
    # A chunk is there before it is needed; icechunk is one transaction, but refuses such chunks.
    last = {key: key.endswith(_ROOT) != is_icechunk(store) for key in template}
    for key, content in sorted(template.items(), key=lambda item: last[item[0]]):
        if key != _ROOT and former.get(key) != content:
            validate()
            write_object(store, key, read_object(made, key) or b"")
    validate()
    write_object(store, f"{RECORDS}/{_ROOT}", manifest.record_metadata)
    write_object(store, MARKER, manifest.to_bytes())
    write_object(store, _ROOT, root(manifest, template))
    for key in former.keys() - template.keys():
        delete_object(store, key)
    drop_copies(manifest)
    return manifest


def drop_copies(manifest: Manifest) -> None:
    """Delete copies of the template that are not valid any more, or never were."""
    for key in list_keys(manifest.store, f"{_COPIES}/"):
        if key != f"{_COPIES}/{manifest.copy}":
            delete_object(manifest.store, key)


def root(manifest: Manifest, template: _Template) -> bytes:
    """Write the metadata of the root with those of all arrays, as the function of zarr adds them.

    That function warns that this is no part of the specification. A reader sees the store as it is
    now until the root is replaced, whatever is appended.
    """
    content = json.loads(_bytes(template, _ROOT))
    if not manifest.store.supports_consolidated_metadata:
        return as_json(content)
    nodes = {
        key.removesuffix(f"/{_ROOT}"): json.loads(data)
        for key, data in sorted(template.items())
        if key.endswith(f"/{_ROOT}") and isinstance(data, bytes)
    }
    nodes |= {GROUP: json.loads(manifest.to_bytes())}
    nodes |= {RECORDS: json.loads(manifest.record_metadata)}
    inline = {"kind": "inline", "must_understand": False, "metadata": nodes}
    return as_json({**content, "consolidated_metadata": inline})


def _objects_of(manifest: Manifest, template: _Template) -> dict[str, bytes | tuple[int, int]]:
    """All that a store holds beside pixels and records, by key."""
    own = {
        f"{RECORDS}/{_ROOT}": manifest.record_metadata,
        MARKER: manifest.to_bytes(),
        _ROOT: root(manifest, template),
    }
    if manifest.copy is not None:
        own[f"{_COPIES}/{manifest.copy}"] = _dump(template)
    return {**template, **own}


def find_changed(manifest: Manifest, template: _Template) -> dict[str, bytes | None]:
    """Find objects that are not as the manifest wants them; None where there is no copy of one."""
    wanted = _objects_of(manifest, template)
    found = read_objects(manifest.store, wanted)
    return {
        key: content if isinstance(content, bytes) else None
        for key, content in wanted.items()
        if (found[key] if isinstance(content, bytes) else checksum(found[key])) != content
    }


def in_memory(template: _Template) -> MemoryStore:
    """Make a store of a template, to be opened or changed."""
    store = MemoryStore()
    for key, content in template.items():
        if isinstance(content, bytes):
            write_object(store, key, content)
    return store


def _bytes(template: _Template, key: str) -> bytes:
    content = template[key]
    assert isinstance(content, bytes)
    return content


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _dump(template: _Template) -> bytes:
    return as_json(
        {
            key: base64.b64encode(content).decode() if isinstance(content, bytes) else content
            for key, content in sorted(template.items())
        }
    )


def _parse(data: bytes) -> _Template:
    return {
        key: base64.b64decode(content) if isinstance(content, str) else (content[0], content[1])
        for key, content in json.loads(data).items()
    }
