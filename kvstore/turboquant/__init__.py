"""A quantized cache to compute with: attention on packed keys and values, which are never decoded.

quantizers.py  vectors <-> packed vectors: TurboQuantMSE, TurboQuantProd; inner products on codes
cache.py       one head: QuantizedKVCache
heads.py       many heads: MultiHeadKVCache
bridge.py      such caches in the store and out of it, and stored blocks as such caches

The byte formats are those of `kvstore.codecs.turboquant`. Arrays belong to the thread that makes them; a cache is used
by one thread at a time.
"""

from kvstore.errors import InvalidVectorError
from kvstore.turboquant.bridge import blocks_to_cache, load, save
from kvstore.turboquant.cache import CacheStats, KVCacheConfig, QuantizedKVCache
from kvstore.turboquant.heads import MultiHeadKVCache, MultiHeadStats
from kvstore.turboquant.quantizers import PackedVectors, QuantStrategy, TurboQuantMSE, TurboQuantProd

__all__ = [
    "CacheStats",
    "InvalidVectorError",
    "KVCacheConfig",
    "MultiHeadKVCache",
    "MultiHeadStats",
    "PackedVectors",
    "QuantStrategy",
    "QuantizedKVCache",
    "TurboQuantMSE",
    "TurboQuantProd",
    "blocks_to_cache",
    "load",
    "save",
]
