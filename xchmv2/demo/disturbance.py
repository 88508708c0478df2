"""Disturbances of a synthetic forest: clear-cuts, thinnings and windthrow, given or random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from xchmv2.demo.landscape import is_land
from xchmv2.demo.noise import (
    Cutout,
    Floats,
    Hashes,
    Ints,
    cells_around,
    draw,
    noise_at,
    noise_grid,
    place_hash,
    stream,
)
from xchmv2.demo.stands import BASE_YEAR, stand_traits, stands_at
from xchmv2.demo.sun import as_time, decimal_year
from xchmv2.errors import CHMv2Error

Kind = Literal["clear_cut", "thinning", "windthrow"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SEVERITY = {"clear_cut": 1.0, "thinning": 0.3, "windthrow": 0.85}

_REGROWN_YEARS = 25.0
_EDGE_LENGTH = 22.0
_RACK_SPACING, _RACK_WIDTH = 19.0, 4.0
_CELL = 150.0  # one chance per cell and epoch
_EPOCH_YEARS = 4
_FIRST_EPOCH = 2012  # earlier events are part of the ages of the stands
_RATE = 0.46
_LOTS: dict[Kind, int] = {"clear_cut": 2, "thinning": 1, "windthrow": 1}
_YOUNGEST = 28.0  # no random event in stands younger than this
_SMALLEST, _LARGEST = 2_500.0, 11_000.0  # [m2]


@dataclass(frozen=True)
class Disturbance:
    """One event that removes trees.

    Parameters
    ----------
    kind : {"clear_cut", "thinning", "windthrow"}
        Kind of event. A clear-cut has straight edges, windthrow ragged ones; a thinning takes
        the trees on skid trails and single trees between them.
    date : str or datetime64
        Day of the event.
    x, y : float
        Centre in map coordinates [m].
    area : float
        Nominal area [m2]; only its forested part is labelled.
    severity : float, optional
        Share of trees felled; by default 1 in a clear-cut, 0.3 in a thinning and 0.85 in windthrow.
    angle : float
        Direction of the long axis, counter-clockwise from east [degree].
    elongation : float
        Length over width.
    spares_regrowth : bool
        Whether the event spares areas that an earlier one opened within 25 years.

    Raises
    ------
    CHMv2Error
        If the kind is unknown, or a number is out of its range.

    Examples
    --------
    >>> Disturbance("clear_cut", "2021-02-01", x=500_200, y=5_299_800, area=8_000).severity
    1.0
    """

    kind: Kind
    date: str | np.datetime64
    x: float
    y: float
    area: float
    severity: float | None = None
    angle: float = 0.0
    elongation: float = 1.6
    spares_regrowth: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CHMv2Error(
                f"a disturbance of kind {', '.join(KINDS)}",
                repr(self.kind),
                'pass such as kind="clear_cut"',
            )
        severity = _SEVERITY[self.kind] if self.severity is None else float(self.severity)
        if not (0.0 < severity <= 1.0 and self.area > 0.0 and self.elongation > 0.0):
            raise CHMv2Error(
                "0 < severity <= 1, area > 0 m2 and elongation > 0",
                f"severity {severity}, area {self.area}, elongation {self.elongation}",
                "pass such as area=8_000, severity=1.0, elongation=1.6",
            )
        object.__setattr__(self, "severity", severity)
        object.__setattr__(self, "date", str(self.day))

    @property
    def day(self) -> np.datetime64:
        """Date to the day."""
        return as_time(self.date, "D")

    @property
    def year(self) -> float:
        """Date as a decimal year."""
        return decimal_year(self.day)

    @property
    def half_axes(self) -> tuple[float, float]:
        """Half length and half width [m]."""
        # The area of a superellipse of power 6 is 0.966 of its box, that of an ellipse pi / 4.
        share = np.pi if self.kind == "windthrow" else 4.0 * 0.966
        width = np.sqrt(self.area / (share * self.elongation))
        return float(width * self.elongation), float(width)

    @property
    def reach(self) -> float:
        """Distance [m] from the centre beyond which the event has no effect."""
        return 1.5 * float(np.hypot(*self.half_axes)) + 5.0

    def key(self, seed: int) -> int:
        """Return the key of this event's own random numbers."""
        place = (int(self.y * 8), int(self.x * 8), KINDS.index(self.kind))
        return stream(seed, "event", *place, int(self.day.astype(int)))

    def axes(self, y: Floats, x: Floats) -> tuple[Floats, Floats]:
        """Return world coordinates [m] along the long and the short axis, from the centre."""
        c, s = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        dy, dx = y + self.y, x - self.x  # world y counts southward
        return dx * c - dy * s, dx * s + dy * c

    def covers(self, y: Floats, x: Floats, edge: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
        """Return whether places lie in the footprint.

        World coordinates `y` and `x` [m] broadcast against each other; unit noise `edge` makes the
        edge ragged.
        """
        u, v = self.axes(y, x)
        a, b = self.half_axes
        if self.kind == "windthrow":
            return np.asarray(
                (u / a) ** 2 + (v / b) ** 2 < np.clip(1.0 + 0.28 * edge, 0.2, 1.9) ** 2
            )
        return np.asarray((u / a) ** 6 + (v / b) ** 6 < np.clip(1.0 + 0.05 * edge, 0.5, 1.4) ** 6)

    def covers_points(
        self, seed: int, y: Floats, x: Floats, lean: Floats | None = None
    ) -> npt.NDArray[np.bool_]:
        """Return whether points [m], moved towards the centre by `lean` [m], are inside."""
        inside = np.zeros(y.shape, bool)
        dy, dx = y + self.y, x - self.x
        near = np.flatnonzero(np.hypot(dy, dx) < self.reach)
        dy, dx = dy[near], dx[near]
        if lean is not None:
            shrink = 1.0 - np.minimum(lean[near] / np.maximum(np.hypot(dy, dx), 1e-6), 1.0)
            dy, dx = dy * shrink, dx * shrink
        edge = noise_at(self.key(seed), dy - self.y, dx + self.x, _EDGE_LENGTH)
        inside[near] = self.covers(dy - self.y, dx + self.x, edge)
        return inside

    def taken(self, h: npt.NDArray[np.uint64], y: Floats, x: Floats) -> npt.NDArray[np.bool_]:
        """Return whether trees inside the footprint fall, given hashes of tree and event."""
        fallen = draw(h, 0) < float(self.severity or 1.0)
        if self.kind != "thinning":
            return fallen
        _, v = self.axes(y, x)
        return fallen | (np.mod(v, _RACK_SPACING) < _RACK_WIDTH)


def struck_at(
    events: Sequence[Disturbance], seed: int, y: Floats, x: Floats, lean: Floats | None = None
) -> Iterator[tuple[Disturbance, npt.NDArray[np.bool_]]]:
    """Yield each event, in order of date, with the points [m] inside its footprint and not spared.

    `lean` [m]: how far a crown may reach into the footprint before its tree counts as inside.
    """
    opened = np.full(y.shape, -np.inf)
    for event in events:
        inside = event.covers_points(seed, y, x, lean)
        yield event, _strike(event, inside, opened)


def struck_in(
    events: Sequence[Disturbance], seed: int, window: Cutout
) -> Iterator[tuple[Disturbance, tuple[slice, slice], npt.NDArray[np.bool_]]]:
    """Yield each event, in order of date, that may intersect a window, with the pixels it affects.

    The event, the part of the window that it may intersect, and whether each pixel of that part
    lies in its footprint and is not spared.
    """
    opened = np.full(window.shape, -np.inf, np.float32)
    for event in events:
        part = part_around(event, window)
        if part is not None:
            box, y, x = window.slices_of(part), part.y, part.x
            edge = noise_grid(event.key(seed), y, x, _EDGE_LENGTH)
            inside = event.covers(y[:, None], x, edge)
            yield event, box, _strike(event, inside, opened[box])


def _strike(
    event: Disturbance, inside: npt.NDArray[np.bool_], opened: npt.NDArray[np.floating]
) -> npt.NDArray[np.bool_]:
    """Return where an event has an effect, and record in place where it opens the canopy."""
    if event.spares_regrowth:
        inside = inside & (event.year - opened > _REGROWN_YEARS)
    if event.kind != "thinning":
        opened[inside] = event.year
    return inside


def part_around(event: Disturbance, window: Cutout) -> Cutout | None:
    """Return the part of a window that an event may intersect, if any."""
    res = window.resolution
    row = int(np.floor((-event.y - event.reach) / res + window.dy))
    col = int(np.floor((event.x - event.reach) / res + window.dx))
    size = int(2 * event.reach / res) + 3
    top, left = max(row, window.row), max(col, window.col)
    bottom = min(row + size, window.row + window.height)
    right = min(col + size, window.col + window.width)
    if bottom <= top or right <= left:
        return None
    return Cutout(top, left, bottom - top, right - left, res, window.dy, window.dx)


@dataclass(frozen=True)
class Chronicle:
    """The history of disturbances in a world: random events of some kinds, and given events."""

    seed: int
    kinds: tuple[Kind, ...] = KINDS
    given: tuple[Disturbance, ...] = ()

    def up_to(
        self, until: np.datetime64, window: Cutout, after: np.datetime64 | None = None
    ) -> tuple[Disturbance, ...]:
        """Return the events that may intersect a window, by date, then from north to south.

        From the day after `after` (by default all, from 2012 for random events) to the day `until`.
        """
        last = (int(decimal_year(until)) - _FIRST_EPOCH) // _EPOCH_YEARS
        events = [*self.given]
        if self.kinds and last >= 0:
            events += _random_events(self.seed, window, last, self.kinds)
        day, start = until.astype("datetime64[D]"), np.datetime64("0001-01-01", "D")
        start = start if after is None else after.astype("datetime64[D]")
        near = [e for e in events if start < e.day <= day and part_around(e, window)]
        return tuple(sorted(near, key=lambda e: (e.day, -e.y, e.x)))


def _random_events(
    seed: int, window: Cutout, last: int, kinds: Sequence[Kind]
) -> list[Disturbance]:
    """Return the random events in and around a window, up to an epoch."""
    # Margin of two cells: one for events that reach in, one for earlier events that precede them.
    i, j = cells_around(window.bounds, _CELL, margin=2)
    epoch = np.repeat(np.arange(last + 1), i.size)
    i, j = np.tile(i, last + 1), np.tile(j, last + 1)
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
    """Return whether events lie where an event of an earlier epoch has been."""
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
    """Return whether the forest at points [m] is old enough for an event in a year."""
    traits = stand_traits(seed, stands_at(seed, y, x))
    old = traits.age + year - BASE_YEAR > _YOUNGEST
    return np.asarray(~traits.meadow & old & is_land(seed, y, x, 15.0))


def _random_event(h: Hashes, epoch: int, y: float, x: float, kinds: Sequence[Kind]) -> Disturbance:
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
