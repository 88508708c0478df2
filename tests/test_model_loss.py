import math

import numpy as np
import pytest
import reference
import torch
from scipy import ndimage

from xchmv2.errors import ImageryError
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.model.loss import Curriculum, chmv2_loss
from xchmv2.training import charbonnier, patch_gradient, silog

# Private imports: the loss is tested where it is written; users take it from training.


def heights(seed=0, shape=(2, 40, 48)):
    noise = np.random.default_rng(seed).random(shape)
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3))
    return torch.from_numpy((smooth - smooth.min()) / np.ptp(smooth) * 30).float()


LOSSES = [silog, charbonnier, patch_gradient, chmv2_loss]


def test_silog_is_the_published_formula():
    p, t = heights(0) + 1, heights(1) + 1
    d = np.log(p.numpy()) - np.log(t.numpy())
    assert silog(p, t).item() == pytest.approx(
        math.sqrt((d**2).mean() - 0.85 * d.mean() ** 2), rel=1e-5
    )
    assert silog(3 * t, t, variance_focus=1.0).item() < 1e-3


def test_charbonnier_is_the_published_formula():
    p, t = heights(0), heights(1)
    expected = np.sqrt(((p - t).numpy() / 8) ** 2 + 1e-6).mean()
    assert charbonnier(p, t).item() == pytest.approx(expected, rel=1e-5)


def test_patch_gradient_against_numpy_with_hard_ranges():
    """At a low temperature the soft range is the range of scipy's filters."""
    p, t = (heights(s, (1, 30, 34)) for s in (0, 1))

    def parts(x):
        log = np.log(np.maximum(x[0].numpy(), 0.1) / 8)
        log = log - log.mean()
        gy = ndimage.correlate1d(ndimage.correlate1d(log, [1, 2, 1], 1), [-1, 0, 1], 0) / 8
        gx = ndimage.correlate1d(ndimage.correlate1d(log, [1, 2, 1], 0), [-1, 0, 1], 1) / 8
        gy, gx = gy[1:-1, 1:-1], gx[1:-1, 1:-1]
        m = np.sqrt(gy**2 + gx**2 + 1e-8)
        ranges = []
        for window in (3, 5):
            r = window // 2
            full = ndimage.maximum_filter(m, window) - ndimage.minimum_filter(m, window)
            ranges.append(full[r:-r, r:-r])
        return gy, gx, m, ranges

    (py, px, pm, pr), (ty, tx, tm, tr) = parts(p), parts(t)
    cosine = ((py * ty + px * tx) / (pm * tm))[tm > 1e-3]
    expected = 0.3 * np.abs(pm - tm).mean() + 0.4 * (1 - cosine).mean()
    expected += sum(0.3 * np.abs(a - b).mean() for a, b in zip(pr, tr, strict=True))
    found = patch_gradient(p, t, scales=(1,), temperature=1e-4)
    assert found.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_perfect_heights_cost_next_to_nothing_and_gradients_are_finite(loss):
    target = heights()
    predicted = target.clone().requires_grad_()
    value = loss(predicted, target)
    value.backward()
    assert value.item() < 2e-3
    assert predicted.grad.isfinite().all()
    worse = loss(heights(5), target)
    assert worse > 10 * value


@pytest.mark.parametrize("loss", LOSSES)
def test_missing_labels_are_ignored(loss):
    target, predicted = heights(0), heights(1)
    target[:, :20] = torch.nan
    changed = predicted.clone()
    changed[:, :16] += 7  # coarse pixels at the border of the hole are ignored too
    assert loss(predicted, target).item() == pytest.approx(loss(changed, target).item(), rel=1e-5)
    nothing = torch.full_like(target, torch.nan)
    empty = loss(predicted.requires_grad_(), nothing)
    assert empty.item() == 0
    empty.backward()
    assert predicted.grad.isfinite().all()


def test_patch_gradient_forgives_a_common_factor_but_not_blur():
    target = heights() + 2
    blurred = torch.from_numpy(ndimage.gaussian_filter(target.numpy(), (0, 3, 3)))
    assert patch_gradient(1.5 * target, target) < 0.02 * patch_gradient(blurred, target)


def test_curriculum_follows_the_paper():
    weights = Curriculum().weights
    assert weights(0) == (1, 0, 0)
    assert weights(0.15) == pytest.approx((0.5, 0.5, 0.075 * 0.1 / 0.45))
    assert weights(0.3)[:2] == (0, 1)
    assert weights(0.05)[2] == 0
    assert weights(0.5)[2] == weights(1)[2] == 0.075


def test_shapes_must_agree():
    with pytest.raises(ImageryError, match=r"labels of the heights' shape, \(2, 40, 48\), found"):
        chmv2_loss(heights(), heights()[:, :-1])


def test_forward_returns_the_loss():
    torch.manual_seed(0)
    model = CHMv2ForDepthEstimation(reference.tiny_config())
    labels = heights(0, (2, 64, 64))
    labels[0, :30] = torch.nan
    pixels = torch.randn(2, 3, 64, 64)
    output = model(pixels, labels=labels)
    assert output.loss.item() == pytest.approx(
        chmv2_loss(output.predicted_depth, labels).item(), rel=1e-6
    )
    assert model(pixels, labels=labels, return_dict=False)[0].ndim == 0
    output.loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for n, p in model.named_parameters()
        if "mask_token" not in n
    )


def test_training_on_the_loss_brings_it_down():
    torch.manual_seed(0)
    model = CHMv2ForDepthEstimation(reference.tiny_config(initializer_range=0.2)).train()
    pixels, labels = torch.randn(2, 3, 64, 64), heights(0, (2, 64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.6 * values[0]
