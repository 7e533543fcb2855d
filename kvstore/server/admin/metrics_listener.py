"""Answers `GET /metrics` on a loopback address or a unix socket: the metrics of `kvstore stats --prometheus`.

It has a thread and an event loop of its own, so that no scraper, however slow or many, holds up the daemon's loop: that
one makes the Stats reply at most once a second, as for any other caller. (The library's own server was rejected: it has
a thread for each connection, for as long as its client likes.)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from kvstore.blobs.fs import info_of
from kvstore.config import Address
from kvstore.config.private_files import require_private_directory
from kvstore.errors import DirectoryError, KVStoreError
from kvstore.metrics.exposition import CONTENT_TYPE, exposition
from kvstore.server.threads import Threads
from kvstore.wire.convert import message_to_dict
from kvstore.wire.v1 import kvstore_pb2 as pb

log = logging.getLogger(__name__)

# A scrape takes milliseconds. A client that needs longer to ask, or to read the answer, is disconnected.
SCRAPE_S = 10.0
CONNECTIONS_MAX = 128
BACKLOG = 128
HEAD_BYTES_MAX = 8192
# Scrapes within this time get the same answer.
FRESH_S = 1.0

Ask = Callable[[], Coroutine[Any, Any, pb.StatsReply]]


@contextlib.contextmanager
def serving_metrics(listener: MetricsListener | None, threads: Threads) -> Iterator[None]:
    """Answer scrapers as long as the block lasts, if there is a listener. Use it on the daemon's event loop."""
    if listener is None:
        yield
        return
    threads.metrics.post(listener.run)
    try:
        yield
    finally:
        listener.stop()


def names_this_host(head: bytes) -> bool:
    """Whether a request is for a loopback address, or does not say for what.

    A page in a browser on this host can have its own name resolve to 127.0.0.1 and read what is answered there. Its
    requests still carry that name.
    """
    found = re.search(rb"(?im)^host:[ \t]*(\[[^\]\r]*\]|[^:\r]*)", head)
    name = found[1].decode("latin-1").strip().strip("[]") if found else "localhost"
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class MetricsListener:
    """See the module. Made and stopped on the daemon's event loop; `run` is for a thread that may be kept."""

    @classmethod
    def bound(cls, address: Address | None, ask: Ask) -> MetricsListener | None:
        """A listener on `address`, which answers once it runs; None for no address. `ask` is awaited on this loop.

        DirectoryError where the address is taken, or its directory is open to others.
        """
        return None if address is None else cls(address, ask)

    def __init__(self, address: Address, ask: Ask) -> None:
        self._ask = ask
        self._daemon_loop = asyncio.get_running_loop()
        self._path = address.path
        self._socket = bind_unix(address.path) if address.path else bind_tcp(address)
        self._socket.listen(BACKLOG)
        log.info("metrics for Prometheus on %s", address.target)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._asking = asyncio.Lock()
        self._connections: set[asyncio.Task[None]] = set()
        self._body = b""
        self._made_s = time.monotonic() - FRESH_S

    def run(self) -> None:
        """Answer until `stop`."""
        with contextlib.closing(self._loop), self._socket:
            self._loop.run_until_complete(self._serve())
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def stop(self) -> None:
        """Have `run` end; any thread."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._socket, limit=HEAD_BYTES_MAX, backlog=BACKLOG)
        async with server:
            await self._stopping.wait()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            async with asyncio.timeout(SCRAPE_S):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            log.debug("a scraper went away")
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        """The response to one request. Raises what ends a connection without one."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return response("431 Request Header Fields Too Large", b"the request is too long\n")
        words = head.partition(b"\r\n")[0].split(b" ")
        method, target = (words[0], words[1].partition(b"?")[0]) if len(words) == 3 else (b"", b"")
        if method not in (b"GET", b"HEAD"):
            return response("405 Method Not Allowed", b"only GET\n")
        if target not in (b"/", b"/metrics"):
            return response("404 Not Found", b"the metrics are at /metrics\n")
        if not self._path and not names_this_host(head):
            return response("421 Misdirected Request", b"ask for a loopback address\n")
        try:
            body = await self._text()
        except (KVStoreError, OSError, RuntimeError, CancelledError):
            return response("503 Service Unavailable", b"the daemon does not answer now\n")
        return response("200 OK", body, has_body=method == b"GET")

    async def _text(self) -> bytes:
        async with self._asking:
            if time.monotonic() >= self._made_s + FRESH_S:
                asked = asyncio.run_coroutine_threadsafe(self._ask(), self._daemon_loop)
                reply = await asyncio.wrap_future(asked)
                self._body = exposition(message_to_dict(reply))
                self._made_s = time.monotonic()
            return self._body


def response(status: str, body: bytes, *, has_body: bool = True) -> bytes:
    """A whole HTTP response, after which the connection ends."""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body * has_body


def bind_tcp(address: Address) -> socket.socket:
    """A socket bound to a loopback address. DirectoryError where the port is taken."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address.host, address.port))
    except OSError as error:
        made.close()
        raise DirectoryError(f"metrics_listen: cannot listen on {address.target}: {error.strerror}") from error
    return made


def bind_unix(path: str) -> socket.socket:
    """A unix socket that only we can open. DirectoryError where another process has it, or others could reach it."""
    file = Path(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private_directory(file.parent, "set metrics_listen to a socket in a directory of your own")
        if (info := info_of(path)) is not None and not stat.S_ISSOCK(info.st_mode):
            raise DirectoryError(f"metrics_listen: {path} is in the way and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            # One that is too busy to take a connection listens, too.
            if probe.connect_ex(path) not in (errno.ENOENT, errno.ECONNREFUSED):
                raise DirectoryError(f"metrics_listen: another process listens on {path}")
        file.unlink(missing_ok=True)
        made.bind(path)
        os.chmod(path, 0o600)
    except OSError as error:
        made.close()
        raise DirectoryError(f"metrics_listen: cannot listen on {path}: {error.strerror}") from error
    except DirectoryError:
        made.close()
        raise
    return made
