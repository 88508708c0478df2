"""Stores and files of heights, their change and masks, read by other people's software."""

import ctypes
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401  (registers .rio)
import xarray as xr
import zarr
from conftest import cube

import xchmv2
from xchmv2.change import difference, label_events, loss
from xchmv2.errors import StoreError
from xchmv2.store.geotiff import write_cog

# Private imports: a GeoTIFF is written by the function behind the accessor.

#: By encoding: data type, number that means "missing", metres per unit, largest error [m].
STORED = {
    "float32": ("float32", np.nan, 1, 0),
    "rounded": ("float32", np.nan, 1, 1 / 16),
    "int16_cm": ("int16", -(2**15), 0.01, 0.005),
    "uint8_half_m": ("uint8", 255, 0.5, 0.25),
}
SHAPE = (2, 70, 90)
LAYOUTS = [("blosc", False), ("blosc", True), ("gzip", False), ("gzip", True)]


@pytest.fixture(scope="module", params=STORED)
def encoding(request):
    return request.param


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=["blosc", "blosc-shards", "gzip", "gzip-shards"]
)
def layout(request):
    return request.param


def heights():
    values = np.random.default_rng(0).uniform(0, 60, SHAPE).astype("f4")
    values[0, 20:40, 5:50] = np.nan
    height = cube(SHAPE[1:], times=2).red.astype("f4").copy(data=values)
    height = height.rename("canopy_height").assign_attrs(units="m")
    return height.assign_coords(platform=("time", ["A", "B"])).chunk(time=1, y=32, x=40)


@pytest.fixture(scope="module")
def store(encoding, layout, tmp_path_factory):
    """Path of a store, and the numbers that lie in it."""
    compressor, shards = layout
    path = tmp_path_factory.mktemp("readers") / "h.zarr"
    options = {"compressor": compressor, "shards": shards}
    heights().chmv2.to_zarr(path, encoding=encoding, progress=False, **options)
    dtype, missing, unit, _ = STORED[encoding]
    values = heights().values.astype("f8")
    if encoding == "rounded":
        values = np.round(values * 8) / 8
    stored = np.where(np.isnan(values), missing, np.rint(values / unit) if unit < 1 else values)
    return path, stored.astype(dtype)


def test_zarr_python(store):
    path, stored = store
    array = zarr.open_array(path, path="canopy_height", mode="r")
    np.testing.assert_array_equal(array[:], stored)
    np.testing.assert_equal(array.fill_value, stored[0, 20, 5])
    assert array.metadata.dimension_names == ("time", "y", "x")


def test_plain_xarray(store, encoding):
    found = xr.open_zarr(store[0]).canopy_height
    assert abs(found - heights()).max() <= STORED[encoding][3] + 1e-5
    np.testing.assert_array_equal(found.isnull(), heights().isnull())
    assert found.rio.crs.to_epsg() == found.odc.crs.to_epsg() == 32633


def test_tensorstore(store):
    tensorstore = pytest.importorskip("tensorstore")
    path, stored = store
    place = {"driver": "file", "path": f"{path}/canopy_height/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}).result()
    assert array.domain.labels == ("time", "y", "x")
    np.testing.assert_equal(array.fill_value, stored[0, 20, 5])
    np.testing.assert_array_equal(array.read().result(), stored)


ZARRITA = """
import * as zarr from "zarrita"; import { FileSystemStore } from "@zarrita/storage";
const root = await zarr.open(new FileSystemStore(process.argv[1]), { kind: "group" });
const array = await zarr.open(root.resolve("canopy_height"), { kind: "array" });
const x = await zarr.get(await zarr.open(root.resolve("x"), { kind: "array" }));
console.log(JSON.stringify({
  values: Array.from((await zarr.get(array)).data), missing: array.fillValue,
  dims: array.dimensionNames, code: root.attrs["proj:code"], x: Array.from(x.data) }));
"""


def node(code, *arguments):
    """Run a module under node in the root of the checkout, where npm may have put zarrita."""
    command = ["node", "--input-type=module", "-e", code, *map(str, arguments)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)


@cache
def has_zarrita():
    return bool(shutil.which("node")) and node('import "zarrita"').returncode == 0


def test_zarrita(store):
    if not has_zarrita():
        pytest.skip("install node, and in the checkout: npm install --no-save zarrita")
    path, stored = store
    done = node(ZARRITA, path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    values = np.array(found["values"], "f8").reshape(SHAPE)  # JSON writes NaN as null
    np.testing.assert_array_equal(values, stored)
    np.testing.assert_equal(np.array(found["missing"], "f8"), stored[0, 20, 5].astype("f8"))
    assert (found["dims"], found["code"]) == (["time", "y", "x"], "EPSG:32633")
    np.testing.assert_array_equal(found["x"], heights().x)


GDAL = tuple(map(int, rasterio.__gdal_version__.split(".")[:2]))


@pytest.mark.skipif(GDAL < (3, 11), reason="this GDAL does not know the codecs of Zarr v3")
def test_gdal_of_rasterio(store, layout):
    path, stored = store
    if layout[1] and GDAL < (3, 13):
        pytest.skip("this GDAL does not read shards")
    with rasterio.open(f'ZARR:"{path}":/canopy_height:0') as found:
        np.testing.assert_array_equal(found.read(1), stored[0])
        np.testing.assert_equal(found.nodata, stored[0, 20, 5].astype("f8"))
        assert found.crs.to_epsg() == 32633
        assert found.transform.almost_equals(heights().odc.geobox.transform, 1e-6)


def test_gdal_of_pyogrio(store, layout):
    """A build that has neither blosc nor zstd; it opens rasters by its interface in C alone."""
    pyogrio = pytest.importorskip("pyogrio")
    folder = Path(pyogrio.__file__).parents[1] / "pyogrio.libs"
    library = next(iter(folder.glob("libgdal*")), None)
    if library is None or not ((3, 11) <= pyogrio.__gdal_version__ < (3, 13)):
        pytest.skip("no GDAL 3.11 or 3.12 in the package pyogrio")
    path, stored = store
    if layout != ("gzip", False):
        pytest.skip("this GDAL has no blosc and does not read shards")
    gdal = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_double
    gdal.GDALOpenEx.restype = gdal.GDALGetRasterBand.restype = pointer
    gdal.GDALGetRasterNoDataValue.restype = gdal.GDALGetRasterScale.restype = number
    gdal.GDALGetProjectionRef.restype = ctypes.c_char_p
    gdal.GDALAllRegister()
    name = f'ZARR:"{path}":/canopy_height:0'.encode()
    source = pointer(gdal.GDALOpenEx(name, 0x02, None, None, None))
    assert source.value
    band = pointer(gdal.GDALGetRasterBand(source, 1))
    height, width = SHAPE[1:]
    values, transform = np.empty(SHAPE[1:]), (number * 6)()
    whole, into = (0, 0, 0, width, height), (pointer(values.ctypes.data), width, height, 7, 0, 0)
    assert gdal.GDALRasterIO(band, *whole, *into) == 0  # 7: float64
    np.testing.assert_array_equal(values, stored[0])
    np.testing.assert_equal(gdal.GDALGetRasterNoDataValue(band, None), float(stored[0, 20, 5]))
    assert b"UTM zone 33N" in gdal.GDALGetProjectionRef(source)
    gdal.GDALGetGeoTransform(source, transform)
    expected = heights().odc.geobox.transform.to_gdal()
    np.testing.assert_allclose(list(transform), expected, rtol=1e-9, atol=1e-6)
    gdal.GDALClose(source)


# What is written


@pytest.mark.parametrize("shards", [False, True])
def test_equal_pixels_are_equal_bytes_at_any_time(shards, tmp_path, monkeypatch):
    """A writer that comes late writes what is already there; the header of gzip holds a time."""
    found = []
    for now in (1e9, 2e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        root = tmp_path / f"{now}.zarr"
        heights().chmv2.to_zarr(root, compressor="gzip", shards=shards, progress=False)
        files = [path for path in root.glob("canopy_height/c/**/*") if path.is_file()]
        found.append({str(path.relative_to(root)): path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert len(found[0]) == 18


def test_a_store_keeps_its_compressor(tmp_path):
    heights()[:1].chmv2.to_zarr(tmp_path / "h.zarr", compressor="gzip", progress=False)
    # An array in memory has no recipe, so the same dates are written again.
    heights()[:1].chmv2.to_zarr(tmp_path / "h.zarr", progress=False)
    codecs = zarr.open_array(tmp_path / "h.zarr", path="canopy_height").metadata.codecs
    assert [codec.to_dict()["name"] for codec in codecs] == ["bytes", "gzip"]
    with pytest.raises(StoreError, match=r"compressor.*'zlib'.*gzip"):
        heights().chmv2.to_zarr(tmp_path / "other.zarr", compressor="zlib")


def test_conventions_are_named_as_their_schemas_demand(tmp_path):
    heights().chmv2.to_zarr(tmp_path / "h.zarr", progress=False)
    attrs = zarr.open_group(tmp_path / "h.zarr", mode="r").attrs
    proj, spatial = attrs["zarr_conventions"]
    home = "zarr-conventions/{}/{}/v0.1/{}"
    for found, name in ((proj, "proj"), (spatial, "spatial")):
        assert found.keys() == {"name", "uuid", "description", "schema_url", "spec_url"}
        assert found["name"] == name
        assert found["schema_url"].endswith(home.format(name, "refs/tags", "schema.json"))
        assert found["spec_url"].endswith(home.format(name, "blob", "README.md"))
    assert (attrs["spatial:transform_type"], attrs["spatial:registration"]) == ("affine", "pixel")
    assert len(attrs["spatial:transform"]) == 6
    assert ("proj:code" in attrs) + ("proj:wkt2" in attrs) == 1


# Files for a GIS


def change():
    before = heights()[0].compute().rename("canopy_height")
    after = before.copy(data=before.values - np.eye(*SHAPE[1:], dtype="f4") * 5)
    after[40:60, 40:60] = 0
    after["time"] = np.datetime64("2024-07-01", "ns")
    return difference(before, after, sigma=1.0)


@pytest.mark.parametrize("kind", ["mask", "labels", "dates", "mixed", "change"])
def test_a_geotiff_holds_every_number_as_it_is(kind, tmp_path):
    base = change()
    labels, _ = label_events(loss(base), base)
    labels = labels.astype("int32")
    labels.data[0, 0] = 2**24 + 1  # which float32 cannot hold
    days = np.full(SHAPE[1:], "2024-07-10", "M8[ns]")
    days[:30] = "NaT"
    days = labels.copy(data=days).rename("loss_date")
    given, dtype, nodata = {
        "mask": (loss(base), "uint8", None),
        "labels": (labels, "int32", None),
        "dates": (days, "int32", -(2**31)),
        "mixed": (base.assign(event=labels, loss_date=days), "float64", np.nan),
        "change": (base, "float32", np.nan),
    }[kind]
    write_cog(given, tmp_path / "x.tif", progress=False)
    layers = given if isinstance(given, xr.Dataset) else given.to_dataset()
    with rasterio.open(tmp_path / "x.tif") as found:
        assert found.crs.to_epsg() == 32633
        assert {*found.dtypes} == {dtype}
        np.testing.assert_equal(found.nodata, nodata)
        assert found.descriptions == (*layers.data_vars,)
        for band, (name, layer) in enumerate(layers.data_vars.items(), 1):
            values = found.read(band, masked=True)
            expected = layer.values
            if layer.dtype.kind == "M":
                assert found.units[band - 1] == "days since 1970-01-01"
                missing = np.ma.getmaskarray(values)
                np.testing.assert_array_equal(missing, np.isnat(expected), err_msg=name)
                assert values[50, 50] == 19_914  # 2024-07-10
            else:
                np.testing.assert_array_equal(np.ma.getdata(values), expected, err_msg=name)


@pytest.mark.parametrize("engine", ["scipy", "netcdf4", "h5netcdf"])
@pytest.mark.parametrize("kind", ["change", "mask", "labels", "store"])
def test_netcdf_keeps_numbers_attributes_and_crs(kind, engine, tmp_path):
    pytest.importorskip({"netcdf4": "netCDF4"}.get(engine, engine))
    if kind == "store":
        heights().chmv2.to_zarr(tmp_path / "h.zarr", encoding="int16_cm", progress=False)
        given = xchmv2.open_zarr(tmp_path / "h.zarr").to_dataset()
    else:
        mask = loss(change())
        given = {"mask": mask, "labels": label_events(mask, change())[0], "change": change()}[kind]
    given.to_netcdf(tmp_path / "x.nc", engine=engine)
    given = given if isinstance(given, xr.Dataset) else given.to_dataset()
    with xr.open_dataset(tmp_path / "x.nc", engine=engine, decode_coords="all") as found:
        xr.testing.assert_equal(found, given)
        for name, layer in given.data_vars.items():
            assert found[name].dtype == layer.dtype
            assert (
                found[name].attrs.items()
                >= {n: v for n, v in layer.attrs.items() if n != "grid_mapping"}.items()
            )
        assert found.rio.crs.to_epsg() == 32633
