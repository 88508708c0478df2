import numpy as np
import pandas as pd
import pytest

from tests.evaluation.change import evaluate, false_change, rates, write_tables
from tests.evaluation.scenarios import SCENARIOS, UNDISTURBED, make_scene


def test_one_scenario_beats_the_plain_difference():
    """The whole table is printed by ``python -m tests.evaluation.change``."""
    chosen = [s for s in SCENARIOS if s.name == "true + noise, bias, shift"]
    masks, areas = evaluate(chosen, seeds=[203], side=400)
    f1 = masks.set_index("method")["F1"]
    assert f1["xchmv2"] > f1.drop("xchmv2").max()
    assert f1["xchmv2"] > 0.9
    assert (areas["lower"] <= areas["true"]).all()
    assert (areas["true"] <= areas["upper"]).all()
    false = false_change(UNDISTURBED[:1], seeds=[203], side=400)
    assert (false["xchmv2"] < 1).all()
    text = write_tables(masks, areas, false)
    assert "true + noise, bias, shift: 1 of 1" in text


def test_rates():
    counts = pd.DataFrame({"both": [30.0, 10], "found": [40.0, 10], "true": [50.0, 30]})
    found = rates(counts)
    assert found["precision"] == pytest.approx(0.8)
    assert found["recall"] == pytest.approx(0.5)
    assert found["IoU"] == pytest.approx(40 / 90)
    assert found["F1"] == pytest.approx(2 * 0.8 * 0.5 / 1.3)


def test_errors_are_as_stated():
    scenario = SCENARIOS[1]
    found, truth = make_scene(scenario, 204, 500)
    high = truth.values.min(0) > 15
    errors = [(found["canopy_height"] - truth).values[k][high] for k in range(2)]
    assert np.std(errors[0]) == pytest.approx(scenario.noise, rel=0.2)
    assert np.mean(errors[1]) - np.mean(errors[0]) == pytest.approx(scenario.bias, abs=0.5)
