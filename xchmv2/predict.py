"""Imagery in, canopy height out: validate, plan, compute, label."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import dask
import numpy as np
import xarray as xr
from odc.geo.xr import xr_coords

from xchmv2 import defaults
from xchmv2._dask import Job, predict_blocks
from xchmv2._version import __version__
from xchmv2.imagery import Grid, Scene, ValueRange, find_crs_coordinate
from xchmv2.inference import Layer, ModelLike
from xchmv2.labels import HEIGHT_ATTRS, HEIGHT_NAME
from xchmv2.preparation import prepare, scene_sources

_ATTRS: dict[Layer, dict[str, str]] = {
    "height": HEIGHT_ATTRS,
    "bin_spread": {
        "long_name": "standard deviation of the height bin distribution",
        "units": "m",
    },
    "overlap_disagreement": {
        "long_name": "standard deviation of canopy height between overlapping tiles",
        "units": "m",
    },
}
_NAMES: dict[Layer, str] = {"height": HEIGHT_NAME}


def predict(
    imagery: xr.Dataset | xr.DataArray,
    model: ModelLike = defaults.MODEL,
    *,
    bands: Sequence[Hashable] | None = None,
    value_range: ValueRange | None = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
    erode: int = 0,
    resolution: float | None = None,
    tile: int = defaults.TILE,
    overlap: int = defaults.OVERLAP,
    block: int | None = None,
    layers: Layer | Sequence[Layer] = ("height",),
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    compile: bool = False,
) -> xr.DataArray | xr.Dataset:
    """Predict canopy height from high-resolution RGB imagery.

    Parameters
    ----------
    imagery : Dataset or DataArray
        (..., y, x) variables for the bands, or an array with a ``band`` dimension. Further
        dimensions, such as time, are kept.
    model : str, path, CHMv2ForDepthEstimation or ModelSpec
        Hub id, checkpoint folder, a model of this process, what :func:`xchmv2.warmup` returned,
        or "demo" for the small model that comes with the package and knows synthetic forest alone.
    bands : sequence of three names or numbers, optional
        Red, green and blue, where names and metadata do not tell.
    value_range : (low, high) or three of them, optional
        Values that stand for black and white. Needed for all but uint8; values outside are
        clipped.
    nodata : float, optional
        Nodata value, in place of the one the metadata declare.
    valid : DataArray of bool, optional
        Pixels that hold imagery, for example ``alpha == 255`` or ``~cloud``.
    erode : int, default 0
        Source pixels around invalid ones that are taken for invalid too.
    resolution : float, optional
        Ground resolution to resample to while predicting [m]; the model was trained at 0.6 m. It
        holds at the scene's centre, to half a percent: see Notes.
    tile, overlap : int
        Side of the network's window and what neighbouring windows share [px].
    block : int, optional
        Side of an output chunk [px]. By default the input's own spatial chunk where that is
        uniform, square, and from two tiles to 8192 px, else 4096 (less under strong resampling).
    layers : sequence of {"height", "bin_spread", "overlap_disagreement"}
        What to return. ``bin_spread`` is the standard deviation of the height bin distribution,
        ``overlap_disagreement`` the blend-weighted standard deviation between the tiles that
        cover a pixel, NaN where only one does.
    device : str, default "auto"
        Torch device; "auto" is CUDA where the computing process has it.
    dtype : {"auto", "float32", "bfloat16"}
        Arithmetic of the network. "auto" is bfloat16 if this process, or under a distributed
        client every worker that will forward tiles, has a CUDA card that supports it, else
        float32; a warmed-up model keeps its own. With no worker up yet, pass "bfloat16".
    batch_size : int or "auto"
        Tiles per forward.
    compile : bool, default False
        Whether each process compiles the network before its first tile, which takes minutes and
        pays on large areas alone; where it fails, a warning is given and it runs uncompiled.

    Returns
    -------
    DataArray or Dataset
        ``canopy_height`` (..., y, x) float32 [m], NaN where invalid; a Dataset with one variable
        per layer where ``layers`` is not just the height. Lazy if the imagery is dask-backed.

    Raises
    ------
    ImageryError
        If the imagery does not fit the model; the message says how to make it fit.
    GridError
        If tile, overlap and block do not form a grid.
    CheckpointError
        If the model cannot be found or its files are damaged.
    DeviceError
        If the device or dtype is not to be had.
    CHMv2Error
        If an option is outside its range.

    Notes
    -----
    On dask-backed imagery nothing is computed and no weights are loaded. The result does not
    depend on chunks, block size or area of interest, except within one tile of the imagery's edge.

    Several layers come out of one run of the network if they are computed together, as in
    ``dataset.compute()`` or one ``to_zarr``; computed one after the other, each runs it again.

    In a projection whose scale varies, such as EPSG:3857, ``resolution`` is turned into CRS units
    in steps of 1 % at the scene's centre, so that neighbouring areas share one grid; far apart
    ones may differ by a step. In UTM the step is exactly 1.

    Integer imagery is best opened as it is stored: reading it masked (``masked=True``,
    ``mask_and_scale``) makes every band's nodata value NaN by itself, and sunlit crowns that
    saturate one band are lost.

    References
    ----------
    CHMv2, arXiv:2603.06382.
    """
    ready = prepare(
        imagery,
        model,
        bands=bands,
        value_range=value_range,
        nodata=nodata,
        valid=valid,
        erode=erode,
        resolution=resolution,
        tile=tile,
        overlap=overlap,
        block=block,
        layers=layers,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        compile=compile,
    )
    scene = ready.scene
    found = predict_blocks(*scene_sources(scene), ready.job)
    if not scene.lazy:
        found = dict(zip(found, dask.compute(*found.values(), scheduler="sync"), strict=True))
    return _label(found, scene, ready.target, ready.job)


def _label(
    found: Mapping[Layer, Any], scene: Scene, target: Grid, job: Job
) -> xr.DataArray | xr.Dataset:
    """Give the pixels their names, dims, coordinates, CRS, units and provenance."""
    template = scene.template
    coords = _coords(template, scene.grid, target)
    mapping = find_crs_coordinate(coords)
    provenance = {
        **({"grid_mapping": mapping} if mapping else {}),
        "chmv2_model": job.model.model,
        "chmv2_weights_sha256": job.model.weights_sha256,
        "chmv2_dtype": job.model.dtype,
        "chmv2_tile": job.rows.tile,
        "chmv2_overlap": job.rows.overlap,
        "xchmv2_version": __version__,
    }
    variables = {}
    for layer, data in found.items():
        name = _NAMES.get(layer, layer)
        array = xr.DataArray(data, coords, template.dims, name, {**_ATTRS[layer], **provenance})
        variables[name] = array.transpose(*scene.dims).isel(scene.flipped)
        # Tells rioxarray and GDAL that NaN is nodata; xarray writes the same on its own.
        variables[name].encoding["_FillValue"] = np.float32(np.nan)
    if tuple(found) == ("height",):
        return variables[HEIGHT_NAME]
    return xr.Dataset(variables)


def _coords(template: xr.DataArray, grid: Grid, target: Grid) -> dict[Hashable, xr.DataArray]:
    """Coordinates of the result: the imagery's own, or those of the grid it is resampled to."""
    coords: dict[Hashable, xr.DataArray] = {str(n): c for n, c in template.coords.items()}
    if grid.crs is None:
        return coords
    mapping = find_crs_coordinate(coords)
    fresh = xr_coords(target.geobox, crs_coord_name=mapping or "spatial_ref", dims=grid.dims)
    if target != grid:
        kept = {n: c for n, c in coords.items() if not set(c.dims) & set(grid.dims)}
        return {**kept, **fresh}
    return coords if mapping else {**coords, "spatial_ref": fresh["spatial_ref"]}
