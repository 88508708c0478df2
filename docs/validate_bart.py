"""Hold the demonstration model, and one fine-tuned on half the plot, against lidar of a NEON plot.

Run from the repository root: ``python docs/validate_bart.py DATA [PICTURE]``, where DATA holds
``BART_320000_4881000_rgb_2019.tif`` and ``BART_320000_4881000_chm_2019.tif`` (NEON AOP, CC0).
Prints a table for each; both are of the eastern half, which fine-tuning never saw.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import rioxarray
import xarray as xr

import xchmv2
from xchmv2.errors import DemoModelWarning
from xchmv2.plotting import plot_validation
from xchmv2.training import fine_tune
from xchmv2.validation import to_table, validate

TILE, RESOLUTION = 64, 0.6


def heights(data: Path, output: Path, *, epochs: int = 20) -> dict[str, xr.DataArray]:
    """Predict the eastern half before and after fine-tuning on the western."""
    image = rioxarray.open_rasterio(data / "BART_320000_4881000_rgb_2019.tif")
    lidar = rioxarray.open_rasterio(data / "BART_320000_4881000_chm_2019.tif")
    half = image.sizes["x"] // 2
    west, east = image.isel(x=slice(0, half)), image.isel(x=slice(half, None))
    tuned = fine_tune(
        west, lidar, "demo", output=output, resolution=RESOLUTION, tile=TILE, train="all",
        epochs=epochs, batch_size=8, lr=3e-4, validation=0.0, seed=0, progress=False,
    )  # fmt: skip
    options = dict(resolution=RESOLUTION, tile=TILE, overlap=TILE // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DemoModelWarning)
        before = east.chmv2.predict("demo", **options)
    return {"demo model": before, "fine-tuned": east.chmv2.predict(tuned.folder, **options)}


def main() -> None:
    """Print the tables; draw the fine-tuned model's errors if a picture is named."""
    data = Path(sys.argv[1])
    lidar = rioxarray.open_rasterio(data / "BART_320000_4881000_chm_2019.tif")
    with tempfile.TemporaryDirectory() as folder:
        found = heights(data, Path(folder) / "bart")
    for name, height in found.items():
        scores = validate(height, lidar)
        edge = float(scores["edge_error"])
        table = to_table(scores).round(2).to_string()
        sys.stdout.write(f"{name}, xchmv2 {xchmv2.__version__}\n{table}\nedge error {edge:.2f}\n\n")
    if len(sys.argv) > 2:
        plot_validation(found["fine-tuned"], lidar).figure.savefig(sys.argv[2], dpi=90)


if __name__ == "__main__":
    main()
