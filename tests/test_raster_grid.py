"""Which CRS and which grid: every way that is in use to say it, and every piece of advice run."""

import re
import warnings

import numpy as np
import pandas as pd
import pyproj
import pytest
import rasterio
import rioxarray
import xarray as xr
from affine import Affine
from conftest import cube
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_zeros

from xchmv2.change import difference
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.raster import find_crs, find_grid, georeference, has_true_areas, label_quantity
from xchmv2.structure import canopy_cover

GRID = {"tile": 64, "overlap": 16}
pytestmark = pytest.mark.filterwarnings("ignore:.*:xchmv2.errors.DemoModelWarning")
UTM = pyproj.CRS(32633)


def bare(dataset=None, **attrs):
    """Stacked imagery that says nothing of its CRS but what is given."""
    dataset = cube((96, 96)) if dataset is None else dataset
    stacked = dataset.to_dataarray("band").drop_vars("spatial_ref").drop_encoding()
    stacked.attrs = attrs
    return stacked


def predict(imagery, **options):
    return imagery.chmv2.predict("demo", **GRID, **options)


def advice(imagery, **options):
    with pytest.raises(CHMv2Error) as raised:
        predict(imagery, **options)
    return raised.value


def run(error, pattern, epsg="EPSG:32633", **names):
    """Run the call that an error advises."""
    call = re.search(pattern, error.fix).group().replace("EPSG:...", epsg)
    return eval(call, {"np": np, "xr": xr, **names})


def without_wkt(epsg):
    return {k: v for k, v in pyproj.CRS(epsg).to_cf().items() if k != "crs_wkt"}


def mapping(attrs, name="utm", text="utm"):
    return bare(grid_mapping=text).assign_coords({name: xr.DataArray(0, attrs=attrs)})


SAID = {
    "extended": mapping({"crs_wkt": UTM.to_wkt()}, text="utm: x y"),
    "several": mapping({"crs_wkt": UTM.to_wkt()}, text="utm: y x wgs: lat lon").assign_coords(
        wgs=xr.DataArray(0, attrs=pyproj.CRS(4326).to_cf())
    ),
    "CF without WKT": mapping(without_wkt(32633)),
    "no grid_mapping": mapping({"spatial_ref": UTM.to_wkt()}).drop_attrs(deep=False),
    "epsg": bare().assign_coords(epsg=32633),
    "epsg per date": bare().assign_coords(epsg=("band", [32633] * 3)),
    "proj:epsg": bare().assign_coords({"proj:epsg": 32633}),
    "proj:code": bare().assign_coords({"proj:code": "EPSG:32633"}),
    "epsg before those of items": bare().assign_coords({"epsg": 32633, "proj:epsg": 4326}),
    "value of spatial_ref": bare().assign_coords(spatial_ref=32633),
    **{
        f"attrs {key}": bare(**{key: value})
        for key, value in {
            "crs": "+init=epsg:32633",
            "spatial_ref": UTM.to_wkt(),
            "epsg": np.int64(32633),
            "proj4": "+proj=utm +zone=33 +datum=WGS84 +units=m +no_defs",
            "crs_wkt": UTM.to_wkt(),
            "proj:code": "EPSG:32633",
            "epsg_code": "32633.0",
            "proj:projjson": UTM.to_json_dict(),
        }.items()
    },
    "attrs crs of rasterio": bare(crs=rasterio.crs.CRS.from_epsg(32633)),
    "attrs crs as old dict": bare(crs={"init": "epsg:32633"}),
    "stale grid_mapping beside one CRS": mapping({"crs_wkt": UTM.to_wkt()}, text="gone"),
}


class TestCRS:
    @pytest.mark.parametrize("said", SAID)
    def test_every_spelling_is_understood(self, said):
        imagery = SAID[said]
        before = imagery.copy(deep=True)
        found = georeference(imagery)
        assert find_crs(imagery).epsg == 32633
        assert found.rio.crs.to_epsg() == found.odc.crs.epsg == 32633
        assert [n for n in found.coords if n not in ("band", "y", "x")] == [
            found.attrs["grid_mapping"]
        ]
        assert has_true_areas(imagery)
        xr.testing.assert_identical(imagery, before)

    @pytest.mark.parametrize("attrs", [{"crs": "EPSG:32633"}, {"epsg": 32633}])
    def test_attributes_of_a_dataset(self, attrs):
        coarse = cube((96, 96), pixel=10, origin=(-480_000, 50_000))
        imagery = coarse.drop_vars("spatial_ref").drop_encoding()
        assert "10 x 10 m" in str(advice(imagery.assign_attrs(attrs)))

    def test_plain_open_zarr(self, tmp_path):
        imagery = cube((96, 96)).isel(y=slice(None, None, -1))
        for band in imagery.data_vars.values():
            band.encoding["grid_mapping"] = "spatial_ref"
            band.attrs.pop("grid_mapping", None)
        imagery.to_zarr(tmp_path / "z", consolidated=False)
        opened = xr.open_zarr(tmp_path / "z", consolidated=False)
        assert "spatial_ref" in opened.data_vars
        np.testing.assert_array_equal(predict(opened), predict(imagery))
        stacked = opened[["red", "green", "blue"]].to_dataarray("band")
        stacked.encoding["grid_mapping"] = "spatial_ref"
        error = advice(stacked)
        assert "grid_mapping='spatial_ref', and no such coordinate" in str(error)
        assert "decode_coords='all'" in str(error)
        written = run(error, r"imagery\.rio\.write_crs\(.*\)", imagery=stacked)
        np.testing.assert_array_equal(predict(written), predict(imagery))

    def test_pixel_size_instead_of_a_lost_crs(self):
        imagery = cube((96, 96))
        found = predict(imagery.drop_vars("spatial_ref"), pixel_size=0.6)
        assert "grid_mapping" not in found.attrs
        np.testing.assert_array_equal(found, predict(imagery.drop_vars("spatial_ref").drop_attrs()
                                                     .drop_encoding(), pixel_size=0.6))  # fmt: skip

    @pytest.mark.parametrize(
        ("imagery", "message"),
        [
            (bare(crs="nonsense"), r"a CRS that PROJ knows, found 'nonsense' in attrs\['crs'\]"),
            (mapping({"grid_mapping_name": "nonsense"}), "a complete CF grid mapping, found 'nons"),
            (mapping({"grid_mapping_name": "transverse_mercator"}), "complete CF grid mapping"),
            (mapping({"comment": "UTM"}), "a CRS coordinate that says which, found 'utm' with"),
            (mapping({"spatial_ref": UTM.to_wkt(), "crs_wkt": pyproj.CRS(4326).to_wkt()}),
             "one CRS, found EPSG:32633 in spatial_ref of 'utm' and EPSG:4326 in crs_wkt of 'utm'"),
            (bare().assign_coords(spatial_ref=0), "'spatial_ref' with {}"),
            (bare().assign_coords(epsg=("band", [32633, 32632, 32633])), "found epsg of 32632, 32"),
            (bare(crs="EPSG:4326").assign_coords(epsg=32633),
             r"one CRS, found EPSG:32633 in epsg and EPSG:4326 in attrs\['crs'\]"),
            (mapping(UTM.to_cf()).drop_attrs(deep=False).assign_coords(
                crs=xr.DataArray(0, attrs=pyproj.CRS(4326).to_cf())), "one CRS, found EPSG:32633"),
        ],
    )  # fmt: skip
    def test_what_is_not_understood_is_refused(self, imagery, message):
        error = advice(imagery)
        assert re.search(message, str(error))
        written = run(error, r"imagery\.rio\.write_crs\(.*\)", imagery=imagery)
        assert predict(written).rio.crs.to_epsg() == 32633

    @pytest.mark.parametrize("crs", [None, 32633])
    def test_coordinates_in_kilometres(self, crs):
        imagery = bare()
        for dim in ("y", "x"):
            imagery[dim] = (dim, imagery[dim].values / 1000, {"units": "km"})
        if crs:
            imagery = imagery.rio.write_crs(crs)
        fixed = run(advice(imagery), r"imagery\.assign_coords\(.*\)", imagery=imagery)
        np.testing.assert_allclose(predict(fixed).y, bare().y)

    @pytest.mark.parametrize("attrs", ["units", "standard_name", "names of dims"])
    def test_axes_in_degrees(self, attrs):
        y, x = 61 - 5e-6 * np.arange(80), 15.9 + 1e-5 * np.arange(80)
        named = {"units": ("degrees_north", "degrees_east"), "standard_name":
                 ("latitude", "longitude"), "names of dims": (None, None)}[attrs]  # fmt: skip
        dims = ("lat", "lon") if attrs == "names of dims" else ("y", "x")
        coords = {
            dim: (dim, values, {attrs: name} if name else {})
            for dim, values, name in zip(dims, (y, x), named, strict=True)
        }
        values = np.random.default_rng(0).integers(1, 255, (3, 80, 80)).astype("uint8")
        imagery = xr.DataArray(values, coords, ("band", *dims))
        error = advice(imagery)
        assert "geographic CRS 4326" in str(error)
        reprojected = run(error, r"imagery.*(?=\.chmv2)", imagery=imagery)
        assert predict(reprojected).rio.crs.to_epsg() == 32633

    def test_units_against_the_crs(self):
        imagery = bare().rio.write_crs(32633)
        imagery["y"] = imagery.y.assign_attrs(units="degrees_north")
        assert "in m, the unit of EPSG:32633, found y in degrees" in str(advice(imagery))

    def test_the_result_has_the_crs_it_was_computed_in_alone(self, tmp_path):
        wrong = xr.DataArray(0, attrs=pyproj.CRS(4326).to_cf())
        imagery = bare(grid_mapping="spatial_ref").assign_coords(crs=wrong)
        imagery = imagery.assign_coords(spatial_ref=cube((96, 96)).spatial_ref)
        found = predict(imagery)
        assert found.attrs["grid_mapping"] == "spatial_ref"
        assert "crs" not in found.coords
        found.rio.to_raster(tmp_path / "h.tif")
        with rasterio.open(tmp_path / "h.tif") as file:
            assert file.crs.to_epsg() == 32633
        assert found.odc.crs.epsg == 32633

    def test_bands_in_two_crs(self):
        imagery = cube((64, 64)).drop_encoding()
        imagery = imagery.assign_coords(crs=xr.DataArray(0, attrs=pyproj.CRS(32632).to_cf()))
        for name, band in imagery.data_vars.items():
            band.attrs["grid_mapping"] = "crs" if name == "blue" else "spatial_ref"
        assert "green and blue in one CRS, found EPSG:32633 and EPSG:32632" in str(advice(imagery))


class TestWithoutCRS:
    @pytest.mark.parametrize("method", ["predict", "plan"])
    def test_one_warning_at_the_line_of_the_call(self, method):
        imagery = bare().chunk(x=40)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = getattr(imagery.chmv2, method)("demo", **GRID)
            if method == "predict":
                found.compute()
        told = [w for w in told if "without a CRS" in str(w.message)]
        assert [w.filename for w in told] == [__file__]

    def test_the_overview_does_not_warn(self):
        assert "can run" in repr(bare().chmv2)

    @pytest.mark.parametrize("drop", [[], ["y", "x"]])
    def test_resolution_of_a_stated_pixel_size(self, drop):
        fine = cube((400, 360), pixel=0.15)
        one = {"tile": 128, "overlap": 16}  # without a CRS tiles are counted from the first pixel
        expected = fine.chmv2.predict("demo", resolution=0.6, **one)
        unplaced = bare(fine).drop_vars(drop)
        found = unplaced.chmv2.predict("demo", pixel_size=0.15, resolution=0.6, **one)
        assert found.shape == (100, 90)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert ("y" in found.coords) == (not drop)
        if not drop:
            np.testing.assert_allclose(found.y, expected.y)
            np.testing.assert_allclose(found.x, expected.x)

    def test_messages(self):
        imagery = bare(cube((64, 64), pixel=0.035))
        assert ".predict(..., resolution=0.6)" in advice(imagery, pixel_size=0.035).fix
        assert "pixel_size=0.6" in advice(imagery, resolution=0.6).fix
        error = advice(cube((64, 64)), pixel_size=0.6)
        assert "found pixel_size=0.6 and EPSG:32633; leave pixel_size out" in str(error)
        for value in (0, -1.0, np.inf, True, "0.6", [0.6]):
            assert "pixel_size=0.6" in advice(imagery, pixel_size=value).fix
        long = imagery.assign_coords(x=imagery.x * 2)
        error = advice(long, pixel_size=0.6)
        assert "pixels as long as wide" in str(error)
        predict(run(error, r"imagery\.drop_vars\(.*\)", imagery=long), pixel_size=0.6)


def geocoded(box, dtype="uint8", **attrs):
    zeros = xr_zeros(box, dtype=dtype)
    rng = np.random.default_rng(0)
    bands = {n: rng.integers(1, 255, zeros.shape).astype(dtype) for n in ("red", "green", "blue")}
    named = {"grid_mapping": "spatial_ref", **attrs}
    return xr.Dataset({n: (zeros.dims, v, named) for n, v in bands.items()}, zeros.coords)


ROTATED = GeoBox(
    (120, 120),
    Affine.translation(5e5, 5e6) @ Affine.rotation(20) @ Affine.scale(0.6, -0.6),
    "EPSG:32633",
)
DEGREES = GeoBox((150, 150), Affine(1e-5, 0, 15.9, 0, -5e-6, 61), "EPSG:4326")


class TestReprojection:
    @pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
    @pytest.mark.parametrize("box", [ROTATED, DEGREES])
    @pytest.mark.parametrize(
        ("dtype", "nodata"), [("uint8", None), ("uint8", 255), ("uint16", 0), ("float32", None)]
    )
    def test_what_is_outside_is_nodata(self, box, dtype, nodata):
        declared = {} if nodata is None else {"_FillValue": nodata}
        imagery = geocoded(box, dtype, **declared)
        options = {} if dtype == "uint8" else {"value_range": (0, 255)}
        error = advice(imagery, **options)
        call = r"imagery\.odc\.reproject\((?:[^()]|\([^()]*\))*\)"
        placed = run(error, call, imagery=imagery)
        found = predict(placed, **options)
        inside = xr.ones_like(imagery.red, "uint8").odc.reproject(placed.odc.geobox) == 1
        assert 0.02 < float((~inside).mean()) < 0.5
        np.testing.assert_array_equal(found.isnull(), ~inside)
        values = imagery.red.odc.reproject(placed.odc.geobox)
        np.testing.assert_array_equal(placed.red.where(inside), values.where(inside))

    def test_coordinates_that_float32_rounded(self):
        exact = cube((96, 96))
        imagery = exact.assign_coords(y=exact.y.astype("f4"), x=exact.x.astype("f4"))
        fixed = run(advice(imagery), r"imagery\.assign_coords\(.*\)", imagery=imagery)
        for dim in ("y", "x"):
            np.testing.assert_allclose(fixed[dim], exact[dim], atol=1e-6)
        np.testing.assert_array_equal(predict(fixed), predict(exact))

    def test_missing_rows(self):
        whole = cube((96, 96))
        imagery = whole.isel(y=[*range(40), *range(45, 96)])
        fixed = run(advice(imagery), r"imagery\.reindex\(.*\)(?=\.chmv2)", imagery=imagery)
        found = predict(fixed, nodata=0)
        assert found.shape == (96, 96)
        np.testing.assert_array_equal(
            found.isnull().all("x"), np.isin(np.arange(96), range(40, 45))
        )

    def test_unsorted_rows(self):
        imagery = cube((96, 96)).isel(y=[1, 0, *range(1, 96)])
        fixed = run(advice(imagery), r"imagery\.drop_dup.*\)", imagery=imagery)
        np.testing.assert_allclose(predict(fixed).y, cube((96, 96)).y[::-1])

    @pytest.mark.parametrize(
        "centres",
        [np.arange(96) + 0.5, np.arange(96.0), np.arange(1.0, 97), np.arange(300, 396) + 0.5],
    )
    def test_pixel_numbers(self, centres):
        imagery = cube((96, 96)).assign_coords(y=centres, x=centres)
        error = advice(imagery)
        assert re.search(r"unit of EPSG:32633, found pixel numbers, y .* to .* and x", str(error))
        unplaced = run(error, r"imagery\.drop_vars\(.*\](?=\))\)", imagery=imagery)
        found = predict(unplaced, pixel_size=0.6)
        assert found.shape == (96, 96)
        assert not {"y", "x", "spatial_ref"} & set(found.coords)

    def test_an_identity_transform(self, tmp_path):
        shape = {"count": 3, "height": 64, "width": 64, "dtype": "uint8"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(tmp_path / "i.tif", "w", crs="EPSG:32633", **shape) as file:
                file.write(np.ones((3, 64, 64), "uint8"))
            imagery = rioxarray.open_rasterio(tmp_path / "i.tif")
            assert "pixel numbers" in str(advice(imagery))

    def test_whole_metres_are_no_pixel_numbers(self):
        """As in the Isles of Scilly, near the origin of the British grid."""
        y, x = 12_000.5 - np.arange(64), 85_000.5 + np.arange(64)
        imagery = cube((64, 64), crs=None).assign_coords(y=y, x=x).odc.assign_crs(27700)
        assert find_grid(imagery.red).pixel == (-1.0, 1.0)

    def test_pixels_longer_than_wide(self):
        y, x = 65 * 111319.49 - 0.6 * np.arange(96), 2e6 + 0.6 * np.arange(200)
        imagery = cube((96, 200), crs=None).assign_coords(y=y, x=x).odc.assign_crs(4087)
        error = advice(imagery)
        assert "at most 1.2 times as long as wide" in str(error)
        assert "0.601 x 0.254 m" in str(error)
        found = predict(imagery, resolution=0.6)
        assert found.shape == pytest.approx((96, 85), abs=1)


class TestCorners:
    """stackstac gives the upper left corners of pixels, and says so by ``transform`` alone."""

    @staticmethod
    def stack():
        exact = cube((96, 96))
        affine = exact.odc.geobox.affine
        stacked = bare(exact, transform=affine, crs="epsg:32633").assign_coords(epsg=32633)
        return exact, stacked.assign_coords(y=stacked.y + 0.3, x=stacked.x - 0.3)

    @pytest.mark.parametrize(
        "part", [{}, {"y": slice(10, None), "x": slice(7, 90)}, {"y": slice(None, None, -1)}]
    )
    def test_half_a_pixel(self, part):
        exact, stacked = self.stack()
        found, expected = predict(stacked.isel(part)), predict(exact.isel(part))
        np.testing.assert_array_equal(found, expected)
        for dim in ("y", "x"):
            np.testing.assert_allclose(found[dim], expected[dim], atol=1e-6)
        assert "transform" not in found.attrs

    def test_with_a_mask_of_its_own(self):
        _, stacked = self.stack()
        valid = (stacked > 100).isel(band=0, drop=True)
        valid.attrs = {}
        np.testing.assert_array_equal(predict(stacked, valid=valid).isnull(), ~valid)

    def test_a_transform_of_centres(self):
        exact, stacked = self.stack()
        centred = stacked.assign_coords(y=exact.y, x=exact.x)
        assert find_grid(centred).edges == pytest.approx(find_grid(exact.red).edges, rel=1e-12)

    def test_as_variables(self):
        exact, stacked = self.stack()
        dataset = stacked.assign_coords(band=["red", "green", "blue"]).to_dataset("band")
        np.testing.assert_allclose(predict(dataset).x, exact.x, atol=1e-6)


class TestStaleTransform:
    @pytest.fixture
    def part(self, tmp_path):
        whole = cube((200, 200))
        whole.to_dataarray("band").rio.to_raster(tmp_path / "whole.tif")
        opened = rioxarray.open_rasterio(tmp_path / "whole.tif")
        return opened.isel(y=slice(100, None), x=slice(90, None))

    @staticmethod
    def assert_true(array, where):
        top, left = float(where.y[0]) + 0.3, float(where.x[0]) - 0.3
        words = [float(word) for word in array.spatial_ref.GeoTransform.split()]
        np.testing.assert_allclose(words, [left, 0.6, 0, top, 0, -0.6], atol=1e-6)

    def test_outputs(self, part, tmp_path):
        stale = part.spatial_ref.GeoTransform
        height = predict(part)
        self.assert_true(height, part)
        height.to_netcdf(tmp_path / "h.nc", engine="scipy")
        self.assert_true(xr.open_dataset(tmp_path / "h.nc", decode_coords="all"), part)
        height.isel(x=slice(5, None)).chmv2.to_zarr(tmp_path / "h.zarr", progress=False)
        import xchmv2

        self.assert_true(xchmv2.open_zarr(tmp_path / "h.zarr"), part.isel(x=slice(5, None)))
        later = height.isel(y=slice(8, None))
        self.assert_true(difference(later, later + 1, sigma=1.0), part.isel(y=slice(8, None)))
        self.assert_true(predict(part.isel(y=slice(None, None, -1)), resolution=0.6)[::-1]
                         .pipe(georeference), part)  # fmt: skip
        assert part.spatial_ref.GeoTransform == stale

    def test_a_true_one_is_not_rewritten(self, part):
        placed = georeference(part)
        words = placed.spatial_ref.GeoTransform
        assert georeference(placed).spatial_ref.GeoTransform == words
        assert label_quantity(placed, "any", {}).spatial_ref.GeoTransform == words

    def test_cells(self, part):
        cells = canopy_cover(predict(part), cell=6)
        words = [float(word) for word in cells.spatial_ref.GeoTransform.split()]
        assert words[1] == pytest.approx(6)
        assert words[0] == pytest.approx(float(cells.x[0]) - 3)


def test_raster_without_times_keeps_its_other_coordinates():
    imagery = cube((64, 64)).assign_coords(platform="naip", when=pd.Timestamp("2020-01-01"))
    assert {"platform", "when"} <= set(predict(imagery).coords)
    with pytest.raises(ImageryError, match="two spatial dims"):
        find_grid(xr.DataArray(np.zeros(3)))
