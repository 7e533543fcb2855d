"""Epochs: KV belongs to the state of the model that computed it, whatever its folder holds when it is stored."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kvstore.core.blocks import Reason
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.epochs import Epoch, InFlight
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import PromptCache
from tests.support.fake_store import FakeClient
from tests.support.models import build_tiny, heldout_tokens, write_tiny
from tests.test_prompt_cache import Provider, feed, filled

TOKENS = heldout_tokens()
P = TOKENS[:100]
WAIT_S = 60.0


class Model:
    """A model folder whose weights change, and the model as it is loaded at each time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = (str(path), None, None)
        write_tiny(path, seed=0)
        self.model = build_tiny(seed=0)

    def retrain(self, seed: int) -> None:
        """Other weights, in the folder and in memory."""
        old = self.path.with_name(f"{self.path.name}-before-{seed}")
        self.path.rename(old)
        write_tiny(self.path, seed=seed)
        self.model = build_tiny(seed=seed)

    def reload(self, seed: int = 0) -> None:
        """The model as a server has it after it was loaded again from unchanged files."""
        self.model = build_tiny(seed=seed)


@pytest.fixture
def one(tmp_path: Path) -> Model:
    """A model with the weights of seed 0."""
    return Model(tmp_path / "model")


@pytest.fixture
def client() -> FakeClient:
    """An empty store."""
    return FakeClient()


@pytest.fixture
def digests(tmp_path: Path) -> WeightsDigest:
    """Knows nothing yet."""
    return WeightsDigest(tmp_path / "cache")


class Rig:
    """A prompt cache whose server loads models, with or without a provider, and the store behind it."""

    def __init__(self, client: FakeClient, digests: WeightsDigest, one: Model, *, provided: bool) -> None:
        self.client, self.digests, self.one, self.provided = client, digests, one, provided
        self.store, self.cache = self.new()

    def new(self) -> tuple[ModelStore, PromptCache]:
        """Another process that loads what the folder holds now."""
        store = ModelStore(self.client, self.digests)  # type: ignore[arg-type]
        self.provider = Provider(self.one.key, self.one.model) if self.provided else None
        self.pin(store)
        return store, PromptCache(store=store, provider=self.provider)

    def pin(self, store: ModelStore) -> None:
        """As `kvstore run` does it when a model is loaded; then waits for the digest."""
        store.pin(str(self.one.path))
        assert self.digests.wait(self.one.path, WAIT_S)
        if self.provider is not None:
            self.provider.model = self.one.model
        else:
            store.epoch(self.one.key, self.one.model)  # there is no other way to see it

    def load(self) -> None:
        """The server loads the model again."""
        self.pin(self.store)


@pytest.fixture(params=["provider", "drop-in"])
def rig(request: pytest.FixtureRequest, client: FakeClient, digests: WeightsDigest, one: Model) -> Rig:
    """Both ways to use a prompt cache."""
    return Rig(client, digests, one, provided=request.param == "provider")


def check_of(model: Any, tokens: Sequence[int], cache: list[Any], rest: Sequence[int]) -> None:
    """The cache is what this model computes of the tokens before `rest`."""
    expected = filled(model, tokens[: len(tokens) - len(rest)])
    for layer, other in zip(cache, expected, strict=True):
        for mine, its in ((layer.keys, other.keys), (layer.values, other.values)):
            assert mx.allclose(mine[..., : layer.offset, :], its[..., : other.offset, :], atol=1e-4)


def fresh_hit(rig: Rig, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
    """What a new process with the weights of now gets from the store; it learns its layout from another prompt."""
    _, cache = rig.new()
    cache.insert_cache(rig.one.key, TOKENS[900:940], filled(rig.one.model, TOKENS[900:940]))
    return cache.fetch_nearest_cache(rig.one.key, tokens)


def test_a_model_that_changed_between_two_loads_meets_no_kv_of_before(rig: Rig) -> None:
    """Neither in memory nor, by the next store, in the namespace of the new weights, where every worker finds it."""
    key = rig.one.key
    rig.cache.insert_cache(key, P, filled(rig.one.model, P))
    rig.one.retrain(seed=1)
    rig.load()
    cache, rest = rig.cache.fetch_nearest_cache(key, [*P, 7, 8])
    assert (cache, rest) == (None, [*P, 7, 8])
    rig.cache.insert_cache(key, [*P, 7, 8], filled(rig.one.model, [*P, 7, 8]))
    found, rest = fresh_hit(rig, [*P, 7, 8, 9])
    assert found is not None and rest == [9]
    check_of(rig.one.model, [*P, 7, 8, 9], found, rest)
    assert not rig.store.reasons


def test_what_an_old_cache_is_continued_with_is_not_stored(rig: Rig) -> None:
    """A hit of before the change comes back after it: refused and counted; the same prompt, begun again, is kept."""
    key, old = rig.one.key, rig.one.model
    rig.cache.insert_cache(key, P, filled(old, P))
    cache, rest = rig.cache.fetch_nearest_cache(key, [*P, 7, 8])
    assert cache is not None
    rig.one.retrain(seed=1)
    rig.load()
    feed(old, cache, rest)
    rig.cache.insert_cache(key, [*P, 7, 8], cache)
    assert rig.store.reasons[Reason.IDENTITY_CHANGED] == 1
    assert rig.client.refusals.count(Reason.IDENTITY_CHANGED) == 1
    assert rig.cache.fetch_nearest_cache(key, [*P, 7, 8, 9])[0] is None
    rig.cache.insert_cache(key, [*P, 7, 8, 9], filled(rig.one.model, [*P, 7, 8, 9]))
    found, rest = fresh_hit(rig, [*P, 7, 8, 9, 10])
    assert found is not None and rest == [10]
    check_of(rig.one.model, [*P, 7, 8, 9, 10], found, rest)


@pytest.mark.parametrize("inserted", [P[:60], P, [*P, 5]], ids=["a segment's end", "the prompt", "the answer"])
def test_a_cache_that_was_begun_empty_belongs_to_the_model_of_that_time(rig: Rig, inserted: list[int]) -> None:
    """Layers are copied into batches and out again, so only the tokens tell that it is this one."""
    key, old = rig.one.key, rig.one.model
    assert rig.cache.fetch_nearest_cache(key, P)[0] is None
    rig.one.retrain(seed=1)
    rig.load()
    rig.cache.insert_cache(key, inserted, filled(old, inserted))
    assert rig.store.reasons[Reason.IDENTITY_CHANGED] == 1
    assert fresh_hit(rig, [*inserted, 6])[0] is None


def test_two_requests_for_one_prompt_around_a_change_are_told_apart(rig: Rig) -> None:
    """By the layers themselves when these come back; else nothing is kept before the first is accounted for."""
    key, old = rig.one.key, rig.one.model
    rig.cache.insert_cache(key, P, filled(old, P))
    before, _ = rig.cache.fetch_nearest_cache(key, [*P, 7])
    rig.cache.fetch_nearest_cache(key, TOKENS[200:260])
    rig.one.retrain(seed=1)
    rig.load()
    rig.cache.fetch_nearest_cache(key, [*P, 7])
    rig.cache.fetch_nearest_cache(key, TOKENS[200:260])
    assert before is not None
    feed(old, before, [7])
    rig.cache.insert_cache(key, [*P, 7], before)
    rig.cache.insert_cache(key, TOKENS[200:260], filled(old, TOKENS[200:260]))
    assert rig.store.reasons[Reason.IDENTITY_CHANGED] == 2
    for tokens in ([*P, 7], TOKENS[200:260]):
        rig.cache.insert_cache(key, tokens, filled(rig.one.model, tokens))
        found, rest = fresh_hit(rig, [*tokens, 8])
        assert found is not None and rest == [8]
        check_of(rig.one.model, [*tokens, 8], found, rest)


def test_unchanged_files_keep_the_entries_in_memory(rig: Rig) -> None:
    """A server that swaps models by request loads the same one again and again."""
    rig.cache.insert_cache(rig.one.key, P, filled(rig.one.model, P))
    fetches = rig.client.only.fetches
    for _ in range(2):
        rig.one.reload()
        rig.load()
        cache, rest = rig.cache.fetch_nearest_cache(rig.one.key, [*P, 7])
        assert cache is not None and rest == [7]
    assert rig.client.only.fetches == fetches
    assert not rig.store.reasons


def test_a_loaded_model_is_noticed_when_nobody_pins(client: FakeClient, digests: WeightsDigest, one: Model) -> None:
    """A provider whose loads are not watched: another object was loaded since, so the folder is looked at again."""
    rig = Rig(client, digests, one, provided=True)
    rig.cache.insert_cache(one.key, P, filled(one.model, P))
    one.retrain(seed=1)
    assert rig.provider is not None
    rig.provider.model = one.model
    assert rig.cache.fetch_nearest_cache(one.key, [*P, 7])[0] is None
    assert digests.wait(one.path, WAIT_S)
    rig.cache.insert_cache(one.key, [*P, 7], filled(one.model, [*P, 7]))
    found, rest = fresh_hit(rig, [*P, 7, 8])
    assert found is not None
    check_of(one.model, [*P, 7, 8], found, rest)


def test_an_adapter_that_was_retrained_in_place_is_another_epoch(
    client: FakeClient, digests: WeightsDigest, one: Model, tmp_path: Path
) -> None:
    """The model's own files are unchanged."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"rank": 8}))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"lora_a": mx.zeros((4, 4))})
    key = (str(one.path), str(adapter), None)
    store = ModelStore(client, digests)  # type: ignore[arg-type]
    cache = PromptCache(store=store)
    store.pin(*key)
    cache.insert_cache(key, P, filled(one.model, P))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"lora_a": mx.ones((4, 4))})
    store.pin(*key)
    assert cache.fetch_nearest_cache(key, [*P, 7])[0] is None


def test_a_draft_model_that_changed_is_another_epoch(
    client: FakeClient, digests: WeightsDigest, one: Model, tmp_path: Path
) -> None:
    """Its layers lie in the same cache."""
    draft = Model(tmp_path / "draft")
    key = (str(one.path), None, str(draft.path))
    store = ModelStore(client, digests)  # type: ignore[arg-type]
    provider = Provider(key, one.model, draft.model)
    cache = PromptCache(store=store, provider=provider)
    store.pin(*key)
    both = filled(one.model, P) + filled(draft.model, P)
    assert digests.wait(one.path, WAIT_S) and digests.wait(draft.path, WAIT_S)
    cache.insert_cache(key, P, both)
    assert cache.fetch_nearest_cache(key, [*P, 7])[0] is not None
    draft.retrain(seed=1)
    store.pin(str(draft.path))
    provider.draft_model = draft.model
    assert cache.fetch_nearest_cache(key, [*P, 7])[0] is None
    cache.insert_cache(key, [*P, 7], both)
    assert store.reasons[Reason.IDENTITY_CHANGED] == 1


def test_a_digest_that_arrives_late_is_that_of_the_files_as_loaded(
    client: FakeClient, digests: WeightsDigest, one: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing takes minutes; meanwhile the folder is replaced and another digest is known before."""
    go = threading.Event()
    stock = WeightsDigest._work

    def slow(self: WeightsDigest, path: str, pin: Any) -> None:
        go.wait(WAIT_S)
        stock(self, path, pin)

    monkeypatch.setattr(WeightsDigest, "_work", slow)
    rig = Rig.__new__(Rig)
    rig.client, rig.digests, rig.one, rig.provided = client, digests, one, True
    store = ModelStore(client, digests)  # type: ignore[arg-type]
    provider = Provider(one.key, one.model)
    cache = PromptCache(store=store, provider=provider)
    store.pin(str(one.path))
    early = store.epoch(one.key, one.model)
    cache.insert_cache(one.key, P, filled(one.model, P))
    assert store.reasons == {Reason.IDENTITY_PENDING: 1}
    go.set()
    assert digests.wait(one.path, WAIT_S)
    assert store.epoch(one.key, one.model) == early, "the digest is no part of the epoch"
    assert cache.fetch_nearest_cache(one.key, [*P, 7])[1] == [7]
    cache.insert_cache(one.key, [*P, 7], filled(one.model, [*P, 7]))
    first = set(client.sessions)
    old = one.model
    go.clear()
    one.retrain(seed=1)
    store.pin(str(one.path))
    provider.model = one.model
    assert cache.fetch_nearest_cache(one.key, [*P, 7, 8])[0] is None
    cache.insert_cache(one.key, [*P, 7, 8], filled(one.model, [*P, 7, 8]))
    assert set(client.sessions) == first, "not to be stored anywhere before the digest of its own files is known"
    go.set()
    assert digests.wait(one.path, WAIT_S)
    cache.insert_cache(one.key, [*P, 7, 8, 9], filled(one.model, [*P, 7, 8, 9]))
    assert len(client.sessions) == 2
    for root, session in client.sessions.items():
        for tokens, layers in session.stored:
            check_of(old if root in first else one.model, [*tokens, 0], kv.restore(layers), [0])


def test_a_prefix_store_that_outlives_its_model_keeps_the_two_apart(
    client: FakeClient, digests: WeightsDigest, one: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program loads the model again from changed files and goes on with the PrefixStore that it has."""
    monkeypatch.setattr(kv, "connect", lambda address: client)
    with kv.PrefixStore(str(one.path), digests=digests) as store:
        assert store.wait(WAIT_S)
        for _ in range(2):
            with store.prefix(one.model, P) as (cache, rest):
                feed(one.model, cache, rest)
        assert rest == P[-1:]
        one.retrain(seed=1)
        with store.prefix(one.model, P) as (cache, rest):
            assert rest == P
            assert digests.wait(one.path, WAIT_S)
            feed(one.model, cache, rest)
        with store.prefix(one.model, [*P, 7]) as (cache, rest):
            assert rest == [7]
            check_of(one.model, [*P, 7], cache, rest)


def test_a_prefix_that_was_entered_before_the_change_is_refused(
    client: FakeClient, digests: WeightsDigest, one: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with the old model, ended after its folder was pinned with the new one."""
    monkeypatch.setattr(kv, "connect", lambda address: client)
    with kv.PrefixStore(str(one.path), digests=digests) as store:
        assert store.wait(WAIT_S)
        old = one.model
        with store.prefix(old, P) as (cache, rest):
            feed(old, cache, rest)
            one.retrain(seed=1)
            store._store.pin(str(one.path))
        assert store._store.reasons[Reason.IDENTITY_CHANGED] == 1
        assert not any(session.stored for session in client.sessions.values())


def epoch(number: int) -> Epoch:
    """One of some epochs."""
    return Epoch((), (), bytes([number]))


def test_what_the_table_has_forgotten_is_of_no_later_epoch() -> None:
    """The table is bounded; a cache that it does not know any more may be of the epoch of what it dropped."""
    table = InFlight(limit=2)
    for number in range(4):
        table.begin("key", [number] * 10, epoch(1), None)
    assert table.accepts("key", [0] * 20, epoch(1), [])
    assert not table.accepts("key", [0] * 20, epoch(2), [])
    assert not table.accepts("key", [3] * 20, epoch(2), [])


def test_a_hit_that_nobody_continued_is_no_obstacle() -> None:
    """A lookup for nothing before the change does not keep the same prompt out after it."""
    table = InFlight()
    table.begin("key", [1, 2, 3], epoch(1), [object()])
    table.begin("key", [1, 2, 3], epoch(2), None)
    assert table.accepts("key", [1, 2, 3, 4], epoch(2), [])
    assert table.accepts("key", [1, 2, 3, 4], epoch(2), [])


def test_models_do_not_see_each_others_prompts() -> None:
    """The table is by model."""
    table = InFlight()
    table.begin("one", [1, 2, 3], epoch(1), None)
    assert table.accepts("other", [1, 2, 3], epoch(2), [])
    assert not table.accepts("one", [1, 2, 3], epoch(2), [])


def test_a_model_that_cannot_be_looked_at_is_served_from_memory(
    client: FakeClient, digests: WeightsDigest, one: Model
) -> None:
    """A weight that another thread left unevaluated raises on this one: the engine goes on without the store."""
    kept = filled(one.model, P)

    def touch() -> None:
        norm = one.model.model.norm
        norm.weight = norm.weight + 1

    toucher = threading.Thread(target=touch)
    toucher.start()
    toucher.join()
    store = ModelStore(client, digests)  # type: ignore[arg-type]
    cache = PromptCache(store=store, provider=Provider(one.key, one.model))
    assert cache.fetch_nearest_cache(one.key, P) == (None, P)
    cache.insert_cache(one.key, P, kept)
    assert cache.fetch_nearest_cache(one.key, [*P, 7])[1] == [7]
    assert store.reasons[Reason.INTERNAL] and not client.sessions
