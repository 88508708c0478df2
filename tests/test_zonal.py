"""Zonal statistics, against shapely's exact areas, supersampling and simulated errors."""

import json
import subprocess
import sys

import geopandas as gpd
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import rioxarray
import shapely
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from reference import follow
from scipy import ndimage

from xchmv2.change import correlation_length, difference
from xchmv2.errors import CHMv2Error
from xchmv2.raster import cell_areas
from xchmv2.structure import canopy_cover
from xchmv2.zonal import coverage, effective_samples, to_table, zonal, zone_statistics
from xchmv2.zonal import polygons as pieces_module

# Private imports: squares and batches are made small, so that polygons are cut and spread.

CRS = 32633
LEFT, TOP = 500_000.0, 5_300_000.0


def raster(shape=(30, 40), *, times=None, pixel=1.0, crs=CRS, seed=0, low=0.0, high=40.0):
    rng = np.random.default_rng(seed)
    full = shape if times is None else (times, *shape)
    coords = {
        "y": TOP - (np.arange(shape[0]) + 0.5) * pixel,
        "x": LEFT + (np.arange(shape[1]) + 0.5) * pixel,
    }
    dims = ("y", "x") if times is None else ("time", "y", "x")
    if times is not None:
        coords["time"] = pd.date_range("2020-07-01", periods=times, freq="365D")
    values = rng.uniform(low, high, full).astype(np.float32)
    array = xr.DataArray(values, coords, dims, name="canopy_height")
    array.attrs.update(standard_name="canopy_height", long_name="canopy height", units="m")
    return array if crs is None else array.odc.assign_crs(crs)


def place(*points):
    """A polygon from (column, row) corners, in metres from the raster's upper left corner."""
    return shapely.Polygon([(LEFT + x, TOP - y) for x, y in points])


def circle(x, y, radius):
    return shapely.Point(LEFT + x, TOP - y).buffer(radius)


def supersample(array, polygon, factor=40):
    """Share of each pixel inside, by counting points."""
    rows, cols = array.shape
    step = abs(float(array.x[1] - array.x[0]))
    xs = LEFT + (np.arange(cols * factor) + 0.5) * step / factor
    ys = TOP - (np.arange(rows * factor) + 0.5) * step / factor
    inside = shapely.contains_xy(polygon, *np.meshgrid(xs, ys))
    return inside.reshape(rows, factor, cols, factor).mean(axis=(1, 3))


HOLED = shapely.difference(
    place((2.3, 3.1), (25.7, 4.4), (21.2, 24.9), (5.5, 20.2)), circle(14, 12, 4.3)
)
SHAPES = {
    "tilted": place((3.3, 2.7), (17.9, 5.2), (12.4, 19.6)),
    "with a hole": HOLED,
    "in two parts": shapely.union_all([circle(8, 8, 3.7), circle(30.2, 20.1, 5.5)]),
    "a sliver": place((5.1, 5.2), (35.3, 5.25), (35.3, 5.3), (5.1, 5.28)),
    "inside a pixel": place((7.2, 7.2), (7.6, 7.2), (7.6, 7.5), (7.2, 7.5)),
    "half outside": place((30.4, 20.3), (55.2, 21.1), (50.3, 44.4), (31.7, 40.2)),
}


class TestCoverage:
    @pytest.mark.parametrize("name", SHAPES)
    def test_area_is_shapely_s(self, name):
        # Without a CRS the area of a pixel is exactly 1.
        height = raster(crs=None)
        polygon = SHAPES[name]
        inside = polygon.intersection(shapely.box(LEFT, TOP - 30, LEFT + 40, TOP))
        found = zonal(height, polygon)
        assert found["area"].item() == pytest.approx(inside.area, rel=1e-7)
        assert found["count"].item() == pytest.approx(inside.area, rel=1e-7)
        share = inside.area / polygon.area
        assert found["valid_fraction"].item() == pytest.approx(share, rel=1e-7)

    @pytest.mark.parametrize("name", ["tilted", "with a hole", "in two parts", "half outside"])
    def test_statistics_by_supersampling(self, name):
        height = raster(crs=None)
        weight = supersample(height, SHAPES[name])
        found = zonal(height, SHAPES[name])
        mean = np.average(height, weights=weight)
        std = np.sqrt(np.average((height - mean) ** 2, weights=weight))
        assert found["mean"].item() == pytest.approx(mean, abs=0.01)
        assert found["std"].item() == pytest.approx(std, abs=0.02)
        under = height.values[weight > 0.01]
        assert found["min"].item() <= under.min()
        assert found["max"].item() >= under.max()

    def test_a_whole_raster_is_numpy_s(self):
        height = raster(crs=None)
        found = zonal(height, shapely.box(LEFT, TOP - 30, LEFT + 40, TOP))
        values = height.values.astype(float)
        for name in ("mean", "std", "min", "max"):
            assert found[name].item() == pytest.approx(getattr(values, name)(), rel=1e-9)

    def test_percentiles_are_numpy_s(self):
        height = raster(crs=None)
        weight = supersample(height, SHAPES["tilted"], factor=1)  # whole pixels
        whole = shapely.union_all(
            [
                shapely.box(LEFT + c, TOP - r - 1, LEFT + c + 1, TOP - r)
                for r, c in np.argwhere(weight > 0)
            ]
        )
        found = zonal(height, whole, stats=("median", "p5", "p95", "p99.9", "p0", "p100"))
        values = height.values[weight > 0]
        for name, q in {
            "median": 0.5,
            "p5": 0.05,
            "p95": 0.95,
            "p99.9": 0.999,
            "p0": 0,
            "p100": 1,
        }.items():
            expected = np.quantile(values, q, method="inverted_cdf")
            assert found[name].item() == expected

    def test_weighted_percentile(self):
        height = raster(crs=None)
        polygon = SHAPES["with a hole"]
        weight = supersample(height, polygon).ravel()
        found = zonal(height, polygon, stats="p90")["p90"].item()
        below = weight[height.values.ravel() <= found].sum() / weight.sum()
        assert below == pytest.approx(0.9, abs=0.01)

    @pytest.mark.parametrize("crs", [3857, 4326, 32633])
    def test_areas_are_true_on_the_ground(self, crs):
        lon, lat = 15.0, 60.0
        area = gpd.GeoSeries([shapely.box(lon, lat, lon + 0.001, lat + 0.0005)], crs=4326)
        left, bottom, right, top = area.to_crs(crs).total_bounds
        step = (right - left) / 80
        shape = (int((top - bottom) / step) + 20, 100)
        coords = {
            "y": top + 10 * step - (np.arange(shape[0]) + 0.5) * step,
            "x": left - 10 * step + (np.arange(shape[1]) + 0.5) * step,
        }
        height = xr.DataArray(np.ones(shape, np.float32), coords, ("y", "x")).odc.assign_crs(crs)
        found = zonal(height, area)
        exact = abs(area.crs.get_geod().geometry_area_perimeter(area.iloc[0])[0])
        # The polygon's edges are straight in the raster's CRS, not geodesics.
        assert found["area"].item() == pytest.approx(exact, rel=2e-4)
        assert found["area"].attrs["units"] == "m2"
        assert found["mean"].item() == pytest.approx(1)

    def test_missing_heights(self):
        height = raster(crs=None)
        height = height.where(height.x > LEFT + 10)
        found = zonal(height, [circle(10, 15, 6), circle(4, 4, 3)], stats=None)
        assert found["valid_fraction"][0].item() == pytest.approx(0.5, abs=1e-6)
        assert found["mean"].isnull().values.tolist() == [False, True]
        assert found["area"].values[1] == 0
        assert found["valid_fraction"].values[1] == 0

    @pytest.mark.parametrize(
        "turn",
        [
            lambda h: h[..., ::-1, :],
            lambda h: h[..., ::-1],
            lambda h: h.transpose("x", "time", "y"),
            lambda h: h.rename(y="latitude", x="longitude"),
        ],
    )
    def test_any_way_up(self, turn):
        height = raster(times=2)
        shapes = list(SHAPES.values())
        expected, found = (zonal(h, shapes, stats=("mean", "p90")) for h in (height, turn(height)))
        for name in expected.data_vars:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)


class TestLazy:
    @settings(max_examples=25)
    @given(
        rows=st.integers(3, 40),
        cols=st.integers(3, 40),
        dates=st.integers(1, 3),
        tile=st.integers(5, 50),
    )
    def test_same_for_any_chunking(self, rows, cols, dates, tile):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces_module, "TILE", tile)
            change = raster(times=3, low=-10, high=10).rename("height_change")
            change = change.where(change > -9.5)
            options = {"stats": ("mean", "std", "min", "max", "p90", "loss_area", "gain_volume")}
            options |= {"sigma": 2.0, "correlation_length": 3.0}
            expected = zonal(change, list(SHAPES.values()), **options)
            chunked = change.chunk(time=dates, y=rows, x=cols)
            xr.testing.assert_identical(
                zonal(chunked, list(SHAPES.values()), **options).compute(), expected
            )

    @settings(max_examples=10)
    @given(tile=st.integers(3, 60), batch=st.integers(1, 2000))
    def test_pieces_do_not_matter(self, tile, batch):
        change = raster(low=-10, high=10).rename("height_change")
        stats = ("mean", "std", "min", "max", "count", "area", "p90", "loss_area", "net_volume")
        expected = zonal(change, list(SHAPES.values()), stats=stats)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces_module, "TILE", tile)
            patch.setattr(zone_statistics, "_BATCH", batch)
            found = zonal(change, list(SHAPES.values()), stats=stats)
        for name in stats:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-12)

    def test_nothing_is_computed(self):
        change = raster(times=2, low=-9, high=9).rename("height_change").chunk(y=7, x=9, time=1)
        before = change.copy(deep=True)
        with no_compute():
            found = zonal(change, list(SHAPES.values()), sigma=2.0)
        assert all(variable.chunks is not None for variable in found.data_vars.values())
        xr.testing.assert_identical(change, before)
        again = zonal(change, list(SHAPES.values()), sigma=2.0)
        assert found["mean"].data.name == again["mean"].data.name
        expected = zonal(change.compute(), list(SHAPES.values()), sigma=2.0)
        xr.testing.assert_allclose(found.compute(), expected, rtol=1e-9)

    def test_only_chunks_under_polygons_are_read_and_each_once(self):
        read = []

        def note(block, block_info=None):
            read.append(block_info[None]["chunk-location"])
            return block

        height = raster((60, 60)).chunk(y=10, x=10)
        height = height.copy(
            data=height.data.map_blocks(note, dtype="float32", meta=np.empty((0, 0), "f4"))
        )
        shapes = [circle(5, 5, 3), circle(4, 6, 3), circle(6, 4, 2), circle(45, 45, 8)]
        zonal(height, shapes).compute()
        assert sorted(read) == [(0, 0)] + [(r, c) for r in (3, 4, 5) for c in (3, 4, 5)]

    def test_tasks_are_by_chunk_and_not_by_polygon(self):
        rng = np.random.default_rng(0)
        shapes = [circle(*at, 2) for at in rng.uniform(3, 77, (2000, 2))]
        found = zonal(raster((80, 80)).chunk(y=40, x=40), shapes, stats="mean")
        sums = {key for key in found.__dask_graph__() if "zonal-sums" in str(key)}
        assert len(sums) == 9  # four chunks, four sides between them and a corner

    def test_polygon_over_many_squares(self):
        height = raster((2300, 2100), crs=None)
        polygon = circle(1100, 1050, 1000)
        found = zonal(height.chunk(y=512, x=700), polygon).compute()
        assert found["area"].item() == pytest.approx(polygon.area, rel=1e-9)
        assert found["mean"].item() == pytest.approx(20, abs=0.1)


class TestResult:
    def test_labels(self):
        height = raster(times=2)
        frame = gpd.GeoDataFrame(
            {"name": ["a", "b"], "mean": [1, 2]},
            geometry=[circle(8, 8, 3), circle(20, 20, 5)],
            crs=CRS,
            index=pd.Index([7, 9], name="stand"),
        )
        found = zonal(height, frame.to_crs(4326))
        assert found["mean"].dims == ("time", "geometry")
        assert found["mean"].attrs == {"long_name": "mean canopy height", "units": "m"}
        assert "standard_name" not in found["mean"].attrs
        assert found["stand"].values.tolist() == [7, 9]
        assert found["name"].values.tolist() == ["a", "b"]
        assert found["polygon_mean"].values.tolist() == [1, 2]
        assert "spatial_ref" not in found.coords
        assert found.xindexes["geometry"].crs.to_epsg() == 4326
        np.testing.assert_allclose(found["area"][0], frame.area, rtol=2e-3)
        plain = zonal(height, frame.geometry)
        np.testing.assert_allclose(found["mean"], plain["mean"], rtol=1e-5)

    def test_table(self):
        height = raster(times=2)
        shapes = [circle(8, 8, 3), circle(20, 20, 5), circle(8, 8, 3)]
        found = zonal(height, gpd.GeoSeries(shapes, crs=CRS))
        table = to_table(found)
        assert isinstance(table, gpd.GeoDataFrame)
        assert table.crs.to_epsg() == CRS
        assert len(table) == 6
        assert list(table.columns[:3]) == ["time", "polygon", "mean"]
        for k, row in table.iterrows():
            assert row["mean"] == found["mean"].values.ravel()[k]
            assert row.geometry.equals(shapes[k % 3])
        assert len(to_table(zonal(height[0], shapes))) == 3
        assert len(found.to_dataframe()) == 6

    def test_columns_of_any_name(self):
        names = {"time": [1, 2], "shape": ["a", "b"], "y": [5, 6], "mean": [7, 8]}
        squares = [place((0, 0), (9, 0), (9, 9)), place((9, 9), (20, 9), (20, 20))]
        frame = gpd.GeoDataFrame(names, geometry=squares, crs=CRS)
        height = raster(times=2).drop_vars("time")
        table = to_table(zonal(height, frame, stats="mean"))
        assert list(table["time"]) == [0, 0, 1, 1]
        assert list(table["polygon_time"]) == [1, 2, 1, 2]
        assert list(table["shape"]) == ["a", "b", "a", "b"]
        assert list(table["polygon_mean"]) == [7, 8, 7, 8]
        assert table.geometry.iloc[2].equals(squares[0])

    def test_nodata_of_a_file_is_missing(self):
        height = raster(crs=None)
        filled = height.where(height > 5, -9999).assign_attrs(_FillValue=-9999.0)
        expected = zonal(height.where(height > 5), SHAPES["tilted"])
        xr.testing.assert_allclose(zonal(filled, SHAPES["tilted"]), expected)

    def test_outside_is_nan_and_said(self):
        shapes = gpd.GeoSeries([circle(8, 8, 3), circle(900, 8, 3), None], index=list("abc"))
        with pytest.warns(UserWarning, match=r"2 of 3 polygons \(b, c\) are empty or outside"):
            found = zonal(raster(crs=None), shapes)
        assert found["mean"].isnull().values.tolist() == [False, True, True]
        assert found["count"].isnull().values.tolist() == [False, True, True]

    def test_polygons_that_reach_around_the_world(self):
        height = raster()
        world = gpd.GeoSeries([shapely.box(-180, -90, 180, 90)], crs=4326)
        for crs in (CRS, 3857):
            placed = height.odc.reproject(f"EPSG:{crs}")
            found = zonal(placed, world)
            assert found["count"] == placed.notnull().sum()
            assert found["mean"].item() == pytest.approx(float(placed.mean()), abs=1e-3)

    def test_long_sides_are_straight_in_their_own_crs(self):
        """A parallel of two degrees bends by 0.5 km in UTM; a strip along it is 1 km wide."""
        coords = {"y": 5.4e6 - 200.0 * np.arange(500), "x": 400e3 + 200.0 * np.arange(1000)}
        northing = np.broadcast_to(coords["y"][:, None], (500, 1000))
        height = xr.DataArray(northing, coords, ("y", "x")).odc.assign_crs(CRS)
        strip = gpd.GeoSeries([shapely.box(14, 48.2, 16, 48.21)], crs=4326)
        found = zonal(height, strip, stats="mean")["mean"].item()
        lon, lat = np.meshgrid(np.linspace(14, 16, 2001), np.linspace(48.2, 48.21, 11))
        points = gpd.GeoSeries(gpd.points_from_xy(lon.ravel(), lat.ravel()), crs=4326)
        assert found == pytest.approx(points.to_crs(CRS).y.mean(), abs=5)

    def test_touching_is_outside(self):
        beside = shapely.box(LEFT - 10, TOP - 20, LEFT, TOP)
        with pytest.warns(UserWarning, match=r"1 of 1 polygons \(0\)"):
            assert np.isnan(zonal(raster(crs=None), beside)["mean"].item())

    def test_crossed_polygons_are_repaired_and_said(self):
        bow = place((2, 2), (12, 12), (12, 2), (2, 12))
        with pytest.warns(
            UserWarning, match=r"1 of 1 polygons \(0\) are invalid \(Self-int.*areas"
        ):
            found = zonal(raster(crs=None), bow)
        assert found["area"].item() == pytest.approx(50)


class TestLongitudes:
    """Rasters and polygons on both sides of 180 degrees."""

    BESIDE = staticmethod(lambda west, east: shapely.box(west, -17.002, east, -17.001))

    def raster(self, crs):
        lon, lat = (-180.0 if crs == "west" else 180.0), -17.0
        if crs in (32701, 32760):
            left, top = gpd.GeoSeries.from_xy([180], [lat], crs=4326).to_crs(crs).iloc[0].coords[0]
            step = 2.0
        else:
            left, top, step, crs = lon, lat, 2e-5, 4326
        y = top - step * np.arange(200)
        x = left + step * (np.arange(300) - 150)
        data = np.broadcast_to(np.arange(300.0), (200, 300))
        return xr.DataArray(data, {"y": y, "x": x}, ("y", "x")).odc.assign_crs(crs)

    @pytest.mark.parametrize("crs", ["west", "east", 32701, 32760])
    @pytest.mark.parametrize("form", ["joined", "two parts", "on from 180", "projected"])
    def test_one_polygon_in_every_form(self, crs, form):
        height = self.raster(crs)
        whole = self.BESIDE(179.999, 180.002)
        shape = {
            "joined": shapely.Polygon(
                [(179.999, -17.002), (-179.998, -17.002), (-179.998, -17.001), (179.999, -17.001)]
            ),
            "two parts": shapely.union_all(
                [self.BESIDE(179.999, 180), self.BESIDE(-180, -179.998)]
            ),
        }.get(form, whole)
        polygons = gpd.GeoSeries([shape], crs=4326)
        if form == "projected":
            polygons = gpd.GeoSeries([whole], crs=4326).to_crs(32760)
        if form == "joined":
            with pytest.warns(UserWarning, match=r"1 of 1 polygons \(0\) have sides of more"):
                found = zonal(height, polygons)
        else:
            found = zonal(height, polygons)
        assert found["valid_fraction"].item() == pytest.approx(1, abs=1e-6)
        exact = abs(polygons.crs.get_geod().geometry_area_perimeter(whole)[0])
        assert found["area"].item() == pytest.approx(exact, rel=2e-3)
        middle = 150 + 0.0005 / 2e-5 if crs in ("west", "east") else 150 + 53.2 / 2
        assert found["mean"].item() == pytest.approx(middle, abs=1.5)

    def test_longitudes_from_0_to_360(self):
        height = self.raster("east").assign_coords(x=lambda h: h.x + 120)  # about 300 degrees
        there = self.BESIDE(299.999, 300.001)
        here = self.BESIDE(-60.001, -59.999)
        for one in (there, here):
            assert zonal(height, one)["valid_fraction"].item() == pytest.approx(1, abs=1e-6)

    def test_a_hole_goes_along(self):
        ring = [(179.998, -17.003), (-179.998, -17.003), (-179.998, -17.001), (179.998, -17.001)]
        hole = [(179.9995, -17.0025), (-179.9995, -17.0025), (-179.9995, -17.0015)]
        polygon = gpd.GeoSeries([shapely.Polygon(ring, [hole])], crs=4326)
        with pytest.warns(UserWarning, match="taken to cross 180 degrees"):
            found = zonal(self.raster("east"), polygon)
        assert found["count"].item() == pytest.approx((0.004 * 0.002 - 0.001**2 / 2) / 4e-10)

    def test_a_world_of_two_halves(self):
        step = 1.0
        height = xr.DataArray(
            np.ones((180, 360)),
            {"y": 89.5 - step * np.arange(180), "x": -179.5 + step * np.arange(360)},
            ("y", "x"),
        ).odc.assign_crs(4326)
        found = zonal(height, [self.BESIDE(170, 190), shapely.box(-180, -90, 180, 90)])
        np.testing.assert_allclose(found["count"], [20 * 0.001, 360 * 180])


class TestCover:
    @pytest.mark.parametrize("chunks", [None, {"y": 7, "x": 11, "time": 1}])
    def test_share_of_pixels(self, chunks):
        height = raster(times=2)
        height = height.where(height < 35)
        weight = supersample(height[0], SHAPES["tilted"])
        read = height if chunks is None else height.chunk(chunks)
        found = zonal(read, SHAPES["tilted"], stats=("cover", "mean"), threshold=12.0).compute()
        for date in range(2):
            valid = height[date].notnull()
            expected = (weight * (height[date] >= 12)).sum() / (weight * valid).sum()
            assert found["cover"][date, 0].item() == pytest.approx(expected.item(), abs=0.005)
        assert found["cover"].attrs == {
            "long_name": "share of the ground under canopy of 12 m or more",
            "units": "1",
        }

    def test_is_that_of_cells(self):
        height = raster().round()
        window = shapely.box(LEFT, TOP - 30, LEFT + 40, TOP)
        expected = float(canopy_cover(height, cell=None))
        assert zonal(height, window, stats="cover")["cover"].item() == pytest.approx(expected)
        gone = height.where(height < -1)
        assert np.isnan(zonal(gone, window, stats="cover")["cover"].item())

    @pytest.mark.parametrize("smooth", [0.0, 2.0])
    def test_standard_error_is_the_spread_of_repeated_measurements(self, smooth):
        rng = np.random.default_rng(1)
        truth = 25 + 50 * ndimage.gaussian_filter(rng.normal(size=(160, 160)), 4)
        coords = {"y": TOP - np.arange(160.0), "x": LEFT + np.arange(160.0)}
        discs = [circle(x, y, 25) for x in (40, 110) for y in (40, 110)]
        rows = []
        for seed in range(40):
            noise = np.random.default_rng(seed + 10).normal(size=truth.shape)
            noise = ndimage.gaussian_filter(noise, smooth, mode="wrap") if smooth else noise
            noisy = truth + noise / noise.std() * 2
            layers = xr.Dataset(
                {
                    "canopy_height": (("y", "x"), noisy, {"units": "m"}),
                    "bin_spread": (("y", "x"), np.full(truth.shape, 2.0)),
                },
                coords,
            )
            length = 2 * smooth if smooth else 0.0  # the integral of the autocorrelation
            options = {"sigma": "bin_spread", "correlation_length": length}
            rows.append(zonal(layers, discs, stats="cover", threshold=25.0, **options))
        runs = xr.concat(rows, "run", coords="minimal", compat="override")
        stated = np.sqrt((runs["cover_se"] ** 2).mean())
        seen = np.sqrt(runs["cover"].var("run", ddof=1).mean())
        assert 0.8 < float(stated / seen) < 1.6


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("step", [1, 3])
def test_weights_of_a_polygon_of_several_pieces(name, step, monkeypatch):
    """Standard errors need the shape of a polygon: its weights on coarse cells."""
    monkeypatch.setattr(pieces_module, "TILE", 7)
    flat = shapely.transform(SHAPES[name], lambda xy: xy - (LEFT, TOP))
    pieces = pieces_module.cut_pieces(np.array([flat]), (30, 40))
    spans = (0, 30), (0, 40)
    covered = coverage.measure_coverage(pieces, spans)
    steps = np.full(len(pieces), step)
    found = coverage.join_weights(
        coverage.weigh_pieces(covered, covered.share, pieces, spans, steps)
    )
    full = np.zeros(30 * 40)
    np.add.at(full, covered.cell, covered.share)
    full = np.pad(full.reshape(30, 40), ((0, 0), (0, -40 % step)))
    coarse = full.reshape(30 // step, step, -1, step).sum(axis=(1, 3))
    (row, col), shape = found.corner, found.grid.shape
    np.testing.assert_allclose(found.grid, coarse[row : row + shape[0], col : col + shape[1]])
    assert found.grid.sum() == pytest.approx(coarse.sum())


class TestChange:
    def test_loss_and_gain_by_hand(self):
        values = np.zeros((4, 5), np.float32)
        values[0] = [-10, -4, 6, 20, np.nan]
        change = xr.DataArray(values, dims=("y", "x"), name="height_change")
        change = change.assign_coords(y=[35.0, 25.0, 15.0, 5.0], x=[5.0, 15.0, 25.0, 35.0, 45.0])
        found = zonal(change, shapely.box(5, 0, 50, 40))
        # Pixels of 100; the polygon covers half of the first column.
        assert found["loss_area"].item() == pytest.approx(50 / 1e4)
        assert found["gain_area"].item() == pytest.approx(200 / 1e4)
        assert found["net_area"].item() == pytest.approx(150 / 1e4)
        assert found["loss_volume"].item() == pytest.approx(500)
        assert found["gain_volume"].item() == pytest.approx(2600)
        assert found["net_volume"].item() == pytest.approx(-500 - 400 + 600 + 2000)
        wide = zonal(change, shapely.box(5, 0, 50, 40), threshold=3.0)
        assert wide["loss_area"].item() == pytest.approx(150 / 1e4)
        assert not [name for name in found.data_vars if name.endswith("_se")]

    def test_difference_brings_its_own_threshold_and_error(self):
        before, after = raster(seed=1), raster(seed=2)
        change = difference(before, after, sigma=3.0, confidence=0.9, correlation_length=4.0)
        found = zonal(change, SHAPES["tilted"])
        again = zonal(
            change["height_change"],
            SHAPES["tilted"],
            threshold=float(change["level_of_detection"].max()),
            sigma=float(np.sqrt(18)),
            correlation_length=4.0,
        )
        for name in found.data_vars:
            assert found[name].item() == pytest.approx(again[name].item(), rel=1e-5), name
        assert found["correlation_length"].item() == 4
        weight = supersample(before, SHAPES["tilted"])
        area = (weight * change["significant"] * (change["height_change"] < 0)).sum().item()
        assert found["loss_area"].item() == pytest.approx(area / 1e4, rel=0.02)

    def test_estimated_length_is_that_of_change(self):
        rng = np.random.default_rng(0)
        noise = ndimage.gaussian_filter(rng.normal(size=(300, 320)), 3) * 10
        change = raster((300, 320)).copy(data=noise.astype(np.float32)).rename("height_change")
        found = zonal(change.chunk(y=100), circle(100, 100, 50), sigma=1.0)
        assert float(found["correlation_length"]) == pytest.approx(correlation_length(change))

    def test_land_cover_mask(self):
        change = raster(low=-10, high=10).rename("height_change")
        forest = change.x > LEFT + 20
        found = zonal(change.where(forest), shapely.box(LEFT, TOP - 30, LEFT + 40, TOP))
        area = (cell_areas(change) * forest * (change < -5)).sum().item()
        assert found["loss_area"].item() == pytest.approx(area / 1e4, rel=1e-6)

    def test_cauaxi(self, data):
        known = json.loads((data / "reference_values.json").read_text())["cauaxi_nw100"]
        folder = data / "chm_change_cauaxi_window"
        heights = [
            rioxarray.open_rasterio(folder / f"CAU_CHM_{year}_nw100.tif").squeeze(drop=True)
            for year in (2012, 2014)
        ]
        window = shapely.box(*heights[0].rio.bounds())
        means = [zonal(h, window)["mean"].item() for h in heights]
        assert means == pytest.approx([known["mean_t0"], known["mean_t1"]], abs=1e-4)
        change = (heights[1] - heights[0]).rename("height_change")
        found = zonal(change, window, sigma=3.0)
        assert found["mean"].item() == pytest.approx(known["mean_change"], abs=1e-4)
        assert found["net_volume"].item() == pytest.approx(known["volume_change_m3"], abs=0.1)
        assert round(found["loss_area"].item() * 1e4) == known["cells_change_lt_minus5"]
        assert round(found["gain_area"].item() * 1e4) == known["cells_change_gt_5"]
        ten = zonal(change, window, threshold=10.0)["loss_area"].item()
        assert round(ten * 1e4) == known["cells_change_lt_minus10"]
        assert 0.05 < found["mean_se"].item() < 0.5
        quantiles = zonal(change, window, stats=("median", "p5", "p95"))
        assert quantiles["median"].item() == pytest.approx(known["median_change"], abs=0.011)
        assert quantiles["p5"].item() == pytest.approx(known["p05"], abs=0.011)
        assert quantiles["p95"].item() == pytest.approx(known["p95"], abs=0.011)


class TestStandardError:
    def test_limits(self):
        cell = 0.36
        pixel = np.sqrt(cell / np.pi)  # the radius of one pixel: nothing is correlated
        assert effective_samples(1000 * cell, pixel, 1000) == pytest.approx(1000)
        assert effective_samples(1000 * cell, 0, 1000) == 1000
        assert effective_samples(1.0, 1e6, 1000) == pytest.approx(1, abs=1e-5)
        assert effective_samples(np.pi * 100**2, 10, 10**6) == pytest.approx(100)
        assert np.isnan(effective_samples(0.0, 10, 0))
        assert np.isnan(effective_samples(100.0, np.nan, 10))

    @given(area=st.floats(0.1, 1e8), length=st.floats(0, 1e4), count=st.integers(1, 10**8))
    def test_between_one_and_all(self, area, length, count):
        found = effective_samples(area, length, count)
        assert 1 <= found <= count
        assert effective_samples(area, 2 * length, count) <= found
        assert effective_samples(2 * area, length, 2 * count) >= found

    @pytest.mark.parametrize("smooth", [0.0, 2.0, 5.0])
    @pytest.mark.parametrize("radius", [4.0, 12.0, 40.0])
    def test_spread_of_simulated_means(self, smooth, radius):
        """Means under discs of many simulated error fields scatter as the standard error says."""
        means, stated = [], []
        for seed in range(1 if radius == 4 else 12):
            noise = np.random.default_rng(seed).normal(size=(256, 256))
            if smooth:
                noise = ndimage.gaussian_filter(noise, smooth, mode="wrap")
            noise = (noise / noise.std()).astype(np.float32)
            change = xr.DataArray(noise, dims=("y", "x"), name="height_change").assign_coords(
                y=TOP - np.arange(256.0), x=LEFT + np.arange(256.0)
            )
            centres = np.arange(45, 256 - 40, 2 * radius + 3 * smooth)
            discs = [circle(x, y, radius) for x in centres for y in centres]
            found = zonal(change, discs, stats="mean", sigma=1.0)
            means.append(found["mean"].values)
            stated.append(found["mean_se"].values.mean())
        seen = np.sqrt(np.mean(np.concatenate(means) ** 2))
        # Never much too small; where the area is near the correlation length, somewhat too large.
        assert 0.8 < np.mean(stated) / seen < 1.5

    def test_areas_and_volumes_of_repeated_measurements(self):
        """The standard error of areas and volumes is their spread over repeated measurements."""
        rng = np.random.default_rng(0)
        truth = np.zeros((160, 160))
        truth[40:90, 30:100] = -12
        truth += ndimage.gaussian_filter(rng.normal(size=truth.shape), 2) * 15
        disc = circle(80, 80, 75)
        rows = []
        for seed in range(60):
            noise = np.random.default_rng(seed + 1).normal(size=truth.shape)
            noise = ndimage.gaussian_filter(noise, 2, mode="wrap")
            noise = noise / noise.std() * 2
            change = xr.DataArray(
                truth + noise, dims=("y", "x"), name="height_change"
            ).assign_coords(y=TOP - np.arange(160.0), x=LEFT + np.arange(160.0))
            rows.append(zonal(change, disc, sigma=2.0, correlation_length=4.0).squeeze())
        runs = xr.concat(rows, "run", coords="minimal", compat="override")
        for name in ("loss_area", "gain_area", "net_area", "loss_volume", "net_volume", "mean"):
            stated = float(np.sqrt((runs[f"{name}_se"] ** 2).mean()))
            seen = float(runs[name].std(ddof=1))
            assert 0.6 < stated / seen < 2.5, (name, stated, seen)


class TestOtherRasters:
    @pytest.mark.parametrize("chunks", [None, {"y": 7}])
    def test_mask_is_a_share(self, chunks):
        height = raster()
        mask = height > 20
        mask_read = mask if chunks is None else mask.chunk(chunks)
        found = zonal(mask_read, SHAPES["tilted"]).compute()
        weight = supersample(height, SHAPES["tilted"])
        assert found["mean"].item() == pytest.approx(np.average(mask, weights=weight), abs=2e-3)
        assert found["mean"].attrs == {"long_name": "mean share", "units": "1"}
        named = mask.rename("forest").assign_attrs(long_name="forest", units="1")
        assert zonal(named, SHAPES["tilted"])["mean"].attrs["long_name"] == "mean forest"

    def test_any_quantity_in_its_own_unit(self):
        biomass = (raster() * 10).rename("agbd").assign_attrs(long_name="biomass", units="Mg ha-1")
        del biomass.attrs["standard_name"]
        found = zonal(biomass, SHAPES["tilted"])
        expected = zonal(raster(), SHAPES["tilted"])
        for name in ("mean", "max", "std"):
            assert found[name].attrs["units"] == "Mg ha-1"
            assert found[name].item() == pytest.approx(10 * expected[name].item(), rel=1e-6)
        assert found["mean"].attrs["long_name"] == "mean biomass"
        score = difference(raster(seed=1), raster(seed=2), sigma=3.0)["z_score"]
        assert zonal(score, SHAPES["tilted"])["mean"].attrs["units"] == "1"
        plain = xr.DataArray(biomass.values, biomass.coords, biomass.dims)
        assert "units" not in zonal(plain, SHAPES["tilted"])["mean"].attrs

    def test_heights_in_feet_are_metres(self):
        feet = (raster() / 0.3048).assign_attrs(raster().attrs, units="ft").rename("canopy_height")
        found, expected = (zonal(h, SHAPES["tilted"])["mean"] for h in (feet, raster()))
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        assert found.attrs["units"] == "m"

    def test_events_are_a_loss(self):
        lost = raster(seed=3).rename("magnitude")
        lost.attrs = {"long_name": "canopy height lost", "units": "m"}
        polygon = SHAPES["tilted"]
        found = zonal(lost.to_dataset(), polygon)
        expected = zonal((-lost).rename("height_change"), polygon)
        assert found["loss_volume"].item() > 0
        for name in expected.data_vars:
            assert found[name].item() == expected[name].item()


def test_layers_within_a_hundredth_of_a_pixel_are_on_the_grid():
    change = raster(times=2, low=-10, high=10).rename("height_change")
    sigma = (abs(change[0]) * 0 + 2).drop_vars("time").rename("sigma")
    options = {"stats": "mean", "correlation_length": 3.0}
    expected = zonal(change, SHAPES["tilted"], sigma=2.0, **options)
    moved = sigma.assign_coords(x=sigma.x + 1e-6)
    xr.testing.assert_allclose(zonal(change, SHAPES["tilted"], sigma=moved, **options), expected)
    dates = xr.concat([sigma, sigma], "time").assign_coords(time=change.time)
    late = dates.assign_coords(time=change.time + np.timedelta64(1, "D"))
    xr.testing.assert_allclose(zonal(change, SHAPES["tilted"], sigma=dates, **options), expected)
    for wrong in (sigma.assign_coords(x=sigma.x + 0.1), late):
        with pytest.raises(CHMv2Error, match=r"sigma on the grid of the values.*interp_like"):
            zonal(change, SHAPES["tilted"], sigma=wrong, **options)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stats": ("mean", "modus")}, r"statistics among mean, .*found \['modus'\]"),
            ({"stats": ()}, r"statistics among"),
            ({"stats": "p101"}, r"found \['p101'\]"),
            ({"sigma": "bin_spread"}, "or 'bin_spread' of a Dataset that holds it, found"),
            ({"stats": "loss_area"}, "a change, for loss_area, found heights"),
            ({"sigma": -1.0}, "a sigma of at least 0 m, or None, found sigma=-1.0"),
            ({"sigma": np.nan}, "a sigma of at least 0 m"),
            ({"sigma": 1.0}, "heights need the correlation length of their errors"),
            ({"sigma": 1.0, "correlation_length": -2.0}, "a correlation_length of at least 0 m"),
            (
                {"threshold": 5.0},
                r"'cover', or a change of height, with threshold=.*rename\('height_change'\)",
            ),
        ],
    )
    def test_arguments(self, change, message):
        with pytest.raises(CHMv2Error, match=message):
            zonal(raster(), SHAPES["tilted"], **change)

    def test_threshold(self):
        with pytest.raises(CHMv2Error, match="a threshold above 0 m"):
            zonal(raster().rename("height_change"), SHAPES["tilted"], threshold=0.0)

    @pytest.mark.parametrize("polygons", [[], "stands.gpkg", 3, ["POLYGON"]])
    def test_no_polygons(self, polygons):
        with pytest.raises(CHMv2Error, match=r"polygons, as a GeoDataFrame.*read_file"):
            zonal(raster(), polygons)

    def test_points_are_no_polygons(self):
        with pytest.raises(CHMv2Error, match="polygons and multipolygons, found 1 of Point"):
            zonal(raster(), [shapely.Point(LEFT + 2, TOP - 2), circle(5, 5, 2)])
        points = gpd.GeoSeries([shapely.Point(LEFT + 5, TOP - 5)], crs=CRS)
        with pytest.raises(CHMv2Error, match=r"turn them into areas: polygons\.buffer") as raised:
            zonal(raster(), points)
        assert zonal(raster(), follow(raised, polygons=points))["count"] > 1

    def test_crs_on_polygons_only(self):
        with pytest.raises(
            CHMv2Error, match=r"polygons are in .*, but the raster has no CRS; .*write_crs"
        ):
            zonal(raster(crs=None), gpd.GeoSeries([circle(5, 5, 2)], crs=CRS))

    def test_places_that_cannot_be(self):
        metres = gpd.GeoSeries([circle(8, 8, 3)], crs=4326)
        with pytest.raises(CHMv2Error, match=r"longitudes and latitudes.*x up to 500011") as raised:
            zonal(raster(), metres)
        raised.value.fix = raised.value.fix.replace("...", str(CRS))
        assert zonal(raster(), follow(raised, polygons=metres))["count"] > 1
        nowhere = gpd.GeoSeries([shapely.box(5e8, 5e8, 6e8, 6e8)], crs=32632)
        with pytest.raises(CHMv2Error, match="cannot be reprojected to the raster's CRS; check"):
            zonal(raster(), nowhere)

    def test_polygons_without_crs_are_asked_about(self):
        polygons = gpd.GeoDataFrame(geometry=[circle(8, 8, 3)])
        expected = zonal(raster(), polygons.geometry[0])
        for asked in (polygons, polygons.geometry):
            with pytest.raises(CHMv2Error, match=r"the raster has one \(EPSG:32633\)") as raised:
                zonal(raster(), asked)
            answered = zonal(raster(), follow(raised, polygons=asked))
            xr.testing.assert_identical(answered, expected)
            assert zonal(raster(crs=None), asked)["mean"].notnull().all()

    @pytest.mark.filterwarnings("ignore:invalid value encountered in linearrings:RuntimeWarning")
    @pytest.mark.parametrize("broken", [np.nan, np.inf])
    def test_coordinates_that_are_not_finite(self, broken):
        shapes = [circle(8, 8, 3), place((2, 2), (broken, 2), (9, 9)), circle(20, 9, 4)]
        polygons = gpd.GeoSeries(shapes, crs=CRS, index=["a", "b", "c"])
        message = r"finite coordinates, found NaN or infinite ones in 1 of 3 polygons \(b\)"
        with pytest.raises(CHMv2Error, match=message) as raised:
            zonal(raster(), polygons)
        assert zonal(raster(), follow(raised, polygons=polygons))["polygon"].values.tolist() == [
            "a",
            "c",
        ]

    def test_cover_is_of_heights(self):
        mask = raster() > 5
        for other in (mask, raster().rename("height_change")):
            with pytest.raises(CHMv2Error, match="canopy heights, for cover, found") as raised:
                zonal(other, SHAPES["tilted"], stats="cover")
        advice = {"zonal": zonal, "mask": mask, "polygons": SHAPES["tilted"]}
        assert 0 < follow(raised, **advice)["mean"] < 1

    def test_sigma_below_0_somewhere(self):
        change = raster().rename("height_change")
        sigma = (change * 0 + 2).where(change > 1, -0.5)
        with pytest.raises(CHMv2Error, match=r"at least 0 m, or None, found sigma=-0\.5"):
            zonal(change, place((0, 0), (9, 0), (9, 9)), sigma=sigma)

    def test_sigma_on_another_grid(self):
        sigma = raster((10, 10)) + 1
        with pytest.raises(CHMv2Error, match="sigma on the grid of the values"):
            zonal(raster().rename("height_change"), SHAPES["tilted"], sigma=sigma)

    def test_other_things(self):
        with pytest.raises(CHMv2Error, match="heights or changes as a DataArray or a Dataset"):
            zonal(raster().values, SHAPES["tilted"])
        with pytest.raises(CHMv2Error, match=r"a Dataset with height_change or canopy_height"):
            zonal(raster().to_dataset(name="slope"), SHAPES["tilted"])
        named = raster().to_dataset(name="canopy_height")
        xr.testing.assert_identical(
            zonal(named, SHAPES["tilted"]), zonal(raster(), SHAPES["tilted"])
        )

    def test_missing_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "exactextract", None)
        message = r'exactextract, .* is not installed; pip install "xchmv2\[zonal\]"'
        with pytest.raises(CHMv2Error, match=message):
            zonal(raster(), SHAPES["tilted"])


def test_import_is_light():
    code = """
        import sys, xchmv2.zonal, xchmv2.validation, xchmv2.plotting
        heavy = {"torch", "geopandas", "exactextract", "matplotlib", "skimage", "xvec"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    import textwrap

    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
