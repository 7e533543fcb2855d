"""Callers that take too much, or their time: refused or ended, while everybody else is served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import Client
from kvstore.config import Config
from kvstore.config.credentials import CLIENT_KEY
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.errors import LimitError
from kvstore.server.calls.call_limits import Admission
from kvstore.server.calls.refusals import Refusals
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.status import DETAILS_KEY, RETRY_INFO, from_rpc_error, trailing_metadata
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.faults.hostile import open_files
from tests.support.daemon import DaemonProcess
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=8, heads=4, width=128)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(1200))
STALL_S = 3  # a client that behaves well takes less, on a busy machine too
LIMITS = {"calls_max": 24, "connection_calls_max": 16, "stream_stall_s": STALL_S, "upload_idle_s": STALL_S}
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
# Of calls that the daemon answers: so that one that it forgets is an error with a name.
ANSWER_S = 240.0


class Peer:
    """A connection of its own, whose calls do as they like."""

    def __init__(self, daemon: DaemonProcess) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(daemon.listen, options=options)
        self.kvstore: Any = rpc.KVStoreStub(self.channel)

    def begin(self, **fields: Any) -> pb.BeginStoreRequest:
        """A BeginStore of 300 tokens that nobody has."""
        sound = {
            "namespace": namespace_to_message(NAMESPACE),
            "layout": LAYOUT.record,
            "tokens": pack_tokens(range(10**6, 10**6 + 300)),
        }
        return pb.BeginStoreRequest(**{**sound, **fields})

    def fetch(self) -> Any:
        """A fetch by stream of all that is held; nothing of it is taken yet."""
        request = pb.FetchRequest(namespace=namespace_to_message(NAMESPACE), tokens=pack_tokens(TOKENS))
        return self.kvstore.Fetch(request)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with small limits, which lives through everything here."""
    with DaemonProcess(
        tmp_path_factory.mktemp("daemon") / "data", profile="raw", memory_bytes="8MiB", limits=LIMITS
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """A well-behaved client, which has stored TOKENS."""
    with client_of(daemon) as client:
        assert patient(client, NAMESPACE).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        yield client


@pytest.fixture
def peer(daemon: DaemonProcess) -> Iterator[Peer]:
    """A connection that is closed in the end, whatever it did."""
    made = Peer(daemon)
    yield made
    made.channel.close()


@pytest.fixture(autouse=True)
def _lives_on(daemon: DaemonProcess, client: Client) -> Iterator[None]:
    """Afterwards no upload is under way, no file is left open, and what was held is served as before."""
    before = open_files(daemon)
    yield
    wait_until(lambda: not daemon.left_over(), 30, lambda: str(daemon.left_over()))
    wait_until(lambda: open_files(daemon) <= before, 30, lambda: f"{open_files(daemon)} open, {before} before")
    assert_served(client)
    assert "Traceback" not in daemon.log_text()


def assert_served(client: Client) -> None:
    """The whole prefix, bit for bit."""
    hit = patient(client, NAMESPACE).fetch(TOKENS)
    assert hit.n_tokens == len(TOKENS) - 1, hit
    assert_rows(hit.layers, LAYOUT, TOKENS[:-1])


def code_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """The status with which a call fails, and its sentence."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()  # type: ignore[attr-defined]


def silent(stop: threading.Event, *messages: Any) -> Iterator[Any]:
    """A few messages, and then nothing, and no end either."""
    yield from messages
    stop.wait(60)


def test_a_claim_of_terabytes_makes_no_file_and_evicts_nothing(
    peer: Peer, daemon: DaemonProcess, client: Client
) -> None:
    """It is answered from the announced size alone."""
    huge = make_layout(layers=64, heads=64, width=1024)
    before = client.stats()["disk"]["blobs"]
    namespace = namespace_to_message(make_namespace(huge))
    request = peer.begin(namespace=namespace, layout=huge.record, tokens=pack_tokens(range(100_000)))
    reply = peer.kvstore.BeginStore(request)
    assert 100_000 * huge.token_bytes > 10**12
    assert (reply.upload_id, reply.reason) == ("", Reason.STORE_FULL)
    assert not daemon.left_over()
    assert client.stats()["disk"]["blobs"] == before


def test_uploads_together_claim_half_of_the_budget_at_most(tmp_path: Path) -> None:
    """The next is told when to try again, and nothing that is held was evicted for their claims."""
    opened: list[str] = []
    limits = {**LIMITS, "upload_idle_s": 600}  # none of them ends while the others begin
    with (
        DaemonProcess(tmp_path / "data", profile="raw", memory_bytes="8MiB", limits=limits) as daemon,
        client_of(daemon) as client,
    ):
        assert patient(client, NAMESPACE).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        peer = Peer(daemon)

        def claim_on() -> None:
            while len(opened) < 40:
                tokens = pack_tokens(range(len(opened) * 10**7, len(opened) * 10**7 + 6000))
                named = ((CLIENT_KEY, f"client {len(opened)}"),)
                opened.append(peer.kvstore.BeginStore(peer.begin(tokens=tokens), metadata=named).upload_id)

        with pytest.raises(grpc.RpcError) as refused:
            claim_on()
        assert 2 < len(opened) < 20
        error = from_rpc_error(refused.value)
        assert isinstance(error, LimitError) and error.retry_s > 0 and "bytes of uploads" in str(error)
        assert_served(client)
        for upload_id in opened:
            peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=upload_id))
        assert peer.kvstore.BeginStore(peer.begin()).upload_id
        peer.channel.close()


def test_a_worker_waits_for_a_place_instead_of_losing_its_store(peer: Peer, client: Client) -> None:
    """While all the places are claimed by uploads that nothing arrives for; these end by themselves."""
    tokens = [pack_tokens(range(n * 10**7, n * 10**7 + 6000)) for n in range(5, 18)]
    claims = [
        peer.kvstore.BeginStore.future(peer.begin(tokens=one), metadata=((CLIENT_KEY, f"client {number}"),))
        for number, one in enumerate(tokens)
    ]
    assert any(claim.exception() for claim in claims)
    mine = list(range(50_000, 56_000))
    result = patient(client, NAMESPACE).store(mine, make_layers(LAYOUT, mine), wait=True)
    assert (result.reason, result.stored_tokens) == (Reason.OK, len(mine))
    client.evict(bytes=6000 * LAYOUT.token_bytes)
    patient(client, NAMESPACE).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)


def test_a_cancelled_begin_leaves_no_upload(peer: Peer, daemon: DaemonProcess) -> None:
    """Whenever the cancellation comes. At once while it is planned; if the reply was on its way, when it is idle."""
    for number in range(60):
        # What is left to be idle fits: all of it together under the limit, and each under its own client's share.
        request, named = peer.begin(tokens=pack_tokens([number] * 1000)), ((CLIENT_KEY, f"client {number}"),)
        call = peer.kvstore.BeginStore.future(request, metadata=named)
        time.sleep(number * 0.0002)
        if not call.cancel():
            peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=call.result().upload_id))


def test_more_streams_than_are_allowed_wait_or_are_refused(peer: Peer, daemon: DaemonProcess, client: Client) -> None:
    """A thousand uploads that never say anything: the daemon ends them, and serves others meanwhile."""
    stop = threading.Event()
    peers = [Peer(daemon) for _ in range(3)]
    calls = [one.kvstore.Upload.future(silent(stop), timeout=20) for one in peers for _ in range(40)]
    assert_served(client)
    refused = [call for call in calls if call.exception() is not None]
    assert len(refused) == len(calls)
    assert any(call.code() is EXHAUSTED for call in calls)
    stop.set()
    for one in peers:
        one.channel.close()


def test_an_upload_that_trickles_is_ended_although_something_moves(tmp_path: Path) -> None:
    """A byte now and then keeps an upload from being idle, and not from being too slow."""
    limits = {"upload_bytes_per_s_min": 10_000_000, "stream_stall_s": 30, "upload_idle_s": 1}
    with DaemonProcess(tmp_path / "data", profile="raw", limits=limits) as daemon:
        peer = Peer(daemon)
        upload_id = peer.kvstore.BeginStore(peer.begin()).upload_id

        def trickle() -> Iterator[pb.UploadChunk]:
            yield pb.UploadChunk(upload_id=upload_id, data=b"x")
            while True:
                time.sleep(0.1)
                yield pb.UploadChunk(data=b"x")

        code, words = code_of(lambda: peer.kvstore.Upload(trickle(), timeout=120))
        late = "nothing arrived for 1 s, or too little; the worker may store again"
        assert (code, words) == (grpc.StatusCode.DEADLINE_EXCEEDED, late)
        assert not daemon.left_over()
        peer.channel.close()


@pytest.mark.parametrize("n_chunks", [0, 1])
def test_an_upload_that_pauses_is_told_so_without_a_deadline_of_its_own(
    peer: Peer, daemon: DaemonProcess, n_chunks: int
) -> None:
    """Before its first bytes and after them; what it had is free."""
    upload_id = peer.kvstore.BeginStore(peer.begin()).upload_id
    ended = threading.Event()

    def paused() -> Iterator[pb.UploadChunk]:
        for _ in range(n_chunks):
            yield pb.UploadChunk(upload_id=upload_id, data=bytes(1000))
        ended.wait(60)

    upload = peer.kvstore.Upload.future(paused())
    error = upload.exception(timeout=60)
    ended.set()
    assert (error.code(), error.details()) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        f"nothing was sent or read for {STALL_S} s",
    )
    wait_until(lambda: not daemon.left_over(), 60, lambda: "the upload is still there")


def test_a_caller_that_stops_reading_holds_nothing_for_long(peer: Peer, daemon: DaemonProcess) -> None:
    """Its lease and its files are free after stream_stall_s."""
    before = open_files(daemon)
    calls = [peer.fetch() for _ in range(8)]
    for call in calls:
        next(call)
    wait_until(lambda: open_files(daemon) <= before, 60, lambda: f"{open_files(daemon)} open, {before} before")
    for call in calls:
        call.cancel()


def test_messages_over_the_daemons_memory_are_refused_with_a_time(peer: Peer, client: Client) -> None:
    """All calls together; one that is alone gets in."""
    big = pb.MatchRequest(namespace=namespace_to_message(NAMESPACE), tokens=bytes(30 << 20))
    assert peer.kvstore.Match(big, timeout=ANSWER_S).reason == Reason.UNKNOWN_PREFIX
    calls = [peer.kvstore.Match.future(big, timeout=ANSWER_S) for _ in range(8)]
    errors = [from_rpc_error(call.exception()) for call in calls if call.exception() is not None]
    assert all(isinstance(error, LimitError) and error.retry_s > 0 for error in errors), errors


def test_admission_counts_to_zero_again(daemon: DaemonProcess) -> None:
    """What is taken is given back, and more than there is is not taken."""
    config = Config(memory_bytes=64 << 20)
    admission = Admission(config, Refusals())
    assert admission.messages.try_acquire(20 << 20) and not admission.messages.try_acquire(20 << 20)
    admission.messages.release(20 << 20)
    assert (admission.messages.used_bytes, admission.calls) == (0, [0, 0, 0])


def test_a_refusal_says_in_the_words_of_grpc_when_to_try_again() -> None:
    """google.rpc.Status with a RetryInfo, byte for byte: other clients know it too."""
    ((key, value),) = trailing_metadata(LimitError("busy", 1.5))
    assert key == DETAILS_KEY
    details = pb.StatusDetails.FromString(value)
    assert (details.code, details.message) == (EXHAUSTED.value[0], "busy")
    assert details.details[0].type_url == RETRY_INFO
    assert details.details[0].value == bytes.fromhex("0a080801 1080cab5ee01".replace(" ", ""))
    assert trailing_metadata(LimitError("too large")) == ()


@pytest.mark.parametrize("value", [b"", b"\xff", b"\x1a\x00", b"\x1a\x03\x12\x01\xff"])
def test_details_that_are_none_are_no_time(value: bytes) -> None:
    """A daemon is not trusted with the client's time either."""

    class Refused(grpc.RpcError):
        code = staticmethod(lambda: EXHAUSTED)
        details = staticmethod(lambda: "busy")
        trailing_metadata = staticmethod(lambda: ((DETAILS_KEY, value),))

    error = from_rpc_error(Refused())
    assert isinstance(error, LimitError) and error.retry_s == 0.0
