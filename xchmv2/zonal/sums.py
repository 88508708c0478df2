"""Sums over the pixels under a polygon, that add up over pieces of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from xchmv2.zonal.coverage import cover
from xchmv2.zonal.pieces import Group, Piece

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rules:
    """What is summed up.

    Parameters
    ----------
    percentiles : bool
        Whether values are kept for percentiles.
    change : bool
        Whether values are changes, with loss and gain.
    threshold : float or None
        Change [m] from which on a pixel is lost or gained; None: a mask tells.
    """

    percentiles: bool = False
    change: bool = False
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Sums over what a polygon covers, one number for each date (D,).

    Parameters
    ----------
    sums : dict of str to ndarray
        Sums of weights: they add up.
    mean, scatter : ndarray
        Mean, and sum of squares about it, weighted by area.
    low, high : ndarray
        Extremes; infinite where there is no data.
    values, weights : list of ndarray
        Values and their areas, for percentiles: one array (D, n) and (n,) for each piece.
    """

    sums: dict[str, Floats]
    mean: Floats
    scatter: Floats
    low: Floats
    high: Floats
    values: list[npt.NDArray[Any]]
    weights: list[Floats]

    def __add__(self, other: Part) -> Part:
        """Join what two pieces cover."""
        area, more = self.sums["area"], other.sums["area"]
        total = area + more
        share = np.divide(more, total, out=np.zeros_like(total), where=total > 0)
        step = other.mean - self.mean
        return Part(
            {name: self.sums[name] + other.sums[name] for name in self.sums},
            self.mean + step * share,
            self.scatter + other.scatter + step**2 * area * share,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.values + other.values,
            self.weights + other.weights,
        )


def sum_group(
    group: Group, rules: Rules, values: npt.NDArray[Any], layers: Mapping[str, npt.NDArray[Any]]
) -> list[tuple[int, Part]]:
    """Task: sum up the pieces of one group.

    Parameters
    ----------
    group : Group
        Pieces and the window they lie in.
    rules : Rules
        What to sum up.
    values : ndarray, shape (D, H, W)
        Heights or changes in the window.
    layers : mapping of str to ndarray
        ``area`` (H, W) of each pixel; where there are any, ``sigma`` of each value and ``changed``,
        the pixels that have changed, of any shape that broadcasts against the values.

    Returns
    -------
    list of (int, Part)
        Polygon and its sums.
    """
    return [
        (piece.polygon, _sum_piece(group, piece, rules, values, layers)) for piece in group.pieces
    ]


def _sum_piece(
    group: Group,
    piece: Piece,
    rules: Rules,
    values: npt.NDArray[Any],
    layers: Mapping[str, npt.NDArray[Any]],
) -> Part:
    top, bottom, left, right = piece.window
    rows = slice(top - group.window[0], bottom - group.window[0])
    cols = slice(left - group.window[2], right - group.window[2])
    share = cover(piece.wkb, piece.window)
    under = share > 0
    full = {name: np.broadcast_to(layer, values.shape) for name, layer in layers.items()}
    dates = []
    for date, plane in enumerate(values):  # one by one, to need memory for one
        # Only pixels under the polygon are kept: (1, n).
        chosen = plane[rows, cols][under].astype(np.float64)[None]
        flat = {name: layer[date, rows, cols][under][None] for name, layer in full.items()}
        dates.append(sum_pixels(chosen, share[under], flat, rules))
    return _stack_dates(dates)


def _stack_dates(dates: Sequence[Part]) -> Part:
    """Put the sums of single dates together."""
    first = dates[0]
    joined = {
        name: np.concatenate([getattr(part, name) for part in dates])
        for name in ("mean", "scatter", "low", "high")
    }
    return Part(
        {name: np.concatenate([part.sums[name] for part in dates]) for name in first.sums},
        **joined,
        values=[np.concatenate([part.values[0] for part in dates])] if first.values else [],
        weights=[np.concatenate([part.weights[0] for part in dates])] if first.weights else [],
    )


def sum_pixels(
    values: Floats, share: Floats, layers: Mapping[str, npt.NDArray[Any]], rules: Rules
) -> Part:
    """Sum up pixels.

    Parameters
    ----------
    values : ndarray, shape (D, n)
        Heights or changes.
    share : ndarray, shape (n,)
        How much of each pixel counts.
    layers : mapping of str to ndarray, shape (D, n)
        As in :func:`sum_group`.
    rules : Rules
        What to sum up.

    Returns
    -------
    Part
        The sums.
    """
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    weight = np.where(known, share * layers["area"], 0.0)
    area = weight.sum(axis=1)
    total = (weight * filled).sum(axis=1)
    mean = np.divide(total, area, out=np.zeros_like(area), where=area > 0)
    sums = {"count": (share * known).sum(axis=1), "area": area}
    if "sigma" in layers:
        sums["variance"] = (weight * np.where(known, layers["sigma"], 0.0) ** 2).sum(axis=1)
    if rules.change:
        sums |= _sum_change(filled, weight, layers, rules)
    return Part(
        sums,
        mean,
        (weight * (filled - mean[:, None]) ** 2).sum(axis=1),
        np.where(known, values, np.inf).min(axis=1, initial=np.inf),
        np.where(known, values, -np.inf).max(axis=1, initial=-np.inf),
        [values.astype(np.float32)] if rules.percentiles else [],
        [weight] if rules.percentiles else [],
    )


def _sum_change(
    change: Floats, weight: Floats, layers: Mapping[str, npt.NDArray[Any]], rules: Rules
) -> dict[str, Floats]:
    """Sum up area and volume of loss and gain, and how uncertain each pixel's part in them is."""
    size = np.abs(change)
    least = layers["least"] if rules.threshold is None else rules.threshold
    changed = layers["changed"] if rules.threshold is None else size > least
    changed = changed.astype(bool) & (weight > 0)
    sums = {}
    for name, side in (("loss", change < 0), ("gain", change > 0)):
        lost = np.where(changed & side, weight, 0.0)
        sums[f"{name}_area"] = lost.sum(axis=1)
        sums[f"{name}_volume"] = (lost * size).sum(axis=1)
        if "sigma" not in layers:
            continue
        sigma = np.where(weight > 0, layers["sigma"], 0.0)
        sums[f"{name}_variance"] = (lost * sigma**2).sum(axis=1)
        # How likely a repeated measurement would call the pixel changed.
        chance = ndtr((size - least) / np.maximum(sigma, 1e-9))
        doubt = np.where(side, weight**2 * chance * (1 - chance), 0.0)
        sums[f"{name}_area_doubt"] = doubt.sum(axis=1)
        sums[f"{name}_volume_doubt"] = (doubt * size**2).sum(axis=1)
    return sums


def quantile(values: Sequence[npt.NDArray[Any]], weights: Sequence[Floats], q: float) -> Floats:
    """Weighted quantile of each date: the least value that so much of the area does not exceed.

    Parameters
    ----------
    values : sequence of ndarray, shape (D, n)
        Values.
    weights : sequence of ndarray, shape (D, n)
        Areas; 0 where there is no value.
    q : float
        Between 0 and 1.

    Returns
    -------
    ndarray of float64, shape (D,)
        NaN where there is no value. numpy's ``method="inverted_cdf"``.
    """
    found = []
    for value, weight in zip(np.concatenate(values, 1), np.concatenate(weights, 1), strict=True):
        value, weight = value[weight > 0], weight[weight > 0]
        if not value.size:
            found.append(np.nan)
            continue
        order = np.argsort(value, kind="stable")
        rising = np.cumsum(weight[order])
        place = np.searchsorted(rising, q * rising[-1] * (1 - 1e-12))
        found.append(float(value[order][min(place, value.size - 1)]))
    return np.array(found)
