"""Package versions on a cluster: tasks go by module path, so both ends must have the same code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xchmv2.errors import CHMv2Error
from xchmv2.inference.workers import list_workers, name_worker

#: Packages whose exact version must be the same everywhere: they read each other's pickles.
_SAME_VERSION = ("xchmv2", "dask", "distributed")
#: Packages that must agree to the minor version.
_SAME_MINOR = ("torch", "numpy", "xarray", "zarr", "python")
#: Those that a scheduler does without: it unpacks graphs, but stores and forwards nothing.
_OF_WORKERS = ("numpy", "xarray", "zarr")
#: All that :func:`xchmv2.warmup` compares.
PACKAGES = (*_SAME_VERSION, *_SAME_MINOR)
_MOST_NAMED = 3


def validate_versions(client: Any, packages: Sequence[str] = ("xchmv2",)) -> dict[str, str]:
    """Compare versions between client, scheduler and workers; returns the client's, by package.

    No task is sent for it. A client used in coroutines cannot be asked, and is not. A CHMv2Error
    names the packages that differ, their versions and where they were found.
    """
    if client.asynchronous:
        return {}
    found = client.get_versions(packages=[name for name in packages if name != "python"])
    ours: dict[str, str] = found["client"]["packages"]
    shared = [name for name in packages if name not in _OF_WORKERS]
    on_scheduler = _differing(found["scheduler"]["packages"], ours, shared)
    on_workers = {
        address: _differing(info["packages"], ours, packages)
        for address, info in found["workers"].items()
    }
    if on_scheduler or any(on_workers.values()):
        known = list_workers(client)
        parties = {"the scheduler": on_scheduler}
        parties |= {name_worker(known, address): text for address, text in on_workers.items()}
        raise _version_error([f"{text} on {party}" for party, text in parties.items() if text])
    return ours


def validate_own_versions(theirs: Mapping[str, str], name: str) -> None:
    """Compare the versions in this process, which is the worker called `name`, with a client's.

    A CHMv2Error names those that differ.
    """
    from distributed.versions import get_versions

    ours = get_versions([name for name in PACKAGES if name != "python"])["packages"]
    differing = _differing(ours, theirs, PACKAGES)
    if differing:
        raise _version_error([f"{differing} on worker {name!r}"])


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Iterable[str]) -> str:
    """Name the packages whose versions do not go together."""
    return ", ".join(
        f"{name} {theirs.get(name) or 'missing'} (client: {ours.get(name) or 'missing'})"
        for name in names
        if _release(name, theirs.get(name)) != _release(name, ours.get(name))
    )


def _release(name: str, version: str | None) -> str | None:
    """Cut a version to the part that must agree; torch has builds for different hardware."""
    if version is None or name in _SAME_VERSION:
        return version
    return ".".join(version.split("+")[0].split(".")[:2])


def _version_error(wrong: Sequence[str]) -> CHMv2Error:
    more = f"; and on {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
    return CHMv2Error(
        "the same versions on client, scheduler and workers",
        "; ".join(wrong[:_MOST_NAMED]) + more,
        "install the client's versions there, for example from one constraints file or container "
        "image, and start the workers again",
    )
