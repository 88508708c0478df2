"""How heights become bytes: names, what each keeps, and a check that nothing is cut off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr
from zarr.codecs import BloscCodec

from xchmv2.errors import StoreError

#: What ``encoding=`` takes.
EncodingName = Literal["float32", "rounded", "int16_cm", "uint8_half_m"]

#: Steps of "rounded" [1/m]: a power of two, so that the bits behind it are zeros.
_STEPS_PER_METRE = 8


@dataclass(frozen=True)
class Encoding:
    """How one variable is stored.

    Parameters
    ----------
    dtype : str
        Of the stored numbers.
    fill : number or None
        Stored number that means "no value".
    scale : float or None
        Metres that a stored 1 stands for, where the stored numbers are whole.
    step : float or None
        What values are rounded to before they are stored as floating point.
    attrs : tuple of (str, str)
        Further attributes that say how to decode.
    """

    dtype: str
    fill: float | int | None = None
    scale: float | None = None
    step: float | None = None
    attrs: tuple[tuple[str, str], ...] = ()

    def __call__(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Encode an array.

        Raises
        ------
        OverflowError
            If a value is outside what the encoding can hold; the message counts them.
        """
        if self.step is not None:
            values = np.round(values / np.float32(self.step)) * np.float32(self.step)
        if self.scale is not None:
            return self._whole(values)
        if np.issubdtype(values.dtype, np.datetime64):
            return self._days(values)
        try:
            with np.errstate(over="raise"):
                return values.astype(self.dtype, copy=False)
        except FloatingPointError:
            raise OverflowError(f"values beyond the range of {self.dtype}") from None

    @property
    def for_xarray(self) -> dict[str, Any]:
        """The same in xarray's terms, codec and fill value of the file included."""
        dtype = np.dtype(self.dtype)
        encoding: dict[str, Any] = {"dtype": self.dtype, "compressors": _codec(dtype)}
        if self.fill is not None:
            fill = dtype.type(self.fill)
            # Both: CF's attribute tells readers, zarr's own what a chunk that is not there holds.
            encoding |= {"_FillValue": fill, "fill_value": fill}
        if self.scale is not None:
            encoding["scale_factor"] = self.scale
        return encoding | dict(self.attrs)

    def _whole(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Count steps; the fill number is kept for what is missing."""
        assert self.scale is not None
        assert self.fill is not None
        limits = np.iinfo(self.dtype)
        low = limits.min + (self.fill == limits.min)
        high = limits.max - (self.fill == limits.max)
        steps = np.rint(values / np.float64(self.scale))
        missing = np.isnan(steps)
        outside = int(np.count_nonzero(~missing & ((steps < low) | (steps > high))))
        if outside:
            raise OverflowError(
                f"{outside} values outside {low * self.scale:g} to {high * self.scale:g} m, from "
                f"{np.nanmin(values):.2f} to {np.nanmax(values):.2f} m"
            )
        return np.where(missing, self.fill, steps).astype(self.dtype)

    def _days(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Days since 1970; times of the day are cut off."""
        days = values.astype("datetime64[D]").astype(np.int64)
        assert self.fill is not None
        return np.where(np.isnat(values), self.fill, days).astype(self.dtype)


_FLOATS: Mapping[EncodingName, Encoding] = {
    "float32": Encoding("float32", np.nan),
    "rounded": Encoding("float32", np.nan, step=1 / _STEPS_PER_METRE),
    "int16_cm": Encoding("int16", -(2**15), scale=0.01),
    "uint8_half_m": Encoding("uint8", 255, scale=0.5),
}
_DAYS = Encoding(
    "int32",
    -(2**31),
    attrs=(("units", "days since 1970-01-01"), ("calendar", "proleptic_gregorian")),
)


def resolve_encoding(name: str, variable: xr.DataArray) -> Encoding:
    """Choose how to store a variable.

    Parameters
    ----------
    name : {"float32", "rounded", "int16_cm", "uint8_half_m"}
        For floating-point variables.
    variable : DataArray
        Whole numbers and booleans keep their dtype, dates are stored as days.

    Raises
    ------
    StoreError
        If the name is unknown, or the dtype cannot be stored.
    """
    if name not in get_args(EncodingName):
        raise StoreError(
            f"encoding out of {get_args(EncodingName)}",
            f"encoding={name!r}",
            "for example .to_zarr(store, encoding='int16_cm')",
        )
    dtype = variable.dtype
    if np.issubdtype(dtype, np.floating):
        return _FLOATS[name]  # type: ignore[index]
    if np.issubdtype(dtype, np.datetime64):
        return _DAYS
    if np.issubdtype(dtype, np.integer) or dtype.kind == "b":
        return Encoding(dtype.name)
    raise StoreError(
        "variables of numbers, booleans or dates",
        f"{variable.name!r} of dtype {dtype}",
        f"leave it out: dataset.drop_vars({variable.name!r})",
    )


def _codec(dtype: np.dtype[Any]) -> BloscCodec:
    return BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=dtype.itemsize)
