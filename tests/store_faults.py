"""Stores that fail at a chosen operation, and what must hold after each failure.

``survive(verb, way, place)`` makes operation 1, 2, 3 ... of a call fail in turn. After each failure
a reader must see right heights or none, and one clean call must leave the bytes of a run that
nothing happened to.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import dask
import numpy as np
import torch
import xarray as xr
from conftest import cube
from faulty_s3 import bucket, s3_server
from reference import whole_tile_model
from store_run import copy_store, forks
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xchmv2
from xchmv2.errors import IncompleteStoreWarning, StoreError
from xchmv2.store import lock, remove_store
from xchmv2.store.storage import delete_object, list_keys, read_object, write_object

# Private imports: objects are compared byte by byte.

#: How an operation fails. The process dies at it: nothing is changed any more. It raises an
#: OSError, before it has done anything or, if it changes something, after. What it reads is said to
#: be missing.
WAYS = ("dies", "raises", "raises late", "missing")


@dataclass
class Fault:
    """Operation number ``at`` fails, counted from 1 among those that can fail in this way."""

    way: str
    at: int
    count: int = 0

    @property
    def struck(self):
        return self.count >= self.at

    async def do(self, operation, changes, missing=None):
        """Await an operation of a store unless it is to fail."""
        if self.way == "dies" and changes and self.struck:
            raise _broken()
        if changes is (self.way == "missing") and self.way != "raises":
            return await operation()
        self.count += 1
        if self.count != self.at:
            return await operation()
        if self.way == "missing":
            return missing
        if self.way == "raises late":
            await operation()
        raise _broken()


def _broken():
    return OSError(errno.EIO, os.strerror(errno.EIO))


class Faulty(WrapperStore):
    """A store with a fault; its read-only copies have the same."""

    def __init__(self, store, fault):
        super().__init__(store)
        self.fault = fault

    def with_read_only(self, read_only=False):
        return Faulty(self._store.with_read_only(read_only), self.fault)

    async def get(self, *given, **named):
        return await self.fault.do(lambda: self._store.get(*given, **named), False)

    async def get_partial_values(self, prototype, key_ranges):
        return [await self.get(key, prototype, span) for key, span in key_ranges]

    async def exists(self, key):
        return await self.fault.do(lambda: self._store.exists(key), False, missing=False)

    async def set(self, key, value):
        await self.fault.do(lambda: self._store.set(key, value), True)

    async def set_if_not_exists(self, key, value):
        await self.fault.do(lambda: self._store.set_if_not_exists(key, value), True)

    async def delete(self, key):
        await self.fault.do(lambda: self._store.delete(key), True)

    async def delete_dir(self, prefix):
        # The last first: whichever way a store does it, a part may be gone.
        for key in sorted([key async for key in self.list_prefix(f"{prefix}/")], reverse=True):
            await self.delete(key)

    async def _listed(self, listing, *given):
        async def collect():
            return [item async for item in listing(*given)]

        return await self.fault.do(collect, False, missing=[])

    async def list(self):
        for key in await self._listed(self._store.list):
            yield key

    async def list_prefix(self, prefix):
        for key in await self._listed(self._store.list_prefix, prefix):
            yield key

    async def list_dir(self, prefix):
        for key in await self._listed(self._store.list_dir, prefix):
            yield key

    async def _get_many(self, requests):
        for key, prototype, span in requests:
            yield key, await self.get(key, prototype, span)

    async def _set_many(self, values):
        for key, value in values:
            await self.set(key, value)


# Verbs

#: Days of the dates that a store is begun with.
OLD = (0, 365)


@cache
def heights(*days, seed=1000, **coords):
    """Heights of one row of two blocks, other ones on each day."""
    each = [cube((60, 70), times=1, seed=day + seed) for day in days]
    each = [
        scene.assign_coords(time=scene.time + np.timedelta64(day, "D"))
        for day, scene in zip(days, each, strict=True)
    ]
    found = xr.concat(each, "time").chunk(time=1)
    found = found.assign_coords({name: ("time", list(value)) for name, value in coords.items()})
    return found.chmv2.predict(_model(), tile=64, overlap=16, block=64)


@cache
def _model():
    with torch.random.fork_rng():  # the same weights in every process
        torch.manual_seed(0)
        return whole_tile_model()


def write(height, store, **options):
    return height.chmv2.to_zarr(store, progress=False, **options)


@dataclass(frozen=True)
class Verb:
    """A call that is made to fail.

    ``before`` makes the store that it finds. What a reader sees meanwhile is part of one of
    ``truths``. Where ``keeps``, what the store held is still there whatever happens.
    """

    before: Callable[[Store], object]
    act: Callable[[Store], object]
    truths: Callable[[], list[xr.DataArray]]
    keeps: bool = True


def _extension(day):
    def then():
        return heights(*OLD, day, wind=(1.0, 2.0, 3.0))

    return Verb(
        lambda store: write(heights(*OLD, sun=(50.0, 40.0)), store),
        lambda store: write(then(), store),
        lambda: [then()],
    )


def _damaged(store):
    """Write a store, lose a chunk and a record, and cut off metadata and another chunk."""
    write(heights(*OLD, 100), store)
    pixels, records = (
        [key for key in list_keys(store, "") if key.startswith(name)]
        for name in ("canopy_height/c/", "xchmv2/checksums/c/")
    )
    delete_object(store, pixels[0])
    delete_object(store, records[-1])
    for key in (pixels[3], "canopy_height/zarr.json"):
        write_object(store, key, read_object(store, key)[:20])


def _repair(store):
    xchmv2.verify(store, repair=True)
    write(heights(*OLD, 100), store)


VERBS = {
    "create": Verb(
        lambda store: None,
        lambda store: write(heights(*OLD, sun=(50.0, 40.0)), store),
        lambda: [heights(*OLD)],
        keeps=False,
    ),
    "extend by an earlier date": _extension(-500),
    "extend by a date between": _extension(100),
    "extend by a later date": _extension(2000),
    "resume": Verb(
        lambda store: write(
            heights(*OLD, 100), store, regions={"time": slice(0, 2), "x": slice(0, 64)}
        ),
        lambda store: write(heights(*OLD, 100), store),
        lambda: [heights(*OLD, 100)],
    ),
    "overwrite": Verb(
        lambda store: write(heights(*OLD, seed=5000), store),
        lambda store: write(heights(*OLD, 100), store, mode="w"),
        lambda: [heights(*OLD, seed=5000), heights(*OLD, 100)],
        keeps=False,
    ),
    "remove": Verb(
        lambda store: write(heights(*OLD), store),
        remove_store,
        lambda: [heights(*OLD)],
        keeps=False,
    ),
    "verify and repair": Verb(_damaged, _repair, lambda: [heights(*OLD, 100)], keeps=False),
}


# What must hold


def objects(store):
    """All objects of a store but the lock, and half-written files of its first moment."""
    keys = [key for key in list_keys(store, "") if key != lock.LOCK]
    begun = ("xchmv2/lock.", "xchmv2/zarr.")
    return {
        key: read_object(store, key)
        for key in keys
        if not (key.startswith(begun) and key.endswith(".partial"))
    }


def pixels(found):
    """The objects that hold heights."""
    return {key: data for key, data in found.items() if key.startswith("canopy_height/c/")}


def is_part(found, truth):
    """Whether every height is that of the truth on its date, or missing."""
    known = np.isin(found.time.values, truth.time.values)
    right = truth.sel(time=found.time[known])
    wrong = found[known].notnull() & (found[known].values != right.values)
    return not wrong.any() and not found[~known].notnull().any()


class Case:
    """A verb, the store that it finds, the one that it leaves, and what must hold between."""

    def __init__(self, name):
        self.verb = VERBS[name]
        self.base, self.undisturbed = MemoryStore(), MemoryStore()
        self.verb.before(self.base)
        self.verb.act(copy_store(self.base, self.undisturbed))
        self.truths = [truth.compute() for truth in self.verb.truths()]
        self._judged = set()

    def judge(self, store, what):
        """Assert that nobody sees wrong heights and that a clean call mends what a failure left."""
        found = objects(store)
        state = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
        if state in self._judged:  # the same objects are read and mended alike
            return False
        self._judged.add(state)
        self.look(store, what)
        if self.verb.keeps:
            lost = pixels(objects(self.base)).items() - found.items()
            assert not lost, f"{what}: pixels are lost"
        self.verb.act(store)
        different = {key for key, _ in objects(store).items() ^ objects(self.undisturbed).items()}
        assert not different, f"{what}: a clean call leaves other {sorted(different)}"
        return True

    def look(self, store, what):
        """Assert that neither our reader nor plain xarray sees wrong heights."""
        for reader, refusals in ((self._ours, StoreError), (self._plain, Exception)):
            try:
                found = reader(store)
            except refusals:
                if self.verb.keeps:
                    raise
                continue
            right = any(is_part(found, truth) for truth in self.truths)
            assert right, f"{what}: wrong heights through {reader.__name__}"

    def _ours(self, store):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompleteStoreWarning)
            return xchmv2.open_zarr(store).compute()

    def _plain(self, store):
        with warnings.catch_warnings():
            if not self.verb.keeps:  # of folders that are no arrays yet, or no more
                warnings.simplefilter("ignore")
            return xr.open_zarr(store, chunks=None).canopy_height.load()


case = cache(Case)


@dataclass
class Trials:
    """What came of the failures of one call: how many operations, trials, and states judged."""

    operations: int = 0
    trials: int = 0
    states: int = 0
    #: Failures that the call told with another error than a StoreError, by type.
    raw: Counter = field(default_factory=Counter)


def survive(name, way, place=MemoryStore, step=1):
    """Make every ``step``-th operation of a call fail in turn, and judge what each leaves.

    ``place`` returns an empty store.
    """
    tried, result = case(name), Trials()
    with dask.config.set(scheduler="synchronous"), warnings.catch_warnings():
        # What is hidden is found to be missing, and computed again.
        warnings.filterwarnings("ignore", ".* missing or damaged, and are computed again")
        for at in itertools.count(1, step):
            store = copy_store(tried.base, place())
            fault = Fault(way, at)
            try:
                tried.verb.act(Faulty(store, fault))
            except Exception as error:
                assert fault.struck, "the call fails by itself"
                if not isinstance(error, StoreError):
                    result.raw[type(error).__name__] += 1
            if not fault.struck:
                result.operations = fault.count
                return result
            result.trials += 1
            result.states += tried.judge(store, f"{name}: {way} at operation {at}")


# Processes that are killed


def survive_kills(name, folder, step=1):
    """As ``survive``, but kill a process at every ``step``-th change of a file, on a local disk."""
    tried, result = case(name), Trials()
    start = forks().Process
    for at in itertools.count(1, step):
        root = Path(folder, f"{at}")
        store = copy_store(tried.base, LocalStore(root))
        process = start(target=_be_killed, args=(name, root, at))
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0, "the call fails by itself"
            result.operations = at - 1  # or fewer, by less than a step
            return result
        result.trials += 1
        result.states += tried.judge(store, f"{name}: killed at change {at} of a file")
        shutil.rmtree(root, ignore_errors=True)


def _be_killed(name, root, at):
    """Make a call, but die at a change of a file."""
    left = at

    def count(event, given):
        nonlocal left
        path = str(given[0]) if given else ""
        writes = event in _CHANGES or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and (path.startswith(str(root)) or not os.path.isabs(path)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    lock._CONFIRM = 0.0
    sys.addaudithook(count)
    with dask.config.set(scheduler="synchronous"):
        VERBS[name].act(LocalStore(root))


#: Events of Python's auditing that change files.
_CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}


# The table of docs/reliability.md: python tests/store_faults.py [memory] [local] [s3] [killed]


def _tried(place, name, folder):
    """Fail at every operation of a call in every way; where that takes long, every seventh."""
    if place == "killed":
        return [survive_kills(name, folder, 7)]
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:
        make = {
            "memory": lambda: MemoryStore,
            "local": lambda: lambda: LocalStore(Path(folder, f"{next(numbers)}")),
            "s3": lambda: bucket(stack.enter_context(s3_server())),
        }[place]()
        return [survive(name, way, make, 7 if place == "s3" else 1) for way in WAYS]


def _table(*places):
    """Print how many failures were tried, and how many different states they left, in Markdown."""
    places = places or ("memory", "local", "s3", "killed")
    lock._CONFIRM = 0.0
    print("| call | operations |", " | ".join(places), "|")
    print("|---" * (2 + len(places)) + "|")
    for name in VERBS:
        with tempfile.TemporaryDirectory() as folder:
            tried = [_tried(place, name, folder) for place in places]
        cells = [f"{sum(t.trials for t in ways)} ({sum(t.states for t in ways)})" for ways in tried]
        operations = max(t.operations for t in tried[0])
        print(f"| {name} | {operations} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    _table(*sys.argv[1:])
