"""Rings, chunked windows, recurrent state, lists: there and back, and then what the engine makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from kvstore.core.layers import NO_PART, LayerSpec, StateLayer
from kvstore.errors import InvalidRequestError, UnsupportedLayerError
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.caches import token_count
from tests.support.replay import copied, raw

SIZES = ((8, 0), (8, 3), (5, 1), (300, 0), (300, 4))


def rows(count: int) -> tuple[mx.array, mx.array]:
    """Keys and values of so many tokens, of different width."""
    return mx.random.normal((1, 2, count, 4)), mx.random.normal((1, 2, count, 3))


def through(cache: Sequence[Any], n_tokens: int | None = None) -> list[Any]:
    """The cache captured, kept as bytes, and restored."""
    return kv.restore(copied(kv.capture(cache, n_tokens)), kv.layout(cache).tree)


def same_continuation(one: Any, other: Any, chunks: Sequence[int], before: Callable[[Any], object]) -> None:
    """Both layers hand the same rows and masks to the attention for the next tokens."""
    for count in chunks:
        keys, values = rows(count)
        for layer in (one, other):
            before(layer)
        if isinstance(one, RotatingKVCache):
            masks = [layer.make_mask(count, window_size=3) for layer in (one, other)]
            assert str(masks[0]) == str(masks[1])
        for a, b in zip(one.update_and_fetch(keys, values), other.update_and_fetch(keys, values), strict=True):
            assert a.shape == b.shape
            assert raw(a) == raw(b)
        assert one.offset == other.offset


@pytest.mark.parametrize(("size", "keep"), SIZES)
def test_a_ring_goes_on_as_if_it_had_never_been_away(size: int, keep: int) -> None:
    """After any mix of chunks and single tokens, before and after it wraps, trimmed or not."""
    dice = random.Random(size * 10 + keep)
    mx.random.seed(0)
    for _ in range(60):
        ring = RotatingKVCache(max_size=size, keep=keep)
        for count in dice.choices((1, 1, 1, 2, size // 2, size - 1, size, size + 5), k=dice.randint(1, 9)):
            ring.update_and_fetch(*rows(count))
        if ring.is_trimmable() and ring.offset > 2 and dice.random() < 0.5:
            ring.trim(2)
        (layer,) = kv.capture([ring])
        assert isinstance(layer, StateLayer)
        assert dict(layer.arrays)["keys"].shape[2] == min(ring.offset, size), "no slack, and no row twice"
        (restored,) = through([ring])
        assert (type(restored), restored.keep, restored.max_size) == (RotatingKVCache, keep, size)
        same_continuation(ring, restored, dice.choices((1, 1, 1, 2, size, size + 3), k=4), lambda layer: None)


def test_rows_that_the_ring_will_drop_are_not_stored() -> None:
    """A long prefill leaves them in the buffer; pinned rows stay."""
    ring = RotatingKVCache(max_size=8, keep=2)
    keys, values = rows(50)
    ring.update_and_fetch(keys, values)
    (layer,) = kv.capture([ring])
    assert layer.spec.params == (("size", 8), ("keep", 2))
    assert layer.numbers == (("index", 8),)
    assert raw(dict(layer.arrays)["keys"]) == raw(mx.concatenate([keys[:, :, :2], keys[:, :, 44:]], axis=2))


def test_what_a_batch_gives_back_of_a_ring_can_be_stored() -> None:
    """extract() puts rows in the order of their tokens."""
    rings = [RotatingKVCache(max_size=8) for _ in range(2)]
    for ring, count in zip(rings, (20, 5), strict=True):
        ring.update_and_fetch(*rows(count))
    batch = BatchRotatingKVCache.merge(rings)
    with pytest.raises(UnsupportedLayerError, match="extract"):
        kv.capture([batch])
    for index in range(2):
        extracted = batch.extract(index)
        (restored,) = through([extracted])
        same_continuation(extracted, restored, (1, 1, 3, 1), lambda layer: None)


def test_a_ring_that_was_trimmed_too_late_is_refused() -> None:
    """The engine would go on from stale rows."""
    prefilled, wrapped = RotatingKVCache(max_size=8), RotatingKVCache(max_size=8)
    prefilled.update_and_fetch(*rows(12))
    for _ in range(10):
        wrapped.update_and_fetch(*rows(1))
    for ring in (prefilled, wrapped):
        ring.trim(3)
        with pytest.raises(InvalidRequestError, match="no ring of 8"):
            kv.capture([ring])


@pytest.mark.parametrize("chunk", [256, 300])
def test_a_chunked_window_goes_on_as_if_it_had_never_been_away(chunk: int) -> None:
    """At its exact position, before and after its window moved, with the buffer that it had."""
    dice = random.Random(chunk)
    for _ in range(20):
        window = ChunkedKVCache(chunk)
        for count in dice.choices((1, 1, 7, 100, 255), k=dice.randint(1, 6)):
            window.maybe_trim_front()
            window.update_and_fetch(*rows(count))
        held = window.offset - window.start_position
        (layer,) = kv.capture([window])
        assert isinstance(layer, StateLayer)
        assert layer.spec.params == (("chunk", chunk),)
        assert dict(layer.arrays)["keys"].shape[2] == held
        (restored,) = through([window])
        assert restored.keys.shape == window.keys.shape
        same_continuation(window, restored, (1, 1, 1, 200, 1), lambda layer: layer.maybe_trim_front())


def state(slots: int = 5) -> ArraysCache:
    """Recurrent state with everything that models were seen to keep."""
    cache = ArraysCache(slots, left_padding=[3])
    cache[0] = mx.random.normal((1, 3, 8)).astype(mx.bfloat16)
    cache[2] = mx.random.normal((1, 4, 8, 8))
    cache[3] = mx.array([[7, -(1 << 60), 1 << 40]], mx.int64)
    cache[4] = mx.zeros((1, 0, 8))
    cache.lengths = mx.array([9])
    return cache


def test_recurrent_state_comes_back_with_its_gaps() -> None:
    """Empty slots, token ids, zero sizes, padding and lengths."""
    before = state()
    (after,) = through([before], 9)
    assert after[1] is None
    for a, b in zip(
        [*before.cache, before.left_padding, before.lengths],
        [*after.cache, after.left_padding, after.lengths],
        strict=True,
    ):
        if a is not None:
            assert (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))
    bare = ArraysCache(1)
    bare[0] = mx.array([[True, False]])
    (after,) = through([bare], 2)
    assert after.left_padding is None
    assert after.lengths is None
    assert after[0].tolist() == [[True, False]]


def test_a_recurrent_cache_does_not_know_its_length() -> None:
    """So the caller must; another layer's count is taken where there is one, and a wrong one cannot be given."""
    assert token_count([state()]) is None
    with pytest.raises(InvalidRequestError, match="n_tokens"):
        kv.capture([state()])
    plain = KVCache()
    plain.update_and_fetch(*rows(9))
    assert [layer.n_tokens for layer in kv.capture([state(), plain])] == [9, 9]
    assert [layer.n_tokens for layer in kv.capture([state(), plain], 7)] == [9, 7], "only plain layers can be cut"
    with pytest.raises(InvalidRequestError, match="10 tokens"):
        kv.capture([state(), plain], 10)
    plain.offset = mx.array([9])
    with pytest.raises(InvalidRequestError, match="whole number"):
        kv.capture([state(), plain])


def test_lists_nest_to_any_depth() -> None:
    """Depth first, and back into the same lists."""
    ring, plain = RotatingKVCache(8), KVCache()
    for layer in (ring, plain):
        layer.update_and_fetch(*rows(12))
    cache = [CacheList(state(), CacheList(CacheList(plain), ring)), plain, CacheList(ring)]
    layout = kv.layout(cache)
    assert layout.tree == "(.((.).)).(.)"
    assert [spec.kind for spec in layout.layers] == ["state", "kv", "window", "kv", "window"]
    assert layout.exact_layers == (0, 2, 4) and not kv.layout([CacheList(plain, plain), plain]).exact_layers
    outer, middle, last = through(cache)
    assert [type(outer), type(middle), type(last)] == [CacheList, KVCache, CacheList]
    assert type(outer[1][0][0]) is KVCache
    assert type(outer[1][1]) is type(last[0]) is RotatingKVCache
    assert type(outer[0]) is ArraysCache
    layers = kv.capture(cache)
    for tree in ("....", "(.....", "(.)()....", ".....)("):
        with pytest.raises(InvalidRequestError):
            kv.restore(layers, tree)
    with pytest.raises(InvalidRequestError, match="no layers"):
        kv.capture([plain, CacheList()])


def test_an_engine_quantizes_only_plain_layers_that_are_not_nested() -> None:
    """As mlx_lm does for --kv-bits: lists, windows and state have no quantized form."""
    plain = KVCache()
    plain.update_and_fetch(mx.zeros((1, 1, 9, 64)), mx.zeros((1, 1, 9, 64)))
    layout = kv.quantized(kv.layout([plain, CacheList(state(), plain), state()]), 8, 64)
    assert [spec.keys.bits for spec in layout.layers] == [8, 0, 0, 0]
    assert layout.tree == ".(..)."


def test_two_restores_do_not_disturb_each_other() -> None:
    """The engine writes into the rows of a ring in place."""
    ring = RotatingKVCache(max_size=8)
    for _ in range(10):
        ring.update_and_fetch(*rows(1))
    layers = kv.capture([ring])
    before = raw(dict(layers[0].arrays)["keys"])
    one, other = (kv.restore(layers)[0] for _ in range(2))
    for layer in (one, ring):
        layer.update_and_fetch(*rows(1))
    assert raw(other.keys) == raw(dict(layers[0].arrays)["keys"]) == before
    layers = kv.capture([state()], 9)
    one, other = (kv.restore(layers)[0] for _ in range(2))
    one[2][:, :1] = 0.0
    assert raw(other[2]) == raw(dict(layers[0].arrays)["slot2"]) != raw(one[2])


def test_what_is_not_one_sequence_or_empty_is_refused() -> None:
    """With the number and the class of the layer."""
    two, odd, empty = state(), state(), ArraysCache(2)
    two[0] = mx.zeros((2, 3))
    odd[2] = mx.zeros((1, 2), mx.complex64)
    for bad, message in (
        (two, "layer 0, a ArraysCache: slot0 is not of one sequence"),
        (odd, "cannot be stored"),
        (empty, "empty"),
        (RotatingKVCache(8), "empty"),
        (ChunkedKVCache(8), "empty"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            kv.capture([bad], 5)


def test_checkpoints_that_are_not_what_their_layout_says_are_refused() -> None:
    """What comes from a store is looked at again before an engine gets it."""
    ring, chunked = RotatingKVCache(max_size=8), ChunkedKVCache(8)
    for layer in (ring, chunked):
        layer.update_and_fetch(*rows(12))
    (window,), (chunks,), (slots,) = kv.capture([ring]), kv.capture([chunked]), kv.capture([state()], 9)
    assert isinstance(window, StateLayer) and isinstance(chunks, StateLayer) and isinstance(slots, StateLayer)
    arrays = dict(window.arrays)
    keys, values = arrays["keys"], arrays["values"]
    short = (("keys", keys[:, :, 1:]), ("values", values[:, :, 1:]))
    for bad in (
        replace(window, arrays=(("keys", keys),)),
        replace(window, arrays=(("keys", values), ("values", keys))),
        replace(window, arrays=(("keys", keys.astype(mx.float16)), ("values", values))),
        replace(window, arrays=(("keys", keys[:, :, 1:]), ("values", values))),
        replace(window, arrays=(("keys", keys[0]), ("values", values))),
        replace(window, arrays=short),
        replace(window, numbers=()),
        replace(window, numbers=(("index", 3),), n_tokens=8),
        replace(chunks, numbers=(("start", 1), ("capacity", 256))),
        replace(chunks, numbers=(("start", 0), ("capacity", 5))),
        replace(slots, arrays=(*slots.arrays, ("slot5", keys))),
        replace(slots, spec=LayerSpec(NO_PART, NO_PART, "state")),
        replace(slots, spec=LayerSpec(NO_PART, NO_PART, "window", (("slots", 2),))),
    ):
        with pytest.raises(InvalidRequestError):
            kv.restore([bad])
