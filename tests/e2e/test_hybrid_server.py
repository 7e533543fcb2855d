"""Models whose caches cannot be cut, through the stock server with the store plugged in, and a real daemon."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from kvstore.client import connect
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.model_names import ModelKey
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import PromptCache
from tests.support.agent import LAUNCH_WITHOUT_ENDS, SYSTEM, Answer, Server, Session, with_template
from tests.support.daemon import DaemonProcess
from tests.support.models import build_tiny, heldout_tokens, write_tiny
from tests.support.servers import PATIENCE_S, wait_until
from tests.test_prompt_cache import Provider, filled

TOKENS = heldout_tokens()
QUANTIZED = ("--kv-bits", "8", "--quantized-kv-start", "0")
PATHS = pytest.mark.parametrize("flags", [(), QUANTIZED], ids=["batched", "kv-bits"])
SHORTFALL_MAX = 64
CALLS = 14


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: a hybrid, one with a short and one with a long window."""
    base = tmp_path_factory.mktemp("models")
    made = {name: with_template(write_tiny(base / name, name)) for name in ("qwen3_5", "gemma3")}
    long = made["long"] = with_template(write_tiny(base / "long", "gemma3"))
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "sliding_window": 1024}))
    return made


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A running daemon."""
    with DaemonProcess(tmp_path / "data") as started:
        yield started


def environ(daemon: DaemonProcess) -> dict[str, str]:
    """For server processes that use the daemon."""
    return {**daemon.environ(), "XDG_CACHE_HOME": str(daemon.data_dir.parent / "cache")}


def alone(tmp_path: Path) -> dict[str, str]:
    """For server processes that find no daemon."""
    return {**os.environ, "KVSTORE_LISTEN": f"unix:{tmp_path}/none", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def written_bytes(daemon: DaemonProcess, answer: Answer) -> int:
    """What the daemon has written, once it holds a checkpoint near the end of the prompt: servers store later."""
    with connect(daemon.listen) as client:

        def furthest() -> int:
            blocks = client.list(blocks=True, limit=10_000)["blocks"]
            return max((one["start"] + one["n_tokens"] for one in blocks if one["checkpoint"]), default=0)

        least = answer.prompt_tokens - SHORTFALL_MAX
        wait_until(lambda: furthest() >= least, PATIENCE_S, lambda: f"no checkpoint at {least} or later: {furthest()}")
        return int(client.stats()["bytes"]["written"])


@PATHS
def test_an_agent_finds_all_of_its_last_prompt(
    flags: tuple[str, ...], folders: dict[str, Path], daemon: DaemonProcess
) -> None:
    """Fourteen calls; half-way server and daemon start anew, so what comes next was on disk."""
    session, written = Session(), []
    for half in range(2):
        with Server(folders["qwen3_5"], environ(daemon), *flags) as server:
            session.chat = server.chat
            written += [written_bytes(daemon, session.call()) for _ in range(CALLS // 2)]
        if not half:
            daemon.restart()
    shortfalls = session.shortfalls()
    assert len(shortfalls) == CALLS - 1
    assert max(shortfalls) <= SHORTFALL_MAX, shortfalls
    # What a call writes does not grow with its prompt.
    calls = [after - before for before, after in itertools.pairwise(written) if after >= before]
    assert sum(calls[-6:]) < 2 * sum(calls[1:7]), calls


def test_an_agent_that_drops_all_reasoning_at_once_still_finds_a_checkpoint(
    folders: dict[str, Path], daemon: DaemonProcess
) -> None:
    """As templates do at the user's next message; in a new process, with few checkpoints kept of many."""
    session = Session(user_every=100, strip=False)
    for calls in (12, 1):
        with Server(folders["qwen3_5"], environ(daemon)) as server:
            session.chat = server.chat
            for _ in range(calls):
                session.call()
        session.strip_all()
    alike = session.answers[0].prompt_tokens - SHORTFALL_MAX
    assert session.answers[-2].cached_tokens > 2 * alike
    assert session.answers[-1].cached_tokens >= alike - SHORTFALL_MAX, "the system prompt at least"


@PATHS
def test_without_the_added_ends_the_agent_starts_over(
    flags: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    """What the test above is worth."""
    with Server(folders["qwen3_5"], alone(tmp_path), *flags, launch=LAUNCH_WITHOUT_ENDS) as server:
        session = Session(server.chat)
        for _ in range(4):
            session.call()
    assert min(session.shortfalls()) > SHORTFALL_MAX
    assert session.shortfalls() == sorted(session.shortfalls()), "and falls back further with every call"


@pytest.mark.parametrize(
    ("name", "flags", "options"),
    [
        ("gemma3", (), ({}, {"seed": 5})),
        ("qwen3_5", (), ({"seed": 5},)),
        ("long", ("--draft-model", "qwen3_5"), ({},)),
    ],
    ids=["rotating", "hybrid-seed", "draft"],
)
def test_another_server_goes_on_where_the_first_was(
    name: str,
    flags: tuple[str, ...],
    options: tuple[dict[str, Any], ...],
    folders: dict[str, Path],
    daemon: DaemonProcess,
) -> None:
    """The same answers, from a prefix that another process computed; with a seed by the sequential path."""
    named = [str(folders.get(flag, flag)) for flag in flags]
    sessions: list[list[Session]] = []
    for _ in range(2):
        with Server(folders[name], environ(daemon), *named) as server:
            sessions.append([Session(server.chat, messages=task(number)) for number in range(len(options))])
            for session, given in zip(sessions[-1], options, strict=True):
                session.call(**given)
                session.call(**given)
    for first, second in zip(*sessions, strict=True):
        assert [one.text for one in second.answers] == [one.text for one in first.answers]
        assert first.answers[0].cached_tokens == 0
        assert first.shortfalls()[0] <= SHORTFALL_MAX
        for answer in second.answers:
            assert answer.prompt_tokens - answer.cached_tokens <= SHORTFALL_MAX


def task(number: int) -> list[dict[str, Any]]:
    """The beginning of a session that shares no prefix with another task."""
    return [{"role": "system", "content": f"{number}. task. {SYSTEM}"}]


@pytest.fixture
def reader(daemon: DaemonProcess, tmp_path: Path) -> Iterator[Any]:
    """Makes prompt caches as new processes have them, over the daemon."""
    digests, stores = WeightsDigest(tmp_path / "cache"), []

    def new(key: ModelKey, model: Any, salt: bytes = b"") -> PromptCache:
        for path in filter(None, key):
            assert digests.wait(path, 30.0)
        stores.append(ModelStore(connect(daemon.listen), digests, salt=salt))
        return PromptCache(store=stores[-1], provider=Provider(key, model))

    yield new
    for store in stores:
        store.close()


def keep(cache: PromptCache, key: ModelKey, model: Any, tokens: Sequence[int]) -> None:
    """Insert what the model makes of the tokens, and wait until it is stored."""
    cache.insert_cache(key, list(tokens), filled(model, tokens))
    assert cache._store.flush(30.0)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_nothing_is_shared_across_identities(name: str, folders: dict[str, Path], reader: Any, tmp_path: Path) -> None:
    """Other weights of equal shape, an adapter, another KV dtype, another salt."""
    model, key = build_tiny(name), (str(folders[name]), None, None)
    keep(reader(key, model), key, model, TOKENS[:300])
    _, rest = reader(key, model).fetch_nearest_cache(key, TOKENS[:400])
    assert len(rest) == 100
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"a": mx.zeros((2,))})
    fine_tune = write_tiny(tmp_path / "fine-tune", name, seed=1)
    for other, its_model, salt in (
        ((str(fine_tune), None, None), model, b""),
        ((key[0], str(adapter), None), model, b""),
        (key, build_tiny(name, mx.bfloat16), b""),
        (key, model, b"tenant"),
    ):
        assert reader(other, its_model, salt).fetch_nearest_cache(other, TOKENS[:400]) == (None, TOKENS[:400])


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_restored_and_cold_sequences_share_a_batch(name: str, folders: dict[str, Path], reader: Any) -> None:
    """Their tokens are those of a batch in which all are cold."""
    model, key = build_tiny(name), (str(folders[name]), None, None)
    prompts = [TOKENS[:340], TOKENS[1000:1080], TOKENS[2000:2150]]
    writer = reader(key, model)
    keep(writer, key, model, prompts[0][:300])
    keep(writer, key, model, prompts[2][:40])
    fresh = reader(key, model)
    warm = [fresh.fetch_nearest_cache(key, prompt) for prompt in prompts]
    assert [len(rest) for _, rest in warm] == [40, 80, 110]
    assert together(model, warm) == together(model, [(None, prompt) for prompt in prompts])


def together(model: Any, sequences: Sequence[tuple[list[Any] | None, list[int]]]) -> dict[int, list[int]]:
    """What a batch of (cache, tokens left) generates."""
    batch = BatchGenerator(model, max_tokens=12)
    caches = [cache or make_prompt_cache(model) for cache, _ in sequences]
    made: dict[int, list[int]] = {uid: [] for uid in batch.insert([rest for _, rest in sequences], caches=caches)}
    while responses := batch.next_generated():
        for one in responses:
            made[one.uid].append(one.token)
    batch.close()
    return made
