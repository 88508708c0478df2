"""The command line: ``xchmv2 demo``, ``xchmv2 fine-tune``. What it says is for people to read."""

from __future__ import annotations

import errno
import math
import shlex
from typing import TYPE_CHECKING, Any

import click

from xchmv2 import defaults
from xchmv2._version import __version__
from xchmv2.errors import CHMv2Error

# Commands import what they need when they run, so that help comes at once.
if TYPE_CHECKING:
    from xchmv2.training import FineTuned


_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


class _Commands(click.Group):
    """A group whose commands end with exit code 1 and one line where the input is at fault."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (CHMv2Error, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of a pipe went away: click ends quietly
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="xchmv2")
def main() -> None:
    """Canopy height in metres from high-resolution RGB imagery."""


@main.command()
@click.argument("output_dir", default=".", type=click.Path(file_okay=False))
@click.option("--seed", type=click.IntRange(min=0), show_default="10", help="Seed of the forest.")
@click.option(
    "--size",
    type=click.IntRange(min=64),
    show_default="640",
    help="Side of the scene [px of 0.6 m].",
)
@click.option("--overwrite", is_flag=True, help="Replace a demo.zarr and a demo.png.")
@click.option("--model", default="demo", hidden=True)
def demo(output_dir: str, seed: int | None, size: int | None, overwrite: bool, model: str) -> None:
    """Do the whole job on a synthetic forest.

    Needs no network and a minute or two. Writes demo.zarr (imagery, truth and prediction) and
    demo.png (look at it) into OUTPUT_DIR, by default the current folder, and prints how near the
    prediction comes to the truth.
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
@click.option("--model", default=defaults.MODEL, help="Where to start: hub id, folder or demo.")
@click.option("--train", type=click.Choice(["head", "all"]), default="head", help="What to train.")
@click.option("--epochs", type=int, default=20, help="Most epochs.")
@click.option("--batch-size", type=int, default=8, help="Crops per step.")
@click.option("--lr", type=float, default=1e-4, help="Highest learning rate.")
@click.option("--tile", type=int, default=defaults.TILE, help="Side of a crop [px], n times 32.")
@click.option("--validation", type=float, default=0.2, help="Share of the area held out.")
@click.option("--resolution", type=float, help="Ground resolution to resample to [m].")
@click.option("--bands", type=int, nargs=3, metavar="R G B", help="Bands, counted from 1.")
@click.option("--value-range", type=float, nargs=2, metavar="LOW HIGH", help="Black and white.")
@click.option("--nodata", type=float, help="Nodata value of IMAGE, instead of its own.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of crops and blocks.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1, ...")
def fine_tune(image: str, lidar: str, out: str, **options: Any) -> None:
    """Train a model further on lidar heights of your own forest.

    IMAGE and LIDAR are rasters, of colours and of canopy heights in metres; they need not share
    a grid. OUT is the checkpoint folder to write. The same command goes on after a kill.
    """
    from xchmv2.training import fine_tune

    found = fine_tune(_read(image), _read(lidar), output=out, **options)
    click.echo(_describe(found))


def _read(path: str) -> Any:
    """Open a raster lazily, or refuse a file that holds several."""
    import rioxarray
    import xarray as xr

    raster = rioxarray.open_rasterio(path, chunks={})
    if not isinstance(raster, xr.DataArray):
        raise CHMv2Error(
            f"one raster in {path!r}", "several", "name one, as gdalinfo lists its subdatasets"
        )
    return raster


def _describe(found: FineTuned) -> str:
    """Say what fine-tuning gained, and how to use it."""
    mae = found.history.set_index("epoch")["validation_mae"]
    before, after = mae.loc[0], mae.loc[found.best_epoch]
    if math.isnan(before):
        gained = f"Nothing was held out: no telling how good epoch {found.best_epoch} is."
    elif found.best_epoch == 0:
        gained = (
            f"Validation MAE: {before:.2f} m before, and no epoch did better: the model is as it "
            "came.\nMore reference heights, or another --lr, may help."
        )
    else:
        gained = f"Validation MAE: {before:.2f} m before, {after:.2f} m after epoch "
        gained += f"{found.best_epoch}."
    folder = str(found.folder)
    return (
        f"{gained}\nWrote {shlex.quote(folder)}. Use it in Python:\n\n"
        f"     imagery.chmv2.predict(model={folder!r})"
    )
