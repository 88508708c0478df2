"""What the demonstration says in the end: two tables, and what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from xchmv2.demo.scores import DROP, OPENING, HeightScore, LossScore

_CAVEAT = (
    "The demo model was trained on synthetic forest alone: elsewhere its heights mean nothing."
)


def write_tables(
    heights: Sequence[HeightScore], losses: Sequence[LossScore], megapixels: float, seconds: float
) -> str:
    """Return the scores as two tables.

    Parameters
    ----------
    heights, losses : sequence
        Scores of dates and of the steps between them.
    megapixels : float
        Imagery predicted from, all dates together [Mpx].
    seconds : float
        Time the prediction took, with reading and writing [s].

    Returns
    -------
    str
        Lines of at most 80 characters.
    """
    lines = [f"{'height':<14}{'MAE':>9}{'bias':>11}{'R2':>8}"]
    lines += [f"{s.date:<14}{s.mae:7.2f} m{s.bias:+9.2f} m{s.r2:8.2f}" for s in heights]
    lines += ["", f"{'forest lost':<14}{'truth':>10}{'found':>11}{'overlap':>10}"]
    lines += [
        f"{s.years:<14}{s.true_area:7.2f} ha{s.found_area:8.2f} ha{s.overlap:10.2f}" for s in losses
    ]
    lines += [
        "",
        f"Lost is what drops by more than {DROP:g} m, cleaned by a {OPENING} x {OPENING} opening;",
        "overlap is intersection over union. Pixels under cloud count on neither side.",
        f"Speed: {megapixels / seconds:.2f} megapixels per second.",
        _CAVEAT,
    ]
    return "\n".join(lines)


def write_next_steps(store: Path) -> str:
    """Return three things to try with what the demonstration wrote, each ready to paste.

    Parameters
    ----------
    store : Path
        The Zarr store.

    Returns
    -------
    str
        Numbered paragraphs; each is made of words, then indented lines of Python or shell.
    """
    return "\n\n".join(
        f"{number}. {words}\n" + "\n".join(f"     {line}" for line in lines)
        for number, (words, lines) in enumerate(_next_steps(store), start=1)
    )


def _next_steps(store: Path) -> list[tuple[str, list[str]]]:
    image, lidar, height = (
        store.with_name(name) for name in ("image.tif", "lidar.tif", "height.tif")
    )
    tuned = store.with_name("my-model")
    paths = " ".join(shlex.quote(str(path)) for path in (image, lidar, tuned))
    return [
        (
            "Open the result in Python, and write its last date as GeoTIFF for your GIS:",
            [
                "import rioxarray, xarray as xr",
                f'cube = xr.open_zarr({str(store)!r}, consolidated=False, decode_coords="all")',
                "print(cube)",
                "last = cube.isel(time=-1)",
                'rgb = last[["red", "green", "blue"]].to_dataarray("band")',
                f"rgb.rio.to_raster({str(image)!r})",
                f"last.true_height.rio.to_raster({str(lidar)!r})",
            ],
        ),
        (
            "Predict from a GeoTIFF. Put your own image there and leave out model= for the\n"
            "   published CHMv2 weights (they are gated; the README says how to get them):",
            [
                "import rioxarray, xchmv2",
                f"image = rioxarray.open_rasterio({str(image)!r}, chunks={{'x': 2048, 'y': 2048}})",
                'height = image.chmv2.predict(model="demo")',
                f"height.rio.to_raster({str(height)!r})",
            ],
        ),
        (
            "Fine-tune on lidar, here the forest's truth (takes some minutes without a GPU):",
            [f"xchmv2 fine-tune {paths} --model demo --tile 128 --epochs 2"],
        ),
    ]
