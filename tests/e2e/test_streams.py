"""Streams of a real daemon: workers that stop reading or go away, and what they may cost it."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.results import Hit, LayerHit
from kvstore.core.blocks import pack_tokens
from kvstore.errors import CorruptDataError, DeadlineError
from kvstore.server.fetching.stream_out import BATCH_BYTES, Frames, Sender
from kvstore.wire.convert import channel_options, namespace_to_message
from kvstore.wire.frames import LayerBytes, kvstore_stub, upload_frame
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support.daemon import DaemonProcess
from tests.support.servers import free_port
from tests.support.sessions import client_of, patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=8, heads=4, width=128)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(4096))
SIXTY_FOUR_MIB = 64 << 20
STALL_S = 2
PATIENCE_S = 60  # what frees something takes less of it on any machine; a daemon's own patience is longer


@contextmanager
def holding(data_dir: Path, stall_s: int) -> Iterator[DaemonProcess]:
    """A daemon that holds 64 MiB of one sequence, as raw KV."""
    limits = {"stream_stall_s": stall_s, "upload_idle_s": stall_s}
    with DaemonProcess(data_dir, limits=limits, profile="raw") as running:
        with client_of(running) as client:
            session, layers = patient(client, NAMESPACE), make_layers(LAYOUT, TOKENS)
            assert comes_true(lambda: session.store(TOKENS, layers, wait=True).stored_tokens == len(TOKENS))
        yield running


@contextmanager
def stub_of(daemon: DaemonProcess) -> Iterator[Any]:
    """A daemon's RPCs, without a client's limits."""
    with grpc.insecure_channel(daemon.listen, options=channel_options(32 << 20)) as channel:
        yield kvstore_stub(channel)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """It gives nobody up within a test."""
    with holding(tmp_path_factory.mktemp("streams") / "data", 2 * PATIENCE_S) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """It waits STALL_S for its callers."""
    with holding(tmp_path_factory.mktemp("impatient") / "data", STALL_S) as running:
        yield running


@pytest.fixture
def stub(daemon: DaemonProcess) -> Iterator[Any]:
    """Of the patient one."""
    with stub_of(daemon) as made:
        yield made


def begin(stub: Any, representation: pb.Representation = pb.REPRESENTATION_PACKED) -> Any:
    """A fetch of everything by stream, of which the plan and one chunk were read."""
    call = stub.Fetch(
        pb.FetchRequest(
            namespace=namespace_to_message(NAMESPACE),
            tokens=pack_tokens([*TOKENS, 1]),
            representation=representation,
            transport=pb.TRANSPORT_STREAM,
        )
    )
    assert next(call).plan.n_tokens == len(TOKENS)
    assert isinstance(next(call), LayerBytes)
    return call


def open_blobs(daemon: DaemonProcess) -> int:
    """How many blob files the daemon has open."""
    assert daemon.process is not None
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    links = []
    for link in folder.iterdir():
        try:
            links.append(str(link.readlink()))
        except OSError:
            continue
    return sum("blobs.noindex" in link for link in links)


def resident_bytes(daemon: DaemonProcess) -> int:
    """Memory of the daemon."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) << 10


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in time."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.02)
    return True


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
BOTH = pytest.mark.parametrize("representation", [pb.REPRESENTATION_PACKED, pb.REPRESENTATION_DENSE])


@linux
@BOTH
def test_a_cancelled_stream_frees_everything_at_once(
    daemon: DaemonProcess, stub: Any, representation: pb.Representation
) -> None:
    """Files, lease and buffers, long before it would be given up; the next fetch finds the daemon as it was."""
    call = begin(stub, representation)
    assert open_blobs(daemon) > 0
    call.cancel()
    assert comes_true(lambda: open_blobs(daemon) == 0)


@linux
@BOTH
def test_a_worker_that_stops_reading_is_given_up(impatient: DaemonProcess, representation: pb.Representation) -> None:
    """Its files are closed after the stall limit; should it read on, it is told so in place of the rest."""
    rest: list[LayerBytes] = []
    with stub_of(impatient) as stub:
        started_s, call = time.monotonic(), begin(stub, representation)
        assert comes_true(lambda: open_blobs(impatient) == 0)
        assert time.monotonic() - started_s > STALL_S / 2
        with pytest.raises(grpc.RpcError) as caught:
            rest.extend(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert sum(len(chunk.data) for chunk in rest) < SIXTY_FOUR_MIB // 2


@linux
def test_many_workers_that_stop_reading_cost_the_daemon_little_memory(daemon: DaemonProcess, stub: Any) -> None:
    """Each stream holds a few MiB, not what it was asked for: here 24 of 64 MiB."""
    before = resident_bytes(daemon)
    calls = [begin(stub) for _ in range(24)]
    highest = 0
    for _ in range(10):
        time.sleep(0.05)
        highest = max(highest, resident_bytes(daemon))
    for call in calls:
        call.cancel()
    assert highest - before < 24 * (2 * BATCH_BYTES + (6 << 20))
    assert comes_true(lambda: open_blobs(daemon) == 0)


def test_a_slow_reader_is_not_a_stalled_one(impatient: DaemonProcess) -> None:
    """Every chunk starts the time anew."""
    with stub_of(impatient) as stub:
        while (received := read_slowly(begin(stub))) is None:
            pass
    assert received > SIXTY_FOUR_MIB // 2


def read_slowly(call: Any) -> int | None:
    """The bytes of a stream, read with pauses; None where the machine made one that is as long as the stall limit."""
    received, longest_s, last_s = 0, 0.0, time.monotonic()
    try:
        for number, chunk in enumerate(call):
            received += len(chunk.data)
            if number % 16 == 0:
                time.sleep(STALL_S * 0.4)
            longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
    except grpc.RpcError:
        if max(longest_s, time.monotonic() - last_s) < STALL_S * 0.9:
            raise
        return None
    return received


def test_an_upload_that_stops_is_given_up(impatient: DaemonProcess) -> None:
    """Also when the worker stays connected; nothing of it is left."""
    request = pb.BeginStoreRequest(
        namespace=namespace_to_message(NAMESPACE),
        layout=LAYOUT.record,
        tokens=pack_tokens(range(10_000, 10_300)),
        transport=pb.TRANSPORT_STREAM,
    )
    ended = threading.Event()
    with stub_of(impatient) as stub:
        begun = stub.BeginStore(request)

        def chunks() -> Iterator[bytes]:
            yield upload_frame(begun.upload_id, [bytes(1000)])
            ended.wait(PATIENCE_S)

        upload = stub.Upload.future(chunks(), timeout=2 * PATIENCE_S)
        try:
            assert upload.exception(timeout=PATIENCE_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert comes_true(lambda: impatient.left_over() == [])
        finally:
            ended.set()


@pytest.mark.parametrize(("listen", "transport"), [(None, "path"), ("127.0.0.1", "stream")])
def test_a_client_finds_out_by_itself_how_bytes_go(tmp_path: Path, listen: str | None, transport: str) -> None:
    """Both ways: files where both see the same ones, by the socket's kind; a stream elsewhere."""
    if listen is not None:
        listen = f"{listen}:{free_port()}"
    tokens = TOKENS[:700]
    with DaemonProcess(tmp_path / "data", listen=listen, profile="raw") as running, client_of(running) as client:
        session = patient(client, NAMESPACE)
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
        hit = session.fetch(tokens)
        assert isinstance(hit, Hit)
        assert (hit.n_tokens, hit.source.transport) == (699, transport)
        assert_rows(hit.layers, LAYOUT, tokens[:699])
        assert session._uploader._by_socket == (transport == "path")


def receivers() -> int:
    """Threads of this process that receive a stream."""
    return sum(thread.name == "kvstore-receive" for thread in threading.enumerate())


@pytest.mark.parametrize("transport", ["path", "stream"])
def test_lossless_blocks_of_a_few_numbers_are_hits(daemon: DaemonProcess, transport: str) -> None:
    """Their frames are longer than what they hold; a limit on what a plan may ask for must not refuse them."""
    layout = make_layout(layers=2, heads=1, width=1, dtype="F16")
    with client_of(daemon) as client:
        session = patient(client, make_namespace(layout, f"narrow-{transport}"), "exact")
        for n_tokens in (1, 2, 9):
            tokens = list(range(100 * n_tokens, 101 * n_tokens))
            assert session.store(tokens, make_layers(layout, tokens), wait=True).durable
            hit = session.fetch([*tokens, 1], "packed", transport)
            assert hit.n_tokens == n_tokens
            assert_rows(hit.layers, layout, tokens)


def test_a_long_stream_is_received_ahead_and_its_thread_ends_with_it(daemon: DaemonProcess) -> None:
    """Whether all layers are taken or some; then the daemon has its files back, too."""
    with client_of(daemon) as client:
        session = patient(client, NAMESPACE)
        hit = session.fetch([*TOKENS, 1], "packed", "stream")
        assert isinstance(hit, Hit)
        assert_rows(hit.layers, LAYOUT, TOKENS)
        assert not receivers()
        some = session.fetch_layers([*TOKENS, 1], "stream")
        assert isinstance(some, LayerHit)
        next(some.layers)
        assert receivers() == 1
        del some
        gc.collect()
        assert not receivers()
        assert comes_true(lambda: open_blobs(daemon) == 0)


def test_a_daemon_that_stops_in_the_middle_of_a_stream_costs_the_stall_limit(daemon: DaemonProcess) -> None:
    """The caller waits for the thread that receives, which the watchdog ends."""
    with client_of(daemon) as client:
        session = client.session(NAMESPACE, connect_ms=20_000, stall_ms=300, total_ms=1000 * PATIENCE_S)
        hit = session.fetch_layers([*TOKENS, 1], "stream")
        assert isinstance(hit, LayerHit)
        next(hit.layers)
        daemon.signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                list(hit.layers)
            assert time.monotonic() - started < PATIENCE_S / 2
        finally:
            daemon.signal(signal.SIGCONT)
        assert not receivers()


# -- the sender by itself ----------------------------------------------------------------------------------------------


class Peer:
    """Takes frames, up to `takes` of them; `is_full` is set when it is offered one more."""

    def __init__(self, takes: int) -> None:
        self.frames: list[bytes] = []
        self.is_full = asyncio.Event()
        self._takes = takes

    async def write(self, frame: bytes) -> None:
        """One frame, or never."""
        if len(self.frames) == self._takes:
            self.is_full.set()
            await asyncio.sleep(3600)
        self.frames.append(frame)


class Made:
    """Frames, how many were made, and whether the generator was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count = 0
        self.closed = False
        self.frames = self._make(count, error)

    def _make(self, count: int, error: Exception | None) -> Frames:
        try:
            for number in range(count):
                self.count += 1
                yield b"%d" % number + bytes(1 << 20)
            if error is not None:
                raise error
        finally:
            self.closed = True


async def carry_out(made: Made, peer: Peer) -> Sender:
    """Send everything, and close whatever happens."""
    sender = Sender(made.frames, asyncio.to_thread)
    try:
        await sender.send(peer)
    finally:
        await sender.close()
    return sender


def test_frames_arrive_in_order() -> None:
    """However fast they are made."""
    made, peer = Made(50), Peer(51)
    sender = asyncio.run(carry_out(made, peer))
    assert peer.frames == [b"%d" % number + bytes(1 << 20) for number in range(50)]
    assert sender.sent_bytes == sum(map(len, peer.frames))


def test_an_error_while_frames_are_made_comes_out_after_those_before_it() -> None:
    """And the generator is closed."""
    made, peer = Made(9, CorruptDataError("gone")), Peer(20)
    with pytest.raises(CorruptDataError):
        asyncio.run(carry_out(made, peer))
    assert len(peer.frames) == 8  # whole batches
    assert made.closed


def test_a_cancelled_sender_has_made_two_batches_at_most_and_closes_the_generator() -> None:
    """Which a thread may be in the middle of."""
    made, peer = Made(50), Peer(3)

    async def cancelled() -> None:
        task = asyncio.create_task(carry_out(made, peer))
        await peer.is_full.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert made.count * (1 << 20) <= 2 * (BATCH_BYTES + (1 << 20))
    assert made.closed
