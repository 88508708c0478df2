"""From STAC items to a cube: against rasterio and rioxarray reading the same files."""

import copy
import json
import pickle
import warnings

import dask
import numpy as np
import odc.geo.xr
import odc.stac
import pystac
import pytest
import rasterio
import rioxarray
import xarray as xr
from catalogue import BART, NAIP, SJER, item, names, noise, published_naip, raster
from catalogue import static_catalogue as build_catalogue
from conftest import no_compute
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from webserver import serve

import xchmv2
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.stac import quality_flags
from xchmv2.stac.asset_bands import BandInfo, resolve_clear
from xchmv2.stac.grids import resolve_area

# Private imports: bands and areas of one item, without a cube.

COLOURS = ("red", "green", "blue")
SMALL = dict(tile=64, overlap=16)

# rasterio silences this warning around its in-memory datasets, but by a way that threads undo for
# one another.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


@pytest.fixture(scope="module")
def catalogue(data, tmp_path_factory):
    return build_catalogue(data, tmp_path_factory.mktemp("catalogue") / "stac")


@pytest.fixture
def rgb(tmp_path):
    """A file of three colours."""
    return raster(tmp_path / "rgb.tif", noise())


def stacked(cube, time=0):
    return np.stack([cube[name].isel(time=time).values for name in COLOURS])


def pixels(path):
    with rasterio.open(path) as file:
        return file.read()


def flags_of(cube):
    flags = cube.quality_flags
    masks = dict(zip(flags.flag_meanings.split(), flags.flag_masks, strict=True))
    return [{n for n, bit in masks.items() if int(v) & int(bit)} for v in flags.values]


# --- the whole path, on real imagery ---------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "pystac", "url"])
def test_static_catalogue_equals_rioxarray(catalogue, data, how):
    neon = "neon/collection.json"
    with serve(catalogue.parent) as url:
        source = {"path": catalogue.parent / neon, "url": f"{url}/{neon}"}.get(how)
        source = source or pystac.Catalog.from_file(str(catalogue)).get_child("neon")
        place = {"lon": (-119.74, -119.7), "lat": (37.1, 37.12)}  # San Joaquin; Bartlett is far
        with no_compute():
            cube = xchmv2.load(source, resolution=None, bbox=(-119.74, 37.1, -119.71, 37.12))
            assert xchmv2.load(source, **place).sizes["time"] == 2
        assert cube.red.chunks == ((1, 1), (400,), (400,))
        assert [str(t)[:4] for t in cube.time.values] == ["2017", "2018"]
        for time, year in enumerate((2017, 2018)):
            truth = rioxarray.open_rasterio(data / SJER.format(year))
            np.testing.assert_array_equal(stacked(cube, time), truth.values)
            np.testing.assert_allclose(cube.x, truth.x, atol=1e-6)
            np.testing.assert_allclose(cube.y, truth.y, atol=1e-6)
        assert cube.odc.crs == truth.odc.crs
        assert cube.red.dtype == "uint8"
        assert cube.red.attrs["nodata"] == 255
        if how == "url":
            ranges = [asked for _, path, asked in url.requests if path.endswith(".tif") and asked]
            assert ranges
            assert all(asked.startswith("bytes=") for asked in ranges)


def test_whole_catalogue_of_a_place_by_file_and_over_http(catalogue, tiny_checkpoint):
    bbox = (-71.2445, 44.065, -71.2435, 44.0655)  # in Bartlett; other items are in California
    with serve(catalogue.parent) as url:
        near = xchmv2.load(catalogue, bbox=bbox)
        far = xchmv2.load(f"{url}/catalog.json", bbox=bbox)
        assert list(far.item_ids.values) == ["BART_2019"]
        with no_compute():
            height = far.chmv2.predict(tiny_checkpoint, **SMALL)
        xr.testing.assert_identical(near.compute(), far.compute())
        assert height.dims == ("time", "y", "x")
        assert height.notnull().any()
        assert height.odc.crs == "EPSG:32619"
        assert list(height.item_ids.values) == ["BART_2019"]
        xr.testing.assert_identical(height.quality_flags.variable, far.quality_flags.variable)


def test_published_naip_items_are_cured_and_left_alone(data, tiny_checkpoint):
    items = published_naip(data, str(data / NAIP))
    before = copy.deepcopy(items)
    objects = [pystac.Item.from_dict(i) for i in items]
    cube = xchmv2.load(objects, resolution=None)
    np.testing.assert_array_equal(stacked(cube), pixels(data / NAIP)[:3])
    assert [i.to_dict(transform_hrefs=False)["assets"] for i in objects] == [
        pystac.Item.from_dict(i).to_dict(transform_hrefs=False)["assets"] for i in before
    ]
    assert "raster:bands" not in objects[0].assets["image"].extra_fields
    xr.testing.assert_identical(cube.compute(), xchmv2.load(items, resolution=None).compute())
    assert items == before
    assert cube.red.dtype == "uint8"
    assert cube.chmv2.predict(tiny_checkpoint, **SMALL).notnull().all()


def test_the_grid_is_that_of_predict(data, tiny_checkpoint):
    for name in (BART, "rgb_misc/OAM_5c15_orchard_black_collar.tif"):
        image = rioxarray.open_rasterio(data / name, chunks={"x": 500, "y": 500})
        wanted = image.chmv2.predict(tiny_checkpoint, resolution=0.6, nodata=0).odc.geobox
        cube = xchmv2.load(item(data / name))
        found = cube.odc.geobox
        np.testing.assert_allclose(found.affine[:6], wanted.affine[:6], atol=1e-6)
        assert found.shape == wanted.shape


def test_averages_finer_imagery_by_area(data):
    cube = xchmv2.load(item(data / BART))
    source, box = pixels(data / BART).astype(float), cube.odc.geobox
    col, row = (~rasterio.open(data / BART).transform) * (box.affine.c, box.affine.f)
    rows, cols = (np.arange(n) * 6 + round(o) for n, o in zip(box.shape, (row, col), strict=True))
    assert (abs(row - round(row)), abs(col - round(col))) < (1e-6, 1e-6)
    inside = np.s_[2:-2, 2:-2]
    blocks = np.stack([
        [[source[b, y : y + 6, x : x + 6].mean() for x in cols[2:-2]] for y in rows[2:-2]]
        for b in range(3)
    ])  # fmt: skip
    assert abs(stacked(cube)[(..., *inside)] - blocks).max() <= 0.51


# --- bands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"eo:bands": names("blue", "green", "red", "nir")},
        {"bands": [{"eo:common_name": n} for n in ("blue", "green", "red", "nir")]},
        {"bands": [{"name": n, "data_type": "uint8"} for n in ("B", "G", "R", "N")]},
        {
            "eo:bands": names("blue", "green", "red", "nir"),
            "raster:bands": [{"data_type": "uint8", "nodata": 0}] * 4,
        },
    ],
)
def test_finds_colours_in_the_order_of_the_file(tmp_path, fields):
    values = noise(4)
    path = raster(tmp_path / "bgrn.tif", values)
    cube = xchmv2.load(item(path, **fields), resolution=None)
    np.testing.assert_array_equal(stacked(cube), values[[2, 1, 0]])


def test_common_names_outrank_band_names(tmp_path):
    values = noise(3)
    bands = [{"name": n, "common_name": c} for n, c in zip(("B02", "B03", "B04"), COLOURS)]  # noqa: B905
    cube = xchmv2.load(
        item(raster(tmp_path / "a.tif", values), **{"eo:bands": bands}), resolution=None
    )
    np.testing.assert_array_equal(stacked(cube), values)


def test_one_file_for_each_band(tmp_path):
    values = noise(3)
    found = item(raster(tmp_path / "b.tif", values[2:]), asset="B02", **{"eo:bands": names("blue")})
    for name, band, colour in (("B04", 0, "red"), ("B03", 1, "green")):
        path = raster(tmp_path / f"{name}.tif", values[band : band + 1])
        other = item(path, asset=name, **{"eo:bands": names(colour)})
        found["assets"] |= other["assets"]
    cube = xchmv2.load(found, resolution=None)
    np.testing.assert_array_equal(stacked(cube), values)
    swapped = xchmv2.load(found, resolution=None, bands=("B02", "green", "B04.1"))
    np.testing.assert_array_equal(stacked(swapped), values[::-1])


def test_visual_goes_before_analytic_and_quicklooks_are_no_imagery(tmp_path, tiny_checkpoint):
    seen, raw = noise(3, seed=1), noise(3, seed=2, dtype="uint16")
    path = raster(tmp_path / "analytic.tif", raw)
    visual = item(raster(tmp_path / "visual.tif", seen), asset="visual")["assets"]
    look = item(raster(tmp_path / "look.tif", noise(3)), asset="a", roles=["thumbnail"])["assets"]
    found = item(path, asset="analytic", assets=visual | look, **{"eo:bands": names(*COLOURS)})
    np.testing.assert_array_equal(stacked(xchmv2.load(found, resolution=None)), seen)
    chosen = xchmv2.load(found, resolution=None, bands="analytic")
    np.testing.assert_array_equal(stacked(chosen), raw)
    assert chosen.red.dtype == "uint16"
    with pytest.raises(ImageryError, match="uint16 and no value_range"):
        chosen.chmv2.predict(tiny_checkpoint)


def test_a_nameless_image_is_told_by_its_file(tmp_path):
    values = noise(3)
    np.testing.assert_array_equal(
        stacked(xchmv2.load(item(raster(tmp_path / "rgb.tif", values)), resolution=None)), values
    )
    four = item(raster(tmp_path / "four.tif", noise(5)))
    with pytest.raises(
        ImageryError, match=r"5 bands without names.*name them in the order"
    ) as told:
        xchmv2.load(four)
    assert told.value.fix.endswith("of 'image.1', 'image.2', 'image.3', 'image.4', 'image.5'")
    by_number = xchmv2.load(four, resolution=None, bands=(3, 2, 1))
    np.testing.assert_array_equal(stacked(by_number), pixels(tmp_path / "four.tif")[[2, 1, 0]])


def test_real_item_without_band_names_says_what_there_is(data):
    found = json.loads((data / "stac/item-naip.json").read_text())
    with pytest.raises(ImageryError, match=r"found assets .*CO_GEOTIFF_AWS_RGB.*name them"):
        xchmv2.load(found)


def test_real_sentinel_2_is_too_coarse(data):
    found = data / "stac/sentinel-2-l2a-pc.json"  # its files are not here, and not asked for
    with pytest.raises(ImageryError, match=r"10 x 10 m, in which single trees.*sentinel-2-l2a/S2"):
        xchmv2.load(found)


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ("other", "an asset 'other' in every item, found assets image"),
        (("red", "green"), "three different bands"),
        (("red", "green", "pink"), "a band or asset 'pink' in every item, found assets image"),
        (("image.1", "image.2", "image.9"), "band 9 for blue.*3 bands in its file"),
        (
            ("image", "image.1", "image.2"),
            "one band, as image.1, found assets image .red, green, blue.",
        ),
    ],
)
def test_bands_that_are_not_there(rgb, bands, message):
    with pytest.raises(ImageryError, match=message):
        xchmv2.load(item(rgb, **{"eo:bands": names(*COLOURS)}), bands=bands)


def test_band_numbers_need_one_image(rgb):
    two = item(rgb, assets=item(rgb, asset="other")["assets"])
    with pytest.raises(ImageryError, match="band numbers for items with one image"):
        xchmv2.load(two, bands=(1, 2, 3))


def test_an_item_that_lacks_bands_is_named(rgb):
    odd = item(rgb, id="odd", **{"eo:bands": names("red", "nir")})
    with pytest.raises(ImageryError, match=r"red, green and blue.*image \(red, nir\).*images/odd"):
        xchmv2.load([item(rgb, **{"eo:bands": names(*COLOURS)}), odd])
    vector = item(rgb, id="vector")
    vector["assets"]["image"]["type"] = "application/geo+json"
    with pytest.raises(ImageryError, match=r"no image among the assets \['image'\]"):
        xchmv2.load(vector)


# --- laziness, keys, files -------------------------------------------------------------------


def test_opens_one_header_per_collection_and_asset(tmp_path):
    items = []
    with serve(tmp_path) as url:
        for day in range(1, 6):
            raster(tmp_path / f"{day}.tif", noise(seed=day))
            time = f"2020-07-0{day}T10:00:00Z"
            items.append(
                item(tmp_path / f"{day}.tif", id=f"i{day}", time=time, href=f"{url}/{day}.tif")
            )
            items[-1]["assets"]["image"]["eo:bands"] = names(*COLOURS)
        with no_compute():
            cube = xchmv2.load(items)
        assert {path for _, path, _ in url.requests} == {"/1.tif"}
        url.requests.clear()
        for found in items:
            found["assets"]["image"]["raster:bands"] = [{"data_type": "uint8", "nodata": 0}] * 3
        xchmv2.load(items)
        for found in items:
            del found["assets"]["image"]["raster:bands"]
        xchmv2.load(items, dtype="uint8", nodata=0)
        assert not url.requests
        cube.isel(time=[2]).compute()
        assert {path for _, path, _ in url.requests} == {"/3.tif"}


def test_signs_when_it_reads_and_keys_know_no_signature(tmp_path):
    raster(tmp_path / "a.tif", noise())
    with serve(tmp_path, token="secret") as url:
        found = item(tmp_path / "a.tif", href=f"{url}/a.tif")
        with pytest.raises(ImageryError, match=r"a.tif: HTTP response code: 403.*sign=planetary"):
            xchmv2.load(found)
        keys = []
        for moment in (1, 2):
            cube = xchmv2.load(
                found, resolution=None, sign=lambda href, m=moment: f"{href}?{m}&sig=secret"
            )
            keys.append(cube.__dask_keys__())
            np.testing.assert_array_equal(stacked(cube), noise())
        assert keys[0] == keys[1]
        with pytest.raises(CHMv2Error, match="sign as a function that takes the URL"):
            xchmv2.load(found, sign=lambda item: item.href, dtype="uint8", nodata=0,
                        bands=("image.1", "image.2", "image.3"))  # fmt: skip
        with pytest.raises(CHMv2Error, match="sign to return a URL, found int"):
            xchmv2.load(found, sign=len, dtype="uint8", nodata=0, bands=(1, 2, 3))
        patched = xchmv2.load(found, resolution=None, patch_url=lambda href: f"{href}?sig=secret")
        np.testing.assert_array_equal(stacked(patched), noise())


def test_an_error_while_reading_names_the_file_but_no_secret(tmp_path):
    raster(tmp_path / "a.tif", noise())
    with serve(tmp_path) as url:
        found = item(tmp_path / "a.tif", href=f"{url}/a.tif")
        found["assets"]["image"]["eo:bands"] = names(*COLOURS)
        found["assets"]["image"]["raster:bands"] = [{"data_type": "uint8", "nodata": 0}] * 3
        cube = xchmv2.load(found, sign=lambda href: f"{href}?sig=secret")
        (tmp_path / "a.tif").unlink()
        with pytest.raises(ImageryError, match=r"can be read, found http.*a\.tif: ") as caught:
            cube.red.compute()
        assert "secret" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        lenient = xchmv2.load(found, dtype="uint8", nodata=0, bands=(1, 2, 3), fail_on_error=False)
        assert (lenient.red.compute() == 0).all()


def test_unreadable_files_are_counted(tmp_path):
    values = noise()
    items = [
        item(raster(tmp_path / f"{n}.tif", values), id=n, time=f"202{n}-07-01T10:00:00Z")
        for n in "123"
    ]
    (tmp_path / "1.tif").unlink()
    (tmp_path / "3.tif").write_bytes(b"no image")
    with pytest.raises(ImageryError, match="on_error='nodata' leaves out files"):
        xchmv2.load(items)
    cube = xchmv2.load(items, resolution=None, on_error="nodata")
    np.testing.assert_array_equal(cube.unreadable_assets, [1, 0, 1])
    assert ["partly_unreadable" in flags for flags in flags_of(cube)] == [True, False, True]
    np.testing.assert_array_equal(stacked(cube, 1), values)
    assert (stacked(cube, 0) == 0).all()
    assert (stacked(cube, 2) == 0).all()
    with pytest.raises(ImageryError, match="at least one image that can be read, found 1 that"):
        xchmv2.load(items[0], on_error="nodata")
    nowhere = item(tmp_path / "2.tif", id="4", href=tmp_path / "4.tif", projection=False)
    nowhere["properties"]["datetime"] = "2024-07-01T10:00:00Z"
    with pytest.raises(ImageryError, match="at least one image that can be read"):
        xchmv2.load(nowhere, on_error="nodata")
    assert list(xchmv2.load([items[1], nowhere], on_error="nodata").item_ids.values) == ["2", "4"]
    nowhere["geometry"] = None
    assert list(xchmv2.load([items[1], nowhere], on_error="nodata").item_ids.values) == ["2"]


def test_part_of_a_date_unreadable(tmp_path):
    west = item(raster(tmp_path / "w.tif", noise(seed=1)), id="w")
    east = item(raster(tmp_path / "e.tif", noise(seed=2), origin=(500_048.0, 5_000_000.0)), id="e")
    (tmp_path / "e.tif").unlink()
    cube = xchmv2.load([east, west], resolution=None, on_error="nodata")
    assert cube.sizes == {"time": 1, "y": 64, "x": 160}
    np.testing.assert_array_equal(stacked(cube)[..., :80], noise(seed=1))
    assert (stacked(cube)[..., 80:] == 0).all()
    assert list(cube.item_ids.values) == ["e;w"]


def test_items_without_projection_are_told_by_their_files(rgb, tmp_path):
    cube = xchmv2.load(item(rgb, projection=False), resolution=None)
    np.testing.assert_array_equal(stacked(cube), noise())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        nowhere = item(raster(tmp_path / "nowhere.tif", noise(), crs=None), projection=False)
    with pytest.raises(ImageryError, match="neither the projection extension nor a CRS"):
        xchmv2.load(nowhere)


def test_the_file_outranks_a_wrong_projection(rgb):
    found = item(rgb, **{"eo:bands": names(*COLOURS)})
    found["properties"]["proj:transform"][0] = 1.2
    np.testing.assert_array_equal(stacked(xchmv2.load(found, resolution=None)), noise())


# --- place and grid --------------------------------------------------------------------------


@pytest.mark.parametrize("far", [(10.0, 10.0, 11.0, 11.0), (15.002, 45.148, 15.0021, 45.1481)])
def test_a_place_outside_is_refused_before_anything_is_read(rgb, far):
    with pytest.raises(ImageryError, match=r"covers at least in part, found imagery over \(15.00"):
        xchmv2.load(item(rgb), bbox=far)


def test_a_place_partly_outside_is_filled_with_nodata(rgb, tiny_checkpoint):
    box = GeoBox.from_bbox((499_980, 4_999_980, 500_030, 5_000_020), 32633, resolution=0.6)
    cube = xchmv2.load(item(rgb), geobox=box)
    same = xchmv2.load(item(rgb), like=cube)
    xr.testing.assert_equal(cube.compute(), same.compute())
    assert cube.odc.geobox == box
    outside = (cube.x + 0.3 <= 500_000) | (cube.y - 0.3 >= 5_000_000)  # of any part of a pixel
    assert cube.red.attrs["nodata"] == 0
    assert ((cube.red == 0).compute() == outside).all()
    height = cube.chmv2.predict(tiny_checkpoint, **SMALL)
    assert (height.isnull().compute() == outside).all()


@pytest.mark.parametrize("declared", [None, 7])
@pytest.mark.parametrize("stored", [None, 7])
def test_nodata_of_item_or_file_through_a_rotation(tmp_path, declared, stored):
    """Into another UTM zone: corners that no image covers are nodata, the rest is not."""
    values = noise(low=8)
    values[:, :20, :20] = 7
    path = raster(tmp_path / "a.tif", values, nodata=stored)
    fields = {"raster:bands": [{"data_type": "uint8", "nodata": declared}] * 3} if declared else {}
    cube = xchmv2.load(item(path, **{"eo:bands": names(*COLOURS)}, **fields), crs=32634)
    empty = cube.red.attrs["nodata"]
    assert empty == (7 if declared or stored else 0)
    counted = (stacked(cube) == empty).all(axis=0).sum()
    corner = 400 if declared or stored else 0
    outside = cube.red[0].size - 64 * 80
    assert abs(counted - corner - outside) < 200
    hole = xchmv2.load(item(path), crs=32634, nodata=7)
    assert hole.red.attrs["nodata"] == 7
    assert abs((stacked(hole) == 7).all(axis=0).sum() - 400 - outside) < 200


@given(
    west=st.floats(-30_000, 30_000),
    south=st.floats(-30_000, 30_000),
    step=st.floats(10, 3_000),
    crs=st.sampled_from([3857, 32633, 3395, 2263]),
)
def test_neighbouring_places_share_a_grid(west, south, step, crs):
    lon, lat = 15 + west / 1e5, 45 + south / 1e5
    if crs == 2263:  # feet
        lon, lat = lon - 89, lat - 4.4
    grow = step / 1e5
    places = [
        (lon, lat, lon + 0.01, lat + 0.01),
        (lon + grow, lat + grow / 2, lon + 0.04, lat + 0.02),
    ]
    one, other = (
        resolve_area([], crs=crs, resolution=0.6, place={"bbox": bbox}) for bbox in places
    )
    if crs == 32633:
        assert one.resolution.x == 0.6
    # Across one of the 1 % steps of a projection whose scale varies the grids do differ.
    if one.resolution == other.resolution:
        off = ~one.affine * other.affine * (0, 0)
        np.testing.assert_allclose(off, np.round(off), atol=1e-4)


def test_usual_crs_degrees_and_utm(tmp_path):
    here = item(raster(tmp_path / "a.tif", noise()), id="a")
    there = item(raster(tmp_path / "b.tif", noise(), crs=32634, origin=(31_000, 5_010_000)), id="b")
    more = item(raster(tmp_path / "c.tif", noise()), id="c")
    assert xchmv2.load([there, here, more]).odc.crs == 32633
    degrees = item(
        raster(tmp_path / "d.tif", noise(), crs=4326, origin=(15.0, 45.0), pixel=6e-6), id="d"
    )
    cube = xchmv2.load(degrees)
    assert cube.odc.crs == 32633
    assert (cube.red != 0).any()
    assert xchmv2.load(here, crs="utm").odc.crs == 32633
    assert xchmv2.load(here, crs=3857).odc.crs == 3857
    with pytest.raises(ImageryError, match="a projected CRS"):
        xchmv2.load(here, crs=4326)


def test_other_ways_to_say_where(rgb):
    found = item(rgb)
    west, south, east, north = found["bbox"]
    bbox = (west, south, (west + east) / 2, north)
    wanted = xchmv2.load(found, bbox=bbox)
    ring = [(bbox[i], bbox[j]) for i, j in ((0, 1), (2, 1), (2, 3), (0, 3), (0, 1))]
    for place in (
        {"lon": bbox[::2], "lat": bbox[1::2]},
        {"intersects": {"type": "Polygon", "coordinates": [ring]}},
    ):
        assert xchmv2.load(found, **place).odc.geobox == wanted.odc.geobox
    x, y = (500_006.0, 500_012.0), (4_999_980.0, 4_999_986.0)
    assert xchmv2.load(found, x=x, y=y, crs=32633).sizes == {"time": 1, "y": 10, "x": 11}
    native = xchmv2.load(found, bbox=bbox, resolution=None)
    np.testing.assert_array_equal(stacked(native), noise()[..., : native.sizes["x"]])


def test_native_pixels_need_one_grid(tmp_path):
    one = item(raster(tmp_path / "a.tif", noise()), id="a")
    off = item(raster(tmp_path / "b.tif", noise(), origin=(500_000.3, 5_000_000)), id="b")
    with pytest.raises(ImageryError, match="images on one grid, to keep their own pixels"):
        xchmv2.load([one, off], resolution=None)
    with pytest.raises(ImageryError, match="to be loaded in EPSG:3857"):
        xchmv2.load(one, resolution=None, crs=3857)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bbox": (15, 46, 16, 45)}, "bbox as .west, south, east, north. in degrees"),
        ({"bbox": (5e5, 4.9e6, 5.1e5, 5e6)}, "for other coordinates pass geobox="),
        ({"bbox": (15, 45, 16)}, "bbox as .west, south"),
        ({"bbox": (15, 45, 16, 46), "like": 1}, "one way to give the place, found bbox, like"),
        ({"geobox": GeoBox((9, 9), rasterio.Affine(1, 0, 0, 0, -1, 0), 32633), "crs": 3857},
         "found geobox, crs"),
        ({"like": GeoBox((9, 9), rasterio.Affine(1, 0, 0, 0, -1, 0), 32633), "resolution": 1.0},
         "found like, resolution=1.0"),
        ({"like": xr.DataArray(0)}, "geobox or like with coordinates and a CRS"),
        ({"lon": (15, 16)}, "one way to give the place, found lon"),
        ({"resolution": "fine"}, "resolution as a number above 0 m, or None"),
        ({"resolution": 5}, "a ground resolution of 0.25 to 1.5 m"),
        ({"crs": "EPSG:nonsense"}, "expected a CRS, found crs='EPSG:nonsense'"),
        ({"chunks": 0}, "the side of a chunk"),
        ({"chunks": {"band": 1}}, "the side of a chunk"),
        ({"on_error": "ignore"}, "on_error as one of 'raise', 'nodata'"),
        ({"clear_values": 1}, "clear_values together with the mask"),
        ({"resolutoin": 1}, r"options among .*found \['resolutoin'\]"),
        ({"groupby": "quadkey"}, "a property 'quadkey' in every item"),
        ({"groupby": ["time"]}, r"groupby as a name, .*found groupby=\['time'\]"),
        ({"groupby": "proj:shape"}, r"shape' as one number or text, found \[64, 80\] of item"),
        ({"groupby": lambda *_: []}, r"groupby to return one number or text, found \[\] of item"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(rgb, options, message):
    with pytest.raises(CHMv2Error, match=message):
        xchmv2.load(item(rgb), **options)


# --- values ----------------------------------------------------------------------------------


def test_refuses_mixed_values(tmp_path):
    one = item(raster(tmp_path / "a.tif", noise()), id="a")
    wide = item(raster(tmp_path / "b.tif", noise(dtype="uint16")), id="b", collection="other")
    with pytest.raises(ImageryError, match="one data type, found uint8 in images/a, uint16 in oth"):
        xchmv2.load([one, wide])
    assert xchmv2.load([one, wide], dtype="uint16").red.dtype == "uint16"
    white = item(raster(tmp_path / "c.tif", noise(), nodata=255), id="c", collection="white")
    black = item(raster(tmp_path / "d.tif", noise(), nodata=0), id="d", collection="black")
    assert xchmv2.load([white, black]).red.attrs["nodata"] == 0  # each file's own holds for it
    assert xchmv2.load([white, black], nodata=0).red.attrs["nodata"] == 0


def test_a_date_is_resampled_for_itself(tmp_path):
    fine = item(raster(tmp_path / "f.tif", noise(shape=(96, 96)), pixel=0.2), id="f")
    coarse = item(
        raster(tmp_path / "c.tif", noise(shape=(20, 20)), pixel=1.2), id="c",
        time="2022-07-01T10:00:00Z",
    )  # fmt: skip
    box = GeoBox((20, 20), rasterio.Affine(0.6, 0, 500_000.4, 0, -0.6, 4_999_999.8), 32633)
    alone = xchmv2.load(fine, geobox=box)
    both = xchmv2.load([coarse, fine], geobox=box)
    np.testing.assert_array_equal(both.red[0], alone.red[0])
    np.testing.assert_allclose(both.native_resolution, [0.2, 1.2], rtol=1e-3)
    assert ["upsampled" in flags for flags in flags_of(both)] == [False, True]
    assert both.red.chunks == ((1, 1), (20,), (20,))
    assert np.abs(np.diff(both.red[1].astype(int), axis=1)).max() < 240
    nearest = xchmv2.load(coarse, geobox=box, resampling="nearest")
    assert set(np.unique(nearest.red)) <= set(np.unique(pixels(tmp_path / "c.tif")[0]))


def test_images_side_by_side_make_one(tmp_path):
    values = noise(shape=(64, 160))
    west = raster(tmp_path / "w.tif", values[..., :84])
    east = raster(tmp_path / "e.tif", values[..., 76:], origin=(500_000 + 76 * 0.6, 5_000_000))
    whole = xchmv2.load(item(raster(tmp_path / "all.tif", values)), crs=32634)
    both = xchmv2.load([item(west, id="w"), item(east, id="e")], crs=32634)
    assert both.sizes == whole.sizes
    np.testing.assert_array_equal(both.red == 0, whole.red == 0)
    assert (both.red != whole.red).mean() < 0.01  # interpolated from one side along the seam


def test_floats_get_nan(tmp_path):
    path = raster(tmp_path / "a.tif", noise(dtype="float32") / 255)
    box = GeoBox((20, 20), rasterio.Affine(0.6, 0, 499_994, 0, -0.6, 5_000_000), 32633)
    cube = xchmv2.load(item(path), geobox=box)
    assert cube.red.dtype == "float32"
    assert cube.red.isnull().sum() == 200


# --- time and facts --------------------------------------------------------------------------


def test_facts_of_several_items_are_the_worst(rgb):
    def told(id, time, **facts):
        return item(rgb, id=id, time=time, properties={k.replace("_", ":", 1): v
                                                       for k, v in facts.items()})  # fmt: skip

    cube = xchmv2.load([
        told("b", "2021-07-01T10:00:00+00:00", view_sun_elevation=50, view_off_nadir=26.0,
             view_sun_azimuth=170, eo_cloud_cover=1, platform="WV03"),
        told("a", "2021-07-01T12:30:00+02:00", view_sun_elevation=44.9, view_off_nadir=3,
             view_sun_azimuth=190.0, platform="WV02"),
        told("c", "2020-07-01T10:00:00Z", view_sun_elevation=45, view_off_nadir=25),
        told("d", "2019-07-01T10:00:00Z", view_sun_elevation=float("nan"), view_off_nadir=None),
    ])  # fmt: skip
    assert cube.time.dtype == "datetime64[ns]"
    assert [str(t)[:16] for t in cube.time.values] == [
        "2019-07-01T10:00", "2020-07-01T10:00", "2021-07-01T10:00"]  # fmt: skip
    np.testing.assert_array_equal(cube.sun_elevation, [np.nan, 45, 44.9])
    np.testing.assert_array_equal(cube.sun_azimuth, [np.nan, np.nan, 190])
    np.testing.assert_array_equal(cube.off_nadir, [np.nan, 25, 26])
    np.testing.assert_array_equal(cube.cloud_cover, [np.nan, np.nan, 1])
    assert list(cube.platform.values) == ["", "", "WV02;WV03"]
    assert list(cube.item_ids.values) == ["d", "c", "a;b"]
    assert flags_of(cube) == [
        {"sun_elevation_unknown", "off_nadir_unknown"}, set(), {"low_sun", "high_off_nadir"}
    ]  # fmt: skip
    assert cube.sun_elevation.attrs["units"] == "degree"


def test_quality_flags_with_other_limits():
    time = {"time": np.array(["2020-01-01", "2021-01-01"], "datetime64[ns]")}
    sun = xr.DataArray([30.0, np.nan], time, "time", attrs={"units": "degree"})
    off = xr.DataArray([10.0, 10.0], time, "time")
    flags = quality_flags(sun, off, lowest_sun=20, largest_off_nadir=5)
    assert flags.dtype == "uint8"
    np.testing.assert_array_equal(flags, [2, 2 + 4])
    assert flags.attrs["lowest_sun_elevation"] == 20
    assert flags.attrs["flag_masks"].dtype == "uint8"
    assert "units" not in flags.attrs
    assert len(flags.attrs["flag_meanings"].split()) == len(flags.attrs["flag_masks"]) == 6
    assert sun.attrs == {"units": "degree"}


@pytest.mark.parametrize("groupby", ["solar_day", "time", "id", None, "gsd"])
def test_dates_are_those_of_odc_stac(rgb, groupby):
    times = ["2020-07-01T10:00:00Z", "2020-07-01T23:30:00Z", "2020-07-01T10:00:00Z",
             "2020-07-02T01:00:00Z"]  # fmt: skip
    fields = {
        "eo:bands": names(*COLOURS),
        "raster:bands": [{"data_type": "uint8", "nodata": 0}] * 3,
    }
    items = [
        item(rgb, id=f"i{n}", time=t, properties={"gsd": n // 2}, **fields)
        for n, t in enumerate(times)
    ]
    cube = xchmv2.load(items, groupby=groupby)
    theirs = odc.stac.load(
        [pystac.Item.from_dict(i) for i in items], ["red"], groupby=groupby, chunks={},
        like=cube,
    )  # fmt: skip
    np.testing.assert_array_equal(cube.time, np.sort(theirs.time.values))


def test_groupby_function_gets_the_users_item(rgb):
    items = [pystac.Item.from_dict(item(rgb, id=n)) for n in "abc"]
    seen = []
    cube = xchmv2.load(items, groupby=lambda i, parsed, n: seen.append((i, parsed.id, n)) or n % 2)
    assert [i is original for (i, _, _), original in zip(seen, items, strict=True)] == [True] * 3
    assert list(cube.item_ids.values) == ["a;c", "b"]


def test_cube_survives_zarr_without_a_warning(rgb, tmp_path, tiny_checkpoint):
    items = [item(rgb, id=n, time=f"202{n}-07-01T10:00:00Z", properties={"platform": "p"})
             for n in "01"]  # fmt: skip
    cube = xchmv2.load(items, resolution=None)
    in_memory = cube.compute()
    for name, source in (("lazy", cube), ("memory", in_memory)):
        source.to_zarr(tmp_path / name, zarr_format=3, consolidated=False)
        back = xr.open_zarr(tmp_path / name, consolidated=False)
        xr.testing.assert_equal(back.set_coords("spatial_ref"), in_memory)
        assert list(back.item_ids.values) == ["0", "1"]
        assert (
            back.quality_flags.attrs["flag_meanings"] == cube.quality_flags.attrs["flag_meanings"]
        )
        assert back.rio.crs == in_memory.rio.crs
        height = back.chmv2.predict(tiny_checkpoint, **SMALL)
        np.testing.assert_array_equal(height.quality_flags, cube.quality_flags)


# --- cloud masks -----------------------------------------------------------------------------

MAXAR = [
    {"value": 0, "name": "nodata", "nodata": True},
    {"value": 1, "name": "clear", "description": "Clear of clouds or shadows"},
    {"value": 2, "name": "cloud"},
    {"value": 3, "name": "cloud_shadow"},
]


def masked(tmp_path, values, *, pixel=1.2, asset="cloud-mask-raster", shape=None, **fields):
    image = item(raster(tmp_path / "rgb.tif", noise()), **{"eo:bands": names(*COLOURS)})
    mask = item(raster(tmp_path / "mask.tif", values, pixel=pixel), asset=asset, **fields)
    with rasterio.open(tmp_path / "mask.tif") as file:
        mask["assets"][asset] |= {
            "proj:shape": list(file.shape), "proj:transform": list(file.transform)
        }  # fmt: skip
    image["assets"] |= mask["assets"]
    return image


def test_maxar_classes_become_valid(tmp_path, tiny_checkpoint):
    values = np.random.default_rng(3).integers(0, 4, (1, 32, 40)).astype("uint8")
    found = masked(tmp_path, values, **{"raster:bands": [{"classification:classes": MAXAR}]})
    with no_compute():
        cube = xchmv2.load(found, cloud_mask="cloud-mask-raster", resolution=None)
        height = cube.chmv2.predict(tiny_checkpoint, valid=cube.valid, **SMALL)
    clear = np.kron(values[0] == 1, np.ones((2, 2), bool))
    assert cube.valid.dtype == bool
    np.testing.assert_array_equal(cube.valid[0], clear)
    np.testing.assert_array_equal(height[0].notnull(), clear)
    known = masked(tmp_path, values)  # the same file, its classes told by its name alone
    again = xchmv2.load(known, cloud_mask="cloud-mask-raster", resolution=None)
    np.testing.assert_array_equal(again.valid, cube.valid)


@pytest.mark.parametrize(
    ("mask", "clear_values", "truth"),
    [
        ("udm.clear", None, lambda v: v[0] != 0),
        ("clear", None, lambda v: v[0] != 0),
        ("udm.2", 0, lambda v: v[1] == 0),
        ("cloud", (0, 2), lambda v: np.isin(v[1], (0, 2))),
        ("udm.2", lambda mask: (mask & 2) == 0, lambda v: (v[1] & 2) == 0),
    ],
)
def test_bands_of_a_usable_data_mask(tmp_path, mask, clear_values, truth):
    values = np.random.default_rng(3).integers(0, 4, (2, 32, 40)).astype("uint8")
    found = masked(tmp_path, values, asset="udm", **{"eo:bands": [{"name": "clear"},
                                                                 {"name": "cloud"}]})  # fmt: skip
    mask = {"udm.clear": "udm.1"}.get(mask, mask)
    cube = xchmv2.load(found, cloud_mask=mask, clear_values=clear_values, resolution=None)
    np.testing.assert_array_equal(cube.valid[0], np.kron(truth(values), np.ones((2, 2), bool)))
    box = GeoBox((4, 4), rasterio.Affine(0.6, 0, 499_998.8, 0, -0.6, 5_000_000), 32633)
    edge = xchmv2.load(found, cloud_mask=mask, clear_values=clear_values, geobox=box)
    assert not edge.valid[..., :2].any()  # no mask there


def test_masks_that_cannot_be_told(tmp_path):
    found = masked(tmp_path, np.zeros((1, 32, 40), "uint8"), asset="clouds")
    with pytest.raises(
        ImageryError, match=r"mean a clear view.*'clouds' of item images/one.*clear_values=0"
    ):
        xchmv2.load(found, cloud_mask="clouds")
    with pytest.raises(ImageryError, match="a band or asset 'scl' in every item"):
        xchmv2.load(found, cloud_mask="scl")
    with pytest.raises(ImageryError, match="clear_values to return booleans"):
        xchmv2.load(found, cloud_mask="clouds", clear_values=lambda mask: mask + 1)
    all_cloud = {"raster:bands": [{"classification:classes": MAXAR[2:]}]}
    found = masked(tmp_path, np.zeros((1, 32, 40), "uint8"), asset="clouds", **all_cloud)
    with pytest.raises(
        ImageryError, match=r"class for a clear view, found .*'2 cloud'.*images/one"
    ):
        xchmv2.load(found, cloud_mask="clouds")


@pytest.mark.parametrize(
    ("names_", "clear"),
    [
        (["no_data", "cloud free", "thick cloud", "cirrus"], {1}),
        (["fill", "not_cloud", "cloud shadow", "vegetation"], {1, 3}),
        (["noncloud", "haze", "clear_sky", "saturated"], {0, 2}),
    ],
)
def test_class_names(names_, clear):
    classes = tuple({"value": n, "name": name} for n, name in enumerate(names_))
    rule = resolve_clear("m", BandInfo((), None, None, None, classes), "uint8", None, None)
    assert set(rule.values) == clear
    assert rule.fill not in clear


# --- items -----------------------------------------------------------------------------------


class Search:
    """Behaves as a search of pystac-client does."""

    def __init__(self, items):
        self._items = items

    def items(self):
        yield from self._items

    def item_collection(self):
        return pystac.ItemCollection(self._items)


def test_items_of_every_kind(rgb, tmp_path):
    content = item(rgb)
    object_ = pystac.Item.from_dict(content)
    whole = pystac.ItemCollection([object_])
    whole.save_object(str(tmp_path / "collection.json"))
    (tmp_path / "list.json").write_text(json.dumps([content]))
    (tmp_path / "item.json").write_text(json.dumps(content))
    wanted = xchmv2.load(content).compute()
    for source in (
        object_, [object_, content], iter([object_]), whole, whole.to_dict(), Search([object_]),
        tmp_path / "collection.json", str(tmp_path / "list.json"), [tmp_path / "item.json"],
    ):  # fmt: skip
        xr.testing.assert_identical(xchmv2.load(source).compute(), wanted)


def test_items_without_a_collection_are_each_for_themselves(tmp_path):
    dtypes = {"a": "uint8", "b": "uint16"}
    items = [
        item(raster(tmp_path / f"{n}.tif", noise(dtype=dtype)), id=n, collection=None)
        for n, dtype in dtypes.items()
    ]
    for found in items:
        found["assets"]["image"]["eo:bands"] = names(*COLOURS)
    with pytest.raises(ImageryError, match="one data type, found uint8 in a, uint16 in b"):
        xchmv2.load(items)
    same = [items[0], copy.deepcopy(items[0])]
    same[1]["assets"]["image"]["href"] += "?signature"
    assert list(xchmv2.load(same).item_ids.values) == ["a"]


def test_relative_files_lie_beside_the_item(rgb, tmp_path):
    (tmp_path / "item.json").write_text(json.dumps(item(rgb, href="./rgb.tif")))
    cube = xchmv2.load(tmp_path / "item.json", resolution=None)
    np.testing.assert_array_equal(stacked(cube), noise())


def test_real_item_collection_is_read_whole(data):
    with pytest.raises(ImageryError, match=r"imagery over \(-65.+covers|covers.+imagery over \(-6"):
        xchmv2.load(data / "stac/naip-pc.json", bbox=(10, 10, 11, 11))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "at least one STAC item, found none in the list; widen the search"),
        (pystac.ItemCollection([]), "at least one STAC item"),
        (Search([]), "found none in the Search"),
        (None, "STAC items, found NoneType 'None'; pass items"),
        ([1], "STAC items, found int '1'"),
        ({"type": "Point"}, "a mapping of type 'Point'"),
        ({"type": "Feature", "assets": {}}, "properties as a mapping, found None in item None"),
        ("nowhere.json", "a file of STAC items that can be read, found .*nowhere.json"),
    ],
)
def test_what_is_no_item(source, message):
    with pytest.raises(CHMv2Error, match=message):
        xchmv2.load(source)


def test_broken_catalogues_and_timeless_items(rgb, tmp_path):
    broken = {"type": "Catalog", "id": "broken", "stac_version": "1.0.0", "description": "d",
              "links": [{"rel": "item", "href": "./gone.json"}]}  # fmt: skip
    (tmp_path / "catalog.json").write_text(json.dumps(broken))
    with pytest.raises(CHMv2Error, match="a catalogue whose items can be read, found 'broken'"):
        xchmv2.load(tmp_path / "catalog.json")
    span = item(rgb)
    span["properties"] |= {"datetime": None, "start_datetime": "2020-01-01T00:00:00Z",
                           "end_datetime": "2020-02-01T00:00:00Z"}  # fmt: skip
    assert str(xchmv2.load(span).time.values[0])[:10] == "2020-01-01"
    timeless = pystac.Item.from_dict(span)
    timeless.properties.clear()
    with pytest.raises(CHMv2Error, match="items with a datetime or start_datetime"):
        xchmv2.load(timeless)


def test_a_whole_api_is_refused():
    class Client(pystac.Catalog):
        def conforms_to(self, what):
            return what == "ITEM_SEARCH"

    with pytest.raises(CHMv2Error, match="the whole API 'pc'; search it"):
        xchmv2.load(Client("pc", "an API"))


def test_importing_the_package_does_not_import_stac():
    import subprocess
    import sys

    code = "import sys, xchmv2; print([m for m in ('pystac', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_identical_calls_have_identical_keys(rgb):
    one, two = (xchmv2.load(item(rgb)) for _ in range(2))
    assert one.__dask_keys__() == two.__dask_keys__()
    with dask.config.set(scheduler="processes"):
        np.testing.assert_array_equal(one.red.compute(), two.red.compute(scheduler="threads"))
