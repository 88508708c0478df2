"""The history of a world's forests: events at random, and events that were told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from xchmv2.datasets.events import KINDS, Disturbance, Kind, touches
from xchmv2.datasets.landscape import is_land
from xchmv2.datasets.noise import Floats, Hashes, Window, draw, place_hash, stream
from xchmv2.datasets.stands import BASE_YEAR, Ints, stand_traits, stands_at
from xchmv2.datasets.sun import decimal_year

_CELL = 150.0  # one chance per cell and epoch
_EPOCH_YEARS = 4
_FIRST_EPOCH = 2012  # before it, the ages of the stands say all there is to say
_RATE = 0.46
_LOTS: dict[Kind, int] = {"clear_cut": 2, "thinning": 1, "windthrow": 1}
_YOUNGEST = 28.0  # no random event in stands younger than this
_SMALLEST, _LARGEST = 2_500.0, 11_000.0  # [m2]


@dataclass(frozen=True)
class Chronicle:
    """All that ever happens to a world's forests.

    Parameters
    ----------
    seed : int
        Seed of the world.
    kinds : tuple of str
        What happens of itself; nothing if empty.
    told : tuple of Disturbance
        What happens on top of it.
    """

    seed: int
    kinds: tuple[Kind, ...] = KINDS
    told: tuple[Disturbance, ...] = ()

    def up_to(
        self, until: np.datetime64, window: Window, after: np.datetime64 | None = None
    ) -> tuple[Disturbance, ...]:
        """Return the events that may touch a window.

        Parameters
        ----------
        until : datetime64
            Last day.
        window : Window
            Pixels.
        after : datetime64, optional
            The day before the first; by default the beginning, 2012 for random events.

        Returns
        -------
        tuple of Disturbance
            In order of date, then from north to south.
        """
        last = (int(decimal_year(until)) - _FIRST_EPOCH) // _EPOCH_YEARS
        events = [*self.told]
        if self.kinds and last >= 0:
            events += _random_events(self.seed, window, last, self.kinds)
        day, start = until.astype("datetime64[D]"), np.datetime64("0001-01-01", "D")
        start = start if after is None else after.astype("datetime64[D]")
        near = [e for e in events if start < e.day <= day and touches(e, window)]
        return tuple(sorted(near, key=lambda e: (e.day, -e.y, e.x)))


def _random_events(
    seed: int, window: Window, last: int, kinds: Sequence[Kind]
) -> list[Disturbance]:
    """Return the world's own events in and around a window, up to an epoch."""
    north, south, west, east = window.bounds
    # Two cells around: one for events that reach in, one for those that came before them there.
    i = np.arange(np.floor(north / _CELL) - 2, np.floor(south / _CELL) + 3)
    j = np.arange(np.floor(west / _CELL) - 2, np.floor(east / _CELL) + 3)
    grid = np.meshgrid(np.arange(last + 1), i, j, indexing="ij")
    epoch, i, j = (a.ravel().astype(np.int64) for a in grid)
    h = place_hash(stream(seed, "chronicle"), epoch, i, j)
    found = np.flatnonzero(draw(h, 0) < _RATE)
    h, epoch = h[found], epoch[found]
    y = (i[found] + 0.2 + 0.6 * draw(h, 1)) * _CELL
    x = (j[found] + 0.2 + 0.6 * draw(h, 2)) * _CELL
    keep = _is_grown_forest(seed, y, x, _FIRST_EPOCH + _EPOCH_YEARS * epoch.astype(np.float64))
    h, epoch, y, x = h[keep], epoch[keep], y[keep], x[keep]
    return [
        _random_event(h[k : k + 1], int(epoch[k]), float(y[k]), float(x[k]), kinds)
        for k in np.flatnonzero(~_comes_second(y, x, _area(h), epoch))
    ]


def _area(h: Hashes) -> Floats:
    """Return the nominal area [m2] of random events."""
    return np.asarray(_SMALLEST + (_LARGEST - _SMALLEST) * draw(h, 5) ** 1.5)


def _comes_second(y: Floats, x: Floats, area: Floats, epoch: Ints) -> npt.NDArray[np.bool_]:
    """Return which events lie where an event of an earlier epoch has already been."""
    second = np.zeros(y.size, bool)
    if y.size:
        radius = np.sqrt(area / np.pi)
        tree = cKDTree(np.stack([y, x], axis=-1))
        pairs = tree.query_pairs(float(np.sqrt(_LARGEST / np.pi)), output_type="ndarray")
        a, b = pairs[:, 0], pairs[:, 1]
        distance = np.hypot(y[a] - y[b], x[a] - x[b])
        second[b[(epoch[a] < epoch[b]) & (distance < radius[a])]] = True
        second[a[(epoch[b] < epoch[a]) & (distance < radius[b])]] = True
    return second


def _is_grown_forest(seed: int, y: Floats, x: Floats, year: Floats) -> npt.NDArray[np.bool_]:
    """Return where [m] a forest stands that is old enough to be cut or thrown in a year."""
    traits = stand_traits(seed, stands_at(seed, y, x))
    old = traits.age + year - BASE_YEAR > _YOUNGEST
    return np.asarray(~traits.meadow & old & is_land(seed, y, x, 15.0))


def _random_event(h: Hashes, epoch: int, y: float, x: float, kinds: Sequence[Kind]) -> Disturbance:
    """Return the event of one cell and epoch."""
    u = [float(draw(h, k)[0]) for k in range(3, 8)]
    first = np.datetime64(f"{_FIRST_EPOCH + _EPOCH_YEARS * epoch}-01-01", "D")
    lots = [kind for kind in kinds for _ in range(_LOTS[kind])]
    return Disturbance(
        kind=lots[int(u[0] * len(lots))],
        date=first + int(u[1] * 365.25 * _EPOCH_YEARS),
        x=x,
        y=-y,
        area=float(_area(h)[0]),
        angle=180.0 * u[3],
        elongation=1.1 + 1.4 * u[4],
        spares_regrowth=True,
    )
