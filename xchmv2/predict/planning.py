"""plan(): what a prediction will do, before it does it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from numbers import Real
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from xchmv2.errors import CheckpointError, CHMv2Error
from xchmv2.imagery import Scene, ValueRange, WindowReader
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
from xchmv2.model import MODEL, OVERLAP, TILE
from xchmv2.predict.prediction import Preparation, leading_chunks, prepare
from xchmv2.predict.task_memory import TaskMemory, find_memory
from xchmv2.predict.tasks import Job
from xchmv2.raster import (
    Row,
    TileRun,
    as_html,
    as_text,
    find_period,
    ground_pixel,
    write_bytes,
    write_crs,
    write_period,
    write_pixel,
    write_seconds,
    write_share,
    write_sizes,
)


@dataclass(frozen=True, repr=False)
class PlannedWork:
    """What is known of a prediction before it runs.

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
        Height and width of a pixel on the ground, of imagery and result [m]; None without a CRS.
    date_chunks : int
        Chunks of dates: tasks handle those of one chunk together.
    skipped : Skipped or None
        Tiles without a valid pixel; None where it takes reading the imagery to know.
    memory : TaskMemory
        Arrays of the largest tasks.
    model_problem : str or None
        Why ``predict`` would refuse the model.
    device, batch_size, seconds_per_tile : optional
        Device of this process, tiles a forward there, and what a tile of this size took this
        process so far [s]. None under a distributed client, whose workers have their own; the
        time is None too before this process has forwarded such tiles.
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
    skipped: Skipped | None
    memory: TaskMemory
    model_problem: str | None = None
    device: str | None = None
    batch_size: int | None = None
    seconds_per_tile: float | None = None
    #: Whether the time a tile was given to :meth:`timed` and not measured.
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
        """Tiles of all dates, skipped ones included."""
        return math.prod(self.tile_grid) * self.dates

    @property
    def forwards(self) -> int:
        """Tiles that will be put through the network, or at most will as far as is known."""
        return self.tiles - (0 if self.skipped is None else self.skipped.tiles)

    @property
    def skipped_share(self) -> float | None:
        """Share of the tiles that hold no valid pixel, 0 to 1; at least that if not exact."""
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
        """Ground that one date covers, by the pixel at its centre [km2]; None without a CRS."""
        if self.pixel is None:
            return None
        return self.job.rows.size * self.job.cols.size * math.prod(self.pixel) / 1e6

    @property
    def output_bytes(self) -> int:
        """Size of the result in memory, all layers [bytes]."""
        return 4 * math.prod(self.sizes.values()) * len(self.job.layers)

    @property
    def seconds(self) -> float | None:
        """Time the network takes on one device [s], for ``forwards``; None if not known."""
        return None if self.seconds_per_tile is None else self.forwards * self.seconds_per_tile

    def timed(self, tiles_per_second: float) -> Self:
        """Return the same plan at a speed that you know.

        Parameters
        ----------
        tiles_per_second : float
            Tiles that all devices together forward in a second, as
            ``python -m xchmv2.benchmark`` measures for one.

        Returns
        -------
        PlannedWork
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


def write_rows(plan: PlannedWork) -> list[Row]:
    """Write a plan as named lines.

    Parameters
    ----------
    plan : PlannedWork
        The plan.

    Returns
    -------
    list of (name, value)
        Fourteen of them.
    """
    return [
        ("imagery", _imagery(plan)),
        ("dates", f"{plan.dates}, {write_period(plan.period) or 'without days'}"),
        ("CRS", plan.crs or "none"),
        ("resolution", _resolution(plan)),
        ("output", _output(plan)),
        ("area", _area(plan)),
        ("tiles", _tiles(plan)),
        ("skipped", _skipped(plan)),
        ("blocks", _blocks(plan)),
        ("tasks", _tasks(plan)),
        ("memory", _memory(plan)),
        ("model", _model(plan)),
        ("device", _device(plan)),
        ("time", _time(plan)),
    ]


def _imagery(plan: PlannedWork) -> str:
    kind = "dask-backed" if plan.lazy else "not dask-backed: predicted at once"
    bands = ", ".join(plan.job.bands)
    return f"{write_sizes(plan.source_sizes)}; {bands}; {plan.values}; {kind}"


def _resolution(plan: PlannedWork) -> str:
    if plan.source_pixel is None or plan.pixel is None:
        return "not known without a CRS; the imagery's own pixels"
    if not plan.resampled:
        return f"{write_pixel(plan.pixel)} on the ground, the imagery's own"
    found, wanted = write_pixel(plan.source_pixel), write_pixel(plan.pixel)
    return f"{found} on the ground, resampled to {wanted}"


def _output(plan: PlannedWork) -> str:
    layers = ", ".join(plan.job.layers)
    return f"{write_sizes(plan.sizes)}; {layers}; float32, {write_bytes(plan.output_bytes)}"


def _area(plan: PlannedWork) -> str:
    a_date = plan.megapixels / plan.dates
    ground = "" if plan.area is None else f", {plan.area:.3g} km2"
    return f"{a_date:.3g} Mpx{ground} a date; {plan.megapixels:.3g} Mpx in all"


def _tiles(plan: PlannedWork) -> str:
    axis, (rows, cols) = plan.job.rows, plan.tile_grid
    grid = f"{axis.tile} px, overlap {axis.overlap}, stride {axis.stride}"
    return f"{grid}: {rows} x {cols} = {rows * cols} a date, {plan.tiles} in all"


def _skipped(plan: PlannedWork) -> str:
    if plan.skipped is None:
        return "not known before the imagery is read"
    if plan.skipped.exact and not plan.skipped.tiles:
        return "none"
    least = "" if plan.skipped.exact else "at least "
    share = write_share(plan.skipped.tiles, plan.tiles)
    return f"{least}{plan.skipped.tiles} tiles without a valid pixel, {share}"


def _blocks(plan: PlannedWork) -> str:
    rows, cols = plan.block_grid
    return f"{plan.job.block} px: {rows} x {cols} = {rows * cols} a date"


def _tasks(plan: PlannedWork) -> str:
    groups, blocks = plan.group_tasks, plan.block_tasks
    return f"{groups} tile groups + {blocks} blocks = {plan.tasks}, and those that read imagery"


def _memory(plan: PlannedWork) -> str:
    found = plan.memory
    read = f"chunks {write_bytes(found.chunks)}, " if found.chunks else ""
    window = write_bytes(found.window + found.group_scratch)
    return (
        f"a tile group {write_bytes(found.of_group)} at most ({read}"
        f"window {window}, sums {write_bytes(found.sums)}), "
        f"a block {write_bytes(found.of_block)}; without the network"
    )


def _model(plan: PlannedWork) -> str:
    spec = plan.job.model
    if plan.model_problem is not None:
        return f"{spec.model}, which predict() would refuse: .model_problem says why"
    compiled = ", compiled" if spec.compile else ""
    name = "a model of this process" if spec.model.startswith("live:") else spec.model
    return f"{name}, weights {spec.weights_sha256[:12]}, {spec.dtype}{compiled}"


def _device(plan: PlannedWork) -> str:
    if plan.device is None:
        return f"{plan.job.model.device} on each worker of the cluster"
    batch = f"{plan.batch_size} tile{'s' if plan.batch_size != 1 else ''} a forward"
    return f"{plan.device}, {batch}"


def _time(plan: PlannedWork) -> str:
    if plan.seconds is None or not plan.seconds_per_tile:
        return (
            "not known: predict a piece in this process first, or give plan.timed(tiles_per_second)"
        )
    known = plan.skipped is not None and plan.skipped.exact
    speed = f"{_significant(1 / plan.seconds_per_tile)} tiles a second"
    how = "as given" if plan.assumed else "as measured in this process"
    most = "" if known else "at most "
    return f"{most}{write_seconds(plan.seconds)} for the network, at {speed}, {how}"


def _significant(number: float) -> str:
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"


@dataclass(frozen=True)
class Skipped:
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


def count_skipped(scene: Scene, job: Job, reader: WindowReader) -> Skipped | None:
    """Count the tiles without a valid pixel.

    Parameters
    ----------
    scene : Scene
        Imagery and mask; only what is in memory is looked at.
    job : Job
        The tile grid.
    reader : WindowReader
        The rule for validity.

    Returns
    -------
    Skipped or None
        None where it takes reading the imagery to know.
    """
    never = reader.valid_pixels.never_invalid([band.array.dtype for band in scene.bands])
    if never and scene.mask is None:
        return Skipped(0, exact=True)
    mask_known = scene.mask is None or _in_memory(scene.mask)
    known = not never and mask_known and all(_in_memory(band.array) for band in scene.bands)
    if not known and (scene.mask is None or not mask_known):
        return None
    if not known:  # the mask alone: as if all bands were valid everywhere
        rule = replace(reader.valid_pixels, nodata=(None, None, None))
        reader = replace(reader, valid_pixels=rule)
    tiles = sum(
        _count_in_date(_Plane(scene, date, known), job, reader)
        for date in np.ndindex(scene.template.shape[:-2])
    )
    return Skipped(tiles, exact=known or never)


@dataclass(frozen=True, eq=False)
class _Plane:
    """One date of what is in memory."""

    scene: Scene
    date: tuple[int, ...]
    with_bands: bool

    def bands(self, where: tuple[slice, slice]) -> list[npt.NDArray[Any]]:
        """Red, green and blue (H, W), or zeros in their place."""
        if not self.with_bands:
            shape = [cut.stop - cut.start for cut in where]
            return [np.broadcast_to(np.uint8(0), shape)] * 3
        found = []
        for band in self.scene.bands:
            index = () if band.index is None else (band.index,)
            key: Any = (*self.date, *index, *where)
            found.append(band.array.values[key])
        return found

    def mask(self, where: tuple[slice, slice]) -> npt.NDArray[np.bool_] | None:
        """Pixels declared valid (H, W)."""
        if self.scene.mask is None:
            return None
        key: Any = (*self.date, *where)
        mask: npt.NDArray[np.bool_] = self.scene.mask.values[key]
        return mask


def _count_in_date(plane: _Plane, job: Job, reader: WindowReader) -> int:
    """Go through the groups as the tasks will, so that no more is held than they hold."""
    return sum(_count_in_group(plane, rows, cols, reader) for rows, cols in product(*job.runs))


def _count_in_group(plane: _Plane, rows: TileRun, cols: TileRun, reader: WindowReader) -> int:
    target = ((rows.start, rows.stop), (cols.start, cols.stop))
    y, x = (slice(*reader.source_span(axis, *span)) for axis, span in enumerate(target))
    valid = reader.valid(plane.bands((y, x)), plane.mask((y, x)), target)
    return sum(not valid[ys, xs].any() for (ys, _), (xs, _) in product(rows.tiles, cols.tiles))


def _in_memory(array: xr.DataArray) -> bool:
    """Whether an array's values are there; of a file opened without dask they may not be."""
    return bool(getattr(array.variable, "_in_memory", False))


_SIDE = 140
_MOST_LINES = 40


def draw_grid(job: Job) -> str:
    """Draw blocks as thick lines and tile starts as thin ones.

    Parameters
    ----------
    job : Job
        The grid; what has more than 40 lines along an axis is left out, as nobody could see it.

    Returns
    -------
    str
        SVG in the colour of the text around it.
    """
    height, width = job.rows.size, job.cols.size
    scale = _SIDE / max(height, width)
    size = (max(1.0, height * scale), max(1.0, width * scale))
    blocks = [[job.block * i for i in range(1, len(sizes))] for sizes in job.chunks]
    tiles = [axis.starts[1:] for axis in (job.rows, job.cols)]
    return (
        f'<svg width="{size[1] + 4:.0f}" height="{size[0] + 4:.0f}" '
        f'viewBox="-2 -2 {size[1] + 4:.1f} {size[0] + 4:.1f}" fill="none" stroke="currentColor" '
        f'style="flex: none;" role="img" aria-label="tiles and blocks">'
        f'<rect width="{size[1]:.1f}" height="{size[0]:.1f}" stroke-width="1.5"/>'
        f'<path d="{_lines(tiles, size, scale)}" stroke-width="0.5" stroke-opacity="0.45"/>'
        f'<path d="{_lines(blocks, size, scale)}" stroke-width="1.5"/></svg>'
    )


def _lines(places: Sequence[Sequence[int]], size: tuple[float, float], scale: float) -> str:
    """Lines across at rows, and down at columns, as an SVG path."""
    rows, cols = ([place * scale for place in along] for along in places)
    across = [f"M0 {y:.1f}H{size[1]:.1f}" for y in rows] if len(rows) <= _MOST_LINES else []
    down = [f"M{x:.1f} 0V{size[0]:.1f}" for x in cols] if len(cols) <= _MOST_LINES else []
    return "".join(across + down)


_TITLE = "xchmv2 prediction plan, nothing computed yet"


@dataclass(frozen=True, repr=False)
class PredictionPlan(PlannedWork):
    """What a prediction will do, from :func:`xchmv2.predict.plan`; printed, it tells it in lines.

    Its parameters and attributes are those of `PlannedWork`.
    """

    def __repr__(self) -> str:
        return as_text(f"<{_TITLE}>", write_rows(self))

    def _repr_html_(self) -> str:
        return as_html(_TITLE, write_rows(self), draw_grid(self.job))


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
        As of ``predict``. Of a model on the hub the configuration is fetched, not the weights.
        Where the model cannot be found, the plan says so and holds for all else.
    bands, value_range, nodata, valid, erode, resolution, tile, overlap, block, layers, device, \
    dtype, batch_size, compile
        As of ``predict``.

    Returns
    -------
    PredictionPlan
        It prints as text, and as a table in notebooks.

    Raises
    ------
    ImageryError, GridError, ConfigError, DeviceError, CHMv2Error
        As ``predict`` does.

    Notes
    -----
    Nothing is computed and no weights are loaded. Of imagery and masks in memory the valid pixels
    are counted, which takes about as long as reading them once.

    Examples
    --------
    >>> plan = imagery.chmv2.plan(block=1024)
    >>> print(plan.timed(tiles_per_second=20.0))
    <xchmv2 prediction plan, nothing computed yet>
    ...
    """
    describe = _Describe()
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
        describe=describe,
    )
    return _count(ready, describe.problem)


class _Describe:
    """Names the model as ``resolve_model`` does, and remembers why it cannot."""

    problem: CheckpointError | None = None

    def __call__(self, model: ModelLike, *, device: str, dtype: str, **options: Any) -> ModelSpec:
        try:
            return resolve_model(model, device=device, dtype=dtype, weights=False, **options)
        except CheckpointError as error:
            self.problem = error
            name = model.model if isinstance(model, ModelSpec) else model
            named = str(name) if not isinstance(name, torch.nn.Module) else type(name).__name__
            return ModelSpec(named, None, "", "", device, dtype)


def _count(ready: Preparation, problem: CheckpointError | None) -> PredictionPlan:
    scene, target, job = ready.scene, ready.target, ready.job
    sizes = dict(zip(scene.template.dims, scene.template.shape, strict=True))
    source = {str(dim): sizes[dim] for dim in scene.dims}
    return PredictionPlan(
        job=job,
        source_sizes=source,
        sizes={**source, **dict(zip(target.dims, target.shape, strict=True))},
        values=" and ".join(dict.fromkeys(str(band.array.dtype) for band in scene.bands)),
        lazy=scene.lazy,
        resampled=not ready.reader.is_identity,
        period=find_period(scene.template),
        crs=write_crs(target.crs),
        source_pixel=None if target.crs is None else ground_pixel(scene.grid),
        pixel=None if target.crs is None else ground_pixel(target),
        date_chunks=math.prod(len(chunks) for chunks in leading_chunks(scene)),
        skipped=count_skipped(scene, job, ready.reader),
        memory=find_memory(scene, job, ready.reader),
        model_problem=None if problem is None else str(problem),
        **_here(job, scene.lazy, problem is None),
    )


def _here(job: Job, lazy: bool, found: bool) -> dict[str, Any]:
    """Device, batch and speed of this process; of a cluster's workers they are not known."""
    if lazy and active_client() is not None:
        return {}
    window = (job.rows.window, job.cols.window)
    device = resolve_device(job.model.device)
    batch = resolve_batch(
        job.batch_size,
        math.prod(window),
        torch.device(device),
        compiled=job.model.compile,
    )
    speed = seconds_per_tile(job.model, window) if found else None
    return {"device": device, "batch_size": batch, "seconds_per_tile": speed}
