"""Naive implementations that the package is held against: no cleverness, float64, plain loops."""

from __future__ import annotations

import numpy as np

from xchmv2.model import CHMv2Config, CHMv2ForDepthEstimation

MEAN = np.array([0.420, 0.411, 0.296]).reshape(3, 1, 1)
STD = np.array([0.213, 0.156, 0.143]).reshape(3, 1, 1)


def follow(raised, **names):
    """The result of the call that an error's advice ends with."""
    return eval(raised.value.fix.rpartition(": ")[2], names)


def tiny_config(**changes):
    """A model that runs in a millisecond."""
    backbone = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_register_tokens=1,
        return_class_token=True,
        key_bias=True,
        out_indices=[1, 2, 3, 4],
        image_size=64,
    )
    settings = dict(
        backbone_config=backbone,
        post_process_channels=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        number_output_channels=8,
    )
    return CHMv2Config(**{**settings, **changes})


class WholeTileModel(CHMv2ForDepthEstimation):
    """Heights that depend on every pixel of the tile and on the place in it: blending must show."""

    largest_batch: int | None = None

    def height(self, pixel_values, *, spread=False):
        import torch

        if self.largest_batch is not None and len(pixel_values) > self.largest_batch:
            raise torch.OutOfMemoryError("out of memory, as the test wants it")
        x = pixel_values.double()
        h, w = x.shape[-2:]
        place = torch.arange(h)[:, None] * 0.02 + torch.arange(w)[None] * 0.03
        shift = (x * torch.linspace(0.5, 1.5, w, dtype=x.dtype)).mean(dim=(1, 2, 3))
        height = 20 + 2 * x.mean(dim=1) + 5 * shift[:, None, None] + place
        height = height.float()
        return height, (height / 7 + 1 if spread else None)


def whole_tile_model():
    return WholeTileModel(tiny_config())


def starts(size, tile, overlap, origin):
    """Tile starts along one axis, straight from the words of the design."""
    window = tile if size >= tile else -(-size // 32) * 32
    stride = tile - overlap
    found = set()
    for k in range((origin - 2 * tile) // stride, (origin + size) // stride + 2):
        nominal = k * stride - origin
        covers_first = nominal <= 0 < nominal + stride
        previous_ends_early = nominal > 0 and nominal - stride + tile < size
        if covers_first or previous_ends_early:
            found.add(min(max(nominal, 0), max(size - window, 0)))
    return sorted(found), window


def ramp(window, overlap):
    return [
        min(1.0, (i + 0.5) / overlap, (window - i - 0.5) / overlap) if overlap else 1.0
        for i in range(window)
    ]


def predict(model, image, valid, *, tile, overlap, origin=(0, 0), low=0.0, high=255.0):
    """Blend a plain loop over the tiles of one image (3, H, W); returns layers and tile count."""
    import torch

    _, rows, cols = image.shape
    ys, window_y = starts(rows, tile, overlap, origin[0])
    xs, window_x = starts(cols, tile, overlap, origin[1])
    weight = np.zeros((rows, cols))
    total = np.zeros((rows, cols))
    spread_total = np.zeros((rows, cols))
    covering = np.zeros((rows, cols), int)
    kept = []
    for y in ys:
        for x in xs:
            part = (slice(y, min(y + window_y, rows)), slice(x, min(x + window_x, cols)))
            if not valid[part].any():
                continue
            pixels = (image[(slice(None), *part)].astype(np.float64) - low) / (high - low)
            pixels = np.where(valid[part], (np.clip(pixels, 0, 1) - MEAN) / STD, 0)
            h, w = pixels.shape[1:]
            pad = [(0, 0), (0, window_y - h), (0, window_x - w)]
            pixels = np.pad(pixels, pad, mode="reflect").astype(np.float32)
            with torch.inference_mode():
                height, spread = model.height(torch.from_numpy(pixels)[None], spread=True)
            height, spread = height[0, :h, :w].numpy(), spread[0, :h, :w].numpy()
            blend = np.outer(ramp(window_y, overlap)[:h], ramp(window_x, overlap)[:w])
            kept.append((part, blend, height))
            weight[part] += blend
            total[part] += blend * height
            spread_total[part] += blend * spread
            covering[part] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / weight
        variance = np.zeros((rows, cols))
        for part, blend, height in kept:
            variance[part] += blend / weight[part] * (height - mean[part]) ** 2
        layers = {
            "height": np.where(valid, mean, np.nan),
            "bin_spread": np.where(valid, spread_total / weight, np.nan),
            "overlap_disagreement": np.where(valid & (covering > 1), np.sqrt(variance), np.nan),
        }
    return layers, len(kept)
