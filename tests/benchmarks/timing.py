"""Timing side by side: A B A B ..., then medians, and ratios pair by pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

#: Something to be timed.
Action = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """How long each action took in each round.

    Parameters
    ----------
    seconds : mapping
        Seconds per round, by action; one entry where an action was timed only once.
    failed : mapping
        Why an action could not run, by action.
    """

    seconds: Mapping[str, tuple[float, ...]]
    failed: Mapping[str, str]

    def median(self, name: str) -> float:
        """Median time of an action [s]."""
        return median(self.seconds[name])

    def shortest(self, name: str) -> float:
        """Shortest time of an action [s]."""
        return min(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """How many times as fast as ``base`` an action is: the median over rounds.

        Where one of them was timed only once, the ratio of the medians.
        """
        own, other = self.seconds[name], self.seconds[base]
        if len(own) != len(other):
            return self.median(base) / self.median(name)
        return median(b / a for a, b in zip(own, other, strict=True))

    def best_of(self, names: list[str]) -> str | None:
        """Name the action of the lowest median, None if all failed."""
        ran = [name for name in names if name in self.seconds]
        return min(ran, key=self.median, default=None)


def interleave(
    actions: Mapping[str, Action],
    runs: int,
    *,
    device: str = "cpu",
    patience: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time actions in turns, so that a busy machine hurts all alike.

    Parameters
    ----------
    actions : mapping
        What to time, by name. Each runs once before, to warm up.
    runs : int
        Rounds.
    device : str
        Torch device that is waited for before the clock is read.
    patience : float
        An action whose second call takes longer is not repeated [s].
    clock : callable
        Tells the time [s].

    Returns
    -------
    Times
        What took how long, and what could not run and why.
    """
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, action in actions.items():
        try:
            first = timed(action, device, clock)
            if first > patience:
                # It may have been compiling: only a second call tells.
                first = timed(action, device, clock)
            seconds[name] = [first] if first > patience else []
        except Exception as error:  # whatever it is, its row says it
            failed[name] = first_line(error)
    repeated = [name for name, found in seconds.items() if not found]
    for _ in range(runs):
        for name in repeated:
            seconds[name].append(timed(actions[name], device, clock))
    return Times({name: tuple(found) for name, found in seconds.items()}, failed)


def timed(action: Action, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call [s], and what it left the device to do."""
    synchronise(device)
    begun = clock()
    action()
    synchronise(device)
    return clock() - begun


def synchronise(device: str) -> None:
    """Wait for what a CUDA device still has to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def first_line(error: BaseException) -> str:
    """Give an error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
