"""The client against a real daemon in a process of its own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import channel
from kvstore.client.client import Client, connect
from kvstore.client.results import Hit
from kvstore.client.session import Session
from kvstore.core.blocks import Reason
from kvstore.core.breaker import CircuitBreaker
from kvstore.core.layers import Layout
from tests.support.clock import Clock
from tests.support.daemon import DaemonProcess
from tests.support.limits import OPEN_DEADLINES, small_config
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=3, heads=2, width=64)
TOKENS = list(range(1000, 1700))
WAYS = (("packed", "path"), ("packed", "stream"), ("dense", "stream"))
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}
TOTAL_S = OPEN_DEADLINES["fetch_total_ms"] / 1000


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon on an empty directory, at its default profile."""
    with DaemonProcess(tmp_path / "data") as running:
        yield running


def client_of(daemon: DaemonProcess, **settings: object) -> Client:
    """A client whose limits do not decide a test."""
    return connect(config=small_config(daemon.listen, **settings))


def check_hit(session: Session, prompt: list[int], n_tokens: int, bits: int, layout: Layout = LAYOUT) -> None:
    """Every way of fetching gives the rows of these tokens."""
    for representation, transport in WAYS:
        hit = session.fetch(prompt, representation, transport)  # type: ignore[arg-type]
        assert isinstance(hit, Hit), hit
        assert (hit.n_tokens, hit.source.transport, hit.source.representation) == (n_tokens, transport, representation)
        assert_rows(hit.layers, layout, prompt[:n_tokens], bits=bits)


@pytest.mark.parametrize(("profile", "bits"), [("raw", 0), ("affine8", 8), ("affine4", 4)])
def test_what_one_client_stores_another_fetches(daemon: DaemonProcess, profile: str, bits: int) -> None:
    """Any cut, packed and dense, by path and by stream."""
    namespace = make_namespace(LAYOUT)
    with client_of(daemon) as writer:
        result = writer.session(namespace, profile, **SLOW).store(
            TOKENS, make_layers(LAYOUT, TOKENS, slack=68), wait=True
        )
        assert (result.stored_tokens, result.reason, result.durable) == (700, Reason.OK, True)
        assert result.new_bytes > 0
    with client_of(daemon) as reader:
        session = reader.session(namespace, profile, **SLOW)
        assert session.match(TOKENS).n_tokens == 699
        check_hit(session, TOKENS, 699, bits)
        check_hit(session, [*TOKENS[:300], 1, 2], 300, bits)
        check_hit(session, [*TOKENS, 5], 700, bits)
        stats = reader.stats()
        assert stats["tokens"]["stored"] == 700
        assert stats["requests"]["misses"] == 0
        assert [row["id"] for row in reader.list()["namespaces"]] == [namespace.root.hex()]


def test_turns_of_a_chat_send_and_write_only_what_is_new(daemon: DaemonProcess) -> None:
    """And what came out of the store is spliced, so that ten turns drift no further than one."""
    namespace = make_namespace(LAYOUT)
    with client_of(daemon) as client:
        first = client.session(namespace, **SLOW)
        assert first.store(TOKENS[:300], make_layers(LAYOUT, TOKENS[:300]), wait=True).durable
        n_tokens = 300
        for _ in range(10):
            session = client.session(namespace, **SLOW)  # remembers nothing but its own hits
            hit = session.fetch(TOKENS)
            assert hit.n_tokens == n_tokens
            n_tokens += 37
            result = session.store(TOKENS[:n_tokens], make_layers(LAYOUT, TOKENS[:n_tokens]), wait=True)
            assert (result.stored_tokens, result.durable) == (n_tokens, True)
        check_hit(client.session(namespace, **SLOW), TOKENS, 670, bits=8)
        assert client.session(namespace).store(TOKENS[:670], make_layers(LAYOUT, TOKENS[:670]), wait=True).reason is (
            Reason.ALREADY_STORED
        )


def test_a_sequence_over_the_queue_limit_arrives_whole(daemon: DaemonProcess) -> None:
    """In pieces, each of them durable before the next begins."""
    tokens = list(range(5000))
    with client_of(daemon, memory_bytes=2 << 20) as client:
        session = client.session(make_namespace(LAYOUT), **SLOW)
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == 5000
        assert session.stats.stores["ok"] > 2
        assert session.fetch(tokens, "dense", "stream").n_tokens == 4999  # two messages of 1 MiB are held at a time
    with client_of(daemon, memory_bytes=1 << 20) as client:
        refused = client.session(make_namespace(LAYOUT), **SLOW).fetch(tokens, "dense", "stream")
        assert not refused and "1048576" in refused.detail
    with client_of(daemon) as client:
        check_hit(client.session(make_namespace(LAYOUT), **SLOW), tokens, 4999, bits=8)


def test_a_damaged_blob_is_found_by_the_client_and_quarantined_by_the_daemon(daemon: DaemonProcess) -> None:
    """This fetch is shorter, the next does not meet the blob again."""
    with client_of(daemon) as client:
        session = client.session(make_namespace(LAYOUT), **SLOW)
        session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
        key = next(block["key"] for block in client.list(session.namespace.root)["blocks"] if block["start"] == 256)
        path = next(blob for blob in daemon.blobs() if blob.name.startswith(key))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)
        hit = session.fetch(TOKENS)
        assert (hit.n_tokens, hit.reason) == (256, Reason.CORRUPT)
        assert session.flush(60)
        assert client.stats()["disk"]["quarantined"] == 1
        assert session.fetch(TOKENS).n_tokens == 256
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).stored_tokens == 700
        check_hit(session, TOKENS, 699, bits=8)


def test_a_killed_daemon_costs_misses_and_comes_back_with_everything(daemon: DaemonProcess) -> None:
    """The same session goes on."""
    with client_of(daemon) as client:
        session = client.session(make_namespace(LAYOUT), **SLOW)
        session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
        daemon.kill()
        assert session.fetch(TOKENS).reason is Reason.UNAVAILABLE
        assert not session.store(TOKENS[:50], make_layers(LAYOUT, TOKENS[:50]), wait=True).durable
        daemon.start()
        give_up_at = time.monotonic() + 120
        while not (hit := session.fetch(TOKENS)):
            assert time.monotonic() < give_up_at, hit
            time.sleep(0.05)
        assert hit.n_tokens == 699


def test_a_stopped_daemon_costs_the_stall_limit_and_no_more(daemon: DaemonProcess) -> None:
    """With the shipped limits; afterwards the circuit is open, and a store does not hold anybody up either."""
    with client_of(daemon) as client:
        session = client.session(make_namespace(LAYOUT), **SLOW)
        session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
        assert session.fetch(TOKENS)
        quick = client.session(session.namespace, connect_ms=50, stall_ms=500)
        clock = Clock()
        client._connection.breaker = CircuitBreaker(clock=clock)
        daemon.signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert quick.fetch(TOKENS).reason is Reason.DEADLINE
            assert time.monotonic() - started < TOTAL_S / 2, "the stall limit of 0.5 s ended it"
            assert [quick.fetch(TOKENS).reason for _ in range(4)][2:] == [Reason.CIRCUIT_OPEN] * 2
            answer = quick.store([*TOKENS, 1], make_layers(LAYOUT, [*TOKENS, 1]))
            assert answer.reason in (Reason.OK, Reason.UNAVAILABLE)
            assert time.monotonic() - started < TOTAL_S / 2
        finally:
            daemon.signal(signal.SIGCONT)
        give_up_at = time.monotonic() + 120
        while not session.fetch(TOKENS):
            assert time.monotonic() < give_up_at
            clock.now_s += 1.0
            time.sleep(0.05)


def test_a_verb_waits_for_a_daemon_that_is_held_up_longer_than_one_attempt_takes(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To connect: it has the time that the verb has, and the first answer counts."""
    monkeypatch.setattr(channel, "ATTEMPT_S", 0.3)
    daemon.signal(signal.SIGSTOP)
    timer = threading.Timer(1.0, daemon.signal, [signal.SIGCONT])
    timer.start()
    try:
        with client_of(daemon) as client:
            assert client.stats()["daemon"]["state"] == "serving"
    finally:
        timer.join()


def test_evicted_prefixes_are_misses_and_can_be_stored_again(daemon: DaemonProcess) -> None:
    """The session's memory of what is held gives way to what the daemon says."""
    with client_of(daemon) as client:
        session = client.session(make_namespace(LAYOUT), **SLOW)
        session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
        assert client.evict(all=True)["blocks"] == 3
        assert not session.fetch(TOKENS)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).stored_tokens == 700
        client.evict(all=True)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).stored_tokens == 700
        check_hit(session, TOKENS, 699, bits=8)
