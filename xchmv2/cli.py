"""The command line: ``xchmv2 predict``, ``run``, ``verify``, ``demo`` and ``fine-tune``.

A command exits with 0, with 1 and one line on an error, or with 2 on wrong usage. With
``XCHMV2_DEBUG=1`` in the environment the traceback is shown too. What a command computes with is
imported when it runs, so that help appears at once.
"""

from __future__ import annotations

import errno
import os
import shlex
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error, require_library
from xchmv2.model.files import MODEL, OVERLAP, TILE

__all__ = ["main"]

if TYPE_CHECKING:
    from xchmv2.store import Written
    from xchmv2.training import FineTuned


class _Commands(click.Group):
    """A group of commands that report any error as one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List commands in the order they were added."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; report warnings and an error in one line each, and exit with 1."""
        with warnings.catch_warnings():
            # In one line, without the line of code that gave it.
            warnings.showwarning = lambda message, *_, **__: click.echo(
                f"warning: {message}", err=True
            )
            try:
                return super().invoke(ctx)
            except (click.ClickException, click.Abort, click.exceptions.Exit):
                raise  # click's own: it reports wrong usage
            except KeyboardInterrupt as error:
                click.echo(": ".join(filter(None, ["interrupted", str(error)])), err=True)
                ctx.exit(130)
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:
                    raise  # the reader of a pipe went away: click ends quietly
                if os.environ.get("XCHMV2_DEBUG"):
                    click.echo(traceback.format_exc(), err=True)
                click.echo(f"error: {_write_error(error)}", err=True)
                ctx.exit(1)


def _write_error(error: Exception) -> str:
    """Write an error as one line: the package's own as it is, any other with what it is."""
    said = " ".join(str(error).split())
    if isinstance(error, CHMv2Error | OSError) and said:
        return said
    if isinstance(error, MemoryError):
        return "memory is full; pass a smaller --block or --tile, or close other programs"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return (
            f"the Python package {package} is not installed; install it, or all optional ones: "
            'pip install "xchmv2[all]"'
        )
    name = type(error).__name__
    return f"{f'{name}: {said}' if said else name}; XCHMV2_DEBUG=1 shows where it was raised"


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(__version__, prog_name="xchmv2")
def main() -> None:
    """Canopy height in metres from high-resolution RGB imagery."""


_F = TypeVar("_F", bound=Callable[..., Any])
_LAYERS = ("height", "bin_spread", "overlap_disagreement")
_ENCODINGS = ("float32", "rounded", "int16_cm", "uint8_half_m")


class _Listed(click.ParamType):  # type: ignore[type-arg]
    """Values separated by commas: so many numbers of a kind, such as ``1,2,3``, or known names."""

    def __init__(
        self, kind: type = str, count: int | None = None, known: Sequence[str] = ()
    ) -> None:
        self.name = "names" if known else "numbers"
        self._kind, self._count, self._known = kind, count, known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Split and check; click calls it with the default too."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        unknown = [name for name in found if self._known and name not in self._known]
        if unknown:
            self.fail(f"{unknown[0]!r} is none of {', '.join(self._known)}", param, ctx)
        if len(found) != (self._count or len(found)):
            what = "whole numbers" if self._kind is int else "numbers"
            self.fail(f"{value!r} is not {self._count} {what} between commas", param, ctx)
        return found


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Return a decorator that adds some options to a command."""

    def add(command: _F) -> _F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_prediction_options = _options(
    click.option("--model", default=MODEL, help="Hub id, checkpoint folder, or demo."),
    click.option("--value-range", type=_Listed(float, 2), metavar="LOW,HIGH",
                 help="Values of black and white; required unless imagery is 8-bit."),
    click.option("--erode", type=click.IntRange(min=0), default=0,
                 help="Pixels around nodata to treat as nodata."),
    click.option("--tile", type=click.IntRange(min=1), default=TILE,
                 help="Side of a tile [px]."),
    click.option("--overlap", type=click.IntRange(min=0), default=OVERLAP,
                 help="Pixels shared by neighbouring tiles."),
    click.option("--block", type=click.IntRange(min=1),
                 help="Side of an output block [px]."),
    click.option("--layers", type=_Listed(known=_LAYERS), default="height", metavar="NAMES",
                 help=f"Some of {', '.join(_LAYERS)}, separated by commas."),
    click.option("--device", default="auto", help="cpu, cuda, cuda:1, ..."),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
                 help="Precision of the network."),
)  # fmt: skip
_writing_options = _options(
    click.option("--encoding", type=click.Choice(_ENCODINGS), show_default="float32",
                 help="Encoding of heights in a Zarr store."),
    click.option("--resume", is_flag=True, help="Continue an existing Zarr store."),
    click.option("--quiet", is_flag=True, help="No progress bar."),
)  # fmt: skip

# Names of the options that are passed to ``load`` and to ``predict`` unchanged.
_LOADING_NAMES = ("bbox", "crs", "resolution", "cloud_mask", "on_error")
_PREDICTION_NAMES = (
    "model", "value_range", "erode", "tile", "overlap", "block", "layers", "device", "dtype",
)  # fmt: skip


@main.command("predict")
@click.argument("image")
@click.argument("out", type=click.Path())
@click.option("--bands", type=_Listed(int, 3), metavar="R,G,B", help="Bands, counted from 1.")
@click.option(
    "--nodata", type=float, help="Nodata value of IMAGE, in place of the one it declares."
)
@click.option(
    "--resolution",
    type=float,
    help="Ground resolution to resample to [m]; the model was trained at 0.6.",
)
@click.option(
    "--pixel-size",
    type=float,
    help="Side of a pixel on the ground [m], for an IMAGE without a CRS.",
)
@_prediction_options
@_writing_options
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def _predict(image: str, out: str, *, resume: bool, overwrite: bool, **options: Any) -> None:
    """Predict canopy height from an RGB raster.

    IMAGE is a GeoTIFF, COG or any other raster that GDAL reads; its colour interpretation, band
    descriptions, nodata value, masks and alpha band count. OUT ends in .tif, for a cloud-optimised
    GeoTIFF with one band per layer, or in .zarr, for a store that --resume continues after an
    interruption.
    """
    kind = _validate_names(out, resume, overwrite, options["encoding"])
    from xchmv2.raster import BLOCK

    side = options["block"] or BLOCK
    imagery, valid = _open_imagery(image, options["bands"], {"x": side, "y": side})
    names = (*_PREDICTION_NAMES, "bands", "nodata", "resolution", "pixel_size")
    named = {name: options[name] for name in names}
    height = imagery.chmv2.predict(valid=valid, **named)
    quiet = options["quiet"]
    if kind == ".tif":
        from xchmv2.store.geotiff import write_cog

        done = write_cog(height, out, progress=not quiet, overwrite=overwrite)
    else:
        mode: Any = "w" if overwrite else "a" if resume else "w-"
        encoding = options["encoding"] or "float32"
        done = height.chmv2.to_zarr(out, encoding=encoding, mode=mode, progress=not quiet)
    if not quiet:
        click.echo(_describe_written(done, out))


def _validate_names(out: str, resume: bool, overwrite: bool, encoding: str | None) -> str:
    """Check OUT before anything is read; return its suffix."""
    kind = Path(out).suffix.lower().replace(".tiff", ".tif")
    if kind not in (".tif", ".zarr"):
        raise CHMv2Error("OUT that ends in .tif or .zarr", repr(out), "name it so")
    if encoding and kind == ".tif":
        raise CHMv2Error(
            "--encoding with a .zarr", f"--encoding with {out}", "a GeoTIFF keeps float32"
        )
    if resume and (overwrite or kind == ".tif"):
        raise CHMv2Error(
            "--resume with a .zarr, without --overwrite",
            f"--resume with {'--overwrite' if overwrite else out}",
            "a GeoTIFF is written whole or not at all",
        )
    if os.path.lexists(out) and not (resume or overwrite):
        raise CHMv2Error(
            f"no {out} yet",
            "that it exists",
            "replace it by --overwrite"
            + (", or go on with it by --resume" if kind == ".zarr" else ""),
        )
    return kind


def _open_raster(path: str, chunks: dict[str, int] | None = None) -> Any:
    """Open a raster lazily; a file that holds several is refused."""
    import rioxarray
    import xarray as xr

    raster = rioxarray.open_rasterio(path, chunks=chunks or {})
    if not isinstance(raster, xr.DataArray):
        raise CHMv2Error(
            f"one raster in {path!r}", "several", "name one, as gdalinfo lists its subdatasets"
        )
    return raster


def _open_imagery(
    path: str, bands: Sequence[int] | None, chunks: dict[str, int] | None = None
) -> tuple[Any, Any]:
    """Open imagery with what rioxarray leaves out: colour interpretation, and the valid pixels."""
    import rasterio
    import rioxarray

    raster = _open_raster(path, chunks)
    with rasterio.open(path) as file:
        colours = [colour.name for colour in file.colorinterp]
        flags = {flag.name for flag in file.mask_flag_enums[0]}
    raster = raster.assign_coords(colorinterp=("band", colours))
    valid = None
    # An alpha band that is asked for as a colour is none: GDAL calls any fourth band of bytes so.
    if "alpha" in colours and colours.index("alpha") + 1 not in (bands or ()):
        valid = raster.isel(band=colours.index("alpha"), drop=True) != 0
    if "per_dataset" in flags and "alpha" not in flags:  # an internal mask, or a file .msk
        # With chunks, rioxarray would give it the dask keys of the raster that is not masked.
        masked = rioxarray.open_rasterio(path, masked=True)
        masked = masked.chunk(chunks or {}, name_prefix="chmv2-masked-", token=raster.data.name)
        # Nodata in one band is no reason: a pixel is outside where every band is masked.
        inside = masked.isel(band=[c != "alpha" for c in colours]).notnull().any("band")
        valid = inside if valid is None else valid & inside
    return raster, None if valid is None else valid.drop_vars("colorinterp", errors="ignore")


def _describe_written(done: Written, out: str) -> str:
    """Report what was written, and how fast."""
    speed = done.pixels / 1e6 / max(done.seconds, 1e-9)
    return (
        f"Wrote {done.regions} regions, {done.pixels / 1e6:.2f} megapixels, at {speed:.2f} "
        f"megapixels per second"
        + (f"; {done.present} were there already" if done.present else "")
        + f": {out}"
    )


@main.command("run")
@click.argument("items")
@click.argument("out")
@click.option("--bbox", type=_Listed(float, 4), metavar="W,S,E,N", help="Area [degrees].")
@click.option("--resolution", type=float, default=0.6, help="Ground resolution [m].")
@click.option("--crs", help="CRS of the result, such as EPSG:32633; by default that of the items.")
@click.option("--bands", metavar="R,G,B", help="Names of red, green and blue in the catalogue.")
@click.option("--cloud-mask", help="Asset or band with the cloud mask.")
@click.option(
    "--sign",
    metavar="MODULE:NAME",
    help="Function that signs addresses, such as planetary_computer:sign.",
)
@click.option(
    "--on-error",
    type=click.Choice(["raise", "nodata"]),
    default="raise",
    help="What to do with assets that cannot be read.",
)
@_prediction_options
@_writing_options
@click.option("--scheduler", metavar="ADDRESS", help="Dask scheduler to compute on.")
def _run(items: str, out: str, *, scheduler: str | None, **options: Any) -> None:
    """Predict canopy height from a STAC catalogue into a Zarr store.

    ITEMS is a file or address of a STAC catalogue, collection, item or item collection; OUT the
    store, a path or a URL such as s3://bucket/canopy.zarr. With --resume the same command
    continues after an interruption, and adds new dates.
    """
    from xchmv2.predict.warming import warmup
    from xchmv2.stac import load

    if out.lower().endswith((".tif", ".tiff")):
        raise CHMv2Error(
            "OUT as a Zarr store",
            repr(out),
            "name it .zarr; one date at a time goes into a GeoTIFF",
        )
    bands = options["bands"].split(",") if options["bands"] else None
    with _client(scheduler) as client:
        if client is not None:
            options["model"] = warmup(client, options["model"])
        cube = load(
            items,
            bands=bands,
            sign=_find(options["sign"]),
            **{name: options[name] for name in _LOADING_NAMES},
        )
        clear = cube["valid"] if options["cloud_mask"] else None
        height = cube.chmv2.predict(
            valid=clear, **{name: options[name] for name in _PREDICTION_NAMES}
        )
        done = height.chmv2.to_zarr(
            out,
            encoding=options["encoding"] or "float32",
            mode="a" if options["resume"] else "w-",
            progress=not options["quiet"],
        )
    if not options["quiet"]:
        click.echo(_describe_written(done, out))


def _client(scheduler: str | None) -> Any:
    if scheduler is None:
        return nullcontext()
    require_library("distributed", "--scheduler needs", "cluster")
    from distributed import Client
    from distributed.comm import parse_address
    from distributed.comm.registry import get_backend

    try:  # a client that fails would stay the default
        get_backend(parse_address(scheduler)[0])
        return Client(scheduler)
    except ValueError as error:
        raise CHMv2Error(
            "--scheduler as an address such as tcp://host:8786",
            f"{scheduler!r} ({error})",
            "give the address that `dask scheduler` printed",
        ) from None


def _find(name: str | None) -> Any:
    """Import the function that ``module:name`` names."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise CHMv2Error(
            "--sign as module:name of something that is installed",
            f"{name!r} ({error})",
            "for example --sign planetary_computer:sign, after pip install planetary-computer",
        ) from None


@main.command("verify")
@click.argument("store")
@click.option("--repair", is_flag=True, help="Restore metadata; forget what is damaged.")
@click.option("--redo", metavar="DATE", help="A date to be computed again, such as 2020-07-01.")
def _verify(store: str, *, repair: bool, redo: str | None) -> None:
    """Compare a Zarr store with the checksums taken when it was written.

    STORE is a path or URL. What is missing, damaged or not written yet is listed, one line each,
    and the exit code is 1. After --repair or --redo the command that wrote the store, with
    --resume, computes those regions again.
    """
    from xchmv2.store import verify

    found = verify(store, repair=repair, redo=redo)
    for problem in found.problems:
        click.echo(problem)
    unchecked = f", {found.without_checksum} without checksum" if found.without_checksum else ""
    click.echo(f"{found.regions} regions{unchecked}, {len(found.problems)} problems: {store}")
    if found.problems:
        if repair:
            click.echo("Repaired; now make the call that wrote the store again, with --resume.")
        raise click.exceptions.Exit(1)


@main.command("demo")
@click.argument("output_dir", default=".", type=click.Path(file_okay=False))
@click.option("--seed", type=click.IntRange(min=0), show_default="10", help="Seed of the forest.")
@click.option(
    "--size",
    type=click.IntRange(min=64),
    show_default="640",
    help="Side of the scene [px of 0.6 m].",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing demo.zarr and demo.png.")
@click.option("--model", default="demo", hidden=True)
def _demo(output_dir: str, seed: int | None, size: int | None, overwrite: bool, model: str) -> None:
    """Run the whole workflow on a synthetic forest.

    This takes a minute or two and needs no network. It writes demo.zarr (imagery, truth and
    prediction) and a figure, demo.png, into OUTPUT_DIR, by default the current folder, and prints
    the errors of the prediction against the truth.
    """
    from xchmv2.demo.run import SEED, SIZE, run_demonstration

    found = run_demonstration(
        output_dir,
        seed=SEED if seed is None else seed,
        size=SIZE if size is None else size,
        overwrite=overwrite,
        model=model,
        report=lambda line: click.echo(f"{line} ..."),
    )
    click.echo(f"\n{found.tables}\n\nLook at {found.picture}. Then try:\n\n{found.next_steps}")


@main.command("fine-tune")
@click.argument("image")
@click.argument("lidar")
@click.argument("out", type=click.Path())
@click.option("--model", default=MODEL, help="Initial model: hub id, checkpoint folder, or demo.")
@click.option("--train", type=click.Choice(["head", "all"]), default="head", help="What to train.")
@click.option("--epochs", type=int, default=20, help="Maximum number of epochs.")
@click.option("--batch-size", type=int, default=8, help="Crops per step.")
@click.option("--lr", type=float, default=1e-4, help="Peak learning rate.")
@click.option("--tile", type=int, default=TILE, help="Side of a crop [px], a multiple of 32.")
@click.option("--validation", type=float, default=0.2, help="Share of the area held out.")
@click.option("--resolution", type=float, help="Ground resolution to resample to [m].")
@click.option("--bands", type=_Listed(int, 3), metavar="R,G,B", help="Bands, counted from 1.")
@click.option("--value-range", type=_Listed(float, 2), metavar="LOW,HIGH", help="Black and white.")
@click.option(
    "--nodata", type=float, help="Nodata value of IMAGE, in place of the one it declares."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of crops and blocks.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1, ...")
def _fine_tune(image: str, lidar: str, out: str, **options: Any) -> None:
    """Fine-tune a model on lidar heights of your own forest.

    IMAGE is an RGB raster and LIDAR a raster of canopy heights in metres; they need not share a
    grid. OUT is the checkpoint folder to write. The same command continues after an
    interruption.
    """
    from xchmv2.training import fine_tune

    imagery, valid = _open_imagery(image, options["bands"])
    found = fine_tune(imagery, _open_raster(lidar), output=out, valid=valid, **options)
    click.echo(_describe_tuned(found))


def _describe_tuned(found: FineTuned) -> str:
    """Report the errors before and after, and how to use the result."""
    folder = str(found.folder)
    return (
        f"{found}\nWrote {shlex.quote(folder)}. Use it in Python:\n\n"
        f"     imagery.chmv2.predict(model={folder!r})"
    )
