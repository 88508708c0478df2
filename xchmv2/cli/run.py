"""``xchmv2 run``: from a catalogue to a Zarr store."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any

import click

from xchmv2.cli.options import PREDICTION, Numbers, prediction_options, writing_options
from xchmv2.cli.predict import describe
from xchmv2.errors import CHMv2Error


@click.command()
@click.argument("items")
@click.argument("out")
@click.option("--bbox", type=Numbers(float, 4), metavar="W,S,E,N", help="Area [degrees].")
@click.option("--resolution", type=float, default=0.6, help="Ground resolution [m].")
@click.option("--crs", help="CRS of the result, such as EPSG:32633; else that of the items.")
@click.option("--bands", metavar="R,G,B", help="Names of red, green and blue in the catalogue.")
@click.option("--cloud-mask", help="Asset or band that tells clouds.")
@click.option(
    "--sign", metavar="MODULE:NAME", help="What signs addresses: planetary_computer:sign."
)
@click.option(
    "--on-error",
    type=click.Choice(["raise", "nodata"]),
    default="raise",
    help="What becomes of assets that cannot be read.",
)
@prediction_options
@writing_options
@click.option("--scheduler", metavar="ADDRESS", help="Dask scheduler to compute on.")
def run(items: str, out: str, *, scheduler: str | None, **options: Any) -> None:
    """Go all the way from a STAC catalogue to a Zarr store of canopy heights.

    ITEMS is a file or address of a STAC catalogue, collection, item or item collection; OUT the
    store, a path or a URL such as s3://bucket/canopy.zarr. With --resume the same command goes on
    after a kill, and adds new dates.
    """
    import xchmv2

    if out.lower().endswith((".tif", ".tiff")):
        raise CHMv2Error(
            "OUT as a Zarr store",
            repr(out),
            "name it .zarr; one date at a time goes into a GeoTIFF",
        )
    bands = options["bands"].split(",") if options["bands"] else None
    with _client(scheduler) as client:
        if client is not None:
            options["model"] = xchmv2.warmup(client, options["model"])
        cube = xchmv2.load(
            items,
            bbox=options["bbox"],
            crs=options["crs"],
            resolution=options["resolution"],
            bands=bands,
            cloud_mask=options["cloud_mask"],
            sign=_find(options["sign"]),
            on_error=options["on_error"],
        )
        clear = cube["valid"] if options["cloud_mask"] else None
        height = cube.chmv2.predict(valid=clear, **{name: options[name] for name in PREDICTION})
        done = height.chmv2.to_zarr(
            out,
            encoding=options["encoding"] or "float32",
            resume=options["resume"],
            progress=not options["quiet"],
        )
    if not options["quiet"]:
        click.echo(describe(done, out))


def _client(scheduler: str | None) -> Any:
    if scheduler is None:
        return nullcontext()
    try:
        from distributed import Client
    except ImportError:
        raise CHMv2Error(
            "dask.distributed, since --scheduler is given",
            "that it is not installed",
            'install it: pip install "xchmv2[cluster]"',
        ) from None
    try:
        return Client(scheduler)
    except ValueError as error:
        raise CHMv2Error(
            "--scheduler as an address such as tcp://host:8786",
            f"{scheduler!r} ({error})",
            "give the address that `dask scheduler` printed",
        ) from None


def _find(name: str | None) -> Any:
    """Import what ``module:name`` means."""
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
