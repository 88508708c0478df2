"""What happens to a forest: clear-cuts, thinnings and windthrow, at random or as told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from xchmv2.datasets.noise import (
    Floats,
    Window,
    draw,
    noise_at,
    noise_grid,
    stream,
)
from xchmv2.datasets.sun import as_time, decimal_year
from xchmv2.errors import CHMv2Error

Kind = Literal["clear_cut", "thinning", "windthrow"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEVERITY = {"clear_cut": 1.0, "thinning": 0.3, "windthrow": 0.85}

_REGROWN_YEARS = 25.0
_EDGE_LENGTH = 22.0
_RACK_SPACING, _RACK_WIDTH = 19.0, 4.0


@dataclass(frozen=True)
class Disturbance:
    """One event that takes trees.

    Parameters
    ----------
    kind : {"clear_cut", "thinning", "windthrow"}
        What happened. A clear-cut and windthrow have straight and ragged edges; a thinning takes
        racks for machines and single trees between them.
    date : str or datetime64
        Day it happened.
    x, y : float
        Centre in map coordinates [m].
    area : float
        Nominal area [m2]; the labelled area is what of it was forest.
    severity : float, optional
        Share of trees taken; by default 1 in a clear-cut, 0.3 in a thinning and 0.85 in windthrow.
    angle : float
        Direction of the long axis, counter-clockwise from east [degree].
    elongation : float
        Length over width.
    spares_regrowth : bool
        Whether it leaves alone what a clear-cut or windthrow opened less than 25 years before.

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
                'pass e.g. Disturbance("clear_cut", ...)',
            )
        severity = SEVERITY[self.kind] if self.severity is None else float(self.severity)
        if not (0.0 < severity <= 1.0 and self.area > 0.0 and self.elongation > 0.0):
            raise CHMv2Error(
                "0 < severity <= 1, area > 0 m2 and elongation > 0",
                f"severity {severity}, area {self.area}, elongation {self.elongation}",
                "pass e.g. area=8_000, severity=1.0",
            )
        object.__setattr__(self, "severity", severity)
        object.__setattr__(self, "date", str(self.day))

    @property
    def day(self) -> np.datetime64:
        """Date as a day."""
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
        """Distance [m] from the centre beyond which nothing happens."""
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
        """Return which places lie in the footprint.

        Parameters
        ----------
        y, x : ndarray of float64
            World coordinates [m] that broadcast against each other.
        edge : ndarray of float
            Unit noise that makes the edge ragged.

        Returns
        -------
        ndarray of bool
            Inside or not.
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
        """Return which points [m], moved towards the centre by `lean` [m], are in the footprint."""
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
        """Return which trees inside the footprint fall, given a hash of tree and event."""
        fallen = draw(h, 0) < float(self.severity or 1.0)
        if self.kind != "thinning":
            return fallen
        _, v = self.axes(y, x)
        return fallen | (np.mod(v, _RACK_SPACING) < _RACK_WIDTH)


def struck_at(
    events: Sequence[Disturbance], seed: int, y: Floats, x: Floats, lean: Floats | None = None
) -> Iterator[tuple[Disturbance, npt.NDArray[np.bool_]]]:
    """Yield each event with the points it strikes.

    Parameters
    ----------
    events : sequence of Disturbance
        In order of date.
    seed : int
        Seed of the world.
    y, x : ndarray of float64, shape (n,)
        World coordinates [m].
    lean : ndarray of float64, shape (n,), optional
        How far into the footprint a crown may reach [m] before its tree counts as inside.

    Yields
    ------
    event : Disturbance
        The event.
    inside : ndarray of bool, shape (n,)
        In its footprint, and not spared.
    """
    opened = np.full(y.shape, -np.inf)
    for event in events:
        inside = event.covers_points(seed, y, x, lean)
        yield event, _strike(event, inside, opened)


def struck_in(
    events: Sequence[Disturbance], seed: int, window: Window
) -> Iterator[tuple[Disturbance, tuple[slice, slice], npt.NDArray[np.bool_]]]:
    """Yield each event that may touch a window with the pixels it strikes.

    Parameters
    ----------
    events : sequence of Disturbance
        In order of date.
    seed : int
        Seed of the world.
    window : Window
        Pixels.

    Yields
    ------
    event : Disturbance
        The event.
    box : tuple of slice
        The part of the window it may touch.
    inside : ndarray of bool
        In its footprint, and not spared; of the shape of that part.
    """
    opened = np.full(window.shape, -np.inf, np.float32)
    for event in events:
        part = _part_around(event, window)
        if part is not None:
            box, y, x = window.slices_of(part), part.y, part.x
            edge = noise_grid(event.key(seed), y, x, _EDGE_LENGTH)
            inside = event.covers(y[:, None], x, edge)
            yield event, box, _strike(event, inside, opened[box])


def _strike(
    event: Disturbance, inside: npt.NDArray[np.bool_], opened: npt.NDArray[np.floating]
) -> npt.NDArray[np.bool_]:
    """Return where an event strikes, and note in place where it opens the canopy."""
    if event.spares_regrowth:
        inside = inside & (event.year - opened > _REGROWN_YEARS)
    if event.kind != "thinning":
        opened[inside] = event.year
    return inside


def _part_around(event: Disturbance, window: Window) -> Window | None:
    """Return the part of a window that an event may touch."""
    res = window.resolution
    row = int(np.floor((-event.y - event.reach) / res + window.dy))
    col = int(np.floor((event.x - event.reach) / res + window.dx))
    size = int(2 * event.reach / res) + 3
    top, left = max(row, window.row), max(col, window.col)
    bottom = min(row + size, window.row + window.height)
    right = min(col + size, window.col + window.width)
    if bottom <= top or right <= left:
        return None
    return Window(top, left, bottom - top, right - left, res, window.dy, window.dx)


def touches(event: Disturbance, window: Window) -> bool:
    """Return whether an event may reach into a window."""
    north, south, west, east = window.bounds
    in_y = north - event.reach < -event.y < south + event.reach
    return in_y and west - event.reach < event.x < east + event.reach
