"""Requests that are prepared before their turn: no answer waits for a fetch, and what was in vain is not kept."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import server as mlx_lm_server
from mlx_lm.utils import load_tokenizer

from kvstore.core.byte_budget import ByteBudget
from kvstore.integrations import checkpoints, prefetch
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prefetch import Prefetcher, PrefetchingGenerator, Prepared
from kvstore.integrations.prompt_cache import PromptCache
from tests.support.agent import SYSTEM, with_template
from tests.support.fake_store import FakeClient, FakeSession
from tests.support.generators import Loaded, arguments_of, request_of
from tests.support.models import build_tiny, write_tiny
from tests.support.servers import wait_until

LONG = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Count the files."}]
OTHER = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Say how many there are."}]
SHORT = [{"role": "user", "content": "Hello"}]
WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder; which model is computed with is up to the test."""
    return with_template(write_tiny(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    """Its tokenizer."""
    return load_tokenizer(folder)


@functools.cache
def tiny(name: str, seed: int = 0) -> Any:
    """A small model, made once."""
    return build_tiny(name, seed=seed)


class Watched(FakeSession):
    """Fetches say on which thread they run, and wait for a gate."""

    gate: threading.Event | None = None
    threads: list[str] = []

    def fetch(self, tokens: Sequence[int], **said: float) -> Any:
        self.threads.append(threading.current_thread().name)
        if self.gate is not None:
            assert self.gate.wait(WAIT_S)
        return super().fetch(tokens, **said)


@pytest.fixture
def start(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Servers' generators that have answered once; all share one store in memory."""
    monkeypatch.setattr("tests.support.fake_store.FakeSession", Watched)
    monkeypatch.setattr(Watched, "gate", None)
    monkeypatch.setattr(Watched, "threads", [])
    client, digests = FakeClient(), WeightsDigest(tmp_path / "cache")
    assert digests.wait(folder, 30.0)
    for name in ("stream_generate", "ResponseGenerator"):
        monkeypatch.setattr(mlx_lm_server, name, getattr(mlx_lm_server, name))
    checkpoints.plug_in(mlx_lm_server, prefetch.generator())
    made: list[Any] = []

    def new(name: str = "llama", draft: Any = None, slow_hits: bool = False, **flags: Any) -> Any:
        provider = Loaded(folder, tokenizer, tiny(name), draft, **flags)
        provider.model_key = (str(folder), None, str(folder) if draft else None)
        store = ModelStore(client, digests, slow_hits=slow_hits)  # type: ignore[arg-type]
        cache = PromptCache(64, store=store, provider=provider)
        generator = mlx_lm_server.ResponseGenerator(provider, cache)
        assert type(generator) is PrefetchingGenerator
        made.append(generator)
        ask(generator, SHORT)
        return generator

    new.client = client  # type: ignore[attr-defined]
    yield new
    for generator in made:
        generator.stop_and_join()


def ask(generator: Any, messages: Any, seed: int | None = None, **changed: Any) -> tuple[list[int], int]:
    """The tokens of an answer, and how many of the prompt's were cached."""
    context, answer = generator.generate(request_of(messages), arguments_of(seed, **changed))
    tokens = [one.token for one in answer]
    return tokens, context.prompt_cache_count


def is_empty(generator: Any) -> bool:
    """Whether nothing that was prepared is kept."""
    return not generator._prefetcher._prepared and not generator._prefetcher._budget.used_bytes


@pytest.mark.parametrize("seed", [None, 3], ids=["batched", "sequential"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma3", "draft"])
def test_what_another_server_stored_is_fetched_before_the_turn(start: Any, name: str, seed: int | None) -> None:
    """Caches that can be cut, hybrid ones, windows, speculative decoding; the tokens are those of a cold run."""
    model = {"name": "llama", "draft": tiny("llama", 7)} if name == "draft" else {"name": name}
    cold, cached = ask(start(**model), LONG, seed)
    assert cached < 20, "what it shares with the greeting"
    generator = start(**model)
    Watched.threads.clear()
    warm, cached = ask(generator, LONG, seed)
    assert warm == cold
    assert cached > 100
    assert [one.rstrip("_0123456789") for one in Watched.threads] == ["kvstore-prefetch"]
    assert is_empty(generator)


def test_an_answer_goes_on_while_another_request_is_fetched_for(start: Any) -> None:
    """The fetch ends only when the answer being written has become longer, which would otherwise never happen."""
    ask(start(), LONG)
    generator = start()
    context, answer = generator.generate(request_of(SHORT), arguments_of(max_tokens=400))
    next(answer)
    Watched.gate = threading.Event()
    second: list[Any] = []
    asking = threading.Thread(target=lambda: second.append(ask(generator, LONG)))
    Watched.threads.clear()
    asking.start()
    while not Watched.threads:
        time.sleep(0.01)
    while not generator.requests.empty():
        time.sleep(0.01)
    more = [next(answer) for _ in range(50)]
    assert len(more) == 50 and not second
    Watched.gate.set()
    asking.join(WAIT_S)
    assert second[0][1] > 100
    assert sum(1 for _ in answer) == 400 - 51
    assert context.prompt_cache_count >= 0


def test_out_of_time_a_request_is_served_without_and_not_fetched_for_again(start: Any) -> None:
    """What comes too late is dropped, and its share of the memory is given back."""
    cold = ask(start(), LONG)[0]
    generator = start()
    generator._prefetcher._wait_s = 0.2
    Watched.gate = threading.Event()
    Watched.threads.clear()
    tokens, cached = ask(generator, LONG)
    assert (tokens, len(Watched.threads)) == (cold, 1)
    assert cached < 20
    Watched.gate.set()
    generator._prefetcher._threads.shutdown(wait=True)
    assert is_empty(generator)


def await_kept(generator: Any) -> None:
    """Return when memory has the whole of an answered request, which is a moment after its last token."""
    lrus = generator.prompt_cache._lru._lrus
    wait_until(lambda: any(len(tokens) > 100 for _, tokens in list(lrus["assistant"])), WAIT_S, lambda: str(lrus))


def test_a_prompt_that_memory_has_is_not_fetched(start: Any) -> None:
    """Asking the index is all."""
    generator = start()
    ask(generator, LONG)
    await_kept(generator)
    Watched.threads.clear()
    _, cached = ask(generator, LONG)
    assert cached > 100
    assert not Watched.threads


def test_a_prompt_that_leaves_memory_while_its_request_waits_is_fetched_then(start: Any) -> None:
    """When it was prepared memory had it, so nothing was fetched; other inserts pushed it out before its turn."""
    cold = ask(start(), LONG)[0]
    generator = start()
    ask(generator, LONG)
    await_kept(generator)
    request = request_of(LONG)
    prepare = functools.partial(generator._prepare, arguments_of(), generator.model_provider.model_key)
    Watched.threads.clear()
    generator._prefetcher.prepare(request, prepare)
    assert not Watched.threads, "memory has it"
    generator.prompt_cache.trim_to(n_sequences=0)  # as ten other inserts do
    context, answer = super(PrefetchingGenerator, generator).generate(request, arguments_of())
    assert [one.token for one in answer] == cold
    assert context.prompt_cache_count > 100
    assert len(Watched.threads) == 1
    assert is_empty(generator)


def test_what_nobody_collects_is_dropped(start: Any) -> None:
    """A request whose client has gone before its turn."""
    ask(start(), LONG)
    generator = start()
    _, answer = generator.generate(request_of(LONG), arguments_of(max_tokens=50))
    next(answer)
    answer.close()
    assert is_empty(generator)

    request = request_of(LONG)
    prepare = functools.partial(generator._prepare, arguments_of(), generator.model_provider.model_key)
    generator._prefetcher.prepare(request, prepare)
    assert generator._prefetcher._budget.used_bytes > 0
    generator._prefetcher.drop(request)
    assert is_empty(generator)


def test_a_request_that_cannot_be_prepared_is_served_as_ever(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The error, if it is one, comes from the generation thread, as in the stock server."""
    generator = start()

    def broken(*_: Any) -> Any:
        raise KeyError("not here")

    cold = ask(start(), LONG)[0]
    generator.prompt_cache.find = broken
    with caplog.at_level(logging.INFO):
        assert ask(generator, LONG)[0] == cold
    assert "not prepared" in caplog.text
    assert is_empty(generator)


def test_what_was_prepared_for_another_model_is_not_used(start: Any, tokenizer: Any) -> None:
    """The server may have changed models while the request waited."""
    cold = ask(start(), LONG)[0]
    generator = start()
    prepared = generator._segmented(tokenizer, request_of(OTHER), arguments_of())
    generator._segmented, own = lambda *_: prepared, generator._segmented
    request = request_of(LONG)
    generator._prefetcher.prepare(
        request, functools.partial(generator._prepare, arguments_of(), ("another", None, None))
    )
    generator._segmented = own
    _, answer = super(PrefetchingGenerator, generator).generate(request, arguments_of())
    assert [one.token for one in answer] == cold
    assert is_empty(generator)


def test_images_are_left_to_the_server(start: Any) -> None:
    """They are decoded, and served one by one."""
    assert prefetch._has_images(request_of([{"role": "user", "content": [{"type": "text", "text": "x"}]}]))
    assert not prefetch._has_images(request_of(LONG))
    assert not prefetch._has_images(request_of("text"))


def test_prompts_are_measured_and_the_store_is_told(start: Any) -> None:
    """From the second prompt on."""
    generator = start()
    ask(generator, LONG)
    key = generator.model_provider.model_key
    speed = generator.prompt_cache.speed.get(key)
    assert speed > 0
    other = start()
    other.prompt_cache.speed.add(key, 1000, 10.0)
    ask(other, LONG)
    said = start.client.only.said[-1]
    assert said["prefill_tokens_per_s"] == pytest.approx(100.0)
    assert said["evaluate"]


def test_slow_hits_are_asked_of_the_session(start: Any) -> None:
    """A session without them weighs the speed of the caller."""
    for slow_hits in (False, True):
        ask(start(slow_hits=slow_hits), LONG)
        assert start.client.slow_hits is slow_hits


def test_bytes_fetched_ahead_are_bounded_and_one_hit_always_fits() -> None:
    """A hit above the bound is read when nothing else is."""
    budget = ByteBudget(100)
    first, second = (Prepared(object(), budget) for _ in range(2))
    assert first.reserve(1000, 0.0)
    assert not second.reserve(1, 0.01)
    found: Any = object()
    first.finish(found)
    assert budget.used_bytes == 100
    assert first.take() is found
    assert first.take() is None
    assert second.reserve(60, 0.01)
    second.finish(None)
    assert budget.used_bytes == 0


def test_requests_that_are_prepared_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next ones are fetched for by the generation thread."""
    monkeypatch.setattr(prefetch, "PREPARED_MAX", 3)
    prefetcher = Prefetcher(100, WAIT_S)
    requests = [object() for _ in range(5)]
    done: list[int] = []
    for request in requests:
        prefetcher.prepare(request, lambda prepared, seconds: done.append(1))
    assert len(done) == 3
    assert [prefetcher.claim(request) is not None for request in requests] == [True, True, True, False, False]


def test_a_server_of_another_shape_keeps_its_generator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, when it starts."""
    monkeypatch.setattr(prefetch.ResponseGenerator, "generate", lambda self, request, queue: None)
    assert prefetch.generator() is checkpoints.SegmentedGenerator
    assert "another way" in caplog.text
