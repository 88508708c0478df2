"""predict(): imagery in, canopy height out: validate, build the graph, compute, label."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import dask
import numpy as np
import xarray as xr
from dask.system import CPU_COUNT
from odc.geo.xr import xr_coords

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error, warn
from xchmv2.imagery import Scene, ValueRange, resolve_imagery
from xchmv2.inference import (
    Layer,
    ModelLike,
    ModelSpec,
    Scaling,
    resolve_model,
    rough_seconds_per_tile,
    seconds_per_tile,
    validate_model,
)
from xchmv2.model.files import MODEL, OVERLAP, TILE
from xchmv2.predict.graph import predict_blocks
from xchmv2.predict.progress import show_tiles
from xchmv2.predict.tasks import Job
from xchmv2.raster import (
    BLOCK,
    HEIGHT_ATTRS,
    HEIGHT_NAME,
    LARGEST_BLOCK,
    Grid,
    TileAxis,
    georeference,
    is_whole,
    list_items,
    show,
    validate_flags,
    validate_grid,
    write_seconds,
)


def predict(
    imagery: xr.Dataset | xr.DataArray,
    model: ModelLike = MODEL,
    *,
    bands: Sequence[Hashable] | None = None,
    value_range: ValueRange | None = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
    erode: int = 0,
    resolution: float | None = None,
    pixel_size: float | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
    block: int | None = None,
    layers: Layer | Sequence[Layer] = ("height",),
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    compile: bool = False,
    progress: bool | None = None,
) -> xr.DataArray | xr.Dataset:
    """Predict canopy height from high-resolution RGB imagery.

    The result is a DataArray, ``canopy_height`` in metres. It is a Dataset, with one variable per
    layer, only where `layers` names anything but "height".

    Parameters
    ----------
    imagery : Dataset or DataArray
        (..., y, x) variables for the bands, or an array with a ``band`` dimension. Further
        dimensions, such as time, are kept.
    model : str, path, CHMv2ForDepthEstimation or ModelSpec
        Hub id, checkpoint folder, a model in this process, the result of :func:`xchmv2.warmup`, or
        "demo" for the small model that comes with the package and knows synthetic forest alone.
    bands : sequence of three names or numbers, optional
        Red, green and blue, if names and metadata do not identify them.
    value_range : (low, high) or three of them, optional
        Values that stand for black and white. Required except for uint8; values outside are
        clipped.
    nodata : float, optional
        Nodata value, instead of the one in the metadata.
    valid : DataArray of bool, optional
        Pixels that hold imagery, for example ``alpha == 255`` or ``~cloud``.
    erode : int, default 0
        Width of the margin around invalid pixels that is invalid too [source px].
    resolution : float, optional
        Ground resolution to resample to while predicting [m]; the model was trained at 0.6 m. It
        holds at the scene's centre, to half a percent: see Notes.
    pixel_size : float, optional
        Side of a pixel on the ground [m], for imagery without a CRS, such as a drone's.
    tile, overlap : int
        Side of the network's window, and width that neighbouring windows share [px].
    block : int, optional
        Side of an output chunk [px]. By default the input's own spatial chunk if that is uniform,
        square, and from two tiles to 8192 px, else 4096 (less under strong resampling, and 2048
        for imagery in memory).
    layers : sequence of {"height", "bin_spread", "overlap_disagreement"}
        Layers to return. ``bin_spread`` is the standard deviation of the height bin distribution,
        ``overlap_disagreement`` the blend-weighted standard deviation between the tiles that
        cover a pixel, NaN where only one does.
    device : str, default "auto"
        Torch device; "auto" is CUDA if the computing process has it, else the CPU.
    dtype : {"auto", "float32", "bfloat16"}
        Precision of the network. "auto" is bfloat16 if this process, or under a distributed client
        every worker that will forward tiles, has a CUDA GPU that computes in it, else float32; a
        warmed-up model keeps its own. Before any worker has started, pass "bfloat16".
    batch_size : int or "auto"
        Tiles per forward.
    compile : bool, default False
        Whether each process compiles the network before its first tile. This takes minutes and
        pays off only on large areas; if it fails, a warning is given and it runs uncompiled.
    progress : bool, optional
        Whether to show the tiles of imagery in memory, which is predicted at once, as a progress
        bar; by default in terminals and notebooks. Of lazy imagery nothing is computed here.

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
        If the device or dtype is unknown, or this machine has no such device.
    CHMv2Error
        If an option is outside its range, or a cluster runs another version of this package.

    Warns
    -----
    UserWarning
        If nothing tells the size of a pixel: neither a CRS nor ``pixel_size``.
        Or if the imagery is in memory and its prediction will take more than ten minutes, by
        measured or rough rates.

    Notes
    -----
    On dask-backed imagery nothing is computed and no weights are loaded. The result does not
    depend on chunks, block size or area of interest, except within one tile of the imagery's edge.
    Imagery in memory is predicted at once by the threads of this process, or by this thread alone
    where dask is set to the scheduler "sync".

    The network runs once for several layers if they are computed together, as in
    ``dataset.compute()`` or one ``to_zarr``; computed one after the other, each runs it again.

    In a projection whose scale varies, such as EPSG:3857, ``resolution`` is turned into CRS units
    in steps of 1 % at the scene's centre, so that neighbouring areas share one grid; distant areas
    may differ by a step. In UTM the factor is exactly 1.

    Open integer imagery as it is stored: reading it masked (``masked=True``, ``mask_and_scale``)
    turns nodata into NaN band by band, and sunlit crowns that saturate one band are lost.

    References
    ----------
    CHMv2, arXiv:2603.06382.

    Examples
    --------
    >>> height = imagery.chmv2.predict()
    >>> layers = imagery.chmv2.predict(layers=("height", "bin_spread"))
    >>> list(layers.data_vars)
    ['canopy_height', 'bin_spread']
    """
    if progress is not None:
        validate_flags(progress=progress)
    scene, target, job = prepare(
        imagery,
        model,
        bands=bands,
        value_range=value_range,
        nodata=nodata,
        valid=valid,
        erode=erode,
        resolution=resolution,
        pixel_size=pixel_size,
        tile=tile,
        overlap=overlap,
        block=block,
        layers=layers,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        compile=compile,
    )
    found = predict_blocks(scene, job)
    if not scene.lazy:
        found = _compute(found, scene, job, progress)
    return _label(found, scene, target, job)


#: Threads that compute imagery in memory at most: forwards on a device take turns, and while one
#: runs the others read and add up.
_MOST_THREADS = 8
#: Estimated time from which on a warning is given [s].
_LONG = 600.0


def _compute(
    lazy: Mapping[Layer, Any], scene: Scene, job: Job, progress: bool | None
) -> dict[Layer, Any]:
    """Compute a prediction of imagery in memory in the threads of this process."""
    tiles = math.prod(scene.template.shape[:-2]) * len(job.rows.starts) * len(job.cols.starts)
    window = (job.rows.window, job.cols.window)
    rate = seconds_per_tile(job.model, window) or rough_seconds_per_tile(job.model, window)
    if rate is not None and rate * tiles > _LONG:
        warn(
            f"imagery in memory is predicted at once: up to {tiles} tiles, about "
            f"{write_seconds(rate * tiles)}, and nothing is kept if it is interrupted. With "
            "imagery.chunk() the prediction is lazy, and .chmv2.to_zarr('canopy.zarr') can resume"
        )
    alone = dask.config.get("scheduler", None) in ("sync", "synchronous", "single-threaded")
    threads = dask.config.get("num_workers", None) or min(CPU_COUNT, _MOST_THREADS)
    with show_tiles(tiles, show=progress):
        found = dask.compute(
            *lazy.values(), scheduler="sync" if alone else "threads", num_workers=threads
        )
    return dict(zip(lazy, found, strict=True))


def prepare(
    imagery: xr.Dataset | xr.DataArray,
    model: ModelLike,
    *,
    tile: int,
    overlap: int,
    block: int | None,
    layers: Layer | Sequence[Layer],
    device: str,
    dtype: str,
    batch_size: int | Literal["auto"],
    compile: bool,
    describe: Callable[..., ModelSpec] = resolve_model,
    **options: Any,
) -> tuple[Scene, Grid, Job]:
    """Validate what was asked for and resolve every default; nothing is computed.

    The arguments are those of :func:`predict`, `options` those that
    :func:`xchmv2.imagery.resolve_imagery` takes; `describe` names the model, called like
    ``resolve_model``. Returns the imagery, lazy where it was, the grid of the prediction, and all
    else that the tasks need. Raises as ``predict`` does.
    """
    validate_model(model)
    validate_grid(tile, overlap, block)
    wanted = _validate_options(layers, batch_size)
    scene, target, reader, ranges = resolve_imagery(imagery, **options)
    if target.crs is None and target.side is None:
        warn(
            "imagery without a CRS, so that the size of its pixels is not known and not checked; "
            "state it: .predict(..., pixel_size=0.6) in metres on the ground, or write the CRS: "
            "imagery.rio.write_crs('EPSG:...')"
        )
    spec = describe(
        model,
        device=device,
        dtype=dtype,
        compile=compile,
        spread="bin_spread" in wanted,
        in_process=not scene.lazy,
    )
    low, high = zip(*ranges, strict=True)
    job = Job(
        model=spec,
        reader=reader,
        rows=TileAxis(target.shape[0], tile, overlap, target.origin[0]),
        cols=TileAxis(target.shape[1], tile, overlap, target.origin[1]),
        block=block or _default_block(scene, tile, max(reader.rows.ratio, reader.cols.ratio)),
        scaling=Scaling(low, high),
        layers=wanted,
        batch_size=batch_size,
        bands=tuple(band.name for band in scene.bands),
        masked=scene.mask is not None,
        unnamed=() if all(b.named for b in scene.bands) else tuple(b.label for b in scene.bands),
    )
    return scene, target, job


def _validate_options(layers: Layer | Sequence[Layer], batch_size: int | str) -> tuple[Layer, ...]:
    wanted: list[Any] = list_items(layers) or []
    known = get_args(Layer)
    names = [layer for layer in wanted if isinstance(layer, str) and layer in known]
    if not names or names != wanted or len(set(names)) < len(names):
        raise CHMv2Error(
            f"one or more of the layers {known}, each once",
            f"layers={show(layers)}",
            "for example .predict(..., layers=('height', 'bin_spread'))",
        )
    if not is_whole(batch_size, 1) and not (isinstance(batch_size, str) and batch_size == "auto"):
        raise CHMv2Error(
            "a batch size of 1 or more, or 'auto'",
            f"batch_size={show(batch_size)}",
            "leave it out: .predict(..., batch_size='auto')",
        )
    return tuple(wanted)


def _default_block(scene: Scene, tile: int, ratio: float) -> int:
    """Side of an output chunk: the input's spatial chunk if it is suitable, else 4096 source px."""
    if ratio != 1:
        return max(2 * tile, int(BLOCK / max(ratio, 1)))
    chunks = scene.bands[0].array.chunks
    if chunks is None:  # several groups, so that threads read some while others are forwarded
        return max(2 * tile, BLOCK // 2)
    largest = max(sizes[0] for sizes in chunks[-2:])
    fits = 2 * tile <= largest <= LARGEST_BLOCK and all(
        (len(sizes) == 1 or sizes[0] == largest)
        and len(set(sizes[:-1])) <= 1
        and sizes[-1] <= sizes[0]
        for sizes in chunks[-2:]
    )
    return largest if fits else max(2 * tile, BLOCK)


_ATTRS: dict[Layer, dict[str, str]] = {
    "height": HEIGHT_ATTRS,
    "bin_spread": {"long_name": "standard deviation of the height bin distribution", "units": "m"},
    "overlap_disagreement": {
        "long_name": "standard deviation of canopy height between overlapping tiles",
        "units": "m",
    },
}
_NAMES: dict[Layer, str] = {"height": HEIGHT_NAME}


def _label(
    found: Mapping[Layer, Any], scene: Scene, target: Grid, job: Job
) -> xr.DataArray | xr.Dataset:
    """Give the pixels their names, dims, coordinates, CRS, units and provenance."""
    template = scene.template
    coords = _coords(template, scene.grid, target)
    provenance = {
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
        variables[name] = georeference(array.transpose(*scene.dims).isel(scene.flipped))
        # So that rioxarray and GDAL take NaN for nodata; xarray writes the same by default.
        variables[name].encoding["_FillValue"] = np.float32(np.nan)
    if tuple(found) == ("height",):
        return variables[HEIGHT_NAME]
    return xr.Dataset(variables)


def _coords(template: xr.DataArray, grid: Grid, target: Grid) -> dict[Hashable, xr.DataArray]:
    """Coordinates of the result: the imagery's own, or those of the grid it is resampled to."""
    coords: dict[Hashable, xr.DataArray] = {str(n): c for n, c in template.coords.items()}
    if target == grid:
        return coords
    kept = {n: c for n, c in coords.items() if not set(c.dims) & set(grid.dims)}
    mapping = template.attrs.get("grid_mapping", "spatial_ref")
    fresh = xr_coords(target.geobox, crs_coord_name=mapping, dims=grid.dims)
    if grid.crs is None:
        fresh = {dim: fresh[dim].drop_attrs() for dim in grid.dims if dim in coords}
    return {**kept, **fresh}
