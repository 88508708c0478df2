import json
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import dask
import mercantile
import numpy as np
import pyproj
import pytest
import rasterio
import rasterio.features
import rasterio.shutil
import rioxarray  # noqa: F401  (registers .rio)
import scipy.ndimage
import shapely
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from rasterio.io import MemoryFile
from webserver import serve

import xchmv2
from xchmv2.errors import CHMv2Error
from xchmv2.published import footprints, opening
from xchmv2.published import tile_reading as dates
from xchmv2.published import tiles as mirror
from xchmv2.published.footprints import _Footprints

# Private imports: caches are emptied, and the mirror is replaced.

SIZE = 256
#: Two neighbouring tiles in New Hampshire and what lies east of them.
WEST = mercantile.tile(-71.4, 44.06, 10)
EAST = mercantile.Tile(WEST.x + 1, WEST.y, 10)
HALF = 20037508.342789244


def rectangle(west, south, east, north):
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


def feature(geometry, date="2019-07-03"):
    return {"type": "Feature", "properties": {"acq_date": date}, "geometry": geometry}


def share(tile, west=0.0, south=0.0, east=1.0, north=1.0):
    """A rectangle inside a tile, in shares of its sides in longitude and latitude."""
    box = mercantile.bounds(tile)
    wide, high = box.east - box.west, box.north - box.south
    return rectangle(
        box.west + west * wide, box.south + south * high,
        box.west + east * wide, box.south + north * high,
    )  # fmt: skip


def write_footprints(root, tile, features, **more):
    collection = {"type": "FeatureCollection", "features": features, **more}
    path = root / "metadata" / f"{mercantile.quadkey(tile)}.geojson"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(collection))


def write_tile(root, tile, heights, mask=None, nodata=None, features="whole"):
    """One tile as published: a uint8 COG with an internal mask, and its footprints."""
    folder = root / "chm"
    folder.mkdir(exist_ok=True, parents=True)
    box = mercantile.xy_bounds(tile)
    rows, cols = heights.shape
    transform = rasterio.transform.from_bounds(*box, cols, rows)
    path = folder / f"{mercantile.quadkey(tile)}.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=rows, width=cols, count=1, dtype="uint8", crs="EPSG:3857",
            transform=transform, nodata=nodata,
        ) as file:  # fmt: skip
            file.write(heights.astype("uint8"), 1)
            if mask is not None:
                file.write_mask(mask)
        rasterio.shutil.copy(memory.name, path, driver="COG", compress="DEFLATE", blocksize=128)
    if features == "whole":
        features = [feature(share(tile))]
    if features is not None:
        write_footprints(root, tile, features)


def smooth(seed, size=SIZE):
    """Whole metres that change little from pixel to pixel."""
    noise = np.random.default_rng(seed).normal(size=(size, size))
    field = scipy.ndimage.gaussian_filter(noise, 6, mode="wrap")
    return np.round(20 + 8 * field / field.std()).clip(0, 60)


@pytest.fixture(scope="module")
def truth():
    """Heights of both tiles, NaN where masked: the western one has a hole in its mask."""
    west, east = smooth(1), smooth(2)
    west[:40, :50] = 0  # bare ground, which is not nodata
    joined = np.concatenate([west, east], axis=1)
    joined[60:90, 100:140] = np.nan
    return joined


@pytest.fixture(scope="module")
def folder(tmp_path_factory, truth):
    root = tmp_path_factory.mktemp("map")
    west, east = np.nan_to_num(truth[:, :SIZE]), truth[:, SIZE:]
    mask = np.where(np.isnan(truth[:, :SIZE]), 0, 255).astype("uint8")
    halves = [
        feature(share(EAST, east=0.5), "2018-06-01"),
        feature(share(EAST, west=0.5), "2020-02-29"),
    ]
    write_tile(root, WEST, west, mask)
    write_tile(root, EAST, east, np.full((SIZE, SIZE), 255, "uint8"), features=halves)
    return root


@pytest.fixture(scope="module")
def url(folder):
    with serve(folder) as address:
        yield address


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(mirror, "_PAUSE", 0.0)
    footprints._slot.cache_clear()


def bbox_of(tile, west=0.0, south=0.0, east=1.0, north=1.0):
    ring = share(tile, west, south, east, north)["coordinates"][0]
    return (*ring[0], *ring[2])


def across(share_of_tile=0.25):
    """A bbox across the border of the two tiles."""
    west = bbox_of(WEST)
    reach = share_of_tile * (west[2] - west[0])
    return (west[2] - reach, west[1] + 0.001, west[2] + reach, west[3] - 0.001)


def utm(pixel, size=60, row=SIZE / 2, col=SIZE):
    """A grid in UTM zone 19 around a place in ``truth``, by default the border of the tiles."""
    box, step = mercantile.xy_bounds(WEST), 2 * HALF / 1024 / SIZE
    to_utm = pyproj.Transformer.from_crs(3857, 32619, always_xy=True)
    x, y = to_utm.transform(box.left + col * step, box.top - row * step)
    affine = rasterio.Affine(pixel, 0, x - pixel * size / 2, 0, -pixel, y + pixel * size / 2)
    return GeoBox((size, size), affine, "EPSG:32619")


def positions(geobox, parts=1):
    """Rows and columns in ``truth`` of points in target pixels, by pyproj alone."""
    height, width = geobox.shape
    a = geobox.affine
    cols = (np.arange(width * parts) + 0.5) / parts
    rows = (np.arange(height * parts) + 0.5) / parts
    x, y = np.meshgrid(a.c + a.a * cols, a.f + a.e * rows)
    x, y = pyproj.Transformer.from_crs(geobox.crs.proj, 3857, always_xy=True).transform(x, y)
    box, pixel = mercantile.xy_bounds(WEST), 2 * HALF / 1024 / SIZE
    return (box.top - y) / pixel, (x - box.left) / pixel


# --- the map's own pixels


@pytest.mark.parametrize("kind", ["folder", "http", "file"])
def test_pixels_of_several_tiles_come_as_they_are(kind, folder, url, truth):
    base = {"folder": folder, "http": url, "file": folder.as_uri()}[kind]
    opened = xchmv2.open_published(across(), base_url=base)
    rows, cols = opened.sizes["y"], opened.sizes["x"]
    box, pixel = mercantile.xy_bounds(WEST), 2 * HALF / 1024 / SIZE
    top = round((box.top - opened.y.values[0]) / pixel - 0.5)
    left = round((opened.x.values[0] - box.left) / pixel - 0.5)
    assert left < SIZE < left + cols
    wanted = truth[top : top + rows, left : left + cols]
    np.testing.assert_array_equal(opened["canopy_height"].values[0], wanted)
    assert opened["canopy_height"].dtype == np.float32


def test_bbox_is_covered_by_no_more_pixels_than_needed(folder):
    west, south, east, north = across()
    x = xchmv2.open_published((west, south, east, north), base_url=folder)
    left, bottom, right, top = x["canopy_height"].odc.geobox.boundingbox
    project = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform
    (x0, x1), (y0, y1) = project([west, east], [south, north])
    pixel = 2 * HALF / 1024 / SIZE
    assert 0 <= x0 - left < pixel
    assert 0 <= right - x1 < pixel
    assert 0 <= y0 - bottom < pixel
    assert 0 <= top - y1 < pixel


def test_bare_ground_is_zero_and_masked_pixels_are_nan(folder, truth):
    heights = xchmv2.open_published(bbox_of(WEST), base_url=folder)["canopy_height"].values[0]
    assert heights.shape == (SIZE, SIZE)
    assert (heights[:40, :50] == 0).all()
    assert np.isnan(heights[60:90, 100:140]).all()
    assert np.isnan(heights).sum() == 30 * 40


def test_nodata_counts_besides_the_mask(tmp_path):
    heights = np.full((SIZE, SIZE), 7.0)
    heights[3, 4] = 255
    mask = np.full((SIZE, SIZE), 255, "uint8")
    mask[10, 11] = 0
    write_tile(tmp_path, WEST, heights, mask, nodata=255)
    found = xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)["canopy_height"].values[0]
    assert {tuple(at) for at in np.argwhere(np.isnan(found))} == {(3, 4), (10, 11)}


def test_what_was_never_imaged_is_nan_although_the_file_says_zero(tmp_path):
    write_tile(tmp_path, WEST, np.zeros((SIZE, SIZE)), features=[feature(share(WEST, east=0.25))])
    opened = xchmv2.open_published(bbox_of(WEST), base_url=tmp_path).isel(time=0).compute()
    heights = opened["canopy_height"].values
    assert (heights[:, : SIZE // 4] == 0).all()
    assert np.isnan(heights[:, SIZE // 4 :]).all()
    assert np.isnat(opened["acquisition_date"].values[:, SIZE // 4 :]).all()


def test_a_missing_tile_is_open_sea(folder, truth):
    shore = bbox_of(EAST)
    opened = xchmv2.open_published((shore[0], shore[1], shore[2] + 0.2, shore[3]), base_url=folder)
    heights = opened["canopy_height"].values[0]
    np.testing.assert_array_equal(heights[:, :SIZE], truth[:, SIZE:])
    assert heights.shape[1] > SIZE
    assert np.isnan(heights[:, SIZE:]).all()


def test_real_tile_size(tmp_path):
    """A tile of 32768 px, sparse, at the published address's layout."""
    (tmp_path / "chm").mkdir()
    path = tmp_path / "chm" / f"{mercantile.quadkey(WEST)}.tif"
    box = mercantile.xy_bounds(WEST)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
        path, "w", driver="GTiff", height=32768, width=32768, count=1, dtype="uint8", tiled=True,
        crs="EPSG:3857", transform=rasterio.transform.from_bounds(*box, 32768, 32768),
        blockxsize=512, blockysize=512, SPARSE_OK=True, compress="DEFLATE",
    ) as file:  # fmt: skip
        window = rasterio.windows.Window(1000, 2000, 512, 512)
        values = np.arange(512 * 512, dtype="uint32").reshape(512, 512) % 50
        file.write(values.astype("uint8"), 1, window=window)
        file.write_mask(np.full((512, 512), 255, "uint8"), window=window)
    pixel = (box.right - box.left) / 32768
    corners = [box.left + 1010.5 * pixel, box.left + 1310.5 * pixel], [
        box.top - 2320.5 * pixel, box.top - 2020.5 * pixel,
    ]  # fmt: skip
    (west, east), (south, north) = pyproj.Transformer.from_crs(
        3857, 4326, always_xy=True
    ).transform(*corners)
    found = xchmv2.open_published((west, south, east, north), base_url=tmp_path)["canopy_height"]
    assert found.odc.geobox.resolution.x == pytest.approx(1.194328566955)
    np.testing.assert_array_equal(found.values[0], values[20:321, 10:311])


# --- labels


def test_labelled_like_a_prediction(folder):
    from xchmv2.predict.prediction import _ATTRS

    opened = xchmv2.open_published(across(), base_url=folder)
    height = opened["canopy_height"]
    assert height.name == "canopy_height"
    assert height.dims == ("time", "y", "x")
    assert _ATTRS["height"].items() <= height.attrs.items()
    assert height.attrs["grid_mapping"] == "spatial_ref"
    assert np.isnan(height.encoding["_FillValue"])
    assert height.rio.crs.to_epsg() == 3857
    assert height.odc.geobox.crs.epsg == 3857
    assert not [name for name in height.attrs if name.startswith(("chmv2_", "xchmv2_"))]
    for attrs in (opened.attrs, height.attrs):
        assert "CC BY 4.0" in attrs["license"]
        assert "DINOv3 License" in attrs["license"]
        assert str(folder) in attrs["source"]
        assert "2603.06382" in attrs["references"]
    assert "whole metres" in height.attrs["comment"]
    assert "1.194 m" in height.attrs["comment"]
    assert opened["acquisition_date"].dtype == "datetime64[ns]"


def test_is_one_more_date_of_a_cube(folder):
    like = _prediction(utm(100))
    opened = xchmv2.open_published(like=like, base_url=folder)
    cube = xr.concat([opened["canopy_height"], like], "time", join="exact")
    assert cube.sizes == {"time": 2, "y": 60, "x": 60}
    assert cube.time.to_index().is_monotonic_increasing
    np.testing.assert_array_equal(cube[0], opened["canopy_height"][0])
    both = xr.concat([opened, like.to_dataset()], "time", join="exact", data_vars="all")
    assert np.isnat(both["acquisition_date"].values[1]).all()


def test_survives_a_plain_zarr_store(folder, tmp_path):
    opened = xchmv2.open_published(across(), base_url=folder, chunks=50)
    with no_compute():
        writing = opened.to_zarr(tmp_path / "a.zarr", compute=False, consolidated=False)
    writing.compute()
    again = xr.open_zarr(tmp_path / "a.zarr", consolidated=False)
    xr.testing.assert_equal(again.drop_vars("spatial_ref"), opened.drop_vars("spatial_ref"))
    assert again["canopy_height"].rio.crs.to_epsg() == 3857


def test_goes_into_a_store_that_resumes(folder, tmp_path):
    published = xchmv2.open_published(bbox_of(WEST, 0.4, 0.4, 0.6, 0.6), base_url=folder)
    for regions in (1, 0):
        done = published.chmv2.to_zarr(tmp_path / "map.zarr", encoding="int16_cm", progress=False)
        assert done.regions == regions
    found = xchmv2.open_zarr(tmp_path / "map.zarr")
    np.testing.assert_allclose(found.canopy_height, published.canopy_height, atol=1e-5)
    np.testing.assert_array_equal(found.acquisition_date, published.acquisition_date)


def _prediction(geobox, chunks=None):
    from odc.geo.xr import xr_coords

    coords = {**xr_coords(geobox), "time": [np.datetime64("2024-06-01", "ns")]}
    array = xr.DataArray(
        np.full((1, *geobox.shape), 9, "float32"), coords, ("time", "y", "x"), "canopy_height",
        {"grid_mapping": "spatial_ref"},
    )  # fmt: skip
    return array if chunks is None else array.chunk(chunks)


# --- dates


def test_dates_per_pixel(folder):
    opened = xchmv2.open_published((*across(1)[:3], across(1)[3]), base_url=folder)
    days = opened["acquisition_date"].values[0].astype("datetime64[D]").astype(str)
    assert set(np.unique(days)) == {"2019-07-03", "2018-06-01", "2020-02-29"}
    middle = SIZE + SIZE // 2
    assert (days[:, :SIZE] == "2019-07-03").all()
    assert (days[:, SIZE:middle] == "2018-06-01").all()
    assert (days[:, middle:] == "2020-02-29").all()


@pytest.mark.parametrize("order", [1, -1])
def test_later_date_wins_and_undated_footprints_are_imaged(tmp_path, order):
    whole, part = share(WEST), share(WEST, east=0.5)
    features = [
        feature(whole, None),
        feature(whole, 20210101),
        feature(part, "2018-01-05"),
        feature(part, "2019-01-05"),
    ]
    write_tile(tmp_path, WEST, np.full((SIZE, SIZE), 3), features=features[::order])
    opened = xchmv2.open_published(bbox_of(WEST), base_url=tmp_path).isel(time=0).compute()
    assert (opened["canopy_height"] == 3).all()
    days = opened["acquisition_date"].values
    assert (days[:, : SIZE // 2] == np.datetime64("2019-01-05")).all()
    assert np.isnat(days[:, SIZE // 2 :]).all()
    assert opened.time.values == np.datetime64("2019-01-05")


@pytest.mark.parametrize("features", [None, []])
def test_without_footprints_the_mask_alone_counts(tmp_path, features):
    write_tile(tmp_path, WEST, np.full((SIZE, SIZE), 3), features=features)
    opened = xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)
    assert (opened["canopy_height"] == 3).all()
    assert opened["acquisition_date"].isnull().all()
    assert opened.time.values == np.datetime64("2019-01-01")
    assert "no acquisition dates" in opened.time.attrs["long_name"]
    assert "time_coverage_start" not in opened.attrs


def test_footprints_in_a_named_crs_and_crossing_themselves(tmp_path):
    box = mercantile.xy_bounds(WEST)
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    bow = [[box.left, box.bottom], [box.right, box.top], [box.right, box.bottom],
           [box.left, box.top], [box.left, box.bottom]]  # fmt: skip
    write_tile(tmp_path, WEST, np.full((SIZE, SIZE), 3), features=None)
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}}
    bowtie = feature({"type": "Polygon", "coordinates": [bow]}, "2019-05-05T10:00:00Z")
    write_footprints(tmp_path, WEST, [bowtie, feature(None)], crs=crs)
    opened = xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)["canopy_height"][0].load()
    assert opened.sel(x=box.left + 2000, y=y, method="nearest") == 3
    assert opened.sel(x=box.right - 2000, y=y, method="nearest") == 3
    assert np.isnan(opened.sel(x=x, y=box.top - 2000, method="nearest"))
    assert opened.time.values == np.datetime64("2019-05-05")
    assert opened.notnull().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("named", [{"name": "EPSG:32619"}, {"code": 32619}, None, {"href": "?"}])
def test_footprints_in_another_crs(tmp_path, named):
    box = mercantile.xy_bounds(WEST)
    project = pyproj.Transformer.from_crs(3857, 32619, always_xy=True).transform
    ring = shapely.box(*box).exterior.segmentize(1000)
    ring = shapely.transform(ring, lambda points: np.column_stack(project(*points.T)))
    write_tile(tmp_path, WEST, np.full((SIZE, SIZE), 3), features=None)
    polygon = {"type": "Polygon", "coordinates": [[list(point) for point in ring.coords]]}
    crs = {} if named is None else {"crs": {"type": "name", "properties": named}}
    write_footprints(tmp_path, WEST, [feature(polygon, "2019-05-05T10:00:00Z")], **crs)
    if named is None or "href" in named:
        with pytest.raises(CHMv2Error, match=r"coordinates outside the CRS|neither a name nor"):
            xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)
        return
    opened = xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)["canopy_height"][0].load()
    assert opened.notnull().mean() == pytest.approx(1, abs=0.01)


def test_footprints_of_another_place(tmp_path):
    elsewhere = shapely.geometry.mapping(shapely.box(1, 2, 3, 4))
    write_tile(tmp_path, WEST, np.full((SIZE, SIZE), 3), features=None)
    write_footprints(tmp_path, WEST, [feature(elsewhere, "2019-05-05T10:00:00Z")])
    with pytest.raises(CHMv2Error, match=r"none that touches it.*\.set_crs\('EPSG:"):
        xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)


def test_time_is_the_median_by_area(folder):
    opened = xchmv2.open_published((*across(1)[:3], across(1)[3]), base_url=folder)
    assert opened.time.values == np.datetime64("2019-07-03")
    assert opened.attrs["time_coverage_start"] == "2018-06-01"
    assert opened.attrs["time_coverage_end"] == "2020-02-29"
    east = bbox_of(EAST, west=0.6)
    assert xchmv2.open_published(east, base_url=folder).time.values == np.datetime64("2020-02-29")


@pytest.mark.parametrize("time", ["2021-03-04", np.datetime64("2021-03-04"), "2021-03-04T02+02:00"])
def test_time_may_be_given_and_then_nothing_is_looked_up(url, time):
    before = len(url.requests)
    opened = xchmv2.open_published(across(), base_url=url, time=time)
    assert opened.time.values == [np.datetime64("2021-03-04", "ns")]
    assert not [path for _, path, _ in url.requests[before:] if "metadata" in path]


def burn(polygons, days, transform, shape):
    shapes = np.array(polygons, object)
    return _Footprints(shapes, np.array(days, "int32")).burn(transform, shape)


def star(rng, points):
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    reach = rng.uniform(5, 60, points)
    return np.c_[50 + reach * np.cos(angle), 50 + reach * np.sin(angle)]


@given(st.integers(0, 10_000), st.integers(3, 40))
def test_footprints_burn_as_gdal_burns_them_unclipped(seed, points):
    rng = np.random.default_rng(seed)
    polygon = shapely.Polygon(star(rng, points), [0.2 * star(rng, 5) + 40])
    transform = rasterio.transform.from_origin(7.3, 91.7, 1.1, 1.1)
    wanted = rasterio.features.rasterize([polygon], (70, 60), transform=transform).astype(bool)
    found, days = burn([polygon], [9], transform, (70, 60))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(days == 9, wanted)


def test_neighbours_leave_no_gap_and_share_no_pixel():
    """Also where pixel centres lie on the common edge."""
    west = [[0, 0], [5.5, 0], [5.5, 4], [7, 6], [3.5, 10], [0, 10]]
    east = [[5.5, 0], [10, 0], [10, 10], [3.5, 10], [7, 6], [5.5, 4]]
    transform = rasterio.transform.from_origin(0, 10, 1, 1)
    shapes = [shapely.Polygon(ring) for ring in (west, east)]
    assert burn(shapes, [1, 2], transform, (10, 10))[0].all()
    alone = [burn([shape], [1], transform, (10, 10))[0] for shape in shapes]
    assert (np.sum(alone, axis=0) == 1).all()


# --- other grids


@pytest.mark.parametrize("place", [{}, {"row": 62.3, "col": 101.7}])
def test_finer_grid_is_bilinear(folder, truth, place):
    geobox = utm(60, **place)
    found = xchmv2.open_published(geobox=geobox, base_url=folder)["canopy_height"]
    rows, cols = positions(geobox)
    valid = np.isfinite(truth)
    at = [rows - 0.5, cols - 0.5]
    weight = scipy.ndimage.map_coordinates(valid.astype(float), at, order=1)
    total = scipy.ndimage.map_coordinates(np.nan_to_num(truth), at, order=1)
    clear = np.abs(weight - 0.5) > 0.02
    wanted = np.where(weight >= 0.5, total / np.where(weight > 0, weight, 1), np.nan)
    np.testing.assert_allclose(found.values[0][clear], wanted[clear], atol=0.1)
    assert "bilinear" in found.attrs["comment"]


def test_coarser_grid_is_an_area_average(folder, truth):
    geobox = utm(700, size=14, row=100, col=170)
    found = xchmv2.open_published(geobox=geobox, base_url=folder)["canopy_height"].values[0]
    parts = 60
    rows, cols = (p.astype(int) for p in positions(geobox, parts))
    assert rows.min() >= 0
    assert rows.max() < SIZE
    assert cols.min() >= 0
    fine = truth[rows, cols].reshape(14, parts, 14, parts)
    share = np.isfinite(fine).mean(axis=(1, 3))
    assert ((share > 0) & (share < 1)).any()
    clear = np.abs(share - 0.5) > 0.05
    total = np.nansum(fine, axis=(1, 3)) / parts**2
    wanted = np.where(share >= 0.5, total / np.where(share > 0, share, 1), np.nan)
    np.testing.assert_allclose(found[clear], wanted[clear], atol=0.35)
    assert np.nanmean(np.abs(found - wanted)) < 0.08


@pytest.mark.parametrize("pixel", [40, 300])
def test_missing_pixels_do_not_bleed_in_as_zeros(tmp_path, pixel):
    rng = np.random.default_rng(5)
    mask = np.where(rng.random((SIZE, SIZE)) < 0.3, 0, 255).astype("uint8")
    write_tile(tmp_path, WEST, np.where(mask, 20, 0), mask)
    west = utm(pixel, 30, col=128)
    found = xchmv2.open_published(geobox=west, base_url=tmp_path)["canopy_height"].values
    assert np.isfinite(found).any()
    np.testing.assert_allclose(found[np.isfinite(found)], 20, rtol=1e-6)


def test_dates_on_another_grid_are_those_of_the_nearest_pixel(folder):
    geobox = utm(700, size=20, col=350)
    found = xchmv2.open_published(geobox=geobox, base_url=folder)["acquisition_date"].values[0]
    _, cols = positions(geobox)
    days = np.array(["2019-07-03", "2018-06-01", "2020-02-29", "NaT"], "datetime64[D]")
    middle = SIZE + SIZE / 2
    wanted = days[np.digitize(cols, [SIZE, middle, 2 * SIZE])]
    clear = (np.abs(cols - SIZE) > 0.05) & (np.abs(cols - middle) > 0.55)
    assert len(np.unique(wanted)) > 1
    np.testing.assert_array_equal(found[clear].astype("datetime64[D]"), wanted[clear])


@settings(max_examples=5)
@given(
    chunks=st.integers(4, 25), pixel=st.sampled_from([45.0, 400.0]), side=st.sampled_from([8, 64])
)
def test_same_pixels_for_any_chunks(folder, chunks, pixel, side):
    """Squares of the target much smaller than usual, so that there are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xchmv2.published.target._SIDE", side)
        geobox = utm(pixel, 20)
        whole = xchmv2.open_published(geobox=geobox, base_url=folder, chunks=50).compute()
        parts = xchmv2.open_published(geobox=geobox, base_url=folder, chunks=chunks).compute()
    xr.testing.assert_identical(parts, whole)


def test_cut_into_squares_makes_no_difference_to_speak_of(folder, monkeypatch):
    geobox = utm(45, 80)
    whole = xchmv2.open_published(geobox=geobox, base_url=folder).compute()
    monkeypatch.setattr("xchmv2.published.target._SIDE", 16)
    cut = xchmv2.open_published(geobox=geobox, base_url=folder).compute()
    np.testing.assert_allclose(cut["canopy_height"], whole["canopy_height"], atol=0.05)


def test_like_its_own_grid_gives_its_own_pixels(folder):
    opened = xchmv2.open_published(across(), base_url=folder, time="2019")
    part = opened.isel(y=slice(5, 60), x=slice(3, 50))
    again = xchmv2.open_published(like=part, base_url=folder, time="2019")
    xr.testing.assert_equal(again, part)
    assert "as published" in again["canopy_height"].attrs["comment"]


@pytest.mark.parametrize("as_dataset", [False, True])
def test_like_keeps_labels_and_chunks_and_is_not_modified(folder, as_dataset):
    like = _prediction(utm(100), {"y": 25, "x": 40}).rename(y="north", x="east")
    like = like.rename(spatial_ref="crs").assign_attrs(grid_mapping="crs")
    like = like.rename(north="y", east="x")
    table = xr.DataArray(np.zeros((2, 3)), dims=("date", "name"))
    like = xr.Dataset({"table": table, "height": like}) if as_dataset else like
    before = like.copy(deep=True)
    opened = xchmv2.open_published(like=like, base_url=folder)
    xr.testing.assert_identical(like, before)
    assert opened["canopy_height"].chunks == ((1,), (25, 25, 10), (40, 20))
    assert opened["canopy_height"].attrs["grid_mapping"] == "crs"
    assert "crs" in opened.coords
    assert opened.y.variable.identical(like.y.variable)
    assert opened.x.variable.identical(like.x.variable)


def test_like_a_cube_that_lies_south_up(folder):
    north = xchmv2.open_published(geobox=utm(100), base_url=folder)
    south = xchmv2.open_published(
        like=_prediction(utm(100)).isel(y=slice(None, None, -1)), base_url=folder
    )
    turned = south.isel(y=slice(None, None, -1))
    np.testing.assert_allclose(turned["canopy_height"], north["canopy_height"], atol=0.05)
    np.testing.assert_array_equal(turned["acquisition_date"], north["acquisition_date"])


def test_geographic_grids_work_too(folder, truth):
    west, south, east, north = across(0.1)
    geobox = GeoBox.from_bbox((west, south, east, north), "EPSG:4326", shape=(40, 20), tight=True)
    found = xchmv2.open_published(geobox=geobox, base_url=folder)["canopy_height"]
    assert found.dims == ("time", "latitude", "longitude")
    rows, cols = (p.astype(int) for p in positions(geobox, 40))
    fine = truth[rows, cols].reshape(40, 40, 20, 40).mean(axis=(1, 3))
    np.testing.assert_allclose(found.values[0], fine, atol=0.5)


# --- across 180 degrees


@pytest.fixture(scope="module")
def fiji(tmp_path_factory):
    root = tmp_path_factory.mktemp("fiji")
    row = mercantile.tile(179.9, -16.5, 10).y
    first, last = mercantile.Tile(1023, row, 10), mercantile.Tile(0, row, 10)
    heights = np.concatenate([smooth(7), smooth(8)], axis=1)
    write_tile(root, first, heights[:, :SIZE])
    write_tile(root, last, heights[:, SIZE:], features=[feature(share(last), "2020-05-05")])
    return root, first, heights


def test_bbox_across_180_degrees(fiji):
    root, first, heights = fiji
    _, south, _, north = bbox_of(first)
    opened = xchmv2.open_published((179.9, south, -179.9, north), base_url=root)
    found = opened["canopy_height"].values[0]
    half = found.shape[1] // 2
    np.testing.assert_array_equal(found, heights[:, SIZE - half : SIZE + half])
    assert (np.diff(opened.x) > 0).all()
    assert opened.x.max() > HALF
    longitude = pyproj.Transformer.from_crs(3857, 4326, always_xy=True).transform(
        opened.x, 0 * opened.x
    )
    assert longitude[0][0] > 179
    assert longitude[0][-1] < -179
    assert len(np.unique(opened["acquisition_date"])) == 2


def test_utm_cube_across_180_degrees(fiji):
    root, first, heights = fiji
    to_utm = pyproj.Transformer.from_crs(4326, 32760, always_xy=True)
    middle = mercantile.bounds(first)
    x, y = to_utm.transform(180.0, (middle.south + middle.north) / 2)
    geobox = GeoBox((50, 50), rasterio.Affine(90, 0, x - 2250, 0, -90, y + 2250), "EPSG:32760")
    found = xchmv2.open_published(geobox=geobox, base_url=root)["canopy_height"].values[0]
    xs, ys = np.meshgrid(
        x - 2250 + 90 * (np.arange(50) + 0.5), y + 2250 - 90 * (np.arange(50) + 0.5)
    )
    east, north = pyproj.Transformer.from_crs(32760, 3857, always_xy=True).transform(xs, ys)
    box, pixel = mercantile.xy_bounds(first), 2 * HALF / 1024 / SIZE
    rows, cols = (box.top - north) / pixel - 0.5, (east % (2 * HALF) - box.left) / pixel - 0.5
    wanted = scipy.ndimage.map_coordinates(heights, [rows, cols], order=1)
    np.testing.assert_allclose(found, wanted, atol=0.1)


# --- laziness


def test_opening_reads_no_heights(tmp_path):
    keys = [mercantile.quadkey(tile) for tile in (WEST, EAST)]
    noise = np.random.default_rng(0).integers(0, 60, (4 * SIZE, 4 * SIZE))
    for tile in (WEST, EAST):
        write_tile(tmp_path, tile, noise)
    with serve(tmp_path) as address:
        with no_compute():
            opened = xchmv2.open_published(across(), base_url=address)
        asked = [request for request in address.requests if request[0] == "GET"]
        header = next(asked.pop(n) for n, (_, path, _) in enumerate(asked) if "/chm/" in path)
        assert sorted(path for _, path, _ in asked) == [f"/metadata/{k}.geojson" for k in keys]
        assert header == ("GET", f"/chm/{keys[0]}.tif", "bytes=0-131071")
        before = len(address.requests)
        opened["acquisition_date"].compute()
        assert address.requests[before:] == []  # read for the median date already
        opened["canopy_height"].compute()
        assert len(address.requests) > before


def test_chunks_read_only_the_tiles_they_touch(url):
    opened = xchmv2.open_published(bbox_of(EAST, west=-0.5), base_url=url, chunks=64, time="2019")
    before = len(url.requests)
    opened["canopy_height"].isel(x=slice(-5, None), y=slice(0, 5)).compute()
    paths = {path for _, path, _ in url.requests[before:]}
    assert paths
    assert all(mercantile.quadkey(EAST) in path for path in paths)


def test_identical_calls_give_identical_graphs(folder):
    one, two = (xchmv2.open_published(across(), base_url=folder) for _ in range(2))
    for name in one:
        assert one[name].data.name == two[name].data.name
    other = xchmv2.open_published(across(0.2), base_url=folder)
    assert other["canopy_height"].data.name != one["canopy_height"].data.name


def test_travels_to_other_processes(folder):
    opened = xchmv2.open_published(geobox=utm(100), base_url=folder)
    again = pickle.loads(pickle.dumps(opened))
    xr.testing.assert_identical(again.compute(), opened.compute())
    assert len(pickle.dumps(opened)) < 100_000


def test_opening_needs_no_torch():
    code = "import sys, xchmv2; xchmv2.open_published; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what goes wrong


def test_no_network_is_an_error_with_the_url(unused_port):
    address = f"http://127.0.0.1:{unused_port}/map"
    with pytest.raises(
        CHMv2Error, match=rf"refused.* at {address}/chm/\d{{10}}\.tif; check the network"
    ):
        xchmv2.open_published(across(), base_url=address)


@pytest.fixture
def unused_port(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_port


def test_network_that_goes_away_is_an_error_and_never_nan(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 60, (4 * SIZE, 4 * SIZE))
    write_tile(tmp_path, EAST, noise)  # too large to be in memory once its header is
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "0")
    with serve(tmp_path) as address:
        opened = xchmv2.open_published(bbox_of(EAST), base_url=address, time="2019")
        name = f"{address}/chm/{mercantile.quadkey(EAST)}.tif"
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(CHMv2Error, match=f"the published map cannot be read: .* at {name}"):
        opened["canopy_height"].compute()
    with pytest.raises(CHMv2Error, match=rf"refused.* at {address}/metadata/\d{{10}}.geojson"):
        opened["acquisition_date"].compute()


def test_tile_that_vanishes_is_an_error_and_never_nan(tmp_path):
    write_tile(tmp_path, WEST, np.ones((SIZE, SIZE)))
    opened = xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)
    (tmp_path / "chm" / f"{mercantile.quadkey(WEST)}.tif").unlink()
    with pytest.raises(CHMv2Error, match=mercantile.quadkey(WEST)):
        opened["canopy_height"].compute()


@contextmanager
def answering(*statuses):
    """A server that answers with one status after the other, the last for ever."""
    left, asked = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [403, 500])
def test_refusal_is_not_taken_for_open_sea(status):
    refused = pytest.raises(CHMv2Error, match=rf"HTTP status {status}.* at http://.*/chm/\d+.tif")
    with answering(status) as (address, asked), refused:
        xchmv2.open_published(bbox_of(WEST), base_url=address)
    assert len(asked) == (1 if status == 403 else 3)


def test_a_hiccup_is_tried_again():
    with answering(503, 429, 200) as (address, asked):
        assert mirror.Mirror.at(address).exists(f"{address}/chm/x.tif")
        assert len(asked) == 3


def test_no_tile_at_all_is_an_error(folder, url):
    with pytest.raises(CHMv2Error, match=r"none of its \d+ tiles, such as http.*open sea"):
        xchmv2.open_published((-30, 30, -29.9, 30.1), base_url=url)


def test_footprints_that_are_none(tmp_path):
    write_tile(tmp_path, WEST, np.ones((SIZE, SIZE)))
    path = tmp_path / "metadata" / f"{mercantile.quadkey(WEST)}.geojson"
    for text in ('{"type": "Feature', "[]", '{"features": [{"geometry": {"type": "Knot"}}]}'):
        path.write_text(text)
        with pytest.raises(CHMv2Error, match=f"a GeoJSON of imagery footprints.*{path}"):
            xchmv2.open_published(bbox_of(WEST), base_url=tmp_path)


def test_files_with_another_layout_are_refused(tmp_path):
    write_tile(tmp_path, WEST, np.ones((SIZE, SIZE)))
    path = tmp_path / "chm" / f"{mercantile.quadkey(WEST)}.tif"
    path.rename(tmp_path / "chm" / f"{mercantile.quadkey(EAST)}.tif")
    with pytest.raises(CHMv2Error, match="fills its quadkey in EPSG:3857"):
        xchmv2.open_published(bbox_of(EAST), base_url=tmp_path)
    write_tile(tmp_path, EAST, np.ones((SIZE, SIZE)))
    write_tile(tmp_path, WEST, np.ones((SIZE // 2, SIZE // 2)))
    opened = xchmv2.open_published(across(), base_url=tmp_path)
    with pytest.raises(CHMv2Error, match=r"a tile of (128|256) x (128|256) px"):
        opened.compute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of bbox, like and geobox, found none of them"),
        ({"bbox": (0, 0, 1, 1), "geobox": utm(10)}, "found bbox and geobox"),
        ({"bbox": (0, 0, 1)}, r"bbox as \(west, .*\) in degrees.*found bbox=\(0, 0, 1\)"),
        ({"bbox": (0, 1, 1, 0)}, "south below north"),
        ({"bbox": (316000, 4884000, 317000, 4885000)}, "for other coordinates pass geobox="),
        ({"bbox": (0, 86, 1, 87)}, "within 85.05 degrees"),
        ({"bbox": (0, 0, float("nan"), 1)}, "bbox="),
        ({"bbox": (1, 0, 1, 1)}, "bbox="),
        ({"bbox": "abcd"}, "found bbox='abcd'"),
        ({"bbox": 5}, "found bbox=5"),
        ({"like": np.zeros((3, 3))}, "like= a DataArray, or a Dataset.*found a ndarray"),
        ({"like": xr.Dataset({"a": 1})}, r"found a Dataset of \['a'\]"),
        ({"like": xr.DataArray(np.zeros((3, 3)), dims=("y", "x"))}, "a cube with a CRS"),
        ({"geobox": "x"}, "a GeoBox with a CRS, along its axes"),
        ({"geobox": utm(10).rotate(10)}, "along its axes"),
        ({"geobox": GeoBox((2, 2), rasterio.Affine(1, 0, 0, 0, -1, 0), None)}, "with a CRS"),
        ({"bbox": across(), "chunks": 0}, "chunks as a whole number .* found chunks=0"),
        ({"bbox": across(), "time": "soon"}, "one date as time=, found 'soon'"),
        ({"bbox": across(), "time": np.datetime64("NaT")}, "one date as time="),
        ({"bbox": (-180, -80, 180, 80)}, r"at most 10000 tiles.*found \d{6}; open"),
        ({"geobox": utm(1e6, 2)}, "pixels of at most 4096 x 4096"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(folder, arguments, message):
    with pytest.raises(CHMv2Error, match=message):
        xchmv2.open_published(**arguments, base_url=folder)


def test_grid_off_the_earth(folder):
    nowhere = GeoBox((4, 4), rasterio.Affine(1, 0, 1e12, 0, -1, 1e12), "EPSG:32619")
    with pytest.raises(CHMv2Error, match="an area on the Earth between 85 degrees south and north"):
        xchmv2.open_published(geobox=nowhere, base_url=folder)


def test_address_that_makes_no_sense(tmp_path):
    with pytest.raises(CHMv2Error, match="chm/ and metadata/ in it, found no folder"):
        xchmv2.open_published(across(), base_url=tmp_path / "nothing")
    with pytest.raises(
        CHMv2Error, match=r"http\(s\):// or s3:// address, found base_url='ftp://x'"
    ):
        xchmv2.open_published(across(), base_url="ftp://x/")


def test_buckets_are_read_over_https():
    assert mirror.Mirror.at("s3://bucket/a/b/").base == "https://bucket.s3.amazonaws.com/a/b"
    public = "s3://dataforgood-fb-data/forests/v2/global/dinov3_global_chm_v2_ml3"
    assert mirror.Mirror.at(public).base == mirror.PUBLISHED_MAP


def test_median_date_of_a_large_area_is_not_looked_up_unasked(folder, monkeypatch):
    monkeypatch.setattr(dates, "_MOST_TILES", 1)
    with pytest.raises(CHMv2Error, match=r"at most 1 tiles.*found 2; give a date: .*time="):
        xchmv2.open_published(across(), base_url=folder)
    assert xchmv2.open_published(across(), base_url=folder, time="2019").sizes["time"] == 1


def test_footprints_are_read_once_per_process(url):
    before = len(url.requests)
    opened = xchmv2.open_published(across(), base_url=url, chunks=20)
    with dask.config.set(scheduler="threads", num_workers=8):
        opened.compute()
    paths = [path for _, path, _ in url.requests[before:] if "metadata" in path]
    assert len(paths) == len(set(paths)) == 2


def test_default_is_the_public_map():
    import inspect

    default = inspect.signature(opening.open_published).parameters["base_url"].default
    assert default == mirror.PUBLISHED_MAP
    assert default.startswith("https://")
