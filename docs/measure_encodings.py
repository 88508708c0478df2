"""Measure what encodings and compressors cost: python docs/measure_encodings.py [SIDE].

Writes and reads heights that the demonstration model predicts on a synthetic forest, in memory, so
that no disk is measured. Prints a Markdown table, with times as multiples of the default's.
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
OURS = ("float32", "rounded", "int16_cm", "uint8_half_m")
#: Encoding and compressor.
LAYOUTS = (*((e, c) for c in ("blosc", "gzip") for e in OURS), (PLAIN, "zstd"))
ROUNDS = 5


def main(side: int = 1024) -> None:
    """Print the table."""
    forest = synthetic_forest((side, side), times=["2020-07-01"], seed=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DemoModelWarning)
        height = forest[["red", "green", "blue"]].chmv2.predict("demo").compute()
    pixels = height.size
    times: dict[tuple[str, str], list[tuple[float, float]]] = {layout: [] for layout in LAYOUTS}
    print("| encoding | compressor | bits per pixel | largest error [m] | RMS error [m] | ", end="")
    print("write | read |\n|---|---|---|---|---|---|---|")
    facts = {}
    for _ in range(ROUNDS):  # interleaved, so that a busy machine hurts all alike
        for name, compressor in LAYOUTS:
            store = MemoryStore()
            begun = time.perf_counter()
            if name == PLAIN:
                height.to_zarr(store, zarr_format=3, consolidated=False)
            else:
                height.chmv2.to_zarr(store, encoding=name, compressor=compressor, progress=False)
            written = time.perf_counter()
            found = xr.open_zarr(store, consolidated=False)["canopy_height"].compute()
            times[name, compressor].append((written - begun, time.perf_counter() - written))
            size = sum(len(v) for k, v in store._store_dict.items() if "canopy_height/c" in k)
            error = np.abs(found.values - height.values)
            facts[name, compressor] = (
                8 * size / pixels,
                np.nanmax(error),
                np.sqrt(np.nanmean(error**2)),
            )
    base = [median(column) for column in zip(*times["float32", "blosc"], strict=True)]
    for layout, (bits, worst, rms) in facts.items():
        own = [median(column) for column in zip(*times[layout], strict=True)]
        write, read = (o / b for b, o in zip(base, own, strict=True))
        print(f"| {' | '.join(layout)} | {bits:.1f} | {worst:.4f} | {rms:.4f} | ", end="")
        print(f"{write:.1f} times | {read:.1f} times |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
