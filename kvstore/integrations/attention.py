"""What the attention of an mlx-lm model says of its KV: how keys turn, which queries read them, what values become.

Used by a calibration only (`basis_maker.py`). A wrong answer costs bits, never a wrong hit. Where the attention of a
model is of another kind (several axes of positions, latents, no `rope`, no `o_proj`), the answer is None, and its KV is
coded without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvstore.codecs.rope import Rope
from kvstore.core.layers import LayerSpec, PartSpec

Array = npt.NDArray[Any]

OUTPUTS = ("o_proj", "out_proj", "wo", "dense")
# Offsets at which the angles of a rotation are measured, each good enough to count the turns up to the next.
_OFFSETS = (1, 8, 64, 512)
_CHECKED = (3, 100, 1000, 3000)
TOLERANCE = 0.02


def attentions(model: Any, n_layers: int) -> list[Any]:
    """The attention module of each layer: the child that rotates or projects; None where there is no such one."""
    layers = list(getattr(model, "layers", ()))
    if len(layers) != n_layers:
        return [None] * n_layers
    return [_attention(layer) for layer in layers]


def _attention(layer: Any) -> Any:
    children = layer.children().values() if hasattr(layer, "children") else ()
    found = [one for one in children if hasattr(one, "rope") or any(hasattr(one, name) for name in OUTPUTS)]
    return found[0] if len(found) == 1 else None


def probe_rope(rope: Any, width: int) -> Rope | None:
    """What the `rope` of an attention does to heads of this width; None where it is no rotation of fixed frequencies.

    Unit vectors are turned at a few offsets; then what follows from the frequencies is compared at others.
    """
    if not callable(rope):
        return None
    try:
        matrices = {at: _turned(rope, width, at) for at in (0, *_OFFSETS, *_CHECKED)}
    except (TypeError, ValueError, AttributeError, IndexError):
        return None
    factor = float(np.linalg.norm(matrices[0][0]))
    if not np.isfinite(factor) or factor <= 0:
        return None
    places = _pairs(matrices[_OFFSETS[-1]])
    if places is None:
        return None
    halves, pairs = places
    first, second = Rope(np.zeros(pairs), halves).slices()
    frequencies = np.zeros(pairs)
    for at in _OFFSETS:
        found = np.arctan2(np.diag(matrices[at][first, second]), np.diag(matrices[at][first, first]))
        turns = np.rint((frequencies * at - found) / (2 * np.pi))
        frequencies = (found + 2 * np.pi * turns) / at
    made = Rope(frequencies, halves, factor)
    return made if all(_is_like(made, matrices[at], at) for at in _CHECKED) else None


def _turned(rope: Any, width: int, offset: int) -> Array:
    """Row i: unit vector i at position `offset`."""
    units = mx.eye(width).reshape(1, width, 1, width)
    found: Array = np.array(rope(units, offset=offset).astype(mx.float32)).reshape(width, width).astype(np.float64)
    return found


def _pairs(turned: Array) -> tuple[bool, int] | None:
    """(whether pairs are halves, how many) by the channel that the first one mixes with; None where there is none."""
    aside = np.abs(turned - np.diag(np.diag(turned)))
    partner = int(aside[0].argmax())
    if aside[0, partner] == 0:
        return None
    halves = partner != 1
    if halves:
        return halves, partner
    moved = np.flatnonzero(aside.max(1) > 0)
    return halves, int(moved[-1]) // 2 + 1


def _is_like(rope: Rope, turned: Array, offset: int) -> bool:
    """Whether the rotation does the same to unit vectors."""
    rows = np.eye(len(turned), dtype=np.float32)[:, None]
    cos, sin = rope.factors(offset, 1)
    first, second = rope.slices()
    x, y = rows[..., first].copy(), rows[..., second].copy()
    # Channels that do not turn may carry the factor or not: only those that do are compared.
    made = np.zeros_like(rows[:, 0])
    made[:, first], made[:, second] = (x * cos - y * sin)[:, 0], (x * sin + y * cos)[:, 0]
    turning = slice(0, 2 * rope.pairs)
    return bool(np.abs(made[turning, turning] - turned[turning, turning]).max() <= TOLERANCE * rope.factor)


def output_weights(attention: Any, heads: int, width: int, query_heads: int) -> Array | None:
    """W' W of the output projection, `[heads, width, width]`, summed over the query heads of each head of values."""
    project = next((getattr(attention, name) for name in OUTPUTS if hasattr(attention, name)), None)
    if project is None or not query_heads or query_heads % heads:
        return None
    try:
        units = mx.concatenate([mx.eye(query_heads * width), mx.zeros((1, query_heads * width))])
        out = project(units).astype(mx.float32)
        rows = np.array(out[:-1] - out[-1:])  # without a bias
    except (TypeError, ValueError, AttributeError):
        return None
    by_head = rows.reshape(heads, query_heads // heads, width, -1).astype(np.float32)
    weights: Array = np.einsum("hqio,hqjo->hij", by_head, by_head, optimize=True).astype(np.float64)
    return weights


class QueryEnergy:
    """Sums of squares of queries before their rotation, by layer `[query heads, width]`, while `listening`.

    In every attention of mlx-lm the queries come first of the two that its `rope` is called with. One thread.
    """

    def __init__(self, attentions: Sequence[Any]) -> None:
        self._attentions = attentions
        self._calls = [0] * len(attentions)
        self.squares: list[Array | None] = [None] * len(attentions)
        self._keys: list[tuple[int, int]] = [(0, 0)] * len(attentions)
        self._ropes = {index: one.rope for index, one in enumerate(attentions) if hasattr(one, "rope")}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Stands between each attention and its `rope`; puts everything back."""
        try:
            for index, rope in self._ropes.items():
                self._attentions[index].rope = self._hearing(index, rope)
            yield
        finally:
            for index, rope in self._ropes.items():
                self._attentions[index].rope = rope

    def _hearing(self, index: int, rope: Any) -> Any:
        def heard(rows: mx.array, *args: Any, **named: Any) -> Any:
            self._calls[index] += 1
            if self._calls[index] % 2 and rows.ndim == 4:
                found = np.array(mx.square(rows.astype(mx.float32)).sum(axis=(0, 2))).astype(np.float64)
                before = self.squares[index]
                self.squares[index] = found if before is None else before + found
            elif rows.ndim == 4:
                self._keys[index] = rows.shape[1], rows.shape[3]
            return rope(rows, *args, **named)

        return heard

    def of_keys(self, index: int, keys: PartSpec) -> Array | None:
        """Of layer `index`, `[heads of keys, width]`, summed over the query heads that share one.

        None where none were heard, or where what was turned were no keys of this geometry: those of latents are not.
        """
        squares = self.squares[index]
        if squares is None or self._keys[index] != (keys.heads, keys.width) or len(squares) % keys.heads:
            return None
        summed: Array = squares.reshape(keys.heads, -1, keys.width).sum(1)
        return summed

    def rope_of_keys(self, index: int, keys: PartSpec) -> Rope | None:
        """The rotation of layer `index`; None where it is not one of fixed frequencies, or not one of these keys."""
        return None if self.of_keys(index, keys) is None else probe_rope(self._ropes[index], keys.width)

    def output_of(self, index: int, layer: LayerSpec) -> Array | None:
        """`output_weights` of layer `index`; None also where its keys are not what was turned."""
        squares = self.squares[index]
        if squares is None or self.of_keys(index, layer.keys) is None:
            return None
        return output_weights(self._attentions[index], layer.values.heads, layer.values.width, len(squares))
