"""Masks of canopy loss and gain, cleaned of single pixels and thin lines."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy import ndimage

from xchmv2.errors import CHMv2Error, warn
from xchmv2.raster import (
    Connectivity,
    find_grid,
    is_whole,
    keep_sure_patches,
    label_quantity,
    map_neighbourhoods,
    on_same_grid,
    read_change,
    show,
    sieve,
    validate_flags,
    validate_number,
)

#: Change as a DataArray [m], or as the Dataset of ``difference`` or ``events``.
Change = xr.DataArray | xr.Dataset

#: Smallest change that counts where no significance is known [m].
THRESHOLD = 5.0
#: Smallest patch [m2] and side of the square of the opening [px] by default.
_MIN_AREA, _OPENING = 200.0, 3
#: A drop of this many sigma between two dates or more makes a pixel sure, confirmed or not.
_SURE = 3.2
_OF_EVENTS = {"loss_date", "confirmed", "sigma"}


def loss(
    change: Change,
    *,
    threshold: float | None = None,
    confirmed: bool | None = None,
    opening: int | None = _OPENING,
    min_area: float | None = _MIN_AREA,
    mask: xr.DataArray | None = None,
    connectivity: Connectivity = 8,
) -> xr.DataArray:
    """Map where canopy was lost.

    Parameters
    ----------
    change : Dataset or DataArray
        The Dataset of :func:`difference`, whose pixels count if they lost height significantly;
        that of :func:`events`, whose pixels count if they have a loss date, by patches, see below;
        or height change [m], after minus before, such as ``after - before``, where ``threshold``
        alone decides.
    threshold : float, optional
        Least loss [m], inclusive, such as 15; its sign is ignored. Needed with a DataArray; a
        further condition with a Dataset.
    confirmed : bool, optional
        For the Dataset of :func:`events`: whether to take confirmed losses only, which is the
        default, or others too. One bad date at the end of a series looks like a loss, so losses
        that no later date confirms need a look at the imagery.
    opening : int or None, default 3
        Side of the square [px] of the morphological opening: parts that it does not fit into
        are removed, all others keep their shape. Odd; None or 1 for no opening.
    min_area : float or None, default 200
        Smallest patch [m2, true on the ground; without a CRS in the coordinates' own units].
    mask : DataArray, optional
        Boolean on the same grid, True where change is to be left out, such as water and built-up
        land: ``landcover.isin([...])``. The heights are meant for trees.
    connectivity : {8, 4}
        Whether pixels that touch only at corners belong to one patch.

    Returns
    -------
    DataArray
        ``loss``, boolean; False where change is missing. Lazy if the change is; the same for any
        chunks. For a table of its patches see :func:`label_events`.

    Raises
    ------
    CHMv2Error
        If there is no change in the Dataset, it is something other than a change, such as heights,
        ``threshold`` is missing or not above 0, ``confirmed`` is given but no Dataset of events,
        ``opening`` is not odd, ``mask`` is not boolean or on another grid, or ``min_area`` is
        negative.

    Warns
    -----
    UserWarning
        When values are read: if they look like heights, which the metadata of ``after - before``
        do not show, or if some cannot be a height change; the message says how many. If losses of
        some dates, or of all, cannot be confirmed, as there are too few dates on either side.

    Notes
    -----
    The steps are threshold and significance, ``mask``, for events the choice of patches, opening,
    ``min_area``. A patch at the raster's edge counts by its area inside.

    Of events, neighbours of equal loss date form a patch. It stays, as a whole, if at least half
    of its pixels are confirmed; with ``confirmed=False``, if at least half are confirmed or dropped
    by 3.2 sigma or more, in other words, if the median drop is 3.2 times the error of a date.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0)
    >>> lost = change.chmv2.loss(threshold=10.0, min_area=500.0)
    >>> difference = height.isel(time=-1) - height.isel(time=0)
    >>> lost = difference.chmv2.loss(threshold=10.0)
    """
    return _clean("loss", change, threshold, opening, min_area, mask, connectivity, confirmed)


def gain(
    change: Change,
    *,
    threshold: float | None = None,
    opening: int | None = _OPENING,
    min_area: float | None = _MIN_AREA,
    mask: xr.DataArray | None = None,
    connectivity: Connectivity = 8,
) -> xr.DataArray:
    """Map where canopy was gained, as :func:`loss` maps losses.

    Parameters
    ----------
    change : Dataset or DataArray
        The Dataset of :func:`difference`, or height change [m], after minus before.
    threshold : float, optional
        Least gain [m], inclusive. Needed with a DataArray.
    opening, min_area, mask, connectivity
        As in :func:`loss`.

    Returns
    -------
    DataArray
        ``gain``, boolean. Lazy if the change is; the same for any chunks.

    Raises
    ------
    CHMv2Error
        As for :func:`loss`.

    Examples
    --------
    >>> change = height.chmv2.difference("2019", "2024", sigma=4.0)
    >>> gained = change.chmv2.gain(threshold=3.0)
    """
    return _clean("gain", change, threshold, opening, min_area, mask, connectivity)


def _clean(
    kind: Literal["loss", "gain"],
    change: Change,
    threshold: float | None,
    opening: int | None,
    min_area: float | None,
    mask: xr.DataArray | None,
    connectivity: Connectivity,
    confirmed: bool | None = None,
) -> xr.DataArray:
    side = _validate_opening(opening)
    signed = read_change(change)
    least = _validate_threshold(kind, change, threshold)
    found = _candidates(kind, change, signed, least)
    if mask is not None:
        found = found & ~read_left_out(mask, found)
    if isinstance(change, xr.Dataset) and set(change.variables) >= _OF_EVENTS:
        sure = _choose_sure(change, signed, confirmed)
        found = keep_sure_patches(found, change["loss_date"], sure, connectivity=connectivity)
    elif confirmed is not None:
        raise CHMv2Error(
            "confirmed= chooses among the losses of a series",
            fix="leave it out, or pass what events() returns",
        )
    found = sieve(_open(found, side), connectivity=connectivity, min_area=min_area)
    attrs: dict[str, Any] = {"long_name": f"{kind} of canopy height"}
    attrs |= {"threshold": abs(threshold)} if threshold is not None else {}
    attrs |= {"opening": side, "min_area": 0.0 if min_area is None else float(min_area)}
    attrs |= {name: change.attrs[name] for name in ("before", "after") if name in change.attrs}
    return label_quantity(found, kind, attrs)


def _candidates(kind: str, change: Change, signed: xr.DataArray, threshold: float) -> xr.DataArray:
    """Return the pixels that lost or gained enough height; False where it is missing."""
    found = abs(signed) >= threshold
    if isinstance(change, xr.Dataset) and "height_change" not in change:
        if kind == "gain":
            raise CHMv2Error(
                "the events of a series are losses, never gains",
                fix="pass what difference() returns",
            )
        return (found & change["loss_date"].notnull()).drop_vars("sigma", errors="ignore")
    found = found & (signed < 0 if kind == "loss" else signed > 0)
    return found & change.get("significant", True) if isinstance(change, xr.Dataset) else found


def _choose_sure(events: xr.Dataset, signed: xr.DataArray, confirmed: bool | None) -> xr.DataArray:
    """Return the pixels that speak for their patch of a series."""
    validate_flags(confirmed=True if confirmed is None else confirmed)
    if confirmed is False:
        return events["confirmed"] | (-signed >= _SURE * events["sigma"])
    _warn_of_dates(events.attrs.get("confirmable"), asked=confirmed is not None)
    return events["confirmed"]


def _warn_of_dates(confirmable: str | None, *, asked: bool) -> None:
    """Say which losses cannot be confirmed; those at the ends of the series unless asked for."""
    if confirmable == "none":
        warn(
            "no loss can be confirmed, which takes three dates before it and three from it on; "
            "pass confirmed=False to take the losses of a shorter series"
        )
    elif confirmable and not asked:
        first, last = (moment[:10] for moment in confirmable.split("/"))
        warn(
            f"losses first seen before {first} or after {last} cannot be confirmed, which takes "
            "three dates on either side, and are left out; pass confirmed=False to take them too, "
            "or confirmed=True to leave them out without this warning"
        )


def _validate_threshold(kind: str, change: Change, threshold: float | None) -> float:
    if threshold is None:
        if isinstance(change, xr.DataArray) or not {"significant", "loss_date"} & set(change):
            raise CHMv2Error(
                "the change has neither significance nor loss dates, so a threshold must be given",
                fix=f"pass {kind}(change, threshold=15), or what difference() returns",
            )
        return 0.0
    signed = kind == "loss" and isinstance(threshold, Real) and not isinstance(threshold, bool)
    size = abs(threshold) if signed else threshold
    validate_number("threshold", size, 15, above=0, unit="m")
    return size


def _validate_opening(opening: int | None) -> int:
    side = 1 if opening is None else opening
    if not is_whole(side, 1) or side % 2 == 0:
        raise CHMv2Error(
            "an odd side of the opening [px]", f"opening={show(opening)}", "pass opening=3, or None"
        )
    return int(side)


def read_left_out(mask: xr.DataArray, like: xr.DataArray) -> xr.DataArray:
    """Check a mask of excluded pixels, and bring it onto the coordinates of a change."""
    if not isinstance(mask, xr.DataArray) or mask.dtype != bool:
        kind = f"{mask.dtype} values" if isinstance(mask, xr.DataArray) else type(mask).__name__
        raise CHMv2Error(
            "a boolean DataArray as mask, True where change is to be left out",
            kind,
            "choose the classes: mask=landcover.isin([...])",
        )
    kept = on_same_grid(mask, like).reset_coords(drop=True)
    return kept.chunk() if like.chunks is not None and kept.chunks is None else kept


def _open(mask: xr.DataArray, side: int) -> xr.DataArray:
    """Open each plane of a mask with a square, across the borders of chunks."""
    if side == 1:
        return mask
    ordered = mask.transpose(..., *find_grid(mask).dims)
    square = np.ones((1,) * (mask.ndim - 2) + (side, side), bool)
    operation = partial(ndimage.binary_opening, structure=square)
    data = (
        operation(ordered.values)
        if ordered.chunks is None
        else map_neighbourhoods(operation, ordered.data, side - 1)  # an erosion and a dilation
    )
    return ordered.copy(data=data).transpose(*mask.dims)
