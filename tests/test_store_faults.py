"""Stores whose operations fail, one after another: nothing is lost, nothing is read wrong."""

import itertools
import sys
import time

import numpy as np
import pytest
from faulty_s3 import LIES, PASSING, bucket, faulty_s3, options_of, s3_server
from store_faults import VERBS, WAYS, case, survive, survive_kills
from store_run import copy_store
from zarr.storage import LocalStore, MemoryStore

import xchmv2
from xchmv2.errors import IncompleteStoreWarning, StoreError
from xchmv2.store.storage import resolve_store

# Private imports: one store is reached by two ways.


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("xchmv2.store.lock._CONFIRM", 0.0)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as address:
        make = bucket(address)
        make.endpoint = address
        yield make


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


@pytest.fixture(scope="module")
def proxy(s3):
    with faulty_s3(s3.endpoint) as server:
        yield server


@pytest.mark.parametrize(
    ("verb", "kinds", "share", "seed"),
    [
        ("extend by a date between", PASSING, 0.1, 0),
        ("extend by a date between", LIES, 0.02, 0),
        *(
            pytest.param(verb, *how, seed, marks=pytest.mark.slow)
            for verb in VERBS
            for how in ((PASSING, 0.3), (LIES, 0.02), (("404",), 0.05), (("empty list",), 0.1))
            for seed in range(1, 3)
        ),
    ],
)
def test_an_unreliable_s3_loses_nothing(s3, proxy, verb, kinds, share, seed):
    store = copy_store(case(verb).base, s3())
    through = resolve_store(f"s3://{store.path}", options_of(proxy.url))
    proxy.fail(*kinds, share=share, seed=seed)
    begun = time.monotonic()
    try:
        case(verb).verb.act(through)
    except StoreError:
        if kinds == PASSING:
            raise
    finally:
        proxy.fail()
    assert time.monotonic() - begun < 300
    case(verb).judge(store, f"{verb} through {kinds}")


@pytest.mark.parametrize("seeds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_what_an_unreliable_s3_hides_is_not_read_as_missing(s3, proxy, seeds):
    whole = copy_store(case("resume").undisturbed, s3())
    right, outcomes = case("resume").truths[0], set()
    for seed in range(seeds):
        options = options_of(proxy.url, skip_instance_cache=True)
        proxy.fail("404", "empty list", share=0.1, seed=seed)
        try:
            found = xchmv2.open_zarr(f"s3://{whole.path}", storage_options=options).compute()
        except (StoreError, IncompleteStoreWarning):
            outcomes.add("refused")
        else:
            outcomes.add("right")
            np.testing.assert_array_equal(found, right.sortby("time"))
        finally:
            proxy.fail()
    assert "refused" in outcomes
