import numpy as np
import pyproj
import pytest
import rioxarray  # noqa: F401  (registers .rio)
import xarray as xr
from conftest import cube
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.xr import xr_zeros
from scipy import ndimage

from xchmv2.errors import ImageryError
from xchmv2.imagery import (
    WindowReader,
    read_scene,
    resolve_imagery,
    resolve_target,
    resolve_value_range,
)
from xchmv2.imagery.bands import select_bands
from xchmv2.imagery.resampling import _AxisMap, _resample
from xchmv2.raster import ValidPixels, find_grid, ground_pixel, resolve_nodata

# Private imports: resampling is held against a plain loop.


def banded(n, labels=None, **attrs):
    coords = {} if labels is None else {"band": labels}
    return xr.DataArray(np.ones((n, 4, 5), "uint8"), coords, ("band", "y", "x"), attrs=attrs)


def indices(imagery, bands=None):
    return [band.index for band in select_bands(imagery, bands)]


class TestBands:
    @pytest.mark.parametrize(
        "names", [("red", "green", "blue"), ("R", "G", "B"), ("Red_1", "Green_1", "Blue_1")]
    )
    def test_variables_by_name(self, names):
        imagery = xr.Dataset({n: (("y", "x"), np.ones((4, 4))) for n in (*names[::-1], "nir")})
        assert [band.array.name for band in select_bands(imagery)] == list(names)

    @pytest.mark.parametrize("key", ["common_name", "long_name"])
    def test_variables_by_attribute(self, key):
        imagery = xr.Dataset({n: (("y", "x"), np.ones((4, 4))) for n in ("a", "b1", "c")})
        for name, colour in zip(imagery, ("Blue", "Green", "Red"), strict=True):
            imagery[name].attrs[key] = colour
        assert [band.array.name for band in select_bands(imagery)] == ["c", "b1", "a"]

    def test_numbered_one_to_three(self):
        assert indices(banded(3, [1, 2, 3])) == [0, 1, 2]
        assert indices(banded(3)) == [0, 1, 2]

    def test_band_labels_descriptions_and_stac_names(self):
        assert indices(banded(4, ["blue", "green", "red", "nir"])) == [2, 1, 0]
        described = banded(4, [1, 2, 3, 4], long_name=("NIR", "Red", "Green", "Blue"))
        assert indices(described) == [1, 2, 3]
        stac = banded(4, [1, 2, 3, 4]).assign_coords(
            common_name=("band", ["nir08", "blue", "green", "red"])
        )
        assert indices(stac) == [3, 2, 1]

    def test_given(self):
        assert indices(banded(5, [1, 2, 3, 4, 5]), (5, 3, 2)) == [4, 2, 1]

    def test_dataset_of_one_stacked_variable_and_a_mask(self):
        imagery = banded(3, [1, 2, 3]).to_dataset(name="image")
        imagery["alpha"] = imagery["image"].isel(band=0, drop=True)
        assert indices(imagery) == [0, 1, 2]

    def test_dataset_of_one_stacked_variable(self):
        assert indices(banded(3, [1, 2, 3]).to_dataset(name="band_data")) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("imagery", "bands", "message"),
        [
            (banded(4, [1, 2, 3, 4]), None,
             r"red, green and blue.*\[1, 2, 3, 4\]; pass bands= with the numbers of red, green"),
            (banded(3, ["B1", "B2", "B3"]), None, r"\['B1', 'B2', 'B3'\]; pass bands= with the n"),
            (banded(2, [1, 2]), None,
             r"expected red, green and blue bands, found 2: \[1, 2\]; give imagery"),
            (banded(1, [1]), None, r"found 1: \[1\]"),
            (banded(4, ["red", "r", "green", "blue"]), None,
             r"one band each.*2 for red: \['red', 'r'\]; choose"),
            (banded(3, [1, 2, 3]), (1, 2, 9),
             r"three different bands of \[1, 2, 3\].*\(1, 2, 9\)"),
            (banded(3, [1, 2, 3]), (1, 2), r"three different bands"),
            (banded(3, [1, 2, 3]), (1, 1, 2), r"three different bands"),
            (banded(3, ["r", "g", "b"]), "rgb", r"three different bands"),
            (xr.DataArray(np.ones((3, 4, 4)), dims=("c", "y", "x")), None,
             r"'band' dimension, found .*\('c', 'y', 'x'\); name the dimension"),
        ],
    )  # fmt: skip
    def test_errors(self, imagery, bands, message):
        with pytest.raises(ImageryError, match=message):
            select_bands(imagery, bands)

    def test_three_files_of_one_band_each(self):
        """As ``open_rasterio`` opens them: each has a band dimension of its own."""
        imagery = cube((64, 64), times=2)
        files = {name: band.expand_dims(band=[1]) for name, band in imagery.data_vars.items()}
        scene, _, _, _ = resolve_imagery(xr.Dataset(files))
        for band, name in zip(scene.bands, ("red", "green", "blue"), strict=True):
            xr.testing.assert_identical(band.array.drop_attrs(), imagery[name].drop_attrs())

    def test_files_that_were_joined_by_their_band_numbers(self):
        one = cube((64, 64)).red
        several = {name: one.expand_dims(band=[1, 2]) for name in ("red", "green", "blue")}
        with pytest.raises(ImageryError, match="one picture of red, green and blue"):
            select_bands(xr.Dataset(several))

    @pytest.mark.parametrize("bands", [1, 0.5, True, {"red", "green", "blue"}, np.zeros((3, 3))])
    def test_bands_that_are_no_sequence_of_three(self, bands):
        with pytest.raises(
            ImageryError, match=r"three different bands of .* found bands="
        ) as caught:
            select_bands(cube((64, 64)), bands)
        assert len(str(caught.value)) < 300


class TestValues:
    def test_range(self):
        eight, sixteen = banded(1), banded(1).astype("uint16")
        assert resolve_value_range([eight] * 3) == ((0, 255),) * 3
        assert resolve_value_range([sixteen] * 3, (0, 3000)) == ((0, 3000),) * 3
        per_band = [(0, 10), (1, 20), (2, 30)]
        assert resolve_value_range([sixteen] * 3, per_band) == tuple(per_band)

    @pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
    def test_range_is_never_guessed(self, dtype):
        with pytest.raises(ImageryError, match=rf"uint8 imagery.*found {dtype} and no value_range"):
            resolve_value_range([banded(1).astype(dtype)] * 3)

    def test_range_hint_for_masked_uint8(self):
        masked = banded(1).astype("float32")
        masked.encoding["rasterio_dtype"] = "uint8"
        with pytest.raises(ImageryError, match=r"value_range=\(0, 255\)"):
            resolve_value_range([masked] * 3)

    @pytest.mark.parametrize("bad", [(5, 5), (10, 0), (0, 1, 2), "abc", [(0, 1)] * 2, (0, np.nan)])
    def test_bad_ranges(self, bad):
        with pytest.raises(ImageryError, match=r"value_range as one \(low, high\) with low < high"):
            resolve_value_range([banded(1)] * 3, bad)

    def test_nodata_from_metadata(self):
        band = banded(1)
        assert resolve_nodata([band] * 3) == (None,) * 3
        tagged = band.assign_attrs(_FillValue=np.uint8(255))
        assert resolve_nodata([tagged, band, band]) == (255.0, None, None)
        assert resolve_nodata([tagged] * 3, 0) == (0.0,) * 3
        encoded = band.copy()
        encoded.encoding["_FillValue"] = 7
        assert resolve_nodata([encoded.assign_attrs(nodata=9)] * 3) == (9.0,) * 3
        assert resolve_nodata([encoded] * 3) == (7.0,) * 3

    def test_nodata_of_decoded_values_is_nan_already(self):
        stored = banded(1).astype("uint16") * np.uint16(1000)
        stored[0, 0, :2] = 0
        packed = stored.assign_attrs(_FillValue=0, scale_factor=1e-4, add_offset=-0.1)
        decoded = xr.decode_cf(packed.to_dataset(name="b"))["b"]
        assert float(decoded.max()) == pytest.approx(0, abs=1e-6)
        assert resolve_nodata([decoded] * 3) == (None,) * 3
        masked = banded(1).astype("float32")
        masked.encoding.update(_FillValue=255, rasterio_dtype="uint8")
        assert resolve_nodata([masked] * 3) == (None,) * 3

    @pytest.mark.parametrize("dtype", ["bool", "complex64"])
    def test_bands_that_are_no_numbers(self, dtype):
        with pytest.raises(ImageryError, match=rf"bands of integers or .*found {dtype}"):
            resolve_value_range([banded(1).astype(dtype)] * 3, (0, 1))

    def test_integer_needs_all_bands_float_any(self):
        bands = [np.array([[255, 255, 1]], "uint8"), np.array([[255, 3, 1]], "uint8")]
        bands.append(bands[0])
        rule = ValidPixels((255.0,) * 3)
        np.testing.assert_array_equal(rule(bands), [[False, True, True]])
        floats = [band.astype("float32") for band in bands]
        np.testing.assert_array_equal(rule(floats), [[False, False, True]])
        floats[1][0, 2] = np.inf
        np.testing.assert_array_equal(rule(floats), [[False, False, False]])

    @pytest.mark.parametrize("nodata", [-9999.0, 300.0, 0.5, np.nan, None])
    def test_nodata_that_an_integer_cannot_hold(self, nodata):
        bands = [np.zeros((2, 2), "uint8")] * 3
        assert ValidPixels((nodata,) * 3)(bands).all()

    def test_large_negative_float_nodata(self):
        band = np.array([[-3.4e38, 1]], "float32")
        np.testing.assert_array_equal(ValidPixels((-3.4e38,) * 3)([band] * 3), [[False, True]])

    @given(st.integers(0, 4), st.integers(0, 999))
    def test_erode_trims_squares(self, erode, seed):
        mask = np.random.default_rng(seed).random((20, 30)) > 0.02
        found = ValidPixels((None,) * 3, erode)([np.ones((20, 30), "uint8")] * 3, mask)
        square = np.ones((2 * erode + 1,) * 2)
        np.testing.assert_array_equal(found, ~ndimage.binary_dilation(~mask, square))


class TestNeverInvalid:
    @pytest.mark.parametrize(
        ("dtypes", "nodata", "expected"),
        [
            (["u1", "u1", "u1"], (None, None, None), True),
            (["u1", "i2", "u1"], (0, None, 0), True),  # it takes all three bands
            (["u1", "u1", "u1"], (0, 0, 0), False),
            (["u1", "f4", "u1"], (None, None, None), False),
        ],
    )
    def test_it_is_what_no_values_can_break(self, dtypes, nodata, expected):
        rule = ValidPixels(nodata)
        assert rule.never_invalid([np.dtype(name) for name in dtypes]) == expected
        worst = [np.full((2, 2), np.nan if "f" in name else 0, name) for name in dtypes]
        assert rule(worst).all() == expected


class TestGrid:
    def test_ground_metres_of_web_mercator(self):
        y = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(10, 60)[1]
        imagery = xr_zeros(_box(3857, 1.0, y), dtype="uint8")
        height, width = ground_pixel(find_grid(imagery))
        assert (height, width) == pytest.approx((0.5, 0.5), rel=0.01)

    def test_utm_pixel(self):
        grid = find_grid(cube((50, 60), pixel=0.6)["red"])
        assert grid.pixel == (-0.6, 0.6)
        assert grid.origin == (-8_000_000, 800_000)
        assert ground_pixel(grid) == pytest.approx((0.6, 0.6), rel=1e-3)

    def test_windows_of_one_grid_count_alike(self):
        whole = cube((300, 300), pixel=0.1)["red"]
        top, left = find_grid(whole).origin
        for y, x, size in [(1, 2, 3), (17, 33, 50), (200, 150, 99)]:
            part = whole.isel(y=slice(y, y + size), x=slice(x, x + size))
            assert find_grid(part).origin == (top + y, left + x)

    def test_no_crs_counts_from_the_first_pixel(self):
        assert find_grid(cube((50, 60), crs=None)["red"]).origin == (0, 0)

    @pytest.mark.parametrize("resolution", [0.6, 0.5, 1.0])
    def test_target_is_aligned_and_covers_the_source(self, resolution):
        grid = find_grid(cube((107, 211), pixel=0.3, origin=(-16_000_003, 1_700_001))["red"])
        target, _, _ = resolve_target(grid, resolution)
        for axis in (0, 1):
            assert abs(target.pixel[axis]) == pytest.approx(resolution)
            index = target.edges[axis] / target.pixel[axis]
            assert index == pytest.approx(round(index), abs=1e-6)
            (first, last), (low, high) = (
                sorted((g.edges[axis], g.edges[axis] + g.pixel[axis] * g.shape[axis]))
                for g in (grid, target)
            )
            assert low <= first + 1e-6
            assert high >= last - 1e-6
            assert high - low < last - first + 2 * resolution

    def test_matching_grid_is_left_alone(self):
        grid = find_grid(cube((100, 100), pixel=0.6)["red"])
        target, rows, cols = resolve_target(grid, 0.6)
        assert rows.is_identity
        assert cols.is_identity
        assert target.shape == grid.shape

    @pytest.mark.parametrize(
        ("pixel", "resolution", "message"),
        [
            (
                0.1,
                None,
                r"0.25 to 1.5 m.*found pixels of 0.0\d+ x 0.0\d+ m; resample .*resolution=0.6",
            ),
            (2.0, None, r"found pixels of 2 x 2 m; resample while predicting"),
            (10.0, None, r"10 x 10 m, in which single trees cannot be seen; use finer"),
            (10.0, 0.6, r"single trees cannot be seen; use finer"),
            (0.6, 0.1, r"ground resolution of 0.25 to 1.5 m.*found resolution=0.1"),
            (0.6, 5, r"found resolution=5"),
        ],
    )
    def test_resolution_outside_the_range(self, pixel, resolution, message):
        grid = find_grid(cube((50, 50), pixel=pixel, origin=(-500_000, 50_000))["red"])
        with pytest.raises(ImageryError, match=message):
            resolve_target(grid, resolution)

    @pytest.mark.parametrize("pixel", [0.25, 0.2477, 1.5, 1.514])
    def test_resolution_at_the_ends_of_the_range(self, pixel):
        top, left = -int(5_000_000 / pixel), int(500_000 / pixel)
        grid = find_grid(cube((50, 50), pixel=pixel, origin=(top, left))["red"])
        assert resolve_target(grid, None)[0] == grid

    def test_pixels_of_a_millimetre_are_a_mistake(self):
        grid = find_grid(cube((50, 50), pixel=1e-3, origin=(-(10**9), 10**8))["red"])
        for resolution in (None, 0.6):
            with pytest.raises(ImageryError, match=r"at least 0.01 m.*check the CRS"):
                resolve_target(grid, resolution)

    def test_coordinates_that_the_crs_cannot_place(self):
        grid = find_grid(cube((50, 50), pixel=0.6, origin=(-(10**9), 10**9), crs=32633)["red"])
        with pytest.raises(ImageryError, match=r"place on the Earth|at least|pixels of"):
            resolve_target(grid, None)

    @pytest.mark.parametrize("latitude", [0, 20, 45, 60])
    def test_mercator_pixels_stay_square(self, latitude):
        top = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(10, latitude)[1]
        grid = find_grid(xr_zeros(_box(3857, 0.5, top), dtype="uint8"))
        target, _, _ = resolve_target(grid, 0.6)
        assert target.pixel[0] == -target.pixel[1]
        assert ground_pixel(target) == pytest.approx((0.6, 0.6), rel=0.009)

    def test_geographic_crs_names_the_reprojection(self):
        imagery = xr_zeros(_box(4326, 5e-6, 45.0, left=7.0), dtype="uint8")
        message = r"projected CRS.*4326.*reproject\('EPSG:32632', resolution=0.6\)"
        with pytest.raises(ImageryError, match=message):
            resolve_target(find_grid(imagery), None)

    def test_resolution_needs_a_crs(self):
        grid = find_grid(cube((50, 50), crs=None)["red"])
        with pytest.raises(ImageryError, match=r"expected a CRS.*write it: imagery.rio.write_crs"):
            resolve_target(grid, 0.6)

    def test_uneven_coordinates(self):
        imagery = cube((50, 50)).isel(x=[0, 1, 2, 4, 8])
        with pytest.raises(
            ImageryError,
            match=r"pixels on a regular grid, found x coordinates in steps from 0.6 to 2.4",
        ):
            find_grid(imagery["red"])

    def test_pixels_of_a_fraction_of_a_second(self):
        """Rounded to eight decimals of a degree, the last of 20,000 would be one pixel off."""
        size = 5.3897254e-6
        axis = size * np.arange(20_000)
        coords = {"latitude": 60 - axis, "longitude": 15 + axis[:10]}
        imagery = xr.DataArray(np.zeros((20_000, 10), "uint8"), coords).odc.assign_crs(4326)
        assert find_grid(imagery).pixel == pytest.approx((-size, size), rel=1e-7)

    def test_without_crs_by_coordinates(self):
        bare = cube((50, 50), crs=None)["red"]
        grid = find_grid(bare.drop_vars("x"))
        assert grid.pixel == (-0.6, 1.0)
        assert grid.edges == pytest.approx((8_000_000 * 0.6, 0.0))
        with pytest.raises(ImageryError, match=r"x coordinates in steps.*imagery\.reindex\(x="):
            find_grid(bare.isel(x=[0, 1, 3]))
        with pytest.raises(ImageryError, match="y coordinates that are not finite"):
            find_grid(bare.assign_coords(y=bare.y.where(bare.y > bare.y[-1])))

    def test_one_pixel(self):
        imagery = cube((50, 50))
        assert find_grid(imagery["red"].isel(x=[0])).pixel == (-0.6, 0.6)
        assert find_grid(imagery["red"].isel(y=[0])).pixel == (-0.6, 0.6)
        with pytest.raises(ImageryError, match=r"found a single pixel and no transform"):
            find_grid(imagery["red"].isel(x=[0], y=[0]))

    def test_transform_without_coordinates(self):
        imagery = cube((50, 60))["red"]
        transformed = imagery.rio.write_transform(imagery.odc.geobox.affine)
        bare = transformed.drop_vars(["x", "y"])
        found, expected = find_grid(bare), find_grid(imagery)
        assert found.origin == expected.origin
        assert found.edges == pytest.approx(expected.edges)
        assert found.pixel == pytest.approx(expected.pixel)

    def test_no_spatial_dims(self):
        with pytest.raises(ImageryError, match=r"two spatial dims named y and x.*\('p', 'q'\)"):
            find_grid(xr.DataArray(np.ones((4, 4)), dims=("p", "q")))


def _box(crs, pixel, top, left=0.0):
    from affine import Affine
    from odc.geo.geobox import GeoBox

    return GeoBox((100, 100), Affine(pixel, 0, left, 0, -pixel, top), crs)


def brute_force(image, valid, rows, cols):
    """Area average and valid share of the area, pixel by pixel."""
    out = np.full((3, rows.size, cols.size), np.nan)
    valid_share = np.zeros((rows.size, cols.size))
    for i in range(rows.size):
        for j in range(cols.size):
            y0, x0 = i * rows.ratio + rows.offset, j * cols.ratio + cols.offset
            y, x = np.arange(rows.source_size)[:, None], np.arange(cols.source_size)
            high = np.minimum(y + 1, y0 + rows.ratio) - np.maximum(y, y0)
            wide = np.minimum(x + 1, x0 + cols.ratio) - np.maximum(x, x0)
            area = np.clip(high, 0, None) * np.clip(wide, 0, None)
            share = (area * valid).sum()
            valid_share[i, j] = share / area.sum()
            if share > 0:
                out[:, i, j] = (area * valid * image).sum(axis=(1, 2)) / share
    return out, valid_share

    def test_coordinates_that_are_no_numbers(self):
        imagery = cube((64, 64))
        text = imagery.assign_coords(y=imagery.y.astype(str))
        with pytest.raises(ImageryError, match="one number for each row") as caught:
            find_grid(text.red)
        fixed = eval(caught.value.fix.partition(": ")[2], {"array": text.red})
        assert find_grid(fixed) == find_grid(imagery.red)
        rows = np.arange(64)
        levels = imagery.drop_vars("y").assign_coords(a=("y", rows), b=("y", rows))
        with pytest.raises(ImageryError, match=r"several levels; .*reset_index\('y'\)"):
            find_grid(levels.set_index(y=["a", "b"]).red)

    def test_numpy_is_told_what_it_lacks(self):
        with pytest.raises(
            ImageryError, match="imagery as a DataArray or a Dataset, found ndarray"
        ):
            resolve_imagery(np.zeros((3, 64, 64), "uint8"))


class TestResampling:
    @given(st.floats(1.01, 9), st.floats(1.01, 9), st.floats(0, 0.99), st.integers(0, 99))
    def test_down_is_the_area_average_of_valid_pixels(self, ratio_y, ratio_x, start, seed):
        rng = np.random.default_rng(seed)
        image, valid = rng.random((3, 31, 37)).astype("float32"), rng.random((31, 37)) > 0.4
        rows, cols = (
            _AxisMap(size, int(np.ceil((size + start) / ratio - 1e-3)), ratio, -start)
            for size, ratio in ((31, ratio_y), (37, ratio_x))
        )
        expected, share = brute_force(image, valid, rows, cols)
        found, found_ok = _resample(image, valid, (rows, cols), ((0, rows.size), (0, cols.size)))
        clear, ok = np.abs(share - 0.5) > 1e-4, share > 0.5  # halves by rounding go either way
        np.testing.assert_array_equal(found_ok[clear], ok[clear])
        np.testing.assert_allclose(found[:, ok], expected[:, ok], atol=2e-5)

    def test_up_is_bilinear(self):
        image = np.random.default_rng(0).random((3, 20, 20)).astype("float32")
        axis = _AxisMap(20, 40, 0.5, 0.0)
        found, ok = _resample(image, np.ones((20, 20), bool), (axis, axis), ((0, 40), (0, 40)))
        assert ok.all()
        centres = (np.arange(40) + 0.5) * 0.5 - 0.5
        where = np.meshgrid(centres, centres, indexing="ij")
        expected = [ndimage.map_coordinates(b, where, order=1, mode="nearest") for b in image]
        np.testing.assert_allclose(found, expected, atol=1e-6)

    @pytest.mark.parametrize("ratio", [0.47, 1.0, 3.3])
    @pytest.mark.parametrize("erode", [0, 2])
    def test_any_window_equals_the_whole(self, ratio, erode):
        rng = np.random.default_rng(1)
        image, mask = rng.random((3, 60, 70)).astype("float32"), rng.random((60, 70)) > 0.1
        rows, cols = (_AxisMap(n, int(n / ratio) + 1, ratio, -0.3 * ratio) for n in (60, 70))
        reader = WindowReader(ValidPixels((None,) * 3, erode), rows, cols)

        def read(target):
            (y0, y1), (x0, x1) = (reader.source_span(i, *t) for i, t in enumerate(target))
            return reader(image[:, y0:y1, x0:x1], mask[y0:y1, x0:x1], target)

        whole, ok = read(((0, rows.size), (0, cols.size)))
        part, part_ok = read(((3, 15), (5, 14)))
        np.testing.assert_array_equal(part, whole[:, 3:15, 5:14])
        np.testing.assert_array_equal(part_ok, ok[3:15, 5:14])

    @given(st.floats(0.3, 4), st.integers(0, 2), st.integers(0, 99))
    def test_validity_alone_is_that_of_the_values(self, ratio, erode, seed):
        rng = np.random.default_rng(seed)
        image, mask = rng.random((3, 30, 40)), rng.random((30, 40)) > 0.5
        image[rng.random(image.shape) > 0.9] = np.nan
        rows, cols = (_AxisMap(n, int(n / ratio) + 1, ratio, -0.3 * ratio) for n in (30, 40))
        reader = WindowReader(ValidPixels((None,) * 3, erode), rows, cols)
        target = ((0, rows.size), (0, cols.size))
        _, expected = reader(image, mask, target)
        np.testing.assert_array_equal(reader.valid(list(image), mask, target), expected)
        assert reader.is_identity == all(axis.is_identity for axis in (rows, cols))


class TestScene:
    def test_input_is_not_modified(self):
        imagery = cube((40, 50), times=2).chunk(y=20)
        before = imagery.copy(deep=True)
        read_scene(imagery, None, None)
        xr.testing.assert_identical(imagery, before)
        assert imagery.chunks == before.chunks

    def test_crs_among_the_data_variables_is_found(self):
        imagery = cube((40, 50)).reset_coords("spatial_ref")
        assert read_scene(imagery, None, None).grid.crs.to_epsg() == 32633

    def test_empty(self):
        with pytest.raises(ImageryError, match=r"at least one pixel.*'y': 0.*widen the selection"):
            read_scene(cube((40, 50)).isel(y=slice(0, 0)), None, None)

    def test_bands_on_different_grids(self):
        imagery = cube((40, 50))
        imagery["blue"] = imagery["blue"].rename(y="lat", x="lon").drop_vars("spatial_ref")
        with pytest.raises(ImageryError, match=r"red, green and blue on one grid"):
            read_scene(imagery, None, None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda v: v.astype("uint8"),
                r"valid as a boolean DataArray, found uint8 DataArray; compare",
            ),
            (lambda v: v.isel(y=slice(1, None)), r"valid on the imagery's own coordinates"),
            (lambda v: v.assign_coords(x=v.x + 0.1), r"valid on the imagery's own coordinates"),
            (lambda v: v.values, r"valid as a boolean DataArray, found ndarray of shape"),
            (
                lambda v: v.expand_dims(other=2),
                r"further dims \['other'\]; select or combine: valid.isel",
            ),
        ],
    )
    def test_masks_that_do_not_fit(self, change, message):
        imagery = cube((40, 50))
        with pytest.raises(ImageryError, match=message):
            read_scene(imagery, None, change(imagery["red"] > 9))
