"""Connected components of one block, with the summaries that join them across blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_Bools = npt.NDArray[np.bool_]
_Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Connectivity = Literal[4, 8]
#: Name of the values that are 1 where a pixel is sure, and of those that patches have in common.
SURE, KIND = "sure", "kind"


@dataclass(frozen=True)
class Rule:
    """The connectivity of pixels, 4 or 8, and the area bounds of the patches to keep [m2]."""

    connectivity: Connectivity
    low: float
    high: float

    def label(self, mask: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], int]:
        """Label the patches of a mask in the order of their first pixels, row by row.

        Of numbers above 0 instead, those of equal ones, one number after the other.
        """
        structure = np.ones((3, 3), bool) if self.connectivity == 8 else None
        if mask.dtype == bool:
            labels, count = ndimage.label(mask, structure)
            return labels, int(count)
        labels, count = np.zeros(mask.shape, np.int32), 0
        for number in range(1, int(mask.max(initial=0)) + 1):
            found, more = ndimage.label(mask == number, structure)
            labels += np.where(found, found + np.int32(count), 0)
            count += int(more)
        return labels, count

    def keeps(self, area: _Floats, values: Mapping[str, Moments]) -> _Bools:
        """Return whether areas are within the bounds, and at least half of the pixels SURE.

        The last digits of a sum depend on its order; the tolerance keeps them from deciding.
        """
        kept: _Bools = (area >= self.low * (1 - 1e-9)) & (area <= self.high * (1 + 1e-9))
        return kept & (values[SURE].mean >= 0.5 - 1e-9) if SURE in values else kept


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of the values in each patch; missing values are left out.

    `squares`: sum of squared deviations from the `mean`; `low`, `high`: minimum and maximum, inf
    and -inf where no value is valid; `volume`: sum of value times cell area.
    """

    count: Integers
    mean: _Floats
    squares: _Floats
    low: _Floats
    high: _Floats
    volume: _Floats

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

    `ids`: their labels in the block; `kinds`: only patches of the same are joined; `first`: (n, 2)
    row and column in the block of their first pixels; `area` in m2; `values`: statistics of their
    values by name; `edges`: along the first and last row and the first and last column, 1 + index
    in ``ids``, or 0.
    """

    ids: Integers
    kinds: Integers
    first: Integers
    pixels: Integers
    area: _Floats
    values: Mapping[str, Moments]
    edges: tuple[Integers, Integers, Integers, Integers]


def summarise(
    mask: npt.NDArray[Any], area: _Floats, values: Mapping[str, npt.NDArray[Any]], rule: Rule
) -> Summary:
    """Summarise the patches of a block that reach its border or may be kept.

    `mask`, bool or numbers of kinds, `area` of each pixel [m2] and `values`, NaN where missing, are
    (rows, cols).
    """
    labels, count = rule.label(mask)
    inside = np.flatnonzero(labels)
    label = labels.ravel()[inside] - 1
    weight = area.ravel()[inside]
    areas = add_up(label, weight, count)
    edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    moments = {
        name: _moments(label, value.ravel()[inside], weight, count)
        for name, value in values.items()
    }
    matters = rule.keeps(areas, moments)
    for edge in edges:
        matters[edge[edge > 0] - 1] = True
    kept = np.flatnonzero(matters)
    place = np.zeros(count + 1, np.int64)
    place[kept + 1] = np.arange(1, len(kept) + 1)
    first = np.empty(count, np.intp)
    first[label[::-1]] = np.arange(len(label))[::-1]  # the last one assigned stays
    return Summary(
        ids=kept + 1,
        kinds=mask.ravel()[inside[first]][kept].astype(np.int64),
        first=np.stack(np.divmod(inside[first][kept], labels.shape[1]), axis=1),
        pixels=np.bincount(label, minlength=count)[kept],
        area=areas[kept],
        values={name: found.take(kept) for name, found in moments.items()},
        edges=(place[edges[0]], place[edges[1]], place[edges[2]], place[edges[3]]),
    )


def add_up(label: npt.NDArray[Any], value: npt.NDArray[Any], n: int) -> _Floats:
    """Sum the values of each of n labels, numbered from 0."""
    return np.bincount(label, value, minlength=n).astype(np.float64)


def _moments(label: npt.NDArray[Any], value: npt.NDArray[Any], weight: _Floats, n: int) -> Moments:
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

    def apply(self, mask: npt.NDArray[Any], rule: Rule, dtype: Any) -> npt.NDArray[Any]:
        """Assign the numbers to the patches of the block's mask; 0 outside them."""
        labels, count = rule.label(mask)
        number = np.zeros(count + 1, dtype)
        number[self.ids] = self.numbers
        found: npt.NDArray[Any] = number[labels]
        return found
