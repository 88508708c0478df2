"""The ``.chmv2`` accessor: the functions of the package as methods, with no logic of its own.

Each method is a function of the package with the object as one of its arguments. Its signature and
docstring are those of the function, which is imported when the method is looked up; until then
nothing but xarray is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, update_wrapper
from importlib import import_module
from typing import Any

import xarray as xr

__all__ = ["CHMv2Accessor"]


class _Delegate:
    """A method that is a function of the package, imported when the method is looked up.

    Parameters
    ----------
    function : str
        Module and name, such as ``"xchmv2.change:align"``.
    place : int, default 0
        Which of the function's parameters takes the object.
    """

    def __init__(self, function: str, place: int = 0) -> None:
        self.function = function
        self._place = place

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, accessor: CHMv2Accessor | None, owner: type) -> Callable[..., Any]:
        method = _make_method(self.function, self._place, owner, self._name)
        bound: Callable[..., Any] = method if accessor is None else method.__get__(accessor, owner)
        return bound


@cache
def _make_method(function: str, place: int, owner: type, name: str) -> Any:
    """Make the method that calls a function with the object in its place."""
    module, _, attribute = function.partition(":")
    target = getattr(import_module(module), attribute)

    def method(self: CHMv2Accessor, /, *args: Any, **kwargs: Any) -> Any:
        if len(args) < place:  # what stands before the object is given by name
            return target(*args, **{taken: self._obj}, **kwargs)
        return target(*args[:place], self._obj, *args[place:], **kwargs)

    signature = inspect.signature(target)
    parameters = list(signature.parameters.values())
    taken = parameters.pop(place).name
    parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY))
    update_wrapper(method, target)
    method.__name__, method.__qualname__ = name, f"{owner.__qualname__}.{name}"
    method.__module__ = owner.__module__
    method.__doc__ = _without_parameter(target.__doc__ or "", taken)
    method.__annotations__ = {k: v for k, v in target.__annotations__.items() if k != taken}
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return method


def _without_parameter(doc: str, name: str) -> str:
    """Take one parameter out of a numpydoc docstring, and the heading if no other is left."""
    entry = rf"(?m)^{re.escape(name)} :.*\n(?:(?: .*)?\n)*?(?=\S|\Z)"
    doc = re.sub(entry, "", inspect.cleandoc(doc) + "\n", count=1)
    return re.sub(r"(?m)^Parameters\n-+\n\s*(?=\w.*\n-+$|\Z)", "", doc).strip()


@xr.register_dataset_accessor("chmv2")  # type: ignore[no-untyped-call]
@xr.register_dataarray_accessor("chmv2")  # type: ignore[no-untyped-call]
class CHMv2Accessor:
    """Canopy height from imagery, its change and its structure.

    Parameters
    ----------
    obj : Dataset or DataArray
        The object the accessor was reached from: imagery, heights, or a change of heights. It is
        never modified.
    """

    # From imagery to heights, and anything into a store.
    predict = _Delegate("xchmv2.predict:predict")
    plan = _Delegate("xchmv2.predict:plan")
    to_zarr = _Delegate("xchmv2.store:to_zarr")
    # From heights of several dates to their change.
    align = _Delegate("xchmv2.change:align")
    stable_bias = _Delegate("xchmv2.change:stable_bias")
    difference = _Delegate("xchmv2.change:difference_between")
    error_model = _Delegate("xchmv2.change:error_model")
    events = _Delegate("xchmv2.change:events")
    trend = _Delegate("xchmv2.change:trend")
    transition = _Delegate("xchmv2.change:transition_between")
    # From a change to what was lost and gained.
    loss = _Delegate("xchmv2.change:loss")
    gain = _Delegate("xchmv2.change:gain")
    loss_area = _Delegate("xchmv2.change:loss_area")
    correlation_length = _Delegate("xchmv2.change:correlation_length")
    label_events = _Delegate("xchmv2.change:label_events", place=1)
    # Structure of the canopy.
    canopy_cover = _Delegate("xchmv2.structure:canopy_cover")
    gap_fraction = _Delegate("xchmv2.structure:gap_fraction")
    percentile = _Delegate("xchmv2.structure:percentile")
    rumple = _Delegate("xchmv2.structure:rumple")
    canopy_volume = _Delegate("xchmv2.structure:canopy_volume")
    gaps = _Delegate("xchmv2.structure:gaps")
    forest_mask = _Delegate("xchmv2.structure:forest_mask")
    # Statistics per polygon, and comparison with a reference.
    zonal = _Delegate("xchmv2.zonal:zonal")
    validate = _Delegate("xchmv2.validation:validate")
    calibrate = _Delegate("xchmv2.training:calibrate")
    # Pictures.
    plot = _Delegate("xchmv2.plotting:plot_height")
    plot_change = _Delegate("xchmv2.plotting:plot_change")
    plot_errors = _Delegate("xchmv2.plotting:plot_errors")
    plot_series = _Delegate("xchmv2.plotting:plot_series")
    plot_validation = _Delegate("xchmv2.plotting:plot_validation")

    def __init__(self, obj: xr.Dataset | xr.DataArray) -> None:
        self._obj = obj

    def __repr__(self) -> str:
        return self._describe(html=False)

    def _repr_html_(self) -> str:
        return self._describe(html=True)

    def _describe(self, *, html: bool) -> str:
        from xchmv2.imagery import describe_object

        return describe_object(self._obj, html=html)
