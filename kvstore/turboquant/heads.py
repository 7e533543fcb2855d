"""The quantized cache of many heads that see the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from kvstore.errors import InvalidVectorError
from kvstore.turboquant.cache import HEAD_SEED, CacheStats, KVCacheConfig, QuantizedKVCache


@dataclass(frozen=True, slots=True)
class MultiHeadStats:
    """Sizes of a cache's heads, each and in total."""

    heads: tuple[CacheStats, ...]

    @property
    def num_heads(self) -> int:
        """Heads."""
        return len(self.heads)

    @property
    def head_dim(self) -> int:
        """Coordinates of a key of one head."""
        return self.heads[0].dim

    @property
    def num_tokens(self) -> int:
        """Tokens that every head holds."""
        return self.heads[0].num_tokens

    @property
    def key_bytes(self) -> int:
        """Bytes of all keys."""
        return sum(head.key_bytes for head in self.heads)

    @property
    def value_bytes(self) -> int:
        """Bytes of all values."""
        return sum(head.value_bytes for head in self.heads)

    @property
    def total_bytes(self) -> int:
        """Keys and values."""
        return self.key_bytes + self.value_bytes

    @property
    def baseline_bytes(self) -> int:
        """Bytes in float32."""
        return sum(head.baseline_bytes for head in self.heads)

    @property
    def compression_ratio(self) -> float:
        """Baseline over packed; 0 when there is nothing."""
        return self.baseline_bytes / self.total_bytes if self.total_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers, and those of each head, as json takes them."""
        names = ("num_heads", "head_dim", "num_tokens", "key_bytes", "value_bytes", "total_bytes", "baseline_bytes")
        totals = {name: getattr(self, name) for name in (*names, "compression_ratio")}
        return {**totals, "heads": [head.to_dict() for head in self.heads]}


class MultiHeadKVCache:
    """One `QuantizedKVCache` a head; head h has seed + 1000 h. One thread at a time.

    An append reaches all heads or none.
    """

    def __init__(self, config: KVCacheConfig, num_heads: int) -> None:
        """InvalidVectorError (heads, dimension, bits) for what cannot be."""
        if num_heads < 1:
            raise InvalidVectorError("heads", f"a cache has at least one head, got {num_heads}")
        self.heads = [QuantizedKVCache(replace(config, seed=config.seed + HEAD_SEED * h)) for h in range(num_heads)]

    @classmethod
    def of(cls, heads: Sequence[QuantizedKVCache]) -> MultiHeadKVCache:
        """A cache of these heads, which hold equally many tokens; InvalidVectorError (heads, length) otherwise."""
        if not heads:
            raise InvalidVectorError("heads", "a cache has at least one head")
        if len({head.num_tokens for head in heads}) > 1:
            raise InvalidVectorError("length", "heads hold different numbers of tokens")
        cache = cls(heads[0].config, 1)
        cache.heads = list(heads)
        return cache

    @property
    def num_heads(self) -> int:
        """Heads."""
        return len(self.heads)

    @property
    def head_dim(self) -> int:
        """Coordinates of a key of one head."""
        return self.heads[0].config.dim

    @property
    def num_tokens(self) -> int:
        """Tokens that every head holds."""
        return self.heads[0].num_tokens

    def __repr__(self) -> str:
        return f"MultiHeadKVCache(num_heads={self.num_heads}, head_dim={self.head_dim}, heads[0]={self.heads[0]!r})"

    def head(self, index: int) -> QuantizedKVCache:
        """The cache of one head; InvalidVectorError (heads) when there is none."""
        if not 0 <= index < len(self.heads):
            raise InvalidVectorError("heads", f"no head {index} among {len(self.heads)}")
        return self.heads[index]

    def append_all(self, keys: Any, values: Any) -> None:
        """Keys and values of every head: `[heads, n, dim]`, or a sequence of `[n, dim]` for each head.

        InvalidVectorError (heads, length, dimension, ...), and no head changed, otherwise.
        """
        self._require_each(keys, "keys")
        self._require_each(values, "values")
        packed = [head.prepare(k, v) for head, k, v in zip(self.heads, keys, values, strict=True)]
        if len({part[0][0].shape[0] for part in packed}) > 1:
            raise InvalidVectorError("length", "heads got different numbers of tokens")
        for head, part in zip(self.heads, packed, strict=True):
            head.commit(part)

    def attention_scores_all(self, queries: Any) -> list[mx.array]:
        """For each head float32 `[num_tokens]`; `queries`: `[heads, dim]`."""
        self._require_each(queries, "queries")
        return [head.attention_scores(query) for head, query in zip(self.heads, queries, strict=True)]

    def attention_output_all(self, queries: Any, temperature: float = 0.0) -> list[mx.array]:
        """For each head float32 `[dim]`, as `QuantizedKVCache.attention_output`."""
        self._require_each(queries, "queries")
        return [head.attention_output(query, temperature) for head, query in zip(self.heads, queries, strict=True)]

    def concat_outputs(self, queries: Any, temperature: float = 0.0) -> mx.array:
        """float32 `[heads * dim]`: the outputs of all heads, one after the other."""
        return mx.concatenate(self.attention_output_all(queries, temperature))

    def reconstruct_keys_all(self) -> list[mx.array]:
        """For each head float32 `[num_tokens, dim]`."""
        return [head.reconstruct_keys() for head in self.heads]

    def reconstruct_values_all(self) -> list[mx.array]:
        """For each head float32 `[num_tokens, dim]`."""
        return [head.reconstruct_values() for head in self.heads]

    def stats(self) -> MultiHeadStats:
        """Sizes of every head and in total."""
        return MultiHeadStats(tuple(head.stats() for head in self.heads))

    def clear(self) -> None:
        """Drop all tokens of all heads."""
        for head in self.heads:
            head.clear()

    def _require_each(self, parts: Any, name: str) -> None:
        if len(parts) != len(self.heads):
            raise InvalidVectorError("heads", f"{name} for {len(parts)} heads, expected {len(self.heads)}")
