"""Check change on real data: lidar that changed, and imagery that changed where trees did not.

Run from the repository root: ``python docs/evaluate_change.py DATA``, where DATA holds
``chm_change_cauaxi_window/CAU_CHM_2012_nw100.tif`` and ``..._2014_nw100.tif`` (Sustainable
Landscapes Brazil), and ``sjer052_two_dates/SJER_052_rgb_2017.tif``, ``..._2018.tif`` and
``SJER_052_chm.tif`` (NEON AOP, CC0). For synthetic forests: ``python -m tests.evaluation.change``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rioxarray
import shapely
import xarray as xr

from xchmv2.change import ComparisonWarning, align, difference, loss, stable_bias
from xchmv2.training import fine_tune

RESOLUTION = 0.6


def cauaxi(data: Path) -> pd.DataFrame:
    """Compare lidar of two dates, and each figure with the one computed independently."""
    folder = data / "chm_change_cauaxi_window"
    before, after = (
        rioxarray.open_rasterio(folder / f"CAU_CHM_{year}_nw100.tif").squeeze("band", drop=True)
        for year in (2012, 2014)
    )
    change = difference(before, after, sigma=1.0)
    moved = change["height_change"]
    wide = {"opening": None, "min_area": None}
    found = {
        "mean_change": float(moved.mean()),
        "median_change": float(moved.median()),
        "cells_change_lt_minus5": int(loss(moved, threshold=np.nextafter(5, 6), **wide).sum()),
        "cells_change_lt_minus10": int(loss(moved, threshold=np.nextafter(10, 11), **wide).sum()),
        "volume_change_m3": float(moved.sum()),
    }
    known = json.loads((data / "reference_values.json").read_text())["cauaxi_nw100"]
    rows = {name: {"here": value, "reference": known[name]} for name, value in found.items()}
    lost = loss(change, threshold=5)
    rows["loss above 5 m in patches of 200 m2 [m2]"] = {"here": float(lost.sum()), "reference": ""}
    window = shapely.box(*before.rio.bounds())
    zones = change.chmv2.zonal(window, threshold=5.0, correlation_length=5.0).isel(geometry=0)
    of_window = {
        "mean": known["mean_change"],
        "net_volume": known["volume_change_m3"],
        "loss_area": known["cells_change_lt_minus5"] / 1e4,
        "gain_area": known["cells_change_gt_5"] / 1e4,
    }
    for name, reference in of_window.items():
        here, error = float(zones[name]), float(zones[f"{name}_se"])
        rows[f"zonal: {name}"] = {"here": here, "standard error": error, "reference": reference}
    return pd.DataFrame.from_dict(rows, orient="index")


def sjer(data: Path, output: Path, *, dates: tuple[int, ...]) -> pd.DataFrame:
    """Predict both dates with a model fine-tuned on the plot's lidar, and compare them."""
    folder = data / "sjer052_two_dates"
    images = {
        year: rioxarray.open_rasterio(folder / f"SJER_052_rgb_{year}.tif") for year in (2017, 2018)
    }
    lidar = rioxarray.open_rasterio(folder / "SJER_052_chm.tif", masked=True)
    # One image of the plot is little more than one tile of 64 px: alone it needs smaller ones.
    tile, lr, epochs = (32, 3e-4, 100) if len(dates) == 1 else (64, 1e-3, 60)
    tuned = fine_tune(
        [images[year] for year in dates], [lidar] * len(dates), "demo", output=output,
        resolution=RESOLUTION, tile=tile, train="all", epochs=epochs, patience=epochs,
        batch_size=8, lr=lr, validation=0.0, seed=0, progress=False,
    )  # fmt: skip
    cube = xr.concat(list(images.values()), "time").to_dataset("band")
    cube = cube.rename({1: "red", 2: "green", 3: "blue"})
    apart = align(cube, apply=False)
    options = dict(
        resolution=RESOLUTION, tile=tile, overlap=tile // 2, value_range=(0, 255), nodata=np.nan
    )
    heights = [
        image.chmv2.predict(tuned.folder, **options) for image in (cube.astype("f4"), align(cube))
    ]
    sys.stdout.write(
        f"imagery 2018 against 2017: {float(apart.shift_y[1]):+.2f} px down, "
        f"{float(apart.shift_x[1]):+.2f} px along, {float(apart.agreement[1]):.0%} of windows\n"
    )
    return _shares(*heights)


def _shares(cube: Any, aligned: Any) -> pd.DataFrame:
    """Tell the share of the plot called changed, step by step."""
    steps = {
        "as predicted": cube,
        "imagery aligned": aligned,
        "and offset taken out": stable_bias(aligned),
    }
    rows = {}
    for name, dates in steps.items():
        plain = dates[1] - dates[0]
        change = difference(dates[0], dates[1])
        fixed = difference(dates[0], dates[1], sigma=3.0)
        rows[name] = {
            "median change [m]": float(plain.median()),
            "level of detection [m]": float(change.level_of_detection.max()),
            "drop above 5 m [%]": 100 * float((plain < -5).mean()),
            "significant, measured sigma [%]": 100 * float(change.significant.mean()),
            "significant, sigma=3 [%]": 100 * float(fixed.significant.mean()),
            "loss, 5 m and 200 m2 [%]": 100 * float(loss(change, threshold=5).mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    """Print the tables."""
    data = Path(sys.argv[1])
    sys.stdout.write(f"Cauaxi, lidar 2012 and 2014\n{cauaxi(data).to_string()}\n\n")
    warnings.simplefilter("ignore", ComparisonWarning)
    for dates in ((2018,), (2017, 2018)):
        with tempfile.TemporaryDirectory() as folder:
            table = sjer(data, Path(folder) / "sjer", dates=dates)
        trained = " and ".join(str(year) for year in dates)
        sys.stdout.write(f"SJER 2017 and 2018, model fine-tuned on imagery of {trained}\n")
        sys.stdout.write(f"{table.round(2).T.to_string()}\n\n")


if __name__ == "__main__":
    main()
