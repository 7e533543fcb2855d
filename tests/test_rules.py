"""What layers may hold after n tokens: what engines make is accepted, everything else is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import ChunkedKVCache, RotatingKVCache

from kvstore.codecs import byte_plan
from kvstore.codecs.states import describe_layer
from kvstore.core.blocks import Block, LayerState, Run, StateArray, pack_tokens
from kvstore.core.layers import NO_PART, ArraySpec, LayerSpec, Layout, PartSpec, StateLayer
from kvstore.core.rules import check_block, check_state, check_states
from kvstore.errors import CorruptDataError
from kvstore.integrations import mlx_lm as kv

PART = PartSpec(2, 4, "F32")
RING = LayerSpec(PART, PART, "window", (("size", 8), ("keep", 2)))
CHUNKED = LayerSpec(PART, PART, "window", (("chunk", 8),))
SLOTS = LayerSpec(
    NO_PART,
    NO_PART,
    "state",
    (("slots", 2),),
    (
        ArraySpec("slot0", "F32", (1, 3, 8)),
        ArraySpec("slot1", "I64", (1, 0), 1),
        ArraySpec("lengths", "I32", (1,), optional=True),
    ),
)
LATENTS = ("compress_kv", "index_k")
COMPRESSED = LayerSpec(
    NO_PART,
    NO_PART,
    "state",
    (("compressed", 8), ("ratio", 4)),
    (
        ArraySpec("window", "F32", (1, 0, 6), 1, 8),
        *(ArraySpec(name, "F32", (1, 0, 6), 1, optional=True) for name in LATENTS),
        *(ArraySpec(name, "F32", (1, 0, 6), 1, 3) for name in ("pending_kv", "pending_gate")),
    ),
)


def window(rows: int, **numbers: int) -> LayerState:
    """Keys and values of so many rows."""
    arrays = tuple(StateArray(name, "F32", (1, 2, rows, 4)) for name in ("keys", "values"))
    return LayerState(0, tuple(numbers.items()), arrays)


def arrays_of(**shapes: tuple[str, tuple[int, ...]]) -> LayerState:
    """A state of these arrays."""
    return LayerState(0, (), tuple(StateArray(name, *what) for name, what in shapes.items()))


def is_fine(spec: LayerSpec, state: LayerState, n_tokens: int) -> bool:
    """Whether the rules accept it."""
    try:
        check_state(spec, state, n_tokens)
    except CorruptDataError:
        return False
    return True


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 7))
def test_every_ring_that_the_engine_makes_obeys_the_rule(chunks: list[int], keep: int) -> None:
    """Any mix of prefills and single tokens, from the engine's own class."""
    ring = RotatingKVCache(max_size=8, keep=keep)
    for count in chunks:
        ring.update_and_fetch(mx.zeros((1, 2, count, 4)), mx.zeros((1, 2, count, 4)))
    (layer,) = kv.capture([ring])
    assert isinstance(layer, StateLayer)
    check_state(layer.spec, describe_layer(layer), sum(chunks))


@given(st.lists(st.integers(1, 600), min_size=1, max_size=6), st.sampled_from((8, 256, 300)))
def test_every_chunked_window_that_the_engine_makes_obeys_the_rule(chunks: list[int], size: int) -> None:
    """Its buffer grows by steps, and is cut at the front."""
    layer = ChunkedKVCache(size)
    for count in chunks:
        layer.maybe_trim_front()
        layer.update_and_fetch(mx.zeros((1, 1, count, 1)), mx.zeros((1, 1, count, 1)))
    (captured,) = kv.capture([layer])
    assert isinstance(captured, StateLayer)
    check_state(captured.spec, describe_layer(captured), sum(chunks))


@pytest.mark.parametrize("n_tokens", [1, 5, 7, 8, 9, 30])
def test_of_all_rings_only_those_that_can_be_are_fine(n_tokens: int) -> None:
    """All rows and indices in reach, and far beyond."""
    fine = {
        (rows, index)
        for rows, index in itertools.product(range(12), [*range(-3, 40), 12345, -(1 << 60)])
        if is_fine(RING, window(rows, index=index), n_tokens)
    }
    want = {(n_tokens, n_tokens)} if n_tokens <= 8 else {(8, index) for index in range(3, 9)}
    assert fine == want


def test_a_chunked_window_has_the_rows_up_to_its_last_token() -> None:
    """In a buffer that holds them and is not much larger than what was ever in it."""
    assert is_fine(CHUNKED, window(8, start=4, capacity=256), 12)
    assert is_fine(CHUNKED, window(12, start=0, capacity=12), 12)
    for rows, start, capacity in ((8, 5, 256), (8, 4, 7), (8, 4, 1 << 40), (8, -4, 256), (0, 12, 256), (13, -1, 256)):
        assert not is_fine(CHUNKED, window(rows, start=start, capacity=capacity), 12), (rows, start, capacity)


@pytest.mark.parametrize("spec", [RING, CHUNKED])
def test_a_window_has_its_numbers_and_arrays_and_no_others(spec: LayerSpec) -> None:
    """Missing, additional, twice; another dtype, rank, head count or width."""
    good = window(8, index=8) if spec is RING else window(8, start=0, capacity=8)
    assert is_fine(spec, good, 8)
    keys, values = good.arrays
    for bad in (
        replace(good, numbers=good.numbers[1:]),
        replace(good, numbers=(*good.numbers, ("more", 0))),
        replace(good, numbers=(*good.numbers, good.numbers[0])),
        replace(good, arrays=(keys,)),
        replace(good, arrays=(keys, keys)),
        replace(good, arrays=(keys, values, replace(keys, name="more"))),
        replace(good, arrays=(keys, replace(values, name="slot0"))),
        *(
            replace(good, arrays=(replace(keys, **change), values))
            for change in (
                {"dtype": "F16"},
                {"shape": (1, 2, 8)},
                {"shape": (2, 2, 8, 4)},
                {"shape": (1, 3, 8, 4)},
                {"shape": (1, 2, 8, 5)},
                {"shape": (1, 2, 7, 4)},
            )
        ),
    ):
        assert not is_fine(spec, bad, 8), bad


@given(
    st.dictionaries(
        st.sampled_from(("slot0", "slot1", "slot2", "lengths")),
        st.tuples(
            st.sampled_from(("F32", "I64", "I32")),
            st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.sampled_from(((1, 3, 8), (1, 2), (1,))),
        ),
    )
)
def test_slots_have_the_shapes_of_the_layout(shapes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Fixed ones exactly, token ids up to as many as there are tokens, padding only where there is any."""
    ids = shapes.get("slot1", ("", ()))
    want = (
        shapes.get("slot0") == ("F32", (1, 3, 8))
        and ids[0] == "I64"
        and len(ids[1]) == 2
        and ids[1][0] == 1
        and ids[1][1] <= 5
        and shapes.get("lengths") in (None, ("I32", (1,)))
        and "slot2" not in shapes
    )
    assert is_fine(SLOTS, arrays_of(**shapes), 5) == want
    assert is_fine(SLOTS, arrays_of(slot0=("F32", (1, 3, 8)), slot1=("I64", (1, 5))), 5)


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 8, 11])
def test_latents_follow_from_the_token_count(n_tokens: int) -> None:
    """Rows of the window, of latents and their keys, and of the open group; any other number is refused."""
    rows = {"window": min(n_tokens, 8), "pending_kv": n_tokens % 4, "pending_gate": n_tokens % 4}
    rows |= {name: n_tokens // 4 for name in LATENTS if n_tokens >= 4}
    good = arrays_of(**{name: ("F32", (1, count, 6)) for name, count in rows.items()})
    check_state(COMPRESSED, good, n_tokens)
    for name, other in itertools.product(rows, (0, 1, 2, 3, 9, 1000)):
        changed = {**rows, name: other}
        bad = arrays_of(**{key: ("F32", (1, count, 6)) for key, count in changed.items()})
        assert is_fine(COMPRESSED, bad, n_tokens) == (other == rows[name]), (name, other)
    for name in rows:
        less = replace(good, arrays=tuple(array for array in good.arrays if array.name != name))
        assert not is_fine(COMPRESSED, less, n_tokens)


def test_a_checkpoint_has_every_exact_layer_and_no_other() -> None:
    """In the layout's order."""
    layout = Layout((RING, LayerSpec(PART, PART), RING))
    one, other = window(4, index=4), replace(window(4, index=4), layer=2)
    check_states(layout, (one, other), 4)
    for states in ((one,), (other, one), (one, replace(other, layer=1), other), ()):
        with pytest.raises(CorruptDataError):
            check_states(layout, states, 4)
    with pytest.raises(CorruptDataError, match="layer 2 after 4 tokens"):
        check_states(layout, (one, replace(other, numbers=(("index", 12345),))), 4)


def test_a_block_holds_every_kv_layer_once_in_tensors_of_its_recipe() -> None:
    """Fewer layers, one twice, one that is none; other heads or widths than the layout has."""
    plain = LayerSpec(PART, PartSpec(2, 6, "F32"))
    layout = Layout((plain, plain, RING))
    keys, values = layout.raw_stacks
    tokens = pack_tokens([1, 2, 3])

    def block(*stacks: object) -> Block:
        return Block(bytes(32), bytes(32), bytes(32), 0, tokens, 0, (Run(3, 0, 3, 0, stacks),))  # type: ignore[arg-type]

    for check in (check_block, byte_plan.check_block):
        check(layout, block(keys, values))
        for stacks in (
            (keys,),
            (keys, values, values),
            (keys, replace(values, layers=(0,))),
            (keys, replace(values, layers=(0, 1, 2))),
            (keys, replace(values, layers=(0, 7))),
            (keys, replace(values, part="keys")),
        ):
            with pytest.raises(CorruptDataError):
                check(layout, block(*stacks))
    wide = replace(values, tensors=(replace(values.tensors[0], width=8),))
    with pytest.raises(CorruptDataError, match="do not fit"):
        byte_plan.check_block(layout, block(keys, wide))
