"""A worker and a daemon of different versions: misses with the reason `version`, whichever end is the older one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import Client
from kvstore.core.blocks import Reason
from kvstore.errors import VersionError
from kvstore.wire import handshake
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import SERVE, DaemonProcess
from tests.support.limits import small_config
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(300))
OTHER = f"from kvstore.wire import handshake\nhandshake.PROTOCOL = {handshake.PROTOCOL + 1}\n"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon of the next protocol."""
    running = DaemonProcess(tmp_path_factory.mktemp("daemon") / "data", program=OTHER + SERVE)
    with running:
        yield running


def assert_misses(client: Client) -> None:
    """Match, fetch and store each say the reason, and what to do."""
    session = client.session(NAMESPACE, connect_ms=20_000, stall_ms=20_000, total_ms=20_000)
    assert session.match(TOKENS).reason is Reason.VERSION
    miss = session.fetch(TOKENS)
    assert miss.reason is Reason.VERSION and handshake.REMEDY in miss.detail  # type: ignore[union-attr]
    stored = session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
    assert stored.reason is Reason.VERSION and handshake.REMEDY in stored.detail
    with pytest.raises(VersionError, match="restart the older one"):
        client.stats()


def test_a_worker_and_a_daemon_of_another_protocol_miss(newer: DaemonProcess) -> None:
    """As they are."""
    with Client(small_config(newer.listen)) as client:
        assert_misses(client)


def test_a_worker_misses_at_a_daemon_that_would_take_its_calls(
    newer: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that does not look at the number: its health has no service of ours."""
    monkeypatch.setattr("kvstore.client.channel.PROTOCOL", handshake.PROTOCOL + 1)
    with Client(small_config(newer.listen)) as client:
        assert_misses(client)


def test_a_daemon_refuses_calls_of_another_protocol(newer: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker that asked another daemon for its health, behind the same connection."""
    monkeypatch.setattr("kvstore.client.connection.health_request", lambda: b"")
    monkeypatch.setattr("kvstore.client.health.health_request", lambda: b"")
    with Client(small_config(newer.listen)) as client:
        assert_misses(client)


def test_a_daemon_of_the_workers_protocol_serves_it(newer: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is the number alone that the tests above are about."""
    monkeypatch.setattr(handshake, "PROTOCOL", handshake.PROTOCOL + 1)
    monkeypatch.setattr("kvstore.client.channel.PROTOCOL", handshake.PROTOCOL)
    with Client(small_config(newer.listen)) as client:
        session = client.session(NAMESPACE, connect_ms=20_000, stall_ms=20_000, total_ms=20_000)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        assert session.fetch([*TOKENS, 1]).n_tokens == len(TOKENS)


class NoCalls(rpc.AdminServicer):
    """A daemon of our protocol that has none of the calls: gRPC answers each as one that is not implemented."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvv-"))
        self.address = f"unix:{self.folder}/s"
        self._server = grpc.server(ThreadPoolExecutor(2))
        check = {"Check": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", check),))
        self._server.add_insecure_port(self.address)
        self._server.start()

    def __enter__(self) -> NoCalls:
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.stop(0).wait()
        shutil.rmtree(self.folder)


def test_a_daemon_that_lacks_a_call_is_of_another_version() -> None:
    """And not one whose data cannot be read."""
    with NoCalls() as daemon, Client(small_config(daemon.address)) as client:
        assert_misses(client)


def test_a_call_without_a_number_speaks_the_first_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of grpcurl; a later daemon refuses it."""
    assert handshake.refusal(None) is None
    assert handshake.refusal("1") is None
    assert handshake.refusal("2") is not None
    assert handshake.refusal("\x1b" * 9999) is not None
    monkeypatch.setattr(handshake, "PROTOCOL", 2)
    assert handshake.refusal(None) is not None
