"""What a memory tier does while stores are staged: whose prompt a sequence is of, and what it offers at the end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.client import Client
from kvstore.client.store import Touch
from kvstore.core.breaker import Deadline
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import PromptCache
from kvstore.integrations.touches import YOUNG_S, FirstTouches
from tests.support.daemon import DaemonProcess
from tests.support.models import build_tiny, heldout_tokens, write_tiny
from tests.support.sessions import client_of
from tests.test_prompt_cache import Provider, filled

TOKENS = heldout_tokens()
PLACE = ("model", "epoch")


class Rig:
    """First touches with a clock, and what they offer."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.offers: list[list[int]] = []
        self.touches = FirstTouches(lambda _, tokens: self.offers.append(tokens), lambda _: None, lambda: self.now_s)


def test_every_part_of_a_prompt_is_of_it() -> None:
    """What it begins with, and what begins with it; other prompts and models have numbers of their own."""
    touches = Rig().touches
    one, other = touches.begin("model", [1, 2, 3, 4], 2), touches.begin("model", [1, 9], 0)
    assert one.prompt != other.prompt and one.prompt
    assert touches.of("model", [1, 2, 3, 4, 5, 6]) == one and touches.of("model", [1, 9, 9]) == other
    assert touches.of("model", [1, 2, 3]) == one
    assert touches.of("model", [7, 7]) not in (one, other) and touches.of("another", [1, 9]) != other
    later = touches.begin("model", [1, 2, 3, 4], 4)
    assert touches.of("model", [1, 2, 3, 4, 5]) == later, "the latest"
    assert touches.of("model", [1, 2, 3]) is later, "so that all of it knows whether it was deferred"


def test_at_the_end_what_is_young_is_offered_once_the_newest_first() -> None:
    """Older than eight minutes it was not asked for in the time in which most is."""
    rig = Rig()
    for number in range(4):
        rig.touches.offered(PLACE, [number], Touch(1, deferred=True))
        rig.now_s += YOUNG_S / 2 - 1
    rig.touches.end(Deadline(60.0))
    assert rig.offers == [[3], [2]]
    rig.touches.end(Deadline(60.0))
    assert rig.offers == [[3], [2]]


def test_what_was_not_deferred_is_not_offered_again() -> None:
    """It is stored."""
    rig = Rig()
    rig.touches.offered(PLACE, [1], Touch(1))
    rig.touches.end(Deadline(60.0))
    assert rig.offers == [] and not rig.touches.is_deferred(PLACE, [1])


def test_an_end_without_time_offers_nothing() -> None:
    """A stop is not held up."""
    rig = Rig()
    rig.touches.offered(PLACE, [1], Touch(1, deferred=True))
    rig.touches.end(Deadline(0.0))
    assert rig.offers == []


def test_a_model_that_is_left_has_its_young_sequences_offered() -> None:
    """Those of the model that is asked for now stay for later."""
    rig = Rig()
    rig.touches.begin("model", [1], 0)
    rig.touches.offered(PLACE, [1], Touch(1, deferred=True))
    rig.touches.offered(("another", None), [2], Touch(2, deferred=True))
    rig.touches.begin("another", [3], 0)
    assert rig.offers == [[1]]
    rig.touches.begin("another", [3], 0)
    rig.touches.end(Deadline(60.0))
    assert rig.offers == [[1], [2]]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that stages its stores."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data", admission="staged", profile="exact") as running:
        yield running


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a tiny model, and the model: one whose caches can be cut, and a hybrid."""
    folder = tmp_path_factory.mktemp("model") / request.param
    write_tiny(folder, request.param)
    return str(folder), build_tiny(request.param)


class Server:
    """A prompt cache of a new process: it computes prompts one after the other, and ends."""

    def __init__(self, daemon: DaemonProcess, worker: Any) -> None:
        folder, self.model = worker
        self.key = (folder, None, None)
        self.client: Client = client_of(daemon)
        digests = WeightsDigest(Path(folder).parent / "digests")
        assert digests.wait(folder, 30.0)
        self.store = ModelStore(self.client, digests)  # type: ignore[arg-type]
        self.cache = PromptCache(store=self.store, provider=Provider(self.key, self.model))

    def compute(self, tokens: list[int], kind: str = "assistant") -> int:
        """Look a prompt up, compute all of it and insert it; how many tokens were there."""
        _, rest = self.cache.fetch_nearest_cache(self.key, tokens)
        self.cache.insert_cache(self.key, tokens, filled(self.model, tokens), cache_type=kind)
        assert self.store.flush(60.0)
        return len(tokens) - len(rest)

    def held(self, tokens: list[int]) -> int:
        """How many tokens of a prompt the daemon has."""
        [session] = self.store._sessions.values()
        return session.match([*tokens, 1]).n_tokens


FIRST = itertools.count(1)


def prompt(n_tokens: int = 300) -> list[int]:
    """A prompt that no other begins with."""
    return [next(FIRST), *TOKENS[1:n_tokens]]


def test_a_first_touch_waits_in_memory_and_the_second_is_written(daemon: DaemonProcess, worker: Any) -> None:
    """The conversation goes on: what it went on from is stored, and what is new waits in its turn."""
    server, tokens = Server(daemon, worker), prompt()
    server.compute(tokens)
    assert server.held(tokens) == 0
    assert server.compute([*tokens, *TOKENS[400:500]]) > 0
    held = server.held([*tokens, *TOKENS[400:500]])
    assert held == (300 if server.cache.needs_checkpoints(server.key) else 256)
    server.store.close(0.0)


def test_a_system_prompt_is_written_at_once(daemon: DaemonProcess, worker: Any) -> None:
    """It is asked for again by whatever comes."""
    server, tokens = Server(daemon, worker), prompt()
    server.compute(tokens, "system")
    assert server.held(tokens) == 300
    server.store.close(0.0)


def test_what_is_young_when_the_worker_ends_is_written(daemon: DaemonProcess, worker: Any) -> None:
    """The next worker has it; and of one that is killed nothing but first touches is missing."""
    server, tokens, lost = Server(daemon, worker), prompt(), prompt()
    server.compute(lost)
    killed = server
    server = Server(daemon, worker)
    server.compute(tokens)
    ending = threading.Thread(target=server.store.close, args=(60.0,))  # as a server's main thread does
    ending.start()
    ending.join()
    again = Server(daemon, worker)
    _, rest = again.cache.fetch_nearest_cache(again.key, [*tokens, 1])
    assert rest == [1] and again.held(lost) == 0
    again.store.close(0.0)
    killed.client.close(0.0)
