"""What a small sample of pixels tells about imagery: its value range, and the order of its bands.

Neither is ever applied: a range is proposed, and an order that the colours contradict is told.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import xarray as xr

#: Mean red, green and blue of the images that the model was trained on, from 0 to 1.
TRAINED_COLOUR = (0.420, 0.411, 0.296)

_FEWEST = 64 * 64  # pixels that tell anything of a scene
_MOST = 128 * 128  # pixels of one window that are looked at
_SIDE = 128  # of the five windows of a sample [px]
_PLACES = ((1 / 2, 1 / 2), (1 / 6, 1 / 6), (1 / 6, 5 / 6), (5 / 6, 1 / 6), (5 / 6, 5 / 6))
_STEPS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


def sample_windows(planes: Sequence[xr.DataArray]) -> list[list[npt.NDArray[Any]]]:
    """Read five windows of 128 px, at the centre and towards the corners, of the middle date.

    Of `planes` (..., y, x) of one shape; each window holds (height, width) of every plane. At most
    five chunks of each are read.
    """
    shape = planes[0].shape
    middle = tuple(size // 2 for size in shape[:-2])
    starts = dict.fromkeys(
        tuple(
            max(0, min(int(size * share) - _SIDE // 2, size - _SIDE))
            for size, share in zip(shape[-2:], place, strict=True)
        )
        for place in _PLACES
    )
    places = [tuple(slice(start, start + _SIDE) for start in corner) for corner in starts]
    windows = [[plane[(*middle, *where)].data for plane in planes] for where in places]
    found: list[list[npt.NDArray[Any]]] = dask.compute(windows)[0]
    return [[np.asarray(part) for part in window] for window in found]


def find_range(values: npt.NDArray[Any]) -> tuple[float, float] | None:
    """Propose the values of black and white from valid pixels; None where they tell none.

    0 to 255 where the sample is 8-bit values in a wider type. Else from the 0.5 % quantile, or from
    0 where that is below a fifth of the range, to the 99.5 % quantile, both rounded outwards to one
    or two digits.
    """
    known = values[np.isfinite(values)].astype(float)
    if known.size == 0 or known.min() == known.max():
        return None
    low, high = (float(value) for value in np.quantile(known, (0.005, 0.995)))
    most = float(known.max())
    whole = bool((known == np.round(known)).all())
    if known.min() >= 0 and (100 < most <= 255 or (whole and 1 < most <= 255)):
        return 0.0, 255.0
    high = _rounded(high if high > low else most, up=True)
    # Dark pixels near 0 are black, and slightly negative reflectance is noise.
    return (_rounded(low, up=False) if abs(low) > 0.2 * abs(high) else 0.0), high


def looks_exchanged(pixels: npt.NDArray[Any]) -> bool:
    """Tell whether the colours fit the training data much better with red and blue exchanged.

    `pixels` (3, N) are valid pixels of the bands read as red, green and blue, scaled to 0 to 1.
    False where it is not clear, and for fewer than 4096 pixels.

    The shares of red, green and blue in the mean colour are compared with those in training, by the
    sum of absolute differences. As exchanged count bands that then fit within 0.08, at least three
    times better than as given, and by 0.15 or more; or better by 0.04, while bright pixels are
    bluer than dark ones (correlation of brightness with (red - blue) / brightness below -0.3).
    Skylight makes shadow blue on every land surface, and only exchanged bands turn that round: in
    the first case too, bright pixels must not be redder (above 0.2). So neither water nor snow,
    haze or shadow counts. A surface that hardly varies (by under a tenth) tells nothing.
    """
    brightness = pixels.sum(axis=0, dtype=float)
    known = brightness > 0
    if known.sum() < _FEWEST or brightness[known].std() < 0.1 * brightness[known].mean():
        return False
    colour = pixels.mean(axis=1, dtype=float)
    shares, trained = colour / colour.sum(), np.asarray(TRAINED_COLOUR) / sum(TRAINED_COLOUR)
    given, exchanged = (float(abs(c - trained).sum()) for c in (shares, shares[::-1]))
    warmth = (pixels[0, known] - pixels[2, known]) / brightness[known]
    if warmth.std() == 0:
        return False
    redder = float(np.corrcoef(brightness[known], warmth)[0, 1])
    if exchanged < 0.08 and given > max(0.15, 3 * exchanged):
        return redder < 0.2
    return given - exchanged > 0.04 and redder < -0.3


def advise_order(labels: Sequence[Hashable]) -> str:
    """Write that bands read as red, green and blue look like blue, green and red."""
    given, other = tuple(labels), tuple(labels[::-1])
    return (
        f"the bands {given!r} are read as red, green and blue, but the colours fit the model's "
        f"training data much better as {other!r}; if that is their order, pass bands={other!r}; "
        "if not, name them: imagery.assign_coords(band=['red', 'green', 'blue']), or rename(...)"
    )


def take_pixels(
    bands: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    low: Sequence[float],
    high: Sequence[float],
) -> npt.NDArray[np.float32]:
    """Take every n-th pixel of a window (3, H, W), some 16,000 at most, scaled to 0 to 1.

    `low` and `high` are the values of black and white in each band. Returns the valid ones, (3, N).
    """
    step = max(1, math.ceil(math.sqrt(valid.size / _MOST)))
    seen = valid[::step, ::step]
    pixels = bands[:, ::step, ::step][:, seen].astype(np.float32)
    black, white = (np.asarray(ends, np.float32)[:, None] for ends in (low, high))
    scaled: npt.NDArray[np.float32] = np.clip((pixels - black) / (white - black), 0, 1)
    return scaled


def _rounded(value: float, *, up: bool) -> float:
    """Round to 1, 1.2, 1.5, 2, 2.5, 3, ... times a power of ten, upwards or downwards."""
    if value == 0:
        return 0.0
    if value < 0:
        return -_rounded(-value, up=not up)
    scale = 10.0 ** math.floor(math.log10(value))
    steps = [step * scale for step in _STEPS]
    if up:
        return float(f"{min(s for s in steps if s >= value * (1 - 1e-9)):.3g}")
    return float(f"{max(s for s in steps if s <= value * (1 + 1e-9)):.3g}")
