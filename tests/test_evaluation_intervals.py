"""Stated intervals hold the truth: few cells of ``python -m tests.evaluation.intervals``."""

import numpy as np
import pandas as pd
import pytest

from tests.evaluation import intervals
from xchmv2.change import ErrorModel, difference


def table(rows):
    return pd.DataFrame(list(rows)).set_index(["interval", "noise", "truth"])


def test_simulated_errors_are_as_stated():
    noise = "80 % sph 10, 20 % sph 300"
    fields = np.concatenate(
        [intervals.two_fields(np.random.default_rng(seed), 128, noise) for seed in range(40)]
    )
    assert (fields**2).mean() == pytest.approx(1, rel=0.1)
    near = np.arange(-10, 10) + 0.5
    disc = np.hypot(near[:, None], near) <= 10
    means = fields[:, 54:74, 54:74][:, disc].mean(axis=1)
    assert means.std() == pytest.approx(intervals.true_error(noise, 10), rel=0.25)
    assert intervals.true_error("white", 10) == pytest.approx(disc.sum() ** -0.5)


def test_few_cells_of_the_table():
    few = table(intervals.significance(1, 250, ["1 m + 0.1 h"]))["coverage"]
    assert few.between(0.91, 0.985).all()
    assert len(few) == 15
    offsets = table(intervals.offsets(1, 160, ["3 m"], [0.3]))
    assert (offsets["coverage"] == 1).all()
    discs = table(intervals.means(3, 160, ["sph 20"], [10, 30]))
    assert discs["coverage"].groupby("interval").mean().between(0.8, 1).all()
    assert discs["width"].between(0.7, 2).all()
    lost = table(intervals.losses(2, 200, ["2.5 m white"], ["0.5 ha cleared"]))
    assert (lost["coverage"] == 1).all()
    slopes = table(intervals.trends(1, dates=[3, 6]))
    assert (slopes["coverage"] > 0.93).all()
    confirmed = table(intervals.confirmed_losses(1, 40, [8]))
    assert (confirmed["coverage"] > 0.97).all()
    assert "coverage" in intervals.write_table([{"runs": 1, "coverage": 0.95}])


@pytest.mark.slow
@pytest.mark.parametrize("name", intervals.TABLES)
def test_the_whole_table(name):
    found = table(intervals.TABLES[name](200))
    held = found["coverage"]
    if name == "significance":
        assert held.between(0.92, 0.975).all()
    elif name == "means":
        # A scene of 512 m holds few errors of 200 m and more, of which some pass for changes.
        far = held.index.isin(["exp 200", "exp 600"], level="noise")
        measured = ~held.index.isin(["zonal, sigma given"], level="interval")
        assert (held[~(far & measured)] > 0.9).all()
        assert (held[far & measured] > 0.75).all()
        assert (found["width"] < 2).all()
    else:
        assert (held > 0.9).all()


def test_errors_of_one_date_alone_are_not_taken_for_errors_that_grow_with_height():
    errors = 3 * np.random.default_rng(0).standard_normal((200, 200))
    flat = np.full((200, 200), 20.0)
    for before, after in ((flat, flat + errors), (flat + errors, flat)):
        found = ErrorModel.read(difference(intervals.on_grid(before), intervals.on_grid(after)))
        assert np.ptp(found.spread) == 0
        assert found.spread[0] == pytest.approx(3, rel=0.03)


def test_errors_that_a_whole_scene_shares_count():
    rng, ratio, apart = np.random.default_rng(1), [], []
    for _ in range(6):
        pair = 20 + 2 * intervals.two_fields(rng, 160, "exp 200")
        found = ErrorModel.read(difference(*(intervals.on_grid(each) for each in pair)))
        ratio.append(found.spread[0] / found.nmad)
        apart.append(abs(found.offset) / found.offset_doubt)
    assert np.mean(ratio) > 1.05
    assert np.median(apart) < 1
    white = [20 + 2 * rng.standard_normal((160, 160)) for _ in range(2)]
    found = ErrorModel.read(difference(*(intervals.on_grid(each) for each in white)))
    assert found.spread[0] == pytest.approx(found.nmad, rel=0.03)
    assert abs(found.offset) < found.offset_doubt < 0.2
