"""``xchmv2 predict``: one raster in, one raster or Zarr store out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xchmv2 import defaults
from xchmv2.cli.options import PREDICTION, Numbers, prediction_options, writing_options
from xchmv2.cli.rasters import open_raster
from xchmv2.errors import CHMv2Error

if TYPE_CHECKING:
    from xchmv2.store import Written


@click.command()
@click.argument("image")
@click.argument("out", type=click.Path())
@click.option("--bands", type=Numbers(int, 3), metavar="R,G,B", help="Bands, counted from 1.")
@click.option("--nodata", type=float, help="Nodata value of IMAGE, instead of its own.")
@click.option("--resolution", type=float, help="Ground resolution to resample to [m], best 0.6.")
@prediction_options
@writing_options
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def predict(image: str, out: str, *, resume: bool, overwrite: bool, **options: Any) -> None:
    """Predict canopy height from a raster of colours.

    IMAGE is a GeoTIFF, COG or whatever else GDAL reads. OUT ends in .tif, for a cloud-optimised
    GeoTIFF with a band per layer, or in .zarr, for a store that goes on after a kill with --resume.
    """
    kind = _validate_names(out, resume, overwrite, options["encoding"])
    side = options["block"] or defaults.BLOCK
    imagery = open_raster(image, {"x": side, "y": side})
    named = {name: options[name] for name in (*PREDICTION, "bands", "nodata", "resolution")}
    height = imagery.chmv2.predict(**named)
    quiet = options["quiet"]
    if kind == ".tif":
        from xchmv2.raster import write_cog

        done = write_cog(height, out, progress=not quiet, overwrite=overwrite)
    else:
        from xchmv2.store import remove_store

        if overwrite and os.path.lexists(out):
            remove_store(out)
        encoding = options["encoding"] or "float32"
        done = height.chmv2.to_zarr(out, encoding=encoding, resume=resume, progress=not quiet)
    if not quiet:
        click.echo(describe(done, out))


def describe(done: Written, out: str) -> str:
    """Say what was written, and how fast."""
    speed = done.pixels / 1e6 / max(done.seconds, 1e-9)
    return (
        f"Wrote {done.regions} regions, {done.pixels / 1e6:.2f} megapixels, at {speed:.2f} "
        f"megapixels per second"
        + (f"; {done.present} were there already" if done.present else "")
        + f": {out}"
    )


def _validate_names(out: str, resume: bool, overwrite: bool, encoding: str | None) -> str:
    """Check OUT before anything is read; returns how it ends."""
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
