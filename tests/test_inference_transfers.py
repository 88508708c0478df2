"""Copies to and from a device: the bits that went, in the order they went."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from conftest import cube

from xchmv2.inference import Predictor
from xchmv2.inference.predictor import _Flight, _Transfers

# Private imports: the order of copies shows nowhere else.

torch.set_num_threads(1)

OPTIONS = dict(tile=64, overlap=16, block=256)


def round_trip(device):
    transfers = _Transfers(torch.device(device))
    arrays = [np.random.default_rng(i).integers(0, 256, (2, 3, 40, 30), "u1") for i in range(8)]
    found = []
    for array in arrays:
        sent = transfers.send(array)
        transfers.await_sent(sent)
        assert sent.dtype == torch.uint8
        assert sent.device.type == device
        found.append(transfers.fetch(sent.float() * 2))
    for fetch, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(fetch.result(), 2.0 * array)


def test_round_trip_on_a_processor():
    round_trip("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_round_trip_on_a_gpu():
    round_trip("cuda")


def test_a_batch_is_launched_before_the_one_before_it_lands(monkeypatch):
    """So that a GPU never waits for the host to take heights in."""
    events = []
    launch, land = Predictor._launch, _Flight.land

    def launched(self, window, batch, size, *, spread):
        events.append(("launch", len(batch)))
        return launch(self, window, batch, size, spread=spread)

    def landed(self):
        events.append(("land", len(self.batch)))
        return land(self)

    monkeypatch.setattr(Predictor, "_launch", launched)
    monkeypatch.setattr(_Flight, "land", landed)
    model = reference.whole_tile_model()
    cube((64, 160)).chmv2.predict(model, batch_size=1, **OPTIONS)
    order = [name for name, _ in events]
    assert order[:3] == ["launch", "launch", "land"]
    assert order[-1] == "land"
    assert order.count("launch") == order.count("land") >= 3


def test_uint8_goes_to_the_device_as_it_is(monkeypatch):
    sent = []
    original = _Transfers.send
    monkeypatch.setattr(
        _Transfers, "send", lambda self, array: sent.append(array.dtype) or original(self, array)
    )
    imagery = cube((64, 64))
    imagery.chmv2.predict(reference.whole_tile_model(), **OPTIONS)
    assert sent == [np.uint8, np.bool_]
    sent.clear()
    floats = imagery.astype("f8")
    floats.chmv2.predict(reference.whole_tile_model(), value_range=(0, 255), **OPTIONS)
    assert sent == [np.float32, np.bool_]
