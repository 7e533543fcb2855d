"""Uploads of a real daemon: workers that stall, go away or are not who they should be, and what reaches the disk."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support import intake
from tests.support.daemon import DaemonProcess
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=4, width=128)
NAMESPACE = make_namespace(LAYOUT)
BLOCK_BYTES = 256 * LAYOUT.token_bytes
HELD, SENT = list(range(600)), list(range(50_000, 50_600))
# How far an upload comes before somebody is killed.
MOMENTS = ("begun", "taken", "half a block", "a block", "all", "committed")


def begin(stub: Any, tokens: list[int]) -> pb.BeginStoreReply:
    """Announce tokens, to be sent over the upload socket."""
    reply: pb.BeginStoreReply = stub.BeginStore(
        pb.BeginStoreRequest(
            namespace=namespace_to_message(NAMESPACE),
            layout=LAYOUT.record,
            tokens=pack_tokens(tokens),
            transport=pb.TRANSPORT_PATH,
        ),
        timeout=60,
    )
    assert reply.by_socket
    return reply


def come_to(moment: str, daemon: DaemonProcess, stub: Any) -> socket.socket | None:
    """An upload of SENT as far as that; the connection that its worker holds."""
    reply = begin(stub, SENT)
    if moment == "begun":
        return None
    connection = intake.connect(daemon.listen, reply.upload_id)
    assert intake.taken(connection)
    sent = {"taken": 0, "half a block": BLOCK_BYTES // 2, "a block": BLOCK_BYTES + 1000}.get(moment, reply.upload_bytes)
    connection.sendall(bytes(sent))
    blocks = sent // BLOCK_BYTES
    wait_until(lambda: len(daemon.unfinished()) >= blocks, 30, lambda: f"{daemon.unfinished()}")
    if moment in ("all", "committed"):
        connection.shutdown(socket.SHUT_WR)
    if moment == "committed":
        next(stub.CommitStore(pb.CommitStoreRequest(upload_id=reply.upload_id)))
    return connection


@contextlib.contextmanager
def holding(tmp_path: Path, limits: dict[str, int] | None = None, **config: str) -> Iterator[DaemonProcess]:
    """A daemon that holds one sequence, raw."""
    with DaemonProcess(tmp_path / "data", profile="raw", limits=limits or {}, **config) as running:
        with client_of(running) as client:
            assert patient(client, NAMESPACE).store(HELD, make_layers(LAYOUT, HELD), wait=True).durable
        yield running


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """One with the limits that are shipped."""
    with holding(tmp_path) as running:
        yield running


def found(daemon: DaemonProcess, tokens: list[int]) -> int:
    """Tokens that are served of a sequence."""
    with client_of(daemon) as client:
        return patient(client, NAMESPACE).match([*tokens, -1]).n_tokens


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_of_the_daemon_leaves_only_what_the_next_start_clears(daemon: DaemonProcess, moment: str) -> None:
    """Files under temporary names, if any; what was held is there, and of the upload nothing, or what was committed."""
    before = set(daemon.blobs())
    with grpc.insecure_channel(daemon.listen) as channel:
        connection = come_to(moment, daemon, rpc.KVStoreStub(channel))
        daemon.kill()
    if moment != "committed":
        assert set(daemon.blobs()) == before
    if connection is not None:
        connection.close()
    daemon.start()
    assert daemon.left_over() == []
    assert found(daemon, HELD) == len(HELD)
    assert found(daemon, SENT) == 0 or moment == "committed"
    with client_of(daemon) as client:
        assert client.check()["findings"] == []
        assert client.stats()["disk"]["blobs"] == len(daemon.blobs())
        assert patient(client, NAMESPACE).store(SENT, make_layers(LAYOUT, SENT), wait=True).durable


DYING = """
import sys, time, grpc
from tests.e2e.test_uploads import *
class Daemon:
    listen, data_dir = sys.argv[1], Path(sys.argv[3])
    unfinished, unfinished_states = DaemonProcess.unfinished, DaemonProcess.unfinished_states
channel = grpc.insecure_channel(sys.argv[1])
held = come_to(sys.argv[2], Daemon(), rpc.KVStoreStub(channel))
print("there", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_of_the_worker_leaves_nothing(tmp_path: Path, moment: str) -> None:
    """At once where its connection tells, else when it was silent for too long. What it committed is stored."""
    with holding(tmp_path, {"upload_idle_s": 6}) as daemon:
        require_nothing_left(daemon, moment)


def require_nothing_left(daemon: DaemonProcess, moment: str) -> None:
    """Of a worker that is killed when its upload is as far as that."""
    command = [sys.executable, "-c", DYING, daemon.listen, moment, str(daemon.data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == b"there\n"
        worker.send_signal(signal.SIGKILL)
    wait_until(lambda: not daemon.left_over(), 30, lambda: str(daemon.left_over()))
    assert found(daemon, SENT) == (len(SENT) if moment == "committed" else 0)
    assert found(daemon, HELD) == len(HELD)
    assert "Traceback" not in daemon.log_text()


def test_an_orderly_stop_ends_uploads_that_were_not_committed(daemon: DaemonProcess) -> None:
    """Without waiting for their workers, and with nothing left."""
    with grpc.insecure_channel(daemon.listen) as channel:
        connection = come_to("a block", daemon, rpc.KVStoreStub(channel))
        assert connection is not None
        started = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started < 20
        connection.close()
    assert daemon.unfinished() == []
    assert "Traceback" not in daemon.log_text()


@contextlib.contextmanager
def stalled_uploads(daemon: DaemonProcess, count: int) -> Iterator[None]:
    """Workers that have sent half a block each and send nothing more."""
    with grpc.insecure_channel(daemon.listen) as channel, contextlib.ExitStack() as stack:
        stub = rpc.KVStoreStub(channel)
        for number in range(1, count + 1):
            reply = begin(stub, [number * 10**6 + at for at in range(600)])
            stalled = stack.enter_context(intake.connect(daemon.listen, reply.upload_id))
            assert intake.taken(stalled)
            stalled.sendall(bytes(BLOCK_BYTES // 2))
        yield


def test_workers_that_stall_hold_up_neither_stores_nor_fetches(daemon: DaemonProcess) -> None:
    """Many at a time, with half a block each; others store, and fetch dense and packed."""
    with stalled_uploads(daemon, 10):
        with client_of(daemon) as client:
            session = patient(client, NAMESPACE)
            started = time.monotonic()
            assert session.store(SENT, make_layers(LAYOUT, SENT), wait=True).durable
            for way in (("packed", "path"), ("packed", "stream"), ("dense", "stream")):
                assert session.fetch([*SENT, -1], *way).n_tokens == len(SENT)  # type: ignore[arg-type]
            assert time.monotonic() - started < 25, "somebody was waited for"
        assert daemon.uploads() == 10


def test_uploads_that_find_no_memory_wait_and_are_told_when_to_come_again(tmp_path: Path) -> None:
    """Their share is taken by workers that stall; once these are given up, the store goes through."""
    with (
        holding(tmp_path, {"upload_idle_s": 10}, memory_bytes=str(16 * BLOCK_BYTES)) as daemon,
        stalled_uploads(daemon, 8),
        client_of(daemon) as client,
    ):
        session = patient(client, NAMESPACE)
        assert session.fetch([*HELD, -1], "packed", "stream").n_tokens == len(HELD)
        assert session.store(SENT, make_layers(LAYOUT, SENT), wait=True).durable


FOREIGN = """
import sys
from kvstore.server.storing import upload_socket
upload_socket.peer_uid = lambda connection: 4242
from kvstore.cli import main
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""


def test_a_worker_of_another_user_is_not_taken(tmp_path: Path) -> None:
    """Even if it has the name of an upload; and nobody but the daemon's user can reach the socket."""
    with DaemonProcess(tmp_path / "data", program=FOREIGN, profile="raw") as daemon:
        path = Path(daemon.listen.removeprefix("unix:") + ".store")
        assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_uid == os.geteuid()
        with client_of(daemon) as client:
            result = patient(client, NAMESPACE).store(SENT, make_layers(LAYOUT, SENT), wait=True)
            assert (result.reason, result.durable) == (Reason.INVALID, False)
        assert "user id 4242 was refused" in daemon.log_text()
        assert daemon.left_over() == []


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: it reads the bytes written from /proc")
@pytest.mark.parametrize("profile", ["raw", "safe"])
def test_what_is_stored_is_written_once(tmp_path: Path, profile: str) -> None:
    """Bytes that worker and daemon write to files, all together, are those stored, within 5 %."""
    tokens = list(range(2048))

    def written(*pids: int) -> int:
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("wchar"))

    with (
        DaemonProcess(tmp_path / "data", profile=profile, min_quantize_tokens=1) as daemon,
        client_of(daemon) as client,
    ):
        assert daemon.process is not None
        layers, pids = make_layers(LAYOUT, tokens), (os.getpid(), daemon.process.pid)
        before = written(*pids)
        result = patient(client, NAMESPACE).store(tokens, layers, wait=True)
        moved = written(*pids) - before
        assert result.durable and result.new_bytes > (4 << 20)
        assert moved <= 1.05 * result.new_bytes + (1 << 18)  # pages of the index
