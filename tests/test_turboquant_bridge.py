"""Quantized caches that go through the store, and stored blocks that become such caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kvstore import Reason, connect
from kvstore.codecs import device
from kvstore.codecs.assemble import assemble_layer
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.encode import encode_run
from kvstore.codecs.profiles import Profile, parse_profile
from kvstore.codecs.runs import narrow_run, payload_run
from kvstore.codecs.turboquant import turboquant_mse_recipe, turboquant_prod_recipe
from kvstore.config import Config
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.errors import InvalidRequestError
from kvstore.turboquant import KVCacheConfig, MultiHeadKVCache, QuantStrategy, blocks_to_cache, bridge, load, save
from tests.support.daemon import DaemonProcess
from tests.support.limits import make_config
from tests.support.stored import finish_runs, random_payload, streamed

HEADS = 4
WEIGHTS = b"weights of a model"
CONFIG = KVCacheConfig(64, key_bits=3, value_bits=4, seed=7)
TOKENS = list(range(1000, 1300))
PATIENT = {"fetch_connect_ms": 5000, "fetch_stall_ms": 10_000, "fetch_total_ms": 30_000}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon on an empty directory; by default it would quantize what it is given."""
    with DaemonProcess(tmp_path / "data") as running:
        yield running


def caches(n_tokens: int, config: KVCacheConfig = CONFIG) -> list[MultiHeadKVCache]:
    """Two layers of four heads: 32 words of values a token, which another profile could quantize again."""
    made = []
    for layer in range(2):
        rows = np.random.default_rng(layer).normal(size=(2, HEADS, n_tokens, 64)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        cache = MultiHeadKVCache(config, HEADS)
        cache.append_all(rows[0], rows[1])
        made.append(cache)
    return made


def held(cache: MultiHeadKVCache, n_tokens: int) -> list[bytes]:
    """The bytes of the first tokens of all heads."""
    heads = [cache.head(h) for h in range(cache.num_heads)]
    return [
        np.array(tensor)[:n_tokens].tobytes()
        for head in heads
        for packed in (head.packed_keys, head.packed_values)
        for tensor in packed.tensors
    ]


def test_a_cache_comes_back_from_the_store_bit_for_bit(daemon: DaemonProcess) -> None:
    """Whole, as a prefix, and under nothing but its own recipes and weights; the codes are never quantized again."""
    stored = caches(300)
    with connect(config=make_config(listen=daemon.listen, min_prefix_tokens=1, **PATIENT)) as client:
        result = save(client, stored, TOKENS, WEIGHTS)
        assert (result.reason, result.durable, result.stored_tokens) == (Reason.OK, True, 300)
        for tokens, n_tokens in ((TOKENS, 300), ([*TOKENS[:270], 5, 6], 270)):
            loaded = load(client, CONFIG, (2, HEADS), tokens, WEIGHTS)
            assert loaded is not None and [cache.num_tokens for cache in loaded] == [n_tokens] * 2
            for got, expected in zip(loaded, stored, strict=True):
                assert held(got, n_tokens) == held(expected, n_tokens)
        assert load(client, CONFIG, (2, HEADS), TOKENS, b"other weights") is None
        assert load(client, KVCacheConfig(64, 3, 4, seed=8), (2, HEADS), TOKENS, WEIGHTS) is None
        assert load(client, KVCacheConfig(64, 3, 4, QuantStrategy.MSE, 7), (2, HEADS), TOKENS, WEIGHTS) is None


def test_caches_with_norms_and_prefixes_of_one_token_come_back_too(daemon: DaemonProcess) -> None:
    """Scales travel beside the codes."""
    config = KVCacheConfig(64, store_norms=True)
    stored = caches(9, config)
    with connect(config=make_config(listen=daemon.listen, min_prefix_tokens=1, **PATIENT)) as client:
        assert save(client, stored, TOKENS[:9], WEIGHTS).durable
        for n_tokens in (9, 1):
            loaded = load(client, config, (2, HEADS), TOKENS[:n_tokens], WEIGHTS)
            assert loaded is not None
            assert [held(c, n_tokens) for c in loaded] == [held(c, n_tokens) for c in stored]


def test_a_cache_whose_window_has_moved_on_is_not_saved() -> None:
    """Its first row is not that of the first token."""
    windowed = KVCacheConfig(64, seed=7, max_tokens=50)
    with pytest.raises(InvalidRequestError, match="50"):
        save(connect(config=Config(listen="unix:/nowhere/s")), caches(60, windowed), TOKENS[:60], WEIGHTS)


def stored_blocks(layout: Layout, profile: Profile) -> tuple[list[HitBlock], list[bytes]]:
    """Two blocks of 20 and 9 tokens, of which 9 are shown and 7 used."""
    blocks, payloads = [], []
    for seed, (n_tokens, shown, take) in enumerate([(20, 20, 20), (9, 9, 7)]):
        payload = random_payload(np.random.default_rng(seed), "BF16", n_tokens * layout.token_bytes // 2)
        run = narrow_run(encode_run(layout, payload_run(layout, payload, n_tokens), profile), shown)
        sealed, data = finish_runs([run])
        blocks.append(HitBlock(sealed, take))
        payloads.append(data)
    return blocks, payloads


@pytest.mark.parametrize("key_recipe", [turboquant_prod_recipe(4), turboquant_mse_recipe(3, 9)], ids=str)
def test_stored_blocks_become_a_cache_without_decoding(key_recipe: object) -> None:
    """Its reconstruction is what a fetch decodes, and attention on its codes is attention over that."""
    layout = Layout((LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16")),) * 2)
    profile = Profile("test", key_recipe, turboquant_mse_recipe(4))  # type: ignore[arg-type]
    blocks, payloads = stored_blocks(layout, profile)
    cache = blocks_to_cache(layout, 1, blocks, streamed(blocks, payloads, 1))
    layer = assemble_layer(layout, 1, blocks, streamed(blocks, payloads, 1))
    assert cache.num_heads == 2 and cache.num_tokens == 27
    query = np.random.default_rng(4).normal(size=64).astype(np.float32)
    for h in range(2):
        for got, array in (
            (cache.head(h).reconstruct_keys(), layer.keys[0]),
            (cache.head(h).reconstruct_values(), layer.values[0]),
        ):
            assert np.array_equal(np.array(got.astype(mx.bfloat16).view(mx.uint16)), bits_of(array[0, h, :27]))
        keys = np.array(cache.head(h).reconstruct_keys())
        np.testing.assert_allclose(np.array(cache.head(h).attention_scores(query)), keys @ query, atol=1e-3)
    cache.append_all(np.ones((2, 3, 64)), np.ones((2, 3, 64)))
    assert cache.num_tokens == 30
    assert device.dtype_name(cache.head(0).packed_keys.tensors[1]) == "BF16"


def bits_of(array: mx.array) -> np.ndarray:
    """bfloat16 as its bit patterns."""
    return np.array(mx.contiguous(array).view(mx.uint16))


@pytest.mark.parametrize("name", ["affine4", "raw", "channel4:affine4"])
def test_blocks_of_another_codec_are_refused(name: str) -> None:
    """With the name of what they are."""
    layout = Layout((LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16")),))
    payload = random_payload(np.random.default_rng(1), "BF16", 64 * layout.token_bytes // 2)
    sealed, data = finish_runs([encode_run(layout, payload_run(layout, payload, 64), parse_profile(name))])
    blocks = [HitBlock(sealed, 64)]
    with pytest.raises(InvalidRequestError, match=r"raw|affine|groups"):
        blocks_to_cache(layout, 0, blocks, streamed(blocks, [data], 0))


def test_caches_of_dimensions_that_are_packed_alike_do_not_meet_in_the_store() -> None:
    """Rows of 10 coordinates are as wide as those of 16: their namespaces tell them apart."""
    caches = [MultiHeadKVCache(KVCacheConfig(dim), 2) for dim in (10, 16)]
    layers = [bridge.cache_to_layer(cache) for cache in caches]
    assert layers[0].spec == layers[1].spec
    spaces = [
        bridge._namespace([bridge._recipes(cache)], [layer], WEIGHTS, b"")
        for cache, layer in zip(caches, layers, strict=True)
    ]
    assert spaces[0].root != spaces[1].root
