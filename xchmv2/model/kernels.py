"""The last stage as one Triton kernel; importing this needs triton.

`xchmv2.model.height` decides whether it runs, and calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: A NaN stays one: a plain maximum would take the other number for the height.
_NAN = tl.constexpr(tl.PropagateNan.ALL)


def _height_kernel(
    features,
    weight,
    bias,
    bins,
    height,
    spread,
    pixels,
    offset,
    tiny,
    scale,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Reduce the features of ``ROWS`` pixels to heights; all logits of a pixel stay in registers.

    The computation is that of `xchmv2.model.height.FeaturesToHeight`, line by line. Triton compiles
    annotations too and knows only its own, so the other arguments have no types here.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, channel = tl.arange(0, BINS), tl.arange(0, STEP)
    inside = row < pixels
    logits = tl.zeros((ROWS, BINS), dtype=tl.float32)
    for first in tl.static_range(0, CHANNELS, STEP):
        x = tl.load(
            features + row[:, None] * CHANNELS + (first + channel)[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        w = tl.load(weight + column[None, :] * CHANNELS + (first + channel)[:, None])
        logits += tl.dot(x, w, input_precision="ieee")
    logits += tl.load(bias + column)[None, :]
    if NORM == "relu":
        weights = tl.maximum(logits, 0.0, _NAN) + offset
    else:
        if NORM == "sigmoid":  # as a softmax of the logarithms of sigmoids
            logits = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
        weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    centre = tl.load(bins + column)[None, :]
    total = tl.sum(weights, axis=1)
    total = tl.where(total < float("inf"), tl.maximum(total, tiny), 1.0)
    mean = tl.sum(weights * centre, axis=1) / total
    tl.store(height + row, scale * tl.maximum(mean, tiny, _NAN), mask=inside)
    if SPREAD:
        off = centre - mean[:, None]
        variance = tl.sum(weights * off * off, axis=1) / total
        tl.store(spread + row, scale * tl.sqrt(variance), mask=inside)


height_kernel = triton.jit(_height_kernel)
