"""What determines the pixels of a store, described in JSON and compared when a run resumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from xchmv2.errors import StoreError
from xchmv2.predict import Prediction, compute_keys, find_prediction
from xchmv2.raster import ALGORITHM, find_grid
from xchmv2.store.template import Cube

_LONGEST_VALUE = 120


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
