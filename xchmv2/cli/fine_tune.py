"""``xchmv2 fine-tune``: training on local lidar."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Any

import click

from xchmv2 import defaults
from xchmv2.cli.options import Numbers
from xchmv2.cli.rasters import open_raster

if TYPE_CHECKING:
    from xchmv2.training import FineTuned


@click.command("fine-tune")
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
@click.option("--bands", type=Numbers(int, 3), metavar="R,G,B", help="Bands, counted from 1.")
@click.option("--value-range", type=Numbers(float, 2), metavar="LOW,HIGH", help="Black and white.")
@click.option("--nodata", type=float, help="Nodata value of IMAGE, instead of its own.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of crops and blocks.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1, ...")
def fine_tune(image: str, lidar: str, out: str, **options: Any) -> None:
    """Train a model further on lidar heights of your own forest.

    IMAGE and LIDAR are rasters, of colours and of canopy heights in metres; they need not share
    a grid. OUT is the checkpoint folder to write. The same command goes on after a kill.
    """
    from xchmv2.training import fine_tune

    found = fine_tune(open_raster(image), open_raster(lidar), output=out, **options)
    click.echo(_describe(found))


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
