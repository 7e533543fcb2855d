"""Layers of mlx-lm that are valid at their exact token count only <-> `StateLayer`s, bit-exact, by attribute.

    class             kind    params      arrays                                 numbers
    RotatingKVCache   window  size, keep  keys, values                           index
    ChunkedKVCache    window  chunk       keys, values                           start, capacity
    ArraysCache       state   slots       slot0, slot1 ..; left_padding, lengths
    LayerCache        state   compressed, ratio   window, compress_kv, index_k, pending_kv, pending_gate

RotatingKVCache is a ring: `keep` pinned rows, then the others; the next token goes to row `index`. A prefill of several
tokens leaves more rows than `size`; before its next token the engine itself drops all but the first `keep` and the last
`size - keep` of them, whether that token comes alone or in a chunk. Dropping them here is bit-exact, and for short
windows 17 times smaller. A ring that has wrapped stays in its physical order: attention sums rows in that order, so
rows in the order of their tokens would give other logits in the last bits.

ChunkedKVCache says that it can be trimmed, and is wrong. mlx-lm 0.31 moves its window by the size of the buffer instead
of by the rows that are in use, so the buffer's size (`capacity`) belongs to its state.

LayerCache is that of deepseek_v41 in mlx-lm 0.32: a sliding window beside compressed latents. `compressed` is the size
of the window, `ratio` how many tokens make one latent (0 in layers that use those of another); how many rows the arrays
have follows from the token count. Before its first latent a layer does not show its shapes, and is not stored.

The layout has a rule for every array, the same at every token count. In an ArraysCache an array of floats has one shape
for ever, and token ids `[1, rows]` grow with the first tokens; `caches.probe` finds out when a model does otherwise.
Whether a layer that is captured or restored obeys `kvstore.core.rules` is checked by `codecs.states.describe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from kvstore.codecs.device import dtype_name
from kvstore.codecs.states import describe_layer
from kvstore.core.layers import NO_PART, ArraySpec, LayerSpec, PartSpec, StateLayer
from kvstore.errors import InvalidRequestError, UnsupportedLayerError

try:
    from mlx_lm.models import deepseek_v41

    _COMPRESSED_CACHE: Any = deepseek_v41.LayerCache
except ImportError:  # mlx-lm 0.31
    _COMPRESSED_CACHE = None

_SLOT = "slot"
_PADDING = ("left_padding", "lengths")
_PADDING_RULES = tuple(ArraySpec(name, "I32", (1,), optional=True) for name in _PADDING)
_COMPRESSED = ("window", "compress_kv", "index_k", "pending_kv", "pending_gate")
_LATENTS = ("compress_kv", "index_k")


def capture_exact(layer: Any, n_tokens: int) -> StateLayer:
    """A layer of one of `EXACT_CLASSES` after `n_tokens` tokens, without copying what need not be cut.

    InvalidRequestError when it is empty, holds several sequences, or its numbers do not fit its arrays.
    """
    captured = _CAPTURE[type(layer)](layer, n_tokens)
    if captured.spec.kind == "window":
        describe_layer(captured)
    return captured


def restore_exact(layer: StateLayer) -> Any:
    """A cache layer for the engine. UnsupportedLayerError when this mlx-lm has none for it."""
    name = layer.spec.params[0][0] if layer.spec.params else ""
    if (layer.spec.kind, name) not in _RESTORE:
        raise UnsupportedLayerError(f"mlx-lm has no cache for layers of kind {layer.spec.kind!r} with {name or 'no'!r}")
    return _RESTORE[layer.spec.kind, name](layer)


def is_cuttable(layer: Any) -> bool:
    """Whether a layer of one of `EXACT_CLASSES` can still go back by a few tokens: a ring that has not wrapped."""
    return type(layer) is stock.RotatingKVCache and layer.offset < layer.max_size


def part_spec(array: mx.array) -> PartSpec:
    """The spec of keys or values `[1, H, T, D]`."""
    return PartSpec(array.shape[1], array.shape[-1], dtype_name(array))


def check_rows(array: mx.array) -> None:
    """Raise InvalidRequestError unless this is one sequence of keys or values."""
    if array.ndim != 4 or array.shape[0] != 1:
        raise InvalidRequestError(f"not one sequence: shape {tuple(array.shape)}, not [1, H, T, D]")


def _capture_rotating(layer: Any, n_tokens: int) -> StateLayer:
    size, keep, index = layer.max_size, layer.keep, layer._idx  # noqa: SLF001 - part of the state, and never renamed
    rows = layer.keys.shape[2]
    dropped = max(0, rows - size)
    if dropped and index != rows:
        # It was trimmed after it had wrapped, and the engine itself would go on wrongly.
        raise InvalidRequestError(f"no ring of {size} ({keep} kept) has {rows} rows and index {index}")
    arrays = [_drop(a, keep, dropped) if dropped else a[:, :, :n_tokens] for a in (layer.keys, layer.values)]
    spec = _window_spec(layer, ("size", size), ("keep", keep))
    return StateLayer(spec, _named(("keys", "values"), arrays), (("index", index - dropped),), n_tokens)


def _drop(array: mx.array, keep: int, count: int) -> mx.array:
    """The rows without the `count` after the first `keep`."""
    rest = array[:, :, keep + count :]
    return mx.concatenate([array[:, :, :keep], rest], axis=2) if keep else rest


def _restore_rotating(layer: StateLayer) -> Any:
    params = dict(layer.spec.params)
    made: Any = stock.RotatingKVCache(max_size=params["size"], keep=params["keep"])
    made.keys, made.values = _window_arrays(layer)
    made.offset, made._idx = layer.n_tokens, dict(layer.numbers)["index"]  # noqa: SLF001
    return made


def _capture_chunked(layer: Any, n_tokens: int) -> StateLayer:
    capacity = layer.keys.shape[2]
    held = n_tokens - layer.start_position
    if layer.start_position < 0 or not 0 < held <= capacity:
        raise InvalidRequestError(f"{capacity} rows from token {layer.start_position} are not those before {n_tokens}")
    arrays = [a[:, :, :held] for a in (layer.keys, layer.values)]
    numbers = (("start", layer.start_position), ("capacity", capacity))
    spec = _window_spec(layer, ("chunk", layer.chunk_size))
    return StateLayer(spec, _named(("keys", "values"), arrays), numbers, n_tokens)


def _restore_chunked(layer: StateLayer) -> Any:
    made: Any = stock.ChunkedKVCache(layer.spec.param("chunk"))
    keys, values = _window_arrays(layer)
    numbers = dict(layer.numbers)
    made.offset, made.start_position = layer.n_tokens, numbers["start"]
    slack = numbers["capacity"] - keys.shape[2]
    made.keys, made.values = (mx.pad(a, [(0, 0), (0, 0), (0, slack), (0, 0)]) if slack else a for a in (keys, values))
    return made


def _window_spec(layer: Any, *params: tuple[str, int]) -> LayerSpec:
    check_rows(layer.keys)
    check_rows(layer.values)
    if layer.keys.shape[2] != layer.values.shape[2]:
        raise InvalidRequestError("keys and values have different numbers of rows")
    return LayerSpec(part_spec(layer.keys), part_spec(layer.values), "window", params)


def _window_arrays(layer: StateLayer) -> list[mx.array]:
    """Keys and values, each an object of its own."""
    arrays = dict(layer.arrays)
    return [arrays["keys"][:], arrays["values"][:]]


def _capture_arrays(layer: Any, n_tokens: int) -> StateLayer:
    slots = _named((f"{_SLOT}{i}" for i in range(len(layer.cache))), layer.cache)
    padding = _named(_PADDING, [getattr(layer, name, None) for name in _PADDING], required=False)
    rules = (*(_slot_rule(name, array) for name, array in slots), *_PADDING_RULES)
    spec = LayerSpec(NO_PART, NO_PART, "state", (("slots", len(layer.cache)),), rules)
    return StateLayer(spec, slots + padding, (), n_tokens)


def _slot_rule(name: str, array: mx.array) -> ArraySpec:
    dtype, shape = dtype_name(array), tuple(array.shape)
    is_ids = mx.issubdtype(array.dtype, mx.integer) and array.ndim == 2
    return ArraySpec(name, dtype, (1, 0), 1) if is_ids else ArraySpec(name, dtype, shape)


def _restore_arrays(layer: StateLayer) -> Any:
    slots = layer.spec.param("slots")
    made: Any = stock.ArraysCache(slots)
    arrays = dict(layer.arrays)
    made.cache = [_taken(arrays, f"{_SLOT}{i}") for i in range(slots)]
    made.left_padding, made.lengths = (_taken(arrays, name) for name in _PADDING)
    _check_nothing_left(arrays)
    return made


def _capture_compressed(layer: Any, n_tokens: int) -> StateLayer:
    arrays = _named(_COMPRESSED, [getattr(layer, name) for name in _COMPRESSED])
    rows = {name: array.shape[1] for name, array in arrays if array.ndim == 3}
    if "pending_kv" in rows and not rows.get("compress_kv"):
        raise InvalidRequestError("it has too few tokens: no group of them has been compressed yet")
    latents = rows.get("compress_kv", 0)
    ratio = (n_tokens - rows.get("pending_kv", 0)) // latents if latents else 0
    bounds = {"window": layer.window_size, "pending_kv": ratio - 1, "pending_gate": ratio - 1}
    rules = tuple(
        ArraySpec(name, dtype_name(array), (1, 0, array.shape[-1]), 1, bounds.get(name, 0), name in _LATENTS)
        for name, array in arrays
    )
    params = (("compressed", layer.window_size), ("ratio", ratio))
    return StateLayer(LayerSpec(NO_PART, NO_PART, "state", params, rules), arrays, (), n_tokens)


def _restore_compressed(layer: StateLayer) -> Any:
    if _COMPRESSED_CACHE is None:
        raise UnsupportedLayerError("this mlx-lm has no cache for compressed latents")
    made: Any = _COMPRESSED_CACHE(layer.spec.param("compressed"))
    arrays = dict(layer.arrays)
    for name in _COMPRESSED:
        setattr(made, name, _taken(arrays, name))
    _check_nothing_left(arrays)
    made.offset = layer.n_tokens
    return made


def _named(
    names: Iterable[str], arrays: Iterable[mx.array | None], *, required: bool = True
) -> tuple[tuple[str, mx.array], ...]:
    """Those arrays that are there, each as an object of its own, if they are of one sequence and a dtype to be stored.

    The first axis of every array counts sequences. `required`: raise InvalidRequestError when there is none.
    """
    found = tuple((name, array) for name, array in zip(names, arrays, strict=True) if array is not None)
    for name, array in found:
        if array.ndim == 0 or array.shape[0] != 1:
            raise InvalidRequestError(f"{name} is not of one sequence: shape {tuple(array.shape)}")
        dtype_name(array)
    if not found and required:
        raise InvalidRequestError("it is empty; there is nothing to store")
    return tuple((name, array[:]) for name, array in found)


def _taken(arrays: dict[str, mx.array], name: str) -> mx.array | None:
    array = arrays.pop(name, None)
    return None if array is None else array[:]


def _check_nothing_left(arrays: dict[str, mx.array]) -> None:
    if arrays:
        raise InvalidRequestError(f"arrays that the layer has no place for: {', '.join(sorted(arrays))}")


_CAPTURE: dict[type, Callable[[Any, int], StateLayer]] = {
    stock.RotatingKVCache: _capture_rotating,
    stock.ChunkedKVCache: _capture_chunked,
    stock.ArraysCache: _capture_arrays,
}
if _COMPRESSED_CACHE is not None:
    _CAPTURE[_COMPRESSED_CACHE] = _capture_compressed

# By kind of layer and its first parameter.
_RESTORE: dict[tuple[str, str], Callable[[StateLayer], Any]] = {
    ("window", "size"): _restore_rotating,
    ("window", "chunk"): _restore_chunked,
    ("state", "slots"): _restore_arrays,
    ("state", "compressed"): _restore_compressed,
}

EXACT_CLASSES = frozenset(_CAPTURE)
WINDOW_CLASSES = frozenset({stock.RotatingKVCache, stock.ChunkedKVCache})
