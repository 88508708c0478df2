"""Areas on the ground, against geodesic polygons."""

import dask.array as da
import numpy as np
import pyproj
import pytest
import xarray as xr
from conftest import no_compute

from xchmv2.errors import CHMv2Error
from xchmv2.raster import cell_areas, cell_sides, find_grid, has_true_areas, label_quantity


def raster(y, x, crs=None, dims=("y", "x")):
    array = xr.DataArray(np.zeros((len(y), len(x)), "float32"), {dims[0]: y, dims[1]: x}, dims)
    return array if crs is None else array.odc.assign_crs(crs)


def axis(first, step, count):
    return first + step * np.arange(count)


def geodesic(crs, y, x, dy, dx, density=1):
    """Area of one cell by its own polygon, its edges split so that they follow the grid."""
    crs = pyproj.CRS(crs)
    side = np.linspace(-0.5, 0.5, density + 1)[:-1]
    xs = x + dx * np.concatenate([side, 0.5 + 0 * side, -side, -0.5 + 0 * side])
    ys = y + dy * np.concatenate([-0.5 + 0 * side, side, 0.5 + 0 * side, -side])
    transformer = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    lon, lat = transformer.transform(xs, ys)
    return abs(crs.get_geod().polygon_area_perimeter(lon, lat)[0])


GRIDS = {
    "utm": (32633, 5_300_000, -10, 400_000, 10),
    "utm far from its meridian": (32633, 100_000, -30, 830_000, 30),
    "web mercator": (3857, 8_399_737, -20, 1_000_000, 20),
    "web mercator south": (3857, -4_000_000, 20, -6_000_000, 20),
    "mercator": (3395, 4_700_000, -20, -46_000, 20),
    "lambert conformal": (2154, 6_600_000, -25, 700_000, 25),
    "equal area": (3035, 3_000_000, -25, 4_000_000, 25),
    "pole": (3413, 5_000, -100, -5_000, 100),
    "feet": (2263, 200_000, -60, 980_000, 60),
    "geographic": (4326, 59.9, -0.0003, 12.0, 0.0003),
    "sphere": ("+proj=sinu +R=6371007.181 +units=m +type=crs", 5_000_000, -463, 400_000, 463),
}


@pytest.mark.parametrize("name", GRIDS)
def test_areas_equal_geodesic_polygons(name):
    crs, top, dy, left, dx = GRIDS[name]
    y, x = axis(top, dy, 90), axis(left, dx, 110)
    areas = cell_areas(raster(y, x, crs))
    assert areas.attrs["units"] == "m2"
    for row in (0, 44, 89):
        for col in (0, 71, 109):
            expected = geodesic(crs, y[row], x[col], dy, dx, density=20)
            assert float(areas[row, col]) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_sides_equal_geodesic_lines(name):
    code, top, dy, left, dx = GRIDS[name]
    y, x = axis(top, dy, 30), axis(left, dx, 40)
    tall, wide = cell_sides(raster(y, x, code))
    crs = pyproj.CRS(code)
    transformer = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    for row, col in ((0, 0), (29, 39), (12, 5)):
        for side, (sy, sx) in ((tall, (dy / 2, 0)), (wide, (0, dx / 2))):
            lon, lat = transformer.transform([x[col] - sx, x[col] + sx], [y[row] - sy, y[row] + sy])
            length = crs.get_geod().line_length(lon, lat)
            assert float(side[row, col]) == pytest.approx(length, rel=2e-5)
    assert tall.attrs["units"] == wide.attrs["units"] == "m"


def test_sides_without_a_crs():
    tall, wide = cell_sides(raster(axis(100, -2, 4), axis(7, 3, 5)))
    assert (tall == 2).all()
    assert (wide == 3).all()
    assert "units" not in tall.attrs


def test_interpolation_over_a_wide_area():
    y, x = axis(6_000_000, -500, 900), axis(300_000, 500, 1000)  # 450 x 500 km
    areas = cell_areas(raster(y, x, 32633))
    rng = np.random.default_rng(0)
    for row, col in zip(rng.integers(0, 900, 40), rng.integers(0, 1000, 40), strict=True):
        expected = geodesic(32633, y[row], x[col], 500, 500, density=20)
        assert float(areas[row, col]) == pytest.approx(expected, rel=2e-6)


def test_web_mercator_at_60_north_is_a_quarter():
    to_mercator = pyproj.Transformer.from_crs(4326, 3857, always_xy=True)
    _, y = to_mercator.transform(0, 60)
    areas = cell_areas(raster(axis(y + 2, -1, 5), axis(0, 1, 5), 3857))
    assert float(areas[2, 2]) == pytest.approx(0.25, rel=0.005)  # an ellipsoid is not a sphere


def test_utm_is_nearly_one():
    areas = cell_areas(raster(axis(5e6, -1, 4), axis(500_000, 1, 4), 32633))
    np.testing.assert_allclose(areas, 1 / 0.9996**2, rtol=1e-6)


def test_the_whole_earth():
    y, x = axis(89.5, -1, 180), axis(-179.5, 1, 360)
    total = float(cell_areas(raster(y, x, 4326)).sum())
    assert total == pytest.approx(510_065_621.724e6, rel=1e-9)  # WGS 84


@pytest.mark.parametrize("crs", [32633, 4326, 3857])
def test_orientation_plays_no_part(crs):
    step = 0.001 if crs == 4326 else 10
    y, x = (
        axis(45.0 if crs == 4326 else 5e6, step, 30),
        axis(13.0 if crs == 4326 else 4e5, step, 20),
    )
    up = cell_areas(raster(y, x, crs))
    down = cell_areas(raster(y[::-1], x[::-1], crs))
    np.testing.assert_allclose(up, down[::-1, ::-1], rtol=1e-9)
    assert (up > 0).all()


def test_without_a_crs_areas_are_in_own_units():
    areas = cell_areas(raster(axis(100, -2, 4), axis(7, 3, 5)))
    np.testing.assert_array_equal(areas, np.full((4, 5), 6.0))
    assert "units" not in areas.attrs
    bare = xr.DataArray(np.zeros((3, 4)), dims=("y", "x"))
    np.testing.assert_array_equal(cell_areas(bare), np.ones((3, 4)))
    assert not has_true_areas(bare)
    assert has_true_areas(raster(axis(9, -1, 3), axis(0, 1, 3), 32633))


def test_own_units_may_be_metres():
    array = raster(axis(100, -2, 4), axis(7, 3, 5))
    for dim in "yx":
        array[dim].attrs["units"] = "m"
    assert cell_areas(array).attrs["units"] == "m2"


def test_a_single_row_borrows_its_spacing():
    np.testing.assert_array_equal(cell_areas(raster([5.0], axis(0, 2, 3))), [[4, 4, 4]])
    np.testing.assert_array_equal(cell_areas(raster([5.0], [6.0])), [[1]])


def test_grid_of_own_coordinates():
    grid = find_grid(raster(axis(100, -2, 4), axis(7, 3, 5)))
    assert grid.edges == (101.0, 5.5)
    assert grid.pixel == (-2.0, 3.0)


def test_lazy_like_the_array_and_over_its_spatial_dims():
    y, x = axis(5e6, -30, 50), axis(4e5, 30, 70)
    array = raster(y, x, 32633).expand_dims(time=3).transpose("x", "time", "y")
    with no_compute():
        lazy = cell_areas(array.chunk({"y": 17, "x": (5, 40, 25)}))
        again = cell_areas(array.chunk({"y": 17, "x": (5, 40, 25)}))
    assert lazy.dims == ("y", "x")
    assert lazy.chunks == ((17, 17, 16), (5, 40, 25))
    assert lazy.data.name == again.data.name
    xr.testing.assert_allclose(lazy, cell_areas(array), rtol=1e-12)
    assert lazy.odc.crs.epsg == 32633
    assert "time" not in lazy.coords


def test_irregular_coordinates_are_refused():
    with pytest.raises(CHMv2Error, match=r"in steps from 1 to 2; put it on one: imagery\.reindex"):
        cell_areas(raster([0.0, 1.0, 3.0], axis(0, 1, 3)))


def test_coordinates_outside_their_crs_are_refused():
    with pytest.raises(CHMv2Error, match=r"can place on the Earth, found .*; correct the CRS"):
        cell_areas(raster(axis(1e9, 1e7, 4), axis(5e8, 1e7, 4), 32633))
    with pytest.raises(CHMv2Error, match=r"at most 90 degrees, found y edges from 99\.5"):
        cell_areas(raster(axis(100.0, 1, 4), axis(0, 1, 4), 4326))


def test_a_derived_quantity_forgets_what_it_came_from():
    height = raster(axis(9, -1, 3), axis(0, 1, 3), 32633).rename("canopy_height")
    height.attrs |= {"standard_name": "canopy_height", "units": "m", "chmv2_model": "m"}
    height.encoding = {"dtype": "int16", "grid_mapping": "spatial_ref"}
    before = height.copy(deep=True)
    cover = label_quantity(height, "canopy_cover", {"units": "1", "long_name": "cover"})
    assert cover.name == "canopy_cover"
    assert cover.attrs == {"units": "1", "long_name": "cover", "grid_mapping": "spatial_ref"}
    assert list(cover.encoding) == ["_FillValue"]
    assert cover.odc.crs.epsg == 32633
    assert label_quantity(height > 1, "tall", {}).encoding == {}
    xr.testing.assert_identical(height, before)
    assert height.encoding == {"dtype": "int16", "grid_mapping": "spatial_ref"}
    assert height.name == "canopy_height"
    assert "grid_mapping" not in label_quantity(raster([0.0, 1], [0.0, 1]), "n", {}).attrs


def test_a_large_raster_is_no_burden():
    size = 100_000
    array = xr.DataArray(
        da.zeros((size, size), chunks=4096, dtype="float32"),
        {"y": axis(5e6, -1, size), "x": axis(4e5, 1, size)},
        ("y", "x"),
    ).odc.assign_crs(32633)
    areas = cell_areas(array)
    assert areas.shape == (size, size)
    corner = areas[-3:, -3:].values
    expected = geodesic(32633, 5e6 - size + 1, 4e5 + size - 1, 1, 1)
    assert corner[-1, -1] == pytest.approx(expected, rel=2e-6)
