"""The daemon's threads: what is short never waits for what is long, and the event loop waits for no disk."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import Client
from kvstore.core.blocks import pack_tokens
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.slow_disk import SlowDisk
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=1, heads=1)
NAMESPACE = make_namespace(LAYOUT)
HELD = list(range(1000))
# A call that has not ended by then waits for what is held.
PATIENCE_S = 30.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[SlowDisk]:
    """A daemon that holds one sequence, and whose disk the test slows down."""
    with (
        SlowDisk(tmp_path / "data", limits={"upload_idle_s": 600}, profile="raw") as running,
        client_of(running) as client,
    ):
        assert patient(client, NAMESPACE, "raw").store(HELD, make_layers(LAYOUT, HELD), wait=True).durable
        yield running


@pytest.fixture
def client(daemon: SlowDisk) -> Iterator[Client]:
    """A client of this daemon."""
    with client_of(daemon) as one:
        yield one


@pytest.fixture
def stub(daemon: SlowDisk) -> Iterator[Any]:
    """A connection without a client's conveniences."""
    with grpc.insecure_channel(daemon.listen) as channel:
        yield rpc.KVStoreStub(channel)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads of the test."""
    with ThreadPoolExecutor(32) as threads:
        yield threads


def begin(stub: Any, number: int, transport: pb.Transport = pb.TRANSPORT_STREAM) -> pb.BeginStoreReply:
    """Plan the store of a sequence of its own."""
    return stub.BeginStore(
        pb.BeginStoreRequest(
            namespace=namespace_to_message(NAMESPACE),
            layout=LAYOUT.record,
            tokens=pack_tokens([100_000 + number, *range(300)]),
            transport=transport,
        ),
        timeout=120,
    )


def upload(stub: Any, plan: pb.BeginStoreReply, timeout: float = 120) -> None:
    """Hand over what a plan asks for."""
    stub.Upload(iter([pb.UploadChunk(upload_id=plan.upload_id, data=bytes(plan.upload_bytes))]), timeout=timeout)


def fetch(stub: Any) -> pb.FetchPlan:
    """The plan of what the daemon holds."""
    request = pb.FetchRequest(
        namespace=namespace_to_message(NAMESPACE), tokens=pack_tokens([*HELD, 1]), transport=pb.TRANSPORT_PATH
    )
    call = stub.Fetch(request, timeout=PATIENCE_S)
    plan = next(call).plan
    call.cancel()
    return plan


def answers_all(daemon: SlowDisk, stub: Any) -> None:
    """Health, a cached fetch and upkeep go on now."""
    assert daemon.healthy(PATIENCE_S), "the event loop stands still"
    assert fetch(stub).n_tokens == len(HELD)
    before = len(daemon.upkeep_times())
    wait_until(lambda: len(daemon.upkeep_times()) > before, PATIENCE_S, lambda: "there is no upkeep")


@contextlib.contextmanager
def held(
    daemon: SlowDisk, call: str, *, begun: Callable[[], Any], pool: ThreadPoolExecutor, every: int = 1
) -> Iterator[Future[Any]]:
    """What `begun` starts stands still in `call` of the disk."""
    daemon.hold(call, every)
    try:
        running = pool.submit(begun)
        daemon.await_held(call)
        yield running
    finally:
        daemon.release(call)


def test_a_check_holds_up_nothing(daemon: SlowDisk, client: Client, stub: Any, pool: ThreadPoolExecutor) -> None:
    """However long it takes: stats, listings, upkeep, fetches and stores do not wait for it."""
    with held(daemon, "verify", begun=lambda: client.check(), pool=pool) as check:
        assert client.stats()["disk"]["blobs"]
        assert client.list()
        answers_all(daemon, stub)
        other = [7, *HELD]
        assert patient(client, NAMESPACE, "raw").store(other, make_layers(LAYOUT, other), wait=True).durable
        assert not check.done()
    assert check.result(60)["findings"] == []


def test_stores_that_wait_for_the_index_hold_up_no_fetch(daemon: SlowDisk, stub: Any, pool: ThreadPoolExecutor) -> None:
    """Eight that begin or bring bytes, more than there are threads for fetches: each needs room, or may."""

    def store(number: int) -> None:
        plan = begin(stub, number)
        upload(stub, plan)
        *_, reply = stub.CommitStore(pb.CommitStoreRequest(upload_id=plan.upload_id), timeout=120)
        assert reply.stored_tokens == 301

    with held(daemon, "commit", begun=lambda: store(0), pool=pool):
        waiting = [pool.submit(store, number) for number in range(1, 9)]
        time.sleep(1.0)
        assert not any(each.done() for each in waiting)
        assert fetch(stub).n_tokens == len(HELD)
        assert daemon.healthy(PATIENCE_S)
    for each in waiting:
        each.result(120)


def test_the_event_loop_does_not_wait_for_the_unlink_of_an_upload(
    daemon: SlowDisk, stub: Any, pool: ThreadPoolExecutor
) -> None:
    """Neither when a worker takes back its store nor when it goes away in the middle of it."""

    def abort() -> None:
        for plan in plans[:3]:
            stub.AbortStore(pb.AbortStoreRequest(upload_id=plan.upload_id), timeout=120)

    plans, end = [begin(stub, number) for number in range(6)], threading.Event()
    uploads = [stub.Upload.future(chunks(plan.upload_id, end), timeout=120) for plan in plans]
    wait_until(lambda: len(daemon.unfinished()) == 6, 60.0, lambda: "no bytes")
    with held(daemon, "unlink_blob", begun=abort, pool=pool) as aborting:
        for call in uploads[3:]:
            call.cancel()
        answers_all(daemon, stub)
        last = begin(stub, 99)
        upload(stub, last, timeout=PATIENCE_S)
        *_, reply = stub.CommitStore(pb.CommitStoreRequest(upload_id=last.upload_id), timeout=PATIENCE_S)
        assert reply.durable
        assert not aborting.done()
    aborting.result(60)
    end.set()
    wait_until(lambda: not daemon.left_over(), 60.0, lambda: f"{daemon.left_over()} stay")


def chunks(upload_id: str, end: threading.Event) -> Iterator[pb.UploadChunk]:
    """A block of an upload, and then nothing."""
    yield pb.UploadChunk(upload_id=upload_id, data=bytes(256 * LAYOUT.token_bytes))
    end.wait(60)


def test_a_lease_that_ends_unlinks_on_no_thread_that_others_need(
    daemon: SlowDisk, client: Client, stub: Any, pool: ThreadPoolExecutor
) -> None:
    """What was evicted under a fetch is deleted when the fetch ends, however slow the disk is."""
    request = pb.FetchRequest(
        namespace=namespace_to_message(NAMESPACE), tokens=pack_tokens([*HELD, 1]), transport=pb.TRANSPORT_PATH
    )
    reading = stub.Fetch(request, timeout=120)
    assert next(reading).plan.n_tokens == len(HELD)
    daemon.hold("unlink_blob")
    other = [7, *HELD]
    assert patient(client, NAMESPACE, "raw").store(other, make_layers(LAYOUT, other), wait=True).durable
    evicting = pool.submit(lambda: client.evict(all=True))
    daemon.await_held("unlink_blob")
    reading.cancel()
    assert daemon.healthy(PATIENCE_S)
    assert not evicting.done()
    daemon.release("unlink_blob")
    evicting.result(60)
    wait_until(lambda: not daemon.blobs(), 60.0, lambda: "blobs stay")
