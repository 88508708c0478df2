"""Sinks: graphs whose last tasks write, one per date, or per band of rows where that is too large.

Each of these tasks takes one block of every layer and writes it. Tile groups that reach into
several blocks run once and stay in memory until the last of these is written; from one band of rows
to the next they are handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import get_scheduler
from dask.callbacks import Callback
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from xchmv2.errors import CHMv2Error
from xchmv2.inference import validate_versions
from xchmv2.predict.graph import GROUPS

#: Place of a block: indices of its chunks along all dims.
_Index = tuple[int, ...]
#: Writes one block of each array and returns how many pixels that were.
_Sink = Callable[[Sequence[npt.NDArray[Any]]], int]

#: Blocks of one graph at most on a cluster: about five tasks each, besides those that read.
_MOST_BLOCKS = 2048
#: In this process a graph is one row of blocks, however long: one row of border groups is then held
#: in memory. A date in one graph took three times the memory, and more with every row.
_MOST_BLOCKS_HERE = 1


def run_sinks(
    arrays: Sequence[da.Array],
    sinks: Mapping[_Index, _Sink],
    *,
    name: str,
    done: Callable[[_Index, int], None],
) -> None:
    """Compute blocks and write them, on the scheduler that dask is set to.

    Parameters
    ----------
    arrays : sequence of dask.array.Array
        Arrays of equal chunks.
    sinks : mapping
        By place, the function that writes its blocks; other places are not computed.
    name : str
        Prefix of the writing tasks' keys; no two simultaneous runs may share it.
    done : callable
        Called in this process with the place and pixels of each block once it is written.

    Raises
    ------
    Exception
        The first error of a task; the other tasks are cancelled.
    """
    graph = _sink_graph(arrays, sinks, name)
    client = _validated_client()
    most = _MOST_BLOCKS_HERE if client is None else _MOST_BLOCKS
    for batches in _batches(sinks, most):
        keys: list[list[Hashable]] = [[(name, *index) for index in batch] for batch in batches]
        held: dict[Hashable, Any] = {}
        for wanted, carried in zip(keys, _carried(graph, keys), strict=True):
            if client is None:
                held = _run_here(graph, wanted, carried, held, done)
            else:
                held = _run_on_cluster(client, graph, wanted, carried, done)


def delayed_sinks(arrays: Sequence[da.Array], sinks: Mapping[_Index, _Sink], name: str) -> Any:
    """Return a Delayed that writes all blocks and returns the number of pixels written.

    Parameters
    ----------
    arrays, sinks, name
        As for :func:`run_sinks`.
    """
    from dask.delayed import Delayed

    graph = _sink_graph(arrays, sinks, name)
    total = f"{name}-pixels"
    last = {total: (sum, [(name, *index) for index in sinks])}
    return Delayed(total, HighLevelGraph.from_collections(total, last, [_Ends(graph, name)]))


def leaves_process() -> bool:
    """Whether other processes would compute now."""
    module = getattr(get_scheduler(cls=da.Array), "__module__", "")
    return _distributed_client() is not None or module == "dask.multiprocessing"


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


@dataclass(frozen=True)
class _Ends:
    """A graph as a dask collection, for others to depend on."""

    graph: HighLevelGraph
    name: str

    def __dask_graph__(self) -> HighLevelGraph:
        return self.graph

    def __dask_layers__(self) -> tuple[str]:
        return (self.name,)


@dataclass(frozen=True, eq=False)
class _Held:
    """Task: return a value that was computed before."""

    value: Any

    def __call__(self) -> Any:
        return self.value


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
    done: Callable[[_Index, int], None],
) -> dict[Hashable, Any]:
    """Compute a batch in this process; returns the groups to hand over."""
    ends = set(keys)

    def tell(key: Any, value: Any, *_: object) -> None:
        if key in ends:
            done(key[1:], value)

    wanted = keys + carried
    ready = da.optimization.optimize(_with_held(graph, held), wanted)  # culls it too
    with Callback(posttask=tell):
        found = get_scheduler(cls=da.Array)(ready, wanted)
    return dict(zip(carried, found[len(keys) :], strict=True))


def _with_held(graph: HighLevelGraph, held: Mapping[Hashable, Any]) -> HighLevelGraph:
    """Replace tasks by the values that were computed before."""
    if not held:
        return graph
    layers = dict(graph.layers)
    for name, layer in graph.layers.items():
        if name.startswith(GROUPS):
            tasks = {key: (_Held(held[key]),) if key in held else layer[key] for key in layer}
            layers[name] = MaterializedLayer(tasks)
    return HighLevelGraph(layers, graph.dependencies)


def _run_on_cluster(
    client: Any,
    graph: HighLevelGraph,
    keys: list[Hashable],
    carried: list[Hashable],
    done: Callable[[_Index, int], None],
    attempts: int = 5,
) -> dict[Hashable, Any]:
    """Compute a batch on a cluster; returns the groups to hand over, which stay there.

    The graph is only culled: fusing its tasks would lose the workers that they may run on. Tasks
    that are lost with their worker are computed again.
    """
    from distributed import as_completed

    wanted = keys + carried
    futures = client.get(graph.cull(set(wanted)), wanted, sync=False)
    ends, shared = futures[: len(keys)], futures[len(keys) :]
    lost: list[Hashable] = []
    try:
        for future in as_completed(ends):
            if future.status == "lost" and attempts:  # its worker died with it
                lost.append(future.key)
                future.release()
                continue
            if future.status not in ("finished", "error"):
                raise CHMv2Error(
                    "the cluster to finish its work",
                    f"that a task was {future.status}",
                    "call again: what is written is kept",
                )
            done(future.key[1:], future.result())
            future.release()  # else the block would be written again if its worker died
    except BaseException:
        client.cancel(futures)
        raise
    if lost:
        _run_on_cluster(client, graph, lost, [], done, attempts - 1)
    return dict(zip(carried, shared, strict=True))
