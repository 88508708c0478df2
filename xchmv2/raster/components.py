"""Connected components of one block, with the summaries that join them across blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Connectivity = Literal[4, 8]


@dataclass(frozen=True)
class Rule:
    """The connectivity of pixels, 4 or 8, and the area bounds of the patches to keep [m2]."""

    connectivity: Connectivity
    low: float
    high: float

    def label(self, mask: _Bools) -> tuple[npt.NDArray[np.int32], int]:
        """Label the patches of a mask in the order of their first pixels, row by row."""
        structure = np.ones((3, 3), bool) if self.connectivity == 8 else None
        labels, count = ndimage.label(mask, structure)
        return labels, int(count)

    def keeps(self, area: Floats) -> _Bools:
        """Return whether areas are within the bounds.

        The last digits of a sum depend on its order; the tolerance keeps them from deciding.
        """
        return (area >= self.low * (1 - 1e-9)) & (area <= self.high * (1 + 1e-9))


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of the values in each patch; missing values are left out.

    `squares`: sum of squared deviations from the `mean`; `low`, `high`: minimum and maximum, inf
    and -inf where no value is valid; `volume`: sum of value times cell area.
    """

    count: Integers
    mean: Floats
    squares: Floats
    low: Floats
    high: Floats
    volume: Floats

    def take(self, kept: npt.NDArray[Any]) -> Moments:
        """Select some of the patches."""
        return Moments(*(field[kept] for field in self.fields))

    @property
    def fields(self) -> tuple[npt.NDArray[Any], ...]:
        """All statistics, in the order of the parameters."""
        return self.count, self.mean, self.squares, self.low, self.high, self.volume


@dataclass(frozen=True, eq=False)
class Summary:
    """The n patches of one block that may be kept: at its border, or within the area bounds.

    `ids`: their labels in the block; `first`: (n, 2) row and column in the block of their first
    pixels; `area` in m2; `values`: statistics of their values by name; `edges`: along the first and
    last row and the first and last column, 1 + index in ``ids``, or 0.
    """

    ids: Integers
    first: Integers
    pixels: Integers
    area: Floats
    values: Mapping[str, Moments]
    edges: tuple[Integers, Integers, Integers, Integers]


def summarise(
    mask: _Bools, area: Floats, values: Mapping[str, npt.NDArray[Any]], rule: Rule
) -> Summary:
    """Summarise the patches of a block that reach its border or are within the area bounds.

    `mask`, `area` of each pixel [m2] and `values`, NaN where missing, are (rows, cols).
    """
    labels, count = rule.label(mask)
    inside = np.flatnonzero(labels)
    label = labels.ravel()[inside] - 1
    weight = area.ravel()[inside]
    areas = add_up(label, weight, count)
    edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    matters = rule.keeps(areas)
    for edge in edges:
        matters[edge[edge > 0] - 1] = True
    kept = np.flatnonzero(matters)
    place = np.zeros(count + 1, np.int64)
    place[kept + 1] = np.arange(1, len(kept) + 1)
    # Labels run from 0 without gaps, in the order of their first pixels.
    first = np.flatnonzero(np.diff(np.maximum.accumulate(label), prepend=-1))
    return Summary(
        ids=kept + 1,
        first=np.stack(np.divmod(inside[first][kept], labels.shape[1]), axis=1),
        pixels=np.bincount(label, minlength=count)[kept],
        area=areas[kept],
        values={
            name: _moments(label, value.ravel()[inside], weight, count).take(kept)
            for name, value in values.items()
        },
        edges=(place[edges[0]], place[edges[1]], place[edges[2]], place[edges[3]]),
    )


def add_up(label: npt.NDArray[Any], value: npt.NDArray[Any], n: int) -> Floats:
    """Sum the values of each of n labels, numbered from 0."""
    return np.bincount(label, value, minlength=n).astype(np.float64)


def _moments(label: npt.NDArray[Any], value: npt.NDArray[Any], weight: Floats, n: int) -> Moments:
    there = ~np.isnan(value)
    label, value, weight = label[there], value[there].astype(np.float64), weight[there]
    count = np.bincount(label, minlength=n)
    mean = add_up(label, value, n) / np.maximum(count, 1)
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low, label, value)
    np.maximum.at(high, label, value)
    return Moments(
        count=count,
        mean=mean,
        squares=add_up(label, (value - mean[label]) ** 2, n),
        low=low,
        high=high,
        volume=add_up(label, value * weight, n),
    )


@dataclass(frozen=True, eq=False)
class PatchNumbers:
    """Labels of the patches of one block that are kept, and their numbers in the whole raster."""

    ids: Integers
    numbers: Integers

    def apply(self, mask: _Bools, rule: Rule, dtype: Any) -> npt.NDArray[Any]:
        """Assign the numbers to the patches of the block's mask; 0 outside them."""
        labels, count = rule.label(mask)
        number = np.zeros(count + 1, dtype)
        number[self.ids] = self.numbers
        found: npt.NDArray[Any] = number[labels]
        return found
