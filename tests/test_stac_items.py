"""Items as they are really written, and as they should not be: refused in a sentence, or right."""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter

import numpy as np
import pystac
import pytest
import rasterio
from catalogue import NAIP, RGBN, item, names, noise, published_naip, raster
from pyproj import Transformer
from rasterio.enums import ColorInterp

import xchmv2
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.stac.items import find_items

# Private imports: an item as it was read, without a cube.

COLOURS = ("red", "green", "blue")


@pytest.fixture
def rgb(tmp_path):
    return raster(tmp_path / "rgb.tif", noise())


def stacked(cube):
    return np.stack([cube[c].isel(time=0).values for c in COLOURS])


def native(items, **options):
    return stacked(xchmv2.load(items, resolution=None, **options))


def described(path, **fields):
    return item(path, **{"eo:bands": names(*COLOURS)}, **fields)


def image(found, name="image"):
    return found["assets"][name]


# --- any item is right or refused -------------------------------------------------------------


def naip(folder):
    path = raster(folder / "naip.tif", noise(4))
    found = item(path, id="tile-7", collection="naip", **{"eo:bands": names(*RGBN)})
    found["properties"] |= {"gsd": 0.6, "naip:year": "2020", "proj:bbox": None}
    found["assets"]["thumbnail"] = {
        "href": "look.jpg",
        "type": "image/jpeg",
        "roles": ["thumbnail"],
    }
    found["assets"]["metadata"] = {"href": "m.txt", "type": "text/plain", "roles": ["metadata"]}
    return found


def maxar(folder):
    """A visual image, the same as 8 bands of reflectance, and a mask with classes."""
    values = noise(4)
    visual = raster(folder / "visual.tif", values[:3])
    bands = np.concatenate([values[[2, 2, 1, 1, 0]], values[[3, 3, 3]]]).astype("uint16")
    analytic = item(raster(folder / "ms.tif", bands), asset="ms_analytic")["assets"]
    image(analytic_item := {"assets": analytic}, "ms_analytic")["eo:bands"] = [
        {"name": f"BAND_{n}", "common_name": n}
        for n in ("coastal", "blue", "green", "yellow", "red", "rededge", "nir08", "nir09")
    ]
    mask = item(raster(folder / "mask.tif", np.ones((1, 64, 80), "uint8")), asset="data-mask")
    classes = [{"value": 1, "name": "clear"}, {"value": 2, "name": "cloud"}]
    image(mask, "data-mask")["raster:bands"] = [
        {"data_type": "uint8", "nodata": 0, "classification:classes": classes}
    ]
    return item(
        visual,
        id="tile-7",
        asset="visual",
        collection="wv",
        assets=analytic_item["assets"] | mask["assets"],
        properties={"view:sun_elevation": 50.0, "view:off_nadir": 9, "view:sun_azimuth": 160.5,
                    "eo:cloud_cover": 0, "platform": "WV03", "gsd": 0.6},
        bands=[{"name": c, "eo:common_name": c, "data_type": "uint8"} for c in COLOURS],
    )  # fmt: skip


def planetscope(folder):
    values = noise(4).astype("uint16")
    path = raster(folder / "ps.tif", values[[2, 1, 0, 3]], nodata=0)
    bands = {"eo:bands": names("blue", "green", "red", "nir"),
             "raster:bands": [{"data_type": "uint16", "nodata": 0, "scale": 1e-4}] * 4}  # fmt: skip
    udm = item(raster(folder / "udm.tif", np.ones((3, 64, 80), "uint8")), asset="ortho_udm2")
    image(udm, "ortho_udm2")["eo:bands"] = [{"name": n} for n in ("clear", "snow", "shadow")]
    return item(
        path, id="tile-7", asset="ortho_analytic_4b", collection="PSScene", assets=udm["assets"],
        properties={"view:sun_elevation": 61.2, "view:off_nadir": -1.9, "platform": "2402",
                    "constellation": "planetscope", "eo:cloud_cover": 3.5}, **bands,
    )  # fmt: skip


JUNK = [
    None, True, 0, -1, 1e308, 10**30, float("nan"), float("inf"), "", "x", "\0", "é", "128", "red",
    "0001-01-01T00:00:00Z", "../../etc/passwd", "http://[x", "A" * 5000, [], {}, [[]], [None],
    {"a": 1}, {1: 2}, [1] * 1000, [[[[0]]]], (1, 2), ["x", "y"],
]  # fmt: skip


def paths(value, path=()):
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else ()
    for key, entry in enumerate(value) if isinstance(value, list) else entries:
        yield from paths(entry, (*path, key))


def mutated(found, chance):
    """Change one or two fields: remove, repeat, or replace by something else."""
    found, changed = copy.deepcopy(found), []
    for _ in range(chance.choice((1, 1, 2))):
        part = chance.choice([*found, "properties", "assets", "assets"])
        path = chance.choice([path for path in paths(found) if path[0] == part])
        *way, last = path
        inner = found
        for key in way:
            inner = inner[key]
        kind, value = chance.random(), copy.deepcopy(chance.choice(JUNK))
        if kind < 0.2:
            inner.pop(last)
        elif kind < 0.3 and isinstance(inner[last], list):
            inner[last] = inner[last] * chance.choice((0, 2, 50))
        else:
            inner[last] = value
        changed.append(path)
    return found, changed


def outcome(found, changed, truth):
    """Load and compute: "refused" in a sentence that names the item, or "right"."""
    masked = isinstance(found.get("assets"), dict) and "data-mask" in found["assets"]
    options = {"cloud_mask": "data-mask"} if masked else {}
    refusal = None
    try:
        cube = xchmv2.load([found], resolution=None, **options)
        assert cube.sizes["y"] * cube.sizes["x"] < 1e6, changed
        cube = cube.compute(scheduler="sync")
    except CHMv2Error as error:
        refusal = str(error)
    if refusal is not None:
        if not any(path[-1] in ("id", "collection", "type", "href") for path in changed):
            elsewhere = "data-mask" in str(changed) or "one grid" in refusal
            assert "tile-7" in refusal or elsewhere, refusal
            assert len(refusal) < 1000
        return "refused"
    here = cube.isel(time=0)
    wanted = truth.reindex(y=here.y, x=here.x, method="nearest", tolerance=1e-6, fill_value=0)
    if any("proj:transform" in path or "proj:epsg" in path for path in changed):
        return "moved"  # on another grid, for a reason that the item states
    for colour in COLOURS:
        np.testing.assert_array_equal(here[colour], wanted[colour], err_msg=str(changed))
    return "right"


@pytest.mark.parametrize("kind", [naip, maxar, planetscope])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of nodata values that cannot be
def test_mutated_items_are_refused_in_a_sentence_or_right(kind, tmp_path):
    found, chance, counts = kind(tmp_path), random.Random(14), Counter()
    truth = xchmv2.load([found], resolution=None).isel(time=0, drop=True).compute()
    np.testing.assert_array_equal(truth.red, noise(4)[0])
    for _ in range(75):
        counts[outcome(*mutated(found, chance), truth)] += 1
    print(kind.__name__, dict(counts))
    assert counts["right"] > 10
    assert counts["refused"] > 24
    assert counts["moved"] < 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("proj:shape", "abc", "proj:shape as two whole numbers, rows and columns, found 'abc' in"),
        ("proj:shape", [64.5, 80], "proj:shape as two whole numbers"),
        ("proj:transform", [0.6, 0, "x"], "proj:transform as 6 or 9 numbers"),
        ("proj:transform", [0, 0, 5e5, 0, -0.6, 5e6], "proj:transform of an image"),
        ("proj:code", 32633, "proj:code as text, found 32633"),
        ("proj:projjson", "x", "proj:projjson as a mapping"),
        ("view:sun_elevation", "high", "view:sun_elevation as a number from -90 to 90"),
        ("view:off_nadir", 200, "view:off_nadir as a number from -90 to 90, found 200"),
        ("platform", ["a"], "platform as text"),
        ("eo:bands", {"name": "red"}, "eo:bands as a list of mappings"),
        ("eo:bands", ["red", "green", "blue"], "eo:bands as a list of mappings"),
        ("raster:bands", [{"data_type": "cint16"}] * 3, "data_type as a type of real numbers"),
        ("raster:bands", [{"nodata": "none"}] * 3, "nodata as a number, 'nan', 'inf' or '-inf'"),
        ("raster:bands", [{"scale": "x"}] * 3, "scale as a number, found 'x' in band 1 of asset"),
        ("raster:bands", [{}, {}], "one number of bands, found 2 in raster:bands and 3 in eo"),
    ],
)  # fmt: skip
def test_the_item_loads_without_the_field_that_was_refused(rgb, field, value, message):
    found = described(rgb)
    if field == "proj:code":
        del found["properties"]["proj:epsg"]
    where = image(found) if field in ("eo:bands", "raster:bands") else found["properties"]
    kept, where[field] = where.get(field), value
    with pytest.raises(CHMv2Error, match=rf"{message}.*images/one; correct"):
        xchmv2.load(found)
    if field != "eo:bands" or kept is None:
        del where[field]
    else:
        where[field] = kept
    np.testing.assert_array_equal(native(found), noise())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "id as text, found 3"),
        ({"properties": None}, "properties as a mapping, found None in item images/one"),
        ({"properties": {"datetime": "2020-99-99"}}, "datetime as a time such as '2020-07-01"),
        ({"properties": {"datetime": "0001-01-01T00:00:00Z"}}, "datetime as a time.*from 1678"),
        ({"bbox": [15, 46, 15.1, 45]}, "bbox as .west, south, east, north. in degrees"),
        ({"bbox": "x"}, "bbox as 4 or 6 numbers"),
        ({"geometry": {"type": "Polygon"}}, "geometry as GeoJSON in degrees"),
        ({"geometry": {"type": "Point", "coordinates": [5e5, 5e6]}}, "geometry as GeoJSON"),
        ({"assets": {"image": 1}}, "assets with a mapping as 'image'"),
        ({"assets": {"image": {"href": ""}}}, "href as the address of a file, found ''"),
        ({"assets": {"image": {"href": "http://[x"}}}, "href as the address of a file"),
        ({"assets": {"image": {"href": "a.tif", "roles": 1}}}, "roles as a list of texts"),
        ({"links": [1.5]}, "links as a list of mappings"),
        ({"stac_version": ["1.0.0"]}, "stac_version as text"),
    ],
)  # fmt: skip
def test_broken_items_name_item_and_field(rgb, change, message):
    with pytest.raises(CHMv2Error, match=message):
        xchmv2.load(described(rgb) | change)


def test_numbers_written_as_text_and_tables_without_values_are_understood(rgb):
    found = described(rgb, **{"raster:bands": [{"data_type": "uint8", "nodata": "0"}] * 3})
    found["properties"] |= {"proj:epsg": "32633", "proj:shape": ["64", "80"],
                            "view:sun_elevation": "50.5", "view:off_nadir": -12.5,
                            "platform": float("nan"), "eo:cloud_cover": float("nan")}  # fmt: skip
    cube = xchmv2.load(found, resolution=None)
    np.testing.assert_array_equal(stacked(cube), noise())
    assert (float(cube.sun_elevation[0]), float(cube.off_nadir[0])) == (50.5, 12.5)
    assert np.isnan(cube.cloud_cover[0])


def test_an_item_in_two_places_is_refused(rgb):
    found = described(rgb)
    right = found["properties"]["proj:transform"]
    found["properties"]["proj:transform"] = [0.6, 0, 600_000, 0, -0.6, 5_000_000]
    with pytest.raises(
        ImageryError, match=r"one place, found bbox .15.00.* the grid .*one; correct"
    ):
        xchmv2.load(found)
    found["properties"]["proj:transform"] = right
    found["properties"]["proj:shape"] = [2_000_000, 2_000_000]
    with pytest.raises(ImageryError, match="metadata that put an item in one place"):
        xchmv2.load(found)
    del found["properties"]["proj:shape"]  # the file has its grid
    np.testing.assert_array_equal(native(found), noise())


def test_a_transform_in_the_order_of_gdal(rgb):
    found = described(rgb)
    found["properties"]["proj:transform"] = [500_000.0, 0.6, 0, 5_000_000.0, 0, -0.6]
    with pytest.raises(ImageryError, match="it is in GDAL's order: set it to") as caught:
        xchmv2.load(found)
    advised = caught.value.fix.split("set it to ")[1].split(", or")[0]
    found["properties"]["proj:transform"] = json.loads(advised)
    np.testing.assert_array_equal(native(found), noise())
    del found["properties"]["proj:transform"]
    np.testing.assert_array_equal(native(found), noise())


# --- footprints -------------------------------------------------------------------------------


def test_a_footprint_of_a_million_vertices_takes_no_time(rgb):
    found = described(rgb)
    west, south, east, north = found["bbox"]
    turn = np.linspace(0, 2 * np.pi, 1_000_000)
    ring = np.stack([(west + east) / 2 + (east - west) / 2 * np.cos(turn),
                     (south + north) / 2 + (north - south) / 2 * np.sin(turn)], 1)  # fmt: skip
    found["geometry"] = {"type": "Polygon", "coordinates": [ring.tolist()]}
    started = time.process_time()
    (read,) = find_items(found)
    assert read.outline.bounds == tuple(found["bbox"])
    assert time.process_time() - started < 1
    assert len(read.outline.exterior.coords) == 5
    np.testing.assert_array_equal(native(found), noise())


def test_footprints_that_cross_themselves_or_180_degrees(rgb):
    found = described(rgb)
    w, s, e, n = found["bbox"]
    bow = [[w, s], [e, n], [e, s], [w, n], [w, s]]
    found["geometry"] = {"type": "Polygon", "coordinates": [bow]}
    assert find_items(found)[0].outline.is_valid
    cut = [[179.9, 0], [-179.9, 0], [-179.9, 1], [179.9, 1], [179.9, 0]]
    found |= {"geometry": {"type": "Polygon", "coordinates": [cut]}, "bbox": [179.9, 0, -179.9, 1]}
    (read,) = find_items(found)
    assert read.outline.bounds == pytest.approx((179.9, 0, 180.1, 1))
    assert read.bbox == pytest.approx((179.9, 0, 180.1, 1))


# --- which band is red ------------------------------------------------------------------------


def single_bands(folder, values, assets, **fields):
    """One file for each band, by asset name; ``fields`` beside each."""
    found = None
    for values_, name in zip(values, assets, strict=True):
        one = item(raster(folder / f"{name}.tif", values_[None]), asset=name, **fields)
        found = one if found is None else found | {"assets": found["assets"] | one["assets"]}
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"raster:bands": [{"data_type": "uint8", "nodata": 0}]},
        {"data_type": "uint8"},
        {"bands": [{"data_type": "uint8"}], "nodata": 0},
        {"eo:bands": [1]},
        {"eo:bands": [{"name": "1"}]},
    ],
)
def test_assets_named_by_colour_with_metadata_that_name_none(tmp_path, fields):
    found = single_bands(tmp_path, noise(), ("blue", "red", "green"), **fields)
    np.testing.assert_array_equal(native(found), noise()[[1, 2, 0]])


def test_an_image_with_metadata_that_name_no_band_is_told_by_its_file(tmp_path):
    path = raster(tmp_path / "rgb.tif", noise())
    for fields in (
        {"data_type": "uint8"},
        {"raster:bands": [{"data_type": "uint8"}] * 3},
        {"eo:bands": [0, 1, 2]},
        {"eo:bands": [{"name": "Band 1"}, {"name": "Band 2"}, {"name": "Band 3"}]},
    ):
        for asset in ("image", "visual"):
            np.testing.assert_array_equal(native(item(path, asset=asset, **fields)), noise())


def test_indices_and_names_of_bands_that_item_or_collection_list(rgb):
    listed = names("blue", "green", "red")
    old = item(rgb, **{"eo:bands": [0, 1, 2]})
    old["properties"]["eo:bands"] = listed
    np.testing.assert_array_equal(native(old), noise()[::-1])
    new = item(rgb, bands=[{"name": f"B{number}"} for number in (1, 2, 3)])
    new["properties"]["bands"] = [{"name": b["name"], "eo:common_name": b["common_name"]}
                                  for b in listed]  # fmt: skip
    np.testing.assert_array_equal(native(new), noise()[::-1])
    new["assets"]["image"].pop("bands")  # the only image
    np.testing.assert_array_equal(native(new), noise()[::-1])
    new["properties"]["bands"] = [{"name": "nir"}, *new["properties"]["bands"][:2]]
    with pytest.raises(ImageryError, match="though the item lists other bands"):
        xchmv2.load(new)
    extent = pystac.Extent(pystac.SpatialExtent([[-180, -90, 180, 90]]),
                           pystac.TemporalExtent([[None, None]]))  # fmt: skip
    for known in ({"item_assets": {"image": {"eo:bands": listed}}}, {"bands": listed}):
        collection = pystac.Collection("images", "made up", extent, extra_fields=known)
        fields = {} if "item_assets" in known else {"eo:bands": [{"name": f"B{n}"} for n in "123"]}
        collection.add_item(pystac.Item.from_dict(item(rgb, **fields)))
        np.testing.assert_array_equal(native(collection), noise()[::-1])


REFUSED = {
    "numbers of bands": {"eo:bands": [{"name": f"B0{n}"} for n in (1, 2, 3)]},
    "near infrared": {"eo:bands": names("nir", "red", "green")},
    "near infrared by name": {"bands": [{"name": n} for n in ("nir", "red", "green")]},
    "two reds": {"eo:bands": names("red", "green", "blue", "red")},
    "a name against a common name": {
        "eo:bands": [{"name": n, "common_name": c}
                     for n, c in zip(COLOURS, COLOURS[::-1], strict=True)]
    },
    "a description against a common name": {
        "eo:bands": [{"description": f"{n} band", "common_name": c}
                     for n, c in zip(COLOURS, COLOURS[::-1], strict=True)]
    },
    "two common names": {
        "bands": [{"common_name": n, "eo:common_name": c}
                  for n, c in zip(COLOURS, COLOURS[::-1], strict=True)]
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bands_that_nothing_names_beyond_doubt_are_asked_for(tmp_path, case):
    count = len(next(iter(REFUSED[case].values())))
    values = noise(count)
    found = item(raster(tmp_path / "a.tif", values), **REFUSED[case])
    with pytest.raises(ImageryError, match=r"in (item images/one|asset 'image').*|images/one") as e:
        xchmv2.load(found)
    assert "bands=(...)" in str(e.value)  # no order is proposed that might swap the colours
    assert "'image.1', 'image.2', 'image.3'" in e.value.fix
    with pytest.raises(ImageryError):
        xchmv2.load(found, bands="image")
    asked = ("image.3", "image.2", "image.1")
    np.testing.assert_array_equal(native(found, bands=asked), values[[2, 1, 0]])


@pytest.mark.parametrize("name", ["bgr", "image_BGRN", "grb", "cir", "nrg", "false_color"])
def test_the_name_of_an_asset_that_is_no_rgb(tmp_path, name):
    path = raster(tmp_path / "a.tif", noise())
    with rasterio.open(path, "r+") as file:  # as GDAL does by default
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    with pytest.raises(ImageryError, match=r"named so and not described.*name them in the order"):
        xchmv2.load(item(path, asset=name))


def test_the_name_of_an_asset_and_its_common_names(tmp_path):
    path = raster(tmp_path / "a.tif", noise())
    bgr = {"eo:bands": names("blue", "green", "red")}
    np.testing.assert_array_equal(native(item(path, asset="bgr", **bgr)), noise()[::-1])
    with pytest.raises(ImageryError, match="whose name states another order"):
        xchmv2.load(item(path, asset="rgb", **bgr))
    found = single_bands(tmp_path, noise(), COLOURS)
    for name, common in zip(COLOURS, COLOURS[::-1], strict=True):
        image(found, name)["eo:bands"] = names(common)
    with pytest.raises(ImageryError, match="whose name means another colour"):
        xchmv2.load(found)


def test_the_exact_name_goes_before_a_like_one(tmp_path):
    bands = ("coastal_blue", "blue", "green_i", "green", "yellow", "red", "rededge", "nir")
    values = noise(8)
    path = raster(tmp_path / "superdove.tif", values)
    common = {"coastal_blue": "coastal", "green_i": "green"}
    for fields in ({"eo:bands": [{"name": n} for n in bands]},
                   {"eo:bands": [{"name": n, "common_name": common.get(n, n)} for n in bands]},
                   {"bands": [{"description": n.replace("_", " ").title()} for n in bands]},
                   {"bands": [{"name": "red", "eo:common_name": "red"} if n == "red" else
                              {"name": n, "eo:common_name": f"{n}05"} if n == "green_i" else
                              {"name": n} for n in bands]}):  # fmt: skip
        np.testing.assert_array_equal(native(item(path, **fields)), values[[5, 3, 1]])


def test_an_item_of_one_band_is_not_asked_for_three(tmp_path):
    path = raster(tmp_path / "dem.tif", noise(1))
    for fields in ({"raster:bands": [{"data_type": "uint8"}]}, {"eo:bands": [{"name": "dem"}]}):
        with pytest.raises(ImageryError, match=r"red, green and blue.*dem.*no three") as caught:
            xchmv2.load(item(path, asset="dem", **fields))
        assert "bands=" not in str(caught.value)


def test_files_of_too_few_bands_are_not_asked_for_three(tmp_path):
    found = item(raster(tmp_path / "dem.tif", noise(1)), asset="dem")
    with pytest.raises(ImageryError, match=r"1 bands without names.*they have no three bands$"):
        xchmv2.load(found)
    with pytest.raises(ImageryError, match=r"band 2 for green.*1 bands in its.*no three bands$"):
        xchmv2.load(found, bands=(1, 2, 3))
    found["assets"] |= item(raster(tmp_path / "rgb.tif", noise()))["assets"]
    for bands in ("dem", ("image.1", "image.2", "dem.2")):
        with pytest.raises(ImageryError, match=r"order red, green, blue.* or name an asset") as e:
            xchmv2.load(found, bands=bands)
        assert "'dem.1', 'image.1'" in e.value.fix
    np.testing.assert_array_equal(native(found, bands="image"), noise())
    with pytest.raises(ImageryError, match=r"band 2 for valid in asset 'dem'.*mask='dem.1'"):
        xchmv2.load(found, bands="image", cloud_mask="dem.2")
    xchmv2.load(found, bands="image", cloud_mask="dem.1", clear_values=0)


def test_metadata_of_an_asset_hold_for_all_its_bands(tmp_path):
    values = noise(dtype="uint16", high=3000)
    path = raster(tmp_path / "a.tif", values)
    told = {"data_type": "uint16", "nodata": 0, "raster:scale": 1e-4, "raster:offset": 0}
    one, other = item(path, id="a", **told), item(path, id="b", **(told | {"raster:offset": -0.1}))
    np.testing.assert_array_equal(native(one), values)
    with pytest.raises(ImageryError, match=r"offset 0 in a; scale 0.0001 and offset -0.1 in b"):
        xchmv2.load([one, other])


@pytest.mark.parametrize(
    "bands",
    [1, ("image.1", "image.2"), (1, 1, 2), (True, 2, 3), [[1], 2, 3], {"red": 1},
     (c for c in COLOURS), (1, 2, None), object(), np.array([[1, 2, 3]])],
)  # fmt: skip
def test_bands_that_are_no_three_bands(rgb, bands):
    with pytest.raises(ImageryError, match="an asset, or three different bands"):
        xchmv2.load(described(rgb), bands=bands)


def test_bands_as_numpy_numbers(rgb):
    np.testing.assert_array_equal(native(described(rgb), bands=np.array([3, 2, 1])), noise()[::-1])


def test_a_band_name_that_two_bands_have(tmp_path):
    values = noise(4)
    bands = [{"name": n} for n in ("a", "b", "c", "a")]
    found = item(raster(tmp_path / "a.tif", values), bands=bands)
    with pytest.raises(ImageryError, match=r"2 in asset 'image'.*'image.1' or 'image.4'"):
        xchmv2.load(found, bands=("a", "b", "c"))
    taken = native(found, bands=("image.4", "b", "c"))
    np.testing.assert_array_equal(taken, values[[3, 1, 2]])


# --- 180 degrees ------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["north", "south"])
def across(request, tmp_path):
    """Two images that touch at 180 degrees, and the latitude."""
    north = request.param
    latitude, west, east = (65.0, 32660, 32601) if north else (-17.0, 32760, 32701)
    found = []
    start = 179.998 if north else 179.999
    for id, crs, longitude, left in (("west", west, start, 0), ("east", east, -179.9995, -50)):
        x, y = Transformer.from_crs(4326, crs, always_xy=True).transform(longitude, latitude)
        path = raster(tmp_path / f"{id}.tif", noise(3, (200, 170)), crs=crs,
                      origin=(round(x) + left, round(y) + 60))  # fmt: skip
        found.append(item(path, id=id))
    return found, latitude


def test_a_place_across_180_degrees_finds_both_sides(across):
    found, latitude = across
    assert found[0]["bbox"][0] > 179
    box = (179.9992, latitude - 0.0004, 180.0008, latitude)
    cube = xchmv2.load(found, bbox=box).compute()
    assert list(cube.item_ids.values) == ["east;west"]
    assert cube.odc.crs.proj.utm_zone in ("60N", "60S", "1N", "1S", "01N", "01S")
    assert float((cube.red != 0).mean()) > 0.5
    for other in (
        {"bbox": (179.9992, box[1], -179.9992, box[3])},
        {"bbox": (-180.0008, box[1], -179.9992, box[3])},
        {"lon": (179.9992, -179.9992), "lat": (box[1], box[3])},
        {"geobox": cube.odc.geobox},
        {"like": cube},
    ):
        same = xchmv2.load(found, **other).compute()
        np.testing.assert_array_equal(stacked(same), stacked(cube))
    alone = xchmv2.load(found[0], geobox=cube.odc.geobox).compute()
    shown = alone.red.values != 0
    assert 0.05 < shown.mean() < 0.95
    whole = xchmv2.load(found)  # without a place: all of both
    assert whole.sizes["x"] < 1000
    assert list(whole.item_ids.values) == ["east;west"]


def test_a_crs_that_is_cut_at_180_degrees(across):
    found, latitude = across
    box = (179.9992, latitude - 0.0004, -179.9992, latitude)
    for crs in (3857, "EPSG:3395"):
        with pytest.raises(CHMv2Error, match=r"not cut at 180 degrees.*crs='utm'"):
            xchmv2.load(found, bbox=box, crs=crs)
    zone = xchmv2.load(found, bbox=box, crs="utm")
    assert zone.odc.crs.proj.utm_zone is not None
    assert float((zone.red != 0).mean().compute()) > 0.5


def test_degrees_and_mercator_beside_180_degrees_go_to_a_zone(tmp_path):
    found = []
    for crs, left, pixel in ((4326, 180 - 80 * 6e-6, 6e-6), (4326, -180.0, 6e-6),
                             (3857, -20037508.342789244, 0.6)):  # fmt: skip
        path = raster(tmp_path / f"{len(found)}.tif", noise(), crs=crs, pixel=pixel,
                      origin=(left, 10.0 if crs == 4326 else 1118889.97))  # fmt: skip
        found.append(item(path, id=str(len(found))))
    cube = xchmv2.load(found).compute()
    assert cube.odc.crs.proj.utm_zone is not None
    assert cube.sizes["x"] < 400
    assert float((cube.red != 0).mean()) > 0.5


def test_an_item_whose_box_crosses_180_degrees(across):
    found, latitude = across
    wide = copy.deepcopy(found[0])
    wide["bbox"] = [179.9, latitude - 1, -179.9, latitude + 1]
    near = xchmv2.load(wide, bbox=(179.9992, latitude - 0.0004, 180.0, latitude))
    assert list(near.item_ids.values) == ["west"]
    with pytest.raises(ImageryError, match="a place that the imagery covers"):
        xchmv2.load(wide, bbox=(100.0, latitude - 1, 101.0, latitude))


# --- items of others --------------------------------------------------------------------------


def test_published_items_are_right_or_refused_in_a_sentence(data):
    for path in sorted((data / "stac").glob("*.json")):
        if "collection" in path.name:
            continue
        with pytest.raises(CHMv2Error, match=r"item|a file|an image that can be read"):
            xchmv2.load(path)  # the files of these items are not here
    (found,) = published_naip(data, str(data / NAIP))
    with rasterio.open(data / NAIP) as file:
        np.testing.assert_array_equal(native(found), file.read()[:3])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"lon": 5, "lat": (1, 2)}, "lon and lat as two numbers each, found lon=5"),
        ({"x": ("a", "b"), "y": (1, 2), "crs": 32633}, "x and y as a place, found x="),
        ({"geopolygon": {"type": "x"}}, "geopolygon as a place"),
        ({"geobox": "here"}, "geobox or like with coordinates and a CRS, found str"),
        ({"bbox": np.array(5)}, "bbox as .west, south, east, north. in degrees"),
    ],
)
def test_places_that_are_none(rgb, place, message):
    with pytest.raises(CHMv2Error, match=message):
        xchmv2.load(described(rgb), **place)


def test_swapped_corners_are_no_place_across_180_degrees(rgb):
    found = described(rgb)
    west, south, east, north = found["bbox"]
    for swapped in ((east, south, west, north), (west, north, east, south)):
        with pytest.raises(CHMv2Error, match="swap its corners"):
            xchmv2.load(found, bbox=swapped)
    np.testing.assert_array_equal(native(found, bbox=(west, south, east, north)), noise())
