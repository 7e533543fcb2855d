"""Makes the basis of the codec `pca` for a model: `kvstore calibrate` does, before it measures its points.

collect     windows of text are prefilled; keys without their rotation, and values, go into sums. Memory is that of
            the sums (8 bytes times the width of a group, for each channel of each layer), however long the text
fit         components, weighted by the queries and the output projections where they can be reached
measure     each part alone at a few steps: KL of the next tokens, and bits
choose      steps of all parts, for each share of the bits of `compact`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvstore.codecs import code_packing
from kvstore.codecs.basis import Basis, Key, PartBasis, group_width
from kvstore.codecs.basis_fit import GRID, Fitted, Moments, cheapest_steps, fit_part, key_weights, value_weights
from kvstore.codecs.device import dtype_of
from kvstore.codecs.plausible import expected_bits
from kvstore.codecs.profiles import parse_profile
from kvstore.codecs.rope import Rope
from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.layers import PARTS, KVLayer, Layout, PartSpec, StateLayer
from kvstore.errors import InvalidRequestError
from kvstore.integrations.attention import QueryEnergy, attentions
from kvstore.integrations.calibrate import Calibration, Layers

Array = npt.NDArray[Any]

# Parts of the bits of BASELINE at which points are chosen, the largest first.
SHARES = (0.6, 0.5, 0.4)
BASELINE = "compact"
# The first tokens, and text that the steps were not chosen on, take so much over the sum of the parts.
MARGIN = 0.95
CALIBRATION_TOKENS = 6000
WINDOW_TOKENS = 768
STEP_WINDOWS = 5


@dataclass(frozen=True)
class MadeBasis:
    """A basis with its points, and what it could not do, for people."""

    basis: Basis
    notes: tuple[str, ...]


def make_basis(
    calibration: Calibration,
    model: Any,
    tokens: Sequence[int],
    step_windows: int = STEP_WINDOWS,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> MadeBasis:
    """The basis of a model out of `tokens`, and points on the first `step_windows` windows of a calibration.

    `tell` hears how many of how many measurements are done. On the thread that owns the model. InvalidRequestError
    where no part of the cache can be coded.
    """
    collected = _Collected(calibration, model, tokens)
    fitted = collected.fit()
    if not fitted:
        raise InvalidRequestError("no layer of this model keeps KV that can be coded by a basis")
    kl, bits = _costs(calibration, fitted, step_windows, tell)
    asked = expected_bits(parse_profile(BASELINE), collected.layout).most
    points = [cheapest_steps(kl, bits, MARGIN * share * asked) for share in SHARES]
    parts = {
        key: replace(one.part, steps=np.array([units[number] * one.unit for units in points], np.float32))
        for number, (key, one) in enumerate(fitted.items())
    }
    return MadeBasis(Basis(parts), collected.notes)


class _Collected:
    """Sums over calibration text, and what the model says of its attention."""

    def __init__(self, calibration: Calibration, model: Any, tokens: Sequence[int]) -> None:
        self._moments: dict[Key, Moments] = {}
        self._ropes: dict[int, Rope | None] = {}
        self._left_out: dict[str, list[int]] = {"rotation": [], "queries": [], "output projection": []}
        self.layout = Layout(tuple(layer.spec for layer in calibration.prefill(tokens[:2])))
        self._queries = QueryEnergy(attentions(model, len(self.layout.layers)))
        with self._queries.listening():
            for at in range(0, len(tokens), WINDOW_TOKENS):
                self._add(calibration.prefill(tokens[at : at + WINDOW_TOKENS]))

    def _add(self, layers: Layers) -> None:
        for index, layer in enumerate(layers):
            for name in PARTS if isinstance(layer, KVLayer) else ():
                assert isinstance(layer, KVLayer)
                part = layer.spec.part(name)
                if part.bits or not part.width or not group_width(part.heads, part.width):
                    continue
                rows = _token_rows(layer, name)
                rope = self._rope(index, part) if name == "keys" else None
                if rope is not None:
                    rope.apply(rows, 0, back=True)
                self._moments.setdefault((index, name), Moments(part.heads, part.width)).add(rows)

    def _rope(self, index: int, keys: PartSpec) -> Rope | None:
        if index not in self._ropes:
            self._ropes[index] = self._queries.rope_of_keys(index, keys)
        return self._ropes[index]

    def fit(self) -> dict[Key, Fitted]:
        """The basis of every part, with a step of 1. Notes what could not be reached."""
        return {
            (index, name): self._keys(index, moments) if name == "keys" else self._values(index, moments)
            for (index, name), moments in self._moments.items()
        }

    def _keys(self, index: int, moments: Moments) -> Fitted:
        rope, energy = self._ropes[index], self._queries.of_keys(index, self.layout.layers[index].keys)
        self._left_out["rotation"] += [index] if rope is None else []
        self._left_out["queries"] += [index] if energy is None else []
        return fit_part(moments, None if energy is None else key_weights(energy, rope), rope)

    def _values(self, index: int, moments: Moments) -> Fitted:
        weights = self._queries.output_of(index, self.layout.layers[index])
        self._left_out["output projection"] += [index] if weights is None else []
        return fit_part(moments, None if weights is None else value_weights(weights))

    @property
    def notes(self) -> tuple[str, ...]:
        """What `fit` had to leave out, and in how many layers."""
        return tuple(
            f"{len(layers)} of {len(self.layout.layers)} layers are coded without their {what}, which is out of reach"
            for what, layers in self._left_out.items()
            if layers
        )


def _token_rows(layer: KVLayer, name: str) -> npt.NDArray[np.float32]:
    """float32 `[tokens, heads, width]`, of its own memory."""
    (array,) = layer.part(name)
    rows = array[0, :, : layer.n_tokens].transpose(1, 0, 2).astype(mx.float32)
    return np.array(rows)


def _costs(
    calibration: Calibration, fitted: dict[Key, Fitted], step_windows: int, tell: Callable[[int, int], None]
) -> tuple[Array, Array]:
    """KL and bits a value of all, of every part alone at every step of GRID: `[parts, steps]` twice."""
    kl, bits = np.zeros((len(fitted), len(GRID))), np.zeros((len(fitted), len(GRID)))
    bases = [
        replace(one.part, steps=np.array([unit * one.unit for unit in GRID], np.float32)) for one in fitted.values()
    ]
    of = calibration.windows[:step_windows]
    for done, window in enumerate(of):
        cold = calibration.prefill(window.prefix)
        before = calibration.continued(cold, window.following)
        kept = [layer for layer in cold if isinstance(layer, KVLayer)]
        values = sum(array.size for layer in kept for name in PARTS for array in layer.part(name))
        for number, ((index, name), basis) in enumerate(zip(fitted, bases, strict=True)):
            layer = cold[index]
            assert isinstance(layer, KVLayer)
            for step in range(len(GRID)):
                changed, taken = _coded(layer, name, basis, step)
                after = calibration.continued([*cold[:index], changed, *cold[index + 1 :]], window.following)
                lost = np.exp(before) * (before - after)
                kl[number, step] += np.nan_to_num(lost).sum(-1).clip(0).mean() / len(of)
                bits[number, step] += taken / values / len(of)
            tell(done * len(fitted) + number + 1, len(of) * len(fitted))
    return kl, bits


def _coded(layer: KVLayer, name: str, basis: PartBasis, point: int) -> tuple[KVLayer | StateLayer, int]:
    """The layer with one part encoded and decoded at a point of the grid, and the bits that this takes.

    If the step is too small to encode it: the layer as it is, and its own bits.
    """
    (array,) = layer.part(name)
    codes = basis.encode(_token_rows(layer, name), point, 0)
    if codes is None or not basis.is_exact(codes):
        return layer, 8 * array.nbytes
    back = np.empty((basis.heads, codes.shape[1], basis.width), np.float32)
    basis.decode(codes, point, 0, back)
    blocks = (codes[:, at : at + BLOCK_TOKENS] for at in range(0, codes.shape[1], BLOCK_TOKENS))
    bits = sum(8 * len(code_packing.pack(np.ascontiguousarray(block))) for block in blocks)
    restored = (mx.array(back)[None].astype(dtype_of(layer.spec.part(name).dtype)),)
    return (replace(layer, keys=restored) if name == "keys" else replace(layer, values=restored)), bits
