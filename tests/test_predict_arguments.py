"""Wrong values for any argument end in a CHMv2Error: no raw error, no value taken for another."""

import datetime
import inspect
import random
import warnings
from itertools import count

import numpy as np
import pytest
from conftest import cube

import xchmv2
from xchmv2 import change as change_module
from xchmv2.errors import CHMv2Error
from xchmv2.predict import plan, predict
from xchmv2.store import open_zarr, to_zarr
from xchmv2.validation import validate
from xchmv2.zonal import zonal

GRID = dict(tile=64, overlap=16)
#: Values that are wrong for nearly every argument, by a name that a failure shows.
POOL = {
    "None": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "1e30": 1e30,
    "10**30": 10**30,
    "''": "",
    "'x'": "x",
    "'0.6'": "0.6",
    "b'x'": b"x",
    "True": True,
    "[]": [],
    "{}": {},
    "set()": set(),
    "object()": object(),
    "a function": lambda: 1,
    "[1, 2]": np.array([1, 2]),
    "an image": np.zeros((3, 64, 96), "uint8"),
    "a date": datetime.date(2020, 1, 1),
    "a datetime64": np.datetime64("2020"),
}
LARGE = {"1e30", "10**30"}
#: Which values of the pool an argument takes, besides its default; all others must be refused.
RIGHT = {
    "nodata": {"nan", "inf", "-1", "0", "1.5", *LARGE},
    "value_range": {"[1, 2]"},
    "erode": {"0", "10**30"},
    "resolution": {"1.5"},
    "tile": {"10**30"},
    "overlap": {"0"},
    "block": {"10**30"},
    "batch_size": {"10**30"},
    "compile": {"True"},
    "progress": {"True"},
    "time": {"True"},
    "store": {"'x'", "'0.6'"},
    "verify": {"True"},
    "fsync": {"True"},
    "regions": {"[]", "{}", "set()"},
    "shards": {"True"},
    "compute": {"True"},
    "storage_options": {"{}"},
    "sigma": {"1.5", *LARGE},
    "correlation_length": {"0", "1.5", *LARGE},
    "error_correlation": {"0", "-1"},
    "threshold": {"1.5", *LARGE},
    "min_area": {"inf", "0", "1.5", *LARGE},
    "radius": {"1.5", *LARGE},
    "percentile": {"0", "1.5"},
    "column": {"''", "'x'", "'0.6'"},
    "classes": {"[1, 2]"},
    "percentiles": {"[1, 2]"},
}
#: What some functions take for an argument and others refuse: no loss is a negative change, and a
#: known height has no error.
EITHER = {"threshold": {"-1"}, "sigma": {"0"}, "block": {"10**30"}, "store": POOL, "column": POOL}
#: Arguments whose default, None, is right as well.
OPTIONAL = {
    *("bands", "value_range", "nodata", "valid", "resolution", "block", "regions", "progress"),
    *("storage_options", "sigma", "correlation_length", "stable", "threshold", "opening"),
    *("min_area", "mask", "stats", "column", "pixel_size"),
}
#: Arguments that a plan takes as any text, since it holds for a model that is not here.
RIGHT_IN_A_PLAN = {"model": {"''", "'x'", "'0.6'"}}


@pytest.fixture(scope="module")
def calls(tiny_checkpoint, tmp_path_factory):
    """Each function with a way to make arguments that work."""
    geopandas, shapely = pytest.importorskip("geopandas"), pytest.importorskip("shapely")
    distributed = pytest.importorskip("distributed")
    folder, number = tmp_path_factory.mktemp("stores"), count()
    imagery = cube((64, 96), times=4)
    lazy = imagery.chunk(x=64)
    rng = np.random.default_rng(0)
    heights = (imagery.red / 10 + rng.random(imagery.red.shape)).astype(np.float32)
    heights = heights.rename("canopy_height").assign_attrs(units="m")
    before, after = (heights.isel(time=k, drop=True) for k in (0, 1))
    changed = change_module.difference(before, after, sigma=1.0)
    x, y = (imagery[dim].values for dim in ("x", "y"))
    square = geopandas.GeoSeries([shapely.box(x[5], y[40], x[60], y[5])], crs=32633)
    to_zarr(heights.chunk(), folder / "done.zarr", progress=False)
    cluster = distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0")
    client = distributed.Client(cluster, set_as_default=False)
    imagery_call = dict(imagery=lazy, model=tiny_checkpoint, **GRID)
    change = change_module
    yield {
        predict: lambda: imagery_call,
        plan: lambda: imagery_call,
        to_zarr: lambda: dict(
            height=before.chunk(), store=folder / f"{next(number)}.zarr", progress=False
        ),
        open_zarr: lambda: dict(store=folder / "done.zarr"),
        xchmv2.warmup: lambda: dict(client=client, model=tiny_checkpoint),
        change.difference: lambda: dict(before=before, after=after, sigma=1.0),
        change.loss: lambda: dict(change=changed),
        change.events: lambda: dict(height=heights),
        change.trend: lambda: dict(height=heights),
        zonal: lambda: dict(height_or_change=changed, polygons=square),
        validate: lambda: dict(height=before, reference=after),
    }
    client.close()
    cluster.close()


def is_right(function, argument, value):
    """Whether a value of the pool is one that an argument takes."""
    right = RIGHT.get(argument, set())
    if function is plan:
        right = RIGHT_IN_A_PLAN.get(argument, right)
    return value in right | {*EITHER.get(argument, ())} or (
        value == "None" and argument in OPTIONAL
    )


def test_wrong_values_are_refused_in_a_sentence(calls, tmp_path, monkeypatch):
    """Some 600 draws of a function, one of its arguments and a value."""
    monkeypatch.chdir(tmp_path)  # "x" is a right name of a store
    draw, wrong = random.Random(14), []
    every = [
        (function, argument, value)
        for function in calls
        for argument in inspect.signature(function).parameters
        for value in POOL
    ]
    for function, argument, value in draw.sample(every, 600):
        told = f"{function.__name__}({argument}={value})"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function(**{**calls[function](), argument: POOL[value]})
            except CHMv2Error as error:
                if len(str(error)) > 600 or not (error.expected and error.fix):
                    wrong.append(f"{told}: {error}")
                # None may be refused.
                if value in {*RIGHT.get(argument, ())} - {*EITHER.get(argument, ())}:
                    wrong.append(f"{told} was refused: {error}")
            except Exception as error:
                wrong.append(f"{told}: {type(error).__name__}: {error}")
            else:
                if not is_right(function, argument, value):
                    wrong.append(f"{told} was taken")
    assert not wrong, "\n".join(wrong)
