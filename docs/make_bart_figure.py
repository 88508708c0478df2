"""Fine-tune the demonstration model on half a NEON plot, and hold the other half against lidar.

Run from the repository root: ``python docs/make_bart_figure.py DATA [SCATTER]``, where DATA holds
``BART_320000_4881000_rgb_2019.tif`` and ``BART_320000_4881000_chm_2019.tif`` (NEON AOP, CC0).
Draws the picture of the documentation, and the fine-tuned model's errors if SCATTER names a file;
prints a table of scores for each model.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import rioxarray
import xarray as xr

import xchmv2
from xchmv2.errors import DemoModelWarning
from xchmv2.plotting import plot_validation
from xchmv2.training import fine_tune
from xchmv2.training.pairs import Pair, read_pair
from xchmv2.validation import to_table, validate

OUT = Path(__file__).parent / "images" / "bart_fine_tuning.png"
TILE, RESOLUTION = 64, 0.6


@dataclass(frozen=True, eq=False)
class Comparison:
    """The eastern half: imagery, lidar, and heights before and after fine-tuning on the western."""

    pair: Pair
    lidar: xr.DataArray
    before: xr.DataArray
    after: xr.DataArray
    epochs: int

    def mae(self, height: xr.DataArray) -> float:
        """Mean absolute error against the lidar [m]."""
        return float(validate(height, self.lidar)["mae"])


def compare(data: Path, output: Path, *, epochs: int = 20) -> Comparison:
    """Fine-tune on the western half, predict the eastern half with both models.

    The western half is six tiles: too few to hold any out for validation.
    """
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
    after = east.chmv2.predict(tuned.folder, **options)
    pair = read_pair(east, lidar, resolution=RESOLUTION)
    return Comparison(pair, lidar, before, after, tuned.best_epoch)


def draw(found: Comparison) -> None:
    """Draw imagery, lidar and both predictions side by side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12, 5.2), layout="constrained")
    axes[0].imshow(found.pair.image.transpose(1, 2, 0))
    titles = ["imagery at 0.6 m", "lidar", "demo model", "demo model, fine-tuned"]
    for axis, height in zip(axes[1:], (found.pair.height, found.before, found.after), strict=True):
        drawn = axis.imshow(height, vmin=0, vmax=25, cmap="viridis")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[2].set_xlabel(f"MAE {found.mae(found.before):.2f} m")
    axes[3].set_xlabel(f"MAE {found.mae(found.after):.2f} m")
    figure.colorbar(drawn, ax=axes, label="canopy height [m]", shrink=0.75)
    figure.savefig(OUT, dpi=90)


def main() -> None:
    """Fine-tune, print the figures, write the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(sys.argv[1]), Path(folder) / "bart")
    for name, height in (("demo model", found.before), ("fine-tuned", found.after)):
        scores = validate(height, found.lidar)
        table = to_table(scores).round(2).to_string()
        sys.stdout.write(f"{name}\n{table}\nedge error {float(scores['edge_error']):.2f}\n\n")
    sys.stdout.write(f"xchmv2 {xchmv2.__version__}, {found.epochs} epochs\n")
    if len(sys.argv) > 2:
        plot_validation(found.after, found.lidar).figure.savefig(sys.argv[2], dpi=90)
    draw(found)


if __name__ == "__main__":
    main()
