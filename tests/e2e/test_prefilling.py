"""Prompts stored while they are computed: the batch of mlx_lm.server over a real daemon, and the server itself."""

from __future__ import annotations

import functools
import http.client
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer

from kvstore.client import connect
from kvstore.core.blocks import Reason
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prefilling import StoringBatch, watched
from kvstore.integrations.prompt_cache import PromptCache
from kvstore.integrations.touches import Endings
from tests.support.daemon import DaemonProcess
from tests.support.limits import OPEN_DEADLINES, launch, small_config
from tests.support.models import build_tiny, heldout_tokens, write_tiny
from tests.support.servers import (
    ANSWER_TIMEOUT_S,
    HOST,
    NO_MEMORY,
    PLAIN,
    ServerProcess,
    clean_environ,
    start_all,
    wait_until,
)
from tests.test_prompt_cache import Provider

TOKENS = heldout_tokens()
STEP = 128
PART = 256
PARTS = {"prefill_part_tokens": PART, "prefill_checkpoint_tokens": PART}


@functools.cache
def tiny(name: str) -> Any:
    """A small model, made once."""
    return build_tiny(name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the models that are computed in this process."""
    base = tmp_path_factory.mktemp("models")
    return {name: str(write_tiny(base / name, name)) for name in ("llama", "qwen3_5", "gemma3")}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A running daemon."""
    with DaemonProcess(tmp_path_factory.mktemp("store") / "data", profile="raw") as started:
        yield started


class Worker:
    """A process's view of the store, and the loop of the server around a batch of prompts."""

    def __init__(self, name: str, folders: dict[str, str], daemon: DaemonProcess, tenant: str, **config: Any) -> None:
        self.key, self.model = (folders[name], None, None), tiny(name)
        digests = WeightsDigest(Path(folders[name]).parent / "cache")
        assert digests.wait(folders[name], 60.0)
        client = connect(config=small_config(daemon.listen, **{**PARTS, **config}))
        self.store = ModelStore(client, digests, salt=tenant.encode())
        self.cache = PromptCache(0, store=self.store, provider=Provider(self.key, self.model))

    def generate(self, prompts: Sequence[list[int]], cancel_at: int = 1 << 30, kind: str = "batched") -> list[Any]:
        """(tokens that were restored, tokens generated) of each prompt; all are given up when one has `cancel_at`."""
        if kind == "sequential":
            return [self._one(prompt, cancel_at) for prompt in prompts]
        batch = StoringBatch(self.model, max_tokens=5, prefill_step_size=STEP, prompt_cache=self.cache)
        covered, made = {}, {}
        for prompt in prompts:
            found, rest = self.cache.fetch_nearest_cache(self.key, prompt)
            given = len(prompt) - len(rest)
            (uid,) = batch.insert_segments([[rest]], caches=[found], all_tokens=[prompt[:given]])
            covered[uid], made[uid] = given, []
        left = set(made)
        while left:
            computed, generated = batch.next()
            reached = any(covered[one.uid] + one.progress[0] >= cancel_at for one in computed)
            given_up = [one.uid for one in computed] if reached else []
            batch.remove(given_up)
            left.difference_update(given_up)
            for one in generated:
                made[one.uid].append(one.token)
                if one.finish_reason:
                    left.discard(one.uid)
                    self.cache.insert_cache(self.key, one.all_tokens, one.prompt_cache)
        batch.close()
        return [(covered[uid], made[uid]) for uid in made]

    def _one(self, prompt: list[int], cancel_at: int) -> Any:
        cache, rest = self.cache.fetch_nearest_cache(self.key, prompt)
        layers = cache if cache is not None else make_prompt_cache(self.model)
        covered = len(prompt) - len(rest)

        def progress(done: int, total: int) -> None:
            if covered + done >= cancel_at:
                raise InterruptedError

        options = {"prompt": rest, "prompt_cache": layers, "prompt_progress_callback": progress}
        options = watched(self.cache, {**options, "prefill_step_size": STEP, "max_tokens": 5})
        made: list[int] = []
        with suppress(InterruptedError):
            tokenizer = load_tokenizer(Path(str(self.key[0])))
            made = [one.token for one in stream_generate(self.model, tokenizer, **options)]
            self.cache.insert_cache(self.key, [*prompt, *made], layers)
        return covered, made

    def is_heard(self) -> bool:
        """Whether the daemon answers what its session asks."""
        (session,) = self.store._sessions.values()
        return session.match(TOKENS[:64]).reason in (Reason.IDENTITY, Reason.UNKNOWN_PREFIX)

    def close(self) -> None:
        """Everything queued is stored, or was refused."""
        assert self.store.flush(60.0)
        self.store.close()


@functools.cache
def cold(name: str, start: int, end: int) -> list[int]:
    """What the model generates without any cache."""
    model = tiny(name)
    batch = StoringBatch(model, max_tokens=5, prefill_step_size=STEP, prompt_cache=PromptCache(0, store=NoStore()))
    batch.insert_segments([[TOKENS[start:end]]])
    made: list[int] = []
    while len(made) < 5:
        made += [one.token for one in batch.next()[1]]
    return made


class NoStore:
    """In the place of a store that nobody asks."""

    endings = Endings()

    def flush(self, timeout_s: float) -> None:
        """Nothing is queued."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "batched"),
        ("llama", "sequential"),
        ("qwen3_5", "batched"),
        ("qwen3_5", "sequential"),
        ("gemma3", "batched"),
    ],
)
def test_a_prompt_that_was_given_up_is_found_where_it_was(
    name: str, kind: str, folders: dict[str, str], daemon: DaemonProcess
) -> None:
    """By another process, at most one part below; and the answer is that of a cold run."""
    prompt = TOKENS[:700]
    first = Worker(name, folders, daemon, f"given-up-{kind}")
    assert first.generate([prompt], cancel_at=640, kind=kind) == [(0, [])]
    first.close()
    other = Worker(name, folders, daemon, f"given-up-{kind}")
    ((covered, made),) = other.generate([prompt], kind=kind)
    other.close()
    assert 640 - PART <= covered <= 640
    assert made == cold(name, 0, 700)


def test_prompts_of_a_batch_are_stored_apart_and_once(folders: dict[str, str], daemon: DaemonProcess) -> None:
    """Different lengths share one padded batch; what is inserted at the end moves only what is left."""
    prompts = [TOKENS[:700], TOKENS[1500:1800], TOKENS[3000:3550]]
    first = Worker("llama", folders, daemon, "batch")
    before = tokens_stored(daemon)
    assert [made for _, made in first.generate(prompts)] == [
        cold("llama", 0, 700),
        cold("llama", 1500, 1800),
        cold("llama", 3000, 3550),
    ]
    first.close()
    assert tokens_stored(daemon) - before == sum(len(prompt) + 5 for prompt in prompts)
    other = Worker("llama", folders, daemon, "batch")
    assert [covered for covered, _ in other.generate(prompts)] == [len(prompt) - 1 for prompt in prompts]
    other.close()


def test_padded_prompts_of_a_batch_are_stored_too(folders: dict[str, str], daemon: DaemonProcess) -> None:
    """One begins with what was restored, the others beside it are padded by as much; all are given up."""
    prompts = [TOKENS[:700], TOKENS[3000:3700]]
    worker = Worker("llama", folders, daemon, "padded")
    worker.generate(prompts[:1], cancel_at=256)
    assert worker.store.flush(60.0)
    assert [covered for covered, _ in worker.generate(prompts, cancel_at=512)] == [256, 0]
    worker.close()
    other = Worker("llama", folders, daemon, "padded")
    answers = other.generate(prompts)
    other.close()
    assert [covered for covered, _ in answers] == [512, 256]
    assert [made for _, made in answers] == [cold("llama", 0, 700), cold("llama", 3000, 3700)]


def test_the_next_checkpoint_replaces_the_one_before(folders: dict[str, str], daemon: DaemonProcess) -> None:
    """Of a prompt with two interim checkpoints one is left, beside the one at its end."""
    worker = Worker("qwen3_5", folders, daemon, "replaced")
    before = checkpoints(daemon)
    worker.generate([TOKENS[:700]], cancel_at=640)
    worker.close()
    assert checkpoints(daemon) - before == 1
    worker = Worker("qwen3_5", folders, daemon, "replaced")
    worker.generate([TOKENS[:700]])
    worker.close()
    assert checkpoints(daemon) - before == 1


def tokens_stored(daemon: DaemonProcess) -> int:
    """By the daemon, since it began."""
    with connect(daemon.listen) as client:
        return int(client.stats()["tokens"]["stored"])


def checkpoints(daemon: DaemonProcess) -> int:
    """How many the daemon holds."""
    with connect(daemon.listen) as client:
        return sum(one["checkpoints"] for one in client.stats()["namespaces"])


def test_a_prompt_of_four_times_the_memory_is_stored_in_one_turn(
    folders: dict[str, str], daemon: DaemonProcess
) -> None:
    """And nothing of it twice."""
    memory_bytes = 1 << 20
    prompt = TOKENS[: 4 * memory_bytes // (len(tiny("llama").layers) * 2 * 2 * 64 * 4)]
    worker = Worker("llama", folders, daemon, "memory", memory_bytes=memory_bytes)
    before = tokens_stored(daemon)
    worker.generate([prompt])
    worker.close()
    assert tokens_stored(daemon) - before == len(prompt) + 5
    other = Worker("llama", folders, daemon, "memory")
    ((covered, made),) = other.generate([prompt])
    other.close()
    assert (covered, made) == (len(prompt) - 1, cold("llama", 0, len(prompt)))


def test_a_daemon_that_dies_meanwhile_changes_no_token(folders: dict[str, str], tmp_path: Path) -> None:
    """Nor does one that comes back with less than was acknowledged: what is missing is stored once more."""
    prompt = TOKENS[:700]
    daemon = DaemonProcess(tmp_path / "data", profile="raw").start()
    worker = Worker("llama", folders, daemon, "dies")
    worker.generate([prompt], cancel_at=384)
    assert worker.store.flush(60.0)
    daemon.kill()
    ((_, made),) = worker.generate([prompt])
    assert made == cold("llama", 0, 700)
    for path in daemon.data_dir.iterdir():
        if path.name in ("index", "blobs.noindex"):
            shutil.rmtree(path)
    daemon.start()
    wait_until(worker.is_heard, 60.0, daemon.log_text)
    worker.generate([prompt], cancel_at=640)
    worker.close()
    other = Worker("llama", folders, daemon, "dies")
    ((covered, made),) = other.generate([prompt])
    other.close()
    daemon.kill()
    assert covered >= 640 - PART, daemon.log_text()
    assert made == cold("llama", 0, 700)


WITH_PARTS = launch("run", "--no-start", "--slow-hits", "mlx_lm.server", min_prefix_tokens=1, **OPEN_DEADLINES, **PARTS)
FLAGS = ("--prefill-step-size", str(STEP), *NO_MEMORY)


@contextmanager
def hung_up_at(server: ServerProcess, system: str, share: float, **options: Any) -> Iterator[int]:
    """The tokens computed of a prompt, once they are such a share of it; its client hangs up where the context ends."""
    body = {"messages": messages(system), "temperature": 0.0, "stream": True, "max_tokens": 5, **options}
    with closing(http.client.HTTPConnection(HOST, server.port, timeout=ANSWER_TIMEOUT_S)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        lines = (line.split()[-1].split(b"/") for line in response if line.startswith(b": keepalive "))
        yield next(int(done) for done, total in lines if int(done) >= share * int(total))
        response.close()


def messages(system: str) -> list[dict[str, str]]:
    """Of one chat."""
    return [{"role": "system", "content": system}, {"role": "user", "content": "What is a cache?"}]


def test_a_cancelled_request_and_a_killed_server_keep_their_prefill(
    folders: dict[str, str], daemon: DaemonProcess, tmp_path: Path
) -> None:
    """Hung up in a batched prompt; killed in a sequential one. The texts are those of a stock server."""
    folder = Path(folders["qwen3_5"])
    one, other = (load_tokenizer(folder).decode(TOKENS[start : start + 1000]) for start in (0, 4000))
    stock = ServerProcess(folder, tmp_path / "cold.log", clean_environ(), launcher=PLAIN, flags=FLAGS)
    first, last = (
        ServerProcess(folder, tmp_path / f"{name}.log", daemon.environ(), launcher=WITH_PARTS, flags=FLAGS)
        for name in ("first", "last")
    )
    try:
        start_all(stock, first, last)
        cold_texts = [stock.chat(messages(one)).text, stock.chat(messages(other), seed=1).text]
        before = tokens_stored(daemon)
        with hung_up_at(first, one, 0.8) as done:
            pass
        wait_until(lambda: tokens_stored(daemon) - before >= done - PART, 60.0, first.log_text)
        retried = first.chat(messages(one))
        assert retried.cached_tokens >= done - PART, first.log_text()
        assert retried.text == cold_texts[0]
        before = tokens_stored(daemon)
        with hung_up_at(first, other, 0.8, seed=1) as done:
            wait_until(lambda: tokens_stored(daemon) - before >= done - PART, 60.0, first.log_text)
            first.kill()
        retried = last.chat(messages(other), seed=1)
        assert retried.cached_tokens >= done - PART, last.log_text()
        assert retried.text == cold_texts[1]
    finally:
        for server in (stock, first, last):
            server.kill()
