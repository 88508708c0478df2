"""Fine-tune the demonstration model on real plots: ``python -m tests.evaluation.fine_tuning DATA``.

DATA holds the folders ``rgb_chm_bart2019`` and ``sjer052_two_dates`` (NEON AOP, CC0). Prints the
errors of the published losses and of those that are chosen by default, on the training data: the
plots are too small to hold any out. SJER in the dry season is read as 0 m everywhere.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import rioxarray

from xchmv2.training import Curriculum, fine_tune

#: Imagery, lidar, and the ground resolution to read them at [m].
PLOTS = {
    "SJER 2018, dry": (
        "sjer052_two_dates/SJER_052_rgb_2018",
        "sjer052_two_dates/SJER_052_chm",
        0.3,
    ),
    "SJER 2017, green": (
        "sjer052_two_dates/SJER_052_rgb_2017",
        "sjer052_two_dates/SJER_052_chm",
        0.3,
    ),
    "BART 2019": (
        "rgb_chm_bart2019/BART_320000_4881000_rgb_2019",
        "rgb_chm_bart2019/BART_320000_4881000_chm_2019",
        0.6,
    ),
}


def main() -> None:
    """Fine-tune on each plot with both and print a line for each."""
    data = Path(sys.argv[1])
    for name, (image, lidar, resolution) in PLOTS.items():
        rasters = [rioxarray.open_rasterio(data / f"{path}.tif") for path in (image, lidar)]
        for losses, curriculum in {"published": Curriculum(), "chosen": None}.items():
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = fine_tune(
                    *rasters, "demo", output=Path(folder) / "tuned", resolution=resolution, tile=64,
                    validation=0, curriculum=curriculum, progress=False, device="cpu",
                )  # fmt: skip
            before, after, constant = found.scores.loc["training"]
            sys.stdout.write(
                f"{name:16s} {losses:9s} read as ground {found.blind:4.0%}, MAE [m] before "
                f"{before:.2f}, after {after:.2f}, of the median {constant:.2f}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
