import pickle
import re
import subprocess
import sys
import threading

import dask
import numpy as np
import pytest
import reference
import rioxarray
import torch
import xarray as xr
from affine import Affine
from conftest import cube, no_compute
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_zeros

import xchmv2
from xchmv2.errors import CheckpointError, CHMv2Error, DeviceError, GridError, ImageryError
from xchmv2.inference import models as held
from xchmv2.inference import tiles_forwarded
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.predict import prediction
from xchmv2.predict.tasks import SumGroup

# Private imports: loads of a model are counted, tasks and clocks are watched.

MODEL = reference.whole_tile_model()
GRID = dict(tile=64, overlap=16)


class TestOutput:
    def test_labels(self, tiny_checkpoint):
        imagery = cube((100, 120), times=2).assign_coords(platform=("time", ["a", "b"]), run=7)
        heights = imagery.chmv2.predict(tiny_checkpoint, **GRID)
        assert isinstance(heights, xr.DataArray)
        assert heights.name == "canopy_height"
        assert heights.dtype == np.float32
        assert heights.dims == ("time", "y", "x")
        assert {n: heights.attrs[n] for n in ("standard_name", "units", "grid_mapping")} == {
            "standard_name": "canopy_height",
            "units": "m",
            "grid_mapping": "spatial_ref",
        }
        assert heights.attrs["chmv2_model"] == str(tiny_checkpoint.resolve())
        assert len(heights.attrs["chmv2_weights_sha256"]) == 64
        assert heights.attrs["chmv2_tile"] == 64
        assert heights.attrs["chmv2_overlap"] == 16
        assert heights.attrs["chmv2_dtype"] in ("float32", "bfloat16")
        assert heights.attrs["xchmv2_version"] == xchmv2.__version__
        xr.testing.assert_identical(heights.coords.to_dataset(), imagery.coords.to_dataset())
        assert "grid_mapping" not in heights.encoding
        assert heights.odc.crs == imagery.odc.crs

    def test_layers(self):
        heights = cube((100, 120)).chmv2.predict(
            MODEL, layers=("bin_spread", "overlap_disagreement"), **GRID
        )
        assert list(heights.data_vars) == ["bin_spread", "overlap_disagreement"]
        for variable in heights.data_vars.values():
            assert variable.attrs["units"] == "m"
            assert "standard_name" not in variable.attrs
        assert isinstance(
            cube((64, 64)).chmv2.predict(MODEL, layers="height", **GRID), xr.DataArray
        )

    def test_height_does_not_depend_on_the_other_layers(self):
        imagery = cube((100, 120))
        alone = imagery.chmv2.predict(MODEL, **GRID)
        layers = ("overlap_disagreement", "height", "bin_spread")
        np.testing.assert_array_equal(
            alone, imagery.chmv2.predict(MODEL, layers=layers, **GRID)["canopy_height"]
        )

    @pytest.mark.parametrize(
        "dims", [("time", "band", "y", "x"), ("band", "time", "y", "x"), ("y", "x", "band", "time")]
    )
    def test_dims_order_survives(self, dims):
        imagery = cube((70, 90), times=2)
        expected = imagery.chmv2.predict(MODEL, **GRID)
        stacked = imagery.to_dataarray("band").transpose(*dims)
        kept = tuple(d for d in dims if d != "band")
        for form in (stacked, stacked.chunk(y=40, band=1), stacked.chunk(time=1, band=3)):
            found = form.chmv2.predict(MODEL, **GRID)
            assert found.dims == kept
            assert "band" not in found.coords
            np.testing.assert_allclose(found.transpose(*expected.dims), expected, atol=5e-4)

    def test_several_further_dims(self):
        imagery = xr.concat([cube((70, 70), seed=s) for s in range(4)], "n")
        cubed = imagery.assign_coords(a=("n", [0, 0, 1, 1]), b=("n", [0, 1, 0, 1]))
        cubed = cubed.set_index(n=["a", "b"]).unstack("n").transpose("a", "b", "y", "x")
        found = cubed.astype("uint8").chunk(a=1).chmv2.predict(MODEL, **GRID)
        assert found.dims == ("a", "b", "y", "x")
        np.testing.assert_allclose(
            found.isel(a=1, b=0), cube((70, 70), seed=2).chmv2.predict(MODEL, **GRID), atol=5e-4
        )

    def test_geographic_names_of_dims_survive(self):
        imagery = cube((70, 70), dims=("northing", "easting"), crs=None)
        renamed = imagery.rename(northing="lat", easting="lon")
        assert renamed.chmv2.predict(MODEL, pixel_size=0.6, **GRID).dims == ("lat", "lon")

    @pytest.mark.parametrize("chunked", [False, True])
    def test_south_up_imagery_gives_the_same_ground_the_same_height(self, chunked):
        imagery = cube((100, 130))
        expected = imagery.chmv2.predict(MODEL, **GRID)
        turned = imagery.isel(y=slice(None, None, -1), x=slice(None, None, -1))
        found = (turned.chunk(y=30) if chunked else turned).chmv2.predict(MODEL, **GRID)
        np.testing.assert_array_equal(found.y, turned.y)
        np.testing.assert_array_equal(found.x, turned.x)
        xr.testing.assert_allclose(found.sortby("y", ascending=False).sortby("x"), expected)

    def test_raster_without_coordinates_and_its_rows_turned(self, tmp_path):
        """A transform alone, south up: the same ground must get the same height."""
        imagery = cube((150, 170), pixel=0.3, origin=(-16_000_000, 1_600_000))
        stacked = imagery.to_dataarray("band").transpose("band", "y", "x")
        turned = stacked.isel(y=slice(None, None, -1))
        turned = turned.rio.write_transform(turned.rio.transform(recalc=True))
        turned.rio.to_raster(tmp_path / "south_up.tif")
        options = dict(resolution=0.6, **GRID)
        with_coords, without = (
            rioxarray.open_rasterio(
                tmp_path / "south_up.tif", parse_coordinates=given
            ).chmv2.predict(MODEL, **options)
            for given in (True, False)
        )
        expected = imagery.chmv2.predict(MODEL, **options)
        for found in (with_coords, without):
            north_up = found.sortby("y", ascending=False)
            np.testing.assert_allclose(north_up, expected, atol=5e-4)
            np.testing.assert_allclose(north_up.y, expected.y)

    def test_values_outside_the_range_are_clipped(self):
        imagery = cube((64, 64)).astype("uint16") * 20
        found = imagery.chmv2.predict(MODEL, value_range=(1000, 3000), **GRID)
        clipped = imagery.clip(1000, 3000)
        np.testing.assert_array_equal(
            found, clipped.chmv2.predict(MODEL, value_range=(1000, 3000), **GRID)
        )

    def test_scaled_uint16_equals_uint8(self):
        imagery = cube((64, 64))
        scaled = imagery.astype("uint16") * 10 + 3
        np.testing.assert_allclose(
            scaled.chmv2.predict(MODEL, value_range=(3, 2553), **GRID),
            imagery.chmv2.predict(MODEL, **GRID),
            atol=5e-4,
        )

    def test_band_without_time_is_shared_by_all_dates(self):
        imagery = cube((64, 64), times=2)
        imagery["blue"] = imagery["blue"].isel(time=0, drop=True)
        found = imagery.chmv2.predict(MODEL, **GRID)
        full = imagery.assign(blue=imagery["blue"].broadcast_like(imagery["red"]))
        np.testing.assert_array_equal(found, full.chmv2.predict(MODEL, **GRID))


class TestValid:
    def test_invalid_is_nan_and_valid_is_not(self):
        imagery = cube((100, 120), times=2).astype("float32")
        imagery["red"][dict(time=0, y=slice(10, 40), x=slice(0, 90))] = np.nan
        found = imagery.chmv2.predict(MODEL, value_range=(0, 255), **GRID)
        np.testing.assert_array_equal(found.isnull(), imagery["red"].isnull())

    def test_nodata_value_never_matters(self):
        imagery = cube((100, 120)).clip(1, 250)
        hole = dict(y=slice(30, 60), x=slice(20, 70))
        found = []
        for nodata in (0, 255):
            holed = imagery.copy(deep=True)
            for band in holed.data_vars.values():
                band[hole] = nodata
            found.append(holed.chmv2.predict(MODEL, nodata=nodata, **GRID))
        np.testing.assert_array_equal(*found)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_mask_and_erosion(self, chunked):
        from scipy import ndimage

        imagery = cube((100, 120), times=2)
        mask = imagery["red"].isel(time=0, drop=True) != 7
        if chunked:
            imagery, mask = imagery.chunk(y=33, x=41, time=1), mask.chunk(y=20)
        found = imagery.chmv2.predict(MODEL, valid=mask, erode=1, **GRID)
        trimmed = ndimage.binary_dilation(~mask.values, np.ones((3, 3)))
        for date in found:
            np.testing.assert_array_equal(date.isnull(), trimmed)

    def test_all_nodata_never_loads_the_model(self, tiny_checkpoint, monkeypatch):
        def refuse(spec):
            raise AssertionError("model loaded")

        monkeypatch.setattr(held, "_predictors", {})
        monkeypatch.setattr(held, "_load", refuse)
        imagery = xr.zeros_like(cube((100, 120), times=2))
        before = tiles_forwarded()
        for form in (imagery, imagery.chunk(y=50)):
            found = form.chmv2.predict(tiny_checkpoint, nodata=0, **GRID).compute()
            assert found.isnull().all()
            assert found.dims == ("time", "y", "x")
        assert tiles_forwarded() == before


class TestResampling:
    @pytest.mark.parametrize("pixel", [0.15, 0.25, 1.1])
    def test_any_chunking(self, pixel):
        imagery = cube(
            (330, 300), pixel=pixel, origin=(-int(4_800_001 / pixel), int(500_001 / pixel))
        )
        imagery["red"][60:200, 100:220] = 0
        imagery["green"][60:200, 100:220] = 0
        imagery["blue"][60:200, 100:220] = 0
        options = dict(resolution=0.6, nodata=0, erode=1, **GRID)
        expected = imagery.chmv2.predict(MODEL, **options)
        assert expected.isnull().any()
        assert expected.odc.geobox.resolution.x == pytest.approx(0.6)
        for chunks in (dict(y=100, x=77), dict(y=1, x=-1)):
            for block in (64, 100, None):
                found = imagery.chunk(chunks).chmv2.predict(MODEL, block=block, **options)
                np.testing.assert_allclose(found, expected, atol=5e-4)

    def test_equals_resampling_by_gdal_then_predicting(self):
        """Whole-pixel area averages: GDAL's and ours must agree."""
        imagery = cube((240, 300), pixel=0.3, origin=(-16_000_000, 1_600_000))
        box = GeoBox.from_bbox(imagery.odc.geobox.boundingbox, imagery.odc.crs, resolution=0.6)
        smooth = imagery.astype("float32").odc.reproject(box, resampling="average")
        expected = smooth.chmv2.predict(MODEL, value_range=(0, 255), **GRID)
        found = imagery.chmv2.predict(MODEL, resolution=0.6, **GRID)
        np.testing.assert_allclose(found.x, expected.x)
        np.testing.assert_allclose(found.y, expected.y)
        np.testing.assert_allclose(found, expected, atol=2e-3)

    def test_coordinates(self):
        imagery = cube((200, 200), times=2, pixel=0.3, origin=(-16_000_000, 1_600_000))
        imagery = imagery.assign_coords(
            lat=(("y", "x"), np.zeros((200, 200))), cloud=("time", [0.1, 0.2])
        )
        found = imagery.chmv2.predict(MODEL, resolution=0.6, **GRID)
        assert set(found.coords) == {"time", "cloud", "y", "x", "spatial_ref"}
        assert found.rio.crs == imagery.rio.crs
        assert found.rio.resolution(recalc=True) == pytest.approx((0.6, -0.6))
        assert found.attrs["grid_mapping"] == "spatial_ref"


class TestSchedulers:
    def test_threads_and_sync(self):
        imagery = cube((300, 300), times=2).chunk(time=1, y=128, x=128)
        lazy = imagery.chmv2.predict(MODEL, **GRID)
        one = lazy.compute(scheduler="sync")
        many = lazy.compute(scheduler="threads", num_workers=4)
        xr.testing.assert_identical(one, many)
        xr.testing.assert_allclose(one, imagery.compute().chmv2.predict(MODEL, **GRID), atol=5e-4)

    def test_distributed(self, tiny_checkpoint):
        distributed = pytest.importorskip("distributed")
        imagery = cube((300, 300)).chunk(y=128, x=128)
        expected = imagery.chmv2.predict(tiny_checkpoint, **GRID).compute(scheduler="sync")
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=":0"
            ) as cluster,
            distributed.Client(cluster),
        ):
            lazy = imagery.chmv2.predict(tiny_checkpoint, **GRID)
            np.testing.assert_allclose(lazy.compute(), expected, atol=5e-4)
            with pytest.raises(CheckpointError, match=r"live model while a distributed client"):
                imagery.chmv2.predict(MODEL, **GRID)

    def test_graph_pickles_small(self, tiny_checkpoint):
        lazy = cube((300, 300)).chunk().chmv2.predict(tiny_checkpoint, **GRID)
        own = [v for k, v in lazy.__dask_graph__().items() if str(k).startswith("('chmv2")]
        assert own
        assert max(len(pickle.dumps(task)) for task in own) < 4000


class TestInMemory:
    def test_threads_of_this_process_or_this_thread_alone(self, monkeypatch):
        imagery = cube((200, 260), times=2)
        used, whole = set(), SumGroup.__call__

        def spy(task, chunks):
            used.add(threading.current_thread().name)
            return whole(task, chunks)

        monkeypatch.setattr(SumGroup, "__call__", spy)
        found = imagery.chmv2.predict(MODEL, block=64, **GRID)
        assert threading.current_thread().name not in used
        assert len(used) <= 8
        used.clear()
        with dask.config.set(scheduler="sync"):
            alone = imagery.chmv2.predict(MODEL, block=64, **GRID)
        assert used == {threading.current_thread().name}
        np.testing.assert_allclose(found, alone, atol=5e-4)

    def test_blocks_are_smaller_than_those_of_lazy_imagery(self):
        assert cube((64, 64)).chmv2.plan(MODEL, **GRID).job.block == 2048
        assert cube((64, 64)).chunk().chmv2.plan(MODEL, **GRID).job.block == 4096

    def test_progress_counts_every_tile_once(self, capsys):
        imagery = cube((200, 260), times=2)
        for band in imagery.data_vars.values():
            band[0, :100] = 0  # some tiles have no valid pixel, some groups neither
        options = dict(nodata=0, block=64, **GRID)
        tiles = imagery.chmv2.plan(MODEL, **options).tiles
        imagery.chmv2.predict(MODEL, progress=True, **options)
        assert f"{tiles}/{tiles}" in capsys.readouterr().err
        imagery.chmv2.predict(MODEL, **options)  # no terminal
        imagery.chmv2.predict(MODEL, progress=False, **options)
        assert capsys.readouterr().err == ""

    def test_what_takes_long_is_told_with_a_way_out(self, monkeypatch, tmp_path):
        imagery = cube((100, 130))
        monkeypatch.setattr(prediction, "seconds_per_tile", lambda spec, window: 3600.0)
        with pytest.warns(UserWarning, match=r"up to 12 tiles, about 12 h.*can resume") as told:
            found = imagery.chmv2.predict(MODEL, **GRID)
        assert told[0].filename == __file__
        calls = r"imagery\.chunk\(\)|\.chmv2\.to_zarr\([^)]*\)"
        chunk, write = re.findall(calls, str(told[0].message))
        monkeypatch.chdir(tmp_path)
        lazy = eval(chunk, {"imagery": imagery}).chmv2.predict(MODEL, **GRID)  # and no warning
        eval(f"lazy{write}", {"lazy": lazy})
        np.testing.assert_allclose(xchmv2.open_zarr("canopy.zarr"), found, atol=5e-4)


class TestLaziness:
    def test_nothing_is_computed_and_the_input_is_untouched(self):
        imagery = cube((100, 100), times=2).chunk(y=40)
        before = imagery.copy(deep=True)
        mask = imagery["red"] > 3
        with no_compute():
            lazy = imagery.chmv2.predict(
                MODEL, valid=mask, resolution=0.5, layers=("height", "bin_spread"), **GRID
            )
            assert dask.is_dask_collection(lazy)
            repr(lazy)
        xr.testing.assert_identical(imagery, before)

    def test_importing_the_package_does_not_import_torch(self):
        code = (
            "import sys, xchmv2; assert 'torch' not in sys.modules; import xarray as xr; "
            "xr.Dataset().chmv2; assert 'torch' not in sys.modules; xchmv2.CHMv2Config"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_default_block_follows_the_input(self):
        def blocks(**chunks):
            lazy = cube((700, 900)).chunk(chunks).chmv2.predict(MODEL, **GRID)
            return lazy.chunks

        assert blocks(y=200, x=200) == ((200,) * 3 + (100,), (200,) * 4 + (100,))
        assert blocks(y=-1, x=-1) == ((700,), (900,))
        assert blocks(y=100, x=200) == ((700,), (900,))  # not square: 4096
        assert blocks(y=(300, 400), x=300) == ((700,), (900,))  # not uniform
        assert blocks(y=100, x=100) == ((700,), (900,))  # below two tiles

    def test_result_chains(self, tmp_path):
        imagery = cube((300, 300), times=2).chunk(time=1, y=150, x=150)
        lazy = imagery.chmv2.predict(MODEL, **GRID)
        expected = lazy.compute()
        part = dict(time=1, y=slice(10, 100), x=slice(20, 60))
        xr.testing.assert_identical(lazy.isel(part).compute(), expected.isel(part))
        xr.testing.assert_identical(lazy.persist().compute(), expected)
        xr.testing.assert_identical((lazy + 1).compute(), expected + 1)
        mapped = xr.map_blocks(lambda a: a * 2, lazy, template=lazy)
        np.testing.assert_array_equal(mapped, expected * 2)
        assert lazy.groupby("time.year").mean().sizes["year"] == 2
        lazy.to_zarr(tmp_path / "out.zarr", zarr_format=3, consolidated=False)
        back = xr.open_zarr(tmp_path / "out.zarr", consolidated=False)
        np.testing.assert_array_equal(back["canopy_height"], expected)
        assert back["canopy_height"].attrs["grid_mapping"] == "spatial_ref"
        lazy.isel(time=0).rio.to_raster(tmp_path / "out.tif")
        raster = rioxarray.open_rasterio(tmp_path / "out.tif").isel(band=0)
        np.testing.assert_array_equal(raster, expected.isel(time=0))


BAD_OPTIONS = [
    (dict(tile=100), GridError, r"multiple of 32 px, found tile=100"),
    (dict(overlap=40), GridError, r"overlap of 0 to half a tile"),
    (dict(block=32), GridError, r"block of at least one tile"),
    (dict(batch_size=-1), CHMv2Error, r"batch size of 1 or more, or 'auto', found batch_size=-1"),
    (dict(batch_size=1.5), CHMv2Error, r"found batch_size=1.5"),
    (
        dict(layers=("heigth",)),
        CHMv2Error,
        r"one or more of the layers .*'height'.*found layers=\('heigth',\)",
    ),
    (dict(layers=()), CHMv2Error, r"one or more of the layers"),
    (dict(erode=-1), CHMv2Error, r"erode as a whole number of at least 0 px, found erode=-1"),
    (dict(batch_size=True), CHMv2Error, r"found batch_size=True"),
    (dict(nodata="x"), CHMv2Error, r"nodata as one number, found nodata='x'"),
    (dict(nodata=(0, 0, 0)), CHMv2Error, r"nodata as one number"),
    (dict(resolution="0.6"), CHMv2Error, r"resolution as a number.*found resolution='0.6'"),
    (dict(block=128.0), GridError, r"whole pixels, found block=128.0"),
    (dict(device="gpu"), DeviceError, r"found device='gpu'"),
    (dict(bands=("a", "b", "c")), ImageryError, r"three different bands of"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        cube((64, 64)).chmv2.predict(MODEL, **{**GRID, **options})


def test_the_reprojection_in_the_message_works():
    box = GeoBox((150, 150), Affine(6e-6, 0, 7.0, 0, -6e-6, 45.0), 4326)
    imagery = xr.Dataset(
        {n: xr_zeros(box, dtype="uint8") + np.uint8(90) for n in ("red", "green", "blue")}
    )
    with pytest.raises(ImageryError) as refused:
        imagery.chmv2.predict(MODEL, **GRID)
    call = refused.value.fix.removeprefix("reproject it: ").replace(
        "predict(...)", "predict(MODEL, **GRID)"
    )
    heights = eval(call)
    assert heights.odc.crs.to_epsg() == 32632
    assert heights.notnull().any()


class TestBadModels:
    def test_folder_without_config(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"config.json"):
            cube((64, 64)).chmv2.predict(tmp_path, **GRID)

    def test_truncated_weights(self, tiny_checkpoint, tmp_path):
        for file in tiny_checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model.safetensors"):
            cube((64, 64)).chmv2.predict(tmp_path, **GRID)

    def test_model_for_another_number_of_channels(self, tmp_path):
        backbone = {**reference.tiny_config().backbone_config.to_dict(), "num_channels": 4}
        model = CHMv2ForDepthEstimation(reference.tiny_config(backbone_config=backbone))
        model.save_pretrained(tmp_path)
        for given in (model, tmp_path):
            with pytest.raises(CheckpointError, match=r"three bands, found num_channels=4"):
                cube((64, 64)).chunk().chmv2.predict(given, **GRID)

    def test_spread_of_a_plain_regression(self):
        model = CHMv2ForDepthEstimation(reference.tiny_config(number_output_channels=1))
        with pytest.raises(CHMv2Error, match=r"spread"):
            cube((64, 64)).chunk().chmv2.predict(model, layers=("bin_spread",), **GRID)


def test_reads_like_the_published_pipeline(tiny_checkpoint):
    """One tile through processor and model, as the published example does it."""
    from xchmv2.model import CHMv2ImageProcessor

    imagery = cube((64, 64), crs=None)
    image = imagery.to_dataarray("band").transpose("y", "x", "band").values
    model = CHMv2ForDepthEstimation.from_pretrained(tiny_checkpoint)
    with torch.inference_mode():
        outputs = model(**CHMv2ImageProcessor()(image, return_tensors="pt"))
    options = {"pixel_size": 0.6, "dtype": "float32", "device": "cpu", **GRID}
    found = imagery.chmv2.predict(tiny_checkpoint, **options)
    np.testing.assert_allclose(found, outputs.predicted_depth[0], atol=1e-4)
