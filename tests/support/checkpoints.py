"""Caches with window and state layers in which every array says which tokens it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import xxhash

from kvstore.codecs import device
from kvstore.codecs.states import StateCapture
from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, LayerState
from kvstore.core.keys import Chain, checkpoint_key
from kvstore.core.layers import NO_PART, ArraySpec, KVLayer, LayerSpec, Layout, PartSpec, StateLayer
from tests.support.synthetic import make_layers, prefix_seeds

WINDOW_ROWS = 32

# Everything that a recurrent cache may hold: any dtype and rank, nothing at all, and a slot (3) that is not there.
STATE_ARRAYS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("slot0", "F32", (1, 4, 8, 6)),
    ("slot1", "BF16", (1, 3, 16)),
    ("slot2", "I64", (5,)),
    ("slot4", "BOOL", (2, 3)),
    ("slot5", "F16", (1, 0, 16)),
    ("slot6", "U32", ()),
    ("slot7", "U64", (3,)),
    ("slot8", "I16", (1, 1)),
)


def state_spec(arrays: Sequence[tuple[str, str, tuple[int, ...]]] = STATE_ARRAYS) -> LayerSpec:
    """A recurrent layer of arrays that never change their shapes."""
    return LayerSpec(NO_PART, NO_PART, "state", (("slots", 9),), tuple(ArraySpec(*one) for one in arrays))


def window_spec(part: PartSpec) -> LayerSpec:
    """A sliding window of WINDOW_ROWS rows."""
    return LayerSpec(part, part, "window", (("size", WINDOW_ROWS), ("keep", 0)))


def hybrid_layout() -> Layout:
    """window, kv, state, kv, state."""
    part = PartSpec(2, 64, "BF16")
    kv = LayerSpec(part, part)
    return Layout((window_spec(part), kv, state_spec(), kv, state_spec()), "(..)(..).")


def pure_layout() -> Layout:
    """State layers only: no token has any bytes of its own."""
    return Layout((state_spec(),) * 3)


def random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Any bit pattern, NaNs included; booleans are 0 or 1."""
    flat = rng.integers(0, 2 if dtype == "BOOL" else 256, (*shape, device.zeros((), dtype).itemsize), np.uint8)
    array = device.zeros(shape, dtype) if flat.size == 0 else device.to_array(flat, dtype).reshape(shape)
    mx.eval(array)
    return array


def make_state(spec: LayerSpec, tokens: Sequence[int], layer: int) -> StateLayer:
    """A window or state layer after these tokens."""
    seed = int(prefix_seeds(tokens)[-1]) if tokens else 0
    rng = np.random.default_rng([seed, layer])
    if spec.kind == "state":
        arrays = tuple((name, random_array(rng, dtype, shape)) for name, dtype, shape in STATE_ARRAYS)
        return StateLayer(spec, arrays, (), len(tokens))
    rows = min(len(tokens), WINDOW_ROWS)
    arrays = tuple(
        (name, random_array(rng, spec.part(name).dtype, (1, spec.part(name).heads, rows, spec.part(name).width)))
        for name in ("keys", "values")
    )
    return StateLayer(spec, arrays, (("index", rows),), len(tokens))


def make_cache(layout: Layout, tokens: Sequence[int], states_at: int | None = None) -> list[KVLayer | StateLayer]:
    """A whole cache of these tokens, evaluated; window and state layers after the first `states_at` of them."""
    short = tokens[:states_at]
    kv = make_layers(layout, tokens)
    return [make_state(spec, short, index) if spec.is_exact else kv[index] for index, spec in enumerate(layout.layers)]


def array_bytes(array: mx.array) -> bytes:
    """What an array holds, row by row, through a path of its own."""
    if not array.size:
        return b""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()


def state_bytes(layers: Sequence[KVLayer | StateLayer]) -> bytes:
    """What must travel of the window and state layers."""
    states = [layer for layer in layers if isinstance(layer, StateLayer)]
    return b"".join(array_bytes(array) for layer in states for _, array in layer.arrays)


def assert_state(got: KVLayer | StateLayer, want: KVLayer | StateLayer) -> None:
    """Equal in everything, bit for bit."""
    assert isinstance(got, StateLayer) and isinstance(want, StateLayer)
    assert (got.spec, got.numbers, got.n_tokens) == (want.spec, want.numbers, want.n_tokens)
    assert [name for name, _ in got.arrays] == [name for name, _ in want.arrays]
    for (name, mine), (_, other) in zip(got.arrays, want.arrays, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
        assert array_bytes(mine) == array_bytes(other), name


def assert_cache(got: Sequence[KVLayer | StateLayer], layout: Layout, tokens: Sequence[int]) -> None:
    """The layers are exactly those after `tokens`, raw."""
    for mine, other in zip(got, make_cache(layout, tokens), strict=True):
        if isinstance(other, StateLayer):
            assert_state(mine, other)
            continue
        assert isinstance(mine, KVLayer) and mine.n_tokens == len(tokens)
        for part in ("keys", "values"):
            for a, b in zip(mine.part(part), other.part(part), strict=True):
                assert mx.array_equal(a[:, :, : len(tokens)], b).item()


def finish_states(capture: StateCapture) -> tuple[tuple[LayerState, ...], bytes]:
    """States with offsets and checksums, and the payload that they describe."""
    payload = b"".join(capture.views())
    at, sealed = 0, []
    for state in capture.states:
        arrays = []
        for array in state.arrays:
            data = payload[at : at + array.nbytes]
            checksum = xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
            arrays.append(replace(array, offset=at, checksum=checksum))
            at += array.nbytes
        sealed.append(replace(state, arrays=tuple(arrays)))
    return tuple(sealed), payload


def checkpoint_place(root: bytes, tokens: bytes) -> tuple[bytes, bytes, bytes]:
    """(key, last full block, tokens after it) of the checkpoint after packed tokens."""
    keys = Chain(root, tokens).keys()
    parent, tail = (keys[-1] if keys else root), tokens[len(keys) * BLOCK_TOKENS * TOKEN_BYTES :]
    return checkpoint_key(parent, tail), parent, tail
