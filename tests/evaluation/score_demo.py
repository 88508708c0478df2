"""``python -m tests.evaluation.score_demo``: the demonstration model on forests it never saw."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from xchmv2.datasets import synthetic_forest
from xchmv2.demo.truth import DROP
from xchmv2.predict import predict
from xchmv2.validation import scores

from .train_demo import TEST_SEEDS

# Private imports: scores as arrays have no public face.

#: Edges of the height classes of the table [m].
CLASSES = (0.0, 1.0, 5.0, 10.0, 15.0, 20.0, 30.0, np.inf)
#: Side of the blocks of block-R2 [px], as in the CHMv2 paper.
BLOCK = 50
_DATES = ("2019-07-01", "2024-07-01")


def evaluate(
    model: Any = "demo", *, seeds: Iterable[int] = TEST_SEEDS, side: int = 600
) -> tuple[pd.Series, pd.DataFrame]:
    """Predict two dates of unseen synthetic forests and compare with the truth.

    Parameters
    ----------
    model : str, path or model
        As in ``predict``.
    seeds : iterable of int
        Forests, one scene each.
    side : int, default 600
        Side of a scene [px].

    Returns
    -------
    summary : pandas.Series
        ``block_r2`` over 50-px blocks, ``mae`` [m], ``mae_share`` of the MAE of predicting the
        mean, ``bias`` [m]; ``cleared_iou``: overlap of the area that lost more than 5 m, true and
        predicted.
    classes : pandas.DataFrame
        Pixels, MAE and bias [m] by class of true height.

    References
    ----------
    Block-R2: CHMv2, arXiv 2603.06382, section 4.
    """
    truth, found = (np.concatenate(part) for part in zip(*_scenes(model, seeds, side), strict=True))
    mean = np.full_like(truth, truth.mean())
    true_loss, found_loss = (np.diff(h, axis=1) < -DROP for h in (truth, found))
    summary = pd.Series(
        {
            "block_r2": scores.r2(blocks(found), blocks(truth)),
            "mae": scores.mae(found, truth),
            "mae_share": scores.mae(found, truth) / scores.mae(mean, truth),
            "bias": scores.bias(found, truth),
            "cleared_iou": scores.overlap(found_loss, true_loss),
        }
    )
    return summary, by_class(truth, found)


def blocks(heights: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mean heights [m] of whole blocks of 50 px, from arrays (..., H, W)."""
    return scores.block_means(heights, BLOCK)


def by_class(truth: npt.NDArray[Any], found: npt.NDArray[Any]) -> pd.DataFrame:
    """Pixels, MAE and bias [m] by class of true height."""
    rows = scores.by_class(found, truth, CLASSES)
    frame = pd.DataFrame(rows, scores.class_names(CLASSES), ["pixels", "mae", "bias"])
    return frame.astype({"pixels": int})


def _scenes(
    model: Any, seeds: Iterable[int], side: int
) -> Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Yield truth and prediction of one scene after another, (1, 2, H, W) [m]."""
    for seed in seeds:
        forest = synthetic_forest((side, side), times=_DATES, seed=seed)
        found = cast(xr.DataArray, predict(forest[["red", "green", "blue"]], model))
        yield forest["canopy_height"].values[None], found.values[None]


if __name__ == "__main__":
    overall, classes = evaluate(*sys.argv[1:2])
    sys.stdout.write(f"{overall.round(3).to_string()}\n\n{classes.round(2).to_string()}\n")
