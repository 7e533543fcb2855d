"""Cache layers of mlx-lm <-> engine-neutral `KVLayer`s and `StateLayer`s, bit-exact, by attribute.

`.state` is not used: it changed its meaning between mlx-lm 0.31 and 0.32, while `keys`, `values` and `offset` are the
same in both. Classes are looked up in one table by exact type, so that a subclass with other semantics, or an unknown
class, is refused and not guessed at. This module has the layers that can be cut at any token,
`exact_caches` those that cannot.

Nested layers (CacheList) are laid out flat, depth first; `Layout.tree` keeps the nesting.

Arrays are passed as `array[:]`: a new object over the same buffer. Writing into a slice of one object
does not change the other; the last object on a buffer appends in place. So capture copies nothing, and an
engine's first token after a restore goes into the head-room of the very buffer that was read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from kvstore.codecs.device import dtype_name
from kvstore.codecs.states import describe
from kvstore.core.layers import PARTS, KVLayer, LayerSpec, Layout, PartSpec, StateLayer
from kvstore.errors import InvalidRequestError, UnsupportedLayerError
from kvstore.integrations.exact_caches import (
    EXACT_CLASSES,
    WINDOW_CLASSES,
    capture_exact,
    check_rows,
    is_cuttable,
    part_spec,
    restore_exact,
)

CacheLayer = KVLayer | StateLayer

# Tokens that are traced, one time after the other, until a cache shows its shapes.
TRACED_TOKENS = (7, 120, 900)

_MX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
_BATCH_ADVICE = "it holds several sequences: call extract(i) on every layer and store each sequence by itself"
_OTHER_ADVICE = "nothing of this sequence is stored"


def capture(cache: Iterable[Any], n_tokens: int | None = None) -> list[CacheLayer]:
    """The layers of a cache of one sequence, nested ones depth first, without copying. Lazy arrays stay lazy.

    `n_tokens`: how many tokens are meant; needed where no layer knows how many it holds (recurrent layers do not).
    Layers of kind kv that hold more are cut to it. Window and state layers cannot be cut and say what they hold.

    UnsupportedLayerError names the class of a layer that cannot be stored; InvalidRequestError for an empty layer, more
    than one sequence, arrays that do not fit their offset, and layers that disagree on how many tokens they hold.
    """
    cache = list(cache)
    leaves, _ = _flatten(cache)
    _check_classes(leaves)
    _check_filled(leaves)
    held = token_count(cache)
    if held is None and n_tokens is None:
        raise InvalidRequestError("no layer knows how many tokens it holds; say so with n_tokens")
    wanted = n_tokens if n_tokens is not None else held
    if wanted is None or wanted < 1 or (held is not None and wanted > held):
        raise InvalidRequestError(f"{wanted} tokens are not in layers that hold {held}")
    return [_cut(layer, wanted) for layer in _capture_all(leaves, wanted if held is None else held)]


def restore(layers: Iterable[CacheLayer], tree: str = "") -> list[Any]:
    """Cache layers for the engine that continue after `n_tokens`, head-room included; nested as `Layout.tree` says.

    To append without a copy the engine must be the only holder of the buffers: let go of `layers` afterwards.
    InvalidRequestError for layers that the engine could not go on from, UnsupportedLayerError for those that this
    mlx-lm has no cache for.
    """
    given = list(layers)
    Layout(tuple(layer.spec for layer in given), tree).validate()
    _check_restorable(given)
    restored = iter([_restore_layer(layer) for layer in given])
    levels: list[list[Any]] = [[]]
    for sign in tree or "." * len(given):
        if sign == "(":
            levels.append([])
        elif sign == ")":
            nested = levels.pop()
            levels[-1].append(stock.CacheList(*nested))
        else:
            levels[-1].append(next(restored))
    return levels[0]


def _check_restorable(layers: Sequence[CacheLayer]) -> None:
    """Raise InvalidRequestError unless the layers are what their specs say, all after the same tokens."""
    if len({layer.n_tokens for layer in layers}) != 1 or layers[0].n_tokens < 1:
        raise InvalidRequestError("layers after different numbers of tokens, or none, are not one cache")
    describe(layers)
    for layer in layers:
        if isinstance(layer, KVLayer):
            for name in PARTS:
                _check_part(layer, name)


def _check_part(layer: KVLayer, name: str) -> None:
    tensors, arrays = layer.spec.part(name).tensors(), layer.part(name)
    if len(tensors) != len(arrays):
        raise InvalidRequestError(f"{len(arrays)} arrays of {name} instead of {len(tensors)}")
    for tensor, array in zip(tensors, arrays, strict=True):
        batch, heads, rows, width = array.shape if array.ndim == 4 else (0, 0, 0, 0)
        if (batch, heads, width, dtype_name(array)) != (1, tensor.heads, tensor.width, tensor.dtype):
            raise InvalidRequestError(f"{tensor.name} of {name} are not what the layout says: {tuple(array.shape)}")
        if rows < layer.n_tokens:
            raise InvalidRequestError(f"{layer.n_tokens} tokens do not fit in {rows} rows")


def layout(cache: Iterable[Any]) -> Layout:
    """The layout of a cache that holds at least one token; raises what `capture` raises."""
    cache = list(cache)
    leaves, tree = _flatten(cache)
    _check_classes(leaves)
    _check_filled(leaves)
    # No layout depends on how many tokens there are, so one stands for as many as recurrent layers may have seen.
    layers = _capture_all(leaves, token_count(cache) or 1)
    made = Layout(tuple(layer.spec for layer in layers), tree)
    made.validate()
    return made


def probe(*models: Any, max_kv_size: int | None = None) -> Layout:
    """The layout of the caches that `models` (a model, or a model and its draft model) make, one after the other.

    `max_kv_size`: as for make_prompt_cache; models that make their own caches ignore it.

    A new cache has no shapes, and what a configuration says of heads and dtype need not be what the model does. So some
    tokens are traced through the model; the graph gives shapes and dtypes and is dropped without being evaluated.
    UnsupportedLayerError for a model whose layout depends on how many tokens there are.
    """
    probed = [layout(_traced(model, stock.make_prompt_cache(model, max_kv_size))) for model in models]
    layers = tuple(layer for one in probed for layer in one.layers)
    tree = "".join(one.tree or "." * len(one.layers) for one in probed)
    return Layout(layers, tree if "(" in tree else "")


def _traced(model: Any, cache: list[Any]) -> list[Any]:
    """The cache after as many tokens as it takes to see every shape: one where nothing but keys and values is kept."""
    _trace(model, cache, 1)
    if all(type(layer) in _CAPTURE or type(layer) in WINDOW_CLASSES for layer in _leaves(cache)):
        return cache
    for count in TRACED_TOKENS:
        try:
            before = layout(cache)
        except UnsupportedLayerError:
            raise
        except InvalidRequestError:  # a layer may not show all of its arrays before it has more tokens
            _trace(model, cache, count)
            continue
        _trace(model, cache, 1)
        if layout(cache) != before:
            raise UnsupportedLayerError("the shapes of its state change with the number of tokens")
        break
    return cache


def _trace(model: Any, cache: list[Any], n_tokens: int) -> None:
    model(mx.array([[0] * n_tokens]), cache=cache)


def quantized(plain: Layout, bits: int, group: int) -> Layout:
    """The layout of the same cache after the engine has quantized it: its kv layers, as far as they are not nested."""
    depths = _depths(plain)
    specs = [
        s
        if s.is_exact or depth
        else replace(s, keys=replace(s.keys, bits=bits, group=group), values=replace(s.values, bits=bits, group=group))
        for s, depth in zip(plain.layers, depths, strict=True)
    ]
    made = Layout(tuple(specs), plain.tree)
    made.validate()
    return made


def token_count(cache: Sequence[Any]) -> int | None:
    """How many tokens the cache holds; None when no layer knows.

    UnsupportedLayerError for a class that is not known, InvalidRequestError when layers disagree.
    """
    leaves = _leaves(cache)
    _check_classes(leaves)
    counts = _counts(leaves)
    if not all(isinstance(count, int) for count in counts):
        raise InvalidRequestError("a layer whose offset is not a whole number")
    if len(set(counts)) > 1:
        raise InvalidRequestError(f"the layers hold different numbers of tokens: {sorted(set(counts))}")
    return counts[0] if counts else None


def align(cache: Sequence[Any], n_tokens: int) -> int | None:
    """Trim the layers in place to what all of them hold of `n_tokens`, and say how much that is.

    After speculative decoding the draft model's layers, and the model's own, lag behind the tokens by one or more.
    None, and nothing trimmed, unless all layers are known; 0, and nothing trimmed, when one that would have to be cut
    cannot be.
    """
    leaves = _leaves(cache)
    if not leaves or any(type(layer) not in _KNOWN for layer in leaves):
        return None
    counts = _counts(leaves)
    common = min(n_tokens, *counts) if counts else n_tokens
    ahead = [layer for layer in leaves if getattr(layer, "offset", common) > common]
    # A layer that does not say how much it holds holds what the longest does.
    silent = len(counts) < len(leaves) and any(count > common for count in counts)
    if silent or not all(type(layer) in _CAPTURE or is_cuttable(layer) for layer in ahead):
        return 0
    for layer in ahead:
        layer.trim(layer.offset - common)
    return int(common)


def _flatten(cache: Iterable[Any]) -> tuple[list[Any], str]:
    """The layers depth first, and their nesting as `Layout.tree` writes it."""
    leaves: list[Any] = []
    tree = ""
    for layer in cache:
        if type(layer) is stock.CacheList:
            inner, inner_tree = _flatten(layer.caches)
            leaves += inner
            tree += f"({inner_tree or '.' * len(inner)})"
        else:
            leaves.append(layer)
            tree += "."
    if not leaves:
        raise InvalidRequestError("the cache, or a list in it, has no layers")
    return leaves, tree if "(" in tree else ""


def _leaves(cache: Sequence[Any]) -> list[Any]:
    return _flatten(cache)[0] if len(cache) else []


def _depths(layout: Layout) -> list[int]:
    """How deep each layer is nested."""
    depths, depth = [], 0
    for sign in layout.tree or "." * len(layout.layers):
        depth += {"(": 1, ")": -1, ".": 0}[sign]
        if sign == ".":
            depths.append(depth)
    return depths


def _counts(leaves: Iterable[Any]) -> list[Any]:
    """What the layers that know it say of how many tokens they hold."""
    return [layer.offset for layer in leaves if hasattr(layer, "offset")]


def _check_classes(leaves: Sequence[Any]) -> None:
    for index, leaf in enumerate(leaves):
        kind = type(leaf)
        if kind not in _KNOWN:
            advice = _BATCH_ADVICE if "Batch" in kind.__name__ else _OTHER_ADVICE
            raise UnsupportedLayerError(f"layer {index} is a {kind.__module__}.{kind.__name__}; {advice}")


def _check_filled(leaves: Sequence[Any]) -> None:
    for index, leaf in enumerate(leaves):
        if getattr(leaf, "keys", leaf) is None:
            raise InvalidRequestError(f"layer {index} is empty; there is nothing to store")


def _capture_all(leaves: Sequence[Any], n_tokens: int) -> list[CacheLayer]:
    layers: list[CacheLayer] = []
    for index, leaf in enumerate(leaves):
        try:
            layers.append(capture_exact(leaf, n_tokens) if type(leaf) in EXACT_CLASSES else _capture_kv(leaf))
        except InvalidRequestError as error:
            raise type(error)(f"layer {index}, a {type(leaf).__name__}: {error}") from error
    return layers


def _cut(layer: CacheLayer, n_tokens: int) -> CacheLayer:
    return replace(layer, n_tokens=min(layer.n_tokens, n_tokens)) if isinstance(layer, KVLayer) else layer


def _capture_kv(layer: Any) -> KVLayer:
    for array in _arrays(layer):
        check_rows(array)
        if not 0 < layer.offset <= array.shape[2]:
            raise InvalidRequestError(f"offset {layer.offset} does not fit in {array.shape[2]} rows")
    return _CAPTURE[type(layer)](layer)


def _arrays(layer: Any) -> list[mx.array]:
    parts = (layer.keys, layer.values)
    return [array for part in parts for array in (part if isinstance(part, (tuple, list)) else (part,))]


def _capture_plain(layer: Any) -> KVLayer:
    keys, values = layer.keys, layer.values
    spec = LayerSpec(part_spec(keys), part_spec(values))
    return KVLayer(spec, _plain_arrays(keys), _plain_arrays(values), layer.offset)


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


def _restore_layer(layer: CacheLayer) -> Any:
    if isinstance(layer, StateLayer):
        return restore_exact(layer)
    kind = (layer.spec.kind, bool(layer.spec.keys.bits))
    if kind not in _RESTORE:
        raise UnsupportedLayerError(f"mlx-lm has no cache for keys and values of kind {layer.spec.kind!r}")
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


# ConcatenateKVCache comes back as a KVCache: it appends to the same rows, without copying all of them.
_CAPTURE: dict[type, Callable[[Any], KVLayer]] = {
    stock.KVCache: _capture_plain,
    stock.ConcatenateKVCache: _capture_plain,
    stock.QuantizedKVCache: _capture_quantized,
}
_KNOWN = EXACT_CLASSES | _CAPTURE.keys()

# By kind of layer, and whether the engine keeps it quantized.
_RESTORE: dict[tuple[str, bool], Callable[[KVLayer], Any]] = {
    ("kv", False): _restore_plain,
    ("kv", True): _restore_quantized,
}
