"""Make store_half_written.zip with the code of commit 166d6a0, the last before the rooms moved.

Run with that commit's checkout on PYTHONPATH: ``PYTHONPATH=OLD:OLD/tests python
tests/reference_data/make_store_half_written.py``. The archive holds a small checkpoint and a store
of two dates, whose writing stopped after three of its eight regions.
"""

import os
import shutil
import tempfile
from pathlib import Path

import dask
import torch
from conftest import cube
from reference import tiny_config

import xchmv2  # noqa: F401  (registers .chmv2)
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.store.regions import WriteBlock

# Private imports: writing is stopped between two regions.

OUT = Path(__file__).parent / "store_half_written"
WRITTEN = 3


def main():
    """Write the checkpoint, and the store until its fourth region."""
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)  # a store keeps the checkpoint's address
    torch.manual_seed(0)
    model = CHMv2ForDepthEstimation(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 64).round() / 64)  # packs well
    model.save_pretrained("checkpoint")

    write, written = WriteBlock.__call__, []

    def stop(self, blocks):
        if len(written) == WRITTEN:
            raise KeyboardInterrupt
        written.append(self)
        return write(self, blocks)

    WriteBlock.__call__ = stop
    imagery = cube((96, 96), times=2).chunk(time=1)
    height = imagery.chmv2.predict("checkpoint", tile=64, overlap=16, block=64)
    try:
        with dask.config.set(scheduler="sync"):
            height.chmv2.to_zarr("canopy.zarr", progress=False)
    except KeyboardInterrupt:
        shutil.make_archive(str(OUT), "zip", folder)


if __name__ == "__main__":
    main()
