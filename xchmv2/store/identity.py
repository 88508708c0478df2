"""What determines the pixels of a cube, as plain JSON: two equal ones are the same heights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from xchmv2 import defaults
from xchmv2._dask import Prediction, compute_keys, find_prediction
from xchmv2.imagery import find_grid
from xchmv2.store.cube import Cube


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
        "algorithm": defaults.ALGORITHM,
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
