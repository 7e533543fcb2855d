"""The quantized cache of many heads that see the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from kvstore.errors import InvalidVectorError
from kvstore.turboquant.cache import HEAD_SEED, CacheStats, KVCacheConfig, QuantizedKVCache, merged_stats


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
    def num_tokens(self) -> int:
        """Tokens that every head holds."""
        return self.heads[0].num_tokens

    def head(self, index: int) -> QuantizedKVCache:
        """The cache of one head; InvalidVectorError (heads) when there is none."""
        if not 0 <= index < len(self.heads):
            raise InvalidVectorError("heads", f"no head {index} among {len(self.heads)}")
        return self.heads[index]

    def append_all(self, keys: Any, values: Any) -> None:
        """Keys and values of every head: `[heads, n, dim]`, or a sequence of `[n, dim]` for each head.

        InvalidVectorError (heads, length, dimension, ...), and no head changed, otherwise.
        """
        self._demand_each(keys, "keys")
        self._demand_each(values, "values")
        packed = [head.prepare(k, v) for head, k, v in zip(self.heads, keys, values, strict=True)]
        if len({part[0][0].shape[0] for part in packed}) > 1:
            raise InvalidVectorError("length", "heads got different numbers of tokens")
        for head, part in zip(self.heads, packed, strict=True):
            head.commit(part)

    def attention_scores_all(self, queries: Any) -> list[mx.array]:
        """For each head float32 `[num_tokens]`; `queries`: `[heads, dim]`."""
        self._demand_each(queries, "queries")
        return [head.attention_scores(query) for head, query in zip(self.heads, queries, strict=True)]

    def attention_output_all(self, queries: Any, temperature: float = 0.0) -> list[mx.array]:
        """For each head float32 `[dim]`, as `QuantizedKVCache.attention_output`."""
        self._demand_each(queries, "queries")
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

    def stats(self) -> CacheStats:
        """Bytes of all heads."""
        return merged_stats([head.stats() for head in self.heads])

    def clear(self) -> None:
        """Drop all tokens of all heads."""
        for head in self.heads:
            head.clear()

    def _demand_each(self, parts: Any, name: str) -> None:
        if len(parts) != len(self.heads):
            raise InvalidVectorError("heads", f"{name} for {len(parts)} heads, expected {len(self.heads)}")
