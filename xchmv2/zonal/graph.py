"""The graph of sums under polygons: one task for each group of pieces, one that joins them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from xchmv2.zonal.pieces import Group, Window
from xchmv2.zonal.sums import Part, Rules, sum_group

#: One array's chunks over a window: [chunk of the leading dim][row][column].
Chunks = Sequence[Sequence[Sequence[npt.NDArray[Any]]]]


@dataclass(frozen=True, eq=False)
class Source:
    """A dask array that windows are read from, chunk by chunk.

    Parameters
    ----------
    array : dask.array.Array
        (D, H, W) or (H, W).

    Notes
    -----
    A task names the chunks it reads. A slice of the array for each window would be fused with the
    chunk it cuts, and each window would then make that chunk anew.
    """

    array: da.Array

    def over(self, window: Window) -> tuple[list[Any], tuple[int, int]]:
        """Return the keys of the chunks over a window, and where the first of them begins."""
        top, bottom, left, right = window
        rows, first_row = _covering(self.array.chunks[-2], top, bottom)
        cols, first_col = _covering(self.array.chunks[-1], left, right)
        name = self.array.name
        heads = [(k,) for k in range(self.array.numblocks[0])] if self.array.ndim == 3 else [()]
        keys = [[[(name, *head, row, col) for col in cols] for row in rows] for head in heads]
        return keys, (first_row, first_col)


def _covering(sizes: Sequence[int], start: int, stop: int) -> tuple[range, int]:
    """Return the chunks over a span, and where the first begins."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    first = int(np.searchsorted(bounds, start, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))
    return range(first, last), int(bounds[first])


def read_window(chunks: Chunks, begin: tuple[int, int], window: Window) -> npt.NDArray[Any]:
    """Put a window together from the chunks over it.

    Parameters
    ----------
    chunks : nested sequence of ndarray
        The chunks.
    begin : (row, column)
        Where the first of them begins.
    window : tuple of int
        Pixels wanted.

    Returns
    -------
    ndarray, shape (D, h, w) or (h, w)
        The pixels.
    """
    top, bottom, left, right = window
    dates = []
    for rows in chunks:
        bands, y = [], begin[0]
        for row in rows:
            parts, x = [], begin[1]
            for chunk in row:
                ys, xs = slice(max(0, top - y), bottom - y), slice(max(0, left - x), right - x)
                parts.append(chunk[..., ys, xs])
                x += chunk.shape[-1]
            bands.append(np.concatenate(parts, axis=-1))
            y += row[0].shape[-2]
        dates.append(np.concatenate(bands, axis=-2))
    return np.concatenate(dates, axis=0) if len(dates) > 1 else dates[0]


@dataclass(frozen=True, eq=False)
class SumWindow:
    """Task: read the window of a group and sum up its pieces.

    Parameters
    ----------
    group : Group
        What to sum up.
    rules : Rules
        How.
    names : tuple of str
        Of the lazy layers.
    begins : tuple of (int, int)
        Where the first chunk of the values and of each lazy layer begins.
    known : dict of str to ndarray
        Layers in memory: numbers, or arrays cut to the window.
    """

    group: Group
    rules: Rules
    names: tuple[str, ...]
    begins: tuple[tuple[int, int], ...]
    known: Mapping[str, npt.NDArray[Any]]

    def __call__(self, chunks: Sequence[Chunks]) -> list[tuple[int, Part]]:
        """Return polygons and their sums."""
        values, *layers = (
            read_window(each, begin, self.group.window)
            for each, begin in zip(chunks, self.begins, strict=True)
        )
        named = dict(zip(self.names, layers, strict=True))
        return sum_group(self.group, self.rules, values, {**self.known, **named})


def cut_layer(layer: npt.NDArray[Any], window: Window) -> npt.NDArray[Any]:
    """Cut a window out of a layer; a number stays what it is."""
    top, bottom, left, right = window
    return layer[..., top:bottom, left:right] if layer.ndim else layer


def lazy_sums(
    values: da.Array,
    layers: Mapping[str, Any],
    groups: Sequence[Group],
    rules: Rules,
    join: Callable[..., npt.NDArray[np.float64]],
    shape: tuple[int, int, int],
    estimate: tuple[Callable[..., float], Sequence[Window]] | None,
) -> tuple[da.Array, da.Array | None]:
    """Build the graph; nothing is computed.

    Parameters
    ----------
    values : dask.array.Array, shape (D, H, W)
        Heights or changes.
    layers : mapping of str to array
        As in :func:`~xchmv2.zonal.sums.sum_group`, lazy or not.
    groups : sequence of Group
        What to read.
    rules : Rules
        What to sum up.
    join : callable
        Turns all sums into statistics of the given shape; takes the correlation length where there
        is an estimate of it.
    shape : (names, D, polygons)
        Of the result.
    estimate : (callable, windows) or None
        Turns windows of the values into a correlation length.

    Returns
    -------
    statistics : dask.array.Array
        In one chunk.
    length : dask.array.Array or None
        The estimate, without dims.
    """
    lazy = {name: layer for name, layer in layers.items() if isinstance(layer, da.Array)}
    sources = [Source(array) for array in (values, *lazy.values())]
    known = {name: layer for name, layer in layers.items() if name not in lazy}
    token = tokenize(values, layers, groups, rules, join, estimate)
    sums, joined, lengths = (f"chmv2-{word}-{token}" for word in ("sums", "zones", "length"))
    tasks: dict[Any, Any] = {}
    for index, group in enumerate(groups):
        over = [source.over(group.window) for source in sources]
        cut = {name: cut_layer(layer, group.window) for name, layer in known.items()}
        task = SumWindow(group, rules, tuple(lazy), tuple(begin for _, begin in over), cut)
        tasks[(sums, index)] = (task, [keys for keys, _ in over])
    if estimate is not None:
        tasks[(lengths,)] = _estimate(sources[0], *estimate)
    found = [(sums, index) for index in range(len(groups))]
    tasks[(joined, 0, 0, 0)] = (join, found, *([(lengths,)] if estimate else []))
    arrays = [source.array for source in sources]
    graph = HighLevelGraph.from_collections(joined, MaterializedLayer(tasks), arrays)
    chunks = tuple((size,) for size in shape)
    statistics = da.Array(graph, joined, chunks, meta=np.empty((0, 0, 0)))
    return statistics, _alias(graph, lengths, joined) if estimate else None


def _estimate(
    source: Source, estimate: Callable[..., float], windows: Sequence[Window]
) -> tuple[Any, ...]:
    over = [source.over(window) for window in windows]
    task = partial(_read_and_estimate, estimate, tuple(windows), tuple(b for _, b in over))
    return (task, [keys for keys, _ in over])


def _read_and_estimate(
    estimate: Callable[..., float],
    windows: Sequence[Window],
    begins: Sequence[tuple[int, int]],
    chunks: Sequence[Chunks],
) -> npt.NDArray[np.float64]:
    """Task: estimate the correlation length."""
    read = [
        read_window(each, begin, window)
        for each, begin, window in zip(chunks, begins, windows, strict=True)
    ]
    return np.asarray(estimate(read), np.float64)


def _alias(graph: HighLevelGraph, name: str, layer: str) -> da.Array:
    """Return the correlation length, a task among those of a layer, as an array of its own."""
    own = f"{name}-array"
    tasks = {(own,): (np.asarray, (name,))}
    layers = {**graph.layers, own: MaterializedLayer(tasks)}
    full = HighLevelGraph(layers, {**graph.dependencies, own: {layer}})
    return da.Array(full, own, (), meta=np.empty(()))
