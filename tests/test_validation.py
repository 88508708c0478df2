"""Scores against a reference: scikit-learn, hand-made cases, real lidar."""

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rioxarray
import shapely
import xarray as xr
from conftest import no_compute
from hypothesis import given
from hypothesis import strategies as st
from reference import follow
from scipy import ndimage
from sklearn import metrics

from tests.evaluation import score_demo as evaluate
from xchmv2.errors import CHMv2Error
from xchmv2.validation import match, scores, to_table, validate

# Private imports: scores as arrays have no public face.

LEFT, TOP = 500_000.0, 5_300_000.0


def raster(shape=(120, 130), *, pixel=1.0, seed=0, crs=32633, left=LEFT, top=TOP, smooth=2.0):
    values = np.random.default_rng(seed).normal(size=shape)
    values = ndimage.gaussian_filter(values, smooth) if smooth else values
    values = np.clip(15 + 10 * values / values.std(), 0, 45).astype(np.float32)
    coords = {
        "y": top - (np.arange(shape[0]) + 0.5) * pixel,
        "x": left + (np.arange(shape[1]) + 0.5) * pixel,
    }
    array = xr.DataArray(values, coords, ("y", "x"), name="canopy_height")
    return array if crs is None else array.odc.assign_crs(crs)


def noisy(reference, *, seed=1, spread=2.0, offset=1.0):
    noise = np.random.default_rng(seed).normal(offset, spread, reference.shape)
    return (reference + noise.astype(np.float32)).clip(min=-5)


class TestScores:
    @given(st.integers(0, 10**6), st.integers(3, 400))
    def test_scikit_learn(self, seed, size):
        rng = np.random.default_rng(seed)
        true = rng.gamma(2, 8, size)
        found = true * rng.uniform(0.5, 1.5) + rng.normal(0, 3, size)
        assert scores.mae(found, true) == pytest.approx(metrics.mean_absolute_error(true, found))
        assert scores.rmse(found, true) == pytest.approx(
            metrics.root_mean_squared_error(true, found)
        )
        assert scores.r2(found, true) == pytest.approx(metrics.r2_score(true, found))
        masks = found > 10, true > 10
        if (masks[0] | masks[1]).any():
            assert scores.overlap(*masks) == metrics.jaccard_score(masks[1], masks[0])

    def test_nothing_to_tell(self):
        empty = np.zeros(0)
        for score in (scores.mae, scores.rmse, scores.bias, scores.r2):
            assert np.isnan(score(empty, empty))
        assert np.isnan(scores.r2(np.arange(3.0), np.ones(3)))
        assert np.isnan(scores.overlap(np.zeros(3, bool), np.zeros(3, bool)))
        assert np.isnan(scores.edge_error(np.ones((2, 9)), np.ones((2, 9))))

    def test_blocks(self):
        heights = np.random.default_rng(0).random((3, 110, 160)) * 20
        heights[0, :50, :30] = np.nan
        means = scores.block_means(heights, 50)
        assert means.shape == (3, 2, 3)
        assert np.isnan(means[0, 0, 0])  # two fifths are known
        assert means[2, 1, 2] == pytest.approx(heights[2, 50:100, 100:150].mean())
        ranks = scores.block_percentiles(heights[1], 50, (5, 95))
        assert ranks[1, 0, 2] == pytest.approx(np.percentile(heights[1, :50, 100:150], 95))

    def test_gradient_of_a_slope(self):
        slope = 0.3 * np.arange(12.0)[:, None] + 0.4 * np.arange(9.0)
        steep = scores._gradients(slope)
        np.testing.assert_allclose(steep[1:-1, 1:-1], 0.5)
        assert np.isnan(steep[0]).all()
        assert scores.edge_error(slope, np.zeros_like(slope)) == pytest.approx(0.5)
        assert scores.edge_error(slope, slope) == 0

    def test_missing_heights_make_no_edges(self):
        flat = np.full((20, 20), 30.0)
        holed = flat.copy()
        holed[5:9, 5:9] = np.nan
        assert scores.edge_error(holed, flat) == 0

    def test_classes(self):
        true = np.array([0.0, 0.5, 5.0, 9.9, 10.0, 80.0])
        rows = scores.by_class(true + 1, true, (0, 5, 10, np.inf))
        assert [row[0] for row in rows] == [2, 2, 2]
        assert [row[2] for row in rows] == pytest.approx([1, 1, 1])
        assert scores.class_names((0, 5, np.inf)) == ["0 to 5 m", "above 5 m"]

    def test_the_demonstration_is_scored_by_the_same(self):
        truth = np.random.default_rng(0).random((2, 100, 100)) * 30
        rows = scores.by_class(truth + 1, truth, evaluate.CLASSES)
        assert evaluate.by_class(truth, truth + 1)["pixels"].tolist() == [row[0] for row in rows]


class TestRasters:
    def test_on_the_same_grid(self):
        reference = raster()
        height = noisy(reference)
        found = validate(height, reference)
        true, seen = (a.values.ravel().astype(float) for a in (reference, height))
        assert found["mae"].item() == pytest.approx(metrics.mean_absolute_error(true, seen))
        assert found["rmse"].item() == pytest.approx(metrics.root_mean_squared_error(true, seen))
        assert found["bias"].item() == pytest.approx(1, abs=0.1)
        assert found["r2"].item() == pytest.approx(metrics.r2_score(true, seen))
        assert found["count"].item() == true.size
        means = [
            a[:100, :100].coarsen(y=50, x=50).mean().values.ravel() for a in (reference, height)
        ]
        assert found["block_r2"].item() == pytest.approx(metrics.r2_score(*means), abs=1e-5)
        assert found["block_count"].item() == 4
        tall = true >= 30
        assert found["tall_bias"].item() == pytest.approx((seen - true)[tall].mean())
        assert found["tall_count"].item() == tall.sum() == found["class_count"].values[-1]
        assert found["class_count"].sum() == true.size
        ranks = [
            [np.percentile(a[r : r + 50, c : c + 50], 95) for r in (0, 50) for c in (0, 50)]
            for a in (reference.values, height.values)
        ]
        expected = np.subtract(ranks[1], ranks[0]).mean()
        assert found["percentile_bias"].sel(percentile=95).item() == pytest.approx(
            expected, abs=1e-5
        )
        assert found["mae"].attrs == {"long_name": "mean absolute error", "units": "m"}

    def test_a_finer_reference_is_averaged(self):
        fine = raster((240, 240), pixel=0.5)
        coarse = fine.coarsen(y=4, x=4).mean()
        found = match(coarse.odc.assign_crs(32633), fine)
        np.testing.assert_allclose(found.reference, found.height, atol=1e-4)
        assert found.height.shape == (60, 60)

    def test_half_a_pixel_must_be_known(self):
        fine = raster((40, 40), pixel=0.5)
        fine[:, :3] = np.nan  # one pixel and a half
        height = raster((20, 20)) * 0 + 1
        found = match(height, fine)
        assert found.height.shape == (20, 19)  # of the second pixel half is known
        fine[:3, 3] = np.nan
        assert np.isnan(match(height, fine).height[0, 0])

    def test_another_crs_and_a_part_only(self):
        height = raster((200, 220), pixel=0.6)
        reference = height[60:140, 50:170].odc.reproject("EPSG:3857", resolution=0.3)
        found = match(height, reference)
        error = found.height - found.reference
        assert np.nanmean(np.abs(error)) < 0.4
        assert 70 <= found.height.shape[0] <= 90

    def test_a_coarser_reference_is_interpolated(self):
        slope = raster((60, 60), pixel=2.0)
        slope = slope.copy(data=np.broadcast_to(np.linspace(0, 40, 60, dtype="f4"), (60, 60)))
        height = raster((200, 200), pixel=0.6)
        found = match(height, slope)
        steps = np.diff(found.reference[100, 5:-5])
        assert steps.min() > 0  # no stairs
        assert steps.max() < 0.3

    def test_turned_and_transposed(self):
        reference = raster()
        height = noisy(reference)
        expected = validate(height, reference)
        for turned in (reference[::-1], reference[:, ::-1], reference.T):
            xr.testing.assert_allclose(validate(height, turned), expected, rtol=1e-6)
        found = validate(height.T, reference)
        xr.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_nodata_and_band_of_a_file(self):
        reference = raster()
        filled = reference.where(reference > 3, -9999).assign_attrs(_FillValue=-9999.0)
        height = noisy(reference)
        expected = validate(height, reference.where(reference > 3))
        xr.testing.assert_allclose(validate(height, filled.expand_dims("band")), expected)

    def test_without_crs(self):
        reference = raster(crs=None)
        height = noisy(reference)
        expected = validate(height[20:100, 30:110], reference[20:100, 30:110])
        xr.testing.assert_allclose(validate(height, reference[20:100, 30:110]), expected)
        xr.testing.assert_allclose(validate(height[20:100, 30:110], reference), expected)
        turned = validate(height[::-1], reference)[["mae", "class_bias", "edge_error"]]
        xr.testing.assert_allclose(turned, validate(height, reference)[list(turned)])

    def test_other_pixels_without_crs(self):
        """They are brought together as with a CRS, in the coordinates' own units."""
        fine = raster((240, 260), pixel=0.5)
        height = noisy(raster())
        bare = [array.drop_vars("spatial_ref") for array in (height, fine)]
        for array in bare:
            array.attrs.clear()
            array.encoding.clear()
        assert bare[0].odc.crs is None
        xr.testing.assert_allclose(validate(*bare), validate(height, fine))
        found = match(*bare).reference
        np.testing.assert_allclose(
            found, fine.coarsen(y=2, x=2).mean().values, rtol=1e-5, equal_nan=True
        )

    @pytest.mark.parametrize("part", [dict(y=[7]), dict(x=[7]), dict(y=[7], x=[9])])
    def test_one_row_or_column_of_lidar(self, part):
        height = noisy(raster())
        reference = raster().rio.write_transform(raster().odc.geobox.affine).isel(part)
        known = match(height, reference).known
        assert known.sum() == reference.size
        expected = (height - reference).mean()
        assert validate(height, reference)["bias"] == pytest.approx(float(expected), abs=1e-5)
        stacked = reference.expand_dims(band=1)
        assert validate(height, stacked)["count"] == reference.size

    def test_lazy_heights_are_read_under_the_reference_alone(self):
        read = []

        def note(block, block_info=None):
            read.append(block_info[None]["chunk-location"])
            return block

        height = raster((400, 400)).chunk(y=100, x=100)
        data = height.data.map_blocks(note, dtype="float32", meta=np.empty((0, 0), "f4"))
        reference = raster()[10:80, 10:80]
        found = validate(height.copy(data=data), reference, block=20)
        assert set(read) == {(0, 0)}
        xr.testing.assert_identical(found, validate(height.compute(), reference, block=20))

    def test_dates(self):
        reference = raster()
        heights = xr.concat([noisy(reference), reference], pd.Index([2019, 2021], name="time"))
        before = heights.copy(deep=True)
        found = validate(heights, reference)
        assert found["mae"].dims == ("time",)
        assert found["class_mae"].dims == ("time", "height_class")
        assert found["mae"][1].item() == 0
        assert found["mae"][0].item() == validate(heights[0], reference)["mae"].item()
        assert found["time"].values.tolist() == [2019, 2021]
        twice = xr.concat([reference, heights[0].drop_vars("time").clip(0)], heights["time"])
        clipped = validate(heights[0].clip(0), reference)["mae"].item()
        assert validate(heights, twice)["mae"].values.tolist() == [
            found["mae"][0].item(),
            pytest.approx(clipped),
        ]
        xr.testing.assert_identical(heights, before)
        table = to_table(found)
        assert table.index.names[0] == "time"
        assert table.loc[(2021, "all"), "mae"] == 0

    def test_table(self):
        reference = raster()
        found = validate(noisy(reference), reference)
        table = to_table(found)
        assert table.loc["all", "count"] == reference.size
        assert table.loc["blocks of 50 px", "r2"] == found["block_r2"].item()
        assert table.loc["above 30 m", "bias"] == found["tall_bias"].item()
        assert table.loc["p95 of blocks", "mae"] == found["percentile_mae"][-1].item()
        assert table["mae"].notna().all()

    def test_bart(self, data):
        """Lidar against itself on another grid, and with a known error on top."""
        lidar = rioxarray.open_rasterio(
            data / "rgb_chm_bart2019" / "BART_320000_4881000_chm_2019.tif"
        ).squeeze(drop=True)
        grid = lidar.odc.geobox.zoom_to(resolution=0.6)
        height = lidar.odc.reproject(grid, resampling="bilinear")
        same = validate(height, lidar)
        assert same["mae"].item() < 0.01
        assert same["block_r2"].item() > 0.9999
        assert same["edge_error"].item() < 0.01
        found = validate(noisy(height + 20, spread=3.0, offset=-2.0), lidar + 20)
        assert found["bias"].item() == pytest.approx(-2, abs=0.05)
        assert found["rmse"].item() == pytest.approx(np.sqrt(13), abs=0.05)
        assert found["block_bias"].item() == pytest.approx(-2, abs=0.1)
        assert found["r2"].item() == pytest.approx(1 - 13 / float(lidar.var()), abs=0.05)


class TestPoints:
    def footprints(self, count=40, crs=32633):
        rng = np.random.default_rng(3)
        x, y = LEFT + rng.uniform(15, 115, count), TOP - rng.uniform(15, 105, count)
        return gpd.GeoDataFrame(
            {"rh98": rng.uniform(0, 40, count)}, geometry=gpd.points_from_xy(x, y), crs=crs
        )

    def by_hand(self, height, points, radius=12.0, percentile=98):
        xs, ys = np.meshgrid(height.x, height.y)
        return np.array(
            [
                np.percentile(height.values[np.hypot(xs - p.x, ys - p.y) <= radius], percentile)
                for p in points.geometry
            ]
        )

    @pytest.mark.parametrize("chunks", [None, 37])
    def test_percentile_within_the_footprint(self, chunks):
        height, points = raster(), self.footprints()
        given = height if chunks is None else height.chunk(chunks)
        found = match(given, points)
        # Metres of UTM are 0.9996 metres on the ground at the central meridian.
        np.testing.assert_allclose(found.height, self.by_hand(height, points), atol=0.5)
        exact = self.by_hand(height, points, radius=12.0 * 0.9996)
        np.testing.assert_allclose(found.height, exact, atol=1e-4)
        np.testing.assert_allclose(found.reference, points["rh98"])

    def test_scores(self):
        height, points = raster(), self.footprints()
        found = validate(height, points.to_crs(4326))
        expected = self.by_hand(height, points, radius=12.0 * 0.9996)
        assert found["mae"].item() == pytest.approx(
            metrics.mean_absolute_error(points["rh98"], expected), abs=0.02
        )
        assert found["count"].item() == 40
        assert "block_r2" not in found
        assert list(to_table(found).index[:2]) == ["all", "0 to 1 m"]

    def test_radius(self):
        height, points = raster(), self.footprints()
        icesat = match(height, points, radius=7)
        np.testing.assert_allclose(
            icesat.height, self.by_hand(height, points, 7 * 0.9996), atol=1e-4
        )
        points["radius"] = 7.0
        np.testing.assert_array_equal(match(height, points).height, icesat.height)
        tiny = match(height, points.assign(radius=0.01), statistic=50)
        rows = np.floor(TOP - points.geometry.y).astype(int)
        cols = np.floor(points.geometry.x - LEFT).astype(int)
        np.testing.assert_array_equal(tiny.height, height.values[rows, cols])

    def test_a_footprint_is_a_disc_on_the_ground(self):
        """At 60 degrees north a metre of web Mercator is half a metre."""
        height = raster((200, 200), crs=3857, top=8_399_738.0)
        points = pd.DataFrame({"x": [LEFT + 100], "y": [8_399_738.0 - 100], "height": [20.0]})
        found = match(height, points, statistic=100).height
        xs, ys = np.meshgrid(height.x, height.y)
        inside = np.hypot(xs - points.x[0], ys - points.y[0]) <= 24.0
        assert found[0] == pytest.approx(height.values[inside].max(), abs=0.3)

    def test_partly_known_footprints(self):
        height = raster()
        x, y = LEFT + np.array([60, 3, -50.0]), TOP - np.array([60, 60, 60.0])
        points = pd.DataFrame({"x": x, "y": y, "height": [10.0, 10.0, 10.0]})
        found = match(height, points)
        assert np.isfinite(found.height).tolist() == [True, False, False]
        assert match(height.where(height.x > LEFT + 49), points).known.sum() == 1
        holed = height.where(height.x > LEFT + 60)
        with pytest.raises(
            CHMv2Error, match="do not overlap where both are valid; check their bounds"
        ):
            match(holed, points)

    def test_many_points_in_batches(self):
        height, points = raster(), self.footprints(5000)
        found = match(height.chunk(50), points)
        assert found.known.all()
        np.testing.assert_allclose(
            found.height[::500], self.by_hand(height, points[::500], 12 * 0.9996), atol=1e-4
        )


class TestPlots:
    def plots(self, height, count=25, seed=4):
        """Polygons of 6 to 60 m with notches, some reaching out of the heights."""
        rng = np.random.default_rng(seed)
        shapes = []
        for x, y in rng.uniform((0, 0), (130, 120), (count, 2)):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
            reach = rng.uniform(3, 30) * rng.uniform(0.5, 1, 12)
            ring = np.column_stack([np.cos(angles), np.sin(angles)]) * reach[:, None]
            shapes.append(shapely.make_valid(shapely.Polygon(ring + np.array([LEFT + x, TOP - y]))))
        return gpd.GeoDataFrame({"height": rng.uniform(0, 40, count)}, geometry=shapes, crs=32633)

    def by_hand(self, height, plots):
        xs, ys = np.meshgrid(height.x, height.y)
        inside = [shapely.contains_xy(shape, xs, ys) for shape in plots.geometry]
        room = shapely.box(LEFT, TOP - 120, LEFT + 130, TOP)
        whole = plots.intersection(room).area > 0.93 * plots.area
        out = plots.intersection(room).area < 0.87 * plots.area
        return [height.values[mask].astype(float) for mask in inside], whole, out

    @pytest.mark.parametrize("statistic", ["mean", 95, 50])
    @pytest.mark.parametrize("chunks", [None, 37])
    def test_pixels_whose_centres_lie_inside(self, statistic, chunks):
        height = raster()
        plots = self.plots(height)
        given = height if chunks is None else height.chunk(chunks)
        found = match(given, plots, statistic=statistic)
        values, whole, out = self.by_hand(height, plots)
        assert whole.sum() > 10
        assert out.sum() > 3
        expected = [
            v.mean() if statistic == "mean" else np.percentile(v, statistic) if v.size else np.nan
            for v in values
        ]
        np.testing.assert_allclose(found.height[whole], np.array(expected)[whole], atol=1e-5)
        assert np.isnan(found.height[out]).all()
        assert found.statistic == statistic

    def test_scores(self):
        height = raster()
        plots = self.plots(height)
        expected = match(height, plots, statistic="mean")
        known = expected.known
        found = validate(height, plots.to_crs(4326), statistic="mean")
        assert found["count"].item() == known.sum()
        assert found["mae"].item() == pytest.approx(
            np.abs(expected.height - expected.reference)[known].mean(), abs=0.02
        )
        assert found.attrs == {"statistic": "mean", "flagged": 0}
        assert "block_r2" not in found
        assert to_table(found).loc["all", "count"] == known.sum()
        cube = xr.concat([height, height + 2], "time")
        dates = validate(cube, plots, statistic="mean")
        assert float(dates["bias"][1] - dates["bias"][0]) == pytest.approx(2, abs=1e-5)
        assert float(height.chmv2.validate(plots, statistic="mean")["bias"]) == dates["bias"][0]

    def test_the_column_tells_the_statistic(self):
        height = raster()
        plots = self.plots(height).rename(columns={"height": "rh95"})
        for name, statistic in (("rh95", 95), ("RH_50", 50), ("zq95", 95), ("p100", 100)):
            named = plots.rename(columns={"rh95": name})
            assert match(height, named, column=name).statistic == statistic
        mean = plots.rename(columns={"rh95": "zmean"})
        assert match(height, mean, column="zmean").statistic == "mean"
        assert match(height, mean, column="zmean", statistic=90).statistic == 90
        points = plots.set_geometry(plots.centroid)
        assert match(height, points, column="rh95").statistic == 95
        assert match(height, points.rename(columns={"rh95": "h"}), column="h").statistic == 98
        with pytest.raises(
            CHMv2Error, match="column 'h100' does not say which heights of the plots it holds; pass"
        ):
            match(height, plots.rename(columns={"rh95": "h100"}), column="h100")

    def test_unusual_shapes(self):
        height = raster()
        at = np.array([LEFT + 50.2, TOP - 60.8])
        shapes = [
            shapely.Point(at).buffer(0.1),  # between the centres of pixels
            shapely.Polygon(at + np.array([(0, 0), (20, 20), (20, 0), (0, 20)])),  # crosses itself
            shapely.MultiPolygon([shapely.box(*at, *at + 9), shapely.box(*at + 12, *at + 21)]),
            None,
            shapely.Polygon(),
            shapely.box(LEFT - 1e5, TOP - 1e5, LEFT + 1e5, TOP + 1e5),  # larger than the heights
        ]
        plots = gpd.GeoDataFrame({"height": [10.0] * 6}, geometry=shapes, crs=32633)
        found = match(height, plots, statistic="mean").height
        assert found[0] == pytest.approx(height.values[60, 50])
        xs, ys = np.meshgrid(height.x, height.y)
        for k in (1, 2):
            inside = shapely.contains_xy(shapely.make_valid(shapes[k]), xs, ys)
            assert found[k] == pytest.approx(height.values[inside].mean(), abs=1e-5)
        assert np.isnan(found[3:]).all()
        whole = plots.iloc[:1].set_geometry([shapely.box(LEFT, TOP - 120, LEFT + 130, TOP)])
        assert match(height, whole.set_crs(32633), statistic="mean").height == pytest.approx(
            float(height.mean()), abs=1e-5
        )

    def test_without_a_crs(self):
        plots = self.plots(raster())
        with pytest.raises(CHMv2Error, match="the plots have no CRS, but the heights are in"):
            validate(raster(), plots.set_crs(None, allow_override=True), statistic="mean")
        with pytest.raises(CHMv2Error, match=r"plots are in .*, but the heights have no CRS"):
            validate(raster(crs=None), plots, statistic="mean")
        bare = plots.set_crs(None, allow_override=True)
        assert validate(raster(crs=None), bare, statistic="mean")["count"] > 10

    def test_bad_shots(self):
        height = raster()
        table = pd.DataFrame({"x": LEFT + 60.0, "y": TOP - 60.0, "height": 15.0}, index=range(5))
        for flags in (
            {"quality_flag": [1, 0, 1, 0, np.nan]},
            {"l2a_quality_flag": [True, False, True, False, False]},
            {"degrade_flag": [0, 1, 0, 30, 2]},
            {"quality_flag": [1, 0, 1, 1, 1], "degrade_flag": [0, 0, 0, 3, 3]},
        ):
            found = validate(height, table.assign(**flags))
            assert (found["count"].item(), found.attrs["flagged"]) == (2, 3)
        with pytest.raises(CHMv2Error, match="quality flags rule out all 5 footprints") as raised:
            validate(height, table.assign(quality_flag=0))
        named = follow(raised, reference=table.assign(quality_flag=0))
        assert validate(height, named)["count"] == 5


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"block": 1}, "block as a whole number from 2 to 32768 px, found block=1"),
            ({"block": 2.5}, "block as a whole number from 2"),
            ({"classes": (5, 0)}, "classes as one or more ascending numbers"),
            ({"percentiles": (101,)}, "percentiles as one or more numbers from 0 to 100"),
        ],
    )
    def test_arguments(self, change, message):
        with pytest.raises(CHMv2Error, match=message):
            validate(raster(), raster(), **change)

    def test_no_common_ground(self):
        with pytest.raises(CHMv2Error, match="heights and reference do not overlap"):
            validate(raster(), raster(left=LEFT + 1000))
        with pytest.raises(CHMv2Error, match="heights and reference do not overlap"):
            validate(raster() * np.nan, raster())
        with pytest.raises(CHMv2Error, match="heights and reference do not overlap"):
            validate(raster(crs=None), raster(crs=None, left=LEFT + 1000))

    def test_crs(self):
        with pytest.raises(CHMv2Error, match="or on neither, found none on the reference"):
            validate(raster(), raster(crs=None))
        with pytest.raises(CHMv2Error, match="none on the heights"):
            validate(raster(crs=None), raster())
        points = gpd.GeoDataFrame({"rh98": [1.0]}, geometry=[shapely.Point(15, 48)], crs=4326)
        with pytest.raises(
            CHMv2Error, match=r"points are in .*, but the heights have no CRS; write it"
        ):
            validate(raster(crs=None), points)

    def test_heights_no_canopy_has(self):
        with pytest.raises(CHMv2Error, match=r"reference heights of 0 to 120 m, found \d+ outside"):
            validate(raster(), raster() + 100)
        points = pd.DataFrame({"x": [LEFT + 50], "y": [TOP - 50], "height": [-50.0]})
        with pytest.raises(CHMv2Error, match="1 outside, from -50"):
            validate(raster(), points)

    def test_dims(self):
        cube = raster().expand_dims(time=2)
        with pytest.raises(CHMv2Error, match="heights of one date"):
            match(cube, raster())
        with pytest.raises(CHMv2Error, match="reference heights of one date"):
            validate(raster(), cube)
        with pytest.raises(CHMv2Error, match="a reference of one date, or of the dates"):
            validate(cube, raster().expand_dims(time=3))
        with pytest.raises(CHMv2Error, match="at most one dim beside"):
            validate(cube.expand_dims(member=2), raster())
        for function in (validate, match):
            with pytest.raises(CHMv2Error, match="as a DataArray or a Dataset, found ndarray"):
                function(raster().values, raster())

    def test_points(self):
        table = pd.DataFrame({"x": [LEFT + 50], "y": [TOP - 50], "z": [20.0]})
        with pytest.raises(CHMv2Error, match=r"a column of reference heights.*column='rh98'"):
            validate(raster(), table)
        assert validate(raster(), table, column="z")["count"].item() == 1
        with pytest.raises(CHMv2Error, match="a column 'top'"):
            validate(raster(), table, column="top")
        named = table.rename(columns={"z": "height"})
        with pytest.raises(CHMv2Error, match="radius above 0 m"):
            validate(raster(), named, radius=0)
        with pytest.raises(CHMv2Error, match="'mean' or a percentile from 0 to 100"):
            validate(raster(), named, statistic=120)
        with pytest.raises(CHMv2Error, match=r"as a GeoDataFrame.*points_from_xy"):
            validate(raster(), named.drop(columns="x"))
        with pytest.raises(CHMv2Error, match="a reference as a DataArray, points or plots"):
            validate(raster(), "lidar.tif")
        lines = gpd.GeoDataFrame(
            {"height": [1.0]}, geometry=[shapely.LineString([(0, 0), (1, 1)])], crs=32633
        )
        with pytest.raises(CHMv2Error, match="points, or polygons alone, found LineString"):
            validate(raster(), lines)

    def test_advice(self):
        """The calls that messages name, on what was refused."""
        height = raster()
        at = shapely.Point(LEFT + 50, TOP - 50)
        table = pd.DataFrame({"height": [20.0, -50.0], "lon": 15.0003, "lat": 47.85})
        mixed = gpd.GeoDataFrame(
            {"rh98": 20.0}, index=[0, 1], geometry=[at, at.buffer(2)], crs=32633
        )
        points = gpd.GeoDataFrame({"height": [20.0, -50.0]}, geometry=[at, at], crs=32633)
        bare = points.iloc[:1].to_crs(4326).set_crs(None, allow_override=True)
        cube = height.expand_dims(layer=2)
        feet = height.assign_attrs(units="m") * 3.2808
        for wrong, message in (
            (mixed, "make polygons of all"),
            (bare, "say which one theirs is"),
            (points, "leave them out"),
            (cube, "choose one"),
            (feet, "if they are in feet"),
        ):
            with pytest.raises(CHMv2Error, match=message) as raised:
                validate(height, wrong)
            assert validate(height, follow(raised, reference=wrong))["count"] > 0
        with pytest.raises(CHMv2Error, match="make points") as raised:
            validate(height, table)
        made = follow(raised, reference=table, geopandas=gpd)
        assert made.crs == 4326
        assert made.geometry.x[0] == 15.0003


def test_reference_stays_lazy_until_cut():
    reference = raster((300, 300)).chunk(50)
    with no_compute():
        from xchmv2.validation.matching import _clean_heights

        assert _clean_heights(reference).chunks is not None
