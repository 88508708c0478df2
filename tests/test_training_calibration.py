"""Calibration: what is right stays right, known biases go, and without skill nothing changes."""

import os
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import reference
import rioxarray
import xarray as xr
from conftest import cube, no_compute
from reference import follow
from scipy import ndimage

from xchmv2.datasets import synthetic_forest
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.inference import tiles_forwarded
from xchmv2.training import calibrate
from xchmv2.validation import match

CRS, LEFT, TOP = 32633, 500_000.0, 5_300_000.0
DATA = Path(os.environ.get("XCHMV2_DATA", Path(__file__).parents[2] / "shared" / "data"))
BIASES = {
    "offset": lambda h: np.where(h > 2, h + 3, h),
    "scale": lambda h: 0.8 * h,
    "compressed": lambda h: np.where(h > 15, 15 + 0.4 * (h - 15), h),
    "line": lambda h: np.where(h > 4, 0.7 * h + 4, h),
}


def plane(values, pixel=0.6):
    coords = {
        axis: start + step * (np.arange(n) + 0.5)
        for axis, start, step, n in zip(
            "yx", (TOP, LEFT), (-pixel, pixel), values.shape, strict=True
        )
    }
    array = xr.DataArray(values.astype("float32"), coords, ("y", "x"), name="canopy_height")
    return array.odc.assign_crs(CRS)


def truth(seed=811, size=360):
    forest = synthetic_forest((size, size), times=("2019-07-01",), seed=seed)
    return plane(forest["canopy_height"].values[0])


@pytest.fixture(scope="module")
def forest():
    return truth()


def noise(shape, rng):
    """Errors over 2.4 and 24 m, as those of a network are; sd 1."""
    short, long = (
        field / field.std()
        for field in (
            ndimage.gaussian_filter(rng.normal(size=shape), s, mode="wrap") for s in (4, 40)
        )
    )
    return 0.9 * short + np.sqrt(1 - 0.81) * long


def predicted(height, bias, sd=1.5, seed=0):
    wrong = bias(height.values)
    wrong = np.clip(wrong + sd * noise(wrong.shape, np.random.default_rng(seed)), 0, None)
    return height.copy(data=np.where(height > 0, wrong, 0).astype("float32"))


def footprints(height, count=150, *, seed=1, error=1.0, plots=False):
    """RH98 of shots, or mean heights of plots, as the truth gives them, with an error [m]."""
    rng = np.random.default_rng(seed)
    sides = [n * abs(float(height[d][1] - height[d][0])) for d, n in height.sizes.items()]
    x = float(height.x.min()) + rng.uniform(15, sides[1] - 15, count)
    y = float(height.y.max()) - rng.uniform(15, sides[0] - 15, count)
    found = gpd.GeoDataFrame(
        {"height": np.zeros(count)}, geometry=gpd.points_from_xy(x, y), crs=height.odc.crs.proj
    )
    found["geometry"] = found.buffer(12) if plots else found.geometry
    exact = match(height, found, statistic="mean" if plots else 98).height
    return found.assign(height=np.clip(exact + error * rng.normal(size=count), 0, None))


def mean_error(height, true):
    return float(np.abs(height - true).mean())


class TestWhatIsRight:
    @pytest.mark.parametrize("aim", ["error", "distribution"])
    @pytest.mark.parametrize("kind", ["shots", "plots", "raster"])
    def test_stays_as_it_is(self, forest, kind, aim):
        given = forest if kind == "raster" else footprints(forest, error=0, plots=kind == "plots")
        statistic = "mean" if kind == "plots" else None
        corrected, found = calibrate(forest, given, aim=aim, statistic=statistic)
        assert found.model == "none"
        assert not found.refused
        assert found.skill == pytest.approx(1)
        np.testing.assert_array_equal(corrected, forest)
        assert corrected.attrs["calibration_model"] == "none"
        assert "calibration_model" not in forest.attrs
        # No candidate does harm here, and a constant is far off.
        assert found.report["mae"].drop("constant").max() < 0.2
        assert found.report["mae"]["constant"] > 2

    def test_footprints_where_all_trees_are_tall(self):
        """Shots on single crowns of a park: each reads the tallest of its hundreds of pixels."""
        rng = np.random.default_rng(0)
        seeds = np.zeros((400, 400))
        seeds[rng.integers(0, 400, 900), rng.integers(0, 400, 900)] = rng.uniform(8, 30, 900)
        height = plane(ndimage.grey_dilation(seeds, structure=-np.hypot(*np.mgrid[-6:7, -6:7])))
        height = height.clip(min=0)
        corrected, found = calibrate(height, footprints(height, 300, error=0))
        assert found.model == "none"
        np.testing.assert_array_equal(corrected, height)


class TestKnownBiases:
    @pytest.mark.parametrize("bias", BIASES)
    def test_go(self, forest, bias):
        wrong = predicted(forest, BIASES[bias])
        corrected, found = calibrate(wrong, footprints(forest))
        assert mean_error(corrected, forest) < 0.8 * mean_error(wrong, forest)
        tall = forest > 20
        assert abs(float((corrected - forest).where(tall).mean())) < 2
        assert float(corrected.where(forest == 0).max()) == 0
        assert found.report["mae"][found.model] < 0.7 * found.report["mae"]["none"]

    @pytest.mark.parametrize("bias", ["offset", "scale"])
    def test_plot_means(self, forest, bias):
        """The curve is applied to pixels and then averaged: an offset is no offset of means."""
        wrong = predicted(forest, BIASES[bias])
        plots = footprints(forest, 80, error=0.5, plots=True)
        corrected, found = calibrate(wrong, plots, statistic="mean")
        assert found.model == bias
        assert mean_error(corrected, forest) < 0.55 * mean_error(wrong, forest)
        assert abs(float((corrected - forest).mean())) < 0.25

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("bias", "most", "tall"),
        [("offset", 1.0, 1), ("scale", 1.2, 1), ("compressed", 1.6, 2), ("line", 1.3, 1)],
    )
    def test_six_forests(self, bias, most, tall):
        """Bounds around the table of docs/fine-tuning.md, on other forests."""
        errors, tops = [], []
        for seed in range(821, 827):
            true = truth(seed, 700)
            wrong = predicted(true, BIASES[bias], seed=seed)
            corrected, _ = calibrate(wrong, footprints(true, 200, seed=seed))
            errors.append([mean_error(wrong, true), mean_error(corrected, true)])
            tops.append([float((a - true).where(true > 20).mean()) for a in (wrong, corrected)])
            assert float(corrected.where(true == 0).max()) == 0
            assert errors[-1][1] < errors[-1][0]
        print(bias, np.mean(errors, axis=0).round(2), np.nanmean(tops, axis=0).round(2))
        assert np.mean(errors, axis=0)[1] < most
        assert abs(np.nanmean(tops, axis=0)[1]) < tall

    def test_wrong_references_do_not_pull(self, forest):
        shots = footprints(forest)
        shots.loc[::12, "height"] = 100.0
        corrected, found = calibrate(predicted(forest, BIASES["scale"]), shots)
        assert found.model in ("scale", "line")
        assert mean_error(corrected, forest) < 1.3

    def test_above_the_tallest_reference(self, forest):
        wrong = predicted(forest, BIASES["compressed"], sd=0)
        corrected, found = calibrate(wrong, footprints(forest), model="monotone")
        top = found.heights[-1]
        above = found.apply(plane(np.array([[top, top + 5.0], [0.0, -1.0]])))
        assert float(above[0, 1] - above[0, 0]) == pytest.approx(5, abs=1e-4)
        assert above[1].values.tolist() == [0, 0]
        assert corrected.attrs["calibration_highest"] == found.highest < 40


class TestSkill:
    MESSAGE = r"no better than one constant height .*so nothing was corrected"

    def weak(self, correlation, count=60):
        """Plots whose heights are known to a correlation with their field heights."""
        rng = np.random.default_rng(5)
        values = (
            rng.normal(size=(count, 2)) @ np.linalg.cholesky([[1, correlation], [correlation, 1]]).T
        )
        height = plane(np.repeat(np.repeat(np.clip(12 + 4 * values[:, :1].T, 1, 40), 20, 0), 20, 1))
        edges = LEFT + 12.0 * np.arange(count)
        squares = gpd.GeoSeries.from_wkt(
            [
                f"POLYGON (({x + 1} {TOP - 1}, {x + 11} {TOP - 1}, {x + 11} {TOP - 11}, "
                f"{x + 1} {TOP - 11}, {x + 1} {TOP - 1}))"
                for x in edges
            ]
        )
        field = np.clip(18 + 3 * values[:, 1], 0, None)
        return height, gpd.GeoDataFrame({"height": field}, geometry=squares, crs=CRS)

    @pytest.mark.parametrize("aim", ["error", "distribution"])
    @pytest.mark.parametrize("model", ["auto", "offset"])
    def test_none(self, aim, model):
        """The plots are 6 m taller, but r = 0.1: an offset would be one constant for another."""
        height, plots = self.weak(0.1)
        with pytest.warns(UserWarning, match=self.MESSAGE):
            corrected, found = calibrate(height, plots, statistic="mean", aim=aim, model=model)
        assert found.refused
        assert found.model == "none"
        assert "nothing corrected" in repr(found)
        np.testing.assert_array_equal(corrected, height)

    def test_some(self):
        height, plots = self.weak(0.9)
        corrected, found = calibrate(height, plots, statistic="mean")
        assert not found.refused
        assert abs(float(corrected.mean()) - 18) < 1

    def test_equal_heights_have_none(self, forest):
        with pytest.warns(UserWarning, match=self.MESSAGE):
            corrected, _ = calibrate(forest * 0 + 12, footprints(forest))
        assert (corrected == 12).all()

    def test_equal_references_have_none(self, forest):
        with pytest.warns(UserWarning, match=self.MESSAGE):
            _, found = calibrate(forest, footprints(forest).assign(height=20.0))
        assert found.skill < 0.1


class TestAims:
    def drawn_to_the_mean(self, seed=3):
        """Heights as a network gives them: the part of the truth that imagery tells."""
        rng = np.random.default_rng(seed)
        told = 18 + 5 * noise((250, 250), rng)
        height = plane(told)
        return height, plane(np.clip(told + 4 * noise(told.shape, rng), 0, None))

    def test_least_error_or_right_tall_trees(self):
        height, true = self.drawn_to_the_mean()
        least, by_error = calibrate(height, true)
        wide, by_rank = calibrate(height, true, aim="distribution")
        assert mean_error(least, true) <= mean_error(height, true) + 0.02
        assert mean_error(wide, true) > mean_error(least, true)
        off = [float(a.quantile(0.95) - true.quantile(0.95)) for a in (least, wide)]
        assert off[0] < -1.5
        assert abs(off[1]) < 0.3
        assert by_rank.report["distribution"][by_rank.model] < 0.3
        assert by_error.report["distribution"][by_error.model] > 0.7
        assert (by_error.aim, by_rank.aim) == ("error", "distribution")
        assert wide.attrs["calibration_aim"] == "distribution"

    def test_errors_in_both(self):
        """Noisy heights flatten a line of ordinary regression; Deming's keeps its slope."""
        rng = np.random.default_rng(0)
        true = plane(np.clip(25 + 6 * noise((200, 200), rng), 8, None))
        height = true.copy(data=(true.values / 1.5 + 3 * rng.normal(size=true.shape)).clip(0))
        _, found = calibrate(height, true, model="line", reference_error=0.5, aim="error")
        _, ranked = calibrate(height, true, model="line", aim="distribution")
        ordinary = np.polyfit(height.values.ravel(), true.values.ravel(), 1)[0]
        assert ordinary < 1.05
        assert found.model == "line"
        assert found.slope == pytest.approx(1.5, abs=0.15)
        assert ordinary < ranked.slope < 1.5


class TestReferences:
    def test_kinds_of_footprints(self, forest):
        wrong = predicted(forest, BIASES["scale"])
        shots = footprints(forest)
        x, y = shots.geometry.x.to_numpy(), shots.geometry.y.to_numpy()
        table = pd.DataFrame({"x": x, "y": y, "rh98": shots["height"]})
        array = xr.DataArray(
            shots["height"].to_numpy(), {"x": ("shot", x), "y": ("shot", y)}, "shot"
        )
        expected = calibrate(wrong, shots)[1]
        degrees = shots.to_crs(4326)
        placed = array.assign_coords(
            x=("shot", degrees.geometry.x), y=("shot", degrees.geometry.y)
        ).odc.assign_crs(4326)
        for given in (table, array, degrees, placed, shots.rename(columns={"height": "rh98"})):
            found = calibrate(wrong, given)[1]
            assert found.model == expected.model
            assert found.slope == pytest.approx(expected.slope, abs=0.01)
            assert found.count == 150

    def test_bad_shots_are_left_out_and_counted(self, forest):
        shots = footprints(forest, error=0)
        bad = np.arange(150) % 3 == 0
        shots["height"] = np.where(bad, 90.0, shots["height"])
        _, found = calibrate(forest, shots.assign(quality_flag=1 - bad))
        assert (found.count, found.flagged, found.model) == (100, 50, "none")
        assert "50 more left out by their quality flag" in repr(found)
        _, other = calibrate(forest, shots.assign(degrade_flag=np.where(bad, 30, 0)))
        assert other == found

    def test_a_curve_for_pixels_from_plots_needs_their_statistic(self, forest):
        plots = footprints(forest, plots=True)
        with pytest.raises(CHMv2Error, match="does not say which heights of the plots") as raised:
            calibrate(forest, plots)
        assert "statistic='mean'" in raised.value.fix
        assert calibrate(forest, plots, statistic="mean")[1].model == "none"

    def test_chunks_and_dims_do_not_matter(self, forest):
        wrong, shots = predicted(forest, BIASES["scale"]), footprints(forest)
        whole, expected = calibrate(wrong, shots)
        lazy, found = calibrate(wrong.chunk(y=100, x=130), shots)
        assert found == expected
        with no_compute():
            again = expected.apply(wrong.chunk(y=100, x=130))
        assert again.chunks == lazy.chunks
        assert again.data.name == lazy.data.name
        assert lazy.dtype == np.float32
        xr.testing.assert_identical(lazy.compute(), whole)
        assert calibrate(wrong.transpose("x", "y"), forest)[1] == calibrate(wrong, forest)[1]

    def test_only_what_is_under_the_reference_is_computed_and_once(self):
        imagery = cube((200, 260)).odc.assign_crs(CRS)
        height = (imagery["red"] * 0.1).astype("float32")
        layers = imagery.chunk(y=64, x=64).chmv2.predict(
            reference.whole_tile_model(),
            tile=32,
            overlap=8,
            block=64,
            layers=("height", "bin_spread"),
        )
        before = tiles_forwarded()
        calibrate(layers, height.isel(y=slice(0, 60), x=slice(0, 60)))
        corner = tiles_forwarded() - before
        layers.compute(scheduler="sync")
        assert 0 < corner < 0.3 * (tiles_forwarded() - before - corner)

    def test_nodata(self, forest):
        holed = forest.copy()
        holed[::5] = -9999
        with pytest.warns(UserWarning, match="25920 of 129600 values cannot be heights"):
            undeclared = calibrate(forest, holed)[1]
        declared = calibrate(forest, holed.assign_attrs(_FillValue=-9999))[1]
        assert declared == undeclared

    def test_several_dates(self, forest):
        several = xr.concat([forest, forest * 2], "time")
        with pytest.raises(CHMv2Error, match="heights of one date"):
            calibrate(several, forest)
        _, found = calibrate(predicted(forest, BIASES["scale"]), footprints(forest))
        both = found.apply(several)
        assert both.dims == several.dims
        xr.testing.assert_allclose(both[0].drop_attrs(), found.apply(forest).drop_attrs())


class TestSpread:
    def layers(self, spread=2.6):
        """Heights 1.3 m off at random, and a spread twice as large."""
        rng = np.random.default_rng(0)
        height = plane(np.clip(15 + 6 * noise((240, 240), rng), 4, None))
        wrong = height + 1.3 * rng.normal(size=height.shape).astype("float32")
        return xr.Dataset({"canopy_height": wrong, "bin_spread": height * 0 + spread}), height

    def test_of_pixels(self):
        layers, height = self.layers()
        corrected, found = calibrate(layers, height)
        assert found.coverage == pytest.approx(0.954, abs=0.01)
        assert found.spread_factor == pytest.approx(0.5, abs=0.02)
        inside = np.abs(corrected["canopy_height"] - height) <= corrected["bin_spread"]
        assert float(inside.mean()) == pytest.approx(0.683, abs=0.01)
        assert corrected["bin_spread"].attrs["spread_factor"] == found.spread_factor

    def test_footprints_tell_nothing_of_it(self):
        layers, height = self.layers()
        corrected, found = calibrate(layers, footprints(height))
        assert found.spread_factor is None
        xr.testing.assert_identical(corrected["bin_spread"], layers["bin_spread"])

    def test_dataset_without_heights(self):
        layers, height = self.layers()
        with pytest.raises(CHMv2Error, match="a Dataset with canopy_height"):
            calibrate(layers[["bin_spread"]], height)


class TestErrors:
    def test_too_few(self, forest):
        with pytest.raises(ImageryError, match=r"at least 20 references on valid.*, found 19"):
            calibrate(forest, footprints(forest, 19))
        few = forest.where((forest.x == forest.x[3]) & (forest.y > forest.y[5]))
        with pytest.raises(ImageryError, match=r"at least 20 references .*found 5"):
            calibrate(forest, few)

    def test_blocks(self, forest):
        shots = footprints(forest)
        with pytest.raises(ImageryError, match=r"at least 2 blocks, found all within \d+ m") as one:
            calibrate(forest, shots, block=1000)
        assert "block=10" in one.value.fix
        assert calibrate(forest, shots, block=10)[1].blocks > 50
        with pytest.warns(UserWarning, match="lie in 4 blocks of 120 m, so the errors"):
            calibrate(forest, shots, block=120)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"aim": "both"}, "aim as one of 'error', 'distribution'"),
            ({"model": "cubic"}, "model as one of 'auto', 'none', 'offset'"),
            ({"reference_error": 0}, "reference_error above 0 m"),
            ({"block": -1}, "block above 0 m"),
            ({"statistic": "max"}, "statistic, 'mean' or a percentile"),
        ],
    )
    def test_arguments(self, forest, wrong, message):
        with pytest.raises(CHMv2Error, match=message):
            calibrate(forest, forest, **wrong)

    def test_a_row_of_a_raster_is_no_footprints(self, forest):
        with pytest.raises(CHMv2Error, match="a reference as a DataArray, points or plots"):
            calibrate(forest, forest.isel(y=3))

    def test_all_shots_are_bad(self, forest):
        shots = footprints(forest).assign(quality_flag=0)
        with pytest.raises(CHMv2Error, match="quality flags rule out all 150") as raised:
            calibrate(forest, shots)
        assert calibrate(forest, follow(raised, reference=shots))[1].count == 150


def test_report_and_attrs(forest, tmp_path):
    corrected, found = calibrate(predicted(forest, BIASES["scale"]), footprints(forest))
    assert found.report.index.tolist() == [
        "none",
        "offset",
        "scale",
        "line",
        "monotone",
        "constant",
    ]
    assert found.report.columns.tolist() == ["mae", "bias", "tall_bias", "distribution"]
    text = repr(found)
    assert all(word in text for word in ("150 references", "constant", "10 to 12", "skill 0."))
    corrected.to_netcdf(tmp_path / "corrected.nc")
    corrected.to_zarr(tmp_path / "corrected.zarr", consolidated=False)
    for kept in (
        xr.open_dataarray(tmp_path / "corrected.nc"),
        xr.open_zarr(tmp_path / "corrected.zarr", consolidated=False)["canopy_height"],
    ):
        assert kept.attrs["calibration_model"] == found.model
        assert kept.attrs["calibration_slope"] == found.slope


def test_real_lidar():
    """Lidar of a Florida pine forest at 0.8 of its height, put right by plots and by shots."""
    path = DATA / "chm_tile_osbs2018" / "OSBS_399000_3284000_chm_2018_w512.tif"
    if not path.exists():
        pytest.skip("real data are absent")
    lidar = rioxarray.open_rasterio(path, masked=True).squeeze(drop=True)
    for plots in (True, False):
        given = footprints(lidar, 60, error=0.5, plots=plots)
        statistic = "mean" if plots else 98
        assert (
            calibrate(lidar, given.assign(height=given["height"]), statistic=statistic)[1].model
            == "none"
        )
        corrected, found = calibrate(lidar * 0.8, given, statistic=statistic)
        assert found.model == "scale"
        assert mean_error(corrected, lidar) < 0.25 * mean_error(lidar * 0.8, lidar)
