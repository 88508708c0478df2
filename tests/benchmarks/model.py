"""Part ``model``: one forward of ours against transformers, each at its own best."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.model.modeling import convert_weights

from .memory import in_child
from .networks import count_flop
from .peak import matmul
from .published import Forward, load_published, published_forward
from .report import Table
from .settings import Settings
from .timing import Action, Times, interleave, timed

# Private imports: weights are converted as a Predictor converts them.

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, THEIRS = "xchmv2", "transformers"


def measure_model(settings: Settings) -> list[Table]:
    """Time forwards of both implementations, same weights, same tiles, in turns.

    Parameters
    ----------
    settings : Settings
        Which network, tile, batch and device.

    Returns
    -------
    list of Table
        One row per implementation, precision and mode, and a last one of the best of each.

    Raises
    ------
    CHMv2Error
        If transformers is not installed.
    """
    pixels = tiles(settings)
    networks = {
        (who, dtype): load(settings, who, dtype) for dtype in DTYPES for who in (OURS, THEIRS)
    }
    flop = {
        who: count_flop(lambda who=who: networks[who, "float32"](pixels))  # type: ignore[misc]
        for who in (OURS, THEIRS)
    }
    products = {dtype: matmul(settings.device, kind) for dtype, kind in DTYPES.items()}
    actions: dict[str, Action] = {f"matmul {dtype}": products[dtype][0] for dtype in DTYPES}
    refused = {}
    for (who, dtype), forward in networks.items():
        least = flop[who] / products[dtype][1] * timed(actions[f"matmul {dtype}"], settings.device)
        for mode in _modes(settings):
            name = f"{who} {dtype} {mode}"
            if least > settings.patience:
                refused[name] = f"not run: {least:.0f} s at the speed of the matrix product"
            else:
                actions[name] = _action(forward, pixels, mode)
    with torch.inference_mode(), _quiet():
        times = interleave(
            actions,
            settings.runs,
            device=settings.device,
            patience=settings.patience,
            clock=settings.timer,
        )
    times = Times(times.seconds, {**times.failed, **refused})
    peaks = {
        dtype: product[1] / times.shortest(f"matmul {dtype}")
        for dtype, product in products.items()
        if f"matmul {dtype}" in times.seconds
    }
    rows = [
        _row(settings, times, peaks, flop[who], who, dtype, mode)
        for dtype in DTYPES
        for mode in _modes(settings)
        for who in (OURS, THEIRS)
    ]
    title = f"One forward: {settings.config}, tile {settings.tile}, batch {settings.batch}"
    return [Table("model", title, [*rows, _best(settings, times)], _notes(peaks, flop, settings))]


def tiles(settings: Settings, batch: int | None = None) -> torch.Tensor:
    """Normalised random pixels (B, 3, tile, tile) on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch or settings.batch, 3, settings.tile, settings.tile)
    return torch.randn(shape, generator=generator).to(settings.device)


def load(settings: Settings, who: str, dtype: str) -> Forward:
    """Load one implementation as a function from pixels to heights.

    Ours does bfloat16 as ``predict`` does, by autocast with converted weights; transformers'
    weights are cast, which is its own way and the faster one.
    """
    if who == THEIRS:
        model = load_published(settings.folder, settings.device, DTYPES[dtype])
        return published_forward(model)
    return ours_forward(settings, dtype)


def ours_forward(settings: Settings, dtype: str) -> Forward:
    """Load our implementation as a function from pixels to heights."""
    model = CHMv2ForDepthEstimation.from_pretrained(settings.folder, device_map=settings.device)
    kind = torch.device(settings.device).type
    if dtype == "bfloat16":
        model = convert_weights(model, torch.bfloat16)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        reduced = torch.autocast(kind, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
        with reduced:
            return model.height(pixels)[0]

    return forward


def _modes(settings: Settings) -> tuple[str, ...]:
    return ("eager", "compiled") if settings.compiled else ("eager",)


def _action(forward: Forward, pixels: torch.Tensor, mode: str) -> Action:
    """Bind pixels; compiled at the first call."""
    call: Callable[[torch.Tensor], Any] = torch.compile(forward) if mode == "compiled" else forward
    return lambda: call(pixels)


def _row(
    settings: Settings,
    times: Times,
    peaks: dict[str, float],
    flop: float,
    who: str,
    dtype: str,
    mode: str,
) -> dict[str, Any]:
    name, peer = f"{who} {dtype} {mode}", f"{THEIRS} {dtype} {mode}"
    row: dict[str, Any] = {"implementation": who, "precision": dtype, "mode": mode}
    if name in times.failed:
        missing = dict.fromkeys(("tiles/s", "ratio", "TFLOP/s", "share of peak", "peak [MiB]"))
        return {**row, **missing, "remark": times.failed[name]}
    seconds = times.median(name)
    both = who == OURS and peer in times.seconds
    once = len(times.seconds[name]) < settings.runs
    return {
        **row,
        "tiles/s": settings.batch / seconds,
        "ratio": times.ratio(name, peer) if both else None,
        "TFLOP/s": flop / seconds / 1e12,
        "share of peak": flop / seconds / peaks[dtype] if dtype in peaks else None,
        "peak [MiB]": _peak(settings, who, dtype, mode),
        "remark": f"timed once: over {settings.patience:.0f} s" if once else "",
    }


def _best(settings: Settings, times: Times) -> dict[str, Any]:
    """Compare the best of ours with the best of theirs."""
    chosen = {
        who: times.best_of([f"{who} {d} {m}" for d in DTYPES for m in _modes(settings)])
        for who in (OURS, THEIRS)
    }
    ours, theirs = chosen[OURS], chosen[THEIRS]
    return {
        "implementation": "best of each",
        "precision": "",
        "mode": "",
        "tiles/s": settings.batch / times.median(ours) if ours else None,
        "ratio": times.ratio(ours, theirs) if ours and theirs else None,
        "TFLOP/s": None,
        "share of peak": None,
        "peak [MiB]": None,
        "remark": f"{ours} against {theirs}",
    }


def _peak(settings: Settings, who: str, dtype: str, mode: str) -> float | None:
    """Memory of one forward in a process of its own; compiling would drown it on a CPU."""
    if mode == "compiled" and not settings.device.startswith("cuda"):
        return None
    work = (_forward_once, settings, who, dtype, mode)
    return in_child(*work, device=settings.device, threads=settings.threads)[1]


def _forward_once(settings: Settings, who: str, dtype: str, mode: str) -> None:
    with torch.inference_mode(), _quiet():
        _action(load(settings, who, dtype), tiles(settings), mode)()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what a compiler warns of and logs."""
    log = logging.getLogger("torch._dynamo")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _notes(peaks: dict[str, float], flop: dict[str, float], settings: Settings) -> str:
    reached = ", ".join(f"{dtype} {peak / 1e12:.3g}" for dtype, peak in peaks.items())
    where = "on the device" if settings.device.startswith("cuda") else "of the whole process"
    return (
        f"Matrix product of this run: {reached} TFLOP/s. Operations of a forward: "
        + ", ".join(f"{who} {count / 1e12:.3g}" for who, count in flop.items())
        + f" TFLOP. Ratio: speed relative to transformers in the same precision and mode, median "
        f"over {settings.runs} rounds. Peak memory {where}, of one forward with its weights."
    )
