"""Lloyd-Max codebooks: the levels of least squared error for one coordinate of a random unit vector.

In dimension d such a coordinate has density (1 - t^2)^((d-3)/2), times a constant. Levels are in units of 1/sqrt(d),
where the limit for large d is the standard normal density, and they are whole multiples of 2^-16: what the iteration
or libm lose in the last digits never shows, and levels and the boundaries half-way between them are exact in float32.
`d = 0` names the normal limit. Golden values: tests/golden/codebooks.json.

Levels are symmetric. With k positive boundaries below |z| the code of a value z is half + k, or half - 1 - k for z < 0,
where half is the number of positive levels. One comparison finds k: |z| falls into a bin of width 2^-7, which holds
one boundary at the most; `base` counts the boundaries below the bin.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

BITS_MAX = 8
UNIT = 1 << 16
BINS_PER_UNIT = 128
BINS = 1024
_REACH = 12.0  # the density beyond is under 1e-31
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Codebook:
    """`levels` float32 `[2^bits]`, rising; `base` uint8 and `bound` float32 `[BINS]`, see the module docstring.

    `boundaries`: float32 `[half - 1]`, the positive ones.
    """

    levels: npt.NDArray[np.float32]
    base: npt.NDArray[np.uint8]
    bound: npt.NDArray[np.float32]
    boundaries: npt.NDArray[np.float32]


@functools.lru_cache(maxsize=128)
def codebook(dim: int, bits: int) -> Codebook:
    """The codebook of 1 to 8 bits for dimension `dim` >= 8, or 0 for the normal limit."""
    assert 1 <= bits <= BITS_MAX and (dim == 0 or dim >= 8)
    half = np.round(_lloyd_max(dim, 1 << (bits - 1)) * UNIT)
    levels = (np.concatenate([-half[::-1], half]) / UNIT).astype(np.float32)
    boundaries = ((half[1:] + half[:-1]) / (2 * UNIT)).astype(np.float32)
    bins = np.floor(boundaries * BINS_PER_UNIT).astype(np.int64)
    assert (np.diff(bins) > 0).all() and (bins < BINS).all()
    bound = np.full(BINS, np.inf, np.float32)
    bound[bins] = boundaries
    base = np.searchsorted(bins, np.arange(BINS), side="left").astype(np.uint8)
    return Codebook(levels, base, bound, boundaries)


def _lloyd_max(dim: int, n: int) -> Doubles:
    """The `n` positive levels. Newton's method on "every level is the mean of its cell": its convergence is quadratic,
    where Lloyd's own iteration takes 10^5 steps for 128 levels."""
    reach = min(np.sqrt(dim), _REACH) if dim else _REACH
    levels = _companded(dim, n)
    for _ in range(100):
        edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [reach]])
        mass = _mass(dim, edges)
        means = -np.diff(_moment(dim, edges)) / mass
        step = means - levels
        density = _density(dim, edges)
        upper = density[1:] * (edges[1:] - means) / mass / 2  # how a mean follows its upper edge, and an edge a level
        lower = density[:-1] * (means - edges[:-1]) / mass / 2
        upper[-1] = lower[0] = 0.0  # the outer edges do not move
        levels = levels + _solve_tridiagonal(-lower, 1.0 - lower - upper, -upper, step)
        if np.abs(step).max() < 1e-11:
            break
    return levels


def _companded(dim: int, n: int) -> Doubles:
    """A start: quantiles of the cube root of the density, which is right for many levels."""
    grid = np.linspace(0.0, min(np.sqrt(dim), _REACH) if dim else _REACH, 1 << 14)
    total = np.cumsum(np.cbrt(_density(dim, grid)))
    levels: Doubles = np.interp((np.arange(n) + 0.5) / n * total[-1], total, grid)
    return levels


def _density(dim: int, x: Doubles) -> Doubles:
    """Not normalized; 1 at 0."""
    if not dim:
        return np.exp(-x * x / 2)
    inside = np.maximum(1.0 - x * x / dim, 0.0)
    density: Doubles = inside ** ((dim - 3) / 2)
    return density


def _moment(dim: int, x: Doubles) -> Doubles:
    """The integral of x * density from x to the end of its support."""
    if not dim:
        return np.exp(-x * x / 2)
    moment: Doubles = np.maximum(1.0 - x * x / dim, 0.0) ** ((dim - 1) / 2) * dim / (dim - 1)
    return moment


def _mass(dim: int, edges: Doubles) -> Doubles:
    """The integral of the density over each cell, by Gauss-Legendre quadrature."""
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    mass: Doubles = (_density(dim, middle[:, None] + half[:, None] * _NODES) * _WEIGHTS).sum(-1) * half
    return mass


def _solve_tridiagonal(lower: Doubles, diagonal: Doubles, upper: Doubles, right: Doubles) -> Doubles:
    """x with lower[i] x[i-1] + diagonal[i] x[i] + upper[i] x[i+1] = right[i]."""
    n = len(right)
    above, x = np.zeros(n), np.zeros(n)
    for i in range(n):
        before = (above[i - 1], x[i - 1]) if i else (0.0, 0.0)
        pivot = diagonal[i] - lower[i] * before[0]
        above[i] = upper[i] / pivot
        x[i] = (right[i] - lower[i] * before[1]) / pivot
    for i in range(n - 2, -1, -1):
        x[i] -= above[i] * x[i + 1]
    return x
