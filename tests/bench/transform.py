"""The codec `pca` on small-lm in numpy, with the functions of the store: what a basis from one calibration brings.

As `kvstore calibrate` makes it (`kvstore.codecs.basis_fit`), on a model whose layers are at hand; steps can be left
out. Bits are those of the packed codes of blocks of 256 tokens, and of the first four tokens, exact, without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvstore.codecs.basis import Basis, PartBasis
from kvstore.codecs.basis_fit import GRID, Moments, cheapest_steps, fit_part, key_weights, value_weights
from kvstore.codecs.code_packing import Codes, pack
from kvstore.codecs.exact import LosslessCodec
from kvstore.codecs.rope import Rope
from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.layers import PARTS
from tests.bench.rate_distortion import exact_bytes
from tests.bench.small_llama import KV, Array, Codec, Cold, SmallLlama, bfloat16

SINKS = 4
CALIBRATION_WINDOW = 768

Steps = list[list[float]]  # by layer: of keys, of values


class Transform:
    """The bases of a model, from calibration text. `unrotate`, `query_weight`, `output_weight`: to leave steps out."""

    def __init__(
        self,
        model: SmallLlama,
        text: Sequence[int],
        *,
        unrotate: bool = True,
        query_weight: bool = True,
        output_weight: str = "full",
    ) -> None:
        self.model = model
        rope = Rope(model.frequencies, halves=True) if unrotate else None
        moments = [[Moments(model.heads, model.width) for _ in PARTS] for _ in range(model.n_layers)]
        energy = np.zeros((model.n_layers, model.heads, model.width))

        def hear(layer: int, queries: Array, keys: Array, values: Array) -> None:
            squares = np.square(queries.astype(np.float64)).sum(1)
            energy[layer] += squares.reshape(model.heads, -1, model.width).sum(1)
            moments[layer][0].add((keys if unrotate else model.rope(keys, 0)).transpose(1, 0, 2))
            moments[layer][1].add(values.transpose(1, 0, 2))

        for at in range(0, len(text), CALIBRATION_WINDOW):
            model.run(text[at : at + CALIBRATION_WINDOW], tap=hear)
        self.fitted = [
            (
                fit_part(keys, key_weights(energy[layer], rope) if query_weight else None, rope),
                fit_part(values, self._output_weight(layer, output_weight)),
            )
            for layer, (keys, values) in enumerate(moments)
        ]

    def _output_weight(self, layer: int, kind: str) -> Array | None:
        """W' W of the query heads of each value head; its diagonal; none."""
        if kind == "none":
            return None
        width = self.model.width
        rows = self.model.layers[layer]["o_proj"].astype(np.float64).T  # [query heads * width, hidden]
        by_head = rows.reshape(self.model.heads, -1, width, rows.shape[1])
        full = np.einsum("hqio,hqjo->hij", by_head, by_head, optimize=True)
        return value_weights(full if kind == "full" else full * np.eye(width))

    def part(self, layer: int, part: int, step: float) -> PartBasis:
        """The basis with one step."""
        return replace(self.fitted[layer][part].part, steps=np.array([step], np.float32))

    def file(self, steps: Sequence[Steps]) -> Basis:
        """The basis as it would be stored, with some points."""
        return Basis(
            {
                (layer, name): replace(fitted.part, steps=np.array([point[layer][part] for point in steps], np.float32))
                for layer, pair in enumerate(self.fitted)
                for part, (name, fitted) in enumerate(zip(PARTS, pair, strict=True))
            }
        )

    def codec(self, steps: Steps) -> Codec:
        """KV through the codec with these steps."""
        bases = [[self.part(layer, part, step) for part, step in enumerate(pair)] for layer, pair in enumerate(steps)]

        def through(kv: KV) -> tuple[KV, int]:
            restored, bits = [], 0
            for pair, both in zip(kv, bases, strict=True):
                parts = []
                for rows, basis in zip(pair, both, strict=True):
                    back, taken = coded(basis, rows)
                    parts.append(back)
                    bits += taken
                restored.append((parts[0], parts[1]))
            return restored, bits

        return through


_REST = LosslessCodec()


def coded(basis: PartBasis, rows: Array) -> tuple[Array, int]:
    """Float32 `[heads, tokens, width]` through one part's codec, in bfloat16, the first tokens as they were; bits."""
    codes = basis.encode(rows.transpose(1, 0, 2).astype(np.float32, order="C"), 0, 0)
    assert codes is not None and basis.is_exact(codes)
    back = np.empty(rows.shape, np.float32)
    basis.decode(codes, 0, 0, back)
    back = bfloat16(back)
    back[:, :SINKS] = rows[:, :SINKS]
    return back, packed_bits(codes) + 8 * len(_REST.pack(exact_bytes(rows[:, :SINKS]), 2))


def packed_bits(codes: Codes) -> int:
    """Bits of codes `[groups, tokens, components]` after the first tokens, by blocks."""
    blocks = (codes[:, max(at, SINKS) : at + BLOCK_TOKENS] for at in range(0, codes.shape[1], BLOCK_TOKENS))
    return sum(8 * len(pack(np.ascontiguousarray(block))) for block in blocks if block.size)


def piece_costs(transform: Transform, runs: Sequence[Cold]) -> tuple[Array, Array]:
    """KL and bits a value of every (layer, part) alone at every step of GRID: two arrays `[layers, 2, steps]`."""
    shape = (transform.model.n_layers, 2, len(GRID))
    kl, bits = np.zeros(shape), np.zeros(shape)
    for run in runs:
        values = sum(array.size for pair in run.kv for array in pair) * len(runs)
        for layer, pair in enumerate(run.kv):
            for part, rows in enumerate(pair):
                for number, unit in enumerate(GRID):
                    basis = transform.part(layer, part, float(unit * transform.fitted[layer][part].unit))
                    changed: list[Any] = list(pair)
                    changed[part], taken = coded(basis, rows)
                    kv = [*run.kv[:layer], tuple(changed), *run.kv[layer + 1 :]]
                    logprobs = transform.model.logprobs(run.following, kv)
                    lost = (np.exp(run.logprobs) * (run.logprobs - logprobs)).sum(-1).clip(0)
                    kl[layer, part, number] += lost.mean() / len(runs)
                    bits[layer, part, number] += taken / values
    return kl, bits


def steps_at(transform: Transform, costs: tuple[Array, Array], bits_asked: float) -> Steps:
    """The steps of least KL that take `bits_asked` in sum."""
    kl, bits = (one.reshape(-1, len(GRID)) for one in costs)
    units = cheapest_steps(kl, bits, bits_asked).reshape(-1, 2)
    return [
        [float(unit) * fitted.unit for unit, fitted in zip(two, pair, strict=True)]
        for two, pair in zip(units, transform.fitted, strict=True)
    ]
