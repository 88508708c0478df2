"""Part ``scene``: a whole scene by ``predict()`` against what a user would write."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xarray as xr

from xchmv2.errors import CHMv2Error, DemoModelWarning
from xchmv2.predict import predict
from xchmv2.raster import TileAxis

from .imagery import KM2_PER_MPX, ORIGIN, as_cube, noise
from .model import OURS, THEIRS, load, tiles
from .published import careful_script, half_overlapping_tiles, sliding_window
from .report import Table
from .settings import Settings
from .timing import Action, interleave

COMPUTE, STORE, BARE = "predict().compute()", "predict() to Zarr", "bare forwards"
CAREFUL, SLIDING = "careful script", "sliding window, half overlap"


def measure_scene(settings: Settings) -> list[Table]:
    """Time a scene by ``predict()`` and by scripts around transformers, in turns.

    Parameters
    ----------
    settings : Settings
        Which network, scene, tile and device.

    Returns
    -------
    list of Table
        One row per way.

    Raises
    ------
    CHMv2Error
        If transformers is not installed.
    """
    image, axes = noise(settings.side), scene_axes(settings)
    ours, theirs = (load(settings, who, settings.dtype) for who in (OURS, THEIRS))
    pixels = tiles(settings)
    count = math.prod(len(axis.starts) for axis in axes)
    sliding = half_overlapping_tiles(image.shape[1:], settings.tile)
    options = {"batch": settings.batch, "device": settings.device}
    cube = as_cube(image).chunk(y=settings.block, x=settings.block)

    def bare() -> None:
        with torch.inference_mode():
            for first in range(0, count, settings.batch):
                ours(pixels[: count - first]).cpu()

    with TemporaryDirectory() as folder:
        actions: dict[str, Action] = {
            COMPUTE: lambda: predicted(settings, cube).compute(),
            STORE: lambda: _store(settings, cube, Path(folder) / "heights.zarr"),
            BARE: bare,
            CAREFUL: lambda: careful_script(theirs, image, *axes, **options),  # type: ignore[arg-type]
            SLIDING: lambda: sliding_window(theirs, image, settings.tile, **options),  # type: ignore[arg-type]
        }
        times = interleave(actions, settings.runs, device=settings.device, clock=settings.timer)
    mpx = settings.side**2 / 1e6
    rows: list[dict[str, Any]] = []
    for name, forwarded in zip(actions, (count, count, count, count, sliding), strict=True):
        if name in times.failed:
            raise CHMv2Error(
                "every way to predict the scene to run",
                f"{name}: {times.failed[name]}",
                "a smaller --batch or --side may do",
            )
        seconds = times.median(name)
        rows.append(
            {
                "way": name,
                "tiles": forwarded,
                "Mpx/s": mpx / seconds,
                "km2/s": mpx * KM2_PER_MPX / seconds,
                "times as fast as the script": times.ratio(name, CAREFUL),
                "times as fast as the window": times.ratio(name, SLIDING),
                "bare forwards / time": times.ratio(name, BARE),
            }
        )
    title = (
        f"A scene of {settings.side} x {settings.side} px: {settings.config}, tile "
        f"{settings.tile}, overlap {settings.overlap}, block {settings.block}, batch "
        f"{settings.batch}, {settings.dtype}"
    )
    return [Table("scene", title, rows, _NOTES)]


def scene_axes(settings: Settings) -> tuple[TileAxis, TileAxis]:
    """Tiles of the scene along y and x."""
    rows, cols = (TileAxis(settings.side, settings.tile, settings.overlap, o) for o in ORIGIN)
    return rows, cols


def predicted(settings: Settings, cube: xr.DataArray, **options: Any) -> xr.DataArray:
    """Predict lazily, in the precision of the settings."""
    given = {
        "tile": settings.tile,
        "overlap": settings.overlap,
        "block": settings.block,
        "batch_size": settings.batch,
        "device": settings.device,
        "dtype": settings.dtype,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DemoModelWarning)
        found = predict(cube, settings.checkpoint, **{**given, **options})
    assert isinstance(found, xr.DataArray)  # one layer
    return found


def _store(settings: Settings, cube: xr.DataArray, path: Path) -> None:
    predicted(settings, cube).chmv2.to_zarr(path, progress=False)
    shutil.rmtree(path)


_NOTES = (
    "The script forwards the same tiles in the same batches through transformers and blends them "
    "in numpy with everything in memory; the window is the common one, tiles that overlap by half "
    "and are averaged. Bare forwards are those of our network for as many tiles in full batches, "
    "with nothing around them: the last column is the efficiency of the pipeline in the first two "
    "rows. At 0.6 m a megapixel is 0.36 km2."
)
