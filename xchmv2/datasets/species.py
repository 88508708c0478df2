"""Tree species: how tall at which age, how wide at which height, what shape and what colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xchmv2.datasets.noise import Floats


@dataclass(frozen=True)
class Species:
    """One species, or a group that looks alike from above.

    Parameters
    ----------
    name : str
        Common name.
    conifer : bool
        Evergreen, pointed and even, rather than deciduous, domed and lumpy.
    tallest, rate, shape : float
        Chapman-Richards growth: height = tallest * (1 - exp(-rate * age)) ** shape [m, 1/year].
    radius, slenderness : float
        Crown radius = radius + slenderness * height [m].
    depth : float
        How far the crown surface falls from top to rim, as a share of the height.
    profile : float
        Exponent of that fall over the distance from the stem: 1 a cone, 2 and more a dome.
    colour, autumn : tuple of float
        Red, green and blue of sunlit foliage in summer and in autumn (8-bit values).
    """

    name: str
    conifer: bool
    tallest: float
    rate: float
    shape: float
    radius: float
    slenderness: float
    depth: float
    profile: float
    colour: tuple[float, float, float]
    autumn: tuple[float, float, float]


SPECIES = (
    Species("spruce", True, 38, 0.026, 1.6, 0.60, 0.068, 0.58, 1.0, (101, 113, 75), (101, 112, 75)),
    Species("fir", True, 41, 0.023, 1.7, 0.65, 0.074, 0.52, 1.1, (94, 110, 85), (94, 109, 85)),
    Species("pine", True, 30, 0.034, 1.3, 0.75, 0.092, 0.36, 1.5, (112, 124, 90), (114, 122, 90)),
    Species("beech", False, 36, 0.023, 1.4, 0.80, 0.148, 0.40, 2.3, (120, 148, 82), (176, 134, 84)),
    Species("oak", False, 30, 0.022, 1.2, 0.90, 0.172, 0.42, 2.6, (130, 146, 88), (162, 128, 82)),
    Species(
        "birch", False, 25, 0.045, 1.2, 0.60, 0.118, 0.46, 1.9, (142, 162, 102), (206, 180, 88)
    ),
)
N_CONIFERS = sum(s.conifer for s in SPECIES)  # conifers come first


def parameters(name: str) -> npt.NDArray[np.float64]:
    """Return one parameter of every species, in the order of `SPECIES`."""
    return np.array([getattr(s, name) for s in SPECIES], np.float64)


def growth_height(species: npt.NDArray[np.intp], age: Floats) -> Floats:
    """Return the height of a dominant tree.

    Parameters
    ----------
    species : ndarray of int, shape (n,)
        Index into `SPECIES`.
    age : ndarray of float64, shape (n,)
        Years; not yet born below 0.

    Returns
    -------
    ndarray of float64, shape (n,)
        Height [m].

    References
    ----------
    Chapman-Richards: Richards (1959), J. Exp. Bot. 10, 290-300.
    """
    grown = 1.0 - np.exp(-parameters("rate")[species] * np.maximum(age, 0.0))
    return np.asarray(parameters("tallest")[species] * grown ** parameters("shape")[species])


def crown_radius(species: npt.NDArray[np.intp], height: Floats) -> Floats:
    """Return the crown radius [m] of trees of a height [m]: the allometry of each species."""
    return np.asarray(parameters("radius")[species] + parameters("slenderness")[species] * height)
