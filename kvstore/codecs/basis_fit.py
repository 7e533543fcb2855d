"""Makes the basis of `basis.py` out of a model's KV: sums over calibration text, components, and steps. numpy only.

Errors should count as they do in attention. So keys are taken without their rotation, and each pair of channels is
weighted by the energy of the queries that read it; values are weighted by W' W of the output projection of the query
heads that read them, the full matrix. The components are the principal ones of the weighted rows.

Steps are chosen by a Lagrangian: measured KL and bits of every part alone, at a few steps; then the least sum of KL at
the bits asked. Rejected, since they gave nothing: dead zones, metrics averaged over positions, more than 6,000 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.basis import BASIS_MAX, PartBasis, group_width
from kvstore.codecs.rope import Rope

Array = npt.NDArray[Any]

# Added to the diagonal of a weight, in parts of itself: large channels must change nothing for the others.
RIDGE = 1e-3
# Steps that are measured, in units of the root mean square of a part's components.
GRID = np.array([0.1, 0.2, 0.4, 0.8, 1.4, 2.4])
_FINE = 60


@dataclass
class Moments:
    """Sums over the rows of one part, `[tokens, heads, width]` without rotation, by group of channels.

    A calibration of any length takes the memory of the matrices. One thread.
    """

    heads: int
    width: int
    count: int = 0
    total: Array = field(init=False)
    squares: Array = field(init=False)

    def __post_init__(self) -> None:
        size = group_width(self.heads, self.width)
        groups = self.heads * self.width // size
        self.total, self.squares = np.zeros((groups, size)), np.zeros((groups, size, size))

    def add(self, rows: Array) -> None:
        """Count more rows `[tokens, heads, width]`, of any float dtype; summed in float64."""
        wide = rows.reshape(len(rows), *self.total.shape).astype(np.float64).transpose(1, 0, 2)
        self.count += len(rows)
        self.total += wide.sum(1)
        self.squares += wide.transpose(0, 2, 1) @ wide

    @property
    def mean(self) -> Array:
        """Mean row `[groups, width of a group]`."""
        mean: Array = self.total / self.count
        return mean

    @property
    def covariance(self) -> Array:
        """Of the rows, by group."""
        mean = self.mean
        covariance: Array = self.squares / self.count - mean[:, :, None] * mean[:, None, :]
        return covariance


@dataclass(frozen=True)
class Fitted:
    """The basis of a part with one step, 1, and the root mean square of its components, the unit of steps."""

    part: PartBasis
    unit: float


def fit_part(moments: Moments, weights: Array | None = None, rope: Rope | None = None) -> Fitted:
    """The principal components. `weights`: `[groups, size, size]`, symmetric and not negative; None: all alike."""
    matrices, scales, energies = [], [], []
    for group, covariance in enumerate(moments.covariance):
        root, inverse = _roots(np.eye(len(covariance)) if weights is None else weights[group])
        energy, components = np.linalg.eigh(root @ covariance @ root)
        back = components[:, ::-1].T @ inverse
        scale = np.maximum(np.abs(back).max(0) / BASIS_MAX, np.finfo(np.float32).tiny).astype(np.float32)
        matrices.append(np.rint(back / scale).clip(-BASIS_MAX, BASIS_MAX).astype(np.int16))
        scales.append(scale)
        energies.append(energy.clip(0))
    part = PartBasis(
        moments.heads,
        moments.width,
        np.stack(matrices),
        np.concatenate(scales),
        moments.mean.reshape(-1).astype(np.float32),
        np.ones(1, np.float32),
        rope,
    )
    return Fitted(part, float(np.sqrt(np.mean(energies))) or 1.0)


def _roots(weight: Array) -> tuple[Array, Array]:
    """The symmetric root of a weight and its inverse, after a ridge that is relative to the diagonal."""
    own = np.diag(weight)
    ridged = weight + np.diag(RIDGE * own + 1e-9 * max(float(own.max()), 1e-30))
    sizes, axes = np.linalg.eigh(ridged)
    sizes = np.maximum(sizes, 1e-12 * sizes[-1])
    return (axes * np.sqrt(sizes)) @ axes.T, (axes / np.sqrt(sizes)) @ axes.T


def key_weights(energy: Array, rope: Rope | None) -> Array:
    """Weights of keys by the energy `[heads, width]` of the queries that read them: pairs that turn share theirs."""
    heads, width = energy.shape
    shared = energy.copy()
    if rope is not None:
        even, odd = rope.slices()
        shared[:, even] = shared[:, odd] = energy[:, even] + energy[:, odd]
    size = group_width(heads, width)
    return np.stack([np.diag(row) for row in shared.reshape(-1, size)])


def value_weights(by_head: Array) -> Array:
    """Weights of values by W' W `[heads, width, width]` of the query heads that read each head, summed."""
    heads, width, _ = by_head.shape
    size = group_width(heads, width)
    together = max(1, size // width)
    weights = np.zeros((heads * width // size, size, size))
    for group, weight in enumerate(weights):
        if size < width:  # a part of one head
            head, at = divmod(group * size, width)
            weight[...] = by_head[head, at : at + size, at : at + size]
            continue
        for place in range(together):
            span = slice(place * width, (place + 1) * width)
            weight[span, span] = by_head[group * together + place]
    return weights


def cheapest_steps(kl: Array, bits: Array, bits_asked: float) -> Array:
    """Steps in units, one for each part, of the least sum of KL that takes `bits_asked` in sum.

    `kl`, `bits`: `[parts, len(GRID)]`, of each part alone; the curves between measured steps are straight in the
    logarithms of step and KL.
    """
    units = np.geomspace(GRID[0], GRID[-1], _FINE)
    curve = np.exp(_between(np.log(np.maximum(kl, 1e-9)), units))
    taken = _between(bits, units)
    low, high = 1e-9, 1e3
    chosen = np.zeros(len(kl), np.int64)
    for _ in range(80):
        price = (low * high) ** 0.5
        chosen = (curve + price * taken).argmin(-1)
        low, high = (price, high) if np.take_along_axis(taken, chosen[:, None], 1).sum() > bits_asked else (low, price)
    return units[chosen]


def _between(curves: Array, units: Sequence[float] | Array) -> Array:
    """Curves over GRID at other units."""
    return np.stack([np.interp(np.log(units), np.log(GRID), curve) for curve in curves])
