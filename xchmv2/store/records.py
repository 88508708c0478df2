"""Metadata of a store: its fingerprint, its dates, and the record of written regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.predict import Prediction, compute_keys, find_prediction
from xchmv2.raster import ALGORITHM, find_grid
from xchmv2.store.lock import LOCK
from xchmv2.store.storage import (
    delete_below,
    delete_name,
    delete_object,
    edit_metadata,
    list_keys,
    list_names,
    read_metadata,
    read_nodes,
)
from xchmv2.store.template import Cube

GROUP = "xchmv2"
_DONE = f"{GROUP}/done"
_MARKER = f"{GROUP}/zarr.json"
#: 2: a date keeps its slot. In format 1 dates were moved, so that they lay in the order of time.
_FORMAT = 2
#: Dims of the record of written blocks.
_RECORD_DIMS = ("record", "block_y", "block_x")
_LONGEST_VALUE = 120


class Manifest:
    """The metadata of a store, which lie in a group beside the data."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._group = zarr.open_group(store, path=GROUP, mode="r+" if not store.read_only else "r")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the pixels except the dates."""
        return dict(self._group.attrs["fingerprint"])  # type: ignore[arg-type]

    @property
    def dates(self) -> dict[str, dict[str, Any]]:
        """By label, in order of the slots: entries of the dates.

        An entry holds the ``slot``, the index along the dates for ever; the index in the
        ``record``; source ``items``; digest of the ``imagery``; number of ``unreadable`` files.
        """
        dates: dict[str, Any] = dict(self._group.attrs["dates"])  # type: ignore[arg-type]
        order: Any = self._group.attrs.get("order")
        if order is not None:  # format 1
            dates = {label: {"slot": i, **dates[label]} for i, label in enumerate(order)}
        return dict(sorted(dates.items(), key=lambda item: item[1]["slot"]))

    @property
    def is_of_first_format(self) -> bool:
        """Whether dates have no slots of their own yet."""
        return self._group.attrs["format"] == 1

    @property
    def record(self) -> zarr.Array[Any]:
        """Array (record, block along y, block along x) of uint8: 1 where a block is written."""
        return zarr.open_array(self.store, path=_DONE, mode="r+")

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks along y and x."""
        _, y, x = zarr.open_array(self.store, path=_DONE, mode="r").shape
        return y, x

    def done(self) -> set[tuple[int, int, int]]:
        """List the written blocks of the present dates as (record, y, x)."""
        records = {date["record"] for date in self.dates.values()}
        keys: list[str] = []
        with suppress(Exception) if self.store.read_only else nullcontext():
            keys = list_keys(self.store, f"{GROUP}/")
        if _MARKER in keys:
            head = f"{_DONE}/c/"
            found = (key.removeprefix(head).split("/") for key in keys if key.startswith(head))
            # A file that is being written has a longer name, and a zip file lists its folders too.
            named = [parts for parts in found if len(parts) == 3 and all(map(str.isdigit, parts))]
            blocks = {(int(d), int(y), int(x)) for d, y, x in named}
        else:  # it cannot be listed, as over plain HTTP
            record = zarr.open_array(self.store, path=_DONE, mode="r")
            blocks = set(zip(*np.nonzero(np.asarray(record[...])), strict=True))
        return {block for block in blocks if block[0] in records}

    def commit(self, dates: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the dates, all at once; from then on the store has the present format."""
        count = 1 + max(date["record"] for date in dates.values())
        edit_metadata(
            self.store, _DONE, shape=[count, *self.blocks], dimension_names=list(_RECORD_DIMS)
        )
        kept = {name: self._group.attrs[name] for name in ("state", "fingerprint")}
        self._group.attrs.put({**kept, "format": _FORMAT, "dates": dict(dates)})

    def update(self, **attrs: Any) -> None:
        """Change attributes, all at once."""
        self._group.update_attributes(attrs)


def create_manifest(
    store: Store,
    content: Mapping[str, Any],
    dates: Mapping[str, Mapping[str, Any]],
    blocks: tuple[int, int],
) -> Manifest:
    """Write the metadata of a store whose template is complete.

    ``content`` is the fingerprint, ``dates`` are as :attr:`Manifest.dates`, ``blocks`` their number
    along y and x.
    """
    zarr.create_array(
        store,
        name=_DONE,
        shape=(len(dates), *blocks),
        chunks=(1, 1, 1),
        dtype="uint8",
        fill_value=0,
        compressors=None,
        dimension_names=_RECORD_DIMS,
        overwrite=True,
    )
    manifest = Manifest(store)
    manifest.update(state="ready", format=_FORMAT, fingerprint=dict(content), dates=dict(dates))
    return manifest


def consolidate(store: Store) -> None:
    """Copy the metadata of all arrays into the root, from which plain xarray opens the store.

    Until the next call a reader sees the store as it is now, whatever is appended. The function of
    zarr does the same, but warns that this is no part of the specification.
    """
    if store.supports_consolidated_metadata:
        nodes = {**read_nodes(store), _DONE: read_metadata(store, _DONE)}
        content = {"kind": "inline", "must_understand": False, "metadata": nodes}
        edit_metadata(store, "", consolidated_metadata=content)


def open_manifest(store: Store, *, half_removed: bool = False) -> Manifest | None:
    """Open the metadata of a store; None if it is empty or its template is incomplete.

    Raises
    ------
    StoreError
        If it holds something else, was written by a later version, a former version was killed
        while it moved dates, or it was half removed; with ``half_removed`` the last counts as
        empty, and moved dates do not matter.
    """
    attrs = _attributes(store)
    state = attrs.get("state")
    if state == "creating" or (state == "removing" and half_removed):
        return None
    if state == "removing":
        raise StoreError(
            f"{store} is half removed, because its removal was interrupted",
            fix="remove it again: xchmv2.store.remove_store(...), or xchmv2 predict --overwrite",
        )
    if state != "ready":
        foreign = _foreign_names(store)
        if not foreign:
            return None
        raise StoreError(
            "an empty location, or a store that .chmv2.to_zarr() wrote",
            f"{', '.join(sorted(foreign)[:5])} in {store}",
            "give another name; nothing there was changed",
        )
    if attrs["format"] not in (1, _FORMAT):
        raise StoreError(
            f"a store of format {_FORMAT} or 1",
            f"format {attrs['format']} in {store}",
            "upgrade xchmv2",
        )
    if attrs.get("pending") and not half_removed:
        raise StoreError(
            "a store whose dates are complete",
            f"one in which a former version of xchmv2 was killed while it moved dates: {store}",
            "make the call that was killed again with that version, which completes the store; or "
            "write to another store",
        )
    return Manifest(store)


def begin(store: Store) -> None:
    """Delete the leftovers of a killed start, and mark the store as being created."""
    for key in list_keys(store, ""):
        if key not in (LOCK, _MARKER):
            delete_object(store, key)
    zarr.open_group(store, path=GROUP, mode="a", attributes={"state": "creating"})


def remove_all(store: Store) -> None:
    """Delete everything but the lock, so that a kill never leaves a store that seems complete.

    The state is first set to "removing" and deleted last. Records are deleted before pixels: no
    region is ever recorded whose pixels are gone.
    """
    if _attributes(store).get("state") == "ready":
        Manifest(store).update(state="removing")
    delete_below(store, f"{_DONE}/c")
    for name in list_names(store):
        if name != GROUP:
            delete_name(store, name)
    for name in list_names(store, GROUP):
        if f"{GROUP}/{name}" not in (LOCK, _MARKER):
            delete_name(store, f"{GROUP}/{name}")
    delete_object(store, _MARKER)


def _attributes(store: Store) -> dict[str, Any]:
    try:
        return dict(zarr.open_group(store, path=GROUP, mode="r").attrs)
    except (FileNotFoundError, KeyError, ValueError):
        return {}


def _foreign_names(store: Store) -> set[str]:
    """Name everything in a store without a manifest except a lock and empty groups."""
    names = set(list_names(store)) - {GROUP}
    own = list_keys(store, f"{GROUP}/") if GROUP in list_names(store) else []
    # Another writer may be writing its lock or its first attributes at this moment.
    expected = (LOCK, _MARKER)
    found = names | {k for k in own if k not in expected and not k.endswith(".partial")}
    if found == {"zarr.json"} and not dict(zarr.open_group(store, mode="r").attrs):
        return set()
    return found


def validate_same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse a fingerprint that differs from that of a store, naming each field that does."""
    if ("arrays" in found) != ("arrays" in wanted):
        raise StoreError(
            f"{_kind(found)}, with which {where} was begun",
            _kind(wanted),
            "select and mask the imagery before predict(), not its result; or write to another "
            "store",
        )
    fields = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if fields:
        raise StoreError(
            f"the model, data and options with which {where} was begun: " + _listed(fields, found),
            _listed(fields, wanted),
            "call it as before to resume, or write to another store",
        )


def _kind(content: Mapping[str, Any]) -> str:
    if "arrays" not in content:
        return "the result of predict() as it is"
    names = ", ".join(f"{name} from {array}" for name, array in content["arrays"].items())
    return f"arrays computed in another way ({names})"


def _listed(fields: Iterable[str], content: Mapping[str, Any]) -> str:
    found = []
    for name in fields:
        text = "not given" if content.get(name) is None else str(content[name])
        short = text if len(text) < _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
        found.append(f"{name} {short}")
    return "; ".join(found)


def fingerprint(cube: Cube) -> dict[str, Any]:
    """Describe in JSON everything that determines a cube's pixels except its dates.

    A prediction is described by its model, grid and options, so that another run of the same
    resumes, whatever its imagery's addresses, chunks and dates. Any other array, even one computed
    from a prediction, is described by its dask name.
    """
    made = _find_predictions(cube)
    names = {name: array.name for name, array in cube.arrays.items()}
    return {
        "grid": _grid(cube),
        "block": list(cube.block),
        **(_describe_prediction(made) if made else {"arrays": names}),
    }


def _find_predictions(cube: Cube) -> dict[str, Prediction]:
    """Find the prediction whose layers all variables are; empty if one is anything else."""
    found = {name: find_prediction(array) for name, array in cube.arrays.items()}
    made = {name: prediction for name, prediction in found.items() if prediction is not None}
    one = len(made) == len(found) and len({p.token for p in made.values()}) == 1
    return made if one else {}


def imagery_digests(cube: Cube) -> list[str]:
    """Digest at most nine windows of the imagery of each date; "" where there is no prediction."""
    made = next(iter(_find_predictions(cube).values()), None)
    if made is None:
        return [""] * len(cube.labels)
    chunks = list(made.samples)  # one for each chunk of dates, in order
    return [digest for found in compute_keys(made.graph, chunks) for digest in found]


def _grid(cube: Cube) -> dict[str, Any]:
    first = next(iter(cube.dataset.data_vars.values()))
    grid = find_grid(first)
    return {
        "dims": [str(dim) for dim in first.dims],
        "shape": list(grid.shape),
        "crs": str(grid.crs),
        # Rounded, because coordinates that were summed in another way carry other noise.
        "edges": [round(value, 6) for value in grid.edges],
        "pixel": [round(value, 9) for value in grid.pixel],
    }


def _describe_prediction(made: dict[str, Prediction]) -> dict[str, Any]:
    job = next(iter(made.values())).job
    reader: Any = job.reader
    rows, cols = (asdict(along) for along in (reader.rows, reader.cols))
    return {
        "algorithm": ALGORITHM,
        "weights": job.model.weights_sha256,
        "config and normalisation": job.model.config_sha256,
        "dtype": job.model.dtype,
        "tile": job.rows.tile,
        "overlap": job.rows.overlap,
        "layers": {name: prediction.layer for name, prediction in made.items()},
        "bands": list(job.bands),
        "value_range": [list(pair) for pair in zip(job.scaling.low, job.scaling.high, strict=True)],
        "nodata": [None if v is None else repr(float(v)) for v in reader.valid_pixels.nodata],
        "valid mask": job.masked,
        "erode": reader.valid_pixels.erode,
        "resolution": {"y": rows, "x": cols},
        "origin": [job.rows.origin, job.cols.origin],
    }
