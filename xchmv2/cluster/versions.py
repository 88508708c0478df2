"""Whether client, scheduler and workers run the same software."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distributed import Client
from distributed.versions import get_versions

from xchmv2.errors import CHMv2Error
from xchmv2.inference.clients import Workers, name_worker

#: Packages whose exact version must be the same everywhere: they read each other's pickles.
_SAME_VERSION = ("xchmv2", "dask", "distributed")
#: Packages that must agree to the minor version.
_SAME_MINOR = ("torch", "numpy", "xarray", "zarr", "python")
_PACKAGES = [name for name in (*_SAME_VERSION, *_SAME_MINOR) if name != "python"]


def validate_versions(client: Client, workers: Workers) -> dict[str, str]:
    """Compare versions between client, scheduler and workers.

    Returns
    -------
    dict
        The client's versions by package.

    Raises
    ------
    CHMv2Error
        If they differ; names each party, and what it has.
    """
    found = client.get_versions(packages=_PACKAGES)
    ours: dict[str, str] = found["client"]["packages"]
    # The scheduler unpacks graphs too, but stores and forwards nothing.
    parties: list[tuple[str, Any, tuple[str, ...]]] = [
        ("the scheduler", found["scheduler"], (*_SAME_VERSION, "torch", "python"))
    ]
    for address, info in found["workers"].items():
        parties.append((name_worker(workers, address), info, _SAME_VERSION + _SAME_MINOR))
    wrong = []
    for party, info, names in parties:
        differing = _differing(info["packages"], ours, names)
        if differing:
            wrong.append(f"{differing} on {party}")
    if wrong:
        raise _version_error(wrong)
    return ours


def validate_own_versions(theirs: Mapping[str, str], name: str) -> None:
    """Compare the versions of this process, a worker of the name given, with a client's.

    Raises
    ------
    CHMv2Error
        If they differ.
    """
    differing = _differing(get_versions(_PACKAGES)["packages"], theirs, _SAME_VERSION + _SAME_MINOR)
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
    """Cut a version to what must agree; builds of torch for other hardware are the same torch."""
    if version is None or name in _SAME_VERSION:
        return version
    return ".".join(version.split("+")[0].split(".")[:2])


def _version_error(wrong: list[str]) -> CHMv2Error:
    return CHMv2Error(
        "the same versions on client, scheduler and workers",
        "; ".join(wrong),
        "install the client's versions there, for example from one constraints file or container "
        "image, and start the workers again",
    )
