"""PromptCache and PrefixStore: what comes from memory, what from the store, and that neither is ever wrong."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
)

from kvstore.client.results import Match, StoreResult
from kvstore.core.blocks import Reason
from kvstore.core.keys import Namespace
from kvstore.errors import ConfigError, InvalidRequestError, UnavailableError
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations import prompt_cache as prompt_cache_module
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import PromptCache
from kvstore.integrations.run import plug_in, run
from tests.support.fake_store import FakeClient, FakeSession
from tests.support.models import build_tiny, heldout_tokens, write_tiny
from tests.support.tiny_configs import VOCAB

TOKENS = heldout_tokens()


class Provider:
    """The parts of the server's ModelProvider that the cache looks at."""

    def __init__(self, key: tuple[str, str | None, str | None], model: Any, draft: Any = None, **flags: Any) -> None:
        self.model_key, self.model, self.draft_model, self.is_distributed = key, model, draft, False
        self.cli_args = types.SimpleNamespace(kv_bits=None, kv_group_size=64, prompt_cache_bytes=None, **flags)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model folders of equal shape and different weights."""
    base = tmp_path_factory.mktemp("models")
    return {name: str(write_tiny(base / name, seed=seed)) for seed, name in enumerate(("one", "other"))}


@pytest.fixture(scope="module")
def model() -> Any:
    """The model of folder `one`."""
    return build_tiny(seed=0)


@pytest.fixture
def digests(tmp_path: Path, folders: dict[str, str]) -> WeightsDigest:
    """With both folders known."""
    known = WeightsDigest(tmp_path / "cache")
    for path in folders.values():
        assert known.wait(path, 30.0)
    return known


@pytest.fixture
def client() -> FakeClient:
    """An empty store."""
    return FakeClient()


@pytest.fixture
def make(client: FakeClient, digests: WeightsDigest, folders: dict[str, str], model: Any) -> Any:
    """Prompt caches of new processes that share the store, and the key of their model."""
    key = (folders["one"], None, None)

    def new(**flags: Any) -> PromptCache:
        provider = Provider(key, model)
        for name, value in flags.items():
            setattr(provider.cli_args, name, value)
        return PromptCache(store=ModelStore(client, digests), provider=provider)  # type: ignore[arg-type]

    new.key = key  # type: ignore[attr-defined]
    return new


def feed(model: Any, cache: list[Any], tokens: Sequence[int]) -> mx.array:
    """Logits after the last of `tokens`."""
    logits = model(mx.array([list(tokens)]), cache=cache)[0, -1]
    mx.eval(logits)
    return logits


def filled(model: Any, tokens: Sequence[int]) -> list[Any]:
    """The model's cache after `tokens`."""
    cache = make_prompt_cache(model)
    feed(model, cache, tokens)
    return cache


def check_continuation(model: Any, tokens: Sequence[int], cache: list[Any], rest: Sequence[int]) -> None:
    """What a hit covers plus what is left is the prompt, and the next logits are those of a cold run."""
    assert rest
    assert {layer.offset for layer in cache} == {len(tokens) - len(rest)}
    assert list(tokens[len(tokens) - len(rest) :]) == list(rest)
    warm, cold = feed(model, cache, rest), feed(model, make_prompt_cache(model), tokens)
    assert mx.allclose(warm, cold, atol=1e-4)


def test_another_process_continues_from_the_store(make: Any, model: Any, client: FakeClient) -> None:
    """Supersequence, branch and exact prompt: one fetch each, at most all but the last token."""
    make().insert_cache(make.key, TOKENS[:200], filled(model, TOKENS[:200]))
    for tokens, covered in (
        (TOKENS[:240], 200),
        (TOKENS[:150] + TOKENS[700:750], 150),
        (TOKENS[:200], 199),
        (TOKENS[:100], 99),
    ):
        cache, rest = make().fetch_nearest_cache(make.key, tokens)
        assert len(tokens) - len(rest) == covered
        check_continuation(model, tokens, cache, rest)
    assert client.only.fetches == 4


def test_asking_and_fetching_take_together_no_longer_than_one_fetch_may(
    make: Any, model: Any, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that asks on its own thread waits for both."""
    cache = make()
    cache.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    make().insert_cache(make.key, TOKENS[:300], filled(model, TOKENS[:300]))
    stock = FakeSession.match

    def slow(self: FakeSession, tokens: Sequence[int], *said: float) -> Match:
        time.sleep(0.3)
        return stock(self, tokens, *said)

    monkeypatch.setattr(FakeSession, "match", slow)
    _, rest = cache.fetch_nearest_cache(make.key, TOKENS[:310])
    assert len(rest) == 10 and client.only.said[-1]["total_ms"] <= client.config.fetch_total_ms - 300


def test_a_prompt_that_nobody_has_seen_is_cold(make: Any, model: Any) -> None:
    """As the stock cache says it."""
    assert make().fetch_nearest_cache(make.key, TOKENS[:50]) == (None, TOKENS[:50])
    assert make().fetch_nearest_cache(make.key, []) == (None, [])


def test_an_exact_hit_in_memory_leaves_a_token_to_feed(make: Any, model: Any, client: FakeClient) -> None:
    """The stock cache answers with nothing left, which ends the server's generation thread."""
    cache = make()
    cache.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    for _ in range(2):
        found, rest = cache.fetch_nearest_cache(make.key, TOKENS[:100])
        assert rest == TOKENS[99:100]
        check_continuation(model, TOKENS[:100], found, rest)
    assert client.only.fetches == 0


def test_an_exact_hit_that_cannot_be_trimmed_falls_back(make: Any) -> None:
    """Layers that are not sliceable keep their count; a shorter entry, or nothing, is used."""
    model = build_tiny("qwen3_5")
    cache = make()
    cache.insert_cache(make.key, TOKENS[:60], filled(model, TOKENS[:60]), cache_type="system")
    cache.insert_cache(make.key, TOKENS[:80], filled(model, TOKENS[:80]))
    _, rest = cache.fetch_nearest_cache(make.key, TOKENS[:80])
    assert rest == TOKENS[60:80]


def test_memory_is_used_when_the_store_has_little_more(make: Any, model: Any, client: FakeClient) -> None:
    """And the store when it has: matching decides, so nothing is read for naught."""
    make().insert_cache(make.key, TOKENS[:220], filled(model, TOKENS[:220]))
    near, far = make(), make()
    near.insert_cache(make.key, TOKENS[:200], filled(model, TOKENS[:200]))
    far.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    cache, rest = near.fetch_nearest_cache(make.key, TOKENS[:300])
    assert (len(rest), client.only.fetches) == (100, 0)
    cache, rest = far.fetch_nearest_cache(make.key, TOKENS[:300])
    assert (len(rest), client.only.fetches) == (80, 1)
    check_continuation(model, TOKENS[:300], cache, rest)


def test_layers_that_lag_behind_the_tokens_are_stored_as_far_as_they_go(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str], model: Any
) -> None:
    """With a draft model the server names more tokens than the layers hold; the stock cache then skips them."""
    draft = build_tiny(seed=5)
    key = (folders["one"], None, folders["other"])
    caches = [
        PromptCache(store=ModelStore(client, digests), provider=Provider(key, model, draft))  # type: ignore[arg-type]
        for _ in range(2)
    ]
    list_of_both = filled(model, TOKENS[:99]) + filled(draft, TOKENS[:98])
    caches[0].insert_cache(key, TOKENS[:100], list_of_both)
    for cache in caches:  # from memory, and from the store
        found, rest = cache.fetch_nearest_cache(key, TOKENS[:140])
        assert found is not None
        assert rest == TOKENS[98:140]
        half = len(found) // 2
        check_continuation(model, TOKENS[:140], found[:half], rest)
        check_continuation(draft, TOKENS[:140], found[half:], rest)


def test_a_cache_longer_than_its_tokens_is_cut(make: Any, model: Any) -> None:
    """What has no name is not kept."""
    cache = make()
    cache.insert_cache(make.key, TOKENS[:90], filled(model, TOKENS[:100]))
    found, rest = cache.fetch_nearest_cache(make.key, TOKENS[:120])
    assert len(rest) == 30
    check_continuation(model, TOKENS[:120], found, rest)


def test_a_cache_that_holds_nothing_is_left_out(make: Any, model: Any, client: FakeClient) -> None:
    """New layers, or no tokens."""
    cache = make()
    cache.insert_cache(make.key, TOKENS[:90], make_prompt_cache(model))
    cache.insert_cache(make.key, [], filled(model, TOKENS[:10]))
    assert len(cache) == 0
    assert not client.sessions


def test_quantized_caches_come_back_only_to_a_quantizing_server(make: Any, model: Any) -> None:
    """Such a server takes whichever layout covers more; a batching one could not even merge a quantized cache."""
    long, short = TOKENS[:200], TOKENS[:120]
    quantized = [layer.to_quantized(group_size=64, bits=8) for layer in filled(model, long)]
    writer = make(kv_bits=8)
    writer.insert_cache(make.key, long, quantized)
    make().insert_cache(make.key, short, filled(model, short))
    found, rest = make(kv_bits=8).fetch_nearest_cache(make.key, TOKENS[:250])
    assert len(rest) == 50
    assert {type(layer) for layer in found} == {QuantizedKVCache}
    found, rest = make().fetch_nearest_cache(make.key, TOKENS[:250])
    assert len(rest) == 130
    assert {type(layer) for layer in found} == {KVCache}
    other = TOKENS[:110] + TOKENS[900:950]
    make().insert_cache(make.key, other, filled(model, other))
    found, rest = make(kv_bits=8).fetch_nearest_cache(make.key, [*other, 1])
    assert len(rest) == 1
    assert {type(layer) for layer in found} == {KVCache}


def test_models_of_equal_shape_never_share(make: Any, model: Any, folders: dict[str, str]) -> None:
    """The server swaps models by request; each has its own identity."""
    cache = make()
    cache.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    other = (folders["other"], None, None)
    cache._provider = Provider(other, build_tiny(seed=1))
    assert cache.fetch_nearest_cache(other, TOKENS[:100]) == (None, TOKENS[:100])


def test_without_an_identity_memory_works_alone(
    client: FakeClient, tmp_path: Path, folders: dict[str, str], model: Any
) -> None:
    """Weights that are not hashed yet, or cannot be: counted, and nothing else."""
    key = (str(tmp_path / "absent"), None, None)
    store = ModelStore(client, WeightsDigest(tmp_path / "cache"))  # type: ignore[arg-type]
    cache = PromptCache(store=store, provider=Provider(key, model))
    cache.insert_cache(key, TOKENS[:100], filled(model, TOKENS[:100]))
    assert len(cache.fetch_nearest_cache(key, TOKENS[:150])[1]) == 50
    assert not client.sessions
    assert store.reasons[Reason.IDENTITY_PENDING] == 2


def test_layouts_are_learned_from_inserts_without_a_provider(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str], model: Any
) -> None:
    """A plain drop-in knows no model before the first insert."""
    key = (folders["one"], None, None)
    store = ModelStore(client, digests)  # type: ignore[arg-type]
    store.epoch(key, model)
    cache = PromptCache(max_size=1, store=store)
    assert cache.fetch_nearest_cache(key, TOKENS[:100]) == (None, TOKENS[:100])
    cache.insert_cache(key, TOKENS[:100], filled(model, TOKENS[:100]))
    cache.insert_cache(key, TOKENS[900:1000], filled(model, TOKENS[900:1000]))  # the first one leaves memory
    found, rest = cache.fetch_nearest_cache(key, TOKENS[:120])
    assert found is not None
    check_continuation(model, TOKENS[:120], found, rest)


class Generator:
    """The stock server's generator as the cache sees it: it has cache and provider, and shows the cache neither."""

    def __init__(self, provider: Any, prompt_cache: PromptCache) -> None:
        self.model_provider, self.prompt_cache = provider, prompt_cache

    def serve(self, model: Any, tokens: list[int]) -> list[int]:
        """Look a prompt up, compute it and insert it; the tokens that were left to feed."""
        key = self.model_provider.model_key
        cache, rest = self.prompt_cache.fetch_nearest_cache(key, tokens)
        cache = make_prompt_cache(model) if cache is None else cache
        feed(model, cache, rest)
        self.prompt_cache.insert_cache(key, tokens, cache)
        return rest


def test_in_the_stock_servers_place_it_finds_the_models_by_itself(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str], model: Any
) -> None:
    """`mlx_lm.server.LRUPromptCache = kv.PromptCache`, and nothing else: prompts are stored, and found by others."""
    provider = Provider((folders["one"], None, None), model)
    for rest in (TOKENS[:100], TOKENS[99:100]):
        cache = PromptCache(10, store=ModelStore(client, digests))  # type: ignore[arg-type]
        assert Generator(provider, cache).serve(model, TOKENS[:100]) == rest
        assert not cache._store.reasons
    assert len(client.only.stored[0][0]) == 100


def test_a_plain_drop_in_of_servers_that_work_as_one_stays_in_memory(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str], model: Any
) -> None:
    """They must all see the same hits, and it is from the generator alone that it knows of them."""
    provider = Provider((folders["one"], None, None), model)
    provider.is_distributed = True
    cache = PromptCache(10, store=ModelStore(client, digests))  # type: ignore[arg-type]
    generator = Generator(provider, cache)
    generator.serve(model, TOKENS[:100])
    assert generator.serve(model, TOKENS[:120]) == TOKENS[100:120]
    assert not client.sessions


class StrangeCache(KVCache):  # type: ignore[misc]
    """A class that nobody has looked at."""


def strange(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Let the model make caches of a class that the store refuses."""
    monkeypatch.setattr(model, "make_cache", lambda: [StrangeCache() for _ in model.layers], raising=False)


def test_layers_that_cannot_be_stored_stay_in_memory_and_are_counted(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock behaviour, and a reason."""
    key, model = (folders["one"], None, None), build_tiny()
    strange(monkeypatch, model)
    store = ModelStore(client, digests)  # type: ignore[arg-type]
    cache = PromptCache(store=store, provider=Provider(key, model))
    assert cache.fetch_nearest_cache(key, TOKENS[:60]) == (None, TOKENS[:60])
    assert not cache.needs_checkpoints(key)
    cache.insert_cache(key, TOKENS[:60], filled(model, TOKENS[:60]))
    assert len(cache.fetch_nearest_cache(key, TOKENS[:80])[1]) == 20
    assert store.reasons[Reason.UNSUPPORTED_LAYER] == 2
    assert not client.sessions


@pytest.fixture
def make_exact(client: FakeClient, digests: WeightsDigest, folders: dict[str, str]) -> Any:
    """Prompt caches of new processes with a model whose caches cannot be cut; its name, and flags of the provider."""

    def new(name: str, draft: Any = None, salt: bytes = b"", adapter: str | None = None) -> tuple[PromptCache, Any]:
        key = (folders["one"], adapter, folders["other"] if draft else None)
        model = exact_model(name)
        store = ModelStore(client, digests, salt=salt)  # type: ignore[arg-type]
        return PromptCache(store=store, provider=Provider(key, model, draft)), key

    return new


@functools.cache
def exact_model(name: str) -> Any:
    """One of the small models, made once."""
    return build_tiny(name)


EXACT = pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])


@EXACT
def test_a_cache_that_cannot_be_cut_is_continued_from_where_it_was_kept(name: str, make_exact: Any) -> None:
    """The highest kept position below the prompt's last token, from the store and from memory alike."""
    model = exact_model(name)
    writer, key = make_exact(name)
    assert writer.needs_checkpoints(key)
    for count in (60, 80):
        writer.insert_cache(key, TOKENS[:count], filled(model, TOKENS[:count]))
    for tokens, covered in (
        (TOKENS[:100], 80),
        (TOKENS[:81], 80),
        (TOKENS[:80], 60),
        (TOKENS[:70] + TOKENS[700:750], 60),
        (TOKENS[:59], 0),
        (TOKENS[:50] + TOKENS[700:750], 0),
    ):
        for cache in (make_exact(name)[0], writer):
            found, rest = cache.fetch_nearest_cache(key, tokens)
            assert len(tokens) - len(rest) == covered
            if found is not None:
                check_exact(model, tokens, found, rest)


def check_exact(model: Any, tokens: Sequence[int], cache: list[Any], rest: Sequence[int]) -> None:
    """The next logits are those of a run that stopped at the same place; few tokens, since old state fades."""
    cold = filled(model, tokens[: len(tokens) - len(rest)])
    for token in rest[:3]:
        assert mx.array_equal(feed(model, cache, [token]), feed(model, cold, [token]))


@EXACT
def test_layers_that_are_elsewhere_than_their_tokens_are_not_kept(
    name: str, make_exact: Any, client: FakeClient
) -> None:
    """They cannot be cut, and under other tokens they would be wrong."""
    cache, key = make_exact(name)
    cache.insert_cache(key, TOKENS[:90], filled(exact_model(name), TOKENS[:100]))
    assert len(cache) == 0
    assert not client.sessions


@EXACT
def test_a_checkpoint_inside_an_image_gives_way_to_a_lower_one(name: str, make_exact: Any, client: FakeClient) -> None:
    """It is asked for, since the hit cannot be cut."""
    model = exact_model(name)
    image, other = [-(1 << 58)] * 40, [-(1 << 59)] * 30
    prompt = [*TOKENS[:50], *other, *TOKENS[50:70], *image, *TOKENS[70:90]]
    ids = [max(token, 7) for token in prompt]
    writer, key = make_exact(name)
    for count in (40, 60, 90, 110):
        writer.insert_cache(key, prompt[:count], filled(model, ids[:count]))
    found, rest = make_exact(name)[0].fetch_nearest_cache(key, prompt)
    assert len(prompt) - len(rest) == 90
    check_exact(model, ids, found, ids[90:])
    client.only.stored = [entry for entry in client.only.stored if len(entry[0]) != 90]
    found, rest = make_exact(name)[0].fetch_nearest_cache(key, prompt)
    assert len(prompt) - len(rest) == 40
    check_exact(model, ids, found, ids[40:])


def test_a_full_window_is_not_given_to_speculative_decoding(make_exact: Any, model: Any) -> None:
    """It takes tokens back and refuses such a cache: the request would fail because of the hit."""
    writer, key = make_exact("gemma3", draft=model)
    for count in (20, 60):  # the window has 32
        tokens = TOKENS[:count]
        writer.insert_cache(key, tokens, filled(exact_model("gemma3"), tokens) + filled(model, tokens))
    for cache in (writer, make_exact("gemma3", draft=model)[0]):
        found, rest = cache.fetch_nearest_cache(key, TOKENS[:80])
        assert len(rest) == 60
        assert can_trim_prompt_cache(found)


@EXACT
def test_caches_that_cannot_be_cut_are_never_shared(
    name: str, make_exact: Any, folders: dict[str, str], digests: WeightsDigest, tmp_path: Path, client: FakeClient
) -> None:
    """Another salt, other weights of equal shape, an adapter, another KV dtype."""
    cache, key = make_exact(name)
    cache.insert_cache(key, TOKENS[:60], filled(exact_model(name), TOKENS[:60]))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"a": mx.zeros((2,))})
    assert digests.wait(adapter, 30.0)
    salted, _ = make_exact(name, salt=b"tenant")
    adapted, adapted_key = make_exact(name, adapter=str(adapter))
    other_key = (folders["other"], None, None)
    other = PromptCache(store=cache._store, provider=Provider(other_key, exact_model(name)))
    half = PromptCache(store=cache._store, provider=Provider(key, build_tiny(name, mx.bfloat16)))
    for reader, its_key in ((salted, key), (adapted, adapted_key), (other, other_key), (half, key)):
        assert reader.fetch_nearest_cache(its_key, TOKENS[:80]) == (None, TOKENS[:80])
    assert sum(len(session.stored) for session in client.sessions.values()) == 1
    assert len(client.sessions) == 5


def test_a_chunked_window_in_memory_is_not_cut(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str]
) -> None:
    """It says that it can be, and the stock cache believes it."""
    key = (folders["one"], None, None)
    cache = PromptCache(store=ModelStore(client, digests))  # type: ignore[arg-type]
    for start, count in ((0, 60), (500, 80)):
        layer = ChunkedKVCache(64)
        layer.update_and_fetch(*mx.random.normal((2, 1, 2, count, 32)))
        cache.insert_cache(key, TOKENS[start : start + count], [layer])
    client.sessions.clear()
    for tokens, rest in (
        (TOKENS[:90], 30),
        (TOKENS[500:581], 1),
        (TOKENS[500:580], 80),
        (TOKENS[500:570] + TOKENS[:20], 90),
        ([], 0),
    ):
        found, left = cache.fetch_nearest_cache(key, tokens)
        assert len(left) == rest
        assert found is None or found[0].offset == len(tokens) - rest


def test_layers_that_do_not_know_how_many_tokens_they_hold_need_somebody_who_does(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str]
) -> None:
    """The server names what it fed; a program of its own may have fed more than it says."""
    store = ModelStore(client, digests)  # type: ignore[arg-type]
    layer = ArraysCache(1)
    layer[0] = mx.ones((1, 4))
    store.store((folders["one"], None, None), TOKENS[:60], [layer])
    assert store.reasons[Reason.INVALID] == 1
    assert not client.sessions


def test_a_client_that_fails_costs_nothing_but_the_hit(make: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises of ours."""

    def failing(self: FakeClient, namespace: Namespace, *_: object, **__: object) -> FakeSession:
        raise UnavailableError("no daemon")

    monkeypatch.setattr(FakeClient, "session", failing)
    cache = make()
    cache.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    assert len(cache.fetch_nearest_cache(make.key, TOKENS[:150])[1]) == 50


def test_a_model_that_cannot_be_traced_is_served_without_the_store(make: Any) -> None:
    """Foreign code may want other arguments."""

    class Strange:
        layers = (1, 2)

        def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
            raise TypeError("more arguments, please")

    cache = make()
    cache._provider.model = odd = Strange()
    assert cache.fetch_nearest_cache(make.key, TOKENS[:50]) == (None, TOKENS[:50])
    assert cache._store.reasons[Reason.UNSUPPORTED_LAYER] == 1
    assert odd.layers


def test_a_hit_never_ends_inside_an_image(make: Any, model: Any) -> None:
    """Its patches share one negative id and can only be fed together."""
    image = [-(1 << 58)] * 40
    prompt = [*TOKENS[:100], *image, *TOKENS[100:120]]
    cache = filled(model, [*TOKENS[:100], *([7] * 20)])
    make().insert_cache(make.key, prompt[:120], cache)
    found, rest = make().fetch_nearest_cache(make.key, prompt)
    assert len(prompt) - len(rest) == 100
    assert {layer.offset for layer in found} == {100}


def test_processes_that_work_as_one_use_memory_alone(make: Any, model: Any, client: FakeClient) -> None:
    """Each holds its part of the KV, and all must see the same hits."""
    cache = make()
    cache._enabled = PromptCache(store=cache._store, provider=types.SimpleNamespace(is_distributed=True))._enabled
    cache.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    assert len(cache.fetch_nearest_cache(make.key, TOKENS[:150])[1]) == 50
    assert not client.sessions


def test_memory_is_bounded_in_bytes_unless_the_user_says_otherwise(make: Any, model: Any) -> None:
    """The stock cache counts sequences only."""
    assert make().max_bytes == prompt_cache_module.default_memory_bytes() < 1 << 50
    assert PromptCache(max_bytes=0, store=make()._store).max_bytes == 0
    cache = make()
    cache = PromptCache(max_bytes=1, store=cache._store, provider=cache._provider)
    cache.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    assert len(cache) == 0
    assert len(cache.fetch_nearest_cache(make.key, TOKENS[:150])[1]) == 50, "from the store"


class Sized:
    """A layer of so many bytes; nothing else is looked at. The store does not know its class."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def is_trimmable(self) -> bool:
        """So that it is kept as it is."""
        return False


def sized(cache: PromptCache) -> list[int]:
    """The sizes of what memory keeps, by age."""
    entries = [cache._trie.get(*place) for lru in cache._lru._lrus.values() for place in lru]
    assert sum(entry.nbytes for entry in entries) == cache.nbytes
    return sorted(entry.nbytes for entry in entries)


@pytest.mark.parametrize("kind", ["assistant", "system"])
def test_one_sequence_that_does_not_fit_pushes_out_no_other(
    kind: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock loop empties the tier for it. Ours keeps the newest beside the others; a strict one leaves it out."""
    monkeypatch.setattr(ModelStore, "store", lambda *_, **__: True)
    usual, strict = make(), PromptCache(max_bytes=100, store=make()._store)
    usual.max_bytes = 100
    for cache in (usual, strict):
        for index, nbytes in enumerate((40, 50, 300)):
            cache.insert_cache(make.key, [index, 1], [Sized(nbytes)], cache_type="user" if index == 1 else kind)
    assert (sized(usual), sized(strict)) == ([40, 50, 300], [40, 50])
    for cache in (usual, strict):
        cache.insert_cache(make.key, [7, 7], [Sized(200)], cache_type=kind)
    assert (sized(usual), sized(strict)) == ([40, 50, 200], [40, 50]), "one that does not fit at a time"
    for cache in (usual, strict):
        cache.insert_cache(make.key, [8, 8], [Sized(60)], cache_type=kind)
    assert 60 in sized(usual) and usual.nbytes <= 100
    assert 60 in sized(strict) and strict.nbytes <= 100


def test_what_the_store_does_not_take_is_kept_as_the_stock_server_keeps_it(make: Any) -> None:
    """Without a daemon, or for layers that cannot be stored, memory is all there is: a number of sequences."""
    cache = make()
    cache.max_bytes = 100
    for index in range(12):
        cache.insert_cache(make.key, [index, 1], [Sized(90)])
    assert sized(cache) == [90] * 10


@pytest.fixture
def prefixes(client: FakeClient, digests: WeightsDigest, folders: dict[str, str], monkeypatch: Any) -> kv.PrefixStore:
    """A PrefixStore over the fake client."""
    monkeypatch.setattr(kv, "connect", lambda address: client)
    return kv.PrefixStore(folders["one"], digests=digests)


def test_a_prefix_is_fetched_on_entry_and_stored_on_exit(prefixes: kv.PrefixStore, model: Any) -> None:
    """What was generated is stored when it is named, and cut off when not."""
    prefix = prefixes.prefix(model, TOKENS[:100])
    with prefix as (cache, rest):
        assert rest == TOKENS[:100]
        feed(model, cache, rest)
        feed(model, cache, TOKENS[100:110])
        prefix.extend(TOKENS[100:105])
    with prefixes.prefix(model, TOKENS[:150]) as (cache, rest):
        assert rest == TOKENS[105:150]
        check_continuation(model, TOKENS[:150], cache, rest)
    with prefixes.prefix(model, TOKENS[:150]) as (cache, rest):
        assert rest == TOKENS[149:150]


def test_a_prompt_that_was_just_stored_is_waited_for(
    prefixes: kv.PrefixStore, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again at once by the same program: what is still queued is found, and not computed again."""
    queued: list[Any] = []
    store = FakeSession.store
    monkeypatch.setattr(FakeSession, "store", lambda *job, touch: queued.append(job) or StoreResult())
    monkeypatch.setattr(FakeSession, "flush", lambda session, timeout_s: [store(*queued.pop()) for _ in list(queued)])
    for n_left in (100, 1):
        with prefixes.prefix(model, TOKENS[:100]) as (cache, rest):
            assert len(rest) == n_left
            feed(model, cache, rest)


def test_a_block_that_raises_stores_nothing(prefixes: kv.PrefixStore, model: Any, client: FakeClient) -> None:
    """Nor does one whose layers disagree; a generator that is left early does."""
    prefix = prefixes.prefix(model, TOKENS[:50])
    with contextlib.suppress(ZeroDivisionError), prefix as (cache, rest):
        feed(model, cache, rest)
        raise ZeroDivisionError
    with prefixes.prefix(model, TOKENS[:50]) as (cache, rest):
        feed(model, cache, rest)
        cache[0].trim(1)
    assert client.only.stored == []

    def stream() -> Any:
        with prefixes.prefix(model, TOKENS[:50]) as (cache, rest):
            feed(model, cache, rest)
            yield 1

    generator = stream()
    next(generator)
    generator.close()
    assert len(client.only.stored) == 1
    with pytest.raises(InvalidRequestError):
        prefixes.prefix(model, [])


def test_a_model_that_cannot_be_stored_still_generates(
    prefixes: kv.PrefixStore, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold, every time."""
    model = build_tiny()
    strange(monkeypatch, model)
    for _ in range(2):
        with prefixes.prefix(model, TOKENS[:40]) as (cache, rest):
            assert rest == TOKENS[:40]
            feed(model, cache, rest)
    assert not client.sessions


@EXACT
def test_a_prefix_of_a_model_whose_caches_cannot_be_cut(
    name: str, prefixes: kv.PrefixStore, client: FakeClient
) -> None:
    """Stored when all that was fed is named; the next prefix goes on from there."""
    model = exact_model(name)
    prefix = prefixes.prefix(model, TOKENS[:50])
    with prefix as (cache, rest):
        feed(model, cache, rest)
        feed(model, cache, TOKENS[50:55])
        prefix.extend(TOKENS[50:55])
    with prefixes.prefix(model, TOKENS[:80]) as (cache, rest):
        assert rest == TOKENS[55:80]
        feed(model, cache, [*rest, 1])  # one more than is named
    with prefixes.prefix(model, TOKENS[:90]) as (cache, rest):
        assert rest == TOKENS[55:90]
        check_exact(model, TOKENS[:90], cache, rest)


def test_the_launcher_replaces_three_names_and_passes_everything_on(
    client: FakeClient, tmp_path: Path, folders: dict[str, str], model: Any
) -> None:
    """The server's own functions get what they would have got."""
    calls: list[Any] = []
    store = ModelStore(client, WeightsDigest(tmp_path / "cache"))  # type: ignore[arg-type]
    provider = Provider((folders["one"], None, None), model)
    provider.cli_args.prompt_cache_bytes = 12345

    def stock_run(host: str, port: int, model_provider: Any, handler: str = "stock") -> None:
        calls.append((host, port, handler, server.LRUPromptCache(7)))

    def stock_load(path: str, adapter_path: str | None = None, return_config: bool = False) -> str:
        calls.append((path, adapter_path, return_config))
        return "loaded"

    server = types.SimpleNamespace(load=stock_load, run=stock_run, LRUPromptCache=None, stream_generate=print)
    plug_in(server, store)
    assert server.load(folders["one"], adapter_path=None, return_config=True) == "loaded"
    assert store.digests.wait(folders["one"], 30.0)
    server.run("127.0.0.1", 1, provider, handler="mine")
    assert calls[0] == (folders["one"], None, True)
    host, port, handler, cache = calls[1]
    assert (host, port, handler, cache.max_size, cache.max_bytes) == ("127.0.0.1", 1, "mine", 7, 12345)
    assert isinstance(cache, PromptCache)


ODD_KEYS: list[Any] = [
    ("a", None),
    ("a", None, None, "four"),
    (None, None, None),
    (1, 2, 3),
    None,
    7,
    "a name",
    frozenset({1}),
    ("\udcff", None, None),
    ("\ud800", "\0", None),
    ("x" * 5000, None, None),
    ("/proc/1/root/model", None, None),
]


@pytest.mark.parametrize("provided", [False, True], ids=["alone", "with a provider"])
def test_whatever_tells_models_apart_is_served_from_memory(
    provided: bool, client: FakeClient, digests: WeightsDigest, model: Any
) -> None:
    """Engines use keys of any shape; without an identity nothing is stored, and that is counted."""
    layers = filled(model, TOKENS[:50])
    for key in ODD_KEYS:
        store = ModelStore(client, digests)  # type: ignore[arg-type]
        cache = PromptCache(store=store, provider=Provider(key, model) if provided else None)
        assert cache.fetch_nearest_cache(key, TOKENS[:50]) == (None, TOKENS[:50])
        cache.insert_cache(key, TOKENS[:50], layers)
        found, rest = cache.fetch_nearest_cache(key, TOKENS[:70])
        assert found is not None and rest == TOKENS[50:70]
        assert not cache.needs_checkpoints(key)
        assert store.reasons, key
    assert not client.sessions


def test_a_provider_that_has_loaded_nothing_yet_or_no_longer_is_no_trouble(make: Any, model: Any) -> None:
    """The stock provider forgets its model when it stops, and its key is None then."""
    cache = make()
    cache.insert_cache(make.key, TOKENS[:100], filled(model, TOKENS[:100]))
    assert cache.fetch_nearest_cache(make.key, TOKENS[:150])[0] is not None
    cache._provider.model_key = cache._provider.model = None
    for key in (None, make.key):
        assert cache.fetch_nearest_cache(key, TOKENS[500:550]) == (None, TOKENS[500:550])


def test_layers_and_tokens_may_be_anything_that_can_be_gone_through(make: Any, model: Any) -> None:
    """Once: they are kept in memory and stored."""
    cache = make()
    cache.insert_cache(make.key, iter(TOKENS[:100]), iter(filled(model, TOKENS[:100])))
    for tokens in (tuple(TOKENS[:150]), iter(TOKENS[:150]), mx.array(TOKENS[:150])):
        for reader in (cache, make()):
            found, rest = reader.fetch_nearest_cache(make.key, tokens if reader is cache else TOKENS[:150])
            assert rest == TOKENS[100:150]
            check_continuation(model, TOKENS[:150], found, rest)
    captured = kv.capture(iter(filled(model, TOKENS[:20])))
    assert {layer.n_tokens for layer in captured} == {20}
    assert kv.layout(iter(filled(model, TOKENS[:20]))) == kv.layout(filled(model, TOKENS[:20]))


def test_layers_that_nobody_can_make_sense_of_stay_in_memory(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Offsets that are no numbers, lists without layers: what we make of them is logged, and the engine goes on."""

    class Broken(KVCache):  # type: ignore[misc]
        nbytes = 1

        @property
        def offset(self) -> int:
            raise OSError("broken")

        @offset.setter
        def offset(self, value: int) -> None:
            pass

    cache = make()
    for index, layers in enumerate(([CacheList()], [Broken()], [])):
        cache.insert_cache(make.key, TOKENS[index : index + 50], layers)
        assert cache.fetch_nearest_cache(make.key, TOKENS[index : index + 60])[0] is not None
    assert cache._store.reasons.total()


def test_a_model_with_a_name_that_is_not_unicode_is_stored(
    client: FakeClient, digests: WeightsDigest, folders: dict[str, str], model: Any, tmp_path: Path
) -> None:
    """A file name is bytes; what people are shown has a question mark in it."""
    folder = tmp_path / "\udcffmodel"
    folder.symlink_to(folders["one"])
    shutil.copytree(folders["one"], tmp_path / "\udcfecopy")
    for path, alias in ((folder, "one"), (tmp_path / "\udcfecopy", "?copy")):
        key = (str(path), None, None)
        assert digests.wait(path, 30.0)
        cache = PromptCache(store=ModelStore(client, digests), provider=Provider(key, model))  # type: ignore[arg-type]
        cache.insert_cache(key, TOKENS[:100], filled(model, TOKENS[:100]))
        assert client.only.namespace.alias == alias
        client.sessions.clear()


def test_a_prefix_of_a_purely_recurrent_model_is_covered_on_the_next_turn(
    prefixes: kv.PrefixStore, client: FakeClient
) -> None:
    """Its layers do not count, so the prompt is fed, and stored, where its position is known; nothing else is."""
    model = exact_model("mamba")
    tokens = [token % VOCAB for token in TOKENS]
    with prefixes.prefix(model, tokens[:50]) as (cache, rest):
        assert rest == tokens[49:50]
        check_exact(model, tokens[:50], cache, rest)
        feed(model, cache, tokens[900:910])  # without a name
    prefix = prefixes.prefix(model, tokens[:80])
    with prefix as (cache, rest):
        assert rest == tokens[79:80]
        check_exact(model, tokens[:80], cache, rest)
        prefix.extend(tokens[80:90])  # never fed
    assert [len(stored) for stored, _ in client.only.stored] == [49, 79]
    with prefixes.prefix(model, tokens[:80]) as (cache, rest):
        assert rest == tokens[79:80]
        check_exact(model, tokens[:80], cache, rest)
    assert len(client.only.stored) == 2, "all of it was there"
    assert not prefixes._store.reasons


def test_a_prefix_store_of_no_model_says_so(tmp_path: Path, folders: dict[str, str], client: FakeClient) -> None:
    """At once; an id may still be downloaded."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in ("/no/such/model", "model", "", "./no/model", str(empty), f"{folders['one']}/config.json", "x" * 5000):
        with pytest.raises(InvalidRequestError, match="folder"):
            kv.PrefixStore(path)
    for adapter in ("/no/such/adapter", str(empty)):
        with pytest.raises(InvalidRequestError, match="folder"):
            kv.PrefixStore(folders["one"], adapter_path=adapter)


def test_a_prefix_store_may_be_made_before_its_model_is_downloaded(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, digests: WeightsDigest
) -> None:
    """It has no identity until then."""
    monkeypatch.setattr(kv, "connect", lambda address: client)
    assert not kv.PrefixStore("nobody/has-this-model", digests=digests).wait(0.1)


def test_only_known_servers_are_started() -> None:
    """And the message names them."""
    for argv in (["vim"], []):
        with pytest.raises(ConfigError, match=r"mlx_lm\.server"):
            run(argv)
