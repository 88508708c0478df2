"""Progress bars: widgets in a notebook that has ipywidgets, text anywhere else."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from xchmv2.inference import tiles_done

with warnings.catch_warnings():
    # A text bar does as well; a warning at the first bar would not help anyone.
    warnings.filterwarnings("ignore", "IProgress not found")
    from tqdm.auto import tqdm

#: A progress bar, with the arguments of ``tqdm``.
progress_bar = tqdm


#: How often the bar of a prediction is drawn, and how long one must take to have a bar [s].
_EVERY, _DELAY = 0.5, 1.0


@contextmanager
def show_tiles(total: int, *, show: bool | None) -> Iterator[None]:
    """Show the tiles that this process forwards or skips inside as a bar, of `total` in all.

    With `show` of None in terminals and notebooks alone.
    """
    before, over = tiles_done(), threading.Event()
    with progress_bar(
        total=total,
        disable=None if show is None else not show,
        unit="tile",
        desc="predict",
        delay=0 if show else _DELAY,
        smoothing=0,
    ) as bar:

        def draw() -> None:
            while not over.wait(_EVERY):
                bar.update(tiles_done() - before - bar.n)

        drawing = threading.Thread(target=draw, daemon=True, name="xchmv2-progress")
        if not bar.disable:
            drawing.start()
        try:
            yield
        finally:
            over.set()
            if not bar.disable:
                drawing.join()
                bar.update(tiles_done() - before - bar.n)


class Progress:
    """The progress of writing a store's `total` regions, `done` before, as a bar."""

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        self.pixels = 0
        self.regions = 0
        self._begun = time.perf_counter()
        self._bar = progress_bar(
            total=total, initial=done, disable=not show, unit="region", desc="to_zarr", smoothing=0
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Time since the start [s]."""
        return time.perf_counter() - self._begun

    def add(self, pixels: int, regions: int = 1) -> None:
        """Count regions as written, with their pixels."""
        self.pixels += pixels
        self.regions += regions
        speed = self.pixels / 1e6 / max(self.seconds, 1e-9)
        self._bar.set_postfix_str(f"{speed:.2f} Mpx/s", refresh=False)
        self._bar.update(regions)
