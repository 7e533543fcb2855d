"""A hit is never slower than the prefill that it saves: a fast model, and a disk that becomes slow and fast again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.blobs import ranges
from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.client.session import Session
from kvstore.core.blocks import Reason
from tests.support.daemon import DaemonProcess
from tests.support.servers import wait_until
from tests.support.sessions import PATIENT, client_of
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=2, width=64)
TOKENS = list(range(1000, 3048))
# What the model would take for the prompt: much longer than a hit from a fast disk, on a busy machine too.
PREFILL_S = 12.0
SPEED = len(TOKENS) / PREFILL_S
# 64 ranges are read for a hit, so it takes eight times as long as the prefill.
SLOW_READ_S = PREFILL_S / 8
# Beliefs fade within the test.
FADING = "from kvstore.server.fetching import costs; costs.HALF_LIFE_S = 3.0; "
SERVE = "import sys; from kvstore.cli import main; sys.argv = ['kvstore', 'serve', *sys.argv[1:]]; main()"


class SlowDisk:
    """Makes every read of a blob in this process take longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read_s = 0.0
        self.reads = 0
        self._preadv = os.preadv
        monkeypatch.setattr(ranges.os, "preadv", self._read)

    def _read(self, *arguments: Any) -> int:
        self.reads += 1
        time.sleep(self.read_s)
        return self._preadv(*arguments)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """Fast at first."""
    return SlowDisk(monkeypatch)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A client of a daemon whose beliefs fade within seconds, with one sequence in it."""
    with DaemonProcess(tmp_path / "data", profile="raw", program=FADING + SERVE) as daemon, client_of(daemon) as client:
        session = client.session(make_namespace(LAYOUT), **PATIENT)  # type: ignore[arg-type]
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        yield client


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds."""
    started = time.monotonic()
    return work(), time.monotonic() - started


def fetch(session: Session, speed: float = SPEED) -> Any:
    """A fetch of a caller that says how fast it computes."""
    return session.fetch([*TOKENS, 1], prefill_tokens_per_s=speed)


def test_a_disk_that_becomes_slow_costs_less_than_the_prefill_and_a_fast_one_is_noticed(
    client: Client, disk: SlowDisk
) -> None:
    """First given up at half of the prefill, then not even tried, then tried now and then; hits when it is fast."""
    session = client.session(make_namespace(LAYOUT), **PATIENT)  # type: ignore[arg-type]
    hit = fetch(session)
    assert_rows(hit.layers, LAYOUT, TOKENS)
    disk.read_s = SLOW_READ_S
    answer, took_s = timed(lambda: fetch(session))
    assert (bool(answer), answer.reason) == (False, Reason.DEADLINE)
    assert took_s < PREFILL_S, "and not the time of all reads"
    report = time.monotonic() + 120  # is on its way
    while session.match([*TOKENS, 1], SPEED) and time.monotonic() < report:
        time.sleep(0.05)
    before = disk.reads
    answer = fetch(session)
    assert (bool(answer), answer.reason) == (False, Reason.SLOWER_THAN_PREFILL)
    assert disk.reads == before, "not a single range was read"
    assert session.match([*TOKENS, 1], SPEED).reason is Reason.SLOWER_THAN_PREFILL
    assert session.match([*TOKENS, 1]).n_tokens == len(TOKENS), "who says nothing of its speed is not refused"
    takes_all = client.session(make_namespace(LAYOUT), slow_hits=True, **PATIENT)  # type: ignore[arg-type]
    assert takes_all.match([*TOKENS, 1], SPEED).n_tokens == len(TOKENS), "nor is who takes slow hits"
    # Requests that only matched count, and the fetch that was given up is no hit.
    want = {"slower_than_prefill": 3, "deadline": 1}
    wait_until(lambda: client.stats()["miss_reasons"] == want, 30, lambda: str(client.stats()["miss_reasons"]))
    disk.read_s = 0.0
    deadline = time.monotonic() + 180
    while not (answer := fetch(session)) and time.monotonic() < deadline:
        assert answer.reason is Reason.SLOWER_THAN_PREFILL
        time.sleep(0.2)
    assert isinstance(answer, Hit) and answer.n_tokens == len(TOKENS)
    assert isinstance(fetch(session), Hit), "and it stays so"


def test_a_fast_tiny_model_is_not_made_to_wait(client: Client) -> None:
    """The daemon says no to 2,048 tokens at a million tokens/s; at ten million it is not even asked."""
    session = client.session(make_namespace(LAYOUT), **PATIENT)  # type: ignore[arg-type]
    # Half of what it predicts is 2 ms: a busy machine may not even hear the daemon's no by then.
    assert fetch(session, speed=5e5).reason in (Reason.SLOWER_THAN_PREFILL, Reason.DEADLINE)
    assert session.match([*TOKENS, 1], 5e5).reason is Reason.SLOWER_THAN_PREFILL
    before = client.stats()["requests"]["fetch"]
    assert fetch(session, speed=1e7).reason is Reason.SLOWER_THAN_PREFILL
    assert client.stats()["requests"]["fetch"] == before


def test_a_stream_is_measured_by_the_daemon(client: Client) -> None:
    """Both ways by stream, with a speed and without."""
    session = client.session(make_namespace(LAYOUT), **PATIENT)  # type: ignore[arg-type]
    for representation in ("packed", "dense"):
        hit = session.fetch([*TOKENS, 1], representation, "stream", prefill_tokens_per_s=SPEED, evaluate=True)  # type: ignore[arg-type]
        assert isinstance(hit, Hit), hit
        assert_rows(hit.layers, LAYOUT, TOKENS)
