"""The rotation of keys by position (RoPE), the same bits on every machine: `pca.py` codes keys without it.

Pair i of a head turns by position * frequencies[i]. cos and sin are those of `turns`: a polynomial in float64, made of
additions and products, rounded to float32. A value then takes two products and an addition or a subtraction in float32,
each rounded by itself, never a fused one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]

# pi / 2 in three parts whose products with whole numbers under 2^20 are exact, and the rest.
_PARTS = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SIN = tuple((-1) ** k / float(np.prod(np.arange(1.0, 2 * k + 2))) for k in range(9))
_COS = tuple((-1) ** k / float(np.prod(np.arange(1.0, 2 * k + 1))) for k in range(9))


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of a head's first `2 * pairs` channels; those behind them do not turn.

    `frequencies`: float64 `[pairs]`, in radians a token. `halves`: pair i is channels (i, i + pairs), else
    (2 i, 2 i + 1). Rotated keys are `factor` times as long.
    """

    frequencies: _Doubles
    halves: bool
    factor: float = 1.0

    @property
    def pairs(self) -> int:
        """How many pairs turn."""
        return len(self.frequencies)

    def slices(self) -> tuple[slice, slice]:
        """The channels that are the first and the second of the pairs."""
        step = 1 if self.halves else 2
        return slice(0, step * self.pairs, step), slice(self.pairs if self.halves else 1, 2 * self.pairs, step)

    def factors(self, start: int, count: int, back: bool = False) -> tuple[Floats, Floats]:
        """cos and sin for `count` positions, float32 `[count, pairs]`, with the factor; `back`: to undo it."""
        cos, sin = turns(start, count, self.frequencies.tobytes())
        factor = np.float32(1 / self.factor if back else self.factor)
        return cos * factor, sin * (-factor if back else factor)

    def apply(self, rows: Floats, start: int, back: bool = False) -> None:
        """Turn float32 `[tokens, heads, width]` in place, the first token at position `start`; `back`: the inverse."""
        cos, sin = (one[:, None] for one in self.factors(start, len(rows), back))
        even, odd = self.slices()
        first, second = rows[..., even], rows[..., odd]
        turned = first * cos
        turned -= second * sin
        other = first * sin
        second *= cos
        second += other
        first[...] = turned


@functools.lru_cache(maxsize=64)
def turns(start: int, count: int, frequencies: bytes) -> tuple[Floats, Floats]:
    """cos and sin of position * frequency, float32 `[count, pairs]`, equal on every machine. Not to be written to."""
    angles = np.arange(start, start + count, dtype=np.float64)[:, None] * np.frombuffer(frequencies, np.float64)
    quarters = np.rint(angles * (2 / np.pi))
    x = angles
    for part in _PARTS:
        x = x - quarters * part
    square = x * x
    sin, cos = _horner(square, _SIN) * x, _horner(square, _COS)
    turn = quarters.astype(np.int64) & 3
    swapped = turn & 1 == 1
    s, c = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    return (
        np.where((turn == 1) | (turn == 2), -c, c).astype(np.float32),
        np.where(turn >= 2, -s, s).astype(np.float32),
    )


def _horner(x: np.ndarray[Any, Any], factors: tuple[float, ...]) -> np.ndarray[Any, Any]:
    total = np.full_like(x, factors[-1])
    for factor in reversed(factors[:-1]):
        total = total * x + factor
    return total
