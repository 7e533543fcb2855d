"""Any change to what a checkpoint says: the rules refuse it, or the engine's next forward pass works."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.codecs import device
from kvstore.codecs.states import describe
from kvstore.core.blocks import LayerState, StateArray
from kvstore.core.layers import KVLayer, Layout, StateLayer
from kvstore.core.records import states_from_list, states_to_list
from kvstore.core.rules import check_states
from kvstore.errors import CorruptDataError
from kvstore.integrations import mlx_lm as kv
from tests.support.models import build_tiny, fill
from tests.support.replay import TOKENS, feed, layout_of
from tests.support.topologies import TOPOLOGIES

Layers = list[KVLayer | StateLayer]
CHUNK = 5
SIZES = st.integers(0, 70) | st.sampled_from((256, 300, 1 << 20, 1 << 40))
NUMBERS = st.integers(-3, 70) | st.sampled_from((255, 256, 300, 512, 12345, 1 << 40, -(1 << 61)))
NAMES = st.sampled_from(
    ("keys", "values", "slot0", "slot1", "slot2", "left_padding", "lengths", "window", "compress_kv", "pending_kv", "x")
)
SHAPES = st.lists(SIZES, max_size=5).map(tuple)
# What may be allocated for one array of a changed checkpoint that the rules accept.
BYTES_MAX = 1 << 24

EXACT = [name for name, one in TOPOLOGIES.items() if one.is_there and not one.bits and name != "llama4_long"]


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    """Run models as they are written."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@functools.lru_cache(maxsize=1)
def case(name: str) -> tuple[Any, Layout, Layers, tuple[LayerState, ...], int]:
    """(model, layout, captured layers, what the checkpoint says of them, token count)."""
    model, n_tokens = build_tiny(name), TOPOLOGIES[name].n_tokens
    layers = kv.capture(fill(name, model, TOKENS[:n_tokens]), n_tokens)
    return model, layout_of(name, model), layers, describe(layers), n_tokens


@st.composite
def changed(draw: st.DrawFn, states: tuple[LayerState, ...]) -> list[LayerState]:
    """The states with one to three things other than they were."""
    found = list(states)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found) - 1))
        found[at] = draw(_changed_state(found[at]))
    return found


@st.composite
def _changed_state(draw: st.DrawFn, state: LayerState) -> LayerState:
    ways = ["array", "more", "less", "number", "drop", "add"]
    way = draw(st.sampled_from([way for way in ways if way not in ("array", "less") or state.arrays]))
    arrays, numbers = list(state.arrays), dict(state.numbers)
    if way == "number" and numbers:
        numbers[draw(st.sampled_from(sorted(numbers)))] = draw(NUMBERS)
    elif way == "drop" and numbers:
        del numbers[draw(st.sampled_from(sorted(numbers)))]
    elif way == "add":
        numbers[draw(st.sampled_from(("index", "start", "capacity", "offset")))] = draw(NUMBERS)
    elif way == "less":
        del arrays[draw(st.integers(0, len(arrays) - 1))]
    elif way == "more":
        arrays.append(StateArray(draw(NAMES), draw(st.sampled_from(("F32", "I32", "I64"))), draw(SHAPES)))
    elif arrays:
        at = draw(st.integers(0, len(arrays) - 1))
        arrays[at] = draw(_changed_array(arrays[at]))
    return LayerState(state.layer, tuple(numbers.items()), tuple(arrays))


@st.composite
def _changed_array(draw: st.DrawFn, array: StateArray) -> StateArray:
    way = draw(st.sampled_from(("axis", "axis", "axis", "shape", "dtype", "name")))
    if way == "dtype":
        return replace(array, dtype=draw(st.sampled_from(("F32", "F16", "BF16", "I32", "I64", "BOOL", "U8"))))
    if way == "name":
        return replace(array, name=draw(NAMES))
    if way == "shape" or not array.shape:
        return replace(array, shape=draw(SHAPES))
    shape = list(array.shape)
    shape[draw(st.integers(0, len(shape) - 1))] = draw(SIZES)
    return replace(array, shape=tuple(shape))


def remade(layers: Sequence[KVLayer | StateLayer], states: Sequence[LayerState]) -> Layers:
    """The layers with what the states say in place of what they held."""
    made = list(layers)
    for state in states:
        layer = layers[state.layer]
        assert isinstance(layer, StateLayer)
        arrays = tuple((array.name, device.zeros(array.shape, array.dtype)) for array in state.arrays)
        made[state.layer] = replace(layer, arrays=arrays, numbers=state.numbers)
    return made


def is_refused(layout: Layout, states: Sequence[LayerState], n_tokens: int) -> bool:
    """Whether the daemon refuses them, as it parses what it is sent."""
    try:
        check_states(layout, states_from_list(states_to_list(states)), n_tokens)
    except CorruptDataError:
        return True
    return False


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_checkpoint_is_refused_or_the_engine_goes_on(name: str, data: st.DataObject) -> None:
    """By one token and then more, and by a chunk and then more."""
    model, layout, layers, states, n_tokens = case(name)
    if not states:
        return
    assert not is_refused(layout, states, n_tokens), "what was captured is fine"
    changes = data.draw(changed(states))
    if is_refused(layout, changes, n_tokens):
        return
    assert all(array.nbytes <= BYTES_MAX for state in changes for array in state.arrays)
    for count in (1, CHUNK):
        cache = kv.restore(remade(layers, changes), layout.tree)
        feed(model, cache, TOKENS[n_tokens : n_tokens + count])
        feed(model, cache, TOKENS[n_tokens + count :][:1])
