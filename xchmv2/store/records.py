"""Records of a store: which regions are written, and of which prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import zarr
from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.predict import Prediction, compute_keys, find_prediction
from xchmv2.raster import ALGORITHM, find_grid
from xchmv2.store.lock import LOCK
from xchmv2.store.storage import delete_below, delete_name, delete_object, list_keys, list_names
from xchmv2.store.template import Cube

GROUP = "xchmv2"
_DONE = f"{GROUP}/done"
_MARKER = f"{GROUP}/zarr.json"
_FORMAT = 1
_LONGEST_VALUE = 120


class Manifest:
    """The record that lies beside the data.

    Parameters
    ----------
    store : zarr Store
        A store that has one.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._group = zarr.open_group(store, path=GROUP, mode="r+" if not store.read_only else "r")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What determines the pixels, but for the dates."""
        return dict(self._group.attrs["fingerprint"])  # type: ignore[arg-type]

    @property
    def dates(self) -> dict[str, dict[str, Any]]:
        """By label: which ``record`` is theirs, their source ``items`` and ``imagery`` digest."""
        return dict(self._group.attrs["dates"])  # type: ignore[arg-type]

    @property
    def order(self) -> list[str]:
        """Labels in the order of the data's dates."""
        return list(self._group.attrs["order"])  # type: ignore[arg-type]

    @property
    def pending(self) -> dict[str, Any] | None:
        """What is left of an extension that was begun; None mostly."""
        return self._group.attrs.get("pending")  # type: ignore[return-value]

    @property
    def generation(self) -> int:
        """How often dates were added; places in the data hold for one generation alone."""
        return int(self._group.attrs["generation"])  # type: ignore[arg-type]

    @property
    def record(self) -> zarr.Array[Any]:
        """One whole number for each record, and block along y and x: 1 once it is down."""
        return zarr.open_array(self.store, path=_DONE, mode="r+")

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks there are along y and x."""
        _, y, x = zarr.open_array(self.store, path=_DONE, mode="r").shape
        return y, x

    def done(self) -> set[tuple[int, int, int]]:
        """List the blocks that are down as (record, y, x)."""
        head = f"{_DONE}/c/"
        found = (key.removeprefix(head).split("/") for key in list_keys(self.store, head))
        # A file that is just being written has a longer name.
        return {(int(d), int(y), int(x)) for d, y, x in found if x.isdigit()}

    def forget(self, record: int) -> None:
        """Take the blocks of one record for not written."""
        delete_below(self.store, f"{_DONE}/c/{record}")

    def update(self, **attrs: Any) -> None:
        """Change attributes, all at once."""
        self._group.update_attributes(attrs)

    def add_records(self, count: int) -> None:
        """Make room for more dates."""
        record = self.record
        if record.shape[0] < count:
            record.resize((count, *record.shape[1:]))


def create_manifest(
    store: Store,
    content: Mapping[str, Any],
    dates: Mapping[str, Mapping[str, Any]],
    blocks: tuple[int, int],
) -> Manifest:
    """Write the record of a store whose template is complete.

    Parameters
    ----------
    store : zarr Store
        Where.
    content : mapping
        The fingerprint.
    dates : mapping
        As :attr:`Manifest.dates`, in the order of the data.
    blocks : tuple of int
        Blocks along y and x.
    """
    zarr.create_array(
        store,
        name=_DONE,
        shape=(len(dates), *blocks),
        chunks=(1, 1, 1),
        dtype="uint8",
        fill_value=0,
        compressors=None,
        overwrite=True,
    )
    attrs = {"state": "ready", "format": _FORMAT, "fingerprint": dict(content), "generation": 0}
    manifest = Manifest(store)
    manifest.update(**attrs, dates=dict(dates), order=list(dates), pending=None)
    return manifest


def open_manifest(store: Store, *, half_removed: bool = False) -> Manifest | None:
    """Open a store's record; None where the store is empty, or was hardly begun.

    Parameters
    ----------
    store : zarr Store
        Where.
    half_removed : bool, default False
        Whether a store whose removal was interrupted counts as empty, instead of being refused.

    Raises
    ------
    StoreError
        If something else lies there, a later version wrote it, or it was half removed.
    """
    attrs = _attributes(store)
    if attrs.get("state") == "creating":
        return None
    if attrs.get("state") == "removing":
        if half_removed:
            return None
        raise StoreError(
            "a whole store",
            f"one that was half removed when its removal was interrupted: {store}",
            "remove it again: xchmv2.store.remove_store(...), or xchmv2 predict --overwrite",
        )
    if attrs.get("state") != "ready":
        foreign = _foreign_names(store)
        if not foreign:
            return None
        raise StoreError(
            "an empty place, or a store that .chmv2.to_zarr() wrote",
            f"{', '.join(sorted(foreign)[:5])} in {store}",
            "give another name; nothing there was touched",
        )
    if attrs["format"] != _FORMAT:
        raise StoreError(
            f"a store of format {_FORMAT}",
            f"format {attrs['format']} in {store}",
            "upgrade xchmv2",
        )
    return Manifest(store)


def begin(store: Store) -> None:
    """Clear what a killed start left behind, and say that a start is under way."""
    for key in list_keys(store, ""):
        if key not in (LOCK, _MARKER):
            delete_object(store, key)
    zarr.open_group(store, path=GROUP, mode="a", attributes={"state": "creating"})


def remove_all(store: Store) -> None:
    """Delete a store but for its lock, so that a kill never leaves one that passes for whole.

    Notes
    -----
    The state says first that the store is being removed, and goes last. The records go before the
    pixels: no region is ever recorded whose pixels are gone.
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
    """Name what lies in a store without a manifest, but for a lock and empty groups."""
    names = set(list_names(store)) - {GROUP}
    own = list_keys(store, f"{GROUP}/") if GROUP in list_names(store) else []
    # Another writer may be putting its lock or its first note there just now.
    expected = (LOCK, _MARKER)
    found = names | {k for k in own if k not in expected and not k.endswith(".partial")}
    if found == {"zarr.json"} and not dict(zarr.open_group(store, mode="r").attrs):
        return set()
    return found


def validate_same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Check that two fingerprints are equal.

    Raises
    ------
    StoreError
        If they differ; the message names each field that does.
    """
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
            f"what determines the pixels to be what {where} was begun with: "
            + _listed((name, found.get(name)) for name in fields),
            _listed((name, wanted.get(name)) for name in fields),
            "call it as before to go on, or write to another store",
        )


def _kind(content: Mapping[str, Any]) -> str:
    if "arrays" not in content:
        return "the result of predict() as it is"
    names = ", ".join(f"{name} from {array}" for name, array in content["arrays"].items())
    return f"arrays computed in another way ({names})"


def _listed(pairs: Iterable[tuple[str, Any]]) -> str:
    return "; ".join(f"{name} {_short(value)}" for name, value in pairs)


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) < _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def fingerprint(cube: Cube) -> dict[str, Any]:
    """Describe all that determines a cube's pixels but its dates.

    Parameters
    ----------
    cube : Cube
        What is to be written.

    Returns
    -------
    dict
        JSON. A prediction is described by what made it, so that another run of the same is known
        again, whatever its imagery's addresses, chunks and dates. Any other array, even one
        computed from a prediction, is described by its dask name.
    """
    made = find_predictions(cube)
    return {
        "grid": _grid(cube),
        "block": list(cube.block),
        **(_prediction(made) if made else _array_names(cube)),
    }


def find_predictions(cube: Cube) -> dict[str, Prediction]:
    """Find, for all variables, which layer of one prediction they are; none if one is not."""
    found = {name: find_prediction(array) for name, array in cube.arrays.items()}
    made = {name: prediction for name, prediction in found.items() if prediction is not None}
    one = len(made) == len(found) and len({p.token for p in made.values()}) == 1
    return made if one else {}


def imagery_digests(cube: Cube) -> list[str]:
    """Digest a few windows of the imagery behind each date.

    Parameters
    ----------
    cube : Cube
        What is to be written.

    Returns
    -------
    list of str
        One per date; empty strings where the cube is no prediction. Reads at most nine places of
        each band and date.
    """
    made = next(iter(find_predictions(cube).values()), None)
    if made is None:
        return [""] * len(cube.labels)
    chunks = list(made.samples)  # one for each chunk of dates, in order
    return [digest for found in compute_keys(made.graph, chunks) for digest in found]


def _grid(cube: Cube) -> dict[str, Any]:
    first = next(iter(cube.dataset.data_vars.values()))
    grid = find_grid(first)
    found: dict[str, Any] = {"dims": [str(d) for d in first.dims], "shape": list(grid.shape)}
    # Rounded, so that noise in coordinates that were added up another way does not matter.
    edges, pixel = ([round(v, 6) for v in grid.edges], [round(v, 9) for v in grid.pixel])
    return {**found, "crs": str(grid.crs), "edges": edges, "pixel": pixel}


def _array_names(cube: Cube) -> dict[str, Any]:
    return {"arrays": {name: array.name for name, array in cube.arrays.items()}}


def _prediction(made: dict[str, Prediction]) -> dict[str, Any]:
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
