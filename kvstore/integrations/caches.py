"""Cache layers of mlx-lm <-> engine-neutral `KVLayer`s, bit-exact, by attribute.

`.state` is not used: it changed its meaning between mlx-lm 0.31 and 0.32, while `keys`, `values` and `offset` are the
same in both. Classes are looked up in one table by exact type, so that a subclass with other semantics, or a class that
nobody has looked at, is refused instead of guessed at.

Arrays are handed on as `array[:]`: a new object over the same buffer. Whoever then writes into a slice of the one does
not change the other; whoever is left alone with the buffer appends to it in place. So capture copies nothing, and an
engine's first token after a restore goes into the head-room of the very buffer that was read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from kvstore.codecs.device import dtype_name
from kvstore.errors import InvalidRequestError, UnsupportedLayerError
from kvstore.layers import KVLayer, LayerSpec, Layout, PartSpec

_MX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
_BATCH_ADVICE = "it holds several sequences: call extract(i) on every layer and store each sequence by itself"
_OTHER_ADVICE = "nothing of this sequence is stored"


def capture(cache: Sequence[Any]) -> list[KVLayer]:
    """The layers of a cache, one sequence of `offset` tokens, without copying. Lazy arrays stay lazy.

    UnsupportedLayerError names the class of a layer that cannot be stored; InvalidRequestError for an empty layer, more
    than one sequence, arrays that do not fit their offset, and layers that disagree on how many tokens they hold.
    """
    if not len(cache):
        raise InvalidRequestError("the cache has no layers")
    layers = [_capture_layer(index, layer) for index, layer in enumerate(cache)]
    offsets = sorted({layer.n_tokens for layer in layers})
    if len(offsets) > 1:
        raise InvalidRequestError(f"the layers hold different numbers of tokens: {offsets}")
    return layers


def restore(layers: Iterable[KVLayer]) -> list[Any]:
    """Cache layers for the engine that continue after `n_tokens`, head-room included.

    To append without a copy the engine must be the only holder of the buffers: let go of `layers` afterwards.
    """
    return [_restore_layer(layer) for layer in layers]


def layout(cache: Sequence[Any]) -> Layout:
    """The layout of a cache that holds at least one token; raises what `capture` raises."""
    made = Layout(tuple(layer.spec for layer in capture(cache)))
    made.validate()
    return made


def probe(*models: Any) -> Layout:
    """The layout of the caches that `models` (a model, or a model and its draft model) make, one after the other.

    A new cache has no shapes, and what a configuration says of heads and dtype need not be what the model does. So one
    token is traced through the model; its graph gives shapes and dtypes and is dropped without being evaluated.
    """
    layers: list[Any] = []
    for model in models:
        cache = stock.make_prompt_cache(model)
        model(mx.array([[0]]), cache=cache)
        layers += cache
    return layout(layers)


def quantized(plain: Layout, bits: int, group: int) -> Layout:
    """The layout of the same cache after the engine has quantized it (`to_quantized`)."""
    specs = [
        replace(s, keys=replace(s.keys, bits=bits, group=group), values=replace(s.values, bits=bits, group=group))
        for s in plain.layers
    ]
    made = Layout(tuple(specs))
    made.validate()
    return made


def align(cache: Sequence[Any], n_tokens: int) -> int | None:
    """Trim the layers in place to what all of them hold of `n_tokens`; None, and untouched, unless all are known.

    After speculative decoding the draft model's layers, and the model's own, lag behind the tokens by one or more.
    """
    if not cache or any(type(layer) not in _CAPTURE for layer in cache):
        return None
    common = min(n_tokens, *(layer.offset for layer in cache))
    for layer in cache:
        layer.trim(layer.offset - common)
    return int(common)


def _capture_layer(index: int, layer: Any) -> KVLayer:
    kind = type(layer)
    if kind not in _CAPTURE:
        advice = _BATCH_ADVICE if "Batch" in kind.__name__ else _OTHER_ADVICE
        raise UnsupportedLayerError(f"layer {index} is a {kind.__module__}.{kind.__name__}; {advice}")
    if layer.keys is None or layer.values is None:
        raise InvalidRequestError(f"layer {index} is empty; there is nothing to store")
    offset = layer.offset
    for array in _arrays(layer):
        if array.ndim != 4 or array.shape[0] != 1:
            raise InvalidRequestError(f"layer {index} is not one sequence: shape {array.shape}, not [1, H, T, D]")
        if not isinstance(offset, int) or not 0 < offset <= array.shape[2]:
            raise InvalidRequestError(f"layer {index}: offset {offset} does not fit in {array.shape[2]} rows")
    return _CAPTURE[kind](layer)


def _arrays(layer: Any) -> list[mx.array]:
    parts = (layer.keys, layer.values)
    return [array for part in parts for array in (part if isinstance(part, (tuple, list)) else (part,))]


def _capture_plain(layer: Any) -> KVLayer:
    keys, values = layer.keys, layer.values
    spec = LayerSpec(_plain_spec(keys), _plain_spec(values))
    return KVLayer(spec, _plain_arrays(keys), _plain_arrays(values), layer.offset)


def _plain_spec(array: mx.array) -> PartSpec:
    return PartSpec(array.shape[1], array.shape[-1], dtype_name(array))


def _plain_arrays(array: mx.array) -> tuple[mx.array, ...]:
    return (array[:],) if array.shape[-1] else ()


def _capture_quantized(layer: Any) -> KVLayer:
    keys, values = tuple(layer.keys), tuple(layer.values)
    key_spec, value_spec = (_quantized_spec(part, layer.bits, layer.group_size) for part in (keys, values))
    spec = LayerSpec(key_spec, value_spec)
    return KVLayer(spec, tuple(a[:] for a in keys), tuple(a[:] for a in values), layer.offset)


def _quantized_spec(part: tuple[mx.array, ...], bits: int, group: int) -> PartSpec:
    if len(part) != 3:
        raise UnsupportedLayerError(f"a quantized layer with {len(part)} arrays; affine has codes, scales and biases")
    codes, scales, biases = part
    width = scales.shape[-1] * group
    if codes.shape[-1] * 32 != width * bits or scales.shape != biases.shape:
        raise UnsupportedLayerError(f"a quantized layer that is not affine with {bits} bits in groups of {group}")
    return PartSpec(codes.shape[1], width, dtype_name(scales), bits, group)


def _restore_layer(layer: KVLayer) -> Any:
    kind = (layer.spec.kind, bool(layer.spec.keys.bits))
    if kind not in _RESTORE:
        raise UnsupportedLayerError(f"mlx-lm has no cache for layers of kind {layer.spec.kind!r}")
    for array in (*layer.keys, *layer.values):
        if array.shape[2] < layer.n_tokens:
            raise InvalidRequestError(f"{layer.n_tokens} tokens do not fit in {array.shape[2]} rows")
    return _RESTORE[kind](layer)


def _restore_plain(layer: KVLayer) -> Any:
    if layer.spec.values.bits:
        raise UnsupportedLayerError("mlx-lm has no cache with plain keys and quantized values")
    made: Any = stock.KVCache()
    made.keys, made.values = (_filled(layer, part) for part in ("keys", "values"))
    made.offset = layer.n_tokens
    return made


def _filled(layer: KVLayer, part: str) -> mx.array:
    """The one array of a part; where the width is 0 none was stored, and an empty one stands in its place."""
    spec, arrays = layer.spec.part(part), layer.part(part)
    if spec.width:
        own: mx.array = arrays[0][:]
        return own
    rows = (layer.keys or layer.values)[0].shape[2]
    return mx.zeros((1, spec.heads, rows, 0), _MX_DTYPES[spec.dtype])


def _restore_quantized(layer: KVLayer) -> Any:
    keys, values = layer.spec.keys, layer.spec.values
    if (keys.bits, keys.group) != (values.bits, values.group):
        raise UnsupportedLayerError("mlx-lm quantizes keys and values alike")
    made: Any = stock.QuantizedKVCache(group_size=keys.group, bits=keys.bits)
    made.keys, made.values = tuple(a[:] for a in layer.keys), tuple(a[:] for a in layer.values)
    made.offset = layer.n_tokens
    return made


_CAPTURE: dict[type, Callable[[Any], KVLayer]] = {
    stock.KVCache: _capture_plain,
    stock.QuantizedKVCache: _capture_quantized,
}

# By kind of layer, and whether the engine keeps it quantized.
_RESTORE: dict[tuple[str, bool], Callable[[KVLayer], Any]] = {
    ("kv", False): _restore_plain,
    ("kv", True): _restore_quantized,
}
