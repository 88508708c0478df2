"""How long tiles take: time in which any thread forwarded some, over their number."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures work that several threads do at once.

    Notes
    -----
    Time runs while at least one thread works, so that what threads do side by side counts once. A
    spell from the first to begin to the last to end is added when it is over. The first spell of
    all includes setting up the device: it counts only until there is another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self._tiles = 0
        self._first: tuple[float, int] | None = None
        self._later = (0.0, 0)

    @property
    def seconds_per_tile(self) -> float | None:
        """Time a tile took [s]; None before any was measured."""
        seconds, tiles = self._later if self._later[1] else self._first or (0.0, 0)
        return seconds / tiles if tiles else None

    @contextmanager
    def running(self, tiles: int) -> Iterator[None]:
        """Measure what is done inside; where it fails, its tiles do not count."""
        with self._lock:
            if not self._running:
                self._since, self._tiles = time.perf_counter(), 0
            self._running += 1
        done = 0
        try:
            yield
            done = tiles
        finally:
            with self._lock:
                self._running -= 1
                self._tiles += done
                if not self._running:
                    self._add(time.perf_counter() - self._since, self._tiles)

    def _add(self, seconds: float, tiles: int) -> None:
        """Add a spell that is over, unless nothing came of it."""
        if not tiles:
            return
        if self._first is None:
            self._first = (seconds, tiles)
        else:
            self._later = (self._later[0] + seconds, self._later[1] + tiles)
