"""Advice is executed: each call that a message recommends is taken from it, run, and looked at.

A case calls a function with something that it refuses. The advice is read from the message that
comes: arguments (``tile=448``, ``.predict(..., tile=448)``), or a new object made from the one that
was refused (``height.isel(time=0)``). The same call, with that put in, must give the right result.
"""

import ast
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import odc.geo.xr
import pandas as pd
import pytest
import rasterio
import reference
import rioxarray  # noqa: F401  (registers .rio)
import shapely
import xarray as xr
from conftest import cube
from odc.geo.geobox import GeoBox

import xchmv2
from xchmv2 import change, plotting, structure, training, validation, zonal
from xchmv2.errors import CHMv2Error
from xchmv2.raster import label_patches

PACKAGE = Path(xchmv2.__file__).parent
#: Calls in messages for which there is no case here; the number may only fall.
MOST_WITHOUT_A_CASE = 70
# A small scene leaves its offset and its shift in doubt.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the offset of:xchmv2.change.ComparisonWarning"),
    pytest.mark.filterwarnings("ignore:.*its shift cannot be told:xchmv2.change.ComparisonWarning"),
]
MODEL = reference.whole_tile_model()
GRID = dict(tile=64, overlap=16)
WORDS = {
    "np": np, "xr": xr, "pd": pd, "pandas": pd, "xchmv2": xchmv2, "rasterio": rasterio,
    "geopandas": geopandas, "GeoBox": GeoBox, "odc": odc,
}  # fmt: skip


@dataclass
class Case:
    """A call that is refused, and what must be true of it once the advice was followed.

    ``call`` takes ``given`` as keywords; ``blanks`` fills what the message leaves to the user;
    ``which`` is the number of the advice among several; ``words`` are further names in it.
    """

    call: Callable[..., Any]
    given: dict[str, Any]
    right: Callable[[Any], Any]
    blanks: dict[str, str] = field(default_factory=dict)
    which: int = 0
    words: dict[str, Any] = field(default_factory=dict)


def read_advice(fix: str) -> list[str]:
    """Find the calls and arguments in a message's advice, longest first where they nest."""
    found = []
    for start in re.finditer(r"(?<![\w.'\"])(?=[A-Za-z_.(])", fix):
        for end in range(len(fix), start.start(), -1):
            text = fix[start.start() : end].rstrip(" ,;.")
            if "(" not in text and "=" not in text:
                break
            if (
                " ." not in text
                and " in " not in text
                and _is_code(text)
                and not any(text in longer for longer in found)
            ):
                found.append(text)
                break
    return found


def _is_code(text: str) -> bool:
    """Whether a text is a call, a comparison of one, or arguments in the form name=value."""
    return _call(text) is not None or _arguments(text) is not None


def _call(text: str) -> ast.expr | None:
    try:
        tree = ast.parse("_" + text if text.startswith(".") else text, mode="eval").body
    except SyntaxError:
        return None
    calls = any(isinstance(node, ast.Call) for node in ast.walk(tree))
    return tree if calls and isinstance(tree, ast.Call | ast.BinOp | ast.Compare) else None


def _arguments(text: str) -> list[ast.keyword] | None:
    try:
        tree = ast.parse(f"_({text})", mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(tree, ast.Call) or tree.args or ast.unparse(tree.func) != "_":
        return None
    return tree.keywords if all(keyword.arg for keyword in tree.keywords) else None


def follow(advice: str, case: Case) -> dict[str, Any]:
    """Return the keywords of the call once an advice has been followed."""
    given = case.given
    words = {**WORDS, **given, **case.words}
    keywords = _arguments(advice)
    tree = _call(advice)
    if (
        keywords is None
        and isinstance(tree, ast.Call)
        and (advice.startswith(".") or (tree.keywords and _is_dots(tree.args)))
    ):  # .predict(..., tile=448): the user's call with that added
        keywords = tree.keywords
    if keywords is not None:
        return given | {k.arg: eval(ast.unparse(k.value), words) for k in keywords}
    # imagery.odc.reproject(...).chmv2.predict(...): the same call of a new object.
    if isinstance(tree, ast.Call) and (_is_dots(tree.args) or advice.endswith(".predict()")):
        tree = tree.func.value.value
    roots = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in given]
    return given | {roots[0]: eval(ast.unparse(tree), words)}


def _is_dots(args: list[ast.expr]) -> bool:
    return len(args) == 1 and isinstance(args[0], ast.Constant) and args[0].value is ...


# ---- The objects of the cases --------------------------------------------------------------------


def heights(times=3, shape=(40, 50), **options):
    rng = np.random.default_rng(1)
    like = cube(shape, times=times)["red"]
    values = rng.uniform(5, 35, like.shape).astype("f4")
    attrs = {"standard_name": "canopy_height", "long_name": "canopy height", "units": "m"}
    return like.copy(data=values).rename("canopy_height").assign_attrs(attrs)


HEIGHT = heights()
IMAGERY = cube((100, 120))
PAIR = change.difference(HEIGHT[0], HEIGHT[1], sigma=2.0)
WITHOUT_CRS = HEIGHT.drop_vars("spatial_ref").drop_encoding().drop_attrs(deep=False)
LEFT, BOTTOM, RIGHT, TOP = HEIGHT.odc.geobox.extent.boundingbox
BOX = shapely.box(LEFT + 5, BOTTOM + 5, RIGHT - 5, TOP - 5)
STANDS = geopandas.GeoDataFrame({"stand": [1]}, geometry=[BOX], crs=32633)
POINTS = geopandas.GeoDataFrame({"height": [10.0]}, geometry=[BOX.centroid], crs=32633)


CENTRE = POINTS.to_crs(4326).geometry[0]
PLACE = {"lon": [CENTRE.x], "lat": [CENTRE.y]}


def predict(imagery=IMAGERY, **options):
    return imagery.chmv2.predict(MODEL, **{**GRID, **options})


def same_where_valid(found):
    assert (found.isnull() == (IMAGERY.red <= 30)).all()


def same_heights(found):
    plain = [array.drop_vars("spatial_ref") for array in (found, predict())]
    xr.testing.assert_allclose(*plain, atol=5e-4)
    assert found.odc.crs == 32633


def zonal_of(height, places=STANDS, **options):
    return zonal.zonal(height, places, **options)


def stored(height, **options):
    """Write and open again."""
    store = f"{tempfile.mkdtemp()}/heights.zarr"
    height.chmv2.to_zarr(store, progress=False, **options)
    return xchmv2.open_zarr(store)


def with_variable(name, dims, values):
    return HEIGHT.to_dataset().assign({name: (dims, values)})


def equals(expected):
    return lambda found: xr.testing.assert_allclose(found, expected)


def bare(imagery=IMAGERY, side=0.6):
    """Imagery without a CRS, whose coordinates are multiples of a side from 0."""
    steps = {dim: side * (np.arange(imagery.sizes[dim]) + 0.5) for dim in ("x", "y")}
    return (
        imagery.drop_vars("spatial_ref")
        .drop_encoding()
        .assign_coords(x=steps["x"], y=steps["y"][::-1])
    )


def in_degrees():
    """Imagery of a geographic CRS, north up, without declared nodata."""
    imagery = cube((120, 200), crs=None, pixel=5e-6).drop_vars(("x", "y"))
    coords = {"y": 61 - 5e-6 * np.arange(120), "x": 15.9 + 5e-6 * np.arange(200)}
    return imagery.assign_coords(coords).odc.assign_crs(4326)


def within(expected):
    """Return a check that heights hold NaN around an image that was turned, and none inside."""

    def right(found):
        share = float(found.isnull().mean())
        assert expected[0] < share < expected[1], share
        size = dict(zip(("y", "x"), (n // 2 for n in found.shape), strict=True))
        assert found.isel({d: slice(n - 9, n + 9) for d, n in size.items()}).notnull().all()

    return right


def shape(height):
    return lambda found: found.shape == height.shape


SIXTEEN = IMAGERY.astype("uint16") * 12
STACK = IMAGERY.to_dataarray("band").assign_coords(band=[1, 2, 3])

CASES = {
    # imagery
    "no value range": Case(predict, dict(imagery=SIXTEEN), shape(IMAGERY.red)),
    "value range the wrong way": Case(
        predict, dict(imagery=SIXTEEN, value_range=(3000, 0)), shape(IMAGERY.red)
    ),
    "two reds": Case(predict, dict(imagery=IMAGERY.assign(RED=IMAGERY.red)), same_heights),
    "degrees": Case(predict, dict(imagery=in_degrees()), within((0.005, 0.2))),
    "too fine": Case(
        predict, dict(imagery=cube((600, 600), pixel=0.1)), lambda h: max(h.shape) <= 101
    ),
    "too coarse": Case(predict, dict(resolution=10), shape(IMAGERY.red)),
    "too long": Case(
        predict,
        dict(imagery=IMAGERY.assign_coords(x=IMAGERY.x * 0.5)),
        lambda h: h.shape == (100, 60),
    ),
    "resolution without a CRS: CRS": Case(
        predict,
        dict(imagery=bare(), resolution=0.6),
        shape(IMAGERY.red),
        {"EPSG:...": "EPSG:32633"},
    ),
    "resolution without a CRS: pixels": Case(
        predict, dict(imagery=bare(), resolution=1.2), lambda h: h.shape == (50, 60), which=1
    ),
    "no CRS": Case(predict, dict(imagery=bare()), shape(IMAGERY.red)),
    "no number": Case(predict, dict(resolution="0.6"), shape(IMAGERY.red)),
    "pixels below 0": Case(predict, dict(imagery=bare(), pixel_size=-1.0), shape(IMAGERY.red)),
    "pixels of two sides": Case(
        predict,
        dict(imagery=bare().assign_coords(x=np.arange(120.0)), pixel_size=0.6),
        shape(IMAGERY.red),
    ),
    "mask of numbers": Case(
        predict,
        dict(valid=(IMAGERY.red > 30).astype("u1") * 255),
        same_where_valid,
        words={"mask": (IMAGERY.red > 30).astype("u1") * 255},
    ),
    "mask of dates": Case(
        predict, dict(valid=(IMAGERY.red > 30).expand_dims(time=2)), same_where_valid
    ),
    "mask of dates, all": Case(
        predict, dict(valid=(IMAGERY.red > 30).expand_dims(time=2)), same_where_valid, which=1
    ),
    "mask of another grid": Case(
        predict,
        dict(valid=(IMAGERY.red > 30)[1:]),
        lambda h: bool(h[0].isnull().all() and h[1:].notnull().any()),
        words={"imagery": IMAGERY},
    ),
    "lost mapping": Case(
        predict,
        dict(imagery=STACK.drop_vars("spatial_ref").assign_attrs(grid_mapping="crs")),
        same_heights,
        {"EPSG:...": "EPSG:32633"},
        which=1,
    ),
    "unknown CRS": Case(
        predict,
        dict(imagery=STACK.drop_vars("spatial_ref").assign_attrs(crs="mars")),
        same_heights,
        {"EPSG:...": "EPSG:32633"},
    ),
    "two CRS": Case(
        predict,
        dict(
            imagery=STACK.assign_coords(crs=((), 0, STACK.odc.assign_crs(32634).spatial_ref.attrs))
        ),
        same_heights,
    ),
    "metres that are said to be degrees": Case(
        predict,
        dict(imagery=IMAGERY.odc.assign_crs(4326)),
        same_heights,
        {"EPSG:...": "EPSG:32633"},
    ),
    "kilometres": Case(
        predict,
        dict(
            imagery=IMAGERY.assign_coords(
                {d: (d, IMAGERY[d].values / 1000, {"units": "km"}) for d in ("y", "x")}
            )
        ),
        same_heights,
    ),
    "two pictures": Case(predict, dict(imagery=xr.Dataset({"a": STACK, "b": STACK})), same_heights),
    "no GPU": Case(predict, dict(device="cuda"), same_heights),
    "dims of other names": Case(
        predict,
        dict(imagery=STACK.rename(y="row", x="column")),
        shape(IMAGERY.red),
        {"{...: 'y', ...: 'x'}": "row='y', column='x'"},
    ),
    # predict
    "tile": Case(predict, dict(tile=70), same_heights),
    "overlap": Case(predict, dict(overlap=40), lambda h: h.attrs["chmv2_overlap"] == 32),
    "block": Case(predict, dict(block=32), same_heights),
    "layers": Case(
        predict, dict(layers=("hight",)), lambda d: set(d) == {"canopy_height", "bin_spread"}
    ),
    "batch": Case(predict, dict(batch_size=0), same_heights),
    "device": Case(predict, dict(device="gpu"), same_heights),
    "dtype": Case(predict, dict(dtype="float64"), same_heights),
    "erode": Case(predict, dict(erode=-1), same_heights),
    # change
    "no dates": Case(
        change.align,
        dict(height=HEIGHT[0]),
        lambda h: h.sizes == HEIGHT[0].sizes,
        {"other_height": "height"},
    ),
    "align to several": Case(
        change.align,
        dict(height=HEIGHT[0], to=HEIGHT),
        lambda h: h.sizes == HEIGHT[0].sizes,
        words={"other": HEIGHT},
    ),
    "events of one date": Case(
        change.events,
        dict(height=HEIGHT[0]),
        lambda e: "loss_date" in e,
        {"[before, after], 'time'": "[height] * 3, YEARS"},
        words={"YEARS": pd.date_range("2019", periods=3, name="time")},
    ),
    "undated": Case(
        change.events,
        dict(height=HEIGHT.drop_vars("time")),
        lambda e: "loss_date" in e,
        {"[...]": "['2019-07-01', '2020-07-01', '2021-07-01']"},
    ),
    "unsorted": Case(change.events, dict(height=HEIGHT[::-1]), equals(change.events(HEIGHT))),
    "correlation of several": Case(
        xchmv2.change.correlation_length,
        dict(change=(HEIGHT[1:] - HEIGHT[:2].values).rename("height_change")),
        lambda length: length >= 0,
    ),
    "loss without threshold": Case(
        change.loss,
        dict(change=PAIR["height_change"]),
        lambda m: m.dtype == bool,
        {"loss(change, ": "", "15)": "15"},
    ),
    "threshold 0": Case(change.loss, dict(change=PAIR, threshold=0), lambda m: m.dtype == bool),
    "opening": Case(change.loss, dict(change=PAIR, opening=4), equals(change.loss(PAIR))),
    "mask of classes": Case(
        change.loss,
        dict(change=PAIR, mask=HEIGHT[0].astype(int)),
        lambda m: m.dtype == bool,
        {"[...]": "[3]"},
        words={"landcover": HEIGHT[0].astype(int)},
    ),
    "sigma of three": Case(
        change.difference,
        dict(before=HEIGHT[0], after=HEIGHT[1], sigma=(1.0, 2.0, 3.0)),
        lambda d: "level_of_detection" in d,
    ),
    "two dates as one": Case(
        change.difference,
        dict(before=HEIGHT, after=HEIGHT[1]),
        lambda d: "height_change" in d,
        {"height.sel": "before.sel", "2019-07-01": "2020-07-01"},
    ),
    "variables that cannot be moved": Case(
        change.align,
        dict(height=HEIGHT.to_dataset().assign(open=HEIGHT < 9)),
        lambda d: set(d) == {"canopy_height"},
        {"dataset": "height"},
    ),
    "one date of a series": Case(
        change.events,
        dict(height=HEIGHT[:1]),
        lambda e: "loss_date" in e,
        words={"other": HEIGHT[1:]},
    ),
    "a mask for each date": Case(
        change.difference,
        dict(before=HEIGHT[0], after=HEIGHT[1], stable=HEIGHT > 0),
        lambda d: "level_of_detection" in d,
    ),
    # raster
    "wrong unit": Case(
        lambda height: structure.canopy_cover(height, cell=6.0),
        dict(height=heights() * 100),
        equals(structure.canopy_cover(HEIGHT, cell=6.0)),
    ),
    "undeclared nodata": Case(
        lambda height: structure.canopy_cover(height, cell=6.0),
        dict(height=HEIGHT.where(HEIGHT > 32, -9999)),
        equals(structure.canopy_cover(HEIGHT.where(HEIGHT > 32), cell=6.0)),
        which=1,
    ),
    "scaled already": Case(
        lambda height: structure.canopy_cover(height, cell=6.0),
        dict(height=HEIGHT.assign_attrs(scale_factor=0.01)),
        equals(structure.canopy_cover(HEIGHT, cell=6.0)),
        {"array": "height"},
        which=1,
    ),
    "labels of heights": Case(
        label_patches,
        dict(mask=HEIGHT[0] * 1.0),
        lambda found: int(found[0].max()) > 0,
        {"label_patches(height <= 10)": "abs(mask) <= 10"},
    ),
    "errors not computed": Case(
        lambda errors: errors.standard_error(np.ones((5, 5)), (1.0, 1.0)),
        dict(errors=change.error_model(HEIGHT[:2].chunk())),
        lambda error: error > 0,
    ),
    "errors not measured": Case(
        lambda height: plotting.plot_errors(PAIR if height is HEIGHT else height),
        dict(height=HEIGHT),
        lambda d: len(d.axes) == 2,
        {"2019": "2020", "2024": "2022"},
        which=1,
    ),
    "points without a CRS": Case(
        validation.validate,
        dict(height=HEIGHT[0], reference=POINTS.to_crs(4326).set_crs(None, allow_override=True)),
        lambda d: d["count"] == 1,
    ),
    "flagged shots": Case(
        validation.validate,
        dict(height=HEIGHT[0], reference=POINTS.assign(quality_flag=0)),
        lambda d: d["count"] == 1,
    ),
    # zonal
    "an unnamed change": Case(
        lambda change, **options: zonal.zonal(change, STANDS, **options),
        dict(change=PAIR["height_change"].rename("b").drop_attrs(deep=False), threshold=5.0),
        lambda d: "loss_area" in d,
    ),
    "cover": Case(
        zonal_of,
        dict(height=HEIGHT[0], threshold=5.0),
        lambda d: bool(((d["cover"] > 0) & (d["cover"] <= 1)).all()),
        which=1,
    ),
    "polygons without a CRS": Case(
        zonal_of,
        dict(height=HEIGHT[0], places=STANDS.set_crs(None, allow_override=True)),
        lambda found: float(found["mean"][0]) == float(zonal_of(HEIGHT[0])["mean"][0]),
        {"polygons": "places"},
    ),
    "lines": Case(
        zonal_of,
        dict(height=HEIGHT[0], places=STANDS.boundary),
        lambda d: bool((d["mean"] > 0).all()),
        {"10": "3", "polygons": "places"},
    ),
    "polygons beside a raster without CRS": Case(
        zonal_of,
        dict(height=WITHOUT_CRS[0]),
        lambda found: float(found["mean"][0]) == float(zonal_of(HEIGHT[0])["mean"][0]),
        {"EPSG:...": "EPSG:32633"},
    ),
    "correlation of heights": Case(
        zonal_of, dict(height=HEIGHT[0], sigma=2.0), lambda d: (d["mean_se"] > 0).all()
    ),
    "negative length": Case(
        zonal_of,
        dict(height=HEIGHT[0], sigma=2.0, correlation_length=-1.0),
        lambda d: (d["mean_se"] > 0).all(),
    ),
    # plotting
    "too many maps": Case(
        lambda height: plotting.plot_height(height),
        dict(height=xr.concat([HEIGHT] * 20, "time")),
        lambda drawn: drawn is not None,
        {"array": "height"},
    ),
    # store
    "encoding": Case(
        stored, dict(height=HEIGHT, encoding="int8"), lambda h: float(abs(h - HEIGHT).max()) < 0.006
    ),
    "regions": Case(
        stored,
        dict(height=HEIGHT.chunk(), regions={"z": 0}),
        lambda h: h.shape == HEIGHT.shape,
        {"8192": "40"},
    ),
    "text variable": Case(
        lambda height: stored(height),
        dict(height=with_variable("name", ("time", "y", "x"), np.full(HEIGHT.shape, "a"))),
        equals(HEIGHT),
        {"dataset": "height"},
    ),
    "variables of other dims": Case(
        stored,
        dict(height=with_variable("plane", ("y", "x"), HEIGHT[0].values)),
        equals(HEIGHT),
        {"dataset": "height"},
    ),
    "two more dims": Case(
        stored,
        dict(height=HEIGHT.expand_dims(run=2).transpose("time", "run", "y", "x")),
        equals(HEIGHT),
    ),
    "coordinates of date and place": Case(
        stored,
        dict(height=HEIGHT.assign_coords(age=(("time", "y", "x"), HEIGHT.values))),
        lambda d: {"canopy_height", "age"} <= set(d.data_vars),
    ),
    "a date twice": Case(
        stored, dict(height=xr.concat([HEIGHT, HEIGHT[:1]], "time")), equals(HEIGHT)
    ),
    "no date": Case(
        stored,
        dict(height=HEIGHT.assign_coords(time=HEIGHT.time.where(HEIGHT.time > HEIGHT.time[0]))),
        equals(HEIGHT[1:]),
    ),
    "no place": Case(
        lambda store: HEIGHT.chmv2.to_zarr(store, progress=False),
        dict(store=5),
        lambda written: written.regions == 3,
        {"height.chmv2.to_zarr('canopy.zarr')": "store=FOLDER"},
        words={"FOLDER": tempfile.mkdtemp() + "/a.zarr"},
    ),
    "attributes that are no text": Case(
        stored,
        dict(height=HEIGHT.assign_attrs(model=object())),
        lambda h: h.shape == HEIGHT.shape,
        {"height.attrs.pop('model')": "height.drop_attrs()"},
    ),
    "levels": Case(
        stored,
        dict(
            height=HEIGHT.assign_coords(year=("time", [1, 2, 3]), run=("time", [1, 1, 1]))
            .drop_vars("time")
            .set_index(time=["year", "run"])
        ),
        lambda h: h.shape == HEIGHT.shape,
    ),
    "time zone": Case(
        stored,
        dict(height=HEIGHT.assign_coords(time=HEIGHT.indexes["time"].tz_localize("UTC"))),
        equals(HEIGHT),
    ),
    # plotting
    "dates in one map": Case(
        lambda height: plotting.plot_height(height, ax=plotting.new_figure(3, 3).subplots()),
        dict(height=HEIGHT),
        lambda drawn: drawn is not None,
    ),
    "a map of two further dims": Case(
        lambda height: plotting.plot_height(height),
        dict(height=HEIGHT.expand_dims(run=2)),
        lambda drawn: drawn is not None,
        {"array": "height"},
    ),
    "lines beside points": Case(
        lambda height, places: plotting.plot_series(height, places),
        dict(height=HEIGHT, places=STANDS.boundary),
        lambda drawn: drawn is not None,
    ),
    # validation and training
    "reference of other dates": Case(
        validation.validate,
        dict(height=HEIGHT, reference=HEIGHT[:2].assign_coords(time=HEIGHT.time[1:])),
        lambda s: float(s["mae"][0]) == 0,
    ),
    "plots of an unknown statistic": Case(
        validation.validate,
        dict(height=HEIGHT[0], reference=STANDS.assign(height=20.0), column="height"),
        lambda s: int(s["count"]) == 1,
    ),
    "a table of points": Case(
        validation.validate,
        dict(height=HEIGHT[0], reference=pd.DataFrame(PLACE | {"height": [20.0]}), column="height"),
        lambda s: int(s["count"]) == 1,
    ),
    "a spread without heights": Case(
        lambda height: training.calibrate(height, HEIGHT[0]),
        dict(height=HEIGHT[0].to_dataset(name="bin_spread")),
        lambda found: True,
        {"imagery.chmv2.predict(layers=('height', 'bin_spread'))": "height=BOTH"},
        words={"BOTH": HEIGHT[0].to_dataset().assign(bin_spread=HEIGHT[0] * 0.1)},
    ),
    "heights of two further dims": Case(
        lambda height: validation.validate(height, HEIGHT[0]),
        dict(height=HEIGHT.expand_dims(run=1)),
        lambda s: float(s["mae"].min()) == 0,
    ),
    "calibrate several dates": Case(
        training.calibrate,
        dict(height=HEIGHT, reference=HEIGHT[0] * 1.0),
        lambda r: r is not None,
        {"time=0": "time=0, drop=True"},
    ),
}


def refuse(case: Case) -> str:
    """Return the advice of the refusal, or the warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            case.call(**case.given)
        except CHMv2Error as error:
            return error.fix
    said = [str(warning.message) for warning in told if warning.category is UserWarning]
    assert said, "neither refused nor warned"
    return said[-1]


@pytest.mark.parametrize("name", CASES)
def test_advice_gives_the_right_result(name):
    case = CASES[name]
    fix = refuse(case)
    for blank, filled in case.blanks.items():
        assert blank in fix, fix
        fix = fix.replace(blank, filled)
    advice = read_advice(fix)
    assert len(advice) > case.which, fix
    assert case.right(case.call(**follow(advice[case.which], case))) in (None, True)


def written_advice():
    """Return as patterns the advice of every error and warning that holds a call."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.endswith("Error") or name == "warn":
                named = [k.value for k in node.keywords if k.arg == "fix"]
                for fix in named or (node.args[:1] if name == "warn" else node.args[2:3]):
                    pattern = _pattern(fix)
                    if re.search(r"\w\\\(", pattern):
                        yield f"{path.relative_to(PACKAGE)}", pattern


def _pattern(text: ast.expr) -> str:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return "".join(
        re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in parts
    )


def test_few_calls_are_advised_without_a_case():
    """Those left need a cluster, a network, a GPU or files, or are no calls but names of methods.

    The tests of their rooms run what can be run; ``stac`` has tables of its own.
    """
    said = [refuse(case) for case in CASES.values()]
    left = [
        (place, pattern)
        for place, pattern in written_advice()
        if not place.startswith("stac") and not any(re.search(pattern, s, re.S) for s in said)
    ]
    assert len(left) <= MOST_WITHOUT_A_CASE, left
