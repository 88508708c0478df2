"""Sinks: graphs whose last tasks write, one per date, or per band of rows where that is too large.

Each of these tasks takes one block of every layer and writes it. Tile groups that reach into
several blocks run once and stay in memory until the last of these is written; from one band of rows
to the next they are handed over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import get_scheduler
from dask.callbacks import Callback
from dask.core import literal
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.system import CPU_COUNT
from dask.utils import parse_timedelta

from xchmv2.errors import CheckpointError, CHMv2Error, DeviceError, StoreError, warn
from xchmv2.inference import forwarding_workers, list_workers, stop_forwards, validate_versions
from xchmv2.predict.graph import GROUPS

#: Place of a block: indices of its chunks along all dims.
_Index = tuple[int, ...]
#: Writes one block of each array; what it returns, such as the number of pixels, is passed on.
_Sink = Callable[[Sequence[npt.NDArray[Any]]], Any]
#: Told of each block that is written, or that cannot be, and may raise to end the run.
_Done = Callable[[_Index, Any], None]
_Failed = Callable[[_Index, Exception], None]

#: Blocks of one graph at most on a cluster: about five tasks each, besides those that read.
_MOST_BLOCKS = 2048
#: In this process a graph is one row of blocks, however long: one row of border groups is then held
#: in memory. A date in one graph took three times the memory, and more with every row.
_MOST_BLOCKS_HERE = 1
#: Errors that every other block would end in too.
_OF_ALL_BLOCKS = (StoreError, CheckpointError, DeviceError)
#: Setting of dask: how long to wait for a worker when none is left, and its default.
_TIMEOUT = "xchmv2.worker-timeout", "10 minutes"
#: How long no block was written before workers are looked for, and how often [s].
_QUIET = 5.0
#: By the workers that are needed: what is said where there are none.
_NONE = ("", "no worker", "no worker that declares a GPU")
#: How often a batch of which nothing could be finished is begun anew.
_MOST_IDLE_ROUNDS = 20


def run_sinks(
    arrays: Sequence[da.Array],
    sinks: Mapping[_Index, _Sink],
    *,
    name: str,
    done: _Done,
    failed: _Failed | None = None,
) -> None:
    """Compute blocks and write them, on the scheduler that dask is set to.

    `arrays` have equal chunks. `sinks` holds by place the function that writes its blocks; other
    places are not computed. `name` is the prefix of the writing tasks' keys: no two simultaneous
    runs may share it. `done` is called in this process with the place of each written block and
    what its sink returned, `failed` with the place of each block that cannot be written and the
    error, while the others are written.

    Without ``failed`` the first error ends the run, as one of the store or the model always does;
    the other tasks are cancelled. A CHMv2Error says that a cluster gave up its work, or has had no
    worker for long.
    """
    graph = _sink_graph(arrays, sinks, name)
    client = _validated_client()
    failed = failed or _end
    most = _MOST_BLOCKS_HERE if client is None else _MOST_BLOCKS
    try:
        with _one_pool():
            for batches in _batches(sinks, most):
                keys: list[list[Hashable]] = [[(name, *i) for i in batch] for batch in batches]
                held: dict[Hashable, Any] = {}
                for wanted, carried in zip(keys, _carried(graph, keys), strict=True):
                    if client is None:
                        held = _run_here(graph, wanted, carried, held, done, failed)
                    else:
                        held = _run_on_cluster(client, graph, wanted, carried, done, failed)
    except KeyboardInterrupt:  # threads would go on to the end of their groups
        stop_forwards()
        raise


@contextmanager
def _one_pool() -> Iterator[None]:
    """Keep the processes of dask's own scheduler for all batches, as they take long to start."""
    pool = dask.config.get("pool", None)
    if pool is not None or not _is_multiprocessing():
        yield
        return
    from dask.multiprocessing import get_context

    workers = dask.config.get("num_workers", None) or CPU_COUNT
    with ProcessPoolExecutor(workers, mp_context=get_context()) as pool, dask.config.set(pool=pool):
        yield


def _end(place: _Index, error: Exception) -> None:
    raise error


def delayed_sinks(arrays: Sequence[da.Array], sinks: Mapping[_Index, _Sink], name: str) -> Any:
    """Return a Delayed that writes all blocks and returns the number of pixels written."""
    from dask.delayed import Delayed

    graph = _sink_graph(arrays, sinks, name)
    total = f"{name}-pixels"
    last = {total: (sum, [(name, *index) for index in sinks])}
    layers = {**graph.layers, total: MaterializedLayer(last)}
    return Delayed(total, HighLevelGraph(layers, {**graph.dependencies, total: {name}}))


def leaves_process() -> bool:
    """Whether other processes would compute now."""
    return _distributed_client() is not None or _is_multiprocessing()


def _is_multiprocessing() -> bool:
    return getattr(get_scheduler(cls=da.Array), "__module__", "") == "dask.multiprocessing"


def compute_keys(graph: HighLevelGraph, keys: Sequence[Hashable]) -> list[Any]:
    """Compute some keys of a graph on the scheduler that dask is set to."""
    _validated_client()
    return list(get_scheduler(cls=da.Array)(graph.cull(set(keys)), list(keys)))


def blocks_of(array: da.Array) -> Iterator[tuple[_Index, tuple[slice, ...]]]:
    """Yield the place of each block of an array and its pixels."""
    bounds = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in array.chunks]
    for index in np.ndindex(*array.numblocks):
        pairs = zip(bounds, index, strict=True)
        yield index, tuple(slice(int(b[i]), int(b[i + 1])) for b, i in pairs)


def _distributed_client() -> Any:
    """Return the distributed client that computes now; None where this process computes."""
    owner = getattr(get_scheduler(cls=da.Array), "__self__", None)
    return owner if type(owner).__module__.startswith("distributed") else None


def _validated_client() -> Any:
    """Return that client, once its cluster is known to have this version of the package."""
    client = _distributed_client()
    if client is not None:
        validate_versions(client)
    return client


def _sink_graph(
    arrays: Sequence[da.Array], sinks: Mapping[_Index, _Sink], name: str
) -> HighLevelGraph:
    tasks = {
        (name, *index): (sink, [(array.name, *index) for array in arrays])
        for index, sink in sinks.items()
    }
    return HighLevelGraph.from_collections(name, tasks, dependencies=list(arrays))


def _batches(sinks: Mapping[_Index, _Sink], most: int) -> Iterator[list[list[_Index]]]:
    """Places of each date, in bands of whole rows that one graph can take."""
    for _, date in groupby(sorted(sinks), key=lambda index: index[:-2]):
        bands: list[list[_Index]] = [[]]
        for _, row in groupby(date, key=lambda index: index[-2]):
            blocks = list(row)
            if bands[-1] and len(bands[-1]) + len(blocks) > most:
                bands.append([])
            bands[-1] += blocks
        yield bands


def _carried(
    graph: HighLevelGraph, bands: Sequence[Sequence[Hashable]]
) -> Iterator[list[Hashable]]:
    """Tile groups of each band that later bands of the same date need too."""
    if len(bands) == 1:
        yield []
        return
    needed = [_groups(graph.cull(set(keys))) for keys in bands]
    for place, own in enumerate(needed):
        yield list(own & set().union(*needed[place + 1 :]))


def _groups(graph: HighLevelGraph) -> set[Hashable]:
    return {key for name, layer in graph.layers.items() if name.startswith(GROUPS) for key in layer}


def _run_here(
    graph: HighLevelGraph,
    keys: list[Hashable],
    carried: list[Hashable],
    held: Mapping[Hashable, Any],
    done: _Done,
    failed: _Failed,
) -> dict[Hashable, Any]:
    """Compute a batch in this process; returns the groups to hand over.

    If a task fails, the blocks that are left are computed one by one, and nothing is handed over.
    """
    left, refusals = dict.fromkeys(keys), list[Exception]()

    def tell(key: Any, value: Any, *_: object) -> None:
        if key in left:
            del left[key]
            try:
                done(key[1:], value)
            except Exception as error:
                refusals.append(error)
                raise

    def concerns_all(error: Exception) -> bool:
        return bool(refusals) or isinstance(error, _OF_ALL_BLOCKS)

    def compute(wanted: list[Hashable]) -> list[Any]:
        ready = da.optimization.optimize(_with_held(graph, held), wanted)  # culls it too
        with Callback(posttask=tell):
            return list(get_scheduler(cls=da.Array)(ready, wanted))

    try:
        return dict(zip(carried, compute(keys + carried)[len(keys) :], strict=True))
    except Exception as first:
        if concerns_all(first):
            raise
        for key in list(left):
            try:
                with dask.config.set(pool=None):  # the pool is of no use if a process died
                    compute([key])
            except Exception as error:
                if concerns_all(error):
                    raise
                failed(key[1:], error)  # type: ignore[index]
        return {}


def _with_held(graph: HighLevelGraph, held: Mapping[Hashable, Any]) -> HighLevelGraph:
    """Replace tasks by the values that were computed before."""
    if not held:
        return graph
    layers = dict(graph.layers)
    for name, layer in graph.layers.items():
        if name.startswith(GROUPS):
            tasks = {key: (literal(held[key]),) if key in held else layer[key] for key in layer}
            layers[name] = MaterializedLayer(tasks)
    return HighLevelGraph(layers, graph.dependencies)


def _run_on_cluster(
    client: Any,
    graph: HighLevelGraph,
    keys: list[Hashable],
    carried: list[Hashable],
    done: _Done,
    failed: _Failed,
) -> dict[Hashable, Any]:
    """Compute a batch on a cluster; returns the groups to hand over, which stay there.

    The graph is only culled: fusing its tasks would lose the workers that they may run on. Blocks
    that are lost with their worker are computed again. Those for which several workers died are
    tried once more, one by one, when all others are written: another block may have been to blame.
    """
    wanted = keys + carried
    futures = client.get(graph.cull(set(wanted)), wanted, sync=False)
    shared = futures[len(keys) :]
    rounds = [(keys, futures[: len(keys)], False)]
    idle = 0
    try:
        while rounds:
            asked, futures, again = rounds.pop(0)
            futures = futures or client.get(graph.cull(set(asked)), asked, sync=False)
            lost, condemned = _finish(client, futures, done, failed, again=again)
            idle = 0 if len(lost) + len(condemned) < len(asked) else idle + 1
            if lost and idle > _MOST_IDLE_ROUNDS:
                raise _unfinished("that workers lost what they had computed, again and again")
            rounds = [*([(lost, [], again)] if lost else []), *rounds]
            rounds += [([key], [], True) for key in condemned]
    except BaseException:
        with suppress(Exception):  # the scheduler may be gone
            client.cancel([*futures, *shared])
        raise
    return dict(zip(carried, shared, strict=True))


def _finish(
    client: Any, futures: Sequence[Any], done: _Done, failed: _Failed, *, again: bool
) -> tuple[list[Hashable], list[Hashable]]:
    """Wait for blocks; returns those that are lost, and those for which workers died."""
    from distributed import KilledWorker

    lost, condemned = list[Hashable](), list[Hashable]()
    for future in _completed(client, futures):
        key, status = future.key, future.status
        if status == "lost":  # its worker died with it
            lost.append(key)
        elif status == "finished":
            try:
                result = future.result()
            except OSError as gone:
                raise _unanswered(gone) from gone
            done(key[1:], result)
        elif status == "error":
            error = future.exception()
            if isinstance(error, _OF_ALL_BLOCKS):
                raise error
            if isinstance(error, KilledWorker) and not again:
                condemned.append(key)
            else:
                failed(key[1:], error.with_traceback(future.traceback()))
        else:
            raise _unfinished(f"that a task was {status}")
        future.release()  # else the block would be written again if its worker died
    return lost, condemned


def _completed(client: Any, futures: Sequence[Any]) -> Iterator[Any]:
    """Yield futures as they end; if there is no worker for them for long, raise an error."""
    from distributed import as_completed

    waiting, needed = as_completed(futures), max(1, _kind_of_workers(client))
    limit = parse_timedelta(dask.config.get(*_TIMEOUT)) or math.inf
    looked, gone = time.monotonic(), math.inf
    while not waiting.is_empty():
        ended = waiting.next_batch(block=False)
        yield from ended
        now = time.monotonic()
        if ended:
            looked, gone = now, math.inf
        elif now - looked < min(_QUIET, limit):
            time.sleep(0.05)
        elif _kind_of_workers(client) >= needed:
            looked, gone = now, math.inf
        elif now - gone >= limit:
            raise _unfinished(f"{_NONE[needed]} for {limit:.0f} s")
        else:
            if gone == math.inf:
                gone = now
                warn(
                    f"there is {_NONE[needed]}; waiting {limit:.0f} s for one, or as long "
                    f"as dask.config.set({{{_TIMEOUT[0]!r}: ...}}) says"
                )
            looked = now


def _kind_of_workers(client: Any) -> int:
    """Tell whether a cluster has workers that declare a GPU, 2, or workers at all, 1, or none."""
    try:
        workers = list_workers(client)
    except Exception as error:  # of the network
        raise _unanswered(error) from error
    return 2 if forwarding_workers(workers) is not workers else min(1, len(workers))


def _unanswered(error: Exception) -> CHMv2Error:
    return _unfinished(f"that its scheduler does not answer ({error})")


def _unfinished(found: str) -> CHMv2Error:
    return CHMv2Error(
        "the cluster to finish its work",
        found,
        "see that its scheduler and workers run, and call again: what is written is kept",
    )
