"""Heights to a cloud-optimised GeoTIFF, block by block; the file appears when it is complete."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
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
from xchmv2.raster import find_grid
from xchmv2.store.template import Cube, read_cube, resolve_encoding
from xchmv2.store.writing import Written

_PLAIN = {
    "driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate",
    "bigtiff": "if_safer", "interleave": "band",
}  # fmt: skip
_FINAL = {"driver": "COG", "compress": "deflate", "predictor": "yes", "bigtiff": "if_safer"}


def write_cog(
    height: xr.DataArray | xr.Dataset,
    path: str | os.PathLike[str],
    *,
    progress: bool = True,
    overwrite: bool = False,
) -> Written:
    """Write heights, their change or masks to a cloud-optimised GeoTIFF.

    Parameters
    ----------
    height : DataArray or Dataset
        (y, x) of one date; a Dataset becomes a file with one band per variable, all of the data
        type that holds every variable. Masks become uint8, dates days since 1970-01-01.
    path : str or path
        The file, which appears when it is complete.
    progress : bool, default True
        Whether to show a progress bar.
    overwrite : bool, default False
        Whether to replace an existing file.

    Returns
    -------
    Written
        Blocks and pixels written, and the time taken.

    Raises
    ------
    CHMv2Error
        If the file exists, its folder does not, there are several dates, or dask computes in other
        processes.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise CHMv2Error(f"{target} exists already", fix="replace it: overwrite=True")
    if not target.parent.is_dir():
        raise CHMv2Error(
            f"the folder {target.parent} does not exist", fix="create it, or give another"
        )
    if leaves_process():
        raise CHMv2Error(
            "a GeoTIFF is written by one process, but dask computes in others",
            fix="write to Zarr, or compute here: with dask.config.set(scheduler='threads'): ...",
        )
    cube = read_cube(height)
    if len(cube.labels) > 1:
        raise CHMv2Error(
            "heights of one date",
            f"{len(cube.labels)} along {cube.date_dim}",
            f"write each to its own file, such as height.isel({cube.date_dim}=0), or write to Zarr",
        )
    # Beside its destination, so that a rename on the same disk completes it.
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        plain, final = Path(folder) / "plain.tif", Path(folder) / "final.tif"
        done = _write_blocks(cube, plain, show=progress)
        floats = all(v.dtype.kind == "f" for v in cube.dataset.data_vars.values())
        copy(plain, final, **_FINAL, overview_resampling="average" if floats else "nearest")
        final.replace(target)
    return done


def _write_blocks(cube: Cube, path: Path, *, show: bool) -> Written:
    arrays = list(cube.arrays.values())
    first = next(iter(cube.dataset.data_vars.values()))
    grid = find_grid(first)
    place: dict[str, Any] = {}
    if grid.crs is not None or all(dim in first.coords for dim in grid.dims):
        crs = grid.crs and grid.crs.to_wkt()
        place = {"crs": crs, "transform": grid.geobox.transform}
    height, width = first.shape[-2:]
    encodings = [resolve_encoding("float32", v) for v in cube.dataset.data_vars.values()]
    dtype = np.result_type(*("uint8" if e.dtype == "bool" else e.dtype for e in encodings))
    floating = dtype.kind == "f"
    fills = [e.fill for e in encodings if e.fill is not None]
    place |= {"dtype": dtype.name, "predictor": 3 if floating else 2}
    place["nodata"] = np.nan if floating else next(iter(fills), None)
    lock, blocks = threading.Lock(), list(blocks_of(arrays[0]))
    with (
        Progress(len(blocks), 0, show=show) as bar,
        rasterio.open(
            path, "w", count=len(arrays), height=height, width=width, **_PLAIN, **place
        ) as raster,
    ):
        for band, (name, variable) in enumerate(cube.dataset.data_vars.items(), 1):
            raster.set_band_description(band, str(name))
            attrs = {**variable.attrs, **dict(encodings[band - 1].attrs)}
            if "units" in attrs:
                raster.set_band_unit(band, attrs["units"])
            kept = {str(k): str(v) for k, v in attrs.items() if k != "grid_mapping"}
            raster.update_tags(band, **kept)

        def write(rows: slice, cols: slice, parts: Sequence[npt.NDArray[Any]]) -> int:
            """Write one block of each band; GDAL allows one at a time."""
            window = Window.from_slices(rows, cols)
            with lock:
                for band, (part, encode) in enumerate(zip(parts, encodings, strict=True), 1):
                    values = encode(np.asarray(part).reshape(part.shape[-2:])).astype(dtype)
                    if floating and encode.fill is not None:
                        values[values == encode.fill] = np.nan
                    raster.write(values, band, window=window)
            return int(parts[0].shape[-2] * parts[0].shape[-1])

        sinks = {index: partial(write, rows, cols) for index, (*_, rows, cols) in blocks}
        name = f"chmv2-raster-{path.parent.name}"
        run_sinks(arrays, sinks, name=name, done=lambda _, pixels: bar.add(pixels))
    return Written(len(blocks), 0, bar.pixels, bar.seconds)
