"""Transactions of icechunk: forked for other processes, merged, and committed date by date."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy.typing as npt
from zarr.abc.store import Store

from xchmv2.errors import StoreError
from xchmv2.predict import leaves_process
from xchmv2.store.regions import WriteBlock
from xchmv2.store.storage import is_icechunk, is_repository, read_object

_Index = tuple[int, ...]
#: Tasks that write, by the place of their block.
Writes = Mapping[_Index, Any]


@dataclass(frozen=True, eq=False)
class _ForkedWrite:
    """Task: write a block in a fork of a session; returns its pixels and the fork to merge."""

    write: WriteBlock

    def __call__(self, blocks: Sequence[npt.NDArray[Any]]) -> tuple[int, Any]:
        store: Any = self.write.store  # each task came here with a fork of its own
        return self.write(blocks), store.session


def transactions(
    user: Any, store: Any, sinks: Writes
) -> Generator[tuple[Writes, Store, Any], None, None]:
    """Divide the work into the parts that are committed together.

    `user` is the store that a user gave, `store` the same ready for all dates, `sinks` are the
    tasks that write into it. To a repository each date is committed by itself. Yields tasks, the
    store that they write to, and the function that takes what a task returns and returns the number
    of its pixels.
    """
    if not is_repository(user):
        yield _forked(store, sinks)
        return
    session, branch = store.session, store.session.branch
    _commit(session, "dates of canopy heights")
    for _, places in groupby(sorted(sinks), key=lambda index: index[:-2]):
        part = {place: sinks[place] for place in places}
        session = user.writable_session(branch)
        try:
            yield _forked(session.store, _moved(part, session.store))
        finally:  # what is written before an error is kept too
            labels = [date.label for date in next(iter(part.values())).dates]
            _commit(session, f"canopy heights {', '.join(labels)}")


def _forked(store: Any, sinks: Writes) -> tuple[Writes, Store, Any]:
    """Give tasks that leave this process a fork of the session."""
    if not (is_icechunk(store) and leaves_process()):
        return sinks, store, int
    session = store.session
    if session.has_uncommitted_changes:
        raise StoreError(
            "an icechunk repository, or a session without changes, where other processes compute",
            "a session with changes that are not committed",
            "pass the repository, to which each date is committed: height.chmv2.to_zarr(repo)",
        )
    fork = session.fork().store
    if read_object(fork, "zarr.json") is None:  # what is in memory was not copied with it
        raise StoreError(
            "a store that all computing processes can reach",
            "an icechunk repository in this process's memory",
            "give it a path or bucket, icechunk.local_filesystem_storage('canopy.icechunk')",
        )

    def merge(result: tuple[int, Any]) -> int:
        session.merge(result[1])
        return result[0]

    moved = _moved(sinks, fork).items()
    return {place: _ForkedWrite(write) for place, write in moved}, store, merge


def _moved(sinks: Writes, store: Store) -> Writes:
    """Let tasks write into another session."""
    return {place: replace(sink, store=store) for place, sink in sinks.items()}


def _commit(session: Any, message: str) -> None:
    from icechunk import ConflictError

    if not session.has_uncommitted_changes:
        return
    try:
        session.commit(message)
    except ConflictError as error:
        raise StoreError(
            f"another process committed to the branch {session.branch!r} meanwhile",
            fix="let it finish and call again: dates that are committed are kept",
        ) from error
