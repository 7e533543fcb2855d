"""What a confused or hostile peer may send: each answered with a clear status, nothing lost, nothing left behind."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import mlx.core as mx
import msgpack
import pytest

from kvstore.client.client import Client, connect
from kvstore.client.session import Session
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.layers import KVLayer, LayerSpec, Layout, PartSpec
from kvstore.errors import InvalidRequestError
from kvstore.integrations import mlx_lm as integration
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support import intake
from tests.support.daemon import DaemonProcess
from tests.support.files import taken_bytes
from tests.support.limits import small_config
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
HELD = list(range(300))
FRESH = pack_tokens(range(5000, 5100))
FRESH_BYTES = 100 * LAYOUT.token_bytes
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
MESSAGE_BYTES_MAX = 1 << 20


class Peer:
    """A raw connection to a daemon, with no scruples about sizes."""

    def __init__(self, daemon: DaemonProcess) -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.insecure_channel(daemon.listen, options=options)
        self.kvstore: Any = rpc.KVStoreStub(self.channel)
        self.admin: Any = rpc.AdminStub(self.channel)

    def begin(self, **fields: Any) -> pb.BeginStoreReply:
        """BeginStore of FRESH in NAMESPACE by stream, but for the fields given."""
        sound = {"namespace": namespace_to_message(NAMESPACE), "layout": LAYOUT.record, "tokens": FRESH}
        return self.kvstore.BeginStore(pb.BeginStoreRequest(**{**sound, **fields}))

    def upload(self, upload_id: str, sizes: Iterable[int]) -> pb.UploadReply:
        """Upload zeros in chunks of these sizes."""
        return self.kvstore.Upload(
            pb.UploadChunk(upload_id=upload_id if not at else "", data=bytes(size)) for at, size in enumerate(sizes)
        )

    def commit(self, upload_id: str) -> pb.CommitStoreReply:
        """Commit, and the final word."""
        return list(self.kvstore.CommitStore(pb.CommitStoreRequest(upload_id=upload_id)))[-1]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for the module: it has to live through everything here."""
    directory = tmp_path_factory.mktemp("daemon") / "data"
    limits = {"message_bytes_max": MESSAGE_BYTES_MAX, "tokens_max": 100_000, "uploads_max": 3}
    with DaemonProcess(directory, profile="raw", limits=limits) as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """A well-behaved client, which has stored HELD."""
    with connect(config=small_config(daemon.listen)) as client:
        assert client.session(NAMESPACE, **SLOW).store(HELD, make_layers(LAYOUT, HELD), wait=True).durable
        yield client


@pytest.fixture
def session(client: Client) -> Session:
    """A session that remembers nothing."""
    return client.session(NAMESPACE, **SLOW)


@pytest.fixture
def peer(daemon: DaemonProcess) -> Iterator[Peer]:
    """A raw peer."""
    peer = Peer(daemon)
    yield peer
    peer.channel.close()


@pytest.fixture(autouse=True)
def unharmed(daemon: DaemonProcess, client: Client) -> Iterator[None]:
    """After every test nothing is under way, nothing more is used, and what was held is served as before."""
    before = held(daemon, client)
    yield
    wait_until(lambda: not daemon.left_over())
    assert held(daemon, client) == before
    hit = client.session(NAMESPACE, **SLOW).fetch(HELD)
    assert hit.n_tokens == len(HELD) - 1
    assert_rows(hit.layers, LAYOUT, HELD[:-1])
    assert "Traceback" not in daemon.log_text()


def held(daemon: DaemonProcess, client: Client) -> tuple[int, int, int]:
    """(bytes of blobs on disk, blobs, quarantined). Index and settings grow by themselves: access order, counters."""
    disk = client.stats()["disk"]
    blob_bytes = taken_bytes(daemon.blob_states().values())
    return blob_bytes, disk["blobs"], disk["quarantined"]


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for what the daemon does by itself."""
    give_up_at = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def fails(code: grpc.StatusCode, call: Callable[[], Any], *words: str) -> None:
    """The call ends with this status and a sentence that says so."""

    def outcome() -> Any:
        reply = call()
        return list(reply) if hasattr(reply, "__next__") else reply

    with pytest.raises(grpc.RpcError) as raised:
        outcome()
    assert raised.value.code() is code, raised.value.details()
    for word in words:
        assert word in raised.value.details()


def named(record: bytes) -> dict[str, Any]:
    """BeginStore fields for a namespace that is honestly bound to this layout record."""
    message = namespace_to_message(NAMESPACE)
    message.layout_digest = hashlib.sha256(b"kvstore/layout/v2\0" + record).digest()
    return {"namespace": message, "layout": record}


def identity(**fields: Any) -> pb.Namespace:
    """NAMESPACE but for the fields given."""
    message = namespace_to_message(NAMESPACE)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def record(keys: Any = (1, 64, "BF16", 0, 0), values: Any = (1, 64, "BF16", 0, 0), kind: Any = "kv") -> bytes:
    """A layout record of one layer, of whatever is given."""
    packed: bytes = msgpack.packb([[[kind, keys, values, [], []]], [0], ""])
    return packed


# -- identity and layout -----------------------------------------------------------------------------------------------


def test_a_namespace_that_nobody_introduced_needs_its_layout(peer: Peer) -> None:
    """The first store brings it."""
    fails(NOT_FOUND, lambda: peer.begin(namespace=identity(weights=b"unheard of"), layout=b""), "layout")


def test_a_namespace_that_is_known_needs_no_layout(peer: Peer) -> None:
    """Its layout is the one that it is bound to."""
    reply = peer.begin(layout=b"")
    assert reply.upload_bytes == FRESH_BYTES
    peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))


def test_a_layout_that_is_not_the_namespaces_is_refused(peer: Peer) -> None:
    """Whether the namespace is known or not."""
    other = make_layout(layers=2, heads=1, width=32)
    for namespace in (identity(), identity(weights=b"unheard of")):
        refused = lambda namespace=namespace: peer.begin(namespace=namespace, layout=other.record)  # noqa: E731
        fails(grpc.StatusCode.FAILED_PRECONDITION, refused, "bound to")


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (record(keys=(1, 64, "I8", 0, 0)), "dtype 'I8'"),
        (record(keys=(1, 64, ["BF16"], 0, 0)), "whole numbers"),
        (record(kind="rotating"), "no layer of kind 'rotating'"),
        (record(keys=(2.5, 64, "BF16", 0, 0)), "whole numbers"),
        (record(keys=(2, 64.0, "BF16", 0, 0)), "whole numbers"),
        (record(keys=(True, 64, "BF16", 0, 0)), "whole numbers"),
        (record(keys=(2, 64, "BF16", 8.0, 64)), "whole numbers"),
        (record(keys=(2, 64, "BF16", 7, 64)), "no such quantization"),
        (record(keys=(2, 48, "BF16", 8, 64)), "does not divide"),
        (record(keys=(-2, 64, "BF16", 0, 0)), "out of range"),
        (record(keys=(1, 1 << 40, "BF16", 0, 0)), "out of range"),
        (record(keys=(1, 0, "BF16", 0, 0), values=(1, 0, "BF16", 0, 0)), "keys or values"),
        (record(keys=(1, 64)), "not a layout"),
        (record(keys="BF16"), "not a layout"),
        (msgpack.packb([[], [], ""]), "1 to 4096 layers"),
        (msgpack.packb([[["kv", [1, 64, "BF16", 0, 0], [1, 64, "BF16", 0, 0], [], []]], [7], ""]), "not a layout"),
        (msgpack.packb([[["kv", [1, 64, "BF16", 0, 0], [1, 64, "BF16", 0, 0], [], []]], [0] * 5000, ""]), "too many"),
        (msgpack.packb([[["kv", [1, 64, "BF16", 0, 0], [1, 64, "BF16", 0, 0], [], []]], [0], "(..)"]), "nesting"),
        (
            msgpack.packb([[["kv", [1, 64, "BF16", 0, 0], [1, 64, "BF16", 0, 0], [["size", 1]], []]], [0], ""]),
            "has parameters",
        ),
        (
            msgpack.packb([[["state", [1, 0, "F32", 0, 0], [1, 0, "F32", 0, 0], [["x", 1.5]], []]], [0], ""]),
            "whole numbers",
        ),
        (msgpack.packb({"layers": 3}), "not a layout"),
        (b"\x91" * 100_000, "not a layout"),
        (b"\xdd\xff\xff\xff\xff", "not a layout"),
        (b"\xc1", "not a layout"),
        (b"\x92\x91\x93\xa2\xff\xfe\x90\x90\x90", "not a layout"),
    ],
)
def test_a_hostile_layout_is_refused(peer: Peer, hostile: bytes, words: str) -> None:
    """Under a digest that is right, so that the parser itself is what stands in the way."""
    fails(INVALID, lambda: peer.begin(**named(hostile)), words)


def test_a_layout_too_large_for_the_store_is_a_reason_and_evicts_nothing(peer: Peer) -> None:
    """A terabyte a token is legal; no budget has room for it."""
    part = (4096, 65_536, "F32", 0, 0)
    reply = peer.begin(**named(msgpack.packb([[["kv", part, part, [], []]], [0] * 4096, ""])))
    assert (reply.upload_id, reply.reason) == ("", Reason.STORE_FULL)


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": b""},
        {"weights": b"w" * 5000},
        {"salt": b"s" * 5000},
        {"alias": "a" * 5000},
        {"engine": "e" * 5000},
        {"layout_digest": b""},
        {"layout_digest": b"short"},
    ],
)
def test_an_identity_out_of_bounds_is_refused_by_every_verb(peer: Peer, fields: dict[str, Any]) -> None:
    """Missing weights above all: KV of unknown weights is nobody's."""
    namespace = identity(**fields)
    fails(INVALID, lambda: peer.begin(namespace=namespace))
    fails(INVALID, lambda: peer.kvstore.Match(pb.MatchRequest(namespace=namespace, tokens=FRESH)))
    fails(INVALID, lambda: peer.kvstore.Fetch(pb.FetchRequest(namespace=namespace, tokens=FRESH)))


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"captured_from": 101}, {"restored_tokens": 101}, {"captured_from": (1 << 64) - 1}])
def test_an_offset_beyond_the_tokens_is_refused(peer: Peer, fields: dict[str, int]) -> None:
    """Nobody can say which tokens such KV belongs to."""
    fails(INVALID, lambda: peer.begin(**fields), "within the tokens")


def test_a_fidelity_beyond_exact_is_refused(peer: Peer) -> None:
    """Or quantized values could pass for better than raw."""
    fails(INVALID, lambda: peer.begin(restored_tokens=100, restored_fidelity=(1 << 64) - 1), "fidelity")


def test_restored_tokens_of_no_fidelity_are_refused(peer: Peer) -> None:
    """Not said, it would pass for first-hand."""
    fails(INVALID, lambda: peer.begin(restored_tokens=100), "restored_fidelity")


def test_wanted_tokens_that_were_not_captured_are_a_reason(peer: Peer) -> None:
    """The worker believed them held; now it knows better."""
    reply = peer.begin(captured_from=50)
    assert (reply.upload_id, reply.reason, reply.held_tokens) == ("", Reason.NOT_CAPTURED, 0)


def test_tokens_that_are_not_eight_bytes_each_are_refused_by_every_verb(peer: Peer) -> None:
    """Cut off in the middle of an id."""
    namespace, tokens = identity(), FRESH[:-3]
    fails(INVALID, lambda: peer.begin(tokens=tokens), "8 bytes")
    fails(INVALID, lambda: peer.kvstore.Match(pb.MatchRequest(namespace=namespace, tokens=tokens)), "8 bytes")
    fails(INVALID, lambda: peer.kvstore.Fetch(pb.FetchRequest(namespace=namespace, tokens=tokens)), "8 bytes")


def test_no_tokens_cannot_be_stored_and_are_a_reasoned_miss(peer: Peer) -> None:
    """Nor one token: there must be one left to feed."""
    fails(INVALID, lambda: peer.begin(tokens=b""), "no tokens")
    for tokens in (b"", pack_tokens([0])):
        match = peer.kvstore.Match(pb.MatchRequest(namespace=identity(), tokens=tokens))
        (reply,) = peer.kvstore.Fetch(pb.FetchRequest(namespace=identity(), tokens=tokens))
        assert (match.n_tokens, match.reason) == (0, Reason.BELOW_THRESHOLD)
        assert (reply.plan.n_tokens, reply.plan.reason) == (0, Reason.BELOW_THRESHOLD)


def test_misses_are_replies_with_a_reason(peer: Peer) -> None:
    """Never errors: an unknown model, and a known one that never saw these tokens."""
    for namespace, reason in ((identity(weights=b"unheard of"), Reason.IDENTITY), (identity(), Reason.UNKNOWN_PREFIX)):
        match = peer.kvstore.Match(pb.MatchRequest(namespace=namespace, tokens=FRESH))
        (reply,) = peer.kvstore.Fetch(pb.FetchRequest(namespace=namespace, tokens=FRESH))
        assert (match.n_tokens, match.reason) == (0, reason)
        assert (reply.plan.n_tokens, reply.plan.reason) == (0, reason)


def test_more_tokens_than_the_limit_are_refused(peer: Peer) -> None:
    """The configured one; they would still fit in a message."""
    fails(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: peer.begin(tokens=bytes(8 * 100_001)), "tokens_max")


def test_a_message_over_the_limit_is_refused(peer: Peer) -> None:
    """By gRPC itself, before it is held in memory."""
    fails(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: peer.begin(tokens=bytes(2 * MESSAGE_BYTES_MAX)))
    reply = peer.begin()
    fails(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: peer.upload(reply.upload_id, [2 * MESSAGE_BYTES_MAX]))
    peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))


def test_an_unknown_profile_is_refused_with_the_known_ones(peer: Peer) -> None:
    """And nothing of it is taken for a path or a format."""
    fails(INVALID, lambda: peer.begin(profile="zstd"), "unknown profile 'zstd'", "affine")
    fails(INVALID, lambda: peer.begin(profile="../../etc"), "unknown profile")


# -- uploads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "word"), [([1000], "1000 bytes"), ([FRESH_BYTES, 1], "longer"), ([], "first chunk")])
def test_an_upload_of_the_wrong_size_ends_it(peer: Peer, sizes: list[int], word: str) -> None:
    """Too short, too long, none at all."""
    reply = peer.begin()
    assert reply.upload_bytes == FRESH_BYTES
    fails(INVALID, lambda: peer.upload(reply.upload_id, sizes), word)
    if sizes:
        fails(NOT_FOUND, lambda: peer.commit(reply.upload_id))
    else:
        peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))


@pytest.mark.parametrize("size", [0, FRESH_BYTES - 1, FRESH_BYTES + 1])
def test_bytes_of_the_wrong_size_over_the_upload_socket_are_not_committed(
    peer: Peer, daemon: DaemonProcess, size: int
) -> None:
    """Whether the commit comes before the daemon sees it or after; then the upload is gone."""
    reply = peer.begin(transport=pb.TRANSPORT_PATH)
    assert reply.by_socket
    intake.send(daemon.listen, reply.upload_id, bytes(size))
    word = f"{size} bytes, {FRESH_BYTES} were" if size < FRESH_BYTES else f"longer than the {FRESH_BYTES} bytes"
    fails(INVALID, lambda: peer.commit(reply.upload_id), word)
    fails(NOT_FOUND, lambda: peer.commit(reply.upload_id))


@pytest.mark.parametrize("name", ["", "x", "0" * 32, "\0" * 32, "f" * 40, "../../index/data.mdb".ljust(32)])
def test_the_upload_socket_takes_nothing_under_a_name_that_it_did_not_give(
    peer: Peer, daemon: DaemonProcess, name: str
) -> None:
    """The connection is closed, and what comes over it goes nowhere."""
    with intake.connect(daemon.listen, name) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(bytes(0 if len(name) < 32 else 10_000))
        connection.shutdown(socket.SHUT_WR)
        assert not intake.taken(connection)


def test_an_upload_takes_one_source_of_bytes(peer: Peer, daemon: DaemonProcess) -> None:
    """A second connection is closed and a stream refused; neither disturbs the first."""
    reply = peer.begin(transport=pb.TRANSPORT_PATH)
    with intake.connect(daemon.listen, reply.upload_id) as first:
        assert intake.taken(first)
        with intake.connect(daemon.listen, reply.upload_id) as second:
            intake.taken(second)
            assert second.recv(1) == b""
        fails(INVALID, lambda: peer.upload(reply.upload_id, [10]), "takes no bytes")
        first.sendall(bytes(FRESH_BYTES))
        first.shutdown(socket.SHUT_WR)
        assert first.recv(1) == b"\1"
    peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))


def test_an_upload_cancelled_halfway_leaves_nothing(peer: Peer, daemon: DaemonProcess) -> None:
    """The worker went away; so does its upload, at once."""
    reply = peer.begin(tokens=pack_tokens(range(10_000, 10_600)))
    called = threading.Event()  # gRPC asks for chunks before it hands out the call

    def half() -> Iterator[pb.UploadChunk]:
        yield pb.UploadChunk(upload_id=reply.upload_id, data=bytes(300 * LAYOUT.token_bytes))
        wait_until(lambda: len(daemon.unfinished()) == 1)  # its first block
        called.wait(60)
        call.cancel()
        wait_until(lambda: not daemon.left_over())

    call = peer.kvstore.Upload.future(half())
    called.set()
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    wait_until(lambda: not daemon.left_over())
    fails(NOT_FOUND, lambda: peer.commit(reply.upload_id))


def test_an_abort_ends_an_upload_once(peer: Peer, daemon: DaemonProcess) -> None:
    """And takes along what was written of it."""
    reply = peer.begin()
    assert daemon.uploads() == 1
    peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))
    assert not daemon.left_over()
    fails(NOT_FOUND, lambda: peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id)), "no such upload")
    fails(NOT_FOUND, lambda: peer.upload(reply.upload_id, [FRESH_BYTES]), "no such upload")


def test_an_upload_that_never_was_is_not_found(peer: Peer) -> None:
    """By any verb that takes an id, however odd."""
    for upload_id in ("", "x", "../../index/data.mdb"):
        fails(NOT_FOUND, lambda upload_id=upload_id: peer.commit(upload_id), "no such upload")
        abort = pb.AbortStoreRequest(upload_id=upload_id)
        fails(NOT_FOUND, lambda abort=abort: peer.kvstore.AbortStore(abort), "no such upload")
    fails(NOT_FOUND, lambda: peer.upload("x", [10]), "no such upload")
    fails(INVALID, lambda: peer.kvstore.Upload(iter(())), "first chunk")


def test_more_uploads_than_the_limit_are_refused_until_one_ends(peer: Peer, daemon: DaemonProcess) -> None:
    """Each holds memory, a thread and a descriptor once its bytes come."""
    begun = [peer.begin(tokens=pack_tokens(range(at, at + 40))) for at in (10_000, 20_000, 30_000)]
    fails(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: peer.begin(), "3 uploads")
    assert daemon.uploads() == 3
    for reply in begun:
        peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=reply.upload_id))
    peer.kvstore.AbortStore(pb.AbortStoreRequest(upload_id=peer.begin().upload_id))


def test_scales_that_are_not_finite_are_refused(client: Client, peer: Peer, daemon: DaemonProcess) -> None:
    """Of KV that the engine keeps quantized itself; the rows would come back as NaN."""
    part = PartSpec(1, 64, "F16", 8, 64)
    layout = Layout((LayerSpec(part, part),))
    message = namespace_to_message(make_namespace(layout, "quantized"))
    for transport in (pb.TRANSPORT_PATH, pb.TRANSPORT_STREAM):
        reply = peer.begin(namespace=message, layout=layout.record, transport=transport)
        data = bytearray(reply.upload_bytes)
        scales = 100 * 64
        data[scales : scales + 2] = b"\x00\x7c"  # infinity
        if reply.by_socket:
            intake.send(daemon.listen, reply.upload_id, bytes(data))
        else:
            peer.kvstore.Upload(iter([pb.UploadChunk(upload_id=reply.upload_id, data=bytes(data))]))
        fails(INVALID, lambda reply=reply: peer.commit(reply.upload_id), "non-finite scales")
    assert message.alias not in [row["alias"] for row in client.stats()["namespaces"]]


def test_a_commit_of_what_was_never_sent_stores_nothing(peer: Peer, daemon: DaemonProcess) -> None:
    """Whichever way it was to come. The upload is over by then: who begins again need not wait for it."""
    for transport in (pb.TRANSPORT_PATH, pb.TRANSPORT_STREAM):
        reply = peer.begin(transport=transport)
        fails(INVALID, lambda reply=reply: peer.commit(reply.upload_id), "0 bytes")
        assert not daemon.left_over()


# -- admin -------------------------------------------------------------------------------------------------------------


def test_an_eviction_that_selects_nothing_is_refused(peer: Peer) -> None:
    """All must be said."""
    fails(INVALID, lambda: peer.admin.Evict(pb.EvictRequest()), "say what")


@pytest.mark.parametrize("key", [b"", b"k", b"k" * 31, b"k" * 600])
def test_a_key_of_the_wrong_length_is_refused_or_matches_nothing(peer: Peer, key: bytes) -> None:
    """The index has limits of its own, which are nobody's business."""
    fails(INVALID, lambda: peer.kvstore.Report(pb.ReportRequest(key=key)), "32 bytes")
    if key:
        assert not peer.admin.Show(pb.ShowRequest(key_prefix=key)).blocks
        assert not peer.admin.List(pb.ListRequest(namespace_prefix=key)).blocks
        assert not peer.admin.Evict(pb.EvictRequest(key_prefix=key)).blocks
        assert not peer.admin.Evict(pb.EvictRequest(namespace_prefix=key)).blocks


def test_a_report_about_a_sound_block_quarantines_nothing(peer: Peer, client: Client) -> None:
    """The daemon looks for itself."""
    for block in client.list(NAMESPACE.root)["blocks"]:
        key = bytes.fromhex(block["key"])
        assert not peer.kvstore.Report(pb.ReportRequest(key=key, detail="lies")).quarantined


# -- by the client -----------------------------------------------------------------------------------------------------


def test_the_client_refuses_more_kv_than_tokens(session: Session) -> None:
    """An offset beyond the tokens; layers that disagree."""
    layers = make_layers(LAYOUT, HELD)
    assert session.store(HELD[:-1], layers, wait=True).reason is Reason.OFFSET_MISMATCH
    uneven = [layers[0], KVLayer(layers[1].spec, layers[1].keys, layers[1].values, 100)]
    assert session.store(HELD, uneven, wait=True).reason is Reason.OFFSET_MISMATCH


def test_the_client_refuses_a_batch_and_wrong_shapes_and_dtypes(session: Session) -> None:
    """One sequence, of exactly the layout's heads, width and dtype."""
    tokens = list(range(7000, 7040))
    (first, second) = make_layers(LAYOUT, tokens)
    for keys in (
        mx.concatenate([first.keys[0]] * 2, axis=0),
        mx.concatenate([first.keys[0]] * 2, axis=1),
        first.keys[0][..., :32],
        first.keys[0][:, :, :39],
        first.keys[0].astype(mx.float32),
        first.keys[0][0],
    ):
        mx.eval(keys)
        bad = [KVLayer(first.spec, (keys,), first.values, len(tokens)), second]
        assert session.store(tokens, bad, wait=True).reason is Reason.INVALID
    missing = [KVLayer(first.spec, (), first.values, len(tokens)), second]
    assert session.store(tokens, missing, wait=True).reason is Reason.INVALID
    assert session.store(tokens, [first], wait=True).reason is Reason.INVALID
    assert session.flush(60)


def test_the_capture_of_an_mlx_lm_cache_refuses_a_batch_and_unknown_classes() -> None:
    """Nothing is guessed about them."""
    from mlx_lm.models.cache import KVCache

    class Odd:
        """No cache of mlx-lm."""

    batch = KVCache()
    batch.update_and_fetch(mx.zeros((2, 1, 8, 64)), mx.zeros((2, 1, 8, 64)))
    for cache in ([batch], [Odd()]):
        with pytest.raises(InvalidRequestError):
            integration.capture(cache)


def test_the_client_answers_hopeless_tokens_with_a_reason(session: Session) -> None:
    """Empty, a single one, not integers, too large for 64 bits."""
    assert session.fetch([]).reason is Reason.BELOW_THRESHOLD
    assert session.fetch([5]).reason is Reason.BELOW_THRESHOLD
    assert session.match([]).reason is Reason.BELOW_THRESHOLD
    for tokens in ([1.5, 2.5], ["a", "b"], [1 << 63, 0], b"odd"):
        assert session.fetch(tokens).reason is Reason.INVALID
        assert session.store(tokens, make_layers(LAYOUT, HELD[:2]), wait=True).reason is Reason.INVALID
    assert not session.store([], make_layers(LAYOUT, []), wait=True).durable


# -- a daemon of their own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[(1 << 63) - 1] * 40, [-(1 << 63), -1, 0, 1 << 62] * 10, [1 << 32] * 300])
def test_token_ids_at_the_ends_of_64_bits_are_stored_and_found(tmp_path: Path, tokens: list[int]) -> None:
    """Vision placeholders are negative and exceed 32 bits."""
    with (
        DaemonProcess(tmp_path / "data", profile="raw") as daemon,
        connect(config=small_config(daemon.listen)) as client,
    ):
        session = client.session(NAMESPACE, **SLOW)
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == len(tokens)
        hit = session.fetch([*tokens, 0])
        assert hit.n_tokens == len(tokens)
        assert_rows(hit.layers, LAYOUT, tokens)
        assert session.fetch([*tokens[:7], 12345, 6]).n_tokens == 7


def test_one_token_is_stored_and_found(tmp_path: Path) -> None:
    """Where the configuration does not ask for more."""
    with (
        DaemonProcess(tmp_path / "data", profile="raw") as daemon,
        connect(config=small_config(daemon.listen)) as client,
    ):
        session = client.session(NAMESPACE, **SLOW)
        assert session.store([9], make_layers(LAYOUT, [9]), wait=True).stored_tokens == 1
        hit = session.fetch([9, 1])
        assert hit.n_tokens == 1
        assert_rows(hit.layers, LAYOUT, [9])


def test_uploads_that_nothing_arrives_for_are_given_up(tmp_path: Path) -> None:
    """By socket and by stream, begun, sent or neither; one that a commit comes for in time is not."""
    with (
        DaemonProcess(tmp_path / "data", profile="raw", limits={"upload_idle_s": 12}) as daemon,
        connect(daemon.listen) as client,
    ):
        peer = Peer(daemon)
        used = client.stats()["disk"]["used_bytes"]
        begun = [
            peer.begin(tokens=pack_tokens(range(at, at + 100)), transport=transport)
            for at, transport in ((1000, pb.TRANSPORT_PATH), (2000, pb.TRANSPORT_STREAM), (3000, pb.TRANSPORT_PATH))
        ]
        silent = intake.connect(daemon.listen, begun[0].upload_id)
        assert intake.taken(silent)
        silent.sendall(bytes(100))
        assert client.stats()["disk"]["used_bytes"] <= used + 3 * 4096  # room is made as bytes arrive
        peer.upload(begun[1].upload_id, [begun[1].upload_bytes])
        wait_until(lambda: client.stats()["disk"]["used_bytes"] > used)
        wait_until(lambda: daemon.uploads() == 3 and len(daemon.unfinished()) == 1)
        wait_until(lambda: not daemon.left_over())
        silent.close()
        assert client.stats()["disk"]["used_bytes"] <= used + 3 * 4096  # pages of the index, which never shrinks
        for reply in begun[1:]:
            fails(LATE, lambda reply=reply: peer.commit(reply.upload_id), "nothing arrived for 12 s")
        reply = peer.begin()
        peer.upload(reply.upload_id, [reply.upload_bytes])
        assert peer.commit(reply.upload_id).stored_tokens == 100
        peer.channel.close()
