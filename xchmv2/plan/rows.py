"""What is told of a plan, line by line."""

from __future__ import annotations

import math

from xchmv2.display import Row
from xchmv2.plan.facts import PlannedWork
from xchmv2.wording import (
    write_bytes,
    write_period,
    write_pixel,
    write_seconds,
    write_share,
    write_sizes,
)


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
