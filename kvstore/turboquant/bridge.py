"""Quantized caches and the store.

save, load       a cache under the tokens whose keys and values it holds. A packed row, codes then scales, travels
                 as the bit pattern of a row of float32; what packed it (recipes, seeds) is part of the namespace, and
                 the session's profile is `raw`, so that nothing is ever quantized again.
blocks_to_cache  blocks that the store itself packed with a turboquant profile, as a cache, without decoding them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from kvstore.blobs.protocol import RangeReader
from kvstore.codecs.assemble import packed_layer
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.turboquant import MSE, PROD, fold_of
from kvstore.core.blocks import Recipe, count_tokens, pack_tokens, unpack_tokens
from kvstore.core.keys import Namespace
from kvstore.core.layers import KVLayer, LayerSpec, Layout, PartSpec
from kvstore.errors import InvalidRequestError
from kvstore.turboquant.cache import KVCacheConfig, QuantizedKVCache
from kvstore.turboquant.heads import MultiHeadKVCache
from kvstore.turboquant.quantizers import PackedVectors

ENGINE = "kvstore-turboquant 1"
_AFTER = 0  # a fetch returns all tokens but the last, whatever that is


class _Session(Protocol):
    def store(self, tokens: Any, layers: Any, wait: bool = ...) -> Any: ...
    def fetch(self, tokens: Any) -> Any: ...


class StoreClient(Protocol):
    """The part of a client that `save` and `load` use."""

    def session(self, namespace: Namespace, profile: str | None = None) -> Any:
        """A session for one namespace."""


def save(
    client: StoreClient, caches: Sequence[MultiHeadKVCache], tokens: Any, weights: bytes, salt: bytes = b""
) -> Any:
    """Store the caches of a model's layers, in order; the daemon's word as a StoreResult, with `durable`.

    `weights`: digest of what computed keys and values; only the same finds them again. InvalidRequestError unless every
    cache holds all of `tokens`, in particular when a sliding window has dropped some.
    """
    packed = pack_tokens(tokens)
    n_tokens = count_tokens(packed)
    if not caches or any(cache.num_tokens != n_tokens for cache in caches):
        held = sorted({cache.num_tokens for cache in caches})
        raise InvalidRequestError(f"caches hold {held} tokens, and {n_tokens} are to be stored")
    layers = [cache_to_layer(cache) for cache in caches]
    session: _Session = client.session(_namespace([_recipes(c) for c in caches], layers, weights, salt), "raw")
    return session.store(packed, layers, wait=True)


def load(
    client: StoreClient, config: KVCacheConfig, shape: tuple[int, int], tokens: Any, weights: bytes, salt: bytes = b""
) -> list[MultiHeadKVCache] | None:
    """The caches of the longest stored prefix of `tokens`, one a layer; None when there is none.

    `shape`: (layers, heads); they must have been made with `config`. The arrays belong to the calling thread.
    """
    n_layers, n_heads = shape
    empty = MultiHeadKVCache(config, n_heads)
    layer = cache_to_layer(empty)
    namespace = _namespace([_recipes(empty)] * n_layers, [layer] * n_layers, weights, salt)
    session: _Session = client.session(namespace, "raw")
    hit = session.fetch([*unpack_tokens(pack_tokens(tokens)), _AFTER])
    return [layer_to_cache(one, config) for one in hit.layers] if hit else None


def cache_to_layer(cache: MultiHeadKVCache) -> KVLayer:
    """The packed rows as one kv layer of the store's, `[1, heads, num_tokens, words]`."""
    heads = [cache.head(index) for index in range(cache.num_heads)]
    keys = mx.stack([_joined(head.packed_keys) for head in heads])[None]
    values = mx.stack([_joined(head.packed_values) for head in heads])[None]
    mx.eval(keys, values)
    key_part, value_part = (PartSpec(len(heads), part.shape[-1], "F32") for part in (keys, values))
    return KVLayer(LayerSpec(key_part, value_part), (keys,), (values,), cache.num_tokens)


def layer_to_cache(layer: KVLayer, config: KVCacheConfig) -> MultiHeadKVCache:
    """The inverse of `cache_to_layer`; `config` is that of the cache."""
    cache = MultiHeadKVCache(config, layer.spec.keys.heads)
    for index in range(cache.num_heads):
        head = cache.head(index)
        templates = (head.packed_keys, head.packed_values)
        rows = [part[0][0, index, : layer.n_tokens] for part in (layer.keys, layer.values)]
        keys, values = (_split(row, template) for row, template in zip(rows, templates, strict=True))
        mx.eval(keys, values)
        head.commit((keys, values))
    return cache


def blocks_to_cache(
    layout: Layout, layer: int, blocks: Sequence[HitBlock], reader: RangeReader, max_tokens: int = 0
) -> MultiHeadKVCache:
    """One kv layer of a hit whose keys and values are packed by turboquant throughout, undecoded.

    InvalidRequestError when another codec packed some of it; else raises as `assemble.assemble_layer`.
    """
    spec = layout.layers[layer]
    parts = packed_layer(layout, layer, blocks, reader)
    dims = (spec.keys.width, spec.values.width)
    keys, values = (_only(parts.get(name, []), name, dim) for name, dim in zip(("keys", "values"), dims, strict=True))
    mx.eval(keys.tensors, values.tensors)
    if spec.keys.heads != spec.values.heads:
        raise InvalidRequestError(
            f"layer {layer} has {spec.keys.heads} heads of keys and {spec.values.heads} of values"
        )
    return MultiHeadKVCache.of(
        [
            QuantizedKVCache.from_packed(_head(keys, index), _head(values, index), dims, max_tokens)
            for index in range(spec.keys.heads)
        ]
    )


def _only(segments: Sequence[tuple[Recipe, list[mx.array]]], name: str, dim: int) -> PackedVectors:
    """The one segment of a part, if turboquant packed it."""
    recipes = [recipe for recipe, _ in segments]
    if len(segments) != 1 or recipes[0].name not in (MSE, PROD):
        raise InvalidRequestError(f"{name} are kept as {', '.join(map(str, recipes))}, not by one turboquant recipe")
    if fold_of(recipes[0]) > 1:
        raise InvalidRequestError(f"heads of {name} share scales, and cannot be attended to one by one")
    return PackedVectors(recipes[0], tuple(segments[0][1]), dim)


def _head(packed: PackedVectors, index: int) -> PackedVectors:
    return PackedVectors(packed.recipe, tuple(tensor[0, index] for tensor in packed.tensors), packed.dim)


def _joined(packed: PackedVectors) -> mx.array:
    """Codes and scales as float32 `[n, words]`, bit patterns."""
    if any(tensor.itemsize != 4 for tensor in packed.tensors):
        raise InvalidRequestError("a cache made of stored blocks is in the store already")
    return mx.concatenate([tensor.view(mx.float32) for tensor in packed.tensors], axis=-1)


def _split(rows: mx.array, like: PackedVectors) -> tuple[mx.array, ...]:
    """Split joined rows into tensors again: the inverse of `_joined`. `like`: packed vectors of the same recipe."""
    tensors, at = [], 0
    for tensor in like.tensors:
        width = tensor.shape[-1]
        tensors.append(mx.contiguous(rows[:, at : at + width]).view(tensor.dtype))
        at += width
    return tuple(tensors)


def _recipes(cache: MultiHeadKVCache) -> tuple[Recipe, Recipe, int, int]:
    """Recipes of the first head, the seed of the last, which tells those of all, and the dimension.

    Packed rows of some dimensions are equally wide, so the layout does not tell these apart.
    """
    first, last = cache.head(0), cache.head(cache.num_heads - 1)
    return first.packed_keys.recipe, first.packed_values.recipe, last.config.seed, first.config.dim


def _namespace(
    recipes: Sequence[tuple[Recipe, Recipe, int, int]], layers: Sequence[KVLayer], weights: bytes, salt: bytes
) -> Namespace:
    """Equal only for caches that were packed in the same way."""
    distinct = dict.fromkeys(recipes)
    packing = " ".join(f"{keys}/{values}/{seed}/{dim}" for keys, values, seed, dim in distinct)
    layout = Layout(tuple(layer.spec for layer in layers))
    return Namespace(weights, layout, dtype="F32", engine=f"{ENGINE} {packing}", salt=salt, alias="turboquant")
