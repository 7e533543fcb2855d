"""small-lm in numpy, and what KV that went through a codec does to it.

numpy's matrix product is some 40 times as fast as MLX's on a CPU, so that 40 prefixes take seconds where
`kvstore bench quality` takes minutes. The model computes in float32 and KV is rounded to bfloat16. Windows of text and
continuations are those of `kvstore bench quality`; the store, answers to arithmetic and headers of blobs are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_tokenizer

from kvstore.bench.hard_model import OUTLIERS
from kvstore.cli.measuring import plain_encode
from kvstore.integrations.calibrate import NEXT_TOKENS, Window, windows

Array = np.ndarray[Any, Any]
KV = list[tuple[Array, Array]]  # keys and values of each layer, float32 [heads, tokens, width]
Tap = Callable[[int, Array, Array, Array], None]

SHORTEST, LONGEST = 300, 900


def bfloat16(array: Array) -> Array:
    """float32 rounded to bfloat16, ties to even, as float32."""
    words = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)


class SmallLlama:
    """The model of a folder that `tests.support.models` expanded. `hard`: parts that get outlier channels."""

    def __init__(self, folder: Path, hard: Sequence[str] = ()) -> None:
        loaded: Any = mx.load(str(folder / "model.safetensors"))
        weights = {name: np.array(array.astype(mx.float32)) for name, array in loaded.items()}
        config = json.loads((folder / "config.json").read_text())
        self.query_heads, self.heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width, self.n_layers = config["head_dim"], config["num_hidden_layers"]
        self.frequencies = config["rope_theta"] ** (-np.arange(0, self.width, 2) / self.width)
        self._eps = config["rms_norm_eps"]
        self._embedding, self._norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        self.layers = [
            {name.split(".")[-2]: array for name, array in weights.items() if f".layers.{number}." in name}
            for number in range(self.n_layers)
        ]
        for layer in self.layers:
            if "keys" in hard:
                self._harden(layer, "k_proj", "q_proj", (0, self.width // 2))
            if "values" in hard:
                self._harden(layer, "v_proj", "o_proj", (0,))

    def _harden(self, layer: dict[str, Array], written: str, read: str, places: tuple[int, ...]) -> None:
        """As `kvstore.bench.hard_model`."""
        scale = np.ones(self.width, np.float32)
        for channel, factor in OUTLIERS.items():
            scale[[channel + place for place in places]] = factor
        layer[written] = layer[written] * np.tile(scale, self.heads)[:, None]
        inverse = np.tile(1 / scale, self.query_heads)
        layer[read] = layer[read] * (inverse[:, None] if read == "q_proj" else inverse)

    def rope(self, rows: Array, start: int, sign: int = 1) -> Array:
        """[heads, tokens, width] rotated to positions from `start`; back with `sign` -1."""
        angles = np.arange(start, start + rows.shape[1])[:, None] * self.frequencies
        cos, sin = np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32)
        first, second = np.split(rows, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)

    def _normed(self, x: Array, weight: Array) -> Array:
        normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + self._eps) * weight
        return normed

    def run(self, tokens: Sequence[int], before: KV | None = None, tap: Tap | None = None) -> tuple[Array, KV]:
        """Hidden rows after `tokens`, and all KV. `tap` hears layer, queries, keys and values before rotation."""
        x, n = self._embedding[np.array(tokens)], len(tokens)
        start = before[0][0].shape[1] if before else 0
        hidden = np.arange(start + n)[None] > (start + np.arange(n))[:, None]
        kv: KV = []
        for number, layer in enumerate(self.layers):
            h = self._normed(x, layer["input_layernorm"])
            q, k, v = (
                np.ascontiguousarray((h @ layer[name].T).reshape(n, -1, self.width).transpose(1, 0, 2))
                for name in ("q_proj", "k_proj", "v_proj")
            )
            if tap is not None:
                tap(number, q, k, v)
            q, k = self.rope(q, start), self.rope(k, start)
            if before is not None:
                k, v = (np.concatenate([old, new], 1) for old, new in zip(before[number], (k, v), strict=True))
            kv.append((k, v))
            rows = q.reshape(self.heads, -1, self.width)
            scores = np.matmul(rows, k.transpose(0, 2, 1)).reshape(self.heads, -1, n, start + n) / self.width**0.5
            scores[..., hidden] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores = (scores / scores.sum(-1, keepdims=True)).reshape(self.heads, -1, start + n)
            mixed = np.matmul(scores, v).reshape(self.query_heads, n, self.width).transpose(1, 0, 2)
            x = x + mixed.reshape(n, -1) @ layer["o_proj"].T
            h = self._normed(x, layer["post_attention_layernorm"])
            gate = h @ layer["gate_proj"].T
            x = x + ((gate / (1 + np.exp(-gate))) * (h @ layer["up_proj"].T)) @ layer["down_proj"].T
        return self._normed(x, self._norm), kv

    def logprobs(self, tokens: Sequence[int], before: KV) -> Array:
        """Log-probabilities after each of `tokens`, fed after KV; float64."""
        logits = (self.run(tokens, before)[0] @ self._embedding.T).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        normed: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return normed


@dataclass(frozen=True)
class Cold:
    """A prefix's KV as the model computed it, in bfloat16, what is fed after it, and what the model then says."""

    kv: KV
    following: tuple[int, ...]
    logprobs: Array


def cold_runs(model: SmallLlama, folder: Path, tokens: Sequence[int], count: int) -> list[Cold]:
    """`count` prefixes spread over the text."""
    found: list[Window] = windows(tokens, count, SHORTEST, LONGEST, plain_encode(load_tokenizer(folder)))
    return [_cold(model, window.prefix, window.following) for window in found]


def plain_runs(model: SmallLlama, tokens: Sequence[int], count: int, n_tokens: int) -> Iterator[Cold]:
    """`count` prefixes of `n_tokens`, spread over the text, without arithmetic in them: for calibration."""
    room = len(tokens) - n_tokens - NEXT_TOKENS
    for number in range(count):
        at = number * room // max(1, count - 1)
        text = tuple(tokens[at : at + n_tokens + NEXT_TOKENS])
        yield _cold(model, text[:n_tokens], text[n_tokens:])


def _cold(model: SmallLlama, prefix: Sequence[int], following: Sequence[int]) -> Cold:
    kv = [(bfloat16(k), bfloat16(v)) for k, v in model.run(prefix)[1]]
    return Cold(kv, tuple(following), model.logprobs(following, kv))


@dataclass(frozen=True)
class Result:
    """KL of every position of every prefix `[prefixes, positions]`, top-1 agreement, and bits a value."""

    kl: Array
    top1: float
    bits: float

    @property
    def mean(self) -> float:
        """Mean KL, in nats."""
        return float(self.kl.mean())

    def ratio(self, other: Result) -> tuple[float, float, float]:
        """Mean KL over that of another codec on the same prefixes: the ratio, and 90 % of bootstrap resamples."""
        mine, its = self.kl.mean(1), other.kl.mean(1)
        drawn = np.random.default_rng(0).integers(len(mine), size=(2000, len(mine)))
        low, high = np.percentile(mine[drawn].mean(1) / its[drawn].mean(1), [5, 95])
        return float(mine.mean() / its.mean()), float(low), float(high)


Codec = Callable[[KV], tuple[KV, int]]  # KV -> what comes back, and the bits that were kept


def measured(model: SmallLlama, runs: Sequence[Cold], codec: Codec) -> Result:
    """What a codec costs on these prefixes."""
    kl, same, bits, values = [], 0, 0, 0
    for run in runs:
        restored, kept = codec(run.kv)
        logprobs = model.logprobs(run.following, restored)
        kl.append((np.exp(run.logprobs) * (run.logprobs - logprobs)).sum(-1).clip(0))
        same += int((run.logprobs.argmax(-1) == logprobs.argmax(-1)).sum())
        bits += kept
        values += sum(array.size for pair in run.kv for array in pair)
    rows = np.array(kl)
    return Result(rows, same / rows.size, bits / values)
