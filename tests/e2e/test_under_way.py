"""Calls that end, or wait for each other, while the daemon is at work on them."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client import uploader
from kvstore.client.results import reason_of
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.status import from_rpc_error
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import DaemonProcess
from tests.support.intake import send
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=1, heads=1)
NAMESPACE = make_namespace(LAYOUT)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that gives uploads long enough that a test sees who waits for them."""
    with DaemonProcess(tmp_path / "data", limits={"upload_idle_s": 60}) as running:
        yield running


def test_a_fetch_given_up_while_it_is_planned_keeps_no_files(daemon: DaemonProcess) -> None:
    """Its lease is taken all the same, and must be given back: an eviction shows it."""
    tokens = list(range(5000, 17000))
    chance = random.Random(1)
    with client_of(daemon) as client, grpc.insecure_channel(daemon.listen) as channel:
        stored = patient(client, NAMESPACE, "raw").store(tokens, make_layers(LAYOUT, tokens), wait=True)
        assert stored.stored_tokens == len(tokens)
        request = pb.FetchRequest(
            namespace=namespace_to_message(NAMESPACE),
            tokens=pack_tokens([*tokens, 1]),
            transport=pb.TRANSPORT_PATH,
        )
        given_up = 0
        for _ in range(150):
            try:
                next(rpc.KVStoreStub(channel).Fetch(request, timeout=chance.uniform(0.0005, 0.012)))
            except grpc.RpcError:
                given_up += 1
        assert given_up, "no fetch was given up: the test shows nothing"
        client.evict(all=True)
        wait_until(lambda: not daemon.blobs(), 60, lambda: f"{len(daemon.blobs())} blobs stay on disk")


def test_many_who_wait_for_one_store_do_not_keep_it_from_ending(daemon: DaemonProcess) -> None:
    """Their commits come first; the one that they wait for needs a thread as well."""
    base = list(range(5000, 5512))
    with grpc.insecure_channel(daemon.listen) as channel:
        stub = rpc.KVStoreStub(channel)
        plans = [begin(daemon.listen, stub, base)]
        plans += [begin(daemon.listen, stub, base + [number] * 50) for number in range(1, 8)]
        assert [plan.start for plan in plans] == [0] + [512] * 7
        ended: dict[int, pb.CommitStoreReply] = {}

        def commit(number: int) -> None:
            with contextlib.suppress(grpc.RpcError):
                *_, ended[number] = stub.CommitStore(
                    pb.CommitStoreRequest(upload_id=plans[number].upload_id), timeout=30
                )

        waiting = [threading.Thread(target=commit, args=(number,)) for number in range(1, 8)]
        for thread in waiting:
            thread.start()
        commit(0)
        for thread in waiting:
            thread.join()
    assert [ended[number].stored_tokens for number in sorted(ended)] == [512] + [562] * 7


def begin(listen: str, stub: rpc.KVStoreStub, tokens: list[int], timeout: float | None = None) -> pb.BeginStoreReply:
    """Plan a store and hand over what it wants."""
    reply: pb.BeginStoreReply = stub.BeginStore(
        pb.BeginStoreRequest(
            namespace=namespace_to_message(NAMESPACE),
            layout=LAYOUT.record,
            tokens=pack_tokens(tokens),
            transport=pb.TRANSPORT_PATH,
        ),
        timeout=timeout,
    )
    if reply.by_socket:
        # As workers do: in the background, since the daemon may have to wait for others first.
        data = bytes(reply.upload_bytes)
        threading.Thread(target=send, args=(listen, reply.upload_id, data), daemon=True).start()
    return reply


@pytest.mark.parametrize("selection", [{"all": True}, {"namespace_prefix": NAMESPACE.root}])
def test_an_eviction_takes_along_the_uploads_that_have_begun(daemon: DaemonProcess, selection: dict[str, Any]) -> None:
    """They end with `evicted`, what was written goes, and nothing of them appears later; later ones are kept."""
    tokens = list(range(5000, 5512))
    with client_of(daemon) as client, grpc.insecure_channel(daemon.listen) as channel:
        stub = rpc.KVStoreStub(channel)
        plans = [begin(daemon.listen, stub, tokens), begin(daemon.listen, stub, [*tokens, *range(50)])]
        wait_until(lambda: len(daemon.unfinished()) == 2, 30.0, lambda: str(daemon.unfinished()))
        client.evict(**selection)
        wait_until(lambda: not daemon.left_over(), 30.0, lambda: str(daemon.left_over()))
        for plan in plans:
            with pytest.raises(grpc.RpcError) as ended:
                list(stub.CommitStore(pb.CommitStoreRequest(upload_id=plan.upload_id), timeout=30))
            assert reason_of(from_rpc_error(ended.value)) is Reason.EVICTED
        assert not daemon.blobs() and client.stats()["tokens"]["stored"] == 0
        session = patient(client, NAMESPACE, "raw")
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == len(tokens)


@pytest.mark.parametrize(
    ("stored", "selection"), [(512, {"bytes": 1 << 30}), (562, {"bytes": 1})], ids=["block", "tail"]
)
def test_an_eviction_ends_an_upload_that_continues_what_it_takes(
    daemon: DaemonProcess, stored: int, selection: dict[str, Any]
) -> None:
    """Also one that only names a number of bytes: the whole block before it, or the tail that its first block extends.

    A new sequence continues nothing and is not in the table yet, so that such an eviction leaves it alone.
    """
    tokens = list(range(5000, 5700))
    with client_of(daemon) as client, grpc.insecure_channel(daemon.listen) as channel:
        stub = rpc.KVStoreStub(channel)
        session, base = patient(client, NAMESPACE, "affine8"), tokens[:stored]
        assert session.store(base, make_layers(LAYOUT, base), wait=True).stored_tokens == stored
        longer, other = begin(daemon.listen, stub, tokens), begin(daemon.listen, stub, tokens[1:100])
        assert (longer.start, other.start) == (stored, 0)
        wait_until(lambda: daemon.uploads() == 2, 30.0, lambda: str(daemon.uploads()))
        client.evict(**selection)
        wait_until(lambda: daemon.uploads() == 1, 30.0, lambda: str(daemon.left_over()))
        with pytest.raises(grpc.RpcError) as ended:
            list(stub.CommitStore(pb.CommitStoreRequest(upload_id=longer.upload_id), timeout=30))
        assert reason_of(from_rpc_error(ended.value)) is Reason.EVICTED
        *_, kept = stub.CommitStore(pb.CommitStoreRequest(upload_id=other.upload_id), timeout=30)
        assert kept.stored_tokens == 99


def test_a_worker_whose_upload_is_evicted_before_it_writes_does_not_begin_again(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is not taken, which is no fault of the socket: the next store goes over it, too."""
    tokens, connection = list(range(5000, 5512)), uploader.UploadConnection
    with client_of(daemon) as client:
        session = patient(client, NAMESPACE, "raw")

        def late(*args: Any) -> Any:
            client.evict(all=True)
            return connection(*args)

        monkeypatch.setattr(uploader, "UploadConnection", late)
        ended = session.store(tokens, make_layers(LAYOUT, tokens), wait=True)
        assert (ended.reason, ended.stored_tokens) == (Reason.EVICTED, 0) and not daemon.blobs()
        monkeypatch.setattr(uploader, "UploadConnection", connection)
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == len(tokens)
        assert session._uploader._by_socket


def test_an_eviction_of_another_namespace_leaves_an_upload_alone(daemon: DaemonProcess) -> None:
    """Nor does a dry run end any."""
    with client_of(daemon) as client, grpc.insecure_channel(daemon.listen) as channel:
        stub = rpc.KVStoreStub(channel)
        plan = begin(daemon.listen, stub, list(range(5000, 5512)))
        wait_until(lambda: len(daemon.unfinished()) == 2, 30.0, lambda: str(daemon.unfinished()))
        client.evict(namespace_prefix=make_namespace(LAYOUT, "other").root)
        client.evict(all=True, dry_run=True)
        *_, ended = stub.CommitStore(pb.CommitStoreRequest(upload_id=plan.upload_id), timeout=30)
        assert ended.stored_tokens == 512


# A busy loop: it plans a store itself, and cannot hear meanwhile of a caller that goes away.
BUSY = """
import asyncio, sys, time
from kvstore.server.threads import Pool
from kvstore.cli import main
call = Pool.__call__
def busy(self, work, *args):
    if getattr(work, "__name__", "") != "_begin":
        return call(self, work, *args)
    answer = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: (answer.set_result(work(*args)), time.sleep(1)))
    return answer
Pool.__call__ = busy
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""


def test_an_upload_of_which_the_caller_did_not_hear_any_more_is_given_up_at_once(tmp_path: Path) -> None:
    """It went away when the upload was there and the reply was not: long before the upload would be idle."""
    daemon = DaemonProcess(tmp_path / "data", program=BUSY, limits={"upload_idle_s": 600}, profile="raw")
    with daemon, grpc.insecure_channel(daemon.listen) as channel, client_of(daemon) as client:
        with pytest.raises(grpc.RpcError):
            begin(daemon.listen, rpc.KVStoreStub(channel), list(range(100)), timeout=0.5)
        wait_until(lambda: client.stats()["requests"]["store"] == 1, 60, lambda: "the call has not begun")
        wait_until(lambda: not daemon.uploads(), 60, lambda: "the upload stays")
        assert begin(daemon.listen, rpc.KVStoreStub(channel), list(range(100)), timeout=60).upload_id
        assert daemon.uploads() == 1
