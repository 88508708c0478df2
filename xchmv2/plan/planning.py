"""The plan of a prediction: the same preparation, and then counting in place of computing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
import xarray as xr

from xchmv2 import defaults
from xchmv2._dask import Job
from xchmv2.errors import CheckpointError
from xchmv2.imagery import ValueRange, ground_pixel
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
from xchmv2.plan.memory import find_memory
from xchmv2.plan.prediction_plan import PredictionPlan
from xchmv2.plan.skipping import count_skipped
from xchmv2.preparation import Preparation, leading_chunks, prepare
from xchmv2.wording import find_period, write_crs


def plan(
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
