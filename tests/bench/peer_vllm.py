"""vllm-mlx 0.6.0 as a peer: what it saves at shutdown, and its SSD tier. Runs in its own environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from vllm_mlx.memory_cache import MemoryAwarePrefixCache, MemoryCacheConfig
from vllm_mlx.ssd_cache import SSDCacheConfig, SSDCacheTier

from tests.bench.peer_worker import Peer

WAIT_S = 60.0


class Model:
    """Its caches are named after a model; this one has no parameters."""


class VllmMlx(Peer):
    """save_to_disk and load_from_disk of its prefix cache. `place`: a folder, with one below it for each sequence."""

    def _cache(self) -> Any:
        return MemoryAwarePrefixCache(Model(), MemoryCacheConfig(max_memory_mb=8192))

    def store(self, number: int) -> float | None:
        cache = self._cache()
        started_s = time.perf_counter()
        assert cache.store(self.tokens(number)[:-1], self.caches())
        blocked_s = time.perf_counter() - started_s
        assert cache.save_to_disk(f"{self.place}/{number}")
        return blocked_s

    def load(self, number: int) -> Sequence[mx.array]:
        cache = self._cache()
        assert cache.load_from_disk(f"{self.place}/{number}") == 1
        found, rest = cache.fetch(self.tokens(number))
        assert found is not None and len(rest) == 1
        return [array for layer in found for array in (layer.keys, layer.values)]


class VllmSsd(Peer):
    """Its SSD tier, which entries go to when memory is full. `place`: a folder."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self._tier: Any = None

    def _opened(self) -> Any:
        if self._tier is None:
            self._tier = SSDCacheTier(SSDCacheConfig(cache_dir=self.place))
            self._tier.start_writer()
        return self._tier

    def store(self, number: int) -> float | None:
        tier, tokens = self._opened(), tuple(self.tokens(number)[:-1])
        caches = self.caches()
        started_s = time.perf_counter()
        tier.enqueue_spill(tokens, caches, sum(cache.nbytes for cache in caches))
        blocked_s = time.perf_counter() - started_s
        while tier.lookup_ssd(tokens) is None:
            assert time.perf_counter() < started_s + WAIT_S, "nothing was spilled"
            time.sleep(0.002)
        return blocked_s

    def load(self, number: int) -> Sequence[mx.array]:
        tokens = tuple(self.tokens(number)[:-1])
        tier = self._opened()
        found = tier.lookup_ssd(tokens)
        layers = tier._read_entry(tokens, found["file_path"])
        return [mx.array(layer[part]) for layer in layers for part in ("keys", "values")]


VLLM_PEERS: dict[str, type[Peer]] = {"vllm-mlx": VllmMlx, "vllm-ssd": VllmSsd}
