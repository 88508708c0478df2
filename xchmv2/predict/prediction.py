"""Imagery in, canopy height out: validate, plan, compute, label."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import dask
import dask.array as da
import numpy as np
import xarray as xr
from odc.geo.xr import xr_coords

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error
from xchmv2.imagery import Scene, ValueRange, WindowReader, resolve_imagery
from xchmv2.inference import Layer, ModelLike, ModelSpec, Scaling, resolve_model
from xchmv2.model import MODEL, OVERLAP, TILE
from xchmv2.predict.graph import predict_blocks
from xchmv2.predict.tasks import Job
from xchmv2.raster import (
    BLOCK,
    HEIGHT_ATTRS,
    HEIGHT_NAME,
    LARGEST_BLOCK,
    Grid,
    Source,
    TileAxis,
    find_crs_coordinate,
    is_whole,
    validate_grid,
)

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
    model: ModelLike = MODEL,
    *,
    bands: Sequence[Hashable] | None = None,
    value_range: ValueRange | None = None,
    nodata: float | None = None,
    valid: xr.DataArray | None = None,
    erode: int = 0,
    resolution: float | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
    block: int | None = None,
    layers: Layer | Sequence[Layer] = ("height",),
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    compile: bool = False,
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

    Examples
    --------
    >>> height = imagery.chmv2.predict()
    >>> layers = imagery.chmv2.predict(layers=("height", "bin_spread"))
    >>> list(layers.data_vars)
    ['canopy_height', 'bin_spread']
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


@dataclass(frozen=True, eq=False)
class Preparation:
    """All that a prediction is made from.

    Parameters
    ----------
    scene : Scene
        The imagery, lazy where it was.
    target : Grid
        The grid of the prediction.
    reader : WindowReader
        From source pixels to windows of the target.
    job : Job
        What to do.
    """

    scene: Scene
    target: Grid
    reader: WindowReader
    job: Job


def prepare(
    imagery: xr.Dataset | xr.DataArray,
    model: ModelLike,
    *,
    bands: Sequence[Hashable] | None,
    value_range: ValueRange | None,
    nodata: float | None,
    valid: xr.DataArray | None,
    erode: int,
    resolution: float | None,
    tile: int,
    overlap: int,
    block: int | None,
    layers: Layer | Sequence[Layer],
    device: str,
    dtype: str,
    batch_size: int | Literal["auto"],
    compile: bool,
    describe: Callable[..., ModelSpec] = resolve_model,
) -> Preparation:
    """Check everything that was asked for and resolve it; nothing is computed.

    Parameters
    ----------
    imagery, model, bands, value_range, nodata, valid, erode, resolution, tile, overlap, block, \
    layers, device, dtype, batch_size, compile
        As of :func:`xchmv2.predict.predict`.
    describe : callable, optional
        What names the model, of the parameters and return of ``resolve_model``.

    Returns
    -------
    Preparation
        Imagery, grid and job.

    Raises
    ------
    CHMv2Error
        Of the kinds that ``predict`` raises.
    """
    validate_grid(tile, overlap, block)
    wanted = _validate_options(layers, batch_size, erode)
    _validate_number("nodata", nodata, "nodata=0")
    _validate_number("resolution", resolution, "resolution=0.6")
    found = resolve_imagery(
        imagery,
        bands=bands,
        value_range=value_range,
        nodata=nodata,
        valid=valid,
        erode=erode,
        resolution=resolution,
    )
    scene, target, reader = found.scene, found.target, found.reader
    spec = describe(
        model,
        device=device,
        dtype=dtype,
        compile=compile,
        spread="bin_spread" in wanted,
        in_process=not scene.lazy,
    )
    low, high = zip(*found.ranges, strict=True)
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
    )
    return Preparation(scene, target, reader, job)


def leading_chunks(scene: Scene) -> tuple[tuple[int, ...], ...]:
    """Chunks of the dims before y and x, such as time; one a date for what is in memory.

    Parameters
    ----------
    scene : Scene
        Bands and mask.
    """
    first = scene.bands[0].array
    further = len(scene.template.dims) - 2
    chunks = first.chunks or tuple((1,) * size for size in first.shape)
    return tuple(chunks[:further])


def scene_sources(scene: Scene) -> tuple[list[Source], Source | None]:
    """Hand the arrays over to dask, with equal chunks along all dims but band, y and x.

    Parameters
    ----------
    scene : Scene
        Bands and mask.

    Returns
    -------
    bands : list of Source
        Red, green and blue.
    mask : Source or None
        The pixels declared valid.
    """
    further = len(scene.template.dims) - 2
    arrays = {id(band.array): band.array for band in scene.bands}
    found = {
        key: _as_dask(array, f"chmv2-imagery-{i}", scene.lazy, further)
        for i, (key, array) in enumerate(arrays.items())
    }
    chunks = dict(enumerate(leading_chunks(scene)))
    bands = [Source(found[id(b.array)].rechunk(chunks), b.index) for b in scene.bands]
    if scene.mask is None:
        return bands, None
    mask = _as_dask(scene.mask, "chmv2-mask", scene.lazy, further)
    return bands, Source(mask.rechunk(chunks))


def _as_dask(array: xr.DataArray, name: str, lazy: bool, further: int) -> da.Array:
    """Wrap what is in memory; one date a chunk, so that memory is that of one date."""
    if array.chunks is not None:
        return array.data
    chunks = (1,) * further + (-1,) * (array.ndim - further)
    # Computed at once, it needs no key that tells its content: hashing would only cost time.
    return da.from_array(array.values, chunks=chunks, name=None if lazy else name)


def _validate_options(
    layers: Layer | Sequence[Layer], batch_size: int | str, erode: int
) -> tuple[Layer, ...]:
    wanted: tuple[Any, ...] = (layers,) if isinstance(layers, str) else tuple(layers)
    known = get_args(Layer)
    if not wanted or not set(wanted) <= set(known) or len(set(wanted)) < len(wanted):
        raise CHMv2Error(
            f"layers out of {known}, each once",
            f"layers={layers!r}",
            "for example .predict(..., layers=('height', 'bin_spread'))",
        )
    if batch_size != "auto" and not is_whole(batch_size, 1):
        raise CHMv2Error(
            "a batch size of 1 or more, or 'auto'",
            f"batch_size={batch_size!r}",
            "leave it out: .predict(..., batch_size='auto')",
        )
    if not is_whole(erode, 0):
        raise CHMv2Error(
            "a number of pixels, 0 or more",
            f"erode={erode!r}",
            "pass how many pixels to trim around nodata: .predict(..., erode=2)",
        )
    return wanted


def _validate_number(name: str, value: object, example: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise CHMv2Error(
            f"{name} as one number", f"{name}={value!r}", f"for example .predict(..., {example})"
        )


def _default_block(scene: Scene, tile: int, ratio: float) -> int:
    """Side of an output chunk: the input's spatial chunk if it will do, else 4096 source px."""
    if ratio != 1:
        return max(2 * tile, int(BLOCK / max(ratio, 1)))
    chunks = scene.bands[0].array.chunks
    if chunks is None:
        return max(2 * tile, BLOCK)
    largest = max(sizes[0] for sizes in chunks[-2:])
    fits = 2 * tile <= largest <= LARGEST_BLOCK and all(
        (len(sizes) == 1 or sizes[0] == largest)
        and len(set(sizes[:-1])) <= 1
        and sizes[-1] <= sizes[0]
        for sizes in chunks[-2:]
    )
    return largest if fits else max(2 * tile, BLOCK)
