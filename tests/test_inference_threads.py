"""How many threads a forward on a processor gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from xchmv2.inference import forward_threads
from xchmv2.inference.workers import use_forward_threads

# Private imports: threads are for workers, which set them themselves.

torch.set_num_threads(1)


def worker(threads, nanny="tcp://127.0.0.1:1"):
    return SimpleNamespace(nanny=nanny, state=SimpleNamespace(nthreads=threads))


@pytest.mark.parametrize(
    ("omp", "who", "expected"),
    [
        ("1", worker(6), 6),  # what nannies set
        ("3", worker(6), 1),  # what a user set is torch's already
        (None, worker(6), 1),
        ("1", worker(6, nanny=None), 1),  # a worker by itself keeps its environment
        ("1", None, 1),
    ],
)
def test_a_nannys_one_thread_becomes_the_workers(monkeypatch, omp, who, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert forward_threads(who) == expected


def test_outside_a_cluster_torch_keeps_its_threads():
    use_forward_threads()
    assert torch.get_num_threads() == 1
