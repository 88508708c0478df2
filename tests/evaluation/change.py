"""Measure change detection on forests with known truth: ``python -m tests.evaluation.change``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import xarray as xr

from xchmv2.change import (
    ComparisonWarning,
    align,
    correlation_length,
    difference_between,
    gain,
    loss,
    loss_area,
    stable_bias,
)
from xchmv2.errors import DemoModelWarning

from .scenarios import BEYOND, SCENARIOS, SEEDS, UNDISTURBED, Scenario, make_scene

#: A pixel of the truth is lost if it drops by more than this [m], in patches of 200 m2 or more.
DROP = 5.0
#: Fixed thresholds of the plain difference [m]; 15 is that of a published benchmark.
PLAIN = (5.0, 10.0, 15.0)


def compare(found: xr.Dataset) -> xr.Dataset:
    """Do what is recommended: align, take the offset out, difference.

    Parameters
    ----------
    found : Dataset
        ``canopy_height`` (time, y, x) [m] of two dates, and ``bin_spread`` if it is known: that is
        the sigma then, at a confidence of 0.8 (a loss is significant at 0.1, one-sided), as the
        bins spread wider than the errors do. Without it sigma is measured, at 0.95.

    Returns
    -------
    Dataset
        As from :func:`~xchmv2.change.difference`, with a measured correlation length.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ComparisonWarning)
        ready = stable_bias(align(found))
        dates = found["time"].values
        if "bin_spread" in found:
            change = difference_between(ready, *dates, sigma="bin_spread", confidence=0.8)
        else:
            change = difference_between(ready, *dates)
    return change.assign_attrs(correlation_length=correlation_length(change))


def score(found: xr.DataArray, truth: xr.DataArray) -> dict[str, float]:
    """Count the pixels of loss masks: true, found, and both.

    Parameters
    ----------
    found, truth : DataArray
        Boolean masks.

    Returns
    -------
    dict
        ``both``, ``found`` and ``true`` [px].
    """
    pairs = {"both": found & truth, "found": found, "true": truth}
    return {name: float(mask.sum()) for name, mask in pairs.items()}


def rates(counts: pd.DataFrame) -> dict[str, float]:
    """Return precision, recall, IoU and F1 of counts that are added up over scenes."""
    both, found, true = (float(counts[name].sum()) for name in ("both", "found", "true"))
    return {
        "precision": both / found if found else float("nan"),
        "recall": both / true if true else float("nan"),
        "IoU": both / (found + true - both),
        "F1": 2 * both / (found + true),
    }


def true_loss(truth: xr.DataArray) -> xr.DataArray:
    """Return where more than 5 m was lost in patches of 200 m2 or more."""
    return loss(truth[1] - truth[0], threshold=DROP, opening=None)


def evaluate(
    scenarios: Iterable[Scenario] = SCENARIOS,
    *,
    seeds: Iterable[int] = SEEDS,
    side: int = 600,
    say: Callable[[str], Any] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare masks of loss, and their areas, with the truth.

    Parameters
    ----------
    scenarios : iterable of Scenario
        What to try.
    seeds : iterable of int
        Forests of each.
    side : int
        Side of a scene [px].
    say : callable, optional
        Told what is under way.

    Returns
    -------
    masks : DataFrame
        A row per scenario and method, pixels of all seeds together: precision, recall, IoU, F1.
    areas : DataFrame
        A row per scenario and seed: true area, estimate and bounds [ha].
    """
    masks, areas, seeds = [], [], tuple(seeds)
    for scenario in scenarios:
        counts: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            if say is not None:
                say(f"{scenario.name}, seed {seed}")
            found, truth = make_scene(scenario, seed, side)
            true, change = true_loss(truth), compare(found)
            plain = _plain(found)
            tried = {f"plain, {t:g} m": loss(plain, threshold=t) for t in PLAIN}
            tried["xchmv2"] = loss(change, threshold=DROP)
            for method, mask in tried.items():
                counts.setdefault(method, []).append(score(mask, true))
            areas.append({"scenario": scenario.name, "seed": seed, **_areas(change, true)})
        masks += [
            {"scenario": scenario.name, "method": method, **rates(pd.DataFrame(rows))}
            for method, rows in counts.items()
        ]
    return pd.DataFrame(masks), pd.DataFrame(areas)


def _areas(change: xr.Dataset, true: xr.DataArray) -> dict[str, float]:
    """Return the true area of loss and the interval stated for it [ha]."""
    from xchmv2.raster import cell_areas

    stated = loss_area(change, threshold=DROP)
    found = {name: float(stated[name]) / 1e4 for name in ("area", "lower", "upper")}
    return {"true": float((cell_areas(true) * true).sum()) / 1e4, **found}


def false_change(
    scenarios: Iterable[Scenario] = UNDISTURBED,
    *,
    seeds: Iterable[int] = SEEDS,
    side: int = 600,
    say: Callable[[str], Any] | None = None,
) -> pd.DataFrame:
    """Tell how much change is found where nothing changed.

    Parameters
    ----------
    scenarios, seeds, side, say
        As for :func:`evaluate`.

    Returns
    -------
    DataFrame
        A row per scenario: share of the area [%] in masks of loss or gain by the plain difference
        at 5 m and by this package, the largest of any seed, and single significant pixels.
    """
    rows, seeds = [], tuple(seeds)
    for scenario in scenarios:
        shares = []
        for seed in seeds:
            if say is not None:
                say(f"undisturbed: {scenario.name}, seed {seed}")
            found, _ = make_scene(scenario, seed, side)
            change, plain = compare(found), _plain(found)
            masks = {
                "plain, 5 m": _either(plain),
                "xchmv2": _either(change),
                "single pixels": change["significant"],
            }
            shares.append({name: 100 * float(mask.mean()) for name, mask in masks.items()})
        table = pd.DataFrame(shares)
        worst = {"xchmv2, worst seed": float(table["xchmv2"].max())}
        rows.append({"scenario": scenario.name, **table.mean().to_dict(), **worst})
    return pd.DataFrame(rows)


def _plain(found: xr.Dataset) -> xr.DataArray:
    return found["canopy_height"][1] - found["canopy_height"][0]


def _either(change: xr.Dataset | xr.DataArray) -> xr.DataArray:
    return loss(change, threshold=DROP) | gain(change, threshold=DROP)


def write_tables(masks: pd.DataFrame, areas: pd.DataFrame, false: pd.DataFrame) -> str:
    """Return the tables as text."""
    inside = (areas["lower"] <= areas["true"]) & (areas["true"] <= areas["upper"])
    hits = inside.groupby(areas["scenario"], sort=False).agg(["sum", "size"])
    covered = [f"{name}: {row['sum']} of {row['size']}" for name, row in hits.iterrows()]
    parts = [
        f"Masks of loss: more than {DROP:g} m in patches of 200 m2 or more",
        masks.round(3).to_string(index=False),
        "Area of loss [ha]",
        areas.round(3).to_string(index=False),
        "Seeds whose true area is inside the stated 95 % interval",
        "\n".join(covered),
        "Change found where nothing changed [% of the area]",
        false.round(3).to_string(index=False),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run all scenarios and print the tables; 10 forests each, or as many as asked for."""
    seeds = SEEDS[: int(sys.argv[1])] if len(sys.argv) > 1 else SEEDS

    def say(words: str) -> None:
        sys.stderr.write(f"{words}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DemoModelWarning)
        masks, areas = evaluate(seeds=seeds, say=say)
        false = false_change((*UNDISTURBED, *BEYOND), seeds=seeds, say=say)
    sys.stdout.write(write_tables(masks, areas, false))


if __name__ == "__main__":
    main()
