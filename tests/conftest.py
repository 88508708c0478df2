import os
from contextlib import contextmanager
from pathlib import Path

import dask
import hypothesis
import numpy as np
import odc.geo.xr  # noqa: F401  (registers .odc)
import pytest
import torch
import xarray as xr

if not torch.cuda.is_available():
    # Kernels run as Python then; read when triton is first imported, by whichever test that is.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
hypothesis.settings.register_profile("xchmv2", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("xchmv2")

DATA = Path(os.environ.get("XCHMV2_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data():
    """Folder of real imagery and lidar; it is not part of the repository."""
    if not DATA.is_dir():
        pytest.skip("real test imagery is not here; point XCHMV2_TEST_DATA at it")
    return DATA


@contextmanager
def no_compute():
    """Fail if anything dask-backed is computed inside."""

    def refuse(dsk, keys, **kwargs):
        raise AssertionError("computed while it should have stayed lazy")

    with dask.config.set(scheduler=refuse):
        yield


def cube(
    shape=(200, 260),
    *,
    times=None,
    seed=0,
    dtype="uint8",
    pixel=0.6,
    crs=32633,
    origin=(-8_000_000, 800_000),
    dims=("y", "x"),
):
    """A Dataset of smooth random red, green and blue on a pixel grid at a known origin index."""
    rng = np.random.default_rng(seed)
    full = (times, *shape) if times is not None else shape
    top, left = -origin[0] * pixel, origin[1] * pixel
    coords = {
        dims[0]: top - (np.arange(shape[0]) + 0.5) * pixel,
        dims[1]: left + (np.arange(shape[1]) + 0.5) * pixel,
    }
    names = dims if times is None else ("time", *dims)
    if times is not None:
        coords["time"] = np.datetime64("2020-07-01", "ns") + np.arange(times) * np.timedelta64(
            365, "D"
        )
    bands = {
        name: (names, rng.integers(1, 256, full).astype(dtype)) for name in ("red", "green", "blue")
    }
    dataset = xr.Dataset(bands, coords)
    return dataset if crs is None else dataset.odc.assign_crs(crs)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of a small random checkpoint."""
    from reference import tiny_config

    from xchmv2.model import CHMv2ForDepthEstimation

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    CHMv2ForDepthEstimation(tiny_config()).save_pretrained(folder)
    return folder
