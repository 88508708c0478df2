"""Draw docs/images/synthetic_forest.png: imagery and truth of a synthetic forest on 3 dates.

Run from the repository root: ``python docs/make_synthetic_forest.py`` (about ten seconds; needs
matplotlib and pillow).
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

from xchmv2.demo.synthetic import synthetic_forest

mpl.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent / "images" / "synthetic_forest.png"
TIMES = ("2019-07-01", "2021-10-14", "2024-07-10")


def main() -> None:
    """Make the forest, draw it, and write the picture with a palette to keep it small."""
    forest = synthetic_forest((480, 480), times=TIMES, seed=2)
    figure, axes = plt.subplots(2, 3, figsize=(12.4, 8.6), layout="constrained")
    extent = (0, 480 * 0.6, 480 * 0.6, 0)
    for k, time in enumerate(TIMES):
        one = forest.isel(time=k)
        rgb = np.stack([one[band].values for band in ("red", "green", "blue")], axis=-1)
        axes[0, k].imshow(rgb, extent=extent)
        axes[0, k].set_title(f"{time}, sun {float(one.sun_elevation):.0f}° high")
        height = axes[1, k].imshow(one.canopy_height, extent=extent, vmin=0, vmax=40)
        labels = np.unique(one.disturbance.values)
        for label in labels[labels > 0]:
            axes[1, k].contour(
                np.arange(480) * 0.6,
                np.arange(480) * 0.6,
                one.disturbance == label,
                [0.5],
                colors="white",
                linewidths=1.2,
            )
        kinds = sorted(set(forest.event_kind.values[labels[labels > 0] - 1]))
        names = " and ".join(str(kind).replace("_", "-") for kind in kinds)
        axes[1, k].set_title(f"true height, after {names}" if names else "true height")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(height, ax=axes[1, :], label="canopy height [m]", shrink=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    Image.open(buffer).convert("RGB").quantize(192).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
