"""Ctrl-C, or another exception out of a signal handler, while something runs that cannot go on after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from kvstore.client.background import Background
from kvstore.client.client import Client
from kvstore.client.provenance import HeldPrefixes
from kvstore.client.receiver import STREAM_BYTES
from kvstore.client.results import SessionStats
from kvstore.client.session import Session
from kvstore.core.blocks import Reason
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.interrupts import HELD_SIGNALS, uninterrupted
from tests.support.fake_daemon import HANG_S, FakeDaemon
from tests.support.synthetic import make_layers, make_layout, make_namespace

PROGRAM = """
    import signal, sys
    import grpc._channel
    from kvstore.client.client import Client
    from kvstore.config import Config
    from tests.support.synthetic import make_layout, make_namespace

    begin = grpc._channel._run_channel_spin_thread

    def begin_late(state):  # Ctrl-C, where gRPC has made the call, and nothing takes its events yet
        grpc._channel._run_channel_spin_thread = begin
        signal.raise_signal(signal.SIGINT)
        begin(state)

    patient = {"connect_ms": 20_000, "stall_ms": 20_000, "total_ms": 20_000}
    with Client(Config(listen=sys.argv[1])) as client:
        session = client.session(make_namespace(make_layout()), **patient)
        print(session.match(range(600)).n_tokens)
        grpc._channel._run_channel_spin_thread = begin_late
        try:
            session.fetch(range(600), "packed", "stream")
        except KeyboardInterrupt:
            print("interrupted")
        for _ in range(3):
            print(session.fetch(range(600), "packed", "stream").n_tokens)
    print("closed")
"""

# Ctrl-C while a call is at its n-th line, of ours or of a library: for n = 0, step, 2 * step .. until it has fewer.
EVERYWHERE = """
    import itertools, signal, sys
    from kvstore.client.client import Client
    from tests.support.limits import small_config
    from tests.support.synthetic import make_layers, make_layout, make_namespace

    class CtrlC:
        def __init__(self, line):
            self.line = line

        def __call__(self, frame, event, _):
            self.line -= event in ("call", "line")
            if self.line < 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
            return self

    def tried(call):
        for line in itertools.count(0, int(sys.argv[3])):
            trace = CtrlC(line)
            sys.settrace(trace)
            try:
                call()
            except KeyboardInterrupt:
                pass
            sys.settrace(None)
            if trace.line >= 0:
                return
            yield line

    layout = make_layout()
    layers = make_layers(layout, range(600))
    with Client(small_config(sys.argv[1], memory_bytes=int(sys.argv[2]))) as client:
        session = client.session(make_namespace(layout))
        fetch, store = session.fetch, session.store
"""
FETCHES = """
        for line in tried(lambda: fetch(range(600), "packed", "{transport}")):
            for found in (fetch(range(600), "packed", "path"), fetch(range(600), "packed", "stream")):
                assert found.n_tokens == 599, (line, found)
    print("closed")
"""
LAYERS = """
        for line in tried(lambda: list(session.fetch_layers(range(600), "{transport}").layers)):
            for found in (fetch(range(600), "packed", "path"), fetch(range(600), "packed", "stream")):
                assert found.n_tokens == 599, (line, found)
    print("closed")
"""
STORES = """
        numbers = itertools.count(1000)
        for line in tried(lambda: store([next(numbers), *range(1, 600)], layers, wait={wait})):
            assert session.flush(60), line
            again = store([line, *range(1, 600)], layers, wait=True, restored_tokens=0)
            assert again.stored_tokens == 600, (line, again)
    print("closed")
"""


def out_of_time(number: int, frame: Any) -> None:
    """A time limit's handler."""
    raise TimeoutError


def store_waiting(session: Session) -> None:
    """Store and wait."""
    session.store(range(600), make_layers(session.namespace.layout, range(600)), wait=True)


def run_program(
    text: str, daemon: FakeDaemon, memory_bytes: int = 0, step: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python text that is a client of `daemon`."""
    command = [sys.executable, "-c", textwrap.dedent(text), daemon.address, str(memory_bytes), str(step)]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.parametrize("transport", ["path", "stream"])
@pytest.mark.parametrize("program", [FETCHES, LAYERS], ids=["fetch", "fetch_layers"])
def test_fetches_give_hits_wherever_an_earlier_one_was_interrupted(program: str, transport: str) -> None:
    """No lock stays held, no memory counted. It did where the exception came as `Condition` had taken its lock."""
    with FakeDaemon(make_namespace(make_layout())) as daemon:
        daemon.hold(range(600))
        found = run_program(EVERYWHERE + program.format(transport=transport), daemon, STREAM_BYTES, 23)
    assert found.stdout.split() == ["closed"], found.stderr


@pytest.mark.parametrize("wait", [False, True])
def test_stores_find_memory_wherever_an_earlier_one_was_interrupted(*, wait: bool) -> None:
    """There is room for one. What was copied and not queued yet stayed counted for ever."""
    with FakeDaemon(make_namespace(make_layout())) as daemon:
        found = run_program(EVERYWHERE + STORES.format(wait=wait), daemon, 1 << 20, 7)
    assert found.stdout.split() == ["closed"], found.stderr


def test_a_client_goes_on_after_a_fetch_that_was_interrupted_and_can_be_closed() -> None:
    """Someone at a prompt presses Ctrl-C and fetches again. gRPC alone would give no answer, and never close."""
    with FakeDaemon(make_namespace(make_layout())) as daemon:
        daemon.hold(range(600))
        found = run_program(PROGRAM, daemon)
    assert found.stdout.split() == ["599", "interrupted", "599", "599", "599", "closed"], found.stderr
    assert found.returncode == 0


@pytest.mark.parametrize("wait", [Session.flush, Session.close, store_waiting], ids=["flush", "close", "store"])
def test_ctrl_c_ends_a_wait_for_a_daemon_that_does_not_answer(wait: Callable[[Session], object]) -> None:
    """Long waits go in turns. What was queued goes on after it, but closing ends."""
    namespace = make_namespace(make_layout())
    with FakeDaemon(namespace) as daemon, Client(daemon.config()) as client:
        daemon.faults = {"hang_begin"}
        session = client.session(namespace)
        session.store(range(600), make_layers(namespace.layout, range(600)))

        def interrupt() -> None:
            while not daemon.calls:
                time.sleep(0.01)
            time.sleep(0.2)  # the wait has begun, most likely; before it the signal has the same effect
            os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=interrupt)
        before = signal.signal(signal.SIGUSR1, out_of_time)
        started_s = time.monotonic()
        try:
            with pytest.raises(TimeoutError):  # noqa: PT012  # the signal may come in either
                thread.start()
                wait(session)
        finally:
            signal.signal(signal.SIGUSR1, before)
            thread.join()
        assert time.monotonic() - started_s < HANG_S / 2
        assert (session.store(range(1), []).reason is Reason.UNAVAILABLE) == (wait is Session.close)
        daemon.stop()  # nothing is waited for any more


def test_a_wait_for_memory_ends_with_the_exception_of_a_handler() -> None:
    """Whoever waits inside what must not be interrupted looks for signals between turns, and lets go of its lock."""
    budget = ByteBudget(1)
    assert budget.try_acquire(1)

    def work() -> bool:
        signal.raise_signal(signal.SIGUSR1)
        return budget.acquire(1, 600.0)

    before = signal.signal(signal.SIGUSR1, out_of_time)
    try:
        with pytest.raises(TimeoutError):
            uninterrupted(work)
    finally:
        signal.signal(signal.SIGUSR1, before)
    budget.release(1)
    assert budget.used_bytes == 0


@pytest.mark.parametrize("number", HELD_SIGNALS)
def test_a_handler_runs_after_what_must_not_be_interrupted(number: signal.Signals) -> None:
    """Once for each signal that came; its exception replaces the result, and the handler is what it was."""
    seen: list[str] = []

    def handler(came: int, frame: Any) -> None:
        seen.append("handler")
        raise TimeoutError

    def work() -> None:
        os.kill(os.getpid(), number)
        seen.append("work")

    before = signal.signal(number, handler)
    try:
        with pytest.raises(TimeoutError):
            uninterrupted(work)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert seen == ["work", "handler"]


def test_what_must_not_be_interrupted_returns_and_raises_as_it_would_alone() -> None:
    """On the main thread and on another, nested too; a signal that is ignored or ends the process stays so."""
    handlers = [signal.getsignal(number) for number in HELD_SIGNALS]
    assert uninterrupted(uninterrupted, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        uninterrupted(divmod, 7, 0)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(uninterrupted(int, "7", base=8)))
    thread.start()
    thread.join(60)
    assert found == [7]
    assert [signal.getsignal(number) for number in HELD_SIGNALS] == handlers


def test_a_handler_that_was_not_put_back_runs_all_the_same() -> None:
    """An exception may end the putting back, so what holds a signal may stay: until the next one puts it back."""
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        holding = uninterrupted(signal.getsignal, signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, holding)
        signal.raise_signal(signal.SIGUSR1)
        uninterrupted(signal.raise_signal, signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1] * 2


def test_a_thread_that_is_wrongly_taken_for_the_main_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `threading` does in a program that embeds Python and imports it on another thread."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(uninterrupted(int, "7")))
    monkeypatch.setattr(threading, "main_thread", lambda: thread)
    thread.start()
    thread.join(60)
    assert found == [7]


LEAVING = """
    import sys, time
    from kvstore.client.client import Client
    from kvstore.client.uploader import Uploader
    from kvstore.config import Config
    from tests.support.synthetic import make_layers, make_layout, make_namespace

    Uploader.store = lambda self, job: time.sleep(60)
    layout = make_layout()
    client = Client(Config(listen=sys.argv[1]))
    session = client.session(make_namespace(layout))
    assert session.match(range(10)) is not None  # it is connected
    session.store(range(300), make_layers(layout, range(300)))
"""


def test_a_program_that_ends_with_stores_in_its_queue_is_told_that_they_are_lost() -> None:
    """It neither waits for them nor loses them without a word."""
    with FakeDaemon(make_namespace(make_layout())) as daemon:
        command = [sys.executable, "-c", textwrap.dedent(LEAVING), daemon.address]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert found.stderr == "stores lost at the end of this program: 1; call `close` or `flush` before it\n"


def test_what_is_queued_is_counted_while_it_is_being_taken() -> None:
    """A program ends while its background thread works: the count must not fail over a queue that changes."""
    connection, uploader = mock.MagicMock(), mock.Mock()
    connection.health.absence.return_value = None
    background = Background(mock.Mock(), connection, uploader, HeldPrefixes(), SessionStats())
    try:
        for _ in range(20):
            for number in range(200):
                background.report(bytes([number]), "")
            while background.n_queued:
                pass
        assert background.flush(60)
    finally:
        background.close(10)
