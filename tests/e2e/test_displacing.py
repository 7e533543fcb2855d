"""What one caller may displace of what others have stored: nothing by announcing, and no more than it sends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import Client
from kvstore.config.credentials import CLIENT_KEY
from kvstore.core.blocks import pack_tokens
from kvstore.errors import LimitError
from kvstore.server.storing.store import CALLER_SHARE
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.status import from_rpc_error
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import DaemonProcess
from tests.support.intake import connect, taken
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=4, width=128)
NAMESPACE = make_namespace(LAYOUT)
BUDGET = 64_000_000
STEP_BYTES = 1 << 20
# A third of the budget.
CLAIM_TOKENS = BUDGET // 3 // LAYOUT.token_bytes


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon whose budget another worker has nearly filled."""
    config = {"profile": "raw", "budget_bytes": BUDGET}
    with DaemonProcess(tmp_path / "data", limits={"upload_idle_s": 120}, **config) as running:
        with client_of(running) as client:
            session = patient(client, NAMESPACE)
            for number in range(7):
                tokens = list(range(number * 10_000, number * 10_000 + 1024))
                assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """Somebody who looks."""
    with client_of(daemon) as made:
        yield made


class Greedy:
    """A caller that announces and sends as it likes, under any name."""

    def __init__(self, daemon: DaemonProcess, name: str = "greedy") -> None:
        self.channel = grpc.insecure_channel(daemon.listen)
        self.kvstore: Any = rpc.KVStoreStub(self.channel)
        self.named = ((CLIENT_KEY, name),)

    def claim(self, number: int, transport: Any = pb.TRANSPORT_STREAM) -> pb.BeginStoreReply:
        """Announce a third of the budget."""
        start = 10**9 * number
        request = pb.BeginStoreRequest(
            namespace=namespace_to_message(NAMESPACE),
            layout=LAYOUT.record,
            tokens=pack_tokens(range(start, start + CLAIM_TOKENS)),
            transport=transport,
        )
        reply: pb.BeginStoreReply = self.kvstore.BeginStore(request, metadata=self.named)
        return reply


def blobs(client: Client) -> int:
    """Blobs that are stored."""
    return int(client.stats()["disk"]["blobs"])


def test_an_announcement_displaces_nothing(daemon: DaemonProcess, client: Client) -> None:
    """Nor does one that is given up, however many there are."""
    before, greedy = blobs(client), Greedy(daemon)
    for number in range(1, 6):
        reply = greedy.claim(number)
        assert reply.upload_id and blobs(client) == before
        greedy.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))
    assert blobs(client) == before
    greedy.channel.close()


def test_a_stream_displaces_what_it_brings_and_no_more(daemon: DaemonProcess, client: Client) -> None:
    """Room is made as bytes arrive; it stays within the budget all the time."""
    before, greedy = client.stats()["disk"], Greedy(daemon)
    reply = greedy.claim(1)
    sent_bytes, block_bytes = 18 * STEP_BYTES, 256 * LAYOUT.token_bytes

    def some() -> Iterator[pb.UploadChunk]:
        for at in range(0, sent_bytes, STEP_BYTES):
            yield pb.UploadChunk(upload_id="" if at else reply.upload_id, data=bytes(STEP_BYTES))
        wait_until(lambda: written(daemon) >= sent_bytes - block_bytes, 60, lambda: str(written(daemon)))
        during.append(client.stats()["disk"])

    during: list[dict[str, Any]] = []
    with pytest.raises(grpc.RpcError) as ended:
        greedy.kvstore.Upload(some())
    assert "were asked for" in str(ended.value)
    (disk,) = during
    assert disk["used_bytes"] <= BUDGET
    assert disk["blobs"] < before["blobs"]
    lost_bytes = before["used_bytes"] + sent_bytes - disk["used_bytes"]
    assert lost_bytes <= sent_bytes + block_bytes, lost_bytes
    assert daemon.unfinished() == []
    greedy.channel.close()


def written(daemon: DaemonProcess) -> int:
    """Bytes of blobs that are not committed yet."""
    return sum(info.st_size for info in daemon.unfinished_states().values())


def test_a_worker_of_this_host_displaces_what_it_sends_and_no_more(daemon: DaemonProcess, client: Client) -> None:
    """A block at a time; what it takes back is gone at once."""
    before, greedy = blobs(client), Greedy(daemon)
    reply = greedy.claim(1, pb.TRANSPORT_PATH)
    assert reply.by_socket and blobs(client) == before
    with connect(daemon.listen, reply.upload_id) as connection:
        assert taken(connection)
        connection.sendall(os.urandom(18 * STEP_BYTES))
        wait_until(lambda: blobs(client) < before, 30, lambda: "nothing made room")
        assert client.stats()["disk"]["used_bytes"] <= BUDGET
        greedy.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))
        assert daemon.left_over() == []
    greedy.channel.close()


def test_one_callers_uploads_keep_to_its_share(daemon: DaemonProcess, client: Client) -> None:
    """It is told when to try again; another caller gets its place meanwhile, and each may have a large one."""
    greedy, other = Greedy(daemon), Greedy(daemon, "other")
    first = greedy.claim(1)
    assert first.upload_bytes > BUDGET // 2 // CALLER_SHARE
    with pytest.raises(grpc.RpcError) as refused:
        greedy.claim(2)
    error = from_rpc_error(refused.value)
    assert isinstance(error, LimitError) and error.retry_s > 0 and "of one client" in str(error)
    assert client.stats()["refusals"]["upload_share_percent"] == 1
    greedy.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=first.upload_id))
    assert other.claim(3).upload_id
    greedy.channel.close()
    other.channel.close()
