"""What a daemon that is absent, hung or slow may cost its workers: never more than the deadlines."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.client.client import Client
from kvstore.codecs import assemble
from kvstore.config import Config
from kvstore.core.blocks import Reason
from kvstore.core.breaker import CircuitBreaker
from tests.support.clock import Clock
from tests.support.fake_daemon import FakeDaemon
from tests.support.synthetic import make_layers, make_layout, make_namespace

NAMESPACE = make_namespace(make_layout(layers=3))
TOKENS = list(range(300))
# Of the limits that must not end a call: what takes less than half of it was ended by the one that the test is about.
LONG_MS = 60_000
LONG_S = LONG_MS / 1000
PATIENT = {"connect_ms": LONG_MS, "stall_ms": LONG_MS, "total_ms": LONG_MS}


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that holds the KV of TOKENS."""
    fake = FakeDaemon(NAMESPACE)
    fake.hold(TOKENS)
    fake.start()
    yield fake
    fake.close()


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """What a call returns, and the seconds that it took."""
    started = time.monotonic()
    return call(), time.monotonic() - started


def test_no_daemon_is_a_miss_within_the_connect_limit_and_then_at_once(tmp_path: Path) -> None:
    """Three times unavailable, after that the circuit is open; a store is refused before anything is copied."""
    with Client(Config(listen=f"unix:{tmp_path}/none")) as client:
        session = client.session(NAMESPACE, **{**PATIENT, "connect_ms": 50})
        client._connection.breaker = CircuitBreaker(clock=Clock())
        reasons = []
        for _ in range(5):
            answer, took_s = timed(lambda: session.fetch(TOKENS))
            reasons.append(answer.reason)  # type: ignore[attr-defined]
            assert took_s < LONG_S / 2
        assert reasons == [Reason.UNAVAILABLE] * 3 + [Reason.CIRCUIT_OPEN] * 2
        assert session.match(TOKENS).reason is Reason.CIRCUIT_OPEN
        result, took_s = timed(lambda: session.store(TOKENS, make_layers(NAMESPACE.layout, TOKENS), wait=True))
        assert result.reason is Reason.UNAVAILABLE  # type: ignore[attr-defined]


def test_a_socket_that_nobody_answers_costs_the_connect_limit(tmp_path: Path) -> None:
    """A daemon that was stopped before we came: the kernel still takes connections for it."""
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(f"{tmp_path}/s")
        stopped.listen()
        with Client(Config(listen=f"unix:{tmp_path}/s")) as client:
            session = client.session(NAMESPACE, **{**PATIENT, "connect_ms": 50})
            answer, took_s = timed(lambda: session.fetch(TOKENS))
        assert answer.reason is Reason.UNAVAILABLE  # type: ignore[attr-defined]
        assert took_s < LONG_S / 2


def test_a_hung_daemon_costs_the_stall_limit_once(daemon: FakeDaemon) -> None:
    """After that only the connect limit, and then nothing."""
    with Client(daemon.config()) as client:
        assert client.session(NAMESPACE, **PATIENT).fetch(TOKENS)
        daemon.faults = {"hang"}
        session = client.session(NAMESPACE, **{**PATIENT, "stall_ms": 300})
        answer, took_s = timed(lambda: session.fetch(TOKENS))
        assert answer.reason is Reason.DEADLINE  # type: ignore[attr-defined]
        assert 0.29 < took_s < LONG_S / 2
        quick = client.session(NAMESPACE, **{**PATIENT, "connect_ms": 50})
        answer, took_s = timed(lambda: quick.fetch(TOKENS))
        assert answer.reason is Reason.UNAVAILABLE  # type: ignore[attr-defined]
        assert took_s < LONG_S / 2


@pytest.mark.usefixtures("cancels")
@pytest.mark.parametrize("representation", ["packed", "dense"])
def test_a_stream_that_stalls_is_cancelled(daemon: FakeDaemon, representation: str) -> None:
    """However many bytes came before."""
    daemon.faults = {"stall_midway"}
    with Client(daemon.config()) as client:
        session = client.session(NAMESPACE, **{**PATIENT, "stall_ms": 200})
        answer, took_s = timed(lambda: session.fetch(TOKENS, representation, "stream"))  # type: ignore[arg-type]
        assert answer.reason is Reason.DEADLINE  # type: ignore[attr-defined]
        assert took_s < LONG_S / 2
        assert daemon.cancelled.wait(60)


@pytest.mark.usefixtures("cancels")
@pytest.mark.parametrize("transport", ["path", "stream"])
def test_the_total_limit_covers_reading_and_decoding(
    daemon: FakeDaemon, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at between layers: the last one is not begun."""
    begun: list[object] = []

    def slowly(*args: object, **kwargs: object) -> object:
        begun.append(args)
        time.sleep(0.15)
        return assemble.begin_layer(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("kvstore.client.reads.begin_layer", slowly)
    with Client(daemon.config()) as client:
        session = client.session(NAMESPACE, **PATIENT)
        answer = session.fetch(TOKENS, "packed", transport, total_ms=200)  # type: ignore[arg-type]
        assert answer.reason is Reason.DEADLINE
        assert len(begun) < len(NAMESPACE.layout.layers)
        assert session.fetch(TOKENS, "packed", transport)  # type: ignore[arg-type]


def test_a_restarted_daemon_is_found_again(daemon: FakeDaemon) -> None:
    """Within a second or two of its return, without a new client."""
    with Client(daemon.config()) as client:
        session = client.session(NAMESPACE, **{**PATIENT, "connect_ms": 500})
        assert client.session(NAMESPACE, **PATIENT).fetch(TOKENS)
        daemon.stop()
        for _ in range(4):
            assert not session.fetch(TOKENS)
        daemon.start()
        give_up_at = time.monotonic() + 120
        while not session.fetch(TOKENS):
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        assert session.stats.misses["unavailable"] >= 1


def test_errors_of_requests_do_not_open_the_circuit(daemon: FakeDaemon) -> None:
    """A daemon that answers is there, whatever it answers."""
    daemon.faults = {"wrong_key"}
    with Client(daemon.config()) as client:
        session = client.session(NAMESPACE, **PATIENT)
        for _ in range(5):
            assert session.fetch(TOKENS).reason is Reason.CORRUPT


def test_a_trial_after_the_pause_closes_the_circuit(daemon: FakeDaemon) -> None:
    """One call is let through and decides."""
    with Client(daemon.config()) as client:
        session, clock = client.session(NAMESPACE, **PATIENT), Clock()
        client._connection.breaker = CircuitBreaker(failures_max=1, open_s=0.2, clock=clock)
        client._connection.breaker.failed()
        assert session.fetch(TOKENS).reason is Reason.CIRCUIT_OPEN
        clock.now_s += 0.25
        assert session.fetch(TOKENS)


def test_fetches_of_many_threads_share_one_session(daemon: FakeDaemon) -> None:
    """Any thread may call; each evaluates its own hit."""
    failed: list[object] = []
    with Client(daemon.config()) as client:
        session = client.session(NAMESPACE, **PATIENT)

        def work(number: int) -> None:
            for transport in ("path", "stream"):
                answer = session.fetch(TOKENS[: 100 + number], "packed", transport)  # type: ignore[arg-type]
                if answer.n_tokens != 99 + number:
                    failed.append(answer)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert session.stats.hits == 16
