"""Options that several commands share, and lists of numbers between commas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from xchmv2 import defaults

F = TypeVar("F", bound=Callable[..., Any])

_LAYERS = ("height", "bin_spread", "overlap_disagreement")
_ENCODINGS = ("float32", "rounded", "int16_cm", "uint8_half_m")


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Numbers between commas, such as ``1,2,3``.

    Parameters
    ----------
    kind : type
        int or float.
    count : int
        How many there must be.
    """

    name = "numbers"

    def __init__(self, kind: type, count: int) -> None:
        self._kind = kind
        self._count = count

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Split and check; click calls it with the default too."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if len(found) != self._count:
            what = "whole numbers" if self._kind is int else "numbers"
            self.fail(f"{value!r} is not {self._count} {what} between commas", param, ctx)
        return found


class Choices(click.ParamType):  # type: ignore[type-arg]
    """Names out of some, between commas.

    Parameters
    ----------
    known : sequence of str
        The names there are.
    """

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split and check; click calls it with the default too."""
        if isinstance(value, tuple):
            return value
        found = tuple(str(value).split(","))
        unknown = [name for name in found if name not in self._known]
        if unknown:
            self.fail(f"{unknown[0]!r} is none of {', '.join(self._known)}", param, ctx)
        return found


_PREDICTION = (
    click.option("--model", default=defaults.MODEL, help="Hub id, folder or demo."),
    click.option("--value-range", type=Numbers(float, 2), metavar="LOW,HIGH",
                 help="Values of black and white; needed for all but 8-bit imagery."),
    click.option("--erode", type=click.IntRange(min=0), default=0,
                 help="Pixels around nodata that count as nodata."),
    click.option("--tile", type=click.IntRange(min=1), default=defaults.TILE,
                 help="Side of a tile [px]."),
    click.option("--overlap", type=click.IntRange(min=0), default=defaults.OVERLAP,
                 help="Pixels that tiles share."),
    click.option("--block", type=click.IntRange(min=1),
                 help="Side of a block that is written at once [px]."),
    click.option("--layers", type=Choices(_LAYERS), default="height", metavar="NAMES",
                 help=f"Out of {', '.join(_LAYERS)}, between commas."),
    click.option("--device", default="auto", help="cpu, cuda, cuda:1, ..."),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
                 help="Arithmetic of the network."),
)  # fmt: skip
_WRITING = (
    click.option("--encoding", type=click.Choice(_ENCODINGS), show_default="float32",
                 help="How a Zarr store keeps heights."),
    click.option("--resume", is_flag=True, help="Go on with a Zarr store that is there."),
    click.option("--quiet", is_flag=True, help="No progress bar."),
)  # fmt: skip

#: Names of the options that go to ``predict`` as they are.
PREDICTION = (
    "model", "value_range", "erode", "tile", "overlap", "block", "layers", "device", "dtype",
)  # fmt: skip


def prediction_options(command: F) -> F:
    """Add the options of a prediction to a command."""
    return _add(command, _PREDICTION)


def writing_options(command: F) -> F:
    """Add the options of a Zarr store to a command."""
    return _add(command, _WRITING)


def _add(command: F, options: Sequence[Callable[[F], F]]) -> F:
    for option in reversed(options):
        command = option(command)
    return command
