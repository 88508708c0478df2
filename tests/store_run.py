"""A run for tests to kill: python store_run.py STORE CHECKPOINT LOG [key=value ...].

Writes a synthetic scene's heights and notes in LOG, line by line, which groups were computed and
which blocks are down.
"""

import json
import os
import sys
import time

import dask
import numpy as np
import torch
import xarray as xr
from conftest import cube

from xchmv2.predict.tasks import SumGroup
from xchmv2.store.regions import WriteBlock

# Private imports: work is noted task by task.


def scene(times=2, shape=(420, 540)):
    return cube(shape, times=times).chunk(time=1, y=200, x=200)


def heights(checkpoint, source=None, **options):
    source = scene() if source is None else source
    return source.chmv2.predict(checkpoint, tile=64, overlap=16, block=128, batch_size=4, **options)


def note_work(path, pause):
    """Write a line for each group and block, whole lines only."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(**what):
        os.write(log, (json.dumps({**what, "pid": os.getpid()}) + "\n").encode())

    compute, write = SumGroup.__call__, WriteBlock.__call__

    def group(self, chunks):
        rows, cols = self.job.runs
        say(group=[self.iy, self.ix], blocks=[rows[self.iy].blocks, cols[self.ix].blocks])
        time.sleep(pause)
        return compute(self, chunks)

    def block(self, blocks):
        pixels = write(self, blocks)
        for date in self.dates:
            say(down=[date.record, *self.block])
        return pixels

    SumGroup.__call__, WriteBlock.__call__ = group, block


def main(store, checkpoint, log, *options):
    torch.set_num_threads(1)
    given = dict(option.split("=", 1) for option in options)
    note_work(log, float(given.get("pause", 0.0)))
    source = scene()
    if "extend" in given:
        more = source.assign_coords(time=source.time + np.timedelta64(90, "D")).map(
            lambda b: 255 - b
        )
        source = xr.concat([source, more], "time").sortby("time").chunk(time=1)
    endpoint = given.get("endpoint")
    storage = {"endpoint_url": endpoint, "key": "test", "secret": "test"} if endpoint else None
    with dask.config.set(scheduler="threads", num_workers=2):
        heights(checkpoint, source).chmv2.to_zarr(store, progress=False, storage_options=storage)


if __name__ == "__main__":
    main(*sys.argv[1:])
