"""The command line of the benchmark."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from click.core import ParameterSource

from xchmv2.errors import CHMv2Error
from xchmv2.inference import resolve_device, resolve_dtype, validate_device
from xchmv2.model.files import OVERLAP, TILE
from xchmv2.raster import validate_grid

from .choice import measure_choice
from .graph import measure_graph
from .machine import describe_machine, load_average
from .model import measure_model
from .networks import CONFIGS, write_checkpoint
from .report import Table, to_json, to_markdown, update_document
from .scaling import measure_scaling
from .scene import measure_scene
from .settings import Settings
from .size import measure_size
from .tiles import measure_tiles

# Private imports: defaults of the published checkpoint.

_MODULE = "python -m tests.benchmarks"

#: What measures each part.
PARTS: dict[str, Callable[[Settings], list[Table]]] = {
    "model": measure_model,
    "scene": measure_scene,
    "size": measure_size,
    "graph": measure_graph,
    "scaling": measure_scaling,
    "tiles": measure_tiles,
    "choice": measure_choice,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("parts", nargs=-1, type=click.Choice([*PARTS, "all"]))
@click.option("--config", type=click.Choice(CONFIGS), default="small", help="Which network.")
@click.option("--tile", type=int, default=TILE, help="Side of a tile [px].")
@click.option("--overlap", type=int, default=OVERLAP, help="Pixels that tiles share.")
@click.option("--side", type=int, show_default="1024; 8192 on CUDA", help="Side of a scene [px].")
@click.option("--batch", type=int, show_default="1; 16 on CUDA", help="Tiles per forward.")
@click.option("--runs", type=click.IntRange(min=1), default=5, help="Rounds of a comparison.")
@click.option("--threads", type=click.IntRange(min=1), show_default="all cores", help="Of torch.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
              help="Precision; the part model tries both.")  # fmt: skip
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall",
              help="Time passed, or time computed: for a busy machine.")  # fmt: skip
@click.option("--compile/--no-compile", "compiled", default=True, help="Try torch.compile too.")
@click.option("--patience", type=float, default=60.0, help="What takes longer is timed once [s].")
@click.option("--seconds-per-tile", type=float, default=0.01, help="Of a simulated GPU [s].")
@click.option("--output", type=click.Path(file_okay=False), help="Folder for JSON and Markdown.")
@click.option("--update", type=click.Path(exists=True, dir_okay=False),
              help="Document whose tables to replace.")  # fmt: skip
@click.pass_context
def main(
    context: click.Context,
    /,
    parts: Sequence[str],
    config: str,
    output: str | None,
    update: str | None,
    **options: Any,
) -> None:
    """Measure this machine: model, scene, size, graph, scaling, tiles, choice; by default all.

    Comparisons with transformers need it: pip install "xchmv2[benchmark]".
    """
    chosen = list(PARTS) if not parts or "all" in parts else list(dict.fromkeys(parts))
    try:
        with TemporaryDirectory() as folder:
            settings = _settings(Path(folder), config, options)
            tables = _measure(chosen, settings, _options(context), update)
        if output:
            _write(Path(output), settings, tables, f"{' '.join(chosen)}{_options(context)}")
    except CHMv2Error as error:
        raise click.ClickException(str(error)) from error


def _measure(
    parts: Sequence[str], settings: Settings, options: str, update: str | None
) -> list[Table]:
    """Measure part by part, and show each at once."""
    tables: list[Table] = []
    for part in parts:
        click.echo(f"{part} ...", err=True)
        machine = _machine(settings)
        found = PARTS[part](settings)
        text = to_markdown(machine, f"{_MODULE} {part}{options}", found)
        click.echo(text)
        tables += found
        if update:
            update_document(Path(update), part, text)
    return tables


def _machine(settings: Settings) -> dict[str, str]:
    """Tell the machine, the day, and how busy it is with other work just now."""
    load = load_average()
    return {
        **describe_machine(settings.device, settings.threads),
        "measured": time.strftime("%Y-%m-%d"),
        "load": "unknown" if load is None else f"{load:.1f}",
    }


def _options(context: click.Context) -> str:
    """Options that were given and change what is measured, as one would write them."""
    given = [
        " --no-compile"
        if name == "compiled"
        else f" --{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in context.params.items()
        if name not in ("parts", "output", "update")
        and context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]
    return "".join(given)


def _write(folder: Path, settings: Settings, tables: Sequence[Table], command: str) -> None:
    """Write benchmark.json and benchmark.md."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = _machine(settings)
    known = {name: value for name, value in asdict(settings).items() if name != "checkpoint"}
    (folder / "benchmark.json").write_text(to_json(machine, known, tables))
    text = to_markdown(machine, f"{_MODULE} {command}", tables)
    (folder / "benchmark.md").write_text(f"# Benchmark\n\n{text}")


def _settings(folder: Path, config: str, options: dict[str, Any]) -> Settings:
    """Fill in what depends on the device, and write the network's weights."""
    validate_device(options["device"])
    device = resolve_device(options["device"])
    accelerated = device.startswith("cuda")
    given = {name: value for name, value in options.items() if value is not None}
    if accelerated and options["clock"] == "cpu":
        raise CHMv2Error(
            "--clock wall on a GPU", "--clock cpu", "leave it out: a GPU has no such clock"
        )
    given["dtype"] = resolve_dtype(options["dtype"], device)
    sizes = {"side": 8192, "batch": 16} if accelerated else {}
    validate_grid(options["tile"], options["overlap"], None)
    checkpoint = write_checkpoint(config, folder)
    settings = Settings(str(checkpoint), config, **{**sizes, **given, "device": device})
    torch.set_num_threads(settings.threads)
    return settings
