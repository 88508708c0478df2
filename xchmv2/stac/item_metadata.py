"""Checked reading of an item's metadata: an error names the item and the field."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any

import numpy as np
from pystac.utils import str_to_datetime

from xchmv2.errors import ImageryError

#: Years that a time in nanoseconds can hold.
_YEARS = range(1678, 2262)
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True, eq=False)
class Metadata(Mapping[str, Any]):
    """Metadata of an item, asset or band, which were written by anyone: read by kind, or refused.

    The readers return None where the field is absent or null, and raise an ImageryError where it
    is not what it should be. A number may be written as text.

    Parameters
    ----------
    owner : str
        Whose metadata they are, for messages: "asset 'image' of item a".
    content : mapping
        The metadata.
    """

    owner: str
    content: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def error(self, key: str, expected: str, fix: str | None = None) -> ImageryError:
        """Error about one field."""
        found = f"{_SHORT.repr(self.content.get(key))} in {self.owner}"
        return ImageryError(
            f"{key} {expected}", found, fix or "correct it or remove it, or leave the item out"
        )

    def _value(self, key: str) -> Any:
        """Value of a field; tables of items have NaN where there is none."""
        value = self.content.get(key)
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, key: str) -> str | None:
        """Read a text; an empty one is none."""
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "as text")
        return value or None

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of texts."""
        value = self._value(key)
        found = () if value is None else _as_tuple(value)
        if found is None or not all(isinstance(entry, str) for entry in found):
            raise self.error(key, "as a list of texts")
        return found

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """Read a finite number within limits."""
        value = self._value(key)
        if value is None:
            return None
        number = _as_number(value)
        if number is None or not math.isfinite(number) or not low <= number <= high:
            limits = f" from {low:g} to {high:g}" if math.isfinite(high) else ""
            raise self.error(key, f"as a number{limits}")
        return number

    def nodata(self) -> float | None:
        """Read ``nodata``, which may be NaN or infinite, as a number or as text."""
        value = self.content.get("nodata")
        if value is None:
            return None
        number = _as_number(value)
        if number is None:
            raise self.error("nodata", "as a number, 'nan', 'inf' or '-inf'")
        return number

    def numbers(
        self, key: str, counts: Sequence[int], expected: str | None = None
    ) -> tuple[float, ...] | None:
        """Read a list of so many finite numbers."""
        value = self._value(key)
        if value is None:
            return None
        found = [_as_number(entry) for entry in _as_tuple(value) or ()]
        known = tuple(number for number in found if number is not None and math.isfinite(number))
        if len(known) != len(found) or len(found) not in counts:
            raise self.error(key, expected or f"as {' or '.join(map(str, counts))} numbers")
        return known

    def size(self, key: str) -> tuple[int, int] | None:
        """Read rows and columns of an image."""
        expected = "as two whole numbers, rows and columns"
        sizes = self.numbers(key, (2,), expected)
        if sizes is None:
            return None
        if not all(size.is_integer() and 0 < size < 2**31 for size in sizes):
            raise self.error(key, expected)
        return int(sizes[0]), int(sizes[1])

    def time(self, key: str) -> datetime | None:
        """Read a time as UTC without a time zone."""
        value = self._value(key)
        if value is None:
            return None
        try:
            time = str_to_datetime(value) if isinstance(value, str) else value
            known = isinstance(time, datetime) and time.year in _YEARS
        except (ValueError, OverflowError):
            known = False
        if not known:
            raise self.error(key, "as a time such as '2020-07-01T10:00:00Z', from 1678 to 2261")
        found: datetime = time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time
        return found

    def mapping(self, key: str) -> Metadata:
        """Read a mapping; an absent one is empty."""
        value = self._value(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.error(key, "as a mapping")
        return Metadata(self.owner, value)

    def entries(self, key: str, known: Sequence[Any] = ()) -> tuple[Metadata, ...]:
        """Read a list of mappings.

        An entry may be a number, the index of one of the ``known`` mappings, as in items before
        STAC 0.9; without these it is there, but says nothing.
        """
        value = self._value(key)
        entries = () if value is None else _as_tuple(value)
        found = None if entries is None else [_entry(entry, known) for entry in entries]
        if found is None or any(entry is None for entry in found):
            raise self.error(key, "as a list of mappings")
        owners = (f"band {number} of {self.owner}" for number in range(1, len(found) + 1))
        return tuple(
            Metadata(owner, entry or {}) for owner, entry in zip(owners, found, strict=True)
        )


def _as_tuple(value: Any) -> tuple[Any, ...] | None:
    several = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim)
    return tuple(value) if several else None


def _as_number(value: Any) -> float | None:
    """Take a number, or one written as text."""
    if isinstance(value, bool) or not isinstance(value, Real | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _entry(value: Any, known: Sequence[Any]) -> Mapping[str, Any] | None:
    if isinstance(value, Integral) and not isinstance(value, bool):
        entry = known[int(value)] if 0 <= int(value) < len(known) else {}
        return entry if isinstance(entry, Mapping) else {}
    if value is None:
        return {}
    return value if isinstance(value, Mapping) else None
