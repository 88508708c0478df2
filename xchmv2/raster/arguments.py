"""Arguments of a call: one check for each kind of value, so that a wrong one ends in a sentence."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
import xarray as xr

from xchmv2.errors import CHMv2Error

#: Longest text of a value in a message.
_LONGEST = 80


def is_whole(value: object, least: float = -math.inf) -> bool:
    """Return whether a value is an integer of any type but bool, and at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def show(value: object) -> str:
    """Describe a value in a message: its text if that is short, else its type and shape."""
    if isinstance(value, np.ndarray | xr.DataArray) and value.ndim:
        return f"{type(value).__name__} of shape {value.shape}"
    if isinstance(value, xr.Dataset):
        return f"a Dataset of {[str(name) for name in value.data_vars]}"
    text = str(value) if isinstance(value, np.generic) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def validate_number(
    name: str,
    value: Any,
    example: float | str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    unit: str = "",
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Check that an argument is one finite number within its bounds; a bool is no number.

    Bounds are exclusive (`above`, `below`) or inclusive (`least`, `most`); `whole` asks for an
    integer, `optional` allows None. The CHMv2Error names the argument, its bounds with their
    `unit`, and a value that works as `example`.
    """
    if value is None and optional:
        return
    bounds = _Bounds(above, least, below, most, unit)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and (is_whole(value) or not whole) and value in bounds:
        return
    none = ", or None" if optional else ""
    if whole or not number or not str(bounds):
        expected = f"{name} as a {'whole ' * whole}number{bounds}{none}"
    else:
        expected = f"{'an' if name[0] in 'aeiou' else 'a'} {name}{bounds}{none}"
    raise CHMv2Error(expected, f"{name}={show(value)}", f"for example {name}={example}")


def validate_numbers(
    name: str,
    values: Any,
    example: str,
    *,
    count: int | None = None,
    ascending: bool = False,
    **bounds: Any,
) -> tuple[float, ...]:
    """Check that an argument is a sequence of numbers, and return them.

    They must be `count`, by default one or more, each within ``**bounds`` as for
    :func:`validate_number`, and `ascending`, each above the one before it, if asked for.
    """
    listed = [] if isinstance(values, str | bytes) else list_items(values) or []
    allowed = _Bounds(**bounds)
    numbers = all(isinstance(v, Real) and not isinstance(v, bool) and v in allowed for v in listed)
    rising = not ascending or (numbers and all(low < high for low, high in pairwise(listed)))
    if not listed or not numbers or not rising or len(listed) != (count or len(listed)):
        raise CHMv2Error(
            f"{name} as {count or 'one or more'} {'ascending ' * ascending}numbers{allowed}",
            f"{name}={show(values)}",
            f"for example {name}={example}",
        )
    return tuple(map(float, listed))


def validate_choice(
    name: str,
    value: Any,
    choices: Iterable[Any],
    example: Any = None,
    *,
    error: type[CHMv2Error] = CHMv2Error,
) -> None:
    """Check that an argument is one of a few values; the first is the example if none is given."""
    known = tuple(choices)
    if not isinstance(value, Hashable) or value not in known:
        raise error(
            f"{name} as one of {', '.join(map(repr, known))}",
            f"{name}={show(value)}",
            f"for example {name}={(known[0] if example is None else example)!r}",
        )


def validate_flags(**flags: Any) -> None:
    """Check that arguments are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise CHMv2Error(
                f"{name} as True or False", f"{name}={show(value)}", f"for example {name}=True"
            )


def validate_text(name: str, value: Any, example: str) -> None:
    """Check that an optional argument is text or None."""
    if value is not None and not isinstance(value, str):
        raise CHMv2Error(
            f"{name} as text, or None", f"{name}={show(value)}", f"for example {name}={example!r}"
        )


def validate_raster(
    value: Any,
    what: str = "heights",
    fix: str = "pass the result of .chmv2.predict()",
    *,
    name: str = "height",
    error: type[CHMv2Error] = CHMv2Error,
) -> None:
    """Check that data are an xarray object, since an array has no coordinates, of known size."""
    if not isinstance(value, xr.DataArray | xr.Dataset):
        raise error(f"{what} as a DataArray or a Dataset", show(value), fix)
    variables = value.variables if isinstance(value, xr.Dataset) else {None: value}
    unknown = [n for n, v in variables.items() if any(isinstance(s, float) for s in v.shape)]
    if unknown:  # dask counts a size that it does not know as NaN
        each = f"for band in {unknown}: {name}[band].data" if unknown != [None] else f"{name}.data"
        raise error(
            f"{what} of known size", "dask chunks of unknown size", f"{each}.compute_chunk_sizes()"
        )


def list_items(value: Any) -> list[Any] | None:
    """List what a sequence, set or array of one dimension holds; one text or name is one item.

    None if the value is nothing of the kind.
    """
    if isinstance(value, str | bytes):
        return [value]
    if isinstance(value, xr.DataArray):
        value = value.values
    if isinstance(value, np.ndarray):
        return list(value.tolist()) if value.ndim == 1 else None
    return list(value) if isinstance(value, Iterable) else None


@dataclass(frozen=True)
class _Bounds:
    """Bounds of a finite number, exclusive or inclusive; its text follows the number's name."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    unit: str = ""

    def __contains__(self, value: Any) -> bool:
        low, high = self.least, self.most
        return (
            -math.inf <= value <= math.inf
            and (low is not None or value > (-math.inf if self.above is None else self.above))
            and (high is not None or value < (math.inf if self.below is None else self.below))
            and (low is None or value >= low)
            and (high is None or value <= high)
        )

    def __str__(self) -> str:
        of = f" {self.unit}" if self.unit else ""
        high = self.below if self.most is None else self.most
        if self.above is not None and high is not None:
            return f" between {self.above:g} and {high:g}{of}"
        if self.least is not None and high is not None:
            return f" from {self.least:g} to {'below ' * (self.most is None)}{high:g}{of}"
        if self.above is not None:
            return f" above {self.above:g}{of}"
        return "" if self.least is None else f" of at least {self.least:g}{of}"
