"""vllm-mlx with the store plugged in (`kvstore run vllm-mlx serve`), against a real daemon, over HTTP."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load, load_tokenizer
from vllm_mlx import engine_core, mllm_batch_generator, scheduler
from vllm_mlx.models import mllm
from vllm_mlx.request import Request, SamplingParams
from vllm_mlx.utils import tokenizer

from kvstore.client import connect
from kvstore.codecs import device
from kvstore.config import Config
from kvstore.core.blocks import Reason
from kvstore.integrations import vllm_mlx as integration
from kvstore.integrations.ahead import ahead_of_turn
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.vllm_mlx import Models, PrefixCache, engine_version
from tests.support.daemon import DaemonProcess
from tests.support.fake_store import FakeClient
from tests.support.limits import OPEN_DEADLINES, launch, small_config
from tests.support.models import expand_small_lm, heldout_tokens, write_tiny
from tests.support.servers import ANSWER_TIMEOUT_S, HOST, ServerProcess, clean_environ, free_port, wait_until

# A start takes 15 s of a core, most of it imports; several servers start in one test, on machines that do other work.
START_TIMEOUT_S = 600.0
pytestmark = pytest.mark.timeout(2400)
STOCK = ("-m", "vllm_mlx.cli")
WITH_STORE = launch("run", "--no-start", "--slow-hits", "vllm-mlx", min_prefix_tokens=1, **OPEN_DEADLINES)
FLAGS = {
    "plain": (),
    "quantized": ("--kv-cache-quantization", "--kv-cache-quantization-bits", "8"),
}
QUESTIONS = (" What is a cache?", " How are tokens stored in it?")


@dataclass(frozen=True)
class Completion:
    """One answer, and what the server logged of its prompt."""

    text: str
    prompt_tokens: int
    prefilled_tokens: int


class VllmServer(ServerProcess):
    """`vllm-mlx serve` with its batched engine, in a process of its own."""

    def __init__(
        self, model: Path, log_path: Path, environ: Mapping[str, str], launcher: Sequence[str], flags: Sequence[str]
    ) -> None:
        # Its own cache on disk, by which a restarted server would know prompts without the store, is below HOME.
        home = log_path.parent / f"{log_path.stem}-home"
        home.mkdir(exist_ok=True)
        super().__init__(model, log_path, {**environ, "HOME": str(home)}, launcher=launcher, flags=flags)

    def start(self, wait: bool = True) -> VllmServer:
        """Start it and, with `wait`, return when it answers."""
        self.port = free_port()
        command = [sys.executable, *self.launcher, "serve", self.model, "--host", HOST, "--port", str(self.port)]
        with self.log_path.open("ab") as log:
            command += ["--continuous-batching", *self.flags]
            self.process = subprocess.Popen(command, env=self._environ, stdout=log, stderr=log)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Return when it has loaded its model and answered once."""
        wait_until(self._is_healthy, START_TIMEOUT_S, lambda: f"the server does not answer:\n{self.log_text()}")
        self.complete("Hello")

    def complete(self, prompt: str) -> Completion:
        """Sixteen tokens at temperature 0."""
        before = len(self.log_text())
        body = {"model": self.model, "prompt": prompt, "max_tokens": 16, "temperature": 0.0}
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_TIMEOUT_S)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        assert response.status == 200, answer
        said = re.search(r"\[schedule\] .*prompt_tokens=(\d+) tokens_to_prefill=(\d+)", self.log_text()[before:])
        assert said, self.log_text()
        return Completion(json.loads(answer)["choices"][0]["text"], int(said[1]), int(said[2]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained model."""
    return expand_small_lm(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[str]:
    """Two prompts that share some 600 tokens."""
    shared = load_tokenizer(model).decode(heldout_tokens()[:600])
    return [shared + question for question in QUESTIONS]


@pytest.fixture(scope="module")
def cold(model: Path, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Completion]:
    """The prompts as the stock server answers them, computing all of each."""
    log_path = tmp_path_factory.mktemp("cold") / "cold.log"
    with VllmServer(model, log_path, clean_environ(), STOCK, ("--disable-prefix-cache",)) as stock:
        answers = [stock.complete(prompt) for prompt in prompts]
    assert all(answer.prefilled_tokens == answer.prompt_tokens for answer in answers)
    return answers


@pytest.mark.parametrize("kind", FLAGS)
def test_what_one_server_prefilled_another_takes_from_the_store(
    kind: str, model: Path, prompts: list[str], cold: list[Completion], tmp_path: Path
) -> None:
    """Two servers, then a new daemon and a new server; the texts are those of the stock server without a cache."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        one, other = (
            VllmServer(model, tmp_path / f"{name}.log", daemon.environ(), WITH_STORE, FLAGS[kind])
            for name in ("one", "other")
        )
        with one, other:
            first = one.complete(prompts[0])
            assert (first.text, first.prefilled_tokens) == (cold[0].text, first.prompt_tokens)
            again = one.complete(prompts[0])
            assert (again.text, again.prefilled_tokens) == (cold[0].text, 1), "from memory"
            assert "kvstore: identity of" in one.log_text() or "kvstore: hashing" in one.log_text()
            assert one.stop() == 0, one.log_text()
            same = other.complete(prompts[0])
            assert (same.text, same.prefilled_tokens) == (cold[0].text, 1)
            daemon.kill()
            daemon.start()
            one.start()
            branch = one.complete(prompts[1])
            assert (branch.text, branch.prefilled_tokens < 20) == (cold[1].text, True)
            assert all("kvstore: hit " in server.log_text() for server in (one, other))
            assert one.stop() == other.stop() == 0, one.log_text() + other.log_text()


def test_codes_and_plain_rows_are_not_mixed(model: Path, prompts: list[str], tmp_path: Path) -> None:
    """A server that does not quantize takes nothing from one that does: those rows are not what it would compute."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        with VllmServer(model, tmp_path / "codes.log", daemon.environ(), WITH_STORE, FLAGS["quantized"]) as codes:
            codes.complete(prompts[0])
            assert codes.stop() == 0, codes.log_text()
        assert daemon.blobs()
        with VllmServer(model, tmp_path / "plain.log", daemon.environ(), WITH_STORE, ()) as plain:
            answer = plain.complete(prompts[0])
            assert answer.prefilled_tokens == answer.prompt_tokens


# How much of a prompt of 336 tokens is found whose first 306 are an earlier prompt and its answer, and which was asked
# before. Where layers cannot be cut the scheduler keeps one state, behind the first token of an answer; chunked windows
# it cannot continue at all.
FOUND = {"llama": 335, "qwen3_5": 301, "gemma3": 301, "gpt_oss": 301, "falcon_h1": 301, "llama4": 0}


def answer(engine: scheduler.Scheduler, tokens: list[int], max_tokens: int) -> Request:
    """One request, run to its end."""
    request = Request(str(hash(tuple(tokens))), tokens, SamplingParams(max_tokens=max_tokens, temperature=0.0))
    engine.add_request(request)
    while engine.has_requests():
        engine.step()
    return request


@pytest.mark.parametrize("name", FOUND)
def test_layers_of_every_kind_continue_as_cold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory and, in a scheduler that has seen nothing, from the store; few tokens, which show a stale state."""
    model, tokenizer = load(str(folder := write_tiny(tmp_path / name, name)))
    cold = scheduler.Scheduler(model, tokenizer, scheduler.SchedulerConfig(enable_prefix_cache=False))
    heldout = heldout_tokens()
    said = answer(cold, heldout[:300], 6).output_token_ids
    longer = [*heldout[:300], *said, *heldout[400:430]]
    expected = answer(cold, longer, 4).output_token_ids
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        store, models = ModelStore(connect(daemon.listen), engine=engine_version("mlx-lm")), Models()
        models.add(model, str(folder))
        store.pin(str(folder))
        store.digests.wait(folder, 30.0)
        monkeypatch.setattr(
            scheduler, "MemoryAwarePrefixCache", functools.partial(PrefixCache, store=store, models=models)
        )
        first, second = (
            scheduler.Scheduler(model, tokenizer, scheduler.SchedulerConfig(enable_prefix_cache=True)) for _ in "ab"
        )
        assert answer(first, heldout[:300], 6).output_token_ids == said
        warm = answer(first, longer, 4)
        assert (warm.output_token_ids, warm.cached_tokens > 0) == (expected, FOUND[name] > 0), "from memory"
        assert store.flush(30.0)
        found = answer(second, longer, 4)
        assert (found.output_token_ids, found.cached_tokens) == (expected, FOUND[name]), "from the store"
        store.close()


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_a_prompt_that_is_given_up_is_found_as_far_as_it_was_computed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts with one end but other beginnings wait together; one is aborted at four fifths, and asked again."""
    model, tokenizer = load(str(folder := write_tiny(tmp_path / name, name)))
    heldout, step, n_tokens = heldout_tokens(), 128, 1280
    prompts = [[*heldout[start : start + n_tokens - 100], *heldout[:100]] for start in (100, 2000)]
    options = {"prefill_step_size": step, "prefill_batch_size": 2}
    cold = scheduler.Scheduler(model, tokenizer, scheduler.SchedulerConfig(enable_prefix_cache=False, **options))
    expected = [answer(cold, tokens, 4).output_token_ids for tokens in prompts]
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        parts = {"prefill_part_tokens": 256, "prefill_checkpoint_tokens": 256}
        client = connect(config=small_config(daemon.listen, **parts))
        store, models = ModelStore(client, engine=engine_version("mlx-lm")), Models()
        models.add(model, str(folder))
        store.pin(str(folder))
        store.digests.wait(folder, 30.0)
        monkeypatch.setattr(
            scheduler, "MemoryAwarePrefixCache", functools.partial(PrefixCache, store=store, models=models)
        )
        monkeypatch.setattr(scheduler, "BatchGenerator", models.batch)
        first = scheduler.Scheduler(model, tokenizer, scheduler.SchedulerConfig(enable_prefix_cache=True, **options))
        given_up = [Request(str(at), tokens, SamplingParams(max_tokens=4)) for at, tokens in enumerate(prompts)]
        for request in given_up:
            first.add_request(request)
        for _ in range(n_tokens * 4 // 5 // step):
            first.step()
        for request in given_up:
            first.abort_request(request.request_id)
        first.step()
        assert store.flush(30.0)
        second = scheduler.Scheduler(model, tokenizer, scheduler.SchedulerConfig(enable_prefix_cache=True, **options))
        for tokens, output in zip(prompts, expected, strict=True):
            found = answer(second, tokens, 4)
            assert (found.output_token_ids, found.cached_tokens >= n_tokens * 3 // 5) == (output, True)
        store.close()


def filled(model: Any, tokens: list[int]) -> list[Any]:
    """The model's cache after `tokens`."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([tokens]), cache=cache))
    return cache


def test_what_was_begun_before_the_files_changed_is_kept_nowhere(tmp_path: Path) -> None:
    """The tier in memory forgets what the old weights computed, and what comes back of it is refused and counted."""
    path = write_tiny(tmp_path / "model")
    model, _ = load(str(path))
    client, digests, tokens = FakeClient(), WeightsDigest(tmp_path / "cache"), heldout_tokens()[:200]
    store, models = ModelStore(client, digests), Models()  # type: ignore[arg-type]
    models.add(model, str(path))
    store.pin(str(path))
    assert digests.wait(path, 30.0)
    cache = PrefixCache(model, store=store, models=models)
    assert cache.fetch(tokens)[0] is None
    assert cache.store(tokens, filled(model, tokens))
    assert cache.fetch([*tokens, 7])[0] is not None
    assert cache.fetch(heldout_tokens()[200:400])[0] is None
    path.rename(tmp_path / "before")
    write_tiny(path, seed=1)
    store.pin(str(path))
    assert digests.wait(path, 30.0)
    assert not cache.store(heldout_tokens()[200:400], filled(model, heldout_tokens()[200:400]))
    assert (store.reasons, client.refusals) == ({Reason.IDENTITY_CHANGED: 1}, [Reason.IDENTITY_CHANGED])
    assert cache.fetch([*tokens, 7])[0] is None, "from memory, or from the namespace of the new files"
    assert [len(session.stored) for session in client.sessions.values()] == [1, 0]


def test_unchanged_files_keep_what_is_in_memory(tmp_path: Path) -> None:
    """The files are looked at again when the model is loaded again, and nothing was replaced."""
    path = write_tiny(tmp_path / "model")
    model, _ = load(str(path))
    store, models = ModelStore(FakeClient(), WeightsDigest(tmp_path / "cache")), Models()  # type: ignore[arg-type]
    models.add(model, str(path))
    store.pin(str(path))
    cache, tokens = PrefixCache(model, store=store, models=models), heldout_tokens()[:200]
    assert cache.store(tokens, filled(model, tokens))
    store.pin(str(path))
    assert cache.fetch([*tokens, 7])[1] == [7]


def looked_after(tmp_path: Path) -> tuple[Any, FakeClient, ModelStore, Models]:
    """A model whose identity is known to a store over a fake client."""
    path = write_tiny(tmp_path / "model")
    model, _ = load(str(path))
    client, digests = FakeClient(), WeightsDigest(tmp_path / "cache")
    store, models = ModelStore(client, digests), Models()  # type: ignore[arg-type]
    models.add(model, str(path))
    store.pin(str(path))
    assert digests.wait(path, 30.0)
    return model, client, store, models


def test_a_prompt_that_is_larger_than_memory_is_stored_all_the_same(tmp_path: Path) -> None:
    """Memory refuses it, the store has it: the longest prompts gain most."""
    model, client, store, models = looked_after(tmp_path)
    cache, tokens = PrefixCache(model, store=store, models=models), heldout_tokens()[:200]
    cache._max_memory = 1000
    assert cache.fetch(tokens)[0] is None
    assert not cache.store(tokens, filled(model, tokens))
    assert len(client.only.stored) == 1
    found, rest = cache.fetch([*tokens, 7])
    assert found is not None and rest == [7]


def test_a_prompt_is_looked_up_before_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found ahead is used, and where nothing was found, or not in time, the scheduler's thread asks nobody."""
    model, client, store, models = looked_after(tmp_path)
    cache, tokens = PrefixCache(model, store=store, models=models), heldout_tokens()[:200]
    assert cache.fetch(tokens)[0] is None
    assert cache.store(tokens, filled(model, tokens))
    cache.clear()
    longer = [*tokens, 7]
    with ThreadPoolExecutor(1) as other:
        other.submit(cache.look_ahead, longer, 30.0).result(60)
    monkeypatch.setattr(client.only, "fetch", lambda *_, **__: pytest.fail("asked on the scheduler's thread"))
    monkeypatch.setattr(client.only, "match", lambda *_, **__: pytest.fail("asked on the scheduler's thread"))
    found, rest = cache.fetch(longer)
    assert found is not None and rest == [7]
    cache._ahead.begin(longer, 0)  # the store has not answered yet
    assert cache.fetch(longer)[0] is None
    assert cache._ahead._budget.used_bytes == 0


def test_a_daemon_that_hangs_does_not_hold_up_the_streams_of_others(tmp_path: Path) -> None:
    """The engine's own request waits; the thread that computes for all goes on meanwhile."""
    asked, release = threading.Event(), threading.Event()

    class Cache:
        store_config = Config(fetch_total_ms=60_000)

        def look_ahead(self, tokens: list[int], seconds: float) -> None:
            asked.set()
            assert release.wait(seconds)

    class Tokenizer:
        def encode(self, prompt: str) -> list[int]:
            return [ord(letter) for letter in prompt]

    class Scheduler:
        memory_aware_cache, tokenizer = Cache(), Tokenizer()

    class Core:
        scheduler = Scheduler()
        _external_generation_worker = ThreadPoolExecutor(1)

        async def add_request(self, prompt: Any, more: int = 0) -> tuple[Any, int]:
            return prompt, more

    async def run() -> tuple[Any, int]:
        core = Core()
        adding = asyncio.ensure_future(ahead_of_turn(Core.add_request)(core, "ab", more=1))
        while not asked.is_set():
            await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(core._external_generation_worker, lambda: 7) == 7, "a step of a stream"
        assert not adding.done()
        release.set()
        return await adding

    assert asyncio.run(run()) == ([97, 98], 1)


def test_layers_that_raise_when_they_are_looked_at_are_kept_in_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler stores on its one thread: what foreign layers raise is counted there, and ends no request."""
    path = write_tiny(tmp_path / "model")
    model, _ = load(str(path))
    client = FakeClient()
    store, models = ModelStore(client, WeightsDigest(tmp_path / "cache")), Models()  # type: ignore[arg-type]
    models.add(model, str(path))
    cache, tokens = PrefixCache(model, store=store, models=models), heldout_tokens()[:200]

    def broken(layers: list[Any]) -> Any:
        raise AttributeError("no such layer")

    monkeypatch.setattr(integration, "layout", broken)
    assert cache.store(tokens, filled(model, tokens))
    assert (store.reasons, client.sessions) == ({Reason.INTERNAL: 1}, {})
    assert cache.fetch([*tokens, 7])[1] == [7]


def test_a_scheduler_clears_the_cache_of_mlx_beside_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are loaded on other threads: without a GPU the stock call would wait for them, and they for it."""
    _, _, store, _ = looked_after(tmp_path)
    for owner, name in (
        (scheduler, "MemoryAwarePrefixCache"),
        (mllm_batch_generator, "MemoryAwarePrefixCache"),
        (engine_core.EngineCore, "add_request"),
        (tokenizer, "load_model_with_fallback"),
        (mllm.MLXMultimodalLM, "load"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # and back to this at the end
    integration.plug_in(store, store)
    cleared: list[int] = []
    monkeypatch.setattr(device, "_clear_cache", lambda: cleared.append(1))
    with device.loading():
        scheduler.mx.clear_cache()
        assert not cleared
    scheduler.mx.clear_cache()
    assert cleared
