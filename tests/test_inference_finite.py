"""Heights that are not finite at a valid pixel are an error that names the place."""

import dask
import numpy as np
import pytest
import reference
import torch
import xarray as xr
from conftest import cube

import xchmv2
from xchmv2.errors import CHMv2Error, ConfigError
from xchmv2.inference import Predictor, Scaling, get_predictor, resolve_model
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.raster import TileAxis, tile_runs

OPTIONS = dict(tile=64, overlap=16, block=128)
LAYERS = ["height", "bin_spread", "overlap_disagreement"]
MESSAGE = r"a finite height at every valid pixel, found 1 of .* the first {} at row 140, column 201"


class Overflowing(reference.WholeTileModel):
    """Its heights are not finite where red has one value."""

    value, of_spread = np.nan, False

    def height(self, pixel_values, *, spread=False):
        height, sd = super().height(pixel_values, spread=spread)
        wrong = pixel_values[:, 0] > 2.7  # red of 255 alone
        part = sd if self.of_spread else height
        if part is not None:
            part[wrong] = torch.tensor(self.value)
        return height, sd


def overflowing(value=np.nan, depth=0.004, *, of_spread=False):
    model = Overflowing(reference.tiny_config(min_depth=depth))  # another content, another model
    model.value, model.of_spread = value, of_spread
    return model


def imagery(times=None):
    """One pixel of the last date overflows; it lies where tiles overlap."""
    found = cube((200, 260), times=times)
    found["red"] = found["red"].clip(max=250)
    found["red"][{"time": -1} if times else {}][140, 201] = 255
    return found


@pytest.mark.parametrize(
    ("value", "depth"), [(np.nan, 0.01), (np.inf, 0.02), (-np.inf, 0.03), (1e30, 0.04)]
)
@pytest.mark.parametrize("layers", [["height"], LAYERS])
def test_one_bad_pixel_of_one_tile_is_an_error(value, depth, layers):
    model = overflowing(value, depth)
    for scene in (imagery(), imagery().chunk(y=100, x=100)):
        with pytest.raises(CHMv2Error, match=MESSAGE.format(f"{value:g}".replace("+", r"\+"))):
            scene.chmv2.predict(model, layers=layers, **OPTIONS).compute(scheduler="sync")


def test_a_spread_that_is_not_finite_is_an_error():
    model = overflowing(depth=0.05, of_spread=True)
    assert imagery().chmv2.predict(model, **OPTIONS).notnull().all()  # it is not computed
    with pytest.raises(CHMv2Error, match=MESSAGE.format("nan")):
        imagery().chmv2.predict(model, layers=["bin_spread"], **OPTIONS)


def test_the_date_of_a_chunk_is_named():
    scene = imagery(times=3).chunk(time=3)
    with pytest.raises(CHMv2Error, match=r"at row 140, column 201, .*, date 3 of 3 in a chunk;"):
        scene.chmv2.predict(overflowing(), **OPTIONS).compute(scheduler="sync")


def test_nothing_that_is_not_finite_is_recorded_as_done(tmp_path):
    with dask.config.set(scheduler="sync"):
        lazy = imagery(times=2).chunk(time=1).chmv2.predict(overflowing(), **OPTIONS)
        with pytest.raises(CHMv2Error, match=r"at row 140, column 201"):
            lazy.chmv2.to_zarr(tmp_path / "heights.zarr")
        with pytest.warns(xchmv2.errors.IncompleteStoreWarning):
            written = xchmv2.open_zarr(tmp_path / "heights.zarr")
        values = written["canopy_height"] if isinstance(written, xr.Dataset) else written
        assert values[-1, 128:, 128:].isnull().all()  # the block that holds the pixel


def test_an_invalid_pixel_may_have_no_height():
    scene, model = imagery(), overflowing(np.inf, 0.06)
    valid = xr.DataArray(scene.red < 255, dims=("y", "x"))

    class Blind(Overflowing):
        def height(self, pixel_values, *, spread=False):
            height, sd = reference.WholeTileModel.height(self, pixel_values, spread=spread)
            height[(pixel_values == 0).all(dim=1)] = torch.inf  # what is invalid
            return height, sd

    blind = Blind(reference.tiny_config(min_depth=0.07))
    given = dict(layers=["height", "overlap_disagreement"], valid=valid, **OPTIONS)
    found, expected = (scene.chmv2.predict(m, **given) for m in (blind, model))
    xr.testing.assert_allclose(found, expected)
    assert int(found["canopy_height"].isnull().sum()) == 1


def accumulate(predictor, image, valid=None):
    (rows,), (cols,) = (tile_runs(TileAxis(size, 64, 16), 64) for size in image.shape[1:])
    valid = np.ones(image.shape[1:], bool) if valid is None else valid
    return predictor.accumulate(image, valid, rows, cols, scaling=Scaling(), layers=["height"])


def test_the_predictor_alone():
    predictor = get_predictor(resolve_model(overflowing(np.inf, 0.09)))
    image = np.full((3, 64, 64), 100, np.float32)
    assert np.isfinite(accumulate(predictor, image)["height"]).all()
    image[0, 3, 5] = 255
    with pytest.raises(CHMv2Error, match=r"the first inf at row 3, column 5, in the tile of rows"):
        accumulate(predictor, image)
    image[0, 3, 5] = np.nan  # said to be valid
    plain = get_predictor(resolve_model(reference.whole_tile_model()))
    with pytest.raises(CHMv2Error, match=r"found 4096 of 4096 that are not from the model"):
        accumulate(plain, image)


def made(model, dtype="float32", mean=(0, 0, 0), std=(1, 1, 1)):
    return Predictor(model, device="cpu", dtype=dtype, mean=mean, std=std)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0, 0, np.nan), (1, 1, 1)),
        ((0, 0, 0), (1, 0, 1)),
        ((0, 0, 0), (1, 1, np.inf)),
        ((0, np.inf, 0), (1, 1, 1)),
        ((0, 0, 0), (1, 1, -1)),
        ((0, 0), (1, 1)),
    ],
)
def test_a_mean_or_std_that_cannot_be_used_is_refused(mean, std):
    model = reference.whole_tile_model()
    with pytest.raises(ConfigError, match=r"finite numbers each, those of std above 0") as raised:
        made(model, mean=mean, std=std)
    given = eval(f"dict({raised.value.fix.removeprefix('pass ')})")
    image = np.full((3, 64, 64), 100, np.uint8)
    assert np.isfinite(accumulate(made(model, **given), image)["height"]).all()


def test_float16_that_overflows_runs_in_float32():
    torch.manual_seed(0)
    model = CHMv2ForDepthEstimation(reference.tiny_config())
    with torch.no_grad():
        model.backbone.norm.weight.mul_(30_000)  # finite in float16; their products are not
    half = model.half()
    scene = cube((64, 64))
    with pytest.raises(CHMv2Error, match=r"use weights of float32: .predict\(model.float\(\)\)"):
        scene.chmv2.predict(half, **OPTIONS)
    assert scene.chmv2.predict(half.float(), **OPTIONS).notnull().all()  # what the error advises


def test_bfloat16_that_overflows_runs_in_float32():
    class Rounded(reference.WholeTileModel):
        def height(self, pixel_values, *, spread=False):
            height, sd = super().height(pixel_values, spread=spread)
            return (height * torch.inf if torch.is_autocast_enabled("cpu") else height), sd

    scene, model = cube((64, 64)), Rounded(reference.tiny_config(min_depth=0.08))
    with pytest.raises(CHMv2Error, match=r"compute in float32: .predict\(..., dtype='float32'\)"):
        scene.chmv2.predict(model, dtype="bfloat16", **OPTIONS)
    assert scene.chmv2.predict(model, dtype="float32", **OPTIONS).notnull().all()


def test_weights_that_are_finite_but_too_large_are_named(tmp_path):
    model = CHMv2ForDepthEstimation(reference.tiny_config())
    with torch.no_grad():
        model.backbone.embeddings.patch_embeddings.weight.fill_(1e38)
    model.save_pretrained(tmp_path)
    with pytest.raises(CHMv2Error, match=r"found 4096 of 4096 .*diverged in training.*a lower lr"):
        cube((64, 64)).chmv2.predict(tmp_path, **OPTIONS)
