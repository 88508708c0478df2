"""Stores whose operations fail, one after another: nothing is lost, nothing is read wrong."""

import itertools
import sys

import pytest
from faulty_s3 import bucket, s3_server
from store_faults import VERBS, WAYS, survive, survive_kills
from zarr.storage import LocalStore, MemoryStore


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("xchmv2.store.lock._CONFIRM", 0.0)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as address:
        yield bucket(address)


@pytest.fixture
def place(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    numbers = itertools.count()
    return {"memory": MemoryStore, "local": lambda: LocalStore(tmp_path / f"{next(numbers)}")}[
        request.param
    ]


#: Of so many operations one fails in every run, and in the slow ones.
STEPS = {"dies": 2, "raises": 17, "raises late": 7, "missing": 17}


def trials():
    for place, way, verb in itertools.product(("memory", "local", "s3"), WAYS, VERBS):
        if place == "memory":
            yield pytest.param(verb, way, place, STEPS[way])
        elif place == "s3" and verb in ("create", "extend by a date between") and way == "dies":
            yield pytest.param(verb, way, place, 17)
        yield pytest.param(verb, way, place, 7 if place == "s3" else 1, marks=pytest.mark.slow)


@pytest.mark.parametrize(("verb", "way", "place", "step"), [*trials()], indirect=["place"])
def test_a_call_fails_at_any_operation(verb, way, place, step):
    found = survive(verb, way, place, step)
    assert found.trials > 5 / step
    assert not found.raw


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", VERBS)
def test_a_process_is_killed_at_any_change_of_a_file(tmp_path, verb, step):
    assert survive_kills(verb, tmp_path, step).trials > 10 / step
