"""Every limit of the daemon, reached: the caller is told, a line in the log, a counter, and `stats` works meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.errors import LimitError
from kvstore.server.calls.callers import GRPC_MORE, KEEP_S, RETRY_S, Callers
from kvstore.server.calls.refusals import LOG_EVERY_S, Refusals
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.status import from_rpc_error
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(600))
# What a connection of HTTP/2 begins with, and an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SMALL = {
    "connections_max": 4,
    "calls_max": 6,
    "connection_calls_max": 4,
    "uploads_max": 2,
    "upload_share_percent": 1,
    "message_bytes_max": 6 << 20,
    "tokens_max": 100_000,
    "stream_stall_s": 20,
    "upload_idle_s": 60,
}
IDLE = """
from kvstore.config import load_config
from kvstore.server import daemon, listening
listening.IDLE_MS = 1000
daemon.serve(load_config(), create=True)
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with small limits."""
    with DaemonProcess(
        tmp_path_factory.mktemp("daemon") / "data",
        profile="raw",
        memory_bytes="8MiB",
        budget_bytes="300MB",
        limits=SMALL,
    ) as running:
        with client_of(running) as client:
            known = [-1, *TOKENS]
            assert patient(client, NAMESPACE).store(known, make_layers(LAYOUT, known), wait=True).durable
        yield running


@pytest.fixture(autouse=True)
def _nobody_at_work(daemon: DaemonProcess) -> None:
    """Clients of the test before have given up their places."""
    with client_of(daemon) as client:
        wait_until(lambda: not client.stats()["load"]["clients"], 30, lambda: str(client.stats()["load"]))


class Worker:
    """A worker on a connection of its own, by the generated code: it gives no name, and does as it likes."""

    def __init__(self, daemon: DaemonProcess) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(daemon.listen, options=options)
        self.kvstore: Any = rpc.KVStoreStub(self.channel)

    def begin(self, start: int, n_tokens: int = 600) -> Any:
        """A BeginStore under way."""
        request = pb.BeginStoreRequest(
            namespace=namespace_to_message(NAMESPACE),
            layout=LAYOUT.record,
            tokens=pack_tokens(range(start, start + n_tokens)),
        )
        return self.kvstore.BeginStore.future(request, wait_for_ready=True, timeout=60)

    def silent_upload(self, stop: threading.Event) -> Any:
        """An upload of which nothing comes."""

        def nothing() -> Iterator[pb.UploadChunk]:
            stop.wait(60)
            yield from ()

        return self.kvstore.Upload.future(nothing(), timeout=60)


@pytest.fixture
def worker(daemon: DaemonProcess) -> Iterator[Worker]:
    """A connection that is closed in the end."""
    made = Worker(daemon)
    yield made
    made.channel.close()


def refusals(daemon: DaemonProcess, limit: str) -> int:
    """What `stats` says of a limit, by the command line, in a process of its own."""
    with client_of(daemon) as client:
        return int(client.stats()["refusals"].get(limit, 0))


@contextlib.contextmanager
def reaching(daemon: DaemonProcess, limit: str) -> Iterator[None]:
    """What must be seen of a limit that is reached inside."""
    before = refusals(daemon, limit)
    yield
    wait_until(lambda: refusals(daemon, limit) > before, 30, lambda: f"{limit} is not counted")
    assert f"WARNING limit {limit}: " in daemon.log_text()


def error_of(call: Any) -> LimitError:
    """The LimitError that a call ends with."""
    found = from_rpc_error(call.exception())
    assert isinstance(found, LimitError), found
    return found


def test_stats_work_while_idle_connections_take_every_place(daemon: DaemonProcess) -> None:
    """At gRPC's own bound a worker is away, and is back when one of them goes; `stats` has a socket of its own."""
    bound = SMALL["connections_max"] + GRPC_MORE  # type: ignore[operator]
    with contextlib.ExitStack() as idle, reaching(daemon, "connections"):
        for _ in range(bound + 8):
            one = idle.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(daemon.listen.removeprefix("unix:"))
            with contextlib.suppress(ConnectionError):  # over the bound it is closed, maybe by now
                one.sendall(PREFACE)
        with client_of(daemon) as client:
            assert client.session(NAMESPACE, connect_ms=500).fetch(TOKENS).reason is Reason.UNAVAILABLE
            wait_until(lambda: client.stats()["load"]["connections"] >= bound, 30, lambda: str(client.stats()["load"]))
            assert client.stats()["load"]["connections_max"] == bound
        shown = run_cli(["stats"], daemon.environ())
        assert shown.returncode == 0 and "connections" in shown.stdout
    with client_of(daemon) as client:
        session = patient(client, NAMESPACE)
        wait_until(lambda: session.fetch(TOKENS).reason is Reason.UNKNOWN_PREFIX, 30, lambda: "still away")


def test_a_client_too_many_is_refused_in_words_and_gets_a_place_later(daemon: DaemonProcess) -> None:
    """Clients that called lately have theirs; it is told when to try again, and waits that long."""
    others = [client_of(daemon) for _ in range(4)]
    with reaching(daemon, "connections_max"):
        sessions = [patient(one, NAMESPACE) for one in others]
        with client_of(daemon) as late:
            session = patient(late, NAMESPACE)
            while (found := crowded_out(sessions, session, late)) is None:
                time.sleep(1.2 * KEEP_S)  # everybody's place is free
            first, second, clients = found
            assert first.reason is Reason.QUEUE_FULL and "4 clients are at work" in first.detail
            assert second.reason is Reason.QUEUE_FULL  # it rests for as long as it was told
            assert clients == 4
            for one in others:
                one.close()
            wait_until(lambda: session.fetch(TOKENS).reason is Reason.UNKNOWN_PREFIX, 30, lambda: "no place")


def crowded_out(others: list[Session], late: Session, admin: Client) -> tuple[Any, Any, int] | None:
    """Two answers to one who comes after the others, and how many have places; None where that took too long."""
    started_s = time.monotonic()
    assert all(one.fetch(TOKENS).reason is Reason.UNKNOWN_PREFIX for one in others)
    first, second, clients = late.fetch(TOKENS), late.fetch(TOKENS), admin.stats()["load"]["clients"]
    return None if time.monotonic() - started_s > RETRY_S else (first, second, clients)


def test_calls_that_hang_leave_a_place_for_admins_and_health(daemon: DaemonProcess) -> None:
    """`calls_max` is of workers."""
    stop = threading.Event()
    workers = [Worker(daemon) for _ in range(3)]
    with reaching(daemon, "calls_max"):
        calls = [one.silent_upload(stop) for one in workers for _ in range(3)]
        wait_until(lambda: any(call.done() for call in calls), 30, lambda: "none was refused")
        assert error_of(next(call for call in calls if call.done())).retry_s > 0
        with client_of(daemon) as client:
            assert client.stats()["daemon"]["state"] == "serving"
        assert daemon.healthy(60.0)
        stop.set()
    for one in workers:
        one.channel.close()


def test_one_connections_calls_beyond_its_share_are_counted(daemon: DaemonProcess) -> None:
    """They wait at the client, where nobody sees them."""
    stop = threading.Event()
    with client_of(daemon) as client, reaching(daemon, "connection_calls_max"):
        stub = client._connection.kvstore

        def nothing() -> Iterator[bytes]:
            stop.wait(60)
            yield from ()

        calls = [stub.Upload.future(nothing(), timeout=60) for _ in range(5)]
        wait_until(lambda: refusals(daemon, "connection_calls_max") > 0, 30, lambda: "not counted")
        stop.set()
        for call in calls:
            call.exception()


def test_uploads_and_their_bytes_are_bounded_and_counted(daemon: DaemonProcess, worker: Worker) -> None:
    """`uploads_max` of any size, `upload_share_percent` of any number."""
    opened = []
    with reaching(daemon, "uploads_max"):
        calls = [worker.begin(start * 10**6, 200) for start in range(3)]
        assert [call.exception() is None for call in calls].count(True) == 2
        opened = [call.result().upload_id for call in calls if call.exception() is None]
        assert error_of(next(call for call in calls if call.exception())).retry_s > 0
    for upload_id in opened:
        worker.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=upload_id))
    with reaching(daemon, "upload_share_percent"):
        first = worker.begin(10**8, 2 * 10**6 // LAYOUT.token_bytes).result().upload_id
        assert first and "bytes of uploads" in str(error_of(worker.begin(2 * 10**8, 2 * 10**6 // LAYOUT.token_bytes)))
    worker.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=first))


def test_messages_over_the_memory_for_them_are_counted(daemon: DaemonProcess, worker: Worker) -> None:
    """All calls together; those of admins need none."""
    big = pb.MatchRequest(namespace=namespace_to_message(NAMESPACE), tokens=bytes(5 << 20))
    with reaching(daemon, "memory_bytes"):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not refusals(daemon, "memory_bytes"):
            for call in [worker.kvstore.Match.future(big) for _ in range(4)]:
                assert call.exception() is None or error_of(call).retry_s > 0
        with client_of(daemon) as client:
            assert client.stats()["daemon"]["state"] == "serving"
    assert refusals(daemon, "memory_bytes")


def test_a_sequence_that_is_too_long_is_counted(daemon: DaemonProcess, worker: Worker) -> None:
    """Trying again is no use, so no time is named."""
    with reaching(daemon, "tokens_max"):
        assert error_of(worker.begin(0, 100_001)).retry_s == 0


def test_idle_connections_on_the_unix_socket_end(tmp_path: Path) -> None:
    """As on TCP; a client finds its way back by itself."""
    with DaemonProcess(tmp_path / "data", program=IDLE) as daemon, client_of(daemon) as client:
        session = patient(client, NAMESPACE)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable

        def connections() -> int:
            with client_of(daemon) as other:
                return int(other.stats()["load"]["connections"])

        idle = [Worker(daemon) for _ in range(5)]
        for one in idle:
            grpc.channel_ready_future(one.channel).result(30)
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(daemon.listen.removeprefix("unix:"))
            raw.sendall(PREFACE)
            raw.settimeout(30)
            while raw.recv(4096):
                pass  # SETTINGS, then GOAWAY, then the end
        wait_until(lambda: connections() <= 2, 30, lambda: f"{connections()} are left")
        assert session.fetch(TOKENS)
        for one in idle:
            one.channel.close()


# -- the parts ---------------------------------------------------------------------------------------------------------


def clocked(start: float = 0.0) -> tuple[list[float], Callable[[], float]]:
    """A clock that a test turns."""
    now = [start]
    return now, lambda: now[0]


def test_a_limit_is_logged_once_in_a_while_and_says_how_often(caplog: pytest.LogCaptureFixture) -> None:
    """Each limit for itself; the count is of all."""
    now, clock = clocked()
    counted = Refusals(clock)
    for _ in range(5):
        counted.add(LimitError("busy", 1.0, "calls_max"))
    counted.add(LimitError("other", 1.0, "uploads_max"))
    counted.add(LimitError("no key's"))
    now[0] = LOG_EVERY_S
    counted.add(LimitError("busy", 1.0, "calls_max"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "limit calls_max: busy",
        "limit uploads_max: other",
        "limit calls_max: busy (and 4 times since this was last said)",
    ]
    assert counted.counts() == {"calls_max": 6, "uploads_max": 1}


def test_a_place_is_kept_while_a_client_calls_and_a_little_longer() -> None:
    """Then it is another's. Who carries on with what was begun is not kept out."""
    now, clock = clocked()
    callers = Callers(2, clock)
    assert [callers.enter(name) for name in ("a", "b", "c", "a")] == [1, 1, 0, 2]
    assert callers.enter("c", anyway=True) == 1
    callers.leave("c")
    callers.leave("b")
    now[0] = 6.0
    assert callers.enter("d") == 1 and callers.count() == 2
    callers.leave("a")
    callers.leave("a")
    now[0] = 12.0
    assert callers.count() == 1


def test_a_session_that_is_refused_serves_again_when_there_is_a_place(daemon: DaemonProcess) -> None:
    """A store waits for it and loses nothing."""
    with contextlib.ExitStack() as stack:
        others: list[Client] = [stack.enter_context(client_of(daemon)) for _ in range(4)]
        for one in others:
            patient(one, NAMESPACE).match(TOKENS)
        session = patient(stack.enter_context(client_of(daemon)), NAMESPACE)
        tokens = [one + 7 for one in TOKENS]
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == len(tokens)
