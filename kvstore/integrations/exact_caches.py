"""Layers of mlx-lm that are valid at their exact token count only <-> `StateLayer`s, bit-exact, by attribute.

    class             kind    params      arrays                                 numbers
    RotatingKVCache   window  size, keep  keys, values                           index
    ChunkedKVCache    window  chunk       keys, values                           start, capacity
    ArraysCache       state   slots       slot0, slot1 ..; left_padding, lengths
    LayerCache        state   compressed  window, compress_kv, index_k, pending_kv, pending_gate

RotatingKVCache is a ring: `keep` pinned rows, then the others; the next token goes to row `index`. A prefill of several
tokens leaves more rows than `size`; before its next token the engine itself drops all but the first `keep` and the last
`size - keep` of them, whether that token comes alone or in a chunk. Dropping them here is bit-exact, and for short
windows 17 times smaller. A ring that has wrapped stays in its physical order: attention sums rows in that order, so
rows in the order of their tokens would give other logits in the last bits.

ChunkedKVCache says that it can be trimmed, and is wrong. mlx-lm 0.31 moves its window by the size of the buffer instead
of by the rows that are in use, so the buffer's size (`capacity`) belongs to its state.

LayerCache is that of deepseek_v41 in mlx-lm 0.32: a sliding window beside compressed latents. `compressed` is the size
of the window; how many rows the other arrays have follows from the token count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from kvstore.codecs.device import dtype_name
from kvstore.errors import InvalidRequestError, UnsupportedLayerError
from kvstore.layers import NO_PART, LayerSpec, PartSpec, StateLayer

try:
    from mlx_lm.models import deepseek_v41

    _COMPRESSED_CACHE: Any = deepseek_v41.LayerCache
except ImportError:  # mlx-lm 0.31
    _COMPRESSED_CACHE = None

_SLOT = "slot"
_PADDING = ("left_padding", "lengths")
_COMPRESSED = ("window", "compress_kv", "index_k", "pending_kv", "pending_gate")


def capture_exact(layer: Any, n_tokens: int) -> StateLayer:
    """A layer of one of `EXACT_CLASSES` after `n_tokens` tokens, without copying what need not be cut.

    InvalidRequestError when it is empty, holds several sequences, or its numbers do not fit its arrays.
    """
    return _CAPTURE[type(layer)](layer, n_tokens)


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


def _check_ring(rows: int, offset: int, index: int, size: int, keep: int) -> None:
    """Raise InvalidRequestError unless a ring can have this state.

    Others come about when a ring was trimmed after it had wrapped; the engine itself would go on wrongly.
    """
    if rows > size:
        fits = index == rows <= offset
    elif offset <= rows:
        fits = index == offset
    else:
        fits = rows == size and keep < index <= size
    if not fits or not 0 <= keep < size or offset <= 0:
        raise InvalidRequestError(f"no ring of {size} ({keep} kept) has {rows} rows and index {index} after {offset}")


def _capture_rotating(layer: Any, n_tokens: int) -> StateLayer:
    size, keep, index = layer.max_size, layer.keep, layer._idx  # noqa: SLF001 - part of the state, and never renamed
    rows = layer.keys.shape[2]
    _check_ring(rows, n_tokens, index, size, keep)
    dropped = max(0, rows - size)
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
    index = _number(layer, "index")
    _check_ring(made.keys.shape[2], layer.n_tokens, index, made.max_size, made.keep)
    made.offset, made._idx = layer.n_tokens, index  # noqa: SLF001
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
    made: Any = stock.ChunkedKVCache(dict(layer.spec.params)["chunk"])
    keys, values = _window_arrays(layer)
    made.offset, made.start_position = layer.n_tokens, _number(layer, "start")
    slack = _number(layer, "capacity") - keys.shape[2]
    if slack < 0 or made.start_position < 0 or made.offset - made.start_position != keys.shape[2]:
        raise InvalidRequestError(f"{keys.shape[2]} rows are not those before token {made.offset} of a chunked window")
    made.keys, made.values = (mx.pad(a, [(0, 0), (0, 0), (0, slack), (0, 0)]) if slack else a for a in (keys, values))
    return made


def _window_spec(layer: Any, *params: tuple[str, int]) -> LayerSpec:
    check_rows(layer.keys)
    check_rows(layer.values)
    if layer.keys.shape[2] != layer.values.shape[2]:
        raise InvalidRequestError("keys and values have different numbers of rows")
    return LayerSpec(part_spec(layer.keys), part_spec(layer.values), "window", params)


def _window_arrays(layer: StateLayer) -> list[mx.array]:
    """Keys and values as the spec describes them, each an object of its own."""
    arrays = dict(layer.arrays)
    if set(arrays) != {"keys", "values"}:
        raise InvalidRequestError(f"a window has keys and values, not {', '.join(sorted(arrays))}")
    for name, array in arrays.items():
        check_rows(array)
        if part_spec(array) != layer.spec.part(name):
            raise InvalidRequestError(f"{name} of a window are not what the layout says")
    if arrays["keys"].shape[2] != arrays["values"].shape[2]:
        raise InvalidRequestError("keys and values have different numbers of rows")
    return [arrays["keys"][:], arrays["values"][:]]


def _capture_arrays(layer: Any, n_tokens: int) -> StateLayer:
    slots = _named((f"{_SLOT}{i}" for i in range(len(layer.cache))), layer.cache)
    padding = _named(_PADDING, [getattr(layer, name, None) for name in _PADDING])
    return StateLayer(_state_spec(slots, "slots", len(layer.cache)), slots + padding, (), n_tokens)


def _restore_arrays(layer: StateLayer) -> Any:
    slots = dict(layer.spec.params)["slots"]
    made: Any = stock.ArraysCache(slots)
    arrays = dict(layer.arrays)
    made.cache = [_taken(arrays, f"{_SLOT}{i}") for i in range(slots)]
    made.left_padding, made.lengths = (_taken(arrays, name) for name in _PADDING)
    _check_nothing_left(arrays)
    return made


def _capture_compressed(layer: Any, n_tokens: int) -> StateLayer:
    arrays = _named(_COMPRESSED, [getattr(layer, name) for name in _COMPRESSED])
    return StateLayer(_state_spec(arrays, "compressed", layer.window_size), arrays, (), n_tokens)


def _restore_compressed(layer: StateLayer) -> Any:
    if _COMPRESSED_CACHE is None:
        raise UnsupportedLayerError("this mlx-lm has no cache for compressed latents")
    made: Any = _COMPRESSED_CACHE(dict(layer.spec.params)["compressed"])
    arrays = dict(layer.arrays)
    for name in _COMPRESSED:
        setattr(made, name, _taken(arrays, name))
    _check_nothing_left(arrays)
    made.offset = layer.n_tokens
    return made


def _named(names: Iterable[str], arrays: Iterable[mx.array | None]) -> tuple[tuple[str, mx.array], ...]:
    """Those arrays that are there, each as an object of its own, if they are of one sequence and a dtype to be stored.

    The first axis of every array counts sequences.
    """
    found = tuple((name, array) for name, array in zip(names, arrays, strict=True) if array is not None)
    for name, array in found:
        if array.ndim == 0 or array.shape[0] != 1:
            raise InvalidRequestError(f"{name} is not of one sequence: shape {tuple(array.shape)}")
        dtype_name(array)
    return tuple((name, array[:]) for name, array in found)


def _state_spec(arrays: tuple[tuple[str, mx.array], ...], param: str, value: int) -> LayerSpec:
    """The spec of a state layer. Shapes are not in it, since some grow with the first tokens.

    Dtypes are, of the first and the last array of floats (convolution and recurrent state): else the states of a model
    without kv layers could be mixed up with those of the same model loaded in another dtype.
    """
    if not arrays:
        raise InvalidRequestError("it is empty; there is nothing to store")
    floats = [dtype_name(array) for _, array in arrays if mx.issubdtype(array.dtype, mx.floating)] or [NO_PART.dtype]
    keys, values = (replace(NO_PART, dtype=dtype) for dtype in (floats[0], floats[-1]))
    return LayerSpec(keys, values, "state", ((param, value),))


def _taken(arrays: dict[str, mx.array], name: str) -> mx.array | None:
    array = arrays.pop(name, None)
    return None if array is None else array[:]


def _check_nothing_left(arrays: dict[str, mx.array]) -> None:
    if arrays:
        raise InvalidRequestError(f"arrays that the layer has no place for: {', '.join(sorted(arrays))}")


def _number(layer: StateLayer, name: str) -> int:
    numbers = dict(layer.numbers)
    if name not in numbers:
        raise InvalidRequestError(f"a {layer.spec.kind} layer without its {name}")
    return numbers[name]


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
