"""A run for tests to kill: python store_run.py STORE CHECKPOINT LOG [key=value ...]; other kills.

Writes a synthetic scene's heights and notes in LOG, line by line, which groups were computed and
which blocks are written. ``Run`` does the same in a process that starts at once.
"""

import errno
import json
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import dask
import numpy as np
import torch
import xarray as xr
from conftest import cube
from zarr.storage import MemoryStore, WrapperStore

import xchmv2
from xchmv2.errors import IncompleteStoreWarning
from xchmv2.predict.tasks import SumGroup
from xchmv2.store.regions import WriteBlock
from xchmv2.store.storage import list_keys, read_object, write_object

# Private imports: work is noted task by task.


@cache
def forks():
    """Context of ``multiprocessing`` whose processes have imported everything when they start."""
    here = Path(__file__).parent
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["store_faults"])
    # They import this checkout, wherever the installed package lies.
    path = os.pathsep.join([str(here), str(here.parent)])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return context


class Killed(WrapperStore):
    """A store that changes nothing any more after some operations, as if its writer was killed."""

    def __init__(self, store, operations=0):
        super().__init__(store)
        self.left = operations

    def count(self, key):
        if self.left <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if not key.endswith("lock.json"):
            self.left -= 1

    def with_read_only(self, read_only=False):  # the lowest version of zarr has none
        return self._store.with_read_only(read_only)

    async def set(self, key, value):
        self.count(key)
        await super().set(key, value)

    async def delete(self, key):
        self.count(key)
        await super().delete(key)

    async def delete_dir(self, prefix):
        # The last first: whichever way a store does it, a part may be gone.
        for key in sorted([key async for key in self.list_prefix(f"{prefix}/")], reverse=True):
            await self.delete(key)


def copy_store(store, target=None):
    """Copy a store, by default into memory."""
    target = MemoryStore() if target is None else target
    for key in list_keys(store, ""):
        write_object(target, key, read_object(store, key))
    return target


def read_whole(store):
    """Read what our reader finds; plain xarray's finds the same, or the dates of before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteStoreWarning)
        ours = xchmv2.open_zarr(store).compute()
    plain = xr.open_zarr(store).canopy_height.compute()
    same = ours.sel(time=plain.time).values
    written = ~np.isnan(same)  # plain xarray shows pixels that are not recorded yet
    np.testing.assert_array_equal(plain.values[written], same[written])
    return ours


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
        days = np.timedelta64(int(given["extend"]), "D")
        more = source.assign_coords(time=source.time + days).map(lambda b: 255 - b)
        source = xr.concat([source, more], "time").sortby("time").chunk(time=1)
    endpoint = given.get("endpoint")
    storage = {"endpoint_url": endpoint, "key": "test", "secret": "test"} if endpoint else None
    with dask.config.set(scheduler="threads", num_workers=2):
        heights(checkpoint, source).chmv2.to_zarr(store, progress=False, storage_options=storage)


class Run:
    """A forked process that calls a function; its methods are those of ``subprocess.Popen``."""

    def __init__(self, function, *given):
        self._errors, theirs = forks().Pipe(duplex=False)
        self._process = forks().Process(target=self._call, args=(theirs, function, given))
        self._process.start()
        theirs.close()
        self.pid = self._process.pid

    @staticmethod
    def _call(errors, function, given):
        os.dup2(errors.fileno(), 2)
        errors.close()
        function(*given)

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Wait until it ends; returns what it printed about errors."""
        with open(self._errors.fileno(), closefd=False) as errors:
            said = errors.read()
        self._process.join(timeout)
        self._errors.close()
        return "", said


if __name__ == "__main__":
    main(*sys.argv[1:])
