"""From what was asked for to what is to be done: the part that predicting and planning share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import dask.array as da
import xarray as xr

from xchmv2 import defaults
from xchmv2._dask import Job, Source
from xchmv2.errors import CHMv2Error
from xchmv2.imagery import Grid, Scene, ValueRange, WindowReader, resolve_imagery
from xchmv2.inference import Layer, ModelLike, ModelSpec, Scaling, resolve_model
from xchmv2.tiling import TileAxis, is_whole, validate_grid


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
        return max(2 * tile, int(defaults.BLOCK / max(ratio, 1)))
    chunks = scene.bands[0].array.chunks
    if chunks is None:
        return max(2 * tile, defaults.BLOCK)
    largest = max(sizes[0] for sizes in chunks[-2:])
    fits = 2 * tile <= largest <= defaults.LARGEST_BLOCK and all(
        (len(sizes) == 1 or sizes[0] == largest)
        and len(set(sizes[:-1])) <= 1
        and sizes[-1] <= sizes[0]
        for sizes in chunks[-2:]
    )
    return largest if fits else max(2 * tile, defaults.BLOCK)
