"""plan(): what a prediction will do, before it does it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from xchmv2.errors import CheckpointError, require_library, warn
from xchmv2.imagery import (
    COLOURS,
    TRAINED_COLOUR,
    Scene,
    ValueRange,
    advise_order,
    looks_exchanged,
    sample_windows,
    take_pixels,
)
from xchmv2.inference import (
    Layer,
    ModelLike,
    ModelSpec,
    active_client,
    get_predictor,
    resolve_batch,
    resolve_device,
    resolve_model,
    rough_seconds_per_tile,
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
    validate_flags,
    validate_number,
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
    time: bool = False,
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
    time : bool, default False
        Whether to load the model and forward a few tiles here, to measure the time of a tile.
        Otherwise it is known if this process has forwarded such tiles, and else a rough rate of
        the device.

    Returns
    -------
    PredictionPlan
        Printed as text, and as a table in notebooks.

    Raises
    ------
    ImageryError, GridError, ConfigError, DeviceError, CHMv2Error
        As ``predict`` does.

    Warns
    -----
    UserWarning
        If these colours fit the training data much better with red and blue exchanged.

    Notes
    -----
    No weights are loaded without `time`, and nothing is computed but this: for imagery and masks in
    memory the valid pixels are counted, which takes about as long as reading them once. Where no
    name tells which bands are red, green and blue, five windows of 128 px of the middle date are
    read (of lazy imagery, five chunks of each band at most), and their mean colour is set beside
    that of the model's training data.

    Examples
    --------
    >>> plan = imagery.chmv2.plan(block=1024)
    >>> print(plan.timed(tiles_per_second=20.0))
    <xchmv2 prediction plan, nothing computed yet>
    ...
    """
    validate_flags(time=time)
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
    here = not (scene.lazy and active_client() is not None)
    if time and here and not problems:
        window = (job.rows.window, job.cols.window)
        get_predictor(job.model).time_tiles(window, job.batch_size, job.layers)
    found = _count(scene, target, job, problems)
    return found if not job.unnamed else replace(found, colour=_look(scene, job))


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
        has taken in this process [s], or a rough one of such a device. None under a distributed
        client, whose workers have their own.
    rate : {"measured", "rough", "given"}
        Whether the time per tile was measured in this process, is that of such a device by a
        factor of two or three, or was given to :meth:`timed`.
    valid_tiles : ndarray of int or None
        Dates at which each tile of the grid holds a valid pixel; None where that is not known.
    colour : tuple of float or None
        Mean red, green and blue of a sample, from 0 to 1 within the value range; None where names
        tell the bands, and where the sample cannot be read or holds no valid pixel.
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
    rate: Literal["measured", "rough", "given"] = "measured"
    valid_tiles: npt.NDArray[np.intp] | None = field(default=None, compare=False)
    colour: tuple[float, float, float] | None = None

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
        validate_number("tiles_per_second", tiles_per_second, 20, above=0)
        return replace(self, seconds_per_tile=1 / float(tiles_per_second), rate="given")

    def plot(self, *, ax: Any = None) -> Any:
        """Draw the area of the prediction, its blocks and its tiles.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; by default a new figure.

        Returns
        -------
        matplotlib Axes
            In kilometres from the upper left corner, or in pixels without a CRS. Tiles are grey
            where it is known that they hold no valid pixel at any date. More than 40 lines of
            blocks or tiles are left out.

        Raises
        ------
        CHMv2Error
            If matplotlib is not installed.

        Examples
        --------
        >>> axes = imagery.chmv2.plan().plot()
        >>> axes.figure.savefig("plan.png")
        """
        return _plot(self, ax)

    def __repr__(self) -> str:
        return as_text(f"<{_TITLE}>", _write_rows(self))

    def _repr_html_(self) -> str:
        return as_html(_TITLE, _write_rows(self), _draw_grid(self.job))


@dataclass(frozen=True)
class _Skipped:
    """Tiles of all dates that hold no valid pixel, and so never reach the network.

    They are not `exact` where only a mask is known, so that there may be more.
    """

    tiles: int
    exact: bool


@dataclass(frozen=True)
class _TaskMemory:
    """Arrays of the largest task of each kind [bytes], without the network and its batches.

    `chunks`: of the imagery, over the largest tile group, 0 for imagery in memory; `window`: the
    pixels cut from them, and the temporary arrays of preparing and adding them up; `sums`: the
    weighted sums of the group's tiles, which it returns; `gathered`: the sums of all groups that
    reach into one block; `block`: one block of one layer, which is the output, and the temporary
    arrays of deriving it.
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
    valid, exact = _count_valid(scene, job)
    dates = math.prod(scene.template.shape[:-2])
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
        skipped=None if valid is None else _Skipped(int(dates * valid.size - valid.sum()), exact),
        valid_tiles=valid,
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
    measured = seconds_per_tile(job.model, window) if found else None
    rough = rough_seconds_per_tile(job.model, window) if found else None
    return {
        "rate": "rough" if measured is None else "measured",
        "device": device,
        "batch_size": resolve_batch(
            job.batch_size, pixels, torch.device(device), compiled=compiled
        ),
        "seconds_per_tile": measured or rough,
    }


def _look(scene: Scene, job: Job) -> tuple[float, float, float] | None:
    """Find the mean colour of a sample, and warn if its bands look exchanged."""
    masks = [] if scene.mask is None else [scene.mask]
    try:
        windows = sample_windows([*(band.plane for band in scene.bands), *masks])
    except Exception:  # a plan holds for imagery that cannot be read just now
        return None
    rule, scaling = job.reader.valid_pixels, job.scaling
    seen = []
    for window in windows:
        valid = rule(window[:3], window[3] if masks else None)
        seen.append(take_pixels(np.stack(window[:3]), valid, scaling.low, scaling.high))
    pixels = np.concatenate(seen, axis=1)
    if not pixels.size:
        return None
    if looks_exchanged(pixels):
        warn(advise_order(job.unnamed))
    red, green, blue = (float(value) for value in pixels.mean(axis=1))
    return red, green, blue


def _count_valid(scene: Scene, job: Job) -> tuple[npt.NDArray[np.intp] | None, bool]:
    """Count the dates at which each tile holds a valid pixel, from what is in memory.

    It goes through the groups as the tasks will, so that it holds no more than they do. The count
    is None where what is in memory cannot tell, and an upper bound unless the second is True.
    """
    reader, mask = job.reader, scene.mask
    dates, grid = scene.template.shape[:-2], (len(job.rows.starts), len(job.cols.starts))
    never = reader.valid_pixels.never_invalid([band.array.dtype for band in scene.bands])
    if never and mask is None:
        return np.full(grid, math.prod(dates)), True
    known = not never and all(_in_memory(band.array) for band in scene.bands)
    if not (known if mask is None else _in_memory(mask)):
        return None, False
    if not known:  # the mask alone: as if all bands were valid everywhere
        rule = replace(reader.valid_pixels, nodata=(None, None, None))
        reader = replace(reader, valid_pixels=rule)
    count = np.zeros(grid, np.intp)
    for date in np.ndindex(dates):
        for rows, cols in product(*job.runs):
            target = ((rows.start, rows.stop), (cols.start, cols.stop))
            where = tuple(slice(*reader.source_span(axis, *s)) for axis, s in enumerate(target))
            index: Any = (*date, *where)
            seen = None if mask is None else mask.values[index]
            bands = [np.broadcast_to(np.uint8(0), [cut.stop - cut.start for cut in where])] * 3
            if known:
                bands = [b.plane.values[index] for b in scene.bands]
            valid = reader.valid(bands, seen, target)
            for (i, (y, _)), (j, (x, _)) in product(enumerate(rows.tiles), enumerate(cols.tiles)):
                count[rows.first + i, cols.first + j] += valid[y, x].any()
    return count, known or never


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
    if plan.colour is not None:
        lines["colours"] = _write_colours(plan.colour)
    return list(lines.items())


def _write_colours(colour: tuple[float, float, float]) -> str:
    """Set a sample's mean colour beside the one that the model knows."""
    here, trained = (
        ", ".join(f"{name} {value:.2f}" for name, value in zip(COLOURS, values, strict=True))
        for values in (colour, TRAINED_COLOUR)
    )
    return f"mean {here} in a sample; in training {trained}"


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
        return "not known here; give the speed of all devices: plan.timed(tiles_per_second)"
    most = "" if plan.skipped is not None and plan.skipped.exact else "at most "
    speed = 1 / plan.seconds_per_tile
    speed_text = f"{speed:.{max(0, 2 - math.floor(math.log10(speed)))}f} tiles a second"
    how = {
        "given": "as given",
        "measured": "as measured in this process",
        "rough": "a rough rate of such a device: .plan(time=True) measures it",
    }[plan.rate]
    return f"{most}{write_seconds(plan.seconds)} for the network, at {speed_text}, {how}"


def _plot(plan: PredictionPlan, ax: Any) -> Any:
    """Draw the outline, the blocks, and the tiles, those without a valid pixel in grey."""
    require_library("matplotlib", "draws a plan", "plot")
    import matplotlib.pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    job = plan.job
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    tall, wide = (1.0, 1.0) if plan.pixel is None else (side / 1000 for side in plan.pixel)
    unit = "px" if plan.pixel is None else "km"
    height, width = job.rows.size * tall, job.cols.size * wide
    if plan.valid_tiles is not None:
        high = min(job.rows.window, job.rows.size) * tall
        across = min(job.cols.window, job.cols.size) * wide
        empty = [
            Rectangle((job.cols.starts[x] * wide, job.rows.starts[y] * tall), across, high)
            for y, x in np.argwhere(plan.valid_tiles == 0)
        ]
        ax.add_collection(PatchCollection(empty, facecolor="0.85", edgecolor="none"))
    tiles = [axis.starts[1:] for axis in (job.rows, job.cols)]
    blocks = [[job.block * i for i in range(1, len(sizes))] for sizes in job.chunks]
    for places, style in ((tiles, ("C0", 0.4)), (blocks, ("black", 1.4))):
        rows, cols = ([] if len(along) > _MOST_LINES else along for along in places)
        ax.hlines([y * tall for y in rows], 0, width, color=style[0], linewidth=style[1])
        ax.vlines([x * wide for x in cols], 0, height, color=style[0], linewidth=style[1])
    ax.add_patch(Rectangle((0, 0), width, height, fill=False, linewidth=2))
    ax.set(xlim=(-0.02 * width, 1.02 * width), ylim=(1.02 * height, -0.02 * height), aspect="equal")
    ax.set(xlabel=f"east [{unit}]" if plan.pixel else "x [px]")
    ax.set(ylabel=f"south [{unit}]" if plan.pixel else "y [px]")
    empty_share = "" if plan.skipped is None else f", {plan.skipped.tiles} without a valid pixel"
    ground = "" if plan.area is None else f"{plan.area:.3g} km2, "
    ax.set_title(
        f"{ground}{math.prod(plan.block_grid)} blocks of {job.block} px (black),\n"
        f"{plan.tiles} tiles of {job.rows.tile} px (blue){empty_share}"
    )
    return ax


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
