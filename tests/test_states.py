"""Window and state layers as bytes and back: bit for bit, verified, and untouched by what the engine does next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

from kvstore.blobs.ranges import BufferReader, FileReader, Range
from kvstore.client.receiver import LayerReader
from kvstore.codecs.codec import BlockCorruptError
from kvstore.codecs.device import Capture, dtype_name
from kvstore.codecs.states import StateCapture, begin_state, describe, state_ranges
from kvstore.core.blocks import ITEM_BYTES, LayerState
from kvstore.core.layers import NO_PART, ArraySpec, KVLayer, LayerSpec, Layout, PartSpec, Piece, StateLayer
from kvstore.core.records import states_from_list, states_to_list
from kvstore.errors import InvalidRequestError, UnsupportedLayerError
from kvstore.wire.frames import LayerBytes
from tests.support.checkpoints import (
    STATE_ARRAYS,
    array_bytes,
    assert_state,
    finish_states,
    hybrid_layout,
    make_cache,
    pure_layout,
    random_array,
    state_bytes,
    state_spec,
    window_spec,
)
from tests.support.stored import write_source
from tests.support.synthetic import make_layers

LAYOUT = hybrid_layout()
TOKENS = list(range(50))
SOURCE = 7


def payload_reader(states: tuple[LayerState, ...], payload: bytes) -> BufferReader:
    """The payload of a checkpoint as source SOURCE."""
    return BufferReader([payload], [Range(SOURCE, 0, len(payload))])


def one_state(arrays: dict[str, mx.array], numbers: tuple[tuple[str, int], ...] = ()) -> StateLayer:
    """A state layer of these arrays, whose spec says nothing else."""
    rules = [(name, dtype_name(array), tuple(array.shape)) for name, array in arrays.items()]
    return StateLayer(state_spec(rules), tuple(arrays.items()), numbers, 10)


def test_a_description_says_what_each_layer_holds() -> None:
    """By index in the layout, in order, kv layers left out, nothing evaluated; it survives its serial form."""
    cache = make_cache(LAYOUT, TOKENS)
    states = describe(cache)
    assert tuple(state.layer for state in states) == LAYOUT.exact_layers == (0, 2, 4)
    window, first, _ = states
    assert [(a.name, a.dtype, a.shape) for a in window.arrays] == [
        ("keys", "BF16", (1, 2, 32, 64)),
        ("values", "BF16", (1, 2, 32, 64)),
    ]
    assert window.numbers == (("index", 32),)
    assert tuple((a.name, a.dtype, a.shape) for a in first.arrays) == STATE_ARRAYS
    assert sum(state.nbytes for state in states) == len(state_bytes(cache))
    assert states_from_list(states_to_list(states)) == states


@pytest.mark.parametrize("layout", [LAYOUT, pure_layout()])
def test_captured_states_are_the_bytes_of_all_arrays_in_order(layout: Layout) -> None:
    """Zero-size arrays take none; views may be taken on any thread."""
    cache = make_cache(layout, TOKENS)
    capture = StateCapture(cache)
    with ThreadPoolExecutor(1) as pool:
        data = pool.submit(lambda: b"".join(capture.views())).result()
    assert data == state_bytes(cache)
    assert capture.nbytes == len(data)
    assert capture.states == describe(cache)


@pytest.mark.parametrize("how", ["file", "memory", "messages"])
def test_states_come_back_bit_for_bit(tmp_path: Path, how: str) -> None:
    """Every dtype and rank, NaN payloads and empty arrays included, from files, from memory and as they arrive."""
    cache = make_cache(LAYOUT, TOKENS)
    states, payload = finish_states(StateCapture(cache))
    with contextlib.closing(FileReader([write_source(tmp_path / "c", payload)])) as files:
        for state in states:
            ranges = state_ranges(state, SOURCE)
            parts = [payload[r.offset : r.offset + r.nbytes] for r in ranges]
            arriving = LayerReader((LayerBytes(0, memoryview(part)) for part in parts), 0, ranges)
            readers = {"file": files, "memory": BufferReader(parts, ranges), "messages": arriving}
            order = ranges if how == "messages" else ()
            source = 0 if how == "file" else SOURCE
            got = begin_state(LAYOUT, state, len(TOKENS), source, readers[how], order=order).finish()
            assert_state(got, cache[state.layer])


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_that_may_be_stored_comes_back_as_it_was(dtype: str) -> None:
    """All of MLX's but complex ones and float64, whatever their bits."""
    layer = one_state({"a": random_array(np.random.default_rng(3), dtype, (3, 5, 7))})
    states, payload = finish_states(StateCapture([layer]))
    assert dtype_name(layer.arrays[0][1]) == dtype
    got = begin_state(Layout((layer.spec,)), states[0], 10, SOURCE, payload_reader(states, payload)).finish()
    assert_state(got, layer)


def test_a_layer_whose_slots_are_all_empty_is_a_layer_too() -> None:
    """Where every array is optional none need be there; nothing is read for it."""
    rule = ArraySpec("slot0", "F32", (1, 3), optional=True)
    layer = StateLayer(LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (rule,)), (), (), 10)
    states, payload = finish_states(StateCapture([layer]))
    assert payload == b""
    assert_state(begin_state(Layout((layer.spec,)), states[0], 10, SOURCE, payload_reader(states, b"")).finish(), layer)


def test_what_comes_back_belongs_to_the_caller() -> None:
    """Two assemblies share no memory: an engine writes into its state."""
    cache = make_cache(LAYOUT, TOKENS)
    states, payload = finish_states(StateCapture(cache))
    first, second = (
        begin_state(LAYOUT, states[0], 50, SOURCE, payload_reader(states, payload)).finish() for _ in range(2)
    )
    keys = first.arrays[0][1]
    keys[..., 0:1, :] = 99.0
    mx.eval(keys)
    assert_state(second, cache[0])


MUTATIONS: dict[str, Callable[[mx.array], object]] = {
    "slice": lambda a: a.__setitem__((Ellipsis, slice(0, 1)), mx.ones_like(a[..., 0:1])),
    "all": lambda a: a.__setitem__(Ellipsis, mx.ones_like(a)),
    "in place": lambda a: a.__iadd__(mx.ones_like(a)),
}


@pytest.mark.parametrize("how", MUTATIONS)
def test_a_capture_holds_still_when_the_engine_goes_on(how: str) -> None:
    """Slice assignment changes the very object that was captured; ours must not see it."""
    arrays = {
        "whole": mx.random.normal((1, 4, 16)),
        "cut": mx.random.normal((1, 9, 64))[:, 3:7],
        "strided": mx.random.normal((6, 8)).T,
        "lazy": mx.random.normal((5, 5)) * 2,
    }
    mx.eval(arrays["whole"])
    wanted = b"".join(map(array_bytes, arrays.values()))
    capture = StateCapture([one_state(arrays)])
    for array in arrays.values():
        MUTATIONS[how](array)
        mx.eval(array)
    assert b"".join(map(array_bytes, arrays.values())) != wanted
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: b"".join(capture.views())).result() == wanted


def test_captures_of_mlx_lm_caches_hold_still_while_they_are_used() -> None:
    """A rotating cache writes its new row in place, a recurrent one replaces its slots."""
    rows = mx.random.normal((1, 2, 40, 64)).astype(mx.bfloat16)
    rotating = RotatingKVCache(max_size=32, keep=0)
    for at in range(40):
        rotating.update_and_fetch(rows[:, :, at : at + 1], rows[:, :, at : at + 1])
    recurrent = ArraysCache(2)
    recurrent[0] = mx.random.normal((1, 3, 8))
    cache = [
        StateLayer(
            window_spec(PartSpec(2, 64, "BF16")),
            (("keys", rotating.keys), ("values", rotating.values)),
            (("index", rotating._idx),),
            40,
        ),
        StateLayer(state_spec([("slot0", "F32", (1, 3, 8))]), (("slot0", recurrent[0]),), (), 40),
    ]
    wanted = state_bytes(cache)
    capture = StateCapture(cache)
    for at in range(3):
        rotating.update_and_fetch(rows[:, :, at : at + 1], rows[:, :, at : at + 1])
        recurrent[0] = recurrent[0] + 1
        mx.eval(rotating.keys, rotating.values, recurrent[0])
    assert array_bytes(rotating.keys) not in wanted
    assert b"".join(capture.views()) == wanted


def test_a_capture_keeps_no_memory_of_the_engine() -> None:
    """A convolution state is a few rows cut from the whole prefill."""
    large = mx.zeros((1, 1 << 14, 64))
    mx.eval(large)
    before = mx.get_active_memory()
    capture = StateCapture([one_state({"conv": large[:, -3:]})])
    del large
    assert mx.get_active_memory() <= before - (1 << 14) * 64 * 4
    assert capture.nbytes == 3 * 64 * 4


GOOD = mx.zeros((1, 2, 8, 64), mx.bfloat16)
WINDOW = window_spec(PartSpec(2, 64, "BF16"))
ONE = state_spec([("a", "BF16", (1, 2, 8, 64))])


def ring(*arrays: tuple[str, mx.array], index: int = 8) -> StateLayer:
    """A window after eight tokens."""
    return StateLayer(WINDOW, arrays, (("index", index),), 8)


BAD_LAYERS = {
    "complex": StateLayer(ONE, (("a", mx.zeros(3, mx.complex64)),), (), 10),
    "one name twice": StateLayer(ONE, (("a", GOOD), ("a", GOOD)), (), 10),
    "no array": StateLayer(ONE, (), (), 10),
    "another array": StateLayer(ONE, (("a", GOOD), ("b", GOOD)), (), 10),
    "another shape": StateLayer(ONE, (("a", GOOD[:, :, :7]),), (), 10),
    "another rank": StateLayer(ONE, (("a", GOOD[0]),), (), 10),
    "another dtype": StateLayer(ONE, (("a", GOOD.astype(mx.float32)),), (), 10),
    "a name that is none": one_state({"a b": GOOD}),
    "nine dimensions": one_state({"a": mx.zeros((1,) * 9)}),
    "too large a number": one_state({"a": GOOD}, (("n", 1 << 62),)),
    "too many numbers": one_state({"a": GOOD}, tuple((f"n{i}", i) for i in range(33))),
    "a number of its own": one_state({"a": GOOD}, (("index", 1),)),
    "a window of other heads": ring(("keys", GOOD[:, :1]), ("values", GOOD)),
    "a window of another width": ring(("keys", GOOD), ("values", GOOD[..., :32])),
    "a window of another dtype": ring(("keys", GOOD.astype(mx.float16)), ("values", GOOD)),
    "a window of two sequences": ring(("keys", mx.concatenate([GOOD, GOOD])), ("values", GOOD)),
    "a window without heads": ring(("keys", GOOD[0]), ("values", GOOD)),
    "a window without values": ring(("keys", GOOD)),
    "a window of fewer rows": ring(("keys", GOOD[:, :, 1:]), ("values", GOOD[:, :, 1:])),
    "a window with an index of its own": ring(("keys", GOOD), ("values", GOOD), index=9),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_layers_that_cannot_be_stored_are_refused(name: str) -> None:
    """Before anything is copied, and by the same rules that a reader applies."""
    StateCapture([ring(("keys", GOOD), ("values", GOOD)), StateLayer(ONE, (("a", GOOD),), (), 10)])
    with pytest.raises(UnsupportedLayerError if name == "complex" else InvalidRequestError):
        StateCapture([BAD_LAYERS[name]])


def array_at(states: tuple[LayerState, ...], name: str) -> tuple[LayerState, int]:
    """The state that has the array, and the array's number."""
    state = next(one for one in states if any(array.name == name for array in one.arrays))
    return state, [array.name for array in state.arrays].index(name)


@pytest.mark.parametrize("name", ["keys", "values", *(name for name, _, shape in STATE_ARRAYS if 0 not in shape)])
@pytest.mark.parametrize("damage", ["bit", "zeroed", "cut", "other tokens"])
def test_damage_to_any_array_is_found(name: str, damage: str) -> None:
    """One bit, everything zero, the file cut short, the same array after another prompt."""
    states, payload = finish_states(StateCapture(make_cache(LAYOUT, TOKENS)))
    _, other = finish_states(StateCapture(make_cache(LAYOUT, [*TOKENS[:-1], 9999])))
    state, number = array_at(states, name)
    at, nbytes = state.arrays[number].offset, state.arrays[number].nbytes
    data = bytearray(payload)
    if damage == "bit":
        data[at + nbytes - 1] ^= 1
    elif damage == "zeroed":
        data[at : at + nbytes] = bytes(nbytes)
    elif damage == "cut":
        del data[at + nbytes - 1 :]
    else:
        data[at : at + nbytes] = other[at : at + nbytes]
    if data == payload:  # two booleans, or an array that was zero
        return
    with pytest.raises(BlockCorruptError) as caught:
        begin_state(LAYOUT, state, 50, SOURCE, payload_reader(states, bytes(data))).finish()
    assert caught.value.source == SOURCE


def test_two_arrays_swapped_are_found() -> None:
    """Equal shape and dtype, both intact: keys for values, one layer's state for another's."""
    cache = make_cache(LAYOUT, TOKENS)
    states, payload = finish_states(StateCapture(cache))
    window, first, second = states
    keys, values = window.arrays
    swaps = [
        replace(window, arrays=(replace(keys, offset=values.offset), replace(values, offset=keys.offset))),
        replace(first, arrays=(replace(first.arrays[0], offset=second.arrays[0].offset), *first.arrays[1:])),
    ]
    for state in swaps:
        with pytest.raises(BlockCorruptError):
            begin_state(LAYOUT, state, 50, SOURCE, payload_reader(states, payload)).finish()


def test_an_array_without_a_checksum_is_never_served() -> None:
    """Nothing else would tell it from another one."""
    states, payload = finish_states(StateCapture(make_cache(LAYOUT, TOKENS)))
    bare = replace(states[0], arrays=tuple(replace(array, checksum=b"") for array in states[0].arrays))
    with pytest.raises(BlockCorruptError, match="no checksum"):
        begin_state(LAYOUT, bare, 50, SOURCE, payload_reader(states, payload)).finish()


def test_a_failing_disk_stays_an_os_error() -> None:
    """No block is to blame for it."""

    class Failing:
        """Raises whatever is asked of it."""

        def readinto(self, source: int, offset: int, views: object) -> None:
            raise OSError("disk")

    states, _ = finish_states(StateCapture(make_cache(LAYOUT, TOKENS)))
    with pytest.raises(OSError, match="disk"):
        begin_state(LAYOUT, states[0], 50, SOURCE, Failing()).finish()


def test_the_tokens_of_a_mixed_cache_are_captured_without_its_other_layers() -> None:
    """Window and state layers have no rows for a token; a cache of nothing else has no bytes for it."""
    cache = make_cache(LAYOUT, TOKENS)
    capture = Capture(cache, 10, 50)
    assert capture.nbytes == 40 * LAYOUT.token_bytes
    got = b"".join(capture.piece_views(LAYOUT, Piece(10, 50)))
    kv = [layer for layer in cache if isinstance(layer, KVLayer)]
    plain = Layout(tuple(layer.spec for layer in kv))
    assert got == b"".join(Capture(kv, 10, 50).piece_views(plain, Piece(10, 50)))
    nothing = Capture(make_cache(pure_layout(), TOKENS), 0, 50)
    assert nothing.nbytes == 0
    assert list(nothing.piece_views(pure_layout(), Piece(0, 50))) == []


def test_layers_of_the_wrong_kind_are_a_defect() -> None:
    """A kv layer never comes from a checkpoint."""
    layout = Layout((LayerSpec(PartSpec(1, 8, "F32"), NO_PART),))
    with pytest.raises(AssertionError):
        begin_state(layout, LayerState(0, (), ()), 1, SOURCE, payload_reader((), b"")).finish()
    assert describe(make_layers(layout, [1])) == ()
