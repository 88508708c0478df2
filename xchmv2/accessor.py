"""The ``.chmv2`` accessor: delegation only, no logic, no state.

Each method is a function of the package with the object as its first argument: its signature and
docstring are that function's own, read when the method is looked up. Nothing but xarray is imported
before that.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Generic, TypeVar, overload

import xarray as xr

T = TypeVar("T", xr.Dataset, xr.DataArray)


class Delegate:
    """A method that is a function of the package, imported when it is looked up.

    Parameters
    ----------
    function : str
        Module and name, such as ``"xchmv2.change:align"``.
    place : int, default 0
        Which of the function's parameters takes the object.
    """

    def __init__(self, function: str, place: int = 0) -> None:
        self.function = function
        self.place = place

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, accessor: None, owner: type) -> Callable[..., Any]: ...

    @overload
    def __get__(self, accessor: object, owner: type) -> Any: ...

    def __get__(self, accessor: Any, owner: type) -> Any:
        method = _make_method(self.function, self.place, f"{owner.__qualname__}.{self._name}")
        return method if accessor is None else method.__get__(accessor, owner)


@cache
def _make_method(function: str, place: int, qualname: str) -> Any:
    module, _, name = function.partition(":")
    target = getattr(import_module(module), name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args[:place], self._obj, *args[place:])
        return target(*given, **kwargs)

    signature = inspect.signature(target)
    parameters = list(signature.parameters.values())
    taken = parameters.pop(place)
    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        self_ = self_.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(parameters=[self_, *parameters])  # type: ignore[attr-defined]
    method.__doc__ = _without_parameter(target.__doc__ or "", taken.name)
    method.__name__ = qualname.rpartition(".")[2]
    method.__qualname__ = qualname
    method.__module__ = __name__
    method.__annotations__ = {k: v for k, v in target.__annotations__.items() if k != taken.name}
    return method


def _without_parameter(doc: str, name: str) -> str:
    """Leave the parameter that the object is out of a numpydoc docstring."""
    doc = inspect.cleandoc(doc)
    entry = rf"(?m)^{re.escape(name)} :.*\n(?:(?:[ ].*)?\n)*?(?=\S|\Z)"
    doc = re.sub(entry, "", doc, count=1)
    return re.sub(r"Parameters\n-+\n\s*(?=Returns\n-)", "", doc)


@xr.register_dataset_accessor("chmv2")  # type: ignore[no-untyped-call]
@xr.register_dataarray_accessor("chmv2")  # type: ignore[no-untyped-call]
class CHMv2Accessor(Generic[T]):
    """Canopy height from imagery, its change and its structure.

    Parameters
    ----------
    obj : Dataset or DataArray
        The object the accessor was reached from: imagery, heights, or a change of heights. It is
        never modified.
    """

    # From imagery to heights, and anything into a store.
    predict = Delegate("xchmv2.predict:predict")
    plan = Delegate("xchmv2.predict:plan")
    to_zarr = Delegate("xchmv2.store:to_zarr")
    # From heights of several dates to their change.
    align = Delegate("xchmv2.change:align")
    stable_bias = Delegate("xchmv2.change:stable_bias")
    difference = Delegate("xchmv2.change:difference_between")
    events = Delegate("xchmv2.change:events")
    trend = Delegate("xchmv2.change:trend")
    transition = Delegate("xchmv2.change:transition_between")
    # From a change to what was lost and gained.
    loss = Delegate("xchmv2.change:loss")
    gain = Delegate("xchmv2.change:gain")
    loss_area = Delegate("xchmv2.change:loss_area")
    correlation_length = Delegate("xchmv2.change:correlation_length")
    label_events = Delegate("xchmv2.change:label_events", place=1)
    # Structure of the canopy.
    canopy_cover = Delegate("xchmv2.structure:canopy_cover")
    gap_fraction = Delegate("xchmv2.structure:gap_fraction")
    percentile = Delegate("xchmv2.structure:percentile")
    rumple = Delegate("xchmv2.structure:rumple")
    canopy_volume = Delegate("xchmv2.structure:canopy_volume")
    gaps = Delegate("xchmv2.structure:gaps")
    forest_mask = Delegate("xchmv2.structure:forest_mask")
    # Numbers at places.
    zonal = Delegate("xchmv2.zonal:zonal")
    validate = Delegate("xchmv2.validation:validate")
    # Pictures.
    plot = Delegate("xchmv2.plotting:plot_height")
    plot_change = Delegate("xchmv2.plotting:plot_change")
    plot_series = Delegate("xchmv2.plotting:plot_series")
    plot_validation = Delegate("xchmv2.plotting:plot_validation")

    def __init__(self, obj: T) -> None:
        self._obj: T = obj

    def __repr__(self) -> str:
        return str(self._overview().text)

    def _repr_html_(self) -> str:
        return str(self._overview().html)

    def _overview(self) -> Any:
        from xchmv2.imagery import overview

        return overview(self._obj, type(self))
