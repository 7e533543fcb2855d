"""Stock mlx_lm.server processes that share one daemon: hits across processes and restarts, and what trouble costs.

Texts are compared with those of a plain server that has neither store nor memory. The store is kept raw, where they
must be equal to the letter. Every test has prompts of its own, and leaves the daemon and both servers running.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import server as stock
from mlx_lm.utils import load_model, load_tokenizer

import kvstore
from kvstore.core.keys import Namespace
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import default_memory_bytes
from kvstore.integrations.run import plug_in
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.limits import OPEN_DEADLINES, launch
from tests.support.models import write_attentive
from tests.support.servers import NO_MEMORY, PLAIN, Answer, ServerProcess, free_port, start_all, wait_until

# A model this small repeats itself at temperature 0; with a penalty its texts differ, and so does a wrong one.
OPTIONS = {"max_tokens": 24, "repetition_penalty": 1.3, "repetition_context_size": 64}

CONNECT_MS = 500
STALL_MS = 2000
TOTAL_MS = 4000
# What a machine with other work to do may add to an answer. A hung daemon never answers: without deadlines a prompt
# would wait for it longer than this.
SLACK_S = 30.0
# What a server's log has for each fetch that found something in the store, and for each that failed.
HIT_LOGGED = "kvstore: hit "
FAILURES_LOGGED = (" deadline [", " unavailable [")
STORED_TIMEOUT_S = 120.0
RECOVERY_TIMEOUT_S = 180.0

DOCUMENT = """You answer questions about a program from its documentation.
cache.open(path, mode='r', budget=None)
Open the file at path and return a Cache object. If mode is 'w' the file is created when it does not exist. The argument
budget is the largest number of bytes that the file may take; when it is reached, the entries that were not used for the
longest time are removed first. Raises OSError if the file cannot be opened.
Cache.get(key, default=None)
Return the value that was stored for key. If there is none, or if its checksum does not agree with its content, return
default. Keys are compared byte by byte; two keys with the same hash are never taken for each other."""

# Of more than 32 tokens, and no two begin alike: what a hit leaves is computed in the pieces of a cold prompt.
QUESTIONS = [
    """Name the function that opens the file. Say what it returns and what happens when the file does not exist, in a
few lines of documentation.""",
    """What does the method get return if the checksum of a value does not agree with its content? Describe the method
and its arguments in a few sentences.""",
    """Explain to a new user which entries are removed when the budget is reached and what the argument budget means,
and give an example of its use.""",
]

# Prompts about two topics have this many leading tokens in common at most; a server may find these in its memory.
COMMON_TOKENS_MAX = 20


def chat(topic: str, question: int = 0) -> list[dict[str, str]]:
    """A chat about a topic of its own."""
    system = {"role": "system", "content": f"Notes on {topic}.\n{DOCUMENT}"}
    return [system, {"role": "user", "content": QUESTIONS[question]}]


def short_chat(topic: str) -> list[dict[str, str]]:
    """A chat of some sixty tokens: quick to answer, long enough to be stored."""
    return [{"role": "user", "content": f"{topic}: {QUESTIONS[0]}"}]


class Model:
    """A model folder, its tokens, and the identity under which servers store its KV."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        self._tokenizer = load_tokenizer(folder)
        self.namespace: Namespace = kv.namespace(load_model(folder)[0], str(folder), digests=WeightsDigest(cache_dir))

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt that a server makes of a chat."""
        ids: list[int] = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return ids

    def shared(self, topic: str) -> int:
        """How many leading tokens the questions about a topic have in common."""
        prompts = [self.tokens(chat(topic, question)) for question in range(len(QUESTIONS))]
        return next(at for at, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where hashes are remembered; not the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Model:
    """A tiny model."""
    return Model(write_attentive(tmp_path_factory.mktemp("models") / "tiny"), cache_dir)


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory, model: Model, cache_dir: Path) -> Model:
    """A model of the same shape, configuration and folder name, with slightly different weights."""
    folder = copy_model(model.folder, tmp_path_factory.mktemp("fine-tunes") / "tiny")
    weights: Any = mx.load(str(folder / "model.safetensors"))
    mx.random.seed(0)
    changed = {name: array + 0.01 * mx.random.normal(array.shape, array.dtype) for name, array in weights.items()}
    mx.eval(changed)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), changed, {"format": "mlx"})
    return Model(folder, cache_dir)


def copy_model(source: Path, folder: Path) -> Path:
    """A second folder with the same files. Not by links: these change the time of change of the originals, which are
    then hashed again, and a server that has just loaded them knows no identity for a moment."""
    shutil.copytree(source, folder)
    return folder


class Rig:
    """A daemon, two servers A and B that use it, and a plain server for cold answers."""

    def __init__(self, folder: Path, model: Model, cache_dir: Path) -> None:
        self.folder = folder
        self.model = model
        self.daemon = DaemonProcess(folder / "store", profile="raw", limits={"min_prefix_tokens": 32})
        # The user's own configuration must not decide a test.
        private = {"XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(cache_dir)}
        self.environ = {**self.daemon.environ(), **private}
        self.a, self.b = self.server("A"), self.server("B")
        plain = {key: value for key, value in self.environ.items() if not key.startswith("KVSTORE_")}
        self.plain = ServerProcess(model.folder, folder / "plain.log", plain, launcher=PLAIN, flags=NO_MEMORY)
        self._cold: dict[str, Answer] = {}

    def server(self, name: str, *flags: str, total_ms: int = 0, **limits: int) -> ServerProcess:
        """Another server that uses the daemon, not started; with a time and limits of its own for fetches."""
        environ = {**self.environ, **({"KVSTORE_FETCH_TOTAL_MS": str(total_ms)} if total_ms else {})}
        launcher = launch("run", "--no-start", "--slow-hits", "mlx_lm.server", **{**OPEN_DEADLINES, **limits})
        return ServerProcess(self.model.folder, self.folder / f"{name}.log", environ, launcher=launcher, flags=flags)

    def cold(self, messages: list[dict[str, str]], **options: Any) -> Answer:
        """The plain server's answer, computed once."""
        key = repr((messages, sorted(options.items())))
        if key not in self._cold:
            self._cold[key] = self.plain.chat(messages, **options)
            assert self._cold[key].cached_tokens == 0, "the reference is not cold"
        return self._cold[key]

    def wait_stored(self, messages: list[dict[str, str]], model: Model | None = None) -> int:
        """Wait until the daemon holds all of a prompt; its length in tokens."""
        model = model or self.model
        tokens = model.tokens(messages)
        wait_until(
            lambda: self._held(model, tokens) == len(tokens),
            STORED_TIMEOUT_S,
            lambda: f"not stored:\n{self.daemon.log_text()}\n{self.a.log_text()}",
        )
        return len(tokens)

    def _held(self, model: Model, tokens: list[int]) -> int:
        with kvstore.connect(self.daemon.listen) as client:
            return client.session(model.namespace).match([*tokens, 0]).n_tokens

    def wait_recovered(self) -> None:
        """Wait until both servers store and find again what the other stored: their circuits are closed."""
        for server, other in ((self.a, self.b), (self.b, self.a)):
            topics = iter(f"{number} after trouble, {server.port}" for number in range(1000))

            def found(server: ServerProcess = server, other: ServerProcess = other, topics: Any = topics) -> bool:
                messages = short_chat(next(topics))
                other.chat(messages, max_tokens=1)
                tokens = self.model.tokens(messages)
                for _ in range(20):  # a server whose circuit is open does not store it
                    if self._held(self.model, tokens) == len(tokens):
                        return server.chat(messages, max_tokens=1).cached_tokens == len(tokens) - 1
                    time.sleep(0.05)
                return False

            wait_until(found, RECOVERY_TIMEOUT_S, lambda: self.a.log_text() + self.b.log_text())

    def kill(self) -> None:
        """SIGKILL to the daemon and both servers."""
        for process in (self.a, self.b, self.daemon):
            process.kill()

    def start(self) -> None:
        """Start the daemon and both servers."""
        self.daemon.start()
        start_all(self.a, self.b)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, model: Model, cache_dir: Path) -> Iterator[Rig]:
    """Everything started, once for the module."""
    made = Rig(tmp_path_factory.mktemp("rig"), model, cache_dir)
    try:
        made.daemon.start()
        start_all(made.a, made.b, made.plain)
        yield made
    finally:
        made.kill()
        made.plain.kill()


def check_cold(rig: Rig, answer: Answer, messages: list[dict[str, str]], **options: Any) -> None:
    """Nothing about the topic was cached, and the text is the cold one."""
    assert answer.cached_tokens <= COMMON_TOKENS_MAX
    assert answer.text == rig.cold(messages, **options).text


# -- hits -------------------------------------------------------------------------------------------------------------


def test_what_one_server_computed_the_other_takes_from_the_store(rig: Rig) -> None:
    """Documents under another question, and the very prompt; the texts are cold ones."""
    topic = "sharing"
    first = rig.a.chat(chat(topic), **OPTIONS)
    check_cold(rig, first, chat(topic), **OPTIONS)
    n_tokens = rig.wait_stored(chat(topic))

    other = rig.b.chat(chat(topic, 1), **OPTIONS)
    assert other.cached_tokens == rig.model.shared(topic)
    assert other.text == rig.cold(chat(topic, 1), **OPTIONS).text

    same = rig.b.chat(chat(topic), **OPTIONS)
    assert (same.prompt_tokens, same.cached_tokens) == (n_tokens, n_tokens - 1)
    assert same.text == first.text


def test_a_seeded_request_takes_the_sequential_path_and_hits_alike(rig: Rig) -> None:
    """Sampled at temperature 0.8: equal texts need equal logits and an equal state of the generator."""
    topic, options = "seeds", {"max_tokens": 24, "seed": 1, "temperature": 0.8}
    assert rig.a.chat(chat(topic), **options).text == rig.cold(chat(topic), **options).text
    n_tokens = rig.wait_stored(chat(topic))
    for question, cached in ((2, rig.model.shared(topic)), (0, n_tokens - 1)):
        answer = rig.b.chat(chat(topic, question), **options)
        assert (answer.cached_tokens, answer.text) == (cached, rig.cold(chat(topic, question), **options).text)


def test_both_paths_continue_what_the_other_stored(rig: Rig) -> None:
    """A prompt from the batch for a seeded request, and the other way round."""
    for topic, stored_with, asked_with in (("ways", {}, {"seed": 1}), ("ways back", {"seed": 1}, {})):
        rig.a.chat(chat(topic), **stored_with)
        n_tokens = rig.wait_stored(chat(topic))
        answer = rig.b.chat(chat(topic), **asked_with)
        assert (answer.cached_tokens, answer.text) == (n_tokens - 1, rig.cold(chat(topic), **asked_with).text)


def test_after_sigkill_to_all_of_them_everything_still_hits(rig: Rig) -> None:
    """What was durable is found by new processes."""
    topic = "restarts"
    rig.a.chat(chat(topic), **OPTIONS)
    n_tokens = rig.wait_stored(chat(topic))
    rig.kill()
    rig.start()
    for server in (rig.a, rig.b):
        same = server.chat(chat(topic), **OPTIONS)
        assert (same.cached_tokens, same.text) == (n_tokens - 1, rig.cold(chat(topic), **OPTIONS).text)
    other = rig.b.chat(chat(topic, 1), **OPTIONS)
    assert other.cached_tokens >= rig.model.shared(topic)
    assert other.text == rig.cold(chat(topic, 1), **OPTIONS).text


def test_two_models_of_equal_shape_never_share(rig: Rig, fine_tune: Model) -> None:
    """One server, two models by request: the other's KV is there, fits, and is not taken."""
    topic, options = "fine-tunes", {**OPTIONS, "model": str(fine_tune.folder)}
    rig.a.chat(chat(topic), **OPTIONS)
    n_tokens = rig.wait_stored(chat(topic))
    assert rig.cold(chat(topic), **OPTIONS).text != rig.cold(chat(topic), **options).text

    for server in (rig.a, rig.b):
        server.chat([{"role": "user", "content": "Hello"}], max_tokens=1, model=str(fine_tune.folder))
    tuned = rig.a.chat(chat(topic), **options)
    check_cold(rig, tuned, chat(topic), **options)
    rig.wait_stored(chat(topic), fine_tune)
    for wanted in (options, OPTIONS):
        answer = rig.b.chat(chat(topic), **wanted)
        assert (answer.cached_tokens, answer.text) == (n_tokens - 1, rig.cold(chat(topic), **wanted).text)


def test_while_the_weights_are_hashed_nothing_is_taken_or_stored(rig: Rig, tmp_path: Path) -> None:
    """A folder with a file of 64 GB, all of it a hole: its identity takes minutes, the answers do not wait for it."""
    topic = "pending"
    rig.a.chat(chat(topic), **OPTIONS)
    rig.wait_stored(chat(topic))
    folder = copy_model(rig.model.folder, tmp_path / "tiny")
    with (folder / "other.safetensors").open("wb") as hole:
        hole.truncate(64 << 30)
    with kvstore.connect(rig.daemon.listen) as client:
        before = len(client.list()["namespaces"])
        server = rig.server("pending")
        server.model = str(folder)
        with server:
            answer = server.chat(chat(topic), **OPTIONS)
            check_cold(rig, answer, chat(topic), **OPTIONS)
            assert server.stop() == 0, server.log_text()
        assert len(client.list()["namespaces"]) == before


def test_a_damaged_blob_costs_the_hit_and_not_the_text(rig: Rig) -> None:
    """One byte of KV in each new blob is turned over behind the daemon's back."""
    topic, before = "damage", set(rig.daemon.blobs())
    rig.a.chat(chat(topic), **OPTIONS)
    n_tokens = rig.wait_stored(chat(topic))
    for blob in set(rig.daemon.blobs()) - before:
        with suppress(FileNotFoundError), blob.open("r+b") as file:  # it may be a tail that a longer block replaced
            file.seek(-1000, os.SEEK_END)
            (old,) = file.read(1)
            file.seek(-1000, os.SEEK_END)
            file.write(bytes([old ^ 0x40]))
    answer = rig.b.chat(chat(topic), **OPTIONS)
    assert answer.cached_tokens < n_tokens - 1
    assert answer.text == rig.cold(chat(topic), **OPTIONS).text


# -- a daemon in trouble ----------------------------------------------------------------------------------------------


def check_not_delayed(rig: Rig, answer: Answer, messages: list[dict[str, str]], **options: Any) -> None:
    """The cold text, and no later than a cold prompt, a fetch's deadlines and other work on this machine explain."""
    check_cold(rig, answer, messages, **options)
    cold = rig.cold(messages, **options)
    assert answer.first_token_s < 3 * cold.first_token_s + (CONNECT_MS + STALL_MS) / 1e3 + SLACK_S


def test_without_a_daemon_at_its_start_a_server_answers_and_uses_one_that_comes_later(rig: Rig) -> None:
    """Absent first, then started."""
    rig.kill()
    start_all(rig.a, rig.b)
    for number in range(5):
        messages = short_chat(f"{number} in absence")
        check_not_delayed(rig, rig.a.chat(messages, **OPTIONS), messages, **OPTIONS)
    rig.daemon.start()
    rig.wait_recovered()


def test_a_daemon_killed_during_an_answer_does_not_change_it(rig: Rig) -> None:
    """Killed while text is being generated after a hit; the next prompts are answered cold, then hits come back."""
    topic, options = "a kill", {**OPTIONS, "max_tokens": 120}
    rig.a.chat(chat(topic), **OPTIONS)
    n_tokens = rig.wait_stored(chat(topic))
    with ThreadPoolExecutor(1) as pool:
        hits = rig.b.log_text().count(HIT_LOGGED)
        answering = pool.submit(rig.b.chat, chat(topic), **options)
        wait_until(lambda: rig.b.log_text().count(HIT_LOGGED) > hits, 20.0, rig.b.log_text)
        rig.daemon.kill()
        answer = answering.result()
    assert (answer.cached_tokens, answer.text) == (n_tokens - 1, rig.cold(chat(topic), **options).text)
    for number in range(2):
        messages = short_chat(f"{number} after {topic}")
        check_not_delayed(rig, rig.b.chat(messages, **OPTIONS), messages, **OPTIONS)
    rig.daemon.start()
    rig.wait_recovered()


def test_a_hung_daemon_costs_a_few_deadlines_and_then_nothing(rig: Rig) -> None:
    """SIGSTOP: the first fetches fail in time, then the circuit is open; SIGCONT: hits come back.

    With a server of its own, whose deadlines are short; all others here have time.
    """
    deadlines = {"fetch_connect_ms": CONNECT_MS, "fetch_stall_ms": STALL_MS}
    with rig.server("hurried", total_ms=TOTAL_MS, **deadlines) as server:

        def failed() -> int:
            return sum(server.log_text().count(logged) for logged in FAILURES_LOGGED)

        topics = iter(f"{number} and hanging" for number in range(1000))

        def found() -> bool:
            messages = short_chat(next(topics))
            rig.b.chat(messages, max_tokens=1)
            n_tokens = rig.wait_stored(messages)
            return server.chat(messages, max_tokens=1).cached_tokens == n_tokens - 1

        wait_until(found, RECOVERY_TIMEOUT_S, server.log_text)  # it knows the identity of its model
        before = failed()
        rig.daemon.signal(signal.SIGSTOP)
        try:
            for number in range(8):
                messages = short_chat(f"{number} hanging")
                check_not_delayed(rig, server.chat(messages, **OPTIONS), messages, **OPTIONS)
            # Three failures open the circuit, and those of stores in the background count too.
            assert failed() - before < 7
            wait_until(lambda: "is not responding" in server.log_text(), RECOVERY_TIMEOUT_S, server.log_text)
        finally:
            rig.daemon.signal(signal.SIGCONT)
        wait_until(found, RECOVERY_TIMEOUT_S, server.log_text)
    rig.wait_recovered()


def test_requests_that_are_answered_together_survive_a_kill(rig: Rig) -> None:
    """Four prompts in one batch, the daemon killed under them: all are answered, and the server lives on."""
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(rig.a.chat, short_chat(f"{number} together"), max_tokens=60) for number in range(4)]
        time.sleep(0.5)
        rig.daemon.kill()
        assert all(answer.result().completion_tokens > 0 for answer in answers)
    rig.daemon.start()
    rig.wait_recovered()


# -- the launcher -----------------------------------------------------------------------------------------------------


def test_flags_reach_the_server_and_sigterm_ends_it_with_everything_stored(rig: Rig) -> None:
    """A server that quantizes its own cache and answers in 7 tokens; another like it goes on from the store."""
    messages, flags = chat("flags"), ("--max-tokens", "7", "--kv-bits", "8", "--quantized-kv-start", "0")
    with rig.server("flags", *flags) as server:
        cold = server.chat(messages, max_tokens=None)
        assert server.stop() == 0, server.log_text()
    rig.daemon.kill()
    rig.daemon.start()
    with rig.server("flags", *flags) as server:
        warm = server.chat(messages, max_tokens=None)
    assert (cold.cached_tokens <= COMMON_TOKENS_MAX, cold.completion_tokens) == (True, 7)
    assert (warm.cached_tokens, warm.completion_tokens) == (cold.prompt_tokens - 1, 7)
    assert warm.text == cold.text
    rig.wait_recovered()


def test_flags_that_the_server_does_not_know_are_its_to_refuse(rig: Rig) -> None:
    """Its usage and its exit code, as without the launcher."""
    result = run_cli(["run", "mlx_lm.server", "--no-such-flag"], rig.environ)
    assert result.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in result.stderr


def test_a_port_that_is_taken_ends_the_server(rig: Rig) -> None:
    """The stock server says so and then waits for its generation thread for ever."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_cli(["run", "mlx_lm.server", "--model", str(rig.model.folder), "--port", port], rig.environ)
    assert ended.returncode == 1
    assert "Address already in use" in ended.stderr


def test_its_own_flags_come_before_the_server_and_are_not_passed_on(rig: Rig) -> None:
    """With --json the first line says what is started."""
    result = run_cli(["run", "--json", "--address", rig.daemon.listen, "mlx_lm.server", "--help"], rig.environ)
    assert result.returncode == 0, result.stderr
    assert "--quantized-kv-start" in result.stdout
    assert "--address" not in result.stdout.partition("}")[2]


@pytest.mark.parametrize(("flags", "expected"), [([], None), (["--prompt-cache-bytes", "5MB"], 5_000_000)])
def test_memory_of_prompts_is_bounded_in_bytes_by_default(
    flags: list[str], expected: int | None, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the stock server's own `run`: an eighth of the machine's memory, unless a flag says otherwise."""
    seen: list[tuple[int, int]] = []

    def listen(host: str, port: int, generator: Any) -> None:
        seen.append((generator.prompt_cache.max_bytes, generator.prompt_cache.max_size))
        generator.stop_and_join()

    for name in ("BatchGenerator", "LRUPromptCache", "load", "run", "stream_generate"):
        monkeypatch.setattr(stock, name, getattr(stock, name))  # put back at the end
    monkeypatch.setattr(stock, "_run_http_server", listen)
    monkeypatch.setattr("sys.argv", ["mlx_lm.server", "--port", str(free_port()), *flags])
    store = ModelStore(kvstore.connect(rig.daemon.listen), WeightsDigest(rig.folder))
    try:
        plug_in(stock, store)
        stock.main()
    finally:
        store.close(0.0)
    assert seen == [(expected or default_memory_bytes(), 10)]
