"""The shift between two rasters: correlation of edges in windows, accepted only if certain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import dask
import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from xchmv2.errors import require_library

_Floats = npt.NDArray[np.float64]

# Edges look alike in any season; raw values do not. Width of the smoothing before them [px].
_EDGE_WIDTH = 1.5
#: Least share of that smoothing's weight on valid pixels for an edge to be known.
_LEAST_WEIGHT = 0.3
#: Least known share of a window of the reference, and of that which both know.
_LEAST_KNOWN, _LEAST_SHARED = 0.25, 0.4
#: Smallest side of a window, and the least search in which a best shift can be judged [px].
_LEAST_SIDE, _LEAST_SEARCH = 16, 8
#: The best shift is accepted if it stands this many NMAD above the median of all,
_LEAST_SIGNAL = 6.0
#: if the best of three of four sets of windows lie within this distance of it [px],
_PARTS, _LEAST_PARTS, _PART_DISTANCE = 4, 3, 1.5
#: and if it is this many times as high as any other that is farther away than this [px].
_LEAST_RATIO, _PEAK_RADIUS = 1.3, 4.0
#: Windows agree with the shift up to this difference, and tell of a rotation up to this [px].
_AGREEMENT, _REACH = 1.0, 6.0
_UPSAMPLING = 50
#: Largest shift that is looked for [px]; beyond it, two images are of different places.
FURTHEST = 1024.0
NO_REFERENCE = "the reference is NaN in all windows"
#: What to do about a rotation.
REGISTER = "register it with a rotation and a scale first, as by ground control points"
#: Displacement in the corners from which on rotation and scale matter [px]; how many of its
#: standard errors it must be; residual of a window that fits it [px]; and the most of it [1].
_LEAST_DISTORTION, _CERTAIN, _FIT, _MOST_SLOPE = 0.5, 5.0, 1.5, 0.1


@dataclass(frozen=True)
class Shift:
    """Displacement of one raster from another: the content at (r, c) is at (r + dy, c + dx) [px].

    `dy` and `dx` are NaN if none could be told, and `problem` then says why, and what to do. The
    others are as in the Dataset of :func:`~xchmv2.change.align`; `rotation` is NaN if the windows
    do not fit one.
    """

    dy: float = math.nan
    dx: float = math.nan
    spread: float = math.nan
    agreement: float = math.nan
    windows: int = 0
    signal: float = math.nan
    rotation: float = math.nan
    distortion: float = 0.0
    problem: str = ""

    @property
    def known(self) -> bool:
        """Whether a shift was found."""
        return math.isfinite(self.dy)


@dataclass(frozen=True)
class Windows:
    """Squares spread evenly over a scene: their `side`, and their first pixels, the `corners`.

    `margin`: how far beyond them the other raster is read [px].
    """

    side: int
    margin: int
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def spread_over(cls, shape: tuple[int, int], side: int, most: int, margin: int) -> Windows:
        """Lay at most about `most` windows over a scene, evenly and inside it."""
        side = min(side, *shape)
        longest = max(1, round(math.sqrt(most)))
        room = [min(longest, -(-size // side)) for size in shape]
        starts = [
            np.unique(np.linspace(0, size - side, n).round().astype(int))
            for size, n in zip(shape, room, strict=True)
        ]
        return cls(side, margin, tuple(product(*(line.tolist() for line in starts))))

    @classmethod
    def apart(cls, shape: tuple[int, int], side: int, most: int, search: int) -> Windows:
        """Lay windows that do not overlap, at least two along each axis, for a search [px].

        Four along the shorter axis if their sides can be 32 px, so that some may be lost. The
        search is at most a quarter of this axis.
        """
        side = max(1, min(side, max(min(shape) // 4, 2 * _LEAST_SIDE), min(shape) // 2))
        room = [size // side for size in shape]
        fewer = min(round(math.sqrt(most)), *room)
        starts = [
            np.linspace(0, size - side, min(n, most // fewer)).astype(int)
            for size, n in zip(shape, room, strict=True)
        ]
        margin = min(max(search, _LEAST_SEARCH), min(shape) // 4)
        return cls(side, margin, tuple(product(*(line.tolist() for line in starts))))

    def cut(self, plane: Any) -> list[Any]:
        """Cut the windows with their margins, where inside the scene; lazily from dask."""
        return [plane[self._reach(plane.shape, corner)] for corner in self.corners]

    def padded(self, patches: list[npt.NDArray[Any]], shape: tuple[int, int]) -> list[_Floats]:
        """Pad patches from :meth:`cut` with NaN where they reach beyond the scene."""
        padded = []
        for patch, corner in zip(patches, self.corners, strict=True):
            beyond = [
                (s.start - (c - self.margin), c + self.side + self.margin - s.stop)
                for s, c in zip(self._reach(shape, corner), corner, strict=True)
            ]
            padded.append(np.pad(patch.astype(float), beyond, constant_values=np.nan))
        return padded

    def inner(self, patch: _Floats, dy: int = 0, dx: int = 0) -> _Floats:
        """Cut the square from a padded patch, moved by some pixels."""
        row, col = self.margin + dy, self.margin + dx
        return patch[row : row + self.side, col : col + self.side]

    def _reach(self, shape: tuple[int, ...], corner: tuple[int, int]) -> tuple[slice, ...]:
        return tuple(
            slice(max(0, c - self.margin), min(size, c + self.side + self.margin))
            for c, size in zip(corner, shape, strict=True)
        )


class _Look(NamedTuple):
    """What a window shows, NaN where unknown; spectra of the known pixels, values and squares."""

    values: _Floats
    spectra: tuple[npt.NDArray[np.complex128], ...]


def find_shifts(
    reference: Any,
    rasters: Sequence[Any],
    *,
    max_shift: float,
    window: int = 128,
    windows: int = 36,
    edges: bool = True,
) -> list[Shift]:
    """Find the shift of each raster (y, x) from a reference (y, x) of the same shape.

    numpy or dask, NaN where missing, by the method of :func:`~xchmv2.change.align`; compared are
    edges, or with ``edges=False`` the values. The smoothing before edges is normalised by the
    weight of the valid pixels (Knutsson and Westin 1993, Computer Vision and Pattern Recognition,
    515), so that scattered gaps do not matter. Averaged are the Fisher transforms of correlations,
    weighted by the number of pixels. For the fraction of a pixel the windows are cut again at the
    best shift, and weighted by the first correlations. Rotation and scale are fitted to the shifts
    of the single windows by repeated medians.
    """
    require_library("skimage", "estimates the shifts", "change")
    shape = (reference.shape[0], reference.shape[1])
    laid = Windows.apart(shape, window, windows, math.ceil(max_shift) + 1)
    if laid.side < _LEAST_SIDE:
        few = f"{shape[0]} x {shape[1]} px are too few to tell a shift"
        problem = f"{few}; take an area of at least {2 * _LEAST_SIDE} x {2 * _LEAST_SIDE} px"
        return [Shift(problem=problem)] * len(rasters)
    show = _edges if edges else np.asarray
    cut = dask.compute(*(laid.cut(plane) for plane in (reference, *rasters)))
    padded = laid.padded(cut[0], shape)
    if not any(np.isfinite(patch).any() for patch in padded):
        return [Shift(problem=NO_REFERENCE)] * len(rasters)
    still = [_look(laid.inner(show(patch)), laid) for patch in padded]
    return [
        _find_shift(still, [show(p) for p in laid.padded(patches, shape)], laid, shape, max_shift)
        for patches in cut[1:]
    ]


def _find_shift(
    still: Sequence[_Look | None],
    patches: Sequence[_Floats],
    laid: Windows,
    shape: tuple[int, int],
    max_shift: float,
) -> Shift:
    """Find the shift of one raster, from what its windows show with their margins."""
    pairs, centres, surfaces, weights = [], [], [], []
    for corner, here, patch in zip(laid.corners, still, patches, strict=True):
        there = None if here is None else _look(patch, laid)
        if here is None or there is None:
            continue
        surface, shared = _correlate(here, there, laid)
        if shared.any():
            pairs.append((here.values, there.values))
            centres.append([c + (laid.side - n) / 2 for c, n in zip(corner, shape, strict=True)])
            surfaces.append(surface)
            weights.append(shared)
    count = len(pairs)
    if count < _PARTS:
        smaller = max(_LEAST_SIDE, laid.side // 2)
        fix = f"pass window={smaller}" if smaller < laid.side else "take a larger area"
        problem = f"only {count} of {len(laid.corners)} windows hold edges on both; {fix}"
        return Shift(windows=count, problem=problem)
    stack, shares, middles = np.array(surfaces), np.array(weights), np.array(centres)
    coarse, signal, problem = _judge(stack, shares, laid, max_shift)
    known = np.where(shares > 0, stack, np.nan)
    first = np.array([_peak(surface) for surface in known]) - laid.margin
    if problem:
        refused = Shift(agreement=0.0, windows=count, signal=signal, problem=problem)
        rotation, distortion, _ = _fit_similarity(middles, first, shape)
        if not distortion:
            return refused
        problem = f"it is turned by about {rotation:.1f} degrees, or scaled; {REGISTER}"
        return replace(refused, rotation=rotation, distortion=distortion, problem=problem)
    place = np.rint(coarse).astype(int)
    spectra = np.array([_cross_spectrum(*pair, laid, place) for pair in pairs])
    gain = np.maximum(stack[:, *(place + laid.margin)], 0)
    shift = place + _refine(np.tensordot(gain, spectra, 1))
    if np.abs(shift - coarse).max() > _PART_DISTANCE:
        shift = coarse
    found = place + np.array([_refine(spectrum) for spectrum in spectra])
    # A window that fades out before its only edges has been seen in the first look.
    lost = np.abs(found - shift).max(axis=1) > _REACH
    found[lost] = first[lost]
    near = np.abs(found - shift).max(axis=1) <= _REACH
    rotation, distortion, centre = _fit_similarity(middles[near], found[near], shape)
    if distortion:
        shift = centre
    apart = np.abs(found - shift)
    agree = apart.max(axis=1) <= _AGREEMENT
    spread = 1.4826 * np.median(apart[agree], axis=0).max() if agree.any() else math.nan
    dy, dx = shift.tolist()
    return Shift(dy, dx, float(spread), float(agree.mean()), count, signal, rotation, distortion)


def smooth(values: _Floats, width: float) -> tuple[_Floats, _Floats]:
    """Smooth by a Gaussian of a width [px] over the valid pixels; returns also their weight."""
    valid = np.isfinite(values)
    middle = float(np.median(values[valid])) if valid.any() else 0.0
    weight = ndimage.gaussian_filter(valid.astype(np.float64), width)
    total = ndimage.gaussian_filter(np.where(valid, values - middle, 0).astype(np.float64), width)
    return middle + total / np.maximum(weight, 1e-6), weight


def _edges(patch: _Floats) -> _Floats:
    """Return the magnitude of the gradient, NaN where too few pixels around are valid."""
    smoothed, weight = smooth(patch, _EDGE_WIDTH)
    return np.where(weight >= _LEAST_WEIGHT, np.hypot(*np.gradient(smoothed)), np.nan)


def _look(values: _Floats, laid: Windows) -> _Look | None:
    """Centre and scale what a window shows; None if too little of it is known or it is flat."""
    known = np.isfinite(values)
    if known.sum() < _LEAST_KNOWN * laid.side**2:
        return None
    filled = np.where(known, values - values[known].mean(), 0)
    scale = filled[known].std()
    if scale <= 1e-9 * np.abs(values[known]).max():
        return None
    filled /= scale
    planes = known.astype(np.float64), filled, filled**2
    spectra = tuple(fft.rfft2(plane, _fft_size(laid)) for plane in planes)
    return _Look(np.where(known, filled, np.nan), spectra)


def _fft_size(laid: Windows) -> tuple[int, int]:
    side = fft.next_fast_len(laid.side + 2 * laid.margin, real=True)
    return side, side


def _correlate(here: _Look, there: _Look, laid: Windows) -> tuple[_Floats, _Floats]:
    """Correlate a window with every place of a larger one, over the pixels that both know.

    Returns the Fisher transforms of the correlations and the numbers of shared pixels, both
    (2 margin + 1)^2, and 0 where these are too few or do not vary.
    """
    n = 2 * laid.margin + 1
    size = _fft_size(laid)

    def cross(a: int, b: int) -> _Floats:
        return np.asarray(fft.irfft2(there.spectra[a] * here.spectra[b].conj(), size)[:n, :n])

    count = np.maximum(cross(0, 0), 0.5)
    sums = cross(0, 1), cross(1, 0)
    spread = cross(0, 2) - sums[0] ** 2 / count, cross(2, 0) - sums[1] ** 2 / count
    usable = (count >= _LEAST_SHARED * laid.side**2) & (np.minimum(*spread) > 1e-6 * count)
    both = np.sqrt(np.where(usable, spread[0] * spread[1], 1))
    r = np.where(usable, (cross(1, 1) - sums[0] * sums[1] / count) / both, 0)
    return np.arctanh(np.clip(r, -0.99, 0.99)), np.where(usable, count, 0)


def _judge(
    surfaces: _Floats, shared: _Floats, laid: Windows, max_shift: float
) -> tuple[_Floats, float, str]:
    """Return the best shift of all windows, its signal, and why it is not accepted, or ''."""
    total = _average(surfaces, shared)
    peak = _peak(total)
    shift = peak - laid.margin
    rows, cols = np.indices(total.shape)
    away = np.hypot(rows - peak[0], cols - peak[1]) > _PEAK_RADIUS
    others = total[away & np.isfinite(total)]
    others = others if len(others) else np.array([math.nan])
    middle = float(np.median(others))
    noise = max(1.4826 * float(np.median(np.abs(others - middle))), 1e-9)
    height = float(np.nanmax(total)) - middle
    signal = height / noise
    parts = [_peak(_average(surfaces[k::_PARTS], shared[k::_PARTS])) for k in range(_PARTS)]
    near = sum(bool(np.hypot(*(part - peak)) <= _PART_DISTANCE) for part in parts)
    second = float(others.max()) - middle
    failed = []
    if not signal >= _LEAST_SIGNAL:
        failed.append(
            f"the best shift stands {signal:.1f} NMAD above all, {_LEAST_SIGNAL:g} needed"
        )
    if near < _LEAST_PARTS:
        failed.append(f"{near} of {_PARTS} parts of the scene agree on it, {_LEAST_PARTS} needed")
    if not height >= _LEAST_RATIO * second:
        failed.append("another is nearly as good, as with rows of trees")
    wider = laid.margin > max_shift  # the scene does not limit the search
    more = f"pass max_shift={min(2 * max_shift, FURTHEST):g}"
    if failed:
        fix = "take a larger area" + (f", or {more}" if wider else "")
        return shift, signal, f"{', '.join(failed)}; check that both show the same ground, {fix}"
    limit = min(max_shift + 0.5, laid.margin - 0.5)
    if np.abs(shift).max() > limit:
        fix = f"; {more}" if wider else ", a quarter of the scene; take a larger area"
        found = f"({round(shift[0])}, {round(shift[1])}) px, is beyond {limit:.0f} px"
        return shift, signal, f"the best shift, of {found}{fix}"
    return shift, signal, ""


def _average(surfaces: _Floats, shared: _Floats) -> _Floats:
    """Average the surfaces of windows by their shared pixels, NaN where these are few."""
    weight = shared.sum(axis=0)
    enough = weight >= max(1, _LEAST_SHARED * weight.max())
    return np.where(enough, (surfaces * shared).sum(axis=0) / np.maximum(weight, 1), np.nan)


def _peak(surface: _Floats) -> _Floats:
    """Return the highest place, to a fraction by parabolas through its neighbours."""
    if not np.isfinite(surface).any():
        return np.full(2, np.inf)
    place = np.unravel_index(np.nanargmax(surface), surface.shape)
    peak = np.array(place, np.float64)
    for axis in range(2):
        line = np.take(surface, place[1 - axis], axis=1 - axis)
        around = line[max(0, place[axis] - 1) : place[axis] + 2]
        if len(around) == 3 and np.isfinite(around).all():
            low, top, high = around
            bend = low - 2 * top + high
            peak[axis] += 0.5 * (low - high) / bend if bend < 0 else 0
    return peak


def _cross_spectrum(
    here: _Floats, there: _Floats, laid: Windows, step: npt.NDArray[np.intp]
) -> npt.NDArray[np.complex128]:
    """Return the cross-spectrum of a window and the other one moved, fading out at the rim."""
    there = laid.inner(there, *step)
    known = np.isfinite(here) & np.isfinite(there)
    fade = np.hanning(laid.side + 2)[1:-1]
    taper = np.multiply.outer(fade, fade) * known
    filled = np.where(known, (here, there), 0)
    means = (filled * taper).sum(axis=(1, 2), keepdims=True) / max(float(taper.sum()), 1e-9)
    faded = fft.fft2((filled - means) * taper)
    return np.asarray(faded[0] * faded[1].conj())


def _refine(spectrum: npt.NDArray[np.complex128]) -> _Floats:
    """Return the shift that a cross-spectrum tells, to 1/50 px; infinite if it is empty."""
    from skimage.registration import phase_cross_correlation

    if not spectrum.any():
        return np.full(2, np.inf)
    options = {"space": "fourier", "upsample_factor": _UPSAMPLING, "normalization": None}
    back, _, _ = phase_cross_correlation(spectrum, np.ones_like(spectrum), **options)
    return -np.asarray(back, np.float64)


def _fit_similarity(
    centres: _Floats, shifts: _Floats, shape: tuple[int, int]
) -> tuple[float, float, _Floats]:
    """Fit a rotation, a scale and a shift to windows by repeated medians, then least squares.

    Returns the angle [degree], NaN unless half of the windows fit; the displacement in the corners
    [px], 0 if it is uncertain or small; and the shift in the middle of the scene [px].
    """
    nothing = math.nan, 0.0, np.full(2, math.nan)
    if len(shifts) < _PARTS:
        return nothing
    place, shift = (points[:, 0] + 1j * points[:, 1] for points in (centres, shifts))
    run = place[:, None] - place
    np.fill_diagonal(run, 1)
    slopes = (shift[:, None] - shift) / run
    np.fill_diagonal(slopes, np.nan)
    slope = _median(_median(slopes, axis=1))
    rest = shift - slope * place
    fits = np.abs(rest - _median(rest)) <= _FIT
    if fits.sum() < max(_PARTS, len(shifts) / 2):
        return nothing
    place, shift = place[fits], shift[fits]
    away = place - place.mean()
    energy = float((np.abs(away) ** 2).sum())
    slope = complex((away.conj() * shift).sum() / energy)
    rest = shift - shift.mean() - slope * away
    error = math.sqrt(float((np.abs(rest) ** 2).sum()) / (len(shift) - 2) / energy)
    middle = complex(shift.mean() - slope * place.mean())
    corner = abs(slope) * math.hypot(*shape) / 2
    certain = corner >= _LEAST_DISTORTION and _CERTAIN * error < abs(slope) < _MOST_SLOPE
    angle = math.degrees(slope.imag)
    return angle, corner if certain else 0.0, np.array([middle.real, middle.imag])


def _median(points: npt.NDArray[np.complex128], axis: int | None = None) -> Any:
    """Return the medians of the real and the imaginary parts, without NaN."""
    return np.nanmedian(points.real, axis=axis) + 1j * np.nanmedian(points.imag, axis=axis)
