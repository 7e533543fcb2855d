"""A transform codec for KV, as a prototype in numpy: what a basis from one calibration would bring. Not in the store.

Of a layer's keys, and of its values, all heads of a token are one row. A row is multiplied by a basis, divided by one
step for the whole (layer, part), rounded, and packed with zstd:

1. keys are taken before rotation (RoPE), and every pair of channels is weighted by the energy of the queries that read
   it; values are weighted by the matrices of o_proj of the query heads that read them. Errors then count as they do in
   attention scores and in what attention adds to the model
2. the basis: principal components of weighted rows of calibration text, as 12-bit integers and a scale a channel
3. steps: measured KL and bits of each (layer, part) alone at a few steps; then the least sum of KL at the bits asked
4. packing: the shorter of two. Codes as bytes, token by token; or by component in three classes by their largest code,
   five, two or one to a byte
5. the first four tokens exact, without loss

Bits are those of real zstd frames, of the first tokens, and of a list of codes over 127. Blocks of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard

from kvstore.codecs.lossless import LosslessCodec
from kvstore.core.blocks import BLOCK_TOKENS
from tests.bench.rate_distortion import exact_bytes
from tests.bench.small_llama import KV, Array, Codec, Cold, SmallLlama, bfloat16

SINKS = 4
BASIS_BITS = 12
CODE_MAX = 127
OVERFLOW_BITS = 48  # place and value of a code over CODE_MAX
CALIBRATION_WINDOW = 768
RIDGE = 1e-3  # of each channel's own weight, so that large channels change nothing
# Steps that are measured, in units of the root mean square of all components.
GRID = np.array([0.1, 0.2, 0.4, 0.8, 1.4, 2.4])

Steps = list[list[float]]  # by layer: of keys, of values


@dataclass
class Moments:
    """Sums over rows `[tokens, n]`: a calibration of any length in the memory of one matrix."""

    n: int
    count: int = 0
    total: Array = field(init=False)
    squares: Array = field(init=False)

    def __post_init__(self) -> None:
        self.total, self.squares = np.zeros(self.n), np.zeros((self.n, self.n))

    def add(self, rows: Array) -> None:
        """More rows."""
        wide = rows.astype(np.float64)
        self.count += len(rows)
        self.total += wide.sum(0)
        self.squares += wide.T @ wide

    @property
    def mean(self) -> Array:
        """Mean row."""
        mean: Array = self.total / self.count
        return mean

    @property
    def covariance(self) -> Array:
        """Of the rows."""
        covariance: Array = self.squares / self.count - np.outer(self.mean, self.mean)
        return covariance


class Basis:
    """Rows to components and back. `matrix` and `scale` are what would be stored: component times row of integers."""

    def __init__(self, moments: Moments, weight: Array) -> None:
        self.mean = moments.mean.astype(np.float32)
        sizes, axes = np.linalg.eigh(weight)
        root, inverse = (axes * np.sqrt(sizes)) @ axes.T, (axes / np.sqrt(sizes)) @ axes.T
        energy, components = np.linalg.eigh(root @ moments.covariance @ root)
        back = components[:, ::-1].T @ inverse
        self.rms = float(np.sqrt(energy.clip(0).mean()))
        self.scale = (np.abs(back).max(0) / (2 ** (BASIS_BITS - 1) - 1)).astype(np.float32)
        self.matrix = np.round(back / self.scale)
        self._forward = np.linalg.inv(self.matrix * self.scale.astype(np.float64))

    def components(self, rows: Array) -> Array:
        """`[tokens, n]`, float64."""
        found: Array = (rows.astype(np.float64) - self.mean) @ self._forward
        return found

    def rows(self, codes: Array, step: float) -> Array:
        """Codes to rows, float32: an integer product, then one scale a channel."""
        restored: Array = (codes @ self.matrix).astype(np.float32) * (self.scale * np.float32(step)) + self.mean
        return restored

    def reach(self, codes: Array) -> float:
        """The largest sum of absolute products of a row: under 2^24, any order of float32 additions is exact."""
        return float((np.abs(codes) @ np.abs(self.matrix)).max(initial=0))


def joint(part: Array) -> Array:
    """[heads, tokens, width] -> [tokens, heads * width]."""
    return part.transpose(1, 0, 2).reshape(part.shape[1], -1)


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
        self.model, self._unrotate = model, unrotate
        heads, width = model.heads, model.width
        self._shared = model.query_heads // heads
        moments = [[Moments(heads * width) for _ in range(2)] for _ in range(model.n_layers)]
        energy = np.zeros((model.n_layers, heads, width))

        def hear(layer: int, queries: Array, keys: Array, values: Array) -> None:
            squares = np.square(queries.astype(np.float64)).sum(1)
            energy[layer] += squares.reshape(heads, self._shared, width).sum(1)
            moments[layer][0].add(joint(keys if unrotate else model.rope(keys, 0)))
            moments[layer][1].add(joint(values))

        for at in range(0, len(text), CALIBRATION_WINDOW):
            model.run(text[at : at + CALIBRATION_WINDOW], tap=hear)
        self.bases = [
            (
                Basis(keys, self._query_weight(energy[layer]) if query_weight else np.eye(heads * width)),
                Basis(values, self._output_weight(layer, output_weight)),
            )
            for layer, (keys, values) in enumerate(moments)
        ]

    def _query_weight(self, energy: Array) -> Array:
        """Each pair of channels that a rotation mixes has the energy of both in the queries."""
        pairs = energy.reshape(len(energy), 2, -1).sum(1)
        return np.diag(np.concatenate([pairs, pairs], -1).reshape(-1))

    def _output_weight(self, layer: int, kind: str) -> Array:
        """W' W of the query heads of each value head, block by block."""
        width = self.model.width
        weight = np.zeros((self.model.heads * width,) * 2)
        columns = self.model.layers[layer]["o_proj"].astype(np.float64)
        for head in range(self.model.query_heads):
            at, place = head * width, head // self._shared * width
            one = columns[:, at : at + width]
            weight[place : place + width, place : place + width] += one.T @ one
        own = np.diag(np.diag(weight))
        return {"full": weight + RIDGE * own, "diagonal": own, "none": np.eye(len(own))}[kind]

    def components(self, layer: int, kv: tuple[Array, Array]) -> list[Array]:
        """Of keys and of values `[tokens, n]`."""
        keys = self.model.rope(kv[0], 0, -1) if self._unrotate else kv[0]
        return [basis.components(joint(part)) for basis, part in zip(self.bases[layer], (keys, kv[1]), strict=True)]

    def restored(self, layer: int, part: int, codes: Array, step: float, exact: Array) -> Array:
        """[heads, tokens, width] in bfloat16, the first tokens as they were."""
        rows = self.bases[layer][part].rows(codes, step)
        heads = np.ascontiguousarray(rows.reshape(len(rows), self.model.heads, -1).transpose(1, 0, 2))
        back = bfloat16(self.model.rope(heads, 0) if part == 0 and self._unrotate else heads)
        back[:, :SINKS] = exact[:, :SINKS]
        return back

    def codec(self, steps: Steps) -> Codec:
        """KV through the codec with these steps."""

        def through(kv: KV) -> tuple[KV, int]:
            restored, bits = [], 0
            for layer, pair in enumerate(kv):
                parts = []
                for part, found in enumerate(self.components(layer, pair)):
                    codes = np.round(found / steps[layer][part])
                    bits += packed_bits(codes) + 8 * len(_REST.pack(exact_bytes(pair[part][:, :SINKS]), 2))
                    parts.append(self.restored(layer, part, codes, steps[layer][part], pair[part]))
                restored.append((parts[0], parts[1]))
            return restored, bits

        return through


_REST = LosslessCodec()
_ZSTD = zstandard.ZstdCompressor(level=3, write_content_size=False, write_checksum=False)


def packed_bits(codes: Array) -> int:
    """Bits of codes `[tokens, n]` after the first tokens, by blocks, and of those over CODE_MAX."""
    small = np.clip(codes, -CODE_MAX, CODE_MAX).astype(np.int8)
    bits = OVERFLOW_BITS * int((np.abs(codes[SINKS:]) > CODE_MAX).sum())
    for at in range(0, len(codes), BLOCK_TOKENS):
        block = small[max(at, SINKS) : at + BLOCK_TOKENS]
        bits += 8 * (1 + min(_frame(block.tobytes()), sum(_classes(block)))) if len(block) else 0
    return bits


def _frame(raw: bytes) -> int:
    return min(len(raw), len(_ZSTD.compress(raw)))


def _classes(block: Array) -> Iterator[int]:
    """Bytes of the classes by component: two bits each say which; zeros cost nothing else."""
    yield -(-block.shape[1] * 2 // 8)
    largest = np.abs(block.astype(np.int16)).max(0)
    for low, high, base, together in ((1, 1, 3, 5), (2, 7, 16, 2), (8, CODE_MAX, 256, 1)):
        some = block[:, (largest >= low) & (largest <= high)].T.astype(np.int64).reshape(-1) + base // 2
        if some.size:
            padded = np.concatenate([some, np.zeros(-some.size % together, np.int64)]).reshape(-1, together)
            yield 4 + _frame((padded * base ** np.arange(together)).sum(1).astype(np.uint8).tobytes())


def piece_costs(transform: Transform, runs: Sequence[Cold]) -> tuple[Array, Array]:
    """KL and bits a value of every (layer, part) alone at every step of GRID: two arrays `[layers, 2, steps]`."""
    shape = (transform.model.n_layers, 2, len(GRID))
    kl, bits = np.zeros(shape), np.zeros(shape)
    for run in runs:
        values = sum(array.size for pair in run.kv for array in pair) * len(runs)
        for layer, pair in enumerate(run.kv):
            for part, found in enumerate(transform.components(layer, pair)):
                for number, unit in enumerate(GRID):
                    step = float(unit * transform.bases[layer][part].rms)
                    codes = np.round(found / step)
                    changed: list[Any] = list(pair)
                    changed[part] = transform.restored(layer, part, codes, step, pair[part])
                    kv = [*run.kv[:layer], tuple(changed), *run.kv[layer + 1 :]]
                    logprobs = transform.model.logprobs(run.following, kv)
                    lost = (np.exp(run.logprobs) * (run.logprobs - logprobs)).sum(-1).clip(0)
                    kl[layer, part, number] += lost.mean() / len(runs)
                    bits[layer, part, number] += packed_bits(codes) / values
    return kl, bits


def steps_at(transform: Transform, costs: tuple[Array, Array], bits_asked: float) -> Steps:
    """The steps of least KL that take `bits_asked` in sum, by a Lagrangian over curves between measured steps."""
    units = np.geomspace(GRID[0], GRID[-1], 60)
    kl, bits = (
        np.apply_along_axis(lambda y: np.interp(np.log(units), np.log(GRID), y), -1, one)
        for one in (np.log(np.maximum(costs[0], 1e-9)), costs[1])
    )
    kl, low, high = np.exp(kl), 1e-9, 1e2
    chosen = np.zeros(kl.shape[:2], np.int64)
    for _ in range(80):
        price = (low * high) ** 0.5
        chosen = (kl + price * bits).argmin(-1)
        taken = np.take_along_axis(bits, chosen[..., None], -1).sum()
        low, high = (price, high) if taken > bits_asked else (low, price)
    return [
        [float(units[chosen[layer, part]]) * basis.rms for part, basis in enumerate(pair)]
        for layer, pair in enumerate(transform.bases)
    ]
