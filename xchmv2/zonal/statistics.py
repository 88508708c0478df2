"""The statistics a polygon can have: their names, their labels, and how sums become them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xchmv2.errors import CHMv2Error
from xchmv2.zonal.correlation import effective_samples
from xchmv2.zonal.sums import Part, quantile

Floats = npt.NDArray[np.float64]

#: What is summed up by default.
HEIGHT_STATS = ("mean", "std", "min", "max", "count", "area", "valid_fraction")
#: Areas and volumes of change.
CHANGE_STATS = (
    "loss_area",
    "gain_area",
    "net_area",
    "loss_volume",
    "gain_volume",
    "net_volume",
)
#: Statistics that come with a standard error where the error of a pixel is known.
WITH_ERROR = ("mean", *CHANGE_STATS)

_HECTARE = 1e4
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d+)?|100)")
_LONG_NAMES = {
    "mean": "mean {of}",
    "median": "median {of}",
    "std": "standard deviation of {of}",
    "min": "lowest {of}",
    "max": "highest {of}",
    "count": "pixels with data, by the share that is covered",
    "area": "area with data",
    "valid_fraction": "share of the polygon that has data",
    "loss_area": "area of loss",
    "gain_area": "area of gain",
    "net_area": "area of gain minus area of loss",
    "loss_volume": "canopy volume lost where there is loss",
    "gain_volume": "canopy volume gained where there is gain",
    "net_volume": "change of canopy volume, of all pixels",
}


def percentile_of(stat: str) -> float | None:
    """Return the share that a percentile's name stands for, such as 0.95 for p95; else None."""
    if stat == "median":
        return 0.5
    found = _PERCENTILE.fullmatch(stat)
    return float(found[1]) / 100 if found else None


def resolve_stats(stats: str | Sequence[str] | None, *, change: bool) -> tuple[str, ...]:
    """Return the statistics wanted.

    Parameters
    ----------
    stats : str, sequence of str or None
        Names; None takes all but percentiles.
    change : bool
        Whether the values are changes.

    Returns
    -------
    tuple of str
        Without repetition.

    Raises
    ------
    CHMv2Error
        If one is not known, or is one of change and the values are none.
    """
    every = HEIGHT_STATS + (CHANGE_STATS if change else ())
    wanted = (
        every
        if stats is None
        else tuple(dict.fromkeys([stats] if isinstance(stats, str) else stats))
    )
    wrong = [stat for stat in wanted if stat not in every and percentile_of(stat) is None]
    if wrong and set(wrong) <= set(CHANGE_STATS):
        raise CHMv2Error(
            f"a change, to sum up {', '.join(wrong)}",
            "heights",
            "give zonal the result of difference(before, after), or a DataArray named "
            "'height_change'",
        )
    if wrong or not wanted:
        raise CHMv2Error(
            f"statistics among {', '.join(every)}, median and percentiles such as p95",
            f"{list(wrong)}",
            "correct them: stats=('mean', 'p95')",
        )
    return wanted


def label(stat: str, of: str, units: str, square: str | None) -> dict[str, str]:
    """Return the attributes of a statistic.

    Parameters
    ----------
    stat : str
        Its name, with ``_se`` for its standard error.
    of : str
        What it is a statistic of.
    units : str
        Of the values.
    square : str or None
        Unit of areas, ``"m2"``; None where it is not known.

    Returns
    -------
    dict
        ``long_name`` and, where known, ``units``.
    """
    name = stat.removesuffix("_se")
    share = percentile_of(name)
    if share is not None and name != "median":
        long_name = f"{100 * share:g}th percentile of {of}"
    else:
        long_name = _LONG_NAMES[name].format(of=of)
    if stat != name:
        long_name = f"standard error of {long_name}"
    unit: str | None = units
    if name == "count" or name == "valid_fraction":
        unit = "1"
    elif name == "area":
        unit = square
    elif name.endswith("_area"):
        unit = "ha" if square else None
    elif name.endswith("_volume"):
        unit = "m3" if square else None
    return {"long_name": long_name, **({"units": unit} if unit else {})}


def finish(
    parts: Sequence[Sequence[tuple[int, Part]]],
    length: float | None = None,
    *,
    names: Sequence[str],
    sizes: Floats,
    dates: int,
) -> Floats:
    """Task: turn sums into statistics.

    Parameters
    ----------
    parts : sequence of sequence of (int, Part)
        Polygon and sums, in order of pieces.
    length : float or None
        Correlation length of errors [m], for standard errors.
    names : sequence of str
        Statistics, with ``_se`` for standard errors.
    sizes : ndarray of float64, shape (N,)
        Size of each polygon [px].
    dates : int
        Number of dates, D.

    Returns
    -------
    ndarray of float64, shape (names, D, N)
        NaN where there is no data.
    """
    whole: dict[int, Part] = {}
    for polygon, part in (pair for group in parts for pair in group):
        whole[polygon] = whole[polygon] + part if polygon in whole else part
    found = np.full((len(names), dates, len(sizes)), np.nan)
    for polygon, part in whole.items():
        for row, name in enumerate(names):
            known = part.sums["area"] > 0
            if name == "valid_fraction":
                values = part.sums["count"] / sizes[polygon]
            else:
                values = _statistic(part, name, length)
            # A polygon on the raster without data has an area of data, and it is 0.
            kept = known | (name in ("count", "area", "valid_fraction"))
            found[row, :, polygon] = np.where(kept, values, np.nan)
    return found


def _statistic(part: Part, name: str, length: float | None) -> Any:
    share = percentile_of(name)
    if share is not None:
        return quantile(part.values, part.weights, share)
    if name.endswith("_se"):
        return _standard_error(part, name.removesuffix("_se"), float(length or 0.0))
    area = np.where(part.sums["area"] > 0, part.sums["area"], np.nan)
    if name == "net_area":
        return (part.sums["gain_area"] - part.sums["loss_area"]) / _HECTARE
    if name == "net_volume":
        return part.mean * area
    if name.endswith("_area"):
        return part.sums[name] / _HECTARE
    if name == "std":
        return np.sqrt(part.scatter / area)
    plain = {"mean": part.mean, "min": part.low, "max": part.high, **part.sums}
    return plain[name]


def _standard_error(part: Part, name: str, length: float) -> Any:
    """Return a standard error, by the effective number of independent pixels."""
    sums = part.sums
    count, area = sums["count"], np.where(sums["area"] > 0, sums["area"], np.nan)
    independent = effective_samples(area, length, count)
    if name in ("mean", "net_volume"):
        error = np.sqrt(sums["variance"] / area / independent)
        return error if name == "mean" else error * area
    sides = ("loss", "gain") if name.startswith("net") else (name.partition("_")[0],)
    # Neighbours are in doubt together: as many pixels go together as make one measurement.
    together = count / independent
    doubt = sum(sums[f"{side}_{name.partition('_')[2]}_doubt"] for side in sides) * together
    if name.endswith("area"):
        return np.sqrt(doubt) / _HECTARE
    return np.sqrt(
        doubt + sum(_height_variance(sums, side, area / count, length) for side in sides)
    )


def _height_variance(sums: dict[str, Floats], side: str, pixel: Floats, length: float) -> Floats:
    """Variance of the volume over the area called loss or gain, by the error of its heights."""
    area = sums[f"{side}_area"]
    independent = effective_samples(area, length, area / pixel)
    mean = np.divide(sums[f"{side}_variance"], area, out=np.zeros_like(area), where=area > 0)
    found: Floats = np.where(area > 0, mean * area**2 / np.nan_to_num(independent, nan=1.0), 0.0)
    return found
