"""What is summed up under polygons: heights, or changes with their thresholds and errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import norm

from xchmv2.errors import CHMv2Error
from xchmv2.nodata import without_nodata

#: Change from which on a pixel is lost or gained, where no significance is known [m].
THRESHOLD = 5.0
CHANGE_NAME = "height_change"


@dataclass(frozen=True, eq=False)
class Quantity:
    """Values, and what is known of them.

    Parameters
    ----------
    values : DataArray
        Heights or changes [m].
    change : bool
        Whether they are changes.
    threshold : float or None
        Change from which on a pixel is lost or gained; None: the layer ``changed`` tells.
    layers : dict of str to DataArray or float
        ``sigma``: standard deviation of the error [m]; ``changed`` and ``least``: significant
        pixels and their level of detection [m].
    length : float or None
        Correlation length that came with the values [m].
    """

    values: xr.DataArray
    change: bool
    threshold: float | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    length: float | None = None


def read_quantity(
    values: xr.DataArray | xr.Dataset,
    threshold: float | None,
    sigma: float | xr.DataArray | None,
) -> Quantity:
    """Tell heights from changes and find what comes with them.

    Parameters
    ----------
    values : DataArray or Dataset
        Heights; a change named ``height_change``; or a Dataset from ``difference``.
    threshold : float, optional
        Change that counts [m].
    sigma : float or DataArray, optional
        Standard deviation of the error of a value [m].

    Returns
    -------
    Quantity
        Lazy where the values are.

    Raises
    ------
    CHMv2Error
        If there are neither heights nor changes, or a threshold or sigma that cannot be.
    """
    _validate(threshold, sigma)
    if isinstance(values, xr.Dataset):
        if CHANGE_NAME not in values:
            return Quantity(_only_height(values), False, layers=_given(sigma))
        return _read_change(values, threshold, sigma)
    if not isinstance(values, xr.DataArray):
        raise CHMv2Error(
            "heights or changes as a DataArray or a Dataset",
            type(values).__name__,
            "open them: xchmv2.open_zarr(...)",
        )
    change = values.name == CHANGE_NAME
    values = without_nodata(values)
    if threshold is not None and not change:
        raise CHMv2Error(
            "a change, where there is a threshold of loss and gain",
            f"an array named {values.name!r}",
            f"if it is a change, say so: change.rename({CHANGE_NAME!r})",
        )
    limit = (THRESHOLD if threshold is None else float(threshold)) if change else None
    return Quantity(values, change, limit, _given(sigma))


def _validate(threshold: float | None, sigma: float | xr.DataArray | None) -> None:
    if threshold is not None and not (np.isfinite(threshold) and threshold > 0):
        raise CHMv2Error(
            "a threshold above 0 m, the size of a change that counts",
            f"{threshold}",
            "give loss and gain one positive number: threshold=5.0",
        )
    if sigma is None or (isinstance(sigma, xr.DataArray) and sigma.chunks is not None):
        return
    least = float(sigma.min()) if isinstance(sigma, xr.DataArray) else float(sigma)
    missing = isinstance(sigma, xr.DataArray) and np.isnan(least)
    if not (missing or (np.isfinite(least) and least >= 0)):
        raise CHMv2Error(
            "sigma, a standard deviation of 0 m or more",
            f"{least}",
            "give the error of one pixel: sigma=4.0",
        )


def _given(sigma: float | xr.DataArray | None) -> dict[str, Any]:
    return {} if sigma is None else {"sigma": sigma}


def _only_height(dataset: xr.Dataset) -> xr.DataArray:
    if "canopy_height" in dataset:
        return without_nodata(dataset["canopy_height"])
    raise CHMv2Error(
        f"a Dataset with {CHANGE_NAME} or canopy_height",
        f"{[str(name) for name in dataset.data_vars]}",
        "choose the variable: dataset['...']",
    )


def _read_change(
    dataset: xr.Dataset, threshold: float | None, sigma: float | xr.DataArray | None
) -> Quantity:
    change = dataset[CHANGE_NAME]
    layers = _given(sigma)
    if sigma is None and "level_of_detection" in dataset:
        confidence = _find_attr(dataset, "confidence")
        if confidence is not None:
            quantile = float(norm.ppf(0.5 + float(confidence) / 2))
            layers["sigma"] = dataset["level_of_detection"] / quantile
    length = _find_attr(dataset, "correlation_length")
    length = None if length is None or not np.isfinite(float(length)) else float(length)
    if threshold is None and {"significant", "level_of_detection"} <= set(dataset.data_vars):
        layers["changed"] = dataset["significant"].fillna(0).astype(bool)
        layers["least"] = dataset["level_of_detection"]
        return Quantity(change, True, None, layers, length)
    return Quantity(change, True, float(threshold or THRESHOLD), layers, length)


def _find_attr(dataset: xr.Dataset, name: str) -> Any:
    """Find a number in the attributes of the level of detection, the change or the Dataset."""
    holders = [dataset.get("level_of_detection"), dataset[CHANGE_NAME], dataset]
    for holder in holders:
        found = None if holder is None else holder.attrs.get(name)
        if isinstance(found, int | float | np.number):
            return found
    return None
