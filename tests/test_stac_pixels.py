"""Pixels of a cube from STAC: each file is checked when read, and one rule says what is empty."""

import logging
import pickle
import re
import tracemalloc

import dask
import numpy as np
import pystac
import pytest
import rasterio
import rioxarray
import xarray as xr
from catalogue import NAIP, item, names, noise, published_naip, raster
from conftest import no_compute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

import xchmv2
from xchmv2.errors import CHMv2Error, ImageryError

COLOURS = ("red", "green", "blue")
RGB = {"eo:bands": names(*COLOURS)}
TOLD = RGB | {"raster:bands": [{"data_type": "uint8", "nodata": 0}] * 3}
SMALL = dict(tile=64, overlap=16)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


def stacked(cube, time=0):
    return np.stack([cube[name].isel(time=time).values for name in COLOURS])


def day(n):
    return f"2020-07-0{n}T10:00:00Z"


def items_of(*dicts):
    return [pystac.Item.from_dict(found) for found in dicts]


def pasted(message, items):
    """Run each call of load that a message advises."""
    names = {"xchmv2": xchmv2, "items": items}
    calls = re.findall(
        r"xchmv2\.load\(.*?\)(?: \* [-\d.e]+(?: \+ [-\d.e]+)?)?(?= and | reads |$)", message
    )
    assert calls
    return [eval(call.replace("(...", "(items"), names) for call in calls]


# --- a sample never speaks for the whole -----------------------------------------------------


def test_another_data_type_is_seen_when_read_and_loads_apart(tmp_path):
    values = noise()
    items = items_of(
        item(raster(tmp_path / "8.tif", values), id="a", time=day(1), **RGB),
        item(raster(tmp_path / "16.tif", values.astype("u2") * 8), id="b", time=day(2), **RGB),
    )
    with no_compute():
        cube = xchmv2.load(items, resolution=None)
    np.testing.assert_array_equal(stacked(cube.isel(time=[0])), values)
    with pytest.raises(
        ImageryError, match=r"uint8 .as in other files.* images/b, found uint16 in .*16\.tif"
    ) as caught:
        cube.red[1].compute()
    (apart,) = pasted(str(caught.value), items)
    np.testing.assert_array_equal(stacked(apart), stacked(apart.astype("u2")))
    assert apart.red.dtype == "uint16"
    assert apart.red.max() > 255
    with pytest.raises(ImageryError, match="one data type, found uint8 in images/a, uint16 in"):
        xchmv2.load(items, resolution=None, on_error="nodata")
    both = xchmv2.load(items, resolution=None, dtype="uint16")
    np.testing.assert_array_equal(stacked(both, 1), values.astype("u2") * 8)
    with pytest.raises(ImageryError, match=r"fit into uint8, found .* in images/b.*dtype='uint16'"):
        xchmv2.load(items, resolution=None, dtype="uint8").compute()


def test_metadata_that_contradict_the_file(tmp_path):
    values = noise(dtype="uint16", high=3000)
    (found,) = items = items_of(item(raster(tmp_path / "a.tif", values), **TOLD))
    with pytest.raises(ImageryError, match=r"uint8 .as the item says.*found uint16") as caught:
        xchmv2.load(items, resolution=None).compute()
    (believed,) = pasted(
        str(caught.value).replace("items, on", "items, resolution=None, on"), items
    )
    assert believed.red.dtype == "uint16"
    found.properties["proj:transform"][2] += 3.0
    found.assets["image"].extra_fields["raster:bands"][0]["data_type"] = "uint16"
    for band in found.assets["image"].extra_fields["raster:bands"]:
        band["data_type"] = "uint16"
    with pytest.raises(
        ImageryError,
        match=r"64 x 80 px at 500003, 5000000 in EPSG:32633.*found 64 x 80 px at 500000",
    ) as caught:
        xchmv2.load(items, resolution=None).compute()
    (believed,) = pasted(str(caught.value), items)
    assert float(believed.x[0]) < 500_000.6
    np.testing.assert_array_equal(
        stacked(xchmv2.load(items, resolution=None, on_error="nodata")), values
    )
    found.properties["proj:transform"][2] -= 3.0
    found.properties["proj:shape"] = [32, 40]
    with pytest.raises(ImageryError, match="32 x 40 px"):
        xchmv2.load(items).compute()


def test_another_crs_or_fewer_bands(tmp_path):
    raster(tmp_path / "a.tif", noise())
    found = item(tmp_path / "a.tif", **TOLD)
    cube = xchmv2.load(found, resolution=None)
    raster(tmp_path / "a.tif", noise(), crs=32634)
    with pytest.raises(ImageryError, match=r"in EPSG:32633 .*found .* in EPSG:32634"):
        cube.compute()
    raster(tmp_path / "a.tif", noise(2))
    with pytest.raises(ImageryError, match=r"at least 3 bands .*found 2 bands in"):
        cube.compute()
    with pytest.raises(ImageryError, match="band 3 for blue"):
        xchmv2.load(found, on_error="nodata")


def coloured(path, values, colours, **options):
    raster(path, values, **options)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp[colour] for colour in colours]
    return path


@pytest.mark.parametrize("fields", [RGB, TOLD])
def test_colours_that_the_file_names_otherwise(tmp_path, fields):
    values = noise()
    path = coloured(tmp_path / "bgr.tif", values, COLOURS[::-1])
    items = items_of(item(path, **fields))
    with pytest.raises(
        ImageryError, match=r"bands of red, green, blue .*found blue, green, red in"
    ) as caught:
        xchmv2.load(items).compute()
    (call,) = re.findall(r"bands=(\(.*?\))", str(caught.value))
    cube = xchmv2.load(items, resolution=None, bands=eval(call))
    np.testing.assert_array_equal(stacked(cube), values[::-1])
    told = xchmv2.load(items, resolution=None, bands=(1, 2, 3))  # the user knows better
    np.testing.assert_array_equal(stacked(told), values)


def scaled(offset, scale=1e-4):
    band = {"data_type": "uint16", "nodata": 0, "scale": scale, "offset": offset}
    return RGB | {"raster:bands": [band] * 3}


def test_scales_that_differ_are_refused_and_load_apart(tmp_path):
    values = noise(dtype="uint16", high=3000)
    values[:, :4] = 0
    later = np.where(values > 0, values + 1000, 0).astype("uint16")
    items = items_of(
        item(raster(tmp_path / "1.tif", values), id="a", time=day(1), **scaled(0)),
        item(raster(tmp_path / "2.tif", later), id="b", time=day(2), **scaled(-0.1)),
    )
    with pytest.raises(ImageryError, match=r"offset 0 in a; scale 0.0001 and offset -0.1 in b"
                       ) as caught:  # fmt: skip
        xchmv2.load(items)
    one, other = pasted(str(caught.value), items)
    joined = xr.concat([one, other], "time")
    np.testing.assert_allclose(joined.red[0], joined.red[1], atol=1e-6)
    assert 0 < float(joined.red.max()) < 0.31
    assert joined.red.isnull().any()
    same = xchmv2.load(items[1:], resolution=None)  # of one scale, numbers stay as stored
    np.testing.assert_array_equal(stacked(same), later)


def test_scales_in_files(tmp_path):
    values = noise(dtype="uint16", high=3000)
    for n, offset in ((1, 0.0), (2, -0.1)):
        with rasterio.open(raster(tmp_path / f"{n}.tif", values), "r+") as file:
            file.scales, file.offsets = (1e-4,) * 3, (offset,) * 3
    items = items_of(*(item(tmp_path / f"{n}.tif", id=f"i{n}", time=day(n), **RGB) for n in (1, 2)))
    cube = xchmv2.load(items, resolution=None)
    np.testing.assert_array_equal(stacked(cube), values)
    with pytest.raises(
        ImageryError, match=r"offset 0 .as in other files.*found scale 0.0001 and offset -0.1"
    ) as caught:
        cube.isel(time=1).compute()
    (apart,) = pasted(str(caught.value), items)
    assert -0.1 < float(apart.red.min()) < 0.21
    with pytest.raises(ImageryError, match="one scale and offset"):
        xchmv2.load(items, on_error="nodata")
    contradicting = item(tmp_path / "2.tif", **scaled(0))
    with pytest.raises(ImageryError, match=r"as the item says.*extra_fields.pop") as caught:
        xchmv2.load(contradicting, resolution=None).compute()
    (believed,) = items_of(contradicting)
    exec(re.search(r"item\.assets.*", str(caught.value))[0], {"item": believed})
    np.testing.assert_array_equal(stacked(xchmv2.load(believed, resolution=None)), values)
    mixed = scaled(0) | {"raster:bands": [{**scaled(0)["raster:bands"][0], "scale": s}
                                          for s in (1e-4, 1e-4, 2e-4)]}  # fmt: skip
    with pytest.warns(UserWarning, match=r"blue=cube.blue \* 0.0002\)") as told:
        cube = xchmv2.load(item(raster(tmp_path / "3.tif", values), **mixed), resolution=None)
    (told,) = [warning for warning in told if "scale them" in str(warning.message)]
    assert told.filename == __file__  # at the user's line
    advised = eval(str(told.message).split("scale them: ")[1], {"cube": cube})
    np.testing.assert_allclose(advised.blue[0], values[2] * 2e-4, rtol=1e-6)
    words = "offset as a number, found 'low' in band 1 of asset 'image' of item images/one"
    with pytest.raises(ImageryError, match=words):
        xchmv2.load(item(tmp_path / "3.tif", **scaled("low")))


# --- one rule of nodata ----------------------------------------------------------------------


def test_the_nodata_value_of_each_file_holds(tmp_path, tiny_checkpoint):
    other = noise(seed=3)
    other[:, :30] = 255
    items = [
        item(raster(tmp_path / "a.tif", noise()), id="a", time=day(1), **RGB),
        item(raster(tmp_path / "b.tif", other, nodata=255), id="b", time=day(2), **RGB),
    ]
    cube = xchmv2.load(items, resolution=None)
    assert cube.red.attrs["nodata"] == 0
    assert (stacked(cube, 1)[:, :30] == 0).all()
    height = cube.chmv2.predict(tiny_checkpoint, **SMALL)
    assert height[1, :30].isnull().all()
    assert height[1, 30:].notnull().all()
    said = [{"data_type": "uint8", "nodata": 7}] * 3  # the file says 255
    wrong = xchmv2.load(item(tmp_path / "b.tif", **RGB, **{"raster:bands": said}), resolution=None)
    assert wrong.red.attrs["nodata"] == 7
    assert (stacked(wrong)[:, :30] == 7).all()


def test_valid_pixels_of_the_cubes_nodata_value_stay_valid(tmp_path):
    white, black = noise(), noise()
    white[:, 0, :9] = 0  # valid, because its file says 255
    black[:, 0, :9] = 255
    items = [
        item(raster(tmp_path / "w.tif", white, nodata=255), id="w", time=day(1), **RGB),
        item(raster(tmp_path / "b.tif", black, nodata=0), id="b", time=day(2), **RGB),
    ]
    cube = xchmv2.load(items, resolution=None, on_error="nodata")
    empty = cube.red.attrs["nodata"]
    for time, values in enumerate((white, black)):
        assert not (stacked(cube, time) == empty).all(axis=0).any()
        assert np.abs(stacked(cube, time).astype(int) - values).max() <= 1


def test_impossible_nodata_is_ignored_aloud(tmp_path):
    fields = RGB | {"raster:bands": [{"data_type": "uint8", "nodata": -9999}] * 3}
    found = item(raster(tmp_path / "a.tif", noise()), **fields)
    with pytest.warns(UserWarning, match="-9999 is ignored: uint8 cannot hold it"):
        cube = xchmv2.load(found, resolution=None)
    assert cube.red.attrs["nodata"] == 0
    np.testing.assert_array_equal(stacked(cube), noise())


@pytest.mark.parametrize("declared", ["nan", float("nan"), None])
@pytest.mark.parametrize("stored", [np.nan, -9999.0, None])
@pytest.mark.parametrize("crs", [32633, 32634])
def test_nan_nodata_loads(tmp_path, declared, stored, crs):
    values = noise(dtype="float32") / 255
    values[1, :20, :20] = -9999.0 if stored == -9999 else np.nan
    fields = {"data_type": "float32"} | ({} if declared is None else {"nodata": declared})
    path = raster(tmp_path / "a.tif", values, nodata=stored)
    cube = xchmv2.load(item(path, **RGB, **{"raster:bands": [fields] * 3}), crs=crs)
    assert cube.red.dtype == "float32"
    assert 0 <= float(cube.red.min()) <= float(cube.red.max()) <= 1
    corner = cube.isel(x=slice(4, 14), y=slice(4, 14))
    assert corner.isnull().all().to_dataarray().all()
    assert cube.red.notnull().sum() > 4000


def test_a_pixel_comes_whole_from_one_image(tmp_path):
    top = noise(seed=1)
    top[2, 20:50, 20:50] = 0  # a shadow, and black blue is no nodata
    top[:, :10] = 0
    items = [
        item(raster(tmp_path / "t.tif", top), id="t", **RGB),
        item(raster(tmp_path / "u.tif", np.full((3, 64, 80), 220, "uint8")), id="u",
             time="2020-07-01T10:00:09Z", **RGB),
    ]  # fmt: skip
    for order in (items, items[::-1]):
        cube = xchmv2.load(order, resolution=None)
        np.testing.assert_array_equal(stacked(cube)[:, 10:], top[:, 10:])
        assert (stacked(cube)[:, :10] == 220).all()


def test_the_mosaic_does_not_depend_on_the_order_of_items(tmp_path):
    items = [
        item(raster(tmp_path / f"{n}.tif", np.full((3, 8, 8), 10 * n, "uint8")),
             id=id, collection=collection, **RGB)
        for n, (id, collection) in enumerate([("s", "b"), ("s", "a"), ("q", "b")], start=1)
    ]  # fmt: skip
    items.append(item(tmp_path / "1.tif", id="s", collection="a", **RGB))  # another file
    wanted = xchmv2.load(items, resolution=None)
    assert int(wanted.red.max()) == 10
    for order in (items[::-1], items[2:] + items[:2]):
        again = xchmv2.load(order, resolution=None)
        assert again.__dask_keys__() == wanted.__dask_keys__()
        xr.testing.assert_identical(again.compute(), wanted.compute())


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("crs", [32633, 32634])
@pytest.mark.parametrize("nodata", [0, 255])
def test_one_band_at_the_nodata_value_is_a_colour(tmp_path, separate, crs, nodata):
    """Half of the pixels have blue at the nodata value: it keeps its share of the mean."""
    values = np.full((3, 192, 240), 100, "uint8")
    values[2] = np.where(np.indices((192, 240)).sum(axis=0) % 2, nodata, 60)
    values[:, :60] = nodata
    found = item(raster(tmp_path / "a.tif", values, pixel=0.2, nodata=nodata), **RGB)
    if separate:
        for n, colour in enumerate(COLOURS):
            path = raster(tmp_path / f"{colour}.tif", values[n : n + 1], pixel=0.2, nodata=nodata)
            found["assets"] |= item(path, asset=colour, **{"eo:bands": names(colour)})["assets"]
        del found["assets"]["image"]
    cube = xchmv2.load(found, crs=crs)
    inner = stacked(cube)[:, 30:50, 30:50].astype(float)
    assert abs(inner[2].mean() - (nodata + 60) / 2) < 1.5
    assert (inner[:2] == 100).all()
    seen = ~(stacked(cube) == nodata).all(axis=0)
    assert (stacked(cube)[0][seen] == 100).all()  # no nodata mixed in
    assert abs(seen.sum() - 44 * 80) < 200


@given(
    pixel=st.sampled_from([0.3, 0.2, 0.4, 0.55, 0.6, 0.75, 1.1]),
    shift=st.floats(0, 1),
    holes=st.booleans(),
    dtype=st.sampled_from(["uint8", "float32"]),
)
@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_resampled_pixels_are_those_of_predict(tmp_path, pixel, shift, holes, dtype):
    values = noise(shape=(70, 90), dtype=dtype)
    if holes:
        at = np.random.default_rng(1).random((70, 90)) < 0.4
        values[:, at] = 0
        values[2, :20] = 0
        if dtype == "float32":
            values[:, at] = np.nan
    path = raster(tmp_path / "a.tif", values, pixel=pixel, nodata=None if dtype == "float32" else 0,
                  origin=(500_000 + shift, 5_000_000 - shift))  # fmt: skip
    cube = xchmv2.load(item(path, **RGB), chunks=64)
    found, valid = of_predict(path, cube)
    seen = np.isfinite(stacked(cube).astype(float)).all(axis=0)
    if dtype == "uint8":
        seen &= (stacked(cube) != 0).any(axis=0)
    assert (seen == valid).mean() > 0.999
    both = seen & valid
    assert np.abs(stacked(cube).astype(float) - found)[:, both].max() <= 0.51


def of_predict(path, cube):
    """What predict(resolution=0.6) would show the model, on the grid of a cube."""
    from xchmv2.imagery import WindowReader, resolve_target
    from xchmv2.raster import ValidPixels, find_grid, resolve_nodata

    image = rioxarray.open_rasterio(path)
    target, rows, cols = resolve_target(find_grid(image), 0.6)
    np.testing.assert_allclose(target.geobox.affine[:6], cube.odc.geobox.affine[:6], atol=1e-6)
    bands = [image.isel(band=n) for n in range(3)]
    read = WindowReader(ValidPixels(resolve_nodata(bands)), rows, cols)
    return read(image.values, None, ((0, target.shape[0]), (0, target.shape[1])))


@pytest.mark.parametrize("kind", ["internal", "sidecar", "alpha"])
@pytest.mark.parametrize("beside", [0.0, 0.2])
@pytest.mark.parametrize("crs", [32633, 32634])
def test_masks_inside_files_count(tmp_path, kind, beside, crs):
    values = noise()
    mask = np.full((64, 80), 255, "uint8")
    mask[:, :40] = 0
    path, transform = tmp_path / "m.tif", from_origin(499_999.8 + beside, 5_000_000.4, 0.6, 0.6)
    bands = np.concatenate([values, mask[None]]) if kind == "alpha" else values
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal"),
        rasterio.open(path, "w", driver="GTiff", width=80, height=64, count=len(bands), crs=32633,
                      dtype="uint8", transform=transform) as file,
    ):  # fmt: skip
        file.write(bands)
        if kind != "alpha":
            file.write_mask(mask)
    assert (tmp_path / "m.tif.msk").exists() == (kind == "sidecar")
    under = item(raster(tmp_path / "u.tif", np.full((3, 64, 80), 7, "uint8")), id="u",
                 time="2020-07-01T10:00:09Z", **RGB)  # fmt: skip
    empty = (stacked(xchmv2.load(item(path, **RGB), crs=crs)) == 0).all(axis=0)
    outside = empty.size - 64 * 80
    assert abs(empty.sum() - outside - 64 * 40) < 200
    both = stacked(xchmv2.load([item(path, **RGB), under], crs=crs))
    assert abs((both == 7).all(axis=0).sum() - 64 * 40) < 300


def test_near_infrared_that_gdal_calls_alpha_is_no_mask(data):
    with rasterio.open(data / NAIP) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    values = rasterio.open(data / NAIP).read([1, 2, 3])
    cube = xchmv2.load(published_naip(data, str(data / NAIP)), resolution=None)
    np.testing.assert_array_equal(stacked(cube), values)


def test_a_mask_in_the_file_keeps_black_pixels(tmp_path):
    values = noise()
    values[:, 5, 5] = 0
    raster(tmp_path / "m.tif", values)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(tmp_path / "m.tif", "r+") as file,
    ):
        file.write_mask(np.full((64, 80), 255, "uint8"))
    cube = stacked(xchmv2.load(item(tmp_path / "m.tif", **RGB), resolution=None))
    assert (cube[:, 5, 5] == (0, 0, 1)).all()
    cube[:, 5, 5] = 0
    np.testing.assert_array_equal(cube, values)


def test_the_mask_comes_from_the_image_of_the_pixel(tmp_path):
    items = []
    for n, (id, cloudy) in enumerate([("t", 1), ("u", 0)]):
        values = noise(seed=n)
        if id == "t":
            values[:, :32] = 0
        found = item(raster(tmp_path / f"{id}.tif", values), id=id, time=f"2020-07-01T10:00:0{n}Z",
                     **RGB)  # fmt: skip
        mask = raster(tmp_path / f"{id}_mask.tif", np.full((1, 64, 80), cloudy, "uint8"))
        found["assets"] |= item(mask, asset="cloud")["assets"]
        items.append(found)
    cube = xchmv2.load(items, resolution=None, cloud_mask="cloud", clear_values=0)
    assert cube.valid[0, :32].all()
    assert not cube.valid[0, 32:].any()


def test_listed_clear_values_are_clear_whatever_the_file_calls_them(tmp_path):
    found = item(raster(tmp_path / "a.tif", noise()), **RGB)
    mask = np.zeros((1, 32, 80), "uint8")
    mask[:, :8] = 1
    path = raster(tmp_path / "m.tif", mask, nodata=0)
    told = item(path, asset="cloud")
    told["assets"]["cloud"] |= {k: told["properties"][k] for k in ("proj:shape", "proj:transform")}
    found["assets"] |= told["assets"]
    cube = xchmv2.load(found, resolution=None, cloud_mask="cloud", clear_values=0)
    assert not cube.valid[0, :8].any()
    assert cube.valid[0, 8:32].all()
    assert not cube.valid[0, 32:].any()  # no mask there


def test_masks_of_different_classes_are_refused(tmp_path):
    classes = [{"value": 0, "name": "clear"}, {"value": 1, "name": "cloud"}]
    items = []
    for n, told in enumerate((classes, [c | {"value": 1 - c["value"]} for c in classes])):
        found = item(raster(tmp_path / f"{n}.tif", noise()), id=str(n), **RGB)
        path = raster(tmp_path / f"m{n}.tif", noise(1, high=2, low=0))
        fields = {"raster:bands": [{"classification:classes": told}]}
        found["assets"] |= item(path, asset="cloud", **fields)["assets"]
        items.append(found)
    with pytest.raises(
        ImageryError, match=r"one list .* mask 'cloud'.*clear.* in item images/0 and .*/1;"
    ):
        xchmv2.load(items, cloud_mask="cloud")


# --- chunks, overviews, files ----------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"resolution": None}, {}, {"crs": 32634}, {"resolution": 1.4, "crs": 32634},
    {"resampling": "cubic"}, {"crs": 32634, "resampling": "nearest"},
])  # fmt: skip
def test_results_do_not_depend_on_chunks(tmp_path, options):
    values = noise(shape=(700, 900))
    values[:, :200, :300] = 0
    pixel = 0.6 if options.get("resolution", 1) is None else 0.45
    items = [
        item(raster(tmp_path / "a.tif", values, pixel=pixel, nodata=0), id="a", **RGB),
        item(raster(tmp_path / "b.tif", noise(seed=2), pixel=pixel), id="b", **RGB),
    ]  # fmt: skip
    whole = xchmv2.load(items, **options).compute()
    for chunks in ({"y": 97, "x": 130}, {"y": -1, "x": 333, "time": 2}):
        xr.testing.assert_equal(xchmv2.load(items, chunks=chunks, **options).compute(), whole)


def test_warped_pixels_lie_where_they_should(tmp_path):
    """A plane of coordinates stays one in the neighbouring zone."""
    from pyproj import Transformer

    rows, cols = np.indices((300, 400)).astype("float32")
    values = np.stack([500_000 + 0.6 * (cols + 0.5) - 500_000, rows * 0.6 + 0.3, cols * 0])
    cube = xchmv2.load(item(raster(tmp_path / "a.tif", values), **RGB), crs=32634).compute()
    x, y = np.meshgrid(cube.x, cube.y)
    east, north = Transformer.from_crs(32634, 32633, always_xy=True).transform(x, y)
    seen = cube.red[0].notnull().values
    seen &= (east > 500_001) & (east < 500_239) & (north < 4_999_999) & (north > 4_999_821)
    assert np.abs(cube.red[0].values - (east - 500_000))[seen].max() < 0.02
    assert np.abs(cube.green[0].values - (5_000_000 - north))[seen].max() < 0.02


def test_one_file_is_opened_once_for_all_bands(tmp_path, monkeypatch):
    opened = []
    original = rasterio.open
    monkeypatch.setattr(rasterio, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    found = item(raster(tmp_path / "a.tif", noise()), **TOLD)
    opened.clear()
    with dask.config.set(scheduler="sync"):
        xchmv2.load(found, resolution=None).compute()
    assert len(opened) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_overviews_are_read_with_the_mask_of_the_file(tmp_path, masked):
    path = raster(tmp_path / "a.tif", np.full((3, 256, 256), 100, "uint8"), pixel=0.15)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], rasterio.enums.Resampling.average)
        if masked:
            mask = np.full((256, 256), 255, "uint8")
            mask[:128] = 0
            file.write_mask(mask)
    with rasterio.open(path, "r+", overview_level=1) as file:
        file.write(np.full((3, 64, 64), 50, "uint8"))
    found = item(path, **RGB)
    inner = np.s_[:, 40:60, 10:50]
    read = stacked(xchmv2.load(found))
    assert (read[inner] == 50).all()
    assert (read[:, :30] == (0 if masked else 50)).all()
    assert (stacked(xchmv2.load(found, use_overviews=False))[inner] == 100).all()


def test_bands_on_different_grids_are_brought_together(tmp_path):
    fine = noise(2, shape=(64, 80))
    coarse = noise(1, shape=(32, 40), seed=1)
    found = item(
        raster(tmp_path / "rg.tif", fine), asset="rg", **{"eo:bands": names("red", "green")}
    )
    blue = item(raster(tmp_path / "b.tif", coarse, pixel=1.2), asset="b",
                **{"eo:bands": names("blue")})  # fmt: skip
    grid = {k: blue["properties"][k] for k in ("proj:shape", "proj:transform")}
    blue["assets"]["b"] |= grid
    found["assets"] |= blue["assets"]
    box = GeoBox((64, 80), rasterio.Affine(0.6, 0, 500_000, 0, -0.6, 5_000_000), 32633)
    cube = stacked(xchmv2.load(found, geobox=box))
    np.testing.assert_array_equal(cube[:2], fine)
    np.testing.assert_array_equal(cube[2], np.kron(coarse[0], np.ones((2, 2), "uint8")))


def test_a_truncated_file_is_named_with_its_window(tmp_path):
    path = raster(tmp_path / "a.tif", noise(shape=(640, 800)))
    found = item(path, **TOLD)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    cube = xchmv2.load(found, resolution=None)
    with pytest.raises(ImageryError, match=r"found .*a\.tif \(rows 0 to 640, columns 0 to 800\): "
                       ) as caught:  # fmt: skip
        cube.compute()
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_left_out_files_are_logged(tmp_path, caplog):
    found = item(raster(tmp_path / "a.tif", noise()), **TOLD)
    cube = xchmv2.load(found, fail_on_error=False)
    (tmp_path / "a.tif").unlink()
    with caplog.at_level(logging.WARNING, "xchmv2.stac.mosaics"):
        assert (cube.red == 0).all()
    assert "a.tif" in caplog.text


def sparse(path, rows):
    """A GeoTIFF of three bands whose pixels were never written: a header alone."""
    with rasterio.open(path, "w", driver="GTiff", width=64, height=rows, count=3, dtype="uint8",
                       crs=32633, transform=from_origin(500_000, 9_000_000, 0.6, 0.6),
                       tiled=True, blockxsize=64, blockysize=2**20, sparse_ok=True,
                       BIGTIFF="YES"):  # fmt: skip
        pass
    return path


def test_endless_files_open_lazily_or_with_a_sentence(tmp_path):
    path = sparse(tmp_path / "endless.tif", 2**27)
    box = GeoBox((600, 64), rasterio.Affine(0.6, 0, 500_000, 0, -0.6, 8_000_000), 32633)
    found = item(path, **RGB)
    tracemalloc.start()
    with pytest.raises(
        ImageryError, match=r"134,217,728 x 64 px in 32,768 chunks; load a part of it.*bbox="
    ):
        xchmv2.load(found, resolution=None, crs=32633)
    cube = xchmv2.load(found, geobox=box)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert (cube.red[0, :2, :2] == 0).all()


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 10}, r"resolution=10; xchmv2.load\(..., resolution=0.6\)$"),
        ({"crs": 4326}, r"geographic CRS 4326; xchmv2.load\(..., crs='utm'\)$"),
        ({"driver": "rio"}, r"keep every pixel whole.*found \['driver'\]"),
        ({"fuse_func": "x", "preserve_original_order": True}, r"'fuse_func', 'preserve_original"),
        ({"dtype": "many"}, "dtype as one data type.*found dtype='many'"),
        ({"dtype": "complex64"}, "dtype as one data type"),
        ({"dtype": {"red": "uint8"}}, "dtype as one data type"),
        ({"nodata": "none"}, "nodata as a number, found nodata='none'"),
        ({"chunks": {"y": "wide"}}, r"chunk sizes of a cube of \(1, .*chunks={'y': 2048"),
        ({"chunks": {"y": (1, 2)}}, "chunk sizes of a cube of"),
        ({"nodata": -9999}, "a number that uint8 can hold, found nodata=-9999"),
        ({"nodata": -9999, "dtype": "uint8"}, "a number that uint8 can hold, found nodata=-9999"),
        ({"resampling": "best"}, "resampling as one of .*found resampling='best'"),
        ({"resampling": {"red": "cubic", "*": "nearest"}}, "for all colours"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(tmp_path, options, message):
    found = item(raster(tmp_path / "a.tif", noise()), **RGB)
    with pytest.raises(CHMv2Error, match=message) as caught:
        xchmv2.load(found, **options)
    advised = re.search(r"xchmv2\.load\(\.\.\., [^)]*\)", str(caught.value))
    if advised:
        cube = eval(advised[0].replace("...", "found"), {"xchmv2": xchmv2, "found": found})
        assert (cube.red != 0).any()


def test_floats_of_integers_are_nan_where_empty(tmp_path):
    values = noise()
    values[:, :9] = 0
    found = item(raster(tmp_path / "a.tif", values), **RGB)
    cube = xchmv2.load(found, resolution=None, dtype="float32")
    assert cube.red[0, :9].isnull().all()
    np.testing.assert_array_equal(stacked(cube)[:, 9:], values[:, 9:])
    assert "nodata" not in cube.red.attrs
