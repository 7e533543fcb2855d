"""Cache layers of mlx-lm to engine-neutral layers and back, on real models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)

from kvstore.core.layers import Layout
from kvstore.errors import InvalidRequestError, UnsupportedLayerError
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.caches import align, token_count
from tests.support.models import build_tiny

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
TOKENS = [(7 * i * i + 3 * i) % 4096 for i in range(300)]


def feed(model: Any, cache: list[Any], tokens: Sequence[int]) -> mx.array:
    """Logits after the last of `tokens`."""
    logits = model(mx.array([list(tokens)]), cache=cache)[0, -1]
    mx.eval(logits)
    return logits


def filled(model: Any, n_tokens: int = 44, bits: int = 0) -> list[Any]:
    """The model's cache after the first tokens, quantized by the engine if `bits`."""
    cache = make_prompt_cache(model)
    feed(model, cache, TOKENS[:n_tokens])
    return [layer.to_quantized(group_size=64, bits=bits) for layer in cache] if bits else cache


def raw(array: mx.array) -> bytes:
    """The bytes of an array."""
    return bytes(memoryview(mx.contiguous(array).view(mx.uint8)))


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_cache_comes_back_bit_exact_and_continues_alike(dtype: str, bits: int) -> None:
    """Every array, and the logits of the next tokens."""
    model = build_tiny(dtype=DTYPES[dtype])
    cache = filled(model, bits=bits)
    layers = kv.capture(cache)
    assert {spec.dtype for layer in layers for spec in (layer.spec.keys, layer.spec.values)} == {dtype}
    assert {layer.spec.keys.bits for layer in layers} == {bits}
    restored = kv.restore(layers)
    assert [type(layer) for layer in restored] == [type(layer) for layer in cache]
    for before, after in zip(kv.capture(cache), kv.capture(restored), strict=True):
        assert before.n_tokens == after.n_tokens == 44
        for a, b in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
            assert raw(a) == raw(b)
    for step in range(44, 48):
        assert raw(feed(model, cache, [TOKENS[step]])) == raw(feed(model, restored, [TOKENS[step]]))


def test_latents_of_unequal_width_are_plain_layers() -> None:
    """MLA keeps a latent as keys and a rotary part as values."""
    model = build_tiny("deepseek_v3", mx.bfloat16)
    layers = kv.capture(filled(model))
    assert (layers[0].spec.keys.width, layers[0].spec.values.width) == (128, 64)
    restored = kv.restore(layers)
    assert raw(feed(model, filled(model), [5])) == raw(feed(model, restored, [5]))


def test_values_of_no_width_come_back_as_an_empty_array() -> None:
    """Some latent layouts have no values at all."""
    cache = KVCache()
    cache.keys, cache.values, cache.offset = mx.ones((1, 1, 256, 32)), mx.zeros((1, 1, 256, 0)), 40
    (layer,) = kv.capture([cache])
    assert layer.values == ()
    (restored,) = kv.restore([layer])
    assert restored.values.shape == (1, 1, 256, 0)
    restored.update_and_fetch(mx.ones((1, 1, 1, 32)), mx.zeros((1, 1, 1, 0)))
    assert restored.offset == 41


@pytest.mark.parametrize("bits", [0, 8])
def test_a_trimmed_cache_says_the_tokens_that_it_has_left(bits: int) -> None:
    """44 tokens stay 44 after the cache was extended to 280 and trimmed back."""
    model = build_tiny()
    cache = filled(model, 280, bits)
    for layer in cache:
        layer.trim(236)
    layers = kv.capture(cache)
    assert {layer.n_tokens for layer in layers} == {44}
    assert all(layer.keys[0].shape[2] > 280 for layer in layers), "capacity, not length"


def test_what_was_captured_does_not_change_when_the_engine_goes_on() -> None:
    """MLX arrays are mutable by slices; a trim and another append overwrite rows of the same buffer."""
    model = build_tiny()
    cache = filled(model)
    layers = kv.capture(cache)
    before = [raw(layer.keys[0][:, :, :44]) for layer in layers]
    for layer in cache:
        layer.trim(20)
    feed(model, cache, [1, 2, 3, 4, 5])
    assert [raw(layer.keys[0][:, :, :44]) for layer in layers] == before


def test_two_restores_of_the_same_layers_do_not_disturb_each_other() -> None:
    """Each replays its own continuation."""
    model = build_tiny()
    layers = kv.capture(filled(model))
    one, other = kv.restore(layers), kv.restore(layers)
    feed(model, one, [9, 9, 9])
    expected = feed(model, filled(model), [11])
    assert raw(feed(model, other, [11])) == raw(expected)


def test_the_first_token_after_a_restore_goes_into_the_head_room() -> None:
    """No growth: the buffer that was restored is the one that is appended to."""
    model = build_tiny()
    restored = kv.restore(kv.capture(filled(model)))
    feed(model, restored, [1])
    assert restored[0].offset == 45
    assert restored[0].keys.shape[2] == 256


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_is_known_before_anything_was_computed(name: str, dtype: str) -> None:
    """Tracing one token says what a filled cache will look like."""
    model = build_tiny(name, DTYPES[dtype])
    assert kv.probe(model) == kv.layout(filled(model))


def test_the_layout_of_a_quantizing_engine_follows_from_the_plain_one() -> None:
    """As to_quantized makes it."""
    model = build_tiny(dtype=mx.bfloat16)
    assert kv.quantized(kv.probe(model), 8, 64) == kv.layout(filled(model, bits=8))


def test_a_draft_models_layers_follow_the_models() -> None:
    """The server keeps both in one list."""
    model, draft = build_tiny(), build_tiny("deepseek_v3")
    assert kv.probe(model, draft) == kv.layout(filled(model) + filled(draft))
    exact = build_tiny("qwen3_5")
    own, its = filled(model), filled(exact)
    cache = own + its
    assert kv.probe(model, exact) == kv.layout(cache)
    restored = kv.restore(kv.capture(cache))
    for one, mine in ((model, slice(0, len(own))), (exact, slice(len(own), None))):
        assert raw(feed(one, restored[mine], [7])) == raw(feed(one, cache[mine], [7]))


def test_subclasses_are_not_taken_for_their_bases() -> None:
    """Nobody knows what they changed."""

    class Odd(KVCache):
        pass

    with pytest.raises(UnsupportedLayerError, match="Odd"):
        kv.capture([Odd()])


def test_batch_caches_are_refused_with_advice() -> None:
    """They hold several sequences."""
    batch = BatchKVCache.merge(filled(build_tiny())[:1])
    for cache in ([batch], [CacheList(KVCache(), batch)]):
        with pytest.raises(UnsupportedLayerError, match=r"BatchKVCache.*extract"):
            kv.capture(cache)
        with pytest.raises(UnsupportedLayerError):
            token_count(cache)


def test_a_plain_cache_can_be_captured_in_part() -> None:
    """Its rows are one a token. More than it holds it cannot give."""
    model = build_tiny()
    cache = filled(model)
    restored = kv.restore(kv.capture(cache, 30))
    assert raw(feed(model, restored, [5])) == raw(feed(model, filled(model, 30), [5]))
    for n_tokens in (0, 45):
        with pytest.raises(InvalidRequestError, match="44"):
            kv.capture(cache, n_tokens)


def test_a_concatenating_cache_comes_back_as_a_plain_one() -> None:
    """It holds the same rows; after a trim only those before the offset."""
    cache, grown = ConcatenateKVCache(), KVCache()
    for layer in (cache, grown):
        layer.update_and_fetch(mx.arange(80.0).reshape(1, 2, 10, 4), mx.arange(80.0).reshape(1, 2, 10, 4) + 1)
        layer.trim(3)
    (restored,) = kv.restore(kv.capture([cache]))
    assert type(restored) is KVCache
    assert restored.offset == 7
    step = mx.ones((1, 2, 1, 4))
    for one, other in zip(restored.update_and_fetch(step, step), grown.update_and_fetch(step, step), strict=True):
        assert raw(one) == raw(other)


def test_what_does_not_fit_together_is_refused() -> None:
    """Empty layers, two sequences, an offset beyond the rows, layers that disagree, no layers, foreign arrays."""
    cache = filled(build_tiny())
    two = KVCache()
    two.keys = two.values = mx.zeros((2, 2, 256, 64))
    two.offset = 10
    beyond = KVCache()
    beyond.keys = beyond.values = mx.zeros((1, 2, 256, 64))
    beyond.offset = 257
    short = kv.restore(kv.capture(cache))[0]
    short.trim(1)
    whole_numbers = KVCache()
    whole_numbers.keys = whole_numbers.values = mx.zeros((1, 2, 256, 64), mx.int32)
    whole_numbers.offset = 5
    not_affine = QuantizedKVCache(group_size=64, bits=8)
    not_affine.keys = not_affine.values = (mx.zeros((1, 2, 256, 8), mx.uint32), *[mx.zeros((1, 2, 256, 1))] * 2)
    not_affine.offset = 5
    for bad, message in (
        ([KVCache()], "empty"),
        ([two], "one sequence"),
        ([beyond], "does not fit"),
        ([cache[0], short], r"\[43, 44\]"),
        ([], "no layers"),
        ([not_affine], "affine"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            kv.capture(bad)
    with pytest.raises(InvalidRequestError):
        Layout(tuple(layer.spec for layer in kv.capture([whole_numbers]))).validate()


def test_aligning_cuts_every_layer_to_what_all_hold() -> None:
    """After speculative decoding the draft model's layers lag; a key may be shorter than the cache."""
    cache = filled(build_tiny())
    cache[1].trim(2)
    assert align(cache, 43) == 42
    assert {layer.offset for layer in cache} == {42}
    assert align(cache, 10) == 10
    assert align([], 10) is None
    assert align([BatchKVCache([0])], 10) is None


def test_aligning_leaves_alone_what_cannot_be_cut() -> None:
    """A ring can go back until it wraps, recurrent state never."""
    model = build_tiny("gemma3")
    early, late = filled(model, 20), filled(model, 44)
    assert align(early, 18) == 18
    assert {layer.offset for layer in early} == {18}
    assert raw(feed(model, early, [5])) == raw(feed(model, filled(model, 18), [5]))
    assert align(late, 44) == align(late, 50) == 44
    late[-1].trim(1)
    assert align(late, 44) == 0
    assert align(late, 43) == 0
    hybrid = filled(build_tiny("qwen3_5"))
    assert align(hybrid, 44) == 44
    assert align(hybrid, 43) == 0
    assert hybrid[-1].offset == 44, "untouched"
    assert align([ArraysCache(2)], 10) == 10
