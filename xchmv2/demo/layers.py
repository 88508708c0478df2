"""The layers of a synthetic scene: imagery, height, cover and disturbances, eager or lazy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.demo.disturbance import Disturbance, part_around, struck_in
from xchmv2.demo.landscape import FOREST, Plane, ground_of, site_of
from xchmv2.demo.noise import Cutout, rng_of
from xchmv2.demo.rendering import Moment, take_picture, take_picture_and_height, true_height

_BLOCK = 1024  # side of the blocks in which an eager scene is made [px]
_BANDS = ("red", "green", "blue")


@dataclass(frozen=True)
class Forest:
    """The complete definition of a scene; small, hashable and picklable.

    `shifts`: misregistration (dy, dx) of each date [px]; `events`: those between the previous date
    and each date, none for the first; `nodata_edge`: share of the scene outside the swath.
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

    @property
    def n_events(self) -> int:
        """Number of events that the scene lists."""
        return sum(map(len, self.events))

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
    """Return all layers of a scene by name, as arrays; `event_area` in m2."""
    times, (height, width) = len(scene.moments), scene.window.shape
    imagery = np.empty((4, times, height, width), np.uint8)
    canopy = np.empty((times, height, width), np.float32)
    labels = np.empty((times, height, width), np.int32)
    cover = np.empty((height, width), np.uint8)
    for top in range(0, height, _BLOCK):
        for left in range(0, width, _BLOCK):
            rows, cols = (top, min(top + _BLOCK, height)), (left, min(left + _BLOCK, width))
            at, block = (slice(*rows), slice(*cols)), scene.block(rows, cols)
            cover[at] = _cover_of(scene, block)
            for k, (moment, (dy, dx)) in enumerate(zip(scene.moments, scene.shifts, strict=True)):
                shifted = replace(block, dy=dy, dx=dx)
                picture, canopy[k, *at] = take_picture_and_height(moment, shifted)
                imagery[:, k, *at] = picture * _swath(scene, block, k)
                labels[k, *at] = _labels_of(scene, block, k)
    return {
        **dict(zip(_BANDS, imagery[:3], strict=True)),
        "valid": imagery[3].astype(bool),
        "canopy_height": canopy,
        "disturbance": labels,
        "land_cover": cover,
        "event_area": _count(labels, scene.n_events)[0, 0, 0] * scene.window.resolution**2,
    }


def _cover_of(scene: Forest, block: Cutout) -> npt.NDArray[np.uint8]:
    return ground_of(scene.seed, site_of(scene.seed, block), block).cover


def _swath(scene: Forest, block: Cutout, k: int) -> npt.NDArray[np.bool_]:
    """Return the swath of date k: the pixels west or east of a slanting line."""
    if scene.nodata_edge <= 0.0:
        return np.ones(block.shape, bool)
    rng = rng_of(scene.seed, "swath", scene.moments[k].stamp)
    lean = np.tan(np.radians(rng.uniform(4.0, 14.0))) * rng.choice((-1, 1))
    flip = rng.random() < 0.5
    v = np.arange(block.height) + block.row - scene.window.row - scene.window.height / 2
    u = np.arange(block.width) + 0.5 + block.col - scene.window.col
    from_edge = (scene.window.width - u if flip else u) - lean * v[:, None]
    return np.asarray(from_edge > scene.nodata_edge * scene.window.width)


def _labels_of(scene: Forest, block: Cutout, k: int) -> npt.NDArray[np.int32]:
    """Return the labels of the events on forest land before date k in a block."""
    labels = np.zeros(block.shape, np.int32)
    if not any(part_around(event, block) for event in scene.events[k]):
        return labels
    numbers = {e: n for n, e in enumerate((e for past in scene.events for e in past), start=1)}
    before = 1 + sum(len(past) for past in scene.events[:k])
    moment = scene.moments[k]
    history = moment.chronicle.up_to(moment.instant, block)
    for event, box, struck in struck_in(history, scene.seed, block):
        number = numbers.get(event, 0)
        if number >= before:
            labels[box][struck] = number
    return np.where(_cover_of(scene, block) == FOREST, labels, 0).astype(np.int32)


def _count(labels: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.int64]:
    """Return the number of pixels with each of the labels 1 to n, of shape (1, 1, 1, n)."""
    return np.bincount(labels.ravel(), minlength=n + 1)[None, None, None, 1:]


def lazy_layers(scene: Forest, chunks: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Return all layers of a scene by name, as dask arrays; `event_area` in m2.

    Chunks along y and x have the sizes `chunks` [px]; each is one task, with its own margin.
    """
    import dask.array as da
    from dask.base import tokenize

    token, times = tokenize(repr(scene), chunks), (1,) * len(scene.moments)

    def lazy(name: str, chunk: Any, sizes: tuple[tuple[int, ...], ...], dtype: type) -> Any:
        return da.map_blocks(
            partial(_chunk, chunk, scene),  # bound, so that dask does not search it for graphs
            name=f"synthetic-{name}-{token}",
            chunks=sizes,
            dtype=dtype,
            meta=np.empty((0,) * len(sizes), dtype),
        )

    imagery = lazy("imagery", _imagery_of, (times, (4,), *chunks), np.uint8)
    labels = lazy("disturbance", _labels_of, (times, *chunks), np.int32)
    counts = da.map_blocks(
        _count,
        labels,
        scene.n_events,
        chunks=(*((1,) * blocks for blocks in labels.numblocks), (scene.n_events,)),
        new_axis=3,
        dtype=np.int64,
        meta=np.empty((0, 0, 0, 0), np.int64),
    )
    return {
        **{band: imagery[:, k] for k, band in enumerate(_BANDS)},
        "valid": imagery[:, 3].astype(bool),
        "canopy_height": lazy("height", _height_of, (times, *chunks), np.float32),
        "disturbance": labels,
        "land_cover": lazy("cover", _cover_of, chunks, np.uint8),
        "event_area": counts.sum(axis=(0, 1, 2)) * scene.window.resolution**2,
    }


def _chunk(layer: Any, scene: Forest, block_info: Any = None) -> npt.NDArray[Any]:
    """Return one chunk of a layer; y and x are its last axes, and its date, if any, the first."""
    location = block_info[None]["array-location"]
    date = [start for start, _ in location[:-2]][:1]
    values: npt.NDArray[Any] = layer(scene, scene.block(*location[-2:]), *date)
    return values.reshape(block_info[None]["chunk-shape"])


def _imagery_of(scene: Forest, block: Cutout, k: int) -> npt.NDArray[np.uint8]:
    """Return red, green, blue and validity (4, height, width) of date k in a block."""
    dy, dx = scene.shifts[k]
    picture = take_picture(scene.moments[k], replace(block, dy=dy, dx=dx))
    return picture * _swath(scene, block, k)


def _height_of(scene: Forest, block: Cutout, k: int) -> Plane:
    """Return the true canopy height [m] of date k in a block."""
    return true_height(scene.moments[k], block)
