"""kvstore.turboquant: accuracy on unit vectors, and the caches line by line of what they promise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import InvalidRequestError
from kvstore.turboquant import (
    InvalidVectorError,
    KVCacheConfig,
    MultiHeadKVCache,
    QuantizedKVCache,
    QuantStrategy,
    TurboQuantMSE,
    TurboQuantProd,
)

# The most that the relative squared error of a 128-dimensional unit vector may be, and the most that the variance of
# its inner products with unit vectors, times the dimension, may be: (pi / 2 - 1) times the error at one bit less, where
# signs after a normal matrix have pi / 2 times (.57, .18, .054).
MSE_MAX = {2: 0.1170, 3: 0.0345, 4: 0.0095, 8: 4.3e-5}
VARIANCE_MAX = {2: 0.22, 3: 0.07, 4: 0.021}

Array = np.ndarray[Any, Any]


def unit_vectors(n: int, dim: int, seed: int = 0) -> Array:
    """float32 `[n, dim]` of length 1."""
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def rel_mse(dim: int, bits: int) -> float:
    """Mean squared error of 3,000 unit vectors."""
    vectors, quantizer = unit_vectors(3000, dim), TurboQuantMSE(dim, bits)
    decoded = np.array(quantizer.dequantize(quantizer.quantize(vectors)))
    return float(((decoded - vectors) ** 2).sum(-1).mean())


@pytest.mark.parametrize("bits", MSE_MAX)
@pytest.mark.parametrize(("dim", "slack"), [(128, 1.0), (64, 1.03), (256, 1.03)])
def test_the_squared_error_of_mse_is_as_small_as_theory_says(dim: int, slack: float, bits: int) -> None:
    """Lloyd-Max on the exact marginal; a wrong rotation, codebook or scale shows here."""
    assert rel_mse(dim, bits) <= MSE_MAX[bits] * slack


@pytest.mark.parametrize("bits", VARIANCE_MAX)
@pytest.mark.parametrize("seed", [42, 7])
def test_inner_products_of_prod_have_no_bias_and_little_variance(bits: int, seed: int) -> None:
    """Against queries that point where the keys do, so that a slope shows."""
    keys, noise = unit_vectors(3000, 128), unit_vectors(3000, 128, seed=1)
    quantizer = TurboQuantProd(128, bits, seed)
    packed = quantizer.quantize(keys)
    decoded = np.array(quantizer.dequantize(packed)).astype(np.float64)
    queries = keys + noise
    truth, estimates = (keys * queries).sum(-1), (decoded * queries).sum(-1)
    assert 0.99 <= (truth * estimates).sum() / (truth * truth).sum() <= 1.01
    errors = ((decoded - keys) * noise).sum(-1)
    assert errors.var() * 128 <= VARIANCE_MAX[bits]
    one = np.array(quantizer.estimate_inner_products(packed, noise[0]))
    np.testing.assert_allclose(one, decoded @ noise[0], atol=1e-6)


@pytest.mark.parametrize(("bits", "mse", "prod"), [(2, 32, 36), (3, 48, 52), (4, 64, 68)])
def test_bytes_of_a_vector(bits: int, mse: int, prod: int) -> None:
    """Codes only, and four bytes more for the residual of prod."""
    vectors = unit_vectors(10, 128)
    assert TurboQuantMSE(128, bits).quantize(vectors).nbytes == 10 * mse
    assert TurboQuantProd(128, bits).quantize(vectors).nbytes == 10 * prod


@pytest.mark.parametrize("make", [TurboQuantMSE, TurboQuantProd])
def test_batches_are_quantized_row_by_row(make: Callable[..., Any]) -> None:
    """Any leading shape, bit for bit, also where rows are taken together in spans."""
    vectors = unit_vectors(5000, 128).reshape(2, 2500, 128)
    quantizer = make(128, 4)
    packed = quantizer.quantize(vectors)
    one = quantizer.quantize(vectors[1, 2345])
    assert packed.tensors[0].shape[:2] == (2, 2500)
    for whole, single in zip(packed.tensors, one.tensors, strict=True):
        assert np.array_equal(np.array(whole[1, 2345]), np.array(single))
    assert quantizer.dequantize(packed).shape == (2, 2500, 128)
    assert quantizer.estimate_inner_products(packed, vectors[0, 0]).shape == (2, 2500)


def test_seeds_give_different_codes_and_the_same_seed_the_same() -> None:
    """Deterministic, on every machine."""
    vectors = unit_vectors(4, 64)
    first, again, other = (np.array(TurboQuantMSE(64, 4, seed).quantize(vectors).tensors[0]) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_vectors_of_another_quantizer_are_refused() -> None:
    """Their codes mean something else."""
    packed = TurboQuantMSE(64, 4, 1).quantize(unit_vectors(4, 64))
    with pytest.raises(InvalidVectorError) as caught:
        TurboQuantMSE(64, 4, 2).dequantize(packed)
    assert caught.value.reason == "recipe"


UNIT = unit_vectors(3, 64)


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("bits", lambda: TurboQuantMSE(64, 0)),
        ("bits", lambda: TurboQuantMSE(64, 9)),
        ("bits", lambda: TurboQuantMSE(64, 3.5)),
        ("bits", lambda: TurboQuantProd(64, 1)),
        ("bits", lambda: QuantizedKVCache(KVCacheConfig(64, key_bits=1))),
        ("dimension", lambda: TurboQuantMSE(0, 4)),
        ("dimension", lambda: TurboQuantMSE(1, 4)),
        ("dimension", lambda: TurboQuantMSE(8193, 4)),
        ("dimension", lambda: TurboQuantMSE(10, 4).dequantize(TurboQuantMSE(16, 4).quantize(unit_vectors(3, 16)))),
        ("temperature", lambda: filled().attention_output(UNIT[0], math.inf)),
        ("temperature", lambda: filled().attention_output(UNIT[0], -math.inf)),
        ("temperature", lambda: filled().attention_output(UNIT[0], math.nan)),
        ("temperature", lambda: filled().attention_output(UNIT[0], 1e39)),
        ("temperature", lambda: filled().attention_output(UNIT[0], None)),
        ("temperature", lambda: QuantizedKVCache(KVCacheConfig(64)).attention_output(UNIT[0], math.inf)),
        ("temperature", lambda: MultiHeadKVCache(KVCacheConfig(64), 3).attention_output_all(UNIT, math.inf)),
        ("temperature", lambda: MultiHeadKVCache(KVCacheConfig(64), 3).concat_outputs(UNIT, math.nan)),
        ("config", lambda: KVCacheConfig.from_dict({"dim": 64, "key_strategy": "best"})),
        ("config", lambda: KVCacheConfig.from_dict({"dim": "64"})),
        ("config", lambda: KVCacheConfig.from_dict({"dim": 64, "colour": 1})),
        ("config", lambda: KVCacheConfig.from_dict({})),
        ("seed", lambda: TurboQuantMSE(64, 4, -1)),
        ("dimension", lambda: TurboQuantMSE(64, 4).quantize(unit_vectors(3, 32))),
        ("dimension", lambda: TurboQuantMSE(64, 4).quantize([[1.0], [1.0, 2.0]])),
        ("dimension", lambda: TurboQuantMSE(64, 4).quantize(1.0)),
        ("not_unit", lambda: TurboQuantMSE(64, 4).quantize(UNIT * 2)),
        ("zero", lambda: TurboQuantMSE(64, 4).quantize(UNIT * np.array([[1.0], [0.0], [1.0]], np.float32))),
        ("non_finite", lambda: TurboQuantMSE(64, 4).quantize(np.where(np.arange(64) == 3, np.nan, UNIT))),
        ("non_finite", lambda: TurboQuantMSE(64, 4).quantize(np.where(np.arange(64) == 3, np.inf, UNIT))),
        ("dimension", lambda: filled().attention_scores(unit_vectors(1, 32)[0])),
        ("dimension", lambda: filled().attention_scores(unit_vectors(2, 64))),
        ("non_finite", lambda: filled().attention_output(np.full(64, np.nan))),
        ("length", lambda: filled().append(UNIT, UNIT[:2])),
        ("length", lambda: filled().append([], UNIT)),
        ("length", lambda: filled().append(UNIT, [])),
        ("dimension", lambda: filled().push_token(UNIT, UNIT)),
        ("length", lambda: QuantizedKVCache(KVCacheConfig(64, max_tokens=-1))),
        ("heads", lambda: MultiHeadKVCache(KVCacheConfig(64), 0)),
        ("heads", lambda: MultiHeadKVCache(KVCacheConfig(64), 2).head(2)),
        ("heads", lambda: MultiHeadKVCache(KVCacheConfig(64), 2).append_all([UNIT], [UNIT])),
        ("heads", lambda: MultiHeadKVCache(KVCacheConfig(64), 2).attention_scores_all(UNIT)),
        ("length", lambda: MultiHeadKVCache(KVCacheConfig(64), 2).append_all([UNIT, UNIT[:1]], [UNIT, UNIT[:1]])),
    ],
)
def test_what_cannot_be_is_a_typed_error(reason: str, call: Callable[[], object]) -> None:
    """One class, a word for the reason; it is a request that can never work."""
    with pytest.raises(InvalidVectorError) as caught:
        call()
    assert caught.value.reason == reason
    assert isinstance(caught.value, InvalidRequestError)


def filled(n: int = 20, **config: Any) -> QuantizedKVCache:
    """A cache of `n` tokens of 64 dimensions."""
    cache = QuantizedKVCache(KVCacheConfig(64, **config))
    cache.append(unit_vectors(n, 64, seed=1), unit_vectors(n, 64, seed=2))
    return cache


def held(cache: QuantizedKVCache) -> list[bytes]:
    """The bytes of all tensors."""
    return [np.array(t).tobytes() for packed in (cache.packed_keys, cache.packed_values) for t in packed.tensors]


@pytest.mark.parametrize("strategy", QuantStrategy)
def test_scores_and_outputs_are_those_of_the_reconstructed_cache(strategy: QuantStrategy) -> None:
    """Computed on codes, and equal to attention over decoded keys and values."""
    cache = filled(50, key_strategy=strategy)
    query = np.random.default_rng(5).normal(size=64).astype(np.float32) * 3
    keys, values = np.array(cache.reconstruct_keys()), np.array(cache.reconstruct_values())
    scores = np.array(cache.attention_scores(query))
    np.testing.assert_allclose(scores, keys @ query, atol=1e-5)
    for temperature, factor in ((2.5, 2.5), (0.0, 1 / 8), (-1.0, 1 / 8)):
        weights = np.exp(scores * factor - (scores * factor).max())
        expected = weights / weights.sum() @ values
        np.testing.assert_allclose(np.array(cache.attention_output(query, temperature)), expected, atol=1e-6)


def test_the_default_is_four_bits_with_prod_keys() -> None:
    """And values have a rotation of their own: seed + 2."""
    config = KVCacheConfig(64)
    assert config == KVCacheConfig(64, 4, 4, QuantStrategy.PROD, 42, 0)
    assert (config.key_recipe.name, config.key_recipe.param("seed")) == ("turboquant-prod", 42)
    assert (config.value_recipe.name, config.value_recipe.param("seed")) == ("turboquant-mse", 44)


def test_an_empty_cache_has_no_scores_and_a_zero_output() -> None:
    """Nothing is divided by nothing."""
    cache = QuantizedKVCache(KVCacheConfig(64))
    assert cache.num_tokens == 0
    assert cache.attention_scores(UNIT[0]).shape == (0,)
    assert np.array_equal(np.array(cache.attention_output(UNIT[0])), np.zeros(64))
    assert cache.reconstruct_keys().shape == cache.reconstruct_values().shape == (0, 64)
    assert cache.stats().num_tokens == cache.stats().total_bytes == cache.stats().baseline_bytes == 0
    assert cache.stats().compression_ratio == 0


def test_appending_nothing_changes_nothing() -> None:
    """Also as an empty array."""
    cache = filled()
    before = held(cache)
    cache.append([], [])
    cache.append(np.zeros((0, 64)), np.zeros((0, 64)))
    assert held(cache) == before


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=6), strategy=st.sampled_from(QuantStrategy), window=st.integers(0, 45)
)
def test_incremental_equals_bulk(cuts: list[int], strategy: QuantStrategy, window: int) -> None:
    """Bit for bit, however a sequence is cut, tokens pushed one by one among them, with and without a window."""
    keys, values = unit_vectors(40, 64, seed=1), unit_vectors(40, 64, seed=2)
    config = KVCacheConfig(64, key_strategy=strategy, max_tokens=window)
    bulk, grown = QuantizedKVCache(config), QuantizedKVCache(config)
    bulk.append(keys, values)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        if last - first == 1:
            grown.push_token(keys[first], values[first])
        else:
            grown.append(keys[first:last], values[first:last])
        if first % 2:
            grown.attention_scores(UNIT[0])
    assert held(grown) == held(bulk)
    assert grown.num_tokens == min(40, window or 40)


def test_the_oldest_tokens_leave_a_window() -> None:
    """What stays are the newest, in order; memory does not grow with what was pushed."""
    cache, keys = QuantizedKVCache(KVCacheConfig(64, max_tokens=7)), unit_vectors(600, 64, seed=1)
    for key in keys:
        cache.push_token(key, key)
    whole = QuantizedKVCache(KVCacheConfig(64))
    whole.append(keys[-7:], keys[-7:])
    assert held(cache) == held(whole)
    assert cache.stats().num_tokens == 7


@settings(max_examples=25, deadline=None)
@given(
    spoiled=st.sampled_from(["keys", "values"]),
    how=st.sampled_from(["nan", "long", "zero", "short", "narrow"]),
    row=st.integers(0, 4),
    head=st.integers(0, 2),
)
def test_an_append_that_fails_changes_no_head(spoiled: str, how: str, row: int, head: int) -> None:
    """Keys, values and all heads move together."""
    cache = MultiHeadKVCache(KVCacheConfig(64), 3)
    good = unit_vectors(15, 64).reshape(3, 5, 64)
    cache.append_all(good, good)
    before = [held(cache.head(h)) for h in range(3)]
    bad = [head_rows.copy() for head_rows in good]
    if how in ("nan", "long", "zero"):
        bad[head][row] *= {"nan": np.nan, "long": 3, "zero": 0}[how]
    else:
        bad[head] = bad[head][:row] if how == "short" else bad[head][:, :32]
    with pytest.raises(InvalidVectorError):
        cache.append_all(*((bad, good) if spoiled == "keys" else (good, bad)))
    assert [held(cache.head(h)) for h in range(3)] == before
    with pytest.raises(InvalidVectorError):
        cache.head(head).append(*((bad[head], good[head]) if spoiled == "keys" else (good[head], bad[head])))
    assert [held(cache.head(h)) for h in range(3)] == before


def test_clear_forgets_and_the_cache_goes_on() -> None:
    """As if it were new."""
    cache = filled()
    cache.clear()
    assert cache.num_tokens == 0
    cache.append(unit_vectors(20, 64, seed=1), unit_vectors(20, 64, seed=2))
    assert held(cache) == held(filled())


def test_stats_count_bytes_against_float32() -> None:
    """Keys of 4 bits prod, values of 2 bits mse."""
    stats = filled(10, value_bits=2).stats()
    assert (stats.num_tokens, stats.key_bytes, stats.value_bytes) == (10, 10 * 36, 10 * 16)
    assert stats.baseline_bytes == 10 * 2 * 64 * 4
    assert stats.compression_ratio == pytest.approx(5120 / 520)


def test_every_head_has_a_seed_of_its_own() -> None:
    """seed + 1000 h, and head h is the cache of one head with that seed."""
    keys, values = unit_vectors(12, 64, 1).reshape(3, 4, 64), unit_vectors(12, 64, 2).reshape(3, 4, 64)
    cache = MultiHeadKVCache(KVCacheConfig(64, seed=5), 3)
    cache.append_all(keys, mx.array(values))
    queries = np.random.default_rng(3).normal(size=(3, 64)).astype(np.float32)
    scores, outputs = cache.attention_scores_all(queries), cache.attention_output_all(queries)
    for h in range(3):
        alone = QuantizedKVCache(KVCacheConfig(64, seed=5 + 1000 * h))
        alone.append(keys[h], values[h])
        assert held(cache.head(h)) == held(alone)
        assert np.array_equal(np.array(scores[h]), np.array(alone.attention_scores(queries[h])))
        assert np.array_equal(np.array(cache.reconstruct_keys_all()[h]), np.array(alone.reconstruct_keys()))
        assert np.array_equal(np.array(cache.reconstruct_values_all()[h]), np.array(alone.reconstruct_values()))
    joined = np.array(cache.concat_outputs(queries))
    assert np.array_equal(joined, np.concatenate([np.array(output) for output in outputs]))
    assert cache.stats().total_bytes == 3 * cache.head(0).stats().total_bytes
    cache.clear()
    assert cache.num_tokens == 0 and cache.stats().total_bytes == 0


def test_with_norms_vectors_of_any_length_are_kept() -> None:
    """Keys of a model are no unit vectors; zero is a vector too."""
    keys = unit_vectors(20, 64) * np.linspace(0, 30, 20)[:, None].astype(np.float32)
    cache = QuantizedKVCache(KVCacheConfig(64, store_norms=True, key_strategy=QuantStrategy.MSE))
    cache.append(keys, keys)
    decoded = np.array(cache.reconstruct_keys())
    assert np.array_equal(decoded[0], np.zeros(64))
    errors = ((decoded - keys) ** 2).sum(-1)[1:] / (keys**2).sum(-1)[1:]
    assert errors.mean() < 0.0095


@pytest.mark.parametrize("strategy", QuantStrategy)
@pytest.mark.parametrize("dim", [2, 3, 5, 7, 8, 9, 12, 17, 80, 100])
def test_every_dimension_from_two_is_packed_and_its_bits_are_counted(dim: int, strategy: QuantStrategy) -> None:
    """Decoded near what came in, attention over it as over what is decoded, and bytes as they are."""
    cache = QuantizedKVCache(KVCacheConfig(dim, 8, 8, strategy))
    keys, values = unit_vectors(50, dim, seed=1), unit_vectors(50, dim, seed=2)
    cache.append(keys, values)
    decoded = np.array(cache.reconstruct_keys())
    assert decoded.shape == (50, dim)
    assert ((decoded - keys) ** 2).sum(-1).mean() < 1e-3
    query = np.random.default_rng(5).normal(size=dim).astype(np.float32)
    scores = np.array(cache.attention_scores(query))
    np.testing.assert_allclose(scores, decoded @ query, atol=1e-5)
    weights = np.exp(scores - scores.max())
    expected = weights / weights.sum() @ np.array(cache.reconstruct_values())
    np.testing.assert_allclose(np.array(cache.attention_output(query, 1.0)), expected, atol=1e-5)
    stats = cache.stats()
    assert stats.key_bytes == sum(tensor.nbytes for tensor in cache.packed_keys.tensors)
    assert stats.key_bits_packed == pytest.approx(8 * stats.key_bytes / (50 * dim))
    assert stats.value_bits_packed == pytest.approx(8 * stats.value_bytes / (50 * dim))
    assert stats.value_bits_packed >= 8 == stats.value_bits
    assert stats.baseline_bytes == 50 * 2 * dim * 4


def test_a_large_temperature_takes_the_best_token() -> None:
    """Without an overflow on the way."""
    cache = filled(20)
    query = unit_vectors(20, 64, seed=1)[7] * 30
    output = np.array(cache.attention_output(query, 3e38))
    best = int(np.array(cache.attention_scores(query)).argmax())
    np.testing.assert_allclose(output, np.array(cache.reconstruct_values())[best], atol=1e-6)


def test_config_and_strategy_go_through_json() -> None:
    """As plain text and numbers, and back."""
    config = KVCacheConfig(80, 3, 2, QuantStrategy.MSE, 7, 100, True)
    text = json.dumps(config.to_dict())
    assert json.loads(text)["key_strategy"] == "mse" == json.loads(json.dumps(QuantStrategy.MSE))
    assert KVCacheConfig.from_dict(json.loads(text)) == config
    assert KVCacheConfig.from_dict({"dim": 64}) == KVCacheConfig(64)
    assert isinstance(KVCacheConfig.from_dict(json.loads(text)).key_strategy, QuantStrategy)


def test_statistics_say_how_a_cache_is_kept_and_go_through_json() -> None:
    """Dimension, bits and strategy of one head; number and size of heads, and each by itself, of many."""
    one = json.loads(json.dumps(filled(10, value_bits=2).stats().to_dict()))
    assert (one["dim"], one["key_bits"], one["value_bits"], one["key_strategy"]) == (64, 4, 2, "prod")
    assert (one["num_tokens"], one["key_bytes"], one["total_bytes"]) == (10, 360, 520)
    assert (one["key_bits_packed"], one["value_bits_packed"]) == (4.5, 2.0)
    cache = MultiHeadKVCache(KVCacheConfig(64), 3)
    cache.append_all(*[unit_vectors(15, 64, seed).reshape(3, 5, 64) for seed in (1, 2)])
    many = json.loads(json.dumps(cache.stats().to_dict()))
    assert (many["num_heads"], many["head_dim"], many["num_tokens"]) == (3, 64, 5)
    assert [head["num_tokens"] for head in many["heads"]] == [5, 5, 5]
    assert many["total_bytes"] == sum(head["total_bytes"] for head in many["heads"])
    assert many["compression_ratio"] == pytest.approx(many["heads"][0]["compression_ratio"])


def test_caches_configs_and_quantizers_say_what_they_are() -> None:
    """In a log or at a prompt."""
    cache = filled(20, value_bits=3)
    assert repr(cache) == "QuantizedKVCache(dim=64, num_tokens=20, key_bits=4, value_bits=3, key_strategy='prod')"
    many = repr(MultiHeadKVCache(KVCacheConfig(64), 3))
    assert many.startswith("MultiHeadKVCache(num_heads=3, head_dim=64, heads[0]=QuantizedKVCache(dim=64, num_tokens=0")
    assert "dim=64" in repr(KVCacheConfig(64)) and "mse" in repr(QuantStrategy.MSE)
    assert "dim=64" in repr(TurboQuantMSE(64, 4)) and "nbytes=96" in repr(TurboQuantMSE(64, 4).quantize(UNIT))
