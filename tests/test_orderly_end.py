"""How fetches and servers end: what one side ends is left to it; a caller that is gone is no error in the log."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest

from kvstore.client.client import Client
from kvstore.server.daemon import unless_caller_gone
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support.fake_daemon import FakeDaemon
from tests.support.synthetic import make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
TOKENS = list(range(700))
SLOW = {"connect_ms": 20_000, "stall_ms": 20_000, "total_ms": 60_000}
ENDING_S = 1.0


class LateEndingDaemon(FakeDaemon):
    """Takes its time between the last message of a fetch and the status."""

    def __init__(self) -> None:
        super().__init__(make_namespace(LAYOUT))
        self.cut_off: list[bool] = []
        self.ended = threading.Event()

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.FetchReply]:
        """As of any fake daemon; then notes whether the caller cancels what is ending."""
        gone = threading.Event()
        context.add_callback(gone.set)
        yield from super().Fetch(request, context)
        self.cut_off.append(gone.wait(ENDING_S))
        self.ended.set()


@pytest.mark.parametrize("way", ["miss by path", "miss by stream", "hit by stream"])
def test_a_fetch_that_the_daemon_is_ending_is_not_cancelled(way: str) -> None:
    """A cancel that crosses the status of a handler is an error with a traceback in the daemon's log."""
    daemon = LateEndingDaemon()
    daemon.start()
    daemon.hold(TOKENS)
    with Client(daemon.config()) as client:
        session = client.session(daemon.namespace, **SLOW)
        answer = session.fetch(
            TOKENS if way.startswith("hit") else [7, *TOKENS], "packed", "path" if way.endswith("path") else "stream"
        )
        assert bool(answer) == way.startswith("hit"), answer
        del answer  # nobody holds the call any more
        assert daemon.ended.wait(60) and daemon.cut_off == [False]
    daemon.close()


def test_a_fetch_by_path_ends_its_lease_at_once() -> None:
    """The daemon waits for nothing else."""
    daemon = FakeDaemon(make_namespace(LAYOUT))
    daemon.start()
    daemon.hold(TOKENS)
    with Client(daemon.config()) as client:
        assert client.session(daemon.namespace, **SLOW).fetch(TOKENS, "packed", "path")
        assert daemon.cancelled.wait(60)
    daemon.close()


def test_the_daemons_log_has_no_tracebacks_of_callers_that_are_gone(caplog: pytest.LogCaptureFixture) -> None:
    """A failed batch and a cancelled handler are dropped; what gRPC refuses to begin, and whatever else, is not."""
    logger = logging.getLogger("tests.orderly_end")
    logger.addFilter(unless_caller_gone)
    for error in (
        grpc.aio.InternalError('Failed "execute_batch": (<SendStatusFromServerOperation>,)'),
        asyncio.CancelledError(),
        grpc.aio.InternalError('Failed "grpc_call_start_batch": 8 with grpc_call_error value: too many operations'),
        ValueError("a mistake"),
    ):
        logger.error("raised by a handler", exc_info=error)
    kept = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(error) for error in kept] == [grpc.aio.InternalError, ValueError]
    assert "start_batch" in str(kept[0])


SERVER = """
import os, signal, time
from kvstore.integrations import run
def again():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
def main():
    try:
        again()
    except KeyboardInterrupt:
        pass
def close(timeout_s):
    again()
    print("all is sent")
run._serve("a server", [], main, close)
"""


def test_a_signal_while_a_server_sends_what_is_queued_changes_nothing() -> None:
    """The first one stopped it; it exits with 0, and what was queued for the store is there."""
    ended = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "all is sent\n"), ended.stderr
