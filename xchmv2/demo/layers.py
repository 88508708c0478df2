"""The layers of a synthetic scene: imagery, height, cover and disturbances, eager or lazy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.demo.colour import FOREST, ground_of
from xchmv2.demo.disturbance import Disturbance, struck_in, touches
from xchmv2.demo.landscape import Plane, site_of
from xchmv2.demo.noise import Cutout, rng_of
from xchmv2.demo.rendering import Moment, take_picture, take_picture_and_height, true_height

_BLOCK = 1024  # side of the blocks in which an eager scene is made [px]
_BANDS = ("red", "green", "blue")


@dataclass(frozen=True)
class Forest:
    """The complete definition of a scene; small, hashable and picklable.

    Parameters
    ----------
    window : Cutout
        Pixels of the scene.
    moments : tuple of Moment
        Dates of the scene.
    shifts : tuple of (dy, dx)
        Misregistration of each date [px].
    events : tuple of tuple of Disturbance
        Events between the previous date and each date; none for the first.
    nodata_edge : float
        Share of the scene outside the swath.
    """

    window: Cutout
    moments: tuple[Moment, ...]
    shifts: tuple[tuple[float, float], ...]
    events: tuple[tuple[Disturbance, ...], ...]
    nodata_edge: float

    @property
    def seed(self) -> int:
        """Seed of the world."""
        return self.moments[0].seed

    def block(self, rows: tuple[int, int], cols: tuple[int, int]) -> Cutout:
        """Return the pixels from rows[0] to rows[1] and cols[0] to cols[1]."""
        return replace(
            self.window,
            row=self.window.row + rows[0],
            col=self.window.col + cols[0],
            height=rows[1] - rows[0],
            width=cols[1] - cols[0],
        )


def eager_layers(scene: Forest) -> dict[str, npt.NDArray[Any]]:
    """Return all layers of a scene as arrays.

    Parameters
    ----------
    scene : Forest
        Scene to make.

    Returns
    -------
    dict of str to ndarray
        Layers by name; `event_area` in m2.
    """
    times, (height, width) = len(scene.moments), scene.window.shape
    imagery = np.empty((4, times, height, width), np.uint8)
    canopy = np.empty((times, height, width), np.float32)
    labels = np.empty((times, height, width), np.int32)
    cover = np.empty((height, width), np.uint8)
    for top in range(0, height, _BLOCK):
        for left in range(0, width, _BLOCK):
            rows, cols = (top, min(top + _BLOCK, height)), (left, min(left + _BLOCK, width))
            at, block = (slice(*rows), slice(*cols)), scene.block(rows, cols)
            cover[at] = _cover_block(scene, block)
            for k in range(times):
                imagery[:, k, *at], canopy[k, *at] = _both_blocks(scene, k, block)
                labels[k, *at] = _disturbance_block(scene, k, block)
    return {
        **dict(zip(_BANDS, imagery[:3], strict=True)),
        "valid": imagery[3].astype(bool),
        "canopy_height": canopy,
        "disturbance": labels,
        "land_cover": cover,
        "event_area": _count(labels, _n_events(scene)) * scene.window.resolution**2,
    }


def _cover_block(scene: Forest, block: Cutout) -> npt.NDArray[np.uint8]:
    """Return the land cover of a block."""
    return ground_of(scene.seed, site_of(scene.seed, block), block).cover


def _both_blocks(scene: Forest, k: int, block: Cutout) -> tuple[npt.NDArray[np.uint8], Plane]:
    """Return :func:`_imagery_block` and :func:`_height_block`, computed together."""
    dy, dx = scene.shifts[k]
    picture, height = take_picture_and_height(scene.moments[k], replace(block, dy=dy, dx=dx))
    return picture * _swath(scene, k, block), height


def _swath(scene: Forest, k: int, block: Cutout) -> npt.NDArray[np.bool_]:
    """Return the swath of date k: the pixels west or east of a slanting line."""
    if scene.nodata_edge <= 0.0:
        return np.ones(block.shape, bool)
    rng = rng_of(scene.seed, "swath", scene.moments[k].stamp)
    lean, flip = (
        np.tan(np.radians(rng.uniform(4.0, 14.0))) * rng.choice((-1, 1)),
        rng.random() < 0.5,
    )
    v = np.arange(block.height) + block.row - scene.window.row - scene.window.height / 2
    u = np.arange(block.width) + 0.5 + block.col - scene.window.col
    from_edge = (scene.window.width - u if flip else u) - lean * v[:, None]
    return np.asarray(from_edge > scene.nodata_edge * scene.window.width)


def _disturbance_block(scene: Forest, k: int, block: Cutout) -> npt.NDArray[np.int32]:
    """Return the labels of the events on forest land before date k in a block."""
    labels = np.zeros(block.shape, np.int32)
    if not any(touches(event, block) for event in scene.events[k]):
        return labels
    numbers = {e: n for n, e in enumerate((e for past in scene.events for e in past), start=1)}
    before = 1 + sum(len(past) for past in scene.events[:k])
    moment = scene.moments[k]
    history = moment.chronicle.up_to(moment.instant, block)
    for event, box, struck in struck_in(history, scene.seed, block):
        number = numbers.get(event, 0)
        if number >= before:
            labels[box][struck] = number
    return np.where(_cover_block(scene, block) == FOREST, labels, 0).astype(np.int32)


def _count(labels: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.int64]:
    """Return the number of pixels with each of the labels 1 to n."""
    return np.bincount(labels.ravel(), minlength=n + 1)[1:]


def _n_events(scene: Forest) -> int:
    """Return the number of events that the scene lists."""
    return sum(len(e) for e in scene.events)


def lazy_layers(scene: Forest, chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, Any]:
    """Return all layers of a scene as dask arrays.

    Parameters
    ----------
    scene : Forest
        Scene to make.
    chunks : tuple of tuple of int
        Chunk sizes along y and x [px].

    Returns
    -------
    dict of str to dask.array.Array
        Layers by name; `event_area` in m2.

    Notes
    -----
    The layers are lazy; each chunk is one task, with its own margin.
    """
    import dask.array as da
    from dask.base import tokenize

    token, times = tokenize(repr(scene), chunks), (1,) * len(scene.moments)

    def lazy(name: str, chunk: Any, sizes: tuple[tuple[int, ...], ...], dtype: type) -> Any:
        return da.map_blocks(
            partial(chunk, scene),  # bound, so that dask does not search the scene for graphs
            name=f"synthetic-{name}-{token}",
            chunks=sizes,
            dtype=dtype,
            meta=np.empty((0,) * len(sizes), dtype),
        )

    imagery = lazy("imagery", _imagery_chunk, (times, (4,), *chunks), np.uint8)
    labels = lazy("disturbance", _disturbance_chunk, (times, *chunks), np.int32)
    return {
        **{band: imagery[:, k] for k, band in enumerate(_BANDS)},
        "valid": imagery[:, 3].astype(bool),
        "canopy_height": lazy("height", _height_chunk, (times, *chunks), np.float32),
        "disturbance": labels,
        "land_cover": lazy("cover", _cover_chunk, chunks, np.uint8),
        "event_area": _lazy_areas(scene, labels),
    }


def _imagery_chunk(scene: Forest, block_info: Any = None) -> npt.NDArray[np.uint8]:
    """Return one chunk (1, 4, height, width) of the imagery."""
    return _imagery_block(scene, *_block_of(scene, block_info))[None]


def _imagery_block(scene: Forest, k: int, block: Cutout) -> npt.NDArray[np.uint8]:
    """Return red, green, blue and validity (4, height, width) of date k in a block."""
    dy, dx = scene.shifts[k]
    picture = take_picture(scene.moments[k], replace(block, dy=dy, dx=dx))
    return picture * _swath(scene, k, block)


def _block_of(scene: Forest, block_info: Any) -> tuple[int, Cutout]:
    """Return the date and the pixels of a chunk; y and x are its last two axes."""
    location = block_info[None]["array-location"]
    return int(location[0][0]), scene.block(*location[-2:])


def _disturbance_chunk(scene: Forest, block_info: Any = None) -> npt.NDArray[np.int32]:
    """Return one chunk (1, height, width) of the labels."""
    return _disturbance_block(scene, *_block_of(scene, block_info))[None]


def _height_chunk(scene: Forest, block_info: Any = None) -> Plane:
    """Return one chunk (1, height, width) of the truth."""
    return _height_block(scene, *_block_of(scene, block_info))[None]


def _height_block(scene: Forest, k: int, block: Cutout) -> Plane:
    """Return the true canopy height [m] of date k in a block."""
    return true_height(scene.moments[k], block)


def _cover_chunk(scene: Forest, block_info: Any = None) -> npt.NDArray[np.uint8]:
    """Return one chunk (height, width) of the land cover."""
    return _cover_block(scene, _block_of(scene, block_info)[1])


def _lazy_areas(scene: Forest, labels: Any) -> Any:
    """Return the area [m2] of each event, counted from lazy labels."""
    import dask.array as da

    n = _n_events(scene)
    counts = da.map_blocks(
        _count_chunk,
        labels,
        n,
        chunks=(*((1,) * blocks for blocks in labels.numblocks), (n,)),
        new_axis=3,
        dtype=np.int64,
        meta=np.empty((0, 0, 0, 0), np.int64),
    )
    return counts.sum(axis=(0, 1, 2)) * scene.window.resolution**2


def _count_chunk(labels: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.int64]:
    """Return the counts (1, 1, 1, n) of one chunk of labels."""
    return _count(labels, n)[None, None, None]
