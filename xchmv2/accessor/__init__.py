"""The ``.chmv2`` accessor: delegation only, no logic, no state.

Each method is the function of the same name, or the one that its docstring names, with the object
as the first argument. Nothing but xarray is imported before a method is called.
"""

from __future__ import annotations

import xarray as xr

from xchmv2.accessor.dates import DateMethods
from xchmv2.accessor.held import T
from xchmv2.accessor.losses import LossMethods
from xchmv2.accessor.pictures import PictureMethods
from xchmv2.accessor.places import PlaceMethods
from xchmv2.accessor.prediction import PredictionMethods
from xchmv2.accessor.structure import StructureMethods

__all__ = ["CHMv2Accessor"]


@xr.register_dataset_accessor("chmv2")  # type: ignore[no-untyped-call]
@xr.register_dataarray_accessor("chmv2")  # type: ignore[no-untyped-call]
class CHMv2Accessor(
    PredictionMethods[T],
    DateMethods[T],
    LossMethods[T],
    StructureMethods[T],
    PlaceMethods[T],
    PictureMethods[T],
):
    """Canopy height from imagery, its change and its structure.

    Parameters
    ----------
    obj : Dataset or DataArray
        The object the accessor was reached from: imagery, heights, or a change of heights.
    """
