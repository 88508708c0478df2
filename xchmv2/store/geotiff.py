"""Heights into a cloud-optimised GeoTIFF, block by block, whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import xarray as xr
from rasterio.shutil import copy
from rasterio.windows import Window

from xchmv2.errors import CHMv2Error
from xchmv2.predict import Progress, blocks_of, leaves_process, run_sinks
from xchmv2.store.template import Cube, read_cube
from xchmv2.store.writing import Written

_PLAIN = {
    "driver": "GTiff", "dtype": "float32", "nodata": np.nan, "tiled": True, "blockxsize": 512,
    "blockysize": 512, "compress": "deflate", "predictor": 3, "bigtiff": "if_safer",
    "interleave": "band",
}  # fmt: skip
_FINAL = {
    "driver": "COG", "compress": "deflate", "predictor": "floating_point",
    "overview_resampling": "average", "bigtiff": "if_safer",
}  # fmt: skip


def write_cog(
    height: xr.DataArray | xr.Dataset,
    path: str | os.PathLike[str],
    *,
    progress: bool = True,
    overwrite: bool = False,
) -> Written:
    """Write heights of one date to a cloud-optimised GeoTIFF.

    Parameters
    ----------
    height : DataArray or Dataset
        (y, x), or one date of it; a Dataset becomes a file with one band per variable.
    path : str or path
        The file. It appears when it is complete.
    progress : bool, default True
        Show a bar.
    overwrite : bool, default False
        Replace a file that is there.

    Returns
    -------
    Written
        Blocks and pixels written, and the time it took.

    Raises
    ------
    CHMv2Error
        If the file exists, its folder does not, there are several dates, or other processes
        compute.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise CHMv2Error(f"no {target} yet", "that it exists", "pass overwrite=True")
    if not target.parent.is_dir():
        raise CHMv2Error(
            f"the folder {target.parent}", "none of that name", "make it, or give another name"
        )
    if leaves_process():
        raise CHMv2Error(
            "to compute in this process, since GDAL writes here",
            "a distributed client, or a scheduler of processes",
            "write to Zarr, or compute here: with dask.config.set(scheduler='threads'): ...",
        )
    cube = read_cube(height)
    if len(cube.labels) > 1:
        raise CHMv2Error(
            "heights of one date",
            f"{len(cube.labels)} along {cube.date_dim}",
            "write one file each, such as height.isel(time=0), or .chmv2.to_zarr(store)",
        )
    # Beside its destination, so that the end is one rename and needs no other disk.
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        plain, final = Path(folder) / "plain.tif", Path(folder) / "final.tif"
        done = _write_blocks(cube, plain, show=progress)
        copy(plain, final, **_FINAL)
        final.replace(target)
    return done


@dataclass(frozen=True, eq=False)
class _WriteWindow:
    """Task: write one block of each band; GDAL takes one at a time."""

    raster: Any
    rows: slice
    cols: slice
    lock: threading.Lock = field(repr=False)

    def __call__(self, blocks: Sequence[npt.NDArray[Any]]) -> int:
        window = Window.from_slices(self.rows, self.cols)
        with self.lock:
            for band, block in enumerate(blocks, 1):
                self.raster.write(np.asarray(block).reshape(block.shape[-2:]), band, window=window)
        return int(blocks[0].shape[-2] * blocks[0].shape[-1])


def _write_blocks(cube: Cube, path: Path, *, show: bool) -> Written:
    arrays = list(cube.arrays.values())
    first = next(iter(cube.dataset.data_vars.values()))
    box = first.odc.geobox
    place = {} if box is None else {"crs": box.crs and box.crs.to_wkt(), "transform": box.transform}
    height, width = first.shape[-2:]
    lock, blocks = threading.Lock(), list(blocks_of(arrays[0]))
    with (
        Progress(len(blocks), 0, show=show) as bar,
        rasterio.open(
            path, "w", count=len(arrays), height=height, width=width, **_PLAIN, **place
        ) as raster,
    ):
        _describe(raster, cube)
        sinks = {
            index: _WriteWindow(raster, rows, cols, lock) for index, (*_, rows, cols) in blocks
        }
        name = f"chmv2-raster-{path.parent.name}"
        run_sinks(arrays, sinks, name=name, done=lambda _, pixels: bar.add(pixels))
    return Written(len(blocks), 0, bar.pixels, bar.seconds)


def _describe(raster: Any, cube: Cube) -> None:
    """Name the bands, and keep what the attributes tell of how they were made."""
    for band, (name, variable) in enumerate(cube.dataset.data_vars.items(), 1):
        raster.set_band_description(band, str(name))
        with suppress(KeyError):
            raster.set_band_unit(band, variable.attrs["units"])
        kept = {str(k): str(v) for k, v in variable.attrs.items() if k != "grid_mapping"}
        raster.update_tags(band, **kept)
