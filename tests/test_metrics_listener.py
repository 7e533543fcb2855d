"""The answers to scrapers: on loopback or a unix socket only, and never at the cost of the daemon's loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.config import Config
from kvstore.config.parsers import parse_address
from kvstore.errors import ConfigError, DirectoryError, UnavailableError
from kvstore.server.admin import metrics_listener
from kvstore.server.admin.metrics_listener import (
    CONNECTIONS_MAX,
    HEAD_BYTES_MAX,
    MetricsListener,
    names_this_host,
    serving_metrics,
)
from kvstore.server.threads import Threads
from kvstore.wire.v1 import kvstore_pb2 as pb

pytest.importorskip("prometheus_client")


class Rig:
    """A daemon's loop on a thread of its own, and a listener."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "m")
        self.asked = 0
        self.error: Exception | None = None
        self.loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._live()))

    async def _live(self) -> None:
        threads = Threads()
        try:
            with serving_metrics(MetricsListener.bound(parse_address(f"unix:{self.path}"), self._stats), threads):
                self._begun.set()
                await self._ended.wait()
        finally:
            await asyncio.to_thread(threads.close)

    async def _stats(self) -> pb.StatsReply:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return pb.StatsReply(daemon=pb.DaemonStats(version="1", state="serving"))

    def __enter__(self) -> Rig:
        self._thread.start()
        assert self._begun.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.loop.close()

    def connect(self) -> socket.socket:
        """A connection on which nothing is said yet."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(60)
        made.connect(self.path)
        return made

    def ask(self, head: bytes) -> bytes:
        """All that comes back for a request."""
        with self.connect() as made:
            with contextlib.suppress(OSError):
                made.sendall(head)
            parts = []
            with contextlib.suppress(OSError):
                while part := made.recv(1 << 16):
                    parts.append(part)
            return b"".join(parts)

    def scrape(self) -> bytes:
        """What a scraper does."""
        return self.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")


@pytest.fixture
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A listener on a unix socket, whose path is short."""
    folder = tmp_path_factory.mktemp("m")
    folder.chmod(0o700)
    with Rig(folder) as made:
        yield made


def test_a_scrape_is_answered_and_the_socket_is_ours_alone(rig: Rig) -> None:
    """By a whole response; a second one within a second asks the daemon nothing."""
    answers = [rig.scrape() for _ in range(5)]
    head, _, body = answers[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and f"Content-Length: {len(body)}".encode() in head
    assert b"kvstore_serving 1.0\n" in body
    assert rig.asked <= 2
    assert os.stat(rig.path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"garbage\r\n\r\n", b"405"),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", b"200"),
        (b"HEAD / HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (2 * HEAD_BYTES_MAX) + b"\r\n\r\n", b"431"),
    ],
)
def test_other_requests_have_their_status(rig: Rig, head: bytes, status: bytes) -> None:
    """And cost nothing more."""
    answer = rig.ask(head)
    # What was sent and not read may end the connection before its answer is read.
    assert answer.startswith(b"HTTP/1.1 " + status) or (status == b"431" and not answer)
    assert not (head.startswith(b"HEAD") and answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        (b"Host: 127.0.0.1:9464\r\n", True),
        (b"host: localhost\r\n", True),
        (b"HOST:[::1]:9464\r\n", True),
        (b"X: y\r\n", True),
        (b"Host: attacker.example:9464\r\n", False),
        (b"Host: 192.168.1.2\r\n", False),
        (b"Host:\r\n", False),
    ],
)
def test_a_request_for_another_host_is_not_answered_on_loopback(host: bytes, is_ours: bool) -> None:
    """A page in a browser may have its own name lead here."""
    assert names_this_host(b"GET /metrics HTTP/1.1\r\n" + host + b"\r\n") == is_ours


def test_a_daemon_that_does_not_answer_is_503(rig: Rig) -> None:
    """And is asked again by the next scrape."""
    rig.error = UnavailableError("draining")
    assert rig.scrape().startswith(b"HTTP/1.1 503")
    rig.error = None
    assert rig.scrape().startswith(b"HTTP/1.1 200")


def test_a_hundred_scrapes_at_once_cost_the_daemon_one_answer_a_second(rig: Rig) -> None:
    """All are answered; the daemon's loop is asked no more often than once a second."""
    started = time.monotonic()
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: rig.scrape(), range(100)))
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert rig.asked <= time.monotonic() - started + 2


def test_slow_scrapers_hold_up_nobody_and_are_let_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that say nothing, half a request, or read nothing; others are answered meanwhile."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(rig.connect()) for _ in range(CONNECTIONS_MAX - 10)]
        for one in silent[::2]:
            one.sendall(b"GET /metrics HT")
        assert rig.scrape().startswith(b"HTTP/1.1 200")
        turns = asyncio.run_coroutine_threadsafe(_turns(), rig.loop)
        assert turns.result(60) == 1000, "the daemon's loop turns as ever"
    monkeypatch.setattr(metrics_listener, "SCRAPE_S", 0.2)
    with rig.connect() as slow:
        slow.sendall(b"GET /metrics HT")
        assert slow.recv(1) == b"", "closed by the daemon"


async def _turns() -> int:
    for _ in range(1000):
        await asyncio.sleep(0)
    return 1000


def test_over_its_limit_a_connection_is_closed_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one is free again when another ends."""
    monkeypatch.setattr(metrics_listener, "SCRAPE_S", 600.0)  # none of those that are held ends by itself
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(rig.connect()) for _ in range(CONNECTIONS_MAX)]
        # The last of these may not be counted yet; then it takes the place.
        deadline = time.monotonic() + 60
        while rig.scrape() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rig.scrape() == b""
        held[0].close()
        while not rig.scrape() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rig.scrape().startswith(b"HTTP/1.1 200")


def test_a_socket_of_a_daemon_that_was_killed_is_taken_over_and_one_in_use_is_not(tmp_path: Path) -> None:
    """A file that is no socket is nobody's to remove; a folder that others enter is refused."""
    tmp_path.chmod(0o700)
    path = str(tmp_path / "m")
    metrics_listener.bind_unix(path).close()
    assert os.path.exists(path), "left behind"
    with metrics_listener.bind_unix(path) as made:
        made.listen()
        with pytest.raises(DirectoryError, match="another process listens"):
            metrics_listener.bind_unix(path)
    with metrics_listener.bind_unix(path) as busy, contextlib.ExitStack() as waiting:
        busy.listen(0)
        for _ in range(2):
            one = waiting.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            one.connect_ex(path)
        with pytest.raises(DirectoryError, match="another process listens"):
            metrics_listener.bind_unix(path)
        assert os.path.exists(path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DirectoryError, match="not a socket"):
        metrics_listener.bind_unix(str(tmp_path / "file"))
    tmp_path.chmod(0o755)
    with pytest.raises(DirectoryError, match="open to other users"):
        metrics_listener.bind_unix(path)


def test_a_port_that_is_taken_is_said() -> None:
    """With the key that named it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = parse_address(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(DirectoryError, match="metrics_listen"):
            metrics_listener.bind_tcp(address)


@pytest.mark.parametrize(
    ("value", "taken"),
    [("127.0.0.1:9464", "127.0.0.1:9464"), ("localhost:9464", "127.0.0.1:9464"), ("[::1]:9464", "[::1]:9464")],
)
def test_loopback_addresses_are_taken(value: str, taken: str) -> None:
    """`localhost` is what it always should be, whatever the host's tables say."""
    assert Config(metrics_listen=value).metrics_listen == taken
    assert Config().metrics_address is None


@pytest.mark.parametrize(
    "value",
    ["0.0.0.0:9464", "[::]:9464", "192.168.1.5:9464", "example.com:9464", ":9464", "9464", "[::ffff:8.8.8.8]:1"],
)
def test_any_other_address_is_refused(value: str) -> None:
    """With what may be written instead."""
    with pytest.raises(ConfigError, match="metrics_listen: "):
        Config(metrics_listen=value)


def test_workers_and_scrapers_do_not_share_an_address() -> None:
    """Nor the sockets beside it."""
    for value in ("unix:/tmp/k/s", "unix:/tmp/k/s.admin", "unix:/tmp/k/s.store"):
        with pytest.raises(ConfigError, match="metrics_listen"):
            Config(listen="unix:/tmp/k/s", metrics_listen=value)
