"""Ctrl-C, or another exception out of a signal handler, while something runs that cannot go on after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest

from kvstore.core.process import HELD_SIGNALS, uninterrupted
from tests.support.fake_daemon import FakeDaemon
from tests.support.synthetic import make_layout, make_namespace

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


def test_a_client_goes_on_after_a_fetch_that_was_interrupted_and_can_be_closed() -> None:
    """Someone at a prompt presses Ctrl-C and fetches again. gRPC alone would give no answer, and never close."""
    with FakeDaemon(make_namespace(make_layout())) as daemon:
        daemon.hold(range(600))
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), daemon.address]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.split() == ["599", "interrupted", "599", "599", "599", "closed"], found.stderr
    assert found.returncode == 0


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
    """Python refuses to change a handler while another one raises: what holds a signal back may stay installed."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        holding = uninterrupted(signal.getsignal, signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, holding)
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
