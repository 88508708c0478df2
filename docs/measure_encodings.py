"""Measure what each encoding of to_zarr costs: python docs/measure_encodings.py [SIDE].

Writes and reads heights that the demonstration model predicts on a synthetic forest, in memory, so
that no disk is measured. Prints a Markdown table.
"""

from __future__ import annotations

import sys
import time
import warnings
from statistics import median

import numpy as np
import xarray as xr
from zarr.storage import MemoryStore

import xchmv2  # noqa: F401  (registers .chmv2)
from xchmv2.demo.synthetic import synthetic_forest
from xchmv2.errors import DemoModelWarning

PLAIN = "`height.to_zarr`"
ENCODINGS = ("float32", "rounded", "int16_cm", "uint8_half_m", PLAIN)
ROUNDS = 5


def main(side: int = 1024) -> None:
    """Print the table."""
    forest = synthetic_forest((side, side), times=["2020-07-01"], seed=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DemoModelWarning)
        height = forest[["red", "green", "blue"]].chmv2.predict("demo").compute()
    pixels = height.size
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ENCODINGS}
    print("| encoding | bits per pixel | largest error [m] | RMS error [m] | write | read |")
    print("|---|---|---|---|---|---|")
    facts = {}
    for _ in range(ROUNDS):  # interleaved, so that a busy machine hurts all alike
        for name in ENCODINGS:
            store = MemoryStore()
            begun = time.perf_counter()
            if name == PLAIN:
                height.to_zarr(store, zarr_format=3, consolidated=False)
            else:
                height.chmv2.to_zarr(store, encoding=name, progress=False)
            written = time.perf_counter()
            found = xr.open_zarr(store, consolidated=False)["canopy_height"].compute()
            times[name].append((written - begun, time.perf_counter() - written))
            size = sum(len(v) for k, v in store._store_dict.items() if "canopy_height/c" in k)
            error = np.abs(found.values - height.values)
            facts[name] = (8 * size / pixels, np.nanmax(error), np.sqrt(np.nanmean(error**2)))
    base = [median(column) for column in zip(*times["float32"], strict=True)]
    for name, (bits, worst, rms) in facts.items():
        own = [median(column) for column in zip(*times[name], strict=True)]
        write, read = (b / o for b, o in zip(base, own, strict=True))
        print(f"| {name} | {bits:.1f} | {worst:.4f} | {rms:.4f} | {write:.2f} x | {read:.2f} x |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
