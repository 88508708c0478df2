"""The whole job on real imagery, with a small random checkpoint written by transformers."""

import warnings

import numpy as np
import odc.geo.xr  # noqa: F401  (registers .odc)
import pytest
import reference
import rioxarray
import xarray as xr
from rasterio.errors import NotGeoreferencedWarning

from xchmv2.inference import tiles_forwarded

SMALL = dict(tile=64, overlap=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from transformers.models.chmv2.modeling_chmv2 import CHMv2ForDepthEstimation

    folder = tmp_path_factory.mktemp("published")
    config = transformers.CHMv2Config(**reference.tiny_config().to_dict())
    CHMv2ForDepthEstimation(config).save_pretrained(folder)
    return folder


def opened(path, **options):
    return rioxarray.open_rasterio(path, **options)


def test_bart_covers_the_source_on_an_aligned_grid(data, checkpoint):
    image = opened(data / "rgb_chm_bart2019/BART_320000_4881000_rgb_2019.tif")
    heights = image.chmv2.predict(checkpoint, resolution=0.6, **SMALL)
    lazy = image.chunk(x=300, y=200).chmv2.predict(checkpoint, resolution=0.6, **SMALL)
    box, source = heights.odc.geobox.boundingbox, image.odc.geobox.boundingbox
    assert box.left <= source.left < box.left + 0.6
    assert box.right - 0.6 < source.right <= box.right
    assert box.bottom <= source.bottom < box.bottom + 0.6
    assert box.top - 0.6 < source.top <= box.top
    for edge in (box.left, box.top):
        assert edge / 0.6 == pytest.approx(round(edge / 0.6), abs=1e-4)
    assert heights.notnull().all()
    np.testing.assert_allclose(lazy, heights, atol=5e-4)


def test_sjer_keeps_its_saturated_crowns(data, checkpoint):
    image = opened(data / "sjer052_two_dates/SJER_052_rgb_2017.tif").chunk(x=100, y=100)
    values = image.values
    assert image.attrs["_FillValue"] == 255
    bright = (values == 255).any(axis=0)
    empty = (values == 255).all(axis=0)
    assert bright.sum() > empty.sum()
    # At 0.1 m on the ground the model is refused; claim 0.6 m to look at single pixels.
    coarse = image.assign_coords(x=image.x * 6, y=image.y * 6).drop_vars("spatial_ref")
    coarse.attrs.pop("grid_mapping", None)
    coarse.encoding.clear()
    heights = coarse.rio.write_crs(32611).chmv2.predict(checkpoint, **SMALL)
    np.testing.assert_array_equal(np.isnan(heights), empty)
    at_06 = image.chmv2.predict(checkpoint, resolution=0.6, **SMALL)
    assert at_06.notnull().all()


def test_orchard_collar_is_nan_where_half_the_source_is_zero(data, checkpoint):
    image = opened(data / "rgb_misc/OAM_5c15_orchard_black_collar.tif")
    before = tiles_forwarded()
    heights = image.chmv2.predict(checkpoint, nodata=0, resolution=0.6, **SMALL)
    forwarded = tiles_forwarded() - before
    zero = (image.values == 0).all(axis=0)
    box, source = heights.odc.geobox.affine, image.odc.geobox.affine
    share = area_share(zero, (box.f - source.f) / source.e, box.e / source.e, heights.sizes["y"])
    share = area_share(
        share.T, (box.c - source.c) / source.a, box.a / source.a, heights.sizes["x"]
    ).T
    clear = np.abs(share - 0.5) > 1e-4  # but for ties by rounding
    np.testing.assert_array_equal(np.isnan(heights.values)[clear], (share > 0.5)[clear])
    assert 0.1 < np.isnan(heights.values).mean() < 0.5
    ys, xs = (
        reference.starts(heights.sizes[d], 64, 16, round(o))[0]
        for d, o in (("y", box.f / box.e), ("x", box.c / box.a))
    )
    valid = ~np.isnan(heights.values)
    needed = sum(valid[y : y + 64, x : x + 64].any() for y in ys for x in xs)
    assert forwarded == needed < len(ys) * len(xs)


def area_share(values, offset, ratio, size):
    """Mean of the rows under each target row, by cumulative sums."""
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=float)])
    edges = np.clip(np.arange(size + 1) * ratio + offset, 0, len(values))
    below = np.floor(edges).astype(int)
    rest = (edges - below)[:, None]
    upper = np.minimum(below + 1, len(values))
    at_edges = total[below] * (1 - rest) + total[upper] * rest
    return np.diff(at_edges, axis=0) / np.diff(edges)[:, None]


def test_yellowstone_without_georeference(data, checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        image = opened(data / "rgb_misc/YELL_2019_no_georef.tiff")
    with pytest.warns(UserWarning, match="imagery without a CRS"):
        heights = image.isel(y=slice(0, 500)).chmv2.predict(checkpoint, tile=224, overlap=32)
    assert heights.dims == ("y", "x")
    assert heights.shape == (500, 1249)
    assert heights.notnull().all()
    np.testing.assert_array_equal(heights.y, image.y[:500])


def test_naip_keeps_its_oblong_pixels(data, checkpoint):
    image = opened(data / "naip_rgbn/naip_m_3211605_ne_11_060_20200415.tif")
    heights = image.chmv2.predict(checkpoint, bands=(1, 2, 3), **SMALL)
    np.testing.assert_allclose(
        np.array(heights.rio.transform())[:6], np.array(image.rio.transform())[:6], atol=1e-9
    )


@pytest.mark.parametrize("kind", ["zarr", "tif"])
def test_files_keep_crs_transform_nodata_and_values(data, checkpoint, tmp_path, kind):
    image = opened(data / "naip_rgbn/naip_m_3211605_ne_11_060_20200415.tif", chunks=dict(x=100))
    mask = image.sel(band=4, drop=True) > 100
    heights = image.chmv2.predict(checkpoint, bands=(1, 2, 3), valid=mask, **SMALL)
    path = tmp_path / f"heights.{kind}"
    if kind == "zarr":
        heights.to_zarr(path, zarr_format=3, consolidated=False)
        back = xr.open_zarr(path, consolidated=False)["canopy_height"]
    else:
        heights.rio.to_raster(path)
        back = opened(path, masked=True).isel(band=0, drop=True)
        assert opened(path).rio.nodata is not None
    np.testing.assert_array_equal(back, heights.compute())
    np.testing.assert_array_equal(back.isnull(), ~mask)
    assert back.rio.crs == image.rio.crs
    assert back.odc.crs == image.odc.crs
    np.testing.assert_allclose(
        np.array(back.rio.transform())[:6], np.array(image.rio.transform())[:6], atol=1e-9
    )
    assert back.odc.geobox.shape == image.odc.geobox.shape
