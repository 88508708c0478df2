"""plan(): what a prediction will do, before it does it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from numbers import Real
from typing import Any, Literal, Self

import numpy as np
import torch
import xarray as xr

from xchmv2.errors import CheckpointError, CHMv2Error
from xchmv2.imagery import Scene, ValueRange
from xchmv2.inference import (
    Layer,
    ModelLike,
    ModelSpec,
    active_client,
    resolve_batch,
    resolve_device,
    resolve_model,
    seconds_per_tile,
)
from xchmv2.model.files import MODEL, OVERLAP, TILE
from xchmv2.predict.prediction import prepare
from xchmv2.predict.tasks import Job
from xchmv2.raster import (
    Grid,
    Row,
    Source,
    as_html,
    as_text,
    find_period,
    ground_pixel,
    runs_by_block,
    write_bytes,
    write_crs,
    write_period,
    write_pixel,
    write_seconds,
    write_share,
    write_sizes,
)


def plan(
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
) -> PredictionPlan:
    """Tell what :func:`xchmv2.predict.predict` will do with the same arguments.

    Parameters
    ----------
    imagery : Dataset or DataArray
        The imagery; it is not modified.
    model : str, path, CHMv2ForDepthEstimation or ModelSpec
        As for ``predict``. For a model on the hub the configuration is fetched, not the weights.
        Where the model cannot be found, the plan says so and holds for all else.
    bands, value_range, nodata, valid, erode, resolution, pixel_size, tile, overlap, block, \
    layers, device, dtype, batch_size, compile
        As for ``predict``.

    Returns
    -------
    PredictionPlan
        Printed as text, and as a table in notebooks.

    Raises
    ------
    ImageryError, GridError, ConfigError, DeviceError, CHMv2Error
        As ``predict`` does.

    Notes
    -----
    Nothing is computed and no weights are loaded. For imagery and masks in memory the valid pixels
    are counted, which takes about as long as reading them once.

    Examples
    --------
    >>> plan = imagery.chmv2.plan(block=1024)
    >>> print(plan.timed(tiles_per_second=20.0))
    <xchmv2 prediction plan, nothing computed yet>
    ...
    """
    problems: list[CheckpointError] = []

    def describe(model: ModelLike, *, device: str, dtype: str, **options: Any) -> ModelSpec:
        try:
            return resolve_model(model, device=device, dtype=dtype, weights=False, **options)
        except CheckpointError as error:
            problems.append(error)
            return ModelSpec(_name_model(model), None, "", "", device, dtype)

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
        describe=describe,
    )
    return _count(scene, target, job, problems)


@dataclass(frozen=True, repr=False)
class PredictionPlan:
    """What a prediction will do, as :func:`xchmv2.predict.plan` found out; print it to read it.

    Parameters
    ----------
    job : Job
        Tile grid, blocks, layers and model, as the prediction's tasks hold them.
    source_sizes, sizes : mapping of str to int
        Dims of the imagery without its bands, and of the result, in the result's order [px].
    values : str
        dtype of the imagery.
    lazy : bool
        Whether the result will be dask-backed; else ``predict`` computes at once.
    resampled : bool
        Whether the imagery is resampled to another grid.
    period : tuple of str or None
        First and last day.
    crs : str or None
        EPSG code or name.
    source_pixel, pixel : tuple of float or None
        Height and width of a pixel on the ground, of imagery and result [m]; None where
        neither a CRS nor ``pixel_size`` tells.
    date_chunks : int
        Chunks of dates: tasks handle those of one chunk together.
    skipped : Skipped or None
        Tiles without a valid pixel; None where only reading the imagery would tell.
    memory : TaskMemory
        Arrays of the largest tasks.
    model_problem : str or None
        Why ``predict`` would refuse the model.
    device, batch_size, seconds_per_tile : optional
        Device of this process, tiles per forward on it, and the mean time that a tile of this size
        has taken in this process [s]. None under a distributed client, whose workers have their
        own; the time is None too before this process has forwarded such tiles.
    assumed : bool
        Whether the time per tile was given to :meth:`timed`, not measured.
    """

    job: Job
    source_sizes: Mapping[str, int]
    sizes: Mapping[str, int]
    values: str
    lazy: bool
    resampled: bool
    period: tuple[str, str] | None
    crs: str | None
    source_pixel: tuple[float, float] | None
    pixel: tuple[float, float] | None
    date_chunks: int
    skipped: _Skipped | None
    memory: _TaskMemory
    model_problem: str | None = None
    device: str | None = None
    batch_size: int | None = None
    seconds_per_tile: float | None = None
    assumed: bool = False

    @property
    def dates(self) -> int:
        """Images: the product of all dims but the two spatial ones."""
        return math.prod(self.sizes.values()) // (self.job.rows.size * self.job.cols.size)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Tiles along y and x."""
        return len(self.job.rows.starts), len(self.job.cols.starts)

    @property
    def tiles(self) -> int:
        """Tiles of all dates, including those skipped."""
        return math.prod(self.tile_grid) * self.dates

    @property
    def forwards(self) -> int:
        """Tiles that the network will see; an upper bound unless ``skipped`` is exact."""
        return self.tiles - (0 if self.skipped is None else self.skipped.tiles)

    @property
    def skipped_share(self) -> float | None:
        """Share of the tiles that hold no valid pixel, 0 to 1; a lower bound unless exact."""
        return None if self.skipped is None else self.skipped.tiles / self.tiles

    @property
    def block_grid(self) -> tuple[int, int]:
        """Blocks along y and x."""
        rows, cols = self.job.chunks
        return len(rows), len(cols)

    @property
    def group_tasks(self) -> int:
        """Tasks that run the network."""
        return math.prod(len(runs) for runs in self.job.runs) * self.date_chunks

    @property
    def block_tasks(self) -> int:
        """Tasks that make the output's chunks, for all layers."""
        return math.prod(self.block_grid) * self.date_chunks * len(self.job.layers)

    @property
    def tasks(self) -> int:
        """Tasks of the prediction, without those that read the imagery."""
        return self.group_tasks + self.block_tasks

    @property
    def megapixels(self) -> float:
        """Pixels of the result over all dates, one layer [Mpx]."""
        return math.prod(self.sizes.values()) / 1e6

    @property
    def area(self) -> float | None:
        """Ground that one date covers, by the pixel at its centre [km2]; None if not known."""
        if self.pixel is None:
            return None
        return self.job.rows.size * self.job.cols.size * math.prod(self.pixel) / 1e6

    @property
    def output_bytes(self) -> int:
        """Size of the result in memory, all layers [bytes]."""
        return _FLOAT32 * math.prod(self.sizes.values()) * len(self.job.layers)

    @property
    def seconds(self) -> float | None:
        """Time the network takes on one device for all ``forwards`` [s]; None if not known."""
        return None if self.seconds_per_tile is None else self.forwards * self.seconds_per_tile

    def timed(self, tiles_per_second: float) -> Self:
        """Return the same plan with a speed that you know.

        Parameters
        ----------
        tiles_per_second : float
            Tiles that all devices together forward in a second, as ``python -m tests.benchmarks``
            measures for one.

        Returns
        -------
        PredictionPlan
            With ``seconds``.

        Raises
        ------
        CHMv2Error
            If it is not a number above 0.
        """
        number = isinstance(tiles_per_second, Real) and not isinstance(tiles_per_second, bool)
        if not number or not 0 < tiles_per_second < math.inf:
            raise CHMv2Error(
                "tiles a second as a number above 0",
                f"tiles_per_second={tiles_per_second!r}",
                "for example plan.timed(20)",
            )
        return replace(self, seconds_per_tile=1 / float(tiles_per_second), assumed=True)

    def __repr__(self) -> str:
        return as_text(f"<{_TITLE}>", _write_rows(self))

    def _repr_html_(self) -> str:
        return as_html(_TITLE, _write_rows(self), _draw_grid(self.job))


@dataclass(frozen=True)
class _Skipped:
    """Tiles that hold no valid pixel, and so never reach the network.

    Parameters
    ----------
    tiles : int
        How many, over all dates.
    exact : bool
        False where only a mask is known, so that there may be more.
    """

    tiles: int
    exact: bool


@dataclass(frozen=True)
class _TaskMemory:
    """Arrays of the largest task of each kind [bytes], without the network and its batches.

    Parameters
    ----------
    chunks : int
        Chunks of the imagery over the largest tile group; 0 for imagery in memory.
    window : int
        The pixels cut from them, and the temporary arrays of preparing and adding them up.
    sums : int
        The weighted sums of the group's tiles, which it returns.
    gathered : int
        The sums of all groups that reach into one block.
    block : int
        One block of one layer, which is the output, and the temporary arrays of deriving it.
    """

    chunks: int
    window: int
    sums: int
    gathered: int
    block: int

    @property
    def of_group(self) -> int:
        """Upper bound for a task that runs the network [bytes]."""
        return self.chunks + self.window + self.sums

    @property
    def of_block(self) -> int:
        """Upper bound for a task that adds up groups [bytes]."""
        return self.gathered + self.block


_TITLE = "xchmv2 prediction plan, nothing computed yet"
_FLOAT32 = 4


def _name_model(model: ModelLike) -> str:
    name = model.model if isinstance(model, ModelSpec) else model
    return type(name).__name__ if isinstance(name, torch.nn.Module) else str(name)


def _count(
    scene: Scene, target: Grid, job: Job, problems: Sequence[CheckpointError]
) -> PredictionPlan:
    sizes = dict(zip(scene.template.dims, scene.template.shape, strict=True))
    source = {str(dim): sizes[dim] for dim in scene.dims}
    known = target.crs is not None or target.side is not None
    return PredictionPlan(
        job=job,
        source_sizes=source,
        sizes={**source, **dict(zip(target.dims, target.shape, strict=True))},
        values=" and ".join(dict.fromkeys(str(band.array.dtype) for band in scene.bands)),
        lazy=scene.lazy,
        resampled=not job.reader.is_identity,
        period=find_period(scene.template),
        crs=write_crs(target.crs),
        source_pixel=ground_pixel(scene.grid) if known else None,
        pixel=ground_pixel(target) if known else None,
        date_chunks=math.prod(len(chunks) for chunks in scene.leading_chunks),
        skipped=_count_skipped(scene, job),
        memory=_estimate_memory(scene, job),
        model_problem=str(problems[0]) if problems else None,
        **_find_device(job, lazy=scene.lazy, found=not problems),
    )


def _find_device(job: Job, *, lazy: bool, found: bool) -> dict[str, Any]:
    """Device, batch and speed of this process; those of a cluster's workers are not known."""
    if lazy and active_client() is not None:
        return {}
    window = (job.rows.window, job.cols.window)
    device = resolve_device(job.model.device)
    pixels, compiled = math.prod(window), job.model.compile
    return {
        "device": device,
        "batch_size": resolve_batch(
            job.batch_size, pixels, torch.device(device), compiled=compiled
        ),
        "seconds_per_tile": seconds_per_tile(job.model, window) if found else None,
    }


def _count_skipped(scene: Scene, job: Job) -> _Skipped | None:
    """Count the tiles without a valid pixel, from what is in memory; None where that cannot tell.

    It goes through the groups as the tasks will, so that it holds no more than they do.
    """
    reader, mask = job.reader, scene.mask
    never = reader.valid_pixels.never_invalid([band.array.dtype for band in scene.bands])
    if never and mask is None:
        return _Skipped(0, exact=True)
    known = not never and all(_in_memory(band.array) for band in scene.bands)
    if not (known if mask is None else _in_memory(mask)):
        return None
    if not known:  # the mask alone: as if all bands were valid everywhere
        rule = replace(reader.valid_pixels, nodata=(None, None, None))
        reader = replace(reader, valid_pixels=rule)
    tiles = 0
    for date in np.ndindex(scene.template.shape[:-2]):
        for rows, cols in product(*job.runs):
            target = ((rows.start, rows.stop), (cols.start, cols.stop))
            where = tuple(slice(*reader.source_span(axis, *s)) for axis, s in enumerate(target))
            index: Any = (*date, *where)
            seen = None if mask is None else mask.values[index]
            bands = [np.broadcast_to(np.uint8(0), [cut.stop - cut.start for cut in where])] * 3
            if known:
                bands = [_without_band(b.array.values, b.index)[index] for b in scene.bands]
            valid = reader.valid(bands, seen, target)
            places = product(rows.tiles, cols.tiles)
            tiles += sum(not valid[y, x].any() for (y, _), (x, _) in places)
    return _Skipped(tiles, exact=known or never)


def _without_band(values: Any, index: int | None) -> Any:
    return values if index is None else values[..., index, :, :]


def _in_memory(array: xr.DataArray) -> bool:
    """Whether an array's values are in memory; a file opened without dask may not be read yet."""
    return bool(getattr(array.variable, "_in_memory", False))


def _estimate_memory(scene: Scene, job: Job) -> _TaskMemory:
    """Add up the arrays of the largest group and of the largest block; upper bounds."""
    # Any pair of runs is a group, so the largest along each axis make up the largest.
    extent = math.prod(max(run.stop - run.start for run in runs) for runs in job.runs)
    spans = [
        [job.reader.source_span(axis, run.start, run.stop) for run in runs]
        for axis, runs in enumerate(job.runs)
    ]
    span = math.prod(max(stop - start for start, stop in along) for along in spans)
    dates = math.prod(max(sizes) for sizes in scene.leading_chunks)
    scatter = "overlap_disagreement" in job.layers
    sums = _FLOAT32 * dates * (1 + ("bin_spread" in job.layers) + scatter)
    # Three bands, validity and mask: of all dates as they are cut out, and of one put together.
    size = max(band.array.dtype.itemsize for band in scene.bands)
    window = span * (dates + 1) * (3 * size + 1 + job.masked)
    if not job.reader.is_identity:  # a band and weights over the source, bands over the target
        window += span * (2 * _FLOAT32 + size) + extent * (9 * _FLOAT32 + 1)
    if dates > 1:  # the sums of all dates are joined
        window += extent * sums
    if scatter:
        window += extent * _FLOAT32
    block = _FLOAT32 * dates * math.prod(max(sizes) for sizes in job.chunks)
    return _TaskMemory(
        chunks=_chunk_bytes(scene, spans),
        window=window,
        sums=extent * sums,
        gathered=_gathered_pixels(job) * sums,
        block=block * 6 if scatter else block * 5 // 4,
    )


def _gathered_pixels(job: Job) -> int:
    """Pixels of all groups that reach into the block with most of them."""
    longest = []
    for axis, runs in zip((job.rows, job.cols), job.runs, strict=True):
        lengths = [run.stop - run.start for run in runs]
        longest.append(max(sum(lengths[i] for i in b) for b in runs_by_block(axis, job.block)))
    return math.prod(longest)


def _chunk_bytes(scene: Scene, spans: Sequence[Sequence[tuple[int, int]]]) -> int:
    """Bytes of the dask chunks over the largest group, counting each dask array once."""
    arrays = [*(band.array for band in scene.bands), scene.mask]
    lazy = {a.data.name: a.data for a in arrays if a is not None and a.chunks is not None}
    total = 0
    for array in lazy.values():
        pixels = math.prod(max(sizes) for sizes in array.chunks[:-2])
        for axis, along in enumerate(spans):
            over = Source(array).covering(axis, along)
            pixels *= max(sum(array.chunks[axis - 2][i] for i in chunks) for chunks, _ in over)
        total += pixels * array.dtype.itemsize
    return total


def _write_rows(plan: PredictionPlan) -> list[Row]:
    """Write a plan as fourteen named lines."""
    job, memory = plan.job, plan.memory
    kind = "dask-backed" if plan.lazy else "not dask-backed: predicted at once"
    ground = "" if plan.area is None else f", {plan.area:.3g} km2"
    read = f"chunks {write_bytes(memory.chunks)}, " if memory.chunks else ""
    tiles = f"{job.rows.tile} px, overlap {job.rows.overlap}, stride {job.rows.stride}"
    batch = f"{plan.batch_size} tile{'s' if plan.batch_size != 1 else ''} a forward"
    lines = {
        "imagery": f"{write_sizes(plan.source_sizes)}; {', '.join(job.bands)}; {plan.values}; "
        f"{kind}",
        "dates": f"{plan.dates}, {write_period(plan.period) or 'without days'}",
        "CRS": plan.crs or "none",
        "resolution": _write_resolution(plan),
        "output": f"{write_sizes(plan.sizes)}; {', '.join(job.layers)}; float32, "
        f"{write_bytes(plan.output_bytes)}",
        "area": f"{plan.megapixels / plan.dates:.3g} Mpx{ground} a date; "
        f"{plan.megapixels:.3g} Mpx in all",
        "tiles": f"{tiles}: {_write_grid(plan.tile_grid)}, {plan.tiles} in all",
        "skipped": _write_skipped(plan),
        "blocks": f"{job.block} px: {_write_grid(plan.block_grid)}",
        "tasks": f"{plan.group_tasks} tile groups + {plan.block_tasks} blocks = {plan.tasks}, "
        "and those that read imagery",
        "memory": f"a tile group {write_bytes(memory.of_group)} at most ({read}"
        f"window {write_bytes(memory.window)}, sums {write_bytes(memory.sums)}), "
        f"a block {write_bytes(memory.of_block)}; without the network",
        "model": _write_model(plan),
        "device": f"{plan.device}, {batch}"
        if plan.device
        else f"{job.model.device} on each worker of the cluster",
        "time": _write_time(plan),
    }
    return list(lines.items())


def _write_grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]} = {math.prod(grid)} a date"


def _write_resolution(plan: PredictionPlan) -> str:
    if plan.source_pixel is None or plan.pixel is None:
        return "not known without a CRS or pixel_size; the imagery's own pixels"
    change = f"resampled to {write_pixel(plan.pixel)}" if plan.resampled else "the imagery's own"
    return f"{write_pixel(plan.source_pixel)} on the ground, {change}"


def _write_skipped(plan: PredictionPlan) -> str:
    if plan.skipped is None:
        return "not known before the imagery is read"
    if plan.skipped == _Skipped(0, exact=True):
        return "none"
    least = "" if plan.skipped.exact else "at least "
    share = write_share(plan.skipped.tiles, plan.tiles)
    return f"{least}{plan.skipped.tiles} tiles without a valid pixel, {share}"


def _write_model(plan: PredictionPlan) -> str:
    spec = plan.job.model
    if plan.model_problem is not None:
        return f"{spec.model}, which predict() would refuse: .model_problem says why"
    name = "a model of this process" if spec.model.startswith("live:") else spec.model
    compiled = ", compiled" if spec.compile else ""
    return f"{name}, weights {spec.weights_sha256[:12]}, {spec.dtype}{compiled}"


def _write_time(plan: PredictionPlan) -> str:
    if plan.seconds is None or not plan.seconds_per_tile:
        return (
            "not known: predict a piece in this process first, or give plan.timed(tiles_per_second)"
        )
    most = "" if plan.skipped is not None and plan.skipped.exact else "at most "
    speed = 1 / plan.seconds_per_tile
    speed_text = f"{speed:.{max(0, 2 - math.floor(math.log10(speed)))}f} tiles a second"
    how = "as given" if plan.assumed else "as measured in this process"
    return f"{most}{write_seconds(plan.seconds)} for the network, at {speed_text}, {how}"


_SIDE = 140
_MOST_LINES = 40


def _draw_grid(job: Job) -> str:
    """Draw blocks as thick lines and tile starts as thin ones, as SVG; over 40 are left out."""
    scale = _SIDE / max(job.rows.size, job.cols.size)
    height, width = (max(1.0, axis.size * scale) for axis in (job.rows, job.cols))
    blocks = [[job.block * i for i in range(1, len(sizes))] for sizes in job.chunks]
    tiles = [axis.starts[1:] for axis in (job.rows, job.cols)]

    def lines(places: Sequence[Sequence[int]]) -> str:
        rows, cols = ([at * scale for at in along[: _MOST_LINES + 1]] for along in places)
        across = [f"M0 {y:.1f}H{width:.1f}" for y in rows] if len(rows) <= _MOST_LINES else []
        down = [f"M{x:.1f} 0V{height:.1f}" for x in cols] if len(cols) <= _MOST_LINES else []
        return "".join(across + down)

    return (
        f'<svg width="{width + 4:.0f}" height="{height + 4:.0f}" '
        f'viewBox="-2 -2 {width + 4:.1f} {height + 4:.1f}" fill="none" stroke="currentColor" '
        f'style="flex: none;" role="img" aria-label="tiles and blocks">'
        f'<rect width="{width:.1f}" height="{height:.1f}" stroke-width="1.5"/>'
        f'<path d="{lines(tiles)}" stroke-width="0.5" stroke-opacity="0.45"/>'
        f'<path d="{lines(blocks)}" stroke-width="1.5"/></svg>'
    )
